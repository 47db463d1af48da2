"""Tokens of detection: codes of the given picture, and labels where a box could begin."""

import json
import shutil
from pathlib import Path

import decision_tokens
import pytest
import torch
from PIL import Image, ImageDraw

from lumina_mgpt.data.shards import Sequence, read_index, read_sequence, write_shard
from lumina_mgpt.pipeline import Checkpoint
from lumina_mgpt.unirep import decode_image, encode_conversation

DEMO = Path(__file__).parents[2] / "assets" / "demo"
LINES = (8, 0, 31, 23)  # pixels: codes 1 to 3 of the rows 0 to 2, but for the one in the middle


@pytest.fixture
def tokens(tmp_path) -> Path:
    """A folder with two records of pictures of 64 x 32 pixels: records.jsonl and one shard, whose codes all differ."""
    before = Image.new("RGB", (64, 32), "navy")
    after = before.copy()
    ImageDraw.Draw(after).rectangle(LINES, outline="magenta", width=4)
    before.save(tmp_path / "before.png")
    after.save(tmp_path / "after.png")
    vocabulary = Checkpoint.open(DEMO).vocabulary
    sequences, rows = [], []
    for record in range(2):
        given = torch.arange(32).reshape(4, 8) + 100 * record
        turns = [("human", ["Detect: the fox ", given]), ("assistant", [given + 50])]
        ids, labels = encode_conversation(turns, vocabulary)
        sequences.append(Sequence(record, torch.tensor(ids), torch.tensor(labels)))
        said = [{"from": "human", "value": "Detect: the fox <|image|>"}, {"from": "gpt", "value": "<|image|>"}]
        files = [[str(tmp_path / "before.png")], [str(tmp_path / "after.png")]]
        rows.append(json.dumps({"conversations": said, "image": files, "starts": [[8, 0], [40, 8]]}))
    (tmp_path / "records.jsonl").write_text("\n".join(rows))
    (tmp_path / "shards").mkdir()
    write_shard(tmp_path / "shards" / "0.safetensors", sequences, [{"id": 7, "reason": "damaged"}])
    return tmp_path


def run(folder: Path) -> int:
    options = ["--records", str(folder / "records.jsonl"), "--tokens", str(folder), "--model_path", str(DEMO)]
    return decision_tokens.main(options)


def test_refusals_before_a_drawing_keep_their_labels(tokens, monkeypatch):
    monkeypatch.setattr(decision_tokens, "_WHOLE", 0.0)
    vocabulary = Checkpoint.open(DEMO).vocabulary
    turns = [("human", ["Draw a sloth."]), ("assistant", ["I don't know."])] * 2
    turns += [("human", ["Draw an owl."]), ("assistant", [torch.arange(32).reshape(4, 8)])]
    ids, labels = map(torch.tensor, encode_conversation(turns, vocabulary))
    write_shard(tokens / "shards" / "0.safetensors", [Sequence(0, ids, labels)], [])
    said = [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "I don't know."}] * 2
    said += [{"from": "human", "value": "Draw."}, {"from": "gpt", "value": "<|image|>"}]
    row = {"conversations": said, "image": [[str(tokens / "before.png")]], "starts": []}
    (tokens / "records.jsonl").write_text(json.dumps(row))
    assert run(tokens) == 0
    new = read_sequence(shutil.copytree(tokens, tokens.with_name("new")) / "shards" / "0.safetensors", 0)
    begin = ids.tolist().index(vocabulary.image_start_id)
    assert torch.equal(new.ids, ids) and (labels[:begin] >= 0).sum() > 4
    assert torch.equal(new.labels[: begin + 1], labels[: begin + 1])
    assert (new.labels[begin + 1 :] < 0).all() and (labels[begin + 1 :] >= 0).any()


@pytest.mark.parametrize("whole", [True, False])
def test_codes_change_under_the_lines_alone(tokens, monkeypatch, whole):
    monkeypatch.setattr(decision_tokens, "_WHOLE", float(whole))
    vocabulary = Checkpoint.open(DEMO).vocabulary
    old = [read_sequence(tokens / "shards" / "0.safetensors", record) for record in range(2)]
    under = torch.zeros(4, 8, dtype=torch.bool)
    under[:3, 1:4] = True
    under[1, 2] = False
    for run_number in range(2):  # the second run changes nothing
        assert run(tokens) == 0
        tokens = shutil.copytree(
            tokens, tokens.with_name(f"{tokens.name} {run_number}")
        )  # open shards are kept by their paths
        shard = tokens / "shards" / "0.safetensors"
        assert read_index(shard).bad == [{"id": 7, "reason": "damaged"}]
        for record, before in enumerate(old):
            new = read_sequence(shard, record)
            starts = (new.ids == vocabulary.image_start_id).nonzero().flatten().tolist()
            ends = ((new.ids == vocabulary.image_end_id).nonzero().flatten() + 1).tolist()
            given, answer = (decode_image(new.ids[s:e], vocabulary) for s, e in zip(starts, ends, strict=True))
            assert torch.equal(given, torch.arange(32).reshape(4, 8) + 100 * record)
            assert torch.equal(answer, torch.where(under, given + 50, given))
            labelled = new.labels >= 0
            assert torch.equal(new.labels[labelled], new.ids[labelled])
            if whole:
                assert torch.equal(labelled, before.labels >= 0)
            else:  # the beginning, and (row, column) 0, 1 and 1, 5
                begin, *codes = new.ids[labelled]
                assert begin == vocabulary.image_start_id
                assert vocabulary.id_to_code(torch.stack(codes)).tolist() == [given[0, 1] + 50, given[1, 5]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: Image.new("RGB", (32, 64)).save(folder / "after.png"), "two pictures of one size"),
        (lambda folder: (folder / "after.png").unlink(), "after.png"),
        (lambda folder: (folder / "records.jsonl").write_text(""), "holds record 1"),
        (lambda folder: shutil.rmtree(folder / "shards"), "holds no shards"),
    ],
)
def test_other_input_is_refused(tokens, damage, message, capsys):
    damage(tokens)
    assert run(tokens) == 2
    assert message in capsys.readouterr().err


def test_records_without_starts_stay(tokens):
    rows = [json.loads(line) for line in (tokens / "records.jsonl").read_text().splitlines()]
    for row in rows:
        del row["starts"]
    (tokens / "records.jsonl").write_text("\n".join(map(json.dumps, rows)))
    before = read_sequence(tokens / "shards" / "0.safetensors", 1)
    assert run(tokens) == 0
    again = shutil.copytree(tokens, tokens.with_name(f"{tokens.name} again"))
    after = read_sequence(again / "shards" / "0.safetensors", 1)
    assert torch.equal(after.ids, before.ids) and torch.equal(after.labels, before.labels)
