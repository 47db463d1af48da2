"""Exports a training checkpoint as a model folder in the released layout."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_mgpt.devices import DTYPES
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.io import cause, new_folder, remedy, require_new, write_atomic
from lumina_mgpt.model.convert import keep_encoder
from lumina_mgpt.model.names import companions_of, is_vqgan
from lumina_mgpt.model.writing import save_model
from lumina_mgpt.training import base
from lumina_mgpt.training.adapters import plain_copy
from lumina_mgpt.training.loading import trained_model
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.run_folder import find
from lumina_mgpt.training.state import read_state
from lumina_mgpt.vqgan.tokenizer import KINDS, Names

logger = logging.getLogger(__name__)


def export_checkpoint(
    output_dir: str | Path,
    folder: str | Path | None = None,
    dtype: str = "bf16",
    checkpoint: Path | None = None,
    parameter: str = "export_dir",
) -> Path:
    """Writes a training checkpoint as a model folder in the released layout, and returns that folder.

    Adapters are merged into the weights. The export also holds the tokenizer and the image tokenizer. The function
    runs in one process. It needs memory for the weights once, and twice if there are adapters. It does not disturb a
    training that runs in `output_dir`.

    Args:
        output_dir: output folder of the run.
        folder: folder to write; `output_dir/export` if None. A former export in it is replaced.
        dtype: number format of the weights, a key of DTYPES.
        checkpoint: checkpoint to export; the newest if None.
        parameter: option that gave `folder`; error messages name it.

    Raises:
        InputError: there is no checkpoint, it is damaged, or `folder` cannot be written. Nothing is written then.
    """
    output_dir = Path(output_dir)
    folder = Path(folder) if folder else output_dir / "export"
    checkpoint = checkpoint or find(output_dir)
    model, settings = trained_model(checkpoint)
    require_export_folder(folder, settings, parameter)
    sources = _sources(settings, read_state(checkpoint).get("base"))
    companions = _all_companions(output_dir, settings, sources, KINDS[model.config.family.image_tokenizer])
    model = plain_copy(model, DTYPES[dtype], "cpu") if settings.model.lora_rank else model
    with _new_or_renewed(folder, parameter) as part:
        save_model(model, part, DTYPES[dtype])
        for file, name in companions.items():
            shutil.copyfile(file, part / name)
        if not any(is_vqgan(part / name) for name in companions.values()):
            _without_image_tokenizer(model.config.family, sources, part)
    return folder


def require_export_folder(folder: Path, settings: TrainingConfig, parameter: str) -> None:
    """Checks that an export can be written to a folder, so that a bad folder is found before the training.

    The folder may be new, empty, or hold a former export.

    Args:
        settings: configuration of the run that is exported.
        parameter: option that gave `folder`; the error names it.

    Raises:
        InputError: `folder` is a file, cannot be examined, or is the base checkpoint of the run.
    """
    try:
        if not os.path.isdir(folder) or not any(os.scandir(folder)):
            require_new(folder, parameter)
            return
        source = os.path.expanduser(settings.model.init_from or "")
        if os.path.isdir(source) and os.path.samefile(folder, source):
            raise InputError(
                f"{folder} is the folder of init_from={source}, whose weights an export would replace; give another "
                "folder",
                parameter,
            )
    except OSError as error:
        raise InputError(f"{folder} cannot be used ({cause(error)}); {remedy(error)}", parameter) from None


def keep_companions(source: str | Path, output_dir: Path) -> None:
    """Copies the files that accompany the weights, such as the tokenizer, to `output_dir/tokenizer`.

    Later exports read them there. The image tokenizer is not copied: it is large, and only the export reads it.

    Args:
        source: folder of the tokenizer that the run uses.
    """
    for file in companions_of(Path(source)):
        if not is_vqgan(file):
            (output_dir / "tokenizer").mkdir(parents=True, exist_ok=True)
            write_atomic(output_dir / "tokenizer" / file.name, file.read_bytes())


@contextmanager
def _new_or_renewed(folder: Path, parameter: str) -> Iterator[Path]:
    """Yields a hidden folder to write; when the block ends, its files replace those of a former export."""
    former = folder.is_dir() and any(folder.iterdir())
    target = folder / f".{os.getpid()}.new" if former else folder
    with new_folder(target, parameter) as part:
        yield part
    if former:
        names = {file.name for file in target.iterdir()}
        stale = set(folder.glob("model*.safetensors*"))  # a loader would read old shards or an old index
        if any(is_vqgan(file) for file in target.iterdir()):  # a loader would refuse two image tokenizers
            stale |= set(filter(is_vqgan, companions_of(folder)))
        for name in names:
            os.replace(target / name, folder / name)
        target.rmdir()
        for file in stale:
            if file.name not in names:
                file.unlink()


def _sources(settings: TrainingConfig, described: dict | None) -> list[Path]:
    """Returns the folders in which the image tokenizer of a run may be: those of its base and of its tokenizer.

    Args:
        described: what `base.describe` returned when the run started.
    """
    sources = []
    if settings.model.init_from:
        try:
            sources.append(base.locate(settings, described))
        except InputError as error:
            logger.warning("%s", error)
    if settings.model.tokenizer_path:
        sources.append(Path(settings.model.tokenizer_path))
    return sources


def _all_companions(output_dir: Path, settings: TrainingConfig, sources: list[Path], names: Names) -> dict[Path, str]:
    """Returns the tokenizer's files and the image tokenizer, with their names in the export.

    An image tokenizer that `movqgan_path` names gets a name by which it is found. The function logs if there is no
    tokenizer.
    """
    found = companions_of(output_dir / "tokenizer")
    if not any(file.name == "tokenizer.json" for file in found):
        logger.warning("%s holds no tokenizer: add one to the export before it is used", output_dir / "tokenizer")
    named = settings.logging.movqgan_path
    image_tokenizer = [Path(named)] if named else []
    for source in sources:
        if not any(file.is_file() for file in image_tokenizer):
            image_tokenizer = [file for file in companions_of(source) if is_vqgan(file)]
    copies = {file: file.name for file in (*found, *image_tokenizer) if file.is_file()}
    for file in image_tokenizer:
        if file in copies and not any(file.match(pattern) for pattern in names.patterns):
            copies[file] = f"{names.title.lower()}{file.suffix}"
    return copies


def _without_image_tokenizer(family: Family, sources: list[Path], part: Path) -> None:
    """Writes what a base without a file of the image tokenizer has of it, and logs what the export lacks."""
    names = KINDS[family.image_tokenizer]
    kept = any(keep_encoder(source, part) for source in sources if (source / "config.json").is_file())
    logger.warning(
        "no %s beside %s: the export holds %s; generation needs %s then",
        names.title,
        " or ".join(map(str, sources)) or "the run",
        "its encoder only" if kept else "none",
        names.option,
    )
