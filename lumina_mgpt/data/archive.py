"""Webdataset tar -> rows for `parse_record`. Pictures are read from the tar; nothing is unpacked to disk.

Before: tars.py checks the tar and lists its members. Next: inputs.py takes the rows.
"""

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

_CAPTIONS = ("prompt", "caption", "text")  # keys of a JSON caption, in order of precedence


@dataclass
class _Sample:
    """Members of one sample.

    Attributes:
        name: path in the tar up to the first dot of the file name.
        members: kind -> member. The kind is the part of the name after that dot in lower case, such as `depth.png`.
        faults: reasons to leave the sample out.
    """

    name: str
    members: dict[str, tarfile.TarInfo] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    @property
    def pictures(self) -> dict[str, tarfile.TarInfo]:
        return {kind: member for kind, member in self.members.items() if _is_picture(kind)}


class Archive:
    """Reads the samples of an uncompressed tar. Members whose names are equal up to the first dot form one sample.

    Each sample becomes a row in one of two forms:

    - Prompt and picture. The prompt is the text of the `.txt` member. If that is missing or blank, it is the
      value of `prompt`, `caption` or `text` in the `.json` member. The picture is the one with a plain extension
      (`0.png`, not `0.depth.png`), or the only picture of the sample.
    - Conversation. The `.json` member holds `conversations`. The pictures are those that its key `image` names. Without
      `image`, they are those with plain extensions. If no picture has one, they are all pictures of the sample. A
      conversation in words alone needs no picture.

    Args:
        path: tar file.

    Attributes:
        rows: one raw record for `parse_record` per sample. An InputError replaces the record of an unusable sample.
        offsets: path of a picture -> (offset, size) of its data in the tar, in bytes.

    Raises:
        InputError: the file is missing, damaged, cut or compressed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.offsets: dict[str, tuple[int, int]] = {}
        samples: dict[str, _Sample] = {}
        skipped = sum(not self._sort(member, samples) for member in members_of(path) if not member.isdir())
        if skipped:
            log.warning("%s: members skipped, as they begin with a dot or have no extension: %d", path, skipped)
        with open(path, "rb") as file:
            self.rows = [self._row(sample, file) for sample in samples.values()]

    def _sort(self, member: tarfile.TarInfo, samples: dict[str, _Sample]) -> bool:
        """Adds a member to its sample. False for names that belong to no sample."""
        folder, _, name = _normalized(member.name).rpartition("/")
        stem, dot, kind = name.partition(".")
        if not dot or not stem:
            return False
        sample = samples.setdefault(f"{folder}/{stem}", _Sample(f"{folder}/{stem}".lstrip("/")))
        kind = kind.lower()
        if not (_is_picture(kind) or kind in ("json", "txt")):
            return True  # other data of the sample, ignored
        where = f"{self.path}/{member.name}"
        if member.islnk() or member.issym():
            todo = "make the tar with --dereference --hard-dereference"
            sample.faults.append(f"{where} is a link to {member.linkname}; {todo}")
        elif not member.isreg() or member.issparse():
            sample.faults.append(f"{where} is not a plain file; make the tar without --sparse")
        elif kind in sample.members:
            first = sample.members[kind].offset
            sample.faults.append(f"{where} is there twice, at bytes {first} and {member.offset}; keep one")
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
        """The record of a sample. Raises InputError if there is none."""
        where = {kind: f"{self.path}/{member.name}" for kind, member in sample.members.items()}
        texts = {}
        for kind in {"json", "txt"} & sample.members.keys():
            file.seek(sample.members[kind].offset_data)
            texts[kind] = file.read(sample.members[kind].size)
        content = parse_json(decode_text(texts["json"], where["json"]), where["json"]) if "json" in texts else {}
        paths = {kind: self._locate(member) for kind, member in sample.pictures.items()}
        in_words = isinstance(content, dict) and "conversations" in content and not content.get("image")
        if not paths and not in_words:
            raise InputError(f"{self.path}/{sample.name} has no picture; it has {', '.join(sample.members) or 'none'}")
        plain = [kind for kind in paths if "." not in kind] or list(paths)
        if isinstance(content, dict) and "conversations" in content:
            if content.get("image") is None:
                return content | {"image": [paths[kind] for kind in plain]}
            return content | {"image": _named(content["image"], paths, where["json"])}
        if "txt" in texts and (texts["txt"].strip() or not content):
            prompt = caption_of(decode_text(texts["txt"], where["txt"]), where["txt"])
        elif "json" in texts:
            prompt = _caption_in(content, where["json"])
        else:
            raise InputError(f"{self.path}/{sample.name} has no caption, .txt or .json; it has {', '.join(paths)}")
        if len(plain) > 1:
            raise InputError(f"{self.path}/{sample.name} has one caption for {' and '.join(plain)}; keep one picture")
        return {"prompt": prompt, "image_path": paths[plain[0]]}

    def _locate(self, member: tarfile.TarInfo) -> str:
        """The path that stands for a member in rows. Notes its offset for `open`."""
        path = str(self.path / _normalized(member.name))
        self.offsets[path] = member.offset_data, member.size
        return path

    def open(self, path: Path) -> io.BytesIO | None:
        """The content of a picture as a binary file, or None if the tar holds no such picture.

        Args:
            path: path of the picture, as in `rows`.

        Raises:
            InputError: the tar is no longer readable.
        """
        if str(path) not in self.offsets:
            return None
        offset, size = self.offsets[str(path)]
        try:
            with open(self.path, "rb") as file:
                file.seek(offset)
                return io.BytesIO(file.read(size))
        except OSError as error:
            raise InputError(f"{self.path} cannot be read ({cause(error)}); {remedy(error)}") from None


def _normalized(name: str) -> str:
    """A member's name without `./`, `//` and a leading `/`, which name the same file."""
    return posixpath.normpath(name).lstrip("/")


def _is_picture(kind: str) -> bool:
    return f".{kind.rpartition('.')[2]}" in picture_suffixes()


def _caption_in(content: object, where: str) -> str:
    """The caption in a sample's JSON. Raises InputError if there is none."""
    key = next((key for key in _CAPTIONS if key in content), None) if isinstance(content, dict) else None
    if not isinstance(content, dict) or key is None:
        raise InputError(f"{where} must hold an object with prompt, caption, text or conversations")
    if not isinstance(content[key], str):
        raise InputError(f"{where}: {key} must be a text, got {type(content[key]).__name__}")
    return caption_of(content[key], f"{where}: {key}")


def _named(image: object, paths: dict[str, str], where: str) -> list:
    """Paths of the pictures that `image` of a record names.

    Args:
        image: file names or paths, of which the last part counts; a nested list is one image in panels.
        paths: kind -> path of the sample's pictures.
        where: name of the JSON member, for the error.

    Raises:
        InputError: `image` names a picture that is not in the sample.
    """
    known = {posixpath.basename(path): path for path in paths.values()}

    def find(entry: object) -> str:
        path = known.get(posixpath.basename(entry)) if isinstance(entry, str) else None
        if path is None:
            raise InputError(
                f"{where}: image must name pictures of its sample, {', '.join(known)}, got {str(entry)[:100]!r}; "
                "correct it, or leave image out"
            )
        return path

    entries = image if isinstance(image, list) else [image]
    return [[find(panel) for panel in entry] if isinstance(entry, list) else find(entry) for entry in entries]
