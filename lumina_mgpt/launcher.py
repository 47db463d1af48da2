"""Reads the environment variables that a launcher (torchrun, accelerate) sets."""

import os

from lumina_mgpt.errors import InputError


def process_share() -> tuple[int, int]:
    """Returns the rank of this process and the number of processes; (0, 1) without a launcher.

    Raises:
        InputError: a number is invalid, or only the number of processes is set.
    """
    values = {name: os.environ.get(name, alone) for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"))}
    if "RANK" not in os.environ and values["WORLD_SIZE"] != "1":
        raise InputError(
            "RANK must be set with WORLD_SIZE, as a launcher does, got WORLD_SIZE={WORLD_SIZE!r} alone; "
            "unset it, or start with torchrun or accelerate launch".format(**values)
        )
    if not all(_is_whole(text) for text in values.values()) or not int(values["RANK"]) < int(values["WORLD_SIZE"]):
        raise InputError(
            "RANK must be below WORLD_SIZE, both whole numbers, got {RANK!r} and {WORLD_SIZE!r}; a "
            "launcher sets them, unset them otherwise".format(**values)
        )
    return int(values["RANK"]), int(values["WORLD_SIZE"])


def meeting_point() -> None:
    """Checks the environment variables with which several processes connect to each other.

    Raises:
        InputError: a variable is missing or out of its range.
    """
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {', '.join(missing)} is not set; start with "
            "torchrun, or unset WORLD_SIZE to train in one process"
        )
    for name, limit in (("LOCAL_RANK", int(os.environ["WORLD_SIZE"]) - 1), ("MASTER_PORT", 65535)):
        text = os.environ[name]
        if not _is_whole(text) or int(text) > limit:
            raise InputError(f"{name} must be a whole number of at most {limit}, got {text!r}; start with torchrun")


def _is_whole(text: str) -> bool:
    return text.isdecimal() and len(text) < 10
