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


def test_the_larger_of_two_boxes_counts(photo):
    image = photo.copy()
    for box in ((10, 10, 40, 40), (50, 20, 150, 100)):
        ImageDraw.Draw(image).rectangle(box, outline="red", width=3)
    assert find_box(image, photo) == pytest.approx((50, 20, 151, 101), abs=1)


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
