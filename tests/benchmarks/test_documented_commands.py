"""The first commands of docs/benchmarks.md run as they are printed."""

import json
import subprocess
import sys

import pytest
from commands import PATIENCE, ROOT, environment
from documents import blocks
from PIL import Image


@pytest.mark.slow
def test_the_first_block_runs(tmp_path):
    block = blocks((ROOT / "docs/benchmarks.md").read_text(encoding="utf-8"), "bash")[0]
    command = f'lumina-mgpt() {{ "{sys.executable}" -m lumina_mgpt "$@"; }}\n'
    done = subprocess.run(
        ["bash", "-e", "-c", command + block],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "geneval_try/00000/samples").iterdir())) == 4
    assert Image.open(tmp_path / "geneval_try/00000/grid.png").size == (192, 192)
    best = Image.open(tmp_path / "best/0_0.png")
    assert best.size == (192, 96) and len(json.loads(best.text["candidates"])) == 4
    text = Image.open(tmp_path / "chosen/0_0.png").text
    assert (text["prompt"], text["original_prompt"]) == ("a rocket on a navy background", "a rocket")
    assert len(list((tmp_path / "chosen").glob("0_0_candidate_*.png"))) == 3
