"""Tensors of a training checkpoint, read and written by torch.distributed.checkpoint."""

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.optim import Optimizer

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.optimizer import Ema
from lumina_mgpt.training.restricted import reader_and_planner


def tensors_of(model: Transformer, optimizers: list[Optimizer], ema: Ema | None) -> dict:
    """Returns everything that training changes: trained weights, optimizer state and moving average.

    Frozen weights are left out; they belong to the base checkpoint.
    """
    weights, optimizer_state = get_state_dict(model, optimizers, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": optimizer_state} | ({"ema": ema.weights} if ema else {})


def read_tensors(checkpoint: Path, tensors: dict, no_dist: bool) -> None:
    """Fills `tensors` in place from a checkpoint.

    Args:
        no_dist: this process reads alone.

    Raises:
        InputError: a file is missing or damaged, or holds other tensors.
    """
    try:
        reader, planner = reader_and_planner(checkpoint)
        quietly(dcp.load, tensors, storage_reader=reader, planner=planner, no_dist=no_dist)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise InputError(f"{checkpoint} cannot be loaded ({reason(error)}); remove it to use the one before") from None


def quietly(call: Callable, *args: Any, **kwargs: Any) -> Any:
    """Calls a function without torch's warning that a single process takes part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        return call(*args, **kwargs)


def reason(error: BaseException) -> str:
    """Returns the message of the first process that failed, without torch's trace, on one line."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]
