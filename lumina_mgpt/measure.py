"""Measures time, memory bandwidth and memory use; for benchmarks."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Returns the median seconds of `repeats` calls of `work`, after one call that is not timed."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repeats // 2]


def wait(device: torch.device) -> None:
    """Waits until the device has done all work given to it. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def read_bandwidth(device: torch.device, size: int = 1 << 26, repeats: int = 5) -> float:
    """Returns the memory bandwidth for reading `size` float32 numbers, in bytes per second.

    It is the best of `repeats` sums and `repeats` matrix-vector products.
    """
    data = torch.ones(size // 4096, 4096, device=device)
    vector, best = torch.ones(4096, device=device), 0.0
    for work in (data.sum, lambda: (data @ vector)[0]) * repeats:
        began = time.perf_counter()
        work().item()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def peak_bytes(device: torch.device) -> int | None:
    """Returns the peak memory in bytes of the GPU, or of this process on Linux; None on other systems."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def peak_anonymous(every: float = 0.05) -> Iterator[list[int]]:
    """Yields a list of one number, kept up to date: this process's peak of anonymous memory in bytes (Linux only).

    The peak is that since the block began. Pages of mapped files do not count, since the system can reclaim them.

    Args:
        every: seconds between two readings.
    """
    peak, stop = [0], threading.Event()

    def watch() -> None:
        while True:
            status = Path("/proc/self/status").read_text()
            line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
            peak[0] = max(peak[0], 1024 * int(line.split()[1]))
            if stop.wait(every):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
