"""Checkpoints of a run: weights, optimizer, moving average and position, by torch.distributed.checkpoint.

A checkpoint is a folder `checkpoints/step-N` that is renamed into place when all of it is written; it loads on any
number of processes.
"""

import json
import os
import pickle
import shutil
import warnings
from pathlib import Path

import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.files import write_atomic
from lumina_mgpt.devices import DTYPES
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.checkpoint import save_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.optimizer import Ema

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
_STATE = "trainer.json"


def newest(output_dir: Path) -> Path | None:
    """The newest whole checkpoint of a run."""
    found = sorted((output_dir / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def read_state(checkpoint: Path) -> dict:
    """Position and settings that a checkpoint was written with.

    Raises:
        InputError: it cannot be read.
    """
    try:
        return json.loads((checkpoint / _STATE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{checkpoint} is damaged ({error}); remove it to go on from the one before") from None


def save(output_dir: Path, model: Transformer, optimizers: list[Optimizer], ema: Ema | None, state: dict,
         processes: Processes, keep: int) -> Path:  # fmt: skip
    """Writes a checkpoint and removes all but the `keep` newest; all processes call it together.

    Raises:
        InputError: the disk does not take it; the checkpoints before it are whole.
    """
    folder = output_dir / "checkpoints"
    final, partial = folder / f"step-{state['step']:08d}", folder / f".partial-step-{state['step']:08d}"
    if processes.first:
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob(".partial-*"):
            shutil.rmtree(old)
    processes.barrier()
    try:
        _quietly(dcp.save, _tensors(model, optimizers, ema), checkpoint_id=partial, no_dist=processes.world == 1)
        if processes.first:
            write_atomic(partial / _STATE, json.dumps(state, indent=1))
            if final.exists():
                shutil.rmtree(final)
            os.replace(partial, final)
            for old in sorted(folder.glob("step-*"))[:-keep]:
                shutil.rmtree(old)
    except (OSError, dcp.api.CheckpointException) as error:
        raise InputError(f"--output_dir {output_dir}: the checkpoint of step {state['step']} cannot be written "
                         f"({_reason(error)}); free some space, then --resume auto") from None  # fmt: skip
    processes.barrier()
    return final


def load(checkpoint: Path, model: Transformer, optimizers: list[Optimizer], ema: Ema | None,
         processes: Processes) -> None:  # fmt: skip
    """Fills model, optimizers and moving average from a checkpoint.

    Raises:
        InputError: a file is missing or damaged, or holds another model.
    """
    tensors = _tensors(model, optimizers, ema)
    _read(checkpoint, tensors, no_dist=processes.world == 1)
    set_state_dict(model, optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])


def _tensors(model: Transformer, optimizers: list[Optimizer], ema: Ema | None) -> dict:
    weights, optimizer_state = get_state_dict(model, optimizers)
    return {"model": weights, "optimizer": optimizer_state} | ({"ema": ema.weights} if ema else {})


def _quietly(call, *args, **kwargs) -> None:
    with warnings.catch_warnings():  # torch warns that there is one process, which is what was asked for
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        call(*args, **kwargs)


def _read(checkpoint: Path, tensors: dict, no_dist: bool) -> None:
    try:
        _quietly(dcp.load, tensors, checkpoint_id=checkpoint, no_dist=no_dist)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        raise InputError(f"{checkpoint} cannot be loaded ({_reason(error)}); remove it to use the one before") from None


def _reason(error: BaseException) -> str:
    """What went wrong on the first process that failed, without the trace that torch puts around it."""
    if isinstance(error, dcp.api.CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:200]


def keep_tokenizer(source: str | Path, output_dir: Path) -> None:
    """Copies the tokenizer beside the run, so that it can be exported from at any time."""
    (output_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            write_atomic(output_dir / "tokenizer" / name, (Path(source) / name).read_bytes())


def export(output_dir: str | Path, folder: str | Path | None = None, dtype: str = "bf16") -> Path:
    """Writes the newest checkpoint in the released layout, tokenizer beside it; the moving average where there is one.

    Needs one process and the memory of the weights alone; a run that goes on is not disturbed.

    Raises:
        InputError: there is no checkpoint, or it is damaged.
    """
    output_dir = Path(output_dir)
    folder = Path(folder) if folder else output_dir / "export"
    checkpoint = newest(output_dir)
    if checkpoint is None:
        raise InputError(f"--output_dir {output_dir} holds no checkpoint to export; train first")
    state = read_state(checkpoint)
    model = Transformer(ModelConfig(**state["model"]))
    weights = {name: parameter.data for name, parameter in model.named_parameters()}
    _read(checkpoint, {"ema" if state["ema"] else "model": weights}, no_dist=True)
    save_model(model, folder, DTYPES[dtype])
    for file in (output_dir / "tokenizer").iterdir():
        shutil.copyfile(file, folder / file.name)
    return folder
