"""TRAIN.md's example, as it stands: its commands are taken from the text and run, with shorter times."""

import re
import subprocess
import sys

import pytest
from PIL import Image
from training_runs import ROOT, environment, metrics_of, path_with_python

from lumina_mgpt.io import read_rows

EXAMPLE = (ROOT / "TRAIN.md").read_text().split("## Step by step")[0]
SHORT = {"MINUTES": "0.1", "KNOWN": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A copy of the project's tree, by links, in which the commands have been run."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("assets", "configs", "generate_examples", "lumina_mgpt", "scripts"):
        (folder / name).symlink_to(ROOT / name)
    commands = "\n".join(re.findall(r"^```bash\n(.*?)^```", EXAMPLE, re.MULTILINE | re.DOTALL))
    assert commands.count("python ") == 7 and "scripts/train.sh" in commands
    python = environment() | SHORT | {"PATH": path_with_python(folder)}
    done = subprocess.run(["bash", "-euc", commands], cwd=folder, env=python, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "work" / "example"


@pytest.mark.slow
def test_the_commands_make_what_the_text_says(folder):
    records = {part: read_rows(folder / f"tokens/{part}/records.jsonl", "") for part in ("lighthouse", "known")}
    assert {part: len(rows) for part, rows in records.items()} == {"lighthouse": 112, "known": 2}
    assert len(metrics_of(folder / "run")) >= 1
    assert (folder / "run/export/model.safetensors").is_file() and (folder / "run/export/movqgan.safetensors").is_file()
    for n in range(6):
        before, after = (Image.open(folder / name / f"{n}_0.png") for name in ("before", "after"))
        assert before.size == after.size == (96, 96) and before.info["prompt"] == after.info["prompt"]
    assert Image.open(folder / "sheet.png").size == Image.open(ROOT / "assets/finetuned.png").size


def test_other_commands_of_the_text_name_options_that_exist():
    """What is not run (GPUs, many machines) at least says what the programs understand."""
    text = (ROOT / "TRAIN.md").read_text()
    told = {script: set() for script in re.findall(r"scripts/([\w/]+)\.py", text)}
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for command in block.replace("\\\n", " ").replace("train.sh", "finetune.py").split("\n"):
            found = re.search(r"scripts/([\w/]+)\.py", command)
            if found:
                options = command[found.end():]
                told.setdefault(found[1], set()).update(re.findall(r"(?<=\s)--\w+", options))
    for script, options in told.items():
        shown = subprocess.run([sys.executable, f"scripts/{script}.py", "--help"], cwd=ROOT, env=environment(),
                               capture_output=True, text=True, check=True).stdout  # fmt: skip
        assert options <= set(re.findall(r"--\w+", shown)), script
