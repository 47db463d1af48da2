"""Makes a checkpoint folder from another one: with int4 weights, or with the companion files of the first."""

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
    """Writes the checkpoint in `source` with int4 weights to `target`, with its tokenizer and MoVQGAN files.

    Tensors that are not quantized keep their dtype. Memory holds the int4 model and one tensor. An error or an
    interrupt leaves no files.

    Args:
        group: number of weights that share a scale: 32, 64 or 128.
        on_read: called with the number of weights read and the total, after each tensor.

    Raises:
        InputError: the source is int4 already, `group` does not divide a matrix, or `target` exists or cannot be
            written.
    """
    require_plain_weights(source, "model_path", "quantized again")
    with new_folder(target, "save_path") as part:
        save_model(load_model(source, None, "cpu", quant=group, on_read=on_read), part)
        copy_companions(source, part)


def copy_companions(source: Path, target: Path) -> None:
    """Copies the tokenizer, name lists and MoVQGAN of a checkpoint folder to another folder.

    Raises:
        OSError: a file cannot be read or written.
    """
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        shutil.copyfile(file, target / file.name)


def check_target(target: Path) -> None:
    """Refuses a folder for a new checkpoint that exists and is not empty.

    Raises:
        InputError: the folder is not empty, or cannot be examined.
    """
    require_new(target, "save_path")
