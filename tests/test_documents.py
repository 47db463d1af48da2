"""Links, anchors, files and commands of the documents."""

import argparse
import re
from functools import cache
from pathlib import Path

import pytest
from commands import main_of, module_of
from documents import DOCUMENTS, GUIDE, ROOT, commands, mentions, prose

from lumina_mgpt import cli
from lumina_mgpt.cli.main import COMMANDS

RELEASED = {
    "generate_single_prompt_with_image": "generate_with_image",
    "concat_record": "concat_records",
    "train": "finetune",
}
WITHOUT_PARSER = {
    "scripts/sample.sh",
    "scripts/sample_i2i.sh",
    "scripts/demo/train.sh",
    "scripts/demo/train_more.sh",
    "scripts/demo/tokens.sh",
    "scripts/train_progressive.sh",
}


def _relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub makes of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _parser(words: list[str], monkeypatch) -> tuple[argparse.ArgumentParser, list[str]] | None:
    """The parser of a command in a document, and its options; None where a shell script has none."""
    if words[0] == "lumina-mgpt":
        if words[1] not in COMMANDS:
            assert words[1] in ("COMMAND", "--help", "--version"), words
            return None
        name, options = COMMANDS[words[1]][0], words[2:]
    else:
        at = next(index for index, word in enumerate(words) if word.endswith((".py", ".sh")))
        assert (ROOT / words[at]).is_file(), words
        if words[at] in WITHOUT_PARSER:
            return None
        stem = Path(words[at]).stem
        name, options = RELEASED.get(stem, stem), words[at + 1 :]
    if hasattr(module_of(name), "build_parser"):
        return module_of(name).build_parser(), options
    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(cli, "run", lambda work, parser, argv, **_: parsers.append(parser) or 0)
    main_of(name)([])
    return parsers[0], options


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1200


def test_every_document_is_checked():
    assert len(DOCUMENTS) >= 14 and len(GUIDE) == 1 + len(list((ROOT / "docs").iterdir()))
    assert len([words for path in GUIDE for words in commands(path.read_text(encoding="utf-8"))]) >= 25


@pytest.mark.parametrize("path", DOCUMENTS, ids=_relative)
def test_links_and_anchors_resolve(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(path.read_text(encoding="utf-8"))):
        if re.match(r"\w+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{link} does not exist"
        assert not anchor or anchor in _anchors(target), f"{link} is not a heading of {target.name}"


@cache
def _paths() -> list[str]:
    """Files and folders of the project, each with a leading slash."""
    folders = [folder for folder in ROOT.iterdir() if folder.is_dir() and not folder.name.startswith(".")]
    files = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    return [f"/{_relative(path)}" for path in (*files, *ROOT.glob("*.*"))]


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if p.name != "CHANGELOG.md"], ids=_relative)
def test_files_exist(path):
    """Files that the text names, by their path from the root or from the package; the changelog names old ones."""
    names = re.findall(
        r"`([\w./-]+\.(?:py|sh|cpp|yaml)|(?:lumina_mgpt|scripts|tests|configs)/[\w/-]+)`",
        path.read_text(encoding="utf-8"),
    )
    missing = {name for name in names if not any(path.endswith(f"/{name.rstrip('/')}") for path in _paths())}
    assert not missing, missing


@pytest.mark.parametrize("path", DOCUMENTS, ids=_relative)
def test_commands_parse(path, monkeypatch):
    for words in commands(path.read_text(encoding="utf-8")):
        if (found := _parser(words, monkeypatch)) is not None:
            parser, options = found
            parser.parse_args(options)


@pytest.mark.parametrize("path", DOCUMENTS, ids=_relative)
def test_mentioned_options_exist(path, monkeypatch):
    for words in mentions(path.read_text(encoding="utf-8")):
        if (found := _parser(words, monkeypatch)) is not None:
            parser, options = found
            known = {option for action in parser._actions for option in action.option_strings}
            assert {option for option in options if option.startswith("--")} <= known, words
