"""What benchmarks measure with: the machine's memory, and this process's."""

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """The median of several runs, after one that is not counted."""
    work()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return sorted(taken)[repeats // 2]


def read_bandwidth(device: torch.device, size: int = 1 << 26, repeats: int = 5) -> float:
    """Bytes a second of going through `size` float32 numbers: of a sum, and of a product with a vector; the best."""
    data = torch.ones(size // 4096, 4096, device=device)
    vector, best = torch.ones(4096, device=device), 0.0
    for work in (data.sum, lambda: (data @ vector)[0]) * repeats:
        began = time.perf_counter()
        work().item()
        best = max(best, data.nbytes / (time.perf_counter() - began))
    return best


def peak_bytes(device: torch.device) -> int | None:
    """The most memory that was in use at once: of the GPU, or of this process (None where that is not told)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform != "linux":
        return None
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def peak_anonymous(every: float = 0.05) -> Iterator[list[int]]:
    """Yields a list whose one number becomes the most anonymous memory of this process, in bytes (Linux only).

    Pages of mapped files do not count: the system takes them back where it needs room. Looks every so many seconds.
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
