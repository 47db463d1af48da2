"""Measures time, memory bandwidth and memory use; for benchmarks."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_READS = 8  # reads of a GPU's memory between two waits: one read takes about as long as its launch and the wait


def seconds(work: Callable[[], object], repeats: int = 5, device: torch.device | None = None) -> float:
    """Returns the median seconds of `repeats` calls of `work`, after one call that is not timed.

    Args:
        device: a device to wait for before and after each call; None where `work` itself waits.
    """
    device = device or torch.device("cpu")
    work()
    taken = []
    for _ in range(repeats):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repeats // 2]


def wait(device: torch.device) -> None:
    """Waits until the device has done all work given to it. On a CPU there is nothing to wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def read_bandwidth(device: torch.device, size: int | None = None, repeats: int = 5) -> float:
    """Returns the memory bandwidth for reading `size` float32 numbers, in bytes per second.

    It is the best of `repeats` sums and `repeats` matrix-vector products. On a GPU each of them is done several times
    in a row, so that launches and waits do not count.

    Args:
        size: default 2^26 on a CPU, and 2^28 (1 GB) on a GPU, whose caches are larger.
    """
    on_cpu = device.type == "cpu"
    size, reads = size or (1 << 26 if on_cpu else 1 << 28), 1 if on_cpu else _READS
    data = torch.ones(size // 4096, 4096, device=device)
    vector, best = torch.ones(4096, device=device), 0.0
    for work in (data.sum, lambda: (data @ vector)[0]) * repeats:
        wait(device)
        began = time.perf_counter()
        for _ in range(reads - 1):
            work()
        work().item()
        best = max(best, reads * data.nbytes / (time.perf_counter() - began))
    return best


def peak_bytes(device: torch.device) -> int | None:
    """Returns the peak memory in bytes of the GPU, or of this process on Linux; None on other systems."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def anonymous_bytes() -> int:
    """Returns the bytes of this process's anonymous memory (Linux only). Pages of mapped files do not count."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


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
            peak[0] = max(peak[0], anonymous_bytes())
            if stop.wait(every):
                return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
