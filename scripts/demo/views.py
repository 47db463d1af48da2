"""Eight views of a solid: training and evaluation examples, and the measure of views."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from emoji import with_article, with_articles
from evaluation import nearest_color
from examples import Example
from PIL import Image
from scenes import background
from solids import SIDE, SOLID_COLORS, SOLIDS, VIEWS, backdrops, draw, view_of

from lumina_mgpt.prompts import FIRST_TASKS, PICTURE

TASK = replace(FIRST_TASKS["multiview"], views=VIEWS, side=SIDE)
KINDS: Mapping[str, int] = MappingProxyType({"views": 4000, "views_given": 3000})
_PLAIN = ("{a}", "{a}", "{a}, 3d asset")  # on white
_CAPTIONS = (
    "{a} on a {b} background",
    "{a} on a {b} background",
    "{a} on a {b} background, 3d asset",
    "{a}, {b} background",
    "{a}, {b} background, 3d asset",
    "{b} background, {a}",
    "{a} in front of a {b} background",
    "{a} on {b}",
)
QUESTION = f"{PICTURE} Show the other seven views."  # with the first view given; that of the evaluation
_QUESTIONS = (
    QUESTION,
    QUESTION,
    f"{PICTURE} Turn it: seven more views.",
    f"{PICTURE} Show this object from all other sides.",
    f"Show the other seven views. {PICTURE}",
    f"Seven more views of this object: {PICTURE}",
)


@dataclass(frozen=True)
class View:
    """The picture of one view; `number` as in `solids.view_of`."""

    solid: str
    color: str
    number: int
    backdrop: str

    @property
    def key(self) -> str:
        return f"view {self}"

    def draw(self, pictures: dict[str, np.ndarray] | None = None) -> Image.Image:
        """The picture, SIDE x SIDE. The emoji `pictures` are not used."""
        return draw(self.solid, self.color, self.number, self.backdrop)


@dataclass(frozen=True)
class Turn:
    """A full turn of a coloured solid on a background, in order from the view `first`."""

    solid: str
    color: str
    backdrop: str
    first: int = 0

    @property
    def held_out(self) -> bool:
        """Whether the pair of solid and colour is held out of training. Each solid has one such colour."""
        return list(SOLID_COLORS)[3 * list(SOLIDS).index(self.solid) % len(SOLID_COLORS)] == self.color

    @property
    def views(self) -> tuple[View, ...]:
        numbers = [(self.first + n) % VIEWS for n in range(VIEWS)]
        return tuple(View(self.solid, self.color, number, self.backdrop) for number in numbers)


def caption(turn: Turn, rng: random.Random) -> str:
    """One of several phrasings."""
    noun = with_article(f"{turn.color} {turn.solid}")
    if turn.solid == "cube":  # its sides have other colours
        noun = f"a cube of six colors with {with_article(f'{turn.color} top')}"
    white = turn.backdrop == "white" and rng.random() < 0.5
    text = with_articles(rng.choice(_PLAIN if white else _CAPTIONS).format(a=noun, b=turn.backdrop))
    return text[0].upper() + text[1:] if rng.random() < 0.15 else text


def turns(held_out: bool) -> list[Turn]:
    """All turns from the front, those that are held out or those that are not."""
    every = [Turn(solid, color, name) for solid in SOLIDS for color in SOLID_COLORS for name in backdrops(color)]
    return [turn for turn in every if turn.held_out == held_out]


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Examples of held-out solids in colours, or of all others; each turn is used once before one repeats.

    Args:
        kind: "views", eight images for a prompt; or "views_given", seven more images for that of any view. In the
            evaluation, the given view is the front, and the question is QUESTION.
        names: not used.
    """
    pool, found = turns(held_out), []
    rng.shuffle(pool)
    for number in range(count):
        turn = pool[number % len(pool)]
        if kind == "views":
            human = TASK.instruction(caption(turn, rng), SIDE, SIDE)
        else:
            human = QUESTION if held_out else rng.choice(_QUESTIONS)
            turn = turn if held_out else replace(turn, first=rng.randrange(VIEWS))
        answer = PICTURE * (VIEWS - human.count(PICTURE))
        found.append(Example(kind, (human, answer), tuple((view,) for view in turn.views), turn))
    return found


# -- measure -----------------------------------------------------------------------------------------------------------

FIGURES = ("all views right", "each view right", "solid right in all", "color right in all", "background right in all")


@lru_cache(maxsize=2)  # 44 MB each
def _known(backdrop: str) -> tuple[list[View], np.ndarray, np.ndarray]:
    """All views of all solids in all colours on a background, their RGB in [0, 1], and the sum of its squares.

    Shapes: pixels (views, SIDE * SIDE * 3); sums (views,).
    """
    keys, colors = [], np.array(list(SOLID_COLORS.values()), np.float32)[:, None, None] / 255
    drawn = np.empty((len(SOLIDS) * VIEWS, len(colors), SIDE, SIDE, 3), np.float32)
    for n, (solid, number) in enumerate((solid, number) for solid in SOLIDS for number in range(VIEWS)):
        view = view_of(solid, number)
        behind = view.fixed + background(backdrop) * (1 - view.opacity[..., None])
        drawn[n] = view.own[..., None] * colors + behind
        keys += [View(solid, color, number, backdrop) for color in SOLID_COLORS]
    pixels = drawn.reshape(len(keys), -1)
    return keys, pixels, np.einsum("vp,vp->v", pixels, pixels)


def nearest_views(images: Sequence[Image.Image], backdrop: str) -> list[View]:
    """The view with the least mean squared error of pixels for each picture, on a known background.

    Raises:
        ValueError: a picture does not have SIDE x SIDE pixels.
    """
    views, known, squares = _known(backdrop)
    if any(image.size != (SIDE, SIDE) for image in images):
        raise ValueError(f"views must have {SIDE} x {SIDE} pixels, got {[image.size for image in images]}")
    pixels = np.stack([np.asarray(image.convert("RGB"), np.float32).ravel() / 255 for image in images])
    distances = squares - 2 * pixels @ known.T  # up to the square of the pixels
    return [views[n] for n in distances.argmin(1)]


def scores(wanted: Sequence[View], images: Sequence[Image.Image]) -> list[list[bool]]:
    """For each of FIGURES, whether it is right: once for the whole answer, or once a view."""
    found = nearest_views(images, wanted[0].backdrop)
    if len(found) != len(wanted):  # an answer that ended early
        return [[False], [False] * len(wanted), [False], [False], [False]]
    each = [got == view for got, view in zip(found, wanted, strict=True)]
    solid = all(got.solid == view.solid for got, view in zip(found, wanted, strict=True))
    color = all(got.color == view.color for got, view in zip(found, wanted, strict=True))
    behind = all(nearest_color(image) == wanted[0].backdrop for image in images)
    return [[all(each)], each, [solid], [color], [behind]]
