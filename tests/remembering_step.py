"""A deterministic model whose logits depend on every cached id."""

import hashlib

import numpy as np
import torch


def logits_of(seen: list[int], codes: int, dtype=torch.float64) -> torch.Tensor:
    """Logits that any change in what was seen, or in its order, changes."""
    digest = hashlib.sha256(np.array(seen, np.int64).tobytes()).digest()
    values = np.random.default_rng(list(digest)).normal(size=codes) * 2
    return torch.from_numpy(values).to(dtype)


class RememberingStep:
    """A model that sees exactly what is in its slots; one that was never written is an error. Keeps its calls."""

    def __init__(self, codes: int, dtype=torch.float64):
        self.codes, self.dtype, self.calls, self.slots = codes, dtype, [], {}

    def __call__(self, ids, positions, read):
        assert ids.shape == positions.shape and positions.device.type == read.device.type == "cpu"
        self.calls.append((ids.clone(), positions.clone(), read.clone()))
        R, T = ids.shape
        for r in range(R):
            for t in range(T):
                self.slots[r, int(positions[r, t])] = int(ids[r, t])
        return torch.stack([torch.stack([self._logits(r, int(positions[r, q])) for q in read[r]]) for r in range(R)])

    def _logits(self, row, position):
        return logits_of([self.slots[row, slot] for slot in range(position + 1)], self.codes, self.dtype)
