"""Distilled guidance: the loss and its gradient, the run, its checkpoints and exports, and generation afterwards."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import ONE, changed, metrics_of, weights_of

from lumina_mgpt.config import ModelConfig, SamplingConfig
from lumina_mgpt.data.batches import Planned, collate
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.shards import Sequence, write_shard
from lumina_mgpt.data.sources import read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.sampling.autoregressive import prompt_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.training import distillation, own_samples
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.distillation import GuidanceLoss, codes_only, divergences, frozen_teacher, lone_images
from lumina_mgpt.training.distillation_trainer import DistillationTrainer
from lumina_mgpt.training.options import ModelOptions
from lumina_mgpt.unirep import IGNORED, encode_conversation

SCALE = 3.0


@pytest.fixture
def distilling(settings):
    """A distillation of eight steps from the tiny checkpoint, in float32 and without dropout."""
    return changed(settings, guidance_scale=SCALE, dropout=0.0, z_loss_weight=0.0, wd=0.0)


@pytest.fixture
def dataset(tokens, vocabulary):
    return TokenDataset(read_sources(str(tokens)), vocabulary, context_dropout=0.0)


def batch_of(dataset, samples, packed=False):
    """A micro-batch of samples, with image codes as its only labels."""
    lengths = dataset.length(dataset.epoch(0)[samples])
    shape = (1, int(lengths.sum()) + 5) if packed else (len(lengths), int(lengths.max()) + 3)
    planned = Planned(dataset.epoch(0)[samples], *shape, packed)
    return codes_only(collate(dataset, planned, 0, multiple=1), dataset.vocabulary)


def sampler_log_probs(model, vocabulary, ids, settings) -> torch.Tensor:
    """Log-probabilities of each code of an image, by the sampler's own step with its cache: (codes, C).

    Args:
        ids: prompt and image, up to image end.
    """
    start = ids.index(vocabulary.image_start_id)
    codes = [n for n, id_ in enumerate(ids) if vocabulary.is_code(torch.tensor(id_))]
    found = []
    for n in codes:
        rows = [ids[:n], ids[start:n]][: 1 if settings.cfg == 1 else 2]
        step = CachedStep(model, KVCache(model.config, len(rows), len(ids), torch.float64, "cpu"), vocabulary.code_slice)
        logits = step(*prompt_call(rows, [0] * len(rows), vocabulary.bos_id))
        found.append(code_log_probs(logits, settings)[0, 0])
    return torch.stack(found)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapters", [False, True])
def test_the_loss_is_the_divergence_of_the_samplers_distributions(tiny_checkpoint, dataset, vocabulary, packed, adapters):
    """Compared with the distributions of the sampler's own calls, of teacher with guidance and student without."""
    if adapters:
        pytest.importorskip("peft")
    base, student = (load_model(tiny_checkpoint, torch.float64, "cpu") for _ in range(2))
    teacher = None if adapters else frozen_teacher(base, torch.float64)
    generator = torch.Generator().manual_seed(1)
    if adapters:
        choose_trained(student, ModelOptions(init_from="x", lora_rank=2))
        student.double()
    for parameter in student.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    student.train().dropout = 0.0
    batch = batch_of(dataset, slice(0, 3), packed)
    total, loss, gap = GuidanceLoss(student, teacher, SCALE)(
        batch.ids, batch.index, batch.targets, batch.documents, *lone_images(batch, vocabulary)
    )
    wanted = torch.zeros(2, dtype=torch.float64)
    settings = SamplingConfig(cfg=SCALE, top_k=10**6)
    for sample in dataset.epoch(0)[:3]:
        ids = dataset.sequence(int(sample)).ids.tolist()[:-2]
        target = sampler_log_probs(base, vocabulary, ids, settings)
        own = sampler_log_probs(student.eval(), vocabulary, ids, replace(settings, cfg=1.0))
        plain = sampler_log_probs(base, vocabulary, ids, replace(settings, cfg=1.0))
        wanted += torch.stack([(target.exp() * (target - other)).sum() for other in (own, plain)]).detach()
    assert wanted.min() > 1
    assert batch.labelled == sum(int(vocabulary.is_code(dataset.sequence(int(n)).ids).sum()) for n in dataset.epoch(0)[:3])
    torch.testing.assert_close(torch.stack([loss, gap]).double(), wanted, rtol=1e-4, atol=1e-4)
    assert total.requires_grad and not loss.requires_grad and not gap.requires_grad


