"""A folder of pictures as a record file: captions lie beside the pictures, or in them."""

import logging
import os
import stat
import warnings
from collections import defaultdict
from pathlib import Path

from PIL import Image

from lumina_mgpt.data.captions import RESOURCE_FORK, caption_of
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import picture_suffixes
from lumina_mgpt.io import cause, decode_text, remedy

log = logging.getLogger(__name__)


def read_folder(path: str | Path) -> list[dict | InputError]:
    """Records in the forms of `records.parse_record`, one for each picture in the folder and those below it, by name.

    The prompt is the text of `cat.txt` beside `cat.png`. Without such a file it is the `prompt` that generate.py writes
    into its pictures. A picture that has no usable caption, and a caption that has no picture, is represented by the
    InputError that says why; those of captions come last. A linked folder is read too, each folder once.

    Raises:
        InputError: there is no picture, or a folder cannot be read.
    """
    files = _files(Path(path))
    forks = [file for file in files if file.name.startswith(RESOURCE_FORK)]
    if forks:
        log.warning("%s: files skipped, as they begin with %s (macOS metadata): %d", path, RESOURCE_FORK, len(forks))
    groups: dict[Path, list[Path]] = defaultdict(list)
    for file in sorted(set(files).difference(forks)):
        groups[file.with_name(file.stem)].append(file)
    pictures = {file: group for group in groups.values() for file in group if _kind(file) in picture_suffixes()}
    if not pictures:
        raise InputError(f"--in_filename {path} is a folder without pictures; put PNG, JPEG, WebP or other picture "
                         "files there, each with its caption in a .txt file of the same name")  # fmt: skip
    rows = [_row(picture, pictures[picture]) for picture in sorted(pictures)]
    return rows + [_unused(group) for group in groups.values() if _captions(group) and not pictures.keys() & set(group)]


def _files(root: Path) -> list[Path]:
    """All files below a folder. Links to folders are followed last, so that a file keeps its path without a link."""
    seen: set[tuple[int, int]] = set()
    files, waiting = [], [root]
    while waiting:
        for folder, below, names in os.walk(waiting.pop(0), onerror=_unreadable):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            files += [Path(folder, name) for name in names]
            waiting += [link for name in sorted(below) if (link := Path(folder, name)).is_symlink()]
    return files


def _unreadable(error: OSError) -> None:
    raise InputError(f"--in_filename: {error.filename} cannot be read ({cause(error)}); {remedy(error)}") from None


def _kind(file: Path) -> str:
    return file.suffix.lower()


def _captions(group: list[Path]) -> list[Path]:
    return [file for file in group if _kind(file) == ".txt"]


def _row(picture: Path, group: list[Path]) -> dict | InputError:
    """The record of a picture; `group` holds all files of its name."""
    try:
        return {"image_path": str(picture), "prompt": _prompt(picture, group)}
    except InputError as error:
        return error


def _prompt(picture: Path, group: list[Path]) -> str:
    """The caption of a picture. Raises InputError where there is none, or it may be another picture's."""
    captions = _captions(group)
    if len(captions) > 1:
        raise InputError(f"{picture} has the captions {_names(captions)}; keep one")
    if captions:
        rivals = [file for file in group if _kind(file) in picture_suffixes()]
        if len(rivals) > 1:
            raise InputError(f"{captions[0]} may describe any of {_names(rivals)}; keep one picture of that name")
        return caption_of(decode_text(_read(captions[0]), str(captions[0])), str(captions[0]))
    prompt = _generated_prompt(picture)
    if not prompt:
        raise InputError(f"{picture} has no caption: {picture.stem}.txt is missing, and generate.py has written no "
                         "prompt into the picture; write the file")  # fmt: skip
    return prompt


def _read(file: Path) -> bytes:
    try:
        if not stat.S_ISREG(file.stat().st_mode):  # reading a pipe would wait for ever
            raise InputError(f"{file} is no regular file; replace it by one")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file} cannot be read ({cause(error)}); {remedy(error)}") from None


def _generated_prompt(picture: Path) -> str:
    """The prompt in a PNG that this project wrote; "" in others, whose `prompt` may mean anything (ComfyUI: a graph).

    Raises:
        InputError: the file is no regular file.
    """
    try:
        regular = stat.S_ISREG(picture.stat().st_mode)
    except OSError as error:
        raise InputError(f"{picture} cannot be read ({cause(error)}); {remedy(error)}") from None
    if not regular:
        raise InputError(f"{picture} is no regular file; replace it by one")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(picture, formats=("PNG",)) as image:  # reads only the chunks before the pixels
                ours = str(image.info.get("software", "")).startswith("lumina_mgpt ")
                return str(image.info.get("prompt", "")).strip() if ours else ""
    except Exception:  # not a PNG, or a damaged one
        return ""


def _unused(group: list[Path]) -> InputError:
    """Why a caption is of no use."""
    others = [file for file in group if _kind(file) != ".txt"]
    if others:
        return InputError(f"{_names(others)} has a caption, and no format that can be read; save it as PNG, JPEG or "
                          "WebP")  # fmt: skip
    return InputError(f"{group[0]} is a caption without a picture; put the picture beside it, or remove it")


def _names(files: list[Path]) -> str:
    """The first file with its folder, then the names of the others."""
    return " and ".join([str(files[0]), *(file.name for file in files[1:])])
