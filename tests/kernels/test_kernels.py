"""The operators built for CPUs with AVX-512 VNNI, against formulas in float64; what happens where they are missing."""

import platform
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from attention_formula import formula, heads
from step_calls import CALLS, CONFIG

from lumina_mgpt.config import INT4_GROUPS
from lumina_mgpt.kernels import build, dispatch, ops
from lumina_mgpt.model import quantization
from lumina_mgpt.model.attention import Span, sdpa
from lumina_mgpt.model.compiled import COMPILED_SPARE, compile_forward
from lumina_mgpt.model.int4 import dequantize
from lumina_mgpt.model.kv_cache import KVCache, Scaled
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer

needed = pytest.mark.skipif(
    not build.machine_supports(), reason="no AVX-512 VNNI, no C++ compiler, or kernels switched off"
)


def int4(outputs: int, inputs: int, group: int) -> Int4Linear:
    module = Int4Linear(inputs, outputs, group)
    weight = torch.randn(outputs, inputs, generator=torch.Generator().manual_seed(outputs))
    module.load("weight", weight, "cpu")
    return module


@needed
@pytest.mark.parametrize("group", INT4_GROUPS)
@pytest.mark.parametrize("shape", [(64, 128), (192, 384)], ids=str)
def test_products(group, shape):
    """Rows that fill tiles and that do not, in one slab of 256 and in two."""
    module = int4(*shape, group)
    weight = dequantize(module.matrix, torch.float64)
    module.pack(torch.bfloat16)
    assert module.native
    for rows in (1, 2, 3, 16, 17, 33, 256, 300):
        x = heads(rows, shape[1], seed=rows, dtype=torch.bfloat16)
        y, expected = module(x), x.double() @ weight.T
        assert y.dtype == torch.bfloat16
        assert ((y.double() - expected).abs() < 0.005 * expected.abs() + 1e-3 * expected.std()).all(), rows
        assert torch.equal(module(x[-1:]), y[-1:]), "a row's product depends on the row alone"


@needed
def test_products_of_several_matrices_in_one_call():
    """Each as on its own, with its own bias or none."""
    modules = [int4(outputs, 128, 64) for outputs in (64, 192, 128)]
    modules[1].bias = torch.nn.Parameter(heads(192, dtype=torch.bfloat16), requires_grad=False)
    for module in modules:
        module.pack(torch.bfloat16)
    for rows in (1, 20, 300):
        x = heads(1, rows, 128, seed=rows, dtype=torch.bfloat16)
        for module, y in zip(modules, quantization.apply_all(x, *modules), strict=True):
            assert torch.equal(y, module(x)) and y.shape == (1, rows, len(module.scale_and_zero) * 64)
    with pytest.raises(RuntimeError, match="no gradient"):
        modules[0](x.requires_grad_())


@needed
@pytest.mark.parametrize("shape", [(16, 16), (80, 1040)], ids=str)
def test_products_of_int8(shape):
    numbers = torch.randint(-127, 128, shape, dtype=torch.int8)
    scale = heads(shape[0], seed=1, dtype=torch.bfloat16)
    for rows in range(1, 9):
        x = heads(1, rows, shape[1], seed=rows, dtype=torch.bfloat16)
        assert dispatch.serves_int8(x[0], numbers)
        y, expected = quantization.int8_linear(x, numbers, scale), x.double() @ (numbers.double().T * scale.double())
        assert y.dtype == torch.bfloat16 and y.shape == expected.shape
        assert ((y.double() - expected).abs() < 0.005 * expected.abs() + 1e-3).all()
        assert torch.equal(quantization.int8_linear(x[:, -1:], numbers, scale), y[:, -1:])


@needed
def test_other_matrices_and_inputs_go_to_torch():
    for module, dtype in ((int4(80, 128, 32), torch.bfloat16), (int4(64, 128, 32), torch.float32)):
        module.pack(dtype)
        assert module.kernel == "cpu" and not module.native


