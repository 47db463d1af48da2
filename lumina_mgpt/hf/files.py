"""The files of a checkpoint folder, as `from_pretrained` finds and `save_pretrained` writes them."""

import os
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.image_tokenizer import load_image_tokenizer
from lumina_mgpt.io import cause, read_json, remedy
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.model.names import INDEX, companions_of
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import KINDS, ImageTokenizer, look_for_image_tokenizer

_HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")
_MODULE = "modeling_lumina_mgpt"
_CONFIG, _MODEL, _PROCESSOR = (f"LuminaMGPT{part}" for part in ("Config", "ForConditionalGeneration", "Processor"))
_AUTO_MODELS = ("AutoModel", "AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM")
# `auto_map` of a saved config.json. With trust_remote_code, transformers imports the names from the folder's module.
AUTO_MAP = {
    "AutoConfig": f"{_MODULE}.{_CONFIG}",
    "AutoProcessor": f"{_MODULE}.{_PROCESSOR}",
    **{name: f"{_MODULE}.{_MODEL}" for name in _AUTO_MODELS},
}
_SOURCE = f'''"""Loads this checkpoint with transformers. It needs the package lumina-mgpt."""

from lumina_mgpt.hf import {_CONFIG}, {_MODEL}, {_PROCESSOR}

__all__ = ["{_CONFIG}", "{_MODEL}", "{_PROCESSOR}"]
'''

_loaded: WeakValueDictionary[tuple, ImageTokenizer] = WeakValueDictionary()


def folder_of(source: str | os.PathLike, options: dict[str, Any], weights: bool = True) -> Path:
    """Returns the local folder of a checkpoint, which is downloaded if `source` is a hub id.

    Args:
        options: arguments of `from_pretrained`. Those of the hub are removed.
        weights: whether a local folder must hold weights.

    Raises:
        InputError: there is no such folder or hub id, or the checkpoint is incomplete.
    """
    hub = {name: options.pop(name) for name in _HUB_OPTIONS if options.get(name) not in (None, False)}
    with caused_by("pretrained_model_name_or_path"):
        folder = Path(source).expanduser()
        if not weights and (folder / "config.json").is_file():
            return folder
        return resolve(Path(source) if folder.exists() else str(source), **hub)


def open_checkpoint(folder: Path, movqgan_path: str | os.PathLike | None = None) -> Checkpoint:
    """Opens a checkpoint as `Checkpoint.open` does. The image tokenizer's file may be missing: training needs none.

    Raises:
        InputError: a file is missing or damaged.
    """
    config = ModelConfig.from_json(folder / "config.json")
    explicit = None if movqgan_path is None else Path(movqgan_path)
    path = look_for_image_tokenizer(folder, explicit, config.family.image_tokenizer)
    return Checkpoint(folder, config, Vocabulary.from_folder(folder, config), path)


def image_tokenizer(checkpoint: Checkpoint, device: torch.device) -> ImageTokenizer:
    """Returns the image tokenizer of a checkpoint. Model and processor on one device share it.

    Raises:
        InputError: its file is missing, damaged, or of another model.
    """
    key = checkpoint.folder, checkpoint.movqgan_path, device
    found = _loaded.get(key)
    if found is None:
        kind = checkpoint.config.family.image_tokenizer
        found = load_image_tokenizer(checkpoint.folder, checkpoint.movqgan_path, device, kind=kind)
        found.require_codes(checkpoint.config, found.source)
        _loaded[key] = found
    return found


def drop_stale_index(folder: str | os.PathLike) -> None:
    """Removes the index of an earlier save whose shards are gone. transformers leaves it, and readers prefer it."""
    index = Path(folder) / INDEX
    if index.is_file():
        shards = set(read_json(index).get("weight_map", {}).values())
        if not all((index.parent / str(name)).is_file() for name in shards):
            index.unlink()


def copy_files(checkpoint: Checkpoint, folder: str | os.PathLike) -> None:
    """Copies tokenizer, name lists and image tokenizer of a checkpoint, and writes the module of AUTO_MAP.

    With config.json and weights, the folder is then complete.

    Raises:
        InputError: a file cannot be written.
    """
    target = Path(folder)
    copies = {
        file.name: file
        for file in companions_of(checkpoint.folder)
        if "vqgan" not in file.name and file.name != "generation_config.json"
    }
    if (path := checkpoint.movqgan_path) is not None:
        kind = checkpoint.config.family.image_tokenizer
        known = any(fnmatch(path.name, pattern) for pattern in KINDS[kind].patterns)
        copies[path.name if known else f"{kind}{path.suffix}"] = path
    try:
        target.mkdir(parents=True, exist_ok=True)
        for name, source in copies.items():
            if not (target / name).exists() or not os.path.samefile(source, target / name):
                shutil.copyfile(source, target / name)
        (target / f"{_MODULE}.py").write_text(_SOURCE, encoding="utf-8")
    except OSError as error:
        raise unwritable(target, error) from None


def unwritable(folder: str | os.PathLike, error: Exception) -> InputError:
    """Returns the error for a folder in which a file cannot be written."""
    advice = remedy(error) if isinstance(error, OSError) else "give another folder"
    return InputError(f"{os.fspath(folder)} cannot be written ({cause(error)}); {advice}", "save_directory")
