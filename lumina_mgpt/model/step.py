"""The model as samplers call it: it takes ids, returns logits of image codes, and keeps a KV cache between calls."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lumina_mgpt.model.compiled import IDS, PARTS, CompiledForward
from lumina_mgpt.model.graphs import Graphs
from lumina_mgpt.model.kv_cache import CUDA_SLOTS, KVCache
from lumina_mgpt.model.transformer import Transformer

# On CUDA, attention reads one of at most this many parts of a cache, or of PARTS if compiled. Each part costs a graph.
# Half a part is read in vain on average: 5 % of the cache.
_CUDA_PARTS = 10


class CachedStep:
    """The step function of one sampler: a model with its KV cache.

    Position p of a row is in slot p of the cache. A call that feeds a position again overwrites its slot.

    The first step reads the prompts, or what a cache with earlier turns lacks. Each later step of a compiled model, and
    each later step on CUDA, is padded to one of few shapes. Pads write to the slots after the end of a row. Later ids
    of the row overwrite these slots before any query attends to them.

    On CUDA, a step is captured as a graph when its shape occurs for the second time. Replays see weights that change in
    place, but not weights that are replaced: make a new step then.

    Args:
        columns: the vocabulary ids whose logits a call returns; None for the whole vocabulary.
        compiled: result of `compile_forward`; None to run the model uncompiled. The first step is never compiled.
        width: on CUDA, the number of ids that later steps are padded to: `cuda_width`. The cache needs as many spare
            slots. Steps with more ids are padded to a multiple of 8.
        graphs: on CUDA, whether to capture graphs.
    """

    def __init__(
        self,
        model: Transformer,
        cache: KVCache,
        columns: slice | None,
        compiled: CompiledForward | None = None,
        *,
        width: int = 2,
        graphs: bool = True,
    ) -> None:
        self.model, self.cache, self.columns, self.compiled, self.width = model, cache, columns, compiled, width
        self.device = model.device
        self.graphs = Graphs(self.device) if graphs and self.device.type == "cuda" else None
        self._inputs: dict[int, tuple[Tensor, Tensor]] = {}  # number of ids -> ids and positions that graphs read
        self.calls = 0

    def dropping(self, images: int, kept: Callable[[], Sequence[int] | None]) -> Callable[[], Sequence[int] | None]:
        """Returns `kept` with a side effect: the cache drops the rows of the images that do not go on.

        Args:
            images: number of images of the batch. The cache has one row for each, or two with guidance.
            kept: returns None, or which of the batch's current images go on.
        """

        def keep() -> Sequence[int] | None:
            nonlocal images
            going_on = kept()
            if going_on is not None:
                rows = len(self.cache.tensors()[0])
                index = [row + image for row in range(0, rows, images) for image in going_on]
                self.cache.keep_rows(torch.tensor(index, device=self.device))
                images = len(going_on)
                self._inputs = {}
                if self.graphs is not None:  # they read the memory of the former rows
                    self.graphs = Graphs(self.device)
            return going_on

        return keep

    def __call__(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        """Returns the logits after the ids at columns `read`.

        Shapes: ids, positions (R, T) int64; read (R, Q) int64 -> (R, Q, C).
        """
        self.calls += 1
        T = ids.shape[1]
        if self.calls > 1:
            return (self._on_cuda if self.device.type == "cuda" else self._later)(ids, positions, read)
        fresh = torch.equal(positions, torch.arange(T).expand_as(positions))
        return self._fresh(ids, read) if fresh else self._later(ids, positions, read)

    def restart(self) -> None:
        """Prepares for the prompts of another batch of the same shape. Graphs and memory are kept."""
        self.cache.clear()
        self.calls = 0

    def _fresh(self, ids: Tensor, read: Tensor) -> Tensor:
        """Reads prompts into empty rows. No mask is needed, and equal rows are computed once."""
        T = ids.shape[1]  # equal rows: the images of one prompt, and the unconditional rows
        rows, source = torch.cat([ids, read], 1).unique(dim=0, return_inverse=True)
        source = source.to(self.device, non_blocking=True)
        hidden = self.model(rows[:, :T].to(self.device, non_blocking=True), positions=0, cache=self.cache, filled=T)
        self.cache.copy_rows(source, T)
        return self._logits(hidden, rows[:, T:])[source]

    def _later(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        filled = int(positions.max()) + 1  # on the CPU, so no synchronization with a GPU
        if self.device.type == "cuda":
            filled = self._rounded(filled)
        elif self.compiled and self.calls > 1:
            return self._logits(self.compiled.step(ids, positions, self.cache, filled), read)
        ids, positions = (tensor.to(self.device, non_blocking=True) for tensor in (ids, positions))
        return self._logits(self.model(ids, positions=positions, cache=self.cache, filled=filled), read)

    def _on_cuda(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        """A later step on CUDA: in one of few shapes, from inputs at fixed addresses.

        It computes the logits of all ids, so that `read` does not add to the shapes. The weights are read once in any
        case.
        """
        R, T = ids.shape
        width = self.width if T <= self.width else T + -T % IDS
        if width not in self._inputs:
            fixed = torch.zeros((2, R, width), dtype=torch.long, device=self.device)
            self._inputs[width] = fixed[0], fixed[1]
        fixed_ids, fixed_positions = self._inputs[width]
        positions = torch.cat([positions, positions[:, -1:] + torch.arange(1, width - T + 1)], 1)
        filled = self._rounded(int(positions.max()) + 1)
        fixed_ids[:, :T].copy_(ids, non_blocking=True)  # pads keep ids of earlier steps
        fixed_positions.copy_(positions, non_blocking=True)
        forward = self.compiled or self.model

        def work() -> Tensor:
            hidden = forward(fixed_ids, positions=fixed_positions, cache=self.cache, filled=filled)
            return self.model.project(hidden, self.columns)  # (R, width, C)

        logits = work() if self.graphs is None else self.graphs.run((width, filled), work)
        read = read.to(self.device, non_blocking=True)
        return logits.gather(1, read[..., None].expand(-1, -1, logits.shape[-1]))  # a copy: replays overwrite `logits`

    def _rounded(self, filled: int) -> int:
        """Rounds a number of filled slots up to a part of the cache; on CUDA."""
        slots = self.cache.slots
        assert filled <= slots, f"{filled} slots of {slots}: the cache needs spare slots for pads"
        part = -(-slots // (PARTS if self.compiled else _CUDA_PARTS))
        part += -part % CUDA_SLOTS
        return min(slots, part * -(-filled // part))

    def _logits(self, hidden: Tensor, read: Tensor) -> Tensor:
        if hidden.shape[1] > 1:
            read = read.to(self.device, non_blocking=True)
            hidden = hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1]))  # (R, Q, D)
        return self.model.project(hidden, self.columns)


def cuda_width(window: int) -> int:
    """Returns the number of ids that steps on CUDA are padded to: one number for all steps of an image.

    Two for plain sampling: a code, and the end of its row or a pad. For windows a multiple of 8, which matrix products
    prefer.

    Args:
        window: largest number of ids that a step feeds, drafts and forced ids; 0 for plain sampling.
    """
    return window + -window % IDS if window else 2
