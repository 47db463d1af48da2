"""Which device and which number format to use: explicit, checked before anything is loaded, never a hidden default."""

import logging
import os

import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """`auto` is the GPU if there is one (CUDA before Apple's), else the CPU; any other name must be usable here.

    Raises:
        InputError: the name means nothing to torch, or such a device is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device must be auto, cpu, cuda or mps, got {name!r}; try auto") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"--device {device} needs a CUDA GPU, but torch {torch.__version__} sees {count} here; "
                "use --device cpu, or install a CUDA driver and a CUDA build of torch"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("--device mps needs an Apple GPU, and torch sees none here; use --device cpu")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"--device must be auto, cpu, cuda or mps, got {device}; try auto")
    return device


def own_device(name: str) -> torch.device:
    """`resolve_device`, but of several GPUs the one that a launcher meant for this process."""
    device, local = resolve_device(name), os.environ.get("LOCAL_RANK", "")
    return resolve_device(f"cuda:{local}") if device.type == "cuda" and local.isdecimal() else device


def resolve_dtype(
    name: str | torch.dtype, device: torch.device, config: ModelConfig, quant: int | None = None
) -> torch.dtype:
    """`auto` is bf16 on CUDA (fp16 where the GPU lacks it), fp16 on Apple's GPUs, and fp32 on a CPU.

    On a CPU fp32 is the quickest format that every processor has; only when the weights would then take more than half
    of the machine's memory does `auto` mean bf16, and says so in the log. With int4 weights it is bf16 on a CPU too:
    torch's kernel for fp32 inputs was 40 times slower (`scripts/benchmarks/bench_large.py floor`).

    Raises:
        InputError: the name is unknown, or no floating-point format.
    """
    if isinstance(name, torch.dtype):
        if not name.is_floating_point:
            raise InputError(f"--dtype must be a floating-point format, got {name}; try fp32")
        return name
    if name in DTYPES:
        return DTYPES[name]
    if name != "auto":
        raise InputError(f"--dtype must be auto, fp32, bf16 or fp16, got {name!r}; try auto")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    if quant or config.int4_group:
        return torch.bfloat16
    needed, memory = 4 * config.weight_count, _physical_memory()
    if memory is not None and 2 * needed > memory:
        logger.info("weights in bf16: fp32 would take %.1f of %.1f GB of memory", needed / 1e9, memory / 1e9)
        return torch.bfloat16
    return torch.float32


def default_window(device: torch.device, int4: bool) -> int:
    """How many drafts one forward judges where the user does not say.

    Seconds an image of the demo checkpoint at windows 8, 16, 32, 64, the quicker of `noise` and `maximal` by
    `bench.py --window 8 16 32 64`, on two cores: fp32 0.70 0.54 0.57 0.67, bf16 0.48 0.39 0.37 0.41, int4 0.34
    0.36 0.45 0.66, int4 with an int8 cache 0.51 0.49 0.57 0.77; int4 by `native` on two cores with AMX 0.22 0.19 0.19
    0.22. Where two are as good, the one of fewer forwards.

    Not measured: a GPU. One that multiplies by 150 rows while it reads its weights once (A100, bf16: 312 TFLOP/s over
    2.0 TB/s) takes 64 drafts with guidance, 128 rows, for the price of one; wider windows hardly give more codes.
    """
    if device.type != "cpu":
        return 64
    return 16 if int4 else 32


def cache_bytes(config: ModelConfig, slots: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that one row of `slots` ids takes; int8 ones have a float32 scale a token and head."""
    vector = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return 2 * config.num_hidden_layers * slots * config.num_key_value_heads * vector


def _physical_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows does not tell this way
        return None
