"""Conversations: the cache goes on, and answers are those of a conversation that starts anew."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from lumina_mgpt import Checkpoint, Pipeline
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.compiled import CompiledForward
from lumina_mgpt.panels import turn_parts
from lumina_mgpt.results import End, ImageBegun, ImageDone, RowDone
from lumina_mgpt.unirep import generation_prompt, split

RANDOM = dict(cfg=2.0, top_k=50, text_top_k=20, text_temperature=20.0, seed=7)  # text that differs from the script's


@pytest.fixture(scope="module")
def exact(oracle_v1_checkpoint):
    """Script -> pipeline in float64."""
    loaded: dict[str, Pipeline] = {}

    def get(script: str) -> Pipeline:
        if script not in loaded:
            checkpoint = Checkpoint.open(oracle_v1_checkpoint(script))
            small = replace(checkpoint, config=replace(checkpoint.config, base_size=64))  # pictures stay as they are
            loaded[script] = Pipeline.from_pretrained(small, "cpu", torch.float64)
        return loaded[script]

    return get


@pytest.fixture
def picture(oracle_v1_dir) -> Path:
    return oracle_v1_dir / "b_64x64.png"


class Fed:
    """Counts the ids of each forward of the model."""

    def __init__(self, pipeline: Pipeline, monkeypatch) -> None:
        self.calls: list[tuple[int, int]] = []
        forward = pipeline.model.forward

        def counted(ids, **arguments):
            self.calls.append(tuple(ids.shape))
            return forward(ids, **arguments)

        monkeypatch.setattr(pipeline.model, "forward", counted)


def ids_of(stream) -> list[int]:
    return list(stream)[-1].answer.ids


# -- the cache goes on -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("speculation", [None, Speculation("noise", 4), Speculation("noise", 16)])
def test_continuing_equals_starting_anew(exact, picture, speculation):
    """Three turns in one conversation, and each of them after a fresh prefill; speculative ones equal plain ones."""
    pipeline, going_on = exact("mixed"), exact("mixed").conversation()
    turns = [("Add a cat.", [picture]), ("Again.", []), ("And now?", [picture])]
    settings = RANDOM | dict(text_temperature=10.0, max_new_tokens=60)
    for text, pictures in turns:
        history = going_on.ids
        stream = going_on.say(text, pictures, speculation=speculation, **settings)
        anew = pipeline.conversation(ids=history)
        assert ids_of(stream) == ids_of(anew.say(text, pictures, **settings))
        assert going_on.ids == anew.ids
    assert going_on.answers == 3
    answers = split(going_on.ids, pipeline.checkpoint.vocabulary)
    assert sum(isinstance(part, torch.Tensor) for part in answers) > 2  # more than the two given pictures


def test_turns_as_texts_and_pictures_give_the_ids_of_a_conversation(exact, picture):
    """`chat` with the turns of a conversation is the conversation; an image of the history is given by its codes."""
    pipeline, settings = exact("mixed"), dict(cfg=3.0, top_k=1, text_top_k=1)
    conversation = pipeline.conversation()
    first = list(conversation.say("Add a cat.", [picture], **settings))[-1].answer
    second = ids_of(conversation.say("Again.", **settings))
    parts = [part if isinstance(part, str) else part.codes for part in first.parts]
    turns = [("human", [Image.open(picture), " Add a cat."]), ("assistant", parts), ("human", ["Again."])]
    assert first.ids[-1] == pipeline.checkpoint.vocabulary.turn_end_id
    answer = pipeline.answer(turns, **settings)
    assert answer.ids == second and answer.text == "".join(
        p if isinstance(p, str) else "<|image|>" for p in first.parts
    )


def test_a_turn_costs_its_own_prefill(exact, picture, monkeypatch):
    pipeline, conversation = exact("image"), exact("image").conversation()
    fed, settings = Fed(pipeline, monkeypatch), dict(cfg=2.0, want="image", size=(32, 32))
    for text, pictures in (("Draw a cat.", [picture, picture]), ("Add a dog.", [])):
        fed.calls.clear()
        before = conversation.ids
        list(conversation.say(text, pictures, **settings))
        answer = 3 + 2 * (2 + 1) + 1 + 1
        pending = 4 if before else 0  # last code, row end, image end and turn end of the answer before
        new = len(conversation.ids) - len(before) - answer
        assert fed.calls == [(2, pending + new + 3), (2, 1), (2, 2), (2, 1)]


def test_a_small_cache_grows_and_keeps_its_ids(exact):
    """Each turn needs more slots, and guidance a second row."""
    pipeline, ids = exact("mixed"), []
    for want, cfg, limit in (("text", 1.0, 3), ("any", 1.0, 40), ("any", 3.0, 60), ("text", 1.0, 90)):
        settings = RANDOM | dict(want=want, cfg=cfg, max_new_tokens=limit)
        if not ids:
            conversation = pipeline.conversation()
        ids.append((conversation.ids, ids_of(conversation.say("More.", **settings)), settings))
    for history, answer, settings in ids[1:]:
        assert ids_of(pipeline.conversation(ids=history).say("More.", **settings)) == answer


def test_padded_steps_change_nothing(exact, monkeypatch, always_compiled):
    """Compiled steps are padded to few shapes; here with the forward that they compile."""
    pipeline, settings = exact("mixed"), RANDOM | dict(text_temperature=10.0, max_new_tokens=50)
    settings["speculation"] = Speculation("noise", 16)
    plain, padded = pipeline.conversation(), pipeline.conversation()
    for text in ("Add a cat.", "Again."):
        expected = ids_of(plain.say(text, **settings))
        with monkeypatch.context() as patch:
            patch.setattr(pipeline, "compiled", CompiledForward(pipeline.model, pipeline.model.forward))
            assert ids_of(padded.say(text, **settings)) == expected


@pytest.mark.parametrize("dtype, cache", [("fp32", torch.int8), ("bf16", None)])
def test_conversations_run_in_other_formats(oracle_v1_checkpoint, dtype, cache):
    pipeline = Pipeline.from_pretrained(oracle_v1_checkpoint("mixed"), "cpu", dtype, cache_dtype=cache)
    conversation = pipeline.conversation()
    for _ in range(2):
        answer = list(conversation.say("A cat.", top_k=1, text_top_k=1))[-1].answer
        assert answer.text == "Sure,<|image|>Yes" and answer.reason == "turn end"


# -- what an answer is -------------------------------------------------------------------------------------------------


def test_wanted_images_are_forced(exact):
    pipeline = exact("text")
    answer = pipeline.answer([("human", ["A cat."])], want="images", size=(96, 32), views=3, cfg=1.0)
    v = pipeline.checkpoint.vocabulary
    assert [image.codes.shape for image in answer.images] == [(2, 6)] * 3 == [p.codes.shape for p in answer.parts]
    assert answer.ids[-1] == v.turn_end_id and answer.text == "<|image|>" * 3
    assert len({tuple(image.codes.flatten().tolist()) for image in answer.images}) == 3
    chosen = pipeline.answer([("human", ["A cat."])], want="image", max_new_tokens=40, top_k=1, cfg=1.0)
    assert chosen.ids[0] == v.image_start_id and chosen.images[0].codes.shape[1] % 2 == 0
    with_size = pipeline.answer([("human", ["A cat."])], want="image", size=(96, 32), cfg=1.0)
    assert torch.equal(with_size.images[0].codes, answer.images[0].codes)  # the first image has the noise of a request


def test_images_of_a_known_size_fit_the_default_limit(exact, monkeypatch):
    monkeypatch.setattr("lumina_mgpt.conversation.MAX_NEW_TOKENS", 30)
    wanted = dict(want="images", size=(64, 32), views=3, **RANDOM)  # 3 images of 14 ids
    answer = exact("mixed").answer([("human", ["A cat."])], **wanted)
    assert [image.whole for image in answer.images] == [True] * 3 and answer.reason == "turn end"
    cut = exact("mixed").answer([("human", ["A cat."])], max_new_tokens=33, **wanted)
    assert [image.whole for image in cut.images] == [True, True, False] and cut.reason == "length"


def test_a_wanted_image_is_that_of_generate(exact):
    """The first image of a conversation draws with the noise of `generate`."""
    pipeline = exact("image")
    (result,) = pipeline.generate("a cat", 96, 64, cfg=3.0, top_k=50, seed=5)
    prompt = pipeline.checkpoint.prompt_ids(["a cat"], pipeline.checkpoint.layout(96, 64))[0]
    text = pipeline.checkpoint.vocabulary.decode_text(prompt[1:-1])
    settings = dict(cfg=3.0, top_k=50, seed=5, want="image", size=(96, 64))
    answer = pipeline.answer([("human", [text])], **settings)
    assert answer.ids[:-1] == result.ids and answer.images[0].image.tobytes() == result.image.tobytes()


def test_wanted_text_has_no_image(exact):
    pipeline = exact("image")
    answer = pipeline.answer([("human", ["A cat."])], want="text", max_new_tokens=30, **RANDOM)
    assert not answer.images and pipeline.checkpoint.vocabulary.image_start_id not in answer.ids


def test_without_a_decoder_of_images_answers_are_texts(exact, monkeypatch):
    pipeline = exact("image")
    monkeypatch.setattr(type(pipeline.image_tokenizer), "can_decode", property(lambda self: False))
    answer = pipeline.answer([("human", ["A cat."])], max_new_tokens=9, **RANDOM)
    assert answer.ids and not answer.images
    with pytest.raises(InputError, match="must name a VQGAN file to make images"):
        pipeline.chat([("human", ["A cat."])], want="image")


# -- endings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["close", "interrupt"])
def test_a_stopped_answer_is_kept_as_far_as_it_came(exact, monkeypatch, how):
    pipeline = exact("mixed")
    conversation, v = pipeline.conversation(), pipeline.checkpoint.vocabulary
    settings = dict(cfg=3.0, top_k=1, text_top_k=1)
    stream = conversation.say("A cat.", **settings)
    rows = 0
    for event in stream:
        rows += isinstance(event, RowDone)
        if rows == 2:
            break
    if how == "close":
        stream.close()
    else:
        monkeypatch.setattr(pipeline.model, "forward", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        monkeypatch.undo()
    answer = stream.answer
    assert answer.reason == "stopped" and answer.text == "Sure,<|image|>"
    assert answer.images[0].codes.shape == (2, 6) and not answer.images[0].whole
    assert answer.images[0].image.crop((0, 32, 96, 64)).getcolors() == [(96 * 32, (128, 128, 128))]
    # The history has the words alone, and goes on.
    history = conversation.ids
    assert len(history) == len(generation_prompt("A cat.", v)) + 3 + 1 and history[-1] == v.turn_end_id
    assert v.image_start_id not in history
    again = ids_of(pipeline.conversation(ids=history).say("Go on.", **settings))
    assert ids_of(conversation.say("Go on.", **settings)) == again


def test_a_turn_without_any_answer_leaves_no_trace(exact):
    conversation = exact("image").conversation()
    settings = dict(cfg=3.0, top_k=1, text_top_k=1)
    *_, end = conversation.say("A cat.", max_new_tokens=12, **settings)
    assert isinstance(end, End) and end.reason == "length" and end.answer.images[0].codes.shape == (1, 6)
    assert conversation.ids == [] and conversation.answers == 0
    conversation.say("A cat.", **settings)  # never begun
    answer = ids_of(conversation.say("A cat.", **settings))
    assert answer == ids_of(exact("image").conversation().say("A cat.", **settings))


def test_a_new_turn_ends_the_one_before(exact):
    conversation = exact("mixed").conversation()
    first = conversation.say("A cat.", cfg=3.0, top_k=1, text_top_k=1)
    next(first)
    second = conversation.say("Stop.", cfg=3.0, top_k=1, text_top_k=1)
    assert list(first) == [] and first.answer.text == "S" and conversation.answers == 1
    assert isinstance(list(second)[-1], End) and conversation.answers == 2


# -- describing --------------------------------------------------------------------------------------------------------


def test_describing_many_equals_one_at_a_time(exact, oracle_v1_dir):
    pipeline = exact("text")
    pictures = sorted(oracle_v1_dir.glob("[a-e]_*.png"))
    settings = dict(max_new_tokens=15, **RANDOM)
    together = list(pipeline.describe(pictures, "What is it?", batch_size=3, **settings))
    assert len(together) == 5 and len({tuple(answer.ids) for answer in together}) > 3
    for picture, answer in zip(pictures, together, strict=True):
        (alone,) = pipeline.describe([picture], "What is it?", **settings)
        assert alone.ids == answer.ids and alone.text == answer.text
        parts = ["What is it? ", picture]
        assert pipeline.answer([("human", parts)], want="text", **settings).ids == answer.ids


def test_greedy_captions_are_those_of_the_script(exact, picture):
    pipeline = exact("text")
    settings = dict(top_k=1, text_top_k=1)
    (answer,) = pipeline.describe([picture], "Describe the image in detail.", **settings)
    assert answer.text == "Describe the image in." and answer.reason == "turn end"
    (cut,) = pipeline.describe([picture], "<|image|> Which?", max_new_tokens=2, **settings)
    assert cut.text == "Describe the" and cut.reason == "length"


# -- the second generation ---------------------------------------------------------------------------------------------


def test_the_second_generation_answers_with_the_whole_head(tiny_checkpoint):
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", torch.float64, text=True)
    conversation = pipeline.conversation()
    first = list(conversation.say("a cat", want="text", max_new_tokens=20, text_top_k=50))[-1].answer
    assert len(first.ids) <= 20 and isinstance(first.text, str) and not first.images
    second = list(conversation.say("a cat", want="image", size=(32, 32), top_k=64))[-1].answer
    assert second.images[0].codes.shape == (4, 4)
    (answer,) = pipeline.describe([second.images[0].codes], "What?", max_new_tokens=9)
    assert 0 < len(answer.ids) <= 9


def test_images_need_no_whole_head_and_are_the_same_with_it(tiny_checkpoint):
    images, whole = (Pipeline.from_pretrained(tiny_checkpoint, "cpu", text=text) for text in (None, True))
    assert not images.writes_text and whole.writes_text
    settings = dict(want="image", size=(32, 64), seed=4)
    answers = [pipeline.answer([("human", ["a cat"])], **settings) for pipeline in (images, whole)]
    assert answers[0].ids == answers[1].ids
    for call in (
        lambda: images.answer([("human", ["a cat"])]),
        lambda: images.answer([("human", ["a cat"])], want="image"),
        lambda: list(images.describe([answers[0].images[0].codes], "What?")),
    ):
        with pytest.raises(InputError, match="text"):
            call()


def test_int4_weights_answer(oracle_v1_checkpoint, tiny_checkpoint):
    pipeline = Pipeline.from_pretrained(tiny_checkpoint, "cpu", "bf16", quant=32, text=True)
    answer = pipeline.answer([("human", ["a cat"])], want="text", max_new_tokens=5)
    assert 0 < len(answer.ids) <= 5
    assert len(pipeline.answer([("human", ["a cat"])], want="image", size=(32, 32)).images) == 1


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_marks_stand_for_pictures():
    one, two = torch.zeros(2, 2), torch.ones(2, 2)
    assert turn_parts("no picture", []) == ["no picture"]
    assert turn_parts("a <|image|> b", [one]) == ["a ", one, " b"]
    assert turn_parts("what?", [one, two]) == [one, " ", two, " what?"]
    assert turn_parts("<|image|><|image|>", ["x.png", two]) == [Path("x.png"), two]
    with pytest.raises(InputError, match="pictures must be as many as the text has marks"):
        turn_parts("<|image|>", [])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(want="poem"), "want must be one of any, text, image, images, got 'poem'"),
        (dict(views=2), "views must be 1 unless want=images"),
        (dict(size=(64, 64)), "size must be left out with want=any"),
        (dict(want="image", size=(60, 64)), "width must be a multiple of 32"),
        (dict(want="images", size=(768, 768), views=9), "takes at least 21204.* this model sees 10240"),
        (dict(max_new_tokens=0), "max_new_tokens must be a whole number of at least 1"),
        (dict(speculation="noise"), "speculation must be a config.Speculation"),
        (dict(pictures=Image.new("RGB", (64, 64))), "pictures must be a sequence of pictures"),
        (dict(top_p=0.9), "top_p is no setting of an answer"),
        (dict(text_top_k=0), "text_top_k must be"),
        (dict(pictures=["nothing.png"]), "nothing.png"),
        (dict(pictures=[torch.zeros(3, 2, dtype=torch.long)]), "rows must be a multiple of 2"),
    ],
)
def test_wrong_arguments_are_refused_at_once(exact, arguments, message):
    conversation = exact("text").conversation()
    with pytest.raises(InputError, match=message):
        conversation.say("A cat.", **arguments)
    assert conversation.ids == []


def test_wrong_histories_are_refused(exact):
    pipeline = exact("text")
    v = pipeline.checkpoint.vocabulary
    with pytest.raises(InputError, match="turns must end with a turn of the human"):
        pipeline.chat([("human", ["a"]), ("assistant", ["b"])])
    with pytest.raises(InputError, match="turn 1 must be the human's"):
        pipeline.conversation([("assistant", ["a"]), ("human", ["b"])])
    for ids in ([v.bos_id], [v.bos_id, 9300, v.turn_end_id], [9300, v.turn_end_id, v.turn_end_id], [10**9]):
        with pytest.raises(InputError, match="^ids must be"):
            pipeline.conversation(ids=ids)
    with pytest.raises(InputError, match="ids must hold complete images"):
        pipeline.conversation(ids=[v.bos_id, v.image_start_id, v.turn_end_id, v.turn_end_id])
    with pytest.raises(InputError, match="pictures must be a sequence"):
        pipeline.describe("cat.png", "What?")


def test_a_text_alone_is_a_turn(exact):
    pipeline = exact("text")
    given = [("human", "A cat."), ("assistant", "Yes."), ("human", "What is this?")]
    whole = pipeline.answer([(role, [text]) for role, text in given], **RANDOM)
    assert pipeline.answer(given, **RANDOM).ids == whole.ids
    prompt = generation_prompt([(role, [text]) for role, text in given], pipeline.checkpoint.vocabulary)
    assert pipeline.chat(given)._sampler.prompt == prompt


@pytest.mark.parametrize("turns", [None, 3, "hello", ["hello"], [("human",)], [{"from": "human"}], [("human", 3)]])
def test_what_is_no_list_of_turns_is_refused(exact, turns):
    with pytest.raises(InputError, match="turns must be a sequence of turns"):
        exact("text").chat(turns)


def test_images_begin_with_their_layout(exact):
    events = list(exact("image").chat([("human", ["A cat."])], cfg=1.0, top_k=9, text_top_k=1))
    begun, done = events[0], events[-2]
    assert isinstance(begun, ImageBegun) and begun.layout.size == (96, 64) and begun.index == 0
    assert isinstance(done, ImageDone) and done.codes.shape == (4, 6)
