"""Proposal distributions, from which the first draft of a position is sampled when the position enters the window.

Verification corrects for any proposal. A poor proposal therefore costs time, but leaves the distribution of images
unchanged. The proposal matters only in the first verification of a position. In later rounds, the target distribution
of the previous round takes its place.

The distribution of the code above needs no computation. Its overlap with the target, the sum of min(p, q), is 13.3 % on
the demo checkpoint at guidance 4. The overlap of the uniform distribution is 1.5 %. The best mixture of all
distributions known when the draft is sampled has 13.9 %. It mixes distributions of codes to the left and of three codes
above, flattened distributions, and counts of the codes seen below the same code.

Shapes: above (B, n, C) holds log-probabilities for n positions per image: those of the code above. A position without a
sampled code above gets those of the last code of the previous window. All functions return log-probabilities (B, n, C).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def uniform(above: Tensor) -> Tensor:
    """Returns the uniform distribution over all codes. Source: speculative Jacobi decoding (arXiv 2410.01699)."""
    return torch.full_like(above, -math.log(above.shape[-1]))


def from_above(above: Tensor) -> Tensor:
    """Returns the distribution that the code above was sampled from."""
    return above


PROPOSAL_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"uniform": uniform, "above": from_above}
