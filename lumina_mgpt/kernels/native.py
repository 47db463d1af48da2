"""Three operators of this project's own for CPUs with AMX, built once by the compiler of the machine.

    torch.ops.lumina_mgpt.int4_linear(x, [packed, ...], group, [scale_and_zero, ...])

is torch's `_weight_int4pack_mm_for_cpu` of several matrices, but for scales that lie in the order in which they are
read (`in_order`);

    torch.ops.lumina_mgpt.int8_linear(x, numbers, scale)

is torch's `_weight_int8pack_mm`; and

    torch.ops.lumina_mgpt.one_query(q, keys, values, key_scales, value_scales, slots)

is attention of one query a row over the first `slots` slots of a cache. Shapes: x (M, K), numbers (N, K), scale (N,);
q (B, 1, N, H), keys and values (B, S, K, H) in bf16, or in int8 with float32 scales (B, S, K), slots (B,) int64. x, q,
scale and what is returned are bf16. All raise RuntimeError where that is not so. None has a gradient.

Where the processor, a compiler or the right to write to the cache folder is missing, others do the same, slower.
LUMINA_MGPT_NATIVE=0 leaves all of them out.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lumina_mgpt.config import INT4_GROUPS

logger = logging.getLogger(__name__)

OUTPUTS = 64  # a matrix of int4 must have a multiple of so many
WIDTHS = (64, 128)  # of a head
_SOURCES = tuple(Path(__file__).with_name(f"{name}.cpp") for name in (
    "operators", "int4_amx", "int8_rows", "one_query"))  # fmt: skip
_NEEDED = ("amx_tile", "amx_bf16", "avx512_bw", "avx512_vl", "avx512_vbmi", "avx512_bf16")
_FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-fopenmp", "-mavx512f", "-mavx512bw", "-mavx512vl",
          "-mavx512vbmi", "-mavx512bf16", "-mamx-tile", "-mamx-bf16",
          "-DTORCH_TARGET_VERSION=0x020a000000000000")  # fmt: skip  # the stable interface as of torch 2.10
_TORCH = Path(torch.__file__).parent
_SECONDS = 120  # that a compiler may take
_OPS = torch.library.Library("lumina_mgpt", "DEF")
for _meant in (
    "int4_linear(Tensor x, Tensor[] packed, int group, Tensor[] scale_and_zero) -> Tensor[]",
    "int8_linear(Tensor x, Tensor numbers, Tensor scale) -> Tensor",
    "one_query(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor slots) -> Tensor",
):
    _OPS.define(_meant, tags=torch.Tag.needs_exact_strides)


@torch.compiler.assume_constant_result
def ready() -> bool:
    """Whether the operators work here; builds them the first time."""
    return _works()


def multiplies(dtype: torch.dtype, outputs: int, group: int) -> bool:
    """Whether `int4_linear` works for inputs on the CPU and a matrix of this kind."""
    return dtype == torch.bfloat16 and outputs % OUTPUTS == 0 and group in INT4_GROUPS and ready()


def multiplies_int8(x: Tensor, numbers: Tensor) -> bool:
    """Whether `int8_linear` works for such rows (M, K) and numbers (N, K)."""
    fit = x.device.type == "cpu" and x.dtype == torch.bfloat16
    return fit and len(numbers) % 16 == numbers.shape[1] % 16 == 0 and ready()


def attends(q: Tensor, keys: Tensor) -> bool:
    """Whether `one_query` works for such queries (B, T, N, H) and keys (B, S, K, H)."""
    fit = q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys.dtype in (torch.bfloat16, torch.int8)
    shaped = q.shape[1] == 1 and q.shape[3] in WIDTHS and keys.stride()[1::2] == (q.shape[3], 1)
    return fit and shaped and not q.requires_grad and ready()


def in_order(scale_and_zero: Tensor) -> Tensor:
    """Shapes: (K/group, N, 2), as torch wants them, -> (N/64, K/group, 64, 2)."""
    return scale_and_zero.unflatten(1, (-1, OUTPUTS)).transpose(0, 1).contiguous()


@torch.library.register_fake("lumina_mgpt::int4_linear", lib=_OPS)
def _(x: Tensor, packed: list[Tensor], group: int, scale_and_zero: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(pairs) * OUTPUTS) for pairs in scale_and_zero]


@torch.library.register_fake("lumina_mgpt::int8_linear", lib=_OPS)
def _(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(numbers))


@torch.library.register_fake("lumina_mgpt::one_query", lib=_OPS)
def _(q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None,
      slots: Tensor) -> Tensor:  # fmt: skip
    return q.new_empty(q.shape)


@cache
def _works() -> bool:
    """Whether the operators are built, registered and tried; a word in the log where that cannot be had."""
    if os.environ.get("LUMINA_MGPT_NATIVE") == "0" or sys.platform != "linux":
        return False
    can = torch.cpu.get_capabilities()
    if not all(can.get(feature) for feature in _NEEDED):
        return False
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")
    if not compiler:
        logger.info("no C++ compiler (g++, clang++ or CXX): products and attention of int4 models are slower without")
        return False
    try:
        path = _path(compiler)
        try:
            register = _register(path) if path.exists() else _register(_built(compiler, path))
        except (OSError, AttributeError):  # damaged, or of another system that shares the folder
            register = _register(_built(compiler, path))
        if not register():
            raise OSError("the system does not let processes use the tile unit, or torch does not take the operators")
        _try()
    except (OSError, AttributeError, subprocess.SubprocessError, RuntimeError) as error:
        said = getattr(error, "stderr", None) or str(error)
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        lines = said.strip().split("\n")
        told = next((line for line in lines if "error" in line), lines[0])
        logger.warning("quicker int4 products and attention cannot be used: %s; torch's take their place", told)
        return False
    return True


def _path(compiler: list[str]) -> Path:
    """Where the library is, or is to be: in a folder of the user's own, under a name that says what it is made of.

    Raises:
        OSError: the folder, or what is there already, is another's or open to others.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    folder = (home if home.is_absolute() else Path.home() / ".cache") / "lumina_mgpt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sources = [path.read_bytes() for path in (*_SOURCES, *_SOURCES[0].parent.glob("*.h"))]
    program = shutil.which(compiler[0])
    made_of = (sources, compiler, program and os.stat(program).st_mtime, _FLAGS, torch.__version__, platform.libc_ver())
    path = folder / f"native-{hashlib.sha256(repr(made_of).encode()).hexdigest()[:16]}.so"
    for place in (folder, path):
        if place.exists():
            status = place.stat()
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise OSError(f"{place} belongs to another user or can be written by others")
    return path


