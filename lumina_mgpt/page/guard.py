"""Middleware that refuses pictures by URL: Gradio would fetch them, and the server opens uploads alone."""

import json

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_PREFIX = "/gradio_api/"
_UPLOAD = "/gradio_api/upload"
_SCHEMES = ("http:", "https:", "//")


class UploadsOnly:
    """Refuses calls of the page whose arguments have a file with a remote path."""

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
        if _names_url(body):
            rule = "pictures must be uploads; this server opens no URL"
            await JSONResponse({"detail": rule}, 400)(scope, receive, send)
            return

        async def again() -> Message:
            return messages.pop(0) if messages else await receive()

        await self._app(scope, again, send)


def _names_url(body: bytes) -> bool:
    """Returns whether a JSON body has an object whose `path` is a URL."""
    try:
        pending = [json.loads(body or b"null")]
    except (ValueError, RecursionError):
        return False  # the page refuses it
    while pending:
        value = pending.pop()
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and path.strip().lower().startswith(_SCHEMES):
                return True
            pending += value.values()
        elif isinstance(value, list):
            pending += value
    return False
