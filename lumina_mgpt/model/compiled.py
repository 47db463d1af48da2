"""Compiled steps: the shapes that they have, and the choice between a compiled and an eager step."""

import functools
import logging
import shutil
import time
from collections.abc import Callable
from types import FunctionType, MethodType

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.transformer import Transformer

logger = logging.getLogger(__name__)

Forward = Callable[..., Tensor]

# Shapes of a compiled step on a CPU, each compiled once: one id, two ids (a code and the end of its row), or a multiple
# of IDS; and a multiple of 1/PARTS of the cache. Caches have a multiple of _SLOTS slots, so that prompts of similar
# lengths have the same shapes.
IDS, PARTS, _SLOTS = 8, 4, 64
COMPILED_SPARE = IDS - 1  # cache slots that a compiled step needs for its pads
SHAPES = 64  # at most this many shapes are compiled: torch checks the guards of one after the other
# torch's own limit, 8 by default, raises an error above it. It counts more than shapes, such as other numbers of
# threads.
_RECOMPILATIONS = 4 * SHAPES
# Steps of a shape are timed in this many rounds, or fewer of them if they take more than this many seconds in total.
_ROUNDS, _LEAST_ROUNDS, _SECONDS = 5, 2, 2.0


class CompiledForward:
    """A compiled forward, and the eager one for steps where that is faster.

    A call runs the compiled forward. `step` runs the faster one.

    Args:
        model: the model.
        compiled: its compiled forward, which compiles each input shape at its first use.
    """

    def __init__(self, model: Transformer, compiled: Forward) -> None:
        self.model, self._compiled = model, compiled
        self._shapes: set[tuple[int, ...]] = set()  # compiled and timed: rows, ids, slots read, slots of the cache
        self._eager: set[tuple[int, int]] = set()  # rows and ids of steps whose eager forward is faster
        self._full = False  # whether the log says that there are too many shapes
        self._failed = False  # whether the compiler has failed

    def __call__(self, ids: Tensor, *, positions: Tensor, cache: KVCache, filled: int) -> Tensor:
        """Returns the result of the compiled forward. Arguments: as `Transformer.forward`."""
        return self._compiled(ids, positions=positions, cache=cache, filled=filled)

    def step(self, ids: Tensor, positions: Tensor, cache: KVCache, filled: int) -> Tensor:
        """Returns the hidden states of a step on a CPU, compiled unless the eager step is faster.

        The first step of a shape is compiled. It then runs a few more times, compiled and eager, to see which is
        faster; this writes the same slots of the cache again. If the eager step is faster, all later steps with the
        same number of rows and ids are eager, whatever part of the cache they read. If the compiler fails, a warning is
        logged, and all later steps of new shapes are eager.

        Args:
            cache: has spare slots for pads: `compiled_spare`.

        Shapes: ids, positions (R, T) -> (R, T or more, D). Results after the first T belong to pads.
        """
        padded_ids, padded_positions, read = padded(ids, positions, filled, cache.slots)
        rows, count = padded_ids.shape
        shape = rows, count, read, cache.slots
        eager = functools.partial(self.model, ids, positions=positions, cache=cache, filled=filled)
        compiled = functools.partial(self, padded_ids, positions=padded_positions, cache=cache, filled=read)
        if (rows, count) in self._eager:
            return eager()
        if shape in self._shapes:
            return compiled()
        if self._failed:
            return eager()
        if len(self._shapes) == SHAPES:
            if not self._full:
                logger.info("%d shapes of steps are compiled; steps of other shapes stay eager", SHAPES)
            self._full = True
            return eager()
        try:
            compiled()  # compiles it
        except (RuntimeError, OSError) as error:  # must not end the run
            logger.warning("compilation failed, steps stay eager: %s", str(error).strip().split("\n")[0])
            self._failed = True
            return eager()
        self._shapes.add(shape)
        hidden, eager_seconds, seconds = _timed(eager, compiled)
        if seconds > eager_seconds:
            self._eager.add((rows, count))
            logger.info(
                "steps of %d x %d ids stay eager: compiled steps are slower, %.2f ms against %.2f",
                *(rows, count, 1000 * seconds, 1000 * eager_seconds),
            )
        return hidden


