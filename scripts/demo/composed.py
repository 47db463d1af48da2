"""Scenes of one to four emoji at several sizes and places, in natural or other colours, on a plain background.

The objects of a scene do not overlap. Their places are multiples of 8 pixels, the side of an image code.
"""

import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from types import MappingProxyType
from typing import Literal

import cv2
import numpy as np
import scenes
from coloring import OBJECT_COLORS, colored
from emoji import CELL, COLORS
from PIL import Image

SMALL = 64  # side of a small object; smaller ones cannot be recognized after the image tokenizer
STEP = 8  # places are multiples of this
_HELD_OUT = 10  # one combination in 10 is held out of training
_CONTRAST = 110  # least distance in RGB between a coloured object and its background

# Number of objects -> sizes (width, height) of its scenes with the side of the objects. Repeated entries are more
# frequent.
SIZES: Mapping[int, tuple[tuple[tuple[int, int], int], ...]] = MappingProxyType(
    {
        1: (
            ((96, 96), CELL), ((96, 96), CELL), ((96, 96), SMALL), ((96, 96), SMALL), ((128, 64), SMALL),
            ((64, 128), SMALL), ((128, 96), CELL), ((96, 128), CELL),
        ),
        2: (
            ((192, 96), CELL), ((96, 192), CELL), ((128, 64), SMALL), ((64, 128), SMALL), ((128, 64), SMALL),
            ((64, 128), SMALL), ((128, 96), SMALL), ((96, 128), SMALL), ((128, 128), SMALL),
        ),
        3: (((192, 64), SMALL), ((64, 192), SMALL), ((128, 128), SMALL)),
        4: (((128, 128), SMALL), ((128, 128), SMALL), ((256, 64), SMALL)),
    }
)  # fmt: skip

Side = Literal["left", "right", "above", "below"]
OPPOSITE: Mapping[str, Side] = MappingProxyType({"left": "right", "right": "left", "above": "below", "below": "above"})


@dataclass(frozen=True)
class Item:
    """An object: an emoji in its own colours or in an object colour, in a square of `side` pixels."""

    name: str
    side: int
    left: int
    top: int
    color: str | None = None

    @property
    def middle(self) -> tuple[float, float]:
        """(x, y) in pixels."""
        return self.left + self.side / 2, self.top + self.side / 2

    @property
    def what(self) -> tuple[str, str | None]:
        """(name, colour)."""
        return self.name, self.color


@dataclass(frozen=True)
class Picture:
    """A scene. Of two objects, captions say where the first is, seen from the second."""

    size: tuple[int, int]
    background: str
    items: tuple[Item, ...]

    @property
    def key(self) -> str:
        """Unique text of the scene; the order of the objects has no effect."""
        return repr((self.size, self.background, sorted(map(repr, self.items))))

    @property
    def names(self) -> list[str]:
        """Names of the objects, in order."""
        return [item.name for item in self.items]

    @property
    def held_out(self) -> bool:
        """Whether the scene has a combination that is held out of training."""
        return any(map(is_held_out, self.combinations()))

    def combinations(self) -> list[tuple[str, ...]]:
        """What a scene combines: (name, background) of a single natural object, pairs, counts, and (name, colour)."""
        found: list[tuple[str, ...]] = [tuple(sorted(pair)) for pair in combinations(sorted(set(self.names)), 2)]
        found += [(item.name, f"color {item.color}") for item in self.items if item.color]
        if len(self.items) == 1 and not self.items[0].color:
            found.append((self.items[0].name, self.background))
        counts = {name: self.names.count(name) for name in self.names}
        return found + [(name, f"count {count}") for name, count in counts.items() if count > 1]

    def draw(self, pictures: dict[str, np.ndarray]) -> Image.Image:
        """RGB picture of `size`."""
        width, height = self.size
        canvas = np.broadcast_to(scenes.background(self.background), (height, width, 3)).copy()
        for item in self.items:
            part = np.s_[item.top : item.top + item.side, item.left : item.left + item.side]
            canvas[part] = scenes.over(canvas[part], appearance(pictures[item.name], item.color, item.side))
        return scenes.to_image(canvas)


def colorable(names: Sequence[str]) -> list[str]:
    """Names of emoji that occur in object colours: those whose name has no colour."""
    words = {*OBJECT_COLORS, "rainbow"}
    return [name for name in names if not words & {*name.split(" ")}]


