"""The options --best_of and --scorer, and how commands draw, choose and describe candidates."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lumina_mgpt.cli.parser import whole
from lumina_mgpt.errors import InputError
from lumina_mgpt.user_functions import add_working_folder

if TYPE_CHECKING:
    from lumina_mgpt.families import Family
    from lumina_mgpt.pipeline import OnRow, Pipeline
    from lumina_mgpt.preparation import PreparedRequest
    from lumina_mgpt.request import ImageJob
    from lumina_mgpt.results import Result
    from lumina_mgpt.scoring import Scorer


@dataclass(frozen=True)
class BestOf:
    """How many candidates a command draws for each image, and how it chooses.

    Attributes:
        count: candidates of each image.
        scorer: how they are scored.
        keep: whether to save the candidates, too.
        prompts: the prompts as the user wrote them, if they were rewritten. A user's function gets these.
    """

    count: int
    scorer: "Scorer"
    keep: bool = False
    prompts: Sequence[str] | None = None

    def text(self, family: "Family") -> bool | None:
        """Returns whether the pipeline must be able to sample text; None if it makes no difference."""
        return True if self.scorer.kind(family) == "reading" else None

    def described(self, family: "Family") -> dict[str, object]:
        """Returns the settings for the text of the saved pictures."""
        kind = self.scorer.kind(family)
        return {"best_of": self.count, "scorer": kind if kind == self.scorer.name else f"{self.scorer.name}, {kind}"}


@dataclass(frozen=True)
class Chosen:
    """An image to save.

    Attributes:
        result: the image, the best candidate if there are several.
        text: what its PNG text says of the candidates.
        candidates: all candidates, if they are to be saved, each with its own text.
    """

    result: "Result"
    text: dict[str, object]
    candidates: Sequence[tuple["Result", dict[str, object]]] = ()


def add_best_of(parser: argparse.ArgumentParser, keep: bool = True) -> None:
    """Adds --best_of and --scorer.

    Args:
        keep: whether to add --keep_candidates, too.
    """
    group = parser.add_argument_group("best of several")
    group.add_argument(
        "--best_of", type=whole, metavar="N", help="draw N candidates for each image and keep the one that scores best"
    )
    group.add_argument(
        "--scorer",
        metavar="own|MODULE:FUNCTION",
        help="own: by the model's own log P(prompt | image); or your function (images, prompts) -> scores in a module "
        "of the working folder or an installed one (default: own)",
    )
    if keep:
        group.add_argument("--keep_candidates", action="store_true", help="save the candidates, too")


def read_best_of(args: argparse.Namespace) -> BestOf | None:
    """Returns what the options of `add_best_of` say, or None without --best_of.

    Raises:
        InputError: options do not fit each other, or the scorer cannot be loaded.
    """
    keep = getattr(args, "keep_candidates", False)
    if args.best_of is None:
        for name, value in (("scorer", args.scorer), ("keep_candidates", keep)):
            if value:
                given = f"--{name}" if value is True else f"--{name} {value}"
                raise InputError(f"{given} has no effect without --best_of; add that, or leave it out")
        return None
    if getattr(args, "preview", False):
        raise InputError("--preview does not show candidates; leave it out, or --best_of")
    from lumina_mgpt.scoring import candidate_count, make_scorer  # imports torch, which takes seconds

    add_working_folder()
    return BestOf(candidate_count(args.best_of), make_scorer(args.scorer or "own"), keep)


def candidate_file(stem: str, repeat: int) -> str:
    """Returns the file name for a candidate of the image `{stem}.png`."""
    return f"{stem}_candidate_{repeat}.png"


def candidate_files(stem: str, job: "ImageJob", count: int) -> list[str]:
    """Returns the file names for the candidates of an image."""
    return [candidate_file(stem, job.repeat * count + number) for number in range(count)]


def chosen_images(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    best: BestOf | None,
    on_row: "OnRow | None",
    jobs: "Sequence[ImageJob] | None" = None,
) -> Iterator[Chosen]:
    """Yields the images of a request.

    Args:
        best: how to choose; None to draw each image once.
        on_row: as for `Pipeline.stream`.
        jobs: the images to make (default: those of the request).
    """
    if best is None:
        for result in pipeline.stream(prepared, on_row, jobs=jobs):
            yield Chosen(result, {})
        return
    from lumina_mgpt.scoring import best_of

    for choice in best_of(pipeline, prepared, best.count, best.scorer, on_row, jobs=jobs, prompts=best.prompts):
        repeats = [candidate.job.repeat for candidate in choice.candidates]
        scores = dict(zip(repeats, choice.scores, strict=True))
        text = {
            "repeat": repeats[choice.index],  # of the candidate: it gives the same image without --best_of
            "score": choice.scores[choice.index],
            "candidates": json.dumps(scores),
        }
        pairs: list[tuple[Result, dict[str, object]]] = [
            (candidate, {"score": scores[candidate.job.repeat]}) for candidate in choice.candidates
        ]
        yield Chosen(choice.result, text, pairs if best.keep else ())
