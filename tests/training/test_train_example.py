"""The commands of TRAIN.md: those of the example are run, with shorter times; the others name options that exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from training_runs import ROOT, environment, metrics_of, path_with_python

from lumina_mgpt.io import read_rows

TEXT = (ROOT / "TRAIN.md").read_text()
EXAMPLE = TEXT.split("## Step by step")[0]
GUIDANCE = TEXT.split("## Guidance in the weights")[1]
SHORT = {"MINUTES": "0.1", "KNOWN": "2"}
BASH = re.compile(r"^```bash\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with links to the project's files, in which the commands of the example were run."""
    commands = "\n".join(BASH.findall(EXAMPLE))
    assert commands.count("python ") == 7 and "scripts/train.sh" in commands
    return run_shortened(commands, tmp_path_factory.mktemp("project")) / "work" / "example"


def run_shortened(commands: str, folder: Path) -> Path:
    """Runs commands with shorter times in a folder with links to the project's files; returns the folder."""
    for name in ("assets", "configs", "generate_examples", "lumina_mgpt", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    python = environment() | SHORT | {"PATH": path_with_python(folder)}
    installed = folder / "bin" / "lumina-mgpt"
    installed.write_text('#!/bin/sh\nexec python -m lumina_mgpt "$@"\n')
    installed.chmod(0o755)
    done = subprocess.run(["bash", "-euc", commands], cwd=folder, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.slow
def test_example_writes_the_files_that_the_text_names(folder):
    records = {part: read_rows(folder / f"tokens/{part}/records.jsonl") for part in ("lighthouse", "known")}
    assert {part: len(rows) for part, rows in records.items()} == {"lighthouse": 112, "known": 2}
    assert len(metrics_of(folder / "run")) >= 1
    assert (folder / "run/export/model.safetensors").is_file() and (folder / "run/export/movqgan.safetensors").is_file()
    for n in range(6):
        before, after = (Image.open(folder / name / f"{n}_0.png") for name in ("before", "after"))
        assert before.size == after.size == (96, 96) and before.info["prompt"] == after.info["prompt"]
    assert Image.open(folder / "sheet.png").size == Image.open(ROOT / "assets/finetuned.png").size


@pytest.mark.slow
def test_the_example_of_guidance_writes_weights_that_record_it(tmp_path):
    folder = run_shortened(BASH.findall(GUIDANCE)[0], tmp_path) / "work" / "guidance"
    assert len(read_rows(folder / "records.jsonl")) == 2 and len(metrics_of(folder / "run")) >= 1
    assert json.loads((folder / "run/export/config.json").read_text())["guided_scale"] == 4.0
    picture = Image.open(folder / "after/0_0.png")
    assert picture.size == (96, 96) and float(picture.info["cfg"]) == 1.0


def options_of_commands() -> dict[str, set[str]]:
    """Script or command of the package -> the options that TRAIN.md gives it."""
    found: dict[str, set[str]] = {script: set() for script in re.findall(r"(scripts/[\w/]+\.py)", TEXT)}
    lines = "\n".join(BASH.findall(TEXT)).replace("\\\n", " ").replace("scripts/train.sh", "scripts/finetune.py")
    for line in lines.split("\n"):
        if command := re.search(r"scripts/[\w/]+\.py|lumina-mgpt [\w-]+", line):
            options = set(re.findall(r"(?<=\s)--\w+", line[command.end() :]))
            found.setdefault(command[0], set()).update(options)
    return found


def test_commands_name_options_that_exist():
    """Also those that need GPUs or several machines, which no test runs."""
    found = options_of_commands()
    assert {"scripts/finetune.py", "scripts/pre_tokenize.py", "lumina-mgpt export"} <= found.keys()
    for command, options in found.items():
        start = ["-m", *command.replace("lumina-mgpt", "lumina_mgpt").split()] if " " in command else [command]
        shown = subprocess.run(
            [sys.executable, *start, "--help"], cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        ).stdout
        assert options <= set(re.findall(r"--\w+", shown)), command
