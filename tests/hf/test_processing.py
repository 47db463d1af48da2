"""Texts, messages and pictures become the ids of `unirep`, and ids become texts and pictures again."""

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.families import SECOND
from lumina_mgpt.panels import encode_pictures, fit_pictures
from lumina_mgpt.unirep import encode_conversation, encode_image
from lumina_mgpt.vocabulary import TURN_END


@pytest.fixture(scope="module")
def processor(hf):
    return hf[1]


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [Image.effect_noise(size, 90).convert("RGB") for size in ((70, 70), (33, 140))]


@pytest.fixture(scope="module")
def codes(processor, pictures) -> list[torch.Tensor]:
    """What the project makes of the pictures."""
    fitted = fit_pictures(pictures, processor.vocabulary, 2, processor.checkpoint.config.base_size)
    return encode_pictures(fitted, processor.image_tokenizer)


def _ids(processor, *turns):
    roles = ("human", "assistant")
    return encode_conversation([(roles[i % 2], parts) for i, parts in enumerate(turns)], processor.vocabulary)


def _user(*parts):
    return {"role": "user", "content": [_part(part) for part in parts]}


def _part(part):
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": "image", "image": part}


def test_texts_with_marks_and_pictures(processor, pictures, codes):
    features = processor(["<|image|> What?", "And <|image|>?"], pictures, return_tensors=None)
    expected = [_ids(processor, [codes[0], " What?"])[0], _ids(processor, ["And ", codes[1], "?"])[0]]
    assert features["input_ids"] == expected
    assert features["attention_mask"] == [[1] * len(row) for row in expected]
    nested = processor(["What?", "<|image|> is <|image|>?"], [[], pictures], return_tensors=None)
    assert nested["input_ids"][1] == _ids(processor, [codes[0], " is ", codes[1], "?"])[0]
    # pictures without marks come first; a picture alone needs no text
    assert processor("What?", pictures[0])["input_ids"][0].tolist() == _ids(processor, [codes[0], " What?"])[0]
    assert processor(images=pictures[0])["input_ids"][0].tolist() == _ids(processor, [codes[0], " "])[0]
    assert processor("<|image|>", codes[1])["input_ids"][0].tolist() == _ids(processor, [codes[1]])[0]


def test_pictures_come_from_paths_arrays_and_base64(processor, pictures, codes, tmp_path):
    pictures[0].save(tmp_path / "a.png")
    buffer = io.BytesIO()
    pictures[0].save(buffer, "PNG")
    encoded = base64.b64encode(buffer.getvalue()).decode()
    expected = _ids(processor, [codes[0]])[0]
    for picture in (str(tmp_path / "a.png"), tmp_path / "a.png", np.asarray(pictures[0])):
        assert processor("<|image|>", picture)["input_ids"][0].tolist() == expected
    for key, value in (
        ("base64", encoded),
        ("path", str(tmp_path / "a.png")),
        ("url", f"data:image/png;base64,{encoded}"),
    ):
        message = {"role": "user", "content": [{"type": "image", key: value}]}
        assert processor.apply_chat_template([message], tokenize=True)["input_ids"][0].tolist() == expected


def test_pads_are_at_the_side_asked_for(processor):
    rows = processor(["a", "a cat on a mat"], return_tensors=None)["input_ids"]
    missing = len(rows[1]) - len(rows[0])
    for side, real in (("left", slice(missing, None)), ("right", slice(0, len(rows[0])))):
        features = processor(["a", "a cat on a mat"], padding_side=side)
        assert features["input_ids"][0][real].tolist() == rows[0]
        assert features["attention_mask"].sum(1).tolist() == [len(row) for row in rows]
        assert features["attention_mask"][0][real].all()


def test_a_conversation_and_its_labels(processor, pictures, codes):
    messages = [_user("Draw."), {"role": "assistant", "content": [_part(pictures[0])]}, _user(pictures[1], "What?")]
    features = processor.apply_chat_template(messages, tokenize=True, return_labels=True)
    ids, labels = _ids(processor, ["Draw."], [codes[0]], [codes[1], " What?"])
    assert features["input_ids"][0].tolist() == ids and features["labels"][0].tolist() == labels
    # the same in two steps
    text = processor.apply_chat_template(messages)
    assert processor(text, pictures)["input_ids"][0].tolist() == ids
    assert processor.decode(ids, skip_special_tokens=False) == text
    assert processor.decode(ids) == text.replace(TURN_END, "")
    # a batch, an answer that goes on, and labels that pads leave out
    batch = processor.apply_chat_template([messages[:1], messages[:2]], tokenize=True, return_labels=True)
    assert (
        batch["labels"][0].eq(-100).all() and batch["labels"][1].tolist() == _ids(processor, ["Draw."], [codes[0]])[1]
    )
    going_on = [_user("Go"), {"role": "assistant", "content": "on"}]
    ids = processor.apply_chat_template(going_on, tokenize=True, continue_final_message=True, return_dict=False)
    assert ids[0].tolist() == _ids(processor, ["Go"], ["on"])[0][:-1]


def test_a_prompt_gets_the_instruction_and_the_size(processor):
    layout = processor.checkpoint.layout(64, 32)
    (start,) = processor.checkpoint.prompt_ids(["a cat"], layout)
    expected = start + layout.ids[:3].tolist()
    settings = {"generation_mode": "image", "height": 32, "width": 64}
    assert processor("a cat", **settings)["input_ids"][0].tolist() == expected
    chat = processor.apply_chat_template([_user("a cat")], tokenize=True, **settings)
    assert chat["input_ids"][0].tolist() == expected
    assert processor.decode(expected).startswith(SECOND.tasks["t2i"].instruction("a cat", 64, 32))


