"""Data set, plan and batches: random choices are functions of a key, and no sequence is lost or seen twice."""

import json
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from records import make_source

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import BatchSize, Feed, MicroBatch, collate, corrupt, pack, plan_epoch
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.seeding import generator, uniform
from lumina_mgpt.data.shards import Sequence, read_index, read_sequence, write_shard
from lumina_mgpt.data.sources import read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.vocabulary import Vocabulary


@pytest.fixture(scope="module")
def dataset(vocabulary, tmp_path_factory) -> TokenDataset:
    return TokenDataset([make_source(tmp_path_factory.mktemp("data"), vocabulary, 200)], vocabulary, seed=3)


def test_uniform_is_uniform_and_a_function_of_its_key():
    values = np.array([uniform(1, "x", n) for n in range(4000)])
    assert values.min() >= 0 and values.max() < 1 and abs(values.mean() - 0.5) < 0.02
    assert abs((values < 0.1).mean() - 0.1) < 0.02
    assert uniform(1, "x", 5) == values[5] != uniform(2, "x", 5)
    assert (generator(1, 2).random(3) == generator(1, 2).random(3)).all()
    assert uniform(1, 23) != uniform(12, 3)


def test_shard_round_trip(tmp_path):
    ids = {n: torch.arange(1, n + 2) for n in (0, 4, 2)}
    sequences = [Sequence(n, value, value.masked_fill(value == 1, -100)) for n, value in ids.items()]
    write_shard(tmp_path / "a.safetensors", sequences, [{"id": 9, "reason": "why"}])
    index = read_index(tmp_path / "a.safetensors", check=True)
    assert (index.records, index.lengths, index.bad) == ([0, 4, 2], [1, 5, 3], [{"id": 9, "reason": "why"}])
    for sequence in sequences:
        read = read_sequence(tmp_path / "a.safetensors", sequence.record)
        assert torch.equal(read.ids, sequence.ids) and torch.equal(read.labels, sequence.labels)
    with pytest.raises(InputError, match="record 7"):
        read_sequence(tmp_path / "a.safetensors", 7)
    write_shard(tmp_path / "empty.safetensors", [], [])
    assert read_index(tmp_path / "empty.safetensors", check=True).lengths == []


@pytest.mark.parametrize("size", [BatchSize(rows=7, multiple=8), BatchSize(tokens=300, multiple=16)])
def test_plan_holds_every_sample_once_in_batches_of_similar_length(dataset, size):
    plan = plan_epoch(dataset, 0, size)
    assert Counter(int(s) for planned in plan for s in planned.samples) == Counter(range(200))
    spread = []
    for planned in plan:
        lengths = dataset.length(planned.samples)
        assert lengths.max() <= planned.width < lengths.max() + size.multiple and planned.width % size.multiple == 0
        assert len(planned.samples) <= planned.rows and (not size.tokens or planned.rows * planned.width <= size.tokens)
        spread.append(len({size.width(int(length)) for length in lengths}))
    assert np.mean(spread) < 1.3  # mixed only at the boundary of two lengths
    assert sum(planned.rows * planned.width for planned in plan) < 1.5 * dataset.lengths.sum()


def test_packed_rows_are_full_and_hold_every_sample_once(dataset):
    size = BatchSize(tokens=400, multiple=8, packed=True)
    plan = plan_epoch(dataset, 0, size)
    assert Counter(int(s) for planned in plan for s in planned.samples) == Counter(range(200))
    assert all(planned.rows == 1 and planned.width <= 400 for planned in plan)
    assert dataset.lengths.sum() / (400 * len(plan)) > 0.9
    mixed = [len(set(dataset.length(planned.samples))) for planned in plan]
    assert np.mean(mixed) > 2  # rows mix sequences of different lengths


def test_packed_kinds_do_not_mix():
    lengths, kinds = np.array([3, 3, 3, 3]), np.array([0, 0, 0, 1])
    assert pack(lengths, kinds, 6) == [[0, 1], [2], [3]]


def test_packed_batch_predicts_each_label_from_its_own_sequence(dataset):
    """The first id of a sequence without context has a label, but is not predicted from the previous sequence."""
    size = BatchSize(tokens=800, multiple=8, packed=True)
    planned = next(
        p
        for p in plan_epoch(dataset, 0, size)
        if sum(len(dataset.read(int(s), 0)[0]) < dataset.length(s) for s in p.samples[1:])
    )
    batch = collate(dataset, planned, 0, multiple=8)
    read = [dataset.read(int(sample), 0) for sample in planned.samples]
    padding = planned.width - sum(len(ids) for ids, _ in read)
    assert batch.documents == (*(len(ids) for ids, _ in read), *([padding] if padding else []))
    assert torch.equal(batch.ids[0, : batch.tokens], torch.cat([ids for ids, _ in read]))
    wanted = torch.cat([labels[1:][labels[1:] >= 0] for _, labels in read])
    assert torch.equal(batch.targets[: batch.labelled], wanted) and batch.labelled == len(wanted)


