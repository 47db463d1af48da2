"""Budgets on a pretended GPU: launches, waits and attention shapes, for a model with the 7B's number of layers.

Launches and waits do not depend on the width of a model.
"""

import shutil
from dataclasses import replace

import pytest
import torch
from pretend_gpu import pretend
from training_runs import changed

from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep, cuda_width
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.sampling.autoregressive import sample
from lumina_mgpt.sampling.jacobi import sample_jacobi, spare_slots, window_ids
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.trainer import Trainer
from lumina_mgpt.unirep import ImageLayout

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
ROOT = "lumina_mgpt/"
LAYERS_7B = 32
# Launches of a step, without graphs, and sampling. The third includes conversion of an int8 cache.
PLAIN, WINDOW, INT8 = 929, 1030, 1633
REPLAYED, REPLAYED_WINDOW = 20, 120  # with graphs: what remains are launches of the sampler
SHAPES = 12  # of attention, in one image
SMALL = ModelConfig(
    vocab_size=512 + 64,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    max_position_embeddings=16384,
    image_code_offset=512,
    num_image_codes=64,
)


class Stop(Exception):
    """Ends sampling."""


def model_7b(layers=LAYERS_7B, config=SMALL):
    model = Transformer(replace(config, num_hidden_layers=layers))
    model.init_weights(torch.Generator().manual_seed(0))
    return model.to("cuda", torch.bfloat16).eval()


class Steps:
    """Runs steps and the sampling between them, and counts both.

    Attributes:
        launches, waits: of each step and the sampling that follows, from the second step after the prompt on.
    """

    def __init__(self, seen, vocabulary, way, cache=torch.bfloat16, graphs=False, steps=2):
        layout = ImageLayout.from_pixels(vocabulary, 32, 288)  # rows of four codes
        model, window = model_7b(), way.window if way else 0
        width = cuda_width(window_ids(layout, window) if window else 0)
        spare = max(width, spare_slots(layout, window) if window else 0)
        store = KVCache(model.config, 2, 9 + layout.length, cache, "cuda", spare)
        self.seen, self.limit, self.marks = seen, steps + 3, []
        self.step = CachedStep(model, store, slice(512, 576), width=width, graphs=graphs)
        common = [[5] * 9], layout, SamplingConfig(), [(0, 0)]
        with pytest.raises(Stop):
            sample_jacobi(self, *common, way) if way else sample(self, *common)
        pairs = list(zip(self.marks[2:], self.marks[3:], strict=False))
        self.launches, self.waits = ([after[i] - before[i] for before, after in pairs] for i in (0, 1))

    def __call__(self, ids, positions, read):
        assert not self.marks or ids.shape[1] <= self.step.width
        self.marks.append((self.seen.launches.total(), self.seen.syncs.total()))
        if len(self.marks) == self.limit:
            raise Stop
        return self.step(ids, positions, read)


def test_launches_of_a_step_with_an_int8_cache(vocabulary):
    with pretend(ROOT, "h100") as seen:
        steps = Steps(seen, vocabulary, None, torch.int8)
    assert max(steps.launches) <= INT8


@pytest.mark.parametrize("graphs", [False, True])
def test_plain_steps_wait_once_a_row(vocabulary, graphs):
    """They check that a row's logits are numbers. The second step after the prompt captures a graph.

    On an A100 the attention kernel would pad a mask of another width, with two more launches a layer.
    """
    with pretend(ROOT, "a100") as seen:
        steps = Steps(seen, vocabulary, None, graphs=graphs, steps=6)
    waits = steps.waits[1:]
    assert len(waits) == 5 and sum(waits[:4]) == sum(waits[1:]) == 1  # rows of four codes
    assert max(steps.launches) <= (REPLAYED if graphs else PLAIN)
    assert seen.replays == (len(steps.launches) if graphs else 0)


@pytest.mark.parametrize("graphs", [False, True])
def test_windows_wait_once_each(vocabulary, graphs):
    """Once more where they complete a row. On an A100 for the same reason as above."""
    with pretend(ROOT, "a100") as seen:
        steps = Steps(seen, vocabulary, Speculation("maximal", 64), graphs=graphs)
        rows = sum(n for key, n in seen.syncs.items() if "autoregressive.py" in key[-1])
    waits = steps.waits[1:]
    assert set(waits) <= {1, 2} and sum(waits) <= len(waits) + rows
    assert max(steps.launches) <= (REPLAYED_WINDOW if graphs else WINDOW)
    assert seen.replays == (len(steps.launches) if graphs else 0)


@pytest.mark.parametrize(
    "gpu, way",
    [
        ("h100", None),
        ("b200", Speculation("maximal", 64)),
        pytest.param("h100", Speculation("noise", 16), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_image_has_few_attention_shapes_and_none_for_cudnn(tiny_checkpoint, gpu, way):
    """A whole image in bf16, and its decoding."""
    with pretend(ROOT, gpu) as seen:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "bf16", movqgan_dtype=torch.bfloat16)
        pipeline.generate("a cat", speculation=way)
    assert not seen.plans and not any("cudnn" in key for key in seen.sdpa)
    assert any(shape[0][1] == 1 for shape in seen.shapes)  # the image tokenizer's, which has one head
    assert 2 < len(seen.shapes) <= SHAPES


@pytest.mark.parametrize("side", [96, 768])
@pytest.mark.parametrize("window", [0, pytest.param(8, marks=pytest.mark.slow), 64])
@torch.no_grad()
def test_all_steps_of_an_image_have_few_attention_shapes(vocabulary, side, window):
    """Steps at places all over an image of the demo's size and of 768 x 768, and windows that shrink at its end.

    The number of slots that a step reads never falls from place to place. The shapes of two steps that read equally
    many slots are therefore those of all steps between them.
    """
    layout = ImageLayout.from_pixels(vocabulary, side, side)
    prompt, most = 60, window_ids(layout, window) if window else 2
    width = cuda_width(most if window else 0)
    spare = max(width, spare_slots(layout, window) if window else 0)
    with pretend(ROOT, "h100") as seen:
        model, slots = model_7b(layers=1), []
        cache = KVCache(model.config, 1, prompt + layout.length, torch.bfloat16, "cuda", spare)
        step = CachedStep(model, cache, slice(512, 576), width=width, graphs=False)
        zero = torch.zeros(1, 1, dtype=torch.long)
        step(torch.full((1, prompt), 5), torch.arange(prompt)[None], zero)
        end = prompt + layout.length - 1  # the image end is not fed
        ids = torch.full((1, most), 520, device="cuda")
        for first in sorted({*range(prompt, end, 401), *range(end - 9, end)}):
            for T in {most} if first < end - 9 else {1, 2, min(most, end - first)}:
                step(ids[:, :T], first + torch.arange(T)[None], zero)
            slots.append(max(shape[1][2] for shape in seen.shapes))
    assert slots == sorted(slots) and slots[-1] == cache.slots and not any(n % 128 for n in slots)
    assert 2 <= len(seen.shapes) <= SHAPES and not seen.plans


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_uses_no_cudnn_attention(settings, checkpointing):
    """Also where the backward pass computes layers again."""
    with pretend(ROOT, "h100") as seen:
        changes = dict(device="cuda", precision="bf16", checkpointing=checkpointing, max_steps=1)
        Trainer(changed(settings, **changes), Processes.start("cuda")).run()
    layers = 2
    assert {key[0]: n for key, n in seen.sdpa.items()} == {"flash": 2 * layers if checkpointing else layers}
    assert not seen.plans
