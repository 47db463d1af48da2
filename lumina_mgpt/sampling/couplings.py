"""Couplings, which accept or reject each draft by its target distribution, and replace rejected drafts.

A coupling verifies a window of W positions. One forward pass computes the target distribution of each position,
conditioned on the drafts before it. The codes that a coupling returns are final up to and including the first rejected
position, because all codes before that position are accepted drafts. The codes after it are drafts of the next round.

Shapes:
    target, proposal: (B, W, C) log-probabilities, -inf where the probability is 0. Drafts are sampled from `proposal`.
    drafts: (B, W) codes.
    uniforms: (2, B, W) float64 in (0, 1) on the CPU, new in every round. The first half decides acceptance, the second
        draws replacements.
    noise: (B, W, C) Gumbel noise, which stays the same for a position in all rounds.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # codes per block of `sample_by_inversion`; the square root of the released model's 16,384 codes


class Verified(NamedTuple):
    """The result of one verification: a code for each position, and which drafts are accepted.

    On a GPU, copying `accepted` to the CPU is the only host synchronization of a round.
    """

    codes: Tensor  # (B, W), on the device of the target
    accepted: Tensor  # (B, W) bool, on the CPU


def common_noise(target: Tensor, drafts: Tensor, noise: Tensor | None) -> Verified:
    """Samples each code from its target with the fixed Gumbel noise, and accepts drafts that equal the sampled code.

    The result is the image that `autoregressive.sample` draws with the same noise.

    Args:
        noise: Gumbel noise of each position; None for greedy decoding.

    Source: Jacobi decoding (arXiv 2002.09928), with the Gumbel-max trick in place of argmax.
    """
    codes = (target if noise is None else target + noise).argmax(-1)
    return Verified(codes, (codes == drafts).cpu())


def maximal(target: Tensor, proposal: Tensor, drafts: Tensor, uniforms: Tensor) -> Verified:
    """Accepts each draft with the highest probability that any coupling allows, even after a rejected draft.

    Every returned code is distributed as its `target`. This target is therefore its proposal in the next round.

    Source: MC-SJD (arXiv 2510.24211).
    """
    accepted = accepts(target, proposal, drafts, uniforms[0])
    codes, rejected, uniform = drafts.clone(), _indices(~accepted, target), _like(uniforms[1], target)
    codes[rejected] = sample_residual(target[rejected], proposal[rejected], drafts[rejected], uniform[rejected])
    return Verified(codes, accepted)


def independent(target: Tensor, proposal: Tensor, drafts: Tensor, uniforms: Tensor) -> Verified:
    """Accepts drafts up to the first rejection, and samples all codes after it anew from `target`.

    This coupling accepts fewer drafts than the others. It is the baseline of the benchmarks.

    Source: speculative Jacobi decoding (arXiv 2410.01699).
    """
    accepted = accepts(target, proposal, drafts, uniforms[0]).cumprod(-1).bool()
    misses = (~accepted).int().cumsum(-1)  # 1 at the first rejection, more after it
    first, after = _indices(misses == 1, target), _indices(misses > 1, target)
    codes, uniform = drafts.clone(), _like(uniforms[1], target)
    codes[first] = sample_residual(target[first], proposal[first], drafts[first], uniform[first])
    codes[after] = sample_by_inversion(to_probs(target[after]), uniform[after])
    return Verified(codes, accepted)


def accepts(target: Tensor, proposal: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """Returns which drafts are accepted. A draft's acceptance probability is min(1, target / proposal).

    The result is on the CPU, so that the caller can select the rejected positions and sample only those.

    Shapes: uniform (B, W) on the CPU -> (B, W) bool on the CPU.
    """
    of_draft = torch.stack([each.gather(-1, drafts[..., None])[..., 0] for each in (target, proposal)])
    log_target, log_proposal = of_draft.cpu().double()
    return uniform.log() < log_target - log_proposal


def sample_residual(target: Tensor, proposal: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """Samples from the residual distribution: the positive part of target - proposal, normalized.

    Where the residual is 0 for all codes, the result is the draft.

    Shapes: target, proposal (n, C) log-probabilities; drafts, uniform (n,) -> (n,).
    Source: speculative decoding (arXiv 2211.17192), section 2.3.
    """
    residual = to_probs(target).sub_(to_probs(proposal)).clamp_(min=0)
    return torch.where(residual.amax(-1) > 0, sample_by_inversion(residual, uniform), drafts)


def to_probs(log_probs: Tensor) -> Tensor:
    """Returns the probabilities exp(log_probs), raised to at least 1e-31 (1e-292 in float64).

    The minimum keeps the difference of two probabilities from being a subnormal number. Strong guidance would produce
    many of these, and a CPU computes with them 10 to 30 times slower. The minimum never affects a sample, because it is
    too small for uniform numbers of 52 bits to resolve.
    """
    numbers = torch.finfo(log_probs.dtype)
    return log_probs.clamp(min=math.log(numbers.tiny / numbers.eps)).exp_()


def sample_by_inversion(weights: Tensor, uniform: Tensor) -> Tensor:
    """Samples codes with probabilities proportional to `weights`, by inverting the cumulative sum.

    Chooses a block of codes first, and then a code in this block. One cumulative sum over all codes in float64 would
    take longer than the forward pass of a small model. Where all weights are 0, the result is arbitrary.

    Shapes: weights (..., C) >= 0, uniform (...) in (0, 1) -> (...).
    """
    C, dtype = weights.shape[-1], _sum_dtype(weights)
    blocks = (F.pad(weights, (0, -C % BLOCK)) if C % BLOCK else weights).unflatten(-1, (-1, BLOCK))
    sums = blocks.sum(-1).to(dtype).cumsum(-1)  # (..., blocks)
    block, rest = _first_above(sums, _like(uniform, sums) * sums[..., -1])
    inside = blocks.gather(-2, block[..., None, None].expand(*block.shape, 1, BLOCK))[..., 0, :]  # (..., BLOCK)
    code, _ = _first_above(inside.to(dtype).cumsum(-1), rest)
    return (block * BLOCK + code).clamp_(max=C - 1)


def _first_above(sums: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the first cumulative sum above a threshold, and the threshold less the sum before that index.

    Shapes: sums (..., n), threshold (...) -> two of (...).
    """
    total = sums[..., -1]
    # Rounding may lift the threshold to the total. Below it, the sum found has a positive weight.
    threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
    index = torch.searchsorted(sums, threshold[..., None], right=True).clamp_(max=sums.shape[-1] - 1)
    before = torch.where(index > 0, sums.gather(-1, (index - 1).clamp(min=0)), 0.0)[..., 0]
    return index[..., 0], (threshold - before).clamp_(min=0)


def _indices(mask: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Indices where a CPU mask is true, copied to the device of `like` without synchronization."""
    return tuple(index.to(like.device, non_blocking=True) for index in mask.nonzero(as_tuple=True))


def _like(uniform: Tensor, other: Tensor) -> Tensor:
    """`uniform` on the device of `other`, in the precision of sums there."""
    return uniform.to(other.device, _sum_dtype(other), non_blocking=True)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype for sums of thousands of terms: float64, or float32 on Apple GPUs, which have no float64."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
