"""Atomic files and folders, locks, and reading of text and JSON.

All text and JSON from users or other programs is read through this module: it removes a byte order mark, and raises an
InputError with the name of a file that cannot be read.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from lumina_mgpt.errors import InputError

_REMEDIES = {
    errno.ENOSPC: "free some space, or write elsewhere",
    errno.EDQUOT: "free some space, or write elsewhere",
    errno.EFBIG: "the file system takes no file this large; write elsewhere",
    errno.EACCES: "change its permissions, or use another path",
    errno.EPERM: "change its permissions, or use another path",
    errno.EROFS: "the file system is read-only; use another path",
    errno.ENAMETOOLONG: "use a shorter name",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.EIO: "the device reports an error; use another one",
}


def cause(error: BaseException) -> str:
    """Returns the system's description of an error, one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def remedy(error: BaseException, otherwise: str = "check the path") -> str:
    """Returns advice for an error of the operating system, or `otherwise` if there is none for its error number."""
    return _REMEDIES.get(getattr(error, "errno", None) or 0, otherwise)


# -- reading -----------------------------------------------------------------------------------------------------------


def decode_text(data: bytes, where: str, parameter: str | None = None) -> str:
    """Returns the text of UTF-8 bytes, without byte order marks at the start of any line (joined files have several).

    Args:
        where: name of the file or stream that the bytes are from, for errors.
        parameter: parameter that named the source, for errors.

    Raises:
        InputError: the bytes are not UTF-8, or contain a zero byte. The message names the probable encoding.
    """
    try:
        text = re.sub("^\ufeff", "", data.decode("utf-8"), flags=re.MULTILINE)
        if "\0" in text:  # UTF-16 without a mark is valid UTF-8 where all letters are ASCII
            raise InputError(
                f"{where} must be UTF-8 text, got a zero byte, as in UTF-16 and binary data, at byte "
                f"{data.index(0)}; save it as UTF-8, or replace it",
                parameter,
            )
        return text
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        seems = "UTF-16" if wide else f"another encoding, perhaps Windows-1252: byte {data[error.start]:#04x}"
        message = f"{where} must be UTF-8 text, got {seems} at byte {error.start}; save it as UTF-8"
        raise InputError(message, parameter) from None


def read_text(path: str | Path, parameter: str | None = None) -> str:
    """Returns the text of a UTF-8 file, without byte order marks and with unmodified line ends.

    Args:
        parameter: parameter that named the file, for errors.

    Raises:
        InputError: the file is missing, cannot be read, or is not UTF-8.
    """
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}", parameter) from None
    return decode_text(data, str(path), parameter)


def require_readable(path: str | Path, parameter: str | None = None) -> None:
    """Checks that a file can be opened, before a library opens it whose errors give no reason.

    Raises:
        InputError: the file is missing, is a folder, or cannot be read.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}", parameter) from None


def lines_of(text: str) -> list[str]:
    r"""Returns the lines of a text without their ends.

    Only \n, \r\n and \r end a line. `str.splitlines` also splits at a form feed, U+0085 and U+2028, which may occur
    inside a sentence.
    """
    return re.split(r"\r\n|\n|\r", text)


def parse_json(text: str, where: str, parameter: str | None = None) -> object:
    """Returns the value of a JSON text.

    Args:
        where: name of the file or stream that the text is from, for errors.
        parameter: parameter that named the source, for errors.

    Raises:
        InputError: the text is not JSON, is nested too deeply, or has a number with too many digits.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply for JSON; correct or remove it", parameter) from None
    except ValueError as error:  # JSONDecodeError, or a number with over 4,300 digits
        raise InputError(f"{where} is not JSON ({cause(error)}); correct or remove it", parameter) from None


def read_json(path: str | Path, parameter: str | None = None) -> dict:
    """Returns the mapping in a JSON file.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds another type.
    """
    value = parse_json(read_text(path, parameter), str(path), parameter)
    if not isinstance(value, dict):
        message = f"{path} must hold a JSON object, got a {type(value).__name__}; correct or replace it"
        raise InputError(message, parameter)
    return value


