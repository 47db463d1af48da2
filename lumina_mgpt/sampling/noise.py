"""Random numbers as functions of (seed, repeat, position): Gumbel noise for sampling, uniform numbers for verification.

Philox is a counter-based generator: its bits depend on key and counter alone. The noise of a code is therefore
independent of the order, batch, process and device that draw the image. NumPy guarantees the stream of raw bits; the
distributions of `numpy.random.Generator` may change between versions (NEP 19), so this module derives its own.
Measured on one core of a server: 125 µs for 16,384 codes, half of it Philox.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def gumbel(seed: int, repeat: int, position: int, count: int) -> Tensor:
    """Standard Gumbel noise for the `count` candidates of one code.

    argmax(log_probs + noise) is a sample from the distribution (the Gumbel-max trick).

    Args:
        seed: 0 ... 2**64 - 1.
        repeat: index of the image among those of one prompt.
        position: index of the code in its image, 0 ... rows · cols - 1.

    Shapes: -> (count,) float64 on the CPU. The first n values do not depend on `count`.
    """
    return gumbel_rows([(seed, repeat)], [position], count)[0]


def gumbel_rows(keys: Sequence[tuple[int, int]], positions: Sequence[int], count: int) -> Tensor:
    """`gumbel` for several rows; noise that several rows share (equal key and position) is computed once.

    Args:
        keys: B times (seed, repeat).
        positions: B indices of codes.

    Shapes: -> (B, count) float64 on the CPU.
    """
    wanted = list(zip(keys, positions, strict=True))
    index = {draw: row for row, draw in enumerate(dict.fromkeys(wanted))}
    noise = np.empty((len(index), count))
    for (key, position), row in index.items():
        _fill(noise[row], *key, position)
    for _ in range(2):  # -log(-log(uniform)), in place
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    if len(index) < len(wanted):
        noise = noise[[index[draw] for draw in wanted]]
    return torch.from_numpy(noise)


def gumbel_like(log_probs: Tensor, keys: Sequence[tuple[int, int]], positions: Sequence[int]) -> Tensor:
    """`gumbel_rows` with the shape, device and dtype of `log_probs`. Shapes: (B, C) -> (B, C)."""
    noise = gumbel_rows(keys, positions, log_probs.shape[-1]).to(log_probs.dtype)
    if log_probs.is_cuda:
        noise = noise.pin_memory()  # copies from pageable memory synchronize
    return noise.to(log_probs.device, non_blocking=True)


def uniform_rows(keys: Sequence[tuple[int, int]], positions: Sequence[int], round: int, count: int) -> Tensor:
    """Returns `count` uniform numbers for each of B rows, independent of the Gumbel noise.

    The numbers of a row depend only on its (seed, repeat), its position and `round`.

    Args:
        keys: (seed, repeat) of each row.
        positions: index of the code of each row.
        round: index of the verification, from 0.

    Shapes: -> (B, count) float64 in (0, 1) on the CPU.
    """
    uniform = np.empty((len(keys), count))
    for row, key, position in zip(uniform, keys, positions, strict=True):
        _fill(row, *key, position, purpose=1 + round)
    return torch.from_numpy(uniform)


def _fill(row: np.ndarray, seed: int, repeat: int, position: int, purpose: int = 0) -> None:
    """Fills a float64 row with uniform numbers in (0, 1), with few temporary arrays, because allocation is slow.

    Args:
        purpose: 0 for Gumbel noise, 1 + round for verification.
    """
    # The counter's first word counts the blocks of this draw.
    key, counter = np.array([seed, repeat], np.uint64), np.array([0, 0, position, purpose], np.uint64)
    bits = np.random.Philox(key=key, counter=counter).random_raw(len(row))
    bits >>= np.uint64(12)  # 52 bits; 53 could round up to 1
    np.add(bits, 0.5, out=row)
    row *= 2.0**-52