def test_the_gradient_equals_the_formula(monkeypatch, tiny_checkpoint, dataset, vocabulary):
    """softmax(student) - softmax(uncond + scale · (cond - uncond)) for each logit; and in chunks as at once."""
    generator = torch.Generator().manual_seed(0)
    rows, head, cond, uncond, teacher_head = (
        torch.randn(n, 8, generator=generator, dtype=torch.float64) for n in (6, 20, 6, 6, 20)
    )
    targets = torch.tensor([0, 0, IGNORED, 0, 0, IGNORED])
    head.requires_grad_(), rows.requires_grad_()
    divergences(rows, head, uncond + SCALE * (cond - uncond), cond, teacher_head, targets)[0].backward()
    with torch.no_grad():
        c, u = cond @ teacher_head.T, uncond @ teacher_head.T
        difference = (rows @ head.T).softmax(-1) - (c + (SCALE - 1) * (c - u)).softmax(-1)
        difference *= (targets >= 0)[:, None]
        torch.testing.assert_close(rows.grad, difference @ head, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.grad, difference.T @ rows, rtol=1e-5, atol=1e-6)
    base, student = (load_model(tiny_checkpoint, torch.float32, "cpu") for _ in range(2))
    module, batch = GuidanceLoss(student, frozen_teacher(base, torch.float32), SCALE), batch_of(dataset, slice(0, 3))
    found = []
    for chunk in (distillation.CHUNK_LOGITS, 7 * 64 * 8):
        monkeypatch.setattr(distillation, "CHUNK_LOGITS", chunk)
        student.zero_grad()
        parts = module(batch.ids, batch.index, batch.targets, (), *lone_images(batch, vocabulary))
        parts[0].backward()
        found.append((parts, [parameter.grad for parameter in student.parameters()]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert all(parameter.grad is None for parameter in module.teacher.parameters())


def test_each_image_of_an_answer_has_a_row_of_its_own(vocabulary, tmp_path):
    """Also with a picture in the question, and with a given panel, whose codes carry no loss but are seen."""
    grids = [torch.full((4, 4), n) for n in (1, 2, 3)]
    turns = [("human", ["two", grids[0]]), ("assistant", [grids[1], "and", grids[2]])]
    ids, labels = encode_conversation(turns, vocabulary)
    write_shard(tmp_path / "a.safetensors", [Sequence(0, torch.tensor(ids), torch.tensor(labels))], [])
    row = {"file": str(tmp_path / "a.safetensors"), "len": len(ids), "id": 0}
    (tmp_path / "records.jsonl").write_text(json.dumps(row) + "\n")
    for given, starts, count in ((False, [1, 2], 32), (True, [2], 16)):
        (tmp_path / "data.yaml").write_text(
            f"META:\n  - {{path: {tmp_path / 'records.jsonl'}, type: image, given: {str(given).lower()}}}\n"
        )
        data = TokenDataset(read_sources(str(tmp_path / "data.yaml")), vocabulary, context_dropout=0.0)
        batch = batch_of(data, slice(0, 1))
        lone = lone_images(batch, vocabulary)
        assert lone.ids[:, 0].tolist() == [vocabulary.image_start_id] * len(starts)
        assert [int(vocabulary.id_to_code(row[3])) for row in lone.ids] == [[1, 2, 3][n] for n in starts]
        counted = batch.targets != IGNORED
        assert batch.labelled == int(counted.sum()) == count
        seen = lone.ids.flatten()[lone.index[counted]]
        assert torch.equal(seen, batch.ids.flatten()[batch.index[counted]])


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters", [False, True])
def test_the_student_learns_the_guided_distribution(distilling, tokens, adapters):
    """The divergence on the records falls to a twentieth of what it is without training."""
    if adapters:
        pytest.importorskip("peft")
    options = dict(lora_rank=32, lr=2e-2) if adapters else dict(lr=5e-3)
    DistillationTrainer(changed(distilling, max_steps=120, batch_size=12, warmup=0.05, **options), ONE).run()
    rows = metrics_of(distilling.output_dir)
    assert rows[0]["loss"] == pytest.approx(rows[0]["gap"], rel=1e-3)  # the student is the teacher without guidance
    print(rows[0]["loss"], rows[-1])
    assert rows[-1]["gap"] > 0.1
    assert rows[-1]["loss"] < 0.05 * rows[-1]["gap"]