def test_plan_is_a_function_of_seed_and_epoch(dataset):
    size = BatchSize(rows=8)
    flat = [[planned.samples.tolist() for planned in plan_epoch(dataset, epoch, size)] for epoch in (0, 0, 1)]
    assert flat[0] == flat[1] != flat[2]


def test_ratio_and_types(vocabulary, tmp_path):
    sources = [
        make_source(tmp_path, vocabulary, 40, "a", type="x", ratio=0.25),
        make_source(tmp_path, vocabulary, 20, "b", type="y", ratio=2.5),
    ]
    dataset = TokenDataset(sources, vocabulary)
    epochs = [dataset.epoch(epoch) for epoch in range(3)]
    for samples in epochs:
        assert len(set(samples)) == len(samples) == 10 + 50
        counts = Counter(samples % 60)
        assert sum(counts[n] for n in range(40)) == 10 and {counts[n] for n in range(40, 60)} == {2, 3}
    assert set(epochs[0]) != set(epochs[1])
    for planned in plan_epoch(dataset, 0, BatchSize(rows=8)):
        assert len(set(dataset.kind(planned.samples))) == 1


def test_any_number_of_processes_follows_the_same_plan(dataset):
    """All processes get equally many batches per step. Without empty ones, they are those of a single process."""
    alone = Feed(dataset, BatchSize(rows=9), accum=6)
    for world, accum in ((2, 3), (3, 2), (6, 1)):
        feeds = [Feed(dataset, BatchSize(rows=9), accum, rank, world) for rank in range(world)]
        alone.epoch = alone.done = 0
        while alone.epoch < 2:
            step = alone.next_step()
            parts = [feed.next_step() for feed in feeds]
            assert len({len(part) for part in parts}) == 1
            real = sorted(batch.ids.sum().item() for part in parts for batch in part if batch.labelled)
            assert real == sorted(batch.ids.sum().item() for batch in step)
            assert {(feed.epoch, feed.done) for feed in feeds} == {(alone.epoch, alone.done)}


def test_batch_predicts_each_label_from_the_previous_position(dataset):
    planned = plan_epoch(dataset, 0, BatchSize(rows=8))[0]
    batch = collate(dataset, planned, 0, multiple=8)
    flat, real = batch.ids.flatten(), batch.targets >= 0
    assert real.sum() == batch.labelled and torch.equal(flat[batch.index[real] + 1], batch.targets[real])
    labels = [dataset.read(int(sample), 0)[1] for sample in planned.samples]
    assert batch.labelled == sum(int((label[1:] >= 0).sum()) for label in labels)
    assert batch.tokens == sum(map(len, labels)) and batch.ids.shape == (8, planned.width)


def test_dropped_context_is_a_function_of_seed_epoch_and_sample(dataset, vocabulary):
    whole = {n: len(dataset.sequence(n).ids) for n in range(200)}
    dropped = [{n for n in range(200) if len(dataset.read(n, epoch)[0]) < whole[n]} for epoch in range(8)]
    assert 0.05 < np.mean([len(found) for found in dropped]) / 200 < 0.15 and dropped[0] != dropped[1]
    assert dropped[0] == {n for n in range(200) if len(dataset.read(n, 0)[0]) < whole[n]}
    ids, labels = dataset.read(min(dropped[0]), 0)
    assert ids[0] == vocabulary.image_start_id and ids[-1] == vocabulary.image_end_id and torch.equal(ids, labels)


