"""The decoder-only transformer over text and image ids. This module uses neither samplers nor tokenizers."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import attention, native_layer, quantization
from lumina_mgpt.model.attention import Span
from lumina_mgpt.model.kv_cache import KVCache, LayerCache, Scaled
from lumina_mgpt.model.linear import Linear, linear

HEAD_NORM_EPS = 1e-5  # of the released model; config.json does not hold it

Rope = tuple[Tensor, Tensor]  # cosines and signed sines


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in float32.

    The weight multiplies the result after the cast back to the input's dtype, as in the released model.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class HeadNorm(nn.Module):
    """Layer norm over the width of each head. Each row of weights applies to an equal share of the heads.

    Released files have `model_parallel_size` rows of weights; files of `transformers` 5 have one row per head.

    Args:
        rows: number of rows of weights.
        width: width of one head.

    Raises:
        InputError: `rows` does not divide `heads`.
    """

    def __init__(self, heads: int, rows: int, width: int) -> None:
        super().__init__()
        if heads % rows:
            rule = f"must divide the {heads} heads of queries and keys"
            raise InputError(f"{rule}, got {rows}", "model_parallel_size")
        self.heads = heads
        self.weight = nn.Parameter(torch.ones(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        """Returns the normalized heads. Shapes: x (..., heads, H) -> (..., heads, H)."""
        width = x.shape[-1]
        if len(self.weight) == len(self.bias) == 1:
            return F.layer_norm(x, (width,), self.weight[0], self.bias[0], HEAD_NORM_EPS)
        # Weight and bias may have different numbers of rows.
        weight, bias = (p.repeat_interleave(self.heads // len(p), dim=0) for p in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, (width,), eps=HEAD_NORM_EPS), weight).to(x.dtype)


def rope_angles(config: ModelConfig, positions: Tensor, length: int, dtype: torch.dtype) -> Rope:
    """Returns the cosines and sines of the rotary angles, as `rotate` takes them.

    The result is float32, or float64 for a float64 model. The first half of the sines has its sign flipped.

    Differs from the reference: with a KV cache, `length` is the length of the cache, so all steps of a sequence scale
    the angles alike. The reference uses the current length at each step, so cached keys keep earlier scalings.

    Args:
        length: sequence length for dynamic scaling, which applies to lengths above `max_position_embeddings`.
        dtype: dtype of the model.

    Shapes: positions (..., T); returns two of (..., T, 1, H).

    Source: RoFormer (arXiv 2104.09864); dynamic scaling: NTK-aware, as in transformers' `dynamic` rope type.
    """
    H, base, scale = config.head_dim, config.rope_theta, 1.0
    if config.rope_scaling is not None:
        factor = float(config.rope_scaling.get("factor", 1.0))
        if config.rope_scaling.get("type", config.rope_scaling.get("rope_type")) == "linear":
            scale = factor
        elif length > config.max_position_embeddings:
            stretch = factor * length / config.max_position_embeddings - (factor - 1)
            base *= stretch ** (H / (H - 2))
    dtype = torch.promote_types(dtype, torch.float32)
    inverse = (base ** (torch.arange(0, H, 2, device=positions.device, dtype=dtype) / H)).reciprocal()
    inverse = inverse if scale == 1.0 else inverse / scale
    angles = positions[..., None, None] * inverse  # (..., T, 1, H/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates each pair of components (i, i + H/2) of a head by its angle, in the dtype of `rope`.

    Shapes: x (B, T, N, H) -> (B, T, N, H).
    """
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).to(x.dtype)


class Attention(nn.Module):
    """Multi-head or grouped-query attention with normalized queries and keys."""

    def __init__(self, config: ModelConfig, attn: str) -> None:
        super().__init__()
        D, N, K, H = config.hidden_size, config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.head_dim, self.attend = H, attention.backend(attn)
        self.q_proj = Linear(D, N * H, bias=config.attention_bias)
        self.k_proj = Linear(D, K * H, bias=config.attention_bias)
        self.v_proj = Linear(D, K * H, bias=config.attention_bias)
        self.o_proj = Linear(N * H, D, bias=config.attention_bias)
        self.q_norm = HeadNorm(N, config.model_parallel_size, H)
        self.k_norm = HeadNorm(K, config.model_parallel_size, H)

    def forward(self, hidden: Tensor, rope: Rope, span: Span, cache: LayerCache | None) -> Tensor:
        """Returns the attention output. Shapes: hidden (B, T, D) -> (B, T, D)."""
        mixed = quantization.apply_all(hidden, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in mixed)  # (B, T, N, H), twice (B, T, K, H)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.update(k, v, span.positions, span.filled)  # (B, S, K, H)
            q = q if isinstance(k, Scaled) else q.to(k.dtype)
        return self.o_proj(self.attend(q, k, v, span, cache is not None).flatten(2))


