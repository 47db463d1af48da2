"""Official lists: what is read, and the one-line error for each way to be malformed."""

import json
from pathlib import Path

import pytest

from lumina_mgpt.benchmarks import BENCHMARKS
from lumina_mgpt.benchmarks.lists import read_list
from lumina_mgpt.errors import InputError

GOOD = {"tag": "two_object", "include": [{"class": "cow", "count": 1}], "prompt": "a photo of a cow"}


def read(name: str, path: Path):
    return read_list(path, BENCHMARKS[name].read)


def geneval(path: Path, *rows: object) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_geneval_keeps_lines_verbatim(tmp_path):
    odd = '{"prompt":"a  cow", "tag" : "counting","include":[{"class":"cow","count":2}], "exclude": []}'
    found = read("geneval", geneval(tmp_path / "g.jsonl", GOOD, "", odd))
    assert [item.line for item in found.items] == [json.dumps(GOOD), odd]
    assert [(item.name, item.prompt) for item in found.items] == [("00000", "a photo of a cow"), ("00001", "a  cow")]


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("{", "is not JSON"),
        ("[1]", "must be a JSON object, got a list"),
        (GOOD | {"prompt": " "}, "must have a prompt"),
        (GOOD | {"prompt": 3}, "must have a prompt"),
        (GOOD | {"tag": None}, "must have a text as its tag"),
        (GOOD | {"include": [{"class": "cow"}]}, "must have a list as its include"),
        (GOOD | {"include": [{"class": "cow", "count": -1}]}, "a count of at least 1"),
        (GOOD | {"include": [{"class": "cow", "count": 1, "colour": "red"}]}, "no other keys"),
        (GOOD | {"exclude": 3}, "must have a list as its exclude"),
        (GOOD | {"promt": "x"}, "got 'promt'"),
    ],
)
def test_malformed_lines_of_geneval(tmp_path, row, part):
    path = geneval(tmp_path / "g.jsonl", GOOD, row)
    with pytest.raises(InputError, match="line 2") as error:
        read("geneval", path)
    assert part in str(error.value) and str(path) in str(error.value) and "\n" not in str(error.value)


def test_dpg_takes_ids_from_file_names(tmp_path):
    (tmp_path / "b1.txt").write_text("two cats\n")
    (tmp_path / "a.txt").write_text("\ufeffone cat")
    (tmp_path / "README.md").write_text("not a prompt")
    found = read("dpg", tmp_path)
    assert [(item.name, item.prompt) for item in found.items] == [("a", "one cat"), ("b1", "two cats")]
    digest = found.sha256
    (tmp_path / "a.txt").write_text("one dog")
    assert read("dpg", tmp_path).sha256 != digest


@pytest.mark.parametrize(
    ("name", "content"), [("a.b.txt", b"x"), ("empty.txt", b" \n"), ("wide.txt", "x".encode("utf-16"))]
)
def test_malformed_files_of_dpg(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read("dpg", tmp_path)


def test_compbench_takes_the_first_column(tmp_path):
    path = tmp_path / "color.txt"
    path.write_text("a red cow\tcolor\r\na blue cat, in rain\n")
    assert [item.prompt for item in read("compbench", path).items] == ["a red cow", "a blue cat, in rain"]


@pytest.mark.parametrize("prompt", ["a cat/dog", "a back\\slash", "an under_score", "x" * 245, "é" * 123])
def test_compbench_refuses_prompts_that_are_no_file_names(tmp_path, prompt):
    path = tmp_path / "color.txt"
    path.write_text(f"a cow\n{prompt}\n")
    with pytest.raises(InputError, match="line 2"):
        read("compbench", path)


def test_parti_keeps_quotation_marks(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text('Prompt\tCategory\tChallenge\tNote\n"Hi" on a sign\tWorld\tBasic\t\nb\tc\td\te\n')
    first, second = read("parti", path).items
    assert (first.prompt, first.fields["Note"], second.name) == ('"Hi" on a sign', "", "00001")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a\tb\tc\td\n", "line 1 must be the header"),
        ("Prompt\tCategory\tChallenge\tNote\na\tb\n", "line 2 must have 4"),
    ],
)
def test_malformed_tables_of_parti(tmp_path, text, part):
    path = tmp_path / "p.tsv"
    path.write_text(text)
    with pytest.raises(InputError, match=part):
        read("parti", path)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_what_is_no_list(tmp_path, name):
    """A missing path, an empty list, and a folder for a file or a file for a folder."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text("")
    for path in (tmp_path / "none", tmp_path / "empty", tmp_path / "empty.txt"):
        with pytest.raises(InputError) as error:
            read(name, path)
        assert str(error.value).startswith("prompts ") and str(path) in str(error.value)
