"""Inputs and outputs of pre-tokenization, for several test modules."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import main_of
from PIL import Image

from lumina_mgpt.data.inputs import read_input
from lumina_mgpt.data.job import PreTokenizeConfig
from lumina_mgpt.data.pre_tokenize import PreTokenizer
from lumina_mgpt.data.shards import Sequence, read_sequence, write_shard
from lumina_mgpt.data.sources import Source, read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.unirep import encode_conversation
from lumina_mgpt.vocabulary import Vocabulary


def square(color: str = "red", form: str = "PNG") -> bytes:
    """File content of a one-color picture, 64 x 64."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, form)
    return buffer.getvalue()


def picture(path: Path, size=(64, 64), seed=0) -> str:
    """Writes a random picture; returns its path."""
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    return str(path)


def write_records(folder: Path, records: list, name="in.jsonl") -> Path:
    """Writes an input of pre-tokenization, `.json` or `.jsonl`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    lines = [json.dumps(record) for record in records]
    path.write_text("\n".join(lines) + "\n" if path.suffix == ".jsonl" else "[" + ",".join(lines) + "]")
    return path


def tokenize(tools, path: Path, out: Path, progress=lambda records: None, **options) -> PreTokenizer:
    """Pre-tokenizes an input; `tools` is the fixture, `options` those of PreTokenizeConfig."""
    job = PreTokenizer(PreTokenizeConfig(str(out), **({"target_size": 64} | options)), read_input(path), *tools)
    job.run(progress)
    return job


def pre_tokenize_command(in_filename: Path, out: Path, checkpoint: Path) -> int:
    """Exit status of the command."""
    return main_of("pre_tokenize")(
        [
            "--in_filename",
            str(in_filename),
            "--out_dir",
            str(out),
            "--model_path",
            str(checkpoint),
            "--target_size",
            "64",
            "--device",
            "cpu",
        ]
    )


def rows_of(out: Path, name="0-of-1-record.jsonl") -> list[dict]:
    """Rows of a JSON lines file in an output folder."""
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def assert_same_ids(folder: Path, one: str, other: str) -> None:
    """Asserts that two outputs of pre-tokenize, subfolders of `folder`, hold the same ids in the same order."""
    rows = zip(rows_of(folder / one), rows_of(folder / other), strict=True)
    for pair in rows:
        ids = [
            read_sequence(folder / part / row["file"], row["id"]).ids
            for part, row in zip((one, other), pair, strict=True)
        ]
        assert torch.equal(*ids)


def refuse_sources(folder: Path, text: str, match: str | None = None) -> None:
    """Asserts that a data file with this text is refused."""
    (folder / "data.yaml").write_text(text)
    with pytest.raises(InputError, match=match):
        read_sources(folder / "data.yaml")


def make_source(folder: Path, vocabulary: Vocabulary, count: int, name: str = "a", **source) -> Source:
    """`count` sequences of three sizes, in two shards."""
    sequences = []
    for n in range(count):
        codes = torch.full((4, 4 * (1 + n % 3)), n % 64)
        ids, labels = encode_conversation([("human", [f"a cat {n}"]), ("assistant", [codes])], vocabulary)
        sequences.append(Sequence(n, torch.tensor(ids), torch.tensor(labels)))
    rows = []
    for part, half in enumerate((sequences[: count // 2], sequences[count // 2 :])):
        file = f"{name}{part}.safetensors"
        rows += write_shard(folder / file, half, []).rows(file)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), **source)
