"""Tars that are cut, damaged or joined are refused with the byte, and never read in part."""

import io
import json
import subprocess
import tarfile
from pathlib import Path

import pytest
from records import pre_tokenize_command, square

from lumina_mgpt.data.archive import Archive
from lumina_mgpt.errors import InputError

BLOCK = tarfile.BLOCKSIZE


def member(name: str, data: bytes = b"", **values) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in values.items():
        setattr(info, key, value)
    return info, data


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], form: int = tarfile.GNU_FORMAT) -> bytes:
    """Writes a tar and returns its bytes."""
    with tarfile.open(path, "w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path.read_bytes()


def three_samples(path: Path, form: int = tarfile.GNU_FORMAT) -> bytes:
    """A tar of three pictures with captions; the last name is too long for a plain header."""
    long = "folder/" + "n" * 120
    members = [pair for n in range(2) for pair in (member(f"{n}.png", square()), member(f"{n}.txt", b"a red square"))]
    return write_tar(path, members + [member(f"{long}.png", square()), member(f"{long}.txt", b"red")], form)


def rows_of(path: Path, data: bytes) -> list[dict] | None:
    """Rows of a tar with this content; None if it is refused."""
    path.write_bytes(data)
    try:
        return Archive(path).rows
    except InputError:
        return None


FORMS = pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])


@FORMS
def test_a_cut_tar_is_refused(tmp_path, form):
    """Bug: it gave fewer records, with exit status 0."""
    whole = three_samples(tmp_path / "whole.tar", form)
    rows = rows_of(tmp_path / "a.tar", whole)
    end = len(whole.rstrip(b"\0"))
    end += -end % BLOCK
    assert len(rows) == 3 and not any(isinstance(row, InputError) for row in rows)
    for size in [size + more for size in range(0, end + 2 * BLOCK, BLOCK) for more in (0, 1, 257, 511)]:
        # After the two blocks that end the archive there is only padding, which is optional.
        expected = rows if size >= end + 2 * BLOCK else None
        assert rows_of(tmp_path / "a.tar", whole[:size]) == expected, size
    for size in (0, 1, BLOCK, end - 1, end + 1):
        (tmp_path / "a.tar").write_bytes(whole[:size])
        with pytest.raises(InputError, match=r"a\.tar cannot be read as a tar.* byte \d+"):
            Archive(tmp_path / "a.tar")


@FORMS
def test_a_damaged_header_is_refused(tmp_path, form):
    """Flips one bit in bytes of every header. Bug: a damaged header was read as the end of the tar."""
    whole = three_samples(tmp_path / "whole.tar", form)
    rows, path = rows_of(tmp_path / "a.tar", whole), tmp_path / "a.tar"
    with tarfile.open(tmp_path / "whole.tar") as tar:
        headers = {info.offset_data - BLOCK for info in tar} | {info.offset for info in tar}
    assert len(headers) == 8  # two of them hold a long name
    for n, at in enumerate(sorted(headers)):
        for byte in range(at, at + BLOCK, 1 if n in (1, 4) else 17):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << byte % 8
            assert rows_of(path, bytes(damaged)) in (None, rows), byte


def test_a_damaged_header_stops_the_command(tiny_checkpoint, tmp_path, capsys):
    whole = bytearray(three_samples(tmp_path / "a.tar"))
    with tarfile.open(tmp_path / "a.tar") as tar:
        at = tar.getmembers()[2].offset
    whole[at + 20] ^= 1
    (tmp_path / "a.tar").write_bytes(whole)
    assert pre_tokenize_command(tmp_path / "a.tar", tmp_path / "out", tiny_checkpoint) == 2
    assert f"a.tar cannot be read as a tar: the header at byte {at} is damaged" in capsys.readouterr().err


