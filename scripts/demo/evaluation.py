"""Measures of the demo checkpoint's pictures: the nearest emoji in pixels, the nearest colour, and errors of maps."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
from emoji import CELL, COLORS
from omni import Example, draw_panel
from PIL import Image, ImageDraw, ImageFont
from scenes import OBJECT_COLORS, Scene, background

from lumina_mgpt.maps import canny

_NEAR = 60  # grey value of near pixels; objects in scenes.depth have at least 0.45 · 255
_BORDER = 4  # pixels at the rim of a cell, which show the background


Pictures = dict[str, np.ndarray]


@dataclass(frozen=True)
class Share:
    """The share of `count` pictures that are right."""

    right: int
    count: int

    @property
    def value(self) -> float:
        return self.right / self.count

    @property
    def error(self) -> float:
        """Standard error, with one right and one wrong picture added, so that it is not 0 for 300 of 300."""
        p = (self.right + 1) / (self.count + 2)
        return math.sqrt(p * (1 - p) / self.count)

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ± {100 * self.error:.1f} %"


@dataclass(frozen=True)
class Mean:
    """The mean of numbers and its standard error."""

    values: tuple[float, ...]

    @property
    def value(self) -> float:
        return float(np.mean(self.values))

    @property
    def error(self) -> float:
        return float(np.std(self.values, ddof=1)) / math.sqrt(len(self.values))

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f}"


def summary(values: Sequence[bool | float]) -> Share | Mean:
    """The share of true scores, or the mean of numbers."""
    return Share(int(sum(values)), len(values)) if isinstance(values[0], bool) else Mean(tuple(values))


def cells(image: Image.Image, scene: Scene) -> list[np.ndarray]:
    """The cell of each object in a picture of `scene.size`. Shapes: (CELL, CELL, 3). Ranges: [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    return [pixels[top : top + CELL, left : left + CELL] for left, top in scene.offsets]


class _Stack:
    """All emoji as matrices, to compare a cell with all of them by matrix products.

    Attributes:
        pictures: the emoji by name, as given.
        names: their names, in the order of the matrices.
        premultiplied: colour times opacity, (emoji, pixels · 3).
        opacity: (emoji, pixels).
    """

    def __init__(self, pictures: Pictures) -> None:
        stack = np.stack(list(pictures.values()))
        opacity = stack[..., 3:]
        self.pictures, self.names = pictures, list(pictures)
        self.premultiplied = (stack[..., :3] * opacity).reshape(len(stack), -1)
        self.opacity = opacity.reshape(len(stack), -1)
        self._squares: dict[str, np.ndarray] = {}

    def squares(self, color: str) -> np.ndarray:
        """Sum of the squared differences of each emoji from a background, (emoji,)."""
        if color not in self._squares:
            behind = self.opacity[..., None] * background(color)
            above = self.premultiplied.reshape(behind.shape) - behind
            self._squares[color] = (above**2).sum((1, 2))
        return self._squares[color]


_stack: _Stack | None = None  # of the last pictures; all measures of a run have the same


def nearest_emoji(cell: np.ndarray, color: str, pictures: Pictures, empty: bool = False) -> str:
    """Name of the emoji with the least mean squared error of pixels, on a background of `color`.

    With `empty`, the background alone is a candidate, too; its name is "".
    """
    global _stack
    if _stack is None or _stack.pictures is not pictures:
        _stack = _Stack(pictures)
    # |emoji - cell|² with the background subtracted from both, less the square of the cell, which all have in common.
    rest = (cell - background(color)).astype(np.float32)
    products = _stack.premultiplied @ rest.ravel() - _stack.opacity @ (rest @ background(color)).ravel()
    errors = _stack.squares(color) - 2 * products
    return "" if empty and errors.min() > 0 else _stack.names[int(errors.argmin())]


def nearest_color(image: Image.Image) -> str:
    """Name of the colour in COLORS nearest to the median pixel of the rim."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / 255
    rim = np.ones(pixels.shape[:2], bool)
    rim[_BORDER:-_BORDER, _BORDER:-_BORDER] = False
    median = np.median(pixels[rim], axis=0)
    return min(COLORS, key=lambda color: float(((background(color) - median) ** 2).sum()))


def edge_f1(edges: Image.Image, truth: Image.Image) -> float:
    """F1 score of white lines on black with a tolerance of 1 pixel."""
    found, wanted = (np.asarray(picture.convert("L")) > 127 for picture in (edges, truth))
    if not found.any() or not wanted.any():
        return float(found.any() == wanted.any())
    near_found, near_wanted = (cv2.dilate(lines.astype(np.uint8), np.ones((3, 3))) > 0 for lines in (found, wanted))
    precision, recall = (found & near_wanted).sum() / found.sum(), (wanted & near_found).sum() / wanted.sum()
    return float(2 * precision * recall / max(precision + recall, 1e-9))


def correlation(image: Image.Image, truth: Image.Image) -> float:
    """Pearson correlation of grey values; 0 if one image is constant."""
    return _pearson(*(np.asarray(picture.convert("L"), np.float64) for picture in (image, truth)))


def shape_correlation(image: Image.Image, truth: Image.Image) -> float:
    """`correlation` over the pixels that are near in either depth map.

    Maps of two random emoji have a correlation of 0.54, because all are centred, and of 0.01 here.
    """
    ours, theirs = (np.asarray(picture.convert("L"), np.float64) for picture in (image, truth))
    near = np.maximum(ours, theirs) > _NEAR
    return _pearson(ours[near], theirs[near])


def _pearson(ours: np.ndarray, theirs: np.ndarray) -> float:
    if not ours.size:
        return 0.0
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    return float((ours * theirs).sum() / max(math.sqrt((ours**2).sum() * (theirs**2).sum()), 1e-9))


def mean_iou(image: Image.Image, truth: Image.Image) -> float:
    """Mean intersection over union of the classes in `truth`; the class of a pixel is the nearest colour.

    Maps of two random emoji have 0.59, because all are centred; `outline_f1` distinguishes them better.
    """
    palette = np.array([(0, 0, 0), *OBJECT_COLORS], np.float32)
    ours, theirs = (
        ((np.asarray(picture.convert("RGB"), np.float32)[..., None, :] - palette) ** 2).sum(-1).argmin(-1)
        for picture in (image, truth)
    )
    shares = [((ours == n) & (theirs == n)).sum() / ((ours == n) | (theirs == n)).sum() for n in np.unique(theirs)]
    return float(np.mean(shares))


def outline_f1(image: Image.Image, truth: Image.Image) -> float:
    """`edge_f1` of the Canny edges of two maps."""
    return edge_f1(canny(image), canny(truth))


# -- image tasks -------------------------------------------------------------------------------------------------------

Score = Callable[[Example, Image.Image, Image.Image, Pictures], "bool | float"]  # of example, both panels, emoji


def shows(scene: Scene, panel: Image.Image, pictures: Pictures) -> bool:
    """Whether the panel shows the emoji of the scene, or an empty background if the scene has none."""
    cell = np.asarray(panel, np.float32) / 255
    return nearest_emoji(cell, scene.color, pictures, empty=True) == "".join(scene.names)


def _emoji(example: Example, upper: Image.Image, lower: Image.Image, pictures: Pictures) -> bool:
    return shows(example.lower, lower, pictures)


def _emoji_above(example: Example, upper: Image.Image, lower: Image.Image, pictures: Pictures) -> bool:
    return shows(example.upper, upper, pictures)


def _on_its_background(example: Example, upper: Image.Image, lower: Image.Image, pictures: Pictures) -> bool:
    return nearest_color(lower) == example.lower.color


def _edited(example: Example, upper: Image.Image, lower: Image.Image, pictures: Pictures) -> bool:
    return all(right(example, upper, lower, pictures) for right in (_emoji, _on_its_background))


def _same_edges(example: Example, upper: Image.Image, lower: Image.Image, pictures: Pictures) -> float:
    return edge_f1(canny(lower), draw_panel(example.upper, "canny", pictures))


def _map(shown: str, measure: Callable[[Image.Image, Image.Image], float]) -> Score:
    """A score that compares the lower panel with the map of its scene."""
    return lambda example, upper, lower, pictures: measure(lower, draw_panel(example.lower, shown, pictures))


_DEPTH = {"correlation": _map("depth", correlation), "correlation in the shapes": _map("depth", shape_correlation)}
# Kind of example (omni.KINDS) -> its scores by name.
SCORES: Mapping[str, Mapping[str, Score]] = MappingProxyType(
    {
        "pair_depth": {"right emoji above": _emoji_above} | _DEPTH,
        "pair_canny": {"right emoji above": _emoji_above, "edge F1": _map("canny", edge_f1)},
        "depth": {"right emoji": _emoji},
        "canny": {"edge F1": _same_edges},
        "subject": {"same emoji": _emoji, "right background": _on_its_background},
        "edit": {"change done, rest kept": _edited},
        "predict_depth": _DEPTH,
        "predict_canny": {"edge F1": _map("canny", edge_f1)},
        "predict_segmentation": {
            "mean IoU": _map("segmentation", mean_iou),
            "outline F1": _map("segmentation", outline_f1),
        },
    }
)


def scores(example: Example, image: Image.Image, pictures: Pictures) -> list[bool | float]:
    """Scores of a dual-panel image of omni.SIZE, in the order of SCORES."""
    upper, lower = (image.crop((0, top, CELL, top + CELL)) for top in (0, CELL))
    return [score(example, upper, lower, pictures) for score in SCORES[example.kind].values()]


# -- contact sheets ----------------------------------------------------------------------------------------------------


def contact_sheet(images: list[Image.Image], captions: list[str], columns: int) -> Image.Image:
    """Pictures with whole captions on white, wide ones first; `columns` of the narrowest ones fit in a row."""
    font, gap, line = ImageFont.load_default(10), 12, 11
    whole = columns * (min(image.width for image in images) + gap)
    texts = [_wrapped(text, font, i.width + gap - 4) for i, text in zip(images, captions, strict=True)]
    order = sorted(range(len(images)), key=lambda n: (images[n].height, -images[n].width))
    corners, left, top, row = {}, 0, 0, 0
    for n in order:
        width, height = images[n].width + gap, images[n].height + gap + line * len(texts[n])
        if left and left + width > whole:
            left, top, row = 0, top + row, 0
        corners[n] = (left + gap // 2, top + gap // 2)
        left, row = left + width, max(row, height)
    sheet = Image.new("RGB", (max(whole, max(image.width for image in images) + gap), top + row), "white")
    draw = ImageDraw.Draw(sheet)
    for n, (x, y) in corners.items():
        sheet.paste(images[n], (x, y))
        for number, text in enumerate(texts[n]):
            draw.text((x, y + images[n].height + 2 + line * number), text, fill="black", font=font)
    return sheet


def _wrapped(text: str, font, width: int) -> list[str]:
    out = [""]
    for word in text.split():
        longer = f"{out[-1]} {word}".strip()
        if font.getlength(longer) <= width or not out[-1]:
            out[-1] = longer
        else:
            out.append(word)
    return out
