"""What a week of training rests on: kills, other numbers of processes, and disks that fail."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_runs import ONE, ROOT, changed, environment, metrics_of, weights_of

from lumina_mgpt.data import shards
from lumina_mgpt.errors import InputError
from lumina_mgpt.training import run_folder
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.trainer import Trainer


@pytest.fixture(scope="module")
def run_forked(tmp_path_factory):
    """Runs one job of `forked_runs.py`, which must end well; returns what it says of it."""
    errors = tmp_path_factory.mktemp("forked") / "errors"
    with open(errors, "w") as file:
        options = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, text=True)
        server = subprocess.Popen([sys.executable, "tests/forked_runs.py"], cwd=ROOT, env=environment(), **options)

    def run(settings: TrainingConfig, **job) -> dict:
        print(json.dumps({"settings": settings.flat(), **job}), file=server.stdin, flush=True)
        said = json.loads(server.stdout.readline() or "{}")
        assert set(said.get("statuses", ())) == {0}, (said, errors.read_text()[-3000:])
        return said

    yield run
    server.stdin.close()
    assert server.wait(timeout=60) == 0


def assert_same_run(one: str, other: str, tolerance: float) -> None:
    """Curves and weights are within `tolerance`; 0: equal bit for bit."""
    for a, b in zip(metrics_of(one), metrics_of(other), strict=True):
        assert a["step"] == b["step"] and abs(a["loss"] - b["loss"]) <= tolerance
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=10 * tolerance, abs=0)
    first, second = weights_of(one), weights_of(other)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=10 * tolerance, atol=tolerance)


def test_ten_kills_leave_no_trace(settings, tmp_path, run_forked):
    """Dropout, dropped contexts, moving average; half of the kills fall into the writing of a checkpoint."""
    base = changed(settings, max_steps=60, ema=0.9, accum_iter=2, batch_size=3, spike=50.0)
    killed = changed(base, output_dir=str(tmp_path / "killed"), save_iteration_interval=2, resume="auto")
    run_forked(base)
    told = run_forked(killed, kills=10)
    assert told["writing"] >= 1, "no kill fell into the writing of a checkpoint; the test shows less than it says"
    assert_same_run(base.output_dir, killed.output_dir, 0.0)


def test_checkpoints_written_beside_the_steps(settings, tmp_path, run_forked):
    """Killed and resumed, as bit for bit as others: what is written is a copy, and nothing half-written has a name.

    Begun on two processes, whose messages about checkpoints and about steps cross.
    """
    base = changed(settings, max_steps=20, ema=0.9, accum_iter=2, batch_size=3, dropout=0.0)
    beside = changed(base, output_dir=str(tmp_path / "beside"), save_iteration_interval=2, resume="auto",
                     save_beside=True)  # fmt: skip
    run_forked(base)
    run_forked(changed(beside, output_dir=str(tmp_path / "killed")), kills=3)
    assert_same_run(base.output_dir, str(tmp_path / "killed"), 0.0)
    run_forked(changed(beside, accum_iter=1), world=2, until=9)
    run_forked(beside)
    assert_same_run(base.output_dir, beside.output_dir, 1e-4)
    assert len(list((tmp_path / "beside" / "checkpoints").iterdir())) == 2


def test_two_processes_equal_one_over_fifty_steps(settings, tmp_path, run_forked):
    """Also across epochs' ends, where a step is a smaller one, and with the loss in chunks on the two."""
    one = changed(settings, dropout=0.0, batch_size=5, accum_iter=2, max_steps=50)
    two = changed(one, accum_iter=1, output_dir=str(tmp_path / "two"))
    run_forked(one)
    run_forked(two, world=2, chunks=True)
    assert_same_run(one.output_dir, two.output_dir, 1e-4)


def test_muon_on_two_processes_equals_one(settings, tmp_path, run_forked):
    """It orthogonalizes in bfloat16, so the order of its sums shows."""
    one = changed(settings, dropout=0.0, batch_size=5, accum_iter=2, max_steps=7, optimizer="muon")
    two = changed(one, accum_iter=1, output_dir=str(tmp_path / "two"))
    run_forked(one)
    run_forked(two, world=2)
    assert_same_run(one.output_dir, two.output_dir, 1e-3)


def test_from_two_processes_to_one_and_back(settings, tmp_path, run_forked):
    whole = changed(settings, dropout=0.0, batch_size=5, accum_iter=2, max_steps=15, ema=0.9)
    parts = changed(whole, output_dir=str(tmp_path / "parts"), resume="auto")
    on_two = changed(parts, accum_iter=1)
    run_forked(whole)
    run_forked(on_two, world=2, until=5)
    run_forked(parts, until=10)
    run_forked(on_two, world=2)
    assert_same_run(whole.output_dir, parts.output_dir, 1e-4)


@pytest.mark.skipif(not importlib.util.find_spec("peft"), reason="needs peft")
def test_adapters_on_two_processes_equal_one(settings, tmp_path, run_forked):
    """In bfloat16 too, where frozen weights and adapters are of two formats in one group of FSDP."""
    one = changed(settings, dropout=0.0, batch_size=5, accum_iter=2, max_steps=4, lora_rank=2)
    two = changed(one, accum_iter=1, output_dir=str(tmp_path / "two"))
    narrow = changed(two, precision="bf16", output_dir=str(tmp_path / "narrow"))
    run_forked(one)
    run_forked(two, world=2)
    run_forked(narrow, world=2)
    assert_same_run(one.output_dir, two.output_dir, 1e-4)
    losses = [[row["loss"] for row in metrics_of(run.output_dir)] for run in (one, narrow)]
    assert losses[0] == pytest.approx(losses[1], abs=0.05)


def test_a_data_file_that_vanishes_is_one_line_and_costs_no_checkpoint(settings, tokens, tmp_path):
    """Put back, the run goes on to where it would have come."""
    for name in ("a.safetensors", "records.jsonl"):
        shutil.copy(tokens.parent / name, tmp_path)
    (tmp_path / "data.yaml").write_text(tokens.read_text().replace(str(tokens.parent), str(tmp_path)))
    run = changed(settings, data_config=str(tmp_path / "data.yaml"), save_iteration_interval=2, resume="auto")
    trainer = Trainer(run, ONE)
    step = trainer._step

    def vanishing(began):
        if trainer.at == 5:
            shards._open.cache_clear()  # as when there are more shards than are kept open
            (tmp_path / "a.safetensors").rename(tmp_path / "away")
        step(began)

    trainer._step = vanishing
    with pytest.raises(InputError, match="a.safetensors is missing") as caught:
        trainer.run()
    assert "\n" not in str(caught.value)
    assert run_folder.newest(Path(run.output_dir)).name == "step-00000004"
    (tmp_path / "away").rename(tmp_path / "a.safetensors")
    Trainer(run, ONE).run()
    whole = changed(run, output_dir=str(tmp_path / "whole"))
    Trainer(whole, ONE).run()
    assert_same_run(whole.output_dir, run.output_dir, 0.0)
