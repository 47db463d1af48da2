"""What a training checkpoint says of itself: position and settings, and a checksum of every file."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy, write_atomic
from lumina_mgpt.training.options import Settings

STATE = "trainer.json"
CHECKSUMS = "SHA256SUMS"  # of the format of sha256sum, which can check it too
_BLOCK = 1 << 20
_REMEDY = "remove the checkpoint to go on from the one before"
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")
_KEYS = {
    "step": int, "epoch": int, "done": int, "elapsed": float, "tokens": int, "ema": int, "identity": dict,
    "model": dict, "settings": dict,
}  # fmt: skip
_LATER_KEYS = {"guard": dict, "base": dict, "checksums": bool}  # checkpoints of earlier versions lack them


def read_state(checkpoint: Path) -> dict:
    """Position and settings that a checkpoint was written with.

    Raises:
        InputError: the file is missing or damaged, lacks a key, or holds a value of another type.
    """
    path = checkpoint / STATE
    try:
        state = read_json(path)
    except InputError as error:
        raise InputError(f"{checkpoint} is damaged ({error}); {_REMEDY}") from None
    for key, kind in (_KEYS | _LATER_KEYS).items():
        if key not in state:
            if key in _LATER_KEYS:
                continue
            raise InputError(f"{path} lacks the key {key!r}; {_REMEDY}")
        value = state[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind in (int, float) and (isinstance(value, bool) or not 0 <= value < 2**63)):
            raise InputError(f"{path}: {key!r} must be a {_WORDS[kind]}, got {str(value)[:60]!r}; {_REMEDY}")
    _check_guard(path, state.get("guard", {}))
    return state


_WORDS = {int: "whole number of at least 0", float: "number of at least 0", dict: "JSON object", bool: "true or false"}


def _check_guard(path: Path, guard: dict) -> None:
    norms, in_a_row = guard.get("norms", []), guard.get("in_a_row", 0)
    if not isinstance(norms, list) or not all(type(norm) in (int, float) for norm in norms):
        raise InputError(f"{path}: 'guard.norms' must be a list of numbers; {_REMEDY}")
    if type(in_a_row) is not int:
        raise InputError(f"{path}: 'guard.in_a_row' must be a whole number; {_REMEDY}")


def settings_of(checkpoint: Path, state: dict) -> tuple[Settings, ModelConfig]:
    """Settings and model of a state.

    Raises:
        InputError: a value is unknown, missing or out of its range; names the file and the key.
    """
    made = []
    for key, kind in (("settings", Settings), ("model", ModelConfig)):
        values, known = state[key], {field.name for field in dataclasses.fields(kind)}
        unknown = sorted(values.keys() - known)
        if unknown:
            raise InputError(f"{checkpoint / STATE}: {key!r} holds {unknown[0]!r}, which this version does not know; "
                             "use the version that wrote it")  # fmt: skip
        try:
            made.append(kind(**values))
        except (InputError, TypeError, ValueError, ArithmeticError) as error:
            raise InputError(f"{checkpoint / STATE}: {key!r} cannot be used ({cause(error)}); {_REMEDY}") from None
    return tuple(made)


# -- checksums ---------------------------------------------------------------------------------------------------------


def write_checksums(folder: Path) -> None:
    """Writes a checksum of each file in a folder.

    Raises:
        OSError: a file cannot be read.
        InputError: the list cannot be written.
    """
    names = _files(folder)
    sums = _hashes([folder / name for name in names])
    write_atomic(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in zip(names, sums, strict=True)))


def verify(checkpoint: Path, share: int = 0, shares: int = 1) -> bool:
    """Compares the files of a checkpoint with their checksums; one of `shares` processes reads only its part of them.

    Returns:
        Whether there are checksums: checkpoints of earlier versions have none.

    Raises:
        InputError: a file differs, or is missing, or is not listed; names it.
    """
    path = checkpoint / CHECKSUMS
    if not path.exists():
        if read_state(checkpoint).get("checksums"):
            raise InputError(f"{path} is missing; {_REMEDY}")
        return False
    wanted = _read_checksums(path)
    found = set(_files(checkpoint))
    for name in sorted(wanted.keys() ^ found):
        what = "is missing" if name in wanted else f"does not belong to the checkpoint ({CHECKSUMS} does not list it)"
        raise InputError(f"{checkpoint / name} {what}; {_REMEDY if name in wanted else 'remove the file'}")
    names = sorted(wanted)[share::shares]
    try:
        hashes = _hashes([checkpoint / name for name in names])
    except OSError as error:
        raise InputError(f"{error.filename or checkpoint} cannot be read ({cause(error)}); {remedy(error)}") from None
    for name, digest in zip(names, hashes, strict=True):
        if digest != wanted[name]:
            raise InputError(f"{checkpoint / name} is damaged: it differs from its checksum in {CHECKSUMS}; {_REMEDY}")
    return True


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_bytes().decode("ascii", "replace").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}") from None
    parts = [_LINE.fullmatch(line) for line in lines[:-1]]
    if not parts or lines[-1] or not all(parts):
        raise InputError(f"{path} is damaged: it must hold a checksum and a file name a line; {_REMEDY}")
    return {part[2]: part[1] for part in parts}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)


def _hashes(paths: Sequence[Path]) -> list[str]:
    """SHA-256 of each file; several at once, since hashlib works beside other threads."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_hash, paths))


def _hash(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()
