"""Pre-tokenization and data for checkpoints of the first generation: compared with the released code."""

import io
import json
import pickle
import shutil
import tarfile

import pytest
import torch
from first_generation import oracle_records, pre_tokenize, sequences_in, vocabulary_of, with_encoder_inside
from records import make_source, picture, rows_of, square, write_records

from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.shards import Sequence, write_shard
from lumina_mgpt.data.sources import Source, read_sources, require_known_panels
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import FIRST, SECOND
from lumina_mgpt.unirep import decode_image, encode_conversation, encode_image
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer


@pytest.fixture(scope="module")
def checkpoint(oracle_v1_checkpoint):
    return oracle_v1_checkpoint("image")


@pytest.fixture(scope="module")
def vocabulary(checkpoint):
    return vocabulary_of(checkpoint)


def images_in(ids: list[int], vocabulary) -> list[torch.Tensor]:
    """Code grids of a sequence."""
    starts = [n for n, id_ in enumerate(ids) if id_ == vocabulary.image_start_id]
    ends = [n + 1 for n, id_ in enumerate(ids) if id_ == vocabulary.image_end_id]
    return [decode_image(ids[start:end], vocabulary) for start, end in zip(starts, ends, strict=True)]


def text_of(sequence: Sequence, vocabulary) -> str:
    """Text of the human's turn in a sequence with an image as its answer."""
    return vocabulary.decode_text(sequence.ids[sequence.labels == -100].tolist())


# -- the command -------------------------------------------------------------------------------------------------------


def test_records_get_the_ids_and_labels_of_the_released_code(oracle_v1_dir, checkpoint, tmp_path):
    """Words alone, several images in a turn, several turns. The released command loses the first kind."""
    records, items = oracle_records(oracle_v1_dir, tmp_path)
    assert any(not item["image"] for item in items) and any(len(item["image"]) > 2 for item in items)
    assert pre_tokenize(write_records(tmp_path, records), tmp_path / "out", checkpoint) == 0
    got = [(sequence.ids.tolist(), sequence.labels.tolist()) for sequence in sequences_in(tmp_path / "out")]
    assert got == [(item["ids"], item["labels"]) for item in items]


def test_an_encoder_in_the_files_of_the_language_model_serves(oracle_v1_dir, checkpoint, tmp_path, capsys):
    records, items = oracle_records(oracle_v1_dir, tmp_path)
    inside = with_encoder_inside(checkpoint, tmp_path / "inside")
    path = write_records(tmp_path, records)
    assert pre_tokenize(path, tmp_path / "out", inside) == 0
    assert [sequence.ids.tolist() for sequence in sequences_in(tmp_path / "out")] == [item["ids"] for item in items]
    elsewhere = shutil.copyfile(checkpoint / "vqgan.safetensors", tmp_path / "other.safetensors")
    assert pre_tokenize(path, tmp_path / "named", inside, "--vqgan_path", elsewhere) == 0
    assert len(rows_of(tmp_path / "named")) == len(items)
    assert pre_tokenize(path, tmp_path / "out", inside, "--vqgan_path", elsewhere) == 2
    assert "holds work with other settings (models)" in capsys.readouterr().err


def test_a_missing_or_wrong_image_tokenizer_is_refused(checkpoint, oracle_movqgan, tmp_path, capsys):
    path = write_records(tmp_path, [{"image_path": picture(tmp_path / "a.png"), "prompt": "a cat"}])
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "vqgan.safetensors").unlink()
    for options, message in [
        ([], "no VQGAN weights in"),
        (["--vqgan_path", tmp_path / "none.ckpt"], "--vqgan_path"),
        (["--vqgan_path", oracle_movqgan], "--vqgan_path must have the model's 8192 codes"),
    ]:
        assert pre_tokenize(path, tmp_path / "out", bare, *options) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_captions_always_name_the_size(checkpoint, vocabulary, tmp_path):
    """As in the released training. Records of the second generation leave it out in one of ten cases."""
    assert (FIRST.plain_share, SECOND.plain_share) == (0, 0.1)
    for n in range(40):
        picture(tmp_path / f"{n:02}.png", (96, 32), seed=n % 2)
        (tmp_path / f"{n:02}.txt").write_text(f"cat {n:02}")
    assert pre_tokenize(tmp_path, tmp_path / "out", checkpoint, "--keep_size") == 0
    texts = [text_of(sequence, vocabulary) for sequence in sequences_in(tmp_path / "out")]
    wanted = "Generate an image of 96x32 according to the following prompt:\ncat "
    assert texts == [f"{wanted}{n:02}" for n in range(40)]


