"""The training loop: losses of the oracle, resuming after kills, one process and two."""

import dataclasses
import json
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import line_of
from safetensors.torch import load_file
from training_runs import ONE, ROOT, changed, command, environment, metrics_of, weights_of

from lumina_mgpt.cli.finetune import train
from lumina_mgpt.data.batches import Planned, collate
from lumina_mgpt.data.shards import Sequence, read_sequence, write_shard
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import run_folder
from lumina_mgpt.training.loss import TAIL_MASS, LossModel, token_losses
from lumina_mgpt.training.optimizer import Ema, schedule
from lumina_mgpt.training.state import read_state
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.unirep import IGNORED

# -- the loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["b2_trunc100", "b3"])
def test_oracle_loss_and_gradients(oracle_dir, oracle_checkpoint, case):
    """Cross-entropy, z-loss and gradient norms equal those of the released trainer; only labels reach the head."""
    from lumina_mgpt.model.names import disk_name

    wanted = json.loads((oracle_dir / "loss_mha256.json").read_text())[case]
    items = [json.loads((oracle_dir / "pre_tokenize.json").read_text())[n] for n in wanted["items"]]
    cut = wanted["max_position_embeddings"]
    width = max(len(item["token"][:cut]) for item in items)
    ids = torch.zeros(len(items), width, dtype=torch.long)
    successors = torch.full((len(items), width), -100)
    for row, item in enumerate(items):
        token, label = item["token"][:cut], item["label"][:cut]
        ids[row, : len(token)], successors[row, : len(label) - 1] = torch.tensor(token), torch.tensor(label[1:])
    index = (successors.flatten() >= 0).nonzero().flatten()
    model = load_model(oracle_checkpoint("mha256"), torch.float32, "cpu").train()
    model.dropout = 0.0
    padded = torch.cat([index, torch.zeros(5, dtype=torch.long)])
    targets = torch.cat([successors.flatten()[index], torch.full((5,), -100)])
    total, cross, z = (value / len(index) for value in LossModel(model, wanted["z_weight"])(ids, padded, targets))
    total.backward()
    assert cross.item() == pytest.approx(wanted["c_loss"], abs=1e-4)
    assert z.item() == pytest.approx(wanted["z_loss"], rel=1e-5)
    norms = {disk_name(name): parameter.grad.norm() for name, parameter in model.named_parameters()}
    for name, norm in wanted["grad_norms"].items():
        assert norms[name].item() == pytest.approx(norm, rel=1e-4), name
    total = torch.stack(list(norms.values())).norm().item()
    assert total == pytest.approx(wanted["total_grad_norm"], rel=1e-4)


@pytest.mark.parametrize("scaling", [None, {"type": "dynamic", "factor": 2.0}])
def test_packed_sequences_do_not_attend_to_each_other(settings, tiny_checkpoint, scaling):
    """The same sequences in separate rows and packed: loss and every gradient are equal."""
    model = load_model(tiny_checkpoint, torch.float64, "cpu").train()
    model.config = dataclasses.replace(model.config, rope_scaling=scaling, max_position_embeddings=64)
    model.dropout = 0.0
    dataset = Trainer(changed(settings, max_tokens=400, batch_size=0, pack=True), ONE).dataset
    sums = []
    for packed in (False, True):
        samples = dataset.epoch(0)[:6:2] if scaling else dataset.epoch(0)[:6]  # dynamic: of one length
        width = int(dataset.length(samples).max())
        shape = (1, int(dataset.length(samples).sum()) + 7) if packed else (len(samples), width)
        batch = collate(dataset, Planned(samples, *shape, packed), 0, multiple=1)
        model.zero_grad()
        total, _, _ = LossModel(model, 0.1)(batch.ids, batch.index, batch.targets, batch.documents)
        total.backward()
        sums.append((batch.labelled, total.detach(), [parameter.grad for parameter in model.parameters()]))
    assert sums[0][0] == sums[1][0] and not torch.equal(sums[0][2][0], torch.zeros_like(sums[0][2][0]))
    torch.testing.assert_close(sums[0][1:], sums[1][1:], rtol=1e-6, atol=1e-6)


