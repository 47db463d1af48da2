"""What loading a pipeline checks and chooses before it reads weights."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lumina_mgpt.errors import InputError
from lumina_mgpt.model import attention
from lumina_mgpt.model.compiled import require_compiler
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.vqgan.tokenizer import find_image_tokenizer

if TYPE_CHECKING:
    from lumina_mgpt.model.parallel import Parallel


def opened(model_path: str | Path | Checkpoint, movqgan_path: str | Path | None) -> Checkpoint:
    """Returns the opened checkpoint, with `movqgan_path` as the file of its image tokenizer if that is given."""
    if not isinstance(model_path, Checkpoint):
        return Checkpoint.open(model_path, movqgan_path)
    if movqgan_path is None:
        return model_path
    kind = model_path.config.family.image_tokenizer
    return replace(model_path, movqgan_path=find_image_tokenizer(model_path.folder, movqgan_path, kind))


def kept_columns(checkpoint: Checkpoint, text: bool | None, parallel: "Parallel | None") -> slice | None:
    """Returns the vocabulary ids whose output projection is kept; None for all.

    Arguments: as `Pipeline.from_pretrained`.

    Raises:
        InputError: text is asked for, but several processes hold the model.
    """
    codes = checkpoint.vocabulary.code_slice
    if parallel:
        if text:
            raise InputError("cannot be True for a model that several processes hold; leave it out", "text")
        return parallel.code_part(codes)
    return None if (checkpoint.config.family.answers_in_text if text is None else text) else codes


def check_format(name: str, dtype: object, *others: torch.dtype) -> None:
    """Checks a format.

    Raises:
        InputError: `dtype` is neither a floating-point format nor one of `others`.
    """
    if not isinstance(dtype, torch.dtype) or not (dtype.is_floating_point or dtype in others):
        choices = " or ".join(["a floating-point torch.dtype", *map(str, others)])
        raise InputError(f"must be {choices}, got {dtype!r}", name)


def check_backend(name: str, device: torch.device, compile: bool) -> None:
    """Checks an attention backend and compilation before anything is loaded.

    Raises:
        InputError: the backend is unknown or lacks its package, it cannot be compiled, or there is no compiler.
    """
    attention.backend(name)
    if compile and name == "flash":
        raise InputError("flash cannot be compiled; leave compile out, or use attn=sdpa", "attn")
    if compile:
        require_compiler(device)


def check_flash(device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype | None) -> None:
    """Checks the formats for flash attention.

    Raises:
        InputError: flash attention does not support the device or a format.
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        raise InputError(
            f"flash needs device=cuda and dtype=bf16 or dtype=fp16, got {device} and {dtype}; use attn=sdpa", "attn"
        )
    if cache_dtype == torch.int8:
        raise InputError("flash does not read an int8 cache; use attn=sdpa, or leave cache_dtype out", "attn")
