"""Opening pictures, crops and pixels against the released code's files."""

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
def test_a_crop_always_has_the_size_asked_for(size, target):
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
    """A dark 16-bit picture must not come out bright: the scale is that of the format, not that of the content."""
    Image.fromarray(np.full((4, 4), level, np.uint16)).save(tmp_path / "deep.png")
    assert open_image(tmp_path / "deep.png").getpixel((1, 1)) == (round(level / 65535 * 255),) * 3


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "HSV", "LAB", "F"])
def test_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / "image.tiff"
    image = Image.new("RGB", (4, 4), "white").convert(mode) if mode != "LAB" else Image.new("LAB", (4, 4))
    try:
        image.save(path)
    except OSError:
        pytest.skip(f"no file format holds {mode}")
    opened = open_image(path)
    assert opened.mode == "RGB"
    if mode != "LAB":
        assert min(opened.getpixel((0, 0))) >= 254


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4), "white")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def test_what_is_no_picture_is_refused_by_name(tmp_path):
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


def test_pixels_and_back_are_exact():
    image = Image.fromarray(np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3))
    pixels = to_pixels([image, image])
    assert pixels.shape == (2, 3, 16, 16) and pixels.min() == -1 and pixels.max() == 1
    assert all(np.array_equal(np.asarray(out), np.asarray(image)) for out in to_images(pixels))
    assert to_images(torch.full((1, 3, 1, 1), 9.0))[0].getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("target", [0, -32, 100])
def test_target_size_must_be_a_multiple_of_32(target):
    with pytest.raises(InputError, match="--target_size"):
        candidate_sizes(target)