def test_a_packed_run_learns_and_resumes(settings):
    packed = changed(settings, batch_size=0, max_tokens=200, pack=True, max_steps=6, lr=1e-2, dropout=0.0)
    Trainer(packed, ONE).run()
    rows = metrics_of(settings.output_dir)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    with pytest.raises(InputError, match="pack=True"):
        Trainer(changed(packed, pack=False, resume="auto"), ONE)
    with pytest.raises(InputError, match="pack cannot be used with compile=True"):
        changed(packed, compile=True)


def test_sample_prompts_need_steps_between_pictures(settings):
    with pytest.raises(InputError, match="sample_prompts needs sample_every=N"):
        Trainer(changed(settings, sample_prompts="prompts.txt"), ONE)


def test_spare_panel_needs_code_noise(settings):
    cases = (
        ({"spare_panel": 0.5}, "spare_panel 0.5 means nothing without code_noise"),
        ({"spare_panel": 1.5, "code_noise": 0.5}, r"spare_panel must be in \[0, 1\], got 1.5"),
    )
    for wrong, rule in cases:
        with pytest.raises(InputError, match=rule):
            changed(settings, **wrong)
    noisy = changed(settings, code_noise=0.5, spare_panel=0.75, max_steps=2)
    Trainer(noisy, ONE).run()
    assert len(metrics_of(settings.output_dir)) == 2


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_overfits_a_batch(settings, optimizer):
    size = dict(batch_size=24, max_steps=80, dropout=0.0, wd=0.0, warmup=0.05, lr=1e-2, optimizer=optimizer)
    Trainer(changed(settings, **size), ONE).run()
    losses = [row["loss"] for row in metrics_of(settings.output_dir)]
    assert losses[0] > 3 and losses[-1] < 0.3


def test_freed_memory_is_kept_unless_memory_matters_more(settings, monkeypatch):
    calls: list[str] = []
    for name in ("return_freed_memory", "keep_freed_memory"):
        monkeypatch.setattr(f"lumina_mgpt.training.distributed.{name}", lambda name=name: calls.append(name))

    def make(*_):
        raise InputError("enough")

    for checkpointing, expected in ((True, []), (False, ["keep_freed_memory"])):
        with pytest.raises(InputError, match="enough"):
            train(changed(settings, checkpointing=checkpointing, device="cpu"), make)
        assert calls == ["return_freed_memory", *expected]
        calls.clear()


def test_schedule_rises_and_falls():
    values = [schedule(n / 100, 0.1, 0.2) for n in range(101)]
    assert values[0] == 0 and values[10] == pytest.approx(1) and values[100] == pytest.approx(0.2)
    assert values[5] == pytest.approx(0.5) and values[55] == pytest.approx(0.6)


def test_moving_average_follows_the_weights():
    model = torch.nn.Linear(2, 2)
    ema, start = Ema(model, 0.9), model.weight.detach().clone()
    with torch.no_grad():
        model.weight += 1
    ema.update(model)
    torch.testing.assert_close(ema.weights["weight"], start + 9 / 11)


def test_export_has_the_moving_average(settings, tiny_checkpoint):
    trainer = Trainer(changed(settings, ema=0.5, max_steps=3), ONE)
    trainer.run()
    exported = weights_of(settings.output_dir)
    torch.testing.assert_close(exported["lm_head.weight"], trainer.ema.weights["lm_head.weight"])
    assert not torch.equal(exported["lm_head.weight"], trainer.model.lm_head.weight)
    folder = Path(settings.output_dir) / "export"
    assert (folder / "tokenizer.json").read_bytes() == (tiny_checkpoint / "tokenizer.json").read_bytes()
    model = load_model(folder, torch.float32, "cpu")
    assert isinstance(model, Transformer) and model.config.num_image_codes == 64


def test_the_tail_term_equalizes_unlikely_ids_and_keeps_likely_ones():
    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(6, 500, generator=generator)).requires_grad_()
    targets = torch.tensor([3, -100, 49, 0, 7, 12])
    plain, _ = token_losses(logits, targets)
    torch.testing.assert_close(plain, F.cross_entropy(logits, targets, reduction="sum"))
    with torch.no_grad():
        logits[torch.arange(6), targets.clamp(min=0)] += 15
    optimizer = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        token_losses(logits, targets, tail_weight=1.0)[0].backward()
        optimizer.step()
    log_probs = logits.detach().log_softmax(-1)[targets >= 0]
    chosen = log_probs.gather(1, targets[targets >= 0, None])
    level = torch.tensor(TAIL_MASS / 500).log()
    assert chosen.exp().min() > 0.95
    tail = log_probs[log_probs < chosen]
    assert (tail.mean() - level).abs() < 0.5 and tail.std() < 0.5


