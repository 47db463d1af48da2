"""Inputs from other sources: pickled records of the released code, webdataset tars, folders, weighted mixtures."""

import io
import json
import os
import pickle
import subprocess
import tarfile
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image
from records import assert_same_ids, make_source, picture, refuse_sources, rows_of, tokenize, write_records
from training_runs import ROOT, environment, path_with_python

from lumina_mgpt.data.batches import BatchSize, plan_epoch
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.released import read_released
from lumina_mgpt.data.shards import read_sequence
from lumina_mgpt.data.sources import Source, read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.unirep import encode_conversation

# -- pickled records ---------------------------------------------------------------------------------------------------


def test_released_records_are_read_without_conversion(vocabulary, tmp_path):
    rows, wanted = [], []
    for n in range(3):
        codes = torch.full((4, 4), n)
        ids, labels = encode_conversation([("human", [f"cat {n}"]), ("assistant", [codes])], vocabulary)
        with open(tmp_path / f"{n}.pkl", "wb") as file:
            pickle.dump({"token": list(ids), "label": list(labels), "id": n}, file, protocol=n + 2)
        rows.append({"file": str(tmp_path / f"{n}.pkl"), "len": len(ids), "id": n})
        wanted.append((ids, labels))
    (tmp_path / "record.json").write_text(json.dumps(rows))
    dataset = TokenDataset([Source(str(tmp_path / "record.json"))], vocabulary)
    dataset.check(4096)
    for n, (ids, labels) in enumerate(wanted):
        sequence = dataset.sequence(n)
        assert sequence.ids.tolist() == list(ids) and sequence.labels.tolist() == list(labels)


class Malicious:
    """Makes a folder when it is unpickled by `pickle.loads`."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(6))
def test_no_code_in_a_pickle_is_run(tmp_path, protocol):
    harmful = pickle.dumps({"token": [1], "label": [1], "x": Malicious(tmp_path / "ran")}, protocol=protocol)
    (tmp_path / "a.pkl").write_bytes(harmful)
    with pytest.raises(InputError, match="asks for"):
        read_released(tmp_path / "a.pkl")
    assert not (tmp_path / "ran").exists()
    pickle.loads(harmful)  # shows that the pickle is harmful
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "content",
    [
        {"token": [1, 2], "label": [1]},
        {"token": [], "label": []},
        {"token": [1.0], "label": [1]},
        [1],
        {"token": [1]},
        {"token": [1, 2], "label": [-100, 3]},
        {"token": [-1], "label": [-1]},
        {"token": [2**40], "label": [2**40]},
    ],
)
def test_other_pickles_are_refused_with_a_one_line_error(tmp_path, content):
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(InputError, match="a.pkl") as caught:
        read_released(tmp_path / "a.pkl")
    assert "\n" not in str(caught.value)


def test_damaged_pickles_are_refused(tmp_path):
    whole = pickle.dumps({"token": list(range(50)), "label": list(range(50))})
    for damaged in (b"", whole[:30], b"\x80\x04garbage", whole[:10] + b"\xff" + whole[11:]):
        (tmp_path / "a.pkl").write_bytes(damaged)
        with pytest.raises(InputError, match="a.pkl"):
            read_released(tmp_path / "a.pkl")
    with pytest.raises(InputError, match="missing.pkl"):
        read_released(tmp_path / "missing.pkl")


# -- tars --------------------------------------------------------------------------------------------------------------


def make_tar(path, members: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def png(seed: int, form: str = "PNG") -> bytes:
    values, buffer = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8), io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    return buffer.getvalue()


def test_a_tar_gives_the_same_tokens_as_its_files(tools, tmp_path):
    """Covers text and JSON captions, a conversation with two pictures, and two bad samples."""
    talk = [{"from": "human", "value": "same? <|image|><|image|>"}, {"from": "gpt", "value": "no"}]
    members = {
        "a/0.png": png(0),
        "a/0.txt": b"a cat\n",
        "a/1.json": b'{"caption": "a dog"}',
        "a/1.png": png(1),
        "a/2.x.png": png(0),
        "a/2.y.png": png(1),
        "a/2.json": json.dumps({"conversations": talk}).encode(),
        "a/3.png": png(3),
        "a/4.png": b"no picture",
        "a/4.txt": b"a cow",
    }
    tar = make_tar(tmp_path / "in.tar", members)
    job = tokenize(tools, tar, tmp_path / "tar")
    assert (job.good, job.bad) == (3, 2)
    reasons = {row["id"]: row["reason"] for row in rows_of(tmp_path / "tar", "0-of-1-bad.jsonl")}
    assert "in.tar/a/3 has no caption" in reasons[3] and "in.tar/a/4.png is not a picture" in reasons[4]
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(2)]
    records = [
        {"image_path": names[0], "prompt": "a cat"},
        {"image_path": names[1], "prompt": "a dog"},
        {"conversations": talk, "image": names},
    ]
    tokenize(tools, write_records(tmp_path, records), tmp_path / "files")
    assert_same_ids(tmp_path, "tar", "files")


def test_a_damaged_tar_is_named(tools, tmp_path):
    tar = make_tar(tmp_path / "in.tar", {"0.png": png(0), "0.txt": b"a cat"})
    (tmp_path / "in.tar").write_bytes(b"x" + (tmp_path / "in.tar").read_bytes()[1:])
    for path in (tar, str(tmp_path / "missing.tar")):
        with pytest.raises(InputError, match="^in_filename .* as a tar"):
            tokenize(tools, path, tmp_path / "out")


@pytest.mark.parametrize("workers", [1, 5])
def test_the_number_of_workers_does_not_change_the_tokens(tools, tmp_path, workers):
    """Uses more pictures than are read in advance, of two sizes, one of them missing."""
    names = [picture(tmp_path / f"{n}.png", (64, 64) if n % 2 else (96, 32), n) for n in range(9)]
    records = [{"image_path": name, "prompt": "a cat"} for name in (*names, "missing.png")]
    job = tokenize(tools, write_records(tmp_path, records), tmp_path / "out", workers=workers, batch_size=2)
    assert (job.good, job.bad) == (9, 1)
    codes = [
        tuple(read_sequence(tmp_path / "out" / row["file"], row["id"]).ids.tolist())
        for row in rows_of(tmp_path / "out")
    ]
    assert len(set(codes)) == 9


# -- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_gives_the_same_tokens_as_a_record_file(tools, tmp_path):
    """Covers captions in text files, in a generated PNG and in a subfolder, and a picture without caption."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for n, name in enumerate(("b.png", "c.png", "d.jpeg", "more/a.PNG")):
        (folder / name).write_bytes(png(n, "JPEG" if name.endswith("jpeg") else "PNG"))
    (folder / "b.txt").write_text(" a cat\n")
    (folder / "more" / "a.txt").write_text("a dog")
    text = {"prompt": "a cow", "software": "lumina_mgpt 2.0"}  # as generate.py writes it
    OutputFolder(folder, overwrite=True).save("c.png", Image.open(folder / "c.png"), text)
    (folder / "b.txt.bak").write_text("no picture")
    job = tokenize(tools, folder, tmp_path / "folder")
    assert (job.good, job.bad) == (3, 1)
    (reason,) = rows_of(tmp_path / "folder", "0-of-1-bad.jsonl")
    assert reason["id"] == 2 and "prompt" in reason["reason"]
    records = [
        {"image_path": str(folder / name), "prompt": prompt}
        for name, prompt in (("b.png", "a cat"), ("c.png", "a cow"), ("none", ""), ("more/a.PNG", "a dog"))
    ]
    tokenize(tools, write_records(tmp_path, records), tmp_path / "file")
    assert_same_ids(tmp_path, "folder", "file")
    (folder / "b.txt").write_text("a car")
    with pytest.raises(InputError, match="other settings .input"):
        tokenize(tools, folder, tmp_path / "folder")


