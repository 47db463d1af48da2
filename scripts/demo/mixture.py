"""The kinds of records of the demo's second training, and what makes them."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import drawing
import long_talks
import marks
import normals
import reading
import talks
import views
from examples import Example

MODULES: tuple[ModuleType, ...] = (drawing, reading, talks, marks, normals, views, long_talks)


@dataclass(frozen=True)
class Kind:
    """A kind of records: its name, the module that makes them, and how many there are."""

    name: str
    module: ModuleType
    count: int

    def examples(self, names: list[str], count: int, rng: random.Random, unknown: Sequence[str] = ()) -> list[Example]:
        """Training examples. `unknown`: names of emoji that the demo does not know."""
        more = {"unknown": unknown} if self.module is reading else {}
        return self.module.examples(self.name, names, count, rng, **more)


def kinds() -> dict[str, Kind]:
    """All kinds by name."""
    return {name: Kind(name, module, count) for module in MODULES for name, count in module.KINDS.items()}
