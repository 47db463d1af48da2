"""`generate` gives what the project's samplers give, for the same settings and seed."""

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import GenerationConfig

from lumina_mgpt import Pipeline
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.hf import LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.results import AnswerImage

PROMPTS = ["a cat", "a hedgehog on a sky blue background"]


def _prompt(processor, texts, **settings):
    return processor(text=texts, generation_mode="image", **{"height": 32, "width": 64, **settings})


def _ids(results) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize(
    "ours, theirs",
    [
        ({}, {}),
        ({"guidance_scale": 1.0, "top_k": 5, "temperature": 0.7}, {"cfg": 1.0, "top_k": 5, "temperature": 0.7}),
        ({"num_return_sequences": 2, "batch_size": 3}, {"n": 2}),
        ({"speculative": True}, {}),
        (
            {"speculative": Speculation("maximal", window=4)},
            {"speculation": Speculation("maximal", window=4)},
        ),
        ({"do_sample": False}, {"top_k": 1}),
        ({"generation_config": GenerationConfig(top_k=3, max_new_tokens=1)}, {"top_k": 3}),
    ],
)
def test_images_equal_the_pipelines(hf, pipeline, ours, theirs):
    model, processor = hf
    expected = _ids(pipeline.generate(PROMPTS, 64, 32, seed=5, **theirs))
    for side in ("left", "right"):
        inputs = _prompt(processor, PROMPTS, padding_side=side)
        assert model.generate(**inputs, generation_mode="image", seed=5, **ours).tolist() == expected


def test_images_of_the_first_generation_equal_the_pipelines(oracle_v1_checkpoint):
    folder = oracle_v1_checkpoint("image")
    model, processor = (
        one.from_pretrained(folder) for one in (LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor)
    )
    (expected,) = Pipeline.from_pretrained(folder, text=True).generate("a cat", 64, 32, seed=5)
    ids = model.generate(**_prompt(processor, "a cat"), generation_mode="image", seed=5)
    assert ids.tolist() == [expected.ids]
    (image,) = processor.post_process_multimodal_output(ids, generation_mode="image")
    assert image.tobytes() == expected.image.tobytes()
    assert (model.decode_image_tokens(ids)[0].numpy() == np.asarray(expected.image)).all()


def test_the_size_comes_from_ids_or_arguments(hf, pipeline):
    model, processor = hf
    text = pipeline.checkpoint.prompt_ids(["a cat"], pipeline.checkpoint.layout(64, 32))[0]
    (expected,) = _ids(pipeline.generate("a cat", 64, 32, seed=5))
    plain = torch.tensor([text])
    settings = {"generation_mode": "image", "seed": 5}
    assert model.generate(plain, height=32, width=64, **settings).tolist() == [expected]
    assert model.generate(plain[0], height=32, width=64, **settings).tolist() == [expected]
    (square,) = model.generate(plain, **settings)
    assert len(square) == pipeline.checkpoint.layout().length
    begun = _prompt(processor, "a cat")["input_ids"]
    assert model.generate(begun, height=32, width=64, **settings).tolist() == [expected]
    with pytest.raises(InputError, match="must be the size of the image that the ids begin, width=64 height=32"):
        model.generate(begun, height=64, width=64, **settings)
    # an image that has begun with given codes keeps them
    more = torch.tensor([text + expected[:12]])
    assert model.generate(more, **settings)[0].tolist()[:12] == expected[:12]
    for wrong in (expected[:-1], [*expected[:5], expected[3], expected[3]][:2], expected[:3] + expected[11:12]):
        with pytest.raises(InputError, match="must end with the first ids of an image"):
            model.generate(torch.tensor([text + wrong]), **settings)


def test_a_given_panel_is_kept(hf, pipeline):
    model, processor = hf
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    task = I2I_TASKS["depth"]
    (expected,) = pipeline.generate("a cat", 64, 128, task=task, panel=picture, seed=2)
    inputs = processor("a cat", picture, generation_mode="image", height=128, width=64, task="depth")
    ids = model.generate(**inputs, generation_mode="image", seed=2)
    assert ids.tolist() == [expected.ids]
    (image,) = processor.post_process_multimodal_output(ids, generation_mode="image", panels=2)
    assert image.tobytes() == expected.image.tobytes()


def test_a_new_generator_gives_the_image_of_its_seed_and_then_others(hf, pipeline):
    model, inputs = hf[0], _prompt(hf[1], "a cat")
    (expected,) = _ids(pipeline.generate("a cat", 64, 32, seed=5))
    generator = torch.Generator().manual_seed(5)
    first, second = (model.generate(**inputs, generation_mode="image", generator=generator) for _ in range(2))
    assert first.tolist() == [expected] and not first.equal(second)
    torch.manual_seed(5)
    assert model.generate(**inputs, generation_mode="image").equal(first)
    assert model.generate(**inputs, generation_mode="image").equal(second)