class SwiGLU(torch.autograd.Function):
    """Computes `silu(gate) * up`. The backward pass computes `silu(gate)` again, which saves its memory.

    Shapes: gate, up and the result (..., inner width).
    """

    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return F.silu(gate) * up

    @staticmethod
    @once_differentiable
    def backward(ctx, d_product: Tensor):
        gate, up = ctx.saved_tensors
        return torch.ops.aten.silu_backward(d_product * up, gate), d_product * F.silu(gate)


class MLP(nn.Module):
    """SwiGLU feed-forward network (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, D, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = quantization.apply_all(hidden, self.gate_proj, self.up_proj)
        product = SwiGLU.apply(gate, up) if torch.is_grad_enabled() else F.silu(gate) * up
        return self.down_proj(product)


class Layer(nn.Module):
    """Attention and MLP, each on a residual branch with a norm.

    The norm is at the start of the branch, or at its end if the config sets `swin_norm`.
    """

    def __init__(self, config: ModelConfig, attn: str) -> None:
        super().__init__()
        self.swin_norm = config.swin_norm
        self.self_attn = Attention(config, attn)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: Rope, span: Span, cache: LayerCache | None, dropout: float) -> Tensor:
        """Returns the output of the layer. The dropout rate `dropout` applies in training and in evaluation mode.

        Shapes: hidden (B, T, D) -> (B, T, D).
        """
        if cache is not None and native_layer.serves(self, hidden, cache, dropout):
            return native_layer.run(self, hidden, rope, span, cache)
        if self.swin_norm:
            hidden = hidden + _drop(self.input_layernorm(self.self_attn(hidden, rope, span, cache)), dropout)
            return hidden + _drop(self.post_attention_layernorm(self.mlp(hidden)), dropout)
        hidden = hidden + _drop(self.self_attn(_narrow(self.input_layernorm(hidden)), rope, span, cache), dropout)
        return hidden + _drop(self.mlp(_narrow(self.post_attention_layernorm(hidden))), dropout)


class Head(Linear):
    """The output projection, to the whole vocabulary or to a slice of it.

    Attributes:
        columns: the slice of the vocabulary that the weights cover; None for the whole vocabulary.
        scale: one scale per vocabulary id of int8 weights; None for floating-point weights.
    """

    columns: slice | None = None
    scale: Tensor | None

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)

    def slice_columns(self, columns: slice | None, int8: bool = False) -> None:
        """Keeps the weights of these vocabulary ids and frees the others.

        Image generation keeps the image codes this way, and frees the weights of text ids.

        Args:
            columns: slice of the vocabulary to keep; None for the whole vocabulary.
            int8: whether to quantize the kept weights to int8, if there is a kernel. With int4 layers, a bf16 head
                would take a large part of the time of each step.
        """
        weight, self.columns = (self.weight if columns is None else self.weight[columns]).detach(), columns
        if int8 and quantization.has_int8_kernel(weight.device, weight.dtype):
            weight, self.scale = quantization.to_int8(weight)
        elif columns is not None:
            weight = weight.clone()  # a view would keep the whole matrix in memory
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Returns the logits of the vocabulary ids in `columns`; None for all ids. A sliced head needs its own slice.

        Shapes: hidden (..., D) -> (..., V), or (..., length of the slice).
        """
        assert self.columns in (None, columns), f"columns {columns} of a head sliced to {self.columns}"
        weight, scale = self.weight, self.scale
        if self.columns != columns:
            weight, scale = weight[columns], None if scale is None else scale[columns]
        if scale is not None:
            return quantization.int8_linear(hidden, weight, scale.to(hidden.dtype))
        return linear(hidden, weight)


