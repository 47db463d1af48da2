"""Pictures on disk: whole or not at all, never over an existing one, with their settings inside."""

import os
import re
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy

# Enough for any small picture, so that a folder on a full disk is noticed before an hour of work and not after it.
_PROBE_BYTES = 1 << 18
_ABANDONED_AFTER = 3600  # seconds without a change: writing a picture takes a few, so its process was killed
_PARTIAL = re.compile(r"\.(.+)\.\d+\.part", re.DOTALL)


class OutputFolder:
    """The folder that results are written to. A file gets its name only once all of it is on the disk."""

    def __init__(
        self, folder: str | Path, overwrite: bool = False, shared: bool = False, option: str = "--save_path"
    ) -> None:
        """
        Args:
            shared: other processes write there too, so that what is there may not be removed, empty as it may be.
            option: what messages call the folder.
        """
        self.folder = Path(folder)
        self.overwrite, self.shared, self.option = overwrite, shared, option

    def claim(self, names: Iterable[str], keep: Iterable[Path] = (), temporary: Iterable[str] = ()) -> None:
        """Checks that all of `names` may be written; call it before the work begins. Writes nothing that stays.

        Args:
            names: of the results.
            keep: files that no result may replace.
            temporary: names of files that the run removes itself; a killed run may have left them, so they may exist.

        Raises:
            InputError: a result exists, or one of the files to `keep` would be replaced, or the folder cannot be made
                or written to, or a name is too long.
        """
        names, temporary = list(names), list(temporary)
        taken = [name for name in names if os.path.exists(self.folder / name)]  # False where it may not be looked at
        left = [name for name in temporary if os.path.exists(self.folder / name)]
        for given in keep:
            if any(os.path.samefile(self.folder / name, given) for name in taken + left):
                raise InputError(f"{self.option} {self.folder}: a result would replace {given}, which was given; give "
                                 "another folder")  # fmt: skip
        if taken and not self.overwrite:
            others = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            raise InputError(
                f"{self.option} {self.folder} has {taken[0]}{others} already; give another folder, or --overwrite"
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
            # Innermost first: what the check made must not stay behind if the run fails later.
            for folder in () if self.shared else made:
                try:
                    folder.rmdir()
                except OSError:
                    break

    def save(
        self, name: str, image: Image.Image, text: Mapping[str, object] | None = None, *, again: bool = False
    ) -> Path:
        """Writes `image` as the PNG `name` with `text` inside it; `again` allows to replace an earlier one of this run.

        Raises:
            InputError: the file exists and may not be overwritten, or it could not be written in full.
        """
        path = self.folder / name
        if os.path.exists(path) and not (self.overwrite or again):
            raise InputError(f"{self.option} {self.folder}: {name} appeared meanwhile and is kept; give another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(name, image, png_text(text or {}))
        except OSError as error:
            raise self._failure(name, error) from None
        return path

    def discard(self, name: str) -> None:
        """Removes a file of this run, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def _write(self, name: str, image: Image.Image, info: PngInfo) -> None:
        partial = self._partial(name)
        try:
            with open(partial, "wb") as file:
                image.save(file, format="PNG", pnginfo=info)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, self.folder / name)
        except BaseException:  # Ctrl-C too must leave no half of a file
            with suppress(OSError):  # or the reason would be lost
                partial.unlink(missing_ok=True)
            raise

    def _partial(self, name: str) -> Path:
        """Where a file is written before it gets its name."""
        return self.folder / f".{name}.{os.getpid()}.part"

    def _probe(self, name: str) -> None:
        """Writes as a result of that name is written, and removes it."""
        partial = self._partial(name)
        try:
            partial.write_bytes(bytes(_PROBE_BYTES))
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _remove_abandoned(self, names: set[str]) -> None:
        """Removes half-written files of these names that a killed process left."""
        with suppress(OSError):  # the folder cannot be listed, or another process removes them as well
            for path in self.folder.iterdir():
                found = _PARTIAL.fullmatch(path.name)
                if found and found[1] in names and time.time() - path.stat().st_mtime > _ABANDONED_AFTER:
                    path.unlink()

    def _failure(self, name: str, error: OSError) -> InputError:
        return InputError(f"{self.option} {self.folder}: cannot write {name} there ({cause(error)}); "
                          f"{remedy(error, 'give another folder')}")  # fmt: skip


def png_text(text: Mapping[str, object]) -> PngInfo:
    """PNG text chunks of `text`, which never fails: what they cannot hold is escaped with a backslash.

    These are null characters and the surrogates that stand for the bytes of a file name that is not UTF-8.
    """
    info = PngInfo()
    for key, value in text.items():
        encodable = str(value).encode("utf-8", "backslashreplace").decode()
        info.add_itxt(key, encodable.replace("\0", "\\x00"))
    return info
