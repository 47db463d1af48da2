"""Compiles and loads the C++ kernels. The compiled library is cached in the user's cache folder.

The kernels need x86 with AVX-512 VNNI, Linux, and a C++ compiler. LUMINA_MGPT_NATIVE=0 switches them off. Where the
processor has AMX, products of many rows use it.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch

_SOURCES = tuple(
    Path(__file__).with_name(f"{name}.cpp")
    for name in ("operators", "int4_rows", "int4_amx", "int8_rows", "heads", "one_query")
)
_FEATURES = ("avx512_f", "avx512_bw", "avx512_vl", "avx512_vnni")
_TILE_FEATURES = ("amx_tile", "amx_int8")
_FLAGS = (
    "-O3",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-mavx512f",
    "-mavx512bw",
    "-mavx512vl",
    "-mavx512vnni",
    "-mfma",
    "-mamx-tile",
    "-mamx-int8",
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # the stable interface of torch 2.10
)
_TORCH = Path(torch.__file__).parent
_COMPILE_SECONDS = 120  # time limit of the compiler
# Linux: arch/x86/include/asm/unistd_64.h and documentation of "XSTATE features".
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18


def machine_supports() -> bool:
    """Returns whether this machine can build and run the kernels. Does not check that their results are correct."""
    return processor_supports() and bool(compiler())


def processor_supports() -> bool:
    """Returns whether the system is Linux, the processor has AVX-512 VNNI, and the kernels are switched on."""
    if os.environ.get("LUMINA_MGPT_NATIVE") == "0" or sys.platform != "linux":
        return False
    return _has(_FEATURES)


def _has(features: tuple[str, ...]) -> bool:
    capabilities = torch.cpu.get_capabilities()
    return all(capabilities.get(feature) for feature in features)


def compiler() -> list[str]:
    """Returns the command of the C++ compiler: the variable CXX, else g++, else clang++, else an empty list."""
    return shlex.split(os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or "")


def tiles_allowed() -> bool:
    """Returns whether the processor has AMX and the system, which is asked here, lets this process use it."""
    if not _has(_TILE_FEATURES):
        return False
    arguments = (_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA)
    return ctypes.CDLL(None).syscall(*map(ctypes.c_long, arguments)) == 0


def load(tiles: bool) -> None:
    """Registers the operators of the cached library. Compiles the library first if it is missing or damaged.

    Args:
        tiles: whether products of many rows use AMX. A second call changes this.

    Raises:
        OSError: the cache folder cannot be used, or torch refuses the operators.
        subprocess.SubprocessError: the compiler fails, or exceeds its time limit.
    """
    command = compiler()
    path = library_path(command)
    try:
        register = _register(path) if path.exists() else _register(compile_library(command, path))
    except (OSError, AttributeError):  # damaged, or written by another system that shares the folder
        register = _register(compile_library(command, path))
    if not register(tiles):
        raise OSError("torch does not take the operators")


def library_path(command: list[str]) -> Path:
    """Returns the path of the cached library, which need not exist yet. Creates its folder.

    The file name has a hash of everything that the build depends on, such as sources, compiler and torch's version.

    Args:
        command: command of the C++ compiler.

    Raises:
        OSError: the folder cannot be made, or the folder or the library belongs to another user or is writable by
            others.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or "")
    folder = (home if home.is_absolute() else Path.home() / ".cache") / "lumina_mgpt"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sources = [path.read_bytes() for path in (*_SOURCES, *_SOURCES[0].parent.glob("*.h"))]
    program = shutil.which(command[0])
    inputs = (sources, command, program and os.stat(program).st_mtime, _FLAGS, torch.__version__, platform.libc_ver())
    path = folder / f"native-{hashlib.sha256(repr(inputs).encode()).hexdigest()[:16]}.so"
    for checked in (folder, path):
        if checked.exists():
            status = checked.stat()
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise OSError(f"{checked} belongs to another user or can be written by others")
    return path


def compile_library(command: list[str], path: Path) -> Path:
    """Compiles the sources to the library `path`, and returns `path`. The complete file appears in one step.

    Args:
        command: command of the C++ compiler.

    Raises:
        OSError: the compiler cannot be started, or the folder cannot be written.
        subprocess.SubprocessError: the compiler fails, or exceeds its time limit.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # several processes may compile at the same time
        library = Path(folder) / path.name
        arguments = [*_FLAGS, f"-I{_TORCH / 'include'}", *map(str, _SOURCES), f"-L{_TORCH / 'lib'}", "-ltorch_cpu"]
        line = [*command, *arguments, "-o", str(library)]
        subprocess.run(line, check=True, capture_output=True, text=True, timeout=_COMPILE_SECONDS)
        library.chmod(0o700)
        library.replace(path)
    return path


def _register(path: Path) -> Callable[[bool], bool]:
    """Returns the library's function that registers its operators; loading the library alone registers nothing."""
    register = ctypes.CDLL(str(path)).lumina_mgpt_register
    register.restype, register.argtypes = ctypes.c_bool, [ctypes.c_bool]
    return register
