"""`lumina-mgpt serve`, and the examples of docs/server.md."""

import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from commands import ROOT, environment, line_of, main_of
from documents import blocks
from PIL import Image
from server_runs import PATIENCE, serving

from lumina_mgpt import Checkpoint, Pipeline
from lumina_mgpt.server.engine import Engine

EXAMPLES = (ROOT / "docs" / "server.md").read_text(encoding="utf-8")
CURL = [block for block in blocks(EXAMPLES, "bash") if block.startswith("curl")]
PYTHON = blocks(EXAMPLES, "python")


@pytest.fixture(scope="module")
def process(tiny_checkpoint) -> Iterator[tuple[str, subprocess.Popen]]:
    """A server of its own: its URL, and its process."""
    line = line_of("serve", "--model_path", tiny_checkpoint, "--device", "cpu", "--port", 0, "--model_name", "demo")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(line, cwd=ROOT, env=environment(), text=True, **pipes) as running:
        try:
            first = running.stdout.readline()
            assert first.startswith("demo at http://127.0.0.1:"), first + running.stderr.read()
            yield re.search(r"http://\S+?(?=;)", first)[0], running
        finally:
            running.kill()


@pytest.fixture(scope="module")
def chat_url(oracle_v1_checkpoint) -> Iterator[str]:
    checkpoint = Checkpoint.open(oracle_v1_checkpoint("mixed"))
    small = replace(checkpoint, config=replace(checkpoint.config, base_size=64))
    with serving(Engine(Pipeline.from_pretrained(small, "cpu"), "chat")) as served:
        yield served.url


def run_example(command: list[str], folder: Path) -> str:
    (folder / "assets").symlink_to(ROOT / "assets")
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.xdist_group("serve")  # one process for all of them
@pytest.mark.parametrize("number", range(2))
def test_the_examples_with_curl(process, tmp_path, number):
    assert len(CURL) == 2
    script = CURL[number].replace("http://localhost:8000", process[0])
    assert "PNG" in run_example(["bash", "-euo", "pipefail", "-c", script], tmp_path)


@pytest.mark.slow
@pytest.mark.xdist_group("serve")
@pytest.mark.parametrize(
    ("number", "files"),
    [(0, ["hedgehog_0", "hedgehog_1"]), (1, ["owl", "owl_0", "owl_1", "owl_2"]), (2, ["depth"]), (3, [])],
)
def test_the_examples_with_the_client(process, chat_url, tmp_path, number, files):
    assert len(PYTHON) == 4
    url = chat_url if "chat." in PYTHON[number] else process[0]
    script = PYTHON[number].replace("http://localhost:8000", url)
    output = run_example([sys.executable, "-c", script], tmp_path)
    assert sorted(path.stem for path in tmp_path.glob("*.png")) == files
    for path in tmp_path.glob("*.png"):
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
    assert "chat." not in PYTHON[number] or output.endswith("data:image/png;base64,iVBORw0K\n")


@pytest.mark.slow
@pytest.mark.xdist_group("serve")
def test_a_signal_ends_the_server(process):
    """The last test of this process."""
    url, running = process
    with urllib.request.urlopen(f"{url}/health", timeout=PATIENCE) as answer:
        assert answer.status == 200
    with urllib.request.urlopen(url, timeout=PATIENCE) as answer:
        assert b"<html" in answer.read()
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=PATIENCE)
    assert running.returncode == 128 + signal.SIGTERM
    assert errors == "stopped by SIGTERM; requests that ran are answered\n"


def test_a_port_in_use(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main_of("serve")(["--port", str(port)]) == 2
    assert capsys.readouterr().err.startswith(f"error: --port {port} cannot be used (")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--port", "70000"], "--port 70000 cannot be used"),
        (["--host", "no.such.host.invalid"], "--host no.such.host.invalid cannot be used"),
        (["--api_key", " "], "--api_key must not be empty"),
        (["--max_n", "0"], "--max_n must be a whole number of at least 1"),
        (["--batch_size", "-1"], "--batch_size must be"),
        (["--model_path", "no/such/folder", "--port", "0"], "--model_path"),
    ],
)
def test_wrong_options(capsys, options, message):
    assert main_of("serve")(options) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1


def test_the_extra_is_named_where_it_is_missing(monkeypatch, capsys):
    for name in [name for name in sys.modules if name.startswith("lumina_mgpt.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert main_of("serve")(["--port", "0"]) == 2
    assert "pip install 'lumina-mgpt[server]'" in capsys.readouterr().err
