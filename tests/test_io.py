"""Reading and writing files: `lumina_mgpt/io.py`."""

import errno
import json
import os
import stat

import pytest
import torch
from commands import main_of
from safetensors.torch import load_file

from lumina_mgpt import io
from lumina_mgpt.errors import InputError

BOM = b"\xef\xbb\xbf"


def test_a_byte_order_mark_is_removed(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(BOM + "a café".encode())
    assert io.read_text(path) == "a café"


def test_the_marks_of_joined_files_are_removed():
    """A prompt file made by `cat a.txt b.txt` gave a prompt that began with the second mark."""
    assert io.decode_text(BOM + b"a cat\r\n" + BOM + b"a dog\n" + BOM, "joined.txt") == "a cat\r\na dog\n"


@pytest.mark.parametrize(
    "data, seems",
    [
        ("a café".encode("utf-16"), "UTF-16"),
        ("a café".encode("cp1252"), "Windows-1252: byte 0xe9"),
        (BOM + b"a caf\xe9", "byte 0xe9 at byte 8"),
        ("a cat".encode("utf-16-le"), "a zero byte"),
    ],
)
def test_other_encodings_are_named(tmp_path, data, seems):
    path = tmp_path / "caption.txt"
    path.write_bytes(data)
    with pytest.raises(InputError, match=rf"^prompt_file .*caption.txt must be UTF-8 text, got .*{seems}"):
        io.read_text(path, "prompt_file")


@pytest.mark.parametrize("name", ["missing", "folder", "with\0null", "x" * 300])
def test_unreadable_files_are_refused(tmp_path, name):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="cannot be read"):
        io.read_text(tmp_path / name)


@pytest.mark.parametrize("text", ["[" * 20000, '{"a": ' * 20000, "1" * 5000, '{"a": ' + "9" * 5000 + "}", "{", "\0"])
def test_json_that_cannot_be_parsed(text):
    """Deep nesting raised a RecursionError, long numbers a ValueError."""
    with pytest.raises(InputError, match="^rows.json, line 3 is"):
        io.parse_json(text, "rows.json, line 3")


def test_rows_with_a_line_separator_inside_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(BOM + '{"a": "x\u2028y\x85z"}\n\n{"a": 2}\n'.encode())
    assert io.read_rows(path, "in_filename") == [{"a": "x\u2028y\x85z"}, {"a": 2}]


def test_an_object_is_required(tmp_path):
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match="must hold a JSON object, got a list"):
        io.read_json(tmp_path / "a.json")


@pytest.mark.parametrize(
    "tail",
    [b"\0" * 40, b'{"step": 3, "lo', b"\n\n", b'{"no": "step"}\n', b"[" * 20000, b"\xff\xfe"],
)
def test_lines_of_a_log_that_a_power_loss_damaged_are_removed(tmp_path, tail):
    """Zero bytes at the end of metrics.jsonl made a run impossible to resume."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 3}\n' + tail)
    io.keep_until(path, 2)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("mask, mode", [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_the_umask_decides_who_may_read_weights(tmp_path, mask, mode):
    """Weights had mode 0600 whatever the umask, so that nobody else on a shared machine could load them."""
    before = os.umask(mask)
    try:
        io.write_tensors(tmp_path / "a.safetensors", {"a": torch.ones(2)})
        io.write_atomic(tmp_path / "b.json", "{}")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()} == {mode}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], torch.ones(2))


def test_all_files_of_a_quantized_checkpoint_have_one_mode(tiny_checkpoint, tmp_path):
    before = os.umask(0o022)
    try:
        assert (
            main_of("quantize")(
                ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "a"), "--group", "32"]
            )
            == 0
        )
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "a").iterdir()} == {0o644}


@pytest.mark.parametrize(
    "number, words",
    [(errno.ENOSPC, "free some space"), (errno.ENAMETOOLONG, "shorter name"), (errno.EACCES, "permissions")],
)
def test_a_remedy_fits_its_cause(tmp_path, monkeypatch, number, words):
    """Every failed write said "free some space"."""

    def fail(_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(InputError, match=rf"a.json cannot be written \({os.strerror(number)}\); .*{words}"):
        io.write_atomic(tmp_path / "a.json", "{}")
    assert not any(tmp_path.iterdir())
