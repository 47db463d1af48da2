"""What a place is drafted from when it enters the window: a law made of those of its neighbours.

Any law will do: couplings judge a draft by the law it was drawn from, so a bad guess costs time, never exactness.

Shapes here: above, left (B, n, C) log-probabilities: the law of the code above (of the code before, in the first row),
and of the last code of the window before it -> (B, n, C).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def uniform(above: Tensor, left: Tensor) -> Tensor:
    """As published: any code."""
    return torch.full_like(above, -math.log(above.shape[-1]))


def from_above(above: Tensor, left: Tensor) -> Tensor:
    return above


def from_left(above: Tensor, left: Tensor) -> Tensor:
    return left


def from_both(above: Tensor, left: Tensor) -> Tensor:
    """The mean of the two."""
    return torch.logaddexp(above, left) - math.log(2)


BIRTHS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "uniform": uniform, "above": from_above, "left": from_left, "both": from_both,
}  # fmt: skip
