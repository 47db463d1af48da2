"""Random numbers as functions of a key and a position: Gumbel noise for sampling, uniform numbers for verification.

Philox is a counter-based generator: its bits depend on key and counter alone. The noise of a code is therefore the same
for any sampling order, batch, process and device. NumPy guarantees the stream of raw bits. The distributions of
`numpy.random.Generator` may change between versions (NEP 19), so this module derives its own from the bits. The Gumbel
noise of one code with 16,384 candidates takes 125 µs on one core of a server; half of this is Philox.

Philox has a key of two words and a counter of four. All are 64-bit numbers:

    key      seed, repeat
    counter  block of the draw, stream, position, purpose
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

Key = tuple[int, int] | tuple[int, int, int]  # seed, repeat, and the stream (default 0)

CODES = 0  # purpose of the Gumbel noise of image codes; 1 + round is that of a round's verification
IDS = 2**64 - 1  # purpose of the Gumbel noise of text ids and grid ids


def stream(answer: int, image: int = 0) -> int:
    """Returns the stream of one image in a conversation, or of the text of an answer.

    All draws of a conversation are independent, and the first image of a fresh request has stream 0.

    Args:
        answer: index of the answer in its conversation.
        image: index of the image in its answer; 0 for text.
    """
    return answer << 32 | image


def gumbel(seed: int, repeat: int, position: int, count: int, purpose: int = CODES, *, stream: int = 0) -> Tensor:
    """Returns standard Gumbel noise for one code or id, one number for each of its `count` candidates.

    argmax(log_probs + noise) is then a sample from the distribution `log_probs` (the Gumbel-max trick).

    Args:
        seed: seed of the request, 0 ... 2**64 - 1.
        repeat: index of the image among the images of one prompt.
        position: index of the code in its image, 0 ... rows · cols - 1; for `IDS` the index of the id in its answer.
        count: number of candidates, which is the size of the codebook or, for `IDS`, of the vocabulary.
        purpose: `CODES` or `IDS`.
        stream: what the function `stream` returns.

    Shapes: -> (count,) float64 on the CPU. The first n values do not depend on `count`.
    """
    return gumbel_rows([(seed, repeat, stream)], [position], count, purpose)[0]


def gumbel_rows(keys: Sequence[Key], positions: Sequence[int], count: int, purpose: int = CODES) -> Tensor:
    """Returns `gumbel` noise for B rows. Rows with equal key and position share noise, which is computed once.

    Args:
        keys: key of each row.
        positions: index of each row's code in its image, or of its id in its answer.
        count: number of candidates.
        purpose: `CODES` or `IDS`.

    Shapes: -> (B, count) float64 on the CPU.
    """
    wanted = list(zip(keys, positions, strict=True))
    index = {draw: row for row, draw in enumerate(dict.fromkeys(wanted))}
    noise = np.empty((len(index), count))
    for (key, position), row in index.items():
        _fill(noise[row], key, position, purpose)
    for _ in range(2):  # -log(-log(uniform)), in place
        np.log(noise, out=noise)
        np.negative(noise, out=noise)
    if len(index) < len(wanted):
        noise = noise[[index[draw] for draw in wanted]]
    return torch.from_numpy(noise)


def gumbel_like(log_probs: Tensor, keys: Sequence[Key], positions: Sequence[int], purpose: int = CODES) -> Tensor:
    """Returns `gumbel_rows` noise with the shape, device and dtype of `log_probs`. Shapes: (B, C) -> (B, C)."""
    noise = gumbel_rows(keys, positions, log_probs.shape[-1], purpose).to(log_probs.dtype)
    if log_probs.is_cuda:
        noise = noise.pin_memory()  # copies from pageable memory synchronize
    return noise.to(log_probs.device, non_blocking=True)


def uniform_rows(keys: Sequence[Key], positions: Sequence[int], round: int, count: int) -> Tensor:
    """Returns `count` uniform numbers for each of B rows, independent of the Gumbel noise.

    The numbers of a row depend only on its key, its position and `round`.

    Args:
        keys: key of each row.
        positions: index of a code in the image of each row.
        round: index of the sampling round, from 0.

    Shapes: -> (B, count) float64 in (0, 1) on the CPU.
    """
    uniform = np.empty((len(keys), count))
    for row, key, position in zip(uniform, keys, positions, strict=True):
        _fill(row, key, position, 1 + round)
    return torch.from_numpy(uniform)


def _fill(row: np.ndarray, key: Key, position: int, purpose: int) -> None:
    """Fills a float64 row with uniform numbers in (0, 1), with few temporary arrays, because allocation is slow.

    Args:
        purpose: `CODES`, 1 + round for verification, or `IDS`.
    """
    # The counter's first word counts the blocks of this draw.
    counter = np.array([0, key[2] if len(key) > 2 else 0, position, purpose], np.uint64)
    bits = np.random.Philox(key=np.array(key[:2], np.uint64), counter=counter).random_raw(len(row))
    bits >>= np.uint64(12)  # 52 bits; 53 could round up to 1
    np.add(bits, 0.5, out=row)
    row *= 2.0**-52
