"""Random numbers as functions of (seed, repeat, position): Gumbel noise for sampling, uniform numbers for verification.

Philox is a counter-based generator: its bits depend on key and counter alone. The noise of a code is therefore the same
for any sampling order, batch, process and device. NumPy guarantees the stream of raw bits. The distributions of
`numpy.random.Generator` may change between versions (NEP 19), so this module derives its own from the bits. The Gumbel
noise of one code with 16,384 candidates takes 125 µs on one core of a server; half of this is Philox.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def gumbel(seed: int, repeat: int, position: int, count: int) -> Tensor:
    """Returns standard Gumbel noise for one code of an image, one number for each of its `count` candidates.

    argmax(log_probs + noise) is then a sample from the distribution `log_probs` (the Gumbel-max trick).

    Args:
        seed: seed of the request, 0 ... 2**64 - 1.
        repeat: index of the image among the images of one prompt.
        position: index of the code in its image, 0 ... rows · cols - 1.
        count: number of candidates, which is the size of the codebook.

    Shapes: -> (count,) float64 on the CPU. The first n values do not depend on `count`.
    """
    return gumbel_rows([(seed, repeat)], [position], count)[0]


def gumbel_rows(keys: Sequence[tuple[int, int]], positions: Sequence[int], count: int) -> Tensor:
    """Returns `gumbel` noise for B rows. Rows with equal key and position share noise, which is computed once.

    Args:
        keys: (seed, repeat) of each row.
        positions: index of each row's code in its image.
        count: number of candidates of each code.

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
    """Returns `gumbel_rows` noise with the shape, device and dtype of `log_probs`. Shapes: (B, C) -> (B, C)."""
    noise = gumbel_rows(keys, positions, log_probs.shape[-1]).to(log_probs.dtype)
    if log_probs.is_cuda:
        noise = noise.pin_memory()  # copies from pageable memory synchronize
    return noise.to(log_probs.device, non_blocking=True)


def uniform_rows(keys: Sequence[tuple[int, int]], positions: Sequence[int], round: int, count: int) -> Tensor:
    """Returns `count` uniform numbers for each of B rows, independent of the Gumbel noise.

    The numbers of a row depend only on its (seed, repeat), its position and `round`.

    Args:
        keys: (seed, repeat) of each row.
        positions: index of a code in the image of each row.
        round: index of the sampling round, from 0.

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
