"""Makes a checkpoint folder from an existing one: quantizes its weights to int4, or copies its companion files.

Companion files are those besides config.json and the weights, such as the tokenizer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lumina_mgpt.io import new_folder
from lumina_mgpt.model.names import companions_of
from lumina_mgpt.model.reading import load_model, require_plain_weights
from lumina_mgpt.model.writing import save_model


def quantize_checkpoint(
    source: Path, target: Path, group: int, on_read: Callable[[int, int], None] | None = None
) -> None:
    """Writes the checkpoint in `source` to `target` with int4 weights. Copies its tokenizer and MoVQGAN files.

    Tensors that are not quantized keep their dtype. Memory holds the int4 model and one tensor of `source` at a time.
    After an error or an interrupt, no files of the new checkpoint remain.

    Args:
        group: number of weights that share a scale: 32, 64 or 128.
        on_read: called after each tensor with the number of weights read so far and the number of all weights.

    Raises:
        InputError: the source is int4 already, `group` does not divide the inputs of a matrix, or `target` is not
            empty or cannot be written.
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
    for file in companions_of(source):
        shutil.copyfile(file, target / file.name)
