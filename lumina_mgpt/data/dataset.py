"""Token records of one or several files as one data set, a function of (seed, epoch) in everything random."""

import hashlib
import logging
import math
import os
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lumina_mgpt.config import is_number
from lumina_mgpt.data.seeding import generator, unit
from lumina_mgpt.data.shards import Sequence, read_sequence
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_rows, read_text
from lumina_mgpt.unirep import IGNORED, decode_image, drop_context
from lumina_mgpt.vocabulary import Vocabulary

log = logging.getLogger(__name__)

DROPPED_SHARE = 0.1  # of the sequences lose their context, as released; guidance needs them
_RATIO_LIMIT = 1000
_WEIGHT_LIMIT = 10**12  # far from where floats overflow
_DENOMINATOR = 10**12  # ratios are fractions with no larger one: 0.1 is a tenth, which no float is
_FEWEST = 0.001  # records an epoch: an epoch in which none is due is passed over, and the next one is looked for
_KEYS = {"path", "type", "ratio", "weight", "given"}


@dataclass(frozen=True)
class Source:
    """One entry of a data file's `META`.

    An epoch holds `ratio` times the number of its records (above 1: some more than once); a fraction of a record is
    carried over to the next epoch. Or each source has a `weight`, its part of the samples: then an epoch has as many
    samples as there are records, and `weighted` makes ratios of weights.
    `given`: the first half of each image, its upper panel, is read without being learnt.
    """

    path: str
    type: str = "default"
    ratio: float = 1.0
    weight: float = 0.0
    given: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.type, str):
            raise InputError(f"type of {self.path} must be a name, got {self.type!r}")
        if not is_number(self.ratio) or not 0 < self.ratio <= _RATIO_LIMIT:
            raise InputError(f"ratio of {self.path} must be above 0 and at most {_RATIO_LIMIT}, got {self.ratio!r}")
        if not is_number(self.weight) or not 0 <= self.weight <= _WEIGHT_LIMIT:
            raise InputError(f"weight of {self.path} must be a number from 0 to {_WEIGHT_LIMIT}, got {self.weight!r}")
        if not isinstance(self.given, bool):
            raise InputError(f"given of {self.path} must be true or false, got {self.given!r}")


def weighted(sources: list[Source], counts: list[int]) -> list[Source]:
    """The sources with ratios that give each its weight's part of an epoch; as they are, where none has a weight.

    Raises:
        InputError: a weight would need some record over a thousand times an epoch.
    """
    total = sum(source.weight for source in sources)
    if not total:
        return sources
    ratios = [source.weight / total * sum(counts) / count for source, count in zip(sources, counts, strict=True)]
    for source, ratio in zip(sources, ratios, strict=True):
        if not 0 < ratio <= _RATIO_LIMIT:
            raise InputError(f"weight of {source.path} must let its records be seen more than never and at most "
                             f"{_RATIO_LIMIT} times an epoch, got {source.weight!r} of {total!r}; change the "
                             "weights")  # fmt: skip
    return [replace(source, ratio=ratio) for source, ratio in zip(sources, ratios, strict=True)]


def read_sources(data_config: str | Path) -> list[Source]:
    """The `META: [{path, type, ratio or weight, given}]` of a YAML file; relative paths start at the working directory.

    Raises:
        InputError: the file cannot be read, or has other keys.
    """
    text = read_text(data_config, "--data_config")
    try:
        raw = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (OmegaConfBaseException, yaml.YAMLError, RecursionError, TypeError, ValueError) as error:
        raise InputError(f"--data_config {data_config} cannot be read as YAML ({cause(error)}); see "
                         "configs/data/") from None  # fmt: skip
    entries = raw.get("META") if isinstance(raw, dict) else None
    if not isinstance(entries, list) or not entries or set(raw) != {"META"}:
        raise InputError(f"--data_config {data_config} must hold one list, META; see configs/data/")
    sources = []
    for entry in entries:
        fits = isinstance(entry, dict) and isinstance(entry.get("path"), str)
        if not fits or not _KEYS >= set(entry) or {"ratio", "weight"} <= set(entry):
            rule = "an entry has path, type, ratio or weight, and given"
            raise InputError(f"--data_config {data_config}: {rule}, got {entry!r}")
        sources.append(Source(**entry))
    if len({source.weight > 0 for source in sources}) > 1:
        raise InputError(f"--data_config {data_config}: give all entries a weight above 0, or none")
    return sources


