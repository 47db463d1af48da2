"""Errors in OpenAI's form: {"error": {"message", "type", "param", "code"}}. No answer contains a traceback."""

import logging
import re

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lumina_mgpt.checks import excerpt
from lumina_mgpt.errors import InputError
from lumina_mgpt.server.tickets import Busy, Closing

logger = logging.getLogger(__name__)

# Parameter of the library -> field of the API, where the names differ.
FIELDS = {
    "prompts": "prompt",
    "width": "size",
    "height": "size",
    "panel": "image",
    "pictures": "messages",
    "turns": "messages",
    "want": "modalities",
    "max_new_tokens": "max_completion_tokens",
}
_FIRST = "(number 0)"  # which of several prompts or pictures; the API has one
_RETRY_AFTER = 5  # seconds after which another process may have taken over


class ApiError(Exception):
    """An error that an endpoint answers.

    Args:
        message: one line with the rule, the value and a remedy.
        param: name of the field at fault.
        status: HTTP status.
        code: short name of the error for programs.
        headers: further headers of the answer.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code, self.headers = message, param, status, code, headers

    @property
    def body(self) -> dict[str, object]:
        """The answer in OpenAI's form."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status)
        kind = kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> JSONResponse:
        """The answer with its status and headers."""
        return JSONResponse(self.body, self.status, self.headers)


def api_error(error: Exception) -> ApiError:
    """Returns what a client may know about an exception. Logs those that are bugs."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        param = FIELDS.get(error.parameter or "", error.parameter)
        message = error.message.removeprefix(_FIRST)
        between = " " if message == error.message else ""  # of "prompt: the text must ..."
        return ApiError(f"{param}{between}{message}" if param else message, param, code="invalid_value")
    if isinstance(error, RequestValidationError):
        return invalid(error.errors()[0])
    if isinstance(error, Busy):
        return ApiError(str(error), None, 429, "queue_full", {"Retry-After": str(error.retry_after)})
    if isinstance(error, Closing):
        return ApiError(str(error), None, 503, "shutting_down", {"Retry-After": str(_RETRY_AFTER)})
    if isinstance(error, HTTPException):
        return ApiError(str(error.detail), None, error.status_code, headers=dict(error.headers or {}))
    if isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", str(error)):
        return ApiError("the server is out of memory; ask for a smaller image, or later", None, 503, "out_of_memory")
    logger.error("an internal error", exc_info=error)
    return ApiError("the server failed because of a bug; its log has the details", None, 500, "internal_error")


def invalid(fault: dict) -> ApiError:
    """Returns the error for one fault that pydantic found.

    Args:
        fault: an entry of `ValidationError.errors()`.
    """
    place = [str(part) for part in fault["loc"] if part != "body"]
    param = ".".join(place) or None
    kind, message = fault["type"], fault["msg"]
    if kind == "extra_forbidden":
        rule = "is no field of this request; remove it, or correct its spelling"
    elif kind == "missing":
        rule = "is missing; add it"
    elif kind == "json_invalid":
        return ApiError("the body is not JSON; send a JSON object", code="invalid_json")
    else:
        message = message.removeprefix("Value error, ").replace("Input should", "must", 1)
        rule = f"{message}, got {excerpt(fault.get('input'))}"
    return ApiError(f"{param or 'the body'} {rule}", param, code="invalid_value")


def add_handlers(app: FastAPI) -> None:
    """Makes the app answer every exception in OpenAI's form."""

    async def answer(_: Request, error: Exception) -> JSONResponse:
        return api_error(error).response

    for kind in (ApiError, InputError, RequestValidationError, Busy, Closing, HTTPException, Exception):
        app.add_exception_handler(kind, answer)
