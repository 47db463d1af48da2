"""Computes causal attention for training on a CPU, with a faster backward pass than torch's."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lumina_mgpt.cuda import torch_attention

QUERY_BLOCK = 128  # queries of one block


class CausalAttention(torch.autograd.Function):
    """Causal attention by torch's kernel, with a backward pass of plain matrix products.

    The result is that of torch's kernel bit for bit, so that a forward pass without gradients gives the same. The
    backward pass computes the probabilities again, for one block of queries at a time, and leaves out the keys after
    each block. It needs as little memory as that of the kernel, which is slower.

    Gradients of bfloat16 are computed in float32. As products of bfloat16 blocks in code of torch.compile, gradients of
    keys were not numbers.

    Shapes: q, k, v and the result (B, N, T, H).
    Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, with blocks of queries only.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch_attention(q, k, v, is_causal=True)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        saved = ctx.saved_tensors  # read once: checkpointing frees what it has unpacked
        parts = (d_out, *saved)
        with torch.autocast("cpu", enabled=False):  # which would compute the products in bfloat16
            gradients = _gradients(*(part.float() if part.dtype == torch.bfloat16 else part for part in parts))
        return tuple(gradient.to(part.dtype) for gradient, part in zip(gradients, saved[:3], strict=True))


def _gradients(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v. Shapes: all (B, N, T, H)."""
    shape, scale = q.shape, q.shape[-1] ** -0.5
    T = shape[2]
    delta = (d_out * out).sum(-1).reshape(-1, T, 1)
    q, k, v, d_out = (part.reshape(-1, *shape[2:]) for part in (q, k, v, d_out))  # (B * N, T, H)
    d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    first, second = (q.new_empty(len(q) * min(T, QUERY_BLOCK) * T) for _ in range(2))
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        block = d_out[:, start:stop]
        weights = _weights(q, k, start, stop, first)
        d_v[:, :stop].baddbmm_(weights.mT, block)
        d_scores = second[: weights.numel()].view(weights.shape)
        torch.bmm(block, v[:, :stop].mT, out=d_scores)
        d_scores.sub_(delta[:, start:stop]).mul_(weights)
        d_q[:, start:stop] = torch.bmm(d_scores, k[:, :stop]).mul_(scale)
        d_k[:, :stop].baddbmm_(d_scores.mT, q[:, start:stop], alpha=scale)
    return d_q.view(shape), d_k.view(shape), d_v.view(shape)


def _weights(q: Tensor, k: Tensor, start: int, stop: int, memory: Tensor) -> Tensor:
    """Returns the probabilities of one block of queries. The result is in `memory`.

    Shapes: q, k (B * N, T, H), memory (at least the size of the result,) -> (B * N, stop - start, stop).
    """
    rows = stop - start
    scores = memory[: len(q) * rows * stop].view(len(q), rows, stop)
    torch.bmm(q[:, start:stop], k[:, :stop].mT, out=scores)
    scores.mul_(q.shape[-1] ** -0.5)
    scores[:, :, start:] += q.new_full((rows, rows), float("-inf")).triu_(1)
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    return weights.div_(weights.sum(-1, keepdim=True))
