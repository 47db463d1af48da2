"""Three operators of this project's own for CPUs with AMX, built once by the compiler of the machine.

    torch.ops.lumina_mgpt.int4_linear(x, packed, group, scale_and_zero)

is torch's `_weight_int4pack_mm_for_cpu`, but for scales that lie in the order in which they are read (`in_order`), and

    torch.ops.lumina_mgpt.one_query(q, keys, values, key_scales, value_scales, slots)

is attention of one query a row over a cache. Where the processor, a compiler or the right to write to the cache folder
is missing, others do the same, slower. LUMINA_MGPT_NATIVE=0 leaves all of them out.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lumina_mgpt.config import INT4_GROUPS

logger = logging.getLogger(__name__)

OUTPUTS = 64  # a matrix must have a multiple of so many
WIDTHS = (64, 128)  # of a head
_SOURCES = tuple(Path(__file__).with_name(name) for name in ("int4_amx.cpp", "int8_rows.cpp", "one_query.cpp"))
_NEEDED = ("amx_tile", "amx_bf16", "avx512_bw", "avx512_vl", "avx512_vbmi", "avx512_bf16")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl",
          "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16")  # fmt: skip
_SECONDS = 120  # that a compiler may take
_OPS = torch.library.Library("lumina_mgpt", "DEF")
_OPS.define("int4_linear(Tensor x, Tensor packed, int group, Tensor scale_and_zero) -> Tensor",
            tags=torch.Tag.needs_exact_strides)  # fmt: skip
_OPS.define("int8_linear(Tensor x, Tensor numbers, Tensor scale) -> Tensor", tags=torch.Tag.needs_exact_strides)
_OPS.define("one_query(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor slots) "
            "-> Tensor", tags=torch.Tag.needs_exact_strides)  # fmt: skip


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Whether the operators work here; builds them the first time."""
    return _library() is not None


def multiplies(dtype: torch.dtype, outputs: int, group: int) -> bool:
    """Whether `int4_linear` works here, for inputs and a matrix of this kind."""
    return dtype == torch.bfloat16 and outputs % OUTPUTS == 0 and group in INT4_GROUPS and ready()


def in_order(scale_and_zero: Tensor) -> Tensor:
    """Shapes: (K/group, N, 2), as torch wants them, -> (N/64, K/group, 64, 2)."""
    return scale_and_zero.unflatten(1, (-1, OUTPUTS)).transpose(0, 1).contiguous()


@torch.library.impl(_OPS, "int4_linear", "CPU")
def _int4_linear(x: Tensor, packed: Tensor, group: int, scale_and_zero: Tensor) -> Tensor:
    (M, K), N = x.shape, len(scale_and_zero) * OUTPUTS
    out = x.new_empty(M, N)
    pointers = (tensor.data_ptr() for tensor in (x, packed, scale_and_zero, out))
    _library().int4_amx(*pointers, M, N, K, group, torch.get_num_threads())
    return out


@torch.library.register_fake("lumina_mgpt::int4_linear", lib=_OPS)
def _(x: Tensor, packed: Tensor, group: int, scale_and_zero: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], len(scale_and_zero) * OUTPUTS)


def multiplies_int8(x: Tensor, numbers: Tensor) -> bool:
    """Whether `int8_linear` works here, for such rows (M, K) and numbers (N, K)."""
    fit = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return fit and len(numbers) % 16 == numbers.shape[1] % 16 == 0 and ready()


