"""How a draft code is judged by the law that is now known for its place, and what takes its place if it falls.

Each coupling takes a window of W places, all of whose laws came out of one forward given the drafts before them, and
returns the codes that now stand there and which drafts were confirmed. Up to and including the first place that was not
confirmed the codes are final: their contexts were. The codes after it are the next drafts.

Shapes here: law, drafted (B, W, C) log-probabilities, -inf where 0: the law now, and the one a draft was drawn from.
drafts (B, W). uniforms (2, B, W) float64 in (0, 1) on the CPU, new for every call. noise (B, W, C), the same for a
place however often it is looked at.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # codes; the root of the released 16,384


class Judged(NamedTuple):
    """Shapes: (B, W) each. `confirmed` is on the CPU: for it a GPU is waited for, and for nothing else."""

    codes: Tensor
    confirmed: Tensor


def common_noise(law: Tensor, drafts: Tensor, noise: Tensor | None) -> Judged:
    """Fixed-point iteration: each place draws with its own fixed noise (None: takes the likeliest code).

    The image is the one that drawing code after code with that noise gives.
    Source: arXiv 2002.09928 (Jacobi decoding), with the Gumbel-max trick in place of argmax.
    """
    codes = (law if noise is None else law + noise).argmax(-1)
    return Judged(codes, (codes == drafts).cpu())


def maximal(law: Tensor, drafted: Tensor, drafts: Tensor, uniforms: Tensor) -> Judged:
    """Keeps each draft as often as any coupling of the two laws can, also behind a miss.

    A code that stands after this call is distributed as `law`, so that is the law it was drawn from in the next one.
    Source: MC-SJD (arXiv 2510.24211).
    """
    kept = _kept(law, drafted, drafts, uniforms[0])
    codes, missed, uniform = drafts.clone(), _places(~kept, law), _beside(uniforms[1], law)
    codes[missed] = _redrawn(law[missed], drafted[missed], drafts[missed], uniform[missed])
    return Judged(codes, kept)


def independent(law: Tensor, drafted: Tensor, drafts: Tensor, uniforms: Tensor) -> Judged:
    """As published for speculative Jacobi decoding: what lies behind the first miss is drawn anew.

    Slower than the others, and here as the baseline of the benchmark. Source: arXiv 2410.01699.
    """
    before = _kept(law, drafted, drafts, uniforms[0]).cumprod(-1).bool()
    misses = (~before).int().cumsum(-1)  # 1 at the first miss, more behind it
    first, behind, uniform = _places(misses == 1, law), _places(misses > 1, law), _beside(uniforms[1], law)
    codes = drafts.clone()
    codes[first] = _redrawn(law[first], drafted[first], drafts[first], uniform[first])
    codes[behind] = by_inversion(probs(law[behind]), uniform[behind])
    return Judged(codes, before)


def _kept(law: Tensor, drafted: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """With probability min(1, law / drafted) at the draft. Shapes: -> (B, W) on the CPU.

    There it says which places fall, so that only those are redrawn.
    """
    both = torch.stack([of.gather(-1, drafts[..., None])[..., 0] for of in (law, drafted)])
    now, then = both.cpu().double()
    return uniform.log() < now - then


def _places(wanted: Tensor, law: Tensor) -> tuple[Tensor, ...]:
    """Where a mask on the CPU is true, as indices on the law's device, which does not wait for them."""
    return tuple(index.to(law.device, non_blocking=True) for index in wanted.nonzero(as_tuple=True))


def _redrawn(law: Tensor, drafted: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """A code from what `law` has more of than `drafted`; the draft itself where that is nothing.

    Shapes: law, drafted (n, C); drafts, uniform (n,) -> (n,).
    """
    residual = probs(law).sub_(probs(drafted)).clamp_(min=0)
    return torch.where(residual.amax(-1) > 0, by_inversion(residual, uniform), drafts)


def probs(law: Tensor) -> Tensor:
    """The exponential; what is below 1e-31 (1e-292 in float64) counts as that.

    So no difference of two is a subnormal number, over which a CPU takes 10 to 30 times as long; strong guidance makes
    many. Nothing is ever drawn from so little: uniform numbers of 52 bits do not reach there.
    """
    numbers = torch.finfo(law.dtype)
    return law.clamp(min=math.log(numbers.tiny / numbers.eps)).exp_()


def by_inversion(weights: Tensor, uniform: Tensor) -> Tensor:
    """A code a place by inversion of the weights' sums. Shapes: weights (..., C), uniform (...) in (0, 1) -> (...).

    First a block of codes by the sums of blocks, then a code in it: a sum of all in float64 costs more than a small
    model's forward. Where all weights are 0, the code means nothing.
    """
    C, wide = weights.shape[-1], _wide(weights)
    blocks = (F.pad(weights, (0, -C % BLOCK)) if C % BLOCK else weights).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).to(wide).cumsum(-1)  # (..., blocks)
    block, rest = _first_above(sums, _beside(uniform, sums) * sums[..., -1])
    inside = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, BLOCK))[..., 0, :]
    code, _ = _first_above(inside.to(wide).cumsum(-1), rest)
    return (block * BLOCK + code).clamp_(max=C - 1)


def _first_above(sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The first of rising sums above a target, and how far the target is beyond the one before it.

    Shapes: sums (..., n), target (...) -> two of (...).
    """
    total = sums[..., -1]
    # Below the total whatever the rounding, so that the first sum above it is one that has just grown.
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    at = torch.searchsorted(sums, target[..., None], right=True).clamp_(max=sums.shape[-1] - 1)
    before = torch.where(at > 0, sums.gather(-1, (at - 1).clamp(min=0)), 0.0)[..., 0]
    return at[..., 0], (target - before).clamp_(min=0)


def _beside(uniform: Tensor, other: Tensor) -> Tensor:
    """The same numbers on another tensor's device, as wide as there are."""
    return uniform.to(other.device, _wide(other), non_blocking=True)


def _wide(tensor: Tensor) -> torch.dtype:
    """Sums of thousands of terms want float64, which Apple's GPUs lack."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
