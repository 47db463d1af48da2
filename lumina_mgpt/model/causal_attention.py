"""Computes causal attention for training on a CPU in float32, in blocks of queries."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERY_BLOCK = 128  # queries of one block


class CausalAttention(torch.autograd.Function):
    """Causal attention whose backward pass computes the probabilities once more, one block of queries at a time.

    Both passes consist of plain matrix products, and leave out the keys after each block. torch's fused kernel has the
    same memory use, but its backward pass is slower on a CPU.

    Besides its inputs and its output, the function saves one number per query and head.

    Shapes: q, k, v and the result (B, N, T, H). The result has the memory layout (B, T, N, H).
    Source: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with blocks of queries only.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        B, N, T, H = q.shape
        out = q.new_empty(B, T, N, H).transpose(1, 2)
        q, k, v = (part.reshape(B * N, T, H) for part in (q, k, v))
        logs = q.new_empty(B * N, T, 1)  # logsumexp of the scores of each query
        memory = q.new_empty(B * N * min(T, QUERY_BLOCK) * T)
        for start, stop in _blocks(T):
            weights = _scores(q, k, start, stop, memory)
            peak = weights.amax(-1, keepdim=True)
            weights.sub_(peak).exp_()
            total = weights.sum(-1, keepdim=True)
            logs[:, start:stop] = total.log().add_(peak)
            mixed = torch.bmm(weights, v[:, :stop]).div_(total)
            out[:, :, start:stop] = mixed.view(B, N, stop - start, H)
        ctx.save_for_backward(q, k, v, out, logs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, d_out: Tensor):
        q, k, v, out, logs = ctx.saved_tensors
        shape = d_out.shape
        T = shape[2]
        delta = (d_out * out).sum(-1).view(-1, T, 1)
        d_out = d_out.reshape(q.shape)
        d_q, d_k, d_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        first, second = (q.new_empty(len(q) * min(T, QUERY_BLOCK) * T) for _ in range(2))
        for start, stop in _blocks(T):
            block = d_out[:, start:stop]
            weights = _scores(q, k, start, stop, first).sub_(logs[:, start:stop]).exp_()
            d_v[:, :stop].baddbmm_(weights.mT, block)
            d_scores = second[: weights.numel()].view(weights.shape)
            torch.bmm(block, v[:, :stop].mT, out=d_scores)
            d_scores.sub_(delta[:, start:stop]).mul_(weights)
            scale = q.shape[-1] ** -0.5
            d_q[:, start:stop] = torch.bmm(d_scores, k[:, :stop]).mul_(scale)
            d_k[:, :stop].baddbmm_(d_scores.mT, q[:, start:stop], alpha=scale)
        return d_q.view(shape), d_k.view(shape), d_v.view(shape)


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(start, min(start + QUERY_BLOCK, length)) for start in range(0, length, QUERY_BLOCK)]


def _scores(q: Tensor, k: Tensor, start: int, stop: int, memory: Tensor) -> Tensor:
    """Returns the scores of one block of queries, minus infinity for later keys. The result is in `memory`.

    Shapes: q, k (B * N, T, H), memory (at least the size of the result,) -> (B * N, stop - start, stop).
    """
    rows = stop - start
    scores = memory[: len(q) * rows * stop].view(len(q), rows, stop)
    torch.bmm(q[:, start:stop], k[:, :stop].mT, out=scores)
    scores.mul_(q.shape[-1] ** -0.5)
    scores[:, :, start:] += q.new_full((rows, rows), float("-inf")).triu_(1)
    return scores
