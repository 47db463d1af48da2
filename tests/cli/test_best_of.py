"""`lumina-mgpt generate --best_of`: files, PNG text, functions in the working folder, and refused options."""

import json

import numpy as np
import pytest
from command_checks import names, refused
from commands import main_of, run_process
from PIL import Image

from lumina_mgpt import Pipeline

SCORES = """
import numpy
def darkness(images, prompts):
    assert len(images) == len(prompts) and set(prompts) == {"a cat"}
    return [-numpy.asarray(image).mean() for image in images]
def few(images, prompts):
    return [1.0]
"""


@pytest.fixture
def options(tiny_checkpoint, tmp_path):
    return ["--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out"), "--prompt", "a cat",
            "--device", "cpu", "--width", "32", "--height", "32"]  # fmt: skip


@pytest.fixture
def generate(options):
    return lambda *more: main_of("generate")([*options, *more])


def mean(path) -> float:
    with Image.open(path) as image:
        return float(np.asarray(image).mean())


def test_a_function_of_the_working_folder_chooses(options, tmp_path):
    """In a process of its own: the working folder is not on the path of modules otherwise."""
    (tmp_path / "scores_here.py").write_text(SCORES)
    more = ("--best_of", "3", "--scorer", "scores_here:darkness", "--keep_candidates", "-n", "2")
    run = run_process("generate", *options, *more, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    out = tmp_path / "out"
    candidates = [[f"0_{r}_candidate_{k}.png" for k in range(3 * r, 3 * r + 3)] for r in range(2)]
    assert names(out) == sorted(["0_0.png", "0_1.png", *candidates[0], *candidates[1]])
    for r in range(2):
        means = [mean(out / name) for name in candidates[r]]
        best = int(np.argmin(means))
        text = Image.open(out / f"0_{r}.png").text
        assert mean(out / f"0_{r}.png") == means[best] and text["repeat"] == str(3 * r + best)
        assert json.loads(text["candidates"]) == pytest.approx({str(3 * r + k): -means[k] for k in range(3)})
        assert float(text["score"]) == pytest.approx(-means[best])
        assert (text["best_of"], text["scorer"], text["seed"]) == ("3", "scores_here:darkness", "0")
        assert Image.open(out / candidates[r][0]).text["repeat"] == str(3 * r)


def test_the_best_is_an_image_of_a_larger_run(generate, tiny_checkpoint, tmp_path, capsys):
    """`own` draws N times as many codes; the chosen repeat gives the same image without --best_of."""
    assert generate("--best_of", "4", "--seed", "6") == 0
    image = Image.open(tmp_path / "out/0_0.png")
    scores = {int(k): v for k, v in json.loads(image.text["candidates"]).items()}
    repeat = int(image.text["repeat"])
    assert image.text["scorer"] == "own, bayes" and scores[repeat] == max(scores.values()) and len(scores) == 4
    results = Pipeline.from_pretrained(tiny_checkpoint, "cpu").generate("a cat", 32, 32, n=4, seed=6)
    assert np.array_equal(np.asarray(image), np.asarray(results[repeat].image))
    assert "64/64 codes" in capsys.readouterr().err and names(tmp_path / "out") == ["0_0.png"]


def test_reading_keeps_the_head_for_text(generate, tmp_path):
    assert generate("--best_of", "2", "--scorer", "reading") == 0
    assert Image.open(tmp_path / "out/0_0.png").text["scorer"] == "reading"


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (("--scorer", "own"), "--scorer own has no effect without --best_of"),
        (("--keep_candidates",), "--keep_candidates has no effect without --best_of"),
        (("--best_of", "0"), "--best_of must be a whole number in 1 ... 1000, got 0"),
        (("--best_of", "2", "--preview"), "--preview does not show candidates"),
        (("--best_of", "2", "--scorer", "clip"), "--scorer must be own"),
        (("--best_of", "2", "--scorer", "math:sqrt"), "math:sqrt raised TypeError"),
        (("--best_of", "2", "--scorer", "builtins:zip"), "must return 2 finite numbers"),
    ],
)
def test_refused_options(generate, capsys, monkeypatch, more, part):
    """All before any weights are loaded."""
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    refused(capsys, generate(*more), part)


def test_kept_candidates_are_not_overwritten(generate, capsys, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/0_0_candidate_1.png").write_bytes(b"mine")
    refused(capsys, generate("--best_of", "2", "--keep_candidates"), "already has 0_0_candidate_1.png")
    assert (tmp_path / "out/0_0_candidate_1.png").read_bytes() == b"mine"
