"""Reads token records of the released pre-tokenizer, which stores each record in a pickle. No code in a pickle is run.

Next: shards.py returns these records like those in its shards.
"""

import pickle
from pathlib import Path
from typing import TypeGuard

import torch

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy
from lumina_mgpt.unirep import IGNORED


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, dictionaries, strings and numbers only.

    A pickle can call a function only after `find_class` has returned it.
    """

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a record holds lists of numbers only")

    def persistent_load(self, key: object):
        raise pickle.UnpicklingError("it refers to something outside the file")


def read_released(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The ids and labels of a `.pkl` record.

    Args:
        path: pickle of a dictionary, {"token": ids, "label": labels}.

    Shapes: ids and labels (T,) long.

    Raises:
        InputError: the file is missing or damaged, or has other content.
    """
    try:
        with open(path, "rb") as file:
            raw = _PlainUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}") from None
    except Exception as error:  # for damaged bytes, the unpickler raises almost any exception
        reason = f"{path} cannot be read as a released record ({cause(error)}); pre-tokenize it again"
        raise InputError(reason) from None
    ids, labels = (raw.get(key) if isinstance(raw, dict) else None for key in ("token", "label"))
    if not _are_integers(ids) or not _are_integers(labels) or not ids or len(ids) != len(labels):
        raise InputError(f"{path} must hold two lists of integers, token and label, of equal length and not empty")
    if not all(0 <= id_ < 2**31 and label in (id_, IGNORED) for id_, label in zip(ids, labels, strict=True)):
        raise InputError(f"{path}: a label must be its id or {IGNORED}, and an id at least 0; make the record again")
    return torch.tensor(ids), torch.tensor(labels)


def _are_integers(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int for value in values)
