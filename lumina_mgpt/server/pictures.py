"""Pictures in answers: which part of an image a client gets, and its encoding."""

import base64
from io import BytesIO

from PIL import Image

from lumina_mgpt import __version__
from lumina_mgpt.outputs import png_text
from lumina_mgpt.request import GenerationRequest, ImageJob

_QUALITY = 95  # of JPEG and WebP


def returned(picture: Image.Image, request: GenerationRequest) -> Image.Image:
    """Returns the part of an image that answers a request: without given panels, or all of it."""
    task = request.task
    top = picture.height * task.given_panels // task.panels
    return picture.crop((0, top, picture.width, picture.height)) if top else picture


def encoded(picture: Image.Image, kind: str, text: dict[str, object] | None = None) -> str:
    """Returns a picture as the base64 text of a file.

    Args:
        kind: png, jpeg or webp.
        text: keys and values of PNG text chunks.
    """
    file = BytesIO()
    if kind == "png":
        picture.save(file, "PNG", pnginfo=png_text(text or {}))
    else:
        picture.save(file, kind.upper(), quality=_QUALITY)
    return base64.b64encode(file.getvalue()).decode()


def data_url(picture: Image.Image) -> str:
    """Returns a picture as a data URL."""
    return f"data:image/png;base64,{encoded(picture, 'png')}"


def settings_text(request: GenerationRequest, job: ImageJob) -> dict[str, object]:
    """Returns the settings that make an image again, for the text of its PNG file."""
    sampling = request.sampling
    text: dict[str, object] = {"prompt": job.prompt, "repeat": job.repeat}
    text |= {name: getattr(sampling, name) for name in ("cfg", "top_k", "temperature", "seed")}
    if request.speculation is not None:
        text |= {"coupling": request.speculation.coupling, "window": request.speculation.window}
    return text | {"software": f"lumina_mgpt {__version__}"}
