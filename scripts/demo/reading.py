"""Pictures to read: captions, questions with balanced answers, several pictures, and what the demo does not know."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from coloring import OBJECT_COLORS
from composed import (
    OPPOSITE,
    Item,
    Picture,
    arranged,
    colorable,
    fitting_backgrounds,
    in_reading_order,
    place,
    relation,
)
from emoji import COLORS, with_article
from examples import Example
from PIL import Image
from words import NUMBERS, UNKNOWN, caption, countable, plural, request, the, thing, word_for

from lumina_mgpt.images import center_crop
from lumina_mgpt.prompts import PICTURE

# Kind -> number of training records. Several questions about one picture make one record.
KINDS: Mapping[str, int] = MappingProxyType({"caption": 18000, "question": 22000, "pictures": 4000, "unknown": 6000})
DESCRIBE = "Describe the image in detail."  # what `lumina-mgpt describe` asks
_DESCRIBE = (DESCRIBE, DESCRIBE, "Describe the picture.", "What does the picture show?")
_NOTHING, _YES, _NO = "nothing", "yes", "no"
_ITEMS = (1, 1, 1, 2, 2, 2, 3, 4)  # numbers of objects in a picture
_TRAINED_ITEMS = (1, 2, 2, 3, 3, 4, 4, 4)  # of captions in training: more names for each code
# Sizes that `lumina-mgpt describe` scales without a crop to a size of about 96 x 96 pixels, and what they become.
_SCALED = {(192, 96): (128, 64), (96, 192): (64, 128)}
_SCALED_SHARE = 0.3  # of the training pictures of these sizes
# Kinds of first questions in training; a repeated one is more frequent. Those of _KEPT with 0 come first or not at all.
_FIRST = (
    "what", "what", "what", "exists", "exists", "exists", "count", "count", "count", "beside", "beside", "where",
    "where", "where", "where", "color", "background",
)  # fmt: skip
# Answer, or kind of question -> share of the further questions that training keeps; all of the others. A name in an
# earlier text gives away "what" and "exists", and the answers are too frequent.
_KEPT: Mapping[str, float] = MappingProxyType(
    {"what": 0.0, "exists": 0.0, "background": 0.3, "one": 0.15, "none": 0.15, "in the middle": 0.2}
)
_FEW_ANSWERS = ("background", "color", "count", "exists", "where")  # kinds of questions
_PLACES = ("middle", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
_WHICH = ("the first", "the second", "both", "neither")


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its answer. `name`: what is counted, or may be there."""

    kind: str
    text: str
    answer: str
    picture: Picture | None = None
    name: str = ""


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


# -- questions ---------------------------------------------------------------------------------------------------------


def _asked_what(names: Sequence[str], rng: random.Random) -> Question:
    color = rng.choice(list(OBJECT_COLORS)) if rng.random() < 0.3 else None
    picture = arranged([(rng.choice(colorable(names) if color else names), color)], rng)
    return _what(picture, rng)


def _what(picture: Picture, rng: random.Random) -> Question:
    return Question("what", rng.choice(("What is it?", "What is this?")), thing(picture.items[0]), picture)


def _asked_background(names: Sequence[str], rng: random.Random) -> Question:
    picture = arranged([(name, None) for name in rng.sample(names, rng.randint(1, 3))], rng, rng.choice(COLORS))
    return _background(picture, rng)


def _background(picture: Picture, rng: random.Random) -> Question:
    text = rng.choice(("What colour is the background?", "What is the colour of the background?"))
    return Question("background", text, picture.background, picture)


def _asked_color(names: Sequence[str], rng: random.Random) -> Question:
    count = rng.randint(1, 2)
    colors = rng.sample(list(OBJECT_COLORS), count)
    picture = arranged(list(zip(rng.sample(colorable(names), count), colors, strict=True)), rng)
    return _color(picture, rng)


