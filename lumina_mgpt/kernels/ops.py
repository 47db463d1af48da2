"""Definitions of the torch operators that the C++ kernels implement on the CPU.

    torch.ops.lumina_mgpt.int4_linear(x, packed, group, scale_and_zero, norm, eps, gated, residual)
        Computes the products of x and several int4 matrices. `packed` lists the matrices as `blocked_numbers` returns
        them, `scale_and_zero` their scales and zeros as `blocked_scales` does. `group` is the number of weights that
        share a scale. With `norm` (K,), x is first normalized as by `RMSNorm`. With `gated`, there are two matrices,
        and the only result is silu of the first product times the second. `residual` (M, N) is added to the product of
        a single matrix.
    torch.ops.lumina_mgpt.prepare_heads(q, k, v, norms, cos, sin, positions, keys, values, key_scales, value_scales)
        Normalizes and rotates q and k, writes k and v to the stores of a KV cache, and returns q. `norms` lists weight
        and bias of the norm of queries and of that of keys, each (rows, H).
    torch.ops.lumina_mgpt.int8_linear(x, numbers, scale)
        Computes torch's `_weight_int8pack_mm`.
    torch.ops.lumina_mgpt.one_query(q, keys, values, key_scales, value_scales, slots)
        Computes attention of one query per row. The query of row b reads the first `slots[b]` slots of a KV cache.

Shapes: x (M, K), numbers (N, K), scale (N,). Of prepare_heads: q (B, T, N, H); k and v (B, T, K, H); cos and sin
(T, 1, H) or (B, T, 1, H) float32; positions (T,) or (B, T) int64; keys and values (rows, K, S, H) in bf16, or in int8
with float32 scales (rows, K, S). Of one_query: q (B, 1, N, H); keys and values (B, S, K, H) in bf16, or in int8 with
float32 scales (B, S, K); slots (B,) int64. All other tensors and the results are bf16. The operators raise RuntimeError
for other dtypes, shapes and strides. They have no gradient.
"""

import torch
from torch import Tensor

INT4_OUTPUTS = 64  # int4_linear takes matrices whose outputs are a multiple of this
INT8_MULTIPLE = 16  # int8_linear takes matrices whose outputs and inputs are multiples of this
HEAD_WIDTHS = (64, 128)  # of prepare_heads and one_query

_LIBRARY = torch.library.Library("lumina_mgpt", "DEF")
for _schema in (
    "int4_linear(Tensor x, Tensor[] packed, int group, Tensor[] scale_and_zero, Tensor? norm=None, float eps=0, "
    "bool gated=False, Tensor? residual=None) -> Tensor[]",
    "prepare_heads(Tensor q, Tensor k, Tensor v, Tensor[] norms, Tensor cos, Tensor sin, Tensor positions, "
    "Tensor(a!) keys, Tensor(b!) values, Tensor(c!)? key_scales, Tensor(d!)? value_scales) -> Tensor",
    "int8_linear(Tensor x, Tensor numbers, Tensor scale) -> Tensor",
    "one_query(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor slots) -> Tensor",
):
    _LIBRARY.define(_schema, tags=torch.Tag.needs_exact_strides)


def blocked_numbers(numbers: Tensor) -> Tensor:
    """Returns a matrix of numbers 0 ... 15 as `int4_linear` reads it: blocks of 64 outputs, four inputs after another.

    Of the 128 bytes that a block has for four inputs, bytes 4·o + i of the first half have output o and input i in the
    low bits, and output o + 16 in the high bits. Those of the second half have outputs o + 32 and o + 48.

    Shapes: numbers (N, K) uint8 -> (N/64, K/4, 128) uint8.
    """
    parts = numbers.view(-1, 2, 2, 16, numbers.shape[1] // 4, 4)  # (N/64, half, bits, o, K/4, i)
    both = parts[:, :, 0] | parts[:, :, 1] << 4
    return both.permute(0, 3, 1, 2, 4).flatten(2)


def blocked_scales(scale_and_zero: Tensor) -> Tensor:
    """Returns scales and zeros reordered for `int4_linear`, which reads them in blocks of 64 outputs.

    Shapes: scale_and_zero (K/group, N, 2), in the order of torch's kernel -> (N/64, K/group, 64, 2).
    """
    return scale_and_zero.unflatten(1, (-1, INT4_OUTPUTS)).transpose(0, 1).contiguous()


# Fakes: shape and dtype of the results, for torch.compile.


@torch.library.register_fake("lumina_mgpt::int4_linear", lib=_LIBRARY)
def _(
    x: Tensor,
    packed: list[Tensor],
    group: int,
    scale_and_zero: list[Tensor],
    norm: Tensor | None = None,
    eps: float = 0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> list[Tensor]:
    return [x.new_empty(len(x), len(pairs) * INT4_OUTPUTS) for pairs in scale_and_zero[: 1 if gated else None]]


@torch.library.register_fake("lumina_mgpt::prepare_heads", lib=_LIBRARY)
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.register_fake("lumina_mgpt::int8_linear", lib=_LIBRARY)
def _(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(numbers))


@torch.library.register_fake("lumina_mgpt::one_query", lib=_LIBRARY)
def _(
    q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None, slots: Tensor
) -> Tensor:
    return q.new_empty(q.shape)
