"""Input rows -> token shards, for one of several ranks.

The data pass through these modules: rows (inputs.py) -> Record (records.py) -> codes (image_codes.py) -> ids and labels
(unirep.py) -> shard (shards.py) -> record file (record_files.py). concat.py joins the record files of all ranks.

A run can be killed and started again at any time. Each block of rows becomes one shard. Shards are written atomically,
so that every existing shard is complete. Each start rebuilds the record file from the existing shards.
"""

import json
import logging
from collections.abc import Callable

import torch

from lumina_mgpt.data.image_codes import ImageCodes
from lumina_mgpt.data.inputs import Input
from lumina_mgpt.data.job import PreTokenizeConfig
from lumina_mgpt.data.records import Record, conversation, is_plain, parse_record, require_no_panels
from lumina_mgpt.data.shards import Sequence, ShardIndex, read_index, write_shard
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import SECOND, Family
from lumina_mgpt.io import alone_in, append_lines, cause, read_json, remedy, write_atomic
from lumina_mgpt.unirep import UniRepError, encode_conversation
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

log = logging.getLogger(__name__)


class PreTokenizer:
    """Tokenizes one rank's part of an input.

    Args:
        config: what to tokenize, and how.
        source: the whole input.
        vocabulary: vocabulary of the model.
        images: image tokenizer.
        family: family of the model.

    Attributes:
        files: the rank's part of the input, and the files that it writes.
        good, bad: number of tokenized records, and number of records left out. Both include earlier runs.

    Raises:
        InputError: the rank's part is empty.
    """

    def __init__(
        self,
        config: PreTokenizeConfig,
        source: Input,
        vocabulary: Vocabulary,
        images: ImageTokenizer,
        family: Family = SECOND,
    ) -> None:
        self.config, self.source, self.vocabulary, self.images = config, source, vocabulary, images
        self.family = family
        self.files = config.files(source)
        self.good = self.bad = 0

    def run(self, progress: Callable[[int], object] = lambda records: None) -> None:
        """Tokenizes all blocks that have no shard yet.

        Args:
            progress: called after each block with the number of its records. The first call gives the number of records
                that earlier runs finished.

        Raises:
            InputError: `out_dir` holds shards of another configuration or is not writable, or another process works on
                the same rank.
        """
        files = self.files
        try:
            (files.folder / "shards").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{files.folder} cannot be made ({cause(error)}); {remedy(error)}", "out_dir") from None
        with alone_in(files.folder, "out_dir", f".{files.name}.lock"):
            self._run(progress)

    def _run(self, progress: Callable[[int], object]) -> None:
        todo = self._resume(progress)
        blocks = self.files.blocks
        records = {n: self._parse(n) for block in todo for n in blocks[block]}
        codes = ImageCodes(self.images, self.config, self.source, _records_in(records))
        for block in todo:
            part = {n: records.pop(n) for n in blocks[block]}
            codes.encode(_records_in(part))
            index = self._write(block, part, codes)
            self._list([(block, index)])
            codes.release(_records_in(part))
            progress(len(part))

    def _parse(self, number: int) -> Record | InputError:
        try:
            record = parse_record(self.source.rows[number])
            require_no_panels(record, self.family)
            return record
        except InputError as error:
            return error

    def _resume(self, progress: Callable[[int], object]) -> list[int]:
        """Rebuilds the record file from existing shards; returns the blocks without a shard."""
        files = self.files
        blocks = range(len(files.blocks))
        done = [block for block in blocks if files.shard(block).exists()]
        job = self.config.description(self.source)
        self._check_job(job, bool(done))
        write_atomic(files.job, json.dumps(job, indent=1))
        for file in (files.record, files.bad):
            write_atomic(file, "")
        self._list([(block, read_index(files.shard(block))) for block in done])
        progress(sum(len(files.blocks[block]) for block in done))
        return [block for block in blocks if block not in set(done)]

    def _check_job(self, job: dict, has_shards: bool) -> None:
        """Raises InputError if the existing shards were made with another configuration."""
        try:
            found = read_json(self.files.job)
        except InputError as error:  # missing or damaged
            if has_shards:
                reason = f"{self.files.folder} holds shards of unknown settings ({error}); give an empty folder"
                raise InputError(reason, "out_dir") from None
            return
        if found != job:
            differs = ", ".join(key for key in job | found if found.get(key) != job.get(key))
            raise InputError(
                f"{self.files.folder} holds work with other settings ({differs}); give an empty folder", "out_dir"
            )

    def _list(self, shards: list[tuple[int, ShardIndex]]) -> None:
        """Appends the content of shards to the record file and the list of bad records."""
        files = self.files
        rows = [row for block, index in shards for row in index.rows(files.shard(block).relative_to(files.folder))]
        bad = [item for _, index in shards for item in index.bad]
        append_lines(files.record, rows)
        append_lines(files.bad, bad)
        self.good, self.bad = self.good + len(rows), self.bad + len(bad)

    def _write(self, block: int, records: dict[int, Record | InputError], codes: ImageCodes) -> ShardIndex:
        sequences, bad = [], []
        for n, record in records.items():
            try:
                sequences.append(self._tokenize(n, record, codes))
            except (InputError, UniRepError) as error:
                log.warning("record %d is left out: %s", n, error)
                bad.append({"id": n, "reason": str(error)})
        return write_shard(self.files.shard(block), sequences, bad)

    def _tokenize(self, number: int, record: Record | InputError, codes: ImageCodes) -> Sequence:
        if isinstance(record, InputError):
            raise record
        found = [codes.of(image) for image in record.images]
        grids, sizes = [grid for grid, _ in found], [size for _, size in found]
        turns = conversation(record, grids, sizes, is_plain(self.config.seed, number, self.family))
        ids, labels = encode_conversation(turns, self.vocabulary)
        return Sequence(number, torch.as_tensor(ids, dtype=torch.long), torch.as_tensor(labels, dtype=torch.long))


def _records_in(rows: dict[int, Record | InputError]) -> list[Record]:
    return [record for record in rows.values() if isinstance(record, Record)]
