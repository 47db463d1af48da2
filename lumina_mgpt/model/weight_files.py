"""Finds the weight files of a checkpoint folder, and reads their tensors one at a time."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy, require_readable
from lumina_mgpt.model.names import INDEX, PICKLE_INDEX, SINGLE, SINGLE_PICKLE, first_line, listed

Reader = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]


def find_weights(folder: Path) -> list[Path]:
    """Returns the weight files of a folder in reading order. Pickles are used only if there are no safetensors.

    Raises:
        InputError: the folder holds no weights, or its index is damaged or names files that are missing.
    """
    for name in (INDEX, SINGLE, PICKLE_INDEX, SINGLE_PICKLE):
        path = folder / name
        if path.is_file():
            return _read_index(path) if name.endswith(".json") else [path]
    without_index = sorted(folder.glob("model-*.safetensors"))
    if without_index:
        return without_index
    raise InputError(f"{folder} holds no weights (model.safetensors, or shards with an index); fetch them again")


def _read_index(path: Path) -> list[Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{path} must hold a weight_map; fetch it again")
    names = list(dict.fromkeys(map(str, weight_map.values())))
    suffix = ".bin" if ".bin." in path.name else ".safetensors"
    for name in names:
        # A name with a folder in it could point to any file of this machine.
        if Path(name).name != name or not name.endswith(suffix):
            raise InputError(
                f"{path} must name {suffix} files of its own folder, got the shard {name!r}; fetch it again"
            )
    shards = [path.parent / name for name in sorted(names)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise InputError(f"{path} names shards that are missing: {listed(missing)}; fetch them again")
    return shards


@contextmanager
def open_weights(shard: Path) -> Iterator[Reader]:
    """Yields the names and shapes of the tensors in a weight file, and a function that reads a tensor by name.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    require_readable(shard)
    try:
        if shard.suffix == ".safetensors":
            with safe_open(shard, framework="pt") as file:
                yield {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}, file.get_tensor
        else:
            state = _unpickle(shard)
            yield {name: tuple(tensor.shape) for name, tensor in state.items()}, state.__getitem__
    except (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError) as error:
        if remedy(error, ""):
            raise InputError(f"{shard} cannot be read ({cause(error)}); {remedy(error)}") from None
        raise InputError(
            f"{shard} is damaged or cut short ({first_line(error)}); fetch it again (with git: `git lfs pull`)"
        ) from None


def _unpickle(shard: Path) -> dict[str, Tensor]:
    """Returns a pickled state dict. The unpickler accepts tensors only, because a pickle can run any code."""
    try:
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    except MemoryError:
        raise
    except Exception as error:  # torch raises many types for damaged files, KeyError and struct.error among them
        if remedy(error, ""):  # an error of the system, such as too many open files
            raise
        raise pickle.UnpicklingError(first_line(error)) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise pickle.UnpicklingError("it holds something else than named tensors")
    return state
