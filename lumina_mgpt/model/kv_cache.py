"""The KV cache: preallocated keys and values of every layer."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model import pages


class Scaled(NamedTuple):
    """Keys or values in int8 with one scale for each token and head.

    Shapes: integers (B, S, K, H) int8, scales (B, S, K) float32.
    """

    integers: Tensor
    scales: Tensor

    @classmethod
    def quantize(cls, x: Tensor) -> "Scaled":
        """Returns `x` rounded to int8. The scale of each token and head maps its largest magnitude to 127.

        Shapes: x (B, S, K, H).
        """
        scales = x.abs().amax(-1).float().clamp_(min=torch.finfo(torch.float32).tiny) / 127
        return cls((x / scales[..., None]).round().to(torch.int8), scales)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """Returns the integers times their scales, in `dtype`. Shapes: -> (B, S, K, H)."""
        return (self.integers * self.scales[..., None]).to(dtype)


CUDA_SLOTS = 128  # on CUDA, a cache has a multiple of this many slots, and attention reads a multiple of it
_CUDA_SPARE = 2  # on CUDA, spare slots that every cache has: a step of one id is padded to two

Cached = Tensor | Scaled  # keys or values as attention reads them


class KVCache:
    """Keys and values of every layer for a batch of sequences. Slot p holds the key and value of position p.

    The slots of one head are contiguous in memory, because attention reads them in this order. With dtype int8, keys
    and values are quantized when they are written, and attention reads the integers.

    A query attends to the slots up to its own position. The model writes all of these before the query reads them.
    Slots are therefore never cleared: what an earlier sequence, a rejected draft or a pad left there has no effect.
    All slots start as zero. A slot above the query's position has weight 0, and 0 · NaN would be NaN.

    Args:
        rows: number of sequences.
        length: largest number of ids in one sequence.
        device: device of all layers, or one device for each layer.
        spare: number of additional slots after `length`, for the pads of short rows. No query attends to them.
            On CUDA there are at least two, and up to 127 more: the number of slots is a multiple of 128.
    """

    def __init__(
        self,
        config: ModelConfig,
        rows: int,
        length: int,
        dtype: torch.dtype,
        device: torch.device | str | Sequence[torch.device],
        spare: int = 0,
    ) -> None:
        if isinstance(device, torch.device | str):
            devices = [torch.device(device)] * config.num_hidden_layers
        else:
            devices = list(device)
        self.length, self.slots = length, length + spare
        if devices[0].type == "cuda":
            self.slots = length + max(spare, _CUDA_SPARE)
            self.slots += -self.slots % CUDA_SLOTS
        shape = (rows, config.num_key_value_heads, self.slots, config.head_dim)
        self.index = torch.arange(self.slots, device=devices[0])  # of each slot
        index = {one: torch.arange(rows, device=one)[:, None] for one in devices}  # (B, 1)
        self.layers: list[LayerCache] = []
        for one in devices:
            # Separate tensors: for a slice of a larger one, a compiled step would write back the whole tensor.
            stores = [_zeros(shape, dtype, one) for _ in range(2)]
            scales = None
            if dtype == torch.int8:
                scales = [_zeros(shape[:-1], torch.float32, one) for _ in range(2)]
            self.layers.append(LayerCache(stores, scales, index[one]))

    def tensors(self) -> list[Tensor]:
        """Returns the tensors of all layers: keys, values and, in int8, their scales."""
        return [tensor for layer in self.layers for tensor in (*layer.stores, *(layer.scales or ()))]

    def clear(self) -> None:
        """Sets all slots to zero, for other sequences: what is not a number in one would reach the next."""
        for tensor in self.tensors():
            tensor.zero_()

    def copy_rows(self, source: Tensor, filled: int) -> None:
        """Copies the first `filled` slots of row `source[r]` to row r, for every row r. Shapes: source (rows,)."""
        for tensor in self.tensors():
            tensor[:, :, :filled] = tensor[source.to(tensor.device), :, :filled]

    def keep_rows(self, rows: Tensor) -> None:
        """Drops all rows but `rows`, and frees their memory. Row `rows[r]` becomes row r.

        Shapes: rows (number of rows that stay,).
        """
        for layer in self.layers:
            for tensors in (layer.stores, layer.scales or []):
                for index, tensor in enumerate(tensors):
                    tensors[index] = tensor[rows]


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return pages.empty(shape, dtype).zero_() if device.type == "cpu" else torch.zeros(shape, dtype=dtype, device=device)


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    Attributes:
        stores: keys and values, two of (rows, K, slots, H).
        scales: scales of int8 keys and values, two of (rows, K, slots); None for other dtypes.
        row: index of each row, (rows, 1).
    """

    stores: list[Tensor]
    scales: list[Tensor] | None
    row: Tensor

    def update(self, keys: Tensor, values: Tensor, positions: Tensor | int, filled: int) -> tuple[Cached, Cached]:
        """Writes the keys and values of B rows. Returns views of the first `filled` slots of these rows.

        Args:
            positions: position of each token. An int is the first position of consecutive ones, for all rows.

        Shapes: keys, values (B, T, K, H); positions (B, T); returns two of (B, filled, K, H).
        """
        for part, new in enumerate((keys, values)):
            if self.scales is None:
                self._write(self.stores[part], new.to(self.stores[part].dtype), positions)
            else:
                quantized = Scaled.quantize(new)
                self._write(self.stores[part], quantized.integers, positions)
                self._write(self.scales[part], quantized.scales, positions)
        return self.read(len(keys), filled)

    def read(self, rows: int, filled: int) -> tuple[Cached, Cached]:
        """Returns views of the first `filled` slots of the first rows: keys and values (rows, filled, K, H)."""
        stores = [store[:rows, :, :filled].transpose(1, 2) for store in self.stores]
        if self.scales is None:
            return stores[0], stores[1]
        scales = [scale[:rows, :, :filled].transpose(1, 2) for scale in self.scales]
        return Scaled(stores[0], scales[0]), Scaled(stores[1], scales[1])

    def _write(self, store: Tensor, new: Tensor, positions: Tensor | int) -> None:
        """Shapes: store (rows, K, slots, ...), new (B, T, K, ...)."""
        B, T = new.shape[:2]
        if isinstance(positions, int):
            store[:B, :, positions : positions + T] = new.transpose(1, 2)
        else:
            store[self.row[:B], :, positions] = new
