"""Folders of pictures: every picture with a caption is read, or listed with the reason why not."""

import io
import json
import os
from pathlib import Path

import pytest
from commands import main_of
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from records import pre_tokenize_command, square

from lumina_mgpt.data.folder import read_folder
from lumina_mgpt.errors import InputError


def tokenized(in_filename: Path, out: Path, checkpoint: Path) -> tuple[list[int], dict[int, str]]:
    """Numbers of the tokenized records, and the reasons for the others."""
    assert pre_tokenize_command(in_filename, out, checkpoint) == 0
    good, bad = (
        [json.loads(line) for line in (out / f"0-of-1-{kind}.jsonl").read_text().splitlines()]
        for kind in ("record", "bad")
    )
    return [row["id"] for row in good], {row["id"]: row["reason"] for row in bad}


def saved(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(buffer, form)
    return buffer.getvalue()


def test_every_format_of_pillow_is_read(tiny_checkpoint, tmp_path):
    """Bug: three of ten were read, with the message `0 left out`."""
    forms = {
        "jfif": "JPEG",
        "jpe": "JPEG",
        "JPEG": "JPEG",
        "bmp": "BMP",
        "gif": "GIF",
        "tif": "TIFF",
        "ppm": "PPM",
        "tga": "TGA",
        "ico": "ICO",
        "png": "PNG",
    }
    for n, (kind, form) in enumerate(forms.items()):
        (tmp_path / "in" / f"{n}").mkdir(parents=True)
        (tmp_path / "in" / f"{n}" / f"a.{kind}").write_bytes(saved(form))
        (tmp_path / "in" / f"{n}" / "a.txt").write_text("red")
    assert tokenized(tmp_path / "in", tmp_path / "out", tiny_checkpoint) == (list(range(10)), {})


def test_unreadable_pictures_and_captions_are_listed(tiny_checkpoint, tmp_path, capsys):
    """Covers formats that are not read, captions without a picture, macOS metadata, broken links and pipes."""
    for name in ("a.png", "b.heic", "c.eps", "d.pdf"):
        (tmp_path / name).write_bytes(square())
        (tmp_path / name).with_suffix(".txt").write_text("red")
    (tmp_path / "._a.png").write_bytes(b"fork")
    (tmp_path / "alone.txt").write_text("red")
    (tmp_path / "data.npz").write_bytes(b"not a picture, no caption")
    (tmp_path / "e.png").symlink_to(tmp_path / "nowhere")
    (tmp_path / "f.png").write_bytes(square())
    os.mkfifo(tmp_path / "f.txt")
    good, bad = tokenized(tmp_path, tmp_path / "out", tiny_checkpoint)
    said = capsys.readouterr()
    assert good == [0] and len(bad) == 6 and "6 left out" in said.out
    assert "begin with ._ (macOS metadata): 1" in said.err
    reasons = [
        "e.png cannot be read (No such file",
        "f.txt is not a regular file",
        "alone.txt is a caption without",
        "b.heic has a caption, but no picture format",
        "c.eps has a caption",
        "d.pdf has a caption",
    ]
    for reason, part in zip(bad.values(), reasons, strict=True):
        assert part in reason


def test_linked_folders_are_read_once(tmp_path):
    """Also with links in a circle. Bug: pictures in linked folders were left out without a message."""
    for folder in ("in/z", "elsewhere/below"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "a.png").write_bytes(square())
        (tmp_path / folder / "a.txt").write_text(folder)
    (tmp_path / "in" / "b").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "c").symlink_to(tmp_path / "elsewhere" / "below")
    (tmp_path / "in" / "d").symlink_to(tmp_path / "in" / "z")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "in")
    assert read_folder(tmp_path / "in") == [
        {"image_path": f"{tmp_path}/in/b/below/a.png", "prompt": "elsewhere/below"},
        {"image_path": f"{tmp_path}/in/z/a.png", "prompt": "in/z"},
    ]


