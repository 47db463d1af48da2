"""Scenes of one or two emoji on a plain background: pictures, captions, and depth and segmentation maps."""

import random
import zlib
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from emoji import ALIASES, CELL, COLORS, with_article, with_articles
from PIL import Image, ImageColor

OBJECT_COLORS = ((230, 60, 60), (60, 110, 230))  # of objects in segmentation maps
_HELD_OUT = 10  # one composition in 10 is held out of training

Arrangement = Literal["single", "beside", "above"]

_SINGLE = (
    "{a} on a {c} background",
    "{a} on a {c} background",
    "{a} on a {c} background",
    "{a}, {c} background",
    "{c} background, {a}",
    "an emoji of {a} on a {c} background",
    "a picture of {a} on a {c} background",
    "{a} in front of a {c} background",
    "{n}, {c} background",
    "{a} on {c}",
)
_BESIDE = (
    "{a} to the left of {b} on a {c} background",
    "{a} to the left of {b} on a {c} background",
    "{a} left of {b}, {c} background",
    "{b} to the right of {a} on a {c} background",
    "{c} background, {a} to the left of {b}",
    "a picture of {a} to the left of {b} on a {c} background",
)
_ABOVE = (
    "{a} above {b} on a {c} background",
    "{a} above {b} on a {c} background",
    "{a} above {b}, {c} background",
    "{b} below {a} on a {c} background",
    "{c} background, {a} above {b}",
    "a picture of {a} above {b} on a {c} background",
)
_TEMPLATES = {"single": _SINGLE, "beside": _BESIDE, "above": _ABOVE}


@dataclass(frozen=True)
class Scene:
    """Up to two emoji, the first one left or above, on a background of a CSS colour."""

    names: tuple[str, ...]
    color: str
    arrangement: Arrangement = "single"

    @property
    def key(self) -> str:
        """File name without suffix, unique for the scene."""
        return "_".join((self.arrangement, *self.names, self.color)).replace(" ", "-")

    @property
    def held_out(self) -> bool:
        """Whether the scene is held out of training, by its (name, colour) or its unordered pair of names."""
        if not self.names:
            return False
        parts = (*self.names, self.color) if len(self.names) == 1 else sorted(self.names)
        return zlib.crc32("|".join(parts).encode()) % _HELD_OUT == 0

    @property
    def offsets(self) -> list[tuple[int, int]]:
        """(left, top) of the cell of each object, in pixels."""
        step = {"single": (0, 0), "beside": (CELL, 0), "above": (0, CELL)}[self.arrangement]
        return [(i * step[0], i * step[1]) for i in range(len(self.names))]

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        left, top = self.offsets[-1] if self.names else (0, 0)
        return left + CELL, top + CELL


def background(color: str) -> np.ndarray:
    """RGB of a CSS colour name (spaces allowed), float32 in [0, 1]."""
    return np.asarray(ImageColor.getrgb(color.replace(" ", "")), np.float32) / 255


