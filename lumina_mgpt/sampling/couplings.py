"""Couplings: how a draft is verified against its target distribution, and what replaces a rejected draft.

A coupling verifies a window of W positions. One forward has given the target distribution of each, conditioned on the
drafts before it. All codes up to and including the first rejected position are final, because the codes they were
conditioned on are final. The codes after it are the drafts of the next round.

Shapes:
    target, proposal: (B, W, C) log-probabilities, -inf where the probability is 0; drafts come from `proposal`.
    drafts: (B, W).
    uniforms: (2, B, W) float64 in (0, 1) on the CPU, new in every round.
    noise: (B, W, C), constant for a position.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128  # codes a block of `sample_by_inversion`; the square root of the released model's 16,384 codes


class Verified(NamedTuple):
    """The result of one verification.

    Reading `accepted` is the only host synchronization of a round on a GPU.
    """

    codes: Tensor  # (B, W), on the device of the target
    accepted: Tensor  # (B, W) bool, on the CPU


def common_noise(target: Tensor, drafts: Tensor, noise: Tensor | None) -> Verified:
    """Draws each position with its fixed Gumbel noise and accepts the draft where the code is the same.

    The image is the one that `autoregressive.sample` draws with the same noise.

    Args:
        noise: None for greedy decoding.

    Source: Jacobi decoding (arXiv 2002.09928), with the Gumbel-max trick in place of argmax.
    """
    codes = (target if noise is None else target + noise).argmax(-1)
    return Verified(codes, (codes == drafts).cpu())


def maximal(target: Tensor, proposal: Tensor, drafts: Tensor, uniforms: Tensor) -> Verified:
    """Accepts each draft with the highest probability that any coupling allows, also after a rejected one.

    Every code returned is distributed as `target`, which is therefore its proposal in the next round.

    Source: MC-SJD (arXiv 2510.24211).
    """
    accepted = accepts(target, proposal, drafts, uniforms[0])
    codes, rejected, uniform = drafts.clone(), _indices(~accepted, target), _like(uniforms[1], target)
    codes[rejected] = sample_residual(target[rejected], proposal[rejected], drafts[rejected], uniform[rejected])
    return Verified(codes, accepted)


def independent(target: Tensor, proposal: Tensor, drafts: Tensor, uniforms: Tensor) -> Verified:
    """Accepts drafts up to the first rejection, and draws all codes after it anew from `target`.

    Accepts fewer drafts than the other couplings; the baseline of benchmarks.

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
    """Whether each draft is accepted, with probability min(1, target / proposal).

    Shapes: uniform (B, W) on the CPU -> (B, W) bool on the CPU, so that only rejected positions are drawn again.
    """
    of_draft = torch.stack([each.gather(-1, drafts[..., None])[..., 0] for each in (target, proposal)])
    log_target, log_proposal = of_draft.cpu().double()
    return uniform.log() < log_target - log_proposal


def sample_residual(target: Tensor, proposal: Tensor, drafts: Tensor, uniform: Tensor) -> Tensor:
    """Samples from the residual distribution max(0, target - proposal), normalized.

    Returns the draft where the residual is 0 for all codes.

    Shapes: target, proposal (n, C) log-probabilities; drafts, uniform (n,) -> (n,).
    Source: speculative decoding (arXiv 2211.17192), section 2.3.
    """
    residual = to_probs(target).sub_(to_probs(proposal)).clamp_(min=0)
    return torch.where(residual.amax(-1) > 0, sample_by_inversion(residual, uniform), drafts)


def to_probs(log_probs: Tensor) -> Tensor:
    """Probabilities of log-probabilities, at least 1e-31 (in float64 1e-292).

    The minimum keeps differences of two probabilities out of the subnormal numbers, with which a CPU computes 10 to 30
    times slower and which strong guidance produces often. It never affects a sample: uniform numbers of 52 bits do not
    resolve it.
    """
    numbers = torch.finfo(log_probs.dtype)
    return log_probs.clamp(min=math.log(numbers.tiny / numbers.eps)).exp_()


def sample_by_inversion(weights: Tensor, uniform: Tensor) -> Tensor:
    """Samples codes in proportion to `weights` by inverting their cumulative sum.

    Chooses a block of codes first and then a code in it: a cumulative sum over all codes in float64 takes longer than
    the forward of a small model. The result is arbitrary where all weights are 0.

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
