"""Counts of `bench.py` against the pipeline, and the order of errors of `measure_error.py`."""

import ast
import json
import os
import subprocess
import sys
from statistics import fmean

import pytest
import torch
from commands import ROOT, environment, module_of

from lumina_mgpt import Pipeline, cli, prompt_files
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.request import GenerationRequest


@pytest.fixture
def bench(monkeypatch):
    """Runs the script and returns its exit status."""
    script = module_of("bench")
    monkeypatch.setattr(script, "read_bandwidth", lambda device: 1e10)
    options = ("--threads", str(torch.get_num_threads()))
    return lambda *argv: cli.run(script.bench, script.build_parser(), [*options, *argv])


def test_codes_a_step_equal_those_of_the_pipeline(bench, tiny_checkpoint, capsys):
    options = ("--model_path", str(tiny_checkpoint), "--width", "32", "--height", "64", "-n", "2", "--seed", "3")
    assert bench("--coupling", "plain", "maximal", "--window", "4", "9", *options) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert {"model", "device", "dtype", "quant", "peak_gb", "bandwidth_gb_s"} < set(printed) and printed["images"] == 10
    plain, *rows = printed["rows"]
    assert (plain["coupling"], plain["codes_a_step"], [row["window"] for row in rows]) == ("plain", 1.0, [4, 9])
    pipeline, prompts = Pipeline.from_pretrained(tiny_checkpoint), prompt_files.example_prompts(tiny_checkpoint)
    layout = pipeline.checkpoint.layout(32, 64)
    for row in rows:
        steps = []
        for prompt in prompts:
            request = GenerationRequest.of(
                prompt, 32, 64, n=2, seed=3, batch_size=1, speculation=Speculation("maximal", row["window"])
            )
            steps += [pipeline.forwards - 1 for _ in pipeline.stream(request)]
        assert row["codes_a_step"] == pytest.approx((layout.num_codes - 1) / fmean(steps))
        assert 0 < row["codes_error"] < row["codes_a_step"] / 2
        assert row["ms_a_step"] * (fmean(steps) + 1) == pytest.approx(1000 * row["seconds_an_image"])
    assert lines[-3].startswith("| 9 | ") and f"{rows[1]['codes_a_step']:.2f} ±" in lines[-3]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--threads", "0"], "--threads must be in 1 ... 1024, got 0"),
        (["-n", "0"], "-n must be"),
        (["--plot", "plot.pdf"], "--plot"),
        (["--window", "0"], "--window must be"),
    ],
)
def test_invalid_options_are_refused(bench, tiny_checkpoint, capsys, options, message):
    assert bench("--model_path", str(tiny_checkpoint), *options) == cli.REFUSED
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_rounding_errors_are_in_the_expected_order(monkeypatch, capsys):
    script = module_of("measure_error")
    monkeypatch.setattr("sys.argv", ["measure_error.py", "--prompts", "1"])
    assert script.main() == 0
    rows = {(row["weights"], row["cache"]): row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]}
    exact, cached, head = rows["fp32", "fp32"], rows["fp32", "int8"], rows["fp32, int8 head", "fp32"]
    ints = [rows[f"int4 in groups of {group}", "fp32"] for group in (32, 64, 128)]
    assert exact["error"] == exact["kl"] == 0
    assert 0 < cached["error"] < ints[0]["error"] < ints[1]["error"] < ints[2]["error"] < 0.5
    assert 0 < head["error"] < ints[0]["error"] and head["head_mb"] < exact["head_mb"] / 3.9
    assert cached["cache_mb"] < exact["cache_mb"] / 3 and ints[2]["layers_mb"] < ints[0]["layers_mb"]


def test_number_of_prompts_must_be_positive(monkeypatch, capsys):
    script = module_of("measure_error")
    monkeypatch.setattr("sys.argv", ["measure_error.py", "--prompts", "0"])
    assert script.main() == cli.REFUSED
    assert "--prompts must be at least 1, got 0" in capsys.readouterr().err


