"""Decides whether a native kernel or torch's slower operator is used; no other module decides this.

The first check in a process builds the kernels and compares small products with those of float matrices.
"""

import logging
import subprocess
from functools import cache

import torch
from torch import Tensor

from lumina_mgpt.config import INT4_GROUPS
from lumina_mgpt.kernels import build, ops

logger = logging.getLogger(__name__)


def serves_int4(device: torch.device, dtype: torch.dtype, outputs: int, group: int) -> bool:
    """Returns whether `int4_linear` supports inputs of this dtype and a matrix of this size.

    Args:
        outputs: number of outputs, which are the rows of the matrix.
        group: number of weights that share a scale.
    """
    fits = device.type == "cpu" and dtype == torch.bfloat16 and outputs % ops.INT4_OUTPUTS == 0
    return fits and group in INT4_GROUPS and ready()


def serves_heads(dtype: torch.dtype, cache: torch.dtype, width: int) -> bool:
    """Returns whether `prepare_heads` supports heads of this dtype and width and a KV cache of this dtype."""
    fits = dtype == torch.bfloat16 and cache in (torch.bfloat16, torch.int8) and width in ops.HEAD_WIDTHS
    return fits and ready()


def serves_int8(x: Tensor, numbers: Tensor) -> bool:
    """Returns whether `int8_linear` supports these inputs and this matrix. Shapes: x (M, K), numbers (N, K)."""
    fits = x.device.type == "cpu" and x.dtype == torch.bfloat16 and not x.requires_grad
    return fits and len(numbers) % ops.INT8_MULTIPLE == numbers.shape[1] % ops.INT8_MULTIPLE == 0 and ready()


def serves_one_query(q: Tensor, keys: Tensor) -> bool:
    """Returns whether `one_query` supports these queries and keys. Shapes: q (B, T, N, H), keys (B, S, K, H)."""
    fits = q.device.type == "cpu" and q.dtype == torch.bfloat16 and keys.dtype in (torch.bfloat16, torch.int8)
    shaped = q.shape[1] == 1 and q.shape[3] in ops.HEAD_WIDTHS and keys.stride()[1::2] == (q.shape[3], 1)
    return fits and shaped and not q.requires_grad and ready()


def ready() -> bool:
    """Returns whether the native operators work on this machine. The first call builds and checks them."""
    return _works()


# As `torch.compiler.assume_constant_result` does, which also imports torch's compiler: 1,100 modules, over a second.
ready._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _works() -> bool:
    """Returns whether the operators are registered and correct; logs why not where the processor has AVX-512 VNNI."""
    if not build.processor_supports():
        return False
    if not build.compiler():
        logger.info("no C++ compiler (g++, clang++ or CXX): int4 products and attention use torch's slower kernels")
        return False
    try:
        build.load(tiles=False)
        _check_products()
    except (OSError, AttributeError, subprocess.SubprocessError, RuntimeError) as error:
        logger.warning("native kernels cannot be used: %s; torch's slower kernels are used instead", _reason(error))
        return False
    if build.tiles_allowed():
        build.load(tiles=True)
        try:
            _check_products()
        except RuntimeError as error:
            build.load(tiles=False)
            logger.warning("the tile unit cannot be used: %s; products of many rows are slower without it", error)
    return True


def _reason(error: Exception) -> str:
    """Returns the first line of a compiler's output with the word error, or the first line of the error's text."""
    output = getattr(error, "stderr", None) or str(error)
    lines = (output.decode(errors="replace") if isinstance(output, bytes) else output).strip().split("\n")
    return next((line for line in lines if "error" in line), lines[0])


def _check_products() -> None:
    """Compares small int4 products with those of the dequantized matrices.

    Raises:
        RuntimeError: a product differs.
    """
    for M, N, K, group in ((3, ops.INT4_OUTPUTS, 64, 32), (21, 2 * ops.INT4_OUTPUTS, 256, 128)):
        with torch.device("cpu"):
            numbers = (torch.arange(N * K) * 7 // 3 % 16).view(N, K)
            x = torch.linspace(-1, 1, M * K).view(M, K).bfloat16()
            scale_and_zero = torch.linspace(0.1, 1, K // group * N * 2).view(K // group, N, 2).bfloat16()
        scale, zero = scale_and_zero.float().transpose(0, 1).repeat_interleave(group, 1).unbind(-1)  # (N, K)
        expected = x.float() @ torch.addcmul(zero, numbers - 8, scale).T
        packed, pairs = ops.blocked_numbers(numbers.to(torch.uint8)), ops.blocked_scales(scale_and_zero)
        for out in torch.ops.lumina_mgpt.int4_linear(x, [packed] * 2, group, [pairs] * 2):
            if not (out - expected).norm() < 0.01 * expected.norm():
                raise RuntimeError("int4 products differ from those of the dequantized matrix")
