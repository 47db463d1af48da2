"""Best of N: draws several candidates for each image, scores them, and keeps the best.

Scorers of the model itself need no second model. Both measure log P(prompt | image), in nats:

- `bayes`: log P(image | prompt) - log P(image). By Bayes' rule this is log P(prompt | image) - log P(prompt), and
  log P(prompt) is the same for all candidates. Both terms are what training teaches a model that draws: with its
  prompt, and with dropped context. They need the logits of image codes only.
- `reading`: log P(prompt | image, question), where the model is asked to describe the image. It needs a model that was
  trained to read images, and its whole output projection.

`own` is `reading` for families that answer in text, and `bayes` for the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.checks import excerpt, real_number, require, whole_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.request import ImageJob
from lumina_mgpt.results import Result
from lumina_mgpt.unirep import IGNORED, Turn, encode_conversation
from lumina_mgpt.user_functions import call, load_function

if TYPE_CHECKING:
    from lumina_mgpt.pipeline import OnRow, Pipeline
    from lumina_mgpt.preparation import PreparedRequest

OWN_SCORERS = ("own", "reading", "bayes")
QUESTION = "Describe the image in detail. "  # of the released README of Lumina-mGPT; the image follows
_MOST_CANDIDATES = 1000  # they are in memory together
_BLOCK = 1024  # positions whose logits are in memory together


@dataclass(frozen=True)
class Scorer:
    """How candidates are scored.

    Attributes:
        name: `own`, `reading`, `bayes`, or `module:function`.
        function: the user's function (images, prompts) -> scores; None for the model's own scores.
    """

    name: str
    function: Callable[[list[Image.Image], list[str]], Any] | None = None

    def kind(self, family: Family) -> str:
        """Returns `name`, or what `own` stands for with checkpoints of this family."""
        return self.name if self.name != "own" else "reading" if family.answers_in_text else "bayes"

    def __call__(
        self, pipeline: "Pipeline", prepared: "PreparedRequest", candidates: Sequence[Result], prompt: str
    ) -> tuple[float, ...]:
        """Returns one score for each candidate of one image; higher is better.

        Args:
            prepared: the request of the candidates, after `Pipeline.encode`.
            prompt: the prompt as the user wrote it, for a user's function.

        Raises:
            InputError: the function fails, or does not return one finite number for each image.
        """
        if self.function is not None:
            images = [candidate.panel for candidate in candidates]
            return scores_of(self.function, self.name, images, [prompt] * len(images))
        score = read_score if self.kind(pipeline.checkpoint.config.family) == "reading" else bayes_score
        return tuple(score(pipeline, prepared, candidate) for candidate in candidates)


@dataclass(frozen=True)
class Choice:
    """The candidates of one image.

    Attributes:
        job: the image. Its repeat r is the image's; those of the candidates are r · N ... r · N + N - 1.
        candidates: the N candidates.
        scores: score of each candidate.
    """

    job: ImageJob
    candidates: tuple[Result, ...]
    scores: tuple[float, ...]

    @property
    def index(self) -> int:
        """Index of the best candidate; the first of equal ones."""
        return self.scores.index(max(self.scores))

    @property
    def result(self) -> Result:
        """The best candidate, as the result of `job`."""
        return replace(self.candidates[self.index], job=self.job)


def make_scorer(name: str) -> Scorer:
    """Returns a scorer.

    Args:
        name: `own`, `reading`, `bayes`, or `module:function` for a function (images, prompts) -> scores.

    Raises:
        InputError: the function cannot be loaded.
    """
    if name in OWN_SCORERS:
        return Scorer(name)
    if ":" not in name:
        raise InputError(f"must be {', '.join(OWN_SCORERS)} or module:function, got {name!r}", "scorer")
    return Scorer(name, load_function(name, "scorer"))


def scores_of(
    function: Callable[..., Any], name: str, images: list[Image.Image], prompts: list[str]
) -> tuple[float, ...]:
    """Returns what a user's function scores images with.

    Args:
        function: (images, prompts) -> a sequence, an array or a tensor of one number for each image.
        name: name of the function, for errors.
        prompts: the prompt of each image.

    Raises:
        InputError: the function raises, or does not return one finite number for each image.
    """
    found = call(function, name, "scorer", images, prompts)
    found = found.detach().cpu().flatten() if isinstance(found, Tensor) else found
    rule = f"{name} must return {len(images)} finite numbers, one for each image"
    try:
        scores = tuple(real_number(value) for value in found)
    except TypeError:  # not a sequence
        raise InputError(f"{rule}, got {excerpt(found)}; correct the function", "scorer") from None
    if len(scores) != len(images) or not all(map(_is_finite, scores)):
        raise InputError(f"{rule}, got {excerpt(list(scores))}; correct the function", "scorer")
    return scores


def check_scorer(scorer: Scorer, prompt: str) -> None:
    """Calls a user's function with two small pictures, so that its faults are found before any sampling.

    Args:
        prompt: prompt of both pictures.

    Raises:
        InputError: the function raises, or does not return one finite number for each picture.
    """
    if scorer.function is not None:
        pictures = [Image.new("RGB", (64, 64), color) for color in ("gray", "white")]
        scores_of(scorer.function, scorer.name, pictures, [prompt] * len(pictures))


def _is_finite(score: float) -> bool:
    return abs(score) < float("inf")  # False for NaN, too


def candidate_count(value: int) -> int:
    """Returns the number of candidates of each image as an int.

    Raises:
        InputError: `value` is not a whole number in 1 ... 1000.
    """
    rule = f"must be a whole number in 1 ... {_MOST_CANDIDATES}"
    return whole_number("best_of", value, 1, _MOST_CANDIDATES, rule)


def candidate_jobs(jobs: Sequence[ImageJob], count: int) -> list[ImageJob]:
    """Returns the candidates of each image: its repeat r becomes r · count ... r · count + count - 1.

    They are therefore the images of a request with `count` times as many images of each prompt.
    """
    return [replace(job, repeat=job.repeat * count + number) for job in jobs for number in range(count)]


def best_of(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    count: int,
    scorer: Scorer,
    on_row: "OnRow | None" = None,
    *,
    jobs: Sequence[ImageJob] | None = None,
    prompts: Sequence[str] | None = None,
) -> Iterator[Choice]:
    """Yields the choice for each image of a request.

    Args:
        count: candidates of each image.
        on_row: as for `Pipeline.stream`; its jobs are those of candidates.
        jobs: the images to make (default: those of the request).
        prompts: what a user's function gets as prompts (default: those of the request).

    Raises:
        InputError: the request does not fit the checkpoint, or the scorer fails.
    """
    count = candidate_count(count)
    jobs = prepared.request.jobs if jobs is None else jobs
    views = prepared.request.task.views
    require(views == 1, "best_of", count, "must be left out for a task that makes several images an answer")
    require_head(pipeline, scorer)
    if prepared.pictures:
        prepared = pipeline.encode(prepared)[0]
    asked = prompts or prepared.request.prompts
    results = pipeline.stream(prepared, on_row, jobs=candidate_jobs(jobs, count))
    for job in jobs:
        candidates = tuple(next(results) for _ in range(count))
        yield Choice(job, candidates, scorer(pipeline, prepared, candidates, asked[job.prompt_index]))


def require_head(pipeline: "Pipeline", scorer: Scorer) -> None:
    """Raises InputError if a scorer needs logits of text that a pipeline lacks."""
    if pipeline.parallel is not None and scorer.function is None:
        rule = "must be a function for a model that several processes hold"
        raise InputError(f"{rule}, got {scorer.name}; give module:function", "scorer")
    if scorer.kind(pipeline.checkpoint.config.family) == "reading" and not pipeline.writes_text:
        raise InputError("reading needs Pipeline.from_pretrained(..., text=True), got a pipeline for images", "scorer")


def bayes_score(pipeline: "Pipeline", prepared: "PreparedRequest", candidate: Result) -> float:
    """Returns log P(codes | instruction) - log P(codes), in nats, summed over the sampled codes of a candidate.

    The second term has the ids that the unconditional row of guidance has. Given codes count as context in both.
    """
    layout = prepared.layout
    offsets = layout.code_offsets[layout.given :]
    image, start = candidate.ids, list(prepared.starts[candidate.job.prompt_index])
    columns = pipeline.checkpoint.vocabulary.code_slice
    with_prompt = log_likelihood(pipeline, [*start, *image], offsets + len(start), columns)
    return with_prompt - log_likelihood(pipeline, image, offsets, columns)


def read_score(pipeline: "Pipeline", prepared: "PreparedRequest", candidate: Result) -> float:
    """Returns log P(prompt | image, question), in nats, summed over the ids of the prompt and its turn end."""
    vocabulary = pipeline.checkpoint.vocabulary
    turns: list[Turn] = [("human", [QUESTION, candidate.panel_codes]), ("assistant", [candidate.job.prompt])]
    ids, labels = encode_conversation(turns, vocabulary)
    at = torch.tensor([index for index, label in enumerate(labels) if label != IGNORED])
    return log_likelihood(pipeline, ids, at, None)


@torch.inference_mode()
def log_likelihood(pipeline: "Pipeline", ids: Sequence[int], at: Tensor, columns: slice | None) -> float:
    """Returns the sum of log P(id | ids before it), in nats, over some ids of a sequence.

    Temperature, top-k and guidance do not enter.

    Args:
        at: indices of the ids to sum over, each at least 1.
        columns: the ids that are possible there; None for the whole vocabulary.

    Shapes: at (n,) int64.
    """
    model, device = pipeline.model, pipeline.device
    row = torch.tensor([list(ids)], device=device)
    hidden = model(row)[0]  # (T, D)
    targets = row[0].cpu()[at] - (columns.start if columns else 0)
    total = 0.0
    for places, wanted in zip(at.split(_BLOCK), targets.split(_BLOCK), strict=True):
        logits = model.project(hidden[(places - 1).to(device)], columns)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        chosen = logits.log_softmax(-1).gather(1, wanted.to(device)[:, None])
        total += float(chosen.double().sum())
    return total
