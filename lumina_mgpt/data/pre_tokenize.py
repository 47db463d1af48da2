"""Records with pictures -> token shards: resumable after a kill at any moment, nothing lost, doubled or replaced.

A rank's part of the input is cut into blocks; a block becomes one shard, written atomically, and a shard that exists is
a finished block. The record file lists what the shards hold; it follows them and is rebuilt from them at every start.
"""

import hashlib
import json
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from lumina_mgpt.data.archive import Archive
from lumina_mgpt.data.folder import read_folder
from lumina_mgpt.data.records import Record, conversation, is_plain, parse_record
from lumina_mgpt.data.shards import Sequence, ShardIndex, read_index, write_shard
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_image, stacked
from lumina_mgpt.io import alone_in, append_lines, cause, json_line, read_json, read_rows, remedy, write_atomic
from lumina_mgpt.movqgan.tokenizer import ImageTokenizer
from lumina_mgpt.unirep import GRID_UNIT, UniRepError, encode_conversation
from lumina_mgpt.vocabulary import Vocabulary

log = logging.getLogger(__name__)

Stack = tuple[Path, ...]  # panels of one picture, from above


@dataclass(frozen=True)
class Settings:
    """Which part of which file to tokenize, and how.

    `panels_apart` as in ModelConfig; `models` fingerprints the tokenizer and MoVQGAN files.
    """

    in_filename: str
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
        if self.splits < 1 or not 0 <= self.rank < self.splits:
            raise InputError(f"--rank must be in 0 ... --splits - 1, got rank {self.rank} of {self.splits} splits")
        for name in ("batch_size", "block", "workers"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name} must be at least 1, got {getattr(self, name)}")
        candidate_sizes(self.target_size)

    @property
    def name(self) -> str:
        return f"{self.rank}-of-{self.splits}"


