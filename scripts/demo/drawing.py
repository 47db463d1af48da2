"""Prompts with their pictures in the six categories of GenEval (arXiv 2310.11513), and of several objects."""

import random
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from coloring import OBJECT_COLORS
from composed import Picture, arranged, colorable, is_held_out, relation
from examples import Example
from words import caption, countable, request, several

from lumina_mgpt.prompts import PICTURE, TASKS, text_to_image_plain

# Kind -> number of training records.
KINDS: Mapping[str, int] = MappingProxyType(
    {
        "single": 5000,
        "two": 4000,
        "counting": 6000,
        "colors": 8000,
        "position": 5000,
        "attribution": 6000,
        "several": 2000,
    }
)
_PLAIN, _CHAT = 0.1, 0.25  # shares of records whose instruction names no size, and that are a wish in a conversation

Made = tuple[Picture, str, bool]  # scene, prompt, and whether the combination that the category tests is held out


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Examples of a category.

    Args:
        count: how many.
        held_out: only examples whose tested combination is held out of training, all with the instruction of
            text to image; else only examples without any such combination.
    """
    found: list[Example] = []
    while len(found) < count:
        picture, prompt, tested = _MAKERS[kind](names, rng)
        if tested if held_out else not picture.held_out:
            turns = (prompt if held_out else _instruction(prompt, picture, rng), PICTURE)
            found.append(Example(kind, turns, ((picture,),), picture))
    return found


def _instruction(prompt: str, picture: Picture, rng: random.Random) -> str:
    share = rng.random()
    if share < _PLAIN:
        return text_to_image_plain(prompt)
    return request(prompt, rng) if share < _PLAIN + _CHAT else TASKS["t2i"].instruction(prompt, *picture.size)


def _colors(rng: random.Random, count: int) -> list[str]:
    return rng.sample(list(OBJECT_COLORS), count)


def _single(names: Sequence[str], rng: random.Random) -> Made:
    picture = arranged([(rng.choice(names), None)], rng)
    return picture, caption(picture, rng), picture.held_out


def _two(names: Sequence[str], rng: random.Random) -> Made:
    picture = arranged([(name, None) for name in rng.sample(names, 2)], rng)
    return picture, caption(picture, rng, related=False), picture.held_out


def _counting(names: Sequence[str], rng: random.Random) -> Made:
    name, count = rng.choice(countable(names)), rng.randint(1, 4)
    picture = arranged([(name, None)] * count, rng)
    return picture, caption(picture, rng, shown=several(count, name, rng=rng)), picture.held_out


def _of_a_color(names: Sequence[str], rng: random.Random) -> Made:
    picture = arranged([(rng.choice(colorable(names)), *_colors(rng, 1))], rng)
    return picture, caption(picture, rng), picture.held_out


def _position(names: Sequence[str], rng: random.Random) -> Made:
    while True:
        picture = arranged([(name, None) for name in rng.sample(names, 2)], rng)
        if relation(*picture.items):
            return picture, caption(picture, rng), picture.held_out


def _attribution(names: Sequence[str], rng: random.Random) -> Made:
    chosen = rng.sample(colorable(names), 2)
    picture = arranged(list(zip(chosen, _colors(rng, 2), strict=True)), rng)
    return picture, caption(picture, rng, related=False), is_held_out(sorted(chosen))


def _several(names: Sequence[str], rng: random.Random) -> Made:
    picture = arranged([(name, None) for name in rng.sample(names, rng.randint(3, 4))], rng)
    return picture, caption(picture, rng), picture.held_out


_MAKERS: Mapping[str, Callable[[Sequence[str], random.Random], Made]] = MappingProxyType(
    {
        "single": _single,
        "two": _two,
        "counting": _counting,
        "colors": _of_a_color,
        "position": _position,
        "attribution": _attribution,
        "several": _several,
    }
)
