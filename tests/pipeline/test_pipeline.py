"""The pipeline on a tiny checkpoint: an image depends only on its prompt, repeat, seed and settings."""

import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from near_ties import PROMPTS, margin, near_tie

from lumina_mgpt import Checkpoint, GenerationRequest, Pipeline, devices
from lumina_mgpt import pipeline as pipeline_module
from lumina_mgpt.config import ModelConfig, SamplingConfig, Speculation
from lumina_mgpt.devices import resolve_device, resolve_dtype
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.sampling.autoregressive import first_call
from lumina_mgpt.sampling.logits import code_log_probs
from lumina_mgpt.unirep import decode_image


@pytest.fixture(scope="module")
def exact(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32")


def by_job(results) -> dict:
    return {(result.job.prompt, result.job.repeat): result.codes for result in results}


@pytest.mark.parametrize("settings", [dict(cfg=4.0), dict(cfg=1.0, top_k=20, temperature=0.7)])
def test_an_image_does_not_depend_on_its_batch(exact, settings):
    """Exact in float64, with prompts of different lengths in one batch and two images of each."""
    together = by_job(exact.generate(PROMPTS, 64, 32, n=2, batch_size=8, seed=3, **settings))
    assert len(together) == 8
    for (prompt, repeat), codes in together.items():
        alone = by_job(exact.generate(prompt, 64, 32, n=repeat + 1, batch_size=1, seed=3, **settings))
        assert torch.equal(alone[prompt, repeat], codes), (prompt, repeat)


def test_images_do_not_depend_on_order_and_batch_size(exact):
    reference = by_job(exact.generate(PROMPTS, 32, 64, n=2, batch_size=3))
    reordered = by_job(exact.generate(PROMPTS[::-1], 32, 64, n=2, batch_size=5))
    assert reference.keys() == reordered.keys()
    assert all(torch.equal(reference[key], reordered[key]) for key in reference)


def test_images_depend_on_seed_and_repeat(exact):
    first, second = exact.generate("a cat", 32, 32, n=2, seed=1)
    (again,) = exact.generate("a cat", 32, 32, n=1, seed=1)
    (other,) = exact.generate("a cat", 32, 32, n=1, seed=2)
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, second.codes)
    assert not torch.equal(first.codes, other.codes)


def test_float32_differs_from_float64_and_between_batches_in_near_ties_only(exact, pipeline):
    settings = dict(cfg=4.0)
    reference = exact.generate(PROMPTS, 64, 64, n=3, batch_size=12, seed=5, **settings)
    batched = pipeline.generate(PROMPTS, 64, 64, n=3, batch_size=12, seed=5, **settings)
    single = pipeline.generate(PROMPTS, 64, 64, n=3, batch_size=1, seed=5, **settings)
    for truth, *others in zip(reference, batched, single, strict=True):
        for other in others:
            assert near_tie(exact, truth.job.prompt, truth.codes, other.codes, (5, truth.job.repeat), **settings)


@pytest.mark.parametrize("window", [3, 40])
def test_speculation_with_common_noise_gives_the_same_images(exact, pipeline, window):
    plain = exact.generate(PROMPTS, 64, 64, n=2, batch_size=8, seed=5)
    cost = exact.forwards
    speculation = Speculation("noise", window)
    fast = exact.generate(PROMPTS, 64, 64, n=2, batch_size=3, seed=5, speculation=speculation)
    assert cost == 64 and exact.forwards <= 64
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(plain, fast, strict=True))
    single = pipeline.generate(PROMPTS, 64, 64, n=2, batch_size=3, seed=5, speculation=speculation)
    for truth, other in zip(plain, single, strict=True):
        assert near_tie(exact, truth.job.prompt, truth.codes, other.codes, (5, truth.job.repeat), cfg=4.0)


@pytest.mark.parametrize("coupling", ["maximal", "independent"])
def test_other_couplings_are_reproducible_and_greedy_with_top_k_1(exact, coupling):
    speculation, settings = Speculation(coupling, 9), dict(width=64, height=64, seed=3)
    batch = exact.generate(PROMPTS, n=2, batch_size=8, speculation=speculation, **settings)
    alone = exact.generate(PROMPTS, n=2, batch_size=1, speculation=speculation, **settings)
    assert all(torch.equal(a.codes, b.codes) for a, b in zip(batch, alone, strict=True))
    assert torch.equal(
        exact.generate("a cat", top_k=1, speculation=speculation, **settings)[0].codes,
        exact.generate("a cat", top_k=1, **settings)[0].codes,
    )


def test_the_near_tie_check_can_fail(exact):
    (result,) = exact.generate("a cat", 32, 32)
    altered = result.codes.clone()
    altered[2, 1] = (altered[2, 1] + 1) % 64
    ahead = margin(exact, "a cat", result.codes, 9, int(altered[2, 1]), (0, 0))
    assert ahead > 0, "the sampled code has the highest score"
    assert not near_tie(exact, "a cat", result.codes, altered, (0, 0), limit=min(1e-3, ahead / 2))


