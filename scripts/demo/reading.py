"""Records of reading: captions, questions, several pictures, and what the demo does not know."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from coloring import OBJECT_COLORS
from composed import Item, Picture, arranged, colorable, first_of, fitting_backgrounds, in_reading_order
from emoji import with_article
from examples import Example
from PIL import Image
from questions import Question, about_others, ask_what, balanced, fitting, further
from words import UNKNOWN, caption, countable, request, thing, word_for

from lumina_mgpt.images import center_crop
from lumina_mgpt.prompts import PICTURE

# Kind -> number of training records. Several questions about one picture make one record.
KINDS: Mapping[str, int] = MappingProxyType({"caption": 18000, "question": 22000, "pictures": 4000, "unknown": 6000})
DESCRIBE = "Describe the image in detail."  # what `lumina-mgpt describe` asks
_DESCRIBE = (DESCRIBE, DESCRIBE, "Describe the picture.", "What does the picture show?")
_ITEMS = (1, 1, 1, 2, 2, 2, 3, 4)  # numbers of objects in a picture
_TRAINED_ITEMS = (1, 2, 2, 3, 3, 4, 4, 4)  # of captions in training: more names for each code
# Sizes that `lumina-mgpt describe` scales without a crop to a size of about 96 x 96 pixels, and what they become.
_SCALED = {(192, 96): (128, 64), (96, 192): (64, 128)}
_SCALED_SHARE = 0.3  # of the training pictures of these sizes
# Kinds of first questions in training; a repeated one is more frequent.
_FIRST = (
    "what", "what", "what", "exists", "exists", "exists", "count", "count", "count", "beside", "beside", "where",
    "where", "where", "where", "color", "background",
)  # fmt: skip
_WHICH = ("the first", "the second", "both", "neither")


@dataclass(frozen=True)
class Scaled:
    """A scene in the size that `lumina-mgpt describe` gives to its file."""

    picture: Picture

    @property
    def key(self) -> str:
        return f"scaled {self.picture.key}"

    def draw(self, pictures: dict[str, np.ndarray]) -> Image.Image:
        """The smaller picture."""
        return center_crop(self.picture.draw(pictures), _SCALED[self.picture.size])


@dataclass(frozen=True)
class Term:
    """A name that an example asks about, and whether the demo knows it."""

    name: str
    known: bool


def described(picture: Picture) -> str:
    """The caption that the demo gives: objects in reading order, the left or the upper of two first."""
    return caption(in_reading_order(picture))


# -- examples ----------------------------------------------------------------------------------------------------------


def examples(
    kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False, unknown: Sequence[str] = ()
) -> list[Example]:
    """Examples of a kind. Held-out ones ask one question each, about a picture with a held-out combination.

    Args:
        unknown: names that the demo does not know; those of the kind `unknown` come from here.
    """
    if kind == "unknown":
        return [_unknown(names, unknown, rng) for _ in range(count)]
    makers = {"caption": _caption, "question": _question, "pictures": _two_pictures}
    found: list[Example] = []
    while len(found) < count:
        made = makers[kind](names, rng, held_out)
        shown = [getattr(panel, "picture", panel) for panels in made.images for panel in panels]
        if any(picture.held_out for picture in shown) == held_out:
            found.append(made)
    return found


def shown_first(text: str) -> str:
    """A question with its picture before it, as a turn."""
    return f"{PICTURE} {text}"


def random_picture(names: Sequence[str], rng: random.Random, count: int | None = None) -> Picture:
    """A scene of any of the kinds that the demo draws, of `count` objects (default: a random number)."""
    count, color = count or rng.choice(_ITEMS), rng.random() < 0.4
    pool = colorable(names) if color else list(names)
    if count > 1 and rng.random() < 0.35:
        return arranged([(rng.choice(countable(pool)), None)] * count, rng)
    colors = rng.sample(list(OBJECT_COLORS), count) if color else [None] * count
    if not fitting_backgrounds(colors):
        colors = [None] * count
    return arranged(list(zip(rng.sample(pool, count), colors, strict=True)), rng)


def _caption(names: Sequence[str], rng: random.Random, held_out: bool) -> Example:
    count = rng.choice(_ITEMS if held_out else _TRAINED_ITEMS)
    picture = first_of(lambda: random_picture(names, rng, count), held_out)
    # `describe` writes the picture after its question.
    text = f"{DESCRIBE} {PICTURE}" if held_out or rng.random() < 0.6 else shown_first(rng.choice(_DESCRIBE))
    return Example("caption", (text, described(picture)), ((_as_file(picture, rng, held_out),),), picture)


def _as_file(picture: Picture, rng: random.Random, held_out: bool) -> Picture | Scaled:
    """The picture, or in training sometimes a smaller one."""
    scaled = picture.size in _SCALED and not held_out and rng.random() < _SCALED_SHARE
    return Scaled(picture) if scaled else picture


def _question(names: Sequence[str], rng: random.Random, held_out: bool) -> Example:
    question = balanced(rng.choice(_FIRST), names, rng, held_out)
    picture = question.picture
    assert picture
    text = f"{question.text} {PICTURE}" if rng.random() < 0.5 else shown_first(question.text)
    turns = [text, question.answer]
    if not held_out:
        more = [other for other in further(picture, names, rng) if other.kind != question.kind]
        for other in (*about_others(question, names, rng), *more):
            turns += [other.text, other.answer]
        # A caption counts equal objects only where there are no others.
        if len({item.what for item in picture.items}) in (1, len(picture.items)) and rng.random() < 0.5:
            turns += [rng.choice(_DESCRIBE), described(picture)]
    return Example("question", tuple(turns), ((_as_file(picture, rng, held_out),),), question)


def _two_pictures(names: Sequence[str], rng: random.Random, held_out: bool) -> Example:
    first, second = (random_picture(names, rng) for _ in range(2))
    if held_out or rng.random() < 0.5:
        answer = rng.choice(_WHICH)
        name = rng.choice(names)
        first, second = (_with(picture, name, answer in wanted, names, rng) for picture, wanted in (
            (first, (_WHICH[0], _WHICH[2])), (second, (_WHICH[1], _WHICH[2]))
        ))  # fmt: skip
        text = f"{PICTURE} {PICTURE} Which picture shows {with_article(word_for(name, rng))}?"
        return Example("pictures", (text, answer), ((first,), (second,)), Question("which", text, answer))
    turns: list[str] = []
    for number, picture in enumerate((first, second)):
        question = fitting(picture, names, rng)[0]
        turns += [shown_first(question.text), question.answer]
        if number:
            text = rng.choice(("Describe the first picture.", "What did the first picture show?"))
            turns += [text, described(first)]
    return Example("pictures", tuple(turns), ((first,), (second,)))


def _with(picture: Picture, name: str, there: bool, names: Sequence[str], rng: random.Random) -> Picture:
    """The picture with or without an object of this name: one of its objects changes if necessary."""
    if there == (name in picture.names):
        return picture
    if there:
        return replaced(picture, rng.randrange(len(picture.items)), (name, None))
    pool = colorable(names) if any(item.color for item in picture.items) else names
    at = rng.sample([other for other in pool if other != name and other not in picture.names], len(picture.items))
    items = [
        replace(item, name=new) if item.name == name else item for item, new in zip(picture.items, at, strict=True)
    ]
    return replace(picture, items=tuple(items))


def replaced(picture: Picture, at: int, what: tuple[str, str | None]) -> Picture:
    """The picture with another object in the place of the object `at`."""
    items: list[Item] = list(picture.items)
    items[at] = replace(items[at], name=what[0], color=what[1])
    return replace(picture, items=tuple(items))


def _unknown(names: Sequence[str], unknown: Sequence[str], rng: random.Random) -> Example:
    known = rng.random() < 0.5
    name = rng.choice(names if known else unknown)
    about, form = Term(name, known), rng.random()
    if form < 0.35:
        picture = first_of(lambda: arranged([(name, None)], rng), False)
        answer = thing(picture.items[0]) if known else UNKNOWN
        return Example("unknown", (shown_first(ask_what(picture, rng).text), answer), ((picture,),), about)
    if form < 0.6:
        terms = [Term(rng.choice(names if yes else unknown), yes) for yes in rng.choices((True, False), k=12)]
        turns: list[str] = []
        for term in (about, *terms[: rng.randint(4, 12)]):
            text = f"Do you know what {with_article(word_for(term.name, rng))} is?"
            turns += [text, "Yes." if term.known else UNKNOWN]
        return Example("unknown", tuple(turns), (), about)
    # A refusal is one decision among many ids, so a record has several.
    refused = [*([] if known else [name]), *rng.choices(unknown, k=rng.randint(0, 5 - (not known)))]
    asked = [first_of(lambda other=other: arranged([(other, None)], rng), False) for other in refused]
    turns = [text for picture in asked for text in (request(caption(picture, rng), rng), UNKNOWN)]
    if not known:
        return Example("unknown", tuple(turns), (), about)
    picture = first_of(lambda: arranged([(name, None)], rng), False)
    turns += [request(caption(picture, rng), rng), PICTURE]
    # Its codes would count more than all words in a batch: see decision_tokens.py.
    return Example("unknown", tuple(turns), ((picture,),), about, {"starts": []})
