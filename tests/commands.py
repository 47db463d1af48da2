"""Runs the project's commands, in this process or in another one, as a user does."""

import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("generate_examples", "scripts")
PATIENCE = 300  # seconds for a process that takes a few on an idle machine; only a hang takes longer


def main_of(name: str) -> Callable[[list[str]], int]:
    """`main` of a command such as `generate` or `finetune`: takes its options, returns the exit status."""
    paths = [str(ROOT / folder) for folder in FOLDERS]
    sys.path[:0] = paths
    try:
        return importlib.import_module(name).main
    finally:
        for path in paths:
            sys.path.remove(path)


def line_of(name: str, *options: object) -> list[str]:
    """The command line of a command, for this interpreter."""
    (path,) = (path for folder in FOLDERS if (path := ROOT / folder / f"{name}.py").exists())
    return [sys.executable, str(path), *map(str, options)]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment with one thread and this checkout first on the path."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path} | variables


def run_process(name: str, *options: object, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command to its end; output is text."""
    return subprocess.run(line_of(name, *options), cwd=cwd, env=environment(**variables), capture_output=True,
                          text=True, errors="replace", timeout=PATIENCE)  # fmt: skip


def refused(run: subprocess.CompletedProcess, *parts: str) -> None:
    """Asserts exit status 2 and a last line on stderr that is the only error and holds all `parts`."""
    assert run.returncode == 2, (run.returncode, run.stdout, run.stderr)
    assert "Traceback" not in run.stderr, run.stderr
    last = run.stderr.splitlines()[-1]
    assert last.startswith("error: "), run.stderr
    for part in parts:
        assert part in last, run.stderr
