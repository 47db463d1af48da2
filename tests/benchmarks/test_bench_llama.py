"""`bench_llama.py` without llama.cpp: what it refuses, the shapes of its model, and its ratios."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from commands import module_of

from lumina_mgpt import cli
from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Transformer

SMALL = ("--width", "128", "--inner", "256", "--heads", "2", "--layers", "1", "--cached", "9", "--repeats", "3")


@pytest.fixture
def script():
    return module_of("bench_llama")


@pytest.fixture
def bench(script, tmp_path):
    """Runs the script and returns its exit status."""
    options = ("--work", str(tmp_path), "--threads", str(torch.get_num_threads()))
    return lambda *argv: script.main([*options, *argv])


@pytest.mark.parametrize(("missing", "package"), [("llama_cpp", "llama-cpp-python"), ("gguf", "gguf")])
def test_a_missing_package_is_one_line(bench, monkeypatch, capsys, missing, package):
    for name in ("llama_cpp", "gguf"):
        monkeypatch.setitem(sys.modules, name, None if name == missing else SimpleNamespace())
    assert bench() == cli.REFUSED
    (line,) = capsys.readouterr().err.splitlines()
    assert f"this comparison needs the {package} package" in line and line.endswith(f"pip install {package}")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokens", "1", "0"], "--tokens must be in 1 ... 512, got 0; try 1 2 32"),
        (["--repeats", "0"], "--repeats must be in 1 ... 65536, got 0; try 5"),
        (["--threads", "0"], "--threads must be in 1 ... 1024, got 0"),
    ],
)
def test_invalid_options_are_refused(bench, capsys, options, message):
    assert bench(*options) == cli.REFUSED
    assert message in capsys.readouterr().err


def test_the_model_of_llama_has_the_shapes_of_ours(script):
    config = replace(ModelConfig.from_yaml(script.SEVEN_B), num_hidden_layers=2)
    with torch.device("meta"):
        model = Transformer(config)
    heads = ("q_norm.", "k_norm.")
    ours = [tuple(one.shape) for name, one in model.named_parameters() if not any(head in name for head in heads)]
    assert sorted(shape for _, shape in script.tensor_shapes(config)) == sorted(ours)


def test_models_are_written_once_for_each_shape(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "write_gguf", lambda gguf, config, file: file.write_text(str(config.hidden_size)))
    made = []

    class Library:
        def quantize(self, source, target, name):
            made.append(name)
            target.write_text(source.read_text())

    config = ModelConfig.from_yaml(script.SEVEN_B)
    others = [config, config, replace(config, num_attention_heads=16, num_key_value_heads=16)]
    files = [script.write_models(Library(), None, each, tmp_path, ["q4_0", "q4_k_m"]) for each in others]
    assert files[0] == files[1] != files[2] and made == ["q4_0", "q4_k_m"] * 2
    assert all(path.read_text() == "4096" for found in files for path in found.values())


def test_it_times_both_sides_and_prints_ratios(bench, script, monkeypatch, capsys):
    """llama.cpp is planted: its steps take twice and three times as long as ours, whatever these take."""
    fake = SimpleNamespace(__version__="1.2", llama_log_callback=lambda f: f)
    monkeypatch.setattr(script, "packages", lambda: (fake, None))
    theirs = {"q4_0": 2.0, "q4_k_m": 3.0}

    class Library:
        build = "CPU : AVX512 = 1"

        def __init__(self, llama):
            assert llama is fake

        def steps(self, file, args):
            return {count: theirs[file.name] * count for count in args.tokens}

    files = {name: SimpleNamespace(name=name) for name in theirs}
    monkeypatch.setattr(script, "Library", Library)
    monkeypatch.setattr(script, "write_models", lambda *args: files)
    counts = {}

    def seconds(step):
        if isinstance(step, float):
            return step
        step()  # a step of ours runs
        counts[step.args[0]] = counts.get(step.args[0], 0) + 1
        return step.args[0] * (0.5 if counts[step.args[0]] == 1 else 1.0)

    monkeypatch.setattr(script, "seconds", seconds)
    assert bench(*SMALL, "--tokens", "1", "5") == 0
    lines = capsys.readouterr().out.splitlines()
    printed = json.loads(lines[-1])
    assert printed["build"] == "CPU : AVX512 = 1" and printed["llama_cpp_python"] == "1.2"
    found = [(row["tokens"], row["format"], row["ratio"], row["least"], row["most"]) for row in printed["rows"]]
    assert found == [
        (count, name, ratio, ratio, 2 * ratio) for count in (1, 5) for name, ratio in (("q4_0", 2), ("q4_k_m", 3))
    ]
    assert lines[-2] == "| 5 | q4_k_m | 15000.0 | 5000.0 | 3.00 | 3.00 | 6.00 |" and counts == {1: 3, 5: 3}
