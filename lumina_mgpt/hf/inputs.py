"""Texts and pictures as users give them to the processor, in one form."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_utils import load_image

from lumina_mgpt.checks import excerpt
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause
from lumina_mgpt.prompts import PICTURE


def texts_of(text: str | Sequence[str] | None, images: Any) -> list[str]:
    if text is None and images is not None:
        text = ""
    texts = [text] if isinstance(text, str) else list(text) if isinstance(text, list | tuple) else []
    if not texts or not all(isinstance(one, str) for one in texts):
        raise InputError(f"must be a text or a list of texts, got {excerpt(text)}", "text")
    return texts


def shares(texts: Sequence[str], images: Any) -> Iterator[list[Any]]:
    """Yields the pictures of each text."""
    nested = isinstance(images, list | tuple) and any(isinstance(one, list | tuple) for one in images)
    if nested:
        if len(images) != len(texts):
            raise InputError(f"must be one list a text, {len(texts)}, got {len(images)}", "images")
        yield from ([picture_of(image) for image in row] for row in images)
        return
    pictures = [picture_of(image) for image in flat(images)]
    marks = [text.count(PICTURE) for text in texts]
    if not any(marks) and len(pictures) in (0, len(texts)):
        marks = [len(pictures) // len(texts)] * len(texts)
    elif len(texts) == 1 and not any(marks):
        marks = [len(pictures)]
    if sum(marks) != len(pictures):
        raise InputError(
            f"must be as many as the texts have marks {PICTURE}: {sum(marks)}, got {len(pictures)}", "images"
        )
    for count in marks:
        yield pictures[:count]
        pictures = pictures[count:]


def flat(images: Any) -> list[Any]:
    if images is None:
        return []
    if isinstance(images, list | tuple):
        return [one for image in images for one in flat(image)]
    return [images]


def picture_of(image: Any) -> Any:
    """Returns a picture, codes or path; loads URLs and base64 texts.

    Raises:
        InputError: an array is not a picture, or a URL or base64 text cannot be loaded.
    """
    if isinstance(image, np.ndarray):
        try:
            return Image.fromarray(image)
        except TypeError:  # another dtype or number of channels
            got = f"an array of {image.dtype} {image.shape}"
            raise InputError(f"must have arrays of uint8 (height, width, 3), got {got}", "images") from None
    if (
        isinstance(image, str)
        and not os.path.exists(image)
        and image.startswith(("http://", "https://", "data:image/"))
    ):
        try:
            return load_image(image)
        except Exception as error:  # of the HTTP library, which is not this project's choice, or of Pillow
            short = image if len(image) <= 60 else f"{image[:60]}..."
            raise InputError(f"{short} cannot be loaded ({cause(error)}); check it", "images") from None
    return Path(image) if isinstance(image, str) else image
