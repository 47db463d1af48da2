"""The model as samplers see it: ids in, logits of image codes out, with keys and values kept in between."""

import logging
import shutil
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.transformer import Transformer

logger = logging.getLogger(__name__)

# Compiled steps come in few shapes, each of which is compiled once: one id, two (a code and a row's end), or a multiple
# of _IDS; and a cache that is filled to so many of _PARTS equal parts.
_IDS, _PARTS = 8, 4
_SHAPES = 64  # limit of compiled shapes; torch's own, 8, is below what windows need
COMPILED_SPARE = _IDS - 1  # cache slots that the pads of a compiled step may write junk into


class CachedStep:
    """One sampler's model: slot equals position in each row, so a row that is fed again overwrites what was there.

    With `compiled` (from `compile_forward`) every step but the first, which reads the prompts, has a shape out of a
    few; pads write junk into slots above a row's end, which it overwrites before it can see them.
    """

    def __init__(self, model: Transformer, cache: KVCache, columns: slice, compiled=None) -> None:
        self.model, self.cache, self.columns, self.compiled = model, cache, columns, compiled
        self.device = next(model.parameters()).device
        self.calls = 0

    def __call__(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        """ids, positions (R, T) and read (R, Q), all int64 -> logits (R, Q, C) after the ids at columns `read`."""
        self.calls += 1
        if self.calls > 1:
            return self._later(ids, positions, read)
        T = ids.shape[1]
        assert torch.equal(positions, torch.arange(T).expand_as(positions))  # so that no mask is needed
        # The images of one prompt read it once, and all the rows without a prompt are one.
        rows, source = torch.cat([ids, read], 1).unique(dim=0, return_inverse=True)
        source = source.to(self.device, non_blocking=True)
        hidden = self.model(rows[:, :T].to(self.device, non_blocking=True), positions=0, cache=self.cache, filled=T)
        self.cache.spread(source, T)
        return self._logits(hidden, rows[:, T:])[source]

    def _later(self, ids: Tensor, positions: Tensor, read: Tensor) -> Tensor:
        forward, filled = self.model, int(positions.max()) + 1  # on the CPU: no synchronisation with a GPU
        if self.compiled:
            forward = self.compiled
            ids, positions, filled = _static(ids, positions, filled, self.cache.slots)
            torch.compiler.cudagraph_mark_step_begin()  # the last step's hidden states may be overwritten
        ids, positions = (tensor.to(self.device, non_blocking=True) for tensor in (ids, positions))
        return self._logits(forward(ids, positions=positions, cache=self.cache, filled=filled), read)

    def _logits(self, hidden: Tensor, read: Tensor) -> Tensor:
        if hidden.shape[1] > 1:
            read = read.to(self.device, non_blocking=True)
            hidden = hidden.gather(1, read[..., None].expand(-1, -1, hidden.shape[-1]))  # (R, Q, D)
        return self.model.project(hidden, self.columns)


def _static(ids: Tensor, positions: Tensor, filled: int, slots: int) -> tuple[Tensor, Tensor, int]:
    """The same call with pads at its end, in one of few shapes, and how many slots it reads. Shapes: (R, T) both."""
    T, part = ids.shape[1], -(-slots // _PARTS)
    if T > 2 and (pads := -T % _IDS):
        ids, filled = F.pad(ids, (0, pads)), filled + pads
        positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(pads)], 1)
    return ids, positions, min(slots, part * -(-filled // part))


def compile_forward(model: Transformer):
    """The model's forward, compiled for each shape at its first use; on CUDA as graphs that are replayed.

    The model's weights and settings must stay what they are from then on.
    """
    device = next(model.parameters()).device
    logger.info("--compile: the first steps of each kind wait a minute or more for the compiler")
    options = {
        "triton.cudagraphs": device.type == "cuda",  # as the mode "reduce-overhead" does
        # Whether any of several hundred weights has been replaced is asked at every step else: 0.3 ms for eight layers.
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    }
    compiled = torch.compile(_own(model.forward), options=options, dynamic=False, fullgraph=True)

    @torch._dynamo.config.patch(recompile_limit=_SHAPES)  # of this function alone, not of the process
    def forward(*args, **kwargs):
        return compiled(*args, **kwargs)

    return forward


def _own(method: MethodType) -> MethodType:
    """The same method with a code object of its own: what was compiled is kept with that, and nothing else would tell
    models of one class apart."""
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return MethodType(copy, method.__self__)


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile has a compiler for this device."""
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        return has_triton()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        return bool(shutil.which(get_cpp_compiler()))
    except InvalidCxxCompiler:
        return False


def require_compiler(device: torch.device) -> None:
    """Raises InputError where torch.compile has no compiler for this device."""
    if has_compiler(device):
        return
    if device.type == "cuda":
        raise InputError("--compile needs the triton package on CUDA; pip install triton, or leave it out")
    raise InputError("--compile needs a C++ compiler on a CPU, and there is none; install g++, or leave it out")
