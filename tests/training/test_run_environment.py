"""Environments and settings that a training refuses: a one-line error and exit status 2."""

import signal

import pytest
from commands import main_of, refused, run_process

from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.trainer import Trainer

finetune = main_of("finetune")
NUMBERS = [item for item in TrainingConfig.options().values() if item.type in (int, float)]


@pytest.fixture
def line(tokens, tiny_checkpoint, tmp_path) -> list[str]:
    return [
        "--data_config",
        str(tokens),
        "--output_dir",
        str(tmp_path / "run"),
        "--init_from",
        str(tiny_checkpoint),
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--batch_size",
        "4",
        "--max_steps",
        "1",
    ]


@pytest.mark.parametrize(
    "variables, parts",
    [
        ({"WORLD_SIZE": "abc"}, ["WORLD_SIZE", "'abc'"]),
        ({"WORLD_SIZE": "2", "RANK": "2"}, ["RANK must be below WORLD_SIZE", "'2'"]),
        ({"WORLD_SIZE": "4"}, ["RANK must be set with WORLD_SIZE", "WORLD_SIZE='4'", "unset it"]),
        (
            {"WORLD_SIZE": "4", "RANK": "0"},
            ["WORLD_SIZE is 4", "LOCAL_RANK, MASTER_ADDR, MASTER_PORT", "unset WORLD_SIZE"],
        ),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "http"},
            ["MASTER_PORT", "'http'"],
        ),
        ({"WORLD_SIZE": "9" * 5000}, ["WORLD_SIZE"]),
    ],
)
def test_a_launchers_variables_are_checked(line, capsys, monkeypatch, variables, parts):
    """At b0c7d2f: `ValueError: invalid literal for int()`, and torch's traceback about MASTER_ADDR."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert finetune(line) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and all(part in error for part in parts), error


def test_processes_that_cannot_connect_report_it(line):
    """In a new process, so that the process group ends with it."""
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        run = run_process(
            "finetune", *line, WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port
        )
    refused(run, f"MASTER_PORT {port}", "cannot meet")


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_closed_terminal_loses_no_step(line, tmp_path, monkeypatch, capsys):
    """SIGHUP, which comes twice then, ended the training without a checkpoint."""
    step = Trainer._step

    def interrupted(self, began) -> None:
        for _ in range(2 * (self.at == 1)):
            signal.raise_signal(signal.SIGHUP)
        step(self, began)

    monkeypatch.setattr(Trainer, "_step", interrupted)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert finetune([*line, "--max_steps", "9", "--save_iteration_interval", "0"]) == 128 + signal.SIGHUP
    finally:
        signal.signal(signal.SIGHUP, before)
    assert "stopped after a checkpoint" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


@pytest.mark.parametrize("field", NUMBERS, ids=lambda field: field.name)
def test_numbers_out_of_range_are_refused(line, capsys, field):
    """At b0c7d2f some ended in tracebacks: a seed of 23 digits, batch sizes and thread counts that no library takes."""
    values = ["-1", "1" * 23, str(2**63), str(2**31), "9" * 4000] if field.type is int else ["nan", "inf", "-inf", "-1"]
    if field.name == "seed":
        values.remove(str(2**31))
    for value in values:
        options = [*line, f"--{field.name}", value]
        if field.name in ("epochs", "max_minutes"):
            options[options.index("--max_steps") + 1] = "0"
        assert finetune(options) == 2, value
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("error: ") and f"--{field.name}" in error, error


@pytest.mark.parametrize("seed, status", [("1" * 23, 2), ("-5", 2), (str(2**63), 2), (str(2**63 - 1), 0)])
def test_seeds_of_a_training_from_scratch(line, tiny_checkpoint, capsys, seed, status):
    """At b0c7d2f: `ValueError: Overflow when unpacking long long` with a traceback."""
    at = line.index("--init_from")
    scratch = ["--model_config", str(tiny_checkpoint / "config.json"), "--tokenizer_path", str(tiny_checkpoint)]
    assert (
        finetune(
            [
                *line[:at],
                *scratch,
                *line[at + 2 :],
                "--seed",
                seed,
                "--sample_every",
                "1",
                "--movqgan_path",
                str(tiny_checkpoint / "movqgan_270M.ckpt"),
            ]
        )
        == status
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert not status or ("--seed" in error and str(2**63 - 1) in error), error
