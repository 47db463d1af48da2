"""Checkpoints in the released layout: found, read strictly, written whole or not at all.

Names: ours are those on disk without the leading `model.` (`lm_head.weight` is the same in both).
"""

import json
import logging
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lumina_mgpt.config import DEFAULT_INT4_GROUP, INT4_GROUPS, ModelConfig, int4_recipe
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy, require_readable, write_tensors
from lumina_mgpt.model import quantization
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.transformer import HeadNorm, Transformer

logger = logging.getLogger(__name__)

# In released files, and never used: the image tokenizer of the Chameleon that training began with.
UNUSED = "model.vqmodel."
_HEAD = "lm_head.weight"
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_WEIGHT_FILES = (_INDEX, _SINGLE, "pytorch_model.bin.index.json", "pytorch_model.bin")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]*[\w]")
# What belongs to a checkpoint besides its config and its weights. generation_config.json is there for other programs:
# nothing here reads it, and codes are drawn as the command line says.
COMPANIONS = (
    "generation_config.json", "tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "names.txt", "prompts.txt", "movqgan*.safetensors", "*movqgan*.ckpt",
)  # fmt: skip
_HUB_FILES = ("config.json", "model*.safetensors", "model*.json", *COMPANIONS)
_HUB_PICKLES = ("pytorch_model*.bin", "pytorch_model*.json")
_SHOWN = 5  # names of a kind in one message

def resolve(source: str | Path) -> Path:
    """The folder of a checkpoint: a local one as it is, or a hub id fetched to the hub's cache.

    Raises:
        InputError: neither a checkpoint folder nor a hub id that can be fetched.
    """
    folder = Path(os.path.expanduser(source))
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{source} cannot be read ({cause(error)}); {remedy(error)}") from None
    if os.path.isdir(folder):
        if not (folder / "config.json").is_file():
            raise InputError(f"{source} is no checkpoint folder: it holds no config.json; give the folder that does")
        _find_weights(folder)
        return folder
    if os.path.exists(folder):
        raise InputError(f"{source} is a file; give the checkpoint folder that holds config.json")
    if not _HUB_ID.fullmatch(str(source)):
        raise InputError(f"{source}: no such folder, and no hub id of the form owner/name; correct the path")
    return _fetch(str(source))


def _fetch(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # half a second to import, and only needed here
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    instead = "give a local folder, or `hf download` it first"
    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES)))
        if not any(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(hub_id, allow_patterns=list(_HUB_FILES + _HUB_PICKLES)))
    except (RepositoryNotFoundError, HFValidationError):
        raise InputError(
            f"{hub_id}: no such folder, and the hub knows no such model (or it is gated: `hf auth login`); "
            "correct the name, or give a local folder"
        ) from None
    except OfflineModeIsEnabled:
        raise InputError(f"{hub_id}: no such folder, and HF_HUB_OFFLINE forbids to fetch it; {instead}") from None
    except (OSError, HTTPError) as error:
        reason = f"no such folder, and it cannot be fetched ({_first_line(error)})"
        raise InputError(f"{hub_id}: {reason}; {remedy(error, instead)}") from None
    return resolve(folder)


def load_model(
    folder: str | Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
    attn: str = "sdpa",
    quant: int | None = None,
    on_read: Callable[[int, int], None] | None = None,
    config: ModelConfig | None = None,
) -> Transformer:
    """The model of a checkpoint folder, in evaluation mode.

    Names and shapes are checked before any weight is read; then each tensor goes straight to its dtype and device, so
    that no second copy of the whole exists. With `quant` the matrices of the layers become int4 in groups of so many
    weights, each as it is read and from the numbers in the file, whatever the dtype; `model.config` then says so.
    `dtype` None keeps every tensor as it is in the file, and int4 weights in their portable form: to be saved.
    `on_read` is told how many weights are read, and of how many.

    Raises:
        InputError: files are missing, damaged or of another model, or it cannot be quantized so; the message says why.
    """
    folder = Path(folder)
    config = config or ModelConfig.from_json(folder / "config.json")
    group = _group(folder, config, quant)
    if group and dtype:
        quantization.require_kernel(device)
    with torch.device("meta"):
        model = Transformer(config, attn)
    if config.int4_group:
        quantization.swap(model, group)
    shards = _find_weights(folder)
    found = _shapes(shards)
    _check(folder, model, found)
    if group and not config.int4_group:  # not before the check: the file has plain matrices
        quantization.swap(model, group)
        model.config = replace(config, quantization_config=int4_recipe(group))
        if dtype:  # for the 7B that takes minutes
            logger.info("making int4 weights in groups of %d while loading", group)
    total, done = sum(map(math.prod, found.values())), 0
    for shard in shards:
        with _open(shard) as (shapes, read):
            for name in shapes:
                if not name.startswith(UNUSED):
                    _place(model, name, read(name), shard, dtype, device)
                done += math.prod(shapes[name])
                if on_read:
                    on_read(done, total)
    if config.tie_word_embeddings:
        _tie(model, folder)
    if group and dtype:
        quantization.pack(model, dtype)
    return model.eval()


