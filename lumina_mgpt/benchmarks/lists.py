"""Reads the official prompt lists of the benchmarks. Every error names the file and the line."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, lines_of, parse_json, read_text, remedy

PARAMETER = "prompts"  # parameter that names the list, for errors
_NAME_BYTES = 255  # of a file name on the usual file systems
_GENEVAL_KEYS = {"tag", "include", "exclude", "prompt"}
_GENEVAL_OBJECT_KEYS = {"class", "count", "color", "position"}
_PARTI_COLUMNS = ("Prompt", "Category", "Challenge", "Note")


@dataclass(frozen=True)
class Item:
    """One prompt of a list.

    Attributes:
        index: position in the list, from 0.
        prompt: text of the prompt.
        name: name of the item: its id, row number or prompt, as the layout needs it.
        line: the whole line of the list, verbatim, where the scorer reads it.
        fields: further values of the row.
    """

    index: int
    prompt: str
    name: str
    line: str = ""
    fields: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class PromptList:
    """A list of prompts, and the SHA-256 of its content."""

    items: tuple[Item, ...]
    sha256: str


def read_list(path: str | Path, read: Callable[[Path], list[Item]]) -> PromptList:
    """Returns the prompts of a list.

    Args:
        path: the official file, or folder of files.
        read: reader of the benchmark, one of the functions below.

    Raises:
        InputError: the list cannot be read, is malformed or has no prompt.
    """
    path = Path(path)
    try:
        items = read(path)
        digest = _sha256(path)
    except OSError as error:
        at = error.filename or path
        raise InputError(f"{at} cannot be read ({cause(error)}); {remedy(error)}", PARAMETER) from None
    if not items:
        raise InputError(f"{path} must hold at least one prompt, got none; give the official list", PARAMETER)
    return PromptList(tuple(items), digest)


def read_geneval(path: Path) -> list[Item]:
    """Reads `evaluation_metadata.jsonl` of GenEval: one JSON object a line, with `tag`, `include` and `prompt`.

    Source: https://github.com/djghosh13/geneval, prompts/evaluation_metadata.jsonl.
    """
    items: list[Item] = []
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        row = parse_json(line, where, PARAMETER)
        if not isinstance(row, dict):
            raise _wrong(where, f"must be a JSON object, got a {type(row).__name__}")
        unknown = sorted(row.keys() - _GENEVAL_KEYS)
        if unknown:
            raise _wrong(where, f"must have only the keys {', '.join(sorted(_GENEVAL_KEYS))}, got {unknown[0]!r}")
        if not isinstance(row.get("tag"), str):
            raise _wrong(where, f"must have a text as its tag, got {row.get('tag')!r}")
        for name, objects in (("include", row.get("include")), ("exclude", row.get("exclude", []))):
            if not isinstance(objects, list) or not all(map(_is_object, objects)):
                rule = f"must have a list as its {name}, each part with a class, a count of at least 1"
                raise _wrong(where, f"{rule}, and no other keys than color and position")
        prompt = _prompt(row.get("prompt"), where)
        items.append(Item(len(items), prompt, f"{len(items):05d}", line))
    return items


def read_dpg(path: Path) -> list[Item]:
    """Reads the folder of DPG-Bench: a text file for each item, whose stem is the item's id.

    Source: https://github.com/TencentQQGYLab/ELLA, dpg_bench/prompts.
    """
    if not path.is_dir():
        raise InputError(f"must be the folder of DPG's text files, got {path}; give dpg_bench/prompts", PARAMETER)
    items: list[Item] = []
    for file in sorted(path.glob("*.txt")):
        if "." in file.stem:  # the scorer cuts the name at the first dot
            raise _wrong(str(file), "must have a name without further dots, which the scorer cuts")
        items.append(Item(len(items), _prompt(read_text(file, PARAMETER), str(file)), file.stem))
    return items


def read_compbench(path: Path) -> list[Item]:
    """Reads a list of T2I-CompBench: one prompt a line. Of a line with tabs, the prompt is the first part.

    Prompts become file names, from which the scorers read them again, up to the first underscore. A prompt that this
    would change is refused. The official code fails at a slash and scores the wrong text at an underscore.

    Source: https://github.com/Karine-Huang/T2I-CompBench, GORS_finetune/inference_eval.py and BLIPvqa_eval/BLIP_vqa.py.
    """
    items: list[Item] = []
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        prompt = _prompt(line.split("\t")[0], where)
        for bad in "/\\_":
            if bad in prompt:
                raise _wrong(where, f"must have no {bad!r}, as the prompt becomes a file name that the scorers read")
        if len(prompt.encode()) > _NAME_BYTES - len("_000000.png"):
            raise _wrong(where, f"must fit a file name, got {len(prompt.encode())} bytes of at most 244")
        items.append(Item(len(items), prompt, prompt))
    return items


def read_parti(path: Path) -> list[Item]:
    """Reads `PartiPrompts.tsv`: a header, then rows of prompt, category, challenge and note.

    The file has no quoting: a quotation mark is part of a prompt.

    Source: https://github.com/google-research/parti, PartiPrompts.tsv.
    """
    items: list[Item] = []
    header = False
    for number, line in _lines(path):
        where, cells = f"{path}, line {number}", line.split("\t")
        if not header:
            if tuple(cells) != _PARTI_COLUMNS:
                raise _wrong(where, f"must be the header {', '.join(_PARTI_COLUMNS)}, separated by tabs")
            header = True
            continue
        if len(cells) != len(_PARTI_COLUMNS):
            raise _wrong(where, f"must have {len(_PARTI_COLUMNS)} columns separated by tabs, got {len(cells)}")
        row = dict(zip(_PARTI_COLUMNS, cells, strict=True))
        prompt = _prompt(row.pop("Prompt"), where)
        items.append(Item(len(items), prompt, f"{len(items):05d}", fields=row))
    return items


def _lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not blank, with their numbers from 1."""
    if path.is_dir():
        raise InputError(f"must be a file, got the folder {path}; give the list in it", PARAMETER)
    return [(number, line) for number, line in enumerate(lines_of(read_text(path, PARAMETER)), 1) if line.strip()]


def _is_object(part: object) -> bool:
    if not isinstance(part, dict) or part.keys() - _GENEVAL_OBJECT_KEYS:
        return False
    return isinstance(part.get("class"), str) and type(part.get("count")) is int and part["count"] >= 1


def _prompt(value: object, where: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _wrong(where, f"must have a prompt, got {value!r}")
    return value.strip()


def _wrong(where: str, rule: str) -> InputError:
    return InputError(f"{where} {rule}; correct it, or fetch the list again", PARAMETER)


def _sha256(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of the text files of a folder."""
    if not path.is_dir():
        return hashlib.sha256(path.read_bytes()).hexdigest()
    digest = hashlib.sha256()
    for file in sorted(path.glob("*.txt")):
        content = hashlib.sha256(file.read_bytes()).hexdigest()
        digest.update(f"{content}  {file.name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
