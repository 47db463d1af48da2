"""Attention backends against attention written as its formula."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from attention_formula import formula, heads

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import attention, short_attention
from lumina_mgpt.model.attention import Span
from lumina_mgpt.model.kv_cache import KVCache, Scaled

CONFIG = ModelConfig(
    vocab_size=8,
    hidden_size=32,
    intermediate_size=8,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    image_code_offset=0,
    num_image_codes=8,
)


def span_for(positions, length, cache, filled=None):
    return Span.of(length, positions, cache, filled, torch.float64, torch.device("cpu"))


@pytest.mark.parametrize("length", [1, 2, 5])
def test_each_row_sees_the_slots_up_to_its_own_positions(length):
    cache = KVCache(CONFIG, 3, 12, torch.float64, "cpu")
    positions = torch.tensor([[4], [0], [6]]) + torch.arange(length)
    span = span_for(positions, length, cache, filled=11)
    q, k, v = heads(3, length, 4, 8), heads(3, 11, 2, 8, seed=1), heads(3, 11, 2, 8, seed=2)
    expected = formula(q, k, v, positions)
    torch.testing.assert_close(attention.sdpa(q, k, v, span, True), expected, rtol=0, atol=1e-12)


def test_cheap_spans_have_no_mask():
    cache = KVCache(CONFIG, 2, 12, torch.float32, "cpu")
    for span, filled, causal in [
        (span_for(0, 7, None), 7, True),
        (span_for(0, 7, cache), 7, True),
        (span_for(9, 1, cache), 10, False),
        (span_for(0, 1, cache), 1, False),
    ]:
        assert span.mask is None and (span.filled, span.causal) == (filled, causal)
    assert span_for(3, 2, cache).mask.shape == (1, 1, 2, 5)
    assert span_for(torch.zeros(2, 1, dtype=torch.long), 1, cache).filled == 12


def test_the_cache_writes_to_the_given_slots_only():
    cache = KVCache(CONFIG, 2, 8, torch.bfloat16, "cpu")
    keys, values = heads(2, 3, 2, 8, seed=1, dtype=torch.float32), heads(2, 3, 2, 8, seed=2, dtype=torch.float32)
    positions = torch.tensor([[0, 1, 2], [4, 5, 6]])
    k, v = cache.layers[1].update(keys, values, positions, 7)
    assert k.shape == v.shape == (2, 7, 2, 8) and k.dtype == torch.bfloat16
    for row, start in ((0, 0), (1, 4)):
        assert torch.equal(k[row, start : start + 3], keys[row].bfloat16())
        assert torch.equal(v[row, start : start + 3], values[row].bfloat16())
    held = sum(tensor.count_nonzero() for tensor in cache.tensors())
    assert held == keys.numel() + values.numel()  # the rest is zero: never NaN


@pytest.mark.parametrize("positions", [torch.tensor([[4, 5, 6], [0, 1, 2]]), 3, 0], ids=["ragged", "alike", "first"])
@pytest.mark.parametrize(("block", "queries"), [(4 * 2 * 8, 256), (1 << 19, 256), (1 << 19, 2)])
def test_an_int8_cache_is_read_as_what_its_integers_stand_for(monkeypatch, positions, block, queries):
    """Against the formula on integers times scales; and those are within half a step of what was put in."""
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "INT8_QUERIES", queries)
    cache = KVCache(CONFIG, 2, 9, torch.int8, "cpu")
    before = heads(2, 7, 2, 8, seed=3), heads(2, 7, 2, 8, seed=4) * torch.logspace(-3, 3, 7)[:, None, None]
    if not isinstance(positions, int) or positions:
        cache.layers[1].update(*before, 0, 7)
    span = span_for(positions, 3, cache, filled=7)
    q, new = heads(2, 3, 4, 8), (heads(2, 3, 2, 8, seed=1), heads(2, 3, 2, 8, seed=2))
    held = cache.layers[1].update(*new, span.positions, span.filled)
    k, v = (part.integers.double() * part.scales.double()[..., None] for part in held)
    asked = torch.arange(3) + (positions if isinstance(positions, int) else positions[:, :1])
    asked = asked.expand(2, 3)
    torch.testing.assert_close(attention.sdpa(q, *held, span, True), formula(q, k, v, asked), rtol=1e-5, atol=1e-5)
    for row in range(2):
        for got, given in zip((k, v), new, strict=True):
            step = given[row].abs().amax(-1, keepdim=True) / 127
            assert ((got[row, asked[row]] - given[row]).abs() <= 0.501 * step).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("position", [torch.tensor([[5], [2]]), 4], ids=["ragged", "alike"])
def test_one_query_on_a_half_precision_cache(monkeypatch, position, dtype):
    """Against the formula in float64, in blocks of two slots; by the numbers, no product is rounded to 8 bits."""
    monkeypatch.setattr(attention, "BLOCK", 2 * 2 * 8)
    cache = KVCache(CONFIG, 2, 9, dtype, "cpu")
    cache.layers[1].update(heads(2, 7, 2, 8, seed=3), heads(2, 7, 2, 8, seed=4), 0, 7)
    span = span_for(position, 1, cache, filled=6)
    q = heads(2, 1, 4, 8).to(dtype)
    k, v = cache.layers[1].update(heads(2, 1, 2, 8, seed=1), heads(2, 1, 2, 8, seed=2), span.positions, span.filled)
    asked = torch.tensor([[position], [position]]) if isinstance(position, int) else position
    expected = formula(q.double(), k.double(), v.double(), asked)
    torch.testing.assert_close(attention.sdpa(q, k, v, span, True), expected.to(dtype), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8])
@pytest.mark.parametrize("position", [torch.tensor([[5], [2]]), 4], ids=["ragged", "alike"])
def test_one_query_for_the_compiler(position, dtype):
    """What a compiled step computes, against what the others do, with its cache's scales and masks."""
    cache = KVCache(CONFIG, 2, 9, dtype, "cpu")
    cache.layers[1].update(heads(2, 7, 2, 8, seed=3), heads(2, 7, 2, 8, seed=4), 0, 7)
    span, q = span_for(position, 1, cache, filled=6), heads(2, 1, 4, 8)
    held = cache.layers[1].update(heads(2, 1, 2, 8, seed=1), heads(2, 1, 2, 8, seed=2), span.positions, span.filled)
    expected = attention.sdpa(q, *held, span, True)
    torch.testing.assert_close(attention._fused(q, *held, span), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
def test_rows_of_a_cache_are_spread(dtype):
    cache = KVCache(CONFIG, 3, 5, dtype, "cpu")
    cache.layers[0].update(heads(2, 4, 2, 8, seed=1), heads(2, 4, 2, 8, seed=2), 0, 4)
    before = [held.clone() for held in cache.tensors()]
    cache.copy_rows(torch.tensor([1, 0, 1]), 3)
    for old, new in zip(before, cache.tensors(), strict=True):
        assert torch.equal(new[:, :, :3], old[[1, 0, 1], :, :3])
        assert torch.equal(new[:, :, 3:], old[:, :, 3:])
    assert all(tensor.count_nonzero() for tensor in cache.layers[0].stores)


def written_out(q, k, v, span, cached):
    """Causal attention in bf16 products with a softmax in float32, as autocast computes it. Shapes (B, T, N, H)."""
    q, k, v = (part.transpose(1, 2) for part in (q, k, v))
    scores = (q @ k.transpose(2, 3)).float() / q.shape[3] ** 0.5
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    return (scores.masked_fill(hidden, -torch.inf).softmax(3).to(v.dtype) @ v).transpose(1, 2)


@pytest.mark.parametrize(("rows", "length", "factor"), [(1, 1, 1), (2, 65, 1), (5, 96, 1), (5, 96, 8), (3, 300, 1)])
def test_compiled_training_in_bfloat16(rows, length, factor, monkeypatch):
    """Values are those of torch's kernel; gradients are as exact as those of `written_out`. `factor` is of scores."""
    monkeypatch.setattr(short_attention, "SCORES", 2 * 3 * 96 * 96)
    sizes, gradients = [], short_attention._compiled()
    monkeypatch.setattr(
        short_attention, "_compiled", lambda: lambda *parts: sizes.append(len(parts[0])) or gradients(*parts)
    )
    q, k, v = (heads(rows, length, 3, 8, seed=s, dtype=torch.bfloat16) for s in range(3))
    outward, span = heads(rows, length, 3, 8, seed=9, dtype=torch.bfloat16), span_for(0, length, None)

    def run(attend, dtype=torch.bfloat16):
        given = [(part * scale).to(dtype).requires_grad_() for part, scale in ((q, factor), (k, 1), (v, 1))]
        out = attend(*given, span, False)
        return out, torch.autograd.grad(out, given, outward.to(dtype))

    out, compiled = run(torch.compile(attention.sdpa, dynamic=False))
    torch.testing.assert_close(out, run(attention.sdpa)[0], rtol=0, atol=0)
    exact = run(attention.sdpa, torch.float64)[1]
    for found, plain, true in zip(compiled, run(written_out)[1], exact, strict=True):
        assert found.dtype == torch.bfloat16 and found.shape == true.shape
        error, allowed = (found - true).norm(), 1.2 * (plain - true).norm()
        assert error <= allowed + 1e-3 * true.norm() and allowed <= 0.1 * true.norm() + 1e-3
    assert sum(sizes) == rows and max(sizes) <= max(1, 2 * 96 * 96 // length**2)


@pytest.mark.parametrize(
    ("length", "groups", "dtype", "trained", "compiled", "served"),
    [
        (9, 1, torch.bfloat16, True, True, True),
        (9, 1, torch.float32, True, True, False),
        (9, 1, torch.bfloat16, False, True, False),
        (9, 1, torch.bfloat16, True, False, False),
        (9, 3, torch.bfloat16, True, True, False),
        (513, 1, torch.bfloat16, True, True, False),
    ],
)
def test_only_compiled_training_of_short_sequences_in_bfloat16_differs(
    length, groups, dtype, trained, compiled, served, monkeypatch
):
    used, gradients = [], short_attention._compiled()
    monkeypatch.setattr(short_attention, "_compiled", lambda: lambda *parts: used.append(1) or gradients(*parts))
    attend = torch.compile(attention.sdpa, dynamic=False) if compiled else attention.sdpa
    q, k, v = (
        heads(2, length, n, 8, seed=n, dtype=dtype).requires_grad_(trained) for n in (3, 3 // groups, 3 // groups)
    )
    out = attend(q, k, v, span_for(0, length, None), False)
    if trained:
        out.sum().backward()
    assert bool(used) == served


def test_attention_for_training_equals_attention_without_gradients():
    """Bit for bit: GRPO compares the two."""
    q, k, v = (heads(2, 200, 3, 8, seed=s, dtype=torch.float32) for s in range(3))
    span = span_for(0, 200, None)
    plain = attention.sdpa(q, k, v, span, False)
    trained = attention.sdpa(*(part.clone().requires_grad_() for part in (q, k, v)), span, False)
    assert trained.requires_grad and torch.equal(plain, trained)


def fake_flash(q, k_cache, v_cache, *, cache_seqlens, causal):
    """What flash-attn documents: per-row lengths, causal aligned to the end of each row's keys."""
    assert causal and cache_seqlens.dtype == torch.int32
    T = q.shape[1]
    return formula(q, k_cache, v_cache, cache_seqlens[:, None].long() - T + torch.arange(T))


@pytest.mark.parametrize("positions", [torch.tensor([[4, 5, 6], [0, 1, 2]]), 3], ids=["ragged", "alike"])
def test_flash_reads_each_row_to_its_own_length(monkeypatch, positions):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace(flash_attn_with_kvcache=fake_flash))
    cache = KVCache(CONFIG, 2, 9, torch.float64, "cpu")
    span = span_for(positions, 3, cache, filled=8)
    q, k, v = heads(2, 3, 4, 8), heads(2, span.filled, 2, 8, seed=1), heads(2, span.filled, 2, 8, seed=2)
    expected = attention.sdpa(q, k, v, span, True)
    torch.testing.assert_close(attention.flash(q, k, v, span, True), expected, rtol=0, atol=1e-12)
    span = span_for(0, 3, None)
    torch.testing.assert_close(attention.flash(q, q, q, span, False), attention.sdpa(q, q, q, span, False))


def test_backends_that_cannot_work_say_so(monkeypatch):
    assert attention.backend("sdpa") is attention.sdpa
    with pytest.raises(InputError, match="attn must be sdpa or flash, got 'eager'"):
        attention.backend("eager")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(InputError, match="attn=flash needs a CUDA GPU"):
        attention.backend("flash")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(InputError, match="attn=flash needs the flash-attn package .* attn=sdpa"):
        attention.backend("flash")
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())
    assert attention.backend("flash") is attention.flash


@pytest.mark.parametrize("shape", [(2, 7, 6, 6, 50), (3, 1, 6, 3, 50), (1, 9, 32, 32, 1100), (2, 5, 8, 4, 3000)])
def test_an_int8_cache_in_blocks_of_rows_or_of_heads_and_slots(shape):
    """Rows, queries, heads, heads of keys and slots: many rows in one block, and many blocks for one row."""
    B, T, N, K, S = shape
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(B, n, heads, 128, generator=random) for n, heads in ((T, N), (S, K), (S, K)))
    k, v = Scaled.quantize(k), Scaled.quantize(v)
    positions = torch.arange(S - T, S)[None] - torch.arange(B)[:, None]
    hidden = torch.arange(S) > positions[:, None, :, None]
    mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    got = attention.sdpa(q, k, v, Span(positions, S, mask, False), True)
    plain = (part.transpose(1, 2) for part in (q, k.dequantize(torch.float32), v.dequantize(torch.float32)))
    expected = F.scaled_dot_product_attention(*plain, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    assert (got - expected).abs().max() < 1e-5
