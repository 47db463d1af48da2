"""The pipeline "any-to-any" of transformers draws and answers as `generate` does."""

import pytest
import torch
from PIL import Image
from transformers import pipeline


@pytest.fixture(scope="module")
def pipe(hf):
    return pipeline("any-to-any", model=hf[0], processor=hf[1])


def test_it_loads_a_saved_folder(hf, tmp_path):
    hf[0].save_pretrained(tmp_path)
    loaded = pipeline("any-to-any", model=str(tmp_path))
    assert (type(loaded.model), type(loaded.processor)) == tuple(map(type, hf))


def test_it_draws(hf, pipe):
    model, processor = hf
    size = {"generation_mode": "image", "height": 32, "width": 64}
    images = processor.post_process_multimodal_output(
        model.generate(**processor("a cat", **size), generation_mode="image", seed=3, num_return_sequences=2),
        generation_mode="image",
    )
    chat = [{"role": "user", "content": "a cat"}]
    settings = {"generation_mode": "image", "processor_kwargs": size}
    for text in ("a cat", chat):
        drawn = pipe(text=text, generate_kwargs={"seed": 3, "num_return_sequences": 2}, **settings)
        assert [one["generated_image"].tobytes() for one in drawn] == [image.tobytes() for image in images]
        assert drawn[0]["input_text"] == text
    with pytest.raises(ValueError, match="can be only one of"):
        pipe(text="a cat", generation_mode="any")


def test_the_pipeline_for_questions_about_images_answers_too(hf):
    model, processor = hf
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    chat = [{"role": "user", "content": "a cat"}]
    (answer,) = pipe(text=chat, max_new_tokens=4, return_full_text=False, generate_kwargs={"seed": 3})
    inputs = processor.apply_chat_template(chat, tokenize=True)
    ids = model.generate(**inputs, max_new_tokens=4, seed=3)
    assert [answer["generated_text"]] == processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])


def test_it_answers(hf, pipe):
    model, processor = hf
    picture = Image.effect_noise((64, 64), 90).convert("RGB")
    chat = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "What?"}]}]
    inputs = processor.apply_chat_template(chat, tokenize=True)
    torch.manual_seed(3)
    ids = model.generate(**inputs, max_new_tokens=9)
    (expected,) = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :])
    torch.manual_seed(3)
    (answer,) = pipe(text=chat, max_new_tokens=9, return_full_text=False)
    assert answer["generated_text"] == expected
    whole = pipe(text=chat, max_new_tokens=9, generate_kwargs={"seed": 3})[0]["generated_text"]
    assert whole[0] == chat[0] and whole[1]["role"] == "assistant"
    several = pipe(text=["a cat", "a hedgehog"], max_new_tokens=4, batch_size=2)
    assert [one["input_text"] for one in several] == ["a cat", "a hedgehog"]
    assert all(one["generated_text"].startswith(one["input_text"]) for one in several)
