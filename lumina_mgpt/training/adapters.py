"""What of a model is trained: all of it, all but embedding and head, or low-rank adapters (by peft)."""

import logging
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from lumina_mgpt.checks import is_number
from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.io import cause, read_json, remedy, require_readable, write_tensors
from lumina_mgpt.model.names import disk_name, listed
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.distributed import full_tensor
from lumina_mgpt.training.options import Settings

logger = logging.getLogger(__name__)

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_ADAPTER = "default"  # peft's own name for it
_FULL = "free some space, or write elsewhere"  # safetensors gives no error number
_PREFIX = "base_model.model."  # of the names in an adapter file, which are those of the checkpoint otherwise


def choose_trained(model: Transformer, settings: Settings) -> None:
    """Adds adapters and freezes weights as the settings say; adapters start so that they change nothing.

    Raises:
        InputError: --lora_rank without peft, or with one that fails to import.
    """
    if settings.lora_rank:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except Exception as error:  # whatever one of its own imports raises
            raise package_error(error, f"--lora_rank {settings.lora_rank}", "peft") from None
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
    """Writes the adapters alone, as peft does: a few MB beside the weights they belong to.

    Raises:
        InputError: the folder cannot be written.
    """
    from peft import LoraConfig

    tensors = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            key = _PREFIX + disk_name(name.replace(f".{_ADAPTER}.", "."))
            tensors[key] = parameter.detach().contiguous()
    config = LoraConfig(r=settings.lora_rank, lora_alpha=alpha(settings), target_modules=list(TARGETS),
                        base_model_name_or_path=settings.init_from)  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / "adapter_model.safetensors", tensors)
        config.save_pretrained(str(folder))
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder} cannot be written ({cause(error)}); {remedy(error, _FULL)}") from None


# -- merging -----------------------------------------------------------------------------------------------------------

# Settings whose adapters belong to weights, or to a model, that peft does not make again from the file alone.
_UNSUPPORTED = {
    "layer_replication": "the model has more layers than its checkpoint",
    "megatron_config": "it belongs to Megatron's layers",
    "alora_invocation_tokens": "it is active behind certain tokens only, so that no weights equal it",
    "arrow_config": "it chooses among adapters for each token, so that no weights equal it",
    "monteclora_config": "it draws weights at random",
}
# Initial values that leave the base weights unmodified: the file replaces all of them.
_PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# Initial values that are subtracted from the base weights, in a way that peft repeats when it loads an adapter.
_REPEATABLE_STARTS = ("pissa", "olora")
_SAYS_NOTHING = ("peft_version",)  # fields of newer versions of peft that change no computation


def merge_adapter(model: Transformer, folder: Path, base: str | Path = "") -> None:
    """Adds the adapter in `folder`, as peft or export wrote it, to the weights that it was trained on, by peft.

    Computed in float32, whatever the dtype of the weights, which is kept.

    Args:
        base: what the weights were given as; a hint is logged where the adapter names others.

    Raises:
        InputError: peft is missing; there is no adapter, it is damaged, of another model, or of a kind that cannot be
            merged.
    """
    try:
        from peft import LoraConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    except Exception as error:  # whatever one of its own imports raises
        raise package_error(error, "merging adapters", "peft") from None
    raw = read_json(folder / "adapter_config.json", "--adapter")
    known = {field.name for field in fields(LoraConfig)}
    _check_settings(folder, raw, known)
    tensors = _read_adapter(folder)
    _say_other_base(raw.get("base_model_name_or_path"), base)
    if raw.get("init_lora_weights", True) in _PLAIN_STARTS:
        raw["init_lora_weights"] = False  # spares the time
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")  # what they warn of is checked here
        try:
            config = LoraConfig(**{key: value for key, value in raw.items() if key in known})
            adapted = PeftModel(_as_on_disk(model), config)
            _check_tied(folder, model, adapted)
            wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False)
            _check_names(folder, "lacks", wanted.keys() - tensors.keys())
            unknown = set_peft_model_state_dict(adapted, tensors).unexpected_keys
            _check_names(folder, "holds unknown", unknown)
            merged = _merged(adapted)
        except InputError:
            raise
        except Exception as error:  # peft and torch raise many classes for what does not fit
            raise InputError(f"--adapter {folder} cannot be merged ({cause(error)}); give an adapter of this model, as "
                             "peft or lumina-mgpt export wrote it") from None  # fmt: skip
    for name, module in _children(merged):
        setattr(model, name, module)


