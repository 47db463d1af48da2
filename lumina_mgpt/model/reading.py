"""Reads a checkpoint folder in the released layout into a model.

A parameter has its name on disk without the leading `model.`. The name `lm_head.weight` has no such prefix on disk.
"""

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lumina_mgpt.config import DEFAULT_INT4_GROUP, INT4_GROUPS, ModelConfig, int4_recipe
from lumina_mgpt.errors import InputError
from lumina_mgpt.meta import on_meta
from lumina_mgpt.model import quantization
from lumina_mgpt.model.names import HEAD, UNUSED_PREFIX, disk_name, listed
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.transformer import HeadNorm, Transformer
from lumina_mgpt.model.weight_files import find_weights, open_weights

if TYPE_CHECKING:
    from lumina_mgpt.model.parallel import Parallel

logger = logging.getLogger(__name__)


def require_plain_weights(folder: Path, parameter: str, action: str) -> None:
    """Raises an error if the checkpoint in `folder` has int4 weights.

    Args:
        parameter: name of the user's parameter that gave the folder, for the message.
        action: what int4 weights cannot be, for the message: a participle such as "trained".

    Raises:
        InputError: the weights are int4, or config.json cannot be read.
    """
    if ModelConfig.from_json(folder / "config.json").int4_group:
        rule = f"int4 weights, which cannot be {action}; give the checkpoint that they were made from"
        raise InputError(f"{folder} holds {rule}", parameter)


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    attn: str = "sdpa",
    quant: int | None = None,
    on_read: Callable[[int, int], None] | None = None,
    config: ModelConfig | None = None,
    parallel: "Parallel | None" = None,
) -> Transformer:
    """Returns the model of a checkpoint folder, in evaluation mode.

    The function checks all names and shapes before it reads the first weight. Then it converts and moves one tensor
    at a time, so memory never holds a second copy of the model.

    Args:
        dtype: dtype of the parameters. None keeps the dtype of each tensor and the portable form of int4 weights;
            `save_model` needs this form.
        attn: attention backend, `sdpa` or `flash`.
        quant: group size 32, 64 or 128 to quantize the layers' matrices to int4 while they are read. The numbers in
            the file are quantized, before any conversion to `dtype`. `model.config` then records the group size.
        on_read: called after each tensor with the number of weights read so far and the number of all weights.
        config: configuration of the checkpoint; None to read it from the folder.
        parallel: this process among those that hold the model together; None to hold all of it. The process keeps its
            part of each tensor. The model must fit `parallel.require_fit`, so its weights are not int4.

    Raises:
        InputError: files are missing, damaged or of another model, or a matrix does not divide into groups.
    """
    folder = Path(folder)
    config = config or ModelConfig.from_json(folder / "config.json")
    group = _int4_group(folder, config, quant)
    if group and dtype:
        quantization.require_kernel(device)
    with on_meta():
        model = Transformer(config, attn)
    if config.int4_group:
        quantization.replace_linears(model, config.int4_group)
    shards = find_weights(folder)
    shapes = _shapes(shards)
    _check(folder, model, shapes)
    if group and not config.int4_group:  # after the check, because the file has plain matrices
        quantization.replace_linears(model, group)
        model.config = replace(config, quantization_config=int4_recipe(group))
        if dtype:
            logger.info("making int4 weights in groups of %d while loading", group)
    if parallel:  # after the check, because the file has whole tensors
        parallel.split(model)
    _read(model, shards, shapes, dtype, device, on_read, parallel)
    if parallel:
        parallel.finish(model)
    if config.tie_word_embeddings:
        _tie(model, folder)
    if group and dtype:
        quantization.pack_weights(model, dtype)
    return model.eval()


