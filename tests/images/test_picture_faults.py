"""Damaged and thin pictures, limits, all modes and formats, and the memory of crops."""

import io
import json
import os
import random
import stat
import struct
import zlib

import numpy as np
import PIL
import pytest
from commands import main_of
from pictures import MODES, every_file, in_mode
from PIL import Image

from lumina_mgpt import maps
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import center_crop, crop_panel, open_image, picture_formats, picture_suffixes, to_rgb


def damaged_avif() -> bytes:
    """A file with an intact header and damaged data, for which libavif raises RuntimeError."""
    file = io.BytesIO()
    in_mode("RGB", (64, 64)).save(file, "AVIF")
    data = file.getvalue()
    start = data.index(b"mdat") + 4
    return data[:start] + b"\xff" * (len(data) - start)


def damaged_blp() -> bytes:
    """A file with an unknown compression, for which Pillow raises NotImplementedError."""
    file = io.BytesIO()
    in_mode("P", (64, 64)).save(file, "BLP")
    return file.getvalue()[:8] + b"\x09" + file.getvalue()[9:]


DAMAGED = {"a.avif": damaged_avif, "b.blp": damaged_blp}


# -- what decoders raise -----------------------------------------------------------------------------------------------


def test_pre_tokenization_continues_after_bad_pictures(tiny_checkpoint, tmp_path):
    """A damaged AVIF (RuntimeError) or BLP (NotImplementedError) stopped it, and a thin picture filled the memory."""
    in_mode("RGB", (64, 64)).save(tmp_path / "good.png")
    Image.new("RGB", (1, 30000)).save(tmp_path / "thin.png")
    for name, make in DAMAGED.items():
        (tmp_path / name).write_bytes(make())
    names = ["good.png", "thin.png", *DAMAGED]
    rows = [{"image_path": str(tmp_path / name), "prompt": "a cat"} for name in names]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {
        "in_filename": tmp_path / "in.jsonl",
        "out_dir": tmp_path / "out",
        "model_path": tiny_checkpoint,
        "target_size": 64,
    }
    assert main_of("pre_tokenize")([str(text) for item in options.items() for text in (f"--{item[0]}", item[1])]) == 0
    lines = (tmp_path / "out" / "0-of-1-bad.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in lines]
    assert len(reasons) == 3
    for name, reason in zip(names[1:], reasons, strict=True):
        assert str(tmp_path / name) in reason
    assert "at most 16 times as long as wide, got 1x30000" in reasons[0]


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize(
    "command, options",
    [
        ("reconstruct", ["{}"]),
        ("generate", ["--task", "i2i", "--i2i_task", "depth", "--image_path", "{}", "--prompt", "a cat"]),
        ("edit", ["--image_path", "{}", "--instruction", "make it red"]),
    ],
)
def test_commands_refuse_damaged_pictures(tiny_checkpoint, tmp_path, capsys, name, command, options):
    """Commands with a picture argument printed a traceback."""
    path = tmp_path / name
    path.write_bytes(DAMAGED[name]())
    folders = ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")]
    assert main_of(command)([option.format(path) for option in options] + folders) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and str(path) in error


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("of a decoder"), RecursionError(), KeyError("tag")])
def test_every_exception_of_a_decoder_names_the_file(tmp_path, monkeypatch, error):
    path = tmp_path / "a.png"
    in_mode("RGB").save(path)

    def load(image):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(InputError, match=f"{path.name} cannot be read as a picture"):
        open_image(path)


def test_keyboard_interrupt_in_a_decoder_is_raised(tmp_path, monkeypatch):
    in_mode("RGB").save(tmp_path / "a.png")

    def load(image):
        raise KeyboardInterrupt

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    with pytest.raises(KeyboardInterrupt):
        open_image(tmp_path / "a.png")


# -- limits ------------------------------------------------------------------------------------------------------------


def _tiled_tiff(tile: int) -> bytes:
    """A TIFF of 16 x 16 pixels with one tile of `tile` x `tile` pixels."""
    data = zlib.compress(b"\x80" * 4096)
    tags = {256: 16, 257: 16, 258: 8, 259: 8, 262: 1, 277: 1, 322: tile, 323: tile, 324: 0, 325: len(data)}
    tags[324] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


def test_tile_above_the_pixel_limit_is_not_decoded():
    """16 x 16 pixels in one tile of 40,000 x 40,000 took 1.6 GB."""
    assert open_image("a.tif", io.BytesIO(_tiled_tiff(64))).getpixel((0, 0)) == (128, 128, 128)
    with pytest.raises(InputError, match="a.tif: the picture has more than 178956970 pixels"):
        open_image("a.tif", io.BytesIO(_tiled_tiff(40000)))


HEADERS = {"GIF": (6, "<HH"), "BMP": (18, "<ii"), "TGA": (12, "<HH"), "QOI": (4, ">II"), "SGI": (6, ">HH")}


@pytest.mark.parametrize("kind", HEADERS)
@pytest.mark.parametrize("size, rule", [((30000, 30000), "178956970 pixels"), ((30000, 20), "16 times as long")])
def test_limits_are_checked_before_decoding(monkeypatch, kind, size, rule):
    file = io.BytesIO()
    in_mode("RGB").save(file, kind)
    offset, form = HEADERS[kind]
    data = bytearray(file.getvalue())
    struct.pack_into(form, data, offset, *size)

    def load(image):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(InputError, match=rule):
        open_image("large", io.BytesIO(data))


