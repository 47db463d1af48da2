"""Greedy images of the whole pipeline against those of the released code: ids equal, pixels within 1 of 255."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_mgpt import Pipeline
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.unirep import ImageLayout, encode_image, generation_prompt


@pytest.fixture(scope="module")
def pipeline(oracle_checkpoint, oracle_movqgan) -> Pipeline:
    return Pipeline.from_pretrained(oracle_checkpoint("mha256"), "cpu", "fp32", movqgan_path=oracle_movqgan)


@pytest.fixture(scope="module")
def cases(oracle_dir) -> dict:
    return json.loads((oracle_dir / "generation_greedy.json").read_text())


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


def test_images_of_one_batch_equal_those_alone(pipeline, cases):
    """The longer prompt's row must not feel the shorter one's pads, nor the other way round."""
    case = cases["t2i_64x64_cfg4"]
    prompt = case["question"].split(":\n", 1)[1]
    results = pipeline.generate(["dog", prompt, prompt + " and a very long wooden table"], 64, 64, top_k=1)
    assert results[1].ids == case["generated"]
    assert results[0].ids != results[1].ids != results[2].ids


def test_pairs_equal_the_released_code(pipeline, cases, oracle_dir):
    case = cases["pair_depth_64x128_cfg4"]
    codes = continue_image(pipeline, case)
    assert encode_image(codes, pipeline.checkpoint.vocabulary) == case["generated"]
    (image,) = pipeline.image_tokenizer.decode(codes[None])
    assert pixels_apart(image, oracle_dir / "gen_pair_depth_64x128_cfg4_0.png") <= 1


def test_image_to_image_equals_the_released_code(pipeline, cases, oracle_dir):
    """The unconditional rows see the given panel too."""
    case = cases["i2i_depth_64x128_cfg4"]
    codes = continue_image(pipeline, case, given_panels=1)
    assert encode_image(codes, pipeline.checkpoint.vocabulary) == case["ref_tokens"] + case["generated"]
    (image,) = pipeline.image_tokenizer.decode(codes[None])
    assert pixels_apart(image, oracle_dir / "gen_i2i_depth_64x128_cfg4_0.png") <= 1


def continue_image(pipeline: Pipeline, case: dict, given_panels: int = 0) -> torch.Tensor:
    """Greedy codes (rows, cols) of a dual-panel image; the upper panel's come from the case's own ids."""
    vocabulary = pipeline.checkpoint.vocabulary
    size = case["width"], case["height"]
    layout = ImageLayout.from_pixels(vocabulary, *size, panels=2, given_panels=given_panels)
    start = generation_prompt(case["question"], vocabulary)
    assert start + (case["ref_tokens"] or []) == case["prompt"]
    ids = torch.tensor(case["ref_tokens"] or [], dtype=torch.long)
    given = vocabulary.id_to_code(ids[vocabulary.is_code(ids)])[None]
    settings = SamplingConfig(cfg=case["cfg"], top_k=1)
    return pipeline.sample([start], layout, settings, [0], given=given)[0]
