"""Small files that are whole or absent, and JSON records read with errors a user can act on."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from lumina_mgpt.errors import InputError

try:
    import fcntl
except ImportError:
    fcntl = None


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a run after a kill, sees all of it or the one before."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({error.strerror}); free some space, or write elsewhere") from None


@contextmanager
def alone_in(folder: Path, option: str) -> Iterator[None]:
    """Keeps a second process out of a folder; the system lets go of it whatever ends the first. Not on Windows.

    Raises:
        InputError: another one is at work there.
    """
    if fcntl is None:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remedy = "stop it, or give another folder"
            raise InputError(f"{option} {folder}: another run is at work there; {remedy}") from None
        except OSError:  # a file system without locks
            pass
        yield


def append_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """Appends JSON lines and waits until they are on the disk."""
    text = "".join(json_line(row) for row in rows)
    if not text:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}); free some space, or write elsewhere") from None


def keep_until(path: Path, step: int) -> None:
    """Removes lines of later steps, which a resumed run does again, and a last one that a kill has torn."""
    if path.exists():
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        write_atomic(path, "".join(json_line(row) for row in rows if row["step"] <= step))


def json_line(row: dict) -> str:
    return json.dumps(row) + "\n"  # escaped: a path may hold what UTF-8 cannot


def read_rows(path: str | Path, option: str) -> list:
    """All rows of a `.json` (a list) or `.jsonl` (one value a line) file.

    Raises:
        InputError: naming `option`, and the line that is damaged.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{option} must end in .json or .jsonl, got {path}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{option} {path} cannot be read ({error}); give an existing file in UTF-8") from None
    if path.suffix == ".jsonl":
        return [_parse(line, f"{path}, line {n}", option) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    rows = _parse(text, str(path), option)
    if not isinstance(rows, list):
        raise InputError(f"{option} {path} must hold a list of records, got a {type(rows).__name__}")
    return rows


def _parse(text: str, where: str, option: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{option} {where} is not JSON ({error}); mend or remove it") from None
