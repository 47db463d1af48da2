"""Layers in native CPU operators, against the modules that they replace and formulas in float64."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from attention_formula import heads
from step_calls import CALLS, CONFIG

from lumina_mgpt.kernels import build, dispatch
from lumina_mgpt.model import native_layer, quantization
from lumina_mgpt.model.int4 import dequantize
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import HeadNorm, RMSNorm, Transformer, rope_angles, rotate

pytestmark = pytest.mark.skipif(
    not build.machine_supports(), reason="no AVX-512 VNNI, no C++ compiler, or kernels switched off"
)
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def registered():
    assert dispatch.ready()


def int4(outputs: int, inputs: int, group: int = 32) -> tuple[Int4Linear, torch.Tensor]:
    """A packed module, and its weights in float64."""
    module = Int4Linear(inputs, outputs, group)
    module.load("weight", heads(outputs, inputs, seed=outputs, dtype=torch.float32), "cpu")
    weight = dequantize(module.matrix, torch.float64)
    module.pack(BF16)
    assert module.native
    return module, weight


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_norm_gate_and_residual_are_part_of_products(rows):
    (first, w1), (second, w2) = int4(128, 192), int4(192, 192)
    gate, gate_weight = int4(192, 192)
    x = heads(1, rows, 192, seed=rows, dtype=BF16)
    norm = RMSNorm(192, 1e-5)
    norm.weight.data = heads(192, seed=5).add(2).to(BF16)
    normed = norm(x).double()
    for y, w in zip(quantization.native(x, [first, second], norm.weight, norm.eps), (w1, w2), strict=True):
        close(y, normed @ w.T)
    (y,) = quantization.native(x, [gate, second], norm.weight, norm.eps, gated=True)
    close(y, F.silu(normed @ gate_weight.T) * (normed @ w2.T))
    residual = heads(1, rows, 128, seed=3, dtype=BF16) * 50
    (y,) = quantization.native(x, [first], residual=residual)
    assert torch.equal(y, residual + first(x)), "rounded as the sum of the rounded product"


def test_no_rows_and_no_biases_in_fused_products():
    (module, _), biased = int4(128, 192), Int4Linear(192, 128, 32, torch.nn.Parameter(torch.zeros(128)))
    assert module(torch.zeros(2, 0, 192, dtype=BF16)).shape == (2, 0, 128)
    x = torch.zeros(1, 1, 192, dtype=BF16)
    for options in ({"gated": True}, {"residual": x[..., :128]}):
        with pytest.raises(AssertionError):
            quantization.native(x, [biased, biased], **options)


def close(y, expected):
    assert y.dtype == BF16 and y.shape == expected.shape
    assert (y.double() - expected).norm() < 0.006 * expected.norm()


def test_a_product_of_large_small_and_invalid_numbers():
    """Scales from 1e-30 to 1e30 in one row, a row of zeros, and a row with NaN or infinity, which stays one."""
    module, weight = int4(64, 128)
    x = heads(4, 128, dtype=torch.float32) * torch.tensor([1e-28, 1e30, 1, 1])[:, None]
    x[2], x[3, 7] = 0, torch.nan
    x = x.to(BF16)
    y, expected = module(x), x.double() @ weight.T
    for row in (0, 1):
        assert (y[row].double() - expected[row]).norm() < 0.005 * expected[row].norm()
    assert y[2].eq(0).all() and y[3].isnan().all()
    x[3, 7] = torch.inf
    assert not module(x)[3].isfinite().any()


@pytest.mark.parametrize("dtype", [BF16, torch.int8])
@pytest.mark.parametrize(("rows", "width"), [((1, 1), 64), ((4, 2), 128), ((4, 1), 64)], ids=str)
@pytest.mark.parametrize("at", ["alike", "own", "int"])
def test_heads_are_prepared_as_by_the_modules(dtype, rows, width, at):
    B, T, N, K, S = 2, 3, 4, 2, 12
    config = replace(CONFIG, hidden_size=N * width, num_attention_heads=N, num_key_value_heads=K)
    q, k, v = (heads(B, T, n, width, seed=n + i, dtype=BF16) for i, n in enumerate((N, K, K)))
    norms = [HeadNorm(N, rows[0], width), HeadNorm(K, min(rows[1], K), width)]
    for norm in norms:
        norm.weight.data = heads(*norm.weight.shape, seed=7).to(BF16)
        norm.bias.data = heads(norm.bias.shape[0], width, seed=8).to(BF16)
    positions = torch.tensor([[4, 5, 6], [8, 9, 11]]) if at == "own" else torch.arange(4, 7)
    rope = rope_angles(config, positions, S, BF16)
    expected_cache, cache = (KVCache(config, B + 1, S, dtype, "cpu").layers[0] for _ in range(2))
    expected_q, new_k = (rotate(norm(x), rope) for norm, x in zip(norms, (q, k), strict=True))
    expected_cache.update(new_k, v, 4 if at == "int" else positions.expand(B, T), S)
    weights = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    scales = cache.scales or (None, None)
    found = torch.ops.lumina_mgpt.prepare_heads(q, k, v, weights, *rope, positions, *cache.stores, *scales)
    # Sums of another order change some of the roundings to bf16 (1/256) or int8.
    torch.testing.assert_close(found, expected_q, rtol=1 / 64, atol=0.02)
    assert (found != expected_q).float().mean() < 0.02
    for one, other in zip(cache.stores, expected_cache.stores, strict=True):
        assert one.any() and (one.float() - other.float()).abs().max() <= (1 if dtype == torch.int8 else 0.03)
        assert (one != other).float().mean() < 0.02
    for one, other in zip(cache.scales or (), expected_cache.scales or (), strict=True):
        torch.testing.assert_close(one, other, rtol=1 / 64, atol=0)
    assert torch.equal(cache.stores[1], expected_cache.stores[1]), "values are copied or rounded alike"


def test_what_they_cannot_take_is_refused():
    """Slots outside the cache, above all."""
    q, k = heads(2, 1, 4, 64, dtype=BF16), heads(2, 1, 2, 64, dtype=BF16)
    weight, angle = torch.ones(1, 64, dtype=BF16), torch.ones(1, 1, 64)
    store, at = torch.zeros(2, 2, 5, 64, dtype=BF16), torch.tensor([4])
    integers, scales = store.char(), torch.zeros(2, 2, 5)
    right = (q, k, k, [weight] * 4, angle, angle, at, store, store, None, None)
    torch.ops.lumina_mgpt.prepare_heads(*right)
    for index, wrong in (
        (0, q.float()),
        (1, k[:1]),
        (2, k.repeat(1, 1, 2, 1)),
        (3, [weight] * 3),
        (3, [weight.repeat(3, 1)] * 4),
        (4, angle.double()),
        (5, angle[..., :32].contiguous()),
        (6, torch.tensor([5])),
        (6, torch.tensor([-1])),
        (6, torch.tensor([4, 4, 4])),
        (6, at.int()),
        (7, store[:1]),
        (7, integers),
        (8, store[:, :, :4]),
        (9, scales),
    ):
        with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
            torch.ops.lumina_mgpt.prepare_heads(*right[:index], wrong, *right[index + 1 :])
    torch.ops.lumina_mgpt.prepare_heads(*right[:7], integers, integers, scales, scales)
    with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
        torch.ops.lumina_mgpt.prepare_heads(*right[:7], integers, integers, scales, scales[:1])
    module, _ = int4(64, 128)
    other, _ = int4(128, 128)
    x, packed, pairs = heads(2, 128, dtype=BF16), module.packed, module.scale_and_zero
    for lists, options in (
        (([packed], [pairs]), {"norm": x[0].float()}),
        (([packed], [pairs]), {"gated": True}),
        (([packed, other.packed], [pairs, other.scale_and_zero]), {"gated": True}),
        (([packed] * 2, [pairs] * 2), {"residual": heads(2, 64, dtype=BF16)}),
        (([packed], [pairs]), {"residual": heads(1, 64, dtype=BF16)}),
        (([], []), {}),
    ):
        with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
            torch.ops.lumina_mgpt.int4_linear(x, lists[0], 32, lists[1], **options)


def model_and_formula(rows: int = 1) -> tuple[Transformer, Transformer]:
    """A bf16 model with int4 layers, and one in float64 with the same weights."""
    config = replace(CONFIG, hidden_size=256, intermediate_size=320, model_parallel_size=rows)
    exact = Transformer(config).eval().requires_grad_(False)
    exact.init_weights(torch.Generator().manual_seed(0))
    for seed, (name, parameter) in enumerate(exact.named_parameters()):
        if "norm" in name:
            parameter.add_(heads(*parameter.shape, seed=seed).float() / 4)
    exact = exact.bfloat16()
    model = Transformer(config).bfloat16().eval().requires_grad_(False)
    model.load_state_dict(exact.state_dict())
    weights = {name: module.weight for name, module in model.layers.named_modules() if hasattr(module, "in_features")}
    quantization.replace_linears(model, 32)
    exact = exact.double()
    for name, weight in weights.items():
        module = model.layers.get_submodule(name)
        module.load("weight", weight, "cpu")
        exact.layers.get_submodule(name).weight.data = dequantize(module.matrix, torch.float64)
    quantization.pack_weights(model, BF16)
    return model, exact


@pytest.mark.parametrize("dtype", [BF16, torch.int8])
@pytest.mark.parametrize("rows", [1, 2])
def test_steps_are_as_exact_as_those_of_the_modules(dtype, rows, monkeypatch):
    model, exact = model_and_formula(rows)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, 96, (2, 9), generator=generator), torch.arange(9).expand(2, 9), torch.tensor([[8], [6]])
    calls = [prompt]
    for starts, T in CALLS:
        ids = torch.randint(0, 96, (2, T), generator=generator)
        calls.append((ids, torch.tensor(starts)[:, None] + torch.arange(T), torch.arange(T).expand(2, T)))
    ran, run = [], native_layer.run
    monkeypatch.setattr(native_layer, "run", lambda *inputs: ran.append(1) or run(*inputs))
    answers = []
    for of, native in ((exact, False), (model, True), (model, False)):
        if of is model and not native:
            monkeypatch.setattr(native_layer, "serves", lambda *_: False)
        step = CachedStep(of, KVCache(of.config, 2, 32, torch.float64 if of is exact else dtype, "cpu"), slice(64, 96))
        answers.append([step(*call).double() for call in calls])
    assert len(ran) == len(calls) * len(model.layers)
    errors = [
        sum((found - right).square().sum() for found, right in zip(answer, answers[0], strict=True)).sqrt().item()
        for answer in answers[1:]
    ]
    assert errors[0] < 1.1 * errors[1], errors


def test_a_plain_step_is_one_of_a_window():
    """Products, norms and heads of a position do not depend on the number of positions; attention is by rounding."""
    model, _ = model_and_formula()
    ids = torch.randint(0, 96, (1, 12), generator=torch.Generator().manual_seed(2))
    answers = []
    for parts in ([12], [9, 1, 1, 1]):
        cache, found = KVCache(model.config, 1, 16, BF16, "cpu"), []
        at = 0
        for T in parts:
            positions = torch.arange(at, at + T)[None]
            found.append(model(ids[:, at : at + T], positions=positions, cache=cache, filled=at + T))
            at += T
        answers.append((torch.cat(found, 1), [store[:, :, :12] for store in cache.layers[0].stores]))
    assert all(torch.equal(one, other) for one, other in zip(answers[0][1], answers[1][1], strict=True))
    torch.testing.assert_close(answers[0][0], answers[1][0], rtol=0.05, atol=0.05)


def test_layers_with_biases_or_other_norms_use_modules():
    model, _ = model_and_formula()
    layer, cache = model.layers[0], KVCache(model.config, 1, 4, BF16, "cpu").layers[0]
    hidden = heads(1, 1, 256, dtype=BF16)
    assert native_layer.serves(layer, hidden, cache, 0.0)
    assert not native_layer.serves(layer, hidden, None, 0.0) and not native_layer.serves(layer, hidden, cache, 0.1)
    assert not native_layer.serves(layer, hidden.float(), cache, 0.0)
    layer.swin_norm = True
    assert not native_layer.serves(layer, hidden, cache, 0.0)
    layer.swin_norm = False
    layer.mlp.up_proj.bias = torch.nn.Parameter(torch.ones(320, dtype=BF16))
    assert not native_layer.serves(layer, hidden, cache, 0.0)


EMULATED = """
import torch
from test_native_layer import heads, int4
from lumina_mgpt.kernels import build, dispatch
assert dispatch.ready()
for group, inputs in ((32, 96), (64, 192), (128, 256)):
    module, _ = int4(128, inputs, group)
    for rows in (1, 5, 15, 16, 17, 31, 300):
        x = heads(rows, inputs, seed=rows, dtype=torch.bfloat16)
        found = []
        for tiles in (False, True):
            build.load(tiles)
            found.append(module(x))
        assert found[0].any() and torch.equal(*found), (group, rows)
print("equal")
"""


def test_tiles_give_the_same_numbers(tmp_path):
    """With the tile unit written as loops, so that processors without AMX test it, too."""
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), *sys.path])
    emulated = {"CXX": f"g++ -include {here / 'emulated_tiles.h'}", "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", EMULATED], env=os.environ | emulated, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "equal\n", done.stderr


def test_products_without_tiles_when_tiles_are_wrong(monkeypatch, caplog):
    loaded, checks = [], iter((None, RuntimeError("they differ")))

    def check() -> None:
        if error := next(checks):
            raise error

    monkeypatch.setattr(build, "load", lambda tiles: loaded.append(tiles))
    monkeypatch.setattr(build, "tiles_allowed", lambda: True)
    monkeypatch.setattr(dispatch, "_check_products", check)
    dispatch._works.cache_clear()
    try:
        assert dispatch.ready() and loaded == [False, True, False] and "they differ" in caplog.text
    finally:
        dispatch._works.cache_clear()
