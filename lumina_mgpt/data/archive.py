"""Webdataset tars as record files: pictures are read out of the archive, nothing is unpacked."""

import io
import json
import tarfile
from pathlib import Path

from lumina_mgpt.errors import InputError

PICTURES = {"png", "jpg", "jpeg", "webp"}
_CAPTIONS = ("prompt", "caption", "text")


class Archive:
    """The samples of an uncompressed tar: members of one name up to its first dot are one sample.

    `rows` are records in the forms of `records.parse_record`. The prompt is a `.txt` member, or `prompt`, `caption` or
    `text` of a `.json` one; a `.json` with `conversations` is a record as it stands, its images the pictures beside it.

    Raises:
        InputError: the file is missing, damaged or compressed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, self.places = Path(path), {}
        samples: dict[str, dict[str, tarfile.TarInfo]] = {}
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    folder, _, name = member.name.rpartition("/")
                    stem, dot, kind = name.partition(".")
                    if member.isfile() and dot and stem:
                        samples.setdefault(f"{folder}/{stem}", {})[kind.lower()] = member
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"--in_filename {path} cannot be read as a tar ({error}); give one that is whole and not "
                             "compressed") from None  # fmt: skip
        with open(path, "rb") as file:
            self.rows = [self._row(members, file) for members in samples.values()]

    def _row(self, members: dict[str, tarfile.TarInfo], file) -> dict:
        """What a sample says, as far as it can be read; what is missing is for `parse_record` to name."""
        pictures = []
        for kind, member in members.items():
            if kind.rpartition(".")[2] in PICTURES:
                pictures.append(str(self.path / member.name))
                self.places[pictures[-1]] = member.offset_data, member.size
        texts = {}
        for kind in {"json", "txt"} & members.keys():
            file.seek(members[kind].offset_data)
            texts[kind] = file.read(members[kind].size).decode(errors="replace")
        try:
            told = json.loads(texts.get("json", "{}"))
        except json.JSONDecodeError:
            told = {}
        told = told if isinstance(told, dict) else {}
        if "conversations" in told:
            return {"conversations": told["conversations"], "image": pictures}
        prompt = texts.get("txt") or next((told[key] for key in _CAPTIONS if key in told), None)
        row = {} if prompt is None else {"prompt": prompt.strip() if isinstance(prompt, str) else prompt}
        return row | ({"image_path": pictures[0]} if pictures else {})

    def open(self, path: Path) -> io.BytesIO | None:
        """The bytes of a picture in here; None for a path elsewhere."""
        if str(path) not in self.places:
            return None
        offset, size = self.places[str(path)]
        with open(self.path, "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))
