"""Opening, cropping and conversion of images, against files of the released code."""

import json
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_image, to_images, to_pixels


@pytest.mark.parametrize("target", ["64", "128", "512", "768"])
def test_candidate_sizes_equal_the_released_ones(oracle_dir, target):
    listed = json.loads((oracle_dir / "crops.json").read_text())["crop_size_list"][target]
    assert candidate_sizes(int(target)) == [tuple(size) for size in listed]


@pytest.mark.parametrize("name, target", [("100x90", 128), ("300x200", 64)])
def test_crop_to_the_best_size_equals_the_released_one(oracle_dir, name, target):
    width, height = name.split("x")
    image = open_image(oracle_dir / f"img_w{width}_h{height}.png")
    golden = Image.open(oracle_dir / f"crop_var_{name}_target{target}.png")
    size = best_size(image.size, candidate_sizes(target))
    assert size == golden.size
    assert np.array_equal(np.asarray(center_crop(image, size)), np.asarray(golden))


def test_crop_to_a_given_size_equals_the_released_one(oracle_dir):
    cropped = center_crop(open_image(oracle_dir / "img_w100_h90.png"), (64, 64))
    assert np.array_equal(np.asarray(cropped), np.asarray(Image.open(oracle_dir / "crop_center_100x90_to_64x64.png")))


@pytest.mark.parametrize("size", [(33, 47), (7, 500), (1000, 31), (64, 64), (1, 1)])
@pytest.mark.parametrize("target", [(64, 64), (32, 96)])
def test_crop_has_the_requested_size(size, target):
    assert center_crop(Image.new("RGB", size, "red"), target).size == target


def test_transparency_is_laid_over_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 0, 255])
    palette.save(tmp_path / "palette.png", transparency=1)
    assert open_image(tmp_path / "palette.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (4, 4), (0, 128)).save(tmp_path / "la.png")
    assert open_image(tmp_path / "la.png").getpixel((0, 0)) == (127, 127, 127)


@pytest.mark.parametrize("level", [0, 200, 20000, 65535])
def test_sixteen_bits_are_scaled(tmp_path, level):
    """By the range of the format and not of the content, so that a dark picture stays dark."""
    Image.fromarray(np.full((4, 4), level, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((1, 1)) == (round(level / 65535 * 255),) * 3


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "LAB", "F"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff"
    image = Image.new("RGB", (4, 4), "white")
    image = Image.new("LAB", (4, 4), (255, 128, 128)) if mode == "LAB" else image.convert(mode)
    image.save(path, compression="tiff_lzw" if mode == "YCbCr" else None)  # Pillow 12 does not read its raw YCbCr
    opened = open_image(path)
    assert opened.mode == "RGB" and min(opened.getpixel((0, 0))) >= 254


@pytest.mark.parametrize(
    "orientation, corner",
    [(1, (0, 0)), (2, (7, 0)), (3, (7, 3)), (4, (0, 3)), (5, (0, 0)), (6, (3, 0)), (7, (3, 7)), (8, (0, 7))],
)
def test_exif_rotation_is_applied(tmp_path, orientation, corner):
    """The first pixel of the first row is in the corner that the EXIF standard defines."""
    image = Image.new("RGB", (8, 4), "white")
    image.putpixel((0, 0), (255, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    opened = open_image(tmp_path / "turned.png")
    assert opened.size == ((8, 4) if orientation < 5 else (4, 8))
    assert [at for at in np.ndindex(opened.size) if opened.getpixel(at) == (255, 0, 0)] == [corner]


@pytest.mark.parametrize(
    "block", [b"", b"II*\0", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08\0\x09" + b"\xff" * 20, b"no exif"]
)
def test_damaged_exif_block_is_ignored(tmp_path, block):
    path = tmp_path / "cut.png"
    Image.new("RGB", (8, 4), "red").save(path)
    content, header = path.read_bytes(), 8 + 25  # signature and IHDR
    path.write_bytes(content[:header] + _png_chunk(b"eXIf", block) + content[header:])
    assert open_image(path).size == (8, 4)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_files_that_are_not_pictures_are_refused(tmp_path):
    text = tmp_path / "text.png"
    text.write_text("no picture")
    truncated = tmp_path / "truncated.png"
    Image.effect_noise((64, 64), 50).save(truncated)
    truncated.write_bytes(truncated.read_bytes()[:-600])
    bomb = tmp_path / "bomb.png"
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunks = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(b"\0" * 100))
    bomb.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    for path in (text, truncated, bomb, tmp_path / "missing.png", tmp_path):
        with pytest.raises(InputError, match=path.name):
            open_image(path)


def test_pixel_round_trip_is_exact():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    pixels = to_pixels([image, image])
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert all(np.array_equal(np.asarray(out), np.asarray(image)) for out in to_images(pixels))
    assert to_images(torch.full((1, 3, 1, 1), 9.0))[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("target", [0, -32, 100])
def test_target_size_must_be_a_multiple_of_32(target):
    with pytest.raises(InputError, match="^target_size must be"):
        candidate_sizes(target)
