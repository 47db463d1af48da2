"""Reads the state file of a training checkpoint: position in the data, identity of the run, and configurations."""

import dataclasses
from pathlib import Path

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json
from lumina_mgpt.training.options import TrainingConfig

STATE = "trainer.json"
REMEDY = "remove the checkpoint to go on from the one before"
_KEYS: dict[str, type] = {
    "step": int,
    "epoch": int,
    "done": int,
    "elapsed": float,
    "tokens": int,
    "ema": int,
    "identity": dict,
    "model": dict,
    "settings": dict,
}
_LATER_KEYS: dict[str, type] = {"guard": dict, "base": dict, "checksums": bool}  # absent in earlier versions
_RULES = {int: "whole number of at least 0", float: "number of at least 0", dict: "JSON object", bool: "true or false"}


def read_state(checkpoint: Path) -> dict:
    """Returns the contents of the state file of a checkpoint, `trainer.json`.

    Raises:
        InputError: the file is missing or damaged, lacks a key, or holds a value of another type.
    """
    path = checkpoint / STATE
    try:
        state = read_json(path)
    except InputError as error:
        raise InputError(f"{checkpoint} is damaged ({error}); {REMEDY}") from None
    for key, kind in (_KEYS | _LATER_KEYS).items():
        if key not in state:
            if key in _LATER_KEYS:
                continue
            raise InputError(f"{path} lacks the key {key!r}; {REMEDY}")
        value = state[key]
        fits = isinstance(value, (int, float) if kind is float else kind)
        if not fits or (kind in (int, float) and (isinstance(value, bool) or not 0 <= value < 2**63)):
            raise InputError(f"{path}: {key!r} must be a {_RULES[kind]}, got {str(value)[:60]!r}; {REMEDY}")
    _check_guard(path, state.get("guard", {}))
    return state


def _check_guard(path: Path, guard: dict) -> None:
    norms, in_a_row = guard.get("norms", []), guard.get("in_a_row", 0)
    if not isinstance(norms, list) or not all(type(norm) in (int, float) for norm in norms):
        raise InputError(f"{path}: 'guard.norms' must be a list of numbers; {REMEDY}")
    if type(in_a_row) is not int:
        raise InputError(f"{path}: 'guard.in_a_row' must be a whole number; {REMEDY}")


def configs_of(checkpoint: Path, state: dict) -> tuple[TrainingConfig, ModelConfig]:
    """Returns the training configuration and the model configuration that a state holds.

    Args:
        checkpoint: folder of the checkpoint; error messages name it.
        state: what `read_state` returned for it.

    Raises:
        InputError: an option is unknown or missing, or its value is out of range. The error names file and key.
    """
    path = checkpoint / STATE
    _check_known(path, "settings", state["settings"], set(TrainingConfig.options()))
    _check_known(path, "model", state["model"], {field.name for field in dataclasses.fields(ModelConfig)})
    key = "settings"
    try:
        settings = TrainingConfig.of(**state["settings"])
        key = "model"
        return settings, ModelConfig(**state["model"])
    except (InputError, TypeError, ValueError, ArithmeticError) as error:
        raise InputError(f"{path}: {key!r} cannot be used ({cause(error)}); {REMEDY}") from None


def _check_known(path: Path, key: str, values: dict, known: set[str]) -> None:
    if unknown := sorted(values.keys() - known):
        raise InputError(
            f"{path}: {key!r} holds {unknown[0]!r}, which this version does not know; use the version that wrote it"
        )
