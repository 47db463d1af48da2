"""Limits of what a client may ask for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Limits of one request. All are checked before anything is sampled.

    Args:
        body: bytes of a request.
        pixels: pixels of an uploaded or requested picture.
        images: images of a request (`n`), and pictures of a conversation.
        prompt: characters of a prompt, or of all texts of a conversation.
        new_tokens: ids of an answer.
    """

    body: int = 20 * 2**20
    pixels: int = 4096 * 4096
    images: int = 10
    prompt: int = 8000
    new_tokens: int = 8192
