"""What a place is drafted from when it enters the window.

Any law will do: couplings judge a draft by the law it was drawn from, so a bad guess costs time, never exactness. The
law of the code above is free, and nothing cheap was found to be better. On the demo checkpoint at guidance 4 it has
13.3 % in common with a code's own law, and any code 1.5 %; of mixtures of all that is known by then (laws to the left,
of three codes above, flattened ones, counts of the codes seen below the same code) the best has 13.9 %
(`scripts/bench_births.py`). A draft is judged several times before it is final; its birth matters at the first only.

Shapes here: above (B, n, C), log-probabilities of the code above (in the first row: of the last code of the window
before) -> (B, n, C).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def uniform(above: Tensor) -> Tensor:
    """As published: any code."""
    return torch.full_like(above, -math.log(above.shape[-1]))


def from_above(above: Tensor) -> Tensor:
    return above


PROPOSAL_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"uniform": uniform, "above": from_above}
