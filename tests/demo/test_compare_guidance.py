"""The comparison of distilled guidance with the original, on a tiny checkpoint, and the script of the demo."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import main_of, module_of

ROOT = Path(__file__).parents[2]


@pytest.fixture
def guided(tiny_checkpoint, tmp_path) -> Path:
    """The tiny checkpoint, which only claims to be guided."""
    folder = tmp_path / "guided"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"guided_scale": 3.0, "base_size": 32}))
    return folder


def figures(path: Path, objects: float, edges: float) -> str:
    rows = {"one emoji": {"all objects": [objects, 0.01], "reconstruction": [27.0, 0.1]}}
    rows |= {"canny: edge F1": {"value": [edges, 0.01], "panel": [0.1, 0.01]}, "cfg": 4.0, "model_path": "x"}
    path.write_text(json.dumps(rows))
    return str(path)


@pytest.mark.parametrize("objects, passed", [(0.97, True), (0.95, False)])
def test_figures_and_speeds_are_compared(objects, passed, guided, tiny_checkpoint, tmp_path, capsys):
    before, after = figures(tmp_path / "a.json", 0.98, 0.7), figures(tmp_path / "b.json", objects, 0.75)
    options = ["--original", str(guided.parent / "original"), "--guided", str(guided), "--images", "2"]
    shutil.copytree(guided, guided.parent / "original")
    config = json.loads((guided / "config.json").read_text()) | {"guided_scale": 1.0}
    (guided.parent / "original" / "config.json").write_text(json.dumps(config))
    assert main_of("compare_guidance")([*options, "--figures", before, after]) == int(not passed)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:4]] == ["one emoji: all objects", "canny: edge F1"]
    assert f"{objects - 0.98:+.3f}" in lines[2] and "+0.050" in lines[3]
    speeds = [line for line in lines if re.match(r"\| (1|32) \| (plain|speculative) \|", line)]
    assert len(speeds) == 4 and all("1.00, 1.00, 1.00" in line for line in speeds if "plain" in line)
    assert json.loads(lines[-1]) == {"guided_scale": 3.0, "figures_passed": passed}
    megabytes = re.search(r"cache of an image: ([\d.]+) MB with guidance, ([\d.]+) MB without", "\n".join(lines))
    assert float(megabytes[1]) == pytest.approx(2 * float(megabytes[2]), abs=0.02)


def test_weights_without_distilled_guidance_are_refused(tiny_checkpoint, tmp_path, capsys):
    options = ["--original", str(tiny_checkpoint), "--guided", str(tiny_checkpoint)]
    assert main_of("compare_guidance")(options) == 2
    assert "has no distilled guidance" in capsys.readouterr().err


def test_figures_of_other_rows_are_refused(guided, tiny_checkpoint, tmp_path, capsys):
    before = figures(tmp_path / "a.json", 0.98, 0.7)
    (tmp_path / "b.json").write_text(json.dumps({"one emoji": {"all objects": [0.9, 0.1]}}))
    options = [
        "--original",
        str(tiny_checkpoint),
        "--guided",
        str(guided),
        "--figures",
        before,
        str(tmp_path / "b.json"),
    ]
    assert main_of("compare_guidance")(options) == 2
    assert "the second file lacks canny: edge F1, value" in capsys.readouterr().err


def test_the_script_of_the_demo_gives_options_that_exist():
    script = (ROOT / "scripts/demo/distill.sh").read_text()
    assert subprocess.run(["bash", "-n", "scripts/demo/distill.sh"], cwd=ROOT).returncode == 0
    lines = script.replace("\\\n", " ").split("\n")
    found = {
        command: next(line for line in lines if command in line) for command in ("distill-guidance", "evaluate.py")
    }
    known = module_of("distill_guidance").build_parser()._option_string_actions
    given = set(re.findall(r"(?<=\s)--\w+", found["distill-guidance"]))
    assert given and given <= set(known)