@pytest.mark.parametrize(("cfg", "first", "rows"), [(1.0, 3, 3), (4.0, 4, 6)])
def test_guidance_one_costs_no_unconditional_row(pipeline, monkeypatch, cfg, first, rows):
    """Counts the forwards, too: one with the prompt, one for each code but the first, none for a forced id."""
    seen = []
    forward = pipeline.model.forward
    monkeypatch.setattr(pipeline.model, "forward", lambda ids, **more: (seen.append(len(ids)), forward(ids, **more))[1])
    pipeline.generate(PROMPTS[:3], 64, 32, cfg=cfg)
    assert seen == [first] + [rows] * (4 * 8 - 1)  # equal rows are read once


@pytest.mark.parametrize("size", [(32, 32), (96, 32), (32, 128), (160, 96)])
def test_the_size_asked_for_comes_out(pipeline, size):
    (result,) = pipeline.generate("a cat", *size)
    assert result.image.size == size
    assert result.image.mode == "RGB"
    codes = decode_image(result.ids, pipeline.checkpoint.vocabulary)
    assert codes.shape == (size[1] // 8, size[0] // 8)
    assert torch.equal(codes, result.codes)


def test_defaults_are_the_base_size_and_all_codes_at_most(pipeline):
    (default,) = pipeline.generate("a cat")
    (capped,) = pipeline.generate("a cat", 64, 64, top_k=64)
    assert default.image.size == (64, 64)
    assert torch.equal(default.codes, capped.codes)


def test_rows_are_reported_in_order_and_are_final(pipeline):
    events = []
    results = pipeline.generate(["a cat", "a snowman"], 32, 64, n=2, batch_size=3, on_row=events.append)
    assert [len(event.jobs) for event in events] == [3] * 8 + [1] * 8
    codes = {result.job: result.codes for result in results}
    for number, event in enumerate(events):
        for job, rows in zip(event.jobs, event.codes, strict=True):
            assert torch.equal(rows, codes[job][: number % 8 + 1])
    picture = pipeline.preview(events[2].codes, events[2].layout)[0]
    assert picture.size == (32, 64)
    assert picture.getpixel((0, 24)) == (128, 128, 128), "rows that are not sampled yet are grey"
    assert picture.crop((0, 0, 32, 24)).getcolors() != [(32 * 24, (128, 128, 128))]


def test_results_come_batch_by_batch(pipeline):
    events = []
    request = GenerationRequest(["a cat", "a snowman"], 32, 32, batch_size=1)
    stream = pipeline.stream(request, on_row=events.append)
    assert not events
    assert next(stream).job.prompt_index == 0
    assert len(events) == 4, "the second batch has not begun"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(prompts=[]), "^prompts must hold at least one text"),
        (dict(n=0), "^n must be a whole number in 1 ... 100000; try 1, got 0"),
        (dict(n=10**9), "^n must be a whole number in 1 ... 100000"),
        (dict(batch_size=0), "^batch_size must be a whole number in 1 ... 100000; try 1, got 0"),
        (dict(cfg=float("nan")), "^cfg must"),
        (dict(temperature=0.0), "^temperature must"),
        (dict(top_k=0), "^top_k must"),
        (dict(seed=-1), "^seed must"),
        (dict(width=100), "^width must be a multiple of 32, got 100; try 96 or 128"),
        (dict(height=0), "^height must be 32 to 2048 pixels, got 0; try 32"),
        (dict(width=512, height=512), "this model sees 2048"),
        (dict(prompts=["a cat", "an <eoss>"]), r"^prompts \(number 1\): .*<eoss>"),
    ],
)
def test_bad_settings_are_refused_before_any_work(pipeline, monkeypatch, arguments, message):
    monkeypatch.setattr(pipeline.model, "forward", lambda *_, **__: pytest.fail("the model ran"))
    with pytest.raises(InputError, match=message):
        pipeline.stream(GenerationRequest.of(**{"prompts": "a cat"} | arguments))


def test_a_movqgan_of_another_size_is_refused(tiny_checkpoint, oracle_movqgan):
    with pytest.raises(InputError, match="^movqgan_path .* 64 codes, .* 16384"):
        Pipeline.from_pretrained(tiny_checkpoint, "cpu", movqgan_path=oracle_movqgan)


def test_opening_reads_no_weights(tiny_checkpoint, tmp_path):
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "copy")
    for name in ("model.safetensors", "movqgan_270M.ckpt"):
        (folder / name).write_bytes(b"damaged")
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.layout().rows == 8
    with pytest.raises(InputError, match="movqgan_270M.ckpt"):
        Pipeline.from_pretrained(checkpoint, "cpu")


