"""Keys and values of every layer, in slots given out beforehand."""

from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig


class Scaled(NamedTuple):
    """Integers that stand for integers times scale. Shapes: codes (B, S, K, H) int8, scales (B, S, K)."""

    codes: Tensor
    scales: Tensor

    @classmethod
    def of(cls, x: Tensor) -> "Scaled":
        """Rounds to int8 with one scale a token and head: the largest number of each becomes 127."""
        scales = x.abs().amax(-1).float().clamp_(min=torch.finfo(torch.float32).tiny) / 127
        return cls((x / scales[..., None]).round().to(torch.int8), scales)

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return (self.codes * self.scales[..., None]).to(dtype)


Held = Tensor | Scaled  # what attention reads


class KVCache:
    """`length` places a row; the key of position p lies in slot p, so rows of different lengths need no bookkeeping.

    `spare` slots behind them are for the pads of short rows: nothing ever sees what is in there. With the dtype int8
    each key and value is rounded as it comes in, with a scale of its own; attention multiplies by the integers (see
    `attention.sdpa`). A head's slots lie one after another, as attention reads them.

    Slots are zero at first: a slot that no query may see still enters the products with weight 0, and 0 · NaN is NaN.
    Nothing is ever cleared. A query sees slots up to its own position only, so what a longer earlier sequence, a
    rejected draft or a pad left behind is overwritten before anything can see it.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device | str,
        spare: int = 0,
    ):  # fmt: skip
        self.length, self.slots = length, length + spare
        shape = (rows, config.num_key_value_heads, self.slots, config.head_dim)
        row = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self.layers: list[LayerCache] = []
        for _ in range(config.num_hidden_layers):
            # Each a tensor of its own: of a slice of a larger one, a compiled step would write a whole copy back.
            stores = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
            scales = None
            if dtype == torch.int8:
                scales = [torch.zeros(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)]
            self.layers.append(LayerCache(stores, scales, row))

    def tensors(self) -> list[Tensor]:
        """All that it holds: keys and values of each layer, and their scales."""
        return [tensor for layer in self.layers for tensor in (*layer.stores, *(layer.scales or ()))]

    def spread(self, source: Tensor, filled: int) -> None:
        """Row r becomes a copy of row source[r] as far as `filled` slots. Shapes: source (rows,)."""
        for tensor in self.tensors():
            tensor[:, :, :filled] = tensor[source, :, :filled]


class LayerCache(NamedTuple):
    """One layer's keys and values. Shapes: stores (rows, K, slots, H), scales (rows, K, slots), row (rows, 1)."""

    stores: list[Tensor]
    scales: list[Tensor] | None
    row: Tensor

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | int, filled: int) -> tuple[Held, Held]:
        """Writes keys and values at their positions, and returns all that may be in use of the first B rows.

        Shapes: keys, values (B, T, K, H); positions (B, T), or the position of the first of T for every row alike;
        returns two views (B, filled, K, H).
        """
        B = len(keys)
        held = []
        for part, new in enumerate((keys, values)):
            store = self.stores[part]
            if self.scales is None:
                self._put(store, new.to(store.dtype), positions)
                held.append(store[:B, :, :filled].transpose(1, 2))
            else:
                codes, scales = Scaled.of(new)
                self._put(store, codes, positions)
                self._put(self.scales[part], scales, positions)
                kept = store[:B, :, :filled], self.scales[part][:B, :, :filled]
                held.append(Scaled(*(tensor.transpose(1, 2) for tensor in kept)))
        return held[0], held[1]

    def _put(self, store: Tensor, new: Tensor, positions: Tensor | int) -> None:
        """Shapes: store (rows, K, slots, ...), new (B, T, K, ...)."""
        B, T = new.shape[:2]
        if isinstance(positions, int):
            store[:B, :, positions : positions + T] = new.transpose(1, 2)
        else:
            store[self.row[:B], :, positions] = new