def _timed(eager: Callable[[], Tensor], compiled: Callable[[], Tensor]) -> tuple[Tensor, float, float]:
    """Returns the result of `compiled`, and the least seconds of both functions, which run in turn."""
    seconds: dict[Callable[[], Tensor], list[float]] = {eager: [], compiled: []}
    began = time.perf_counter()
    for done in range(_ROUNDS):
        if done >= _LEAST_ROUNDS and time.perf_counter() - began > _SECONDS:
            break
        for work, taken in seconds.items():
            before = time.perf_counter()
            hidden = work()
            taken.append(time.perf_counter() - before)
    return hidden, min(seconds[eager]), min(seconds[compiled])


def padded(ids: Tensor, positions: Tensor, filled: int, slots: int) -> tuple[Tensor, Tensor, int]:
    """Pads ids and positions at their ends to one of few shapes, and rounds `filled` up. Shapes: both (R, T)."""
    T, part = ids.shape[1], -(-slots // PARTS)
    if T > 2 and (pads := -T % IDS):
        ids, filled = F.pad(ids, (0, pads)), filled + pads
        positions = torch.cat([positions, positions[:, -1:] + 1 + torch.arange(pads)], 1)
    return ids, positions, min(slots, part * -(-filled // part))


def compiled_spare(length: int, spare: int = 0) -> int:
    """Returns the number of spare slots of a cache for compiled steps: at least `spare` besides those for pads.

    Args:
        length: largest number of ids in one sequence.
    """
    slots = length + spare + COMPILED_SPARE
    return slots + -slots % _SLOTS - length


def compile_forward(model: Transformer) -> CompiledForward:
    """Returns the model's forward with torch.compile. Each input shape is compiled at its first use.

    On CUDA, `CachedStep` captures the compiled code as graphs. Weights and settings of the model must not change
    afterwards.
    """
    logger.info("compiling: the first step of each shape takes a minute or more")
    options: dict[str, str | int | bool | Callable] = {
        # Without this, each step checks whether a weight was replaced: 0.3 ms for eight layers.
        "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
    }
    compiled = torch.compile(_with_own_code(model.forward), options=options, dynamic=False, fullgraph=True)
    return CompiledForward(model, limited(compiled, _RECOMPILATIONS))


def limited(compiled: Forward, count: int) -> Forward:
    """Returns a wrapper of `compiled` that raises torch's limit of recompilations to `count` during each call."""

    @functools.wraps(compiled)
    def call(*args, **kwargs) -> Tensor:
        before = torch._dynamo.config.recompile_limit  # torch imports `_dynamo` at its first use
        torch._dynamo.config.recompile_limit = count  # config.patch takes 80 us a call, this 17
        try:
            return compiled(*args, **kwargs)
        finally:
            torch._dynamo.config.recompile_limit = before

    return call


def _with_own_code(method: Callable[..., Tensor]) -> Forward:
    """Returns a bound method with a copy of its code object.

    torch.compile caches compiled code with the code object, and the guards are off: models of one class would share it.
    """
    assert isinstance(method, MethodType) and isinstance(method.__func__, FunctionType)
    function = method.__func__
    copy = FunctionType(function.__code__.replace(), function.__globals__, closure=function.__closure__)
    copy.__defaults__, copy.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
    return MethodType(copy, method.__self__)


def has_compiler(device: torch.device) -> bool:
    """Returns whether torch.compile finds a compiler for this device: triton on CUDA, otherwise a C++ compiler."""
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
    """Raises an error if torch.compile finds no compiler for this device.

    Raises:
        InputError: triton or a C++ compiler is missing.
    """
    if has_compiler(device):
        return
    if device.type == "cuda":
        raise InputError("needs the triton package on CUDA; pip install triton, or leave it out", "compile")
    raise InputError("needs a C++ compiler on a CPU, and there is none; install g++, or leave it out", "compile")
