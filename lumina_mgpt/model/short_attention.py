"""Causal attention of short sequences in bf16, for compiled training on a CPU."""

import math
from functools import cache

import torch
from torch import Tensor

LONGEST = 512  # ids; with 640, torch's kernel is as fast
SCORES = 1 << 22  # a piece has at least one row, and as many more as have no more scores than this together


class ShortAttention(torch.autograd.Function):
    """Causal attention with a gradient from whole matrices of scores, whose loops torch.compile fuses.

    torch's kernel computes the same gradient block by block, which takes longer. Forward and backward pass of the
    demo's transformer are 1.14 times as fast with this one: medians of seven alternating runs with 256 and with 384
    ids. The kernel's forward pass serves here too. The gradient rounds scores to bf16, as attention written out in
    torch does with autocast; the kernel does not round them.

    Shapes: q, k, v and the result (B, N, T, H).
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(q, k, v)
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)[0]

    @staticmethod
    def backward(ctx, of_mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.lumina_mgpt.short_attention_gradients(of_mixed, *ctx.saved_tensors)


@torch.library.custom_op("lumina_mgpt::short_attention_gradients", mutates_args=())
def short_attention_gradients(of_mixed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v, given that of the result. Computes a few rows at a time.

    It is an operator because torch 2.13 computed NaN when all pieces were in one compiled graph.

    Shapes: all (B, N, T, H).
    """
    B, N, T, _ = q.shape
    pieces = math.ceil(B / max(1, SCORES // (N * T * T)))
    parts = [part.split(math.ceil(B / pieces)) for part in (of_mixed, q, k, v)]
    found = [_compiled()(*part) for part in zip(*parts, strict=True)]
    of_q, of_k, of_v = (torch.cat(part) if len(part) > 1 else part[0] for part in zip(*found, strict=True))
    return of_q, of_k, of_v


@short_attention_gradients.register_fake
def _(of_mixed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    of_q, of_k, of_v = (q.new_empty(q.shape) for _ in range(3))
    return of_q, of_k, of_v


@cache
def _compiled():
    return torch.compile(_gradients, dynamic=False)


def _gradients(of_mixed: Tensor, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    T, scale = q.shape[2], 1 / math.sqrt(q.shape[3])
    seen = torch.ones(T, T, dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(2, 3)).float() * scale
    weights = torch.softmax(torch.where(seen, scores, -math.inf), 3)
    of_weights = (of_mixed @ v.transpose(2, 3)).float()
    mean = (weights * of_weights).sum(3, keepdim=True)
    of_scores = (weights * (of_weights - mean) * scale).to(q.dtype)
    return of_scores @ k, of_scores.transpose(2, 3) @ q, weights.to(q.dtype).transpose(2, 3) @ of_mixed
