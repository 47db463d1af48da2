"""Reads and writes token shards: safetensors files, each with many sequences of ids and labels.

Before: pre_tokenize.py makes the sequences. Next: record_files.py lists the sequences, and dataset.py reads them.

A shard holds four tensors:

- `ids` int32 (total,): the ids of all sequences, one sequence after another.
- `labelled` bool (total,): whether each id has a label.
- `offsets` int64 (sequences + 1,): sequence n is ids[offsets[n] : offsets[n + 1]].
- `records` int64 (sequences,): index of each sequence's record in the input of pre-tokenization.

The metadata holds a checksum, and the records that were left out, with reasons. Shards are written atomically.
"""

import json
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from lumina_mgpt.data.released import read_released
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, parse_json, remedy, write_atomic
from lumina_mgpt.unirep import IGNORED

FORMAT = "lumina-mgpt-tokens-1"
_TENSORS = {"ids": "I32", "labelled": "BOOL", "offsets": "I64", "records": "I64"}  # with their safetensors types
_AGAIN = "delete it and pre-tokenize again"


@dataclass(frozen=True)
class Sequence:
    """One tokenized record.

    Attributes:
        record: index of the record in the input of pre-tokenization.
        ids: the token ids.
        labels: for each position, the id at that position, or -100 if it carries no loss.

    Shapes: ids, labels (T,) long.
    """

    record: int
    ids: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, without ids and labels.

    Attributes:
        records: for each sequence, the index of its record in the input of pre-tokenization.
        lengths: number of ids of each sequence.
        bad: {"id", "reason"} of each record that was left out. The id is the record's index.
    """

    records: list[int]
    lengths: list[int]
    bad: list[dict]

    def rows(self, file: str | PurePath) -> list[dict]:
        """One row of a record file, {"file", "len", "id"}, for each sequence of the shard.

        Args:
            file: path of the shard. The rows contain it with `/` as separator, which every system reads.
        """
        file = PurePath(file).as_posix()
        return [{"file": file, "len": n, "id": record} for record, n in zip(self.records, self.lengths, strict=True)]


def write_shard(path: Path, sequences: list[Sequence], bad: list[dict]) -> ShardIndex:
    """Writes a shard and returns its index.

    Args:
        path: file to write.
        sequences: tokenized records.
        bad: {"id", "reason"} of each record that was left out. The id is the record's index.

    Raises:
        InputError: the file is not writable.
    """
    lengths = [len(sequence.ids) for sequence in sequences]
    empty = [torch.zeros(0, dtype=torch.long)]
    ids = torch.cat([sequence.ids for sequence in sequences] or empty).to(torch.int32)
    labels = torch.cat([sequence.labels for sequence in sequences] or empty)
    labelled = labels != IGNORED
    assert torch.equal(labels[labelled], ids[labelled].long()), "a label is the id itself"
    tensors = {
        "ids": ids,
        "labelled": labelled,
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
        "records": torch.tensor([sequence.record for sequence in sequences], dtype=torch.long),
    }
    metadata = {"format": FORMAT, "checksum": str(_checksum(tensors)), "bad": json.dumps(bad)}
    write_atomic(path, save(tensors, metadata))
    return ShardIndex([sequence.record for sequence in sequences], lengths, bad)


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    value = 0
    for name in _TENSORS:
        value = zlib.crc32(tensors[name].numpy().tobytes(), value)
    return value


def read_index(path: str | Path, check: bool = False) -> ShardIndex:
    """Reads the index of a shard.

    Args:
        path: file of the shard.
        check: also read all tensors and compare them with the checksum.

    Raises:
        InputError: the file is missing or damaged, or is not a token shard.
    """
    try:
        open(path, "rb").close()
    except OSError as error:
        todo = remedy(error, "pre-tokenize again")
        raise InputError(f"{path} is missing or cannot be read ({cause(error)}); {todo}") from None
    try:
        metadata, offsets, records, total = _read_header(path, check)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is damaged ({cause(error)}); {_AGAIN}") from None
    lengths = offsets.diff()
    fits = len(offsets) == len(records) + 1 and int(offsets[0]) == 0 and total == int(offsets[-1])
    if not fits or (lengths <= 0).any():
        raise InputError(f"{path} is damaged: its offsets do not fit; {_AGAIN}")
    return ShardIndex(records.tolist(), lengths.tolist(), _bad_records(metadata.get("bad", ""), path))


def _read_header(path: str | Path, check: bool) -> tuple[dict, torch.Tensor, torch.Tensor, int | None]:
    """Metadata, offsets, records, and the number of ids, None if `ids` and `labelled` differ in length."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise InputError(f"{path} is not a token shard; make it by pre-tokenization")
        slices = {name: file.get_slice(name) for name in _TENSORS}
        forms = {name: (part.get_dtype(), len(part.get_shape())) for name, part in slices.items()}
        if forms != {name: (dtype, 1) for name, dtype in _TENSORS.items()}:
            raise InputError(f"{path} is damaged: its tensors have other types or shapes; {_AGAIN}")
        if check:
            tensors = {name: file.get_tensor(name) for name in _TENSORS}
            if str(_checksum(tensors)) != metadata.get("checksum"):
                raise InputError(f"{path} is damaged (checksum); {_AGAIN}")
        ids, labelled = (slices[name].get_shape()[0] for name in ("ids", "labelled"))
        total = ids if ids == labelled else None
        return metadata, file.get_tensor("offsets"), file.get_tensor("records"), total


def _bad_records(text: str, path: str | Path) -> list[dict]:
    """The records left out, from a shard's metadata. Raises InputError if it is damaged."""
    bad = parse_json(text, f"{path}: list of records left out")
    if not isinstance(bad, list) or not all(isinstance(item, dict) and type(item.get("id")) is int for item in bad):
        raise InputError(f"{path} is damaged: its list of records left out; {_AGAIN}")
    return bad


class _OpenShard:
    """A memory-mapped shard, closed when the object is freed."""

    def __init__(self, path: str) -> None:
        index = read_index(path)
        self.file = safe_open(path, "pt").__enter__()
        self.ids, self.labelled = self.file.get_slice("ids"), self.file.get_slice("labelled")
        offsets = self.file.get_tensor("offsets").tolist()
        self.spans = {record: (offsets[n], offsets[n + 1]) for n, record in enumerate(index.records)}


@lru_cache(maxsize=256)
def _open(path: str) -> _OpenShard:
    return _OpenShard(path)


def read_sequence(path: str | Path, record: int) -> Sequence:
    """Reads one sequence of a shard, or the only sequence of a released `.pkl` file.

    The ids and labels of the shard's other sequences are not read.

    Args:
        path: file of the shard, or `.pkl` file.
        record: index of the sequence's record in the input of pre-tokenization.

    Raises:
        InputError: the file is missing or damaged, or does not hold the record.
    """
    if str(path).endswith(".pkl"):
        return Sequence(record, *read_released(path))
    shard = _open(str(path))
    if record not in shard.spans:
        raise InputError(f"{path} does not hold record {record}; concatenate the records of its folder again")
    start, stop = shard.spans[record]
    ids = shard.ids[start:stop].long()
    return Sequence(record, ids, ids.masked_fill(~shard.labelled[start:stop], IGNORED))
