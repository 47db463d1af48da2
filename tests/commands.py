"""Runs the project's commands, in this process or in another one, as a user does."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from lumina_mgpt.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent
PATIENCE = 300  # seconds for a process that takes a few on an idle machine; only a hang takes longer
_NAMES = {module: command for command, (module, _) in COMMANDS.items()}


def module_of(name: str) -> ModuleType:
    """The module of a command such as `generate`, or of a script in scripts/demo or scripts/benchmarks."""
    return importlib.import_module(f"lumina_mgpt.cli.{name}" if name in _NAMES else name)


def main_of(name: str) -> Callable[[list[str]], int]:
    """`main` of a command or script: takes its options, returns the exit status."""
    return module_of(name).main


def line_of(name: str, *options: object) -> list[str]:
    """The command line of a command, for this interpreter."""
    return [sys.executable, "-m", "lumina_mgpt", _NAMES[name], *map(str, options)]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with one thread, and this checkout and interpreter first on their paths."""
    modules = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": modules, "PATH": programs} | variables


def options_of(**values: object) -> list[str]:
    """Options of a command line: `options_of(lr=0.1, resume="auto")` is `--lr 0.1 --resume auto`."""
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def run_process(name: str, *options: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command to its end; output is text."""
    return subprocess.run(
        line_of(name, *options),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        errors="replace",
        timeout=PATIENCE,
    )


def refused(run: subprocess.CompletedProcess, *parts: str) -> None:
    """Asserts exit status 2 and a last line on stderr that is the only error and holds all `parts`."""
    assert run.returncode == 2, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: "), run.stderr
    for part in parts:
        assert part in last, run.stderr
