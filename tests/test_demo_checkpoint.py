"""The shipped demo checkpoint at work: every command that the README shows of it."""

import importlib.util
import os
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

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


@pytest.mark.parametrize("sampling", ["", "--speculative_jacobi", "--speculative_jacobi --quant --cache_dtype int8"])
def test_image_tasks_go_with_every_way_of_sampling(run, sampling):
    turns = "--instruction 'make the background red' --instruction 'make the background navy'"
    folder = run(f"generate_examples/edit.py --image_path assets/subject.png {turns} {sampling}")
    strip, results = Image.open(folder / "edit_strip.png"), [f"edit_{turn}_result.png" for turn in (1, 2)]
    assert strip.size == (3 * 96, 96)
    for turn, name in enumerate(results, start=1):
        assert strip.crop((96 * turn, 0, 96 * turn + 96, 96)).tobytes() == Image.open(folder / name).tobytes()


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
