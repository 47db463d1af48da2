"""Chooses the trained weights of a model: all, all but embedding and head, or low-rank adapters (LoRA, by peft)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.io import cause, remedy, write_tensors
from lumina_mgpt.meta import on_meta
from lumina_mgpt.model.names import disk_name
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.distributed import full_tensor
from lumina_mgpt.training.options import ModelOptions

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"  # the name that peft gives an adapter
_FULL = "free some space, or write elsewhere"  # safetensors gives no error number
_PREFIX = "base_model.model."  # of names in an adapter file; the rest is the name in the checkpoint


def choose_trained(model: Transformer, options: ModelOptions, seed: int = 0) -> None:
    """Adds adapters to a model, if `options` asks for them, and freezes the weights that are not trained.

    It changes the model in place. New adapters do not change the model's output.

    Args:
        options: `lora_rank` adds adapters and freezes all other weights. `freeze_embeddings` freezes only embedding and
            head.
        seed: seed of the adapters' initial weights.

    Raises:
        InputError: peft is needed and missing, or its import fails.
    """
    if options.lora_rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except Exception as error:  # a failing import of peft may raise any class
            raise package_error(error, f"lora_rank={options.lora_rank}", "peft") from None
        config = LoraConfig(**_lora(options))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if options.lora_rank:
            parameter.requires_grad_(".lora_" in name)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        elif options.freeze_embeddings:
            parameter.requires_grad_(not name.startswith(("embed_tokens.", "lm_head.")))


def _lora(options: ModelOptions) -> dict[str, Any]:
    """The arguments of peft's LoraConfig."""
    return {"r": options.lora_rank, "lora_alpha": options.alpha, "target_modules": list(TARGETS)}


@contextmanager
def without_adapters(model: Transformer) -> Iterator[None]:
    """Makes a model compute what its base computes, without adapters and dropout, until the block ends."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
    dropout, model.dropout = model.dropout, 0.0
    try:
        for layer in layers:
            layer.set_scale(_ADAPTER, 0)
        yield
    finally:
        model.dropout = dropout
        for layer in layers:
            layer.set_scale(_ADAPTER, 1)


def plain_copy(model: Transformer, dtype: torch.dtype, device: torch.device | str, keep: bool = True) -> Transformer:
    """Returns a copy of the model with adapters merged and weights unsharded, made one tensor at a time.

    All processes call the function together.

    Args:
        dtype, device: those of the copy.
        keep: whether the copy of this process has weights. It needs the memory for them.
    """
    with on_meta():
        copy = Transformer(model.config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight, owner = full_tensor(parameter.detach()), name.removesuffix(".base_layer.weight")
        if owner != name:
            layer: Any = model.get_submodule(owner)
            down, up = (full_tensor(part[_ADAPTER].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
            weight = weight.float() + layer.scaling[_ADAPTER] * (up @ down)
        if keep:
            owner, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
            setattr(copy.get_submodule(owner), leaf, torch.nn.Parameter(weight.to(device, dtype, copy=True)))
    if copy.config.tie_word_embeddings:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy.eval()


def save_adapter(model: Transformer, folder: Path, options: ModelOptions) -> None:
    """Writes the adapters of a model to a folder, in peft's format and without the base weights.

    Raises:
        InputError: the folder cannot be written.
    """
    from peft import LoraConfig

    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            key = _PREFIX + disk_name(name.replace(f".{_ADAPTER}.", "."))
            tensors[key] = parameter.detach().contiguous()
    config = LoraConfig(**_lora(options), base_model_name_or_path=options.init_from)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({cause(error)}); {remedy(error, _FULL)}") from None