def _group(folder: Path, config: ModelConfig, quant: int | None) -> int | None:
    """Weights that share a scale: those asked for, or those in the file."""
    stored = config.int4_group
    if quant is not None and quant not in INT4_GROUPS:
        raise InputError(f"--quant_group must be 32, 64 or 128, got {quant}; try {DEFAULT_INT4_GROUP}")
    if quant and stored and quant != stored:
        raise InputError(
            f"--quant_group must be {stored} for {folder}, whose weights are int4 in such groups, got {quant}; "
            "leave it out, or give the checkpoint that it was made of"
        )
    return quant or stored


def _place(
    model: Transformer, disk: str, tensor: Tensor, shard: Path, dtype: torch.dtype | None, device: torch.device | str
) -> None:
    """Puts one tensor of a file where it belongs."""
    name = disk.removeprefix("model.")
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if not (isinstance(module, Int4Linear) and leaf == "weight_int4"):
        _floating(tensor, disk, shard)
    if isinstance(module, Int4Linear) and leaf != "bias":
        try:
            module.take(leaf, tensor, device)
        except InputError as error:
            raise InputError(f"{shard}: {disk} {error}; fetch the checkpoint again") from None
    else:
        # A copy of its own: what safetensors returns is a view of the file.
        held = torch.empty(tensor.shape, dtype=dtype or tensor.dtype, device=device)
        assign_parameter(model, name, held.copy_(tensor))


def _floating(tensor: Tensor, name: str, shard: Path) -> None:
    if not tensor.is_floating_point():
        raise InputError(f"{shard}: {name} must hold floating-point numbers, got {tensor.dtype}")


def _tie(model: Transformer, folder: Path) -> None:
    """Makes embedding and head one parameter; a file may hold it twice, but not with different values."""
    head, embedding = model.lm_head.weight, model.embed_tokens.weight
    if not head.is_meta and not torch.equal(head, embedding):
        raise InputError(
            f"{folder}: lm_head.weight differs from model.embed_tokens.weight, but config.json says "
            "tie_word_embeddings; set that to false if the head is its own"
        )
    model.lm_head.weight = embedding


def assign_parameter(model: Transformer, name: str, tensor: Tensor) -> None:
    """Puts one tensor in its place. Rows of a head norm that repeat over their share of the heads become one again."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if isinstance(module, HeadNorm):
        tensor = _fold(tensor, model.config.model_parallel_size)
    setattr(module, leaf, nn.Parameter(tensor))


def _fold(rows: Tensor, count: int) -> Tensor:
    """(heads, H) -> (count, H) if each of `count` equal shares of the heads holds one row repeated."""
    shares = rows.unflatten(0, (count, -1))  # (count, share, H)
    return shares[:, 0].clone() if torch.equal(shares, shares[:, :1].expand_as(shares)) else rows


def _find_weights(folder: Path) -> list[Path]:
    """The weight files of a folder, safetensors before pickles, in the order to read them."""
    for name in _WEIGHT_FILES:
        path = folder / name
        if path.is_file():
            return _read_index(path) if name.endswith(".json") else [path]
    unlisted = sorted(folder.glob("model-*.safetensors"))
    if unlisted:
        return unlisted
    raise InputError(f"{folder} holds no weights (model.safetensors, or shards with an index); fetch them again")


def _read_index(path: Path) -> list[Path]:
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict):
        raise InputError(f"{path} is no index of shards (it holds no weight_map); fetch it again")
    named = list(dict.fromkeys(map(str, weight_map.values())))
    suffix = ".bin" if ".bin." in path.name else ".safetensors"
    for name in named:
        # A name with a folder in it could point anywhere on this machine.
        if Path(name).name != name or not name.endswith(suffix):
            raise InputError(f"{path} names the shard {name!r}, which is no {suffix} file beside it; fetch it again")
    shards = [path.parent / name for name in sorted(named)]
    missing = [shard.name for shard in shards if not shard.is_file()]
    if missing or not shards:
        raise InputError(f"{path} names shards that are missing: {some(missing)}; fetch them again")
    return shards


def _shapes(shards: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for shard in shards:
        with _open(shard) as (shapes, _):
            twice = sorted(found.keys() & shapes.keys())
            if twice:
                raise InputError(f"{shard} repeats keys of another shard: {some(twice)}; remove the file left over")
            found |= shapes
    return found


def _check(folder: Path, model: Transformer, found: dict[str, tuple[int, ...]]) -> None:
    """Compares names and shapes on disk with the model's, all of them before it complains."""
    wanted = {disk_name(name): _accepted(model, name, tensor) for name, tensor in model.state_dict().items()}
    optional = {_HEAD} if model.config.tie_word_embeddings else set()
    missing = sorted(wanted.keys() - found.keys() - optional)
    unknown = sorted(name for name in found.keys() - wanted.keys() if not name.startswith(UNUSED))
    wrong = [f"{name} {found[name]} instead of {' or '.join(map(str, wanted[name]))}"
             for name in sorted(wanted.keys() & found.keys()) if found[name] not in wanted[name]]  # fmt: skip
    kinds = (("missing keys", missing), ("unknown keys", unknown), ("wrong shapes", wrong))
    faults = [f"{len(names)} {kind}: {some(names)}" for kind, names in kinds if names]
    if faults:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(faults)}; fetch the checkpoint again")


