"""A checkpoint folder made into another one: int4 weights, for now."""

import shutil
from collections.abc import Callable
from pathlib import Path

from lumina_mgpt.io import new_folder, require_new
from lumina_mgpt.model.names import COMPANIONS
from lumina_mgpt.model.reading import load_model, require_plain_weights
from lumina_mgpt.model.writing import save_model


def quantize_checkpoint(
    source: Path, target: Path, group: int, on_read: Callable[[int, int], None] | None = None
) -> None:
    """Writes the checkpoint in `source` with int4 weights in groups of `group`; tokenizer and MoVQGAN files come along.

    Tensors that stay as they are keep their dtype. Memory: the int4 model, and one tensor. `on_read` is told how many
    weights are done, and of how many. Whatever ends this early leaves nothing.

    Raises:
        InputError: the source is int4 already or cannot be quantized so, or the target is taken or cannot be written.
    """
    require_plain_weights(source, "model_path", "quantized again")
    with new_folder(target, "--save_path") as part:
        save_model(load_model(source, None, "cpu", quant=group, on_read=on_read), part)
        copy_companions(source, part)


def copy_companions(source: Path, target: Path) -> None:
    """Copies tokenizer, lists of names and MoVQGAN of a checkpoint folder into another one.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        shutil.copyfile(file, target / file.name)


def check_target(target: Path) -> None:
    """Refuses a --save_path where something is already; an empty folder is allowed.

    Raises:
        InputError: something is there, or the path cannot be examined.
    """
    require_new(target, "--save_path")
