"""What of a model is trained: all of it, all but embedding and head, or low-rank adapters (by peft)."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_tensors
from lumina_mgpt.model.checkpoint import disk_name
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.distributed import full_tensor
from lumina_mgpt.training.settings import Settings

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"  # peft's own name for it
_PREFIX = "base_model.model."  # of the names in an adapter file, which are those of the checkpoint otherwise


def choose_trained(model: Transformer, settings: Settings) -> None:
    """Adds adapters and freezes weights as the settings say; adapters start so that they change nothing.

    Raises:
        InputError: --lora_rank without peft.
    """
    if settings.lora_rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise InputError(f"--lora_rank {settings.lora_rank} needs the peft package; pip install peft") from None
        config = LoraConfig(r=settings.lora_rank, lora_alpha=alpha(settings), target_modules=list(TARGETS))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if settings.lora_rank:
            parameter.requires_grad_(".lora_" in name)
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        elif settings.freeze_embeddings:
            parameter.requires_grad_(not name.startswith(("embed_tokens.", "lm_head.")))


def alpha(settings: Settings) -> float:
    """What adapters are scaled by, times their rank."""
    return settings.lora_alpha or 2.0 * settings.lora_rank


def plain_copy(model: Transformer, dtype: torch.dtype, device: torch.device | str, first: bool = True) -> Transformer:
    """The model as one without adapters or shards, a tensor at a time; of use on the first process only.

    All processes call it together.
    """
    with torch.device("meta"):
        copy = Transformer(model.config)
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight, owner = full_tensor(parameter.detach()), name.removesuffix(".base_layer.weight")
        if owner != name:
            layer = model.get_submodule(owner)
            down, up = (full_tensor(part[_ADAPTER].weight.detach()).float() for part in (layer.lora_A, layer.lora_B))
            weight = weight.float() + layer.scaling[_ADAPTER] * (up @ down)
        if first:
            owner, _, leaf = name.replace(".base_layer.", ".").rpartition(".")
            held = torch.nn.Parameter(weight.to(device, dtype, copy=True))
            setattr(copy.get_submodule(owner), leaf, held)
    if copy.config.tie_word_embeddings:
        copy.lm_head.weight = copy.embed_tokens.weight
    return copy.eval()


def save_adapter(model: Transformer, folder: Path, settings: Settings) -> None:
    """Writes the adapters alone, as peft does: a few MB beside the weights they belong to."""
    from peft import LoraConfig

    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            key = _PREFIX + disk_name(name.replace(f".{_ADAPTER}.", "."))
            tensors[key] = parameter.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    config = LoraConfig(r=settings.lora_rank, lora_alpha=alpha(settings), target_modules=list(TARGETS),
                        base_model_name_or_path=settings.init_from)  # fmt: skip
    config.save_pretrained(str(folder))


@torch.no_grad()
def merge_adapter(model: Transformer, folder: Path) -> None:
    """Adds the adapters in `folder` to the weights that they were trained on; needs no peft.

    Raises:
        InputError: there is no adapter, it is damaged, or one of another model.
    """
    try:
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors, scale = load_file(folder / "adapter_model.safetensors"), config["lora_alpha"] / config["r"]
    except Exception as error:  # what safetensors raises on a damaged file is no one class
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"--adapter {folder} cannot be read ({reason}); give a folder that export.py wrote") from None
    weights = {disk_name(name): parameter for name, parameter in model.named_parameters()}
    for key in [key for key in tensors if ".lora_A." in key]:
        weight = weights.get(key.removeprefix(_PREFIX).replace(".lora_A", ""))
        delta = _product(tensors, key)
        if weight is None or delta is None or weight.shape != delta.shape:
            raise InputError(f"--adapter {folder} was trained on another model ({key} does not fit); give its own")
        weight += (scale * delta).to(weight.dtype)


def _product(tensors: dict[str, Tensor], key: str) -> Tensor | None:
    down, up = tensors[key], tensors.get(key.replace(".lora_A.", ".lora_B."))
    fits = up is not None and up.dim() == down.dim() == 2 and up.shape[1] == down.shape[0]
    return up.float() @ down.float() if fits else None
