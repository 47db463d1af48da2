"""Loads the checkpoints of a run, to resume the training or to use the model."""

import logging
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict
from torch.optim import Optimizer

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
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
