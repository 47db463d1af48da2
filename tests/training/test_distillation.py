"""Distilled guidance: the loss and its gradient, the run, its checkpoints and exports, and generation afterwards."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from commands import main_of
from PIL import Image
from safetensors.torch import load_file, save_file
from training_runs import ONE, ROOT, changed, environment, metrics_of, weights_of

from lumina_mgpt.comfyui.inputs import request_settings
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.conversation import sampling_config
from lumina_mgpt.data.batches import Planned, collate
from lumina_mgpt.data.dataset import TokenDataset
from lumina_mgpt.data.shards import Sequence, write_shard
from lumina_mgpt.data.sources import read_sources
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.writing import save_model
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.sampling.autoregressive import prompt_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.training import distillation, own_samples
from lumina_mgpt.training.adapters import choose_trained
from lumina_mgpt.training.distillation import GuidanceLoss, codes_only, divergences, frozen_teacher, lone_images
from lumina_mgpt.training.distillation_trainer import DistillationTrainer
from lumina_mgpt.training.options import ModelOptions
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.unirep import IGNORED, decode_image, encode_conversation

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
        step = CachedStep(
            model, KVCache(model.config, len(rows), len(ids), torch.float64, "cpu"), vocabulary.code_slice
        )
        logits = step(*prompt_call(rows, [0] * len(rows), vocabulary.bos_id))
        found.append(code_log_probs(logits, settings)[0, 0])
    return torch.stack(found)


# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed, adapters", [(False, False), (True, False), (False, True)])
def test_the_loss_is_the_divergence_of_the_samplers_distributions(
    tiny_checkpoint, dataset, vocabulary, packed, adapters
):
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
    batch = batch_of(dataset, slice(0, 2), packed)
    total, loss, gap = GuidanceLoss(student, teacher, SCALE)(
        batch.ids, batch.index, batch.targets, batch.documents, *lone_images(batch, vocabulary)
    )
    wanted = torch.zeros(2, dtype=torch.float64)
    settings = SamplingConfig(cfg=SCALE, top_k=10**6)
    for sample in dataset.epoch(0)[:2]:
        ids = dataset.sequence(int(sample)).ids.tolist()[:-2]
        target = sampler_log_probs(base, vocabulary, ids, settings)
        own = sampler_log_probs(student.eval(), vocabulary, ids, replace(settings, cfg=1.0))
        plain = sampler_log_probs(base, vocabulary, ids, replace(settings, cfg=1.0))
        wanted += torch.stack([(target.exp() * (target - other)).sum() for other in (own, plain)]).detach()
    assert wanted.min() > 1
    assert batch.labelled == sum(
        int(vocabulary.is_code(dataset.sequence(int(n)).ids).sum()) for n in dataset.epoch(0)[:2]
    )
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
        seen = lone.ids.flatten()[lone.positions[counted]]
        assert torch.equal(seen, batch.ids.flatten()[batch.index[counted]])


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapters, left", [(False, 0.05), pytest.param(True, 0.1, marks=pytest.mark.slow)])
def test_the_student_learns_the_guided_distribution(distilling, adapters, left):
    """The divergence on the records falls to a small part of what it is without training."""
    if adapters:
        pytest.importorskip("peft")
    options = dict(lora_rank=32, lr=2e-2, max_steps=80) if adapters else dict(lr=5e-3, max_steps=120)
    DistillationTrainer(changed(distilling, batch_size=12, warmup=0.05, **options), ONE).run()
    rows = metrics_of(distilling.output_dir)
    assert rows[0]["loss"] == pytest.approx(rows[0]["gap"], rel=1e-3)  # the student is the teacher without guidance
    assert rows[0]["gap"] > 0.5 and rows[-1]["loss"] < left * rows[-1]["gap"]


@pytest.mark.parametrize("adapters", [False, True])
def test_a_resumed_run_equals_the_uninterrupted_one(distilling, tmp_path, adapters):
    """Bit for bit, with dropout, moving average and accumulation, on records and on own samples."""
    if adapters:
        pytest.importorskip("peft")
    more = dict(dropout=0.1, ema=0.9, accum_iter=2, own_samples=0.5, max_steps=6, lora_rank=4 * adapters)
    whole = changed(distilling, **more)
    DistillationTrainer(whole, ONE).run()
    broken = changed(whole, output_dir=str(tmp_path / "broken"), resume="auto")
    trainer = DistillationTrainer(broken, ONE)
    step = trainer._step

    def step_and_stop(began):
        step(began)
        trainer.leave = trainer.at == 3

    trainer._step = step_and_stop
    trainer.run()
    DistillationTrainer(broken, ONE).run()
    first, second = (metrics_of(run.output_dir) for run in (whole, broken))
    assert [(row["loss"], row["gap"]) for row in first] == [(row["loss"], row["gap"]) for row in second]
    one, two = weights_of(whole.output_dir), weights_of(broken.output_dir)
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(InputError, match="guidance_scale=3.0; use the same"):
        DistillationTrainer(changed(broken, guidance_scale=4.0), ONE)


def test_another_teacher_is_refused_when_a_run_resumes(distilling, tiny_checkpoint, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_checkpoint, base)
    run = changed(distilling, init_from=str(base), max_steps=2)
    DistillationTrainer(run, ONE).run()
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"] = -weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="of a run with another value: teacher"):
        DistillationTrainer(changed(run, max_steps=4, resume="auto"), ONE)


def test_own_samples_are_the_images_that_generation_makes(tiny_checkpoint, dataset, vocabulary):
    """Prompts and ids around the images stay; the codes are those of `Pipeline.sample` for the same keys."""
    model = load_model(tiny_checkpoint, torch.float32, "cpu").train()
    batch = batch_of(dataset, slice(0, 3))
    (made,) = own_samples.with_own_samples([batch], model, vocabulary, ONE, 7)
    changed_ids = made.ids != batch.ids
    assert vocabulary.is_code(batch.ids)[changed_ids].all() and changed_ids.sum() > 20
    counted = batch.targets != IGNORED
    assert torch.equal(made.ids.flatten()[made.index[counted] + 1], made.targets[counted])
    assert (made.targets[~counted] == IGNORED).all() and torch.equal(made.index, batch.index)
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32")
    row = batch.ids[1].tolist()
    start, end = row.index(vocabulary.image_start_id), row.index(vocabulary.image_end_id)
    ((layout, number),) = [
        (layout, group.index((1, start)) + sum(map(len, list(found.values())[: list(found).index(layout)])))
        for found in [own_samples.image_places(batch, vocabulary)]
        for layout, group in found.items()
        if (1, start) in group
    ]
    codes = pipeline.sample([row[:start]], layout, SamplingConfig(cfg=1.0, seed=7), [number])[0]
    assert torch.equal(decode_image(made.ids[1, start : end + 1], vocabulary), codes)


def test_own_samples_keep_given_codes(vocabulary, tiny_checkpoint, dataset):
    model, batch = load_model(tiny_checkpoint, torch.float32, "cpu"), batch_of(dataset, slice(0, 1))
    targets = batch.targets.clone()
    codes = (targets != IGNORED).nonzero().flatten()
    targets[codes[: len(codes) // 2]] = IGNORED
    (made,) = own_samples.with_own_samples([replace(batch, targets=targets)], model, vocabulary, ONE, 7)
    border = int(batch.index[codes[len(codes) // 2]]) + 1
    assert torch.equal(made.ids[0, :border], batch.ids[0, :border])
    assert not torch.equal(made.ids[0, border:], batch.ids[0, border:])


@pytest.mark.slow
@pytest.mark.parametrize("precision, adapters", [("fp32", False), ("bf16", False), ("fp32", True)])
def test_two_processes_equal_one(distilling, tmp_path, precision, adapters):
    """Sharded student and teacher (gloo, FSDP), and own samples of copies that are gathered."""
    if adapters:
        pytest.importorskip("peft")
    tolerance = 1e-4 if precision == "fp32" else 0.05
    one = changed(distilling, batch_size=5, accum_iter=2, max_steps=3, precision=precision, lora_rank=4 * adapters)
    two = changed(one, accum_iter=1, output_dir=str(tmp_path / "two"))
    sampled = changed(two, own_samples=1.0, output_dir=str(tmp_path / "sampled"))
    jobs = [{"settings": run.flat(), "world": world} for run, world in ((one, 1), (two, 2), (sampled, 2))]
    done = subprocess.run(
        [sys.executable, "tests/forked_runs.py"],
        input="".join(json.dumps(job) + "\n" for job in jobs),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    reports = [json.loads(line) for line in done.stdout.splitlines()]
    assert [report["statuses"] for report in reports] == [[0], [0, 0], [0, 0]], done.stderr[-3000:]
    for a, b in zip(metrics_of(one.output_dir), metrics_of(two.output_dir), strict=True):
        assert [a["loss"], a["gap"]] == pytest.approx([b["loss"], b["gap"]], rel=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance)
    assert metrics_of(sampled.output_dir)[-1]["loss"] > 0


def test_wrong_settings_name_the_parameter(distilling, tiny_checkpoint, tmp_path, vocabulary):
    for values, message in (
        ({"guidance_scale": 1.0}, "guidance_scale must be above 1"),
        ({"guidance_scale": 0.0, "own_samples": 0.5}, "own_samples 0.5 means nothing without guidance_scale"),
        ({"z_loss_weight": 1e-5}, "z_loss_weight cannot be used with guidance_scale=S"),
        (
            {"own_samples": 0.5, "pack": True, "max_tokens": 400, "batch_size": 0},
            "pack cannot be used with own_samples",
        ),
        ({"init_from": None, "model_config": "x", "tokenizer_path": "x"}, "guidance_scale needs init_from=FOLDER"),
    ):
        with pytest.raises(InputError, match=message):
            changed(distilling, **values)
    ids, labels = encode_conversation([("human", ["hi"]), ("assistant", ["hello"])], vocabulary)
    rows = write_shard(tmp_path / "a.safetensors", [Sequence(0, torch.tensor(ids), torch.tensor(labels))], [])
    lines = [json.dumps(row) + "\n" for row in rows.rows(str(tmp_path / "a.safetensors"))]
    (tmp_path / "records.jsonl").write_text("".join(lines))
    (tmp_path / "data.yaml").write_text(f"META:\n  - {{path: {tmp_path / 'records.jsonl'}, type: text}}\n")
    with pytest.raises(InputError, match="data_config .* holds no images in answers"):
        DistillationTrainer(changed(distilling, data_config=str(tmp_path / "data.yaml")), ONE)


# -- afterwards --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guided(tokens, tiny_checkpoint, tmp_path_factory):
    """Output folder of the command, for adapters."""
    pytest.importorskip("peft")
    folder = tmp_path_factory.mktemp("guided") / "run"
    options = ["--cfg", "3", "--lora_rank", "4", "--max_steps", "2", "--batch_size", "4", "--precision", "fp32"]
    places = ["--init_from", str(tiny_checkpoint), "--data_config", str(tokens), "--output_dir", str(folder)]
    assert main_of("distill_guidance")([*places, *options]) == 0
    return folder


def test_every_export_records_the_scale(guided, tiny_checkpoint, tmp_path, capsys):
    """The export, an adapter that is merged later, and int4 weights. A checkpoint without guidance has no such key."""
    assert "guided_scale" not in json.loads((tiny_checkpoint / "config.json").read_text())
    assert main_of("export")(["--output_dir", str(guided), "--save_path", str(tmp_path / "adapter"), "--adapter"]) == 0
    source = ["--model_path", str(tiny_checkpoint), "--adapter", str(tmp_path / "adapter")]
    assert main_of("merge_lora")([*source, "--save_path", str(tmp_path / "merged")]) == 0
    again = ["--model_path", str(tmp_path / "merged"), "--save_path", str(tmp_path / "int4"), "--group", "32"]
    assert main_of("quantize")(again) == 0
    for folder in (guided / "export", tmp_path / "merged", tmp_path / "int4"):
        assert json.loads((folder / "config.json").read_text())["guided_scale"] == 3.0
    beside = tmp_path / "adapter" / "base_weights.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"guided_scale": 0.5}))
    assert main_of("merge_lora")([*source, "--save_path", str(tmp_path / "other")]) == 2
    assert "guided_scale must be in 1 ... 1000" in capsys.readouterr().err
    model = load_model(tiny_checkpoint, torch.float32, "cpu")
    save_model(model, tmp_path / "plain")
    assert "guided_scale" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_generation_with_guided_weights_uses_no_guidance(guided, tmp_path, capsys, caplog):
    """By default; guidance on top needs --cfg, and gets a hint."""
    place = ["--model_path", str(guided / "export"), "--prompt", "a cat", "--width", "32", "--height", "32"]
    assert main_of("generate")([*place, "--save_path", str(tmp_path / "a")]) == 0
    assert float(Image.open(tmp_path / "a" / "0_0.png").info["cfg"]) == 1.0
    assert main_of("generate")([*place, "--save_path", str(tmp_path / "b"), "--cfg", "4"]) == 0
    assert float(Image.open(tmp_path / "b" / "0_0.png").info["cfg"]) == 4.0
    assert "hint: these weights give guidance 3 by themselves, so cfg=4 guides twice" in caplog.text


def test_guided_weights_are_not_guided_again_unasked(guided, distilling):
    pipeline = Pipeline.from_pretrained(guided / "export", "cpu")
    checkpoint = pipeline.checkpoint
    with pytest.raises(InputError, match="cfg must be 1, got 4: these weights give guidance 3 by themselves"):
        checkpoint.prepare(GenerationRequest("a cat"))
    assert checkpoint.prepare(GenerationRequest.of("a cat")).request.sampling.cfg == 1.0
    assert checkpoint.prepare(GenerationRequest.of("a cat", cfg=4.0)).request.sampling.cfg == 4.0
    assert sampling_config(checkpoint, {}).cfg == 1.0 and sampling_config(checkpoint, {"cfg": 2.0}).cfg == 2.0
    settings = request_settings(0, 0, 0, 4.0, 1.0, 0, "off", 0)  # of a ComfyUI node, whose input always has a value
    with pytest.raises(InputError, match="cfg must be 1, got 4"):
        checkpoint.prepare(GenerationRequest.of("a cat", **settings))
    with pytest.raises(InputError, match="init_from .* gives guidance 3 by itself"):
        DistillationTrainer(changed(distilling, init_from=str(guided / "export")), ONE)


def test_finetuning_keeps_the_record_and_warns(guided, settings, caplog):
    trainer = Trainer(changed(settings, init_from=str(guided / "export"), max_steps=1), ONE)
    assert trainer.model.config.guided_scale == 3.0
    assert "further training changes that" in caplog.text


def test_the_command_names_its_options(tmp_path, capsys):
    needed = ["--data_config", "x", "--output_dir", str(tmp_path / "run"), "--max_steps", "1", "--batch_size", "1"]
    for options, message in (
        (["--cfg", "0", "--init_from", "x"], "--cfg must be above 1 and at most 1000, got 0"),
        ([], "--init_from is missing"),
        (["--init_from", "x", "--cfg", "1"], "--cfg must be above 1 and at most 1000"),
    ):
        assert main_of("distill_guidance")([*needed, *options]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
