"""Runs PyTorch code as if on cuda:0, with a build of torch without CUDA, and counts what costs time on a GPU.

    with pretend(root="lumina_mgpt/", gpu="h100") as seen:  # device="cuda" works; results are those of the CPU
        seen.reset()
        one_step()
        print(seen.table())

A tensor "on the GPU" is a wrapper that reports the device cuda:0 and holds a tensor on the CPU. An operator raises
where CUDA raises: tensors of two devices, a norm of two dtypes, operands that the int4 kernel or flash-attn does not
take, and waits or uploads during the capture of a graph. It says nothing about speed, memory, streams, Triton, NCCL or
the rounding of CUDA's own kernels.

It relies on private parts of one version of torch, TORCH, and refuses any other. It needs g++.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pretend_kernels
import torch
import torch.distributed.tensor  # torch.testing imports it, which fails under a pretended GPU
import torch.nn.functional as F
from nested import changed, leaves
from torch import Tensor
from torch.utils._foreach_utils import _foreach_supported_types
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

TORCH = "2.13"
GPUS = {"t4": (7, 5), "a100": (8, 0), "4090": (8, 9), "h100": (9, 0), "b200": (10, 0)}  # compute capabilities
STAGED = 1 << 16  # bytes: CUDA copies uploads up to this size at once, and the host does not wait
MATH_KERNELS = 8  # kernels of torch's attention without a fused kernel
KINDS = ("syncs", "copies", "sdpa", "int4", "launches", "captured", "host")
# Operators that start no kernel although they are not views.
FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "lift_fresh", "set_"}
# Operators whose result the host needs: a number, or the size of the result.
WAITS = {
    *("_local_scalar_dense", "equal", "nonzero", "masked_select", "bincount", "repeat_interleave"),
    *("_unique2", "unique_dim", "unique_consecutive"),
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
NOW: list["Seen"] = []


class Seen:
    """What was counted since the last `reset`.

    The attributes of KINDS count by operator and line of `root`:

    - syncs: the host waits for the device.
    - copies: uploads for which the host does not wait.
    - sdpa: attention, by the kernel that torch selects.
    - int4: calls of the int4 kernel, by number of tiles of 16 rows. The kernel reads all weights for each tile.
    - launches: kernels that the host starts. A replayed graph is one.
    - captured: kernels that became part of a graph.
    - host: operators on CPU tensors.

    Attributes:
        shapes: all shapes of attention.
        plans: those shapes and strides for which cuDNN would build a plan.
        captures, replays: number of graphs captured, and of replays.
        graph: the graph that is being captured, or None.
        refuse_capture: whether each capture fails, as for lack of memory.
    """

    def __init__(self, root: str, gpu: str) -> None:
        self.root, self.capability = root, GPUS[gpu]
        self.pinned: list[Tensor] = []
        self.graph: PretendGraph | None = None
        self.refuse_capture = False
        self.reset()

    def reset(self) -> None:
        self.shapes: set = set()
        self.plans: set = set()
        self.captures = self.replays = 0
        self.syncs, self.copies, self.sdpa, self.int4 = Counter(), Counter(), Counter(), Counter()
        self.launches, self.captured, self.host = Counter(), Counter(), Counter()

    def note(self, kind: str, *what: object, times: int = 1) -> None:
        """Counts at the innermost line under `root`.

        Raises:
            RuntimeError: the host waits or uploads while a graph is being captured.
        """
        if self.graph is not None:
            if kind in ("syncs", "copies"):
                raise RuntimeError(f"{what[0]}: operation not permitted when stream is capturing")
            kind = "captured" if kind == "launches" else kind
        frame = sys._getframe(1)
        while frame and (self.root not in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
            frame = frame.f_back
        line = f"{frame.f_code.co_filename.rsplit(self.root, 1)[1]}:{frame.f_lineno}" if frame else "elsewhere"
        getattr(self, kind)[(*what, line)] += times

    def table(self, top: int = 12) -> str:
        """Returns the largest counts of each kind, for a person."""
        lines = []
        for kind in KINDS:
            lines.append(f"{kind}: {getattr(self, kind).total()}")
            lines += [f"{n:7} {' '.join(map(str, key))}" for key, n in getattr(self, kind).most_common(top)]
        graphs = f"captures: {self.captures}, replays: {self.replays}"
        return "\n".join([*lines, graphs, f"attention shapes: {len(self.shapes)}, cuDNN plans: {len(self.plans)}"])

    def is_pinned(self, x: Tensor) -> bool:
        places = [held.untyped_storage().data_ptr() for held in self.pinned]
        return not isinstance(x, OnGpu) and x.untyped_storage().data_ptr() in places

    def upload(self, x: Tensor, non_blocking: bool) -> None:
        """Counts an upload: the host waits for it, unless the memory is pinned or the tensor small."""
        if non_blocking and (self.is_pinned(x) or x.nbytes <= STAGED):
            self.note("copies", "pinned" if self.is_pinned(x) else "staged")
        else:
            self.note("syncs", "upload, large and not pinned" if non_blocking else "upload")

    def compute(self, work: Callable[[], Any], operands: list, in_place: bool = False) -> Any:
        """Returns the result of `work` on CPU tensors, and records the work if a graph is being captured.

        During a capture, work that changes its operands is recorded but not done, as on a GPU.

        Args:
            operands: what the work reads; those that are no tensors are ignored.
        """
        if self.graph is None:
            return work()
        out = None if in_place else work()
        places = {x.untyped_storage().data_ptr() for x in operands if isinstance(x, Tensor)}
        new = [x for x in leaves([out]) if isinstance(x, Tensor)]
        self.graph.recorded.append((work, [x for x in new if x.untyped_storage().data_ptr() not in places]))
        return out


class PretendGraph:
    """`torch.cuda.CUDAGraph`: the operators between start and end of a capture, done again by each replay.

    They read and write the tensors of the capture, as a graph does with its fixed addresses. Until the first replay,
    results are not numbers.
    """

    def __init__(self, *_, **__) -> None:
        self.recorded: list[tuple[Callable[[], Any], list[Tensor]]] = []  # work, and the results that own memory

    def replay(self) -> None:
        seen = NOW[-1]
        seen.note("launches", "graph")
        seen.replays += 1
        with _disable_current_modes(), torch.no_grad():
            for work, kept in self.recorded:
                new = [x for x in leaves([work()]) if isinstance(x, Tensor)]
                for old, fresh in zip(kept, new, strict=bool(kept)):
                    old.copy_(fresh)

    def pool(self) -> tuple[int, int]:
        return (0, 1)

    @classmethod
    @contextmanager
    def capturing(cls, graph: "PretendGraph", *_, **__) -> Iterator[None]:
        """`torch.cuda.graph`."""
        seen = NOW[-1]
        seen.note("syncs", "synchronize before a capture")
        if seen.refuse_capture:
            raise torch.OutOfMemoryError("CUDA out of memory. Pretended")
        seen.graph = graph
        try:
            yield
        finally:
            seen.graph = None
        seen.captures += 1
        with _disable_current_modes(), torch.no_grad():
            for x in (x for _, kept in graph.recorded for x in kept if x.is_floating_point()):
                x.fill_(torch.nan)


class OnGpu(Tensor):
    """A tensor that reports the device cuda:0 and holds `inside`, its numbers, on the CPU."""

    inside: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, x: Tensor) -> "OnGpu":
        made = Tensor._make_wrapper_subclass(
            *(cls, x.size()),
            strides=x.stride(),
            storage_offset=x.storage_offset(),
            dtype=x.dtype,
            device=torch.device("cuda", 0),
        )
        made.inside = x
        return made

    def tolist(self) -> list:
        return self.cpu().tolist()

    def __repr__(self, *_, **__) -> str:
        return f"OnGpu({self.inside})"

    def __format__(self, spec: str) -> str:
        return format(self.cpu(), spec)

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None  # so that nn.Module.to swaps whole parameters

    __tensor_unflatten__ = staticmethod(lambda inner, *_: OnGpu(inner["inside"]))

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None) -> Any:
        return _run(None, func, types, args, kwargs)


def _run(_, func, types, args=(), kwargs=None) -> Any:
    """Runs one operator: checks its devices, counts it, and computes it on the CPU."""
    kwargs = kwargs or {}
    seen, name = NOW[-1], func._schema.name.removeprefix("aten::")
    flat = leaves((*args, *kwargs.values()))
    ours = [x for x in flat if isinstance(x, OnGpu)]
    plain = [x for x in flat if isinstance(x, Tensor) and not isinstance(x, OnGpu)]
    target, wait_free = kwargs.get("device"), kwargs.get("non_blocking", False)
    to_gpu = target is not None and torch.device(target).type == "cuda"
    works = not func.is_view and name not in FREE
    if not ours and not to_gpu:
        seen.note("host", name, times=int(works))
        return func(*args, **kwargs)
    if name == "copy_" and plain and plain[0] is args[0]:
        seen.note("syncs", "copy to host")
    elif name in ("copy_", "_to_copy") and plain:
        seen.upload(plain[0], wait_free or len(args) > 2 and args[2])
    elif name == "_to_copy" and target is not None and not to_gpu:
        seen.note("syncs", "copy to host, to be waited for" if wait_free else "copy to host")
        return func(args[0].inside, **kwargs)
    else:
        _check_and_count(seen, func, name, args, flat, works)
    flat = [x.inside if isinstance(x, OnGpu) else x for x in flat]
    inner, options = changed((args, kwargs), lambda x: x.inside if isinstance(x, OnGpu) else x)
    options |= {} if target is None else {"device": torch.device("cpu")}
    options.pop("pin_memory", None)
    if name in pretend_kernels.INT4:
        if name == "_weight_int4pack_mm":
            seen.note("int4", -(-len(inner[0]) // 16), "tiles")
        return OnGpu(seen.compute(lambda: pretend_kernels.INT4[name](*inner), flat))
    in_place = func._schema.is_mutable and bool(func._schema.returns)
    out = seen.compute(lambda: func(*inner, **options), flat, in_place)
    assert not in_place or args[0].shape == inner[0].shape, f"{func} changed a shape"
    return args[0] if in_place else changed(out, lambda x: OnGpu(x) if isinstance(x, Tensor) else x)


def _check_and_count(seen: Seen, func, name: str, args: tuple, flat: list, works: bool) -> None:
    """Raises if the operator mixes devices or dtypes that CUDA does not mix; counts its launch or its wait."""
    ours = [x for x in flat if isinstance(x, OnGpu)]
    indices = [x for x in args[1] if isinstance(x, Tensor)] if name in INDEXING else []
    scalars = torch.Tag.pointwise in func.tags or name in ("fill_", "where", *INDEXING)
    for x in flat:
        if not isinstance(x, Tensor) or isinstance(x, OnGpu):
            continue
        if any(x is index for index in indices) and isinstance(args[0], OnGpu):
            seen.note("syncs", "index on the CPU")
        elif x is flat[0] and func._schema.is_mutable or x.dim() or not scalars:
            raise RuntimeError(
                f"{name}: Expected all tensors to be on the same device, but found at least two devices, "
                f"cuda:0 and cpu! (the latter {tuple(x.shape)})"
            )
    if name in ("native_layer_norm", "native_group_norm"):  # a CPU takes float32 weights for half inputs
        assert all(x.dtype == ours[0].dtype for x in ours), "a norm of two dtypes"
    if name in WAITS or any(x.dtype in (torch.bool, torch.uint8) for x in indices):
        seen.note("syncs", name)
    elif works:
        many = name.startswith(("_foreach", "_fused_a"))
        seen.note("launches", name, times=1 + len(args[0]) // 64 if many else 1)


class _Operators(TorchDispatchMode):
    __torch_dispatch__ = _run


class _Fused(torch.autograd.Function):
    """Keeps operands and result for the backward, as fused attention does."""

    @staticmethod
    def forward(ctx, attend, *tensors):
        with _disable_current_modes():
            inside = [x.inside for x in tensors]
            out = OnGpu(NOW[-1].compute(lambda: attend(*inside), inside))
        ctx.attend = attend
        ctx.save_for_backward(*tensors, out)
        return out

    @staticmethod
    def backward(ctx, grad):
        NOW[-1].note("launches", "sdpa backward", times=3)
        with _disable_current_modes(), torch.enable_grad():
            inner = [x.inside.detach().requires_grad_() for x in ctx.saved_tensors[:3]]
            found = torch.autograd.grad(ctx.attend(*inner), inner, grad.inside)
        return None, *map(OnGpu, found)


def _sdpa(seen: Seen, function, q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, **options) -> Tensor:
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    tensors = [q, k, v] + ([] if attn_mask is None else [attn_mask])
    wrong = [x for x in tensors if not isinstance(x, OnGpu) or x.dtype not in (q.dtype, torch.bool)]
    assert not wrong, f"attention with {[(x.device, x.dtype) for x in wrong]}"
    choice = pretend_kernels.sdpa_choice(seen.capability, q, k, attn_mask, is_causal)
    seen.note("sdpa", choice, "causal" if is_causal else "plain" if attn_mask is None else "masked")
    seen.note("launches", f"sdpa {choice}", times=MATH_KERNELS if choice == "math" else 1)
    seen.shapes.add((*(x.shape for x in tensors), is_causal))
    if choice == "cudnn":
        seen.plans.add((*((x.shape, x.stride()) for x in tensors), is_causal))
    if choice == "efficient" and attn_mask is not None and any(n % 8 for n in attn_mask.stride()[:-1]):
        seen.note("launches", "sdpa pads the mask", times=2)
    mask = None if attn_mask is None else attn_mask.inside
    return _Fused.apply(lambda *x: function(*x, mask, dropout_p, is_causal, **options), q, k, v)


@_disable_current_modes()
def flash_attn_with_kvcache(q, k_cache, v_cache, *, cache_seqlens, causal) -> Tensor:
    """The function of flash-attn 2, without new keys."""
    seen, operands = NOW[-1], (q, k_cache, v_cache, cache_seqlens)
    seen.note("launches", "flash_attn")
    assert all(isinstance(x, OnGpu) for x in operands), "flash-attn wants CUDA tensors"
    inside = [x.inside for x in operands]
    return OnGpu(seen.compute(lambda: pretend_kernels.flash(*inside, causal), inside))


def _stand_ins(seen: Seen, gpu: str, count: int) -> dict[tuple[Any, str], Any]:
    """Returns what takes the place of functions: (owner, name) -> stand-in."""
    name, stream, rms_norm, sdpa = f"NVIDIA {gpu}", mock.MagicMock(), F.rms_norm, F.scaled_dot_product_attention
    facts = SimpleNamespace(major=seen.capability[0], minor=seen.capability[1], total_memory=80 << 30, name=name)
    answers = {
        **{"is_available": True, "device_count": count, "current_device": 0, "get_device_name": name},
        **{"get_device_capability": seen.capability, "get_device_properties": facts, "set_device": None},
        **{"mem_get_info": (60 << 30, 80 << 30), "max_memory_allocated": 0, "manual_seed_all": None},
        **{"current_stream": stream, "Stream": stream, "stream": nullcontext(), "_lazy_init": None},
        "graph_pool_handle": (0, 1),
    }

    def pin_memory(x: Tensor, *_) -> Tensor:
        seen.pinned = [*seen.pinned[-63:], x.clone()]
        return seen.pinned[-1]

    def fused_rms_norm(x, *args, **kwargs):  # one kernel on CUDA; where a gradient is wanted, counted as its parts
        if not isinstance(x, OnGpu) or torch.is_grad_enabled():
            return rms_norm(x, *args, **kwargs)
        seen.note("launches", "_fused_rms_norm")
        with _disable_current_modes():
            return OnGpu(seen.compute(lambda: rms_norm(x.inside, *args, **kwargs), [x.inside]))

    def attention(q, *args, **kwargs):
        return _sdpa(seen, sdpa, q, *args, **kwargs) if isinstance(q, OnGpu) else sdpa(q, *args, **kwargs)

    return {(torch.cuda, what): lambda *_, _answer=answer, **__: _answer for what, answer in answers.items()} | {
        (torch.cuda, "synchronize"): lambda *_: seen.note("syncs", "synchronize"),
        (torch.cuda, "CUDAGraph"): PretendGraph,
        (torch.cuda, "graph"): PretendGraph.capturing,
        (F, "rms_norm"): fused_rms_norm,
        (F, "scaled_dot_product_attention"): attention,
        (Tensor, "pin_memory"): pin_memory,
        (Tensor, "is_pinned"): lambda x, *_: seen.is_pinned(x),
    }


@contextmanager
def pretend(root: str, gpu: str = "h100", count: int = 1) -> Iterator[Seen]:
    """Yields what is counted in files whose paths contain `root`.

    Args:
        gpu: a key of GPUS.
        count: number of GPUs that torch reports. All tensors are on the first.

    Raises:
        RuntimeError: torch is not of version TORCH.
    """
    if not torch.__version__.startswith(TORCH + "."):
        raise RuntimeError(
            f"the pretended GPU relies on private parts of torch {TORCH}, and this is {torch.__version__}: install "
            f"torch {TORCH}, or check tests/gpu/pretend_gpu.py against the new version and change TORCH there"
        )
    seen, flash = Seen(root, gpu), SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)
    switches = (
        pretend_kernels.machine().stand_in,
        torch._C._set_only_lift_cpu_tensors,
        torch.__future__.set_swap_module_params_on_conversion,
    )
    with ExitStack() as stack:
        for switch in switches:
            switch(True)
            stack.callback(switch, False)
        NOW.append(seen)
        stack.callback(NOW.pop)
        _foreach_supported_types.append(OnGpu)
        stack.callback(_foreach_supported_types.remove, OnGpu)
        stack.enter_context(mock.patch.dict(sys.modules, {"flash_attn": flash}))
        for (owner, what), stand_in in _stand_ins(seen, gpu, count).items():
            stack.enter_context(mock.patch.object(owner, what, stand_in))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # no device has a thread
        stack.enter_context(_Operators())
        yield seen
