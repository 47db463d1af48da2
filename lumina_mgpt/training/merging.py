"""Merges an adapter into the weights that it was trained on, with peft."""

import logging
import warnings
from collections.abc import Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lumina_mgpt.checks import is_number
from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.io import cause, read_json, require_readable
from lumina_mgpt.model.names import listed
from lumina_mgpt.model.transformer import Transformer

logger = logging.getLogger(__name__)

# Options of peft with which an adapter cannot be merged from its file alone -> the reason.
_UNSUPPORTED = {
    "layer_replication": "the model has more layers than its checkpoint",
    "megatron_config": "it belongs to Megatron's layers",
    "alora_invocation_tokens": "it is active after certain tokens only; no merged weights are equivalent",
    "arrow_config": "it selects among adapters for each token; no merged weights are equivalent",
    "monteclora_config": "it samples weights at random",
}
# Initializations that leave the base weights unmodified; the file replaces all adapter weights.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# Initializations that peft subtracts from the base weights, and repeats when it loads an adapter.
_REPEATABLE_STARTS = ("pissa", "olora")
_HARMLESS = ("peft_version",)  # fields of newer versions of peft that change no computation


def merge_adapter(model: Transformer, folder: Path, base: str | Path = "") -> None:
    """Adds an adapter to the weights of a model, in place.

    It computes the sum in float32 and rounds it to the dtype of the weights.

    Args:
        folder: folder of the adapter, in peft's format.
        base: folder or hub id of the model. A hint is logged if the adapter names another base model.

    Raises:
        InputError: peft is missing, or the adapter is missing, damaged, of another model, or of a kind that cannot be
            merged.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    except Exception as error:  # a failing import of peft may raise any class
        raise package_error(error, "merging adapters", "peft") from None
    raw, tensors = _read_adapter(folder, {field.name for field in fields(LoraConfig)})
    _hint_at_other_base(raw.get("base_model_name_or_path"), base)
    if raw.get("init_lora_weights", True) in _PLAIN_STARTS:
        raw["init_lora_weights"] = False  # initial weights take time and are replaced
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")  # the checks here cover what peft warns of
        try:
            config = LoraConfig(**raw)
            adapted = PeftModel(_as_on_disk(model), config)
            _check_tied(folder, model, adapted)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _check_names(folder, "lacks", wanted.keys() - tensors.keys())
            outcome: Any = set_peft_model_state_dict(adapted, tensors)
            _check_names(folder, "holds unknown", outcome.unexpected_keys)
            merged = _merged(adapted)
        except InputError:
            raise
        except Exception as error:  # peft and torch raise many classes for an adapter that does not fit
            raise InputError(
                f"{folder} cannot be merged ({cause(error)}); give an adapter of this model, in peft's format",
                "adapter",
            ) from None
    for name, module in _children(merged):
        setattr(model, name, module)


def _read_adapter(folder: Path, known: set[str]) -> tuple[dict, dict[str, Tensor]]:
    """Returns the checked configuration of an adapter and its tensors."""
    try:
        raw = read_json(folder / "adapter_config.json")
        _check_config(folder / "adapter_config.json", raw, known)
        tensors = _read_tensors(folder / "adapter_model.safetensors")
    except InputError as error:
        raise InputError(str(error), "adapter") from None
    return {key: value for key, value in raw.items() if key in known}, tensors


def _check_config(path: Path, raw: dict, known: set[str]) -> None:
    """Refuses options that peft would ignore, and kinds of adapters that cannot be merged."""
    kind, start = raw.get("peft_type"), raw.get("init_lora_weights", True)
    if kind != "LORA":
        raise InputError(f"{path}: peft_type must be LORA, got {kind!r}; merge it with peft, where it was trained")
    for name in ("r", "lora_alpha"):
        if not is_number(raw.get(name, 8)):  # 8 is peft's default of both
            raise InputError(f"{path}: {name} must be a finite number, got {str(raw[name])[:80]!r}; correct it")
    for name, value in raw.items():
        if name not in known and name not in _HARMLESS and value not in (None, False, "", [], {}):
            raise InputError(f"{path}: the installed peft does not know {name}, got {str(value)[:80]!r}; upgrade peft")
        if name in _UNSUPPORTED and value:
            raise InputError(f"{path}: {name} cannot be merged ({_UNSUPPORTED[name]}), got {str(value)[:80]}")
    if not isinstance(start, bool | str) or start not in (*_PLAIN_STARTS, *_REPEATABLE_STARTS):
        raise InputError(
            f"{path}: init_lora_weights must leave the base weights unmodified, got {str(start)[:80]!r}; save the "
            "adapter with peft's path_initial_model_for_weight_conversion"
        )


def _read_tensors(path: Path) -> dict[str, Tensor]:
    require_readable(path)
    try:
        tensors = load_file(path)
    except Exception as error:  # safetensors raises many classes for a damaged file
        raise InputError(f"{path} is damaged or cut short ({cause(error)}); write it again") from None
    if not tensors:
        raise InputError(f"{path} holds no tensors; give a folder with an adapter in peft's format")
    broken = [name for name, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if broken:
        raise InputError(
            f"{path} holds values that are infinite or not a number: {listed(sorted(broken))}; give an earlier step"
        )
    return tensors


def _hint_at_other_base(recorded: object, base: str | Path) -> None:
    """Logs a hint if the adapter names another base. Only the last part of a path counts, since folders move."""
    if isinstance(recorded, str) and recorded and base and Path(recorded).name != Path(base).resolve().name:
        logger.warning("hint: the adapter was trained on %s, and is added to %s", recorded, base)


def _as_on_disk(model: Transformer) -> nn.Module:
    """Returns a module with the parts of the model under the names of the checkpoint, which adapter files use."""
    outer = nn.Module()
    inner = nn.Module()
    outer.add_module("model", inner)
    outer.add_module("lm_head", model.lm_head)
    for name, module in model.named_children():
        if module is not model.lm_head:
            inner.add_module(name, module)
    return outer


def _children(outer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the parts of `_as_on_disk` under the names of the model."""
    yield from outer.get_submodule("model").named_children()
    yield "lm_head", outer.get_submodule("lm_head")


def _check_tied(folder: Path, model: Transformer, adapted: Any) -> None:
    """Refuses adapters that change embedding or head, if these share one matrix."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    ends = {name: module for name, module in _children(adapted.get_base_model()) if name in ("embed_tokens", "lm_head")}
    changed = [name for name, module in ends.items() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if changed and model.config.tie_word_embeddings:
        raise InputError(
            f"{folder} changes {changed[0]}, which is tied in this model (tie_word_embeddings); it cannot be merged",
            "adapter",
        )


def _check_names(folder: Path, fault: str, names: Collection[str]) -> None:
    if names:
        raise InputError(
            f"{folder} {fault} tensors for this model: {listed(sorted(names))}; give the checkpoint that it was "
            "trained on, or a complete adapter",
            "adapter",
        )


def _merged(adapted: Any) -> nn.Module:
    """Returns the base module with the adapter merged; each matrix is float32 while it is changed."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        weights = layer.get_base_layer()
        dtypes = {name: parameter.dtype for name, parameter in weights.named_parameters()}
        weights.float()
        layer.merge(safe_merge=True)
        for name, dtype in dtypes.items():
            parameter = weights.get_parameter(name)
            parameter.data = parameter.data.to(dtype)
    return adapted.merge_and_unload()
