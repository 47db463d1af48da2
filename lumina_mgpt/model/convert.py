"""A checkpoint folder made into another one: int4 weights, for now."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.checkpoint import COMPANIONS, load_model, save_model


def quantize_checkpoint(
    source: Path, target: Path, group: int, on_read: Callable[[int, int], None] | None = None
) -> None:
    """Writes the checkpoint in `source` with int4 weights in groups of `group`; tokenizer and MoVQGAN files come along.

    All is written to a hidden folder beside `target`, which gets its name when nothing is missing: whatever ends this
    early leaves nothing. Tensors that stay as they are keep their dtype. Memory: the int4 model, and one tensor.
    `on_read` is told how many weights are done, and of how many.

    Raises:
        InputError: the source is int4 already or cannot be quantized so, or the target is taken or cannot be written.
    """
    if ModelConfig.from_json(source / "config.json").int4_group:
        raise InputError(f"--model_path {source} holds int4 weights already; give the checkpoint they were made of")
    check_target(target)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    made = next((folder for folder in reversed(target.parents) if not folder.exists()), None)
    try:
        part.mkdir(parents=True)
        model = load_model(source, None, "cpu", quant=group, on_read=on_read)
        save_model(model, part)
        copy_companions(source, part)
        if target.exists():
            target.rmdir()
        part.rename(target)
    except InputError as error:  # not in the words of the hidden folder
        raise InputError(str(error).replace(str(part), f"--save_path {target}")) from None
    except OSError as error:
        reason = error.strerror or error
        remedy = "free some space, or save elsewhere"
        raise InputError(f"--save_path {target} cannot be written ({reason}); {remedy}") from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
        if made and not target.exists():
            shutil.rmtree(made, ignore_errors=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, lists of names and MoVQGAN of a checkpoint folder into another one."""
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        shutil.copyfile(file, target / file.name)


def check_target(target: Path) -> None:
    """Refuses a place where something is already, but for an empty folder.

    Raises:
        InputError: there is something, or it may not be looked at.
    """
    try:
        taken = target.exists() and (not target.is_dir() or any(target.iterdir()))
    except OSError as error:
        raise InputError(f"--save_path {target} cannot be read ({error.strerror}); give another folder") from None
    if taken:
        raise InputError(f"--save_path {target} is there already, and is kept; give a new folder")
