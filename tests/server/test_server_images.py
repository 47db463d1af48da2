"""The image API with OpenAI's client: its pictures are those of the command line."""

import base64
import io
import socket
import time

import openai
import pytest
from commands import main_of
from PIL import Image
from server_runs import PATIENCE, serving

from lumina_mgpt import Pipeline
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.request import GenerationRequest

PROMPT = "a cat on a white background"


def picture(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def same(one: Image.Image, other: Image.Image) -> bool:
    return one.size == other.size and one.convert("RGB").tobytes() == other.convert("RGB").tobytes()


@pytest.fixture(scope="module")
def upload(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("upload") / "gradient.png"
    Image.linear_gradient("L").resize((80, 96)).convert("RGB").save(path)
    return str(path)


@pytest.fixture(scope="module")
def fp32(tiny_checkpoint) -> Pipeline:
    return Pipeline.from_pretrained(tiny_checkpoint, "cpu")


@pytest.mark.parametrize(
    ("fields", "options"),
    [
        ({}, []),
        ({"cfg": 2.5, "top_k": 20, "temperature": 0.8}, ["--cfg", "2.5", "--top_k", "20", "--temperature", "0.8"]),
        ({"speculative_jacobi": True, "coupling": "maximal", "window": 5},
         ["--speculative_jacobi", "--coupling", "maximal", "--window", "5"]),
        ({"task": "depth", "size": "32x64"}, ["--task", "depth", "--height", "64"]),
    ],
)  # fmt: skip
def test_the_pictures_are_those_of_the_command_line(fp32, engine_of, tiny_checkpoint, tmp_path, fields, options):
    extra = {"size": "32x32"} | fields
    size = ["--width", "32", *([] if "--height" in options else ["--height", "32"])]
    line = ["--model_path", str(tiny_checkpoint), "--device", "cpu", "--save_path", str(tmp_path), "-n", "2"]
    assert main_of("generate")([*line, "--prompt", PROMPT, "--seed", "5", *size, *options]) == 0
    with serving(engine_of(fp32)) as served:
        answer = served.client.images.generate(
            prompt=PROMPT, n=2, response_format="b64_json", extra_body=extra | {"seed": 5}
        )
    for repeat, item in enumerate(answer.data):
        got, expected = picture(item.b64_json), Image.open(tmp_path / f"0_{repeat}.png")
        assert same(got, expected) and (item.seed, item.repeat) == (5, repeat)
        for name in ("prompt", "repeat", "seed", "cfg", "top_k", "temperature"):
            if name != "top_k":  # the command line writes the number of codes where top_k is larger
                assert got.text[name] == expected.text[name]
    assert answer.size == "{}x{}".format(*expected.size)
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens


@pytest.mark.parametrize("partial", [0, 1, 3])
def test_a_stream_has_partial_images_and_the_image(served, exact, partial):
    stream = served.client.images.generate(
        prompt=PROMPT, size="32x64", stream=True, partial_images=partial, extra_body={"seed": 3}
    )
    *partials, completed = list(stream)
    assert [event.type for event in partials] == ["image_generation.partial_image"] * partial
    assert [event.partial_image_index for event in partials] == list(range(partial))
    assert completed.type == "image_generation.completed" and completed.seed == 3
    (result,) = exact.generate(PROMPT, 32, 64, seed=3)
    assert same(picture(completed.b64_json), result.image)
    for number, event in enumerate(partials, start=1):
        rows = 8 * number // (partial + 1)
        expected = exact.preview(result.codes[None, :rows], exact.checkpoint.layout(32, 64))[0]
        assert same(picture(event.b64_json), expected)


def test_without_a_seed_each_request_has_another(served):
    answers = [served.client.images.generate(prompt=PROMPT, size="32x32").data[0] for _ in range(2)]
    assert answers[0].seed != answers[1].seed
    again = served.client.images.generate(prompt=PROMPT, size="32x32", extra_body={"seed": answers[0].seed})
    assert again.data[0].b64_json == answers[0].b64_json


@pytest.mark.parametrize("task", ["edit", "predict_depth"])
def test_an_edit_returns_the_result_alone(served, exact, upload, task):
    with open(upload, "rb") as file:
        answer = served.client.images.edit(
            image=file, prompt="make it red", n=2, size="64x32", extra_body={"seed": 4, "cfg": 2.0, "task": task}
        )
    request = GenerationRequest.of(
        "make it red", 64, 64, n=2, seed=4, cfg=2.0, task=I2I_TASKS[task], panel=Image.open(upload)
    )
    for item, result in zip(answer.data, exact.stream(request), strict=True):
        assert same(picture(item.b64_json), result.panel)
    assert answer.size == "64x32"


def test_an_edit_streams_and_takes_a_data_url(served, upload):
    with open(upload, "rb") as file:
        content = file.read()
    fields = {"prompt": "make it red", "size": "32x32"}
    extra = {"seed": 4}
    with open(upload, "rb") as file:
        stream = served.client.images.edit(image=file, **fields, stream=True, partial_images=2, extra_body=extra)
        *partials, completed = list(stream)
    assert [event.type for event in partials] == ["image_edit.partial_image"] * 2
    assert completed.type == "image_edit.completed"
    assert {picture(event.b64_json).size for event in (*partials, completed)} == {(32, 32)}
    url = "data:image/png;base64," + base64.b64encode(content).decode()
    form = {"image": url, **fields, "seed": "4"}
    answer = served.client.post(
        "/images/edits", body=form, cast_to=dict, options={"headers": {"Content-Type": "multipart/form-data"}},
        files=[],
    )  # fmt: skip
    assert same(picture(answer["data"][0]["b64_json"]), picture(completed.b64_json))


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_other_formats(served, kind):
    answer = served.client.images.generate(prompt=PROMPT, size="32x32", output_format=kind)
    assert picture(answer.data[0].b64_json).format == kind.upper() and answer.output_format == kind


def test_a_client_that_leaves_frees_its_rows(served, gate):
    """The other request of the batch goes on, with fewer rows."""
    body = b'{"prompt": "a cat", "size": "32x32", "n": 2}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
    address = served.url.removeprefix("http://").split(":")
    with socket.create_connection((address[0], int(address[1]))) as leaving:
        leaving.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        assert gate.reached.wait(PATIENCE)
    metric = "lumina_cancelled_total 1.0"
    end = time.monotonic() + PATIENCE
    while metric not in served.client.get("/../metrics", cast_to=str) and time.monotonic() < end:
        time.sleep(0.05)
    gate.open()
    assert served.client.images.generate(prompt=PROMPT, size="32x32").data
    assert len(gate.rows) <= 3 + 16


def test_a_full_queue_answers_429(exact, engine_of, gate):
    engine = engine_of(exact, queue_limit=1)
    with serving(engine) as served:
        running = engine.submit(GenerationRequest.of("a cat", 32, 32))
        assert gate.reached.wait(PATIENCE)
        waiting = engine.submit(GenerationRequest.of("a cat", 32, 32))
        with pytest.raises(openai.RateLimitError) as full:
            served.client.images.generate(prompt=PROMPT, size="32x32")
        assert int(full.value.response.headers["Retry-After"]) >= 1
        assert full.value.code == "queue_full"
        gate.open()
        assert list(running) and list(waiting)


def test_the_models(served):
    (model,) = served.client.models.list().data
    assert model.id == "tiny" and model.tasks[0] == "t2i" and "edit" in model.edit_tasks
    assert served.client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("gpt-image-1")
