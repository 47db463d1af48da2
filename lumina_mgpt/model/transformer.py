"""The decoder-only transformer that continues sequences of text and image ids. No sampler and no tokenizer in here."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import attention, quantization
from lumina_mgpt.model.attention import Span
from lumina_mgpt.model.kv_cache import KVCache, LayerCache, Scaled
from lumina_mgpt.model.linear import Linear, linear

HEAD_NORM_EPS = 1e-5  # of the released model; its config.json does not hold it

Rope = tuple[Tensor, Tensor]


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32; the weight is applied after the cast back, as in the released model."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight


class HeadNorm(nn.Module):
    """Layer norm over the width of each head; each of `rows` weights serves an equal share of the heads.

    Released files have model_parallel_size rows, those of `transformers` 5 one row a head.

    Raises:
        InputError: rows do not divide the heads.
    """

    def __init__(self, heads: int, rows: int, width: int):
        super().__init__()
        if heads % rows:
            raise InputError(f"model_parallel_size must divide the {heads} heads of queries and keys, got {rows}")
        self.heads = heads
        self.weight = nn.Parameter(torch.ones(rows, width))
        self.bias = nn.Parameter(torch.zeros(rows, width))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., heads, H), and so is what it returns."""
        width = x.shape[-1]
        if len(self.weight) == len(self.bias) == 1:
            return F.layer_norm(x, (width,), self.weight[0], self.bias[0], HEAD_NORM_EPS)
        # A file may hold one row a head of the one, and fewer of the other.
        weight, bias = (p.repeat_interleave(self.heads // len(p), dim=0) for p in (self.weight, self.bias))
        return torch.addcmul(bias, F.layer_norm(x, (width,), eps=HEAD_NORM_EPS), weight).to(x.dtype)


def rope_angles(config: ModelConfig, positions: Tensor, length: int, dtype: torch.dtype) -> Rope:
    """Cosines and signed sines for `rotate`, computed in float32 (in float64 for a float64 model).

    `length` is the length that a dynamic scaling adapts to once it exceeds max_position_embeddings.
    Differs from the reference: with a cache that is its number of slots, known beforehand, so that all keys of a
    sequence are turned alike; there each step adapts to the length so far, and older keys keep their older angles.
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
    inverse = 1.0 / (base ** (torch.arange(0, H, 2, device=positions.device, dtype=dtype) / H)) / scale
    angles = positions[..., None, None].to(dtype) * inverse  # (..., T, 1, H/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Turns each pair (i, i + H/2) of a head by its angle, in float32. Shapes: x (B, T, N, H)."""
    cos, sin = rope
    a, b = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos, torch.cat((b, a), -1), sin).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, attn: str):
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
        mixed = quantization.products(hidden, self.q_proj, self.k_proj, self.v_proj)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in mixed)  # (B, T, N, H), twice (B, T, K, H)
        q, k = rotate(self.q_norm(q), rope), rotate(self.k_norm(k), rope)
        if cache is not None:
            k, v = cache.update(k, v, span.positions, span.filled)  # (B, S, K, H)
            q = q if isinstance(k, Scaled) else q.to(k.dtype)
        return self.o_proj(self.attend(q, k, v, span, cache is not None).flatten(2))


class MLP(nn.Module):
    """SwiGLU (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        D, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = Linear(D, inner, bias=config.mlp_bias)
        self.up_proj = Linear(D, inner, bias=config.mlp_bias)
        self.down_proj = Linear(inner, D, bias=config.mlp_bias)

    def forward(self, hidden: Tensor) -> Tensor:
        gate, up = quantization.products(hidden, self.gate_proj, self.up_proj)
        return self.down_proj(F.silu(gate) * up)


class Layer(nn.Module):
    """Attention, then MLP, each on a residual branch; swin_norm moves the norm from a branch's start to its end."""

    def __init__(self, config: ModelConfig, attn: str):
        super().__init__()
        self.swin_norm = config.swin_norm
        self.self_attn = Attention(config, attn)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, hidden: Tensor, rope: Rope, span: Span, cache: LayerCache | None, dropout: float) -> Tensor:
        """Shapes: hidden (B, T, D), and so is what it returns. `dropout` is the rate to apply, whatever the mode."""
        if self.swin_norm:
            hidden = hidden + _drop(self.input_layernorm(self.self_attn(hidden, rope, span, cache)), dropout)
            return hidden + _drop(self.post_attention_layernorm(self.mlp(hidden)), dropout)
        hidden = hidden + _drop(self.self_attn(_narrow(self.input_layernorm(hidden)), rope, span, cache), dropout)
        return hidden + _drop(self.mlp(_narrow(self.post_attention_layernorm(hidden))), dropout)


