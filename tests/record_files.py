"""Writes record files, tokenizes them and reads the result."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from lumina_mgpt.data.pre_tokenize import PreTokenizer, Settings


def picture(path: Path, size=(64, 64), seed=0) -> str:
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def write_records(folder: Path, records: list, name="in.jsonl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",".join(lines) + "]")
    return path


def tokenize(tools, path: Path, out: Path, **options) -> PreTokenizer:
    job = PreTokenizer(Settings(str(path), str(out), **({"target_size": 64} | options)), *tools)
    job.run()
    return job


def rows_of(out: Path, name="0-of-1-record.jsonl") -> list[dict]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]
