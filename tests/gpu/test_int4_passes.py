"""Int4 weights on a GPU: how often a product reads them, what it computes, and what quantizing while loading costs."""

import pytest
import torch
from pretend_gpu import OnGpu, pretend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lumina_mgpt.devices import default_window
from lumina_mgpt.errors import InputError
from lumina_mgpt.model import int4
from lumina_mgpt.model.int4 import dequantize, dequantize_packed, quantize
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.quantization import Int4Linear
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep

PACKAGE = "lumina_mgpt/"


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def packed_linear(weight: torch.Tensor, group: int, bias: torch.Tensor | None = None) -> Int4Linear:
    module = Int4Linear(weight.shape[1], len(weight), group, None if bias is None else torch.nn.Parameter(bias))
    module.load("weight", weight, "cuda")
    module.pack(torch.bfloat16)
    assert module.kernel == "cuda"
    return module


class Reads(TorchDispatchMode):
    """Counts how often operators read a packed matrix; torch's kernel reads it once for every 16 rows."""

    def __init__(self, packed: OnGpu) -> None:
        super().__init__()
        self.storage, self.count = packed.inside.untyped_storage().data_ptr(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        for x in tree_leaves((args, kwargs)):
            if isinstance(x, OnGpu) and not func.is_view and x.inside.untyped_storage().data_ptr() == self.storage:
                self.count += -(-len(args[0]) // 16) if "int4pack_mm" in func.name() else 1
        return func(*args, **kwargs)


def passes_of(seen) -> int:
    """How often the int4 kernel read weights: once for each tile of 16 rows."""
    return sum(tiles * calls for (tiles, *_), calls in seen.int4.items())


@pytest.mark.parametrize(("rows", "reads"), [(1, 1), (16, 1), (17, 2), (32, 2), (33, 2), (64, 2), (65, 2), (260, 2)])
def test_a_product_reads_the_weights_once_or_twice(rows, reads):
    """Once up to 16 rows. Above 32 rows the weights are dequantized: half of their bits at a time, without a wait."""
    with pretend(PACKAGE, "h100") as seen:
        module = packed_linear(normal(48, 256), 128)
        x = normal(rows, 256, seed=1).bfloat16().to("cuda")
        seen.reset()
        with Reads(module.packed) as counted:
            module(x)
        assert counted.count == reads
        assert passes_of(seen) == (reads if rows <= 32 else 0)
        assert seen.launches.total() == (1 if rows <= 32 else 7) and not seen.syncs


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("columns", [128, 384, 1024, 192, 96])
def test_dequantized_weights_are_exact(columns, group):
    """384 columns are packed 8 tiles at a time, 192 columns 4, and 96 columns 2."""
    if columns % group:
        columns = 2 * columns if 2 * columns % group == 0 else 4 * columns
    portable = quantize(normal(24, columns), group)
    with pretend(PACKAGE, "h100"):
        module = packed_linear(normal(24, columns), group)
        found = dequantize_packed(module.packed, module.scale_and_zero, group)
        assert found.dtype == torch.bfloat16 and torch.equal(found.cpu(), dequantize(portable).bfloat16())


def test_both_ways_give_the_same_product():
    """Row by row through the kernel, and all rows through dequantized weights; against a product in float64."""
    weight, bias, x = normal(40, 256), normal(40, seed=2).bfloat16(), normal(2, 25, 256, seed=1).bfloat16()
    exact = x.double() @ dequantize(quantize(weight, 64), torch.float64).T + bias.double()
    with pretend(PACKAGE, "a100"):
        module = packed_linear(weight, 64, bias.to("cuda"))
        whole, parts = module(x.to("cuda")), torch.cat([module(part.to("cuda")) for part in x.split(1, 1)], 1)
        assert whole.shape == (2, 25, 40)
        for found in (whole, parts):
            assert (found.cpu().double() - exact).norm() < 0.006 * exact.norm()


@torch.no_grad()
def test_passes_of_a_window_with_guidance(tiny_checkpoint):
    """How often one forward of two rows reads the matrices of two layers; from 33 rows on it dequantizes them."""
    with pretend(PACKAGE, "h100") as seen:
        model = load_model(tiny_checkpoint, torch.bfloat16, "cuda", quant=32)
        step = CachedStep(model, KVCache(model.config, 2, 160, torch.bfloat16, "cuda", 80), slice(512, 576))
        step(torch.full((2, 3), 512), torch.arange(3).expand(2, 3), torch.full((2, 1), 2))
        matrices = 7 * model.config.num_hidden_layers
        for window, passes in ((1, 1), (8, 1), (16, 2), (64, 0)):
            seen.reset()
            positions = (3 + torch.arange(window)).expand(2, window)
            step(torch.full((2, window), 530), positions, torch.arange(window).expand(2, window))
            assert passes_of(seen) == passes * matrices, window
            dequantized = sum(n for (name, line), n in seen.launches.items() if name == "__rshift__")
            assert dequantized == (0 if passes else matrices), window
    assert default_window(torch.device("cuda"), int4=True) == 8


def test_quantizing_on_a_gpu_waits_once_a_matrix(monkeypatch):
    """Chunks are larger than on a CPU, within the free memory, and the numbers are those of a CPU."""
    weight = normal(96, 8192)
    expected = quantize(weight, 128)
    assert weight.numel() == 3 * int4.CHUNK
    with pretend(PACKAGE, "h100") as seen:
        found = []
        for free in (60 << 30, 1 << 20):  # all of it at once; in the chunks of a CPU
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 80 << 30))
            on_gpu = weight.to("cuda")
            seen.reset()
            assert all(torch.equal(a.cpu(), b) for a, b in zip(quantize(on_gpu, 128), expected, strict=True))
            found.append(seen.launches.total())
            assert sum(n for (_, line), n in seen.syncs.items() if line.startswith("model/int4")) == 1
    few, many = found
    assert few < 300 and 2.8 * few < many < 3.2 * few, "launches are those of one chunk, and of three"


@pytest.mark.parametrize("value", [torch.inf, torch.nan])
def test_weights_that_are_no_numbers_are_refused_on_a_gpu(value):
    weight = normal(4, 64)
    weight[1, 3] = value
    with pretend(PACKAGE, "h100"), pytest.raises(InputError, match="infinite or not a number"):
        quantize(weight.to("cuda"), 32)