def test_a_conversation_is_timed_turn_by_turn(capsys):
    script = module_of("bench_chat")
    sizes = {"width": 64, "inner": 128, "heads": 2, "layers": 1, "turns": 3, "answer": 3, "side": 32, "repeats": 2}
    options = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    threads = ["--threads", str(torch.get_num_threads())]
    assert cli.run(script.bench, script.build_parser(), [*options, *threads]) == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    rows = printed["rows"]
    assert printed["ratio"] == rows[2]["seconds"] / rows[1]["seconds"] and sizes.items() <= printed.items()
    picture = 3 + 4 * 5 + 1
    assert [row["turn"] for row in rows] == [1, 2, 3] and all(row["new"] > picture for row in rows)
    assert [row["before"] for row in rows[1:]] == [rows[0]["new"], rows[0]["new"] + rows[1]["new"]]
    assert min(row["seconds"] for row in rows) > 0
    assert cli.run(script.bench, script.build_parser(), ["--turns", "1", *threads]) == cli.REFUSED
    assert "--turns must be at least 2, got 1" in capsys.readouterr().err


def test_the_demo_is_timed_against_the_import_of_torch(tiny_checkpoint, capsys, monkeypatch):
    """With processes that take known times, the ratio is that of pairs, and memory that above the import."""
    script, runs = module_of("bench_demo"), iter([1, 9, 1.0, 3.0, 2.0, 4.0, 1.0, 1.5])
    lines = []

    def run(options: list[str]):
        lines.append(options)
        seconds = next(runs)
        return script.Run(seconds, 2 * seconds, 100 + 10 * seconds)

    monkeypatch.setattr(script, "run_process", run)
    assert script.main(["start", "--runs", "3", "--model_path", str(tiny_checkpoint)]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert printed["seconds_ratio"] == {"median": 2.0, "least": 1.5, "largest": 3.0}
    assert printed["peak_above_import_mib"] == {"median": 20, "least": 5, "largest": 20}
    assert lines[0] == ["-c", "import torch"] and lines[0::2] == lines[:1] * 4 and "generate" in lines[1]


def test_a_process_of_the_demo_is_measured():
    """In a process without torch, whose memory would count in."""
    large = "x = b'x' * 10 ** 8; sum(range(10 ** 6))"
    code = f"from bench_demo import run_process as run; print([vars(run(['-c', x])) for x in ('pass', {large!r})])"
    modules = os.pathsep.join([str(ROOT / "scripts" / "benchmarks"), str(ROOT)])
    ended = subprocess.run([sys.executable, "-c", code], env=environment(PYTHONPATH=modules), stdout=subprocess.PIPE)
    small, large = ast.literal_eval(ended.stdout.decode())
    assert small["peak_mib"] + 80 < large["peak_mib"] < small["peak_mib"] + 120
    assert 0 < small["processor"] < large["processor"] and small["seconds"] > 0
    with pytest.raises(InputError, match="got 3: Spoiled"):
        module_of("bench_demo").run_process(["-c", "import sys; print('Spoiled', file=sys.stderr); sys.exit(3)"])


def test_images_of_the_demo_are_counted(tiny_checkpoint, capsys):
    script = module_of("bench_demo")
    options = ["-n", "3", "--repeats", "2", "--batch_size", "1", "2", "--coupling", "plain", "maximal", "--window", "4"]
    threads = ["--threads", str(torch.get_num_threads())]
    assert script.main(["images", "--model_path", str(tiny_checkpoint), *options, *threads]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["coupling"], row["batch_size"]) for row in rows] == [
        ("plain", 1), ("maximal", 1), ("plain", 2), ("maximal", 2)
    ]  # fmt: skip
    pipeline = Pipeline.from_pretrained(tiny_checkpoint)
    codes = pipeline.checkpoint.layout().num_codes
    assert [row["forwards"] for row in rows[::2]] == [3 * codes, 2 * codes]
    assert all(row["forwards"] < 3 * codes for row in rows[1::2])
    assert all(0 < row["images_a_second"]["least"] <= row["images_a_second"]["largest"] for row in rows)
    assert all(0 < row["sampling_share"] + row["decoding_share"] < 1 for row in rows)
    assert script.main(["images", "-n", "0"]) == cli.REFUSED and "-n must be at least 1" in capsys.readouterr().err