def test_ids_become_texts_and_pictures(processor, pictures, codes):
    ids, _ = _ids(processor, ["Draw."], ["Here: ", codes[0], " and ", codes[1]])
    rows = torch.tensor([ids])
    images = processor.image_tokenizer.decode(codes[0][None]) + processor.image_tokenizer.decode(codes[1][None])
    (parts,) = processor.post_process_multimodal_output(rows, generation_mode="any")
    assert [part if isinstance(part, str) else part.tobytes() for part in parts] == [
        "Draw.Here: ",
        images[0].tobytes(),
        " and ",
        images[1].tobytes(),
    ]
    (last,) = processor.post_process_multimodal_output(rows, generation_mode="image")
    assert last.tobytes() == images[1].tobytes()
    assert processor.post_process_multimodal_output(rows) == ["Draw.Here: <|image|> and <|image|>"]
    # an image that is not complete
    begun = ids[: ids.index(processor.vocabulary.image_end_id)]
    assert processor.decode(begun) == "Draw.Here: <|image|>"
    (parts,) = processor.post_process_multimodal_output(torch.tensor([begun]), generation_mode="any")
    assert parts[0] == "Draw.Here: " and parts[1].size == images[0].size


@pytest.mark.parametrize(
    "text, settings, parameter",
    [
        (None, {}, "text"),
        ([], {}, "text"),
        ([3], {}, "text"),
        (3, {}, "text"),
        ("a", {"colour": 1}, "colour"),
        ("a", {"generation_mode": "any"}, "generation_mode"),
        ("a", {"height": 32}, "height"),
        ("a", {"generation_mode": "image", "height": 33}, "height"),
        ("a", {"generation_mode": "image", "task": "paint"}, "task"),
        (f"a{TURN_END}b{TURN_END}", {"generation_mode": "image"}, "text"),
        ("<|image|>", {}, "images"),
        (["<|image|>", "b"], {"images": [[], []]}, "pictures"),
        (["a", "b"], {"images": [[]]}, "images"),
        (["a", "b c d"], {"padding": False}, "padding"),
        ("a", {"padding_side": "top"}, "padding_side"),
        ("a", {"return_tensors": "np"}, "return_tensors"),
        ("<|endoftext|>", {}, None),
        ("a", {"images": "none.png"}, "panel"),
        ("a", {"images": 3}, "panel"),
        ("a", {"images": np.zeros((8, 8, 3))}, "images"),
        ("a", {"images": np.zeros((3, 8, 8), np.uint8)}, "images"),
        ("a", {"images": "data:image/png;base64,xxx"}, "images"),
        ("a", {"images": "http://127.0.0.1:9/a.png"}, "images"),
        ("a", {"padding": "max_length"}, "padding"),
    ],
)
def test_wrong_arguments_are_refused(processor, text, settings, parameter):
    with pytest.raises(InputError) as error:
        processor(text, **settings)
    assert error.value.parameter == parameter


@pytest.mark.parametrize(
    "messages, settings, message",
    [
        ([], {}, "at least one message"),
        ([{"role": "system", "content": "a"}], {}, "must have the role user"),
        ([_user("a"), _user("b")], {}, "must have the role assistant"),
        ([{"role": "user"}], {}, "must have role and content"),
        ([{"role": "user", "content": [{"type": "video"}]}], {}, "type text or image"),
        ([{"role": "user", "content": [{"type": "text"}]}], {}, "must have a text"),
        ([{"role": "user", "content": [{"type": "image"}]}], {"tokenize": True}, "one of the keys"),
        (_user("a"), {}, "must be a list of messages"),
        ("a", {}, "must be a list of messages"),
        ([_user("a <|image|>")], {}, "control name"),
        ([_user(f"a{TURN_END}b")], {}, "control name"),
        ([_user("a")], {"continue_final_message": True}, "last message is the user's"),
        ([_user("a")], {"chat_template": "x"}, "left out"),
    ],
)
def test_wrong_messages_are_refused(processor, messages, settings, message):
    with pytest.raises(InputError, match=message):
        processor.apply_chat_template(messages, **settings)


def test_ids_without_an_image_are_refused(processor):
    ids = processor("a")["input_ids"]
    with pytest.raises(InputError, match="must hold an image"):
        processor.post_process_multimodal_output(ids, generation_mode="image")
    with pytest.raises(InputError, match="generation_mode"):
        processor.post_process_multimodal_output(ids, generation_mode="video")
    with pytest.raises(InputError, match="complete images"):
        processor.decode([processor.vocabulary.image_start_id, 5, processor.vocabulary.image_end_id])


def test_wrong_outputs_are_refused(processor, codes):
    image = encode_image(codes[0], processor.vocabulary)
    for wrong in ("abc", 3, [["a"]], torch.ones(3), [[0.5]]):
        for mode in ("text", "image", "any"):
            with pytest.raises(InputError, match="must be rows of ids"):
                processor.post_process_multimodal_output(wrong, generation_mode=mode)
    with pytest.raises(InputError, match="panels must be the number of panels"):
        processor.post_process_multimodal_output([image], generation_mode="image", panels=3)
    rows = [image, [5, *image]]  # of different lengths
    first, second = processor.post_process_multimodal_output(rows, generation_mode="image")
    assert first.tobytes() == second.tobytes()
