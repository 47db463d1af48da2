"""Training examples of the demo as conversations with pictures, and the files that pre-tokenization reads."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from emoji import CELL
from PIL import Image
from tqdm import tqdm

from lumina_mgpt.io import json_line, write_atomic
from lumina_mgpt.prompts import PICTURE, text_to_image


class Drawable(Protocol):
    """A description of one picture: a frozen dataclass."""

    @property
    def key(self) -> str:
        """Unique text of the picture: equal keys mean equal pictures."""

    def draw(self, pictures: dict[str, np.ndarray]) -> Image.Image:
        """The picture, RGB; its sides are multiples of 32. `pictures` are those of `emoji.load`."""


@dataclass(frozen=True)
class Example:
    """One conversation.

    Attributes:
        kind: name of the records that it belongs to.
        turns: texts of the human and the assistant in turn, with PICTURE for each image.
        images: for each PICTURE, the panels of the image from the top; most images have one.
        about: what the evaluation needs to know. It is not written to files.
        extra: further keys of the record.
    """

    kind: str
    turns: tuple[str, ...]
    images: tuple[tuple[Drawable, ...], ...] = ()
    about: Any = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.turns) % 2 == 0, self.turns
        assert sum(turn.count(PICTURE) for turn in self.turns) == len(self.images), self


def joined(first: Example, then: Example) -> Example:
    """Two conversations as one, with the kind of the second."""
    return Example(then.kind, first.turns + then.turns, first.images + then.images, then.about)


def path_of(picture: Drawable, folder: Path) -> Path:
    """File of a picture. Its name is a hash of the key, in one of 256 folders."""
    name = hashlib.sha256(picture.key.encode()).hexdigest()[:20]
    return folder / name[:2] / f"{name}.png"


def record(example: Example, folder: Path) -> dict:
    """The example as a row for pre-tokenization. `folder` is that of the pictures."""
    roles = ("human", "gpt")
    turns = [{"from": roles[n % 2], "value": text} for n, text in enumerate(example.turns)]
    images = [[str(path_of(panel, folder)) for panel in panels] for panels in example.images]
    return {"conversations": turns, "image": images, "task": example.kind, **example.extra}


def write(path: Path, todo: Sequence[Example], folder: Path, pictures: dict[str, np.ndarray]) -> None:
    """Writes the pictures that `folder` lacks, then the records to `path`."""
    for example in tqdm(todo, desc=path.stem, unit="record"):
        for panel in (panel for panels in example.images for panel in panels):
            file = path_of(panel, folder)
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                part = file.with_suffix(".part.png")
                panel.draw(pictures).save(part, compress_level=1)
                part.replace(file)  # a stop leaves no damaged picture
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(json_line(record(example, folder)) for example in todo))


def texts(path: Path) -> list[str]:
    """All texts in a file of records of either form, without the marks of pictures."""
    rows = list(map(json.loads, path.read_text(encoding="utf-8").splitlines()))
    captions = [text_to_image(row["prompt"], CELL, CELL) for row in rows if "prompt" in row]
    turns = [turn["value"] for row in rows for turn in row.get("conversations", ())]
    return captions + [text.replace(PICTURE, " ") for text in turns]