@torch.library.impl(_OPS, "int8_linear", "CPU")
def _int8_linear(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    (M, K), N = x.shape, len(numbers)
    assert numbers.shape == (N, K) and scale.shape == (N,) and numbers.is_contiguous() and scale.dtype == x.dtype
    out = x.new_empty(M, N)
    pointers = (tensor.data_ptr() for tensor in (x, numbers, scale, out))
    _library().int8_rows(*pointers, M, N, K, torch.get_num_threads())
    return out


@torch.library.register_fake("lumina_mgpt::int8_linear", lib=_OPS)
def _(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(numbers))


def attends(q: Tensor, keys: Tensor) -> bool:
    """Whether `one_query` works here, for such queries (B, T, N, H) and keys (B, S, K, H)."""
    fit = q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys.dtype in (torch.bfloat16, torch.int8)
    shaped = q.shape[1] == 1 and q.shape[3] in WIDTHS and keys.stride()[1::2] == (q.shape[3], 1)
    return fit and shaped and not q.requires_grad and ready()


@torch.library.impl(_OPS, "one_query", "CPU")
def _one_query(q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None,
               slots: Tensor) -> Tensor:  # fmt: skip
    q, (B, _, N, H) = q.contiguous(), q.shape
    assert keys.stride() == values.stride() and len(slots) == B and slots.dtype == torch.int64
    out, apart = torch.empty_like(q), (0, 0, 0)
    if key_scales is not None:
        apart = key_scales.stride()
        assert apart == value_scales.stride() and apart[1] == 1
    pointers = [None if t is None else t.data_ptr() for t in (q, keys, values, key_scales, value_scales, slots, out)]
    _library().one_query(*pointers, B, N, keys.shape[2], H, keys.stride(0), keys.stride(2), apart[0], apart[2], H**-0.5,
                         torch.get_num_threads())  # fmt: skip
    return out


@torch.library.register_fake("lumina_mgpt::one_query", lib=_OPS)
def _(q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None,
      slots: Tensor) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@cache
def _library() -> ctypes.CDLL | None:
    """The built and tried library; None, with a word in the log, where that cannot be had."""
    can = torch.cpu.get_capabilities()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if os.environ.get("LUMINA_MGPT_NATIVE") == "0" or not all(can.get(feature) for feature in _NEEDED):
        return None
    if not compiler:
        logger.info("no C++ compiler (g++, clang++ or CXX): products and attention of int4 models are slower without")
        return None
    try:
        library = ctypes.CDLL(str(_built(compiler)))
        library.int4_amx.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 5
        library.one_query.argtypes = [ctypes.c_void_p] * 7 + [ctypes.c_long] * 8 + [ctypes.c_float, ctypes.c_long]
        library.int8_rows.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long] * 4
        library.int4_amx.restype = library.int8_rows.restype = library.one_query.restype = None
        if not library.int4_amx_allowed():
            raise OSError("the system does not let processes use the tile unit")
        _try(library)
    except (OSError, subprocess.SubprocessError, RuntimeError) as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        logger.warning("quicker int4 products and attention cannot be built: %s; torch's are used", said.split("\n")[0])
        return None
    return library


def _built(compiler: str) -> Path:
    """Path of the library, in the user's cache folder: compiled if it is not there yet."""
    key = hashlib.sha256(repr(([path.read_bytes() for path in _SOURCES], compiler, _FLAGS)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lumina_mgpt"
    path = folder / f"native-{key}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as room:  # several processes may be at it
            made = Path(room) / path.name
            subprocess.run([compiler, *_FLAGS, *map(str, _SOURCES), "-o", str(made)], check=True, capture_output=True,
                           text=True, timeout=_SECONDS)  # fmt: skip
            made.replace(path)
    return path


def _try(library: ctypes.CDLL) -> None:
    """How torch packs a matrix is its own affair, so a small product is compared before one is relied on.

    Raises:
        RuntimeError: it differs from torch's.
    """
    N, K, group = OUTPUTS, 64, 32
    numbers = (torch.arange(N * K, dtype=torch.int32) * 7 // 3 % 16).view(N, K)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
    x = torch.linspace(-1, 1, 3 * K).view(3, K).bfloat16()
    scale_and_zero = torch.linspace(0.1, 1, K // group * N * 2).view(K // group, N, 2).bfloat16()
    wanted = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_zero)
    out = torch.empty_like(wanted)
    tensors = x, packed, in_order(scale_and_zero), out
    library.int4_amx(*(tensor.data_ptr() for tensor in tensors), len(x), N, K, group, 1)
    if not torch.allclose(out.float(), wanted.float(), rtol=0.02, atol=0.02):
        raise RuntimeError("it does not agree with torch's")
