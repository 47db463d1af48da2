"""Writes and verifies checksums of the files of a training checkpoint, in the format of `sha256sum`."""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy, write_atomic
from lumina_mgpt.training.state import REMEDY, read_state

CHECKSUMS = "SHA256SUMS"
_BLOCK = 1 << 20
_LINE = re.compile(r"([0-9a-f]{64})  ([^/\\]+)")


def write_checksums(folder: Path) -> None:
    """Writes the checksum of each file in a folder to the file `SHA256SUMS` in it.

    Raises:
        OSError: a file cannot be read.
        InputError: `SHA256SUMS` cannot be written.
    """
    names = _files(folder)
    sums = _hashes([folder / name for name in names])
    write_atomic(folder / CHECKSUMS, "".join(f"{digest}  {name}\n" for name, digest in zip(names, sums, strict=True)))


def verify(checkpoint: Path, share: int = 0, shares: int = 1) -> bool:
    """Compares the files of a checkpoint with their checksums.

    Args:
        share: index of this process, from 0. It reads only its part of the files.
        shares: number of processes that read; each reads another part.

    Returns:
        Whether the checkpoint has checksums; checkpoints of earlier toolkit versions have none.

    Raises:
        InputError: a file differs, is missing or is not listed; the message names the file.
    """
    path = checkpoint / CHECKSUMS
    if not path.exists():
        if read_state(checkpoint).get("checksums"):
            raise InputError(f"{path} is missing; {REMEDY}")
        return False
    wanted = _read_checksums(path)
    found = set(_files(checkpoint))
    for name in sorted(wanted.keys() ^ found):
        what = "is missing" if name in wanted else f"does not belong to the checkpoint ({CHECKSUMS} does not list it)"
        raise InputError(f"{checkpoint / name} {what}; {REMEDY if name in wanted else 'remove the file'}")
    names = sorted(wanted)[share::shares]
    try:
        hashes = _hashes([checkpoint / name for name in names])
    except OSError as error:
        raise InputError(f"{error.filename or checkpoint} cannot be read ({cause(error)}); {remedy(error)}") from None
    for name, digest in zip(names, hashes, strict=True):
        if digest != wanted[name]:
            raise InputError(f"{checkpoint / name} is damaged: it differs from its checksum in {CHECKSUMS}; {REMEDY}")
    return True


def _read_checksums(path: Path) -> dict[str, str]:
    try:
        lines = path.read_bytes().decode("ascii", "replace").split("\n")
    except OSError as error:
        raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}") from None
    parts = [part for line in lines[:-1] if (part := _LINE.fullmatch(line))]
    if not parts or lines[-1] or len(parts) < len(lines) - 1:
        raise InputError(f"{path} is damaged: each line must hold a checksum and a file name; {REMEDY}")
    return {part[2]: part[1] for part in parts}


def _files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != CHECKSUMS)


def _hashes(paths: Sequence[Path]) -> list[str]:
    """Returns the SHA-256 of each file; threads work in parallel, since hashlib releases the GIL."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(_hash, paths))


def _hash(path: Path) -> str:
    digest, block = hashlib.sha256(), bytearray(_BLOCK)
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(memoryview(block)[:size])
    return digest.hexdigest()
