"""Expanded prompts: a local server that answers as an OpenAI-compatible endpoint does, and faults of each kind."""

import json
import sys
import threading
import types
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from commands import main_of
from PIL import Image

from lumina_mgpt import Pipeline
from lumina_mgpt.errors import InputError
from lumina_mgpt.rewriting import KEY_VARIABLE, SYSTEM_PROMPT, make_rewriter, rewritten


class Stub(ThreadingHTTPServer):
    """An endpoint. `answer` is the text of its answers, or (status, body) or seconds to wait."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: object = "a long prompt"
        self.requests: list[tuple[str, dict, dict]] = []
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append((self.path, dict(self.headers), body))
        answer = self.server.answer
        if answer == "trickle":
            self._send(200, b"", length=1000)
            while not self.server.released.wait(0.05):
                self.wfile.write(b" ")
                self.wfile.flush()
            return
        if answer is None:
            self.server.released.wait(20)
            return
        if callable(answer):
            answer = answer(body["messages"][-1]["content"])
        if isinstance(answer, tuple):
            self._send(*answer)
        else:
            self._send(200, json.dumps({"choices": [{"message": {"role": "assistant", "content": answer}}]}).encode())

    do_GET = do_POST

    def _send(self, status: int, body: bytes, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        if status in (302, 307):
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def stub(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY", KEY_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    server = Stub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_prompt_is_expanded(stub, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret-1")
    stub.answer = "<think>hm</think>\n “A fat cat,\n  in the sun.” "
    assert make_rewriter(stub.url, "qwen")("a cat") == "A fat cat, in the sun."
    ((path, headers, body),) = stub.requests
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret-1"
    assert body["model"] == "qwen" and [m["role"] for m in body["messages"]] == ["system", "user"]
    assert [m["content"] for m in body["messages"]] == [SYSTEM_PROMPT, "a cat"]


def test_thoughts_whose_beginning_the_server_leaves_out(stub):
    stub.answer = "A cat. Fat?\n</think>\n\nA fat cat."
    assert make_rewriter(stub.url, "qwen")("a cat") == "A fat cat."


@pytest.mark.parametrize(
    ("end", "path"),
    [
        ("/", "/v1/chat/completions"),
        ("/chat/completions", "/v1/chat/completions"),
        ("?v=2", "/v1/chat/completions?v=2"),
    ],
)
def test_addresses(stub, end, path):
    assert make_rewriter(stub.url + end, "m")("a cat") == "a long prompt"
    assert stub.requests[0][0] == path and "Authorization" not in stub.requests[0][1]


def test_equal_prompts_are_expanded_once(stub):
    stub.answer = lambda prompt: f"{prompt}, expanded"
    rewriter = make_rewriter(stub.url, "m")
    assert rewritten(["a", "b", "a"], rewriter) == ["a, expanded", "b, expanded", "a, expanded"]
    assert len(stub.requests) == 2


@pytest.mark.parametrize(
    ("answer", "part"),
    [
        ((500, b"out of\nmemory"), "answers with status 500 (out of memory)"),
        ((404, b""), "answers with status 404"),
        ((302, b""), "answers with status 302"),
        ((307, b""), "answers with status 307"),
        ((200, b"<html>"), "something else than a chat completion"),
        ((200, b'{"choices": []}'), "something else than a chat completion"),
        ((200, b"[" * 100_000), "something else than a chat completion"),
        ((200, b" " * (1 << 21)), "more than 1048576 bytes"),
        ("", "returns an empty prompt"),
        ("<think>what is a cat</think> ", "returns an empty prompt"),
        ("<think>what is a", "returns thoughts without an answer"),
        ('""', "returns an empty prompt"),
        ("word " * 2000, "returns a prompt of 9999 characters"),
        ((200, b'{"choices": [{"message": {"content": null}}]}'), "must return a text, got a NoneType"),
    ],
)
def test_wrong_answers_are_one_line(stub, answer, part):
    stub.answer = answer
    with pytest.raises(InputError) as error:
        make_rewriter(stub.url, "m")("a cat")
    assert part in str(error.value) and str(error.value).startswith(f"rewrite {stub.url}/chat/completions ")
    assert "\n" not in str(error.value) and len(stub.requests) == 1  # no redirect is followed


@pytest.mark.parametrize("answer", [None, "trickle"])
def test_a_slow_answer_is_an_error(stub, answer):
    """No byte in time, and bytes that come in time one by one."""
    stub.answer = answer
    with pytest.raises(InputError, match=r"gives no answer within 0.3 seconds"):
        make_rewriter(stub.url, "m", timeout=0.3)("a cat")


def test_nobody_listens(stub):
    url = stub.url
    stub.shutdown()
    stub.server_close()
    with pytest.raises(InputError, match="cannot be reached"):
        make_rewriter(url, "m")("a cat")


def test_a_wrong_key_is_not_shown(stub, monkeypatch):
    monkeypatch.setenv(KEY_VARIABLE, "secret\nX-More: 1")
    with pytest.raises(InputError, match=f"{KEY_VARIABLE} must be ASCII") as error:
        make_rewriter(stub.url, "m")("a cat")
    assert "secret" not in str(error.value) and not stub.requests


@pytest.mark.parametrize(
    ("source", "model", "part"),
    [
        ("ftp://host/v1", "m", "must be an http or https address"),
        ("file:///etc/passwd", "m", "must be an http or https address"),
        ("http://", "m", "must be an http or https address"),
        ("http://host:many/v1", "m", "must be an http or https address"),
        ("http://host /v1", "m", "must be an http or https address"),
        ("http://me:pass@host/v1", "m", "must hold no user"),
        ("http://host/v1", None, "needs the name of its model"),
        ("str:upper", "m", "rewrite_model m has no effect"),
        ("cats", None, "must be module:function"),
        ("no_such_module_of_mine:f", None, "cannot import"),
    ],
)
def test_wrong_sources(source, model, part):
    with pytest.raises(InputError) as error:
        make_rewriter(source, model)
    assert part in str(error.value) and "pass@" not in str(error.value)


def test_a_function_expands(monkeypatch):
    assert make_rewriter("string:capwords")("a red cat") == "A Red Cat"
    with pytest.raises(InputError, match="math:sqrt raised TypeError"):
        make_rewriter("math:sqrt")("a cat")
    with pytest.raises(InputError, match="must return a text, got a int"):
        make_rewriter("builtins:len")("a cat")


@pytest.fixture
def generate(tiny_checkpoint, tmp_path):
    main = main_of("generate")
    fixed = ["--model_path", tiny_checkpoint, "--save_path", tmp_path / "out", "--device", "cpu"]
    fixed += ["--width", 32, "--height", 32]
    return lambda *options: main([*map(str, fixed), *map(str, options)])


def test_both_prompts_are_in_the_picture(stub, generate, tiny_checkpoint, tmp_path):
    stub.answer = lambda prompt: f"{prompt} on a white background"
    prompts = ("--prompt", "a cat", "--prompt", "a snowman")
    assert generate(*prompts, "--rewrite", stub.url + "?key=1", "--rewrite_model", "qwen") == 0
    text = Image.open(tmp_path / "out/1_0.png").text
    assert (text["prompt"], text["original_prompt"]) == ("a snowman on a white background", "a snowman")
    assert (text["rewrite"], text["rewrite_model"]) == (stub.url, "qwen")  # a query may hold a key
    (result,) = Pipeline.from_pretrained(tiny_checkpoint, "cpu").generate(text["prompt"], 32, 32)
    assert result.image.tobytes() == Image.open(tmp_path / "out/1_0.png").tobytes()


def test_an_endpoint_that_fails_ends_the_command_before_weights(stub, generate, monkeypatch, tmp_path, capsys):
    stub.answer = lambda prompt: (503, b"busy") if "snow" in prompt else prompt
    monkeypatch.setattr(Pipeline, "from_pretrained", None)
    prompts = ("--prompt", "a cat", "--prompt", "a snowman")
    assert generate(*prompts, "--rewrite", stub.url, "--rewrite_model", "m") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --rewrite {stub.url}/chat/completions answers with status 503 (busy)")
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "part"),
    [
        (("--rewrite_model", "m"), "--rewrite_model m has no effect without --rewrite"),
        (("--rewrite", "http://127.0.0.1:9/v1"), "give --rewrite_model NAME"),
        (("--rewrite", "string:capwords", "--instruction", "Draw"), "--instruction replaces that"),
    ],
)
def test_options_that_do_not_fit(generate, capsys, options, part):
    prompt = () if "--instruction" in options else ("--prompt", "a cat")
    assert generate(*prompt, *options) == 2
    assert part in capsys.readouterr().err


def test_several_processes_do_not_rewrite(generate, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate("--prompt", "a cat", "--rewrite", "string:capwords") == 2
    assert "one process" in capsys.readouterr().err


@pytest.fixture
def listed(tiny_checkpoint, tmp_path) -> list[str]:
    """Options of `lumina-mgpt benchmark` for a list of three prompts, two of them equal."""
    (tmp_path / "list").write_text("a cat\na snowman\na cat\n")
    options = ["compbench", "--prompts", tmp_path / "list", "--save_path", tmp_path / "out", "-n", 1]
    options += ["--model_path", tiny_checkpoint, "--device", "cpu", "--width", 32, "--height", 32]
    return [*map(str, options)]


def test_a_benchmark_keeps_its_expanded_prompts(stub, listed, tmp_path, capsys):
    """An endpoint that fails at the second prompt, then works: the first is not asked for again."""
    stub.answer = lambda prompt: (500, b"") if "snow" in prompt else f"{prompt}, first"
    main, options = main_of("benchmark"), [*listed, "--rewrite", stub.url, "--rewrite_model", "m"]
    assert main(options) == 2 and "status 500" in capsys.readouterr().err
    with open(tmp_path / "out/rewritten.jsonl", "a") as file:
        file.write('{"prompt": "a sno')  # a process was killed while it wrote
    stub.answer = lambda prompt: f"{prompt}, second"
    assert main(options) == 0
    assert [body["messages"][-1]["content"] for _, _, body in stub.requests] == ["a cat", "a snowman", "a snowman"]
    rows = [json.loads(line) for line in (tmp_path / "out/rewritten.jsonl").read_text().splitlines()]
    assert [row["rewritten"] for row in rows] == ["a cat, first", "a snowman, second"]
    text = Image.open(tmp_path / "out/samples/a snowman_000001.png").text  # named by the list, drawn from the other
    assert (text["prompt"], text["original_prompt"]) == ("a snowman, second", "a snowman")
    assert main([*options[:-1], "other"]) == 2 and "rewrite_model was m, is other" in capsys.readouterr().err


def test_an_endpoint_that_fails_at_once_leaves_no_folder(stub, listed, tmp_path, capsys):
    """The corrected command therefore starts, although the manifest would name the other address."""
    stub.answer = 503, b""
    wrong = stub.url.replace("/v1", "/wrong")
    assert main_of("benchmark")([*listed, "--rewrite", wrong, "--rewrite_model", "m"]) == 2
    assert "status 503" in capsys.readouterr().err and not (tmp_path / "out").exists()
    stub.answer = lambda prompt: f"{prompt}, expanded"
    assert main_of("benchmark")([*listed, "--rewrite", stub.url, "--rewrite_model", "m"]) == 0
    assert len(stub.requests) == 3  # the failed one, and one for each different prompt


@pytest.mark.parametrize("expanded", ["a snowman <|image|>", "snow " * 1500])
def test_an_expanded_prompt_that_cannot_be_drawn_is_not_kept(stub, listed, tmp_path, capsys, expanded):
    stub.answer = lambda prompt: expanded if "snow" in prompt else f"{prompt}, expanded"
    options = [*listed, "--rewrite", stub.url, "--rewrite_model", "m"]
    assert main_of("benchmark")(options) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --rewrite gives '") and "for 'a snowman', which cannot be drawn" in error
    stub.answer = lambda prompt: f"{prompt}, expanded"
    assert main_of("benchmark")(options) == 0


@pytest.mark.parametrize("command", ["generate", "benchmark"])
def test_a_scorer_gets_the_prompts_of_the_user(command, generate, listed, tmp_path, monkeypatch):
    module = types.ModuleType("both_of_mine")
    module.expand, module.seen = "{}, expanded".format, []
    module.score = lambda images, prompts: module.seen.append(prompts) or list(range(len(images)))
    monkeypatch.setitem(sys.modules, "both_of_mine", module)
    options = ("--best_of", "2", "--rewrite", "both_of_mine:expand", "--scorer", "both_of_mine:score")
    if command == "benchmark":
        assert main_of(command)([*listed, *options]) == 0
    else:
        assert generate("--prompt", "a cat", "--prompt", "a snowman", "--prompt", "a cat", *options) == 0
    assert module.seen[-3:] == [["a cat"] * 2, ["a snowman"] * 2, ["a cat"] * 2]