class TokenDataset:
    """All records of some sources.

    A sample is numbered (source, record, repeat) -> one integer; its length is known without reading it. Records of
    more than `longest` ids are left out, and the log says how many (0: all are kept, for `check` to complain of).

    Attributes:
        lengths: (N,) ids of each record. kinds: (N,) number of the source's type.

    Raises:
        InputError: a record file is missing, damaged or empty.
    """

    def __init__(self, sources: list[Source], vocabulary: Vocabulary, seed: int = 0, longest: int = 0) -> None:
        self.vocabulary, self.seed, self.longest = vocabulary, seed, longest
        self.files: list[str] = []
        types = sorted({source.type for source in sources})
        columns: list[np.ndarray] = []
        self.spans: list[tuple[int, int]] = []
        for source in sources:
            table = self._read(source, types.index(source.type))
            start = sum(map(len, columns))
            self.spans.append((start, start + len(table)))
            columns.append(table)
        counts = [stop - start for start, stop in self.spans]
        self.sources = weighted(sources, counts)
        self.shares = [Fraction(source.ratio).limit_denominator(_DENOMINATOR) for source in self.sources]
        an_epoch = float(sum(share * count for share, count in zip(self.shares, counts, strict=True)))
        if an_epoch < _FEWEST:
            raise InputError(f"--data_config: ratio must give at least {_FEWEST} records an epoch in all, got "
                             f"{an_epoch:.3g}; raise it")  # fmt: skip
        self.file_numbers, self.records, self.lengths, self.kinds = np.concatenate(columns).T
        self.given = np.concatenate([np.full(len(table), source.given)
                                     for source, table in zip(sources, columns, strict=True)])  # fmt: skip

    def _read(self, source: Source, kind: int) -> np.ndarray:
        rows = read_rows(source.path, "path in META")
        if not rows:
            raise InputError(f"{source.path} holds no records; see the bad items that lumina-mgpt pre-tokenize listed")
        base, known, table = Path(source.path).resolve().parent, {}, []
        for row in rows:
            file, length, record = _row(row, source.path)
            if file not in known:
                known[file] = len(self.files)
                self.files.append(str(_located(base, file)))
            table.append((known[file], record, length, kind))
        whole = np.array(table, dtype=np.int64)
        kept = whole[whole[:, 2] <= (self.longest or whole[:, 2].max())]
        if len(kept) < len(whole):
            log.warning("%s: %d of %d sequences have more than %d ids and are left out", source.path,
                        len(whole) - len(kept), len(whole), self.longest)  # fmt: skip
        if not len(kept):
            raise InputError(f"--overlong drop leaves nothing of {source.path}: its shortest sequence has "
                             f"{whole[:, 2].min()} ids, --max_seq_len is {self.longest}; raise it")  # fmt: skip
        return kept

    def check(self, max_seq_len: int) -> None:
        """What can be known to be wrong before anything is trained.

        Raises:
            InputError: sequences are longer than `max_seq_len` (says how many), or a source is of another vocabulary.
        """
        over = int((self.lengths > max_seq_len).sum())
        if over:
            raise InputError(
                f"--max_seq_len must be at least {self.lengths.max()}, got {max_seq_len}: {over} of "
                f"{len(self.lengths)} sequences are longer; raise it, pre-tokenize to a smaller --target_size, or "
                "leave them out with --overlong drop"
            )
        for source, (start, _) in zip(self.sources, self.spans, strict=True):
            ids = self.sequence(start).ids.tolist()
            ends = [n for n, id_ in enumerate(ids) if id_ == self.vocabulary.image_end_id]
            begins = [n for n, id_ in enumerate(ids) if id_ == self.vocabulary.image_start_id]
            try:
                for begin, end in zip(begins, ends, strict=True):
                    decode_image(torch.tensor(ids[begin : end + 1]), self.vocabulary)
            except ValueError as error:
                raise InputError(f"{source.path} was made with another vocabulary ({error}); pre-tokenize with the "
                                 "tokenizer and config.json of this model") from None  # fmt: skip

    def fingerprint(self) -> str:
        """Changes whenever the plan of an epoch would."""
        # `given` only where it is: a run from before there was such a thing goes on.
        # So is "turns", of sources whose records take turns: earlier versions drew them for each epoch anew.
        told = [(source.type, source.ratio, *[True] * source.given, *["turns"] * (share.denominator > 1))
                for source, share in zip(self.sources, self.shares, strict=True)]  # fmt: skip
        digest = hashlib.sha256(repr(told).encode())
        digest.update(self.lengths.tobytes() + self.records.tobytes())
        for start, _ in self.spans:  # other codes of the same pictures have the same lengths
            digest.update(self.sequence(start).ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def epoch(self, epoch: int) -> np.ndarray:
        """Numbers of the samples of an epoch, each source at its ratio; (M,), where M may be 0 after epoch 0.

        What a ratio leaves after its whole times goes round a fixed random order of the source's records: each epoch
        continues where the one before stopped, so that all are seen equally often.
        """
        parts = [np.empty(0, dtype=np.int64)]
        for n, (share, (start, stop)) in enumerate(zip(self.shares, self.spans, strict=True)):
            whole, part = divmod(share, 1)
            parts += [np.arange(start, stop) + repeat * len(self.lengths) for repeat in range(whole)]
            # Rounded up, so that the first epoch has a record of every source.
            first, last = (math.ceil(part * (stop - start) * at) for at in (epoch, epoch + 1))
            if last > first:
                order = generator(self.seed, "turns", n).permutation(stop - start)
                chosen = order[np.arange(first, last) % (stop - start)]
                parts.append(np.sort(chosen) + start + whole * len(self.lengths))
        return np.concatenate(parts)

    def length(self, samples: np.ndarray) -> np.ndarray:
        return self.lengths[samples % len(self.lengths)]

    def kind(self, samples: np.ndarray) -> np.ndarray:
        return self.kinds[samples % len(self.kinds)]

    def read(self, sample: int, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and labels (T,) of a sample, without its context in one case of ten, decided by (seed, epoch, sample).

        Raises:
            InputError: its shard is missing or damaged.
        """
        sequence = self.sequence(sample)
        ids, labels = sequence.ids, sequence.labels
        if unit(self.seed, "context", epoch, sample) < DROPPED_SHARE:
            ids, labels = map(torch.tensor, drop_context(ids.tolist(), labels.tolist(), self.vocabulary))
        return ids, self._lower(labels) if self.given[sample % len(self.lengths)] else labels

    def _lower(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (T,) from the second half of the labelled codes on: of the lower panel."""
        places = self.vocabulary.is_code(labels).nonzero().flatten()
        if not len(places):
            return labels
        return labels.where(torch.arange(len(labels)) >= places[len(places) // 2], IGNORED)

    def name(self, sample: int) -> dict:
        """Where a sample lies: the shard, and its record there."""
        number = int(sample) % len(self.lengths)
        return {"file": self.files[self.file_numbers[number]], "id": int(self.records[number])}

    def sequence(self, sample: int) -> Sequence:
        """A sample as it lies on the disk."""
        number = int(sample) % len(self.lengths)
        path = self.files[self.file_numbers[number]]
        sequence = read_sequence(path, int(self.records[number]))
        if len(sequence.ids) != self.lengths[number]:
            raise InputError(f"{path}: record {self.records[number]} has {len(sequence.ids)} ids, its record file says "
                             f"{self.lengths[number]}; run lumina-mgpt concat-records again")  # fmt: skip
        lowest, highest = map(int, sequence.ids.aminmax())
        if lowest < 0 or highest >= self.vocabulary.vocab_size:
            raise InputError(f"{path} holds ids {lowest} to {highest}, the model has {self.vocabulary.vocab_size}; "
                             "pre-tokenize with the tokenizer of this model")  # fmt: skip
        return sequence


def _row(row: object, source: str) -> tuple[str, int, int]:
    """File, length and number of a record in a record file. Raises InputError where it is damaged."""
    file, *numbers = (row.get(key) for key in ("file", "len", "id")) if isinstance(row, dict) else (None, None, None)
    numbers = [int(number) if isinstance(number, str) and number.isdecimal() else number for number in numbers]
    whole = all(type(number) is int and 0 <= number < 2**63 for number in numbers)
    if not isinstance(file, str) or not whole or not numbers[0]:
        raise InputError(f"{source}: a record is {{file, len, id}}, got {str(row)[:200]}; make the file with "
                         "lumina-mgpt concat-records")  # fmt: skip
    return file, *numbers


def _located(base: Path, file: str) -> Path:
    """Path of a shard that a record file in folder `base` names; on Windows, that may have been with backslashes."""
    path = base / file
    if "\\" in file and "/" not in file and not os.path.lexists(path):
        return base / file.replace("\\", "/")
    return path
