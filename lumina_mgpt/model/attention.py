"""Attention backends: functions of (q, k, v, span, cached). Building a model selects one by name."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor

from lumina_mgpt.cuda import torch_attention
from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.kernels import dispatch
from lumina_mgpt.model.kv_cache import Cached, KVCache, Scaled
from lumina_mgpt.model.short_attention import LONGEST, ShortAttention

HALVES = (torch.bfloat16, torch.float16)
# Except on CUDA: up to this many queries attention reads int8 integers; above, a layer's cache is dequantized.
INT8_QUERIES = 256
# On a CPU: how many numbers of a cache are converted to float32 at once (4 MB: 1024 slots, 8 heads of width 128), and
# how many heads one block has.
BLOCK, BLOCK_HEADS = 1 << 20, 8


@dataclass(frozen=True)
class Span:
    """The key slots that the queries of one forward pass may attend to. Every layer uses the same span.

    Attributes:
        positions: position of each query, (B, T). An int is the first position of consecutive ones, for all rows.
        filled: number of key slots to read, from slot 0.
        mask: (B or 1, 1, T, S), added to the scores; None if no mask is needed.
        causal: whether the kernel's own causal mask applies, because queries and keys have the same T positions.
        documents: lengths of the sequences that one row packs. They do not attend to each other.
    """

    positions: Tensor | int
    filled: int
    mask: Tensor | None
    causal: bool
    documents: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        length: int,
        positions: Tensor | int,
        cache: KVCache | None,
        filled: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "Span":
        """Returns the span of `length` queries per row at `positions`, without host synchronization.

        Args:
            positions: as the attribute.
            cache: cache that holds the keys; None if the keys are those of the queries themselves.
            filled: number of key slots to read; None for all slots. An int for `positions` overrides it.
            dtype: dtype of the mask.
        """
        if cache is None:
            return cls(positions, length, None, True)
        if isinstance(positions, int):
            filled = positions + length
            if positions == 0 or length == 1:  # the queries see all filled slots, or a lower triangle of them
                return cls(positions, filled, None, positions == 0 and length > 1)
            seen = torch.arange(positions, filled, device=device)[None, :]
        else:
            filled = cache.slots if filled is None else filled
            seen = positions
        assert 0 < filled <= cache.slots, f"filled = {filled} of {cache.slots} slots"
        hidden = cache.index[:filled] > seen[:, None, :, None]  # (B or 1, 1, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return cls(positions, filled, mask, False)

    @cached_property
    def lengths(self) -> Tensor:
        """Number of slots up to each row's last position, (B,) int32; for positions that are a tensor."""
        assert isinstance(self.positions, Tensor)
        return (self.positions[:, -1] + 1).to(torch.int32)

    def to(self, device: torch.device | int | str, non_blocking: bool = False) -> "Span":
        """Returns the span on a device. accelerate calls it where the layers of a model are on several devices."""
        positions, mask = self.positions, self.mask
        if isinstance(positions, Tensor):
            positions = positions.to(device, non_blocking=non_blocking)
        if mask is not None:
            mask = mask.to(device, non_blocking=non_blocking)
        return replace(self, positions=positions, mask=mask)


Backend = Callable[..., Tensor]  # of (q, k, v, span, cached)


def backend(name: str) -> Backend:
    """Returns the attention function with this name, `sdpa` or `flash`.

    Raises:
        InputError: the name is unknown, or `flash` lacks its package or a GPU.
    """
    if name == "sdpa":
        return sdpa
    if name != "flash":
        raise InputError(f"must be sdpa or flash, got {name!r}", "attn")
    if not torch.cuda.is_available():
        raise InputError("attn=flash needs a CUDA GPU, and none is visible; use attn=sdpa")
    try:
        import flash_attn  # noqa: F401
    except Exception as error:  # an extension built for another torch raises more than ImportError
        raise package_error(error, "attn=flash", "flash-attn", ("flash_attn",), "use attn=sdpa") from None
    return flash


