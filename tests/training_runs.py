"""Helpers of the training tests: start runs in this or another process, and read their results."""

import json
import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.export import export_checkpoint
from lumina_mgpt.training.options import TrainingConfig

ROOT = Path(__file__).parent.parent
ONE = Processes(0, 1, torch.device("cpu"))


def changed(settings: TrainingConfig, **values) -> TrainingConfig:
    return TrainingConfig.of(**settings.flat() | values)


def weights_of(output_dir) -> dict:
    return load_file(export_checkpoint(output_dir, dtype="fp32") / "model.safetensors")


def metrics_of(output_dir) -> list[dict]:
    return [json.loads(line) for line in (Path(output_dir) / "metrics.jsonl").read_text().splitlines()]


def environment() -> dict:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}


def path_with_python(folder) -> str:
    """A PATH whose `python` is this one."""
    (folder / "bin").mkdir()
    (folder / "bin" / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    (folder / "bin" / "python").chmod(0o755)
    return f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"


def command(settings: TrainingConfig, *options, processes: int = 1) -> list[str]:
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    values, defaults = [], {name: item.default for name, item in TrainingConfig.options().items()}
    for name, value in settings.flat().items():
        if value != defaults[name]:
            values += [f"--{name}"] + ([] if value is True else [str(value)])
    return [*start, "scripts/finetune.py", *values, *options]
