"""A wheel of this checkout, installed in an empty environment and used from another folder."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import PATIENCE, ROOT
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("wheel")]  # one process, one environment
PARTS = ("lumina_mgpt", "configs", "assets", "setup.py", "pyproject.toml", "requirements.txt", "README.md", "LICENSE")
PROMPT = "a hedgehog on a sky blue background"
SKY_BLUE = (135, 206, 235)


def run(*command: object, cwd: Path) -> str:
    """Standard output of a command that sees neither this checkout nor this environment's packages."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env=variables, capture_output=True, text=True, timeout=3 * PATIENCE
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def copied(folder: Path) -> Path:
    """A copy of what a wheel is built from: building leaves files in the source tree."""
    ignore = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in PARTS:
        source, target = ROOT / name, folder / "source" / name
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target, ignore=ignore) if source.is_dir() else shutil.copy(source, target)
    return folder / "source"


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """A folder that is removed at the end: torch takes a gigabyte."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


@pytest.fixture(scope="module")
def wheel(folder) -> Path:
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    reached = subprocess.run(
        [*pip, "download", "--no-deps", "--no-cache-dir", "--dest", folder, "setuptools>=77"],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    if reached.returncode:
        pytest.skip("pip reaches no package index: " + reached.stderr.strip().splitlines()[-1])
    run(*pip, "wheel", "--no-deps", "--wheel-dir", folder / "dist", copied(folder), cwd=folder)
    (built,) = (folder / "dist").iterdir()
    return built


@pytest.fixture(scope="module")
def programs(folder, wheel) -> Path:
    """The `bin` of an environment with the pins of requirements.txt and the wheel."""
    pins = [line for line in (ROOT / "requirements.txt").read_text().splitlines() if not line.startswith("-")]
    (folder / "pins.txt").write_text("\n".join(pins))
    run(sys.executable, "-m", "venv", folder / "venv", cwd=folder)
    found = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    pip = [found / "python", "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "install", "--no-compile", "-r", folder / "pins.txt", cwd=folder)
    run(*pip, "install", wheel, cwd=folder)
    return found


def test_the_wheel_holds_every_file_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if name.startswith("lumina_mgpt/")}
    sources = {path for end in ("py", "cpp", "h") for path in (ROOT / "lumina_mgpt").rglob(f"*.{end}")}
    expected = {path.relative_to(ROOT).as_posix() for path in sources} | {"lumina_mgpt/py.typed"}
    files = [path for name in ("configs", "assets/demo") for path in (ROOT / name).rglob("*") if path.is_file()]
    expected |= {f"lumina_mgpt/_files/{path.relative_to(ROOT).as_posix()}" for path in files}
    assert held == expected and any(name.endswith(".cpp") for name in held)


def test_the_installed_command_makes_a_picture(programs, tmp_path):
    """From the demo checkpoint and into `outputs`, without options but the prompt."""
    assert run(programs / "lumina-mgpt", "--version", cwd=tmp_path).startswith("lumina-mgpt ")
    run(programs / "lumina-mgpt", "generate", "--prompt", PROMPT, cwd=tmp_path)
    (path,) = (tmp_path / "outputs").rglob("*.png")
    image = Image.open(path)
    assert image.size == (96, 96) and image.info["prompt"] == PROMPT
    corner = image.convert("RGB").getpixel((2, 2))
    assert all(abs(got - wanted) < 25 for got, wanted in zip(corner, SKY_BLUE, strict=True)), corner


def test_the_installed_package_finds_its_configurations(programs, tmp_path):
    program = "from lumina_mgpt import resources; print(resources.configs())"
    configs = Path(run(programs / "python", "-c", program, cwd=tmp_path).strip())
    assert configs.is_relative_to(programs.parent.resolve())
    assert {path.name for path in (ROOT / "configs/model").iterdir()} == {p.name for p in (configs / "model").iterdir()}
    assert "--model_size" in run(programs / "python", "-m", "lumina_mgpt", "finetune", "--help", cwd=tmp_path)
