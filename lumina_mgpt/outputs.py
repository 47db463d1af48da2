"""Writes pictures atomically, with their settings as PNG text. Existing files are kept unless the caller overrides."""

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, partial_path, remedy, replacing

_PROBE_BYTES = 1 << 18  # about one picture: a full disk is an error before an hour of work, not after it
_ABANDONED_AFTER = 3600  # seconds without a change: writing takes a few seconds, so the process was killed
_PARTIAL = re.compile(r"\.(.+)\.\d+\.part", re.DOTALL)


class OutputFolder:
    """A folder for results. A file gets its name only when it is complete."""

    def __init__(
        self, folder: str | Path, overwrite: bool = False, shared: bool = False, parameter: str = "save_path"
    ) -> None:
        """Writes nothing yet.

        Args:
            shared: other processes write to the folder, too, so it must not be removed even when it is empty.
            parameter: name of the folder in errors.
        """
        self.folder = Path(folder)
        self.overwrite, self.shared, self.parameter = overwrite, shared, parameter

    def claim(self, names: Iterable[str], keep: Iterable[Path] = (), temporary: Iterable[str] = ()) -> None:
        """Checks before sampling that all of `names` can be written; leaves no new file or folder.

        Args:
            names: file names of the results.
            keep: files that no result may replace, such as inputs.
            temporary: names of files that the run removes at its end. They may exist, as a killed run leaves them.

        Raises:
            InputError: a result exists, a result would replace one of `keep`, the folder cannot be created or written,
                or a name is too long.
        """
        names, temporary = list(names), list(temporary)
        taken = [name for name in names if os.path.exists(self.folder / name)]  # False without permission
        left = [name for name in temporary if os.path.exists(self.folder / name)]
        for given in keep:
            if any(os.path.samefile(self.folder / name, given) for name in taken + left):
                raise InputError(
                    f"{self.folder}: a result would replace {given}, an input; give another folder", self.parameter
                )
        if taken and not self.overwrite:
            others = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            raise InputError(
                f"{self.folder} already has {taken[0]}{others}; give another folder, or overwrite=True", self.parameter
            )
        made = [folder for folder in (self.folder, *self.folder.parents) if not os.path.exists(folder)]
        longest = max([*names, *temporary, "files"], key=lambda name: len(os.fsencode(name)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove_abandoned({*names, *temporary})
            self._probe(longest)
        except OSError as error:
            raise self._failure(longest, error) from None
        finally:
            # Innermost first. The run creates them again when it saves its first result.
            for folder in () if self.shared else made:
                try:
                    folder.rmdir()
                except OSError:
                    break

    def save(
        self, name: str, image: Image.Image, text: Mapping[str, object] | None = None, *, again: bool = False
    ) -> Path:
        """Writes `image` as the PNG file `name` with `text` inside and returns its path.

        Args:
            text: keys and values of the PNG text chunks.
            again: whether the file may replace an earlier version from this run.

        Raises:
            InputError: the file exists and must not be replaced, or it cannot be written.
        """
        path = self.folder / name
        if os.path.exists(path) and not (self.overwrite or again):
            rule = f"now has {name}, which another program wrote"
            raise InputError(f"{self.folder} {rule}; give another folder", self.parameter)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                image.save(file, format="PNG", pnginfo=png_text(text or {}))
        except OSError as error:
            raise self._failure(name, error) from None
        return path

    def discard(self, name: str) -> None:
        """Removes a file of this run, if it exists."""
        (self.folder / name).unlink(missing_ok=True)

    def _probe(self, name: str) -> None:
        """Writes and removes a temporary file, as for a result of that name."""
        partial = partial_path(self.folder / name)
        try:
            partial.write_bytes(bytes(_PROBE_BYTES))
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _remove_abandoned(self, names: set[str]) -> None:
        """Removes incomplete files of these names that killed processes left."""
        with suppress(OSError):  # the folder cannot be listed, or another process removes them, too
            for path in self.folder.iterdir():
                found = _PARTIAL.fullmatch(path.name)
                if found and found[1] in names and time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                    path.unlink()

    def _failure(self, name: str, error: OSError) -> InputError:
        advice = remedy(error, "give another folder")
        return InputError(f"{self.folder}: cannot write {name} there ({cause(error)}); {advice}", self.parameter)


def png_text(text: Mapping[str, object]) -> PngInfo:
    """Returns `text` as PNG text chunks, one per key.

    A backslash escapes characters that PNG text cannot hold: null characters and surrogates. Python uses surrogates
    in file names that are not UTF-8.
    """
    info = PngInfo()
    for key, value in text.items():
        encodable = str(value).encode("utf-8", "backslashreplace").decode()
        info.add_itxt(key, encodable.replace("\0", "\\x00"))
    return info
