"""Configuration of a pre-tokenization, and the files of each rank.

pre_tokenize.py writes these files. concat.py reads them.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from lumina_mgpt.data.inputs import Input
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import candidate_sizes


@dataclass(frozen=True)
class PreTokenizeConfig:
    """Which part of the input to tokenize, and how.

    Args:
        out_dir: folder for shards and record files.
        splits: number of parts that the input is divided into.
        rank: index of the part that this process tokenizes, from 0.
        target_size: images are cropped to about target_size x target_size pixels.
        keep_size: leave images whose sides are multiples of 32 uncropped.
        seed: selects the records whose instruction does not name the image size.
        batch_size: images per call of the image tokenizer.
        block: number of input rows per shard.
        workers: number of threads that read and crop images.
        panels_apart: encode each panel of an image separately; the value of `panels_apart` in ModelConfig.
        models: one hash over the text tokenizer's file and the weights of the image tokenizer.

    Raises:
        InputError: a value is out of range.
    """

    out_dir: str
    splits: int = 1
    rank: int = 0
    target_size: int = 768
    keep_size: bool = False
    seed: int = 0
    batch_size: int = 16
    block: int = 512
    workers: int = 2
    panels_apart: bool = False
    models: str = ""

    def __post_init__(self) -> None:
        if self.splits < 1:
            raise InputError(f"must be at least 1, got {self.splits}", "splits")
        if not 0 <= self.rank < self.splits:
            raise InputError(f"must be at least 0 and below splits={self.splits}, got {self.rank}", "rank")
        for name in ("batch_size", "block", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"must be at least 1, got {getattr(self, name)}", name)
        candidate_sizes(self.target_size)

    def description(self, source: Input) -> dict:
        """The content of the job file: everything that determines the shards.

        Args:
            source: the input to tokenize.
        """
        options = {key: value for key, value in asdict(self).items() if key not in ("out_dir", "batch_size", "workers")}
        return options | {"records": len(source.rows), "input": source.digest}

    def files(self, source: Input) -> "RankFiles":
        """The part of an input that this rank tokenizes, and the files that this rank writes.

        Args:
            source: the whole input.

        Raises:
            InputError: the part is empty.
        """
        files = RankFiles(Path(self.out_dir), self.rank, self.splits, len(source.rows), self.block)
        if not files.part:
            raise InputError(
                f"{source.path} has {len(source.rows)} records, none for this rank with splits={self.splits}",
                "in_filename",
            )
        return files


@dataclass(frozen=True)
class RankFiles:
    """One rank's part of the input, and the files that the rank writes.

    The part is divided into blocks. Each block becomes one shard.

    Args:
        folder: the `out_dir`, which all ranks share.
        rank, splits: index of the rank, and number of ranks.
        records: number of rows in the whole input.
        block: number of input rows per shard.
    """

    folder: Path
    rank: int
    splits: int
    records: int
    block: int

    @property
    def name(self) -> str:
        return f"{self.rank}-of-{self.splits}"

    @property
    def part(self) -> range:
        """The indices of the input rows that this rank tokenizes."""
        return range(self.records * self.rank // self.splits, self.records * (self.rank + 1) // self.splits)

    @property
    def blocks(self) -> list[range]:
        """For each shard, the indices of its input rows."""
        step, stop = self.block, self.part.stop
        return [range(start, min(start + step, stop)) for start in range(self.part.start, stop, step)]

    def shard(self, block: int) -> Path:
        return self.folder / "shards" / f"{self.name}-{block:05d}.safetensors"

    @property
    def job(self) -> Path:
        """Path of the job file: the configuration of the shards as JSON."""
        return self.folder / f"{self.name}-job.json"

    @property
    def record(self) -> Path:
        """Path of the record file, which lists the sequences in the shards."""
        return self.folder / f"{self.name}-record.jsonl"

    @property
    def bad(self) -> Path:
        """Path of the list of rows that were left out, with reasons."""
        return self.folder / f"{self.name}-bad.jsonl"