def _accepted(model: Transformer, name: str, tensor: Tensor) -> list[tuple[int, ...]]:
    """Shapes a tensor may have on disk: a head norm has a row for each model-parallel part, or for each head."""
    module = model.get_submodule(name.rpartition(".")[0])
    shape = tuple(tensor.shape)
    one_a_head = (module.heads, shape[-1]) if isinstance(module, HeadNorm) else shape
    return [shape] if one_a_head == shape else [shape, one_a_head]


Reader = tuple[dict[str, tuple[int, ...]], Callable[[str], Tensor]]


@contextmanager
def _open(shard: Path) -> Iterator[Reader]:
    """Names with shapes of one weight file, and a function that reads one tensor of it.

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
            f"{shard} is damaged or cut short ({_first_line(error)}); fetch it again (with git: `git lfs pull`)"
        ) from None


def _unpickle(shard: Path) -> dict[str, Tensor]:
    """A pickled state dict. Only tensors are read from it: a pickle may otherwise run any code."""
    try:
        state = torch.load(shard, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(shard))
    except MemoryError:
        raise
    except Exception as error:  # a damaged file makes torch's reader raise anything, KeyError and struct.error too
        if remedy(error, ""):  # too many open files, a device with errors
            raise
        raise pickle.UnpicklingError(_first_line(error)) from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise pickle.UnpicklingError("it holds something else than named tensors")
    return state


def save_model(
    model: Transformer, folder: str | Path, dtype: torch.dtype | None = None, max_shard_bytes: int = 5_000_000_000
) -> None:
    """Writes config.json and safetensors in the released layout; other files in the folder stay as they are.

    Everything is written under temporary names and renamed when all of it is on disk. `dtype` None keeps each as it is;
    int4 weights (in their portable form, from `load_model` with dtype None) have no other.

    Raises:
        InputError: the disk is full, or the folder cannot be written to.
    """
    assert dtype is None or model.config.int4_group is None
    folder = Path(folder)
    named = {disk_name(name): tensor.detach() for name, tensor in _stored(model)}
    shards = _split(named, dtype, max_shard_bytes)
    count = len(shards)
    written: dict[Path, Path] = {}  # temporary -> final
    weight_map: dict[str, str] = {}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, names in enumerate(shards, 1):
            final = _SINGLE if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            tensors = {name: _for_disk(named[name], dtype) for name in names}
            write_tensors(_temporary(folder / final, written), tensors)
            weight_map |= dict.fromkeys(names, final)
        if count > 1:
            total = sum(_bytes(tensor, dtype) for tensor in named.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            _temporary(folder / _INDEX, written).write_text(json.dumps(index, indent=2) + "\n")
        model.config.to_json(_temporary(folder / "config.json", written))
        for temporary, final in written.items():
            temporary.replace(final)
        stale = {*folder.glob("model*.safetensors"), folder / _INDEX} - {*written.values()}
        for path in stale:  # an index or shards of a former save would be read instead of these
            path.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        full = "free some space, or save elsewhere"  # safetensors gives no error number
        raise InputError(f"{folder} cannot be written ({cause(error)}); {remedy(error, full)}") from None
    finally:
        for temporary in written:
            temporary.unlink(missing_ok=True)


def _stored(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """What a checkpoint holds: parameters, a tied one once, and the buffers of int4 matrices."""
    assert not any(isinstance(module, Int4Linear) and module.kernel for module in model.modules())
    yield from model.named_parameters()
    yield from model.named_buffers()


def disk_name(name: str) -> str:
    """Our name of a parameter -> its name on disk."""
    return name if name == _HEAD else f"model.{name}"


def _temporary(final: Path, written: dict[Path, Path]) -> Path:
    temporary = final.with_name(f".{final.name}.part")
    written[temporary] = final
    return temporary


def _split(named: dict[str, Tensor], dtype: torch.dtype | None, limit: int) -> list[list[str]]:
    """Names in the order given, cut so that no shard but one of a single large tensor exceeds the limit."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in named.items():
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


def some(names: list[str]) -> str:
    """The first few of many names, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
