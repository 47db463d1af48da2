"""Checkpoints of a run: weights, optimizer, moving average and position, by torch.distributed.checkpoint.

A checkpoint is a folder `checkpoints/step-N` that is renamed into place when all of it is written; it loads on any
number of processes.
"""

import json
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.devices import DTYPES
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_atomic
from lumina_mgpt.model.checkpoint import COMPANIONS, load_model, resolve, save_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.adapters import choose_trained, plain_copy
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.optimizer import Ema
from lumina_mgpt.training.settings import Settings

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


class Saver:
    """Writes the checkpoints of a run and keeps the `keep` newest; all processes call the same methods together.

    With `beside`, `save` only copies what is to be written (in the CPU's memory: 12 bytes a trained weight, spread over
    the processes), and a thread writes it while the training goes on; a checkpoint has its name when it is whole, here
    too. Not the default: for 1.05 GB, on two cores that train as well, the loop was held 0.22 s and not 1.09, but the
    steps beside the writing took longer: 1.46 s lost in all and not 1.17 (scripts/bench_checkpoint.py). Meant for GPUs,
    where the CPU has time; not measured there.
    """

    def __init__(self, output_dir: Path, processes: Processes, keep: int, beside: bool = False) -> None:
        self.output_dir, self.folder, self.processes = output_dir, output_dir / "checkpoints", processes
        self.keep, self.beside = keep, beside
        if beside:  # the thread warns, like `_quietly` says, when that has long returned
            warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        # Its messages must not meet those of the steps that are made meanwhile.
        self.group = dist.new_group(backend="gloo") if beside and processes.world > 1 else None
        self.writing: tuple[Future, dict] | None = None

    def save(self, tensors: dict, state: dict) -> None:
        """Writes a checkpoint, or begins to.

        Raises:
            InputError: the disk does not take it, or did not take the last one; the checkpoints before it are whole.
        """
        self.finish()
        partial = self.folder / f".partial-{_name(state)}"
        if self.processes.first:
            self.folder.mkdir(parents=True, exist_ok=True)
            for old in self.folder.glob(".partial-*"):
                shutil.rmtree(old)
        self.processes.barrier()
        options = {"checkpoint_id": partial, "no_dist": self.processes.world == 1}
        with self._one_line(state):
            if self.beside:
                self.writing = _quietly(dcp.async_save, tensors, process_group=self.group, **options), state
                return
            _quietly(dcp.save, tensors, **options)
            self._publish(state)
        self.processes.barrier()

    def poll(self) -> bool:
        """Gives what is whole by now its name; says whether writing has ended badly instead."""
        if self.writing is None or not self.writing[0].done():
            return False
        if self.writing[0].exception():
            return True
        self.finish()
        return False

    def finish(self) -> None:
        """Waits until nothing is being written.

        Raises:
            InputError: as `save`.
        """
        if self.writing is None:
            return
        (future, state), self.writing = self.writing, None
        with self._one_line(state):
            future.result()
            self._publish(state)

    def _publish(self, state: dict) -> None:
        if not self.processes.first:
            return
        partial, final = self.folder / f".partial-{_name(state)}", self.folder / _name(state)
        write_atomic(partial / _STATE, json.dumps(state, indent=1))
        if final.exists():
            shutil.rmtree(final)
        os.replace(partial, final)
        for old in sorted(self.folder.glob("step-*"))[: -self.keep]:
            shutil.rmtree(old)

    @contextmanager
    def _one_line(self, state: dict) -> Iterator[None]:
        try:
            yield
        except (OSError, dcp.api.CheckpointException) as error:
            raise InputError(f"--output_dir {self.output_dir}: the checkpoint of step {state['step']} cannot be "
                             f"written ({_reason(error)}); free some space, then --resume auto") from None  # fmt: skip


def _name(state: dict) -> str:
    return f"step-{state['step']:08d}"


