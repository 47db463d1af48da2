"""Measures the memory of a device while a block runs."""

import ctypes
import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch

from lumina_mgpt.measure import anonymous_bytes, peak_anonymous

CPU_SLACK = 60e6  # bytes on a CPU: scratch memory of its kernels (0.03 to 0.05 GB with AMX), and small objects


@dataclass
class Use:
    """Bytes of a block.

    Attributes:
        held: bytes in use at its end, beyond those at its begin.
        peak: largest number of bytes in use, beyond those at its begin.
    """

    held: int = 0
    peak: int = 0


@contextmanager
def memory_of(device: torch.device) -> Iterator[Use]:
    """Measures the block: torch's tensors on a GPU, on a CPU the anonymous memory of this process (Linux only)."""
    use, on_gpu = Use(), device.type == "cuda"
    now: Callable[[], int] = (lambda: torch.cuda.memory_allocated(device)) if on_gpu else anonymous_bytes
    if on_gpu:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    _return_freed(on_gpu)
    before = now()
    with nullcontext([0]) if on_gpu else peak_anonymous(0.002) as peak:
        yield use
        if on_gpu:
            torch.cuda.synchronize(device)
            peak[0] = torch.cuda.max_memory_allocated(device)
        _return_freed(on_gpu)
        use.held = now() - before
    use.peak = max(peak[0] - before, use.held)


def _return_freed(on_gpu: bool) -> None:
    """Frees what nothing uses. On a CPU with glibc, returns freed memory to the system, which counts it until then."""
    gc.collect()
    if not on_gpu and sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)