def test_tars_hold_conversations_with_and_without_pictures(checkpoint, vocabulary, tmp_path):
    """Bug: a conversation in words alone was left out, because its sample had no picture."""
    turns = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "good day"}]
    drawn = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|><|image|>"}]
    members = {
        "a.json": json.dumps({"conversations": turns}).encode(),
        "b.json": json.dumps({"conversations": drawn, "image": ["b.png", "b.red.png"]}).encode(),
        "b.png": square("blue"),
        "b.red.png": square(),
        "c.json": json.dumps({"conversations": drawn}).encode(),
        "d.txt": b"a caption without a picture",
    }
    with tarfile.open(tmp_path / "in.tar", "w") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    assert pre_tokenize(tmp_path / "in.tar", tmp_path / "out", checkpoint) == 0
    words, pair = sequences_in(tmp_path / "out")
    assert vocabulary.decode_text(words.ids.tolist()) == "hellogood day"
    assert len(images_in(pair.ids.tolist(), vocabulary)) == 2
    reasons = [item["reason"] for item in rows_of(tmp_path / "out", "0-of-1-bad.jsonl")]
    assert "2 <|image|> or <image> marks for 0 images" in reasons[0] and "has no picture" in reasons[1]


def test_an_answer_of_many_images(checkpoint, vocabulary, tmp_path):
    """Sixteen views, one after another, of which two are the same file."""
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(15)]
    names.append(names[0])
    turns = [{"from": "human", "value": "views"}, {"from": "gpt", "value": "<|image|>" * 16}]
    assert (
        pre_tokenize(write_records(tmp_path, [{"conversations": turns, "image": names}]), tmp_path / "out", checkpoint)
        == 0
    )
    (sequence,) = sequences_in(tmp_path / "out")
    grids = images_in(sequence.ids.tolist(), vocabulary)
    assert len(grids) == 16 and {grid.shape for grid in grids} == {(4, 4)} and torch.equal(grids[0], grids[15])
    assert not torch.equal(grids[0], grids[1])
    answer = sequence.ids.tolist().index(vocabulary.image_start_id)
    assert (sequence.labels[answer:] == sequence.ids[answer:]).all()


def test_panels_are_left_out_with_a_reason(checkpoint, tmp_path):
    names = [picture(tmp_path / f"{n}.png", seed=n) for n in range(2)]
    turns = [{"from": "human", "value": "draw"}, {"from": "gpt", "value": "<|image|>"}]
    records = [{"conversations": turns, "image": image} for image in ([names], [[names[0]]], None)]
    records[2]["conversations"] = [turns[0], {"from": "gpt", "value": "no"}]
    assert pre_tokenize(write_records(tmp_path, records), tmp_path / "out", checkpoint) == 0
    assert [row["id"] for row in rows_of(tmp_path / "out")] == [1, 2]
    (bad,) = rows_of(tmp_path / "out", "0-of-1-bad.jsonl")
    assert "an image of Lumina-mGPT has no panels, got a list of 2 files for one image" in bad["reason"]


# -- samples for training ----------------------------------------------------------------------------------------------


def test_training_on_the_lower_panel_is_refused(tmp_path):
    sources = [Source(str(tmp_path / "a.jsonl"), given=True)]
    with pytest.raises(InputError, match="data_config given of .* must be false for Lumina-mGPT, whose images have no"):
        require_known_panels(sources, FIRST)
    require_known_panels(sources, SECOND)