def test_encodings_of_captions(tmp_path):
    """Bugs: a byte order mark became part of the caption, `.TXT` was not found, other encodings gave no reason."""
    captions = {
        "a.txt": b"\xef\xbb\xbfa caf\xc3\xa9\r\n",
        "b.TXT": b"one\r\ntwo",
        "c.txt": "café".encode("utf-16"),
        "d.txt": "café".encode("cp1252"),
        "e.txt": b"\r\n",
        "f.txt": "cat".encode("utf-16-le"),
    }
    for name, text in captions.items():
        (tmp_path / name).write_bytes(text)
        (tmp_path / name).with_suffix(".png").write_bytes(square())
    first, second, *others = read_folder(tmp_path)
    assert (first["prompt"], second["prompt"]) == ("a café", "one\ntwo")
    expected = [
        "c.txt must be UTF-8 text, got UTF-16",
        "d.txt must be UTF-8 text, got another encoding, perhaps Windows-1252",
        "e.txt is empty",
        "f.txt must be UTF-8 text, got a zero byte",
    ]
    for row, part in zip(others, expected, strict=True):
        assert isinstance(row, InputError) and part in str(row)


def test_prompts_are_read_from_generated_pictures_only(tmp_path):
    """Bug: the JSON graph that ComfyUI writes as the PNG text `prompt` was used as a caption."""
    for name, software in (("comfy", None), ("other", "Photos 1.0"), ("own", "lumina_mgpt 2.0")):
        info = PngInfo()
        info.add_itxt("prompt", "a cow")
        if software:
            info.add_itxt("software", software)
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png", pnginfo=info)
    comfy, other, own = read_folder(tmp_path)
    assert own == {"image_path": f"{tmp_path}/own.png", "prompt": "a cow"}
    for row in (comfy, other):
        assert isinstance(row, InputError) and "has no caption" in str(row)


def test_one_caption_describes_one_picture(tmp_path):
    """Refuses cat.jpg and cat.png with one cat.txt, and cat.png with both cat.txt and cat.TXT."""
    for name in ("cat.jpg", "cat.png", "dog.png", "cow.png", "cow.depth.png"):
        (tmp_path / name).write_bytes(square())
    for name in ("cat.txt", "dog.txt", "dog.TXT", "cow.txt"):
        (tmp_path / name).write_text("an animal")
    jpg, png, depth, cow, dog = read_folder(tmp_path)
    for row, part in (
        (jpg, "cat.txt may describe any of"),
        (png, "cat.txt may describe any of"),
        (depth, "cow.depth.png has no caption"),
        (dog, "has the captions"),
    ):
        assert isinstance(row, InputError) and part in str(row)
    assert cow["image_path"] == f"{tmp_path}/cow.png"


def test_a_folder_may_end_in_tar(tmp_path, tiny_checkpoint):
    folder = tmp_path / "photos.tar"
    folder.mkdir()
    (folder / "a.png").write_bytes(square())
    (folder / "a.txt").write_text("red")
    assert tokenized(folder, tmp_path / "out", tiny_checkpoint) == ([0], {})


@pytest.mark.parametrize(
    "options, parts",
    [
        (["--rank", "-1"], "--rank"),
        (["--splits", "0"], "--splits must be at least 1, got 0"),
        (["--splits", str(10**30)], "none for this rank"),
        (["--target_size", str(32 * 10**9)], "--target_size"),
        (["--out_dir", "a.png/out"], "--out_dir"),
    ],
)
def test_invalid_options_are_refused(tiny_checkpoint, tmp_path, capsys, monkeypatch, options, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(square())
    (tmp_path / "a.txt").write_text("red")
    line = ["--in_filename", ".", "--out_dir", "out", "--model_path", str(tiny_checkpoint), "--target_size", "64"]
    assert main_of("pre_tokenize")([*line, *options]) == 2
    assert parts in capsys.readouterr().err.splitlines()[-1]


def test_a_seed_may_have_any_number_of_digits(tiny_checkpoint, tmp_path):
    (tmp_path / "a.png").write_bytes(square())
    (tmp_path / "a.txt").write_text("red")
    line = ["--in_filename", str(tmp_path), "--out_dir", str(tmp_path / "out"), "--model_path", str(tiny_checkpoint)]
    for _ in range(2):  # made, and continued
        assert main_of("pre_tokenize")([*line, "--target_size", "64", "--seed", "9" * 23]) == 0
