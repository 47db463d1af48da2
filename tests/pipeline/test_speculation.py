"""Speculative sampling in the pipeline, with transformers and caches: identical ids to the plain sampler."""

import random
from pathlib import Path

import pytest
import torch
from near_ties import PROMPTS, near_tie

from lumina_mgpt import Pipeline
from lumina_mgpt.config import PROPOSALS, Speculation
from lumina_mgpt.devices import default_window
from lumina_mgpt.prompts import I2I_TASKS, TASKS

DEMO = Path(__file__).parents[2] / "assets" / "demo"


@pytest.fixture(scope="module")
def exact(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)


def mixed_requests() -> list[dict]:
    """Fixed random sizes, guidance, top-k, temperatures and batch sizes; eight images each."""
    draw = random.Random(0).choice
    return [
        dict(
            width=draw([32, 64]),
            height=draw([32, 64]),
            cfg=draw([0.5, 1.0, 2.5, 4.0]),
            top_k=draw([2, 10, 30, 4096]),
            temperature=draw([0.5, 1.0, 1.5]),
            batch_size=draw([1, 3, 5, 8]),
            seed=draw(range(2**40)),
            n=2,
        )
        for _ in range(26)
    ]


@pytest.fixture(scope="module")
def plain_images(exact) -> list[tuple[dict, list]]:
    return [(request, exact.generate(PROMPTS, **request)) for request in mixed_requests()]


def speculations() -> list[Speculation]:
    draw = random.Random(1).choice
    return [Speculation("noise", draw([1, 3, 8, 17, 40, 200]), draw(PROPOSALS)) for _ in mixed_requests()]


@pytest.mark.slow
def test_two_hundred_images_are_identical_to_the_plain_samplers(exact, plain_images):
    """In float64 the rounding of a window and of a single step is too small for a near tie."""
    count = codes = forwards = 0
    for (request, plain), speculation in zip(plain_images, speculations(), strict=True):
        fast = exact.generate(PROMPTS, **request | {"batch_size": None}, speculation=speculation)
        assert [one.ids for one in fast] == [one.ids for one in plain], (request, speculation)
        count += len(fast)
        codes, forwards = codes + plain[0].codes.numel(), forwards + exact.forwards
    assert count >= 200
    assert forwards < 0.9 * codes, "too few drafts are accepted for a meaningful test"


@pytest.mark.slow
def test_in_float32_each_divergence_is_a_near_tie(exact, tiny_checkpoint, plain_images):
    single = Pipeline.from_pretrained(tiny_checkpoint, "cpu", "fp32")
    for (request, plain), speculation in zip(plain_images, speculations(), strict=True):
        settings = {name: request[name] for name in ("cfg", "top_k", "temperature")}
        for truth, other in zip(plain, single.generate(PROMPTS, **request, speculation=speculation), strict=True):
            key = (request["seed"], truth.job.repeat)
            assert near_tie(exact, truth.job.prompt, truth.codes, other.codes, key, **settings), (request, speculation)


def test_pairs_and_given_panels_are_identical_to_the_plain_samplers():
    """On the demo checkpoint: both panels generated, then the lower panel with given upper panels, in one batch."""
    demo = Pipeline.from_pretrained(DEMO, "cpu", torch.float64)
    prompts = ["an owl on a navy background", "a cactus on a pink background"]
    size, speculation = dict(width=64, height=64, seed=3), Speculation("noise", 12)
    pairs = demo.generate(prompts, task=TASKS["depth"], **size)
    cost = demo.forwards
    fast = demo.generate(prompts, task=TASKS["depth"], **size, speculation=speculation)
    assert [one.ids for one in fast] == [one.ids for one in pairs] and demo.forwards < 0.75 * cost
    request = dict(task=I2I_TASKS["depth"], panel=[one.panel_codes for one in pairs], **size)
    plain, fast = demo.generate(prompts, **request), demo.generate(prompts, **request, speculation=speculation)
    assert [one.ids for one in fast] == [one.ids for one in plain] and demo.forwards < 0.75 * 32


def test_default_window_depends_on_device_and_precision(exact, monkeypatch):
    """A given window is unchanged."""
    asked = []
    monkeypatch.setattr("lumina_mgpt.pipeline.default_window", lambda device, int4: asked.append((device, int4)) or 5)
    (plain,) = exact.generate("a cat", 32, 32)
    (fast,) = exact.generate("a cat", 32, 32, speculation=Speculation())
    assert fast.ids == plain.ids and set(asked) == {(torch.device("cpu"), False)}
    assert exact.with_window(Speculation("maximal")) == Speculation("maximal", 5)
    assert exact.with_window(Speculation(window=7)).window == 7 and exact.with_window(None) is None
    cpu, cuda, mps = (torch.device(name) for name in ("cpu", "cuda", "mps"))
    assert default_window(cpu, int4=True) < default_window(cpu, int4=False) < default_window(cuda, int4=False)
    assert default_window(cuda, int4=True) < default_window(mps, int4=True) == default_window(mps, int4=False)
