"""Which way of sampling is quickest here: a few forwards of each are timed, on the very model and machine.

What a forward of a window costs differs widely: on a GPU, which waits for memory, hardly more than one of a single
code; on a CPU with int4 weights many times that. How many codes it confirms depends far less on the machine.
"""

import time
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.sampling.autoregressive import Step, sample
from lumina_mgpt.sampling.jacobi import sample_jacobi
from lumina_mgpt.unirep import ImageLayout

# Codes a forward, by `scripts/benchmarks/bench.py` on the demo checkpoint at guidance 4 with all codes.
CODES = {
    None: 1.0,
    Speculation("maximal", 8): 3.36,
    Speculation("maximal", 16): 5.11,
    Speculation("maximal", 32): 6.37,
    Speculation("maximal", 64): 7.73,
}
_TIMED = 4  # forwards of each, after the one with the prompt and one more


class _Enough(Exception):
    """The trial is over."""


def fastest(
    step: Callable[[Speculation | None], Step],
    prompts: Sequence[Sequence[int]],
    layout: ImageLayout,
    settings: SamplingConfig,
    given: Tensor,
    choices: Iterable[Speculation | None] = tuple(CODES),
) -> tuple[Speculation | None, dict[Speculation | None, float]]:
    """The choice with the most codes a second (None: plain sampling), and the seconds a code expected of each.

    `step` makes a fresh step with room for a choice's window, `choices` are those to try, of CODES; the other arguments
    are those of `sample`.
    """
    expected = {choice: _forward_seconds(step(choice), prompts, layout, settings, choice, given) / CODES[choice]
                for choice in choices}  # fmt: skip
    return min(expected, key=expected.__getitem__), expected


def _forward_seconds(step: Step, prompts: Sequence[Sequence[int]], layout: ImageLayout, settings: SamplingConfig,
                     choice: Speculation | None, given: Tensor) -> float:  # fmt: skip
    """Seconds from one forward to the next, with all that sampling does between them; the least of several."""
    began: list[float] = []

    def timed(ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
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
        began.append(time.perf_counter())  # a small image was done before
    return min(after - before for before, after in zip(began[1:], began[2:], strict=False))