def read_prefixed(folder: str | Path, prefix: str) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint's weight files whose names begin with `prefix`, which the result leaves out.

    The result is empty if there are none. Other tensors are not read.

    Raises:
        InputError: the folder holds no weights, a file is damaged, or two files hold one name.
    """
    shards = find_weights(Path(folder))
    _shapes(shards)  # checks that no name is there twice
    found = {}
    for shard in shards:
        with open_weights(shard) as (names, read):
            found.update({name.removeprefix(prefix): read(name) for name in names if name.startswith(prefix)})
    return found


def _int4_group(folder: Path, config: ModelConfig, quant: int | None) -> int | None:
    """Returns the number of weights that share a scale, as requested or as in the file; None for plain weights."""
    stored = config.int4_group
    if quant is not None and quant not in INT4_GROUPS:
        raise InputError(f"must be 32, 64 or 128, got {quant}; try {DEFAULT_INT4_GROUP}", "quant")
    if quant and stored and quant != stored:
        rule = f"must be {stored}, the group size of the int4 weights in {folder}, got {quant}"
        raise InputError(f"{rule}; leave it out, or give the checkpoint that they were made from", "quant")
    return quant or stored


def _read(
    model: Transformer,
    shards: list[Path],
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype | None,
    device: torch.device | str,
    on_read: Callable[[int, int], None] | None,
    parallel: "Parallel | None",
) -> None:
    total, done = sum(map(math.prod, shapes.values())), 0
    for shard in shards:
        with open_weights(shard) as (names, read):
            for name in names:
                if not name.startswith(UNUSED_PREFIX):
                    _load_tensor(model, name, read(name), shard, dtype, device, parallel)
                done += math.prod(shapes[name])
                if on_read:
                    on_read(done, total)


def _load_tensor(
    model: Transformer,
    disk: str,
    tensor: Tensor,
    shard: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    parallel: "Parallel | None",
) -> None:
    name = disk.removeprefix("model.")
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    packed = isinstance(module, Int4Linear) and leaf == "weight_int4"
    if not packed and not tensor.is_floating_point():
        raise InputError(f"{shard}: {disk} must hold floating-point numbers, got {tensor.dtype}")
    if isinstance(module, Int4Linear) and leaf != "bias":
        try:
            module.load(leaf, tensor, device)
        except InputError as error:
            raise InputError(f"{shard}: {disk} {error}; fetch the checkpoint again") from None
    else:
        if parallel:
            tensor = parallel.part(getattr(module, leaf), tensor)
        # safetensors returns a view of the mapped file, so the parameter needs a copy.
        copy = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
        assign_parameter(model, name, copy.copy_(tensor))


def _tie(model: Transformer, folder: Path) -> None:
    """Makes the head share the embedding's parameter; a file may hold both if they are equal."""
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    if not head.is_meta and not torch.equal(head, embedding):
        raise InputError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json sets "
            "tie_word_embeddings; set it to false if the head is separate"
        )
    model.lm_head.weight = embedding


def assign_parameter(model: Transformer, name: str, tensor: Tensor) -> None:
    """Makes `tensor` the parameter `name` of the model.

    The tensor of a head norm may have several equal rows per model-parallel shard; one row per shard is then kept.
    """
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, HeadNorm):
        tensor = _merge_equal_rows(tensor, model.config.model_parallel_size)
    setattr(module, leaf, nn.Parameter(tensor))


def _merge_equal_rows(rows: Tensor, count: int) -> Tensor:
    """Returns (count, H) if each of `count` equal shares of the (heads, H) rows repeats one row, else `rows`."""
    shares = rows.unflatten(0, (count, -1))  # (count, share, H)
    return shares[:, 0].clone() if torch.equal(shares, shares[:, :1].expand_as(shares)) else rows


def weight_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Returns the names and shapes of the tensors in a checkpoint's weight files, without reading the tensors.

    Raises:
        InputError: the folder holds no weights, a file is damaged, or two files hold one name.
    """
    return _shapes(find_weights(Path(folder)))


def _shapes(shards: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with open_weights(shard) as (shapes, _):
            twice = sorted(found.keys() & shapes.keys())
            if twice:
                raise InputError(f"{shard} repeats keys of another shard: {listed(twice)}; remove the extra file")
            found |= shapes
    return found


def _check(folder: Path, model: Transformer, found: dict[str, tuple[int, ...]]) -> None:
    """Raises one InputError with all names and shapes on disk that differ from the model's."""
    wanted = {disk_name(name): _accepted_shapes(model, name, tensor) for name, tensor in model.state_dict().items()}
    optional = {HEAD} if model.config.tie_word_embeddings else set()
    missing = sorted(wanted.keys() - found.keys() - optional)
    unknown = sorted(name for name in found.keys() - wanted.keys() if not name.startswith(UNUSED_PREFIX))
    wrong = [
        f"{name} {found[name]} instead of {' or '.join(map(str, wanted[name]))}"
        for name in sorted(wanted.keys() & found.keys())
        if found[name] not in wanted[name]
    ]
    kinds = (("missing keys", missing), ("unknown keys", unknown), ("wrong shapes", wrong))
    faults = [f"{len(names)} {kind}: {listed(names)}" for kind, names in kinds if names]
    if faults:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(faults)}; fetch the checkpoint again")


def _accepted_shapes(model: Transformer, name: str, tensor: Tensor) -> list[tuple[int, ...]]:
    """Returns the shapes a tensor may have on disk; a head norm has one row a model-parallel share, or one a head."""
    module = model.get_submodule(name.rpartition(".")[0])
    shape = tuple(tensor.shape)
    one_a_head = (module.heads, shape[-1]) if isinstance(module, HeadNorm) else shape
    return [shape] if one_a_head == shape else [shape, one_a_head]
