"""Expands short prompts before generation, by a language model behind an HTTP endpoint or by a user's function.

Images of long, detailed prompts follow their text better, as the model is trained on such captions. Lumina-mGPT 2.0
(arXiv 2507.17801) has a language model rewrite the prompts; it does not publish the words of that request. Those below
are this project's own.
"""

import json
import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http.client import HTTPException
from urllib.parse import urlsplit

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause
from lumina_mgpt.user_functions import call, load_function

Rewriter = Callable[[str], str]

KEY_VARIABLE = "OPENAI_API_KEY"
TIMEOUT = 120.0  # seconds for one prompt; a local model on a CPU takes this long
SYSTEM_PROMPT = """\
You expand short image descriptions for a text-to-image model that is trained on long, detailed captions.
Write one paragraph of 60 to 120 words in English that describes the picture.
Keep every object, number, color, position, relation and quoted text of the description exactly as it is given.
Add only what fits it: how things look, the surroundings, light, viewpoint and style.
Do not add further main objects, and do not contradict the description.
If the description is detailed already, repeat it with few changes.
Answer with the paragraph alone."""
_LARGEST_ANSWER = 1 << 20  # bytes
_LONGEST_PROMPT = 8000  # characters; the model's context is checked with the tokenizer
# Reasoning models show their thoughts before the answer. Some servers leave out the first name.
_THOUGHTS = re.compile(r"^.*?</think>", re.DOTALL)


def make_rewriter(source: str, model: str | None = None, timeout: float = TIMEOUT) -> Rewriter:
    """Returns a function that expands a prompt.

    Args:
        source: address of an OpenAI-compatible endpoint, such as http://localhost:8000/v1, or `module:function` for a
            function from a prompt to a prompt.
        model: name of the endpoint's model.
        timeout: seconds that one answer of the endpoint may take.

    Raises:
        InputError: `source` is neither of both, `model` is missing or has no effect, or the function cannot be loaded.
            The returned function raises it when a prompt cannot be expanded.
    """
    if not re.match(r"\w+://", source):
        if model is not None:
            raise InputError(f"{model} has no effect on the function {source}; leave it out", "rewrite_model")
        function = load_function(source, "rewrite")
        return lambda prompt: _checked(call(function, source, "rewrite", prompt), source)
    try:
        parts = urlsplit(source)
        known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        known = False
    if not known or not source.isascii() or re.search(r"[\s\x00-\x1f]", source):
        raise InputError(f"must be an http or https address or module:function, got {source!r}; correct it", "rewrite")
    if "@" in parts.netloc or parts.fragment:
        rule = f"must hold no user, password or fragment, got an address of {parts.hostname} with one"
        raise InputError(f"{rule}; give the key in the variable {KEY_VARIABLE}", "rewrite")
    if not model:
        raise InputError(f"{source} needs the name of its model; give rewrite_model=NAME", "rewrite")
    return lambda prompt: _asked(source, model, prompt, timeout)


def _asked(url: str, model: str, prompt: str, timeout: float) -> str:
    """Returns what an endpoint answers to a prompt."""
    parts = urlsplit(url)
    path = parts.path.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
    target = parts._replace(path=path).geturl()
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": prompt}]
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get(KEY_VARIABLE, "").strip():
        if not key.isascii() or not key.isprintable():  # the message of urllib would show the key
            raise InputError(f"{KEY_VARIABLE} must be ASCII without line ends; correct the variable")
        headers["Authorization"] = f"Bearer {key}"
    body = json.dumps({"model": model, "messages": messages}).encode()
    try:
        answer = _posted(urllib.request.Request(target, body, headers, method="POST"), timeout)
    except urllib.error.HTTPError as error:
        with error:
            detail = f" ({text})" if (text := _excerpt(error)) else ""
        raise _failed(target, f"answers with status {error.code}{detail}") from None
    except TimeoutError:
        raise _failed(target, f"gives no answer within {timeout:g} seconds") from None
    except (urllib.error.URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            raise _failed(target, f"gives no answer within {timeout:g} seconds") from None
        text = cause(reason) if isinstance(reason, BaseException) else str(reason)
        raise _failed(target, f"cannot be reached ({text})") from None
    return _checked(_content(answer, target), target)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirects: a followed one would send the key to another host."""

    def redirect_request(self, *_: object) -> None:
        return None


def _posted(request: urllib.request.Request, timeout: float) -> bytes:
    """Returns the body of the answer. The limit of time holds for the whole answer, not for a part of it."""
    end = time.monotonic() + timeout
    data = bytearray()
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=timeout) as response:
        while part := response.read1(1 << 16):
            data += part
            if len(data) > _LARGEST_ANSWER:
                raise ValueError(f"the answer has more than {_LARGEST_ANSWER} bytes")
            if time.monotonic() > end:
                raise TimeoutError
    return bytes(data)


def _content(answer: bytes, target: str) -> object:
    """Returns the text in an answer of the chat completions API."""
    try:
        value = json.loads(answer)
        return value["choices"][0]["message"]["content"]
    except (ValueError, RecursionError, LookupError, TypeError):
        raise _failed(target, "answers with something else than a chat completion") from None


def _checked(text: object, source: str) -> str:
    """Returns an expanded prompt as one line, without thoughts of the model and without quotation marks around it."""
    if not isinstance(text, str):
        raise _failed(source, f"must return a text, got a {type(text).__name__}")
    line = " ".join(_THOUGHTS.sub("", text).split())
    if line.startswith("<think>"):
        raise _failed(source, "returns thoughts without an answer")
    if len(line) > 1 and line[0] + line[-1] in ('""', "“”") and line.count('"') in (0, 2):
        line = line[1:-1].strip()
    if not line:
        raise _failed(source, "returns an empty prompt")
    if len(line) > _LONGEST_PROMPT:
        raise _failed(source, f"returns a prompt of {len(line)} characters, of at most {_LONGEST_PROMPT}")
    return line


def _excerpt(error: urllib.error.HTTPError) -> str:
    """Returns the beginning of the text that comes with an error status."""
    try:
        return " ".join(error.read(500).decode("utf-8", "replace").split())[:120]
    except (OSError, HTTPException):
        return ""


def _failed(source: str, what: str) -> InputError:
    return InputError(f"{source} {what}; correct it, or leave rewriting out", "rewrite")


def rewritten(prompts: Sequence[str], rewriter: Rewriter) -> list[str]:
    """Returns the expanded prompts, in the same order. Equal prompts are expanded once.

    Raises:
        InputError: a prompt cannot be expanded.
    """
    known = {prompt: rewriter(prompt) for prompt in dict.fromkeys(prompts)}
    return [known[prompt] for prompt in prompts]
