"""The KV cache of conversations and descriptions, and the steps on it."""

from typing import TYPE_CHECKING, Protocol

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import Speculation
from lumina_mgpt.model.compiled import COMPILED_SPARE, CompiledForward, compiled_spare
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep, cuda_width
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.unirep import ImageLayout
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

if TYPE_CHECKING:
    from lumina_mgpt.model.parallel import Parallel

_GROWTH = 1.5  # a cache that is too small grows at least by this factor


class Host(Protocol):
    """What a conversation needs of a `Pipeline`."""

    checkpoint: Checkpoint
    model: Transformer
    image_tokenizer: ImageTokenizer
    device: torch.device
    cache_dtype: torch.dtype
    compiled: CompiledForward | None
    cuda_graphs: bool
    parallel: "Parallel | None"

    @property
    def writes_text(self) -> bool: ...

    def with_window(self, speculation: Speculation | None) -> Speculation | None: ...

    def preview(self, codes: Tensor, layout: ImageLayout) -> list[Image.Image]: ...


class ConversationCache:
    """The KV cache of a conversation, and the steps on it."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._cache: KVCache | None = None
        self._rows = 0
        self._steps: dict[tuple[int, int], CachedStep] = {}  # by number of rows and width; no rows: the text step

    def reserve(self, rows: int, length: int, spare: int, held: int) -> None:
        """Makes room for `rows` rows of `length` ids, and keeps the first `held` ids of the conditional row.

        Without guidance there is no second row, so a cache may grow in both directions.

        Args:
            spare: number of further slots, for pads and drafts.
        """
        host, old = self._host, self._cache
        pads = COMPILED_SPARE if host.compiled else 0
        if old is not None and rows <= self._rows and length + spare + pads <= old.slots:
            return
        if old is not None:
            rows = max(rows, self._rows)
            grown = old.slots if length + spare + pads <= old.slots else int(_GROWTH * old.slots)
            length = max(length, min(host.checkpoint.config.context, grown - spare - pads))
        new = conversation_cache(host, rows, length + spare)
        if old is not None:
            for target, source in zip(new.tensors(), old.tensors(), strict=True):
                target[:1, :, :held] = source[:1, :, :held]
        self._cache, self._rows, self._steps = new, rows, {}

    def text_step(self) -> CachedStep:
        """Returns the step that feeds the conditional row alone, for a new answer."""
        return self._step(0, 1, None)

    def image_step(self, rows: int, window: int) -> CachedStep:
        """Returns the step that feeds this number of rows, for a new image.

        Args:
            window: largest number of ids of a window of drafts, 0 without drafts.
        """
        return self._step(rows, cuda_width(window), self._host.checkpoint.vocabulary.code_slice)

    def _step(self, rows: int, width: int, columns: slice | None) -> CachedStep:
        assert self._cache is not None
        key = rows, width
        if key not in self._steps:
            self._steps[key] = conversation_step(self._host, self._cache, columns, width)
        self._steps[key].calls = 0  # the first call may be a prefill, which is never compiled
        return self._steps[key]


def conversation_cache(host: Host, rows: int, slots: int) -> KVCache:
    """Returns an empty cache. Scaled rotary angles are those of the model's whole context, however large it is.

    Args:
        slots: least number of slots. For compiled steps, the cache has those for pads besides.
    """
    slots += compiled_spare(slots) if host.compiled else 0
    cache = KVCache(host.model.config, rows, slots, host.cache_dtype, host.model.layer_devices)
    cache.length = host.checkpoint.config.context
    return cache


def conversation_step(host: Host, cache: KVCache, columns: slice | None, width: int = 1) -> CachedStep:
    """Returns a step on a cache. Arguments: as `CachedStep`."""
    graphs = host.cuda_graphs and not host.parallel
    return CachedStep(host.model, cache, columns, host.compiled, width=width, graphs=graphs)