def test_a_given_panel_carries_no_loss(vocabulary, tmp_path):
    whole = make_source(tmp_path, vocabulary, 60, name="a")
    given = make_source(tmp_path, vocabulary, 60, name="b", given=True)
    dataset, dropped = TokenDataset([whole, given], vocabulary), 0
    assert dataset.fingerprint() != TokenDataset([whole, replace(given, given=False)], vocabulary).fingerprint()
    for sample in range(60, 120):
        ids, labels = dataset.read(sample, 0)
        dropped += len(ids) < dataset.lengths[sample]
        codes = vocabulary.is_code(ids).nonzero().flatten()
        lower = codes[len(codes) // 2]  # its first code; both panels have equally many rows
        assert (labels[:lower] == -100).all() and torch.equal(labels[lower:], ids[lower:])
        assert vocabulary.is_code(dataset.read(sample - 60, 0)[1]).sum() == len(codes)  # both carry loss
    assert 0 < dropped < 20


def test_finetune_items_match_the_oracle(oracle_dir):
    """Sequences with and without context are identical to those of the released trainer."""
    from lumina_mgpt.unirep import drop_context

    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
    vocabulary = Vocabulary.from_folder(oracle_dir / "tokenizer", ModelConfig(vocab_size=171520, **size))
    items = json.loads((oracle_dir / "pre_tokenize.json").read_text())
    for wanted in json.loads((oracle_dir / "finetune_items.json").read_text()):
        ids, labels = items[wanted["item"]]["token"], items[wanted["item"]]["label"]
        if wanted["dropped"]:
            ids, labels = drop_context(ids, labels, vocabulary)
        assert (ids, labels) == (wanted["token"], wanted["label"])


def test_errors_name_the_file_or_parameter(vocabulary, tmp_path, dataset):
    source = make_source(tmp_path, vocabulary, 6)
    with pytest.raises(InputError, match="2 of 6"):
        TokenDataset([source], vocabulary).check(int(np.sort(TokenDataset([source], vocabulary).lengths)[3]))
    for text in ("META: []", "META: [{path: a, wait: 2}]", "DATA: [{path: a}]", "META: [{path: a, ratio: -1}]", "{"):
        (tmp_path / "data.yaml").write_text(text)
        with pytest.raises(InputError, match="data.yaml") as caught:
            read_sources(tmp_path / "data.yaml")
        assert caught.value.parameter == "data_config"
    (tmp_path / "a1.safetensors").unlink()
    with pytest.raises(InputError, match="a1.safetensors"):
        TokenDataset([source], vocabulary).read(5, 0)
    with pytest.raises(InputError, match="max_tokens"):
        BatchSize(rows=1, tokens=1)
    with pytest.raises(InputError, match="^max_tokens must be at least 64"):
        BatchSize(tokens=63).check(33)
    BatchSize(tokens=64).check(64)


def test_tokens_of_another_vocabulary_are_refused(vocabulary, tmp_path):
    source = make_source(tmp_path, vocabulary, 6)
    other = Vocabulary(vocabulary._tokenizer, 500, 12, vocab_size=576)
    with pytest.raises(InputError, match="another vocabulary") as caught:
        TokenDataset([source], other).check(4096)
    assert caught.value.parameter == "data_config"


def test_corruption_replaces_codes_by_codes_only():
    torch.manual_seed(0)
    codes = slice(100, 164)
    ids = torch.randint(0, 200, (64, 500))
    new = corrupt(ids, codes, 0.2)
    changed = new != ids
    was, now = ids[changed], new[changed]
    assert ((was >= 100) & (was < 164) & (now >= 100) & (now < 164)).all()
    readable = ((ids >= 100) & (ids < 164)).sum()
    assert 0.05 < changed.sum() / readable < 0.2  # many ids of other rows are not codes in this test
    assert torch.equal(corrupt(ids, codes, 0.0), ids)


def test_corruption_can_spare_a_given_panel():
    """Spares the first half of a row's codes, at any position, and never the second half."""
    torch.manual_seed(0)
    ids = torch.randint(100, 164, (400, 60))
    ids[:, :20] = 5  # the text
    changed = corrupt(ids, slice(100, 164), 0.5, spared=0.75) != ids
    upper, lower = changed[:, 20:40].any(1).float().mean(), changed[:, 40:].any(1).float().mean()
    assert 0.2 < upper < 0.3 and lower > 0.9


def test_corruption_can_spare_given_pictures_anywhere():
    """In spared rows, codes without a loss stay, also in the second half; in the others they change as before."""
    torch.manual_seed(0)
    ids, unlabelled = torch.randint(100, 164, (400, 60)), torch.zeros(400, 60, dtype=torch.bool)
    unlabelled[:, 40:] = True
    changed = corrupt(ids, slice(100, 164), 0.5, 0.75, unlabelled) != ids
    kept, answered = ~changed[:, 40:].any(1), changed[:, 30:40].any(1)
    assert 0.7 < kept.float().mean() < 0.8 and answered.float().mean() > 0.8
    torch.manual_seed(1)
    before = corrupt(ids, slice(100, 164), 0.5)
    torch.manual_seed(1)
    assert torch.equal(corrupt(ids, slice(100, 164), 0.5, 0.0, unlabelled), before)


def test_what_carries_no_loss_is_known():
    ids = torch.arange(12).view(2, 6)
    batch = MicroBatch(ids, torch.tensor([2, 3, 9, 0]), torch.tensor([3, 4, 10, -100]), labelled=3, tokens=12)
    assert batch.unlabelled.tolist() == [[True, True, True, False, False, True], [True] * 4 + [False, True]]
