"""Chooses the speculation settings by sampling the beginning of an image with each candidate on this machine.

Two things decide. The time of a forward depends on the machine: on a GPU that is bound by memory bandwidth, a forward
over a window of drafts costs little more than one over a single code. On a CPU with int4 weights it costs many times as
much. The number of codes that a forward accepts depends on the model, the prompt, guidance and temperature.
"""

import logging
import math
import time
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.devices import LARGEST_AUTO_BATCH
from lumina_mgpt.measure import wait
from lumina_mgpt.model.compiled import compile_forward, has_compiler
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.sampling.autoregressive import Step, sample
from lumina_mgpt.sampling.jacobi import sample_jacobi
from lumina_mgpt.unirep import ImageLayout

logger = logging.getLogger(__name__)

CANDIDATES = tuple(Speculation("maximal", window) for window in (8, 16, 32, 64))  # in ascending order of the window
_TIMED = 5  # forwards that are timed, after the one with the prompt
_ROWS = 2  # a trial samples at least this many rows: the first row has no codes above it, and takes more forwards
_SHARE = 0.01  # and at least this share of all codes of the request
_SLOWER = 1.25  # wider windows are not tried after one that takes this many times as long as the best so far
_COMPILING_MAY_PAY = 1800  # seconds of sampling above which compilation is tried; compiling takes about a tenth
_OTHER_SHAPES = 6  # at most this many shapes are compiled during sampling for each shape that the trial compiles


class _Trial(NamedTuple):
    """One batch to sample; the first fields are the arguments of `sample`.

    Attributes:
        goal: number of codes after which a trial of speculative sampling ends.
    """

    prompts: Sequence[Sequence[int]]
    layout: ImageLayout
    settings: SamplingConfig
    given: Tensor
    goal: int


class Measured(NamedTuple):
    """What a trial measured: seconds from one forward to the next, and codes that a forward accepts in each image."""

    seconds: float
    codes: float


class _Enough(Exception):
    """Ends a trial."""


