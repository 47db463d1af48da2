"""A transformer layer in six native CPU operators, for int4 matrices in the native form.

A step of one or two ids reads all weights and computes little. Between the products, a layer would otherwise call some
fifty of torch's operators. Norms, the gate of the MLP and residual additions are part of the products here;
`prepare_heads` does the rest. Numbers are rounded to bf16 where the modules of transformer.py round them, but sums have
other orders: results differ by rounding. Forward hooks of the modules inside a layer do not run.
"""

from typing import Any

import torch
from torch import Tensor

from lumina_mgpt.kernels import dispatch
from lumina_mgpt.model.attention import Span
from lumina_mgpt.model.kv_cache import LayerCache
from lumina_mgpt.model.quantization import Int4Linear, native


def serves(layer: Any, hidden: Tensor, cache: LayerCache | None, dropout: float) -> bool:
    """Returns whether `run` supports this layer and these inputs.

    Args:
        layer: a `Layer` of transformer.py.

    Shapes: hidden (B, T, D).
    """
    attention, mlp = layer.self_attn, layer.mlp
    if cache is None or dropout or layer.swin_norm or hidden.device.type != "cpu":
        return False
    if not isinstance(mlp.up_proj, Int4Linear):  # the common case of other layers, without the checks below
        return False
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
    if not all(_fits(linear) for linear in (*linears, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
        return False
    norms = layer.input_layernorm, layer.post_attention_layernorm, attention.q_norm, attention.k_norm
    if any(tensor.dtype != torch.bfloat16 for tensor in (hidden, *(norm.weight for norm in norms))) or (
        hidden.requires_grad and torch.is_grad_enabled()
    ):
        return False
    return dispatch.serves_heads(hidden.dtype, cache.stores[0].dtype, attention.head_dim)


def _fits(linear: torch.nn.Module) -> bool:
    return isinstance(linear, Int4Linear) and linear.native and linear.bias is None


def run(layer: Any, hidden: Tensor, rope: tuple[Tensor, Tensor], span: Span, cache: LayerCache) -> Tensor:
    """Returns the output of the layer, as `Layer.forward` does.

    Args:
        layer: a `Layer` of transformer.py.

    Shapes: hidden (B, T, D) -> (B, T, D).
    """
    attention, mlp = layer.self_attn, layer.mlp
    norm, after = layer.input_layernorm, layer.post_attention_layernorm
    q, k, v = (
        part.unflatten(-1, (-1, attention.head_dim))
        for part in native(hidden, [attention.q_proj, attention.k_proj, attention.v_proj], norm.weight, norm.eps)
    )  # (B, T, N, H), twice (B, T, K, H)
    positions = span.positions
    if isinstance(positions, int):
        positions = torch.arange(positions, positions + hidden.shape[1], device=hidden.device)
    of_q, of_k = attention.q_norm, attention.k_norm
    norms = [of_q.weight, of_q.bias, of_k.weight, of_k.bias]
    scales = cache.scales or (None, None)
    q = torch.ops.lumina_mgpt.prepare_heads(q, k, v, norms, *rope, positions.contiguous(), *cache.stores, *scales)
    mixed = attention.attend(q, *cache.read(len(q), span.filled), span, True).flatten(2)
    (hidden,) = native(mixed, [attention.o_proj], residual=hidden)
    (inner,) = native(hidden, [mlp.gate_proj, mlp.up_proj], after.weight, after.eps, gated=True)
    (hidden,) = native(inner, [mlp.down_proj], residual=hidden)
    return hidden
