"""What the server refuses: in OpenAI's form, with the name of the field, and without a traceback."""

import base64
import io
import json
import signal
import threading
import urllib.error
import urllib.request

import openai
import pytest
from PIL import Image
from server_runs import PATIENCE, serving

from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.tickets import Finished

LIMITS = Limits(body=200_000, pixels=100 * 100, images=3, prompt=200, new_tokens=50)


@pytest.fixture(scope="module")
def limited(exact):
    from lumina_mgpt.server.engine import Engine

    with serving(Engine(exact, "tiny"), limits=LIMITS) as served:
        yield served


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, "PNG")
    return file.getvalue()


def post(url: str, body: bytes, kind: str = "application/json", **headers: str) -> tuple[int, dict, dict]:
    """Status, body and headers of an answer."""
    request = urllib.request.Request(url, body, {"Content-Type": kind} | headers)
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return answer.status, json.loads(answer.read()), dict(answer.headers)
    except urllib.error.HTTPError as error:
        text = error.read().decode()
        assert "Traceback" not in text
        return error.code, json.loads(text), dict(error.headers)


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 4}, "n", "at most 3, got 4"),
        ({"n": 0}, "n", "got 0"),
        ({"n": True}, "n", "integer"),
        ({"prompt": "x" * 201}, "prompt", "at most 200 characters, got 201"),
        ({"prompt": " "}, "prompt", "empty"),
        ({"prompt": "\ud800"}, "prompt", "prompt: the text must be valid Unicode"),
        ({"prompt": "<|image|>"}, "prompt", "<|image|>"),
        ({"size": "1024x1024"}, "size", "at most 10000 pixels"),
        ({"size": "33x32"}, "size", "multiple of 32"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"response_format": "url"}, "response_format", "b64_json"),
        ({"partial_images": 4}, "partial_images", "got 4"),
        ({"seed": -1}, "seed", "got -1"),
        ({"seed": 2**63}, "seed", "2**63"),
        ({"seed": "1"}, "seed", "integer"),
        ({"cfg": 2000.0}, "cfg", "0 ... 1000"),
        ({"top_k": 0}, "top_k", "at least 1"),
        ({"temperature": 0}, "temperature", "> 0"),
        ({"coupling": "noise"}, "coupling", "speculative_jacobi"),
        ({"speculative_jacobi": True, "window": 0}, "window", "1 ... 4096"),
        ({"task": "edit"}, "task", "t2i"),
        ({"steps": 20}, "steps", "no field"),
    ],
)
def test_fields_out_of_range(limited, fields, param, message):
    body = json.dumps({"prompt": "a cat", "size": "32x32"} | fields).encode()
    status, answer, _ = post(f"{limited.url}/v1/images/generations", body)
    error = answer["error"]
    assert status == 400 and error["param"] == param and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"} and "\n" not in error["message"]
    assert error["message"].startswith(param)


def test_another_model(limited):
    with pytest.raises(openai.NotFoundError, match="model must be tiny"):
        limited.client.images.generate(prompt="a cat", model="gpt-image-1")


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"text"', b"[" * 100_000, b'{"prompt": NaN}', b"\xff"])
def test_bodies_that_are_no_request(limited, body):
    status, answer, _ = post(f"{limited.url}/v1/images/generations", body)
    assert status == 400 and answer["error"]["message"]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (b"no picture", "not a picture"),
        (b"", "not a picture"),
        (png(101, 100), "at most 10000 pixels, got 101x100"),
        (png(64, 64)[:100], "cannot be read"),
        (png(16, 16), "at least 32"),
    ],
)
def test_uploads_that_are_no_picture(limited, image, message):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        limited.client.images.edit(image=("a.png", image), prompt="make it red", size="32x32")
    assert refused.value.param == "image"


@pytest.mark.parametrize(
    "text", ["/etc/passwd", "assets/subject.png", "http://127.0.0.1/a.png", "file:///etc/passwd", "data:text/plain,a"]
)
def test_pictures_by_path_or_url(limited, text):
    boundary = "x"
    parts = {"prompt": "make it red", "image": text}
    body = "".join(
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in parts.items()
    )
    kind = f"multipart/form-data; boundary={boundary}"
    status, answer, _ = post(f"{limited.url}/v1/images/edits", f"{body}--x--\r\n".encode(), kind)
    assert status == 400 and answer["error"]["param"] == "image" and "data URL" in answer["error"]["message"]