def test_batches_are_sized_by_their_cache(pipeline, monkeypatch):
    layout = pipeline.checkpoint.layout(64, 64)
    assert pipeline.batch_size(100, layout, SamplingConfig()) == 32
    assert pipeline.batch_size(100, layout, SamplingConfig(), Speculation()) == 8
    assert pipeline.batch_size(100, layout, SamplingConfig(), largest=5) == 5
    monkeypatch.setattr(
        pipeline,
        "checkpoint",
        pipeline.checkpoint.__class__(
            pipeline.checkpoint.folder, SEVEN_B, pipeline.checkpoint.vocabulary, pipeline.checkpoint.movqgan_path
        ),
    )
    assert pipeline.batch_size(9400, layout, SamplingConfig()) == 1
    monkeypatch.setattr(devices, "_CACHE_LIMIT", 9 << 30)
    settings = SamplingConfig(cfg=1.0)
    assert pipeline.batch_size(3000, layout, settings) == 2  # 1 MiB an id in fp32
    monkeypatch.setattr(pipeline, "cache_dtype", torch.int8)
    assert pipeline.batch_size(3000, layout, settings) == 11
    monkeypatch.setattr(pipeline_module, "ring_bytes", lambda layout, speculation: 2 << 30)
    assert pipeline.batch_size(3000, layout, settings, Speculation()) == 3


def test_equal_rows_are_read_once(exact):
    """Three images of one prompt: first two rows, the conditional and the unconditional one, then six."""
    rows = []
    hook = exact.model.layers[0].register_forward_pre_hook(lambda layer, given: rows.append(len(given[0])))
    images = exact.generate("a cat", 32, 32, n=3, batch_size=3)
    hook.remove()
    assert rows[0] == 2 and set(rows[1:]) == {6}
    assert len({tuple(image.codes.flatten().tolist()) for image in images}) == 3


def test_processes_share_the_images(exact):
    whole = by_job(exact.generate(PROMPTS[:3], 32, 32, n=3, batch_size=9))
    parts = [by_job(exact.generate(PROMPTS[:3], 32, 32, n=3, share=(rank, 2))) for rank in range(2)]
    assert [len(part) for part in parts] == [5, 4] and not parts[0].keys() & parts[1].keys()
    for part in parts:
        assert all(torch.equal(whole[key], codes) for key, codes in part.items())


def test_half_precision_decodes_nearly_the_same_picture(tiny_checkpoint, exact):
    half = Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64, movqgan_dtype=torch.bfloat16)
    (first,), (second,) = (p.generate("a cat", 64, 64, cfg=1.0) for p in (exact, half))
    assert torch.equal(first.codes, second.codes)
    difference = np.asarray(first.image, float) - np.asarray(second.image, float)
    assert 0 < np.abs(difference).mean() < 2  # of 255


def test_an_int8_cache_changes_little(tiny_checkpoint, exact):
    """The log-probabilities of the first code differ by little, and are not equal."""
    rounded = Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64, cache_dtype=torch.int8)
    layout, log_probs = exact.checkpoint.layout(64, 64), []
    call, _ = first_call(exact.checkpoint.prompt_ids(PROMPTS, layout), layout, torch.empty(4, 0).long(), guided=False)
    for pipeline in (exact, rounded):
        cache = KVCache(exact.checkpoint.config, 4, call.ids.shape[1], pipeline.cache_dtype, "cpu")
        with torch.no_grad():
            step = CachedStep(pipeline.model, cache, exact.checkpoint.vocabulary.code_slice)
            log_probs.append(code_log_probs(step(*call), SamplingConfig(cfg=1.0)))
    difference = (log_probs[0] - log_probs[1]).abs()
    assert 1e-6 < difference.max() < 0.05


SEVEN_B = ModelConfig(
    vocab_size=171385,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=32,
)


def test_auto_dtype_on_a_cpu_is_fp32_unless_that_takes_half_of_the_memory(monkeypatch):
    cpu = torch.device("cpu")
    assert 7.5e9 < SEVEN_B.weight_count < 8.0e9
    monkeypatch.setattr(devices, "_physical_memory", lambda: 24 << 30)
    assert resolve_dtype("auto", cpu, SEVEN_B) == torch.bfloat16
    monkeypatch.setattr(devices, "_physical_memory", lambda: 256 << 30)
    assert resolve_dtype("auto", cpu, SEVEN_B) == torch.float32
    monkeypatch.setattr(devices, "_physical_memory", lambda: None)
    assert resolve_dtype("auto", cpu, SEVEN_B) == torch.float32
    assert resolve_dtype("fp16", cpu, SEVEN_B) == torch.float16


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "meta", "cuda:99"])
def test_missing_devices_are_refused(name):
    with pytest.raises(InputError, match="^device "):
        resolve_device(name)


def test_importing_the_package_does_not_import_torch():
    code = "import sys, lumina_mgpt, lumina_mgpt.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
