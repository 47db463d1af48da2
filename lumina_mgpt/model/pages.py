"""Tensors in large memory pages, for weights and caches that a step on a CPU reads as a whole.

With pages of 4 kB, a processor looks up 260,000 addresses a gigabyte, and its prefetcher stops at the end of each page.
Linux gives pages of 2 MB to memory that asks for them. On other systems, the tensors are ordinary ones.
"""

import math
import mmap
import sys

import torch
from torch import Tensor

_PAGE = 1 << 21  # bytes of a large page on x86
_LEAST = 2 * _PAGE  # smaller tensors do not gain


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Returns an uninitialized tensor on the CPU. Its memory is freed with the tensor, as that of any other.

    Args:
        shape: sizes of the tensor.
    """
    size = math.prod(shape) * dtype.itemsize
    if sys.platform != "linux" or size < _LEAST or torch.compiler.is_compiling():
        return torch.empty(shape, dtype=dtype, device="cpu")
    try:
        memory = mmap.mmap(-1, size + _PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        numbers = torch.frombuffer(memory, dtype=torch.uint8)  # keeps `memory` alive
        start = -numbers.data_ptr() % _PAGE
        memory.madvise(mmap.MADV_HUGEPAGE, start, size - size % _PAGE)  # the rest would take a page for less
    except (OSError, ValueError):  # no memory as this system counts it, or a system without large pages
        return torch.empty(shape, dtype=dtype, device="cpu")
    return numbers[start : start + size].view(dtype).view(shape)


def copied(tensor: Tensor) -> Tensor:
    """Returns a contiguous copy of a tensor on the CPU."""
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
