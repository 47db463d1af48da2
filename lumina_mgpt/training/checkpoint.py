"""Checkpoints of a run, read: to go on from, or to export; saver.py writes them."""

import logging
import os
import pickle
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.optim import Optimizer

from lumina_mgpt.devices import DTYPES
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, new_folder, remedy, require_new, write_atomic
from lumina_mgpt.model.checkpoint import COMPANIONS, load_model, save_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import base
from lumina_mgpt.training.adapters import choose_trained, plain_copy
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.lineage import checkpoints_of, name_of, newest, step_of
from lumina_mgpt.training.optimizer import Ema
from lumina_mgpt.training.options import Settings
from lumina_mgpt.training.restricted import reader_and_planner
from lumina_mgpt.training.state import read_state, settings_of, verify

__all__ = [
    "export", "find", "load", "newest", "read_state", "require_export_folder", "trained_model", "verified_state",
]  # fmt: skip

logger = logging.getLogger(__name__)


def verified_state(checkpoint: Path, processes: Processes | None = None) -> dict:
    """Position and settings of a checkpoint whose files are those that were written; many processes share the reading.

    Raises:
        InputError: a file is damaged, missing or left over; names it.
    """
    share, fault, sealed = (processes.rank, processes.world) if processes else (0, 1), None, False
    try:
        sealed = verify(checkpoint, *share)
    except InputError as error:
        fault = error
    faults = processes.sum(fault is not None)[0] if processes else fault is not None
    if faults:  # on all processes alike
        raise fault or InputError(f"{checkpoint} is damaged; another process names the file")
    if not sealed and not share[0]:
        logger.warning("%s is of an earlier version, without checksums: damage to it is not noticed", checkpoint)
    return read_state(checkpoint)


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


def quietly(call, *args, **kwargs):
    with warnings.catch_warnings():  # torch warns that there is one process, which is what was asked for
        warnings.filterwarnings("ignore", category=UserWarning, module="torch.distributed")
        return call(*args, **kwargs)


def _read(checkpoint: Path, tensors: dict, no_dist: bool) -> None:
    try:
        reader, planner = reader_and_planner(checkpoint)
        quietly(dcp.load, tensors, storage_reader=reader, planner=planner, no_dist=no_dist)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError, dcp.api.CheckpointException) as error:
        raise InputError(f"{checkpoint} cannot be loaded ({reason(error)}); remove it to use the one before") from None


def reason(error: BaseException) -> str:
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
        InputError: the checkpoint is damaged, or the weights that it left alone are gone or are others now.
    """
    state = verified_state(checkpoint)
    settings, config = settings_of(checkpoint, state)
    if settings.freezes:
        model = load_model(base.locate(settings, state.get("base")), torch.float32, "cpu")
        model.config = config
    else:
        model = Transformer(config)
    choose_trained(model, settings)
    if wanted := state["identity"].get("frozen"):
        base.check(base.frozen(model), wanted, f"--init_from {settings.init_from}")
    weights = {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}
    _read(checkpoint, {"ema" if state["ema"] else "model": weights}, no_dist=True)
    return model, settings


def export(output_dir: str | Path, folder: str | Path | None = None, dtype: str = "bf16", step: int | None = None,
           checkpoint: Path | None = None, parameter: str = "--export_dir") -> Path:  # fmt: skip
    """Writes a checkpoint (`checkpoint`, else that of `step`, else the newest) in the released layout.

    generate.py loads it. Adapters are merged. Tokenizer and, where the run began with a folder that has it, the MoVQGAN
    come along. Needs one process and the memory of the weights, merged ones twice; a run that goes on is not disturbed.
    `parameter` is what the folder was given as, for messages.

    Raises:
        InputError: there is no such checkpoint, or it is damaged, or `folder` cannot be used, or the disk does not take
            it; none is written.
    """
    output_dir = Path(output_dir)
    folder = Path(folder) if folder else output_dir / "export"
    checkpoint = checkpoint or find(output_dir, step)
    model, settings = trained_model(checkpoint)
    require_export_folder(folder, settings, parameter)
    companions = _all_companions(output_dir, settings, read_state(checkpoint).get("base"))
    model = plain_copy(model, DTYPES[dtype], "cpu") if settings.lora_rank else model
    with _new_or_renewed(folder, parameter) as part:
        save_model(model, part, DTYPES[dtype])
        for file in companions:
            shutil.copyfile(file, part / file.name)
    return folder


def require_export_folder(folder: Path, settings: Settings, parameter: str) -> None:
    """Refuses a folder that an export cannot use; call it before the training.

    An empty folder and a former export are allowed.

    Raises:
        InputError: it is a file, or cannot be examined, or holds the checkpoint that the run began with.
    """
    try:
        if not os.path.isdir(folder) or not any(os.scandir(folder)):
            require_new(folder, parameter)
            return
        base_folder = os.path.expanduser(settings.init_from or "")
        if os.path.isdir(base_folder) and os.path.samefile(folder, base_folder):
            raise InputError(f"{parameter} {folder} is the folder of --init_from, whose weights an export would "
                             "replace; give another folder")  # fmt: skip
    except OSError as error:
        raise InputError(f"{parameter} {folder} cannot be used ({cause(error)}); {remedy(error)}") from None


@contextmanager
def _new_or_renewed(folder: Path, parameter: str) -> Iterator[Path]:
    """A hidden folder to write an export to; when it is whole, its files replace those of a former export."""
    former = folder.is_dir() and any(folder.iterdir())
    place = folder / f".{os.getpid()}.new" if former else folder
    with new_folder(place, parameter) as part:
        yield part
    if former:
        names = {file.name for file in place.iterdir()}
        for name in names:
            os.replace(place / name, folder / name)
        place.rmdir()
        for stale in folder.glob("model*.safetensors*"):  # shards or an index would be read instead of the new ones
            if stale.name not in names:
                stale.unlink()


def _all_companions(output_dir: Path, settings: Settings, described: dict | None) -> list[Path]:
    """Tokenizer and MoVQGAN for an export; logs what is missing."""
    found = _companions(output_dir / "tokenizer")
    if not any(file.name == "tokenizer.json" for file in found):
        logger.warning("%s holds no tokenizer: add one to the export before it is used", output_dir / "tokenizer")
    image_tokenizer = [Path(settings.movqgan_path)] if settings.movqgan_path else []
    sources = []
    if settings.init_from:
        try:
            sources.append(base.locate(settings, described))
        except InputError as error:
            logger.warning("%s", error)
    if settings.tokenizer_path:
        sources.append(Path(settings.tokenizer_path))
    for source in sources:
        if not any(file.is_file() for file in image_tokenizer):
            image_tokenizer = [file for file in _companions(source) if "movqgan" in file.name]
    image_tokenizer = [file for file in image_tokenizer if file.is_file()]
    if not image_tokenizer:
        logger.warning("no MoVQGAN beside %s: the export holds none; give --movqgan_path when generating",
                       " or ".join(map(str, sources)) or output_dir)  # fmt: skip
    return found + image_tokenizer


def find(output_dir: Path, step: int | None = None) -> Path:
    """Raises: InputError: there is no checkpoint, or none of that step."""
    if step is None:
        if (found := newest(output_dir)) is None:
            raise InputError(f"--output_dir {output_dir} holds no checkpoint to export; train first")
        return found
    place = output_dir / "checkpoints" / name_of(step)
    if not place.is_dir():
        there = ", ".join(str(step_of(path)) for path in checkpoints_of(output_dir))
        raise InputError(f"--step {step} is not there; --output_dir {output_dir} holds {there or 'none'}")
    return place