def test_generation_has_no_dropout_and_keeps_the_mode_of_training(hf):
    model, inputs = hf[0], _prompt(hf[1], "a cat")
    expected = model.generate(**inputs, generation_mode="image", seed=5)
    model.model.dropout = 0.5
    model.train().model.layers[1].eval()
    try:
        assert model.generate(**inputs, generation_mode="image", seed=5).equal(expected)
        assert model.training and model.model.layers[0].training and not model.model.layers[1].training
    finally:
        model.model.dropout = 0.0
        model.eval()


@pytest.mark.parametrize("side", ["left", "right"])
def test_answers_in_text_equal_the_pipelines(hf, pipeline, side):
    model, processor = hf
    settings = {"seed": 3, "max_new_tokens": 12}
    inputs = processor(PROMPTS, padding_side=side)
    ids = model.generate(**inputs, top_k=7, temperature=0.8, **settings)
    assert ids[:, : inputs["input_ids"].shape[1]].equal(inputs["input_ids"])
    expected = [
        pipeline.answer([("human", [text])], want="text", text_top_k=7, text_temperature=0.8, **settings)
        for text in PROMPTS
    ]
    shown = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    assert shown == [answer.text for answer in expected]
    two = model.generate(**inputs, num_return_sequences=2, batch_size=3, **settings)
    assert len(two) == 4 and not two[0].equal(two[1])


def test_answers_in_text_and_images_equal_the_pipelines(oracle_v1_checkpoint):
    folder = oracle_v1_checkpoint("mixed")
    model, processor = (
        one.from_pretrained(folder) for one in (LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor)
    )
    pipeline = Pipeline.from_pretrained(folder)
    settings = {"seed": 4, "max_new_tokens": 60}
    inputs = processor(PROMPTS)
    for speculative in (False, "noise"):
        ids = model.generate(**inputs, generation_mode="any", top_k=9, speculative=speculative, **settings)
        rows = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :], generation_mode="any")
        images = 0
        for text, parts in zip(PROMPTS, rows, strict=True):
            answer = pipeline.answer([("human", [text])], top_k=9, **settings)
            expected = [part.image if isinstance(part, AnswerImage) else part for part in answer.parts]
            assert [p.tobytes() if isinstance(p, Image.Image) else p for p in parts] == [
                p.tobytes() if isinstance(p, Image.Image) else p for p in expected
            ]
            images += len(answer.images)
    assert images


@pytest.mark.parametrize(
    "settings, parameter",
    [
        ({"generation_mode": "video"}, "generation_mode"),
        ({"num_beams": 2}, "num_beams"),
        ({"top_p": 0.5}, "top_p"),
        ({"generation_config": GenerationConfig(num_beams=2)}, "num_beams"),
        ({"guidance_scale": -1}, "guidance_scale"),
        ({"height": 32}, "height"),
        ({"seed": 1, "generator": torch.Generator()}, "seed"),
        ({"generator": 3}, "generator"),
        ({"do_sample": "no"}, "do_sample"),
        ({"top_k": False}, "top_k"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"generation_mode": "image", "height": 33}, "height"),
        ({"generation_mode": "image", "speculative": "fast"}, "coupling"),
        ({"generation_mode": "image", "speculative": 3}, "speculative"),
    ],
)
def test_wrong_settings_are_refused(hf, settings, parameter):
    model, processor = hf
    with pytest.raises(InputError) as error:
        model.generate(**processor("a cat"), **settings)
    assert error.value.parameter == parameter


def test_wrong_ids_are_refused(hf):
    model, processor = hf
    for ids in (None, torch.tensor([[9999]]), torch.tensor([[-1]]), torch.tensor([[0.5]]), torch.zeros(1, 1, 1).long()):
        with pytest.raises(InputError) as error:
            model.generate(ids)
        assert error.value.parameter == "input_ids"
    with pytest.raises(InputError, match="empty row"):
        model.generate(torch.tensor([[1]]), torch.tensor([[0]]))
    with pytest.raises(InputError, match="attention_mask"):
        model.generate(torch.tensor([[1]]), torch.tensor([[1, 1]]))
    with pytest.raises(InputError, match="must not end inside an image"):
        model.generate(**_prompt(processor, "a cat"))
    both = processor.pad([{"input_ids": _prompt(processor, "a cat", width=side)["input_ids"][0]} for side in (32, 64)])
    with pytest.raises(InputError, match="must begin images of one size"):
        model.generate(**both, generation_mode="image")
    with pytest.raises(InputError, match="this model sees 2048"):
        model.generate(torch.ones(1, 2040, dtype=torch.long), generation_mode="image", height=32, width=32)
    with pytest.raises(InputError, match="this model sees 2048"):
        model.generate(torch.ones(1, 2048, dtype=torch.long))