def test_from_scratch_within_a_time_box(settings, tiny_checkpoint, tmp_path):
    folder = str(tiny_checkpoint)
    scratch = dict(init_from=None, model_config=f"{folder}/config.json", tokenizer_path=folder)
    run = changed(settings, max_steps=0, max_minutes=0.02, max_tokens=200, batch_size=0, **scratch)
    Trainer(run, ONE).run()
    rows = metrics_of(settings.output_dir)
    assert 1.2 <= rows[-1]["elapsed"] < 20 and rows[-1]["progress"] >= 1
    assert rows[-1]["lr"] < rows[len(rows) // 2]["lr"]


# -- kill and resume ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resumed_run_equals_the_uninterrupted_one(settings, tmp_path, optimizer):
    """Bit for bit, with dropout, dropped contexts, moving average and accumulation, across the end of an epoch."""
    base = changed(settings, ema=0.9, accum_iter=2, max_steps=9, optimizer=optimizer)
    Trainer(base, ONE).run()
    broken = changed(base, output_dir=str(tmp_path / "broken"), save_iteration_interval=2, resume="auto")
    trainer = Trainer(broken, ONE)
    step = trainer._step

    def step_until_five(began):
        if trainer.at == 5:  # as a kill: between checkpoints, without writing another
            raise SystemExit
        step(began)

    trainer._step = step_until_five
    with pytest.raises(SystemExit):
        trainer.run()
    again = Trainer(broken, ONE)
    assert again.at == 4
    again.run()
    first, second = metrics_of(settings.output_dir), metrics_of(broken.output_dir)
    assert [row["loss"] for row in first] == [row["loss"] for row in second]
    one, two = weights_of(settings.output_dir), weights_of(broken.output_dir)
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(list((tmp_path / "broken" / "checkpoints").iterdir())) == 2


def test_an_existing_run_is_not_overwritten(settings):
    Trainer(changed(settings, max_steps=1), ONE).run()
    with pytest.raises(InputError, match="resume=auto"):
        Trainer(settings, ONE)
    with pytest.raises(InputError, match="seed=0"):
        Trainer(changed(settings, resume="auto", seed=1), ONE)
    with pytest.raises(InputError, match="resume must be auto or the folder of a checkpoint, got nowhere"):
        Trainer(changed(settings, resume="nowhere"), ONE)


def test_a_second_run_in_the_same_folder_is_refused(settings):
    """Each would remove the checkpoint that the other is writing."""
    first, second = Trainer(settings, ONE), Trainer(settings, ONE)
    step = first._step

    def step_beside_another(began):
        if first.at == 3:
            with pytest.raises(InputError, match="output_dir .* is in use by another run"):
                second.run()
        step(began)

    first._step = step_beside_another
    first.run()
    assert metrics_of(settings.output_dir)[-1]["step"] == 8
    Trainer(changed(settings, resume="auto", max_steps=9), ONE).run()


def test_ctrl_c_writes_a_checkpoint(settings):
    long = changed(settings, max_steps=100_000)
    process = subprocess.Popen(command(long), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True)
    lines = Path(settings.output_dir) / "metrics.jsonl"
    while process.poll() is None and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "--resume auto" in errors, errors
    state = read_state(run_folder.newest(Path(settings.output_dir)))
    assert state["step"] == metrics_of(settings.output_dir)[-1]["step"]


# -- many processes ----------------------------------------------------------------------------------------------------


def test_torchrun_with_two_processes_equals_one(settings, tmp_path):
    """The same micro-batches on two processes (gloo, FSDP) as one after the other, by the command line."""
    tolerance = 1e-4
    one = changed(settings, dropout=0.0, batch_size=5, accum_iter=2, max_steps=3, ema=0.9)
    Trainer(one, ONE).run()
    two = changed(one, accum_iter=1, output_dir=str(tmp_path / "two"))
    line = command(two, "--export_dtype", "fp32", processes=2)
    run = subprocess.run(line, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    for a, b in zip(metrics_of(one.output_dir), metrics_of(two.output_dir), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=tolerance)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    exported = load_file(Path(two.output_dir) / "export" / "model.safetensors")
    for name, value in weights_of(one.output_dir).items():
        torch.testing.assert_close(exported[name], value, atol=tolerance, rtol=1e-3)


# -- what users do wrong -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "values, message",
    [
        ({"max_seq_len": 30}, "24 of 24|12 of 24"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": 1}, "epochs=N"),
        ({"lr": 0.0}, "lr must"),
        ({"data_config": "missing.yaml"}, "data_config"),
        ({"optimizer": "sgd"}, "optimizer"),
    ],
)
def test_wrong_settings_name_the_parameter(settings, values, message):
    with pytest.raises(InputError, match=message):
        Trainer(changed(settings, **values), ONE)


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(settings):
    trainer = Trainer(changed(settings, save_iteration_interval=2), ONE)
    step = trainer._step

    def poisoned(began):
        if trainer.at == 3:
            trainer.model.lm_head.weight.data[0, 0] = float("nan")
        step(began)

    trainer._step = poisoned
    with pytest.raises(InputError, match="lower lr"):
        trainer.run()
    assert run_folder.newest(Path(settings.output_dir)).name == "step-00000002"


def test_damaged_checkpoint_is_named(settings):
    Trainer(changed(settings, max_steps=2), ONE).run()
    path = run_folder.newest(Path(settings.output_dir))
    data = next(path.glob("*.distcp"))
    data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
    with pytest.raises(InputError, match=path.name):
        Trainer(changed(settings, resume="auto"), ONE)


def test_a_full_disk_raises_one_line_and_keeps_the_last_checkpoint(settings):
    """torch raises CheckpointException, a BaseException, which no handler caught once."""
    trainer = Trainer(changed(settings, max_steps=2), ONE)
    trainer.run()
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    trainer.at = 5
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(InputError, match="step 5 cannot be written") as caught:
            trainer.save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert run_folder.newest(Path(settings.output_dir)).name == "step-00000002"
    assert Trainer(changed(settings, max_steps=3, resume="auto"), ONE).at == 2


def test_a_full_disk_is_reported_while_checkpoints_are_written_in_the_background(settings):
    """The error is raised at one of the next steps, before the next checkpoint is due."""
    trainer = Trainer(changed(settings, save_iteration_interval=2, save_beside=True, max_steps=10_000), ONE)
    step, (_, hard) = trainer._step, resource.getrlimit(resource.RLIMIT_FSIZE)

    def filling(began):
        if trainer.at == 4:
            trainer.saver.finish()
            trainer.settings = changed(trainer.settings, save_iteration_interval=3)
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
        step(began)

    trainer._step, trainer.metrics.flush = filling, lambda: None
    try:
        with pytest.raises(InputError, match="checkpoint of step [67] cannot be written") as caught:
            trainer.run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert "\n" not in str(caught.value)
    assert run_folder.newest(Path(settings.output_dir)).name == "step-00000004"


def test_other_tokens_of_the_same_lengths_are_not_resumed_with(settings, tokens, tmp_path):
    """A retrained image tokenizer gives sequences of the same lengths with another meaning."""
    Trainer(changed(settings, max_steps=1), ONE).run()
    sequences = [read_sequence(tokens.parent / "a.safetensors", n) for n in range(24)]
    first = Sequence(0, sequences[0].ids.clone(), sequences[0].labels.clone())
    position = int((first.labels != IGNORED).nonzero()[4])
    first.ids[position] = first.labels[position] = int(first.ids[position + 1])
    write_shard(tmp_path / "a.safetensors", [first, *sequences[1:]], [])
    shutil.copy(tokens.parent / "records.jsonl", tmp_path)
    (tmp_path / "data.yaml").write_text(tokens.read_text().replace(str(tokens.parent), str(tmp_path)))
    with pytest.raises(InputError, match="data_config"):
        Trainer(changed(settings, resume="auto", data_config=str(tmp_path / "data.yaml")), ONE)


def test_the_released_command_is_understood():
    released = "--cache_ann_on_disk --num_workers 8 --unmask_image_logits --model_size 7B --epochs 2"
    command = [
        *line_of("finetune"),
        "--output_dir",
        "x",
        "--data_config",
        "missing.yaml",
        "--warmup_epochs",
        "0.01",
        "--batch_size",
        "8",
        "--tokenizer_path",
        "x",
        *released.split(),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "missing.yaml" in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