def _check_settings(folder: Path, raw: dict, known: set[str]) -> None:
    """Refuses what peft would pass over, and what cannot become weights."""
    where = f"--adapter {folder / 'adapter_config.json'}"
    kind, start = raw.get("peft_type"), raw.get("init_lora_weights", True)
    if kind != "LORA":
        raise InputError(f"{where}: peft_type must be LORA, got {kind!r}; merge it with peft, where it was trained")
    for name in ("r", "lora_alpha"):
        if not is_number(raw.get(name, 8)):  # 8: peft's own default of both
            raise InputError(f"{where}: {name} must be a finite number, got {str(raw[name])[:80]!r}; correct it")
    for name, value in raw.items():
        if name not in known and name not in _SAYS_NOTHING and value not in (None, False, "", [], {}):
            raise InputError(f"{where}: the installed peft does not know {name}, got {str(value)[:80]!r}; upgrade peft")
        if name in _UNSUPPORTED and value:
            raise InputError(f"{where}: {name} cannot be merged ({_UNSUPPORTED[name]}), got {str(value)[:80]}")
    if not isinstance(start, bool | str) or start not in (*_PLAIN_STARTS, *_REPEATABLE_STARTS):
        raise InputError(f"{where}: init_lora_weights must leave the base weights unmodified, got {str(start)[:80]!r}; "
                         "save it with peft's path_initial_model_for_weight_conversion")  # fmt: skip


def _read_adapter(folder: Path) -> dict[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    require_readable(path, "--adapter")
    try:
        tensors = load_file(path)
    except Exception as error:  # what safetensors raises on a damaged file is no one class
        raise InputError(f"--adapter {path} is damaged or cut short ({cause(error)}); write it again") from None
    if not tensors:
        raise InputError(f"--adapter {path} holds no tensors; give a folder that peft or lumina-mgpt export wrote")
    broken = [name for name, tensor in tensors.items() if not (tensor.is_floating_point() and tensor.isfinite().all())]
    if broken:
        raise InputError(f"--adapter {path} holds values that are infinite or not a number: {listed(sorted(broken))}; "
                         "give an earlier step")  # fmt: skip
    return tensors


def _say_other_base(recorded: object, base: str | Path) -> None:
    """Logs a hint where the adapter names another base. Folders move: only their last name is compared."""
    if isinstance(recorded, str) and recorded and base and Path(recorded).name != Path(base).resolve().name:
        logger.warning("hint: the adapter was trained on %s, and is added to %s", recorded, base)


def _as_on_disk(model: Transformer) -> nn.Module:
    """A module that holds the model's parts under the names of the checkpoint, to which an adapter file refers."""
    outer = nn.Module()
    outer.model, outer.lm_head = nn.Module(), model.lm_head
    for name, module in model.named_children():
        if module is not model.lm_head:
            outer.model.add_module(name, module)
    return outer


def _children(outer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of `_as_on_disk`, under the model's own names."""
    yield from outer.model.named_children()
    yield "lm_head", outer.lm_head


def _check_tied(folder: Path, model: Transformer, adapted: nn.Module) -> None:
    """Refuses adapters that would part the two uses of a tied embedding."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    ends = {name: module for name, module in _children(adapted.get_base_model()) if name in ("embed_tokens", "lm_head")}
    changed = [name for name, module in ends.items() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    if changed and model.config.tie_word_embeddings:
        raise InputError(f"--adapter {folder} changes {changed[0]}, which is tied in this model (tie_word_embeddings); "
                         "such an adapter cannot be merged")  # fmt: skip


def _check_names(folder: Path, fault: str, names: Iterable[str]) -> None:
    if names:
        raise InputError(f"--adapter {folder} {fault} tensors for this model: {listed(sorted(names))}; give the "
                         "checkpoint that it was trained on, or a whole adapter")  # fmt: skip


def _merged(adapted: nn.Module) -> nn.Module:
    """The base module with the adapter in its weights; each matrix is float32 while it is changed."""
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