class Head(Linear):
    """The output projection, to the whole vocabulary or to a slice of it."""

    columns: slice | None = None  # of the vocabulary, None for all

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.register_buffer("scale", None, persistent=False)  # of int8 columns

    def slice_columns(self, columns: slice, int8: bool = False) -> None:
        """Lets go of all other columns: the text of a large vocabulary, for a model that is to write images only.

        `int8` rounds what is left, with a scale a column, where a kernel multiplies by it: beside int4 layers a bf16
        head is a large part of a step.
        """
        weight, self.columns = self.weight[columns].detach(), columns
        if int8 and quantization.has_int8_kernel(weight.device, weight.dtype):
            weight, self.scale = quantization.to_int8(weight)
        else:
            weight = weight.clone()  # a view would hold on to the whole
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        assert self.columns in (None, columns), f"columns {columns} of a head sliced to {self.columns}"
        if self.scale is not None:
            return quantization.int8_linear(hidden, self.weight, self.scale.to(hidden.dtype))
        return linear(hidden, self.weight if self.columns == columns else self.weight[columns])


class Transformer(nn.Module):
    """Embedding, layers and final norm; parameters are named as on disk, but for the leading `model.`.

    `dropout` (active in training mode) and `gradient_checkpointing` (a layer at a time) are plain attributes.

    Raises:
        InputError: `attn` names no backend that works here, or sizes in the config do not fit each other.
    """

    def __init__(self, config: ModelConfig, attn: str = "sdpa"):
        super().__init__()
        self.config = config
        self.dropout = config.dropout
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, attn) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = Head(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, ids: Tensor, *, positions: Tensor | int | None = None, cache: KVCache | None = None,
                filled: int | None = None, documents: tuple[int, ...] = ()) -> Tensor:  # fmt: skip
        """Hidden states after the final norm; `project` makes logits of them.

        Without a cache every id sees those before it in its row. With one, keys and values are written to the slots
        of their positions, and an id sees the slots up to its own position. `positions` are those of each id, or one
        int where all rows start at the same place (default 0; cheapest: with one id a row, or from 0 on, no mask is
        needed). `filled`: how many slots are read, more than any position that matters (default: all of them).
        `documents`, without a cache: each row holds sequences of these lengths, T in all, which do not see each other
        and whose positions start at 0.

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
            held = None if cache is None else cache.layers[index]
            if recompute:
                hidden = checkpoint(layer, hidden, rope, span, held, rate, use_reentrant=False)
            else:
                hidden = layer(hidden, rope, span, held, rate)
        return self.norm(hidden)

    def project(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        """Logits of the whole vocabulary, or of a slice. Shapes: hidden (..., D); returns (..., V or slice)."""
        return self.lm_head(hidden, columns)

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fills all parameters for training from scratch; works on parameters fresh from `to_empty` too.

        Normal with std √(2/5D) (arXiv 1910.05895, "small init"); the last projection of each branch 2/(L√D), so that
        the residual stream grows alike at any depth. Both as in GPT-NeoX-20B (arXiv 2204.06745, section 2.1).
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
    """Under autocast, cast once what several projections read (each would make a copy of its own)."""
    kind = x.device.type
    enabled = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return x.to(torch.get_autocast_dtype(kind)) if enabled else x
