"""Values that Python callers pass to the pipeline: NumPy and torch scalars, a str for a sequence, other types."""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_mgpt import GenerationRequest, Pipeline
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import I2I_TASKS

DEPTH = dict(width=32, height=64, task=I2I_TASKS["depth"])


@pytest.fixture(scope="module")
def pipeline(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64)


@pytest.mark.parametrize("number", [np.int64, np.uint8, torch.tensor])
def test_whole_numbers_of_numpy_and_torch(pipeline, number):
    """They were refused: `seed must be a whole number ..., got 7`."""
    settings = SamplingConfig(cfg=number(2), top_k=number(5), temperature=np.float32(0.5), seed=number(7))
    assert settings == SamplingConfig(cfg=2.0, top_k=5, temperature=0.5, seed=7)
    assert {type(value) for value in asdict(settings).values()} == {int, float}
    assert type(Speculation(window=number(3)).window) is int
    given = dict(width=number(32), height=number(32), n=number(2), batch_size=number(1), seed=number(7))
    results = pipeline.generate("a cat", **given, share=(number(1), number(2)))
    (plain,) = pipeline.generate("a cat", 32, 32, n=2, seed=7, share=(1, 2))
    assert [result.seed for result in results] == [7] and torch.equal(results[0].codes, plain.codes)


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        (dict(seed=True), "seed"),
        (dict(seed=np.bool_(True)), "seed"),
        (dict(seed=torch.tensor(True)), "seed"),
        (dict(seed=7.0), "seed"),
        (dict(seed="7"), "seed"),
        (dict(seed=np.array([1, 2])), "seed"),
        (dict(seed=10**5000), "seed"),
        (dict(top_k=True), "top_k"),
        (dict(cfg=True), "cfg"),
        (dict(cfg="4"), "cfg"),
        (dict(cfg=None), "cfg"),
        (dict(temperature=10**400), "temperature"),
        (dict(n=True), "n"),
        (dict(batch_size=2.0), "batch_size"),
        (dict(width=32.0), "width"),
        (dict(height="32"), "height"),
        (dict(share="01"), "share"),
        (dict(share=(2, 2)), "share"),
        (dict(share=(0, 0)), "share"),
        (dict(task="t2i"), "task"),
        (dict(prompts=b"cat"), "prompts"),
        (dict(prompts=["a cat", 3]), "prompts"),
        (dict(prompts=[None]), "prompts"),
        (dict(shown=3), "shown"),
    ],
)
def test_values_of_other_types_are_refused_by_name(pipeline, values, parameter):
    """True counted as 1, b"cat" as the prompts "99", "97" and "116"; others raised a TypeError."""
    with pytest.raises(InputError, match=f"^{parameter} ") as error:
        pipeline.stream(GenerationRequest.of(**{"prompts": "a cat", "width": 32, "height": 32} | values))
    assert len(str(error.value)) < 500


@pytest.mark.parametrize("kind", [str, Path])
def test_a_panel_may_be_the_path_of_a_picture(pipeline, tmp_path, kind):
    """`panel="a.png"` counted as a panel for each letter."""
    picture = Image.new("RGB", (40, 50), "red")
    picture.save(tmp_path / "a.png")
    (by_path,) = pipeline.generate("a cat", **DEPTH, panel=kind(tmp_path / "a.png"))
    (by_picture,) = pipeline.generate("a cat", **DEPTH, panel=picture)
    assert torch.equal(by_path.codes, by_picture.codes)
    together = pipeline.generate(["a cat", "a dog"], **DEPTH, panel=[kind(tmp_path / "a.png"), picture])
    assert torch.equal(together[0].codes, by_path.codes)


@pytest.mark.parametrize(
    "panel", [b"a.png", bytearray(64), np.zeros((4, 4), int), [[0] * 4] * 4, [np.zeros((4, 4), int)], 7, iter([])]
)
def test_panels_of_other_types_are_refused(pipeline, panel):
    """bytes, arrays and nested lists were counted as panels."""
    with pytest.raises(InputError, match=r"^panel \(number 0\) must be a picture .*, got \w+; convert it"):
        pipeline.stream(GenerationRequest.of("a cat", **DEPTH, panel=panel))


def test_a_missing_panel(pipeline):
    with pytest.raises(InputError, match=r"^panel no/such\.png"):
        pipeline.stream(GenerationRequest.of("a cat", **DEPTH, panel="no/such.png"))


def test_a_str_is_one_prompt(pipeline):
    layout = pipeline.checkpoint.layout(32, 32)
    assert pipeline.checkpoint.prompt_ids("a cat", layout) == pipeline.checkpoint.prompt_ids(["a cat"], layout)


@pytest.mark.parametrize(
    ("values", "parameter"),
    [
        (dict(speculation="maximal"), "speculation"),
        (dict(sampling={"cfg": 1.0}), "sampling"),
        (dict(prompts=None), "prompts"),
        (dict(prompts=3), "prompts"),
    ],
)
def test_fields_of_other_types_are_refused_by_name(values, parameter):
    """They raised AttributeError in the middle of the work, or TypeError."""
    with pytest.raises(InputError, match=f"^{parameter} must be "):
        GenerationRequest(**{"prompts": "a cat"} | values)


def test_a_path_as_panels_is_one_panel():
    """It counted as a panel for each letter."""
    assert GenerationRequest("a cat", panels="a.png").panels == ("a.png",)


@pytest.mark.parametrize(
    "values",
    [
        dict(cache_dtype="int8"),
        dict(cache_dtype=torch.int32),
        dict(movqgan_dtype="bf16"),
        dict(movqgan_dtype=torch.int8),
    ],
)
def test_other_number_formats_are_refused_while_loading(tiny_checkpoint, values):
    """They loaded and raised AttributeError, RuntimeError or TypeError of torch."""
    with pytest.raises(InputError, match=f"^{next(iter(values))} must be a floating-point torch.dtype"):
        Pipeline.from_pretrained(tiny_checkpoint, "cpu", **values)
