"""The portable form of int4 matrices, on disk and in memory: quantization by a short search, and dequantization.

A weight is `(q - 8) · scale + zero` with an integer q in 0 ... 15. In each row of a matrix, `group` neighbouring
weights share one bf16 scale and one bf16 zero. Groups of 128 take 4.25 bits per weight.

`dequantize_packed` reads the other form that a GPU holds: the one that torch's CUDA kernel multiplies by.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lumina_mgpt.errors import InputError

# Fractions of the half-range below and above its middle at which the search starts; 0.9 clips the outermost weights.
_STARTS = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9))
_FITS = 2  # least-squares fits from each start
TINY = 1e-30  # scales below this come from groups of equal weights
CHUNK = 1 << 18  # weights processed at once on a CPU, so that temporaries stay in the processor's cache
GPU_CHUNK = 1 << 24  # the same on a GPU, where a chunk of any size takes 260 kernel launches; 4096 rows of 4096
_TEMPORARY = 32  # bytes of temporaries for each weight of a chunk, rounded up


class Int4(NamedTuple):
    """The portable form of a matrix (N, K). Each byte packs two 4-bit numbers, the first in its high half.

    Shapes: packed (N, K/2) uint8; scale and zero (N, K/group) bfloat16.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor


def quantize(weight: Tensor, group: int) -> Int4:
    """Returns the portable form with the least squared error that a short search finds.

    The search has four starts: the whole range of a group, or the range with one or both ends clipped by a tenth of
    the half-range. Two steps improve each start; a step rounds the weights and fits scale and zero by least squares.
    The search compares the four errors with scale and zero rounded to bf16, and keeps the best.

    The baseline rounds over the whole range. For normally distributed weights its squared error is 0.0061, 0.0080 and
    0.0100 of the squared weights in groups of 32, 64 and 128. The search has these fractions of the baseline's error:

        group size        32     64    128
        normal weights  0.804  0.834  0.839
        demo's layers   0.805  0.833  0.840

    The first start alone gives 0.88, 0.91 and 0.93. Sixteen starts with four fits give 0.79 (groups of 32) and 0.82
    (128) in seven times the time. Rounding scale and zero to bf16 changes the fractions by less than 0.001.

    Args:
        group: number of neighbouring weights of a row that share a scale and a zero.

    Shapes: weight (N, K), K a multiple of `group`.

    Raises:
        InputError: a weight is infinite or not a number.
    """
    N, K = weight.shape
    scale, zero = (torch.empty(N, K // group, dtype=torch.bfloat16, device=weight.device) for _ in range(2))
    packed = torch.empty(N, K // 2, dtype=torch.uint8, device=weight.device)
    finite = torch.ones((), dtype=torch.bool, device=weight.device)
    rows = max(1, _chunk(weight.device) // K)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        groups = weight[part].float().unflatten(1, (-1, group))  # (rows, K/group, group)
        s, z, valid = _search(groups)
        scale[part], zero[part], finite = s.squeeze(-1), z.squeeze(-1), finite & valid
        packed[part] = pack_nibbles((_round(groups, s, z) + 8).flatten(1).to(torch.uint8))
    if not finite:  # read once for the whole matrix: on a GPU the host waits for it
        raise InputError("holds weights that are infinite or not a number")
    return Int4(packed, scale, zero)


def _chunk(device: torch.device) -> int:
    """Returns how many weights `quantize` processes at once: on a GPU as many as half of its free memory allows."""
    if device.type != "cuda":
        return CHUNK
    free, _ = torch.cuda.mem_get_info(device)
    return max(CHUNK, min(GPU_CHUNK, free // (2 * _TEMPORARY)))


def dequantize(matrix: Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Returns the weights (N, K) of a portable form in `dtype`. Computes in float32, or in float64 for float64."""
    wide = torch.promote_types(dtype, torch.float32)
    scale, zero = (tensor.to(wide).unsqueeze(-1) for tensor in matrix[1:])  # (N, K/group, 1)
    numbers = unpack_nibbles(matrix.packed).to(wide).unflatten(1, (scale.shape[1], -1))  # (N, K/group, group)
    return torch.addcmul(zero, numbers - 8, scale).flatten(1).to(dtype)


def dequantize_packed(packed: Tensor, pairs: Tensor, group: int) -> Tensor:
    """Returns the weights (N, K) in bfloat16 of a matrix in the form of torch's CUDA kernel.

    The weights are those of `dequantize` in float32, rounded to bfloat16. Six kernels run, without a host
    synchronization. Two of them read the packed numbers: one takes the low four bits of each byte, one the high ones.
    Temporaries take at most half as many bytes as the result.

    Each byte holds two numbers of one row. The axes of a packed matrix, seen as bytes, are: group of eight rows, outer
    block of 32·P columns, row in the group, lane 0 ... 3, inner block of 32 columns, odd 0 ... 1, half 0 ... 1. In its
    inner block, the number in the low bits has the column 16·half + 2·lane + odd, the one in the high bits 8 more.

    Args:
        packed: what `aten::_convert_weight_to_int4pack` returns on CUDA.
        pairs: scale and zero of each group.
        group: number of neighbouring weights that share a pair, a multiple of 32.

    Shapes: packed (N/8, K/(32·P), 32, P) int32 with P in 1, 2, 4; pairs (K/group, N, 2) bfloat16.
    Source: `matrix_to_m16n8k16_Bint4_layout` in aten/src/ATen/native/cuda/int4mm.cu.
    """
    eighths, outer, _, P = packed.shape
    out = torch.empty(8 * eighths, 32 * outer * P, dtype=torch.bfloat16, device=packed.device)
    numbers = packed.view(torch.uint8).view(eighths, outer, 8, 4, P, 2, 2)  # as above
    places = out.view(eighths, 8, outer, P, 2, 2, 4, 2).permute(5, 0, 2, 1, 6, 3, 7, 4)  # bits, `numbers`
    spread = pairs.transpose(0, 1)[:, :, None].expand(-1, -1, group // 32, -1)  # (N, K/group, group/32, 2)
    spread = spread.to(torch.float32, memory_format=torch.contiguous_format)
    spread = spread.view(eighths, 8, outer, P, 2).transpose(1, 2)[:, :, :, None, :, None, None]
    scale, zero = spread.unbind(-1)
    zero = zero.sub(scale, alpha=8)  # the numbers are 0 ... 15 here, and those of the portable form less 8
    torch.addcmul(zero, numbers & 15, scale, out=places[0])
    torch.addcmul(zero, numbers >> 4, scale, out=places[1])
    return out


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Packs pairs of numbers 0 ... 15 into bytes. The first is in the high half, as torch's CUDA kernel needs.

    Shapes: (N, K) uint8 -> (N, K/2) uint8.
    """
    return numbers[:, ::2] << 4 | numbers[:, 1::2]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """Returns the numbers that `pack_nibbles` packed. Shapes: (N, K/2) uint8 -> (N, K) uint8."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(1)


def _search(weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns scale and zero of each group, rounded to bf16, and whether all weights are finite.

    Shapes: weights (..., group) -> two (..., 1) float32, and a scalar bool.
    """
    low, high = weights.aminmax(dim=-1, keepdim=True)
    finite = torch.isfinite(low).all() & torch.isfinite(high).all()
    middle, half = (low + high) / 2, (high - low) / 2
    least, best_scale, best_zero = torch.full_like(low, torch.inf), low, low
    for below, above in _STARTS:
        scale = half * (below + above) / 15
        zero = middle - half * below + 8 * scale
        scale = torch.where(scale >= TINY, scale, 1.0)  # equal weights: all numbers are 0 with any scale
        for _ in range(_FITS):
            scale, zero = _fit(weights, _round(weights, scale, zero), scale)
        scale, zero = scale.bfloat16().float(), zero.bfloat16().float()
        error = torch.addcmul(zero, _round(weights, scale, zero), scale).sub_(weights).square_().sum(-1, keepdim=True)
        better = error < least
        least = torch.where(better, error, least)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
    return best_scale, best_zero, finite


def _round(weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Returns the nearest of the numbers -8 ... 7."""
    return weights.sub(zero).div_(scale).round_().clamp_(-8, 7)


def _fit(weights: Tensor, numbers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Fits `weights = numbers · scale + zero` by least squares; keeps `scale` where all numbers are equal."""
    mean = numbers.mean(-1, keepdim=True)
    deviations = numbers - mean
    spread = deviations.square().sum(-1, keepdim=True)
    slope = (deviations * weights).sum(-1, keepdim=True) / spread
    scale = torch.where(slope >= TINY, slope, scale)  # the slope of equal numbers is 0/0
    return scale, weights.mean(-1, keepdim=True) - scale * mean
