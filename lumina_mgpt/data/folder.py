"""Folder of pictures and captions -> rows for `parse_record`.

A caption is a text file beside its picture, or metadata in the picture. Next: inputs.py takes the rows.
"""

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
    """One row for each picture in a folder and its subfolders, sorted by path.

    The prompt of `cat.png` is the text of `cat.txt` in the same folder. Without `cat.txt`, the prompt is read from the
    picture itself: this project writes it into the PNG files that it generates. Links to folders are followed, but each
    folder is read only once.

    Returns:
        Rows `{"image_path", "prompt"}`. An InputError replaces the row of a picture without a usable caption. At the
        end of the list, there is one more InputError for each caption without a picture.

    Raises:
        InputError: there is no picture, or a folder is not readable.
    """
    files = _files(Path(path))
    forks = [file for file in files if file.name.startswith(RESOURCE_FORK)]
    if forks:
        log.warning("%s: files skipped, as they begin with %s (macOS metadata): %d", path, RESOURCE_FORK, len(forks))
    groups: dict[Path, list[Path]] = defaultdict(list)  # path without extension -> files
    for file in sorted(set(files).difference(forks)):
        groups[file.with_name(file.stem)].append(file)
    pictures = {file: group for group in groups.values() for file in group if _suffix(file) in picture_suffixes()}
    if not pictures:
        raise InputError(
            f"{path} is a folder without pictures; put PNG, JPEG, WebP or other picture files there, each with its "
            "caption in a .txt file of the same name",
            "in_filename",
        )
    rows = [_row(picture, pictures[picture]) for picture in sorted(pictures)]
    return rows + [_unused(group) for group in groups.values() if _captions(group) and not pictures.keys() & set(group)]


def _files(root: Path) -> list[Path]:
    """All files below a folder. Links to folders come last, so that a file is found by its path without links."""
    seen: set[tuple[int, int]] = set()
    files, waiting = [], [root]
    while waiting:
        for folder, below, names in os.walk(waiting.pop(0), onerror=_refuse_folder):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                below.clear()
                continue
            seen.add((status.st_dev, status.st_ino))
            files += [Path(folder, name) for name in names]
            waiting += [link for name in sorted(below) if (link := Path(folder, name)).is_symlink()]
    return files


def _refuse_folder(error: OSError) -> None:
    raise InputError(str(_unreadable(error.filename, error)), "in_filename") from None


def _unreadable(path: str | Path, error: OSError) -> InputError:
    return InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}")


def _suffix(file: Path) -> str:
    return file.suffix.lower()


def _captions(group: list[Path]) -> list[Path]:
    return [file for file in group if _suffix(file) == ".txt"]


def _row(picture: Path, group: list[Path]) -> dict | InputError:
    """The row of a picture; `group` holds all files of its name, with any extension."""
    try:
        return {"image_path": str(picture), "prompt": _prompt(picture, group)}
    except InputError as error:
        return error


def _prompt(picture: Path, group: list[Path]) -> str:
    """The caption of a picture. Raises InputError if there is none, or if it may belong to another picture."""
    captions = _captions(group)
    if len(captions) > 1:
        raise InputError(f"{picture} has the captions {_names(captions)}; keep one")
    if captions:
        rivals = [file for file in group if _suffix(file) in picture_suffixes()]
        if len(rivals) > 1:
            raise InputError(f"{captions[0]} may describe any of {_names(rivals)}; keep one picture of that name")
        return caption_of(decode_text(_read(captions[0]), str(captions[0])), str(captions[0]))
    prompt = _generated_prompt(picture)
    if not prompt:
        raise InputError(
            f"{picture} has no caption: there is no {picture.stem}.txt, and no prompt of lumina_mgpt in the picture; "
            f"write {picture.stem}.txt"
        )
    return prompt


def _require_regular(file: Path) -> None:
    """Raises InputError for pipes and devices, whose reading may block forever, and for unreadable paths."""
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError as error:
        raise _unreadable(file, error) from None
    if not regular:
        raise InputError(f"{file} is not a regular file; replace it by one")


def _read(file: Path) -> bytes:
    _require_regular(file)
    try:
        return file.read_bytes()
    except OSError as error:
        raise _unreadable(file, error) from None


def _generated_prompt(picture: Path) -> str:
    """The prompt in a PNG file that this project generated, "" for other files.

    Other programs write `prompt`, too, with another meaning: ComfyUI stores a graph there.

    Raises:
        InputError: the file is not a regular file.
    """
    _require_regular(picture)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(picture, formats=("PNG",)) as image:  # reads only the chunks before the pixels
                ours = str(image.info.get("software", "")).startswith("lumina_mgpt ")
                return str(image.info.get("prompt", "")).strip() if ours else ""
    except Exception:  # not a PNG, or a damaged one
        return ""


def _unused(group: list[Path]) -> InputError:
    """The reason why a caption has no picture."""
    others = [file for file in group if _suffix(file) != ".txt"]
    if others:
        return InputError(
            f"{_names(others)} has a caption, but no picture format that can be read; save it as PNG, JPEG or WebP"
        )
    return InputError(f"{group[0]} is a caption without a picture; put the picture beside it, or remove it")


def _names(files: list[Path]) -> str:
    """The path of the first file, and the names of the others."""
    return " and ".join([str(files[0]), *(file.name for file in files[1:])])