class Transformer(nn.Module):
    """Embedding, layers, final norm and head. A parameter has its name on disk without the leading `model.`.

    Attributes:
        attn: name of the attention backend.
        dropout: dropout rate in training mode.
        gradient_checkpointing: whether the backward pass recomputes each layer instead of storing its activations.

    Raises:
        InputError: the attention backend `attn` is unknown or does not work on this machine, or sizes in the config
            contradict each other.
    """

    def __init__(self, config: ModelConfig, attn: str = "sdpa") -> None:
        super().__init__()
        self.config, self.attn = config, attn
        self.dropout = config.dropout
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, attn) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(
        self,
        ids: Tensor,
        *,
        positions: Tensor | int | None = None,
        cache: KVCache | None = None,
        filled: int | None = None,
        documents: tuple[int, ...] = (),
    ) -> Tensor:
        """Returns the hidden states after the final norm. `project` computes logits from them.

        Args:
            positions: position of each id. An int is the first position of consecutive ones, for all rows (default 0).
                An int is cheaper: no mask is needed for one id per row, or from position 0.
            cache: receives keys and values in the slots of their positions. An id attends to the slots up to its own
                position. Without a cache, an id attends to itself and to the ids before it in its row.
            filled: number of cache slots to read, more than the position of any id that is not a pad (default: all
                slots).
            documents: lengths of the sequences that each row packs, T in total. The sequences do not attend to each
                other, and the positions of each start at 0. Not allowed with a cache.

        Shapes: ids (B, T), positions (B, T); returns (B, T, D).
        """
        T = ids.shape[1]
        positions = 0 if positions is None else positions
        assert isinstance(positions, int) or positions.shape == ids.shape
        hidden = self.embed_tokens(ids)  # (B, T, D)
        length = T if cache is None else cache.length
        if documents:
            assert cache is None and positions == 0 and sum(documents) == T
            span, length = Span(0, T, None, True, documents), max(documents)
            positions = torch.cat([torch.arange(n, device=ids.device) for n in documents])
        else:
            span = Span.of(T, positions, cache, filled, hidden.dtype, ids.device)
        if isinstance(positions, int):
            positions = torch.arange(positions, positions + T, device=ids.device)
        rope = rope_angles(self.config, positions, length, hidden.dtype)
        rate = self.dropout if self.training else 0.0
        recompute = self.gradient_checkpointing and torch.is_grad_enabled() and cache is None
        for index, layer in enumerate(self.layers):
            layer_cache = None if cache is None else cache.layers[index]
            if recompute:
                hidden = checkpoint(layer, hidden, rope, span, layer_cache, rate, use_reentrant=False)
            else:
                hidden = layer(hidden, rope, span, layer_cache, rate)
        return self.norm(hidden)

    @property
    def device(self) -> torch.device:
        """Device on which ids go in, and hidden states and logits come out."""
        return next(self.parameters()).device

    @property
    def layer_devices(self) -> list[torch.device]:
        """Device on which each layer runs, and keeps its keys and values."""
        return [self.device] * len(self.layers)

    def project(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Returns the logits of the vocabulary ids in `columns`; None for all ids.

        Shapes: hidden (..., D) -> (..., V), or (..., length of the slice).
        """
        return self.lm_head(hidden, columns)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Initializes all parameters for training from scratch. They may be uninitialized, as after `to_empty`.

        Weights are normally distributed with standard deviation √(2/(5D)) (arXiv 1910.05895, "small init"). For the
        last projection of each branch, it is 2/(L√D) with L layers, so the variance of the residual stream does not
        depend on depth. GPT-NeoX-20B uses both values (arXiv 2204.06745, section 2.1).
        """
        D, L = self.config.hidden_size, self.config.num_hidden_layers
        for name, parameter in self.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                ends_branch = name.endswith(("o_proj.weight", "down_proj.weight"))
                std = 2 / (L * math.sqrt(D)) if ends_branch else math.sqrt(2 / (5 * D))
                parameter.normal_(0.0, std, generator=generator)


def _drop(x: Tensor, rate: float) -> Tensor:
    return F.dropout(x, rate) if rate else x


def _narrow(x: Tensor) -> Tensor:
    """Casts the common input of several projections once under autocast, instead of once for each projection."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x