def test_pictures_within_the_limits_are_opened(tmp_path):
    for size in ((20, 20), (1, 1), (320, 20), (20, 320)):
        Image.new("RGB", size).save(tmp_path / "a.png")
        assert open_image(tmp_path / "a.png").size == size


# -- crops -------------------------------------------------------------------------------------------------------------


def _released_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """`var_center_crop` of the released code: scales the whole picture, then crops."""
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    image = image.resize(scaled, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def test_crops_of_random_sizes_equal_the_released_ones():
    rng, noise = random.Random(0), np.random.default_rng(0)
    for _ in range(200):
        width = rng.randint(1, 200)
        height = rng.randint(-(-width // 16), min(200, 16 * width))
        image = Image.fromarray(noise.integers(0, 256, (height, width, 3), dtype=np.uint8))
        target = rng.choice([(64, 64), (32, 128), (128, 32), (96, 64)])
        assert center_crop(image, target).tobytes() == _released_crop(image, target).tobytes(), (image.size, target)


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (7, 1001)])
def test_crop_of_a_thin_picture_shows_the_same_part(size):
    """Above the limit, only the crop is scaled; a smooth picture gives the same pixels up to 1."""
    wave = 127 + 100 * np.sin(np.add.outer(np.arange(size[1]), np.arange(size[0])) / 20)
    image = Image.fromarray(wave.astype(np.uint8)).convert("RGB")
    ours, whole = (np.asarray(crop(image, (32, 48)), int) for crop in (center_crop, _released_crop))
    assert ours.shape == (48, 32, 3) and abs(ours - whole).max() <= 1


def test_thin_picture_is_not_scaled_as_a_whole(monkeypatch):
    """A picture of 1 x 30,000 was scaled to 384 x 11,520,000: 17 GB."""
    resize = Image.Image.resize

    def bounded(image, size, *args, **kwargs):
        assert size[0] * size[1] <= 64 * 384 * 1536, size
        return resize(image, size, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "resize", bounded)
    for size in ((1, 30000), (30000, 1)):
        assert crop_panel(Image.new("RGB", size), (384, 1536)).size == (384, 1536)


# -- formats and modes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("transparency", [None, 0])
def test_every_mode_becomes_rgb(mode, transparency):
    """Premultiplied grey (La), and some modes with a transparent colour, raised ValueError."""
    image = in_mode(mode)
    if transparency is not None:
        image.info["transparency"] = transparency
    assert to_rgb(image).mode == "RGB" and to_rgb(image).size == image.size
    assert maps.canny(image).size == image.size


def test_palette_with_several_transparent_colours_is_over_white():
    image = Image.new("P", (3, 1))
    image.putpalette([0, 0, 0] * 3)
    image.putdata([0, 1, 2])
    image.info["transparency"] = bytes([0, 255, 128])
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [255, 0, 127]


def test_nan_and_infinity_do_not_change_other_pixels():
    """One infinite value made all others black."""
    for first in (np.nan, np.inf):
        image = Image.fromarray(np.array([[first, np.inf, -np.inf, 0.5, 1.0]], np.float32))
        assert np.asarray(to_rgb(image))[0, 1:, 0].tolist() == [255, 0, 128, 255]


def test_grey_of_a_large_picture_is_scaled_in_bands():
    values = np.random.default_rng(0).integers(0, 65536, (3000, 1000), dtype=np.uint16)
    grey = np.asarray(to_rgb(Image.fromarray(values)))[..., 0]
    assert np.array_equal(grey, (values / 65535 * 255).round().astype(np.uint8))


def test_every_format_that_pillow_writes_is_opened():
    files = every_file()
    assert {"AVIF", "BLP", "DDS", "GIF", "ICNS", "JPEG2000", "MPO", "TIFF", "WEBP"} <= {n.split(",")[0] for n in files}
    if PIL.__version__ < "13":  # Pillow 12 does not read the raw YCbCr that it writes
        files.pop("TIFF, YCbCr")
    for name, data in files.items():
        assert open_image(name, io.BytesIO(data)).mode == "RGB", name


def test_first_of_several_frames_is_read():
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG"):
        file = io.BytesIO()
        frames[0].save(file, kind, save_all=True, append_images=frames[1:])
        red, _, blue = open_image(kind, file).getpixel((0, 0))
        assert red > 240 and blue < 15, kind


def test_no_other_program_is_started(tmp_path, monkeypatch):
    """Pillow renders EPS with Ghostscript, which executes the file."""
    marker = tmp_path / "started"
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    for name in ("a.eps", "a.png"):
        in_mode("RGB").save(tmp_path / name, "EPS")
        with pytest.raises(InputError, match=name):
            open_image(tmp_path / name)
    assert not marker.exists()


def test_suffixes_are_those_of_supported_formats():
    assert {".png", ".jpg", ".jpeg", ".jfif", ".jpe", ".webp", ".bmp", ".gif", ".tif", ".avif"} <= picture_suffixes()
    assert not {".eps", ".ps", ".pdf", ".wmf", ".emf", ".mpg", ".h5", ".grib", ".fits", ".txt"} & picture_suffixes()
    assert "EPS" not in picture_formats() and all(s == s.lower() and s[0] == "." for s in picture_suffixes())


def test_pipe_is_refused(tmp_path):
    """A pipe in a record blocked the pre-tokenization forever."""
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(InputError, match="not a regular file"):
        open_image(tmp_path / "a.png")
