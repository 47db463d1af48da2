"""Turns fields of the API into values of the library, and checks them against the limits."""

import base64
import binascii
import re
import secrets
from io import BytesIO

from PIL import Image

from lumina_mgpt.checks import excerpt
from lumina_mgpt.config import Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import open_image, picture_formats
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.faults import ApiError
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.schemas import ChatFields, ImageFields

_SIZE = re.compile(r"([1-9]\d{0,4})x([1-9]\d{0,4})")
_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,")
_LEAST_SIDE = 32  # pixels of an uploaded picture, as for --image_path
_SEEDS = 2**32  # a random seed is short enough to be typed


def check_model(engine: Engine, name: str | None) -> None:
    """Raises ApiError if a request names another model."""
    if name not in (None, engine.name):
        raise ApiError(f"model must be {engine.name}, got {excerpt(name)}", "model", 404, "model_not_found")


def check_length(text: str, limits: Limits, param: str) -> None:
    """Raises ApiError if a text is longer than the limit."""
    if len(text) > limits.prompt:
        rule = f"{param} must have at most {limits.prompt} characters, got {len(text)}; shorten it"
        raise ApiError(rule, param, code="too_long")


def check_count(count: int, limits: Limits, engine: Engine, param: str) -> None:
    """Raises ApiError if a request has more images than the limit, or than the queue can hold."""
    largest = min(limits.images, engine.queue_limit)
    if count > largest:
        raise ApiError(f"{param} must be at most {largest}, got {count}", param, code="invalid_value")


def size_of(text: str, limits: Limits) -> tuple[int, int] | None:
    """Returns width and height of a size such as 768x512; None for auto.

    Raises:
        ApiError: the text has another form, or the picture more pixels than the limit.
    """
    if text == "auto":
        return None
    found = _SIZE.fullmatch(text)
    if found is None:
        raise ApiError(f"size must be auto or WIDTHxHEIGHT, got {excerpt(text)}; try auto", "size")
    width, height = int(found[1]), int(found[2])
    if width * height > limits.pixels:
        raise ApiError(f"size must have at most {limits.pixels} pixels, got {text}; make it smaller", "size")
    return width, height


def seed_of(fields: ImageFields | ChatFields) -> int:
    """Returns the seed of a request, or a random one."""
    return secrets.randbelow(_SEEDS) if fields.seed is None else fields.seed


def speculation_of(fields: ImageFields | ChatFields) -> Speculation | None:
    """Returns the settings of speculative sampling; None without `speculative_jacobi`.

    Raises:
        InputError: a value is out of range, or has no effect.
    """
    given = {name: value for name in ("coupling", "window") if (value := getattr(fields, name)) is not None}
    if fields.speculative_jacobi:
        return Speculation(**given)
    for name, value in given.items():
        raise InputError(f"has no effect without speculative_jacobi, got {excerpt(value)}; set that to true", name)
    return None


def given_settings(fields: ImageFields | ChatFields, **names: str) -> dict[str, float]:
    """Returns those sampling settings that a request has.

    Args:
        names: field of the request -> field of `SamplingConfig`.
    """
    return {name: value for field, name in names.items() if (value := getattr(fields, field)) is not None}


def picture_of_url(url: str, limits: Limits, param: str) -> Image.Image:
    """Returns the picture of a data URL.

    Raises:
        ApiError: the URL is no data URL of a picture, or the picture cannot be read or is too large.
    """
    found = _DATA_URL.match(url)
    if found is None:
        rule = "must be a data URL such as data:image/png;base64,...; the server opens no other URL and no path"
        raise ApiError(f"{param} {rule}, got {excerpt(url[:60])}", param, code="invalid_image_url")
    try:
        content = base64.b64decode(url[found.end() :], validate=True)
    except binascii.Error:
        raise ApiError(
            f"{param} must be base64 after the comma; encode it again", param, code="invalid_base64"
        ) from None
    return picture_of(content, limits, param)


def picture_of(content: bytes, limits: Limits, param: str) -> Image.Image:
    """Returns the picture in the content of a file, upright and in RGB.

    Raises:
        ApiError: it cannot be read as a picture, or has more pixels than the limit.
    """
    try:
        _check_sides(content, limits, param)
        return open_image("the upload", BytesIO(content))
    except InputError as error:
        raise ApiError(f"{param}: {error}", param, code="invalid_image") from None


def _check_sides(content: bytes, limits: Limits, param: str) -> None:
    """Reads the header alone. What cannot be read is left to `open_image`, which says why."""
    try:
        with Image.open(BytesIO(content), formats=picture_formats()) as picture:
            width, height = picture.size
    except Exception:
        return
    if width * height > limits.pixels:
        rule = f"must have at most {limits.pixels} pixels, got {width}x{height}; shrink it"
        raise ApiError(f"{param} {rule}", param, code="image_too_large")
    if min(width, height) < _LEAST_SIDE:
        rule = f"must be at least {_LEAST_SIDE} pixels on each side, got {width}x{height}; give a larger one"
        raise ApiError(f"{param} {rule}", param, code="image_too_small")
