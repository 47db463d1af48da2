"""What the commands that let the model answer share: images and progress from the events of an answer."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

from tqdm import tqdm

if TYPE_CHECKING:
    from lumina_mgpt.results import AnswerImage, Event, RowDone


def images_of(
    events: "Iterable[Event]", bar: tqdm, on_row: "Callable[[RowDone], None] | None" = None
) -> "Iterator[AnswerImage]":
    """Yields the images of an answer as they are finished. Its text is left out.

    Args:
        bar: bar that counts codes.
        on_row: called with the event each time rows of an image are final.
    """
    from lumina_mgpt.results import ImageBegun, ImageDone, RowDone

    rows = 0
    for event in events:
        if isinstance(event, ImageBegun):
            rows = 0
        elif isinstance(event, RowDone):
            bar.update((len(event.codes) - rows) * event.layout.cols)
            rows = len(event.codes)
            if on_row is not None:
                on_row(event)
        elif isinstance(event, ImageDone):
            yield event.result
