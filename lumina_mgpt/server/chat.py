"""OpenAI's chat API: POST /v1/chat/completions, with texts and pictures in both directions."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image

from lumina_mgpt.results import Answer, AnswerImage, End, ImageDone, Text
from lumina_mgpt.server import values
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.faults import ApiError
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.pictures import data_url
from lumina_mgpt.server.schemas import ChatFields, Message, TextPart
from lumina_mgpt.server.streams import attended, event_stream, sse
from lumina_mgpt.server.tickets import Event as TicketEvent
from lumina_mgpt.server.tickets import Ticket

Part = str | Image.Image
_ROLES = {"user": "human", "assistant": "assistant"}


def routes(engine: Engine, limits: Limits) -> APIRouter:
    """Returns the endpoint."""
    router = APIRouter()

    @router.post("/v1/chat/completions")
    async def completions(request: Request, body: ChatFields) -> Response:
        """Answers a conversation in text and images."""
        turns, settings = await asyncio.to_thread(_arguments, engine, limits, body)
        ticket = engine.chat(turns, **settings)
        head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": engine.name}
        if body.stream:
            usage = body.stream_options is not None and body.stream_options.include_usage
            events = aiter(ticket)
            async with attended(request, ticket, end=False):
                first = await anext(events, None)  # an error in the conversation is an answer of its own
            return event_stream(_chunks(request, ticket, events, first, head, usage))
        answer: Answer | None = None
        async with attended(request, ticket):
            async for event in ticket:
                answer = event.answer if isinstance(event, End) else answer
        if answer is None:  # the client has left
            return JSONResponse({}, 499)
        message = await asyncio.to_thread(_message, answer)
        choice = {"index": 0, "message": message, "finish_reason": _finish(answer), "logprobs": None}
        whole = {"object": "chat.completion", "choices": [choice], "usage": _usage(ticket, answer)}
        return JSONResponse(head | whole)

    return router


def _arguments(
    engine: Engine, limits: Limits, fields: ChatFields
) -> tuple[list[tuple[str, list[Part]]], dict[str, Any]]:
    """Returns the turns and the settings of `Pipeline.chat`."""
    values.check_model(engine, fields.model)
    if not engine.pipeline.writes_text:
        rule = "this server's model writes no text, so that it cannot chat"
        raise ApiError(f"{rule}; serve a checkpoint that does, or start the server with --text", "model")
    texts = [text for message in fields.messages for text in _texts(message)]
    values.check_length("".join(texts), limits, "messages")
    values.check_count(sum(map(_pictures, fields.messages)), limits, engine, "messages")  # before any is opened
    turns = [
        (_ROLES[message.role], _parts(message, f"messages.{number}", limits))
        for number, message in enumerate(fields.messages)
    ]
    for number, (role, _) in enumerate(turns):
        if role != ("human", "assistant")[number % 2]:
            rule = "must be turns of user and assistant in alternation, the first of them the user's"
            raise ApiError(f"messages {rule}, got {fields.messages[number].role} at index {number}", "messages")
    if len(turns) % 2 == 0:
        raise ApiError("messages must end with a turn of the user; remove the answer", "messages")
    return turns, _settings(fields, limits)


def _settings(fields: ChatFields, limits: Limits) -> dict[str, Any]:
    names = dict(cfg="cfg", top_k="top_k", image_temperature="temperature", text_top_k="text_top_k")
    settings: dict[str, Any] = values.given_settings(fields, **names)
    if fields.temperature == 0:
        settings["text_top_k"] = 1
    elif fields.temperature is not None:
        settings["text_temperature"] = fields.temperature
    param = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
    limit = fields.max_completion_tokens or fields.max_tokens or limits.new_tokens
    if limit > limits.new_tokens:
        raise ApiError(f"{param} must be at most {limits.new_tokens}, got {limit}", param)
    kinds = set(fields.modalities or ("text", "image"))
    want = kinds.pop() if len(kinds) == 1 else "any"
    size = values.size_of(fields.size, limits)
    if size is not None and want != "image":
        raise ApiError(f'size must be auto unless modalities is ["image"], got {fields.size}', "size")
    return settings | {
        "seed": values.seed_of(fields),
        "max_new_tokens": limit,
        "want": want,
        "size": size,
        "speculation": values.speculation_of(fields),
    }


def _texts(message: Message) -> list[str]:
    content = message.content or ""
    return [content] if isinstance(content, str) else [part.text for part in content if isinstance(part, TextPart)]


def _pictures(message: Message) -> int:
    """Returns the number of pictures of a message."""
    content = message.content if isinstance(message.content, list) else []
    return len(message.images) + sum(not isinstance(part, TextPart) for part in content)


def _parts(message: Message, param: str, limits: Limits) -> list[Part]:
    """Returns a message as texts and pictures in their order.

    The texts of a user's turn get a space towards a picture, as in the instructions that the models are trained on.
    """
    if message.role == "user" and message.images:
        raise ApiError(
            f"{param}.images must be left out of a user's turn; put pictures into content", f"{param}.images"
        )
    if isinstance(message.content, list):
        parts: list[Part] = []
        for number, part in enumerate(message.content):
            if isinstance(part, TextPart):
                parts.append(part.text)
            else:
                place = f"{param}.content.{number}.image_url"
                parts.append(values.picture_of_url(part.image_url.url, limits, place))
        parts = [part for part in parts if part != ""]
        parts = _spaced(parts) if message.role == "user" else parts
    else:
        parts = _with_images(message, param, limits)
    if not parts:
        raise ApiError(f"{param}.content must not be empty; write a text or add a picture", f"{param}.content")
    return parts


def _with_images(message: Message, param: str, limits: Limits) -> list[Part]:
    """Returns the text of a message with each of its `images` at its offset."""
    text, parts, begin = message.content or "", list[Part](), 0
    assert isinstance(text, str)
    for number, image in enumerate(message.images):
        end = min(max(image.offset, begin), len(text))
        place = f"{param}.images.{number}.image_url"
        parts += [text[begin:end], values.picture_of_url(image.image_url.url, limits, place)]
        begin = end
    return [part for part in (*parts, text[begin:]) if part != ""]


def _spaced(parts: list[Part]) -> list[Part]:
    spaced: list[Part] = []
    for number, part in enumerate(parts):
        if isinstance(part, str):
            after = number + 1 < len(parts) and not isinstance(parts[number + 1], str) and not part[-1].isspace()
            before = number > 0 and not isinstance(parts[number - 1], str) and not part[0].isspace()
            part = f"{' ' * before}{part}{' ' * after}"
        spaced.append(part)
    return spaced


def _image(image: AnswerImage, offset: int) -> dict[str, object]:
    """Returns an image of an answer. `offset` is the number of characters of the text before it."""
    url = {"url": data_url(image.image)}
    return {"type": "image_url", "image_url": url, "index": image.index, "offset": offset}


def _message(answer: Answer) -> dict[str, object]:
    text, images = "", []
    for part in answer.parts:
        if isinstance(part, str):
            text += part
        elif part.whole:
            images.append(_image(part, len(text)))
    message: dict[str, object] = {"role": "assistant", "content": text}
    return message | ({"images": images} if images else {})


def _finish(answer: Answer) -> str:
    return "stop" if answer.reason == "turn end" else "length"


def _usage(ticket: Ticket, answer: Answer) -> dict[str, int]:
    prompt, count = ticket.prompt_length, len(answer.ids)
    return {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}


async def _chunks(
    request: Request,
    ticket: Ticket,
    events: AsyncIterator[TicketEvent],
    first: TicketEvent | None,
    head: dict[str, object],
    usage: bool,
) -> AsyncIterator[str]:
    """Yields the chunks of a streamed answer.

    Args:
        first: the first event; `events` has those after it.
        head: what all chunks share.
        usage: whether a last chunk has the numbers of ids.
    """

    def chunk(delta: dict[str, object], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": None}
        return sse(head | {"object": "chat.completion.chunk", "choices": [choice]})

    async def all_events() -> AsyncIterator[TicketEvent]:
        if first is not None:
            yield first
        async for event in events:
            yield event

    length = 0
    async with attended(request, ticket):
        yield chunk({"role": "assistant", "content": ""})
        async for event in all_events():
            if isinstance(event, Text):
                length += len(event.text)
                yield chunk({"content": event.text})
            elif isinstance(event, ImageDone) and event.result.whole:
                yield chunk({"images": [await asyncio.to_thread(_image, event.result, length)]})
            elif isinstance(event, End):
                yield chunk({}, _finish(event.answer))
                if usage:
                    last = {"object": "chat.completion.chunk", "choices": [], "usage": _usage(ticket, event.answer)}
                    yield sse(head | last)
        yield "data: [DONE]\n\n"
