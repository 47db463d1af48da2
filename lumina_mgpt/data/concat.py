"""Shards of all ranks -> one record file.

Before: pre_tokenize.py wrote the shards. Next: dataset.py reads the record file for training.
"""

import os
from pathlib import Path

from lumina_mgpt.data.job import RankFiles
from lumina_mgpt.data.record_files import comparable, write_record_file
from lumina_mgpt.data.shards import read_index
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_json, read_rows


def concat_records(sub_record_dir: str | Path, save_path: str | Path) -> tuple[int, int]:
    """Checks every shard of every rank and writes one record file.

    Args:
        sub_record_dir: the `out_dir` of the pre-tokenization. The shards stay there.
        save_path: record file to write, `.jsonl` or `.json`. Its rows give the paths of shards relative to its folder.

    Returns:
        Number of records in the written file, and number of records that the pre-tokenization left out.

    Raises:
        InputError: a rank is missing or unfinished, a shard is damaged, the record file of a rank does not match its
            shards, or `save_path` has another extension.
    """
    folder, save_path = Path(sub_record_dir), Path(save_path)
    if save_path.suffix not in (".json", ".jsonl"):
        raise InputError(f"must end in .json or .jsonl, got {save_path}", "save_path")
    rows, bad = [], 0
    for job in _read_jobs(folder):
        part, left_out = _check_rank(folder, job)
        rows += part
        bad += left_out
    try:
        shift = Path(os.path.relpath(folder.resolve(), save_path.resolve().parent))
    except ValueError:  # on Windows, folders of two drives
        shift = folder.resolve()
    write_record_file(save_path, [row | {"file": (shift / row["file"]).as_posix()} for row in rows])
    return len(rows), bad


def _read_jobs(folder: Path) -> list[dict]:
    """Job files of all ranks, in order. Raises InputError if one is missing or differs from the others."""
    jobs = sorted((_read_job(path) for path in folder.glob("*-of-*-job.json")), key=lambda job: job["rank"])
    if not jobs:
        raise InputError(
            f"{folder} holds no work of a pre-tokenization; give the folder that one wrote", "sub_record_dir"
        )
    splits, ranks = jobs[0]["splits"], [job["rank"] for job in jobs]
    if len(ranks) != splits or ranks != list(range(splits)):
        raise InputError(f"{folder} holds ranks {ranks} of {splits}; pre-tokenize all of them", "sub_record_dir")
    if any(job | {"rank": 0} != jobs[0] for job in jobs):
        raise InputError(f"{folder}: its ranks were made with different settings; start over", "sub_record_dir")
    return jobs


def _read_job(path: Path) -> dict:
    """The job file of a rank. Raises InputError if it is damaged or renamed."""
    job = read_json(path, "sub_record_dir")
    numbers = {name: job.get(name) for name in ("rank", "splits", "records", "block")}
    whole = all(type(number) is int and number >= 0 for number in numbers.values()) and numbers["block"] != 0
    if not whole or path.name != f"{numbers['rank']}-of-{numbers['splits']}-job.json":
        raise InputError(f"{path} is damaged or renamed; pre-tokenize in an empty folder", "sub_record_dir")
    return job


def _check_rank(folder: Path, job: dict) -> tuple[list[dict], int]:
    """Rows of a rank's record file, and number of records left out.

    Raises:
        InputError: a shard is missing or damaged, or the record file does not match the shards.
    """
    files = RankFiles(folder, job["rank"], job["splits"], job["records"], job["block"])
    again = f"pre-tokenize rank {job['rank']} again"
    rows, bad, seen = [], 0, []
    for block in range(len(files.blocks)):
        path = files.shard(block)
        if not path.exists():
            raise InputError(f"{path} is missing: rank {job['rank']} is not finished; {again}")
        index = read_index(path, check=True)
        rows += index.rows(path.relative_to(folder))
        bad += len(index.bad)
        seen += index.records + [item["id"] for item in index.bad]
    if sorted(seen) != list(files.part):
        raise InputError(f"{folder}: the shards of rank {job['rank']} do not hold each record once; start over")
    if sorted(map(comparable, read_rows(files.record, "sub_record_dir"))) != sorted(map(comparable, rows)):
        raise InputError(f"{files.record} does not list its shards; {again}")
    return rows, bad
