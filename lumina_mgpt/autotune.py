"""Chooses the speculation settings by timing a few forwards of each candidate with the loaded model on this machine.

The time of a forward depends on the machine. On a GPU that is bound by memory bandwidth, a forward over a window of
drafts costs little more than one over a single code. On a CPU with int4 weights it costs many times as much. The
number of codes that a forward accepts depends little on the machine, so a table of measured values, CODES, has it.
"""

import logging
import math
import time
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.devices import LARGEST_AUTO_BATCH
from lumina_mgpt.measure import wait
from lumina_mgpt.model.step import compile_forward, has_compiler
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.sampling.autoregressive import Step, sample
from lumina_mgpt.sampling.jacobi import sample_jacobi
from lumina_mgpt.unirep import ImageLayout

logger = logging.getLogger(__name__)

# Accepted codes per forward, from `scripts/benchmarks/bench.py` with the demo checkpoint, guidance 4 and all codes.
CODES = {
    None: 1.0,
    Speculation("maximal", 8): 3.36,
    Speculation("maximal", 16): 5.11,
    Speculation("maximal", 32): 6.37,
    Speculation("maximal", 64): 7.73,
}
_TIMED = 4  # forwards that are timed, after the one with the prompt and one more
_COMPILING_MAY_PAY = 1800  # seconds of sampling above which compilation is tried; compiling takes about a tenth
_OTHER_SHAPES = 6  # at most this many shapes are compiled during sampling for each shape that the trial compiles


class _Trial(NamedTuple):
    """One batch to time; the fields are the arguments of `sample`."""

    prompts: Sequence[Sequence[int]]
    layout: ImageLayout
    settings: SamplingConfig
    given: Tensor


class _Enough(Exception):
    """Ends a trial."""


def fastest(pipeline: Pipeline, prepared: PreparedRequest) -> Speculation | None:
    """Returns the speculation settings with the most codes per second for a request; None: one code per forward.

    All candidates are exact: they sample from the same distribution. If the estimated time of the whole request
    exceeds half an hour, the function also tries compiled forwards. It sets `pipeline.compiled` if these save more time
    than the remaining compilation takes.
    """
    request, layout, start = prepared.request, prepared.layout, prepared.starts[0]
    batch = request.batch_size or pipeline.batch_size(len(start), layout, request.sampling, largest=LARGEST_AUTO_BATCH)
    total = len(request.jobs)
    images, batches = min(batch, max(1, total)), -(-total // batch)
    given = torch.zeros((images, layout.given), dtype=torch.long)
    trial = _Trial([start] * images, layout, request.sampling, given)
    seconds = _seconds_per_code(pipeline, trial, CODES)
    choice = min(seconds, key=seconds.__getitem__)
    whole = seconds[choice] * (layout.num_codes - layout.given) * batches
    may_pay = pipeline.compiled is None and whole > _COMPILING_MAY_PAY and pipeline.model.attn != "flash"
    if may_pay and pipeline.parallel is None and has_compiler(pipeline.device):
        _compile_if_faster(pipeline, trial, choice, seconds[choice], whole)
    return choice


def _compile_if_faster(
    pipeline: Pipeline, trial: _Trial, choice: Speculation | None, eager: float, whole: float
) -> None:
    """Sets `pipeline.compiled` if compiled steps save more than the remaining compilation takes.

    Args:
        eager: seconds per code of eager steps.
        whole: seconds that the request takes with them.
    """
    pipeline.compiled, began = compile_forward(pipeline.model), time.perf_counter()
    try:
        compiled = _seconds_per_code(pipeline, trial, [choice])[choice]
    except (RuntimeError, OSError) as error:  # a compiler that fails must not end the run: steps stay eager
        logger.warning("compilation failed, steps stay eager: %s", str(error).strip().split("\n")[0])
        compiled = math.inf
    remaining = _OTHER_SHAPES * (time.perf_counter() - began)
    if whole * (1 - compiled / eager) < remaining:
        pipeline.compiled = None


def _seconds_per_code(
    pipeline: Pipeline, trial: _Trial, choices: Iterable[Speculation | None]
) -> dict[Speculation | None, float]:
    """Returns the expected seconds per accepted code of each choice, which is a key of CODES."""
    prompts, layout, settings, given = trial
    seconds = {
        choice: _forward_seconds(
            pipeline.make_step(prompts, layout, settings, choice), prompts, layout, settings, choice, given
        )
        / CODES[choice]
        for choice in choices
    }
    if pipeline.parallel:  # all processes must choose alike
        shared = pipeline.parallel.of_first(torch.tensor(list(seconds.values())))
        seconds = dict(zip(seconds, shared.tolist(), strict=True))
    return seconds


def _forward_seconds(
    step: Step,
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    choice: Speculation | None,
    given: Tensor,
) -> float:
    """Returns the least seconds from one forward to the next, including the sampler's work between them."""
    began: list[float] = []

    def timed(ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        wait(ids.device)  # a GPU is behind the host, which does not wait for it in each step
        began.append(time.perf_counter())
        if len(began) > 2 + _TIMED:
            raise _Enough
        return step(ids, positions, read)

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
    return min(after - before for before, after in zip(began[1:], began[2:], strict=False))
