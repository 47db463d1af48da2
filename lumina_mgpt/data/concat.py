"""Shards of all ranks -> one record file, after a check of every byte."""

import json
import os
from pathlib import Path

from lumina_mgpt.data.shards import read_index
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import json_line, read_json, read_rows, write_atomic


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
