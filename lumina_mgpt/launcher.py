"""Reads the environment variables that a launcher (torchrun, accelerate) sets, and connects the processes."""

import os
from datetime import timedelta
from typing import TYPE_CHECKING

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause

if TYPE_CHECKING:
    import torch


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


def image_share(tensor_parallel: int = 1) -> tuple[int, int]:
    """Returns which share of the images this process makes, as (index, number of shares).

    Args:
        tensor_parallel: number of processes that hold one model together. They have the same share.

    Raises:
        InputError: `tensor_parallel` does not divide the number of processes, or the launcher's variables are wrong.
    """
    rank, world = process_share()
    if tensor_parallel < 1:
        raise InputError(f"must be at least 1, got {tensor_parallel}; try 2", "tensor_parallel")
    if world % tensor_parallel:
        started = "is 1 without a launcher" if world == 1 else f"is {world}"
        raise InputError(
            f"{tensor_parallel} must divide the number of processes, which {started}; start with "
            f"torchrun --nproc_per_node {tensor_parallel} -m lumina_mgpt COMMAND ...",
            "tensor_parallel",
        )
    return rank // tensor_parallel, world // tensor_parallel


def follows(tensor_parallel: int) -> bool:
    """Returns whether another process of the same model, the first one, writes its files and reports."""
    return process_share()[0] % tensor_parallel > 0


def connect(device: "torch.device", timeout: timedelta) -> None:
    """Joins the process group of the launcher: gloo for tensors on the CPU, NCCL for those on a CUDA GPU.

    Args:
        device: `cpu`, or the GPU of this process. This GPU becomes torch's current one.
        timeout: how long this process waits for another one.

    Raises:
        InputError: the launcher's variables are wrong, or the processes cannot connect.
    """
    import torch
    import torch.distributed as dist

    meeting_point()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:  # the address is unknown or taken, or a process is missing
        world = os.environ["WORLD_SIZE"]
        where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
        raise InputError(
            f"the {world} processes cannot meet at {where} ({cause(error)}); start with torchrun, or give another port"
        ) from None


def meeting_point() -> None:
    """Checks the environment variables with which several processes connect to each other.

    Raises:
        InputError: a variable is missing or out of its range.
    """
    names = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but these are not set: {', '.join(missing)}; start with "
            "torchrun, or unset WORLD_SIZE to run in one process"
        )
    for name, limit in (("LOCAL_RANK", int(os.environ["WORLD_SIZE"]) - 1), ("MASTER_PORT", 65535)):
        text = os.environ[name]
        if not _is_whole(text) or int(text) > limit:
            raise InputError(f"{name} must be a whole number of at most {limit}, got {text!r}; start with torchrun")


def _is_whole(text: str) -> bool:
    return text.isdecimal() and len(text) < 10
