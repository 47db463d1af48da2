"""Paths that only a GPU takes, on a pretended one: images and logits are those of the CPU, with and without graphs."""

import logging
import shutil
from pathlib import Path

import pytest
import torch
from pretend_gpu import pretend
from step_calls import CONFIG

from lumina_mgpt import autotune
from lumina_mgpt.cli import generate
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.reading import load_model
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.request import GenerationRequest

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
ROOT, DEMO = "lumina_mgpt/", Path(__file__).parents[2] / "assets/demo"
SIZE = dict(width=32, height=32)
WAYS = [None, Speculation("noise", 8), Speculation("maximal", 64), Speculation("independent", 8)]


@pytest.mark.parametrize(
    "way, cuda_graphs",
    [(WAYS[0], True), (WAYS[2], True)]
    + [pytest.param(way, True, marks=pytest.mark.slow) for way in (WAYS[1], WAYS[3])]
    + [pytest.param(way, False, marks=pytest.mark.slow) for way in WAYS],
    ids=str,
)
def test_images_are_those_of_a_cpu(tiny_checkpoint, way, cuda_graphs):
    """Batches of two and of one, with prompts of different lengths."""
    asked = dict(prompts=["a cat", "a hedgehog on a white background", "a cat"], top_k=60, seed=3, speculation=way)
    asked |= SIZE | dict(batch_size=2)
    expected = Pipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32").generate(**asked)
    with pretend(ROOT, "a100") as seen:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "fp32", cuda_graphs=cuda_graphs)
        got = pipeline.generate(**asked)
        assert pipeline._kept is None  # its cache is not held after the last image
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(got, expected, strict=True))
    assert (seen.captures > 0) == (seen.replays > 0) == cuda_graphs


def test_batches_of_one_shape_share_their_graphs(tiny_checkpoint):
    captures = []
    with pretend(ROOT) as seen:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "fp32")
        for prompts in (["a cat"], ["a cat", "a red apple", "a hedgehog on a white background"]):
            seen.reset()
            pipeline.generate(prompts, batch_size=1, **SIZE)
            captures.append(seen.captures)
    assert captures[0] == captures[1] > 0


def test_a_broken_batch_does_not_reach_the_next(tiny_checkpoint):
    """Batches share a cache, and a weight of 0 times what is not a number is not a number."""
    with pretend(ROOT):
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "fp32")
        expected = [result.codes for result in pipeline.generate(["a cat"] * 2, batch_size=1, **SIZE)]
        results, found = pipeline.stream(GenerationRequest.of(["a cat"] * 2, batch_size=1, **SIZE)), []
        found.append(next(results).codes)
        for tensor in pipeline._kept[1].cache.tensors():
            tensor.fill_(torch.nan)
        found.append(next(results).codes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def logits(device, dtype, attn="sdpa", quant=None, cache=None):
    """Logits of a prompt and of later steps: single codes, row ends and windows, rows at different positions."""
    model = load_model(DEMO, dtype, device, attn, quant)
    step = CachedStep(model, KVCache(model.config, 3, 190, cache or dtype, device, 32), slice(1024, 3072), width=32)
    random, out, at = torch.Generator().manual_seed(0), [], torch.tensor([[40], [22], [7]])
    for T in (41, 1, 2, 30, 1, 27):
        positions = torch.arange(T).expand(3, T) if T == 41 else at + torch.arange(1, T + 1)
        read = at if T == 41 else torch.full((3, 1), T - 1)
        out.append(step(torch.randint(1024, 3072, (3, T), generator=random), positions, read).float().cpu())
        at = at if T == 41 else at + T
    return torch.cat(out)


@pytest.mark.parametrize(
    "kind",
    [dict(attn="flash"), dict(cache=torch.int8)]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in (dict(), dict(quant=32), dict(quant=128))],
    ids=str,
)
@torch.no_grad()
def test_half_precision_is_as_exact_as_on_a_cpu(kind):
    plain = {key: value for key, value in kind.items() if key != "attn"}
    exact = logits("cpu", torch.float32, **plain)
    on_cpu = logits("cpu", torch.bfloat16, **plain)
    with pretend(ROOT, "a100") as seen:
        on_gpu = logits("cuda", torch.bfloat16, **kind)
    errors = [float((got - exact).square().mean().sqrt() / exact.std()) for got in (on_cpu, on_gpu)]
    assert errors[1] < min(0.04, 1.5 * errors[0])  # 1.5 as in the check of a GPU
    assert seen.captures == 1 and seen.replays == 4


def random_steps(length=32):
    """A step of a small model with grouped heads, on the pretended GPU, and the same on the CPU."""
    steps = []
    for device in ("cuda", "cpu"):
        model = Transformer(CONFIG)
        model.init_weights(torch.Generator().manual_seed(0))
        model = model.to(device).eval()
        steps.append(CachedStep(model, KVCache(CONFIG, 2, length, torch.float32, device, 8), slice(64, 96)))
    return steps


def feed(step, at, T=1, seed=0):
    ids = torch.randint(0, 96, (2, T), generator=torch.Generator().manual_seed(seed))
    positions = torch.tensor([[at], [at if at == 0 else at - 2]]) + torch.arange(T)
    return step(ids, positions, torch.full((2, 1), T - 1)).cpu()