def test_a_form_with_other_parts(limited):
    edit = limited.client.images.edit
    with pytest.raises(openai.BadRequestError) as refused:
        edit(image=[("a.png", png(64, 64)), ("b.png", png(64, 64))], prompt="make it red")
    assert refused.value.param == "image"
    with pytest.raises(openai.BadRequestError) as refused:
        edit(image=("a.png", png(64, 64)), mask=("b.png", png(64, 64)), prompt="make it red")
    assert refused.value.param == "mask"
    with pytest.raises(openai.BadRequestError) as refused:
        edit(image=("a.png", png(64, 64)), prompt="make it red", extra_body={"seed": "many"})
    assert refused.value.param == "seed"


def test_long_bodies(limited):
    url = f"{limited.url}/v1/images/generations"
    body = json.dumps({"prompt": "x" * LIMITS.body}).encode()
    status, answer, _ = post(url, body)
    assert status == 413 and "at most 200000 bytes" in answer["error"]["message"]

    def pieces():
        for start in range(0, len(body), 10_000):
            yield body[start : start + 10_000]

    request = urllib.request.Request(url, pieces(), {"Content-Type": "application/json"})  # chunked: no length
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request, timeout=PATIENCE)
    assert refused.value.code == 413


def test_the_key(exact, engine_of):
    with serving(engine_of(exact), key="s3cret ü") as served:
        with urllib.request.urlopen(f"{served.url}/health", timeout=PATIENCE) as answer:
            assert json.loads(answer.read())["status"] == "ok"
        for header in ("", "Bearer wrong", "Bearer", "Basic %%%", "Basic " + base64.b64encode(b"me:wrong").decode()):
            for path in ("/", "/docs", "/metrics", "/v1/models"):
                status, answer, headers = post(f"{served.url}{path}", b"{}", Authorization=header)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
                assert "s3cret" not in str(answer) and ("Basic" in headers["www-authenticate"]) == (path[:3] != "/v1")
        basic = base64.b64encode("me:s3cret ü".encode()).decode()
        request = urllib.request.Request(f"{served.url}/v1/models", headers={"Authorization": f"Basic {basic}"})
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            assert answer.status == 200


def test_a_bug_is_an_error_500_without_a_traceback(served, exact, monkeypatch):
    monkeypatch.setattr(exact, "sample", lambda *_, **__: {}["secret detail"])
    url = f"{served.url}/v1/images/generations"
    status, answer, _ = post(url, b'{"prompt": "a cat", "size": "32x32"}')
    assert status == 500 and "secret" not in str(answer) and answer["error"]["type"] == "server_error"
    with pytest.raises(openai.APIError, match="bug"):
        list(served.client.images.generate(prompt="a cat", size="32x32", stream=True))
    monkeypatch.undo()
    assert post(url, b'{"prompt": "a cat", "size": "32x32"}')[0] == 200


def test_a_signal_refuses_what_waits_and_finishes_what_runs(exact, engine_of, gate):
    engine, answers = engine_of(exact), {}
    with serving(engine) as served:

        def ask(name: str) -> None:
            answers[name] = post(f"{served.url}/v1/images/generations", b'{"prompt": "a cat", "size": "32x32"}')

        threads = [threading.Thread(target=ask, args=[name]) for name in ("running", "waiting")]
        threads[0].start()
        assert gate.reached.wait(PATIENCE)
        threads[1].start()
        while not engine.waiting:
            threading.Event().wait(0.01)
        served.server.handle_exit(signal.SIGTERM, None)
        threads[1].join(PATIENCE)
        status, answer, headers = answers["waiting"]
        assert status == 503 and answer["error"]["code"] == "shutting_down" and int(headers["retry-after"])
        gate.open()
        threads[0].join(PATIENCE)
    assert answers["running"][0] == 200
    assert not engine.alive


def test_the_engine_and_its_metrics(limited):
    ticket = limited.engine.submit(GenerationRequest.of("a cat", 32, 32))
    assert any(isinstance(event, Finished) for event in ticket)
    with urllib.request.urlopen(f"{limited.url}/metrics", timeout=PATIENCE) as answer:
        text = answer.read().decode()
    for name in ("lumina_waiting 0.0", "lumina_batch_images_count", "lumina_image_codes_total", "process_resident"):
        assert name in text
    assert 'lumina_requests_total{method="GET",path="/metrics",status="200"}' not in text  # counted when it is answered
    with urllib.request.urlopen(f"{limited.url}/metrics", timeout=PATIENCE) as answer:
        assert 'path="/metrics",status="200"} 1.0' in answer.read().decode()
