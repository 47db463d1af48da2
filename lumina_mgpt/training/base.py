"""The checkpoint that a run began with: where it lies, and whether it still holds the same weights."""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_json, write_atomic
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.training.options import Settings

_BESIDE_ADAPTER = "base_weights.json"
_PATHS = ("init_from", "model_config", "tokenizer_path", "data_config", "movqgan_path", "sample_prompts", "output_dir")


def lasting(settings: Settings) -> dict:
    """The settings as a mapping that means the same in every working folder: paths are absolute, a hub id stays."""
    values = dataclasses.asdict(settings)
    for name in _PATHS:
        if values[name] and os.path.exists(path := os.path.expanduser(values[name])):
            values[name] = os.path.abspath(path)
    return values


def describe(settings: Settings, folder: Path | None) -> dict:
    """What a run keeps about its base, which lies in `folder`: the revision, for one from the hub."""
    if not settings.init_from or folder is None or os.path.isdir(os.path.expanduser(settings.init_from)):
        return {"revision": None}
    return {"revision": folder.name if folder.parent.name == "snapshots" else None}


def locate(settings: Settings, described: dict | None) -> Path:
    """The folder of the base, for the settings of a checkpoint; of a hub id the revision that the run began with.

    Raises:
        InputError: it is not there any more, or not in the hub's cache.
    """
    try:
        folder = resolve(str(settings.init_from))
    except InputError as error:
        if not described and not os.path.isabs(str(settings.init_from)):  # of an earlier version
            raise InputError(f"--init_from of the run: {error}; a relative path holds in the folder where the run was "
                             "started") from None  # fmt: skip
        raise InputError(f"--init_from of the run: {error}") from None
    revision = (described or {}).get("revision")
    if revision and folder.name != revision and (folder.parent / str(revision)).is_dir():
        return folder.parent / str(revision)
    return folder


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of named weights on the CPU, rounded to bfloat16: the same for every precision they are held in.

    Names of a model with adapters and of one without give the same digest.
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
    digest.update(data.numpy())
    return digest.hexdigest()


def frozen(model: torch.nn.Module) -> str | None:
    """Fingerprint of the weights that are not trained; None where all are."""
    named = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    return fingerprint(named) if named else None


def check(found: str | None, wanted: str | None, parameter: str) -> None:
    """Compares fingerprints of frozen weights.

    Raises:
        InputError: the weights are others than those that were trained with; names `parameter`.
    """
    if wanted and found != wanted:
        raise InputError(f"{parameter} holds other weights than those that the run was trained on; give the checkpoint "
                         "that it began with")  # fmt: skip


def write_beside_adapter(model: torch.nn.Module, folder: Path) -> None:
    """Writes which weights an adapter was trained on, as a file beside it."""
    write_atomic(folder / _BESIDE_ADAPTER, json.dumps({"fingerprint": frozen(model)}) + "\n")


def check_beside_adapter(model: torch.nn.Module, adapter: Path, parameter: str) -> None:
    """Compares a model without adapters with the weights that an adapter was trained on, where a file says so.

    Raises:
        InputError: they differ; names `parameter`.
    """
    path = adapter / _BESIDE_ADAPTER
    if path.is_file():
        check(fingerprint(model.named_parameters()), read_json(path, "--adapter").get("fingerprint"), parameter)
