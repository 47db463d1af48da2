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
    each key and value is rounded as it comes in, with a scale of its own in `scales`; attention multiplies by the
    integers (see `attention.sdpa`). A head's slots lie one after another, as attention reads them.

    Slots are zero at first: a slot that no query may see still enters the products with weight 0, and 0 · NaN is NaN.
    Nothing is ever cleared. A query sees slots up to its own position only, so what a longer earlier sequence, a
    rejected draft or a pad left behind is overwritten before anything can see it.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device | str,
        spare: int = 0,
    ):  # fmt: skip
        self.length, self.slots = length, length + spare
        shape = (config.num_hidden_layers, 2, rows, config.num_key_value_heads, self.slots, config.head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        quantized = dtype == torch.int8
        self.scales = torch.zeros(shape[:-1], dtype=torch.float32, device=device) if quantized else None
        self._row = torch.arange(rows, device=device)[:, None]  # (B, 1)

    def layer(self, index: int) -> "LayerCache":
        return LayerCache(self.store[index], None if self.scales is None else self.scales[index], self._row)

    def spread(self, source: Tensor, filled: int) -> None:
        """Row r becomes a copy of row source[r] as far as `filled` slots. Shapes: source (rows,)."""
        for held in (self.store, self.scales):
            for layer in () if held is None else held:  # a copy of one layer at a time
                layer[:, :, :, :filled] = layer[:, source, :, :filled]


class LayerCache(NamedTuple):
    """One layer's part. Shapes: store (2, rows, K, slots, H), scales (2, rows, K, slots) or None, row (rows, 1)."""

    store: Tensor
    scales: Tensor | None
    row: Tensor

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | int, filled: int) -> tuple[Held, Held]:
        """Writes keys and values at their positions, and returns all that may be in use of the first B rows.

        Shapes: keys, values (B, T, K, H); positions (B, T), or the position of the first of T for every row alike;
        returns two views (B, filled, K, H).
        """
        B, T = keys.shape[:2]
        alike = isinstance(positions, int)
        rows, at = (slice(B), slice(positions, positions + T)) if alike else (self.row[:B], positions)
        held = []
        for part, new in enumerate((keys, values)):
            store = self.store[part].transpose(1, 2)  # (rows, slots, K, H)
            if self.scales is None:
                store[rows, at] = new.to(store.dtype)
                held.append(store[:B, :filled])
            else:
                scales = self.scales[part].transpose(1, 2)
                store[rows, at], scales[rows, at] = Scaled.of(new)
                held.append(Scaled(store[:B, :filled], scales[:B, :filled]))
        return held[0], held[1]
