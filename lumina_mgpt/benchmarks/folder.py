"""The output folder of a benchmark: which images are done, and how images, tiles and texts get there.

A file gets its name only when it is complete. Until then it is in the folder `.part`, so that folders that a scorer
lists hold nothing else, whenever a process is killed.
"""

import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from PIL import Image

from lumina_mgpt.benchmarks.layouts import Benchmark, columns
from lumina_mgpt.benchmarks.lists import Item
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy
from lumina_mgpt.outputs import png_text

MANIFEST = "manifest.json"
_PARTIAL = ".part"
_ABANDONED_AFTER = 3600  # seconds without a change: writing takes a few seconds, so the process was killed
_SIGNATURE, _END = b"\x89PNG\r\n\x1a\n", b"IEND\xaeB`\x82"  # first and last bytes of a PNG file


class BenchmarkFolder:
    """The images of one run over a benchmark's list.

    Args:
        path: output folder.
        benchmark: layout of the files.
        items: the prompts.
        images: images of each prompt.
        parameter: name of the folder in errors.
    """

    def __init__(
        self, path: str | Path, benchmark: Benchmark, items: tuple[Item, ...], images: int, parameter: str = "save_path"
    ) -> None:
        self.path, self.benchmark, self.items, self.images = Path(path), benchmark, items, images
        self.parameter = parameter

    def open(self) -> None:
        """Creates the folder and checks that files can be written.

        Raises:
            InputError: the folder holds files of something else, or cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            others = [file.name for file in self.path.iterdir() if not file.name.startswith(".")]
            if others and not (self.path / MANIFEST).exists():
                # A run writes the manifest first. If another process of this run has begun, the manifest is there.
                rule = f"{self.path} must be new, empty or hold {MANIFEST} of an earlier run, got {sorted(others)[0]}"
                raise InputError(f"{rule}; give another folder", self.parameter)
            self._remove_abandoned()
            self._write(".probe", bytes(1 << 18))  # about one picture
            (self.path / ".probe").unlink(missing_ok=True)  # another process may have removed it
        except OSError as error:
            raise self._failure(error) from None

    def is_done(self, item: Item, number: int) -> bool:
        """Returns whether the image was saved, and its file is complete."""
        return is_whole_png(self.path / self.image_name(item, number))

    def image_name(self, item: Item, number: int) -> str:
        """Returns the path of an image, relative to the folder."""
        return self.benchmark.image(item, number, self.images)

    def save_image(self, item: Item, number: int, image: Image.Image, text: Mapping[str, object]) -> Path:
        """Saves an image with `text` inside, and the tile of its item if this is its last image. Returns its path.

        Raises:
            InputError: the file cannot be written.
        """
        path = self._save(self.image_name(item, number), image, text)
        self.finish(item)
        return path

    def finish(self, item: Item) -> None:
        """Writes the tile of an item if all its images are done, and the tile is missing or incomplete.

        Of several processes, the one that saves the last image finds all of them. If two find them at the same time,
        both write the same tile.
        """
        if self.benchmark.tile is None or is_whole_png(self.path / self.benchmark.tile(item)):
            return
        if all(self.is_done(item, number) for number in range(self.images)):
            images = []
            for number in range(self.images):
                with Image.open(self.path / self.image_name(item, number)) as image:
                    images.append(image.convert("RGB"))
            self._save(self.benchmark.tile(item), tile(images), {"prompt": item.prompt})

    def write_texts(self) -> None:
        """Writes the text files of the layout that are missing.

        Raises:
            InputError: a file cannot be written.
        """
        for name, content in self.benchmark.texts(self.items, self.images).items():
            if not (self.path / name).exists():
                self.write(name, content)

    def write(self, name: str, content: str) -> None:
        """Writes a text file.

        Raises:
            InputError: the file cannot be written.
        """
        try:
            self._write(name, content.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise self._failure(error) from None

    def close(self) -> None:
        """Removes the folder for incomplete files, unless another process uses it."""
        with suppress(OSError):
            (self.path / _PARTIAL).rmdir()

    def _remove_abandoned(self) -> None:
        """Removes incomplete files of killed processes."""
        with suppress(OSError):  # there is no such folder, or another process removes them, too
            for file in (self.path / _PARTIAL).iterdir():
                if time.time() - file.stat().st_mtime > _ABANDONED_AFTER:
                    file.unlink()

    def _save(self, name: str, image: Image.Image, text: Mapping[str, object]) -> Path:
        try:
            with self._replacing(name) as partial:
                image.save(partial.path, format="PNG", pnginfo=png_text(text))
        except OSError as error:
            raise self._failure(error) from None
        return self.path / name

    def _write(self, name: str, content: bytes) -> None:
        with self._replacing(name) as partial:
            partial.path.write_bytes(content)

    def _replacing(self, name: str) -> "_Partial":
        return _Partial(self.path / _PARTIAL, self.path / name)

    def _failure(self, error: OSError) -> InputError:
        return InputError(
            f"{self.path} cannot be written ({cause(error)}); {remedy(error, 'give another folder')}", self.parameter
        )


class _Partial:
    """A temporary file that gets its name at the end of a `with` block, if the block does not raise."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self.target = folder, target
        self.path = folder / f"{platform.node()}.{os.getpid()}"

    def __enter__(self) -> "_Partial":
        self.target.parent.mkdir(parents=True, exist_ok=True)
        self.folder.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                with open(self.path, "rb+") as file:
                    os.fsync(file.fileno())
                os.replace(self.path, self.target)
        finally:
            with suppress(OSError):
                self.path.unlink(missing_ok=True)


def is_whole_png(path: Path) -> bool:
    """Returns whether a file begins and ends as a PNG does. A file that was cut short does not."""
    try:
        with open(path, "rb") as file:
            start = file.read(len(_SIGNATURE))
            file.seek(-len(_END), os.SEEK_END)
            return start == _SIGNATURE and file.read() == _END
    except OSError:  # missing, or shorter
        return False


def tile(images: Iterable[Image.Image]) -> Image.Image:
    """Returns one picture of all images, left to right, then top to bottom. Cells without an image are black.

    The images have the same size.
    """
    images = list(images)
    across = columns(len(images))
    width, height = images[0].size
    picture = Image.new("RGB", (across * width, -(-len(images) // across) * height))
    for number, image in enumerate(images):
        picture.paste(image, (number % across * width, number // across * height))
    return picture
