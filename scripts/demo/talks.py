"""Conversations of the demo: draw a scene, ask about it, edit it, ask again."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

from coloring import OBJECT_COLORS
from composed import Picture, colorable, fitting_backgrounds
from emoji import with_articles
from examples import Example
from questions import fitting
from reading import described, random_picture, replaced
from words import caption, request, the, thing

from lumina_mgpt.prompts import PICTURE, TASKS

KINDS: Mapping[str, int] = MappingProxyType({"talk": 9000})
# Operation -> wordings of an edit: {o} is the old object, {n} the new one, {c} a colour.
EDITS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "background": ("make the background {c}", "change the background to {c}"),
        "replace": ("replace {o} with {n}", "turn {o} into {n}"),
        "recolor": ("make {o} {c}", "paint {o} {c}"),
        "remove": ("remove {o}", "take {o} away"),
    }
)
_DESCRIBE = ("Describe the picture.", "What does the picture show?", "Describe the image in detail.")


@dataclass(frozen=True)
class Talk:
    """What a conversation is about: the picture before the edit, the edit, and the picture after it."""

    before: Picture
    operation: str
    instruction: str
    after: Picture


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Conversations. With `held_out`, the picture before or after the edit has a held-out combination."""
    found: list[Example] = []
    while len(found) < count:
        made = _talk(names, rng, held_out)
        if (made.about.before.held_out or made.about.after.held_out) == held_out:
            found.append(made)
    return found


def _talk(names: Sequence[str], rng: random.Random, held_out: bool) -> Example:
    before = random_picture(names, rng)
    operation, instruction, after = edited(before, names, rng)
    words = caption(before, rng)
    size = TASKS["t2i"].instruction(words, *before.size)
    turns = [size if held_out or rng.random() < 0.4 else request(words, rng), PICTURE]
    turns += _read(before, names, rng)
    text = instruction[0].upper() + instruction[1:] + "." if rng.random() < 0.6 else instruction
    turns += [text, PICTURE, *_read(after, names, rng)]
    # Half of them end with a picture, so that drawing it is learned without a context, too.
    if not held_out and rng.random() < 0.5:
        turns = turns[: len(turns) - 1 - turns[::-1].index(PICTURE) + 1]
    return Example("talk", tuple(turns), ((before,), (after,)), Talk(before, operation, text, after))


def _read(picture: Picture, names: Sequence[str], rng: random.Random) -> list[str]:
    if rng.random() < 0.4:
        return [rng.choice(_DESCRIBE), described(picture)]
    return [text for question in fitting(picture, names, rng)[:2] for text in (question.text, question.answer)]


def edited(picture: Picture, names: Sequence[str], rng: random.Random) -> tuple[str, str, Picture]:
    """A random edit: operation, instruction, and the picture after it."""
    single = [n for n, item in enumerate(picture.items) if picture.names.count(item.name) == 1]
    pool = ["background", *["replace", "recolor"] * bool(single), *["remove"] * (len(single) > 1)]
    operation = rng.choice(pool)
    if operation == "background":
        grounds = fitting_backgrounds([item.color for item in picture.items])
        color = rng.choice([ground for ground in grounds if ground != picture.background] or grounds)
        return operation, _worded(operation, rng, c=color), replace(picture, background=color)
    at = rng.choice(single)
    item = picture.items[at]
    if operation == "remove":
        rest = picture.items[:at] + picture.items[at + 1 :]
        return operation, _worded(operation, rng, o=the(item, rng)), replace(picture, items=rest)
    if operation == "replace":
        name = rng.choice([name for name in names if name not in picture.names])
        words = _worded(operation, rng, o=the(item, rng), n=thing((name, None), rng))
        return operation, words, replaced(picture, at, (name, None))
    colors = [c for c in OBJECT_COLORS if c != item.color and picture.background in fitting_backgrounds([c])]
    if item.name not in colorable(names) or not colors:
        return edited(picture, names, rng)
    color = rng.choice(colors)
    words = _worded(operation, rng, o=the((item.name, None), rng), c=color)
    return operation, words, replaced(picture, at, (item.name, color))


def _worded(operation: str, rng: random.Random, **words: str) -> str:
    return with_articles(rng.choice(EDITS[operation]).format(**words))
