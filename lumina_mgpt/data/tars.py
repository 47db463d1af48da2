"""Members of a tar file, read to the end of the archive or not at all."""

import os
import tarfile
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause

_END = 2 * tarfile.BLOCKSIZE  # an archive ends with two blocks of zeros
_CHUNK = 1 << 20


def members_of(path: str | Path) -> list[tarfile.TarInfo]:
    """All members of an uncompressed tar (GNU, PAX or ustar).

    Python's tarfile takes a damaged header, and the end of the file, for the end of the archive; this function does
    not.

    Raises:
        InputError: the file is missing, compressed, damaged, cut, or goes on after the end of the archive; names the
            byte.
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
    except Exception as error:  # damaged headers make tarfile raise almost anything
        raise InputError(f"--in_filename {path} cannot be read as a tar ({cause(error)}, byte {at}); give one that is "
                         "whole and not compressed") from None  # fmt: skip
    _check_end(path, at, size)
    return members


def _check_end(path: str | Path, at: int, size: int) -> None:
    """Raises InputError unless the file holds zeros from byte `at` on, and at least those of an archive's end."""
    with open(path, "rb") as file:
        file.seek(at)
        place = at
        while chunk := file.read(_CHUNK):
            zeros = len(chunk) - len(chunk.lstrip(b"\0"))
            if zeros < len(chunk):
                place += zeros
                break
            place += len(chunk)
    whole = f"--in_filename {path} cannot be read as a tar"
    if place < size and place - at < tarfile.BLOCKSIZE <= size - at:
        raise InputError(f"{whole}: the header at byte {at} is damaged; make the tar again")
    if size - at < _END:
        raise InputError(f"{whole}: it ends at byte {size} without the end of an archive; it is cut, make it again")
    if place < size:
        raise InputError(f"{whole}: data follow at byte {place} after the end of the archive at byte {at}; give joined "
                         "tars one by one, or make one of their files")  # fmt: skip
