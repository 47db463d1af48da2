"""Rows of the evaluation: detection of objects in held-out scenes."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import marks
from composed import Picture
from evaluation import Mean
from examples import Example
from PIL import Image
from reading_rows import turns_of
from row_tools import Bench, Figures, Row, share

from lumina_mgpt.boxes import changed_pixels

_SPECKS = 0.02  # share of the pixels: less than half of what the lines of a box cover


def _answers(bench: Bench, todo: Sequence[Example], label: str) -> tuple[list[Image.Image], list[Image.Image]]:
    """The answers, and the given pictures through the image tokenizer."""
    asked = [turns_of(bench, example) for example in todo]
    about = [example.about for example in todo]
    given: list[Picture] = [shown.picture if isinstance(shown, marks.Marked) else shown for shown in about]
    codes = bench.answered_in_pictures(asked, [picture.size for picture in given], label, **marks.TASK.sampling)
    images = [bench.shown(grid) for grid in codes]
    bench.sheet(label, images, [example.turns[0].partition("<")[0] for example in todo])
    return images, [bench.through_tokenizer(picture.draw(bench.pictures)) for picture in given]


def detection(bench: Bench) -> Figures:
    """The box that is found by difference and the true one must have an intersection over union above RIGHT.

    `(tokenizer)`: the true answer after the image tokenizer.
    """
    todo = marks.examples("detect", bench.names, bench.count, bench.rng("detect"), held_out=True)
    images, references = _answers(bench, todo, "detect")
    truth = [bench.through_tokenizer(example.about.draw(bench.pictures)) for example in todo]

    def overlaps(drawn: Sequence[Image.Image]) -> list[float]:
        rows = zip(todo, drawn, references, strict=True)
        return [marks.found_overlap(e.about, image, reference, bench.pictures) for e, image, reference in rows]

    found, best = overlaps(images), overlaps(truth)
    return {
        "box right": share(value > marks.RIGHT for value in found),
        "box right (tokenizer)": share(value > marks.RIGHT for value in best),
        "overlap": Mean(tuple(found)),
        "box found": share(value > 0 for value in found),
    }


def absent(bench: Bench) -> Figures:
    """What the picture does not show gets no box: the answer is the picture, but for at most _SPECKS of the pixels."""
    todo = marks.examples("detect_absent", bench.names, bench.count, bench.rng("detect_absent"), held_out=True)
    images, references = _answers(bench, todo, "detect_absent")
    return {
        "unchanged": share(
            bool(changed_pixels(*pair).mean() <= _SPECKS) for pair in zip(images, references, strict=True)
        )
    }


ROWS: Mapping[str, Row] = MappingProxyType({"detect": detection, "detect_absent": absent})
