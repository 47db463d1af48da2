"""Tensor parallelism over gloo processes: the same codes as one process in float64, and a part of the memory."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE

import numpy as np
import pytest
import torch
from commands import PATIENCE, ROOT, environment, main_of
from parallel_runs import load, results_of
from PIL import Image

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.parallel import require_fit
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.model.writing import save_model

PICTURE = str(ROOT / "assets" / "subject.png")
TWO = {"world": 2, "size": 2}
SMALL = {"width": 32, "height": 32}
REQUESTS = {
    "plain": {"prompts": ["a cat", "a snowman on the snow"], "n": 2, "batch_size": 3, "seed": 3} | SMALL,
    "no guidance": {"prompts": "a cat", "cfg": 1.0, "top_k": 20, "temperature": 0.7} | SMALL,
    "noise": {"prompts": ["a cat", ""], "speculation": {"coupling": "noise", "window": 16}},
    "maximal": {"prompts": ["a cat", "a red apple"], "speculation": {"coupling": "maximal", "window": 8}} | SMALL,
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


@pytest.fixture(scope="module")
def run_job():
    """Runs a job of parallel_runs.py and returns its results."""
    command = [sys.executable, ROOT / "tests" / "parallel_runs.py"]
    with subprocess.Popen(command, stdin=PIPE, stdout=PIPE, text=True, env=environment()) as server:

        def run(job: dict) -> dict:
            print(json.dumps(job), file=server.stdin, flush=True)
            return json.loads(server.stdout.readline())

        yield run
        server.stdin.close()
        assert server.wait(PATIENCE) == 0


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


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["tiny", "int8 cache", pytest.param("demo", marks=SLOW), pytest.param("two models", marks=SLOW)]
)
def test_codes_are_those_of_one_process(jobs, run_job, name):
    """Equal in float64, in all processes."""
    job, done = jobs[name], run_job(jobs[name])
    processes, alone = done["processes"], load(job)
    assert len(processes) == job["world"] and set(done["statuses"]) == {0}, done["printed"]
    for number, request in enumerate(job["requests"]):
        wanted = results_of(alone, request)
        assert wanted and all(process["results"][number] == wanted for process in processes), request


def test_logits_of_a_model_with_biases_and_several_norms(jobs, run_job):
    (request,) = jobs["variant"]["requests"]
    wanted = torch.tensor(results_of(load(jobs["variant"]), request), dtype=torch.float64)
    done = run_job(jobs["variant"])
    first, second = (torch.tensor(process["results"][0], dtype=torch.float64) for process in done["processes"])
    assert torch.equal(first, second)
    assert wanted.shape == (2, 5, 64) and wanted.std() > 0.5
    torch.testing.assert_close(first, wanted, rtol=0, atol=1e-10)


def test_a_process_holds_its_part(tiny_checkpoint, tmp_path, run_job):
    """Weights, except for the embedding, cache, and the peak of memory are half of those of one process."""
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "large")
    config = replace(ModelConfig.from_json(folder / "config.json"), hidden_size=1024, intermediate_size=2816)
    config = replace(config, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4)
    write_random(config, folder)
    job = {"folder": str(folder), "dtype": "float32", "cache": "float32", "length": 2048}
    (alone,) = run_job(job | {"world": 1, "size": 1})["processes"]
    done = run_job(job | TWO)
    assert done["statuses"] == [0, 0], done["printed"]
    embedding = 4 * config.vocab_size * config.hidden_size
    assert alone["weights"] > 180e6 and alone["cache"] > 60e6
    for process in done["processes"]:
        assert process["cache"] == alone["cache"] / 2
        assert process["weights"] < (alone["weights"] + embedding) / 2 + 1e5
        if sys.platform == "linux":
            assert process["peak"] < 0.6 * alone["peak"], (process, alone)


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


@pytest.mark.parametrize("name", [pytest.param("generate", marks=SLOW), "edit"])
def test_commands_write_and_report_once(name, tiny_checkpoint, tmp_path, run_job):
    words = {
        "generate": ["--prompt", "a cat", "--prompt", "an owl", "--preview", "--width", "32", "--fast"],
        "edit": ["--image_path", PICTURE, "--instruction", "make it red", "--instruction", "add snow"],
    }[name]
    options = [*words, "--device", "cpu", "--model_path", str(tiny_checkpoint), "--height", "64", "--save_path"]
    assert main_of(name)([*options, str(tmp_path / "one")]) == 0
    command = [name, *options, str(tmp_path / "two"), "--tensor_parallel", "2"]
    done = run_job({"world": 2, "command": command})
    printed = done["printed"]
    assert done["statuses"] == [0, 0], printed
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) >= 2 and files == sorted(file.name for file in (tmp_path / "two").iterdir())
    assert printed.count(f"{files[0]}: ") == 1, printed
    if name == "edit":  # --fast may choose a coupling for another image of the same distribution
        assert all(np.array_equal(pixels(tmp_path / "one" / file), pixels(tmp_path / "two" / file)) for file in files)
    with Image.open(tmp_path / "two" / files[0]) as image:
        assert image.text["tensor_parallel"] == "2"


def test_a_process_that_ends_does_not_leave_the_others_waiting(tiny_checkpoint, run_job):
    done = run_job(TWO | {"folder": str(tiny_checkpoint), "dies": 1, "requests": [REQUESTS["plain"]]})
    assert done["statuses"] == [2, 9], done["printed"]
    last = done["printed"].splitlines()[-1]
    assert last == "error: another process of this run ended or does not answer; its own message says why"
    assert "Traceback" not in done["printed"]


def test_sizes_that_do_not_divide():
    config = ModelConfig(100, 96, 120, 2, 12, 12, image_code_offset=64, num_image_codes=36, max_position_embeddings=64)
    with pytest.raises(InputError) as caught:
        require_fit(config, 5)
    assert caught.value.parameter == "tensor_parallel"
    assert all(part in str(caught.value) for part in ("12 heads", "120 units", "36 image codes", "5", "2, 3, 4, 6, 12"))
    with pytest.raises(InputError, match="cannot be split"):
        require_fit(replace(config, num_key_value_heads=1), 2)
    require_fit(replace(config, num_key_value_heads=1), 1)


def test_a_run_without_torchrun(tiny_checkpoint, tmp_path, capsys):
    options = ["--prompt", "a cat", "--device", "cpu", "--model_path", str(tiny_checkpoint)]
    assert main_of("generate")([*options, "--save_path", str(tmp_path), "--tensor_parallel", "2"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --tensor_parallel 2 must divide the number of processes, which is 1")
    assert "torchrun --nproc_per_node 2 -m lumina_mgpt" in error and len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ("generate --tensor_parallel 0", ("--tensor_parallel must be at least 1", "0")),
        ("generate --tensor_parallel 3", ("--tensor_parallel 3 must divide", "4", "--nproc_per_node 3")),
        ("generate --tensor_parallel 4", ("--tensor_parallel must divide 4 heads, 2 key and value heads", "fits 2")),
        ("generate --tensor_parallel 2 --quant --quant_group 32", ("--tensor_parallel 2", "int4")),
        ("generate --tensor_parallel 2 --compile", ("--tensor_parallel 2", "--compile")),
        (f"edit --image_path {PICTURE} --instruction red --tensor_parallel 2", ("--tensor_parallel must be 4", "2")),
    ],
)
def test_wrong_command_lines(words, parts, tiny_checkpoint, tmp_path, run_job):
    """Each is an error of one line in every process, before weights are read and a process waits for another."""
    options = ["--device", "cpu", "--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")]
    done = run_job({"world": 4, "command": [*words.split(), *options]})
    assert done["statuses"] == [2] * 4, done["printed"]
    errors = done["printed"].splitlines()
    assert len(errors) == 4 and len(set(errors)) == 1, errors
    assert errors[0].startswith("error: ") and all(part in errors[0] for part in parts), errors
    assert not any((tmp_path / "out").glob("*.png"))