def edits(vocabulary, folder, count: int) -> Source:
    """Sequences of a picture, its edit, and the edit of that."""
    sequences = []
    for n in range(count):
        grids = [torch.full((2, 2 * (1 + k)), 3 * n + k) for k in range(3)]
        turns = [("human", ["redder ", grids[0]]), ("assistant", [grids[1]]), ("human", ["more"])]
        ids, labels = encode_conversation([*turns, ("assistant", ["here: ", grids[2]])], vocabulary)
        sequences.append(Sequence(n, torch.tensor(ids), torch.tensor(labels)))
    rows = write_shard(folder / "edits.safetensors", sequences, []).rows("edits.safetensors")
    (folder / "edits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(folder / "edits.jsonl"))


def test_one_sequence_in_ten_keeps_its_last_image_only(vocabulary, tmp_path):
    """The samples without context change with the epoch. They are the same in both families."""
    source = edits(vocabulary, tmp_path, 100)
    first, second = (TokenDataset([source], vocabulary, 1, several=several) for several in (True, False))
    whole = [first.sequence(n).ids.tolist() for n in range(100)]
    dropped: list[set[int]] = []
    for epoch in range(4):
        dropped.append(set())
        for n in range(100):
            ids, labels = (part.tolist() for part in first.read(n, epoch))
            assert second.read(n, epoch)[0].tolist() == whole[n]
            if ids != whole[n]:
                alone = encode_image(torch.full((2, 6), 3 * n + 2), vocabulary)
                assert (ids, labels) == (alone, alone)
                dropped[-1].add(n)
    assert 20 <= sum(map(len, dropped)) <= 60 and len(set(map(frozenset, dropped))) == 4


def test_pickled_records_of_the_released_code_are_read(oracle_v1_dir, vocabulary, tmp_path):
    items = list(json.loads((oracle_v1_dir / "train_items.json").read_text()).values())
    rows = []
    for n, item in enumerate(items):
        path = tmp_path / f"{n}.pkl"
        path.write_bytes(pickle.dumps({"token": item["ids"], "label": item["labels"], "id": n}))
        rows.append({"file": str(path), "len": len(item["ids"]), "id": n})
    (tmp_path / "record.json").write_text(json.dumps(rows))
    dataset = TokenDataset([Source(str(tmp_path / "record.json"))], vocabulary, several=True)
    dataset.check(4096)
    got = [(dataset.sequence(n).ids.tolist(), dataset.sequence(n).labels.tolist()) for n in range(len(items))]
    assert got == [(item["ids"], item["labels"]) for item in items]


def test_records_of_both_families_are_told_apart(vocabulary, tools, tmp_path):
    """Sequences of the second generation do not decode with the vocabulary of the first."""
    TokenDataset([edits(vocabulary, tmp_path, 2)], vocabulary).check(4096)
    with pytest.raises(InputError, match="made with another vocabulary"):
        TokenDataset([make_source(tmp_path, tools[0], 2)], vocabulary).check(4096)


# -- data files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fp_sft", "omni_sft"])
def test_the_mixtures_of_both_families_can_be_read(name, monkeypatch):
    from lumina_mgpt import resources

    monkeypatch.setenv("DATA", "here")
    monkeypatch.setenv("SIZE", "768")
    sources = read_sources(resources.configs() / "data" / f"{name}_first.yaml")
    require_known_panels(sources, FIRST)
    assert sum(source.weight for source in sources) == pytest.approx(1)
    assert all(source.path.startswith("here/") for source in sources)
    assert {"text", "image"} <= {source.type for source in sources}
    assert any("text_only" in source.path for source in sources) and len({s.path for s in sources}) == len(sources)


def test_the_tokenizer_of_the_folder_is_chameleons(checkpoint):
    assert ImageTokenizer.from_checkpoint(checkpoint / "vqgan.safetensors").kind == "vqgan"
