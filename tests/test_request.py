"""GenerationRequest: what it validates, and that a command does each thing once between options and image."""

import subprocess
import sys
from collections import Counter
from dataclasses import replace

import pytest
from commands import PATIENCE, environment, main_of
from PIL import Image

from lumina_mgpt import Checkpoint, GenerationRequest, preparation
from lumina_mgpt.config import ModelConfig, SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.vocabulary import Vocabulary

PANEL = dict(width=32, height=64, task=I2I_TASKS["depth"])


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """Counts calls of what a command must do once."""
    calls: Counter = Counter()

    def count(owner, name: str, label: str, wrap=lambda function: function) -> None:
        function = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[label] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrap(counted))

    count(ModelConfig, "from_json", "config.json", staticmethod)
    count(Vocabulary, "from_folder", "tokenizer", staticmethod)
    count(preparation, "generation_prompt", "prompt")
    count(SamplingConfig, "__post_init__", "SamplingConfig")
    monkeypatch.setattr("lumina_mgpt.images.center_crop", counted_crop(calls))
    return calls


def counted_crop(calls: Counter):
    from lumina_mgpt.images import center_crop

    def crop(image, size):
        calls["crop"] += 1
        return center_crop(image, size)

    return crop


@pytest.fixture
def run(tiny_checkpoint, tmp_path):
    """Runs a command with a picture and the tiny checkpoint."""
    Image.new("RGB", (70, 50), "red").save(tmp_path / "given.png")
    given = ["--device", "cpu", "--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")]
    return lambda name, *options: main_of(name)([*given, *options])


@pytest.mark.parametrize("sampling", [(), ("--fast",), ("--speculative_jacobi",)])
def test_generate_does_each_thing_once(run, counts, tmp_path, sampling):
    """config.json was parsed twice, a prompt encoded up to three times and a panel cropped twice."""
    panel = ("--task", "i2i", "--i2i_task", "depth", "--image_path", str(tmp_path / "given.png"))
    prompts = ("--prompt", "a cat", "--prompt", "a dog", "-n", "2", "--width", "32", "--height", "64")
    assert run("generate", *panel, *prompts, *sampling) == 0
    assert counts == {"config.json": 1, "tokenizer": 1, "prompt": 2, "crop": 1, "SamplingConfig": 1}


def test_edit_does_each_thing_once(run, counts, tmp_path):
    """The settings are copied for each turn, whose seeds differ, and for the check of the last seed."""
    turns = ("--instruction", "make it red", "--instruction", "make it blue", "--width", "32", "--height", "64")
    assert run("edit", "--image_path", str(tmp_path / "given.png"), *turns, "--fast") == 0
    assert counts == {"config.json": 1, "tokenizer": 1, "prompt": 2, "crop": 1, "SamplingConfig": 5}


def test_reconstruct_does_each_thing_once(run, counts, tmp_path):
    assert run("reconstruct", str(tmp_path / "given.png"), "--target_size", "32", "--through_model", "--fast") == 0
    assert counts == {"config.json": 1, "tokenizer": 1, "prompt": 1, "crop": 1, "SamplingConfig": 1}


def test_flat_settings_become_a_sampling_config():
    request = GenerationRequest.of("a cat", 32, cfg=2, seed=7, n=2)
    unset = ("temperature", "text_temperature", "text_top_k", "top_k")
    assert request == GenerationRequest(
        ("a cat",), 32, n=2, sampling=SamplingConfig(cfg=2.0, seed=7), unset=unset, guide_again=True
    )
    assert [(job.prompt_index, job.repeat) for job in request.jobs] == [(0, 0), (0, 1)]
    with pytest.raises(TypeError, match="top_q"):
        GenerationRequest.of("a cat", top_q=1)


def test_a_changed_request_is_validated_again():
    with pytest.raises(InputError, match="^n must be a whole number in 1 ... 100000; try 1, got 0"):
        replace(GenerationRequest("a cat"), n=0)


def test_a_prepared_request_crops_pictures_and_checks_the_size(tiny_checkpoint):
    checkpoint = Checkpoint.open(tiny_checkpoint)
    prepared = checkpoint.prepare(GenerationRequest.of("a cat", panel=Image.new("RGB", (90, 40)), **PANEL))
    assert prepared.picture.size == (32, 32) and len(prepared.starts) == 1
    with pytest.raises(InputError, match="^width=1024 height=1024 take .* this model sees 2048"):
        checkpoint.prepare(GenerationRequest("a cat", 1024, 1024))


def test_help_of_every_command_imports_no_torch():
    code = """
import contextlib, io, sys
from lumina_mgpt.cli.main import COMMANDS, main
for command in COMMANDS:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([command, "--help"])
    assert text.getvalue().startswith("usage: "), command
    assert "torch" not in sys.modules, command
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["lumina_mgpt", "lumina_mgpt.cli"])
def test_both_modules_run_commands(module):
    command = [sys.executable, "-m", module, "--version"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0 and done.stdout.startswith("lumina-mgpt "), done.stderr