def test_a_folder_without_pictures_is_named(tools, tmp_path):
    with pytest.raises(InputError, match="^in_filename .* without pictures"):
        tokenize(tools, tmp_path, tmp_path / "out")


# -- mixtures ----------------------------------------------------------------------------------------------------------


def test_weights_are_shares_of_an_epoch(vocabulary, tmp_path):
    sources = [
        make_source(tmp_path, vocabulary, 40, "a", type="x", weight=3),
        make_source(tmp_path, vocabulary, 20, "b", type="y", weight=1),
    ]
    dataset = TokenDataset(sources, vocabulary)
    samples = dataset.epoch(0)
    assert len(samples) == 60 and Counter(dataset.kind(samples).tolist()) == {0: 45, 1: 15}
    assert sum(len(planned.samples) for planned in plan_epoch(dataset, 0, BatchSize(rows=4))) == 60


@pytest.mark.parametrize(
    "text",
    [
        "META: [{path: a, weight: 1}, {path: b}]",
        "META: [{path: a, weight: 1, ratio: 2}]",
        "META: [{path: a, weight: -1}]",
    ],
)
def test_invalid_weights_are_refused(tmp_path, text):
    refuse_sources(tmp_path, text, "weight")


def test_the_data_files_in_configs_can_be_read(monkeypatch):
    monkeypatch.setenv("DATA", "here")
    monkeypatch.setenv("SIZE", "768")
    (source,) = read_sources(ROOT / "configs/data/fp_sft.yaml")
    assert source.path == "here/768/records.jsonl"
    omni = read_sources(ROOT / "configs/data/omni_sft.yaml")
    assert sum(source.weight for source in omni) == pytest.approx(1) and omni[0].path.startswith("here/")


@pytest.mark.slow
def test_stages_follow_one_another(vocabulary, tiny_checkpoint, tmp_path):
    """The second stage starts from the export of the first. A finished stage is not repeated."""
    for size in ("32", "64"):
        (tmp_path / size).mkdir()
        source = make_source(tmp_path / size, vocabulary, 6, "records")
        assert source.path.endswith(f"{size}/records.jsonl")
    command = ["bash", "scripts/train_progressive.sh", str(tiny_checkpoint), str(tmp_path / "out"), "--batch_size", "2"]
    command += ["--max_steps", "1", "--warmup", "0", "--device", "cpu"]
    python = environment() | {"DATA": str(tmp_path), "SIZES": "32 64", "PATH": path_with_python(tmp_path)}
    done = subprocess.run(command, cwd=ROOT, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"64 x 64, from {tmp_path}/out/32/export" in done.stdout
    again = subprocess.run(command, cwd=ROOT, env=python, capture_output=True, text=True)
    assert again.returncode == 0 and "exported" not in again.stdout