@needed
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("width", ops.HEAD_WIDTHS)
@pytest.mark.parametrize("size", [0.1, 1, 60, 1e15])
def test_attention_of_one_query(dtype, width, size):
    """Rows of their own lengths, heads that share keys, weights from even to one-hot; what lies behind is not seen."""
    B, N, K = 3, 6, 2
    config = replace(CONFIG, hidden_size=N * width, num_attention_heads=N, num_key_value_heads=K)
    for last in ([0, 14, 15], [16, 63, 99], [99, 99, 99]):
        cache = KVCache(config, B, 120, dtype, "cpu")
        cache.layers[0].update(heads(B, 110, K, width, seed=1), heads(B, 110, K, width, seed=2), 0, 110)
        positions = torch.tensor(last)[:, None]
        new = (heads(B, 1, K, width, seed=seed, dtype=torch.bfloat16) for seed in (3, 4))
        k, v = cache.layers[0].update(*new, positions, 100)
        span = _span(positions, cache)
        q = heads(B, 1, N, width, seed=5).mul(size).bfloat16()
        assert dispatch.serves_one_query(q, k.integers if isinstance(k, Scaled) else k)
        wide = [(x.integers * x.scales[..., None] if isinstance(x, Scaled) else x).double() for x in (k, v)]
        expected = formula(q.double(), *wide, positions)
        torch.testing.assert_close(sdpa(q, k, v, span, True).double(), expected, rtol=0.005, atol=0.002)
        if last == [99, 99, 99]:  # all alike: as an int, too
            assert torch.equal(sdpa(q, k, v, _span(99, cache), True), sdpa(q, k, v, span, True))


def _span(positions, cache):
    return Span.of(1, positions, cache, 100, torch.bfloat16, torch.device("cpu"))


@needed
def test_compiled_steps_use_them(always_compiled):
    """As eager ones, within the rounding of bf16."""
    config = replace(CONFIG, hidden_size=256, intermediate_size=320, num_attention_heads=4, num_key_value_heads=2)
    model = Transformer(config).bfloat16().eval().requires_grad_(False)
    model.init_weights(torch.Generator().manual_seed(0))
    quantization.replace_linears(model, 32)
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.load("weight", torch.randn(len(module.weight_int4), 2 * module.weight_int4.shape[1]) / 16, "cpu")
    quantization.pack_weights(model, torch.bfloat16)
    assert model.layers[0].mlp.up_proj.native
    compiled, answers = compile_forward(model), []
    prompt = (torch.randint(0, 96, (2, 9)), torch.arange(9).expand(2, 9), torch.tensor([[8], [6]]))
    calls = [
        prompt,
        *(
            (
                torch.randint(0, 96, (2, T)),
                torch.tensor(starts)[:, None] + torch.arange(T),
                torch.arange(T).expand(2, T),
            )
            for starts, T in CALLS[:3]
        ),
    ]
    for forward in (None, compiled):
        cache = KVCache(config, 2, 32, torch.bfloat16, "cpu", spare=COMPILED_SPARE)
        step = CachedStep(model, cache, slice(64, 96), forward)
        answers.append([step(*call).float() for call in calls])
    for eager, quick in zip(*answers, strict=True):
        assert (quick - eager).norm() < 0.03 * eager.norm()


