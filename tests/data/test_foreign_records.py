"""Record files, shards and data files that other programs wrote, or that a power loss damaged."""

import hashlib
import json
from pathlib import Path, PureWindowsPath

import numpy as np
import pytest
import torch
from commands import main_of
from records import pre_tokenize_command, refuse_sources, square
from safetensors import safe_open
from safetensors.torch import save_file

from lumina_mgpt.data.batches import BatchSize, Feed
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.records import parse_record
from lumina_mgpt.data.shards import ShardIndex, read_index
from lumina_mgpt.data.sources import Source, read_sources
from lumina_mgpt.errors import InputError

TURNS = [{"from": "human", "value": "what?"}, {"from": "gpt", "value": "a cat"}]


def talk(human: str, gpt: str = "a cat", **more) -> dict:
    return {"conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}], **more}


@pytest.fixture
def made(tiny_checkpoint, tmp_path) -> Path:
    """Output of pre-tokenization for two records, in two shards."""
    (tmp_path / "a.png").write_bytes(square())
    rows = [json.dumps({"image_path": str(tmp_path / "a.png"), "prompt": prompt}) for prompt in ("a cat", "a dog")]
    (tmp_path / "in.jsonl").write_text("\n".join(rows))
    assert tokenize(tmp_path, tiny_checkpoint) == 0
    return tmp_path / "out"


def tokenize(folder: Path, checkpoint: Path) -> int:
    line = ["--in_filename", folder / "in.jsonl", "--out_dir", folder / "out", "--model_path", checkpoint]
    return main_of("pre_tokenize")([*map(str, line), "--target_size", "64", "--block", "1"])


def concat(out: Path) -> int:
    save_path = out.parent / "all" / "all.jsonl"
    return main_of("concat_records")(["--sub_record_dir", str(out), "--save_path", str(save_path)])


def refused(capsys, *parts: str) -> None:
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and all(part in last for part in parts), last


# -- records -----------------------------------------------------------------------------------------------------------


def test_the_image_mark_of_llava_is_read_as_an_image(tiny_checkpoint, tmp_path):
    """Bug: `<image>` was tokenized as text, and its picture put before the text."""
    (tmp_path / "a.png").write_bytes(square())
    image = str(tmp_path / "a.png")
    records = [
        talk("<image>\nwhat?", image=image, id="0"),
        talk("<|image|>\nwhat?", image=image),
        talk("<image> and <image>", image=image),
        talk("<image>\nwhat?"),
        {"image_path": image, "prompt": "<image> a cat"},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert pre_tokenize_command(tmp_path / "in.jsonl", tmp_path / "out", tiny_checkpoint) == 0
    bad = [json.loads(line) for line in (tmp_path / "out" / "0-of-1-bad.jsonl").read_text().splitlines()]
    assert [row["id"] for row in bad] == [2, 3, 4]
    assert "2 <|image|> or <image> marks for 1 images" in bad[0]["reason"] and "mark <image>" in bad[2]["reason"]
    with safe_open(tmp_path / "out" / "shards" / "0-of-1-00000.safetensors", "pt") as shard:
        ids = shard.get_tensor("ids")
    assert torch.equal(*ids.view(2, -1))


def test_a_byte_order_mark_in_a_record_is_removed():
    """Bug: the mark of a caption file that another program copied into JSON became part of the caption."""
    record = parse_record(json.loads('{"image_path": "a.png", "prompt": "\\ufeffa cat"}'))
    assert record.caption == "a cat"
    assert parse_record(talk("\ufeffwhat?", "\ufeffa cat")).turns == (("human", ("what?",)), ("assistant", ("a cat",)))
    with pytest.raises(InputError, match="non-empty"):
        parse_record({"image_path": "a.png", "prompt": "\ufeff"})


@pytest.mark.parametrize(
    "more, key, instead",
    [
        ({"images": ["a.png"]}, "images", "image"),
        ({"caption": "a dog"}, "caption", "prompt"),
        ({"Prompt": "a dog"}, "Prompt", "prompt"),
        ({"image_paths": []}, "image_paths", "image_path"),
        ({"messages": []}, "messages", "conversations"),
    ],
)
def test_keys_of_other_formats_are_refused(more, key, instead):
    """Bug: such keys were ignored without an error."""
    with pytest.raises(InputError, match=f"must not have the key '{key}'.* use {instead}"):
        parse_record({"image_path": "a.png", "prompt": "a cat"} | more)


@pytest.mark.parametrize(
    "record, part",
    [
        ({"image_path": "a.png", "prompt": "a cat", "conversations": TURNS}, "a record has"),
        ({"image_path": "a.png", "prompt": "a \ud800 cat"}, "half of a character"),
        (talk("a \udfff cat"), "half of a character"),
        ({"conversations": [TURNS[0], TURNS[1] | {"weight": 0}]}, "key 'weight'"),
    ],
)
def test_ambiguous_records_are_refused(record, part):
    with pytest.raises(InputError, match=part):
        parse_record(record)


def test_metadata_beside_a_record_is_allowed():
    parse_record({"image_path": "a.png", "prompt": "a cat", "width": 64, "url": "x", "image_id": 3, "id": "7"})
    parse_record(talk("what? <|image|>", image="a.png", id="000", model="", image_url="x"))


@pytest.mark.parametrize("text", ["[" * 20_000, '{"image_path": ' + "1" * 5_000 + "}"])
def test_json_that_python_cannot_read_is_refused(tiny_checkpoint, tmp_path, capsys, text):
    (tmp_path / "in.jsonl").write_text("\n" + text + "\n")
    assert tokenize(tmp_path, tiny_checkpoint) == 2
    refused(capsys, "in.jsonl, line 2 is")


# -- output of pre-tokenization ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"{}", b"[1]", b"\0" * 50, b"[" * 20_000])
def test_a_damaged_job_file_is_refused(made, tiny_checkpoint, capsys, content):
    """Bug: an empty job file, as after a power loss, gave a traceback."""
    (made / "0-of-1-job.json").write_bytes(content)
    assert tokenize(made.parent, tiny_checkpoint) == 2
    refused(capsys, "--out_dir", "give an empty folder")
    assert concat(made) == 2
    refused(capsys, "--sub_record_dir", "0-of-1-job.json")


def test_shards_without_a_job_file_are_refused(made, tiny_checkpoint, capsys):
    """Bug: shards of unknown settings were mixed with new ones."""
    (made / "0-of-1-job.json").unlink()
    assert tokenize(made.parent, tiny_checkpoint) == 2
    refused(capsys, "shards of unknown settings", "give an empty folder")


@pytest.mark.parametrize("bad", ["[" * 20_000, "", "[1]", "{}", '[{"id": ' + "1" * 5_000 + "}]"])
def test_damaged_shard_metadata_is_refused(made, tiny_checkpoint, capsys, bad):
    path = made / "shards" / "0-of-1-00001.safetensors"
    with safe_open(path, "pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}
        metadata = shard.metadata()
    save_file(tensors, path, metadata | {"bad": bad})
    for run in (lambda: concat(made), lambda: tokenize(made.parent, tiny_checkpoint)):
        assert run() == 2
        refused(capsys, "0-of-1-00001.safetensors")
    for broken in ({"offsets": torch.zeros(0, dtype=torch.int64)}, {"ids": torch.zeros(3)}):
        save_file(tensors | broken, path, metadata)
        with pytest.raises(InputError, match="00001.safetensors is damaged"):
            read_index(path)


@pytest.mark.parametrize("line", ["[1]", "3", '{"file": 3, "len": 4, "id": 0}', '{"id": null}', '{"file": "a"}'])
def test_a_record_file_that_does_not_list_its_shards_is_refused(made, capsys, line):
    (made / "0-of-1-record.jsonl").write_text(line + "\n")
    assert concat(made) == 2
    refused(capsys, "does not list its shards")


@pytest.mark.parametrize(
    "row",
    [
        "3",
        "{}",
        '{"file": null, "len": 4, "id": 0}',
        '{"file": "a", "len": NaN, "id": 0}',
        '{"file": "a", "len": 1e400, "id": 0}',
        '{"file": "a", "len": 4, "id": ' + "9" * 30 + "}",
        '{"file": "a", "len": -1, "id": 0}',
        '{"file": "a", "len": 4.5, "id": 0}',
    ],
)
def test_damaged_rows_of_a_record_file_are_refused(tmp_path, row):
    """Bug: an infinite length, or one of 30 digits, gave a traceback in the training."""
    (tmp_path / "all.jsonl").write_text(row + "\n")
    with pytest.raises(InputError, match="all.jsonl: a record must have file, len and id"):
        TokenDataset([Source(str(tmp_path / "all.jsonl"))], None)


# -- separators --------------------------------------------------------------------------------------------------------


def test_record_files_hold_posix_separators(made):
    """Bug: record files had the separators of the system. PureWindowsPath simulates Windows."""
    (row,) = ShardIndex([0], [5], []).rows(PureWindowsPath("shards", "a.safetensors"))
    assert row["file"] == "shards/a.safetensors"
    assert concat(made) == 0
    rows = [json.loads(line) for line in (made.parent / "all" / "all.jsonl").read_text().splitlines()]
    assert [row["file"] for row in rows] == [f"../out/shards/0-of-1-0000{n}.safetensors" for n in range(2)]


def test_record_files_of_windows_are_read(made, tokens, vocabulary):
    """Backslashes are separators, except in a name that contains one."""
    path = made / "0-of-1-record.jsonl"
    path.write_text(path.read_text().replace("shards/", "shards\\\\"))
    assert concat(made) == 0
    dataset = TokenDataset([Source(str(path))], vocabulary)
    assert len(dataset.sequence(1).ids) == dataset.lengths[1]
    (made / "shards" / "0-of-1-00000.safetensors").rename(made / "shards\\0-of-1-00000.safetensors")
    assert len(TokenDataset([Source(str(path))], vocabulary).sequence(0).ids) == dataset.lengths[0]


# -- data files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "META: [{path: a, ratio: true}]",
        "META: [{path: a, ratio: .nan}]",
        "META: [{path: a, weight: .inf}]",
        "META: [{path: a, weight: 1" + "0" * 400 + "}]",
        "META: [{path: a, ratio: 1" + "0" * 5000 + "}]",
        "META: [{path: a, given: 1}]",
        "META: [{path: a, Ratio: 1}]",
        "META: [{path: [a]}]",
        "META: [[a]]",
        "META: a",
        "[" * 20_000,
        "META: [{path: '${oc.env:NOT_SET_AT_ALL}'}]",
        "META: [{path: '${'}]",
        "",
        "? {a: 1}\n: 2",
        "\0",
    ],
)
def test_damaged_data_files_are_refused(tmp_path, text):
    refuse_sources(tmp_path, text)


def test_encodings_of_data_files(tmp_path):
    (tmp_path / "data.yaml").write_bytes(b"\xef\xbb\xbfMETA: [{path: a}]")
    assert read_sources(tmp_path / "data.yaml") == [Source("a")]
    (tmp_path / "data.yaml").write_bytes("META: [{path: café}]".encode("cp1252"))
    with pytest.raises(InputError, match="^data_config .*data.yaml must be UTF-8 text"):
        read_sources(tmp_path / "data.yaml")


# -- small sources -----------------------------------------------------------------------------------------------------


def small(tokens: Path, folder: Path, count: int, **source) -> Source:
    """The first `count` of the 24 records of `tokens`."""
    rows = [json.loads(line) for line in (tokens.parent / "records.jsonl").read_text().splitlines()[:count]]
    rows = [row | {"file": str(tokens.parent / row["file"])} for row in rows]
    path = folder / f"{count}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), **source)


@pytest.mark.parametrize("count, ratio", [(3, 0.1), (24, 0.1), (10, 0.3), (7, 1.35), (3, 0.05), (9, 0.95)])
def test_fractions_are_carried_over_the_epochs(tokens, vocabulary, tmp_path, count, ratio):
    """All records are seen equally often. Bug: 0.3 records per epoch were rounded to none in every epoch."""
    dataset = TokenDataset([small(tokens, tmp_path, count, ratio=ratio)], vocabulary, seed=1)
    epochs = [dataset.epoch(epoch) for epoch in range(40)]
    counts = np.array([len(samples) for samples in epochs])
    assert abs(counts.cumsum() - ratio * count * np.arange(1, 41)).max() < 1 and counts[0] >= 1
    assert counts.max() - counts.min() <= 1 and all(len(set(samples)) == len(samples) for samples in epochs)
    seen = np.bincount(np.concatenate(epochs) % count, minlength=count)
    assert seen.max() - seen.min() <= 1
    again = TokenDataset([small(tokens, tmp_path, count, ratio=ratio)], vocabulary, seed=1)
    assert all((again.epoch(epoch) == samples).all() for epoch, samples in enumerate(epochs))


def test_whole_numbers_of_records_are_the_same_in_every_epoch(tokens, vocabulary, tmp_path):
    for count, ratio, expected in ((20, 0.1, 2), (10, 0.3, 3), (10, 0.7, 7), (20, 1.15, 23)):
        dataset = TokenDataset([small(tokens, tmp_path, count, ratio=ratio)], vocabulary)
        assert {len(dataset.epoch(epoch)) for epoch in range(50)} == {expected}
    mixed = [small(tokens, tmp_path, count, weight=weight) for count, weight in ((6, 0.1), (14, 0.7), (20, 0.2))]
    assert {len(TokenDataset(mixed, vocabulary).epoch(epoch)) for epoch in range(9)} == {40}


@pytest.mark.parametrize("size", [BatchSize(rows=2), BatchSize(tokens=256, packed=True)])
def test_epochs_without_samples_are_skipped(tokens, vocabulary, tmp_path, size):
    """The steps are the same on one and two processes, and after a resume at any position."""
    dataset = TokenDataset([small(tokens, tmp_path, 3, ratio=0.1)], vocabulary)
    alone, seen, places = Feed(dataset, size, accum=2), [], []
    pair = [Feed(dataset, size, 1, rank, 2) for rank in range(2)]
    for _ in range(6):
        other = Feed(dataset, size, accum=2)
        other.epoch, other.done = alone.epoch, alone.done
        for feed in (alone, other, *pair):
            assert feed.next_step()
        assert {tuple(feed.samples) for feed in (alone, other, *pair)} == {tuple(alone.samples)}
        assert {(feed.epoch, feed.done) for feed in (alone, other, *pair)} == {(alone.epoch, alone.done)}
        seen += alone.samples
        places.append(alone.epochs)
    assert sorted(seen) == [0, 0, 1, 1, 2, 2] and places == [3, 6, 10, 13, 16, 20]


def test_training_on_one_small_source(tokens, tiny_checkpoint, tmp_path, capsys):
    """Bug: traceback, need at least one array to concatenate."""
    source = small(tokens, tmp_path, 3, ratio=0.1)
    (tmp_path / "data.yaml").write_text(f"META: [{{path: {source.path}, ratio: 0.1}}]")
    line = [
        "--init_from",
        str(tiny_checkpoint),
        "--data_config",
        str(tmp_path / "data.yaml"),
        "--output_dir",
        str(tmp_path / "run"),
        "--batch_size",
        "2",
        "--epochs",
        "5",
        "--device",
        "cpu",
    ]
    assert main_of("finetune")(line) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [3, 6]


def test_a_ratio_that_gives_nothing_is_refused(tokens, vocabulary, tmp_path):
    with pytest.raises(InputError, match="^data_config must have ratios that give at least 0.001 .*, got 3e-09"):
        TokenDataset([small(tokens, tmp_path, 3, ratio=1e-9)], vocabulary)


def test_the_fingerprint_of_ratios_without_a_fraction_is_that_of_earlier_versions(tokens, vocabulary, tmp_path):
    """Runs of earlier versions can resume if their plan is the same. With a fractional ratio it differs."""
    for ratio in (1.0, 2.0, 0.5):
        dataset = TokenDataset([small(tokens, tmp_path, 6, ratio=ratio)], vocabulary)
        digest = hashlib.sha256(repr([("default", ratio)]).encode())  # the formula of b0c7d2f
        digest.update(dataset.lengths.tobytes() + dataset.records.tobytes() + dataset.sequence(0).ids.numpy().tobytes())
        assert (dataset.fingerprint() == digest.hexdigest()[:16]) == (ratio != 0.5)
