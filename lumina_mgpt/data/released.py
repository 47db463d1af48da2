"""Records as the released pre-tokenizer writes them: one pickle each, read without ever running what is in it."""

import pickle
from pathlib import Path

import torch

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy
from lumina_mgpt.unirep import IGNORED


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, mappings, texts and numbers. Whatever a pickle can call, it must first ask for by name here."""

    def find_class(self, module: str, name: str):
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, and a record holds lists of numbers only")

    def persistent_load(self, key: object):
        raise pickle.UnpicklingError("it refers to something outside the file")


def read_released(path: str | Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels of a `.pkl` record, {"token": [...], "label": [...]}. Shapes: both (T,) long.

    Raises:
        InputError: the file is missing or damaged, or holds anything but that.
    """
    try:
        with open(path, "rb") as file:
            raw = _PlainUnpickler(file).load()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}") from None
    except Exception as error:  # damaged bytes lead the unpickler to raise almost anything
        raise InputError(f"{path} cannot be read as a released record ({cause(error)}); make it again with "
                         "lumina-mgpt pre-tokenize") from None  # fmt: skip
    ids, labels = (raw.get(key) if isinstance(raw, dict) else None for key in ("token", "label"))
    whole = all(isinstance(part, list) and all(type(value) is int for value in part) for part in (ids, labels))
    if not whole or not ids or len(ids) != len(labels):
        raise InputError(f"{path} must hold a token and a label list of whole numbers, equally long and not empty")
    if not all(0 <= id_ < 2**31 and label in (id_, IGNORED) for id_, label in zip(ids, labels, strict=True)):
        raise InputError(f"{path}: a label must be its id or {IGNORED}, and an id at least 0; make the record again")
    return torch.tensor(ids), torch.tensor(labels)
