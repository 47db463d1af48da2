"""CUDA graphs: work on the GPU is captured once for each shape, then replayed with one launch.

A step of a large model starts about a thousand kernels. Starting them takes the host longer than an H100 needs to run
them. A graph starts all of them at once.
"""

import logging
from collections.abc import Callable, Hashable
from typing import NamedTuple

import torch
from torch import Tensor

logger = logging.getLogger(__name__)


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    result: Tensor  # the memory that each replay writes


class Graphs:
    """Captures work on a CUDA device and replays it.

    The first call for a key runs the work. The second call captures it, and this and all later calls replay it. Work
    that occurs only once is therefore never captured. If a capture fails, one warning is logged. From then on, work
    that has no graph yet runs eagerly.

    All graphs share one memory pool, so their temporary tensors take the memory of the largest. A graph holds the
    addresses of all tensors that it reads: it sees weights that change in place, but not weights that are replaced.

    Source: https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._captured: dict[Hashable, _Captured] = {}
        self._warm: set[Hashable] = set()
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._failed = False

    def __len__(self) -> int:
        """Number of captured graphs."""
        return len(self._captured)

    @torch.no_grad()
    def run(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Returns the result of `work`. The next call of `run` may overwrite it.

        Args:
            key: calls with equal keys must do the same work on the same memory: same shapes, same addresses.
            work: starts kernels, does not wait for the device, and copies nothing from the host.
        """
        captured = self._captured.get(key)
        if captured is None and not self._failed and key in self._warm:
            captured = self._capture(key, work)
        if captured is None:
            return work() if self._failed else self._first(key, work)
        captured.graph.replay()
        return captured.result

    def _first(self, key: Hashable, work: Callable[[], Tensor]) -> Tensor:
        """Runs the work on the stream of the captures, so that libraries allocate what they keep for this stream.

        The result needs no record of the other stream: the next work on this stream waits for that stream first.
        """
        self._warm.add(key)
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = work()
        current.wait_stream(self._stream)
        return result

    def _capture(self, key: Hashable, work: Callable[[], Tensor]) -> _Captured | None:
        """Captures the work without running it. Returns None, and captures nothing from then on, if this fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            # torch.cuda.graph does not restore the stream if it fails, so it is restored here. "thread_local" lets
            # other threads use the device meanwhile.
            with torch.cuda.stream(self._stream):
                with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
                    result = work()
        except RuntimeError as error:  # out of memory, or an operator that cannot be captured
            self._failed = True
            reason = str(error).strip().split("\n")[0]
            logger.warning("a CUDA graph cannot be captured, further steps run without: %s", reason)
            return None
        self._captured[key] = _Captured(graph, result)
        return self._captured[key]
