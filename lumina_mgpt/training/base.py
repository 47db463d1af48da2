"""The base checkpoint of a run, which it started from: its folder, and a fingerprint of its weights."""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.io import read_json, write_atomic
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.training.options import TrainingConfig

_BESIDE_ADAPTER = "base_weights.json"
_PATHS = ("init_from", "model_config", "tokenizer_path", "data_config", "movqgan_path", "sample_prompts", "output_dir")


def lasting(settings: TrainingConfig) -> dict:
    """Returns the options with absolute paths, valid in every working folder; a hub id is left unchanged."""
    values = settings.flat()
    for name in _PATHS:
        if values[name] and os.path.exists(path := os.path.expanduser(values[name])):
            values[name] = os.path.abspath(path)
    return values


def describe(settings: TrainingConfig, folder: Path | None) -> dict:
    """Returns what checkpoints store about the base in `folder`: its revision if it comes from the hub."""
    source = settings.model.init_from
    if not source or folder is None or os.path.isdir(os.path.expanduser(source)):
        return {"revision": None}
    return {"revision": folder.name if folder.parent.name == "snapshots" else None}


def find(init_from: str) -> Path:
    """Returns the folder of the base of a new run; its InputErrors name `init_from`."""
    with caused_by("init_from"):
        return resolve(init_from)


def locate(settings: TrainingConfig, described: dict | None) -> Path:
    """Returns the folder of the base of a run; for a hub id, the revision that the run started from.

    Args:
        described: what `describe` returned when the run started; None for checkpoints of earlier versions.

    Raises:
        InputError: the folder does not exist, or the model is not in the hub's cache.
    """
    source = str(settings.model.init_from)
    try:
        folder = resolve(source)
    except InputError as error:
        note = "; a relative path holds in the folder where the run was started"
        known = described or os.path.isabs(source)  # checkpoints of earlier versions may hold a relative path
        raise InputError(f"of the run: {error}{'' if known else note}", "init_from") from None
    revision = (described or {}).get("revision")
    if revision and folder.name != revision and (folder.parent / str(revision)).is_dir():
        return folder.parent / str(revision)
    return folder


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Returns a digest of named weights on the CPU, rounded to bfloat16: the same in every precision.

    A model with adapters and one without have the same digest.
    """
    weights = [(name.replace(".base_layer.", "."), tensor.detach()) for name, tensor in named]
    weights.sort(key=lambda pair: pair[0])
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        digests = pool.map(_digest, weights)
        return hashlib.sha256("".join(digests).encode()).hexdigest()


def _digest(weight: tuple[str, Tensor]) -> str:
    name, tensor = weight
    data = tensor.to(torch.bfloat16).contiguous().view(-1).view(torch.uint8)
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} ".encode())
    digest.update(data.numpy().data)
    return digest.hexdigest()


def frozen(model: torch.nn.Module) -> str | None:
    """Returns the fingerprint of the weights that are not trained; None if all are trained."""
    named = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    return fingerprint(named) if named else None


def check(found: str | None, wanted: str | None, source: str | Path | None, parameter: str = "init_from") -> None:
    """Compares the fingerprint of frozen weights with that of the run.

    Args:
        wanted: fingerprint in the checkpoint of the run; None skips the comparison.
        source, parameter: where the weights were loaded from, and the parameter that named it.

    Raises:
        InputError: the weights differ.
    """
    if wanted and found != wanted:
        raise InputError(
            f"{source} holds other weights than those that the run was trained on; give the checkpoint that it started "
            "from",
            parameter,
        )


def write_beside_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Writes the fingerprint of the weights that an adapter was trained on, as a file beside it."""
    write_atomic(folder / _BESIDE_ADAPTER, json.dumps({"fingerprint": frozen(model)}) + "\n")


def check_beside_adapter(model: torch.nn.Module, adapter: Path, source: str | Path) -> None:
    """Compares a model without adapters with the weights that an adapter was trained on, if a file names them.

    Args:
        source: where the model was loaded from.

    Raises:
        InputError: they differ, or the file is damaged.
    """
    path = adapter / _BESIDE_ADAPTER
    if not path.is_file():
        return
    try:
        wanted = read_json(path).get("fingerprint")
    except InputError as error:
        raise InputError(str(error), "adapter") from None
    check(fingerprint(model.named_parameters()), wanted, source, "model_path")
