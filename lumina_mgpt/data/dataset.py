"""Record files -> samples of ids and labels for training.

Before: record_files.py lists the sequences, and sources.py says how often each sequence is seen. Next: batches.py plans
the batches and makes their tensors. The same seed and epoch give the same random choices.
"""

import hashlib
import logging
import math
from fractions import Fraction

import numpy as np
import torch

from lumina_mgpt.data.record_files import read_record_file
from lumina_mgpt.data.seeding import generator, uniform
from lumina_mgpt.data.shards import Sequence, read_sequence
from lumina_mgpt.data.sources import Source, weighted
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.unirep import IGNORED, decode_image, drop_context
from lumina_mgpt.vocabulary import Vocabulary

log = logging.getLogger(__name__)

CONTEXT_DROPOUT = 0.1  # share of sequences that lose their context, from the released training; guidance needs them
_DENOMINATOR = 10**12  # limit of a ratio's denominator: 0.1 becomes exactly 1/10, which no float is
_MIN_RECORDS = 0.001  # per epoch: Feed skips empty epochs one by one, so there must not be too many


class TokenDataset:
    """All N records of several sources, with indices from 0 to N - 1.

    An epoch consists of samples. A record that is seen several times in an epoch gives several samples. The index of a
    sample is its record's index + N * repeat, where `repeat` counts from 0. The length of a sample is known without
    reading the sample.

    Args:
        sources: record files, with their ratios or weights.
        vocabulary: vocabulary of the model.
        seed: selects the records of fractional ratios, and the samples without context.
        several: whether dropped contexts include those of sequences with several images, see `unirep.drop_context`.
        context_dropout: share of the samples that lose their context.
        longest: largest number of ids in a sequence. Longer sequences are left out, and the log counts them. 0 keeps
            all sequences, and `check` then raises an error for those that are too long.

    Attributes:
        lengths: number of ids of each record.
        kinds: index of each record's type in the sorted list of types. All records of a batch have the same type.
        spans: (start, stop) of each source: its records have the indices start to stop - 1.

    Shapes: lengths, kinds (N,).

    Raises:
        InputError: a record file is missing, damaged or empty, or the ratios are too small.
    """

    def __init__(
        self,
        sources: list[Source],
        vocabulary: Vocabulary,
        seed: int = 0,
        longest: int = 0,
        several: bool = False,
        context_dropout: float = CONTEXT_DROPOUT,
    ) -> None:
        self.vocabulary, self.seed, self.longest, self.several = vocabulary, seed, longest, several
        self.context_dropout = context_dropout
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
        self.ratios = [Fraction(source.ratio).limit_denominator(_DENOMINATOR) for source in self.sources]
        expected = float(sum(ratio * count for ratio, count in zip(self.ratios, counts, strict=True)))
        if expected < _MIN_RECORDS:
            rule = f"must have ratios that give at least {_MIN_RECORDS} records an epoch in all, got {expected:.3g}"
            raise InputError(f"{rule}; raise a ratio", "data_config")
        self.file_numbers, self.records, self.lengths, self.kinds = np.concatenate(columns).T
        self.given = np.concatenate(
            [np.full(len(table), source.given) for source, table in zip(sources, columns, strict=True)]
        )

    def _read(self, source: Source, kind: int) -> np.ndarray:
        """Table (records, 4) of a source: file number, record, length, kind."""
        known: dict[str, int] = {}
        table = []
        with caused_by("data_config"):
            entries = read_record_file(source.path)
        for file, length, record in entries:
            if file not in known:
                known[file] = len(self.files)
                self.files.append(file)
            table.append((known[file], record, length, kind))
        whole = np.array(table, dtype=np.int64)
        kept = whole[whole[:, 2] <= (self.longest or whole[:, 2].max())]
        if len(kept) < len(whole):
            left_out = len(whole) - len(kept)
            log.warning(
                "%s: %d of %d sequences have more than %d ids and are left out",
                source.path,
                left_out,
                len(whole),
                self.longest,
            )
        if not len(kept):
            shortest = whole[:, 2].min()
            raise InputError(
                f"must be at least {shortest}, the shortest sequence of {source.path}, got {self.longest}: "
                "overlong=drop leaves nothing",
                "max_seq_len",
            )
        return kept

    def check(self, max_seq_len: int) -> None:
        """Checks lengths and vocabulary before training starts.

        The check of the vocabulary decodes the images of one record per source.

        Args:
            max_seq_len: largest number of ids in a sequence.

        Raises:
            InputError: sequences are longer than `max_seq_len`, or a source was made with another vocabulary.
        """
        over = int((self.lengths > max_seq_len).sum())
        if over:
            raise InputError(
                f"must be at least {self.lengths.max()}, got {max_seq_len}: {over} of {len(self.lengths)} sequences "
                "are longer; raise it, pre-tokenize smaller pictures, or leave them out with overlong=drop",
                "max_seq_len",
            )
        for source, (start, _) in zip(self.sources, self.spans, strict=True):
            with caused_by("data_config"):
                ids = self.sequence(start).ids.tolist()
            ends = [n for n, id_ in enumerate(ids) if id_ == self.vocabulary.image_end_id]
            begins = [n for n, id_ in enumerate(ids) if id_ == self.vocabulary.image_start_id]
            try:
                if (ids[0], ids[-1]) != (self.vocabulary.bos_id, self.vocabulary.turn_end_id):
                    raise ValueError(f"a sequence begins with id {ids[0]} and ends with {ids[-1]}")
                for begin, end in zip(begins, ends, strict=True):
                    decode_image(torch.tensor(ids[begin : end + 1]), self.vocabulary)
            except ValueError as error:
                raise InputError(
                    f"{source.path} was made with another vocabulary ({error}); pre-tokenize with the tokenizer and "
                    "config.json of this model",
                    "data_config",
                ) from None

    def fingerprint(self) -> str:
        """Hash of everything that determines the plan of an epoch."""
        # `given` and "turns" are hashed only if they apply: runs of earlier versions, which had neither, can resume.
        # "turns": the records of a fractional ratio take turns. Earlier versions drew them anew for each epoch.
        options = [
            (source.type, source.ratio, *[True] * source.given, *["turns"] * (ratio.denominator > 1))
            for source, ratio in zip(self.sources, self.ratios, strict=True)
        ]
        digest = hashlib.sha256(repr(options).encode())
        digest.update(self.lengths.tobytes() + self.records.tobytes())
        for start, _ in self.spans:  # codes of another tokenizer have the same lengths
            digest.update(self.sequence(start).ids.numpy().tobytes())
        return digest.hexdigest()[:16]

    def epoch(self, epoch: int) -> np.ndarray:
        """The indices of the samples of an epoch. The ratio of each source determines how many samples it contributes.

        The integer part of a ratio takes all records of the source that many times. The fractional part cycles through
        a fixed permutation of these records. Each epoch continues where the previous epoch stopped, so that all records
        are seen equally often.

        Args:
            epoch: index of the epoch, from 0.

        Shapes: result (M,). M may be 0, except in epoch 0.
        """
        parts = [np.empty(0, dtype=np.int64)]
        for n, (ratio, (start, stop)) in enumerate(zip(self.ratios, self.spans, strict=True)):
            whole, part = divmod(ratio, 1)
            parts += [np.arange(start, stop) + repeat * len(self.lengths) for repeat in range(whole)]
            # Rounds up, so that the first epoch has a record of every source.
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
        """Ids and labels of a sample for training.

        The share `context_dropout` of all samples loses its context. The seed, the epoch and the sample's
        index select these samples.

        Args:
            sample: index of the sample.
            epoch: index of the epoch.

        Shapes: ids and labels (T,), with T ids in the sample.

        Raises:
            InputError: the shard is missing or damaged.
        """
        sequence = self.sequence(sample)
        ids, labels = sequence.ids, sequence.labels
        if uniform(self.seed, "context", epoch, sample) < self.context_dropout:
            ids, labels = map(torch.tensor, drop_context(ids.tolist(), labels.tolist(), self.vocabulary, self.several))
        return ids, self._lower(labels) if self.given[sample % len(self.lengths)] else labels

    def _lower(self, labels: torch.Tensor) -> torch.Tensor:
        """Labels (T,) without those of the upper panel, the first half of the labelled codes."""
        positions = self.vocabulary.is_code(labels).nonzero().flatten()
        if not len(positions):
            return labels
        return labels.where(torch.arange(len(labels)) >= positions[len(positions) // 2], IGNORED)

    def locate(self, sample: int) -> dict:
        """The path of a sample's shard, and the index of its record in the input of pre-tokenization, for logs."""
        number = int(sample) % len(self.lengths)
        return {"file": self.files[self.file_numbers[number]], "id": int(self.records[number])}

    def sequence(self, sample: int) -> Sequence:
        """The complete sequence of a sample, context included.

        Args:
            sample: index of the sample.

        Raises:
            InputError: the shard is missing or damaged, or does not match the record file or the vocabulary.
        """
        number = int(sample) % len(self.lengths)
        path = self.files[self.file_numbers[number]]
        sequence = read_sequence(path, int(self.records[number]))
        if len(sequence.ids) != self.lengths[number]:
            raise InputError(
                f"{path}: record {self.records[number]} has {len(sequence.ids)} ids, its record file says "
                f"{self.lengths[number]}; concatenate the records again"
            )
        lowest, highest = map(int, sequence.ids.aminmax())
        if lowest < 0 or highest >= self.vocabulary.vocab_size:
            raise InputError(
                f"{path} holds ids {lowest} to {highest}, the model has {self.vocabulary.vocab_size}; pre-tokenize "
                "with the tokenizer of this model"
            )
        return sequence
