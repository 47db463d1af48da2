"""The chat API with OpenAI's client: its answers are those of `Pipeline.chat`."""

import base64
import io
import threading
import time
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from PIL import Image
from server_runs import PATIENCE, serving

from lumina_mgpt import Checkpoint, Pipeline
from lumina_mgpt.config import Speculation
from lumina_mgpt.results import ImageDone
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.limits import Limits

SAMPLING = dict(seed=7, cfg=2.0, top_k=50, text_top_k=20)
LIMITS = Limits(pixels=10_000, images=2, prompt=300, new_tokens=400)


@pytest.fixture(scope="module")
def chats(oracle_v1_checkpoint):
    """Script of the tiny model of the first generation -> its server, in float64."""
    running, contexts = {}, []

    def get(script: str):
        if script not in running:
            checkpoint = Checkpoint.open(oracle_v1_checkpoint(script))
            small = replace(checkpoint, config=replace(checkpoint.config, base_size=64))  # pictures stay as they are
            pipeline = Pipeline.from_pretrained(small, "cpu", torch.float64)
            contexts.append(serving(Engine(pipeline, script), limits=LIMITS))
            running[script] = contexts[-1].__enter__()
        return running[script]

    yield get
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.fixture(scope="module")
def picture(oracle_v1_dir) -> Path:
    return oracle_v1_dir / "b_64x64.png"


