"""Builds the model of a run, and loads the checkpoints of a run, to resume the training or to use the model."""

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
from torch.optim import Optimizer

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.meta import on_meta
from lumina_mgpt.model.reading import load_model, require_plain_weights
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import base
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.checksums import verify
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.optimizer import Ema
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.state import configs_of, read_state
from lumina_mgpt.training.tensors import read_tensors, tensors_of

logger = logging.getLogger(__name__)


def build_model(settings: TrainingConfig, weights: bool = True) -> tuple[Transformer, Path, dict]:
    """Returns the model to train, the folder of its tokenizer, and what `base.describe` returns for its base.

    The model is on the CPU in float32. With adapters and precision bf16, it is in bfloat16, since no product uses its
    frozen weights in a wider format.

    Args:
        weights: whether to load or draw the weights. Otherwise the parameters are on the meta device; those of a head
            norm may have another number of rows than in the checkpoint.

    Raises:
        InputError: the model cannot be loaded or has int4 weights, or an option does not apply to it.
    """
    options = settings.model
    if options.init_from:
        folder = base.find(options.init_from)
        require_plain_weights(folder, "init_from", "trained")
        narrow = options.lora_rank and settings.runtime.precision == "bf16"
        dtype = torch.bfloat16 if narrow else torch.float32
        if weights:
            model = load_model(folder, dtype, torch.device("cpu"), "sdpa")
        else:
            model = _without_weights(ModelConfig.from_json(folder / "config.json")).to(dtype)
    else:
        path = str(options.model_config)
        with caused_by("model_config"):
            config = ModelConfig.from_json(path) if path.endswith(".json") else ModelConfig.from_yaml(path)
        folder = Path(str(options.tokenizer_path))
        model = Transformer(config) if weights else _without_weights(config)
        if weights:
            model.init_weights(torch.Generator().manual_seed(settings.runtime.seed))
    if options.zero_image_head and weights:
        base.zero_image_head(model)
    if settings.regularization.spare_panel and not model.config.family.has_panels:
        raise InputError(f"must be 0 for {model.config.family.name}, whose images have no panels", "spare_panel")
    described = base.describe(settings, folder)
    folder = Path(options.tokenizer_path) if options.tokenizer_path else folder
    dropout, z_loss_weight = settings.regularization.dropout, settings.regularization.z_loss_weight
    guided = base.guided_scale(model.config, settings)
    model.config = replace(model.config, dropout=dropout, z_loss_weight=z_loss_weight, guided_scale=guided)
    model.dropout, model.gradient_checkpointing = dropout, settings.runtime.checkpointing
    return model, folder, described


def _without_weights(config: ModelConfig) -> Transformer:
    with on_meta():
        return Transformer(config)


def verified_state(checkpoint: Path, processes: Processes | None = None) -> dict:
    """Verifies the checksums of a checkpoint, and returns the contents of its state file.

    A checkpoint without checksums, of an earlier toolkit version, is not verified.

    Args:
        processes: the processes that share the reading; all of them call this function together. With None, this
            process reads all files.

    Raises:
        InputError: a file is damaged, missing or not listed. Every process raises; those that found the
            fault name the file.
    """
    share = (processes.rank, processes.world) if processes else (0, 1)
    fault, sealed = None, False
    try:
        sealed = verify(checkpoint, *share)
    except InputError as error:
        fault = error
    faults = processes.sum(fault is not None)[0] if processes else fault is not None
    if faults:  # every process raises
        raise fault or InputError(f"{checkpoint} is damaged; another process names the file")
    if not sealed and share[0] == 0:
        logger.warning("%s is of an earlier version, without checksums: damage to it is not detected", checkpoint)
    return read_state(checkpoint)


def load(
    checkpoint: Path, model: Transformer, optimizers: list[Optimizer], ema: Ema | None, processes: Processes
) -> None:
    """Loads the state of model, optimizers and moving average from a checkpoint, in place.

    Frozen weights stay unchanged, since checkpoints do not hold them.

    Args:
        ema: moving average of the weights; None if the run has none.

    Raises:
        InputError: a file is missing or damaged, or holds another model.
    """
    tensors = tensors_of(model, optimizers, ema)
    read_tensors(checkpoint, tensors, no_dist=processes.world == 1)
    set_state_dict(
        model,
        optimizers,
        model_state_dict=tensors["model"],
        optim_state_dict=tensors["optimizer"],
        options=StateDictOptions(strict=False),
    )


def trained_model(checkpoint: Path) -> tuple[Transformer, TrainingConfig]:
    """Returns the model of a checkpoint and its training configuration.

    The model is on the CPU in float32, and its adapters are not merged. Its trained weights are those of the moving
    average if the run has one.

    Raises:
        InputError: the checkpoint is damaged, or the base checkpoint of its frozen weights is missing or changed.
    """
    state = verified_state(checkpoint)
    settings, config = configs_of(checkpoint, state)
    if settings.model.freezes:
        model = load_model(base.locate(settings, state.get("base")), torch.float32, "cpu")
        model.config = config
    else:
        model = Transformer(config)
    choose_trained(model, settings.model, settings.runtime.seed)
    if wanted := state["identity"].get("frozen"):
        base.check(base.frozen(model), wanted, settings.model.init_from)
    weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    read_tensors(checkpoint, {"ema" if state["ema"] else "model": weights}, no_dist=True)
    return model, settings
