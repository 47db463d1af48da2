"""Bad steps, adapters, frozen weights, exports and sample pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch
from commands import main_of
from PIL import Image
from safetensors.torch import load_file
from training_runs import ONE, changed, metrics_of, weights_of

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.training import run_folder
from lumina_mgpt.training.guard import Guard
from lumina_mgpt.training.metrics import batch_flops
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.trainer import Trainer

# -- bad steps ---------------------------------------------------------------------------------------------------------


def poison(trainer: Trainer, *steps: int) -> Trainer:
    """Makes the gradients of these steps (counted from 1) NaN."""
    backward = trainer._backward

    def poisoned(batch, labelled):
        losses = backward(batch, labelled)
        if trainer.at + 1 in steps:
            next(trainer.model.parameters()).grad.fill_(float("nan"))
        return losses

    trainer._backward = poisoned
    return trainer


def test_a_bad_step_stops_the_run_and_its_records_are_logged(settings):
    with pytest.raises(InputError, match="on_nonfinite stop: .* at step 3.*checkpoints/step-N, a .* before it"):
        poison(Trainer(changed(settings, save_iteration_interval=2), ONE), 3).run()
    (row,) = map(json.loads, (Path(settings.output_dir) / "bad_steps.jsonl").read_text().splitlines())
    assert row["step"] == 3 and len(row["samples"]) == 4
    assert all(Path(sample["file"]).is_file() and 0 <= sample["id"] < 24 for sample in row["samples"])
    assert run_folder.newest(Path(settings.output_dir)).name == "step-00000002"


def test_only_the_bad_step_is_skipped(settings, tmp_path):
    """The update is skipped; the data moves on."""
    trainer = poison(Trainer(changed(settings, on_nonfinite="skip", max_steps=6), ONE), 3)
    update = trainer._update
    trainer._update = lambda: update() if trainer.at != 2 else pytest.fail("the step was taken")
    trainer.run()
    rows = metrics_of(settings.output_dir)
    assert [("skipped" in row) for row in rows] == [False, False, True, False, False, False]
    assert rows[2]["grad_norm"] is None and rows[-1]["step"] == 6
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_weights_that_are_not_finite_end_a_run_that_skips(settings):
    trainer = Trainer(changed(settings, on_nonfinite="skip", max_steps=50), ONE)
    trainer.model.lm_head.weight.data[0, 0] = float("nan")
    with pytest.raises(InputError, match="on_nonfinite skip: .* at step 11 and at the 10 steps before"):
        trainer.run()


def test_a_spike_is_compared_with_the_norms_before_it(tmp_path):
    guard = Guard("skip", 10.0, tmp_path, True)
    assert guard.fault(1.0, 500.0) is None  # nothing to measure it against yet
    for n in range(30):
        assert guard.fault(1.0, 1.0 + n % 3) is None
    assert "10 times the usual 2" in guard.fault(1.0, 25.0)
    assert guard.fault(1.0, 19.0) is None
    again = Guard("skip", 10.0, tmp_path, True)
    again.load(json.loads(json.dumps(guard.state())))
    assert again.fault(1.0, 25.0) == guard.fault(1.0, 25.0)


# -- long sequences ----------------------------------------------------------------------------------------------------


def test_overlong_sequences_are_dropped_only_on_request(settings, caplog):
    limit = int(Trainer(settings, ONE).dataset.lengths.min()) + 3  # sequences are of two sizes
    with pytest.raises(InputError, match="12 of 24 sequences are longer"):
        Trainer(changed(settings, max_seq_len=limit), ONE)
    trainer = Trainer(changed(settings, max_seq_len=limit, overlong="drop"), ONE)
    assert len(trainer.dataset.lengths) == 12 and trainer.dataset.lengths.max() <= limit
    assert f"12 of 24 sequences have more than {limit} ids" in caplog.text
    with pytest.raises(InputError, match="leaves nothing"):
        Trainer(changed(settings, max_seq_len=10, overlong="drop"), ONE)


# -- what is trained ---------------------------------------------------------------------------------------------------


def test_frozen_embeddings_do_not_change(settings, tiny_checkpoint):
    run = changed(settings, freeze_embeddings=True, max_steps=3, ema=0.5)
    Trainer(run, ONE).run()
    start, end = load_file(tiny_checkpoint / "model.safetensors"), weights_of(settings.output_dir)
    same = {name for name in start if torch.equal(start[name], end[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= same
    assert not any(name.endswith("proj.weight") for name in same)
    Trainer(changed(run, max_steps=4, resume="auto"), ONE).run()
    with pytest.raises(InputError, match="freeze_embeddings=True"):
        Trainer(changed(run, freeze_embeddings=False, resume="auto"), ONE)


def test_only_adapters_are_trained_saved_and_merged(settings, tiny_checkpoint, tmp_path):
    """An export, and an exported adapter merged by the command, give the logits of the trained model."""
    pytest.importorskip("peft")
    run = changed(settings, lora_rank=4, max_steps=20, lr=2e-2, dropout=0.0, wd=0.0, save_iteration_interval=10)
    trainer = Trainer(run, ONE)
    trained = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 2 * 7 and all(".lora_" in name for name in trained)
    trainer.run()
    rows = metrics_of(settings.output_dir)
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
    folder = Path(settings.output_dir)
    size = sum(file.stat().st_size for file in run_folder.newest(folder).rglob("*") if file.is_file())
    assert size < (tiny_checkpoint / "model.safetensors").stat().st_size
    ids, wide = torch.arange(40)[None], ["--dtype", "fp32"]
    with torch.no_grad():
        logits = trainer.model.eval().project(trainer.model(ids))
    assert main_of("export")(["--output_dir", str(folder), "--save_path", str(tmp_path / "a"), *wide]) == 0
    assert main_of("export")(["--output_dir", str(folder), "--save_path", str(tmp_path / "b"), "--adapter"]) == 0
    merge = ["--model_path", str(tiny_checkpoint), "--adapter", str(tmp_path / "b"), "--save_path", str(tmp_path / "c")]
    assert main_of("merge_lora")(merge) == 0
    for name in "ac":
        model = load_model(tmp_path / name, torch.float32, "cpu")
        with torch.no_grad():
            torch.testing.assert_close(model.project(model(ids)), logits, rtol=1e-4, atol=1e-4)
        assert (tmp_path / name / "movqgan_270M.ckpt").is_file() and (tmp_path / name / "tokenizer.json").is_file()
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["lora_alpha"] == 8


def test_adapters_resume_bit_for_bit(settings, tmp_path):
    pytest.importorskip("peft")
    run = changed(settings, lora_rank=2, max_steps=6)
    Trainer(run, ONE).run()
    broken = changed(run, output_dir=str(tmp_path / "broken"), save_iteration_interval=3, resume="auto")
    trainer = Trainer(broken, ONE)
    step = trainer._step
    trainer._step = lambda began: step(began) if trainer.at < 5 else (_ for _ in ()).throw(SystemExit)
    with pytest.raises(SystemExit):
        trainer.run()
    Trainer(broken, ONE).run()
    one, two = weights_of(run.output_dir), weights_of(broken.output_dir)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_lora_without_peft_names_the_package(settings, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        Trainer(changed(settings, lora_rank=2), ONE)


def test_merge_refuses_adapters_of_another_model(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    (tmp_path / "adapter" / "adapter_model.safetensors").write_bytes(b"no")
    line = ["--model_path", str(tiny_checkpoint), "--adapter", str(tmp_path / "adapter"), "--save_path"]
    assert main_of("merge_lora")([*line, str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "--adapter" in error and error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "values, message",
    [
        ({"init_from": None, "model_config": "x", "tokenizer_path": "x", "lora_rank": 2}, "init_from"),
        ({"lora_rank": 2, "freeze_embeddings": True}, "freeze_embeddings"),
        ({"lora_alpha": 3.0}, "lora_alpha"),
        ({"lora_rank": 2, "optimizer": "muon"}, "optimizer"),
        ({"spike": 0.5}, "spike"),
        ({"on_nonfinite": "hope"}, "on_nonfinite"),
        ({"overlong": "cut"}, "overlong"),
    ],
)
def test_settings_that_exclude_each_other_are_named(values, message):
    base = dict(data_config="x", output_dir="x", init_from="x", batch_size=1, max_steps=1)
    with pytest.raises(InputError, match=message):
        TrainingConfig.of(**(base | values))


# -- exports and watching ----------------------------------------------------------------------------------------------


def test_export_of_a_chosen_step(settings, tmp_path, capsys):
    Trainer(changed(settings, max_steps=4, save_iteration_interval=2), ONE).run()
    line = ["--output_dir", settings.output_dir, "--save_path", str(tmp_path / "two"), "--dtype", "fp32", "--step"]
    assert main_of("export")([*line, "3"]) == 2
    assert "holds 2, 4" in capsys.readouterr().err
    assert main_of("export")([*line, "2"]) == 0
    early, last = load_file(tmp_path / "two" / "model.safetensors"), weights_of(settings.output_dir)
    assert not torch.equal(early["lm_head.weight"], last["lm_head.weight"])
    assert main_of("export")([*line, "2"]) == 2 and "already exists" in capsys.readouterr().err


def test_sample_pictures_are_generated_during_training(settings):
    """Pictures before and after training differ, and generating them does not change the training."""
    run = changed(settings, max_steps=4, lr=3e-2, warmup=0.0, sample_every=2, tensorboard=False, dropout=0.1)
    Trainer(run, ONE).run()
    folder = Path(settings.output_dir) / "samples"
    assert sorted(path.name for path in folder.iterdir()) == [f"step-0000000{n}" for n in (0, 2, 4)]
    pictures = {path.parent.name: Image.open(path) for path in folder.rglob("0.png")}
    assert {picture.size for picture in pictures.values()} == {(64, 64)}
    assert pictures["step-00000000"].tobytes() != pictures["step-00000004"].tobytes()
    sampled = weights_of(settings.output_dir)
    plain = changed(run, sample_every=0, output_dir=settings.output_dir + "-plain")
    Trainer(plain, ONE).run()
    assert all(torch.equal(value, sampled[name]) for name, value in weights_of(plain.output_dir).items())


def test_tensorboard_holds_the_losses_or_is_reported_as_missing(settings, monkeypatch):
    run = changed(settings, max_steps=2, tensorboard=True)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        Trainer(run, ONE)
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(changed(run, resume="auto"), ONE).run()
    events = EventAccumulator(settings.output_dir + "/tensorboard").Reload()
    losses = [row["loss"] for row in metrics_of(settings.output_dir)]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(losses)


def test_share_of_peak(settings):
    """FLOPs of one layer counted by hand, and the share in the metrics of a run."""
    size = dict(vocab_size=10, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = ModelConfig(**size, num_key_value_heads=1, num_image_codes=2, image_code_offset=8)
    from lumina_mgpt.data.batches import MicroBatch

    batch = MicroBatch(torch.zeros(1, 6, dtype=torch.long), None, None, labelled=3, tokens=6, documents=(4, 2))
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert batch_flops(config, batch) == 6 * (6 * layer + 3 * 10 * 8) + 12 * 8 * (16 + 4) / 2
    Trainer(changed(settings, max_steps=1, peak_tflops=1e-3), ONE).run()
    assert 0 < metrics_of(settings.output_dir)[0]["peak_share"] < 10_000
