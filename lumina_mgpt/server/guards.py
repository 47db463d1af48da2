"""Middleware that refuses requests before an endpoint sees them: without the API key, or with too long a body."""

import base64
import binascii
import hmac

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumina_mgpt.server.faults import ApiError


class KeyGuard:
    """Refuses requests without the key; `/health` needs none.

    The key is a bearer token, or the password of HTTP basic authentication, which a browser asks for.
    """

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app, self._key = app, key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope.get("path") == "/health" or self._allows(Headers(scope=scope)):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": "the API key is missing or wrong"})
        else:
            api = scope["path"].startswith("/v1/")
            rule = "the API key is missing or wrong; send the header Authorization: Bearer KEY"
            challenge = {"WWW-Authenticate": "Bearer" if api else 'Basic realm="lumina-mgpt"'}
            error = ApiError(rule, None, 401, "invalid_api_key", challenge)
            await error.response(scope, receive, send)

    def _allows(self, headers: Headers) -> bool:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except (binascii.Error, UnicodeDecodeError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self._key)


class BodyGuard:
    """Refuses bodies of more bytes than a limit, also those of unknown length."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        rule = f"the body must have at most {self._limit} bytes; send a smaller picture"
        refusal = ApiError(rule, None, 413, "body_too_large").response
        length = Headers(scope=scope).get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            await refusal(scope, receive, send)
            return
        received, refused, begun = 0, False, False

        async def counted() -> Message:
            nonlocal received, refused
            message = await receive()
            received += len(message.get("body", b""))
            if received <= self._limit:
                return message
            if not refused and not begun:
                refused = True
                await refusal(scope, receive, send)
            return {"type": "http.disconnect"}

        async def unless_refused(message: Message) -> None:
            nonlocal begun
            if not refused:
                begun = True
                await send(message)

        await self._app(scope, counted, unless_refused)
