"""Detection as the first generation does it: the picture again, with a box around what was asked for."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from coloring import OBJECT_COLORS
from composed import Item, Picture, appearance, arranged, colorable, first_of
from examples import Example
from PIL import Image, ImageDraw
from words import the, thing, word_for

from lumina_mgpt.boxes import Box, find_box
from lumina_mgpt.prompts import FIRST_I2I_TASKS, PICTURE

TASK = FIRST_I2I_TASKS["detect"]
KINDS: Mapping[str, int] = MappingProxyType({"detect": 14000, "detect_absent": 2000})
LINE = (255, 0, 255)  # color of the box, which no background has
WIDTH = 4  # of its lines in pixels: half of a code
RIGHT = 0.5  # least intersection over union of a box that is right
_ITEMS = (1, 2, 2, 3, 4)  # numbers of objects in a picture
# Number -> sizes of the pictures. Few of them: the model learns to copy pictures of each size by itself.
_SIZES = {1: ((96, 96),), 2: ((128, 64), (64, 128), (128, 128)), 3: ((128, 128),), 4: ((128, 128),)}
_COLORED = 0.4  # share of objects in another colour than their own
_TWINS = 0.2  # share of pictures that show what is asked for again, in another colour


@dataclass(frozen=True)
class Marked:
    """A scene with a box around one of its objects."""

    picture: Picture
    item: Item

    @property
    def key(self) -> str:
        return f"square {self.item} {self.picture.key}"

    def box(self, pictures: dict[str, np.ndarray]) -> Box:
        """The least box around the object: left, top, right, bottom; right and bottom are the first outside."""
        shape = appearance(pictures[self.item.name], None, self.item.side)[..., 3] > 0.5
        (rows,), (columns,) = (np.nonzero(shape.any(axis)) for axis in (1, 0))
        left, top = self.item.left, self.item.top
        return left + int(columns[0]), top + int(rows[0]), left + int(columns[-1]) + 1, top + int(rows[-1]) + 1

    def draw(self, pictures: dict[str, np.ndarray]) -> Image.Image:
        """The scene with lines of WIDTH pixels around the object, WIDTH pixels inside of the edges of its square.

        The lines go through the inner halves of the outermost codes of the square, whatever the form of the object: a
        small model learns which object is meant, but hardly the least box around it. For 99 % of the emoji, this box
        and the least one have an intersection over union above RIGHT.
        """
        image, item = self.picture.draw(pictures), self.item
        corner = item.left + WIDTH, item.top + WIDTH
        opposite = item.left + item.side - WIDTH - 1, item.top + item.side - WIDTH - 1
        ImageDraw.Draw(image).rectangle((*corner, *opposite), outline=LINE, width=WIDTH)
        return image


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Examples of detection; `about` is the Marked picture, or the Picture if it does not show what is asked for.

    Args:
        kind: "detect", or "detect_absent", whose answer is the picture without a box.
        names: names of the emoji.
        held_out: only pictures with a combination that is held out of training, all with one wording; else only
            pictures without any.
    """
    found: list[Example] = []
    for _ in range(count):
        number = rng.choice(_ITEMS)  # does not depend on what is held out
        picture = first_of(lambda number=number: _scene(number, names, rng), held_out)
        asked = picture.items[0]
        shown: Picture | Marked = Marked(picture, asked)
        extra = {"starts": [(item.left, item.top) for item in picture.items]}  # read by decision_tokens.py
        if kind == "detect_absent":
            asked = Item(rng.choice([name for name in names if name not in picture.names]), 0, 0, 0)
            shown = picture
        words = _words(picture, asked, rng, varied=not held_out)
        found.append(
            Example(kind, (TASK.instruction(words, *picture.size), PICTURE), ((picture,), (shown,)), shown, extra)
        )
    return found


def _scene(number: int, names: Sequence[str], rng: random.Random) -> Picture:
    """A scene of this number of objects, the first of which has no equal in it."""
    chosen = rng.sample(names, number)
    fits = set(colorable(names))
    what: list[tuple[str, str | None]] = [
        (name, rng.choice(list(OBJECT_COLORS)) if name in fits and rng.random() < _COLORED else None) for name in chosen
    ]
    name = chosen[0]
    if len(what) > 1 and name in fits and rng.random() < _TWINS:
        what[:2] = [(name, color) for color in rng.sample(list(OBJECT_COLORS), 2)]
    return arranged(what, rng, size=rng.choice(_SIZES[number]))


def _words(picture: Picture, asked: Item, rng: random.Random, varied: bool) -> str:
    """What to look for. The colour is named if another object has the same name, or by chance."""
    needed = picture.names.count(asked.name) > 1
    named = asked.color and (needed or not varied or rng.random() < 0.7)
    what = asked.name, asked.color if named else None
    if not varied:
        return f"{_capital(the(what))}."
    plain = " ".join(filter(None, (what[1], word_for(asked.name, rng))))
    forms = (f"{_capital(the(what, rng))}.", f"{_capital(the(what, rng))}.", the(what, rng), thing(what, rng), plain)
    return rng.choice(forms)


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


# -- measure -----------------------------------------------------------------------------------------------------------


def overlap(first: Box, second: Box) -> float:
    """Intersection over union of two boxes."""
    width, height = (min(first[n + 2], second[n + 2]) - max(first[n], second[n]) for n in (0, 1))
    shared = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return shared / (sum(areas) - shared)


def found_overlap(marked: Marked, image: Image.Image, reference: Image.Image, pictures: dict) -> float:
    """Intersection over union of the true box and the one that is found by difference; 0 if none is found.

    Args:
        image: the answer.
        reference: the picture without a box, through the image tokenizer.
    """
    box = find_box(image, reference) if image.size == reference.size else None
    return overlap(box, marked.box(pictures)) if box else 0.0
