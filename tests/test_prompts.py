"""The instructions are identical to those of the released code."""

import json

import pytest

from lumina_mgpt.prompts import I2I_TASKS, MAPS, TASKS, text_to_image, text_to_image_plain


@pytest.fixture(scope="module")
def oracle(oracle_dir):
    return json.loads((oracle_dir / "prompts.json").read_text())


@pytest.mark.parametrize("name", ["768x768", "64x64", "512x1024", "128x128"])
def test_text_to_image(oracle, name):
    item = oracle[f"t2i_{name}"]
    prompt = item["question"].split(":\n", 1)[1]
    assert text_to_image(prompt, item["width"], item["height"]) == item["question"]


@pytest.mark.parametrize("name", ["depth", "canny", "hed"])
def test_pairs(oracle, name):
    item = oracle[f"pair_{name}_64x128"]
    prompt = item["question"].split(":\n", 1)[1]
    assert TASKS[name].instruction(prompt, item["width"], item["height"]) == item["question"]


@pytest.mark.parametrize("case, name", [("i2i_depth_64x128", "depth"), ("i2i_canny_64x128_rgba", "canny")])
def test_image_to_image(oracle, case, name):
    item = oracle[case]
    prompt = item["question"].split(":\n", 1)[1]
    assert I2I_TASKS[name].instruction(prompt, item["width"], item["height"]) == item["question"]


def test_plain_and_openpose_and_subject():
    assert text_to_image_plain("a cat") == "Generate an image according to the following prompt:\na cat"
    assert "<lower half> displays a <pose estimation map>," in TASKS["openpose"].instruction("x", 64, 128)
    subject = I2I_TASKS["subject"]
    assert "<upper half> displays a <Bubbly and effervescent with a sparkling allure.>," in subject.instruction(
        "", 1, 2
    )
    assert "<upper half> displays a <a red cat>," in subject.instruction("", 1, 2, shown="a red cat")


def test_predicting_a_map_has_the_instruction_of_the_pair():
    for name in MAPS:
        pair, predict = TASKS[name], I2I_TASKS[f"predict_{name}"]
        assert predict.template == pair.template and predict.shown == pair.shown
        assert (pair.panels, pair.given_panels, predict.panels, predict.given_panels) == (2, 0, 2, 1)


@pytest.mark.parametrize("prompt", ["{width} {0} {}", "100 % {prompt}", "a\nb: c\n", ""])
def test_a_prompt_is_inserted_unmodified(prompt):
    for task in (*TASKS.values(), *I2I_TASKS.values()):
        assert task.instruction(prompt, 64, 128).endswith(":\n" + prompt)
