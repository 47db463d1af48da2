"""Collects and reads the tensors of a training checkpoint, by torch.distributed.checkpoint."""

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

    Frozen weights are left out; they belong to the base checkpoint. The result has the form that
    torch.distributed.checkpoint saves and loads.

    Args:
        ema: moving average of the weights; None if the run has none.
    """
    weights, optimizer_state = get_state_dict(model, optimizers, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": optimizer_state} | ({"ema": ema.weights} if ema else {})


def read_tensors(checkpoint: Path, tensors: dict, no_dist: bool) -> None:
    """Reads tensors from a checkpoint into the tensors in `tensors`, in place.

    Args:
        tensors: nested dict of tensors, with all or some of the keys of the checkpoint.
        no_dist: whether this process reads alone, without other processes.

    Raises:
        InputError: a file is missing or damaged, or the checkpoint lacks a tensor or holds it in another shape.
    """
    try:
        reader, planner = reader_and_planner(checkpoint)
        quietly(dcp.load, tensors, storage_reader=reader, planner=planner, no_dist=no_dist)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        raise InputError(f"{checkpoint} cannot be loaded ({reason(error)}); remove it to use the one before") from None


def quietly(call: Callable, *args: Any, **kwargs: Any) -> Any:
    """Returns the result of `call(*args, **kwargs)`, and hides torch's warning that only one process takes part."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        return call(*args, **kwargs)


def reason(error: BaseException) -> str:
    """Returns the message of an error on one line, cut to 200 characters.

    For an error of torch.distributed.checkpoint, it is the message of the first failed process, without the trace.
    """
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]
