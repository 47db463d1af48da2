"""Attention backends: one function of (q, k, v, span) each, chosen by name when the model is built."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.kernels import dispatch
from lumina_mgpt.model.kv_cache import Held, KVCache, Scaled

QUERY_BLOCK = 128
MAX_WRITTEN_OUT = 1024
HALVES = (torch.bfloat16, torch.float16)
INT8_QUERIES = 256  # more of them at once, and the integers of a layer are made numbers for torch's kernel
BLOCK, BLOCK_HEADS = 1 << 20, 8  # numbers of a cache made float32 at once on a CPU, 4 MB: 1024 slots of 8 heads of 128


@dataclass(frozen=True)
class Span:
    """What the queries of one forward may see; made once, used by every layer.

    positions: (B, T), or one int, the position of the first query where all rows are alike.
    filled: how many key slots are read. mask: None, or (B or 1, 1, T, S) to be added to the scores.
    causal: queries and keys are the same T positions, so the kernel's own causal mask does.
    documents: lengths of the sequences that share a row, one after another; none sees another.
    """

    positions: Tensor | int
    filled: int
    mask: Tensor | None
    causal: bool
    documents: tuple[int, ...] = ()

    @classmethod
    def of(cls, length: int, positions: Tensor | int, cache: KVCache | None, filled: int | None, dtype: torch.dtype,
           device: torch.device) -> "Span":  # fmt: skip
        """Never reads a tensor back: how much is seen follows from shapes and ints, who sees what from a comparison."""
        if cache is None:
            return cls(positions, length, None, True)
        if isinstance(positions, int):
            filled = positions + length
            if positions == 0 or length == 1:  # all of what is filled, or its lower triangle
                return cls(positions, filled, None, positions == 0 and length > 1)
            seen = torch.arange(positions, filled, device=device)[None, :]
        else:
            filled = cache.slots if filled is None else filled
            seen = positions
        assert 0 < filled <= cache.slots, f"filled = {filled} of {cache.slots} slots"
        hidden = torch.arange(filled, device=device) > seen[:, None, :, None]  # (B or 1, 1, T, S)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
        return cls(positions, filled, mask, False)


def sdpa(q: Tensor, k: Held, v: Held, span: Span, cached: bool) -> Tensor:
    """torch's scaled_dot_product_attention; written out where it reads a cache badly (`_blockwise`).

    Shapes: q (B, T, N, H); k, v (B, S, K, H); returns (B, T, N, H).
    """
    if span.documents:  # one by one: no mask to hold, and no score that a mask would throw away
        alone, parts = replace(span, documents=()), (part.split(span.documents, 1) for part in (q, k, v))
        return torch.cat([sdpa(*document, alone, cached) for document in zip(*parts, strict=True)], 1)
    if cached and dispatch.serves_one_query(q, k.codes if isinstance(k, Scaled) else k):
        return _native(q, k, v, span)
    few = INT8_QUERIES if isinstance(k, Scaled) else 1
    if q.shape[1] <= few and (isinstance(k, Scaled) or _reads_badly(q, cached)):
        if not torch.compiler.is_compiling():
            return _blockwise(q, k, v, span)
        if q.shape[1] == 1:
            return _fused(q, k, v, span)
    if isinstance(k, Scaled):
        k, v = k.numbers(q.dtype), v.numbers(q.dtype)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    grouped = q.shape[1] != k.shape[1]
    if span.causal and q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16 and not grouped:
        return _causal_blocks(q, k, v).transpose(1, 2)
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=span.mask, is_causal=span.causal, enable_gqa=grouped)
    return mixed.transpose(1, 2)


def _causal_blocks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention written out, a block of queries at a time against the keys that it sees.

    For training on a CPU: torch's fused kernel is slow there in its backward. Forward and backward of 32 rows, 6 heads
    of 64, bf16, ms on one core, fused / this / this compiled: 213 / 119 / 87 for T = 256, 415 / 207 / 156 for T = 350.
    It keeps the probabilities for the backward, in bf16, which suits short sequences: T > 1024 goes to the kernel.

    Shapes: q, k, v (B, N, T, H), and so is what it returns.
    """
    T, H = q.shape[-2:]
    if T > MAX_WRITTEN_OUT:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    mixed = []
    for start in range(0, T, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, T)
        unseen = q.new_full((stop - start, stop), float("-inf")).triu_(start + 1)
        scores = q[:, :, start:stop] @ k[:, :, :stop].transpose(-1, -2)
        mixed.append(torch.add(unseen, scores, alpha=H**-0.5).softmax(-1) @ v[:, :, :stop])
    return torch.cat(mixed, 2)


