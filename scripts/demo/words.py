"""Words of the demo: plurals, numbers, captions of scenes, and names that it does not know."""

import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from coloring import OBJECT_COLORS
from composed import Item, Picture, in_reading_order, relation
from emoji import ALIASES, is_plural, known_names, picture_paths, with_article, with_articles
from scenes import noun

NUMBERS = ("no", "one", "two", "three", "four")
_RELATIONS = {
    "left": ("to the left of", "left of"),
    "right": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below",),
}
_IRREGULAR = {
    "mouse": "mice", "wolf": "wolves", "octopus": "octopuses", "cactus": "cacti", "bus": "buses", "leaf": "leaves",
    "die": "dice", "snowman": "snowmen", "fish": "fish", "deer": "deer", "shrimp": "shrimps", "sheep": "sheep",
}  # fmt: skip
_ON = (
    "{o} on a {c} background",
    "{o} on a {c} background",
    "{o} on a {c} background",
    "{o}, {c} background",
    "{c} background, {o}",
    "a picture of {o} on a {c} background",
    "{o} in front of a {c} background",
)
_DRAW = ("Draw {t}.", "Draw {t}", "Show me {t}.", "Paint {t}.")
_GROUPS = ("Animals & Nature", "Food & Drink", "Travel & Places", "Objects", "Activities")  # of unknown names
UNKNOWN = "I don't know."
HELD_OUT_UNKNOWN = 100  # unknown names that training never sees


def plural(name: str) -> str:
    """`fox` -> `foxes`, `maple leaf` -> `maple leaves`, `ear of corn` -> `ears of corn`."""
    head, of, rest = name.partition(" of ")
    *before, last = head.split(" ")
    if last in _IRREGULAR:
        last = _IRREGULAR[last]
    elif re.search("(s|x|z|ch|sh|tomato|potato)$", last):
        last += "es"
    elif re.search("[^aeiou]y$", last):
        last = last[:-1] + "ies"
    else:
        last += "s"
    return " ".join([*before, last]) + of + rest


def countable(names: Sequence[str]) -> list[str]:
    """Names of which there can be several in a scene."""
    return [name for name in names if not is_plural(name) and name != "statue of liberty"]


def word_for(name: str, rng: random.Random | None = None) -> str:
    """What people call an emoji: with `rng` its Unicode name or its everyday name, without always the latter."""
    return noun(name, rng) if rng else ALIASES.get(name, name)


def thing(item: Item | tuple[str, str | None], rng: random.Random | None = None) -> str:
    """`a fox`, or `a green fox`. `rng`: as in `word_for`."""
    name, color = item.what if isinstance(item, Item) else item
    word = word_for(name, rng)
    if not color:
        return with_article(word)
    return f"{color} {word}" if is_plural(word) else with_articles(f" a {color} {word}").strip()


def the(item: Item | tuple[str, str | None], rng: random.Random | None = None) -> str:
    """`the fox`, or `the green fox`. `rng`: as in `word_for`."""
    name, color = item.what if isinstance(item, Item) else item
    return " ".join(filter(None, ("the", color, word_for(name, rng))))


def several(count: int, name: str, color: str | None = None, rng: random.Random | None = None) -> str:
    """`three green foxes`, or `one fox`."""
    word = word_for(name, rng)
    return " ".join(filter(None, (NUMBERS[count], color, word if count == 1 else plural(word))))


def listed(parts: Sequence[str]) -> str:
    """`a fox, a fish and an owl`."""
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def objects(picture: Picture, rng: random.Random | None = None, related: bool = True) -> str:
    """What a scene shows, without its background. The phrasing is fixed unless `rng` is given.

    Args:
        related: whether to say where one of two objects is. Objects without that are named in reading order: a model
            that draws row by row cannot see from the first rows of an object which one it is.
    """
    items = picture.items
    if len(items) > 1 and len({item.what for item in items}) == 1:
        name, color = items[0].what
        return several(len(items), name, color, rng)
    side = relation(*items) if len(items) == 2 and related else None
    if side:
        words = rng.choice(_RELATIONS[side]) if rng else _RELATIONS[side][0]
        return f"{thing(items[0], rng)} {words} {thing(items[1], rng)}"
    return listed([thing(item, rng) for item in in_reading_order(picture).items])


