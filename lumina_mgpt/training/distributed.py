"""Process groups, sums over processes and sharded parameters (FSDP2); the calls are the same for a single process."""

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.launcher import connect, meeting_point, process_share
from lumina_mgpt.training.loss import LossModel

_M_MMAP_THRESHOLD = -3  # malloc.h
_SEPARATE_BYTES = 1 << 20  # blocks of at least this size are mapped and unmapped individually


@dataclass(frozen=True)
class Processes:
    """Describes this process, and connects it with the other processes of the training.

    Attributes:
        rank: index of this process, from 0.
        world: number of processes.
        device: device of this process.
    """

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto", cpu_offload: bool = False) -> "Processes":
        """Joins the process group that torchrun describes.

        A process that torchrun did not start trains alone, and has no group unless `cpu_offload` is set.

        Args:
            device: auto, cpu or cuda.
            cpu_offload: whether FSDP keeps the shards in the CPU's memory; FSDP needs a group, even for one process.

        Raises:
            InputError: the device cannot be used, the launcher's variables are wrong, or the processes cannot connect.
        """
        return_freed_memory()
        rank, world = process_share()
        found = resolve_device(device)
        if cpu_offload and found.type != "cuda":
            raise InputError(f"needs a CUDA GPU, got device={found}; leave it out", "cpu_offload")
        if world == 1:
            if cpu_offload:
                dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
            return cls(0, 1, found)
        meeting_point()
        if found.type == "cuda":
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise InputError(f"LOCAL_RANK must be below {count}, the number of GPUs; start fewer processes")
            found = torch.device("cuda", index)
        connect(found, timedelta(minutes=30))
        return cls(rank, world, found)

    def stop(self) -> None:
        """Leaves the process group, if there is one."""
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the process that writes files and reports."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Returns the sum of each value over all processes, in the order of the arguments."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        """Waits until all processes have called this method."""
        if self.world > 1:
            dist.barrier()


def return_freed_memory() -> None:
    """Makes glibc return the CPU memory of a freed tensor to the system at once (Linux only).

    By default glibc raises its threshold and keeps freed blocks of up to 32 MiB. The fragmentation costs 0.7 GB for the
    model of bench_train.py. Each step then maps its memory anew, and needs huge pages for it: with pages of 4 KiB,
    mapping takes a third of a step. The variable THP_MEM_ALLOC_ENABLE makes torch use huge pages. Call this function
    before torch allocates its first tensor, which is when torch reads the variable.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _SEPARATE_BYTES)


def place(module: LossModel, processes: Processes, cpu_offload: bool = False, narrow: bool = False) -> None:
    """Shards a model over the processes (FSDP2); without a process group, moves it from the CPU to the device.

    Parameters, gradients and optimizer state are sharded. FSDP gathers the parameters one layer at a time. A device
    therefore holds its shard, the whole head, and either the whole embedding or at most two whole layers.

    Args:
        cpu_offload: whether the shards are in the CPU's memory.
        narrow: whether parameters are gathered and multiplied in bfloat16. Shards and sums of gradients stay float32.
            Without a process group, it has no effect.
    """
    if not dist.is_initialized():
        module.to(processes.device)
        return
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    options: dict[str, Any] = {"offload_policy": CPUOffloadPolicy()} if cpu_offload else {}
    if narrow:  # inputs are not cast: among them are the angles of RoPE, which need float32
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = module.model
    for part in model.layers if model.config.tie_word_embeddings else (model.embed_tokens, *model.layers):
        fully_shard(part, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a sharded tensor, gathered from all processes; returns any other tensor unmodified."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scales the gradients down to a global norm of at most `limit`; returns the norm before that.

    Args:
        limit: largest norm; 0 for no limit.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit if limit > 0 else float("inf"))
    return float(full_tensor(norm))