def _color(picture: Picture, rng: random.Random, name: str | None = None) -> Question:
    item = rng.choice([item for item in picture.items if item.color and name in (None, item.name)])
    text = rng.choice(("What colour is {o}?", "What is the colour of {o}?")).format(o=the((item.name, None), rng))
    return Question("color", text, item.color or "", picture, item.name)


def _asked_count(names: Sequence[str], rng: random.Random) -> Question:
    name, other = rng.sample(countable(names), 2)
    count = rng.randint(0, 4)
    others = rng.randint(0 if count else 1, 4 - count)
    return _count(arranged([(name, None)] * count + [(other, None)] * others, rng), rng, name)


def _count(picture: Picture, rng: random.Random, name: str) -> Question:
    found = picture.names.count(name)
    text = f"How many {plural(word_for(name, rng))} are there?"
    return Question("count", text, NUMBERS[found] if found else "none", picture, name)


def _asked_beside(names: Sequence[str], rng: random.Random) -> Question:
    while True:
        picture = arranged([(name, None) for name in rng.sample(names, 2)], rng)
        if relation(*picture.items):
            return _beside(picture, rng)


def _beside(picture: Picture, rng: random.Random) -> Question:
    first, second = rng.sample(picture.items, 2)
    side = relation(first, second)
    assert side
    answer = thing(first)
    if rng.random() < 0.3:
        side, answer = OPPOSITE[side], _NOTHING
    where = {"left": "to the left of", "right": "to the right of"}.get(side, side)
    return Question("beside", f"What is {where} {the(second, rng)}?", answer, picture)


def _asked_exists(names: Sequence[str], rng: random.Random) -> Question:
    return _exists(arranged([(name, None) for name in rng.sample(names, rng.randint(1, 4))], rng), rng, names)


def _exists(picture: Picture, rng: random.Random, names: Sequence[str]) -> Question:
    there = rng.random() < 0.5
    return _is_there(picture, rng, rng.choice(picture.names if there else _absent(picture, names)))


def _is_there(picture: Picture, rng: random.Random, name: str) -> Question:
    answer = _YES if name in picture.names else _NO
    return Question("exists", f"Is there {with_article(word_for(name, rng))}?", answer, picture, name)


def _absent(picture: Picture, names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in picture.names]


def _asked_where(names: Sequence[str], rng: random.Random) -> Question:
    wanted = rng.choice(_PLACES)
    while True:
        picture = arranged([(name, None) for name in rng.sample(names, rng.randint(1, 4))], rng)
        found = [item.name for item in picture.items if place(item, picture.size) == wanted]
        if found:
            return _where(picture, rng, rng.choice(found))


def _where(picture: Picture, rng: random.Random, name: str) -> Question:
    (item,) = (item for item in picture.items if item.name == name)
    found = place(item, picture.size)
    answer = f"{'in' if found == 'middle' else 'at'} the {found}"
    return Question("where", f"Where is {the(item, rng)}?", answer, picture, name)


def _placed(picture: Picture) -> list[str]:
    """Names of single objects whose place is clear."""
    clear = [item.name for item in picture.items if place(item, picture.size)]
    return [name for name in clear if picture.names.count(name) == 1]


# Kind of question -> function that makes a picture and a question about it. Answers of a kind are equally frequent.
QUESTIONS: Mapping[str, Callable[[Sequence[str], random.Random], Question]] = MappingProxyType(
    {
        "what": _asked_what,
        "background": _asked_background,
        "color": _asked_color,
        "count": _asked_count,
        "beside": _asked_beside,
        "exists": _asked_exists,
        "where": _asked_where,
    }
)


