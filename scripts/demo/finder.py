"""Finds the emoji of a scene: which, in which colour, and where. No network is needed, since all emoji are known.

Each known emoji in each colour and size is compared with every place of a picture. An object is where the emoji
explains the pixels much better than the background does. Objects do not overlap, so the best match removes all that
overlap it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from coloring import OBJECT_COLORS
from composed import SMALL, Item, Picture, appearance, colorable, relation
from emoji import CELL
from evaluation import nearest_color
from PIL import Image

SIDES = (SMALL, CELL)
_HALF = 2  # pictures are compared at half their size
_STEP = 4  # places are compared at multiples of this, in pixels
_OVERLAP = 8  # objects may share a rim of this width, in pixels
# An object must explain this share of what it adds to the background. True objects explain over 0.6 after the image
# tokenizer, and noise under 0.2.
_SHARE = 0.35
_LEAST = 0.0015  # squared difference from the background, as a mean over its square, below which nothing is an object
_ALIKE = 0.1  # root mean squared difference of pixels below which two looks of one emoji are taken for the same
_RIM = 4  # pixels at the edge of a picture, most of which show the background


@dataclass(frozen=True)
class _Looks:
    """All looks of one size: premultiplied colours, opacity, and their sums."""

    what: list[tuple[str, str | None]]
    rgb: np.ndarray  # (looks, pixels · 3)
    alpha: np.ndarray  # (looks, pixels)
    cross: np.ndarray  # (looks, 3): sums of opacity · colour


class Finder:
    """Finds objects in pictures.

    Args:
        pictures: emoji by name, (CELL, CELL, 4) in [0, 1].
        names: names to look for (default: all).
    """

    def __init__(self, pictures: dict[str, np.ndarray], names: Sequence[str] | None = None) -> None:
        self._pictures = pictures
        names = list(pictures if names is None else names)
        what: list[tuple[str, str | None]] = [(name, None) for name in names]
        what += [(name, color) for name in colorable(names) for color in OBJECT_COLORS]
        self._looks = {side: self._of_size(what, side) for side in SIDES}

    def _of_size(self, what: list[tuple[str, str | None]], side: int) -> _Looks:
        shown = np.stack([_halved(_premultiplied(appearance(self._pictures[n], c, side))) for n, c in what])
        rgb, alpha = shown[..., :3], shown[..., 3]
        cross = np.einsum("nijc,nij->nc", rgb, alpha)
        return _Looks(what, rgb.reshape(len(what), -1), alpha.reshape(len(what), -1), cross)

    def find(self, image: Image.Image) -> list[Item]:
        """The objects of a picture, the clearest first."""
        pixels = np.asarray(image.convert("RGB"), np.float32) / 255
        ground = background_of(pixels)
        y = _halved(pixels - ground)
        found: list[tuple[float, Item]] = []
        for side, looks in self._looks.items():
            found += self._matches(y, ground, side, looks)
        kept: list[Item] = []
        for _, item in sorted(found, key=lambda entry: -entry[0]):
            if not any(_overlap(item, other) for other in kept):
                kept.append(item)
        return kept

    def _matches(self, y: np.ndarray, ground: np.ndarray, side: int, looks: _Looks) -> list[tuple[float, Item]]:
        """The best look at each place, with what it explains, where that is enough."""
        d, step = side // _HALF, _STEP // _HALF
        if min(y.shape[:2]) < d:
            return []
        places = [(i, j) for i in range(0, y.shape[0] - d + 1, step) for j in range(0, y.shape[1] - d + 1, step)]
        patches = np.stack([y[i : i + d, j : j + d] for i, j in places])  # (places, d, d, 3)
        inner = patches.reshape(len(places), -1) @ looks.rgb.T
        inner -= (patches @ ground).reshape(len(places), -1) @ looks.alpha.T
        energy = (looks.rgb**2).sum(1) - 2 * looks.cross @ ground + (looks.alpha**2).sum(1) * (ground @ ground)
        gain = 2 * inner - energy  # (places, looks)
        fits = (gain > _SHARE * energy) & (gain > _LEAST * d * d)
        gain = np.where(fits, gain, -np.inf)
        best = gain.argmax(1)
        return [
            (float(gain[n, look]), Item(looks.what[look][0], side, j * _HALF, i * _HALF, looks.what[look][1]))
            for n, ((i, j), look) in enumerate(zip(places, best, strict=True))
            if fits[n, look]
        ]

    def alike(self, found: Item, wanted: Item) -> bool:
        """Whether an object is the wanted one: the same emoji, in the same colour or one that looks the same."""
        if found.name != wanted.name or found.color == wanted.color:
            return found.name == wanted.name
        looks = [appearance(self._pictures[found.name], item.color, SMALL) for item in (found, wanted)]
        inside = looks[0][..., 3] > 0.5
        return float(np.sqrt(((looks[0] - looks[1])[inside][:, :3] ** 2).mean())) < _ALIKE

    def right(self, image: Image.Image, wanted: Picture, related: bool = False) -> bool:
        """Whether a picture shows the objects of a scene and no others.

        Args:
            related: whether the first of two objects must be on the right side of the second.
        """
        found, rest = [], self.find(image)
        for item in wanted.items:
            match = next((other for other in rest if self.alike(other, item)), None)
            if match is None:
                return False
            rest.remove(match)
            found.append(match)
        return not rest and (not related or relation(*found) == relation(*wanted.items))


def background_right(image: Image.Image, wanted: Picture) -> bool:
    """Whether the background has the colour of the scene."""
    return nearest_color(image) == wanted.background


def background_of(pixels: np.ndarray) -> np.ndarray:
    """Colour of the background: the median of the rim. Shapes: (H, W, 3) -> (3,)."""
    inner = np.zeros(pixels.shape[:2], bool)
    inner[_RIM:-_RIM, _RIM:-_RIM] = True
    return np.median(pixels[~inner], 0)


def in_words(items: Sequence[Item]) -> str:
    """The objects as text, for tables and contact sheets."""
    counts = Counter(" ".join(filter(None, (item.color, item.name))) for item in items)
    return ", ".join(f"{count} {what}" for what, count in counts.items()) or "nothing"


def _premultiplied(picture: np.ndarray) -> np.ndarray:
    return np.concatenate([picture[..., :3] * picture[..., 3:], picture[..., 3:]], -1)


def _halved(pixels: np.ndarray) -> np.ndarray:
    """Means over squares of _HALF x _HALF pixels. Shapes: (H, W, C) -> (H / 2, W / 2, C)."""
    height, width = pixels.shape[:2]
    return pixels.reshape(height // _HALF, _HALF, width // _HALF, _HALF, -1).mean((1, 3)).astype(np.float32)


def _overlap(first: Item, second: Item) -> bool:
    return all(
        min(a + first.side, b + second.side) - max(a, b) > _OVERLAP
        for a, b in ((first.left, second.left), (first.top, second.top))
    )
