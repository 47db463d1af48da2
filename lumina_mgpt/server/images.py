"""OpenAI's image API: POST /v1/images/generations and /v1/images/edits."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from lumina_mgpt.checks import excerpt
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.prompts import Task
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.server import values
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.faults import ApiError, invalid
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.pictures import encoded, returned, settings_text
from lumina_mgpt.server.schemas import EditFields, GenerationFields, ImageFields
from lumina_mgpt.server.streams import attended, event_stream, sse
from lumina_mgpt.server.tickets import Finished, Progress, Ticket

_MOST_FIELDS = 50  # of a form


def routes(engine: Engine, limits: Limits) -> APIRouter:
    """Returns the two endpoints."""
    router = APIRouter()

    @router.post("/v1/images/generations")
    async def generations(request: Request, body: GenerationFields) -> Response:
        """Generates images from a prompt."""
        return await _answer(engine, limits, request, body, "image_generation")

    @router.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        """Edits an uploaded picture, or does another task that takes a picture. The body is a form."""
        async with request.form(max_files=2, max_fields=_MOST_FIELDS, max_part_size=limits.body) as form:
            fields: dict[str, str] = {}
            picture: bytes | str | None = None
            for name, value in form.multi_items():
                param = name.removesuffix("[]")
                if param in fields or (param == "image" and picture is not None):
                    raise ApiError(f"{param} must be given once; this model takes one picture", param)
                if param == "image":
                    picture = await value.read() if isinstance(value, UploadFile) else value
                elif isinstance(value, UploadFile):
                    raise ApiError(f"{param} must be text, got an upload; the only upload is image", param)
                else:
                    fields[param] = value
        if picture is None:
            raise ApiError("image is missing; upload the picture to edit", "image")
        try:
            body = EditFields.model_validate(fields, strict=False)  # a form has texts alone
        except ValidationError as error:
            raise invalid(dict(error.errors()[0])) from None
        opened = values.picture_of_url if isinstance(picture, str) else values.picture_of
        given = await asyncio.to_thread(opened, picture, limits, "image")  # type: ignore[arg-type]
        return await _answer(engine, limits, request, body, "image_edit", given)

    return router


def request_of(
    engine: Engine, limits: Limits, fields: GenerationFields | EditFields, picture: Image.Image | None = None
) -> PreparedRequest:
    """Returns the request that the fields describe, checked against the limits and the checkpoint.

    Args:
        picture: the uploaded picture.

    Raises:
        ApiError, InputError: a field is wrong.
    """
    values.check_model(engine, fields.model)
    values.check_length(fields.prompt, limits, "prompt")
    values.check_count(fields.n, limits, engine, "n")
    task = _task(engine, fields.task, picture is not None)
    if not fields.prompt.strip() and not task.wordless:
        raise ApiError("prompt must not be empty; say what the picture shows", "prompt")
    width, height = values.size_of(fields.size, limits) or (None, None)
    if height is not None and task.given_panels:
        height = height * task.panels // (task.panels - task.given_panels)  # `size` is that of the returned picture
    names = dict(cfg="cfg", top_k="top_k", temperature="temperature")
    settings: dict[str, Any] = values.given_settings(fields, **names)
    request = GenerationRequest(
        [fields.prompt],
        width,
        height,
        n=fields.n,
        sampling=SamplingConfig(seed=values.seed_of(fields), **settings),
        unset=[name for name in names if name not in settings],
        speculation=values.speculation_of(fields),
        task=task,
        panels=[picture] if picture is not None else (),
    )
    return engine.checkpoint.prepare(request)


def _task(engine: Engine, name: str, given: bool) -> Task:
    family = engine.checkpoint.config.family
    known = family.i2i_tasks if given else {key: task for key, task in family.tasks.items() if task.views == 1}
    if name not in known:
        raise ApiError(f"task must be one of {', '.join(known)}, got {excerpt(name)}", "task")
    return known[name]


async def _answer(
    engine: Engine,
    limits: Limits,
    request: Request,
    fields: GenerationFields | EditFields,
    kind: str,
    picture: Image.Image | None = None,
) -> Response:
    """Answers either endpoint.

    Args:
        kind: first part of the names of events.
        picture: the uploaded picture.
    """
    prepared = await asyncio.to_thread(request_of, engine, limits, fields, picture)
    ticket = engine.submit(prepared, fields.partial_images if fields.stream else 0)
    made = _Made(prepared, fields)
    if fields.stream:
        return event_stream(_events(request, ticket, made, kind))
    data: dict[int, dict[str, object]] = {}
    async with attended(request, ticket):
        async for event in ticket:
            if isinstance(event, Finished):
                data[event.image] = await asyncio.to_thread(made.image, event)
    whole = made.common | {"data": [data[image] for image in sorted(data)], "usage": made.usage(fields.n)}
    return JSONResponse(whole)


async def _events(request: Request, ticket: Ticket, made: "_Made", kind: str) -> AsyncIterator[str]:
    """Yields the events of a streamed answer."""
    partial: dict[int, int] = {}
    async with attended(request, ticket):
        async for event in ticket:
            if isinstance(event, Finished):
                name = f"{kind}.completed"
                data = await asyncio.to_thread(made.image, event)
                data |= {"image_index": event.image, "usage": made.usage(1)}
            elif isinstance(event, Progress) and event.picture is not None:
                name = f"{kind}.partial_image"
                index = partial[event.image] = partial.get(event.image, -1) + 1
                data = {"b64_json": await asyncio.to_thread(made.partial, event.picture)}
                data |= {"image_index": event.image, "partial_image_index": index}
            else:
                continue
            common = {name: value for name, value in made.common.items() if name != "created"}
            yield sse({"type": name, "created_at": int(time.time())} | common | data, name)


class _Made:
    """Makes the parts of an answer.

    Attributes:
        common: what all images of the answer share.
    """

    def __init__(self, prepared: PreparedRequest, fields: ImageFields) -> None:
        self._prepared, self._kind = prepared, fields.output_format
        width, height = prepared.layout.size
        task = prepared.request.task
        self.common: dict[str, object] = {
            "created": int(time.time()),
            "size": f"{width}x{height * (task.panels - task.given_panels) // task.panels}",
            "output_format": fields.output_format,
            "quality": fields.quality,
            "background": "opaque",
        }

    def image(self, event: Finished) -> dict[str, object]:
        """Returns the encoded image, with the seed and the repeat that make it again."""
        request, result = self._prepared.request, event.result
        text = settings_text(request, result.job)
        content = encoded(returned(result.image, request), self._kind, text)
        return {"b64_json": content, "seed": result.seed, "repeat": result.job.repeat}

    def partial(self, picture: Image.Image) -> str:
        """Returns an encoded preview."""
        return encoded(returned(picture, self._prepared.request), self._kind)

    def usage(self, images: int) -> dict[str, object]:
        """Returns the numbers of ids of the prompt and of the images."""
        start, image = len(self._prepared.starts[0]), images * self._prepared.layout.length
        return {"input_tokens": start, "output_tokens": image, "total_tokens": start + image}
