"""Attention written as its formula, and random heads."""

import torch


def heads(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def formula(q, k, v, positions):
    """softmax(q k / sqrt(H)) v over slots up to each query's position. q (B, T, N, H), k, v (B, S, K, H)."""
    group = q.shape[2] // k.shape[2]
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for t in range(q.shape[1]):
            seen = int(positions[b, t]) + 1
            for n in range(q.shape[2]):
                keys, values = k[b, :seen, n // group], v[b, :seen, n // group]
                out[b, t, n] = torch.softmax(keys @ q[b, t, n] / q.shape[3] ** 0.5, 0) @ values
    return out