def fingerprint(*paths: Path) -> str:
    """One digest of some files' contents."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
    return digest.hexdigest()[:16]


class PreTokenizer:
    """Tokenizes one rank's part of a record file.

    Raises:
        InputError: the input cannot be read, or `out_dir` holds the work of other settings.
    """

    def __init__(self, settings: Settings, vocabulary: Vocabulary, images: ImageTokenizer) -> None:
        self.settings, self.vocabulary, self.images = settings, vocabulary, images
        is_tar = settings.in_filename.endswith(".tar") and not os.path.isdir(settings.in_filename)
        self.archive = Archive(settings.in_filename) if is_tar else None
        self.rows, self.input = self._read_input(Path(settings.in_filename))
        self.first = len(self.rows) * settings.rank // settings.splits
        self.last = len(self.rows) * (settings.rank + 1) // settings.splits
        if self.first == self.last:
            raise InputError(f"--in_filename {settings.in_filename} has {len(self.rows)} records, none for this rank")
        self.sizes = candidate_sizes(settings.target_size)
        self.codes: dict[Stack, tuple[torch.Tensor, tuple[int, int]] | str] = {}  # or why there are none
        self.out = Path(settings.out_dir)
        self.good = self.bad = 0

    def _read_input(self, path: Path) -> tuple[list, str]:
        """The rows of a file or folder, and a digest of them."""
        if path.is_dir():
            rows = read_folder(path)
            told = (row if isinstance(row, dict) else {"reason": str(row)} for row in rows)
            return rows, hashlib.sha256("".join(map(json_line, told)).encode()).hexdigest()[:16]
        if not self.archive and path.suffix not in (".json", ".jsonl"):
            raise InputError(f"--in_filename must be a picture folder, or end in .json, .jsonl or .tar, got {path}; "
                             "check the path")  # fmt: skip
        rows = self.archive.rows if self.archive else read_rows(path, "--in_filename")
        return rows, fingerprint(path)

    @property
    def blocks(self) -> list[range]:
        step = self.settings.block
        return [range(start, min(start + step, self.last)) for start in range(self.first, self.last, step)]

    def shard(self, number: int) -> Path:
        return self.out / "shards" / f"{self.settings.name}-{number:05d}.safetensors"

    def run(self, progress: Callable[[int], None] = lambda records: None) -> None:
        """Does what is not done yet; `progress` is told the number of records after each block.

        Raises:
            InputError: another process does the same rank, or `out_dir` cannot be written or holds other work.
        """
        try:
            (self.out / "shards").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out_dir {self.out} cannot be made ({cause(error)}); {remedy(error)}") from None
        with alone_in(self.out, "--out_dir", f".{self.settings.name}.lock"):
            self._run(progress)

    def _run(self, progress: Callable[[int], None]) -> None:
        todo = self._resume(progress)
        records = {n: self._parse(n) for number in todo for n in self.blocks[number]}
        readable = [record for record in records.values() if isinstance(record, Record)]
        uses = Counter(part for record in readable for part in self._read_of(record))
        for number in todo:
            block = {n: records.pop(n) for n in self.blocks[number]}
            whole = [record for record in block.values() if isinstance(record, Record)]
            self._encode_images(part for record in whole for part in self._read_of(record))
            index = self._write(number, block)
            self._list([(self.shard(number), index)])
            for record in whole:
                uses.subtract(self._read_of(record))
            for part in [part for part in self.codes if not uses[part]]:
                del self.codes[part]
            progress(len(block))

    def _parse(self, number: int) -> Record | str:
        try:
            return parse_record(self.rows[number])
        except InputError as error:
            return str(error)

    def _resume(self, progress: Callable[[int], None]) -> list[int]:
        """Brings the record file in line with the shards; returns the blocks that are to be done."""
        job = asdict(self.settings) | {"records": len(self.rows), "input": self.input}
        for unimportant in ("in_filename", "out_dir", "batch_size", "workers"):
            del job[unimportant]
        path = self.out / f"{self.settings.name}-job.json"
        done = [number for number in range(len(self.blocks)) if self.shard(number).exists()]
        try:
            found = read_json(path)
        except InputError as error:  # missing or damaged: the settings that shards were made with are not known
            if done:
                raise InputError(f"--out_dir {self.out} holds shards of unknown settings ({error}); give an empty "
                                 "folder") from None  # fmt: skip
            found = job
        if found != job:
            differs = ", ".join(key for key in job | found if found.get(key) != job.get(key))
            raise InputError(f"--out_dir {self.out} holds work with other settings ({differs}); give an empty folder")
        write_atomic(path, json.dumps(job, indent=1))
        for kind in ("record", "bad"):
            write_atomic(self.out / f"{self.settings.name}-{kind}.jsonl", "")
        self._list([(self.shard(number), read_index(self.shard(number))) for number in done])
        progress(sum(len(self.blocks[number]) for number in done))
        return sorted(set(range(len(self.blocks))) - set(done))

    def _list(self, shards: list[tuple[Path, ShardIndex]]) -> None:
        name = self.settings.name
        rows = [row for path, index in shards for row in index.rows(path.relative_to(self.out))]
        bad = [item for _, index in shards for item in index.bad]
        append_lines(self.out / f"{name}-record.jsonl", rows)
        append_lines(self.out / f"{name}-bad.jsonl", bad)
        self.good, self.bad = self.good + len(rows), self.bad + len(bad)

    def _parts(self, image: Stack) -> list[Stack]:
        """What of a picture the image tokenizer reads at once: all panels, or each on its own."""
        return [(panel,) for panel in image] if self.settings.panels_apart else [image]

    def _read_of(self, record: Record) -> set[Stack]:
        return {part for image in record.images for part in self._parts(image)}

    def _encode_images(self, parts: Iterable[Stack]) -> None:
        """Fills `codes` for what is new, in batches of one size."""
        waiting: dict[tuple[int, int], list[tuple[Stack, Image.Image]]] = {}
        for part, image in self._read([part for part in dict.fromkeys(parts) if part not in self.codes]):
            if isinstance(image, str):
                self.codes[part] = image
                continue
            batch = waiting.setdefault(image.size, [])
            batch.append((part, image))
            if len(batch) == self.settings.batch_size:
                self._encode_batch(waiting.pop(image.size))
        for batch in waiting.values():
            self._encode_batch(batch)

    def _read(self, parts: list[Stack]) -> Iterator[tuple[Stack, Image.Image | str]]:
        """Cropped pictures, or why there are none, in order; workers are a batch or two ahead of who asks."""
        waiting: deque[tuple[Stack, Future]] = deque()
        with ThreadPoolExecutor(self.settings.workers) as pool:
            for part in parts:
                waiting.append((part, pool.submit(self._read_one, part)))
                if len(waiting) > 2 * self.settings.batch_size:
                    first, future = waiting.popleft()
                    yield first, future.result()
            yield from ((part, future.result()) for part, future in waiting)

    def _read_one(self, part: Stack) -> Image.Image | str:
        try:
            panels = [self._crop(open_image(path, self.archive and self.archive.open(path))) for path in part]
            _check_panels([panel.size for panel in panels])
            return stacked(panels)
        except InputError as error:
            return str(error)

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.settings.keep_size and not (image.width % GRID_UNIT or image.height % GRID_UNIT):
            return image
        return center_crop(image, best_size(image.size, self.sizes))

    @torch.inference_mode()
    def _encode_batch(self, batch: list[tuple[Stack, Image.Image]]) -> None:
        codes = self.images.encode([image for _, image in batch])  # (B, rows, cols)
        for (part, image), grid in zip(batch, codes, strict=True):
            self.codes[part] = grid, image.size

    def _write(self, number: int, block: dict[int, Record | str]) -> ShardIndex:
        sequences, bad = [], []
        for n, record in block.items():
            try:
                sequences.append(self._tokenize(n, record))
            except (InputError, UniRepError) as error:
                log.warning("record %d is left out: %s", n, error)
                bad.append({"id": n, "reason": str(error)})
        return write_shard(self.shard(number), sequences, bad)

    def _tokenize(self, number: int, record: Record | str) -> Sequence:
        if isinstance(record, str):
            raise InputError(record)
        codes, sizes = [], []
        for image in record.images:
            found = [self.codes[part] for part in self._parts(image)]
            for item in found:
                if isinstance(item, str):
                    raise InputError(item)
            _check_panels([size for _, size in found])
            codes.append(torch.cat([grid for grid, _ in found]))
            sizes.append((found[0][1][0], sum(height for _, (_, height) in found)))
        turns = conversation(record, codes, sizes, is_plain(self.settings.seed, number))
        ids, labels = encode_conversation(turns, self.vocabulary)
        return Sequence(number, torch.as_tensor(ids, dtype=torch.long), torch.as_tensor(labels, dtype=torch.long))


def _check_panels(sizes: list[tuple[int, int]]) -> None:
    if len(set(sizes)) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise InputError(f"panels of one picture must have one size after the crop, got {shown}")


def concat_records(sub_record_dir: str | Path, save_path: str | Path) -> tuple[int, int]:
    """Checks every shard of every rank and writes one record file; returns the numbers of records and of bad items.

    `save_path` ends in `.jsonl` (a line a record) or `.json` (one list); the shards stay where they are, and `file` in
    a row is their path from the folder of `save_path`.

    Raises:
        InputError: a rank is missing or unfinished, a shard is damaged, or a record file does not list its shards.
    """
    folder, save_path = Path(sub_record_dir), Path(save_path)
    if save_path.suffix not in (".json", ".jsonl"):
        raise InputError(f"--save_path must end in .json or .jsonl, got {save_path}")
    read = sorted((_read_job(path) for path in folder.glob("*-of-*-job.json")), key=lambda job: job["rank"])
    if not read:
        raise InputError(f"--sub_record_dir {folder} holds no work of lumina-mgpt pre-tokenize; give its --out_dir")
    splits = read[0]["splits"]
    ranks = [job["rank"] for job in read]
    if len(ranks) != splits or ranks != list(range(splits)):
        raise InputError(f"--sub_record_dir {folder} holds ranks {ranks} of {splits}; run pre-tokenize for all")
    if any(job | {"rank": 0} != read[0] for job in read):
        raise InputError(f"--sub_record_dir {folder}: its ranks were made with different settings; start over")
    rows, bad = [], 0
    for job in read:
        part, left_out = _check_rank(folder, job)
        rows += part
        bad += left_out
    base = save_path.resolve().parent
    try:
        shift = Path(os.path.relpath(folder.resolve(), base))
    except ValueError:  # on Windows, folders of two drives
        shift = folder.resolve()
    rows = [row | {"file": (shift / row["file"]).as_posix()} for row in rows]
    base.mkdir(parents=True, exist_ok=True)
    lines = [json_line(row) for row in rows]
    write_atomic(save_path, "".join(lines) if save_path.suffix == ".jsonl" else "[" + ",".join(lines) + "]")
    return len(rows), bad


def _read_job(path: Path) -> dict:
    """What a rank was asked to do. Raises InputError where the file is damaged, or belongs to another rank."""
    job = read_json(path, "--sub_record_dir: its")
    numbers = [job.get(name) for name in ("rank", "splits", "records", "block")]
    whole = all(type(number) is int for number in numbers) and min(numbers) >= 0 < numbers[3]
    if not whole or path.name != f"{job['rank']}-of-{job['splits']}-job.json":
        raise InputError(f"--sub_record_dir: {path} is damaged or renamed; run pre-tokenize in an empty folder")
    return job


def _check_rank(folder: Path, job: dict) -> tuple[list[dict], int]:
    name = f"{job['rank']}-of-{job['splits']}"
    again = f"run lumina-mgpt pre-tokenize --rank {job['rank']} again"
    first, last = (job["records"] * n // job["splits"] for n in (job["rank"], job["rank"] + 1))
    rows, bad, seen = [], 0, []
    for number in range(-(-(last - first) // job["block"])):
        path = folder / "shards" / f"{name}-{number:05d}.safetensors"
        if not path.exists():
            raise InputError(f"{path} is missing: rank {job['rank']} is not finished; {again}")
        index = read_index(path, check=True)
        rows += index.rows(path.relative_to(folder))
        bad += len(index.bad)
        seen += index.records + [item["id"] for item in index.bad]
    if sorted(seen) != list(range(first, last)):
        raise InputError(f"{folder}: the shards of rank {job['rank']} do not hold their records once each; start over")
    listed = read_rows(folder / f"{name}-record.jsonl", "--sub_record_dir")
    if sorted(map(_comparable, listed)) != sorted(map(_comparable, rows)):
        raise InputError(f"{folder}/{name}-record.jsonl does not list its shards; {again}")
    return rows, bad


def _comparable(row: object) -> str:
    """A row of a record file as text; equal for a row that was written on Windows with its separators."""
    if isinstance(row, dict) and isinstance(row.get("file"), str):
        row = row | {"file": row["file"].replace("\\", "/")}
    return json.dumps(row, sort_keys=True)
