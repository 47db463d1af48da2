"""Webdataset tars as record files: pictures are read out of the archive, nothing is unpacked."""

import io
import logging
import posixpath
import tarfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from lumina_mgpt.data.captions import caption_of
from lumina_mgpt.data.tars import members_of
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import picture_suffixes
from lumina_mgpt.io import cause, decode_text, parse_json, remedy

log = logging.getLogger(__name__)

_CAPTIONS = ("prompt", "caption", "text")


@dataclass
class _Sample:
    """Members of one sample by their kind: the name after its first dot, in lower case. `faults` are reasons to leave
    the sample out."""

    name: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> dict[str, tarfile.TarInfo]:
        return {kind: member for kind, member in self.members.items() if _is_picture(kind)}


class Archive:
    """The samples of an uncompressed tar: members of one name up to its first dot are one sample.

    `rows` are records in the forms of `records.parse_record`, or the InputError that says why there is none. The prompt
    is a `.txt` member, or the first of `prompt`, `caption` and `text` in a `.json` one. Its picture is the one of a
    plain extension (`0.png`, not `0.depth.png`), or the only one. A `.json` with `conversations` is a record, its
    images those that its `image` names in the sample; without `image`, those of plain extensions, or all if none is.

    Raises:
        InputError: the file is missing, damaged, cut or compressed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.places = Path(path), {}
        samples: dict[str, _Sample] = {}
        skipped = sum(not self._sort(member, samples) for member in members_of(path) if not member.isdir())
        if skipped:
            log.warning("%s: members skipped, as they begin with a dot or have no extension: %d", path, skipped)
        with open(path, "rb") as file:
            self.rows = [self._row(sample, file) for sample in samples.values()]

    def _sort(self, member: tarfile.TarInfo, samples: dict[str, _Sample]) -> bool:
        """Puts a member into its sample; False where its name belongs to none."""
        folder, _, name = _plain(member.name).rpartition("/")
        stem, dot, kind = name.partition(".")
        if not dot or not stem:
            return False
        sample = samples.setdefault(f"{folder}/{stem}", _Sample(f"{folder}/{stem}".lstrip("/")))
        kind = kind.lower()
        if not (_is_picture(kind) or kind in ("json", "txt")):
            return True  # other data of the sample, of which nothing is read
        if member.islnk() or member.issym():
            sample.faults.append(f"{self.path}/{member.name} is a link to {member.linkname}; make the tar with "
                                 "--dereference --hard-dereference")  # fmt: skip
        elif not member.isreg() or member.issparse():
            sample.faults.append(f"{self.path}/{member.name} is no plain file; make the tar without --sparse")
        elif kind in sample.members:
            sample.faults.append(f"{self.path}/{member.name} is there twice, at bytes {sample.members[kind].offset} and"
                                 f" {member.offset}; keep one")  # fmt: skip
        else:
            sample.members[kind] = member
        return True

    def _row(self, sample: _Sample, file: BinaryIO) -> dict | InputError:
        try:
            if sample.faults:
                raise InputError("; ".join(sample.faults))
            return self._record(sample, file)
        except InputError as error:
            return error

    def _record(self, sample: _Sample, file: BinaryIO) -> dict:
        """The record of a sample. Raises InputError where it has none."""
        where = {kind: f"{self.path}/{member.name}" for kind, member in sample.members.items()}
        texts = {}
        for kind in {"json", "txt"} & sample.members.keys():
            file.seek(sample.members[kind].offset_data)
            texts[kind] = file.read(sample.members[kind].size)
        told = parse_json(decode_text(texts["json"], where["json"]), where["json"]) if "json" in texts else {}
        paths = {kind: self._place(member) for kind, member in sample.pictures.items()}
        if not paths:
            raise InputError(f"{self.path}/{sample.name} has no picture; it has {', '.join(sample.members) or 'none'}")
        plain = [kind for kind in paths if "." not in kind] or list(paths)
        if isinstance(told, dict) and "conversations" in told:
            if told.get("image") is None:
                return told | {"image": [paths[kind] for kind in plain]}
            return told | {"image": _named(told["image"], paths, where["json"])}
        if "txt" in texts and (texts["txt"].strip() or not told):
            prompt = caption_of(decode_text(texts["txt"], where["txt"]), where["txt"])
        elif "json" in texts:
            prompt = _caption_in(told, where["json"])
        else:
            raise InputError(f"{self.path}/{sample.name} has no caption, .txt or .json; it has {', '.join(paths)}")
        if len(plain) > 1:
            raise InputError(f"{self.path}/{sample.name} has one caption for {' and '.join(plain)}; keep one picture")
        return {"prompt": prompt, "image_path": paths[plain[0]]}

    def _place(self, member: tarfile.TarInfo) -> str:
        """The path that stands for a member."""
        path = str(self.path / _plain(member.name))
        self.places[path] = member.offset_data, member.size
        return path

    def open(self, path: Path) -> io.BytesIO | None:
        """The bytes of a picture in the tar; None for a path elsewhere.

        Raises:
            InputError: the tar cannot be read any more.
        """
        if str(path) not in self.places:
            return None
        offset, size = self.places[str(path)]
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({cause(error)}); {remedy(error)}") from None


def _plain(name: str) -> str:
    """A member's name without `./`, `//` and a leading `/`, which do not make it another file."""
    return posixpath.normpath(name).lstrip("/")


def _is_picture(kind: str) -> bool:
    return f".{kind.rpartition('.')[2]}" in picture_suffixes()


def _caption_in(told: object, where: str) -> str:
    """The caption in a sample's JSON. Raises InputError where there is none."""
    key = next((key for key in _CAPTIONS if key in told), None) if isinstance(told, dict) else None
    if key is None:
        raise InputError(f"{where} must hold an object with prompt, caption, text or conversations")
    if not isinstance(told[key], str):
        raise InputError(f"{where}: {key} must be a text, got {type(told[key]).__name__}")
    return caption_of(told[key], f"{where}: {key}")


def _named(image: object, paths: dict[str, str], where: str) -> list:
    """The pictures of a sample that its `image` names, by their whole names or the last part.

    Raises:
        InputError: it names another picture.
    """
    known = {posixpath.basename(path): path for path in paths.values()}

    def find(entry: object) -> object:
        path = known.get(posixpath.basename(entry)) if isinstance(entry, str) else None
        if path is None:
            raise InputError(f"{where}: image must name pictures of its sample, {', '.join(known)}, got "
                             f"{str(entry)[:100]!r}; correct it, or leave image out")  # fmt: skip
        return path

    entries = image if isinstance(image, list) else [image]
    return [[find(panel) for panel in entry] if isinstance(entry, list) else find(entry) for entry in entries]
