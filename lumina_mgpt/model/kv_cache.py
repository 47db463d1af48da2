"""Preallocated keys and values of every layer."""

from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig


class Scaled(NamedTuple):
    """Keys or values in int8 with one scale for each token and head.

    Shapes: integers (B, S, K, H) int8, scales (B, S, K) float32.
    """

    integers: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, x: Tensor) -> "Scaled":
        """Rounds to int8; the scale of each token and head maps its largest number to 127."""
        scales = x.abs().amax(-1).float().clamp_(min=torch.finfo(torch.float32).tiny) / 127
        return cls((x / scales[..., None]).round().to(torch.int8), scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns integers times scales. Shapes: (B, S, K, H)."""
        return (self.integers * self.scales[..., None]).to(dtype)


Cached = Tensor | Scaled  # keys or values as attention reads them


class KVCache:
    """Keys and values of `rows` sequences of at most `length` ids; the key of position p is in slot p.

    The slots of one head are contiguous in memory, because attention reads them in this order. With dtype int8, keys
    and values are quantized when they are written, and attention reads the integers.

    A query sees slots up to its own position only, and these are always written before. So slots are never cleared: an
    earlier sequence, a rejected draft or a pad has no effect. All slots start as zero, because an unseen slot has
    weight 0 in the products, and 0 · NaN is NaN.

    Args:
        spare: additional slots above `length` for the pads of short rows; no query sees them.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str,
        spare: int = 0,
    ) -> None:
        self.length, self.slots = length, length + spare
        shape = (rows, config.num_key_value_heads, self.slots, config.head_dim)
        row = torch.arange(rows, device=device)[:, None]  # (B, 1)
        self.layers: list[LayerCache] = []
        for _ in range(config.num_hidden_layers):
            # Separate tensors: for a slice of a larger one, a compiled step would write back the whole tensor.
            stores = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)]
            scales = None
            if dtype == torch.int8:
                scales = [torch.zeros(shape[:-1], dtype=torch.float32, device=device) for _ in range(2)]
            self.layers.append(LayerCache(stores, scales, row))

    def tensors(self) -> list[Tensor]:
        """Returns keys, values and scales of all layers."""
        return [tensor for layer in self.layers for tensor in (*layer.stores, *(layer.scales or ()))]

    def copy_rows(self, source: Tensor, filled: int) -> None:
        """Copies the first `filled` slots of row source[r] to row r, for every r. Shapes: source (rows,)."""
        for tensor in self.tensors():
            tensor[:, :, :filled] = tensor[source, :, :filled]


class LayerCache(NamedTuple):
    """Keys and values of one layer. Shapes: stores (rows, K, slots, H), scales (rows, K, slots), row (rows, 1)."""

    stores: list[Tensor]
    scales: list[Tensor] | None
    row: Tensor

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | int, filled: int) -> tuple[Cached, Cached]:
        """Writes keys and values at their positions; returns views of the first `filled` slots of the first B rows.

        Args:
            positions: position of each token, or of the first token where all rows have the same positions.

        Shapes: keys, values (B, T, K, H); positions (B, T); returns two of (B, filled, K, H).
        """
        B = len(keys)
        cached: list[Cached] = []
        for part, new in enumerate((keys, values)):
            store = self.stores[part]
            if self.scales is None:
                self._write(store, new.to(store.dtype), positions)
                cached.append(store[:B, :, :filled].transpose(1, 2))
            else:
                quantized = Scaled.quantize(new)
                self._write(store, quantized.integers, positions)
                self._write(self.scales[part], quantized.scales, positions)
                views = store[:B, :, :filled], self.scales[part][:B, :, :filled]
                cached.append(Scaled(*(tensor.transpose(1, 2) for tensor in views)))
        return cached[0], cached[1]

    def _write(self, store: Tensor, new: Tensor, positions: Tensor | int) -> None:
        """Shapes: store (rows, K, slots, ...), new (B, T, K, ...)."""
        B, T = new.shape[:2]
        if isinstance(positions, int):
            store[:B, :, positions : positions + T] = new.transpose(1, 2)
        else:
            store[self.row[:B], :, positions] = new
