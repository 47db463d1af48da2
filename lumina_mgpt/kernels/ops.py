"""Definitions of the torch operators that the C++ kernels implement on the CPU.

    torch.ops.lumina_mgpt.int4_linear(x, packed, group, scale_and_zero)
        Computes torch's `_weight_int4pack_mm_for_cpu` for several matrices with the same input x. `packed` lists the
        matrices in torch's packing. `scale_and_zero` lists their scales and zeros in the order of `blocked_scales`.
        `group` is the number of weights that share a scale.
    torch.ops.lumina_mgpt.int8_linear(x, numbers, scale)
        Computes torch's `_weight_int8pack_mm`.
    torch.ops.lumina_mgpt.one_query(q, keys, values, key_scales, value_scales, slots)
        Computes attention of one query per row. The query of row b reads the first `slots[b]` slots of a KV cache.

Shapes: x (M, K), numbers (N, K), scale (N,); q (B, 1, N, H); keys and values (B, S, K, H) in bf16, or in int8 with
float32 scales (B, S, K); slots (B,) int64. x, q, scale and the results are bf16. The operators raise RuntimeError for
other dtypes, shapes and strides. They have no gradient.
"""

import torch
from torch import Tensor

INT4_OUTPUTS = 64  # int4_linear takes matrices whose outputs are a multiple of this
INT8_MULTIPLE = 16  # int8_linear takes matrices whose outputs and inputs are multiples of this
HEAD_WIDTHS = (64, 128)  # of one_query

_LIBRARY = torch.library.Library("lumina_mgpt", "DEF")
for _schema in (
    "int4_linear(Tensor x, Tensor[] packed, int group, Tensor[] scale_and_zero) -> Tensor[]",
    "int8_linear(Tensor x, Tensor numbers, Tensor scale) -> Tensor",
    "one_query(Tensor q, Tensor keys, Tensor values, Tensor? key_scales, Tensor? value_scales, Tensor slots) -> Tensor",
):
    _LIBRARY.define(_schema, tags=torch.Tag.needs_exact_strides)


def blocked_scales(scale_and_zero: Tensor) -> Tensor:
    """Returns scales and zeros reordered for `int4_linear`, which reads them in blocks of 64 outputs.

    Shapes: scale_and_zero (K/group, N, 2), in the order of torch's kernel -> (N/64, K/group, 64, 2).
    """
    return scale_and_zero.unflatten(1, (-1, INT4_OUTPUTS)).transpose(0, 1).contiguous()


# Fakes: shape and dtype of the results, for torch.compile.


@torch.library.register_fake("lumina_mgpt::int4_linear", lib=_LIBRARY)
def _(x: Tensor, packed: list[Tensor], group: int, scale_and_zero: list[Tensor]) -> list[Tensor]:
    return [x.new_empty(len(x), len(pairs) * INT4_OUTPUTS) for pairs in scale_and_zero]


@torch.library.register_fake("lumina_mgpt::int8_linear", lib=_LIBRARY)
def _(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    return x.new_empty(len(x), len(numbers))


@torch.library.register_fake("lumina_mgpt::one_query", lib=_LIBRARY)
def _(
    q: Tensor, keys: Tensor, values: Tensor, key_scales: Tensor | None, value_scales: Tensor | None, slots: Tensor
) -> Tensor:
    return q.new_empty(q.shape)