def test_joined_tars_are_refused(tiny_checkpoint, tmp_path, capsys):
    """As from `cat a.tar b.tar`. Bug: the second was ignored, with exit status 0."""
    whole = three_samples(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(whole + whole)
    assert pre_tokenize_command(tmp_path / "a.tar", tmp_path / "out", tiny_checkpoint) == 2
    assert f"data follow at byte {len(whole)}" in capsys.readouterr().err


def test_a_damaged_size_is_refused(tmp_path):
    """The headers have a correct checksum, and a size that is negative or larger than the file."""
    whole = three_samples(tmp_path / "whole.tar")
    for size in (b"\xff" * 12, b"\x80" + b"\x00" * 3 + b"\x7f" * 8, b"77777777777\0"):
        for at in (0, 2 * BLOCK):
            header = bytearray(whole[at : at + BLOCK])
            header[124:136], header[148:156] = size, b" " * 8
            header[148:156] = b"%06o\0 " % sum(header)
            assert rows_of(tmp_path / "a.tar", whole[:at] + bytes(header) + whole[at + BLOCK :]) is None


def test_zero_padding_and_the_system_tar_are_read(tmp_path):
    """Covers `tar -c` in three formats, long names, and zeros after the end."""
    folder = tmp_path / ("long" * 20) / ("name" * 10)
    folder.mkdir(parents=True)
    for n in range(2):
        (folder / f"{n}.png").write_bytes(square())
        (folder / f"{n}.txt").write_text("a red square")
    for form in ("gnu", "pax", "ustar"):
        subprocess.run(
            ["tar", f"--format={form}", "-cf", tmp_path / "a.tar", "-C", tmp_path, folder.parent.name], check=True
        )
        rows = Archive(tmp_path / "a.tar").rows
        assert [row["prompt"] for row in rows] == ["a red square"] * 2
        assert rows_of(tmp_path / "a.tar", (tmp_path / "a.tar").read_bytes() + bytes(3_000_001)) == rows


def test_ambiguous_samples_are_listed(tiny_checkpoint, tmp_path):
    """Covers duplicate names, links, captions that are not text, and references to other samples."""
    talk = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}]
    members = [
        member("0.jpg", square("navy", "JPEG")),
        member("0.txt", b"first"),
        member("0.jpg", square("orange", "JPEG")),
        member("./0.txt", b"second"),
        member("1.jpg", type=tarfile.SYMTYPE, linkname="0.jpg"),
        member("1.txt", b"a link"),
        member("2.jpg", square()),
        member("2.json", b'{"caption": null}'),
        member("3.jpg", square()),
        member("3.json", b"[" * 20_000),
        member("4.jpg", square()),
        member("4.json", b'{"caption": ' + b"1" * 5_000 + b"}"),
        member("5.jpg", square()),
        member("5.txt", "café".encode("utf-16")),
        member("6.jpg", square()),
        member("6.json", json.dumps({"conversations": talk, "image": "9.jpg"}).encode()),
        member("7.jpg", square()),
        member("7.png", square()),
        member("7.txt", b"either"),
        member("8.txt", b"no picture"),
        member("9.jpg", square()),
        member("._a.jpg", b"fork"),
    ]
    reasons = [
        "0.jpg is there twice",
        "1.jpg is a link to 0.jpg",
        "2.json: caption must be a text, got NoneType",
        "3.json is nested too deeply",
        "4.json is not JSON",
        "5.txt must be UTF-8 text, got UTF-16",
        "6.json: image must name pictures of its sample, 6.jpg, got '9.jpg'",
        "one caption for jpg and png",
        "8 has no picture",
        "9 has no caption",
    ]
    write_tar(tmp_path / "a.tar", members)
    assert pre_tokenize_command(tmp_path / "a.tar", tmp_path / "out", tiny_checkpoint) == 0
    bad = [json.loads(line) for line in (tmp_path / "out" / "0-of-1-bad.jsonl").read_text().splitlines()]
    assert [item["id"] for item in bad] == list(range(10))
    for item, reason in zip(bad, reasons, strict=True):
        assert reason in item["reason"]


def test_the_plain_extension_is_the_picture(tmp_path):
    """Bugs: 0.depth.png, first in the tar, was the picture; a byte order mark became part of the caption.

    Bug: in a conversation without `image`, 4.depth.png was put before the first text.
    """
    talk = [{"from": "human", "value": "draw <|image|>"}, {"from": "gpt", "value": "<|image|>"}]
    plain_talk = [{"from": "human", "value": "what is this?"}, {"from": "gpt", "value": "a square"}]
    members = [
        member("0.depth.png", square("black")),
        member("0.png", square()),
        member("0.txt", b"\xef\xbb\xbfred\r\nsky"),
        member("1.depth.png", square()),
        member("1.json", b'\xef\xbb\xbf{"caption": "only one"}'),
        member("a/2.x.png", square()),
        member("a/2.y.png", square()),
        member("a/2.json", json.dumps({"conversations": talk, "image": ["2.y.png", "elsewhere/2.x.png"]}).encode()),
        member("/b/3.jfif", square("red", "JPEG")),
        member("/b/3.txt", b"absolute"),
        member("4.depth.png", square("black")),
        member("4.png", square()),
        member("4.json", json.dumps({"conversations": plain_talk}).encode()),
        member("5.x.png", square()),
        member("5.y.png", square()),
        member("5.json", json.dumps({"conversations": talk}).encode()),
    ]
    write_tar(tmp_path / "a.tar", members)
    archive = Archive(tmp_path / "a.tar")
    assert archive.rows == [
        {"prompt": "red\nsky", "image_path": f"{tmp_path}/a.tar/0.png"},
        {"prompt": "only one", "image_path": f"{tmp_path}/a.tar/1.depth.png"},
        {"conversations": talk, "image": [f"{tmp_path}/a.tar/a/2.y.png", f"{tmp_path}/a.tar/a/2.x.png"]},
        {"prompt": "absolute", "image_path": f"{tmp_path}/a.tar/b/3.jfif"},
        {"conversations": plain_talk, "image": [f"{tmp_path}/a.tar/4.png"]},
        {"conversations": talk, "image": [f"{tmp_path}/a.tar/5.x.png", f"{tmp_path}/a.tar/5.y.png"]},
    ]
    assert archive.open(Path(archive.rows[0]["image_path"])).read() == square()
