"""Tensor parallelism over gloo processes: the same codes as one process in float64, and a part of the memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import PATIENCE, ROOT, environment, line_of, refused, run_process
from parallel_runs import load, measured, results_of
from PIL import Image

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.parallel import require_fit
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.model.writing import save_model

PICTURE = str(ROOT / "assets" / "subject.png")
TWO = {"world": 2, "size": 2}
REQUESTS = {
    "plain": {"prompts": ["a cat", "a snowman on the snow"], "n": 2, "batch_size": 3, "seed": 3},
    "no guidance": {"prompts": "a cat", "cfg": 1.0, "top_k": 20, "temperature": 0.7},
    "noise": {"prompts": ["a cat", ""], "speculation": {"coupling": "noise", "window": 16}, "n": 2},
    "maximal": {"prompts": ["a cat", "a red apple"], "speculation": {"coupling": "maximal", "window": 8}},
    "panel": {"prompts": ["a cat", "a hedgehog"], "panel": PICTURE, "task": "depth", "width": 32, "height": 64},
    "panel, noise": {
        "prompts": "a cat",
        "panel": PICTURE,
        "task": "edit",
        "width": 32,
        "height": 64,
        "speculation": {"coupling": "noise", "window": 8},
    },
}


def run_jobs(*jobs: dict) -> tuple[list[dict], str]:
    """Runs jobs of parallel_runs.py; returns their results, and what all processes printed."""
    lines = "".join(json.dumps(job) + "\n" for job in jobs)
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "parallel_runs.py"],
        input=lines,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def variant(tiny_checkpoint, tmp_path_factory) -> Path:
    """All that the tiny checkpoint lacks: biases, a tied head, norms at the ends, four rows of norms for heads."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("variant") / "variant")
    changes = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "swin_norm": True}
    config = replace(ModelConfig.from_json(folder / "config.json"), **changes)
    config = replace(config, num_attention_heads=8, num_key_value_heads=4, model_parallel_size=4)
    write_random(config, folder)
    return folder


@torch.no_grad()
def write_random(config: ModelConfig, folder: Path) -> None:
    model = Transformer(config)
    for number, parameter in enumerate(model.parameters()):
        parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(number))
    save_model(model, folder)


@pytest.fixture(scope="module")
def jobs(tiny_checkpoint, variant) -> dict[str, dict]:
    tiny, demo = str(tiny_checkpoint), str(ROOT / "assets" / "demo")
    ids = [[5, 9, 400, 520, 530], [7, 7, 515, 540, 575]]
    one = {"prompts": "a hedgehog", "speculation": {"coupling": "noise", "window": 32}}
    return {
        "tiny": TWO | {"folder": tiny, "requests": list(REQUESTS.values())},
        "int8 cache": TWO | {"folder": tiny, "cache": "int8", "requests": [REQUESTS["plain"]]},
        "variant": TWO | {"folder": str(variant), "requests": [{"logits": ids}]},
        "demo": TWO | {"folder": demo, "requests": [one]},
        "two models": {"world": 4, "size": 2, "folder": tiny, "requests": [REQUESTS["no guidance"]]},
    }


@pytest.fixture(scope="module")
def results(jobs) -> dict[str, dict]:
    done, printed = run_jobs(*jobs.values())
    assert all(set(result["statuses"]) == {0} for result in done), printed
    return dict(zip(jobs, done, strict=True))


@pytest.mark.parametrize("name", ["tiny", "int8 cache", "demo", "two models"])
def test_codes_are_those_of_one_process(jobs, results, name):
    """Equal in float64, in all processes."""
    job, processes = jobs[name], results[name]["processes"]
    alone = load(job)
    assert len(processes) == job["world"]
    for number, request in enumerate(job["requests"]):
        wanted = results_of(alone, request)
        assert wanted and all(process["results"][number] == wanted for process in processes), request


def test_logits_of_a_model_with_biases_and_several_norms(jobs, results):
    (request,) = jobs["variant"]["requests"]
    wanted = torch.tensor(results_of(load(jobs["variant"]), request), dtype=torch.float64)
    first, second = (
        torch.tensor(process["results"][0], dtype=torch.float64) for process in results["variant"]["processes"]
    )
    assert torch.equal(first, second)
    assert wanted.shape == (2, 5, 64) and wanted.std() > 0.5
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-10)


