"""Writes a model in the released layout: either all files or none of them."""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy, write_tensors
from lumina_mgpt.model.names import INDEX, SINGLE, disk_name
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.transformer import Transformer


def save_model(
    model: Transformer, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config.json and safetensors in the released layout. Other files in the folder stay unchanged.

    Each file first has a temporary name. When the last one is on disk, all get their final names.

    Args:
        dtype: dtype on disk; None keeps the dtype of each tensor. Int4 weights need None. They must also be in the
            portable form, in which `load_model` leaves them with dtype None.
        max_shard_bytes: largest size of one weight file, unless a single tensor is larger.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    assert dtype is None or model.config.int4_group is None
    folder = Path(folder)
    tensors = {disk_name(name): tensor.detach() for name, tensor in _stored(model)}
    temporary: dict[Path, Path] = {}  # temporary -> final path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write_shards(tensors, folder, dtype, max_shard_bytes, temporary)
        model.config.to_json(_temporary(folder / "config.json", temporary))
        for path, final in temporary.items():
            path.replace(final)
        stale = {*folder.glob("model*.safetensors"), folder / INDEX} - {*temporary.values()}
        for path in stale:  # readers would prefer an index or shards of an earlier save
            path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        full = "free some space, or save elsewhere"  # safetensors gives no error number
        raise InputError(f"{folder} cannot be written ({cause(error)}); {remedy(error, full)}") from None
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)


def _write_shards(
    tensors: dict[str, Tensor], folder: Path, dtype: torch.dtype | None, limit: int, temporary: dict[Path, Path]
) -> None:
    """Writes shards, and an index where there are several, under temporary names that it adds to `temporary`."""
    shards = _split(tensors, dtype, limit)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        final = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        shard = {name: _for_disk(tensors[name], dtype) for name in names}
        write_tensors(_temporary(folder / final, temporary), shard)
        weight_map |= dict.fromkeys(names, final)
    if len(shards) > 1:
        total = sum(_bytes(tensor, dtype) for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        _temporary(folder / INDEX, temporary).write_text(json.dumps(index, indent=2) + "\n")


def _stored(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a checkpoint: parameters (a tied one once), and the buffers of int4 matrices."""
    assert not any(isinstance(module, Int4Linear) and module.kernel for module in model.modules())
    yield from model.named_parameters()
    yield from model.named_buffers()


def _temporary(final: Path, temporary: dict[Path, Path]) -> Path:
    path = final.with_name(f".{final.name}.part")
    temporary[path] = final
    return path


def _split(tensors: dict[str, Tensor], dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    """Splits the names, in order, into shards of at most `limit` bytes; a larger tensor has a shard to itself."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        width = _bytes(tensor, dtype)
        if shards[-1] and size + width > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += width
    return shards


def _bytes(tensor: Tensor, dtype: torch.dtype | None) -> int:
    return tensor.numel() * (dtype or tensor.dtype).itemsize


def _for_disk(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    return tensor.to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
