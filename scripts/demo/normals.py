"""Normal maps of scenes, computed from a height map of the objects: examples, and the measure of normals."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import cv2
import numpy as np
from composed import Picture, appearance, arranged
from emoji import CELL, with_articles
from examples import Example
from PIL import Image
from scenes import background, to_image
from words import caption

from lumina_mgpt.prompts import I2I_TASKS, PICTURE, TASKS, Task

SIZE = (CELL, 2 * CELL)  # (width, height) of both panels
KINDS: Mapping[str, int] = MappingProxyType({"predict_normal": 5000, "normal": 4000, "pair_normal": 1000})
TASK_OF: Mapping[str, Task] = MappingProxyType(
    {
        "predict_normal": I2I_TASKS["predict_normal"],
        "normal": I2I_TASKS["normal"],
        "normal_unnamed": I2I_TASKS["normal"],
        "pair_normal": TASKS["normal"],
    }
)
_NAMED = 0.3  # share of training prompts that name the object, of tasks in which the given panel must be used
_BACKGROUNDS = ("on a {c} background", "{c} background", "it, {c} background")
_ROUNDED = 1 / 4  # of the side of an object: distance from its outline at which it is flat, as in scenes.depth
_SMOOTH = 1 / 24  # of the side: deviation of the Gaussian that removes the ridges of the height map


@dataclass(frozen=True)
class NormalMap:
    """The normal map of a scene. It does not depend on the colours of objects and background."""

    picture: Picture

    @property
    def key(self) -> str:
        items = sorted((item.name, item.side, item.left, item.top) for item in self.picture.items)
        return f"normals {self.picture.size} {items}"

    def draw(self, pictures: dict[str, np.ndarray]) -> Image.Image:
        """RGB picture of the normals; see `encoded`."""
        return encoded(normals(self.picture, pictures))


@dataclass(frozen=True)
class Asked:
    """What an example asks for: a scene with one emoji, and the prompt within the instruction."""

    picture: Picture
    prompt: str


def normals(picture: Picture, pictures: dict[str, np.ndarray]) -> np.ndarray:
    """Unit normals of the objects, 0 elsewhere: x right, y up, z towards the viewer. Shapes: (height, width, 3).

    The height of an object rises from its outline as in scenes.depth, along a quarter of an ellipse.
    """
    width, height = picture.size
    found = np.zeros((height, width, 3), np.float32)
    for item in picture.items:
        mask = (appearance(pictures[item.name], None, item.side)[..., 3] > 0.5).astype(np.uint8)
        reach = item.side * _ROUNDED
        inside = cv2.distanceTransform(cv2.copyMakeBorder(mask, 1, 1, 1, 1, cv2.BORDER_CONSTANT), cv2.DIST_L2, 5)
        depth = np.clip(inside / reach, 0, 1)
        level = reach * np.sqrt(depth * (2 - depth))
        level = cv2.GaussianBlur(level, (0, 0), item.side * _SMOOTH, borderType=cv2.BORDER_CONSTANT)
        down, right = np.gradient(level)
        normal = np.stack([-right, down, np.ones_like(level)], -1)[1:-1, 1:-1]
        normal /= np.linalg.norm(normal, axis=-1, keepdims=True)
        part = found[item.top : item.top + item.side, item.left : item.left + item.side]
        part[mask > 0] = normal[mask > 0]
    return found


def encoded(vectors: np.ndarray) -> Image.Image:
    """Normals as colours: -1 to 1 along x, y, z as 0 to 255 in red, green, blue. Pixels without a normal are black."""
    return to_image(np.where(vectors.any(-1, keepdims=True), (vectors + 1) / 2, 0))


def decoded(image: Image.Image) -> np.ndarray:
    """Unit normals of the colours of all pixels. Shapes: (height, width, 3)."""
    vectors = np.asarray(image.convert("RGB"), np.float32) / 127.5 - 1
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6)


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Examples with two panels of CELL x CELL; `about` is an Asked.

    Args:
        kind: "predict_normal", the map of a given picture; "normal", a picture from a given map and a prompt;
            "pair_normal", both from a prompt; in the evaluation also "normal_unnamed", whose prompt gives only the
            background.
        names: names of the emoji.
        held_out: only scenes that are held out of training, else only others.
    """
    found: list[Example] = []
    while len(found) < count:
        picture = arranged([(rng.choice(names), None)], rng, size=(CELL, CELL))
        if picture.held_out != held_out:
            continue
        shown: tuple = (NormalMap(picture), picture) if kind.startswith("normal") else (picture, NormalMap(picture))
        asked = Asked(picture, prompt(kind, picture, rng, held_out))
        turns = TASK_OF[kind].instruction(asked.prompt, *SIZE), PICTURE
        found.append(Example(kind, turns, (shown,), asked))
    return found


def prompt(kind: str, picture: Picture, rng: random.Random, held_out: bool) -> str:
    """The prompt of an example: a caption, the background alone, or none; in training a mixture of two of them."""
    if kind == "pair_normal" or (kind == "normal" and held_out) or (not held_out and rng.random() < _NAMED):
        return caption(picture, rng)
    if kind == "predict_normal":
        return ""
    return with_articles(" " + rng.choice(_BACKGROUNDS).format(c=picture.background)).strip()


# -- measure -----------------------------------------------------------------------------------------------------------


def angle_error(image: Image.Image, picture: Picture, pictures: dict[str, np.ndarray]) -> float:
    """Mean angle in degrees between the normals of a map and the true ones, over the pixels of the objects.

    A map of the same normal everywhere, towards the viewer, has about 30 degrees.
    """
    truth = normals(picture, pictures)
    inside = truth.any(-1)
    cosines = (decoded(image)[inside] * truth[inside]).sum(-1)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).mean())


def right_emoji(image: Image.Image, picture: Picture, pictures: dict[str, np.ndarray]) -> bool:
    """Whether the known emoji that is nearest in pixels, in the place of the only object, is the right one."""
    (item,) = picture.items
    part = np.asarray(image.convert("RGB"), np.float32)[item.top : item.top + item.side] / 255
    part = part[:, item.left : item.left + item.side]
    names, ground = list(pictures), background(picture.background)
    known = np.stack([appearance(pictures[name], None, item.side) for name in names])
    drawn = known[..., :3] * known[..., 3:] + ground * (1 - known[..., 3:])
    return names[int(((drawn - part) ** 2).mean((1, 2, 3)).argmin())] == item.name