def test_a_process_holds_its_part(tiny_checkpoint, tmp_path):
    """Weights and cache of a process are half, but for the embedding; so is the peak of memory while loading."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "large")
    config = replace(ModelConfig.from_json(folder / "config.json"), hidden_size=1024, intermediate_size=2816)
    config = replace(config, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    write_random(config, folder)
    job = TWO | {"folder": str(folder), "dtype": "float32", "cache": "float32", "length": 2048}
    pipeline, alone = measured(job)
    assert alone["weights"] > 180e6 and alone["cache"] > 30e6
    embedding = pipeline.model.embed_tokens.weight.nbytes
    del pipeline
    ((done,), printed) = run_jobs(job)
    assert done["statuses"] == [0, 0], printed
    for process in done["processes"]:
        print(alone, process)
        assert process["cache"] == alone["cache"] / 2
        assert process["weights"] < (alone["weights"] + embedding) / 2 + 1e5
        if sys.platform == "linux":
            assert process["peak"] < 0.5 * (alone["weights"] + alone["cache"]) + 40e6


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", ["generate", "edit"])
def test_commands_write_and_report_once(name, tiny_checkpoint, tmp_path):
    words = {
        "generate": ["--prompt", "a cat", "--prompt", "an owl", "--preview", "--width", "32", "--fast"],
        "edit": ["--image_path", PICTURE, "--instruction", "make it red", "--instruction", "add snow"],
    }[name]
    options = [*words, "--device", "cpu", "--model_path", str(tiny_checkpoint), "--height", "64", "--save_path"]
    alone = subprocess.run(line_of(name, *options, tmp_path / "one"), env=environment(), capture_output=True, text=True)
    assert alone.returncode == 0, alone.stderr
    command = [name, *options, str(tmp_path / "two"), "--tensor_parallel", "2"]
    (done,), printed = run_jobs({"world": 2, "command": command})
    assert done["statuses"] == [0, 0], printed
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) >= 2 and files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert printed.count(f"{files[0]}: ") == 1, printed
    if name == "edit":  # --fast may choose a coupling for another image of the same distribution
        assert all(np.array_equal(pixels(tmp_path / "one" / file), pixels(tmp_path / "two" / file)) for file in files)
    with Image.open(tmp_path / "two" / files[0]) as image:
        assert image.text["tensor_parallel"] == "2"


def test_a_process_that_ends_does_not_leave_the_others_waiting(tiny_checkpoint):
    (done,), printed = run_jobs(TWO | {"folder": str(tiny_checkpoint), "dies": 1, "requests": [REQUESTS["plain"]]})
    assert done["statuses"] == [2, 9], printed
    errors = [line for line in printed.splitlines() if "error" in line]
    assert errors == [
        "error: another process of this run ended or does not answer; its own message says why"
    ], printed
    assert "Traceback" not in printed


def test_sizes_that_do_not_divide():
    config = ModelConfig(96, 96, 120, 2, 12, 12, image_code_offset=64, num_image_codes=36, max_position_embeddings=64)
    with pytest.raises(InputError) as caught:
        require_fit(config, 5)
    assert caught.value.parameter == "tensor_parallel"
    assert all(part in str(caught.value) for part in ("12 heads", "120 units", "36 image codes", "5", "2, 3, 4, 6, 12"))
    with pytest.raises(InputError, match="cannot be split"):
        require_fit(replace(config, num_key_value_heads=1), 2)
    require_fit(replace(config, num_key_value_heads=1), 1)


def test_wrong_command_lines(tiny_checkpoint, tmp_path):
    """Each is one line, before weights are read and before a process waits for another."""
    options = ["--prompt", "a cat", "--device", "cpu", "--model_path", tiny_checkpoint, "--save_path", tmp_path / "out"]
    run = run_process("generate", *options, "--tensor_parallel", 2)
    refused(run, "--tensor_parallel 2", "torchrun --nproc_per_node 2 -m lumina_mgpt")
    cases = {
        ("--tensor_parallel", "0"): ("--tensor_parallel", "at least 1"),
        ("--tensor_parallel", "4"): ("--tensor_parallel", "4 heads, 2 key and value heads", "fits 2"),
        ("--tensor_parallel", "2", "--quant", "--quant_group", "32"): ("--tensor_parallel 2", "int4"),
        ("--tensor_parallel", "2", "--compile"): ("--tensor_parallel 2", "--compile"),
    }
    jobs = [{"world": 4, "command": ["generate", *map(str, options), *case]} for case in cases]
    for job, parts in zip(jobs, cases.values(), strict=True):
        (done,), printed = run_jobs(job)
        assert set(done["statuses"]) == {2}, printed
        errors = [line for line in printed.splitlines() if line.startswith("error: ")]
        assert len(errors) == 4 and all(part in errors[0] for part in parts), printed
        assert "Traceback" not in printed
    assert not any((tmp_path / "out").glob("*.png"))


def test_edit_needs_one_model(tiny_checkpoint, tmp_path):
    words = ["edit", "--image_path", PICTURE, "--instruction", "red", "--save_path", str(tmp_path / "out")]
    (done,), printed = run_jobs({"world": 4, "command": [*words, "--tensor_parallel", "2"]})
    assert set(done["statuses"]) == {2} and "--tensor_parallel must be 4" in printed, printed
