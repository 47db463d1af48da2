"""Devices, number formats and the defaults that depend on them, checked before anything is loaded."""

import logging
import os

import torch

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError

logger = logging.getLogger(__name__)

_CACHE_LIMIT = 1 << 30  # bytes of keys and values in an automatic batch on a CPU
LARGEST_AUTO_BATCH = 8
LARGEST_PLAIN_BATCH = 32  # on a CPU
_FREE_SHARE = 0.9  # of a GPU's free memory that a batch may take; the rest is for fragments and kernels' workspaces

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device of a name; `auto` is a CUDA GPU if there is one, else an Apple GPU, else the CPU.

    Raises:
        InputError: the name is unknown, or this machine has no device of that name.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"must be auto, cpu, cuda or mps, got {name!r}; try auto", "device") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(
                f"{device} needs a CUDA GPU, but torch {torch.__version__} finds {count} here; use device=cpu, or "
                "install a CUDA driver and a CUDA build of torch",
                "device",
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("mps needs an Apple GPU, but torch finds none here; use device=cpu", "device")
    elif device.type not in ("cpu", "mps"):
        raise InputError(f"must be auto, cpu, cuda or mps, got {device}; try auto", "device")
    return device


def own_device(name: str, rank: int | None = None) -> torch.device:
    """Returns the device of a name; for a CUDA GPU, the one that the launcher assigned to this process, if any.

    Args:
        rank: index of this process among several that were started without a launcher. They take the GPUs in turn,
            unless `name` has the index of one.

    Raises:
        InputError: as `resolve_device`.
    """
    device, local = resolve_device(name), os.environ.get("LOCAL_RANK", "")
    if device.type == "cuda" and local.isdecimal():
        return resolve_device(f"cuda:{local}")
    if device.type == "cuda" and device.index is None and rank is not None:
        return torch.device("cuda", rank % torch.cuda.device_count())
    return device


def resolve_dtype(
    name: str | torch.dtype, device: torch.device, config: ModelConfig, quant: int | None = None
) -> torch.dtype:
    """Returns the number format of a name.

    `auto` is bf16 on CUDA (fp16 on GPUs without bf16) and fp16 on Apple GPUs. On a CPU, `auto` is fp32, the fastest
    format that every processor supports, with two exceptions:

    - bf16, with a line in the log, if fp32 weights exceed half of the memory;
    - bf16 with int4 weights. torch's int4 kernel is 40 times slower with fp32 inputs (measured by
      `scripts/benchmarks/bench_large.py floor`).

    The last layer of a first-generation model overflows fp16. Its `auto` is fp32 where it would be fp16.

    Args:
        quant: group size if the weights are quantized to int4 while loading, else None.

    Raises:
        InputError: the name is unknown or not a floating-point format, or the model overflows the format.
    """
    if isinstance(name, torch.dtype):
        if not name.is_floating_point:
            raise InputError(f"must be a floating-point format, got {name}; try fp32", "dtype")
        return _checked(name, config)
    if name in DTYPES:
        return _checked(DTYPES[name], config)
    if name != "auto":
        raise InputError(f"must be auto, fp32, bf16 or fp16, got {name!r}; try auto", "dtype")
    narrow = torch.float16 if config.family.fits_fp16 else torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else narrow
    if device.type == "mps":
        return narrow
    if quant or config.int4_group:
        return torch.bfloat16
    needed, memory = 4 * config.weight_count, _physical_memory()
    if memory is not None and 2 * needed > memory:
        logger.info("weights in bf16: fp32 would take %.1f of %.1f GB of memory", needed / 1e9, memory / 1e9)
        return torch.bfloat16
    return torch.float32


def _checked(dtype: torch.dtype, config: ModelConfig) -> torch.dtype:
    """Returns `dtype`; raises InputError if activations of the model overflow it."""
    if dtype == torch.float16 and not config.family.fits_fp16:
        rule = f"must be bf16 or fp32 for {config.family.name}, whose last layer overflows fp16"
        raise InputError(f"{rule} (its activations reach 270,000, fp16 ends at 65,504); try bf16", "dtype")
    return dtype


def default_window(device: torch.device, int4: bool) -> int:
    """Returns the default number of drafts that one forward verifies.

    On a CPU it is the fastest window in this table, the wider one of equals. The table has the seconds per image of
    the demo checkpoint on two cores, with the faster of the couplings `noise` and `maximal`
    (`scripts/benchmarks/bench.py --window 8 16 32 64`):

    | window | fp32 | bf16 | int4 | int4, int8 cache | int4, AMX kernel |
    | --- | --- | --- | --- | --- | --- |
    | 8 | 0.70 | 0.48 | 0.34 | 0.51 | 0.22 |
    | 16 | 0.54 | 0.39 | 0.36 | 0.49 | 0.19 |
    | 32 | 0.57 | 0.37 | 0.45 | 0.57 | 0.19 |
    | 64 | 0.67 | 0.41 | 0.66 | 0.77 | 0.22 |

    The values for GPUs are estimates. An A100 in bf16 (312 TFLOP/s, 2.0 TB/s) multiplies about 150 rows in the time
    that it takes to read the weights, so 64 drafts with guidance (128 rows) cost about as much as one code. Wider
    windows accept hardly more codes. With int4 weights on CUDA, 8 drafts with guidance are the 16 rows of one pass of
    torch's kernel. 16 drafts take two passes. From 33 rows on, the weights are dequantized for each forward, which
    moves over ten times the bytes of a pass, and 64 drafts accept only 2.3 times the codes of 8.
    """
    if device.type == "cuda":
        return 8 if int4 else 64
    if device.type != "cpu":
        return 64
    return 16 if int4 else 32


def cache_bytes(config: ModelConfig, slots: int, dtype: torch.dtype) -> int:
    """Returns the bytes of the keys and values that the KV cache holds for one sequence, all layers together.

    Args:
        slots: number of ids of the sequence.
        dtype: type of keys and values; int8 adds a float32 scale per token and head.
    """
    vector = config.head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0)
    return 2 * config.num_hidden_layers * slots * config.num_key_value_heads * vector


def activation_bytes(config: ModelConfig, ids: int, dtype: torch.dtype) -> int:
    """Returns the bytes of temporaries of a forward over `ids` ids: eight vectors of the model's width, three inner."""
    return ids * (8 * config.hidden_size + 3 * config.intermediate_size) * dtype.itemsize


def largest_batch(device: torch.device, speculative: bool) -> int:
    """Returns the largest number of images in an automatic batch.

    It is 32 for plain sampling on a CPU, where a product of 64 rows takes 0.6 of the time per row of one of 16: 32
    images of the demo take 1.75 times as long in batches of 8 (`scripts/benchmarks/bench_demo.py images`). Elsewhere it
    is 8. A window of drafts has enough rows.
    """
    return LARGEST_PLAIN_BATCH if device.type == "cpu" and not speculative else LARGEST_AUTO_BATCH


def free_memory(device: torch.device) -> int:
    """Returns the bytes of a CUDA device that torch can still allocate: free ones, and those that its cache holds."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def batch_limit(device: torch.device, reserve: int = 0) -> int:
    """Returns the bytes that an automatic batch may take: 1 GiB; on a CUDA GPU, 90 % of the free memory.

    Args:
        reserve: bytes of a GPU that other work needs meanwhile.
    """
    return int(_FREE_SHARE * (free_memory(device) - reserve)) if device.type == "cuda" else _CACHE_LIMIT


def _physical_memory() -> int | None:
    """Returns the bytes of physical memory, None where the system does not report them."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
