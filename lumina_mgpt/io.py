"""Files that are whole or absent, and text and JSON read with errors that a user can act on.

Everything that a user or another program may have written is read through this module: a byte order mark is removed,
and what cannot be read becomes an InputError that names the file.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

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
    """What went wrong, in the words of the system, on one line of at most 200 characters."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def remedy(error: BaseException, otherwise: str = "check the path") -> str:
    """What a user can do about an error of the operating system; `otherwise` where the error number says nothing."""
    return _REMEDIES.get(getattr(error, "errno", None), otherwise)


# -- reading -----------------------------------------------------------------------------------------------------------


def decode_text(data: bytes, where: str) -> str:
    """Text of UTF-8 bytes, without byte order marks: files that are joined have one at the start of several lines.

    Raises:
        InputError: the bytes are not UTF-8, or hold a zero byte; names `where` and the encoding that they seem to have.
    """
    try:
        text = re.sub("^\ufeff", "", data.decode("utf-8"), flags=re.MULTILINE)
        if "\0" in text:  # UTF-16 without a mark is valid UTF-8 where all letters are ASCII
            raise InputError(f"{where} must be UTF-8 text, got a zero byte, as in UTF-16 and binary data, at byte "
                             f"{data.index(0)}; save it as UTF-8, or replace it")  # fmt: skip
        return text
    except UnicodeDecodeError as error:
        wide = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        seems = "UTF-16" if wide else f"another encoding, perhaps Windows-1252: byte {data[error.start]:#04x}"
        raise InputError(f"{where} must be UTF-8 text, got {seems} at byte {error.start}; save it as UTF-8") from None


def read_text(path: str | Path, parameter: str = "") -> str:
    """Text of a UTF-8 file, without byte order marks; line ends are left unmodified.

    Args:
        parameter: what the file was given as, for messages.

    Raises:
        InputError: the file is missing, may not be read, or is not UTF-8.
    """
    where = f"{parameter} {path}".strip()
    try:
        data = Path(path).read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{where} cannot be read ({cause(error)}); {remedy(error)}") from None
    return decode_text(data, where)


def require_readable(path: str | Path, parameter: str = "") -> None:
    """Refuses a file that cannot be opened, for libraries whose own errors do not say why.

    Raises:
        InputError: the file is missing, a folder, may not be read, or lies on a device with errors.
    """
    try:
        with open(path, "rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{parameter} {path} cannot be read ({cause(error)}); {remedy(error)}".strip()) from None


def lines_of(text: str) -> list[str]:
    r"""Lines of a text, without their ends.

    Only \n, \r\n and \r end a line: `str.splitlines` also splits at a form feed, U+0085 and U+2028, which may occur
    inside a sentence.
    """
    return re.split(r"\r\n|\n|\r", text)


def parse_json(text: str, where: str) -> object:
    """The value of a JSON text.

    Raises:
        InputError: the text is not JSON, or nested too deeply, or holds a number of too many digits; names `where`.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise InputError(f"{where} is nested too deeply for JSON; correct or remove it") from None
    except ValueError as error:  # JSONDecodeError is one; a number of over 4,300 digits raises another
        raise InputError(f"{where} is not JSON ({cause(error)}); correct or remove it") from None


def read_json(path: str | Path, parameter: str = "") -> dict:
    """The mapping that a JSON file holds.

    Raises:
        InputError: the file cannot be read, is not JSON, or holds something else.
    """
    where = f"{parameter} {path}".strip()
    value = parse_json(read_text(path, parameter), where)
    if not isinstance(value, dict):
        raise InputError(f"{where} must hold a JSON object, got a {type(value).__name__}; correct or replace it")
    return value


def read_rows(path: str | Path, parameter: str) -> list:
    """All rows of a `.json` (a list) or `.jsonl` (one value a line) file.

    Raises:
        InputError: naming `parameter`, and the line that is damaged.
    """
    path = Path(path)
    if path.suffix not in (".json", ".jsonl"):
        raise InputError(f"{parameter} must end in .json or .jsonl, got {path}")
    text = read_text(path, parameter)
    if path.suffix == ".jsonl":
        lines = enumerate(text.split("\n"), 1)  # not splitlines: U+2028 may stand inside a JSON string
        return [parse_json(line, f"{parameter} {path}, line {n}") for n, line in lines if line.strip()]
    rows = parse_json(text, f"{parameter} {path}")
    if not isinstance(rows, list):
        raise InputError(f"{parameter} {path} must hold a list of records, got a {type(rows).__name__}")
    return rows


# -- writing -----------------------------------------------------------------------------------------------------------


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or a run after a kill, sees all of it or the one before.

    Raises:
        InputError: the file cannot be written; the one before is kept.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise InputError(f"{path} cannot be written ({cause(error)}); {remedy(error)}") from None


def write_tensors(path: str | Path, tensors: Mapping, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a safetensors file under its name, with the access rights that the umask gives.

    safetensors makes files that no other user can read (mode 0600), whatever the umask.

    Raises:
        OSError, SafetensorError: the file cannot be written; what is there is not whole.
    """
    from safetensors.torch import save_file  # imports torch, which takes seconds

    with open(path, "wb") as file:
        mode = os.fstat(file.fileno()).st_mode & 0o777
    save_file(dict(tensors), path, dict(metadata or {"format": "pt"}))
    os.chmod(path, mode)


