"""Makes a checkpoint folder from an existing one: quantizes its weights to int4, or copies its companion files.

Companion files are those besides config.json and the weights, such as the tokenizer.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.families import VQGAN_ENCODER
from lumina_mgpt.io import new_folder, write_tensors
from lumina_mgpt.model.names import UNUSED_PREFIX, companions_of, is_vqgan
from lumina_mgpt.model.reading import load_model, read_prefixed, require_plain_weights
from lumina_mgpt.model.writing import save_model


def quantize_checkpoint(
    source: Path, target: Path, group: int, on_read: Callable[[int, int], None] | None = None
) -> None:
    """Writes the checkpoint in `source` to `target` with int4 weights. Copies its tokenizer and image tokenizer files.

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
    """Copies the tokenizer, name lists and image tokenizer of a checkpoint folder to another folder.

    Raises:
        InputError: the weight files of `source` are damaged.
        OSError: a file cannot be read or written.
    """
    files = companions_of(source)
    for file in files:
        shutil.copyfile(file, target / file.name)
    if not any(map(is_vqgan, files)):
        keep_encoder(source, target)


def keep_encoder(source: Path, target: Path) -> bool:
    """Writes the encoder in the language model's files of `source` to VQGAN_ENCODER in `target`.

    Files of the first generation may have one (`model.vqmodel.*`), which reads images where no VQGAN file is at hand.
    A model that this project writes lacks these tensors.

    Returns:
        Whether there is one.

    Raises:
        InputError: the weight files of `source` are damaged.
        OSError: the file cannot be written.
    """
    encoder = read_prefixed(source, UNUSED_PREFIX) if _is_first(source) else {}
    if encoder:
        write_tensors(target / VQGAN_ENCODER, encoder)
    return bool(encoder)


def _is_first(source: Path) -> bool:
    return ModelConfig.from_json(source / "config.json").family.image_tokenizer == "vqgan"
