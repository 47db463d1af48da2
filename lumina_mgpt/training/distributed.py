"""One process or many, by the same calls: torchrun's environment, sums over processes, sharded parameters."""

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.training.loss import LossModel


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
        """
        world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
        found = resolve_device(device)
        if cpu_offload and found.type != "cuda":
            raise InputError(f"--cpu_offload needs a CUDA GPU, got --device {found}; leave it out")
        if world == 1:
            if cpu_offload:
                dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
            return cls(0, 1, found)
        if found.type == "cuda":
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise InputError(f"torchrun --nproc-per-node must be at most {count}, the GPUs here")
            found = torch.device("cuda", index)
            torch.cuda.set_device(found)
        backend = "cpu:gloo,cuda:nccl" if found.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
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


def place(module: LossModel, processes: Processes, cpu_offload: bool = False) -> None:
    """Moves a model from the CPU to where it is trained.

    With many processes its parameters, gradients and optimizer state are spread over them, a layer at a time (FSDP2):
    no device ever holds more than its share and one layer, or embedding and head.
    """
    if not dist.is_initialized():
        module.to(processes.device)
        return
    mesh = init_device_mesh(processes.device.type, (processes.world,))
    offload = {"offload_policy": CPUOffloadPolicy()} if cpu_offload else {}
    for layer in module.model.layers:
        fully_shard(layer, mesh=mesh, **offload)
    fully_shard(module, mesh=mesh, **offload)


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def clip_gradients(module: nn.Module, limit: float) -> float:
    """Scales gradients down to a global norm of `limit` (0: leaves them); returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit if limit > 0 else float("inf"))
    return float(full_tensor(norm))