def over(below: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """RGB of an RGBA picture over an RGB one, float32 in [0, 1]."""
    return picture[..., :3] * picture[..., 3:] + below * (1 - picture[..., 3:])


def to_image(pixels: np.ndarray) -> Image.Image:
    """The picture of RGB values, clamped to [0, 1]."""
    return Image.fromarray((pixels.clip(0, 1) * 255).round().astype(np.uint8))


def render(scene: Scene, pictures: dict[str, np.ndarray]) -> Image.Image:
    """RGB picture of the scene, of `scene.size`."""
    width, height = scene.size
    canvas = np.broadcast_to(background(scene.color), (height, width, 3)).copy()
    for name, (left, top) in zip(scene.names, scene.offsets, strict=True):
        part = np.s_[top : top + CELL, left : left + CELL]
        canvas[part] = over(canvas[part], pictures[name])
    return to_image(canvas)


def _masks(scene: Scene, pictures: dict[str, np.ndarray]) -> list[np.ndarray]:
    width, height = scene.size
    masks = []
    for name, (left, top) in zip(scene.names, scene.offsets, strict=True):
        mask = np.zeros((height, width), np.uint8)
        mask[top : top + CELL, left : left + CELL] = pictures[name][..., 3] > 0.5
        masks.append(mask)
    return masks


def depth(scene: Scene, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Depth map, white is near. Objects are rounded silhouettes on black; the first one is nearer."""
    width, height = scene.size
    near = np.zeros((height, width), np.float32)
    for number, mask in enumerate(_masks(scene, pictures)):
        inside = cv2.distanceTransform(mask, cv2.DIST_L2, 5)
        rounded = np.sqrt(np.clip(inside / (CELL / 4), 0, 1))
        near = np.where(mask > 0, (0.45 + 0.55 * rounded) * (1 - 0.2 * number), near)
    return Image.fromarray((near * 255).round().astype(np.uint8)).convert("RGB")


def segmentation(scene: Scene, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Segmentation map: the first object and the second in OBJECT_COLORS on black."""
    width, height = scene.size
    out = np.zeros((height, width, 3), np.uint8)
    for color, mask in zip(OBJECT_COLORS, _masks(scene, pictures), strict=False):
        out[mask > 0] = color
    return Image.fromarray(out)


def loose(rng: random.Random, pictures: dict[str, np.ndarray]) -> Image.Image:
    """Emoji of random size and position on a gradient, CELL x CELL, for training the image tokenizer only."""
    ramp = np.linspace(0, 1, CELL, dtype=np.float32)
    ramp = (ramp[:, None] if rng.random() < 0.5 else ramp[None, :])[..., None]
    first, second = (np.asarray([rng.random() for _ in range(3)], np.float32) for _ in range(2))
    canvas = np.ones((CELL, CELL, 1), np.float32) * (first * ramp + second * (1 - ramp))
    for _ in range(rng.randint(1, 3)):
        side = rng.randint(CELL // 3, CELL * 3 // 2)
        picture = cv2.resize(pictures[rng.choice(sorted(pictures))], (side, side), interpolation=cv2.INTER_AREA)
        if rng.random() < 0.5:
            picture = picture[:, ::-1]
        left, top = (rng.randint(-side // 3, CELL - side * 2 // 3) for _ in range(2))
        x0, y0, x1, y1 = max(0, left), max(0, top), min(CELL, left + side), min(CELL, top + side)
        canvas[y0:y1, x0:x1] = over(canvas[y0:y1, x0:x1], picture[y0 - top : y1 - top, x0 - left : x1 - left])
    return to_image(canvas)


def noun(name: str, rng: random.Random) -> str:
    """What people call the emoji of that name."""
    return ALIASES[name] if name in ALIASES and rng.random() < 0.4 else name


def caption(scene: Scene, rng: random.Random) -> str:
    """One of several phrasings of the scene."""
    nouns = [noun(name, rng) for name in scene.names]
    phrases = [with_article(n) for n in nouns]
    if scene.arrangement == "single" and scene.color == "white" and rng.random() < 0.2:
        text = phrases[0]
    else:
        template = rng.choice(_TEMPLATES[scene.arrangement])
        text = with_articles(template.format(a=phrases[0], b=phrases[-1], c=scene.color, n=nouns[0]))
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    if rng.random() < 0.1:
        text += "."
    return text


def all_singles(names: list[str]) -> list[Scene]:
    """Scenes of each emoji on each background."""
    return [Scene((name,), color) for name in names for color in COLORS]


def training_scenes(names: list[str], pairs: int, rng: random.Random) -> list[Scene]:
    """Training scenes: every single emoji and `pairs` random pairs, none of them held out."""
    singles = [scene for scene in all_singles(names) if not scene.held_out]
    return singles + random_pairs(names, pairs, False, rng)


def evaluation_scenes(names: list[str], count: int, rng: random.Random) -> tuple[list[Scene], list[Scene]]:
    """At most `count` single emoji and `count` pairs, all of them held out."""
    singles = [scene for scene in all_singles(names) if scene.held_out]
    return rng.sample(singles, min(count, len(singles))), random_pairs(names, count, True, rng)


def random_pairs(names: list[str], count: int, held_out: bool, rng: random.Random) -> list[Scene]:
    """Scenes of two different emoji, two thirds side by side, all of them held out or none."""
    scenes: dict[Scene, None] = {}
    while len(scenes) < count:
        pair = tuple(rng.sample(names, 2))
        scene = Scene(pair, rng.choice(COLORS), "above" if rng.random() < 1 / 3 else "beside")
        if scene.held_out == held_out:
            scenes[scene] = None
    return list(scenes)
