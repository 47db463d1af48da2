"""Names, finds and removes the checkpoints of an output folder, and lets a run go back to an earlier checkpoint."""

import logging
import os
import re
import shutil
from pathlib import Path

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, remedy, write_atomic

logger = logging.getLogger(__name__)

# Names of checkpoints, and of folders of samples. Other names are ignored: a user may copy or rename a folder.
_NAME = re.compile(r"step-(\d{8,18})")
_GOING_BACK = "going_back.json"
_ASIDE = "set_aside-"


def name_of(step: int) -> str:
    """Returns the folder name of the checkpoint of a step, such as `step-00000100`."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """Returns the step in the name of a checkpoint; None if the path does not have such a name."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def checkpoints_of(output_dir: Path) -> list[Path]:
    """Returns the checkpoints in an output folder, in ascending order of their steps."""
    return [path for _, path in _numbered(output_dir / "checkpoints")]


def newest(output_dir: Path) -> Path | None:
    """Returns the checkpoint that a run resumes from; None if there is none.

    It is the one with the highest step, or the `start` of a call of `go_back` that was interrupted.

    Raises:
        InputError: `going_back.json` in the folder is damaged.
    """
    note = _read_note(output_dir)
    if note is not None:  # going back was interrupted: later checkpoints are still in place
        return output_dir / "checkpoints" / note["to"]
    found = checkpoints_of(output_dir)
    return found[-1] if found else None


def find(output_dir: Path, step: int | None = None) -> Path:
    """Returns the checkpoint of a step; the newest one if `step` is None.

    Raises:
        InputError: the folder holds no such checkpoint.
    """
    if step is None:
        if (found := newest(output_dir)) is None:
            raise InputError(f"{output_dir} holds no checkpoint to export; train first", "output_dir")
        return found
    path = output_dir / "checkpoints" / name_of(step)
    if not path.is_dir():
        there = ", ".join(str(step_of(path)) for path in checkpoints_of(output_dir)) or "none"
        raise InputError(f"must be that of a checkpoint, got {step}; output_dir={output_dir} holds {there}", "step")
    return path


def belongs(checkpoint: Path, output_dir: Path) -> bool:
    """Returns whether a folder is one of the checkpoints of an output folder."""
    inside = checkpoint.resolve().parent == (output_dir / "checkpoints").resolve()
    return inside and step_of(checkpoint.resolve()) is not None


def go_back(output_dir: Path, start: Path) -> None:
    """Sets aside what the run did after the checkpoint `start`.

    Later checkpoints and samples move to the folder `checkpoints/set_aside-N`, which also gets a copy of
    `metrics.jsonl`. While they move, the file `checkpoints/going_back.json` exists. After an interruption, `newest`
    therefore returns `start`, and the next call moves the rest.

    Raises:
        InputError: the disk or the access rights of the folder do not allow the move.
    """
    folder, step = output_dir / "checkpoints", step_of(start)
    assert step is not None, start
    later = [path for number, path in _numbered(folder) if number > step]
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
        for number, path in _numbered(output_dir / "samples"):
            if number > step:
                os.rename(path, aside / "samples" / path.name)
        (folder / _GOING_BACK).unlink()
    except OSError as error:
        raise InputError(
            f"{output_dir}: later checkpoints cannot be set aside ({cause(error)}); {remedy(error)}", "output_dir"
        ) from None
    logger.warning("going back to step %d: later checkpoints and samples are now in %s", step, aside)


def remove(checkpoint: Path) -> None:
    """Removes a checkpoint. It first renames the folder, so that no run loads a partly removed checkpoint."""
    hidden = checkpoint.with_name(f".removed-{checkpoint.name}")
    os.rename(checkpoint, hidden)
    shutil.rmtree(hidden)


def _numbered(folder: Path) -> list[tuple[int, Path]]:
    """Returns the subfolders named after a step, with that step, in ascending order."""
    found = [(step, path) for path in folder.glob("step-*") if (step := step_of(path)) is not None and path.is_dir()]
    return sorted(found)


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
    except InputError as error:  # without the note, the run would resume from a checkpoint that it has abandoned
        raise InputError(f"{path} is damaged ({error.message.partition('; ')[0]}); {todo}") from None
    to, aside = (Path(str(note.get(key))) for key in ("to", "aside"))
    right = step_of(folder / to.name) is not None and re.fullmatch(_ASIDE + r"\d+", aside.name)
    if not right or not (folder / to.name).is_dir():
        raise InputError(
            f"{path} must name a checkpoint beside it and a {_ASIDE}N folder, got {str(to)!r} and {str(aside)!r}; "
            f"{todo}"
        )
    return {"to": to.name, "aside": aside.name}
