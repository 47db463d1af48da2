"""What the commands that let the model answer share: events of an answer as text, bars and files."""

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from tqdm import tqdm

from lumina_mgpt.cli.progress import bar_interval
from lumina_mgpt.console import printable
from lumina_mgpt.outputs import OutputFolder

if TYPE_CHECKING:
    from lumina_mgpt.conversation import AnswerStream
    from lumina_mgpt.results import Answer, AnswerImage, Event, RowDone
    from lumina_mgpt.unirep import ImageLayout


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


class AnswerWriter:
    """Shows an answer while it is sampled: prints its text, shows a bar for each image, and saves the images.

    Args:
        output: folder to save to.
        name: function that returns the file name of the next image.
        described: settings for the text of the saved images.

    Attributes:
        saved: file names of the images of the last answer.
    """

    def __init__(self, output: OutputFolder, name: Callable[[], str], described: Mapping[str, object]) -> None:
        self.output, self.name, self.described = output, name, described
        self.saved: list[str] = []
        self._bar: tqdm | None = None
        self._in_line = False  # whether the last printed line is not ended

    def show(self, stream: "AnswerStream") -> "Answer":
        """Shows an answer to its end and returns it.

        After Ctrl-C or an error, what came is shown: `stream.answer` has it. Then the exception goes on.
        """
        from lumina_mgpt.results import ImageBegun, ImageDone, RowDone, Text

        self.saved = []
        try:
            for event in stream:
                if isinstance(event, Text):
                    print(printable(event.text), end="", flush=True)
                    self._in_line = not event.text.endswith("\n")
                elif isinstance(event, ImageBegun):
                    self._begin(event.layout)
                elif isinstance(event, RowDone) and self._bar is not None:
                    self._bar.update(len(event.codes) * event.layout.cols - self._bar.n)
                elif isinstance(event, ImageDone):
                    self._save(event.result)
        finally:
            stream.close()
            answer = stream.answer
            for image in answer.images[len(self.saved) :]:  # the image that a stop broke off
                self._save(image)
            self._end_line()
        if answer.reason == "length":
            print("[the answer reached the largest number of ids and is not complete]")
        return answer

    def _begin(self, layout: "ImageLayout") -> None:
        self._end_line()
        self._bar = tqdm(
            total=layout.num_codes,
            unit=" codes",
            desc=f"image of {layout.size[0]}x{layout.size[1]}",
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
            mininterval=bar_interval(),
        )

    def _save(self, image: "AnswerImage") -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        self._end_line()
        name, (width, height) = self.name(), image.layout.size
        text = {"width": width, "height": height, "rows": len(image.codes)} | dict(self.described)
        path = self.output.save(name, image.image, text)
        self.saved.append(name)
        broken = "" if image.whole else f", broken off after {len(image.codes)} of {image.layout.rows} rows of codes"
        print(f"[{path}: {width}x{height}{broken}]", flush=True)

    def _end_line(self) -> None:
        if self._in_line:
            print(flush=True)
            self._in_line = False
