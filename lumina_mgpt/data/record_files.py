"""Reads and writes record files: one row {file, len, id} for each token sequence in the shards.

Before: shards.py makes the rows, and concat.py writes them. Next: dataset.py reads them for training.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import json_line, read_rows, write_atomic


class Entry(NamedTuple):
    """One row of a record file.

    Attributes:
        file: path of the shard that holds the sequence.
        length: number of ids in the sequence.
        record: index of the record in the input of pre-tokenization.
    """

    file: str
    length: int
    record: int


def write_record_file(path: Path, rows: Iterable[dict]) -> None:
    """Writes a record file: `.jsonl` with one row per line, or `.json` with one list of all rows.

    Args:
        path: file to write; its extension selects the format.
        rows: rows with the keys file, len and id.

    Raises:
        InputError: the file is not writable.
    """
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    lines = [json_line(row) for row in rows]
    write_atomic(path, "".join(lines) if path.suffix == ".jsonl" else "[" + ",".join(lines) + "]")


def read_record_file(path: str | Path) -> list[Entry]:
    """All rows of a record file. Relative paths of shards start at the folder of the record file.

    Raises:
        InputError: the file is missing, damaged or empty.
    """
    rows = read_rows(path, "path")
    if not rows:
        raise InputError(f"{path} holds no records; see the list of bad records of the pre-tokenization")
    folder, shards, entries = Path(path).resolve().parent, {}, []
    for row in rows:
        file, length, record = _checked(row, path)
        if file not in shards:
            shards[file] = str(_located(folder, file))
        entries.append(Entry(shards[file], length, record))
    return entries


def comparable(row: object) -> str:
    """A row as text, to compare rows. Paths with `\\` and with `/` as separators give the same text."""
    if isinstance(row, dict) and isinstance(row.get("file"), str):
        row = row | {"file": row["file"].replace("\\", "/")}
    return json.dumps(row, sort_keys=True)


def _checked(row: object, path: str | Path) -> tuple[str, int, int]:
    """File, length and record of a row. Raises InputError if the row is damaged."""
    values = [row.get(key) for key in ("file", "len", "id")] if isinstance(row, dict) else [None] * 3
    file = values[0]
    numbers = [int(value) if isinstance(value, str) and value.isdecimal() else value for value in values[1:]]
    length, record = (value if type(value) is int and 0 <= value < 2**63 else None for value in numbers)
    if not isinstance(file, str) or not length or record is None:
        rule = f"{path}: a record must have file, len and id, got {str(row)[:200]}"
        raise InputError(f"{rule}; pre-tokenize the pictures, and concatenate the records")
    return file, length, record


def _located(folder: Path, file: str) -> Path:
    """Path of a shard that a record file in `folder` names. Accepts the separators of Windows."""
    path = folder / file
    if "\\" in file and "/" not in file and not os.path.lexists(path):
        return folder / file.replace("\\", "/")
    return path
