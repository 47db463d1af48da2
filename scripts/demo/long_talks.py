"""Conversations that go on with another subject: marks, views, or another picture to read."""

import random
from collections.abc import Mapping
from types import MappingProxyType

import marks
import reading
import talks
import views
from examples import Example, joined

KINDS: Mapping[str, int] = MappingProxyType({"long": 3000})
_LATER = (("views", views), ("views", views), ("detect", marks), ("caption", reading), ("talk", talks))


def examples(kind: str, names: list[str], count: int, rng: random.Random, held_out: bool = False) -> list[Example]:
    """Conversations about a scene, then about something else. With `held_out`, both parts are held out of training."""
    found = []
    for _ in range(count):
        later, module = rng.choice(_LATER)
        (first,) = talks.examples("talk", names, 1, rng, held_out)
        (then,) = module.examples(later, names, 1, rng, held_out)
        whole = joined(first, then)
        found.append(Example(kind, whole.turns, whole.images, whole.about))
    return found
