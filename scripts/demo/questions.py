"""Questions about a picture, with balanced answers."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from coloring import OBJECT_COLORS
from composed import OPPOSITE, Picture, arranged, colorable, place, relation
from emoji import COLORS, with_article
from words import NUMBERS, countable, plural, the, thing, word_for

_NOTHING, _YES, _NO = "nothing", "yes", "no"
_PLACES = ("middle", "left", "right", "top", "bottom", "top left", "top right", "bottom left", "bottom right")
_FEW_ANSWERS = ("background", "color", "count", "exists", "where")  # kinds with few different answers
# Kind of a further question, or its answer -> share that training keeps; all of the others. Earlier text may answer
# "what" and "exists". The others would be too frequent.
_KEPT: Mapping[str, float] = MappingProxyType(
    {"what": 0.0, "exists": 0.0, "background": 0.3, "one": 0.15, "none": 0.15, "in the middle": 0.2}
)


@dataclass(frozen=True)
class Question:
    """A question about a picture, and its answer. `name`: the object that it names, of kinds in `about_others`."""

    kind: str
    text: str
    answer: str
    picture: Picture | None = None
    name: str = ""


def _asked_what(names: Sequence[str], rng: random.Random) -> Question:
    color = rng.choice(list(OBJECT_COLORS)) if rng.random() < 0.3 else None
    picture = arranged([(rng.choice(colorable(names) if color else names), color)], rng)
    return ask_what(picture, rng)


def ask_what(picture: Picture, rng: random.Random) -> Question:
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


def fitting(picture: Picture, names: Sequence[str], rng: random.Random) -> list[Question]:
    """A question of each kind that fits a picture, in random order."""
    items, few = picture.items, {item.name for item in picture.items}
    asked = [_background(picture, rng), _exists(picture, rng, names)]
    if len(items) == 1:
        asked.append(ask_what(picture, rng))
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
    asked = fitting(picture, names, rng)
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


def held_out_questions(kind: str, names: list[str], count: int, rng: random.Random) -> list[Question]:
    """Held-out questions of one kind, for the evaluation; answers are equally frequent."""
    return [balanced(kind, names, rng, held_out=True) for _ in range(count)]
