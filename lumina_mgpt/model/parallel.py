"""Tensor parallelism: several processes hold one model, each with a part of the heads, the MLP and the image codes.

The plan is that of Megatron-LM (arXiv 1909.08053, section 3). Queries, keys, values, gate and up projection are split
by outputs, the two projections after them by inputs. Each layer sums twice over the processes. The head is split by
image codes, and every process gathers all logits. Embedding, norms and the residual stream are whole in every process.

torch's `parallelize_module` applies the plan. While a split parameter has no numbers yet, it is a DTensor, whose
placement says which part of the file belongs to this process. `ColwiseParallel` and `RowwiseParallel` of torch keep
DTensors in the forward as well. With them, a 64 x 64 product of two rows takes 160 us on a CPU core instead of 8. That
would be 36 ms a step of a model with 32 layers. The styles here therefore multiply plain tensors, with the same kernels
as one process, and sum and gather as those of torch do.

All processes run the same sampler on the same numbers and therefore sample the same codes. The gathered logits are
copies of one result for each code. A sum is equal in all processes too: the algorithms of gloo and NCCL add each number
in one place and copy the result. Everything else is the same computation on the same kind of device. `require_same`
checks the codes of each batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from math import gcd
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.launcher import connect, image_share
from lumina_mgpt.model.transformer import Head, HeadNorm, Transformer

_OPTION = "tensor_parallel"  # parameter of errors
_SUMMED = "summed_over_processes"  # attribute of a layer whose results are summed
# A process waits this long for another one. It must exceed the time by which processes finish loading, or the decoding
# of previews, apart from each other. torchrun stops the other processes at once when one fails.
PATIENCE = timedelta(minutes=10)


def require_fit(config: ModelConfig, size: int, quant: int | None = None, compile: bool = False) -> None:
    """Checks that `size` processes can hold the model.

    Args:
        quant: group size if the weights are quantized to int4 while loading, else None.
        compile: whether the steps are to be compiled.

    Raises:
        InputError: `size` does not divide the heads, the units of the MLP or the image codes; weights are int4; or
            steps are to be compiled.
    """
    if size == 1:
        return
    if quant or config.int4_group:
        rule = f"{size} cannot split int4 weights yet"
        raise InputError(f"{rule}; leave it out, or use weights that are not quantized", _OPTION)
    if compile:
        # On CUDA the steps become graphs; sums over processes in graphs were never run.
        raise InputError(f"{size} cannot be used with compile=True yet; leave one of them out", _OPTION)
    counts = {
        "heads": config.num_attention_heads,
        "key and value heads": config.num_key_value_heads,
        "units of the MLP": config.intermediate_size,
        "image codes": config.num_image_codes,
    }
    if any(count % size for count in counts.values()):
        largest = gcd(*counts.values())
        fitting = [str(number) for number in range(2, largest + 1) if largest % number == 0]
        remedy = f"this model fits {', '.join(fitting)}" if fitting else "this model cannot be split, leave it out"
        sizes = ", ".join(f"{count} {name}" for name, count in counts.items())
        raise InputError(f"must divide {sizes}, got {size}; {remedy}", _OPTION)


@dataclass(frozen=True)
class Parallel:
    """This process among those that hold one model together.

    Attributes:
        mesh: the processes of the model, in one dimension.
        device: device of this process.
    """

    mesh: DeviceMesh
    device: torch.device

    @classmethod
    @contextmanager
    def start(cls, device: torch.device, size: int) -> Iterator["Parallel"]:
        """Joins the process group that torchrun describes, and leaves it at the end of the block.

        Consecutive ranks hold one model. With more than `size` processes there are several models.

        After an exception, the block does not leave the group, because other processes may wait in it: the process has
        to exit.

        Args:
            device: `cpu`, or the GPU of this process.
            size: number of processes that hold one model, at least 2.

        Raises:
            InputError: the device cannot be used, the launcher's variables are wrong, or the processes cannot connect.
        """
        image_share(size)
        if device.type not in ("cpu", "cuda"):
            raise InputError(f"needs device=cpu or device=cuda, got {device}; choose one, or leave it out", _OPTION)
        connect(device, PATIENCE)
        group, _ = dist.new_subgroups(size, timeout=PATIENCE)
        yield cls(DeviceMesh.from_group(group, device.type), device)
        dist.destroy_process_group()

    @property
    def size(self) -> int:
        """Number of processes that hold the model."""
        return self.mesh.size()

    @property
    def rank(self) -> int:
        """Index of this process among those that hold the model."""
        return self.mesh.get_local_rank()

    @property
    def first(self) -> bool:
        """Whether this is the process of its model that writes files and reports."""
        return self.rank == 0

    def require_fit(self, config: ModelConfig, quant: int | None = None, compile: bool = False) -> None:
        """Checks that these processes can hold the model, as the function `require_fit` does."""
        require_fit(config, self.size, quant, compile)

    def split(self, model: Transformer) -> None:
        """Splits a model without weights, on the meta device. Its split parameters become DTensors.

        `model.config` then has the number of key and value heads of one process, by which caches are made.
        """
        config = model.config
        codes = slice(config.image_code_offset, config.image_code_offset + config.num_image_codes)
        plan: dict[str, ParallelStyle] = {
            "layers.*.self_attn.[qkv]_proj": _Split(0),
            "layers.*.self_attn.o_proj": _Split(1),
            "layers.*.mlp.gate_proj": _Split(0),
            "layers.*.mlp.up_proj": _Split(0),
            "layers.*.mlp.down_proj": _Split(1),
            "lm_head": _SplitCodes(self, codes),
        }
        parallelize_module(model, self.mesh, plan)
        model.config = replace(config, num_key_value_heads=config.num_key_value_heads // self.size)

    def part(self, parameter: object, tensor: Tensor) -> Tensor:
        """Returns the part of a whole tensor that belongs to this process.

        Args:
            parameter: the parameter that `tensor` is for, of a model after `split`.
        """
        if not isinstance(parameter, DTensor):
            return tensor
        (placement,) = parameter.placements
        assert isinstance(placement, Shard)
        return tensor.chunk(self.size, placement.dim)[self.rank]

    def finish(self, model: Transformer) -> None:
        """Splits what has a form of its own in files: norms of heads, and biases that are added to a sum."""
        for module in model.modules():
            if isinstance(module, HeadNorm):
                for leaf in ("weight", "bias"):
                    rows = getattr(module, leaf).detach()
                    rows = rows.repeat_interleave(module.heads // len(rows), 0).chunk(self.size)[self.rank]
                    equal = torch.equal(rows, rows[:1].expand_as(rows))  # HeadNorm is faster with a single row
                    setattr(module, leaf, nn.Parameter(rows[:1].clone() if equal else rows.clone()))
                module.heads //= self.size
            elif getattr(module, _SUMMED, False) and self.rank:
                module.register_parameter("bias", None)  # the first process adds it, once

    def code_part(self, codes: slice) -> slice:
        """Returns the slice of the vocabulary ids whose logits this process computes.

        Args:
            codes: slice of all image codes' ids.
        """
        count = (codes.stop - codes.start) // self.size
        return slice(codes.start + self.rank * count, codes.start + (self.rank + 1) * count)

    def of_first(self, tensor: Tensor) -> Tensor:
        """Returns the tensor of the first process, on the CPU. All processes give one of the same shape and dtype."""
        shared = tensor.to(self.device, copy=True)
        dist.broadcast(shared, group=self.mesh.get_group(), group_src=0)
        return shared.cpu()

    def least(self, number: int) -> int:
        """Returns the least of the numbers that the processes give."""
        shared = torch.tensor(number, device=self.device)
        dist.all_reduce(shared, dist.ReduceOp.MIN, group=self.mesh.get_group())
        return int(shared)

    def require_same(self, codes: Tensor) -> None:
        """Checks that all processes have the same codes.

        Raises:
            InputError: they differ.
        """
        differ = torch.tensor(int(not torch.equal(codes, self.of_first(codes))), device=self.device)
        dist.all_reduce(differ, group=self.mesh.get_group())
        if int(differ):
            raise InputError("got different codes on its devices; use GPUs of one kind for a model", _OPTION)

    def gather(self, logits: Tensor) -> Tensor:
        """Returns the logits of all processes. Shapes: (..., C / size) -> (..., C)."""
        parts = [torch.empty_like(logits) for _ in range(self.size)]
        dist.all_gather(parts, logits.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, -1)


class _Split(ParallelStyle):
    """Splits a linear layer by its outputs (dimension 0 of the weight) or by its inputs (dimension 1).

    The results of a layer that is split by inputs are summed over the processes.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.dim() > self.dimension:
                local = parameter.detach().chunk(device_mesh.size(), self.dimension)[device_mesh.get_local_rank()]
                split = DTensor.from_local(local, device_mesh, [Shard(self.dimension)], run_check=False)
                module.register_parameter(name, nn.Parameter(split))
        if self.dimension == 1:
            group = device_mesh.get_group()
            setattr(module, _SUMMED, True)

            def summed(_: nn.Module, inputs: Any, output: Tensor) -> Tensor:
                dist.all_reduce(output, group=group)
                return output

            module.register_forward_hook(summed)
        return module


class _SplitCodes(ParallelStyle):
    """Makes a head compute the logits of a part of the image codes, and gather those of all."""

    def __init__(self, parallel: Parallel, codes: slice) -> None:
        self.parallel, self.codes = parallel, codes

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, Head)
        own = self.parallel.code_part(self.codes)

        def of_own(_: nn.Module, inputs: tuple[Tensor, slice | None]) -> tuple[Tensor, slice]:
            hidden, columns = inputs
            assert columns == self.codes, f"columns {columns} of a head that is split by {self.codes}"
            return hidden, own

        module.register_forward_pre_hook(of_own)
        module.register_forward_hook(lambda _module, _inputs, logits: self.parallel.gather(logits))
        return module
