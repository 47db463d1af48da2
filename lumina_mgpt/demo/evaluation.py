"""What the demo checkpoint's pictures are judged by: the nearest of all emoji in pixels, and the nearest colour."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from lumina_mgpt.demo.emoji import CELL
from lumina_mgpt.demo.scenes import COLORS, Scene, background

_BORDER = 4  # pixels: emoji leave the rim of their cell free, or nearly so


@dataclass(frozen=True)
class Share:
    """How many of `count` were right."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def error(self) -> float:
        """Standard error of the share, after one right and one wrong more, so that 300 of 300 is not certain."""
        p = (self.right + 1) / (self.count + 2)
        return math.sqrt(p * (1 - p) / self.count)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


def cells(image: Image.Image, scene: Scene) -> list[np.ndarray]:
    """The square of each object in a picture of `scene.size`, (CELL, CELL, 3) in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return [pixels[top : top + CELL, left : left + CELL] for left, top in scene.offsets]


def nearest_emoji(cell: np.ndarray, color: str, pictures: dict[str, np.ndarray]) -> str:
    """The emoji that, on that background, differs least from the cell in mean squared error of pixels."""
    names = list(pictures)
    stack = np.stack([pictures[name] for name in names])
    alpha = stack[..., 3:]
    on_color = stack[..., :3] * alpha + background(color) * (1 - alpha)
    return names[int(((on_color - cell) ** 2).mean((1, 2, 3)).argmin())]


def nearest_color(image: Image.Image) -> str:
    """The name of the background: of COLORS, the nearest to the median pixel of the rim."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    rim = np.ones(pixels.shape[:2], bool)
    rim[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    median = np.median(pixels[rim], axis=0)
    return min(COLORS, key=lambda color: float(((background(color) - median) ** 2).sum()))


def contact_sheet(images: list[Image.Image], captions: list[str], columns: int) -> Image.Image:
    """Pictures in a grid with their captions below, white ground."""
    font = ImageFont.load_default(10)
    width, height = max(i.width for i in images) + 12, max(i.height for i in images) + 42
    rows = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, top = n % columns * width + 6, n // columns * height + 6
        sheet.paste(image, (left, top))
        for line, text in enumerate(_wrapped(caption, draw, font, width - 8, lines=3)):
            draw.text((left, top + image.height + 2 + 11 * line), text, fill="black", font=font)
    return sheet


def _wrapped(text: str, draw: ImageDraw.ImageDraw, font, width: int, lines: int) -> list[str]:
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if draw.textlength(longer, font) <= width or not out[-1]:
            out[-1] = longer
        else:
            out.append(word)
    return out[:lines]