def require_new(target: str | Path, parameter: str) -> None:
    """Refuses a path where something is already; an empty folder is allowed.

    Raises:
        InputError: something is there, or the path cannot be examined.
    """
    try:
        os.stat(target)
        taken = not os.path.isdir(target) or any(os.scandir(target))
    except FileNotFoundError:
        taken = False
    except (OSError, ValueError) as error:  # ValueError: a path with a null byte
        raise InputError(f"{target} cannot be used ({cause(error)}); {remedy(error)}", parameter) from None
    if taken:
        raise InputError(f"{target} is there already, and is kept; give a new folder", parameter)


@contextmanager
def new_folder(target: str | Path, parameter: str) -> Iterator[Path]:
    """Yields a hidden folder to write to; `target` gets its content when the block ends, and nothing if it raises.

    A folder that is not there yet is renamed in one step. An empty one that is there is kept, since it may be a mount
    point: the files are moved into it.

    Args:
        parameter: what the folder was given as, for messages.

    Raises:
        InputError: `target` is taken or cannot be written.
    """
    require_new(target, parameter)
    place = Path(os.path.realpath(target))
    there = place.is_dir()
    hidden = (place if there else place.parent) / f".{place.name[:50]}.{os.getpid()}.part"
    parents = [folder for folder in place.parents if not folder.exists()]
    done = False
    try:
        hidden.mkdir(parents=True)
        yield hidden
        if there:
            for file in sorted(hidden.iterdir()):
                file.rename(place / file.name)
        else:
            hidden.rename(place)
        done = True
    except InputError as error:
        named = error.parameter or (parameter if error.message.startswith(str(hidden)) else None)
        raise InputError(error.message.replace(str(hidden), str(target)), named) from None
    except OSError as error:
        names = [Path(name) for name in (error.filename, error.filename2) if name is not None]
        if names and not any(hidden in (name, *name.parents) or name in hidden.parents for name in names):
            raise  # of another file, such as one that is read
        raise InputError(f"{target} cannot be written ({cause(error)}); {remedy(error)}", parameter) from None
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        for folder in parents if not done else ():
            with suppress(OSError):  # another program has written there
                folder.rmdir()


def append_lines(path: str | Path, rows: Iterable[dict]) -> None:
    """Appends JSON lines and waits until they are on the disk.

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
    """Removes lines of later steps, which a resumed run does again, and what a kill or a power loss has damaged.

    Only whole lines with a whole number as their `step` are kept.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):  # a power loss may leave zero bytes or half a line
        try:
            row = parse_json(decode_text(line, str(path)), str(path))
        except InputError:
            continue
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= step:
            kept.append(json_line(row))
    write_atomic(path, "".join(kept))


def json_line(row: dict) -> str:
    """One line of JSON in ASCII: a path may hold bytes that UTF-8 cannot represent."""
    return json.dumps(row) + "\n"


@contextmanager
def alone_in(folder: Path, parameter: str, name: str = ".lock") -> Iterator[None]:
    """Keeps a second process out of a folder; the system ends the lock with the process.

    Args:
        parameter: what the folder was given as, for messages.
        name: of the lock's file; processes with other names may work in the folder at the same time.

    Raises:
        InputError: another process is at work there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder}: another run is at work there; stop it, or give another folder",
                         parameter) from None  # fmt: skip
    except (NotImplementedError, OSError):  # a file system without locks
        pass
    try:
        yield
    finally:
        lock.release()
