"""The shipped demo checkpoint at work: every command that the README shows of it, and what comes out."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina_mgpt.demo.evaluation import nearest_color
from lumina_mgpt.demo.scenes import SLOT_COLORS

ROOT = Path(__file__).parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
SCRIPTS = ("python generate_examples/", "python scripts/reconstruct.py")


def readme_commands() -> list[str]:
    """The commands of the scripts that make pictures with the demo, without `python`."""
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split("&&")[-1].strip() for line in text.splitlines() if line.startswith("    ")]
    return [line.removeprefix("python ") for line in lines if line.startswith(SCRIPTS) and "Alpha-VLLM" not in line]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command of the README in an empty folder that looks like the project's own; returns what it wrote."""
    for name in ("assets", "generate_examples", "scripts"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)

    def call(command: str) -> Path:
        path, *options = shlex.split(command, comments=True)
        monkeypatch.syspath_prepend(str((ROOT / path).parent))
        spec = importlib.util.spec_from_file_location(f"script_{Path(path).stem}", ROOT / path)
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        assert script.main(options) == 0
        return tmp_path / (options[options.index("--save_path") + 1] if "--save_path" in options else "outputs")

    return call


@pytest.mark.parametrize("command", readme_commands())
def test_the_readmes_commands_run_as_they_stand(run, command):
    folder = run(command)
    pictures = list(folder.glob("*.png"))
    assert pictures and all(Image.open(picture).getextrema() for picture in pictures)


def test_the_readme_shows_every_image_task():
    shown = " ".join(readme_commands())
    scripts = ("generate.py", "generate_single_prompt_with_image.py --task", "edit.py", "reconstruct.py")
    options = ("--task depth", "--i2i_task depth", "--i2i_task predict_segmentation", "--extract", "--instruction")
    assert all(text in shown for text in (*scripts, *options))


@pytest.mark.parametrize("sampling", [(), ("--speculative_jacobi",), ("--speculative_jacobi", "--quant")])
def test_an_edit_does_what_it_says(run, sampling):
    """Two turns, whose backgrounds are told apart with certainty; fast and small ways of sampling too."""
    turns = ("make the background red", "make the background navy")
    words = shlex.join([part for turn in turns for part in ("--instruction", turn)])
    folder = run(f"generate_examples/edit.py --image_path assets/subject.png {words} {' '.join(sampling)}")
    results = [Image.open(folder / f"edit_{turn}_result.png") for turn in (1, 2)]
    assert [nearest_color(result) for result in results] == ["red", "navy"]


def test_a_control_panel_and_a_prompt_are_both_followed(run):
    words = "--image_path assets/depth.png --image_prompt 'a hedgehog on a sky blue background'"
    folder = run(f"generate_examples/generate.py --task i2i --i2i_task depth {words}")
    result = Image.open(folder / "depth_result.png")
    assert nearest_color(result) == "sky blue"
    inside = np.asarray(Image.open(folder / "depth_ref_center_crop.png").convert("L")) > 60
    pixels = np.asarray(result, np.float32)
    ground = np.median(pixels[~inside], axis=0)
    far = np.abs(pixels - ground).sum(-1) > 60
    assert far[inside].mean() > 0.8 and far[~inside].mean() < 0.2, "the silhouette is that of the panel"


def test_a_segmentation_has_the_colours_of_the_training(run):
    words = "--i2i_task predict_segmentation --image_path assets/subject.png"
    pixels = np.asarray(Image.open(run(f"generate_examples/generate.py --task i2i {words}")
                                   / "predict_segmentation_result.png"), np.float32)  # fmt: skip
    distances = np.abs(pixels[..., None, :] - np.array([(0, 0, 0), SLOT_COLORS[0]], np.float32)).sum(-1)
    assert (distances.min(-1) < 120).mean() > 0.9 and 0.1 < (distances.argmin(-1) == 1).mean() < 0.9


@pytest.mark.parametrize(("script", "folder"), [("sample.sh", "t2i"), ("sample_i2i.sh", "i2i")])
def test_sample_scripts_run_as_they_stand(script, folder, tmp_path):
    """From another folder, whose name wants quoting; the model path is the first argument."""
    place = tmp_path / "a folder"
    place.mkdir()
    command = ["bash", str(ROOT / "scripts" / script), str(ROOT / "assets" / "demo"), "--seed", "1"]
    done = subprocess.run(command, cwd=place, capture_output=True, text=True, env=ENVIRONMENT, timeout=600)
    assert done.returncode == 0, done.stderr
    found = {path.name for path in (place / "outputs" / folder).iterdir()}
    expected = {"t2i": ["0_0.png", "4_0.png"], "i2i": ["depth.png", "depth_result.png", "subject_ref_center_crop.png"]}
    assert set(expected[folder]) <= found
