"""Input of pre-tokenization -> rows.

The input is a `.json` or `.jsonl` file, a webdataset tar (archive.py) or a folder of pictures (folder.py).
Next: records.py parses each row into a Record.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from lumina_mgpt.data.archive import Archive
from lumina_mgpt.data.folder import read_folder
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import json_line, read_rows


@dataclass(frozen=True)
class Input:
    """Rows of a file or folder.

    Attributes:
        path: the file or folder.
        rows: raw records for `parse_record`. An InputError replaces a record that could not be made, and says why.
        digest: hash of the content. It detects an input that changed between two runs.
        archive: the tar that holds the pictures; None if the pictures are files on disk.
    """

    path: Path
    rows: list
    digest: str
    archive: Archive | None = None

    def open(self, picture: Path) -> BinaryIO | None:
        """The content of a picture as a binary file, or None if the picture is not in a tar.

        Args:
            picture: path of the picture, as in `rows`.

        Raises:
            InputError: the tar is no longer readable.
        """
        return self.archive.open(picture) if self.archive else None


def read_input(path: str | Path) -> Input:
    """The rows of a `.json`, `.jsonl` or `.tar` file, or of a folder of pictures. No picture is decoded.

    Raises:
        InputError: the input is missing, damaged or of another kind.
    """
    path = Path(path)
    if path.is_dir():
        rows = read_folder(path)
        contents = (row if isinstance(row, dict) else {"reason": str(row)} for row in rows)
        return Input(path, rows, hashlib.sha256("".join(map(json_line, contents)).encode()).hexdigest()[:16])
    if str(path).endswith(".tar"):
        archive = Archive(path)
        return Input(path, archive.rows, fingerprint(path), archive)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(
            f"must be a folder of pictures, or a file that ends in .json, .jsonl or .tar, got {path}; check the path",
            "in_filename",
        )
    return Input(path, read_rows(path, "in_filename"), fingerprint(path))


def fingerprint(*paths: Path) -> str:
    """One hash over the contents of all given files, in their order."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()[:16]
