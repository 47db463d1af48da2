"""Randomly damaged record files, token shards and checkpoints are read or raise InputError."""

import io
import json
import random
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from pictures import damaged
from training_runs import ONE, changed

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.archive import Archive
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.records import parse_record
from lumina_mgpt.data.shards import _open as open_shards
from lumina_mgpt.data.sources import read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_rows
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.training import run_folder
from lumina_mgpt.training.export import export_checkpoint
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

ROWS = [
    {"image_path": "a/猫.png", "prompt": "a cat \u2028 on a sofa"},
    {
        "conversations": [{"from": "human", "value": "What? <|image|>"}, {"from": "gpt", "value": "A cat."}],
        "image": ["a"],
    },
    {"conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "<|image|>"}], "image": [["a", "b"]]},
]
JSON_VALUES = (b"null", b"[]", b"{}", b"-1", b"1e999", b"NaN", b'"\\ud800"', b"true", b"9" * 5000, b"[" * 20000)


def changed_text(data: bytes, rng: random.Random) -> bytes:
    """The bytes of a JSON text with one value replaced, or randomly damaged."""
    if rng.random() < 0.5:
        return damaged(data, rng)
    starts = [index for index, byte in enumerate(data) if byte in b':[,"']
    start = rng.choice(starts) + 1
    stop = min(len(data), start + rng.randrange(12))
    return data[:start] + rng.choice(JSON_VALUES) + data[stop:]


def outcomes(copies: Iterator[object], read: Callable[[object], object]) -> tuple[int, int]:
    """Numbers of copies that are read and refused. Exceptions other than InputError fail the test."""
    accepted = refused = 0
    for number, copy in enumerate(copies):
        try:
            read(copy)
            accepted += 1
        except InputError as error:
            assert str(error), number
            refused += 1
    return accepted, refused


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_record_files(tmp_path, suffix):
    text = json.dumps(ROWS) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in ROWS)
    path, rng = tmp_path / f"records{suffix}", random.Random(1)

    def copies() -> Iterator[Path]:
        for _ in range(600):
            path.write_bytes(changed_text(text.encode(), rng))
            yield path

    def read(path: Path) -> None:
        for row in read_rows(path, "in_filename"):
            parse_record(row)

    accepted, refused = outcomes(copies(), read)
    assert accepted > 9 and refused > 200


def test_tars(tmp_path):
    path, rng = tmp_path / "a.tar", random.Random(2)
    with tarfile.open(path, "w") as tar:
        for number in range(4):
            parts = {"png": b"\x89PNG" * 40, "txt": b"a caption", "json": json.dumps({"caption": "a cat"}).encode()}
            for kind, data in parts.items():
                member = tarfile.TarInfo(f"{number}.{kind}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    whole = path.read_bytes()

    def copies() -> Iterator[Path]:
        for _ in range(400):
            path.write_bytes(damaged(whole, rng))
            yield path

    def read(path: Path) -> None:
        rows = Archive(path).rows
        assert len(rows) == 4, "a damaged tar lost samples without an error"

    accepted, refused = outcomes(copies(), read)
    assert accepted > 1 and refused > 100


def test_token_data(tokens, tiny_checkpoint, tmp_path):
    """The data YAML, the record file and the shard."""
    config = ModelConfig.from_json(tiny_checkpoint / "config.json")
    vocabulary, rng = Vocabulary.from_folder(tiny_checkpoint, config), random.Random(3)
    source = tokens.parent
    files = {name: (source / name).read_bytes() for name in ("records.jsonl", "a.safetensors")}
    files["data.yaml"] = (source / "data.yaml").read_bytes().replace(str(source).encode(), str(tmp_path).encode())

    def copies() -> Iterator[Path]:
        for number in range(300):
            target = list(files)[number % 3]
            for name, data in files.items():
                (tmp_path / name).write_bytes(changed_text(data, rng) if name == target else data)
            yield tmp_path / "data.yaml"

    def read(path: Path) -> None:
        open_shards.cache_clear()
        dataset = TokenDataset(read_sources(path), vocabulary)
        dataset.check(4096)
        for sample in dataset.epoch(0)[:64]:
            dataset.read(int(sample), 0)

    accepted, refused = outcomes(copies(), read)
    assert accepted > 1 and refused > 100


def load(folder: Path) -> None:
    config = ModelConfig.from_json(folder / "config.json")
    Vocabulary.from_folder(folder, config)
    load_model(folder, torch.float32, "cpu")
    ImageTokenizer.from_checkpoint(folder / "movqgan_270M.ckpt")


def test_checkpoint_folders(tiny_checkpoint, tmp_path):
    """Config, tokenizer files, weights and image tokenizer of a model."""
    rng, folder = random.Random(4), tmp_path / "copy"
    shutil.copytree(tiny_checkpoint, folder)
    names = [path.name for path in folder.iterdir() if path.suffix in (".json", ".safetensors", ".ckpt")]

    def copies() -> Iterator[Path]:
        for number in range(200):
            name = names[number % len(names)]
            data = (tiny_checkpoint / name).read_bytes()
            change = changed_text if name.endswith(".json") else damaged
            (folder / name).write_bytes(change(data, rng))
            yield folder
            (folder / name).write_bytes(data)

    accepted, refused = outcomes(copies(), load)
    assert accepted > 1 and refused > 50


def test_training_checkpoints(settings, tmp_path):
    """Any damaged byte of a training checkpoint is detected on resume and on export."""
    run = changed(settings, max_steps=1)
    Trainer(run, ONE).run()
    folder, rng = run_folder.newest(Path(run.output_dir)), random.Random(5)
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}

    def copies() -> Iterator[Path]:
        for number in range(60):
            name = sorted(whole)[number % len(whole)]
            data = whole[name]
            while data == whole[name]:
                data = damaged(whole[name], rng)
            (folder / name).write_bytes(data)
            yield folder
            (folder / name).write_bytes(whole[name])

    def resume(_: Path) -> None:
        Trainer(changed(run, max_steps=2, resume="auto"), ONE)

    accepted, refused = outcomes(copies(), resume)
    assert (accepted, refused) == (0, 60)
    (folder / sorted(whole)[0]).write_bytes(b"damaged")
    with pytest.raises(InputError):
        export_checkpoint(run.output_dir, tmp_path / "export")