def sdpa(q: Tensor, k: Cached, v: Cached, span: Span, cached: bool) -> Tensor:
    """Computes attention by torch's scaled_dot_product_attention, or by faster code where there is some.

    The faster code covers one query or a few queries per row on a KV cache, and compiled training on a CPU.

    Args:
        cached: whether k and v are views of a KV cache.

    Shapes: q (B, T, N, H); k, v (B, S, K, H); returns (B, T, N, H).
    """
    if span.documents:  # one call a document needs no mask, and computes no scores between documents
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        single, parts = replace(span, documents=()), [part.split(span.documents, 1) for part in (q, k, v)]
        return torch.cat([sdpa(q, k, v, single, cached) for q, k, v in zip(*parts, strict=True)], 1)
    if cached and dispatch.serves_one_query(q, k.integers if isinstance(k, Scaled) else k):
        return _native(q, k, v, span)
    if _outside_torch_kernel(q, k, cached):
        if not torch.compiler.is_compiling():
            return _blockwise(q, k, v, span)
        if q.shape[1] == 1:
            return _fused(q, k, v, span)
    k, v = (part.dequantize(q.dtype) if isinstance(part, Scaled) else part for part in (k, v))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if span.causal and not grouped and _trains_compiled(q, k, v):
        return ShortAttention.apply(q, k, v).transpose(1, 2)
    if grouped and span.mask is not None and q.device.type == "cuda":
        return _grouped(q, k, v, span.mask).transpose(1, 2)
    mixed = torch_attention(q, k, v, attn_mask=span.mask, is_causal=span.causal, enable_gqa=grouped)
    return mixed.transpose(1, 2)


