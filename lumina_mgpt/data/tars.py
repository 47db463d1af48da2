"""Tar file -> list of its members, after a check of the whole archive.

Next: archive.py groups the members into records.
"""

import os
import tarfile
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause

_END = 2 * tarfile.BLOCKSIZE  # POSIX: two blocks of zeros end an archive
_CHUNK = 1 << 20  # bytes per read


def members_of(path: str | Path) -> list[tarfile.TarInfo]:
    """All members of an uncompressed tar (GNU, PAX or ustar).

    Python's tarfile silently stops at a damaged header or at the end of a cut file. This function raises an error
    in both cases.

    Raises:
        InputError: the file is missing, compressed, damaged or cut, or has data after the end of the archive. The
            message gives the offset of the fault in bytes.
    """
    members, at = [], 0
    try:
        size = os.path.getsize(path)
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                if member.size < 0 or tar.offset < member.offset_data:
                    raise tarfile.ReadError("bad size")
                if tar.offset > size:
                    raise tarfile.ReadError(f"the data of {member.name} go past the end of the file")
                members.append(member)
                at = tar.offset
    except Exception as error:  # for damaged headers, tarfile raises almost any exception
        raise _refusal(path, f"{cause(error)} at byte {at}; give an undamaged, uncompressed tar") from None
    _check_end(path, at, size)
    return members


def _check_end(path: str | Path, at: int, size: int) -> None:
    """Raises InputError unless the file has only zeros from byte `at` on, and at least two blocks of them."""
    with open(path, "rb") as file:
        file.seek(at)
        end = at  # of the zeros
        while chunk := file.read(_CHUNK):
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            end += zeros
            if zeros < len(chunk):
                break
    if end < size and end - at < tarfile.BLOCKSIZE <= size - at:
        raise _refusal(path, f"the header at byte {at} is damaged; make the tar again")
    if size - at < _END:
        raise _refusal(path, f"it ends at byte {size} without the end of an archive; it is cut, make it again")
    if end < size:
        raise _refusal(
            path,
            f"data follow at byte {end} after the end of the archive at byte {at}; give joined tars one by one, or "
            "pack their files into one tar",
        )


def _refusal(path: str | Path, reason: str) -> InputError:
    return InputError(f"{path} cannot be read as a tar: {reason}", "in_filename")
