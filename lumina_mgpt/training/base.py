"""Finds the base checkpoint, from which a run started, and compares its weights by a fingerprint."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.io import read_json, write_atomic
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.options import TrainingConfig

logger = logging.getLogger(__name__)

_BESIDE_ADAPTER = "base_weights.json"
_PATHS = ("init_from", "model_config", "tokenizer_path", "data_config", "movqgan_path", "sample_prompts", "output_dir")


def lasting(settings: TrainingConfig) -> dict:
    """Returns the options of a run with absolute paths, so that they are valid in every working folder.

    A hub id is left unchanged.
    """
    values = settings.flat()
    for name in _PATHS:
        if values[name] and os.path.exists(path := os.path.expanduser(values[name])):
            values[name] = os.path.abspath(path)
    return values


def describe(settings: TrainingConfig, folder: Path | None) -> dict:
    """Returns what the checkpoints of a run store about its base: `{"revision": revision}`.

    The revision is None if the base does not come from the hub.

    Args:
        folder: folder of the base; None for a model that is trained from scratch.
    """
    source = settings.model.init_from
    if not source or folder is None or os.path.isdir(os.path.expanduser(source)):
        return {"revision": None}
    return {"revision": folder.name if folder.parent.name == "snapshots" else None}


def find(init_from: str) -> Path:
    """Returns the folder of the base of a new run.

    Args:
        init_from: checkpoint folder or hub id.

    Raises:
        InputError: there is no such checkpoint; names the option `init_from`.
    """
    with caused_by("init_from"):
        return resolve(init_from)


def zero_image_head(model: Transformer) -> None:
    """Sets the rows of image codes in the head to zero, in place. All codes are then equally likely.

    A model that has not learned to draw has no use for these rows, and their values would disturb the first steps.

    Raises:
        InputError: the model has no head of its own.

    Source: `finetune_solver.py` of the released code of Lumina-mGPT.
    """
    config = model.config
    if config.tie_word_embeddings:
        raise InputError(
            "needs a head of its own, but tie_word_embeddings makes the embedding the head of this model; leave it out",
            "zero_image_head",
        )
    with torch.no_grad():
        model.lm_head.weight[config.image_code_offset : config.image_code_offset + config.num_image_codes] = 0


def guided_scale(config: ModelConfig, settings: TrainingConfig) -> float:
    """Returns `guided_scale` of the model that a run trains.

    Args:
        config: configuration of the base.

    Raises:
        InputError: the run distills guidance into weights that are guided already.
    """
    scale = settings.distillation.guidance_scale
    if config.guided and scale:
        raise InputError(
            f"{settings.model.init_from} gives guidance {config.guided_scale:g} by itself (guided_scale in "
            "config.json); give the weights that it was trained from",
            "init_from",
        )
    if config.guided:
        logger.warning(
            "%s gives guidance %g by itself; further training changes that, and the export still records it",
            settings.model.init_from,
            config.guided_scale,
        )
    return scale or config.guided_scale


def locate(settings: TrainingConfig, described: dict | None) -> Path:
    """Returns the folder of the base of an existing run.

    For a hub id, this is the folder of the revision that the run started from, if the cache still holds it.

    Args:
        described: what `describe` returned when the run started; None for checkpoints of earlier toolkit versions.

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
    """Returns a digest of weights after rounding them to bfloat16.

    Float32 and bfloat16 copies of a checkpoint therefore have the same digest. The names that peft gives to base
    weights do not change the digest.

    Args:
        named: pairs of name and weight; the weights are on the CPU.
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
    """Returns the fingerprint of the weights that are not trained; None if all weights are trained."""
    named = [(name, weight) for name, weight in model.named_parameters() if not weight.requires_grad]
    return fingerprint(named) if named else None


def check(found: str | None, wanted: str | None, source: str | Path | None, parameter: str = "init_from") -> None:
    """Compares the fingerprint of loaded weights with the fingerprint of the weights that a run started from.

    Args:
        found: fingerprint of the loaded weights.
        wanted: fingerprint in the checkpoint of the run; None skips the comparison.
        source: where the weights were loaded from.
        parameter: option that gave `source`; the error names both.

    Raises:
        InputError: the weights differ.
    """
    if wanted and found != wanted:
        raise InputError(
            f"{source} holds other weights than those that the run was trained on; give the checkpoint that it started "
            "from",
            parameter,
        )


def write_beside_adapter(model: Transformer, folder: Path) -> None:
    """Writes `base_weights.json` to the folder of an adapter.

    The file holds the fingerprint of the weights that the adapter was trained on, and `guided_scale` of the adapted
    model if the adapter makes it guided.

    Args:
        model: model with the adapter.
        folder: folder of the adapter.
    """
    guided = {"guided_scale": model.config.guided_scale} if model.config.guided else {}
    write_atomic(folder / _BESIDE_ADAPTER, json.dumps({"fingerprint": frozen(model)} | guided) + "\n")


def check_beside_adapter(model: Transformer, adapter: Path, source: str | Path) -> None:
    """Compares the weights of a model with those that an adapter was trained on.

    If the adapter makes the model guided, the model's configuration then says so. The function does nothing if the
    adapter's folder holds no `base_weights.json`.

    Args:
        model: model without adapters.
        adapter: folder of the adapter.
        source: where the model was loaded from; the error names it.

    Raises:
        InputError: the weights differ, or `base_weights.json` is damaged.
    """
    path = adapter / _BESIDE_ADAPTER
    if not path.is_file():
        return
    try:
        beside = read_json(path)
        with caused_by(str(path)):
            config = replace(model.config, guided_scale=beside.get("guided_scale", model.config.guided_scale))
    except InputError as error:
        raise InputError(str(error), "adapter") from None
    check(fingerprint(model.named_parameters()), beside.get("fingerprint"), source, "model_path")
    model.config = config
