"""Token records of one or several files as one data set, a function of (seed, epoch) in everything random."""

import hashlib
import logging
import math
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

from lumina_mgpt.data.seeding import generator, uniform
from lumina_mgpt.data.shards import Sequence, read_sequence
from lumina_mgpt.data.sources import Source, weighted
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_rows
from lumina_mgpt.unirep import IGNORED, decode_image, drop_context
from lumina_mgpt.vocabulary import Vocabulary

log = logging.getLogger(__name__)

CONTEXT_DROPOUT = 0.1  # of the sequences lose their context, as released; guidance needs them
_DENOMINATOR = 10**12  # ratios are fractions with no larger one: 0.1 is a tenth, which no float is
_FEWEST = 0.001  # records an epoch: an epoch in which none is due is passed over, and the next one is looked for


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
        if uniform(self.seed, "context", epoch, sample) < CONTEXT_DROPOUT:
            ids, labels = map(torch.tensor, drop_context(ids.tolist(), labels.tolist(), self.vocabulary))
        return ids, self._lower(labels) if self.given[sample % len(self.lengths)] else labels

    def _lower(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (T,) from the second half of the labelled codes on: of the lower panel."""
        places = self.vocabulary.is_code(labels).nonzero().flatten()
        if not len(places):
            return labels
        return labels.where(torch.arange(len(labels)) >= places[len(places) // 2], IGNORED)

    def locate(self, sample: int) -> dict:
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
