"""One process or many, by the same calls: torchrun's environment, sums over processes, sharded parameters."""

import ctypes
import os
import sys
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause
from lumina_mgpt.launcher import meeting_point, process_share
from lumina_mgpt.training.loss import LossModel

_M_MMAP_THRESHOLD = -3  # malloc.h
_SEPARATE_BYTES = 1 << 20  # from here on a block is mapped, and unmapped, for itself


@dataclass(frozen=True)
class Processes:
    """This process among those that train together."""

    rank: int
    world: int
    device: torch.device

    @classmethod
    def start(cls, device: str = "auto", cpu_offload: bool = False) -> "Processes":
        """Joins the group that torchrun describes; a plain start is a world of one, without any group.

        Offloading is FSDP's, so with it a world of one has a group too.

        Raises:
            InputError: the device cannot be used, or the launcher's variables are wrong, or the processes do not meet.
        """
        return_freed_memory()
        rank, world = process_share()
        found = resolve_device(device)
        if cpu_offload and found.type != "cuda":
            raise InputError(f"--cpu_offload needs a CUDA GPU, got --device {found}; leave it out")
        if world == 1:
            if cpu_offload:
                dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
            return cls(0, 1, found)
        meeting_point()
        if found.type == "cuda":
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise InputError(f"torchrun --nproc-per-node must be at most {count}, the GPUs here")
            found = torch.device("cuda", index)
            torch.cuda.set_device(found)
        backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
        try:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        except (RuntimeError, ValueError) as error:  # the address is unknown or taken, or a process does not come
            where = f"MASTER_ADDR {os.environ['MASTER_ADDR']}, MASTER_PORT {os.environ['MASTER_PORT']}"
            raise InputError(f"the {world} processes cannot meet at {where} ({cause(error)}); start with torchrun, "
                             "or give another port") from None  # fmt: skip
        return cls(rank, world, found)

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value summed over all processes."""
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def return_freed_memory() -> None:
    """On Linux with glibc: a tensor's memory on the CPU goes back to the system when the tensor does.

    glibc learns from what is freed to keep blocks of up to 32 MiB. Activations, gradients and optimizer state then lie
    among one another's gaps: for the model of bench_train.py 0.7 GB on top of what a step needs. What is mapped
    anew at every step should come in large pages (torch's THP_MEM_ALLOC_ENABLE, read when it first makes a tensor):
    in pages of 4 KiB the system takes a third of a step to hand it out.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _SEPARATE_BYTES)


def place(module: LossModel, processes: Processes, cpu_offload: bool = False, narrow: bool = False) -> None:
    """Moves a model from the CPU to where it is trained.

    With many processes its parameters, gradients and optimizer state are spread over them, a layer at a time (FSDP2):
    no device ever holds more than its share, the head, and the embedding or a layer or two. With `narrow`, what is sent
    and multiplied is bfloat16; shares, and the sums of gradients, stay as wide as they are.
    """
    if not dist.is_initialized():
        module.to(processes.device)
        return
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    options = {"offload_policy": CPUOffloadPolicy()} if cpu_offload else {}
    if narrow:  # inputs are left alone: among them are the angles of RoPE, which bfloat16 would blur
        options["mp_policy"] = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    model = module.model
    for part in model.layers if model.config.tie_word_embeddings else (model.embed_tokens, *model.layers):
        fully_shard(part, mesh=mesh, **options)
    fully_shard(module, mesh=mesh, **options)


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scales gradients down to a global norm of `limit` (0: leaves them); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit if limit > 0 else float("inf"))
    return float(full_tensor(norm))