def read_rows(path: str | Path, parameter: str | None = None) -> list:
    """Returns the rows of a `.json` file (a list) or a `.jsonl` file (one value per line).

    Raises:
        InputError: the file cannot be read, or is damaged. The message names the damaged line.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"must end in .json or .jsonl, got {path}", parameter)
    text = read_text(path, parameter)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)  # not splitlines: a JSON string may contain U+2028
        return [parse_json(line, f"{path}, line {n}", parameter) for n, line in lines if line.strip()]
    rows = parse_json(text, str(path), parameter)
    if not isinstance(rows, list):
        raise InputError(f"{path} must hold a list of records, got a {type(rows).__name__}", parameter)
    return rows


# -- writing -----------------------------------------------------------------------------------------------------------


def partial_path(path: Path) -> Path:
    """Returns the path of the temporary file that is written in place of `path`, in the same folder."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a temporary file, open for writing bytes, that replaces `path` atomically when the block ends.

    If the block raises, the temporary file is removed.

    Raises:
        OSError: the file cannot be written; the previous one is kept.
    """
    partial = partial_path(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:  # also Ctrl-C
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        raise


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Replaces the content of a file; readers see either all of the new content or all of the old.

    Raises:
        InputError: the file cannot be written; the previous one is kept.
    """
    try:
        with replacing(Path(path)) as file:
            file.write(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({cause(error)}); {remedy(error)}") from None


def write_tensors(path: str | Path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file with the usual access rights (umask), where safetensors itself sets mode 0600.

    The write is not atomic.

    Raises:
        OSError, SafetensorError: the file cannot be written and may be incomplete.
    """
    from safetensors.torch import save_file  # imports torch, which takes seconds

    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    save_file(dict(tensors), path, dict(metadata or {"format": "pt"}))
    os.chmod(path, mode)


def require_new(target: str | Path, parameter: str) -> None:
    """Checks that nothing exists at a path, or only an empty folder.

    Raises:
        InputError: the path is taken or cannot be examined.
    """
    try:
        os.stat(target)
        taken = not os.path.isdir(target) or any(os.scandir(target))
    except FileNotFoundError:
        taken = False
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{target} cannot be used ({cause(error)}); {remedy(error)}", parameter) from None
    if taken:
        raise InputError(f"{target} already exists and is not replaced; give a new folder", parameter)


@contextmanager
def new_folder(target: str | Path, parameter: str) -> Iterator[Path]:
    """Yields a hidden folder to write to, whose content becomes the folder `target` when the block ends.

    If the block raises, the hidden folder is removed. A `target` that does not exist appears in one step. An existing
    empty `target` may be a mount point, so the files are moved into it one by one.

    Args:
        parameter: parameter that named the folder, for errors.

    Raises:
        InputError: `target` is taken or cannot be written.
    """
    require_new(target, parameter)
    resolved = Path(os.path.realpath(target))
    exists = resolved.is_dir()
    hidden = (resolved if exists else resolved.parent) / f".{resolved.name[:50]}.{os.getpid()}.part"
    parents = [folder for folder in resolved.parents if not folder.exists()]
    done = False
    try:
        hidden.mkdir(parents=True)
        yield hidden
        if exists:
            for file in sorted(hidden.iterdir()):
                file.rename(resolved / file.name)
        else:
            hidden.rename(resolved)
        done = True
    except InputError as error:
        if str(hidden) not in str(error):
            raise
        raise InputError(str(error).replace(str(hidden), str(target)), parameter) from None
    except OSError as error:
        names = [Path(name) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(hidden in (name, *name.parents) or name in hidden.parents for name in names):
            raise  # about another file, such as one that is read
        raise InputError(f"{target} cannot be written ({cause(error)}); {remedy(error)}", parameter) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in parents if not done else ():
            with suppress(OSError):  # another program has written there
                folder.rmdir()


def append_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """Appends rows to a file, one JSON line per row, and flushes them to the disk.

    Raises:
        InputError: the file cannot be written.
    """
    text = "".join(json_line(row) for row in rows)
    if not text:
        return
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise InputError(f"{path} cannot be written ({cause(error)}); {remedy(error)}") from None


def keep_until(path: Path, step: int) -> None:
    """Removes from a JSON Lines file all rows after a training step, which a resumed run repeats, and damaged lines.

    Keeps complete rows whose key `step` is an integer of at most `step`.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # a power loss may leave zero bytes or part of a line
        try:
            row = parse_json(decode_text(line, str(path)), str(path))
        except InputError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(json_line(row))
    write_atomic(path, "".join(kept))


def json_line(row: dict) -> str:
    """Returns a row as a line of JSON in ASCII, since a path in it may contain bytes that are not UTF-8."""
    return json.dumps(row) + "\n"


@contextmanager
def alone_in(folder: Path, parameter: str, name: str = ".lock") -> Iterator[None]:
    """Locks a folder against other processes; the system releases the lock when the process ends.

    Args:
        parameter: parameter that named the folder, for errors.
        name: file name of the lock. Processes exclude each other only if they use the same name.

    Raises:
        InputError: another process has the lock.
    """
    from filelock import FileLock, Timeout  # few commands lock a folder

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is in use by another run; stop it, or give another folder", parameter) from None
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()
