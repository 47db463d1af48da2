"""The box that a model draws into a picture is found by its difference to the picture."""

import numpy as np
import pytest
from PIL import Image, ImageDraw

from lumina_mgpt.boxes import find_box


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """Random colors, 160 x 120."""
    pixels = np.random.default_rng(0).integers(0, 256, (120, 160, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def noisy(image: Image.Image, deviation: float = 12) -> Image.Image:
    noise = np.random.default_rng(1).normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("width", [1, 3, 6])
@pytest.mark.parametrize("box", [(20, 30, 100, 90), (0, 0, 159, 119), (70, 5, 90, 25)])
@pytest.mark.parametrize("color", ["red", "white"])
def test_a_box_is_found_in_noise(photo, box, width, color):
    image = photo.copy()
    ImageDraw.Draw(image).rectangle(box, outline=color, width=width)
    left, top, right, bottom = find_box(noisy(image), photo)
    assert np.abs(np.subtract((left, top, right - 1, bottom - 1), box)).max() <= max(1, width // 2 + 1)


def test_thick_lines_around_all_of_a_small_picture_are_found(photo):
    """They change a third of its pixels."""
    picture = photo.crop((0, 0, 96, 96))
    image = picture.copy()
    ImageDraw.Draw(image).rectangle((4, 4, 91, 91), outline="magenta", width=10)
    left, top, right, bottom = find_box(noisy(image), picture)
    assert np.abs(np.subtract((left, top, right - 1, bottom - 1), (4, 4, 91, 91))).max() <= 10


def test_the_larger_of_two_boxes_counts(photo):
    image = photo.copy()
    for box in ((10, 10, 40, 40), (50, 20, 150, 100)):
        ImageDraw.Draw(image).rectangle(box, outline="red", width=3)
    assert find_box(image, photo) == pytest.approx((50, 20, 151, 101), abs=1)


@pytest.mark.parametrize("squares", [6, 12, 24])
def test_another_image_has_no_box(squares):
    """Where much differs, some rectangle has changed sides by chance."""

    def smooth(seed: int) -> Image.Image:
        colors = np.random.default_rng(seed).integers(0, 256, (squares, squares, 3), dtype=np.uint8)
        return Image.fromarray(colors).resize((192, 192), Image.Resampling.BICUBIC)

    for seed in range(4):
        assert find_box(smooth(seed), smooth(seed + 100)) is None


def test_half_of_all_pixels_changed_is_no_box():
    black = np.zeros((96, 96, 3), np.uint8)
    specks = np.where(np.random.default_rng(0).random((96, 96, 1)) < 0.5, 255, black).astype(np.uint8)
    assert find_box(Image.fromarray(specks), Image.fromarray(black)) is None


@pytest.mark.parametrize("dash, found", [(4, False), (8, True)])
def test_sides_may_have_gaps_but_no_large_ones(dash, found):
    """Sides of dashes: 4 or 8 of 10 pixels."""
    black = np.zeros((120, 160, 3), np.uint8)
    drawn, on = black.copy(), np.arange(160) % 10 < dash
    for row in (20, 99):
        drawn[row, 20:140][on[20:140]] = 255
    for column in (20, 139):
        drawn[20:100, column][on[20:100]] = 255
    assert (find_box(Image.fromarray(drawn), Image.fromarray(black)) is not None) == found


def test_no_box(photo):
    assert find_box(photo, photo) is None and find_box(noisy(photo), photo) is None
    line, disc = photo.copy(), photo.copy()
    ImageDraw.Draw(line).line((0, 0, 159, 119), fill="red", width=4)
    ImageDraw.Draw(disc).ellipse((30, 20, 110, 100), fill="red")
    other = Image.fromarray(np.random.default_rng(2).integers(0, 256, (120, 160, 3), dtype=np.uint8))
    for image in (line, disc, other):
        assert find_box(image, photo) is None
    with pytest.raises(ValueError, match="one size"):
        find_box(photo, photo.crop((0, 0, 64, 64)))
