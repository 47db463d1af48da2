"""Process groups, sums over processes and sharded parameters (FSDP2); the calls are the same for a single process."""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.loss import LossModel

TIMEOUT = timedelta(minutes=30)  # of a collective operation: then a process is lost, and the run ends
LONG_TIMEOUT = timedelta(days=1)  # for work that one process may have more of, such as the generation of samples
_HASH = 64  # characters of a fingerprint
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_SEPARATE_BYTES = 1 << 20  # blocks of at least this size are mapped and unmapped individually
_KEPT_BYTES = 1 << 25  # the same for `keep_freed_memory`: the largest threshold that every glibc takes


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
                if found.index is not None:
                    torch.cuda.set_device(found)  # FSDP puts the shards on the current device
                dist.init_process_group("cpu:gloo,cuda:nccl", store=dist.HashStore(), rank=0, world_size=1)
            return cls(0, 1, found)
        meeting_point()
        if found.type == "cuda":
            index, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
            if index >= count:
                raise InputError(f"LOCAL_RANK must be below {count}, the number of GPUs; start fewer processes")
            found = torch.device("cuda", index)
        connect(found, TIMEOUT)
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
        """Returns the sum of each value over all processes, in the order of the arguments.

        The processes exchange the values over the network, not over their GPUs, so that none waits for its GPU.
        """
        if self.world == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def of_first(self, fingerprint: str | None) -> str | None:
        """Returns the fingerprint that the first process passes, on all processes. None stays None."""
        if self.world == 1:
            return fingerprint
        letters = torch.tensor(list((fingerprint or "").encode().ljust(_HASH)), dtype=torch.uint8)
        dist.broadcast(letters, 0)
        return bytes(letters.tolist()).decode().strip() or None

    @contextmanager
    def together(self, action: str) -> Iterator[None]:
        """Ends on all processes with an error if the block ends on one of them with InputError.

        Args:
            action: what the block does, for the message of the others.

        Raises:
            InputError: that of the block, or one that says that another process has one.
        """
        fault: InputError | None = None
        try:
            yield
        except InputError as error:
            fault = error
        if self.sum(fault is not None)[0]:
            raise fault or InputError(f"another process cannot {action}; it names the reason")

    def long_timeout_group(self) -> dist.ProcessGroup | None:
        """Returns a group of all processes that wait for each other for a day; None for a single process.

        All processes call this method together. Its operations take tensors on the CPU.
        """
        return dist.new_group(backend="gloo", timeout=LONG_TIMEOUT) if self.world > 1 else None

    def upload(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Returns copies of CPU tensors on the device. For a GPU, the host does not wait: it pins them first."""
        if self.device.type != "cuda":
            return [tensor.to(self.device) for tensor in tensors]
        return [tensor.pin_memory().to(self.device, non_blocking=True) for tensor in tensors]

    def barrier(self) -> None:
        """Waits until all processes have called this method."""
        self.sum(0)


def return_freed_memory() -> None:
    """Makes glibc return the CPU memory of a freed tensor to the system at once (Linux only).

    By default glibc raises its threshold and keeps freed blocks of up to 32 MiB. The fragmentation costs 0.7 GB for the
    model of bench_train.py. Each step then maps its memory anew, and needs huge pages for it: with pages of 4 KiB,
    mapping takes a third of a step. The variable THP_MEM_ALLOC_ENABLE makes torch use huge pages. Call this function
    before torch allocates its first tensor, which is when torch reads the variable.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    _set_malloc({_M_MMAP_THRESHOLD: _SEPARATE_BYTES})


def keep_freed_memory() -> None:
    """Makes glibc keep the CPU memory of freed tensors below 32 MiB for the next ones (Linux only).

    The setting is that of the whole process, and cannot be taken back: call it in commands only.

    A step then maps hardly any memory. With `return_freed_memory`, the kernel takes a fifth to a third of the time of a
    step, to clear pages. Freed blocks cost 0.6 GB for the model of bench_train.py.
    """
    _set_malloc({_M_MMAP_THRESHOLD: _KEPT_BYTES, _M_TRIM_THRESHOLD: (1 << 31) - 1})


def _set_malloc(values: dict[int, int]) -> None:
    """Sets parameters of glibc's malloc; does nothing without glibc."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "gnu_get_libc_version"):
        for parameter, value in values.items():
            libc.mallopt(parameter, value)


def place(module: LossModel, processes: Processes, cpu_offload: bool = False, narrow: bool = False) -> None:
    """Shards a model over the processes (FSDP2); without a process group, moves it from the CPU to the device.

    Parameters, gradients and optimizer state are sharded. FSDP gathers the parameters one layer at a time. A device
    therefore holds its shard, the whole head, and either the whole embedding or at most two whole layers.

    Only the first process has weights before. The others receive each layer right before it is sharded, so that they
    never hold the whole model.

    The module may hold a second model, such as a frozen teacher, which is sharded alike.

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
    for model in module.children():
        assert isinstance(model, Transformer)
        for part in model.layers if model.config.tie_word_embeddings else (model.embed_tokens, *model.layers):
            _receive(part, processes)
            fully_shard(part, mesh=mesh, **options)
    _receive(module, processes)
    fully_shard(module, mesh=mesh, **options)


def _receive(module: nn.Module, processes: Processes) -> None:
    """Copies the parameters that are not sharded yet from the first process to the devices of all.

    A parameter of another process may be on the meta device, and may have another number of rows.
    """
    if processes.world == 1:
        return
    copies: dict[nn.Parameter, nn.Parameter] = {}  # several modules may share one
    for owner in module.modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            if isinstance(parameter, DTensor):
                continue
            if parameter not in copies:
                shape = torch.tensor(parameter.shape)
                dist.broadcast(shape, 0)
                if processes.first:
                    value = parameter.detach().to(processes.device).contiguous()
                else:
                    value = torch.empty(shape.tolist(), dtype=parameter.dtype, device=processes.device)
                dist.broadcast(value, 0)
                copies[parameter] = nn.Parameter(value, parameter.requires_grad)
            setattr(owner, leaf, copies[parameter])


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Returns the whole of a sharded tensor, gathered from all processes; returns any other tensor unmodified."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def clip_gradients(module: nn.Module, limit: float) -> torch.Tensor:
    """Scales the gradients down to a global norm of at most `limit`; returns the norm before that, a scalar.

    Args:
        limit: largest norm; 0 for no limit.
    """
    parameters = [_with_dense_gradient(parameter) for parameter in module.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    found = full_tensor(norm)
    # On a CPU the host knows the norm already. If it is small, nothing is multiplied.
    if limit > 0 and not (found.device.type == "cpu" and found.item() <= limit):
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return found


def _with_dense_gradient(parameter: nn.Parameter) -> nn.Parameter:
    """Returns the parameter; for a sparse gradient, a parameter whose gradient is the rows that are not zero."""
    gradient = parameter.grad
    if gradient is None or not gradient.is_sparse:
        return parameter
    parameter.grad = gradient.coalesce()  # adds the gradients of equal ids
    rows = nn.Parameter(parameter.grad.values())
    rows.grad = parameter.grad.values()  # shares memory with the sparse gradient
    return rows


def read(device: torch.device, *scalars: torch.Tensor) -> list[float]:
    """Returns the values of float32 scalars. The host waits once for a GPU, not once for each.

    Args:
        device: device of most scalars; the others may be on the CPU.
    """
    return torch.stack([scalar.detach().to(device, torch.float32, non_blocking=True) for scalar in scalars]).tolist()