def load(checkpoint: Path, model: Transformer, optimizers: list[Optimizer], ema: Ema | None,
         processes: Processes) -> None:  # fmt: skip
    """Fills model, optimizers and moving average from a checkpoint.

    Raises:
        InputError: a file is missing or damaged, or holds another model.
    """
    tensors = tensors_of(model, optimizers, ema)
    _read(checkpoint, tensors, no_dist=processes.world == 1)
    set_state_dict(model, optimizers, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"],
                   options=StateDictOptions(strict=False))  # fmt: skip


def tensors_of(model: Transformer, optimizers: list[Optimizer], ema: Ema | None) -> dict:
    """All that training changes: weights that are not trained stay where they came from."""
    weights, optimizer_state = get_state_dict(model, optimizers, options=StateDictOptions(ignore_frozen_params=True))
    return {"model": weights, "optimizer": optimizer_state} | ({"ema": ema.weights} if ema else {})


def _quietly(call, *args, **kwargs):
    with warnings.catch_warnings():  # torch warns that there is one process, which is what was asked for
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        return call(*args, **kwargs)


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


def keep_companions(source: str | Path, output_dir: Path) -> None:
    """Copies tokenizer and lists of names beside the run, so that it can be exported from at any time."""
    for file in _companions(Path(source)):
        if "movqgan" not in file.name:  # large, and needed by the export alone
            (output_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
            write_atomic(output_dir / "tokenizer" / file.name, file.read_bytes())


def _companions(folder: Path) -> list[Path]:
    return sorted({file for pattern in COMPANIONS for file in folder.glob(pattern)})


def trained_model(checkpoint: Path) -> tuple[Transformer, Settings]:
    """The model of a checkpoint as it is trained, adapters and all, on the CPU; the moving average where there is one.

    Raises:
        InputError: the checkpoint is damaged, or the weights that it left alone are gone.
    """
    state = read_state(checkpoint)
    settings, config = Settings(**state["settings"]), ModelConfig(**state["model"])
    if settings.freezes:
        model = load_model(resolve(str(settings.init_from)), torch.float32, "cpu")
        model.config = config
    else:
        model = Transformer(config)
    choose_trained(model, settings)
    weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    _read(checkpoint, {"ema" if state["ema"] else "model": weights}, no_dist=True)
    return model, settings


def export(output_dir: str | Path, folder: str | Path | None = None, dtype: str = "bf16",
           step: int | None = None) -> Path:  # fmt: skip
    """Writes a checkpoint (the newest, or that of `step`) in the released layout, as generate.py loads it.

    Adapters are merged. Tokenizer and, where the run began with a folder that has it, the MoVQGAN come along. Needs one
    process and the memory of the weights, merged ones twice; a run that goes on is not disturbed.

    Raises:
        InputError: there is no such checkpoint, or it is damaged, or the disk does not take it.
    """
    output_dir = Path(output_dir)
    folder = Path(folder) if folder else output_dir / "export"
    checkpoint = find(output_dir, step)
    model, settings = trained_model(checkpoint)
    save_model(plain_copy(model, DTYPES[dtype], "cpu") if settings.lora_rank else model, folder, DTYPES[dtype])
    copies = _companions(output_dir / "tokenizer")
    if settings.init_from and Path(settings.init_from).is_dir():
        copies += [file for file in _companions(Path(settings.init_from)) if "movqgan" in file.name]
    for file in copies:
        write_atomic(folder / file.name, file.read_bytes())
    return folder


def find(output_dir: Path, step: int | None = None) -> Path:
    """Raises: InputError: there is no checkpoint, or none of that step."""
    if step is None:
        if (found := newest(output_dir)) is None:
            raise InputError(f"--output_dir {output_dir} holds no checkpoint to export; train first")
        return found
    place = output_dir / "checkpoints" / f"step-{step:08d}"
    if not place.is_dir():
        there = ", ".join(str(int(path.name.removeprefix("step-"))) for path in sorted(place.parent.glob("step-*")))
        raise InputError(f"--step {step} is not there; --output_dir {output_dir} holds {there or 'none'}")
    return place
