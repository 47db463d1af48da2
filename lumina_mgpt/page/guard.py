"""Middleware that refuses pictures that are not uploads.

Gradio would fetch a URL. In an app that it is mounted in, it would also open every path of the machine.
"""

import json
import os

from gradio.utils import get_upload_folder
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PREFIX = "/gradio_api/"
_UPLOAD = "/gradio_api/upload"


class UploadsOnly:
    """Refuses calls of the page whose arguments have a file outside the folder of uploads, or a URL."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        called = scope["type"] == "http" and scope["method"] == "POST" and path.startswith(_PREFIX)
        if not called or path.startswith(_UPLOAD):
            await self._app(scope, receive, send)
            return
        messages, more = list[Message](), True
        while more:
            messages.append(message := await receive())
            more = message.get("more_body", False)
        body = b"".join(message.get("body", b"") for message in messages)
        if _names_file(body):
            rule = "pictures must be uploads; this server opens no URL and no other file"
            await JSONResponse({"detail": rule}, 400)(scope, receive, send)
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def _names_file(body: bytes) -> bool:
    """Returns whether a JSON body has an object whose `path` is not that of an upload."""
    try:
        pending = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # the page refuses it
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if path is not None and not _uploaded(path):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False


def _uploaded(path: object) -> bool:
    """Returns whether a path, with its links followed, is in Gradio's folder of uploads. A URL is not."""
    if not isinstance(path, str) or "\0" in path:
        return False
    folder = os.path.realpath(get_upload_folder())
    return os.path.realpath(path).startswith(os.path.join(folder, ""))