def caption(picture: Picture, rng: random.Random | None = None, related: bool = True, shown: str = "") -> str:
    """The scene in words. Arguments: as `objects`; `shown` replaces what the scene shows."""
    template = rng.choice(_ON) if rng else _ON[0]
    text = with_articles(template.format(o=shown or objects(picture, rng, related), c=picture.background))
    return _varied(text, rng) if rng else text


def _varied(text: str, rng: random.Random) -> str:
    if rng.random() < 0.15:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.1 else text


def request(text: str, rng: random.Random) -> str:
    """A wish in a conversation to see what a text says."""
    return rng.choice(_DRAW).format(t=text[0].lower() + text[1:].rstrip("."))


def unknown_names(folder: Path) -> tuple[list[str], list[str]]:
    """Unicode names of emoji that the demo does not know: those for training, and those for the evaluation.

    Args:
        folder: the emoji packages.
    """
    found = {*picture_paths(folder, _GROUPS)}
    known = {*known_names(), *ALIASES.values()}
    words = {word for name in known for word in name.split(" ")}
    # A name that shares a word with a known one, such as "green book", is not wholly unknown.
    fits = [n for n in sorted(found - known) if n.isascii() and n.replace(" ", "").isalpha()]
    fits = [n for n in fits if not {*n.split()} & words and not n.startswith(("hour", "heir"))]
    chosen = random.Random(20).sample(fits, min(HELD_OUT_UNKNOWN, len(fits) // 2))
    return [name for name in fits if name not in set(chosen)], chosen


# -- understanding captions --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Said:
    """What a caption says: objects (name, colour) with their numbers, background, and (first, side, second) of two."""

    objects: tuple[tuple[tuple[str, str], int], ...]
    background: str
    relation: tuple[str, str, str] | None = None

    @classmethod
    def of(cls, picture: Picture) -> "Said":
        """What a right caption says. A colour that is an object's own counts as ""."""
        side = relation(*picture.items) if len(picture.items) == 2 else None
        first, second = (picture.names[0], picture.names[-1])
        return cls(
            _counted([(item.name, item.color or "") for item in picture.items]),
            picture.background,
            (first, side, second) if side else None,
        )


def parsed(text: str) -> Said | None:
    """What a caption in the form of `caption` without `rng` says; None for any other text."""
    match = re.fullmatch(r"(.+) on an? ([a-z ]+) background", text)
    if not match:
        return None
    shown, background = match.groups()
    for side, phrases in _RELATIONS.items():
        first, found, second = shown.partition(f" {phrases[0]} ")
        if found:
            pair = [_named(part) for part in (first, second)]
            if None in pair:
                return None
            whats = [what for what in pair if what]
            return Said(_counted(whats), background, (whats[0][0], side, whats[1][0]))
    number, _, rest = shown.partition(" ")
    if number in NUMBERS[2:]:
        what = _named(rest, plural)
        return Said(_counted([what] * NUMBERS.index(number)), background) if what else None
    things = [_named(part) for part in re.split(", | and ", shown)]
    return None if None in things else Said(_counted([what for what in things if what]), background)


def _counted(whats: Sequence[tuple[str, str]]) -> tuple[tuple[tuple[str, str], int], ...]:
    return tuple(sorted(Counter(whats).items()))


@lru_cache
def _nouns(form: Callable[[str], str]) -> dict[str, str]:
    """What captions call the known emoji -> their names."""
    return {form(word_for(name)): name for name in known_names()}


def _named(text: str, form: Callable[[str], str] = str) -> tuple[str, str] | None:
    """(name, colour or "") of a noun with or without an article; None for an unknown one."""
    known = _nouns(form)
    noun_ = re.sub("^(a|an|the) ", "", text)
    if noun_ in known:
        return known[noun_], ""
    color, _, rest = noun_.partition(" ")
    return (known[rest], color) if color in OBJECT_COLORS and rest in known else None
