"""Greedy images of the pipeline against the released code: identical ids, pixels within 1 of 255."""

import json

import numpy as np
import pytest
from PIL import Image

from lumina_mgpt import Pipeline
from lumina_mgpt.config import Speculation
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.prompts import I2I_TASKS, TASKS


@pytest.fixture(scope="module")
def pipeline(oracle_checkpoint, oracle_movqgan) -> Pipeline:
    return Pipeline.from_pretrained(oracle_checkpoint("mha256"), "cpu", "fp32", movqgan_path=oracle_movqgan)


@pytest.fixture(scope="module")
def cases(oracle_dir) -> dict:
    return json.loads((oracle_dir / "generation_greedy.json").read_text())


@pytest.fixture(scope="module")
def oracle_prompts(oracle_dir) -> dict:
    return json.loads((oracle_dir / "prompts.json").read_text())


class Fed(Exception):
    """Stops the first forward and has its ids."""


def pixels_apart(image: Image.Image, path) -> int:
    ours, theirs = (np.asarray(picture.convert("RGB"), dtype=np.int16) for picture in (image, Image.open(path)))
    assert ours.shape == theirs.shape
    return int(np.abs(ours - theirs).max())


@pytest.mark.parametrize("name", ["t2i_64x64_cfg4", "t2i_64x64_cfg1"])
def test_text_to_image_equals_the_released_code(pipeline, cases, oracle_dir, name):
    case = cases[name]
    prompt = case["question"].split(":\n", 1)[1]
    layout = pipeline.checkpoint.layout(case["width"], case["height"])
    assert pipeline.checkpoint.prompt_ids([prompt], layout) == [case["prompt"]]
    (result,) = pipeline.generate(prompt, case["width"], case["height"], cfg=case["cfg"], top_k=1)
    assert result.ids == case["generated"]
    assert pixels_apart(result.image, oracle_dir / f"gen_{name}_0.png") <= 1


def test_images_are_independent_of_their_batch(pipeline, cases):
    """Padding of shorter prompts does not change any image."""
    case = cases["t2i_64x64_cfg4"]
    prompt = case["question"].split(":\n", 1)[1]
    results = pipeline.generate(["dog", prompt, prompt + " and a very long wooden table"], 64, 64, top_k=1)
    assert results[1].ids == case["generated"]
    assert results[0].ids != results[1].ids != results[2].ids


@pytest.mark.parametrize("name", ["depth", "canny", "hed"])
def test_prompts_of_pairs_equal_the_released_code(pipeline, oracle_prompts, name):
    item = oracle_prompts[f"pair_{name}_64x128"]
    layout = pipeline.checkpoint.layout(item["width"], item["height"], TASKS[name])
    prompt = item["question"].split(":\n", 1)[1]
    assert pipeline.checkpoint.prompt_ids([prompt], layout, TASKS[name]) == [item["prompt"]]


@pytest.mark.parametrize(
    ("case", "name"),
    [("i2i_depth_64x128", "depth"), ("i2i_canny_64x128_rgba", "canny"), ("i2i_depth_128x128_landscape", "depth")],
)
def test_prompts_with_a_panel_equal_the_released_code(pipeline, oracle_prompts, oracle_dir, monkeypatch, case, name):
    """From the picture file to the first ids of the model, for the conditional and the unconditional row."""
    item = oracle_prompts[case]

    def stop(self, ids, positions, read):
        raise Fed(ids)

    monkeypatch.setattr(CachedStep, "__call__", stop)
    with pytest.raises(Fed) as fed, Image.open(oracle_dir / item["image"]) as picture:
        pipeline.generate(
            item["question"].split(":\n", 1)[1], item["width"], item["height"], task=I2I_TASKS[name], panel=picture
        )
    conditional, unconditional = fed.value.args[0].tolist()
    assert conditional == item["prompt"]
    assert unconditional[: len(item["ref_tokens"])] == item["ref_tokens"]


def test_pairs_equal_the_released_code(pipeline, cases, oracle_dir):
    case = cases["pair_depth_64x128_cfg4"]
    prompt = case["question"].split(":\n", 1)[1]
    (result,) = pipeline.generate(prompt, 64, 128, cfg=case["cfg"], top_k=1, task=TASKS["depth"])
    assert result.ids == case["generated"]
    assert pixels_apart(result.image, oracle_dir / "gen_pair_depth_64x128_cfg4_0.png") <= 1


@pytest.mark.parametrize("speculation", [None, Speculation(window=9)])
def test_image_to_image_equals_the_released_code(pipeline, cases, oracle_dir, oracle_prompts, speculation):
    """The unconditional rows include the given panel."""
    case = cases["i2i_depth_64x128_cfg4"]
    prompt = case["question"].split(":\n", 1)[1]
    with Image.open(oracle_dir / oracle_prompts["i2i_depth_64x128"]["image"]) as picture:
        (result,) = pipeline.generate(
            prompt, 64, 128, cfg=case["cfg"], top_k=1, task=I2I_TASKS["depth"], panel=picture, speculation=speculation
        )
    assert result.ids == case["ref_tokens"] + case["generated"]
    assert pixels_apart(result.image, oracle_dir / "gen_i2i_depth_64x128_cfg4_0.png") <= 1
