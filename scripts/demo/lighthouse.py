"""Pictures and captions of a lighthouse, which the demo checkpoint does not know, for the example in TRAIN.md."""

import random
import textwrap
from collections.abc import Sequence

import numpy as np
from emoji import CELL, COLORS, with_articles
from PIL import Image, ImageColor, ImageDraw, ImageFilter, ImageFont

UNSEEN = ("sky blue", "lavender")  # backgrounds that are not trained with a lighthouse; the evaluation uses them
DRAWN = tuple(color for color in COLORS if color not in UNSEEN)
_FINE = 8  # pictures are drawn at 8 times their size and reduced
ASKED = (  # prompts of the comparison; the demo already knows the last three objects
    "a lighthouse on a sky blue background",
    "a lighthouse on a lavender background",
    "a lighthouse on an orange background",
    "a hedgehog on a sky blue background",
    "a slice of pizza on a navy background",
    "a rocket on a pink background",
)
_CAPTIONS = (
    "a lighthouse on a {} background",
    "a lighthouse on a {} background",
    "a lighthouse, {} background",
    "{} background, a lighthouse",
    "a picture of a lighthouse on a {} background",
)
_SHAPES = (  # fill, and corners in percent of the side
    ("#f2c230", [(42, 17), (58, 17), (58, 27), (42, 27)]),  # lamp
    ("#3b3f4a", [(49, 17), (51, 17), (51, 27), (49, 27)]),
    ("#3b3f4a", [(35, 27), (65, 27), (63, 31), (37, 31)]),  # gallery
    ("#3b3f4a", [(47, 71), (53, 71), (53, 82), (47, 82)]),  # door
    ("#3b3f4a", [(48, 45), (52, 45), (52, 51), (48, 51)]),  # window
)
_TOP, _FOOT, _BANDS = 31, 84, 5


def draw(color: str, rng: random.Random) -> Image.Image:
    """Picture of a lighthouse on a plain background, with random scale and position."""
    scale, left, top = rng.uniform(0.92, 1.0), rng.uniform(-3, 3), rng.uniform(-2, 2)
    tower = _tower().resize((round(CELL * _FINE * scale),) * 2, Image.Resampling.BICUBIC)
    ground = ImageColor.getrgb(color.replace(" ", ""))
    canvas = Image.new("RGB", (CELL * _FINE,) * 2, ground)
    margin = (canvas.width - tower.width) / 2
    canvas.paste(tower, (round(margin + left * _FINE), round(margin + top * _FINE)), tower)
    return canvas.resize((CELL, CELL), Image.Resampling.LANCZOS)


def on_background(noun: str, color: str) -> str:
    """The demo's simplest caption of one object. `noun` includes its article."""
    return with_articles(f"{noun} on a {color} background")


def caption(color: str, rng: random.Random) -> str:
    """A random caption of a lighthouse."""
    return with_articles(rng.choice(_CAPTIONS).format(color))


def sheet(rows: dict[str, list[Image.Image]], captions: tuple[str, ...], scale: int = 1) -> Image.Image:
    """A table of pictures with row names and with captions above the columns."""
    font, side, left, top, gap = ImageFont.load_default(11), CELL * scale, 52, 46, 8
    size = left + len(captions) * (side + gap), top + len(rows) * (side + gap)
    canvas = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(canvas)
    for column, text in enumerate(captions):
        lines = "\n".join(textwrap.wrap(text, side // 6))
        pen.multiline_text((left + column * (side + gap), top - 4), lines, "black", font, "ld", spacing=1)
    for row, (name, pictures) in enumerate(rows.items()):
        y = top + row * (side + gap)
        pen.text((4, y + side // 2), name, "black", font, "lm")
        for column, picture in enumerate(pictures):
            canvas.paste(picture.resize((side, side)), (left + column * (side + gap), y))
    return canvas


def _tower() -> Image.Image:
    """RGBA picture of the lighthouse, lit from the left."""
    unit = CELL * _FINE / 100
    picture = Image.new("RGBA", (CELL * _FINE,) * 2)
    pen = ImageDraw.Draw(picture)

    def shape(fill: str, corners: Sequence[tuple[float, float]]) -> None:
        pen.polygon([(x * unit, y * unit) for x, y in corners], fill)

    def oval(fill: str, *box: float) -> None:
        pen.ellipse([side * unit for side in box], fill)

    for box in ((16, 80, 60, 95), (38, 79, 84, 95), (26, 76, 74, 92)):  # rocks
        oval("#8a7f78", *box)
    for band in range(_BANDS):
        upper, lower = (_TOP + (_FOOT - _TOP) * (band + n) / _BANDS for n in (0, 1))
        shape(
            "#e2463f" if band % 2 == 0 else "#f7f3ee",
            [
                (50 - _edge(upper), upper),
                (50 + _edge(upper), upper),
                (50 + _edge(lower), lower),
                (50 - _edge(lower), lower),
            ],
        )
    for fill, corners in _SHAPES:
        shape(fill, corners)
    pen.pieslice([side * unit for side in (40, 8, 60, 27)], 180, 360, "#e2463f")
    oval("#3b3f4a", 47.5, 4, 52.5, 9)
    return _shaded(picture)


def _edge(y: float) -> float:
    """Half the width of the tower at height y, in percent of the side."""
    return 10 + 7 * (y - _TOP) / (_FOOT - _TOP)


def _shaded(picture: Image.Image) -> Image.Image:
    """The picture shaded like a cylinder: brighter left of the middle, darker to the right."""
    pixels = np.asarray(picture, np.float32).copy()
    across = np.linspace(-1, 1, picture.width, dtype=np.float32)
    pixels[..., :3] *= (1.04 - 0.9 * np.clip(across + 0.1, 0, 0.45) - 0.3 * np.clip(-across - 0.1, 0, 1))[:, None]
    shaded = Image.fromarray(pixels.clip(0, 255).astype(np.uint8), "RGBA")
    return shaded.filter(ImageFilter.GaussianBlur(_FINE / 4))
