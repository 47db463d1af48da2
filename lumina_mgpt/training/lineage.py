"""Which checkpoints of an output folder belong to its run, and how it goes back to an earlier one."""

import logging
import os
import re
import shutil
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy, write_atomic

logger = logging.getLogger(__name__)

_NAME = re.compile(r"step-(\d{8,18})")  # of samples, too; nothing else counts: a user may copy or rename a folder
_GOING_BACK = "going_back.json"
_ASIDE = "set_aside-"


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint's name; None for every other name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """The checkpoints of a run, the oldest first."""
    return _numbered(output_dir / "checkpoints")


def newest(output_dir: Path) -> Path | None:
    """The checkpoint with which a run goes on.

    Raises:
        InputError: the folder's note of going back is damaged.
    """
    note = _read_note(output_dir)
    if note is not None:  # a kill has left later ones in place, which are to be set aside
        return output_dir / "checkpoints" / note["to"]
    found = checkpoints_of(output_dir)
    return found[-1] if found else None


def belongs(checkpoint: Path, output_dir: Path) -> bool:
    """Whether a folder is one of the checkpoints of this output folder."""
    inside = checkpoint.resolve().parent == (output_dir / "checkpoints").resolve()
    return inside and step_of(checkpoint.resolve()) is not None


def go_back(output_dir: Path, start: Path) -> None:
    """Sets aside what the run in a folder did after the checkpoint `start` of its own.

    Later checkpoints and samples move to `checkpoints/set_aside-N`, with a copy of metrics.jsonl. A note says so while
    they move: if that is interrupted, `newest` is `start` and the next call finishes it.

    Raises:
        InputError: the disk or the folder's access rights do not allow it.
    """
    folder, step = output_dir / "checkpoints", step_of(start)
    later = [path for path in checkpoints_of(output_dir) if step_of(path) > step]
    note = _read_note(output_dir)
    if not later and note is None:
        return
    aside = folder / (note["aside"] if note else _free(folder))
    try:
        write_atomic(folder / _GOING_BACK, f'{{"to": "{start.name}", "aside": "{aside.name}"}}\n')
        (aside / "samples").mkdir(parents=True, exist_ok=True)
        if (output_dir / "metrics.jsonl").exists() and not (aside / "metrics.jsonl").exists():
            write_atomic(aside / "metrics.jsonl", (output_dir / "metrics.jsonl").read_bytes())
        for path in later:
            os.rename(path, aside / path.name)
        for path in _numbered(output_dir / "samples"):
            if step_of(path) > step:
                os.rename(path, aside / "samples" / path.name)
        (folder / _GOING_BACK).unlink()
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: later checkpoints cannot be set aside ({cause(error)}); "
                         f"{remedy(error)}") from None  # fmt: skip
    logger.warning("going back to step %d: later checkpoints and samples are now in %s", step, aside)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint; one that is partly removed has no checkpoint's name."""
    hidden = checkpoint.with_name(f".removed-{checkpoint.name}")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def _numbered(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if step_of(path) is not None and path.is_dir()]
    return sorted(found, key=step_of)


def _free(folder: Path) -> str:
    taken = {path.name for path in folder.glob(f"{_ASIDE}*")}
    return next(name for n in range(1, len(taken) + 2) if (name := f"{_ASIDE}{n}") not in taken)


def _read_note(output_dir: Path) -> dict | None:
    folder = output_dir / "checkpoints"
    path = folder / _GOING_BACK
    if not path.exists():
        return None
    todo = "remove it, and all checkpoints later than the one to go on from"
    try:
        note = read_json(path)
    except InputError as error:  # without the note, the run would go on from a checkpoint that it left
        raise InputError(f"{path} is damaged ({error.args[0].partition('; ')[0]}); {todo}") from None
    to, aside = (Path(str(note.get(key))) for key in ("to", "aside"))
    right = step_of(folder / to.name) is not None and re.fullmatch(_ASIDE + r"\d+", aside.name)
    if not right or not (folder / to.name).is_dir():
        raise InputError(f"{path} must name a checkpoint beside it and a {_ASIDE}N folder, got {str(to)!r} and "
                         f"{str(aside)!r}; {todo}")  # fmt: skip
    return {"to": to.name, "aside": aside.name}
