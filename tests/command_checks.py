"""Checks of a command that ran in this process."""

import os
import sys
from pathlib import Path

PATIENCE = 300  # seconds for a process that takes three on an idle machine; only a hang may exceed it


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def refused(capsys, code: int, *parts: str) -> None:
    """Exit status 2 and exactly one line on stderr that holds all the parts."""
    out, err = capsys.readouterr()
    assert code == 2
    assert err.startswith("error: ") and err.count("\n") == 1, err
    for part in parts:
        assert part in err, err
