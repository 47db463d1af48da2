"""Keys and values of every layer, in slots given out beforehand."""

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig


class KVCache:
    """`length` places a row; the key of position p lies in slot p, so rows of different lengths need no bookkeeping.

    `spare` slots behind them are for the pads of short rows: nothing ever sees what is in there.

    Slots are zero at first: a slot that no query may see still enters the products with weight 0, and 0 · NaN is NaN.
    Nothing is ever cleared. A query sees slots up to its own position only, so what a longer earlier sequence, a
    rejected draft or a pad left behind is overwritten before anything can see it.
    """

    def __init__(
        self, config: ModelConfig, rows: int, length: int, dtype: torch.dtype, device: torch.device | str,
        spare: int = 0,
    ):  # fmt: skip
        self.length, self.slots = length, length + spare
        shape = (config.num_hidden_layers, 2, rows, self.slots, config.num_key_value_heads, config.head_dim)
        self.store = torch.zeros(shape, dtype=dtype, device=device)
        self._row = torch.arange(rows, device=device)[:, None]  # (B, 1)

    def update(
        self, layer: int, keys: Tensor, values: Tensor, positions: Tensor | int, filled: int
    ) -> tuple[Tensor, Tensor]:
        """Writes keys and values at their positions, and returns all that may be in use.

        Shapes: keys, values (B, T, K, H); positions (B, T), or the position of the first of T for every row alike;
        returns two views (B, filled, K, H).
        """
        held = self.store[layer]
        if isinstance(positions, int):
            T = keys.shape[1]
            held[0, :, positions : positions + T] = keys
            held[1, :, positions : positions + T] = values
        else:
            at = (self._row, positions)
            held[0].index_put_(at, keys.to(held.dtype))
            held[1].index_put_(at, values.to(held.dtype))
        return held[0, :, :filled], held[1, :, :filled]
