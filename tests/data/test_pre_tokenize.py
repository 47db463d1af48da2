"""Pictures and texts to token shards: compared with the oracle, after kills, with bad records."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from commands import line_of, main_of
from records import picture, rows_of, tokenize, write_records

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.concat import concat_records
from lumina_mgpt.data.records import conversation, is_plain, parse_record
from lumina_mgpt.data.shards import read_sequence
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_image, stacked
from lumina_mgpt.unirep import decode_image, encode_conversation
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"PYTHONPATH": str(ROOT)}


def test_items_match_the_oracle(oracle_dir, oracle_movqgan, tmp_path):
    """Ids and labels of all twelve items are identical to those of the released code."""
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    vocabulary = Vocabulary.from_folder(oracle_dir / "tokenizer", ModelConfig(vocab_size=171520, **size))
    images = ImageTokenizer.from_checkpoint(oracle_movqgan)
    codes = {}
    for item in json.loads((oracle_dir / "pre_tokenize.json").read_text()):
        record = parse_record({"image_path": str(oracle_dir / item["image"]), "prompt": item["prompt"]})
        if item["image"] not in codes:
            image = open_image(record.images[0][0])
            crop = center_crop(image, best_size(image.size, candidate_sizes(item["target_size"])))
            codes[item["image"]] = images.encode([crop])[0], crop.size
        grid, crop_size = codes[item["image"]]
        ids, labels = encode_conversation(conversation(record, [grid], [crop_size], item["plain"]), vocabulary)
        assert ids == item["token"] and labels == item["label"]


def test_both_forms_give_the_same_ids(tools, tmp_path):
    name = picture(tmp_path / "a.png")
    text = "Generate an image of 64x64 according to the following prompt:\na cat"
    plain = "Generate an image according to the following prompt:\na cat"
    long = [
        {"conversations": [{"from": "human", "value": value}, {"from": "gpt", "value": "<|image|>"}], "image": image}
        for value in (text, plain)
        for image in (name, [name])
    ]
    records = [{"image_path": name, "prompt": "a cat"}, *long]
    for file in ("in.json", "in.jsonl"):
        out = tmp_path / f"out-{file}"
        tokenize(tools, write_records(tmp_path, records, file), out)
        rows = rows_of(out)
        got = [read_sequence(out / row["file"], row["id"]).ids.tolist() for row in rows]
        assert [row["len"] for row in rows] == [len(ids) for ids in got]
        assert got[1] == got[2] and got[3] == got[4] and got[1] != got[3]
        assert got[0] == (got[3] if is_plain(0, 0) else got[1])


def test_unmentioned_image_comes_before_the_first_text(tools, tmp_path):
    name = picture(tmp_path / "a.png")
    turns = [{"from": "human", "value": "what is it?"}, {"from": "gpt", "value": "a cat"}]
    marked = [{"from": "human", "value": "<|image|> what is it?"}, turns[1]]
    records = [{"conversations": turns, "image": name}, {"conversations": marked, "image": name}]
    tokenize(tools, write_records(tmp_path, records), tmp_path / "out")
    first, second = (read_sequence(tmp_path / "out" / row["file"], row["id"]) for row in rows_of(tmp_path / "out"))
    assert torch.equal(first.ids, second.ids) and torch.equal(first.labels, second.labels)
    assert first.ids[1] == tools[0].image_start_id and (first.labels != -100).sum() < 10  # only the answer's text


def test_several_turns_with_several_pictures(tools, tmp_path):
    """Pictures are in the order and at the positions of their marks. Both answers carry loss, nothing else."""
    vocabulary, images = tools
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    said = ["first <|image|> then <|image|>", "two", "draw a third", "<|image|>"]
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(said)]
    tokenize(tools, write_records(tmp_path, [{"conversations": turns, "image": names}]), tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    sequence = read_sequence(tmp_path / "out" / row["file"], 0)
    ids, labelled = sequence.ids.tolist(), sequence.labels != -100
    starts = [n for n, id_ in enumerate(ids) if id_ == vocabulary.image_start_id]
    ends = [n + 1 for n, id_ in enumerate(ids) if id_ == vocabulary.image_end_id]
    grids = [decode_image(sequence.ids[start:end], vocabulary) for start, end in zip(starts, ends, strict=True)]
    wanted = images.encode([open_image(name) for name in names])
    assert all(torch.equal(grid, codes) for grid, codes in zip(grids, wanted, strict=True))
    turn_ends = [n + 1 for n, id_ in enumerate(ids) if id_ == vocabulary.turn_end_id]
    answers = [range(*turn_ends[:2]), range(*turn_ends[2:])]
    assert len(turn_ends) == 4 and labelled.nonzero().flatten().tolist() == [n for turn in answers for n in turn]
    assert vocabulary.decode_text(ids[turn_ends[0] : turn_ends[1] - 1]) == "two" and answers[1][0] == starts[2]


def test_instruction_names_the_size_after_the_crop(tools, tmp_path):
    """keep_size leaves 96 x 32 uncropped; otherwise the picture is cropped to the best candidate size."""
    name = picture(tmp_path / "a.png", (96, 32))
    path = write_records(tmp_path, [{"image_path": name, "prompt": f"cat {n}"} for n in range(40)])
    expected = {True: "96x32", False: "128x32" if (128, 32) == best_size((96, 32), candidate_sizes(64)) else "96x32"}
    for keep in (True, False):
        out = tmp_path / str(keep)
        tokenize(tools, path, out, keep_size=keep)
        plain = 0
        for row in rows_of(out):
            sequence = read_sequence(out / row["file"], row["id"])
            text = tools[0].decode_text(sequence.ids[sequence.labels == -100].tolist())
            assert (expected[keep] in text) != is_plain(0, row["id"])
            plain += is_plain(0, row["id"])
        assert 0 < plain < 15


def test_picture_of_several_records_is_encoded_once(tools, tmp_path):
    class Counting:
        num_codes, seen, device = 64, 0, torch.device("cpu")

        def encode(self, images):
            self.seen += len(images)
            return tools[1].encode(images)

    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    records = [{"image_path": names[n % 3], "prompt": f"cat {n}"} for n in range(12)]
    counting = Counting()
    tokenize((tools[0], counting), write_records(tmp_path, records), tmp_path / "out", block=5)
    assert counting.seen == 3


@pytest.mark.parametrize("apart", [False, True])
def test_panels_of_one_picture_may_be_separate_files(tools, tmp_path, apart):
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(2)]
    both, other = stacked([open_image(name) for name in names]), picture(tmp_path / "other.png", (96, 64))
    turns = [{"from": "human", "value": "<|image|> beside?"}, {"from": "gpt", "value": "<|image|>"}]
    records = [{"conversations": turns, "image": images} for images in ([names, names[0]], [names, [other, names[0]]])]
    out = tmp_path / "out"
    job = tokenize(tools, write_records(tmp_path, records), out, keep_size=True, panels_apart=apart)
    assert (job.good, job.bad) == (1, 1) and "panels of one picture must have one size" in str(
        rows_of(out, "0-of-1-bad.jsonl")
    )
    row = rows_of(out)[0]
    grids = tools[1].encode([both], 2 if apart else 1)[0], tools[1].encode([open_image(names[0])])[0]
    expected, _ = encode_conversation([("human", [grids[0], " beside?"]), ("assistant", [grids[1]])], tools[0])
    assert read_sequence(out / row["file"], row["id"]).ids.tolist() == list(expected)


def test_a_missing_input_is_refused(tools, tmp_path):
    rule = "in_filename must be a folder of pictures, or a file that ends in .json, .jsonl or .tar, got .*nowhere"
    with pytest.raises(InputError, match=rule):
        tokenize(tools, tmp_path / "nowhere", tmp_path / "out")


def test_bad_records_are_listed_and_not_replaced(tools, tmp_path):
    name = picture(tmp_path / "a.png")
    (tmp_path / "no.png").write_text("no picture")
    good = {"image_path": name, "prompt": "a cat"}
    bad = [
        {"image_path": "missing.png", "prompt": "a cat"},
        {"image_path": str(tmp_path / "no.png"), "prompt": "a cat"},
        {"image_path": name, "prompt": "a <eoss> cat"},
        {"prompt": "a cat"},
        "text",
        {"conversations": [{"from": "gpt", "value": "hello"}], "image": name},
        {"conversations": [{"from": "human", "value": "<|image|>"}, {"from": "gpt", "value": ""}], "image": 2 * [name]},
    ]
    job = tokenize(tools, write_records(tmp_path, [good, *bad, good]), tmp_path / "out")
    assert (job.good, job.bad) == (2, 7)
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [0, 8]
    reasons = rows_of(tmp_path / "out", "0-of-1-bad.jsonl")
    assert [item["id"] for item in reasons] == list(range(1, 8)) and all(item["reason"] for item in reasons)
    assert concat_records(tmp_path / "out", tmp_path / "all.json") == (2, 7)


def test_splits_together_hold_every_record_once(tools, tmp_path):
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(3)]
    path = write_records(tmp_path, [{"image_path": names[n % 3], "prompt": f"cat {n}"} for n in range(11)])
    out = tmp_path / "out"
    for rank in (2, 0):
        tokenize(tools, path, out, splits=3, rank=rank, block=2)
    with pytest.raises(InputError, match="ranks"):
        concat_records(out, tmp_path / "all.jsonl")
    tokenize(tools, path, out, splits=3, rank=1, block=2)
    assert concat_records(out, tmp_path / "sub" / "all.jsonl") == (11, 0)
    rows = [json.loads(line) for line in (tmp_path / "sub" / "all.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == list(range(11))
    whole = tmp_path / "whole"
    tokenize(tools, path, whole)
    for row, other in zip(rows, rows_of(whole), strict=True):
        one = read_sequence(tmp_path / "sub" / row["file"], row["id"])
        assert torch.equal(one.ids, read_sequence(whole / other["file"], other["id"]).ids)


@pytest.mark.slow
def test_resume_after_kills(tools, tiny_checkpoint, tmp_path):
    """After SIGKILL at several moments, half a line and a partial file, each record is there once."""
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(24)]
    path = write_records(tmp_path, [{"image_path": names[n % 24], "prompt": f"cat {n}"} for n in range(48)])
    out, block = tmp_path / "out", ["--block", "2", "--batch_size", "2"]
    command = [*line_of("pre_tokenize"), "--in_filename", path, "--out_dir", out, *block]
    command = list(map(str, command + ["--target_size", 64, "--model_path", tiny_checkpoint]))
    kills = 0
    for wanted in (1, 5):
        process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
        while process.poll() is None and len(list(out.glob("shards/*.safetensors"))) < wanted:
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        kills += process.wait() == -signal.SIGKILL
    assert kills, "no process was killed while it worked, so nothing was tested"
    with pytest.raises(InputError, match="not finished"):
        concat_records(out, tmp_path / "all.jsonl")
    with open(out / "0-of-1-record.jsonl", "a") as file:
        file.write('{"file": "shards/0-of')
    (out / "shards" / ".0-of-1-00000.safetensors.1.tmp").write_bytes(b"half")
    # Models' fingerprints are the script's own: take them from its job file.
    models = json.loads((out / "0-of-1-job.json").read_text())["models"]
    tokenize(tools, path, out, block=2, batch_size=2, models=models)
    assert concat_records(out, tmp_path / "all.jsonl") == (48, 0)
    assert [row["id"] for row in rows_of(out)] == list(range(48))
    with pytest.raises(InputError, match="other settings"):
        tokenize(tools, path, out, block=2, models=models, seed=1)


def test_a_second_process_of_the_same_rank_is_refused(tools, tmp_path):
    """Other ranks may work in the same folder. Bug: two processes listed blocks twice in the record file."""
    records = [{"image_path": picture(tmp_path / f"{n}.png"), "prompt": f"{n}"} for n in range(2)]
    path, out = write_records(tmp_path, records), tmp_path / "out"
    beside = []

    def meanwhile(_: int) -> None:
        beside.append(tokenize(tools, path, out, splits=2, rank=1).good)
        with pytest.raises(InputError, match="^out_dir .*another run"):
            tokenize(tools, path, out, splits=2, rank=0)

    tokenize(tools, path, out, meanwhile, splits=2, rank=0)
    assert beside and len(rows_of(out, "0-of-2-record.jsonl")) == 1


def test_concat_refuses_damage(tools, tmp_path):
    name = picture(tmp_path / "a.png")
    path = write_records(tmp_path, [{"image_path": name, "prompt": f"cat {n}"} for n in range(6)])
    out = tmp_path / "out"
    tokenize(tools, path, out, block=3)
    save = tmp_path / "all.jsonl"
    concat_records(out, save)
    shard = out / "shards" / "0-of-1-00001.safetensors"
    whole = shard.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:], b""):
        shard.write_bytes(damaged)
        with pytest.raises(InputError, match="damaged"):
            concat_records(out, save)
    shard.unlink()
    with pytest.raises(InputError, match="not finished"):
        concat_records(out, save)
    shard.write_bytes(whole)
    lines = (out / "0-of-1-record.jsonl").read_text()
    (out / "0-of-1-record.jsonl").write_text(lines + lines)
    with pytest.raises(InputError, match="does not list"):
        concat_records(out, save)
    with pytest.raises(InputError, match="holds no work"):
        concat_records(tmp_path / "shards", save)


@pytest.mark.parametrize("options, message", [(["--rank", "2"], "--rank"), (["--target_size", "50"], "--target_size")])
def test_script_names_the_wrong_option(tiny_checkpoint, tmp_path, options, message):
    path = write_records(tmp_path, [{"image_path": "a.png", "prompt": "a cat"}])
    command = [*line_of("pre_tokenize"), "--in_filename", path, "--out_dir", tmp_path / "out"]
    command += ["--model_path", tiny_checkpoint, *options]
    run = subprocess.run(list(map(str, command)), cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert run.returncode == 2 and message in run.stderr and run.stderr.count("\n") == 1


def test_the_input_is_checked_before_models_are_loaded(tmp_path, capsys):
    """Bug: a wrong --in_filename was reported only after the MoVQGAN was loaded."""
    line = ["--in_filename", str(tmp_path / "none.jsonl"), "--out_dir", str(tmp_path / "out"), "--model_path", "none"]
    assert main_of("pre_tokenize")(line) == 2
    assert capsys.readouterr().err.startswith("error: --in_filename ")
