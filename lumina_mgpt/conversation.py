"""A conversation with a loaded checkpoint: its ids, its code grids and its KV cache, which go on from turn to turn.

conversation = pipeline.conversation()
for event in conversation.say("Describe the image in detail.", pictures=["cat.png"], want="text"):
    if isinstance(event, Text):
        print(event.text, end="", flush=True)
for event in conversation.say("Remove the cup in the background."):
    ...
"""

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from lumina_mgpt.config import Speculation
from lumina_mgpt.panels import Panel
from lumina_mgpt.results import Answer, Event

WANTS = ("any", "text", "image", "images")
MAX_NEW_TOKENS = 8192


class AnswerStream(Iterator[Event]):
    """Iterator over the events of one answer, which samples as it goes.

    If the caller stops early, by `close`, by an exception or by Ctrl-C, `answer` holds what was sampled so far.
    """

    def __next__(self) -> Event:
        raise NotImplementedError

    def close(self) -> None:
        """Ends the answer here. Does nothing after its end."""

    @property
    def answer(self) -> Answer:
        """The answer so far. Its reason is "stopped" unless the answer is complete."""
        raise NotImplementedError


class Conversation:
    """A conversation. `Pipeline.conversation` makes one.

    Attributes:
        ids: ids of all complete turns, bos first.
    """

    ids: list[int]

    def say(
        self,
        text: str | Sequence["str | Panel"],
        pictures: Sequence[Panel] = (),
        *,
        want: str = "any",
        size: tuple[int, int] | None = None,
        views: int = 1,
        max_new_tokens: int = MAX_NEW_TOKENS,
        speculation: Speculation | None = None,
        **sampling: Any,
    ) -> AnswerStream:
        """Returns an iterator over the events of the model's answer to a turn of the human.

        Args:
            text: the turn's text. `<|image|>` in it stands for the next of `pictures`. Pictures without a mark come
                before the text, each followed by a space, as in the released code. Or the turn as a sequence of texts
                and pictures; then `pictures` is empty.
            pictures: pictures (PIL), paths, or codes (rows, cols). Pictures are cropped to the candidate size of
                `config.base_size` that fits best, and encoded once.
            want: what the answer is. "any": the model's choice. "text": no image. "image": one image, then the turn
                end. "images": `views` images in a row, then the turn end.
            size: width and height in pixels of forced images (`want` image and images); None lets the model choose.
            views: number of images for `want="images"`.
            max_new_tokens: largest number of ids of the answer.
            speculation: settings of speculative Jacobi sampling inside images; None for one code a forward.
            sampling: fields of `SamplingConfig`; the defaults are those of the checkpoint's family.

        Raises:
            InputError: an argument does not fit the checkpoint. The call itself raises it, before any sampling.
        """
        raise NotImplementedError


def turn_parts(text: str, pictures: Sequence[Panel | Tensor]) -> list["str | Panel"]:
    """Returns a turn as texts and pictures: see `Conversation.say`."""
    raise NotImplementedError