def url_of(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def opened(url: str) -> Image.Image:
    head, _, content = url.partition(",")
    assert head == "data:image/png;base64"
    return Image.open(io.BytesIO(base64.b64decode(content)))


def turn(text: str, *pictures: Path) -> dict:
    parts = [{"type": "text", "text": text}]
    return {
        "role": "user",
        "content": parts + [{"type": "image_url", "image_url": {"url": url_of(path)}} for path in pictures],
    }


def settings(**values) -> dict:
    return {"extra_body": SAMPLING | values}


def expected(served, text, picture, **values):
    with Image.open(picture) as image:
        return served.engine.pipeline.answer([("human", [text, image])], **SAMPLING | values)


def test_a_text_is_that_of_the_pipeline_whole_and_streamed(chats, picture):
    served = chats("text")
    create = served.client.chat.completions.create
    messages = [turn("Describe it.", picture)]
    fields = dict(model="text", messages=messages, max_completion_tokens=60, temperature=10.0, **settings())
    answer = create(**fields)
    wanted = expected(served, "Describe it. ", picture, max_new_tokens=60, text_temperature=10.0)
    assert wanted.text and answer.choices[0].message.content == wanted.text
    assert answer.choices[0].finish_reason == ("stop" if wanted.reason == "turn end" else "length")
    assert answer.usage.completion_tokens == len(wanted.ids)
    chunks = list(create(**fields, stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert len(pieces) > 1 and "".join(pieces) == wanted.text
    assert chunks[-1].usage == answer.usage and chunks[-2].choices[0].finish_reason == answer.choices[0].finish_reason


def test_images_come_as_data_urls_whole_and_streamed(chats, picture):
    served = chats("mixed")
    create = served.client.chat.completions.create
    fields = dict(model="mixed", messages=[turn("Add a cat.", picture)], max_completion_tokens=150, **settings())
    message = create(**fields).choices[0].message
    wanted = expected(served, "Add a cat. ", picture, max_new_tokens=150)
    whole = [image for image in wanted.images if image.whole]
    assert whole and len(message.images) == len(whole)
    for sent, image in zip(message.images, whole, strict=True):
        assert opened(sent["image_url"]["url"]).tobytes() == image.image.tobytes()
    assert message.content == "".join(part for part in wanted.parts if isinstance(part, str))
    chunks = [chunk.choices[0].delta for chunk in create(**fields, stream=True)]
    streamed = [image for delta in chunks for image in getattr(delta, "images", None) or []]
    assert streamed == message.images
    assert "".join(delta.content or "" for delta in chunks) == message.content


def test_an_answer_can_be_sent_back(chats, picture):
    """The second turn after the client's messages is that of a conversation whose first answer is the same parts."""
    served = chats("mixed")
    create = served.client.chat.completions.create
    messages: list = [turn("Add a cat.", picture)]
    fields = dict(model="mixed", max_completion_tokens=150, **settings())
    message = create(messages=messages, **fields).choices[0].message
    messages += [message, {"role": "user", "content": "And now?"}]
    second = create(messages=messages, **fields).choices[0].message
    first = expected(served, "Add a cat. ", picture, max_new_tokens=150)
    parts = [
        part if isinstance(part, str) else part.image for part in first.parts if isinstance(part, str) or part.whole
    ]
    with Image.open(picture) as image:
        turns = [("human", ["Add a cat. ", image]), ("assistant", parts), ("human", ["And now?"])]
        wanted = served.engine.pipeline.answer(turns, **SAMPLING, max_new_tokens=150)
    assert second.content == "".join(part for part in wanted.parts if isinstance(part, str))


def test_an_image_of_a_given_size(chats):
    served = chats("mixed")
    fields = dict(model="mixed", messages=[{"role": "user", "content": "A cat."}], modalities=["image"])
    message = served.client.chat.completions.create(**fields, **settings(size="64x32")).choices[0].message
    (image,) = message.images
    assert opened(image["image_url"]["url"]).size == (64, 32) and not message.content
    text = served.client.chat.completions.create(
        **fields | {"modalities": ["text"]}, max_completion_tokens=20, **settings()
    )
    assert not hasattr(text.choices[0].message, "images")


def test_a_client_that_leaves_ends_its_answer(chats, picture, monkeypatch):
    served = chats("mixed")

    def count(name: str) -> float:
        text = served.client.get("/../metrics", cast_to=str)
        return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])

    fields = dict(model="mixed", messages=[turn("Add a cat.", picture)], temperature=100.0, **settings(text_top_k=5000))
    forward = served.engine.pipeline.model.forward
    monkeypatch.setattr(
        served.engine.pipeline.model, "forward", lambda *a, **k: (time.sleep(0.02), forward(*a, **k))[1]
    )
    before = count("lumina_answer_seconds_count"), count("lumina_cancelled_total")
    stream = served.client.chat.completions.create(**fields, stream=True)
    next(iter(stream))
    stream.close()
    end = time.monotonic() + PATIENCE
    while served.engine.running and time.monotonic() < end:
        time.sleep(0.02)
    assert not served.engine.running
    assert (count("lumina_answer_seconds_count"), count("lumina_cancelled_total")) == (before[0], before[1] + 1)


@pytest.mark.parametrize("speculation", [None, Speculation("noise", 4)])
def test_a_cancelled_answer_ends_inside_an_image_at_the_next_step(chats, monkeypatch, speculation):
    engine = chats("mixed").engine
    forward, calls = engine.pipeline.model.forward, []

    def counted(ids, **arguments):
        calls.append(len(ids))
        if len(calls) == 3:
            ticket.cancel()
        return forward(ids, **arguments)

    monkeypatch.setattr(engine.pipeline.model, "forward", counted)
    started = threading.Event()
    monkeypatch.setattr(engine.pipeline, "chat", lambda *a, **k: (started.wait(PATIENCE), chat(*a, **k))[1])
    chat = type(engine.pipeline).chat.__get__(engine.pipeline)
    ticket = engine.chat([("human", ["A cat."])], want="image", size=(64, 64), speculation=speculation)
    started.set()
    assert not any(isinstance(event, ImageDone) for event in ticket)
    end = time.monotonic() + PATIENCE
    while engine.running and time.monotonic() < end:
        time.sleep(0.01)
    assert len(calls) == 3


USER = {"role": "user", "content": "Hello"}
BOT = {"role": "assistant", "content": "Hello"}


IMAGE = "messages.0.content.0.image_url"


def with_part(part: dict) -> dict:
    """A turn of the user with one part."""
    return {"role": "user", "content": [part]}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [USER, BOT]}, "messages", "end with a turn of the user"),
        ({"messages": [BOT, USER, USER]}, "messages", "alternation"),
        ({"messages": [USER, USER, USER]}, "messages", "alternation"),
        ({"messages": [{"role": "system", "content": "x"}, USER]}, "messages.0.role", "'user' or 'assistant'"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages.0.content", "empty"),
        ({"messages": [{"role": "user", "content": "x" * 301}]}, "messages", "at most 300"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "got 5"),
        ({"messages": [with_part({"type": "image_url", "image_url": "x"})]}, IMAGE, "must be an object, got 'x'"),
        ({"messages": [with_part({"type": "image_url", "image_url": {"url": "x", "a": 1}})]}, f"{IMAGE}.a", "no field"),
        ({"messages": [with_part({"type": "text", "text": 5})]}, "messages.0.content.0.text", "got 5"),
        ({"messages": [with_part({"type": "file"})]}, "messages.0.content.0", "'text', 'image_url'"),
        ({"messages": [USER], "temperature": -1}, "temperature", "got -1"),
        ({"messages": [USER], "max_tokens": 401}, "max_tokens", "at most 400"),
        ({"messages": [USER], "n": 2}, "n", "must be 1"),
        ({"messages": [USER], "extra_body": {"size": "64x64"}}, "size", "modalities"),
        ({"messages": [USER], "tools": []}, "tools", "no field"),
        ({"messages": [USER], "extra_body": {"text_top_k": 0}}, "text_top_k", "at least 1"),
        ({"messages": [{"role": "user", "content": "<|image|>"}]}, None, "<|image|>"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_refusals(chats, fields, param, message, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        chats("mixed").client.chat.completions.create(model="mixed", stream=stream, **fields)
    assert message in refused.value.body["message"], refused.value.body
    assert refused.value.param == param or param is None


@pytest.mark.parametrize(
    "url",
    ["http://127.0.0.1/a.png", "/etc/passwd", *(f"data:image/png;base64,{text}" for text in ("%%", "AAAA", "\u00e9"))],
)
def test_pictures_that_are_no_data_url_of_a_picture(chats, url):
    content = [{"type": "image_url", "image_url": {"url": url}}]
    with pytest.raises(openai.BadRequestError) as refused:
        chats("mixed").client.chat.completions.create(model="mixed", messages=[{"role": "user", "content": content}])
    assert refused.value.param == "messages.0.content.0.image_url"


def test_pictures_that_wait_are_small(chats, monkeypatch):
    """A picture of few bytes may have many pixels, and hundreds of conversations can wait."""
    served, waiting = chats("mixed"), []
    chat = served.engine.chat
    monkeypatch.setattr(
        served.engine, "chat", lambda turns, **settings: (waiting.extend(turns), chat(turns, **settings))[1]
    )
    file = io.BytesIO()
    Image.new("RGB", (100, 100), "red").save(file, "PNG")
    url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    message = with_part({"type": "image_url", "image_url": {"url": url}})
    served.client.chat.completions.create(model="mixed", messages=[message], max_completion_tokens=1)
    assert [part.size for part in waiting[0][1]] == [(64, 64)]


def test_too_many_pictures(chats, picture):
    with pytest.raises(openai.BadRequestError, match="at most 2, got 3"):
        chats("mixed").client.chat.completions.create(model="mixed", messages=[turn("x", *[picture] * 3)])


def test_a_checkpoint_that_writes_no_text(served):
    with pytest.raises(openai.BadRequestError, match="writes no text"):
        served.client.chat.completions.create(model="tiny", messages=[USER])
