"""Loads the image tokenizer of a checkpoint: from its file, or from the files of the language model."""

from pathlib import Path

import torch

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.names import UNUSED_PREFIX
from lumina_mgpt.model.reading import read_prefixed
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer, missing_file


def load_image_tokenizer(
    model_folder: str | Path,
    path: str | Path | None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    kind: str = "movqgan",
) -> ImageTokenizer:
    """Returns the image tokenizer of a checkpoint.

    Without a file, a checkpoint of the first generation may still have the encoder: as tensors `model.vqmodel.*` in the
    files of the language model. The image tokenizer then reads images, but makes none.

    Args:
        model_folder: folder of the checkpoint.
        path: what `look_for_image_tokenizer` returned for it.
        dtype: type of the decoder. Encoder and codebook are at least float32.
        kind: `movqgan` or `vqgan`, as `config.family.image_tokenizer` says.

    Raises:
        InputError: a file cannot be read, or there is neither a file nor such an encoder.
    """
    if path is not None:
        return ImageTokenizer.from_checkpoint(path, device, dtype)
    state = read_prefixed(model_folder, UNUSED_PREFIX) if kind == "vqgan" else {}
    if not state:
        raise InputError(missing_file(model_folder, kind))
    return ImageTokenizer.from_state(state, device, dtype, f"{model_folder} ({UNUSED_PREFIX}*)")