@torch.no_grad()
def test_each_part_of_a_cache_has_its_graph():
    """Plain steps and windows, with rows at different positions, that go back to an earlier part and on again."""
    places = [(250, 1), (251, 2), (253, 1), (60, 1), (61, 2), (63, 1), (64, 9), (73, 12), (85, 167), (252, 1)]
    with pretend(ROOT) as seen:
        gpu, cpu = random_steps(length=384)
        feed(gpu, 0, 250, 1), feed(cpu, 0, 250, 1)
        for call, (at, T) in enumerate(places):
            torch.testing.assert_close(feed(gpu, at, T, call), feed(cpu, at, T, call), rtol=1e-5, atol=1e-5)
    parts = {(shape[0][2] // 2, shape[1][2]) for shape in seen.shapes if not shape[-1]}  # two heads share a key
    assert parts == {(2, 256), (2, 128), (16, 128), (168, 256)}
    assert seen.captures == 3 and seen.replays == 6


@torch.no_grad()
def test_a_failed_capture_leaves_steps_eager(caplog):
    """For lack of memory, for instance. One line says so, and the logits stay right."""
    with pretend(ROOT) as seen, caplog.at_level(logging.WARNING):
        gpu, cpu = random_steps()
        seen.refuse_capture = True
        for call, (at, T) in enumerate([(0, 9), (9, 1), (10, 1), (11, 2), (13, 1)]):
            torch.testing.assert_close(feed(gpu, at, T, call), feed(cpu, at, T, call), rtol=1e-5, atol=1e-5)
    assert seen.captures == seen.replays == 0
    (line,) = caplog.messages
    assert line == "a CUDA graph cannot be captured, further steps run without: CUDA out of memory. Pretended"


@torch.no_grad()
def test_replays_see_weights_that_change_in_place():
    with pretend(ROOT) as seen:
        gpu, cpu = random_steps()
        for call, (at, T) in enumerate([(0, 9), (9, 1), (10, 1), (11, 1)]):
            assert torch.allclose(feed(gpu, at, T, call), feed(cpu, at, T, call), atol=1e-5)
        for step in (gpu, cpu):
            step.model.norm.weight.mul_(2.0)
        assert torch.allclose(feed(gpu, 12, 1, 9), feed(cpu, 12, 1, 9), atol=1e-5) and seen.replays == 3


@torch.no_grad()
def test_earlier_logits_remain():
    """A replay writes the memory of the replay before; what a step returned is a copy."""
    with pretend(ROOT) as seen:
        gpu, _ = random_steps()
        for at, T in ((0, 9), (9, 1), (10, 1)):
            feed(gpu, at, T)
        ids = torch.zeros(2, 1, dtype=torch.long, device="cuda")
        first = gpu(ids, torch.full((2, 1), 11), torch.zeros(2, 1, dtype=torch.long))
        before = first.clone()
        gpu(ids + 5, torch.full((2, 1), 12), torch.zeros(2, 1, dtype=torch.long))
        assert torch.equal(first, before) and seen.replays == 3


def test_the_search_for_the_fastest_window_waits_for_the_device(tiny_checkpoint, monkeypatch):
    """Else it times how fast the host starts work."""
    monkeypatch.setattr(autotune, "CANDIDATES", ())
    with pretend(ROOT) as seen:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "bf16")
        prepared = pipeline.checkpoint.prepare(GenerationRequest.of(["a cat"], **SIZE))
        waits = []
        monkeypatch.setattr(autotune, "wait", lambda device: waits.append(device.type) or torch.cuda.synchronize())
        autotune.fastest(pipeline, prepared)
    assert waits == ["cpu"] + ["cuda"] * 6 and sum(n for key, n in seen.syncs.items() if key[0] == "synchronize") == 7


def test_decoding_waits_once_for_its_check(tiny_checkpoint):
    with pretend(ROOT) as seen:
        pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cuda", "bf16")
        seen.reset()
        pipeline.image_tokenizer.decode(torch.zeros(1, 4, 4, dtype=torch.long))
        assert sum(n for key, n in seen.syncs.items() if key[-1].startswith("vqgan/model.py")) == 1
        for codes in ([[-1]], [[64]]):
            with pytest.raises(InputError, match=r"codes must be in 0 \.\.\. 63, got (-1 \.\.\. -1|64 \.\.\. 64)"):
                pipeline.image_tokenizer.decode(torch.tensor([codes]))


def test_no_cuda_graphs_needs_cuda(tiny_checkpoint, tmp_path, capsys):
    options = ["--prompt", "a cat", "--model_path", str(tiny_checkpoint), "--save_path", str(tmp_path / "out")]
    assert generate.main([*options, "--device", "cpu", "--no_cuda_graphs"]) == 2
    assert "--no_cuda_graphs has no effect on device cpu; leave it out" in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*.png"))


def test_flash_with_compile_is_refused(tiny_checkpoint):
    with pretend(ROOT), pytest.raises(InputError, match="attn flash cannot be compiled; leave compile out, or use"):
        Pipeline.from_pretrained(tiny_checkpoint, "cuda", "bf16", attn="flash", compile=True)


@pytest.mark.parametrize("speculation", [pytest.param(None, marks=pytest.mark.slow), Speculation("noise", 4)], ids=str)
def test_conversations_and_descriptions_are_those_of_a_cpu(oracle_v1_checkpoint, speculation):
    """Two turns with text and an image: the cache goes on, and each kind of step has its own graphs."""

    def answers(device: str) -> list[list[int]]:
        pipeline = Pipeline.from_pretrained(oracle_v1_checkpoint("mixed"), device, "fp32")
        conversation, found = pipeline.conversation(), []
        for text in ("Draw a cat.", "And a dog."):
            stream = conversation.say(text, want="any", top_k=50, seed=1, max_new_tokens=64, speculation=speculation)
            for _ in stream:
                pass
            found.append(stream.answer.ids)
        codes = [torch.full((2, 2), 7), torch.full((4, 2), 9)]
        return found + [answer.ids for answer in pipeline.describe(codes, "What is it?", max_new_tokens=6, seed=2)]

    expected = answers("cpu")
    with pretend(ROOT, "a100") as seen:
        assert answers("cuda") == expected
    assert seen.replays > 0