@pytest.fixture
def anew(monkeypatch, tmp_path):
    """As in a process that has built nothing."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    dispatch._works.cache_clear()
    yield tmp_path / "lumina_mgpt"
    dispatch._works.cache_clear()


@pytest.fixture
def right_operators(tmp_path):
    """Registers the right operators again after a test. A library does this only once, so that a copy of it does."""
    assert dispatch.ready()
    library = build.library_path(build.compiler())
    yield
    assert build._register(Path(shutil.copy(library, tmp_path / "copy.so")))(build.tiles_allowed())


def test_sources_compile(tmp_path):
    """On processors without AVX-512, too, where the other tests are left out."""
    if platform.machine() != "x86_64" or not shutil.which("g++"):
        pytest.skip("for g++ on x86-64")
    version = subprocess.run(["g++", "-dumpversion"], capture_output=True, text=True, check=True).stdout
    if int(version.split(".")[0]) < 11:
        pytest.skip(f"g++ {version.strip()} does not know AMX")
    assert build.compile_library(["g++"], tmp_path / "native.so").stat().st_size


@needed
def test_built_once(anew, monkeypatch):
    assert dispatch.ready()
    (built,) = anew.iterdir()
    dispatch._works.cache_clear()
    monkeypatch.setattr(build.subprocess, "run", lambda *args, **options: pytest.fail("built again"))
    assert dispatch.ready() and list(anew.iterdir()) == [built]


@needed
def test_a_damaged_library_is_built_anew(anew):
    """An interrupted write, for example by a power loss, leaves an empty file."""
    compiler = build.compiler()
    path = build.library_path(compiler)
    path.touch(0o700)
    assert dispatch.ready() and path.stat().st_size and list(anew.iterdir()) == [path]


@needed
@pytest.mark.parametrize("how", ["compiler", "slow", "source", "folder", "open", "answer"])
def test_what_cannot_be_built_is_said_and_done_without(how, right_operators, anew, monkeypatch, caplog, tmp_path):
    if how == "compiler":
        monkeypatch.setenv("CXX", shutil.which("false"))
    elif how == "slow":
        slow = tmp_path / "slow"
        slow.write_text("#!/bin/sh\necho at it >&2\nexec sleep 30\n")
        slow.chmod(0o700)
        monkeypatch.setenv("CXX", f"{slow} -m64")
        monkeypatch.setattr(build, "_COMPILE_SECONDS", 0.5)
    elif how == "folder":
        anew.write_text("a file")
    elif how == "open":
        anew.mkdir()
        anew.chmod(0o777)
    else:  # a damaged source, or one with wrong products
        old, new = {
            "source": ("void block(", "void block{"),
            "answer": ("_mm512_set1_epi8(15)", "_mm512_set1_epi8(7)"),
        }[how]
        sources = [tmp_path / path.name for path in build._SOURCES]
        for copy, path in zip(sources, build._SOURCES, strict=True):
            copy.write_text(path.read_text().replace(old, new))
        shutil.copy(path.with_name("native.h"), tmp_path)
        monkeypatch.setattr(build, "_SOURCES", tuple(sources))
    module = int4(64, 128, 32)
    weight = dequantize(module.matrix)
    module.pack(torch.bfloat16)
    assert module.kernel == "cpu" and not module.native and not dispatch.ready()
    assert "cannot be used" in caplog.text and "\n" not in caplog.records[-1].getMessage()
    assert not [path for path in anew.glob("*") if how != "answer"], "nothing half-made is left"
    x = heads(2, 128, dtype=torch.bfloat16)
    torch.testing.assert_close(module(x).float(), x.float() @ weight.T, rtol=0.02, atol=0.1)


@needed
def test_what_they_cannot_take_is_refused():
    """Nothing is read or written beside a tensor: the operators check what they are given."""
    module = int4(64, 128, 32)
    module.pack(torch.bfloat16)
    ops, scale = torch.ops.lumina_mgpt, torch.ones(64, dtype=torch.bfloat16)
    x, numbers = torch.ones(2, 128, dtype=torch.bfloat16), torch.ones(64, 128, dtype=torch.int8)
    for wrong in (x.float(), x.char(), x[:, :64].contiguous(), x.repeat(1, 2), x.T.contiguous().T):
        with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
            ops.int4_linear(wrong, [module.packed], 32, [module.scale_and_zero])
        with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
            ops.int8_linear(wrong, numbers, scale)
    q = torch.ones(2, 1, 4, 64, dtype=torch.bfloat16)
    keys, scales = torch.ones(2, 4, 9, 64, dtype=torch.bfloat16).transpose(1, 2), torch.ones(2, 4, 9).transpose(1, 2)
    right = torch.tensor([9, 1])
    assert ops.one_query(q, keys, keys, None, None, right).eq(1).all()
    assert ops.one_query(q, keys.char(), keys.char(), scales, scales, right).eq(1).all()
    for wrong in (
        (q, keys, keys, None, None, torch.tensor([10, 1])),
        (q, keys, keys, None, None, torch.tensor([9, 0])),
        (q, keys, keys, None, None, right.int()),
        (q, keys, keys, scales, scales, right),
        (q, keys, keys.char(), None, None, right),
        (q, keys.char(), keys.char(), scales.double(), scales, right),
        (q, keys.char(), keys.char(), None, None, right),
        (q[:, :, :3], keys, keys, None, None, right),
    ):
        with pytest.raises(RuntimeError, match="other kinds, shapes or strides"):
            ops.one_query(*wrong)


def test_can_be_switched_off(anew, monkeypatch):
    monkeypatch.setenv("LUMINA_MGPT_NATIVE", "0")
    assert not dispatch.ready() and not anew.exists()
