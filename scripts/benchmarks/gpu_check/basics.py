"""Stage `environment`: versions, the GPU, its memory and its speed."""

import importlib.metadata
import platform
import shutil
import subprocess

import torch

from gpu_check.check import Check
from gpu_check.setup import cores, host_bytes
from lumina_mgpt.model.compiled import has_compiler

_PACKAGES = {"triton": ("triton", "pytorch-triton"), "flash-attn": ("flash-attn",), "peft": ("peft",)}


def environment(check: Check) -> None:
    """Records what the figures depend on. Fails where torch does not serve the GPU."""
    device, versions = check.device, versions_of()
    for name, version in versions.items():
        check.record(name, name, version, version or "not installed")
    check.record("device", "device", name_of(device), name_of(device))
    if device.type == "cuda":
        _gpu(check)
    check.record("cores", "CPU cores", cores(), str(cores()))
    host = host_bytes()
    if host is not None:
        check.record("host_gb", "free memory of the host", round(host / 1e9, 1), f"{host / 1e9:.1f} GB")
    found = has_compiler(device)
    check.record("compiler", "compiler for torch.compile", str(found), "found" if found else "not found")
    gb = check.setup.bandwidth / 1e9
    check.record("bandwidth_gb_s", "memory bandwidth for reading", round(gb, 1), f"{gb:.0f} GB/s")


def _gpu(check: Check) -> None:
    facts = torch.cuda.get_device_properties(check.device)
    capability = f"{facts.major}.{facts.minor}"
    check.record("capability", "compute capability", capability, capability)
    free, total = torch.cuda.mem_get_info(check.device)
    check.record("gpu_gb", "memory of the GPU", round(total / 1e9, 1), f"{total / 1e9:.1f} GB")
    few = f"at least {0.9 * total / 1e9:.1f} GB, with no other program on the GPU"
    check.record("free_gb", "free memory of the GPU", round(free / 1e9, 1), f"{free / 1e9:.1f} GB", few)
    a = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
    moved = a.to(check.device)
    error = float(((moved @ moved).cpu().double() - a.double() @ a.double()).abs().max())
    check.record("product_error", "error of a float32 product", error, f"{error:.1e}", "at most 0.001", error <= 1e-3)


def versions_of() -> dict[str, str | None]:
    """Returns the versions of Python, torch, CUDA, the driver and optional packages; None where there is none."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    found |= {"cuda": torch.version.cuda, "driver": _driver()}
    for name, packages in _PACKAGES.items():
        found[name] = next((version for package in packages if (version := _version(package))), None)
    return found


def name_of(device: torch.device) -> str:
    """Returns the name of the GPU, or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU ({platform.machine()})"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """Returns the version of NVIDIA's driver, None where nvidia-smi does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    line = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(line, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None