def is_held_out(parts: Sequence[str]) -> bool:
    """Whether a combination is held out. Those of one or two natural objects are the same as in scenes.Scene."""
    return zlib.crc32("|".join(parts).encode()) % _HELD_OUT == 0


def appearance(picture: np.ndarray, color: str | None, side: int) -> np.ndarray:
    """An emoji in a colour (None: its own) and size. Shapes: (CELL, CELL, 4) -> (side, side, 4). Ranges: [0, 1]."""
    shown = colored(picture, color) if color else picture
    if side == shown.shape[0]:
        return shown
    alpha = shown[..., 3:]
    small = cv2.resize(np.concatenate([shown[..., :3] * alpha, alpha], -1), (side, side), interpolation=cv2.INTER_AREA)
    return np.concatenate([small[..., :3] / np.maximum(small[..., 3:], 1e-6), small[..., 3:]], -1)


def relation(first: Item, second: Item) -> Side | None:
    """Where the first object is, seen from the second; None if that is not clear."""
    x, y = (a - b for a, b in zip(first.middle, second.middle, strict=True))
    far, near = max(abs(x), abs(y)), min(abs(x), abs(y))
    if far < max(first.side, second.side) or near > far / 2:
        return None
    if abs(x) > abs(y):
        return "left" if x < 0 else "right"
    return "above" if y < 0 else "below"


def place(item: Item, size: tuple[int, int]) -> str | None:
    """Where an object is in a picture: "middle", a side ("left") or a corner ("top left"); None if that is unclear."""
    x, y = (2 * middle / side - 1 for middle, side in zip(item.middle, size, strict=True))  # from -1 to 1
    if any(0.1 <= abs(value) < 0.3 for value in (x, y)):
        return None
    sides = ["top" if y < 0 else "bottom"] * (abs(y) >= 0.3) + ["left" if x < 0 else "right"] * (abs(x) >= 0.3)
    return " ".join(sides) or "middle"


def fitting_backgrounds(colors: Sequence[str | None]) -> list[str]:
    """Backgrounds on which objects of these colours are visible."""
    shades = [np.asarray(OBJECT_COLORS[color], np.float32) for color in colors if color]
    grounds = {ground: 255 * scenes.background(ground) for ground in COLORS}
    return [g for g, rgb in grounds.items() if all(np.linalg.norm(rgb - shade) > _CONTRAST for shade in shades)]


def arranged(
    what: Sequence[tuple[str, str | None]],
    rng: random.Random,
    background: str | None = None,
    size: tuple[int, int] | None = None,
) -> Picture:
    """A scene of these objects (name, colour), in random places.

    Args:
        what: one to four objects.
        background: the background (default: a random one on which the objects are visible).
        size: (width, height) (default: a random one of SIZES).
    """
    choices = [entry for entry in SIZES[len(what)] if size in (None, entry[0])]
    (width, height), side = rng.choice(choices)
    if len(what) == 1:
        corners = [(_offset(width - side, rng), _offset(height - side, rng))]
    else:
        columns, rows = width // side, height // side
        cells = rng.sample([(column, row) for row in range(rows) for column in range(columns)], len(what))
        spare = width - columns * side, height - rows * side
        shift = [_offset(extent, rng) for extent in spare]
        corners = []
        for column, row in cells:
            if columns == 1:
                shift[0] = _offset(spare[0], rng)
            if rows == 1:
                shift[1] = _offset(spare[1], rng)
            corners.append((column * side + shift[0], row * side + shift[1]))
    ground = background or rng.choice(fitting_backgrounds([color for _, color in what]))
    items = [Item(name, side, *corner, color) for (name, color), corner in zip(what, corners, strict=True)]
    return Picture((width, height), ground, tuple(items))


def first_of(make: Callable[[], Picture], held_out: bool) -> Picture:
    """The first scene that `make` gives with a held-out combination, or without any."""
    while (picture := make()).held_out != held_out:
        pass
    return picture


def _offset(spare: int, rng: random.Random) -> int:
    return STEP * rng.randint(0, spare // STEP)


def in_reading_order(picture: Picture) -> Picture:
    """The scene with its objects from left to right, row by row from the top."""
    return replace(picture, items=tuple(sorted(picture.items, key=lambda item: (item.top // SMALL, item.left))))
