"""Pictures on disk: whole or not at all, never over an existing one, with their settings inside."""

import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from lumina_mgpt.errors import InputError

# Enough for any small picture, so that a folder on a full disk is noticed before an hour of work and not after it.
_PROBE_BYTES = 1 << 18


class OutputFolder:
    """The folder that results are written to. A file gets its name only once all of it is on the disk."""

    def __init__(self, folder: str | Path, overwrite: bool = False, shared: bool = False) -> None:
        """`shared`: other processes write there too, so that what is there may not be removed, empty as it may be."""
        self.folder = Path(folder)
        self.overwrite, self.shared = overwrite, shared

    def claim(self, names: Iterable[str], keep: Iterable[Path] = ()) -> None:
        """Checks that all of `names` may be written; call it before the work begins. Writes nothing that stays.

        Raises:
            InputError: one of them exists, or is a file to `keep`, or the folder cannot be made or written to.
        """
        taken = [name for name in names if os.path.exists(self.folder / name)]  # False where it may not be looked at
        for given in keep:
            if any(os.path.samefile(self.folder / name, given) for name in taken):
                raise InputError(f"--save_path {self.folder}: a result would replace {given}, which was given; give "
                                 "another folder")  # fmt: skip
        if taken and not self.overwrite:
            others = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
            raise InputError(
                f"--save_path {self.folder} has {taken[0]}{others} already; give another folder, or --overwrite"
            )
        made = [folder for folder in (self.folder, *self.folder.parents) if not os.path.exists(folder)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe-") as probe:
                probe.write(bytes(_PROBE_BYTES))
                probe.flush()
        except OSError as error:
            raise self._failure("files", error) from None
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
            raise InputError(f"--save_path {self.folder}: {name} appeared meanwhile and is kept; give another folder")
        info = PngInfo()
        for key, value in (text or {}).items():
            info.add_itxt(key, str(value))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._write(name, image, info)
        except OSError as error:
            raise self._failure(name, error) from None
        return path

    def discard(self, name: str) -> None:
        """Removes a file of this run, if it is there."""
        (self.folder / name).unlink(missing_ok=True)

    def _write(self, name: str, image: Image.Image, info: PngInfo) -> None:
        temporary = self.folder / f".{name}.{os.getpid()}.part"
        try:
            with open(temporary, "wb") as file:
                image.save(file, format="PNG", pnginfo=info)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.folder / name)
        except BaseException:  # Ctrl-C too must leave no half of a file
            temporary.unlink(missing_ok=True)
            raise

    def _failure(self, name: str, error: OSError) -> InputError:
        reason = error.strerror or str(error)
        return InputError(
            f"--save_path {self.folder}: cannot write {name} there ({reason}); free some space or give another folder"
        )
