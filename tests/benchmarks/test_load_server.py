"""The load script against a running server: what it counts, and what makes it fail."""

import base64
import io
import json
import threading
from collections.abc import Iterator

import numpy as np
import pytest
from commands import module_of
from PIL import Image
from server_runs import Served, serving

from lumina_mgpt import Pipeline, cli
from lumina_mgpt.server.engine import Engine


@pytest.fixture
def script(monkeypatch):
    return module_of("load_server")


@pytest.fixture
def served(tiny_checkpoint) -> Iterator[Served]:
    with serving(Engine(Pipeline.from_pretrained(tiny_checkpoint, "cpu"), "tiny")) as running:
        yield running


def run(script, served, *options: str) -> int:
    line = ["--url", served.url, "--clients", "3", "--seconds", "1", *options]
    return cli.run(script.load, script.build_parser(), line)


@pytest.mark.slow
def test_every_answer_is_counted_and_compared(script, served, capsys):
    assert run(script, served, "--leave", "0.3") == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["images"] > 0 and result["lost"] == result["other"] == 0
    assert result["images_a_second"] == pytest.approx(result["images"] / result["seconds"], rel=0.1)
    assert result["p50"] <= result["p90"] <= result["p99"]


@pytest.mark.slow
def test_a_picture_of_another_request_fails_the_run(script, served, capsys, monkeypatch):
    """The client threads get the picture of another pair than they asked for."""
    pixels_of, made = script.pixels_of, []

    def mixed_up(body):
        picture = pixels_of(body)
        if threading.current_thread() is threading.main_thread():
            made.append(picture)
            return picture
        return next(other for other in made if not np.array_equal(other, picture))

    monkeypatch.setattr(script, "pixels_of", mixed_up)
    assert run(script, served) == 1
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["other"] > 0


def test_judging_a_picture(script):
    references = {("a", 0): np.zeros((4, 4, 3), np.int16), ("b", 0): np.full((4, 4, 3), 200, np.int16)}
    near = references["a", 0].copy()
    near[0] = 50
    counts = script.Counts()
    for picture in (references["a", 0], near, references["b", 0]):
        script.judge(("a", 0), picture, references, counts)
    assert (counts.near, counts.other) == ([("a", 0)], [("a", 0)])


def test_pictures_keep_their_sign(script):
    file = io.BytesIO()
    Image.new("RGB", (2, 2), (255, 0, 1)).save(file, "PNG")
    pixels = script.pixels_of({"data": [{"b64_json": base64.b64encode(file.getvalue()).decode()}]})
    assert pixels.tolist()[0][0] == [255, 0, 1] and (pixels - 255).min() == -255