def _built(compiler: list[str], path: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=path.parent) as room:  # several processes may be at it
        made = Path(room) / path.name
        command = [*compiler, *_FLAGS, f"-I{_TORCH / 'include'}", *map(str, _SOURCES), f"-L{_TORCH / 'lib'}",
                   "-ltorch_cpu", "-o", str(made)]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        made.chmod(0o700)
        made.replace(path)
    return path


def _register(path: Path) -> Callable[[], bool]:
    """What registers the operators of a library; nothing but loading it has happened yet."""
    register = ctypes.CDLL(str(path)).lumina_mgpt_register
    register.restype = ctypes.c_bool
    return register


def _try() -> None:
    """How torch packs a matrix is its own affair, so small products are compared before one is relied on.

    Raises:
        RuntimeError: one differs from torch's.
    """
    for M, N, K, group in ((3, OUTPUTS, 64, 32), (17, 2 * OUTPUTS, 256, 128)):
        with torch.device("cpu"):
            numbers = (torch.arange(N * K, dtype=torch.int32) * 7 // 3 % 16).view(N, K)
            x = torch.linspace(-1, 1, M * K).view(M, K).bfloat16()
            scale_and_zero = torch.linspace(0.1, 1, K // group * N * 2).view(K // group, N, 2).bfloat16()
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1)
        wanted = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group, scale_and_zero).float()
        for out in torch.ops.lumina_mgpt.int4_linear(x, [packed] * 2, group, [in_order(scale_and_zero)] * 2):
            if not (out - wanted).norm() < 0.01 * wanted.norm():
                raise RuntimeError("they do not agree with torch's")