def fastest(pipeline: Pipeline, prepared: PreparedRequest) -> Speculation | None:
    """Returns the speculation settings with the most codes per second for a request; None: one code per forward.

    All candidates are exact: they sample from the same distribution. Each samples the first rows of the first prompt.
    If the estimated time of the whole request exceeds half an hour, the function also tries compiled forwards. It sets
    `pipeline.compiled` if these save more time than the remaining compilation takes.
    """
    request, layout, start = prepared.request, prepared.layout, prepared.starts[0]
    batch = request.batch_size or pipeline.batch_size(len(start), layout, request.sampling, largest=LARGEST_AUTO_BATCH)
    total = len(request.jobs)
    images, batches = min(batch, max(1, total)), -(-total // batch)
    given = torch.zeros((images, layout.given), dtype=torch.long)
    codes = max(_ROWS * layout.cols, math.ceil(_SHARE * total * (layout.num_codes - layout.given)))
    goal = min(layout.given + codes, layout.num_codes)
    trial = _Trial([start] * images, layout, request.sampling, given, goal)
    choice, measured = _best(pipeline, trial)
    per_code = measured.seconds / measured.codes
    way = f"{choice.coupling}, window {choice.window}" if choice else "plain"
    logger.info("--fast: %s; %.2f codes a forward, %.4f s a code", way, measured.codes, per_code)
    whole = per_code * (layout.num_codes - layout.given) * batches
    may_pay = pipeline.compiled is None and whole > _COMPILING_MAY_PAY and pipeline.model.attn != "flash"
    if may_pay and pipeline.parallel is None and has_compiler(pipeline.device):
        _compile_if_faster(pipeline, trial, choice, measured, whole)
    return choice


def _best(pipeline: Pipeline, trial: _Trial) -> tuple[Speculation | None, Measured]:
    """Returns the choice with the least seconds per code, and its measurement."""
    choice: Speculation | None = None
    best = _measure(pipeline, trial, None)
    for candidate in CANDIDATES:
        measured = _measure(pipeline, trial, candidate)
        ratio = measured.seconds / measured.codes / (best.seconds / best.codes)
        if ratio < 1:
            choice, best = candidate, measured
        elif ratio > _SLOWER and candidate is not CANDIDATES[0]:
            break
        if candidate.window is not None and candidate.window >= trial.layout.num_codes - trial.layout.given:
            break  # wider windows are the same
    return choice, best


def _measure(pipeline: Pipeline, trial: _Trial, choice: Speculation | None) -> Measured:
    """Measures one choice. All processes of a model that is split get the same result."""
    step = pipeline.make_step(trial.prompts, trial.layout, trial.settings, choice)
    measured = _sampled(step, trial, choice)
    if pipeline.parallel:  # all processes must choose alike
        measured = Measured(*pipeline.parallel.of_first(torch.tensor(measured)).tolist())
    return measured


def _compile_if_faster(
    pipeline: Pipeline, trial: _Trial, choice: Speculation | None, eager: Measured, whole: float
) -> None:
    """Sets `pipeline.compiled` if compiled steps save more than the remaining compilation takes.

    Args:
        eager: the measurement of eager steps.
        whole: seconds that the request takes with them.
    """
    pipeline.compiled, began = compile_forward(pipeline.model), time.perf_counter()
    try:
        compiled = _measure(pipeline, trial._replace(goal=0), choice).seconds
    except (RuntimeError, OSError) as error:  # a compiler that fails must not end the run: steps stay eager
        logger.warning("compilation failed, steps stay eager: %s", str(error).strip().split("\n")[0])
        compiled = math.inf
    remaining = _OTHER_SHAPES * (time.perf_counter() - began)
    if whole * (1 - compiled / eager.seconds) < remaining:
        pipeline.compiled = None


def _sampled(step: Step, trial: _Trial, choice: Speculation | None) -> Measured:
    """Samples until all images have `trial.goal` codes and `_TIMED` forwards are timed, or the images are complete.

    The time is the least of the first `_TIMED` forwards, including the sampler's work between them. Windows at the end
    of an image are shorter, so later forwards do not count.
    """
    prompts, layout, settings, given, goal = trial
    began: list[float] = []
    fed: list[Tensor] = []  # cache position of the last final code of each image, in each call but the first

    def timed(ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        wait(ids.device)  # a GPU is behind the host, which does not wait for it in each step
        began.append(time.perf_counter())
        if len(began) > 1:
            fed.append(positions[: len(prompts), 0])
            final = torch.searchsorted(layout.code_offsets, fed[-1] - origin) + 1
            if len(began) > 1 + _TIMED and (choice is None or int(final.min()) >= goal):
                raise _Enough
        return step(ids, positions, read)

    origin = torch.tensor([len(prompt) for prompt in prompts])
    keys = [(0, repeat) for repeat in range(len(prompts))]
    try:
        if choice is None:
            sample(timed, prompts, layout, settings, keys, given=given)
        else:
            sample_jacobi(timed, prompts, layout, settings, keys, choice, given=given)
    except _Enough:
        pass
    else:
        began.append(time.perf_counter())  # a small image needs fewer forwards
    seconds = min(after - before for before, after in zip(began[1 : 1 + _TIMED], began[2 : 2 + _TIMED], strict=False))
    return Measured(seconds, _accepted(fed, origin, layout) if choice else 1.0)


def _accepted(fed: Sequence[Tensor], origin: Tensor, layout: ImageLayout) -> float:
    """Returns the mean number of codes that a forward made final in an image.

    Args:
        fed: cache position of the last final code of each image, in each call with a window, two of (B,) at least.
        origin: cache position of image start, (B,).
    """
    if len(fed) < 2:  # one window held the whole image
        return float(layout.num_codes - layout.given - 1) or 1.0
    first, last = (torch.searchsorted(layout.code_offsets, position - origin) for position in (fed[0], fed[-1]))
    return max(1.0, float((last - first).double().mean()) / (len(fed) - 1))
