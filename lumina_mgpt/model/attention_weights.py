"""Records attention weights, which the attention kernels do not return."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lumina_mgpt.model.attention import Backend, Span
from lumina_mgpt.model.kv_cache import Cached
from lumina_mgpt.model.transformer import Attention, Transformer


@contextmanager
def last_query_weights(model: Transformer) -> Iterator[list[Tensor]]:
    """Records the attention weights of the last query in each layer, until the block ends.

    Each forward without a KV cache appends one tensor per layer to the list that the block gets. The outputs of the
    model do not change.

    Shapes: (B, N, S) float32, or float64 for a float64 model. The weights of a head sum to 1.
    """
    recorded: list[Tensor] = []
    parts = [part for part in model.modules() if isinstance(part, Attention)]  # in the order of the layers
    before = [part.attend for part in parts]
    for part, attend in zip(parts, before, strict=True):
        part.attend = _recording(attend, recorded)
    try:
        yield recorded
    finally:
        for part, attend in zip(parts, before, strict=True):
            part.attend = attend


def _recording(attend: Backend, recorded: list[Tensor]) -> Backend:
    """Returns `attend` with the recording of weights."""

    def attend_and_record(q: Tensor, k: Cached, v: Cached, span: Span, cached: bool) -> Tensor:
        assert isinstance(k, Tensor) and not cached and not span.documents  # else the last query does not see all keys
        recorded.append(_weights(q[:, -1], k))
        return attend(q, k, v, span, cached)

    return attend_and_record


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Returns the softmax of the scores. Shapes: q (B, N, H), k (B, S, K, H) -> (B, N, S)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    k = k.repeat_interleave(q.shape[1] // k.shape[2], dim=2)
    scores = torch.einsum("BNH,BSNH->BNS", q.to(wide), k.to(wide)) * q.shape[-1] ** -0.5
    return scores.softmax(-1)