def questions(picture: Picture, names: Sequence[str], rng: random.Random) -> list[Question]:
    """A question of each kind that fits a picture, in random order."""
    items, few = picture.items, {item.name for item in picture.items}
    asked = [_background(picture, rng), _exists(picture, rng, names)]
    if len(items) == 1:
        asked.append(_what(picture, rng))
    if placed := _placed(picture):
        asked.append(_where(picture, rng, rng.choice(placed)))
    if any(item.color for item in items) and len(few) == len(items):
        asked.append(_color(picture, rng))
    if len(items) == 2 and relation(*items) and len(few) == 2:
        asked.append(_beside(picture, rng))
    counted = countable(sorted(few))
    if len(items) > 1 and counted:
        asked.append(_count(picture, rng, rng.choice(counted)))
    return rng.sample(asked, len(asked))


def further(picture: Picture, names: Sequence[str], rng: random.Random) -> list[Question]:
    """Questions for training about a picture that one was asked about, in random order: see _KEPT."""
    asked = questions(picture, names, rng)
    if rng.random() < 0.2:
        asked.append(_count(picture, rng, rng.choice(countable(_absent(picture, names)))))
    return [one for one in asked if rng.random() < _KEPT.get(one.answer, _KEPT.get(one.kind, 1.0))]


def about_others(question: Question, names: Sequence[str], rng: random.Random) -> list[Question]:
    """For training: the same question about each other object of the picture, and about some that it does not show.

    Only for the kinds that compare a name with the picture, which are learned slowly.
    """
    makers = {"exists": _is_there, "count": _count, "where": _where, "color": _color}
    picture, ask = question.picture, makers.get(question.kind)
    if not picture or not ask:
        return []
    shown = _placed(picture) if question.kind == "where" else sorted({*picture.names})
    absent = {"exists": len(shown), "count": rng.randint(0, 1)}.get(question.kind, 0)
    missing = rng.sample(_absent(picture, names), absent)
    chosen = [name for name in (*shown, *missing) if name != question.name]
    if question.kind == "count":
        chosen = countable(chosen)
    return [ask(picture, rng, name) for name in rng.sample(chosen, len(chosen))]


def balanced(kind: str, names: Sequence[str], rng: random.Random, held_out: bool) -> Question:
    """A question about a picture with a held-out combination, or without any.

    Neither the number of objects nor the answer, of kinds that have few, depends on `held_out`: a scene of more objects
    has a held-out combination more often.
    """

    def key(question: Question) -> tuple:
        assert question.picture
        return len(question.picture.items), question.answer if kind in _FEW_ANSWERS else ""

    wanted = key(QUESTIONS[kind](names, rng))
    while True:
        question = QUESTIONS[kind](names, rng)
        if question.picture and question.picture.held_out == held_out and key(question) == wanted:
            return question


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


def asked(kind: str, names: list[str], count: int, rng: random.Random) -> list[Question]:
    """Held-out questions of one kind, for the evaluation; answers are equally frequent."""
    return [balanced(kind, names, rng, held_out=True) for _ in range(count)]


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
    while (picture := random_picture(names, rng, count)).held_out != held_out:
        pass
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
        question = questions(picture, names, rng)[0]
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
        picture = _not_held_out(name, rng)
        answer = thing(picture.items[0]) if known else UNKNOWN
        return Example("unknown", (shown_first(_what(picture, rng).text), answer), ((picture,),), about)
    if form < 0.7:
        terms = [Term(rng.choice(names if yes else unknown), yes) for yes in rng.choices((True, False), k=6)]
        turns: list[str] = []
        for term in (about, *terms[: rng.randint(2, 6)]):
            text = f"Do you know what {with_article(word_for(term.name, rng))} is?"
            turns += [text, "Yes." if term.known else UNKNOWN]
        return Example("unknown", tuple(turns), (), about)
    picture = _not_held_out(name, rng)
    text = request(caption(picture, rng), rng)
    return Example("unknown", (text, PICTURE if known else UNKNOWN), ((picture,),) if known else (), about)


def _not_held_out(name: str, rng: random.Random) -> Picture:
    while (picture := arranged([(name, None)], rng)).held_out:
        pass
    return picture