def _blockwise(q: Tensor, k: Held, v: Held, span: Span) -> Tensor:
    """Attention written out, some rows at a time, or some heads and slots of one: torch's kernels read a cache badly.

    Scales of an int8 cache go to scores and weights, so that only integers are read from memory. On a CPU each block
    becomes float32 in one small room that stays in the processor's cache. One query of 32 heads on 1,025 slots, ms on
    two cores: 2.0 in bf16 and 2.4 in int8; torch's kernel in bf16 4.2, or 2.6 given the query twice.

    Shapes: as `sdpa`.
    """
    T, H = q.shape[1], q.shape[3]
    keys, values = ((part.codes if isinstance(part, Scaled) else part).transpose(1, 2) for part in (k, v))
    B, K, S = keys.shape[:3]
    on_cpu = q.device.type == "cpu"
    queries = q.to(torch.promote_types(q.dtype, torch.float32)) if on_cpu else q
    queries = rearrange(queries * H**-0.5, "B T (K G) H -> B K (G T) H", K=K)
    many = on_cpu and K * S * H > BLOCK  # of a single row, for one block
    heads = min(K, BLOCK_HEADS) if many else K
    slots = min(S, max(1, BLOCK // (heads * H))) if many else S
    rows = max(1, BLOCK // (K * S * H)) if on_cpu else 1
    blocks = [(slice(head, min(head + heads, K)), slice(at, min(at + slots, S)))
              for head in range(0, K, heads) for at in range(0, S, slots)]  # fmt: skip
    room = queries.new_empty(min(rows, B) * heads * slots * H)
    mixed = queries.new_zeros(queries.shape)  # contiguous, as queries need not be
    held = queries.new_empty((min(rows, B), *queries.shape[1:3], S))  # (rows, K, G T, S)
    for row in (slice(first, min(first + rows, B)) for first in range(0, B, rows)):
        scores = held[: row.stop - row.start]
        for head, slot in blocks:  # of all heads where there are several rows: so the first two dimensions are one
            product = queries[row, head].flatten(0, 1) @ _copied(keys[row, head, slot], room).flatten(0, 1).mT
            scores[:, head, :, slot] = product.unflatten(0, (len(scores), -1))
        weights = _weights(scores, k, v, span, row, T).to(queries.dtype)
        for head, slot in blocks:
            block = _copied(values[row, head, slot], room).flatten(0, 1)
            mixed[row, head].view(-1, *mixed.shape[2:]).baddbmm_(weights[:, head, :, slot].flatten(0, 1), block)
    return rearrange(mixed.to(q.dtype), "B K (G T) H -> B T (K G) H", T=T)


def _reads_badly(q: Tensor, cached: bool) -> bool:
    return cached and q.device.type == "cpu" and q.dtype in HALVES and not q.requires_grad


def _fused(q: Tensor, k: Held, v: Held, span: Span) -> Tensor:
    """One query's attention as sums of products, which torch.compile makes two loops over the cache of.

    Shapes: as `sdpa`, with T = 1.
    """
    keys, values = (part.codes if isinstance(part, Scaled) else part for part in (k, v))
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


def _native(q: Tensor, k: Held, v: Held, span: Span) -> Tensor:
    """One query by `native`: on 1,025 slots of 32 heads of bf16, 0.6 ms where `_blockwise` takes 2.3.

    Shapes: as `sdpa`, with T = 1.
    """
    if isinstance(span.positions, int):
        slots = torch.full((len(q),), span.filled, device=q.device)
    else:
        slots = span.positions[:, 0] + 1
    parts = (k.codes, v.codes, k.scales, v.scales) if isinstance(k, Scaled) else (k, v, None, None)
    return torch.ops.lumina_mgpt.one_query(q.contiguous(), *parts, slots)


def _copied(part: Tensor, room: Tensor) -> Tensor:
    return room[: part.numel()].view(part.shape).copy_(part)


def _weights(scores: Tensor, k: Held, v: Held, span: Span, row: slice, T: int) -> Tensor:
    """Softmax of some rows, with the scales of an int8 cache. Shapes: scores (rows, K, G T, S), and so it returns."""
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if isinstance(k, Scaled):
        scores = scores * k.scales[row].transpose(1, 2)[:, :, None]
    if span.causal or span.mask is not None:
        grouped = scores.unflatten(2, (-1, T))  # (rows, K, G, T, S)
        if span.causal:
            grouped += scores.new_full(grouped.shape[-2:], float("-inf")).triu_(1)
        else:  # one mask may serve every row
            grouped += (span.mask if len(span.mask) == 1 else span.mask[row])[:, :, None]
    weights = scores.softmax(-1)
    return weights * v.scales[row].transpose(1, 2)[:, :, None] if isinstance(v, Scaled) else weights


def flash(q: Tensor, k: Tensor, v: Tensor, span: Span, cached: bool) -> Tensor:
    """The flash-attn package where there is a cache: each row reads its own length only, without a mask.

    The positions of a row must follow one another. Without a cache, torch's own kernel is the same algorithm.
    Shapes: as `sdpa`.
    """
    if not cached:
        return sdpa(q, k, v, span, cached)
    from flash_attn import flash_attn_with_kvcache

    B, T = q.shape[:2]
    if isinstance(span.positions, int):
        lengths = torch.full((B,), span.positions + T, dtype=torch.int32, device=q.device)
    else:
        lengths = (span.positions[:, -1] + 1).to(torch.int32)
    # Causal is aligned to the end of each row's keys: query t of T sees all slots but the last T - 1 - t.
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)


def backend(name: str) -> Callable[[Tensor, Tensor, Tensor, Span, bool], Tensor]:
    """The backend of that name.

    Raises:
        InputError: an unknown name, or flash without the package or without a GPU.
    """
    if name == "sdpa":
        return sdpa
    if name != "flash":
        raise InputError(f"--attn must be sdpa or flash, got {name!r}")
    if not torch.cuda.is_available():
        raise InputError("--attn flash needs a CUDA GPU, and none is visible; use --attn sdpa")
    try:
        import flash_attn  # noqa: F401
    except Exception as error:  # an extension of another torch raises more than ImportError
        raise package_error(error, "--attn flash", "flash-attn", ("flash_attn",), "use --attn sdpa") from None
    return flash