def _trains_compiled(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Returns whether `ShortAttention` computes the gradient faster than torch's kernel. Shapes (B, N, T, H)."""
    serves = q.device.type == "cpu" and q.dtype == k.dtype == v.dtype == torch.bfloat16 and q.shape[2] <= LONGEST
    return serves and q.requires_grad and torch.compiler.is_compiling()


def _grouped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of grouped heads with a mask, for CUDA: the queries of a group become queries of one head.

    No fused kernel of torch takes grouped heads together with a mask. torch would repeat keys and values in memory.

    Shapes: q (B, N, T, H); k, v (B, K, S, H); mask (B or 1, 1, T, S); returns (B, N, T, H).
    """
    K, groups = k.shape[1], q.shape[1] // k.shape[1]
    queries = rearrange(q, "B (K G) T H -> B K (G T) H", K=K)
    mixed = torch_attention(queries, k, v, attn_mask=mask.repeat(1, 1, groups, 1))
    return rearrange(mixed, "B K (G T) H -> B (K G) T H", G=groups)


def flash(q: Tensor, k: Tensor, v: Tensor, span: Span, cached: bool) -> Tensor:
    """Computes attention on a KV cache by the flash-attn package, without a mask.

    Each row reads the slots up to its last position. The positions of a row must be consecutive. Without a cache,
    `sdpa` computes the attention: torch's kernel uses the same algorithm.

    Shapes: as `sdpa`.
    """
    if not cached:
        return sdpa(q, k, v, span, cached)
    from flash_attn import flash_attn_with_kvcache

    B, T = q.shape[:2]
    if isinstance(span.positions, int):
        lengths = torch.full((B,), span.positions + T, dtype=torch.int32, device=q.device)
    else:
        lengths = span.lengths
    # flash-attn aligns the causal mask to the end of the keys: query t of T sees all but the last T - 1 - t slots.
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)


def _native(q: Tensor, k: Cached, v: Cached, span: Span) -> Tensor:
    """Attention of one query by the native kernel.

    1,025 slots of 32 heads in bf16 take 0.6 ms; `_blockwise` takes 2.3 ms.

    Shapes: as `sdpa`, with T = 1.
    """
    if isinstance(span.positions, int):
        slots = torch.full((len(q),), span.filled, device=q.device)
    else:
        slots = span.positions[:, 0] + 1
    if isinstance(k, Scaled) and isinstance(v, Scaled):
        return torch.ops.lumina_mgpt.one_query(q.contiguous(), k.integers, v.integers, k.scales, v.scales, slots)
    return torch.ops.lumina_mgpt.one_query(q.contiguous(), k, v, None, None, slots)


def _outside_torch_kernel(q: Tensor, k: Cached, cached: bool) -> bool:
    """Returns whether torch's kernel is slow here: few queries on int8, or one in half precision on a cache.

    On CUDA it never is: to convert an int8 cache takes four kernels a layer, and plain products take several a row.
    """
    if q.device.type == "cuda":
        return False
    if isinstance(k, Scaled):
        return q.shape[1] <= INT8_QUERIES
    return cached and q.shape[1] == 1 and q.device.type == "cpu" and q.dtype in HALVES and not q.requires_grad


def _blockwise(q: Tensor, k: Cached, v: Cached, span: Span) -> Tensor:
    """Attention by plain products over blocks of the cache: several rows, or some heads and slots of one row.

    Scales of an int8 cache multiply scores and weights, so memory traffic is integers only. On a CPU each block is
    converted to float32 in a cache-resident scratch buffer. One query of 32 heads on 1,025 slots, ms on two cores: 2.0
    in bf16, 2.4 in int8; torch's kernel in bf16 takes 4.2, or 2.6 with the query given twice.

    Shapes: as `sdpa`.
    """
    T, H = q.shape[1], q.shape[3]
    keys, values = ((part.integers if isinstance(part, Scaled) else part).transpose(1, 2) for part in (k, v))
    B, K, S = keys.shape[:3]
    on_cpu = q.device.type == "cpu"
    queries = q.to(torch.promote_types(q.dtype, torch.float32)) if on_cpu else q
    queries = rearrange(queries * H**-0.5, "B T (K G) H -> B K (G T) H", K=K)
    rows, blocks, numbers = _blocks(B, K, S, H, on_cpu)
    scratch = queries.new_empty(numbers)
    mixed = queries.new_zeros(queries.shape)  # not zeros_like: `queries` may be non-contiguous
    all_scores = queries.new_empty((rows, *queries.shape[1:3], S))  # (rows, K, G T, S)
    for row in (slice(first, min(first + rows, B)) for first in range(0, B, rows)):
        scores = all_scores[: row.stop - row.start]
        for head, slot in blocks:  # several rows have one block of all heads, so rows and heads flatten to a view
            product = queries[row, head].flatten(0, 1) @ _copied(keys[row, head, slot], scratch).flatten(0, 1).mT
            scores[:, head, :, slot] = product.unflatten(0, (len(scores), -1))
        weights = _weights(scores, k, v, span, row, T).to(queries.dtype)
        for head, slot in blocks:
            block = _copied(values[row, head, slot], scratch).flatten(0, 1)
            mixed[row, head].view(-1, *mixed.shape[2:]).baddbmm_(weights[:, head, :, slot].flatten(0, 1), block)
    return rearrange(mixed.to(q.dtype), "B K (G T) H -> B T (K G) H", T=T)


def _blocks(B: int, K: int, S: int, H: int, on_cpu: bool) -> tuple[int, list[tuple[slice, slice]], int]:
    """Returns rows of a block, the (heads, slots) of a row's blocks, and the numbers of keys in the largest block."""
    split = on_cpu and K * S * H > BLOCK  # one row exceeds a block
    heads = min(K, BLOCK_HEADS) if split else K
    slots = min(S, max(1, BLOCK // (heads * H))) if split else S
    rows = min(B, max(1, BLOCK // (K * S * H))) if on_cpu else 1
    blocks = [
        (slice(head, min(head + heads, K)), slice(at, min(at + slots, S)))
        for head in range(0, K, heads)
        for at in range(0, S, slots)
    ]
    return rows, blocks, rows * heads * slots * H


def _copied(part: Tensor, scratch: Tensor) -> Tensor:
    return scratch[: part.numel()].view(part.shape).copy_(part)


def _weights(scores: Tensor, k: Cached, v: Cached, span: Span, row: slice, T: int) -> Tensor:
    """Returns the softmax of some rows, times the scales of int8 values.

    Shapes: scores and the result (rows, K, G T, S).
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if isinstance(k, Scaled):
        scores = scores * k.scales[row].transpose(1, 2)[:, :, None]
    if span.causal or span.mask is not None:
        grouped = scores.unflatten(2, (-1, T))  # (rows, K, G, T, S)
        if span.mask is None:
            grouped += scores.new_full(grouped.shape[-2:], float("-inf")).triu_(1)
        else:  # the mask has one row for all, or one for each
            grouped += (span.mask if len(span.mask) == 1 else span.mask[row])[:, :, None]
    weights = scores.softmax(-1)
    return weights * v.scales[row].transpose(1, 2)[:, :, None] if isinstance(v, Scaled) else weights


def _fused(q: Tensor, k: Cached, v: Cached, span: Span) -> Tensor:
    """Attention of one query by sums of products, which torch.compile fuses to two loops over the cache.

    Shapes: as `sdpa`, with T = 1.
    """
    keys, values = (part.integers if isinstance(part, Scaled) else part for part in (k, v))
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = rearrange(q.to(wide) * q.shape[-1] ** -0.5, "B 1 (K G) H -> B 1 K G H", K=keys.shape[2])
    scores = (queries * keys[:, :, :, None].to(wide)).sum(-1)  # (B, S, K, G)
    if isinstance(k, Scaled):
        scores = scores * k.scales[..., None]
    if span.mask is not None:
        scores = scores + rearrange(span.mask, "B 1 1 S -> B S 1 1")
    weights = scores.softmax(1)
    if isinstance(v, Scaled):
        weights = weights * v.scales[..., None]
    mixed = (weights[..., None] * values[:, :, :, None].to(wide)).sum(1)  # (B, K, G, H)
    return rearrange(mixed.to(q.dtype), "B K G H -> B 1 (K G) H")
