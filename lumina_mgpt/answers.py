"""Reads the ids of an answer: as events while they come, and as texts and images when they are complete."""

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.results import Answer, AnswerImage, Event, ImageBegun, ImageDone, RowDone, Text
from lumina_mgpt.unirep import HEADER, ImageLayout
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

_UNKNOWN = (128, 128, 128)  # color where no codes are sampled yet


class Painter(Protocol):
    """What reading needs of a `Pipeline`."""

    checkpoint: Checkpoint
    image_tokenizer: ImageTokenizer

    def preview(self, codes: Tensor, layout: ImageLayout) -> list[Image.Image]: ...


class AnswerReader:
    """Turns the ids of one answer into events.

    Attributes:
        parts: texts and images so far, in their order.

    Args:
        painter: decodes images.
        images: images that were decoded before, by (index, number of rows). New ones are added.
    """

    def __init__(self, painter: Painter, images: dict[tuple[int, int], AnswerImage] | None = None) -> None:
        self.parts: list[str | AnswerImage] = []
        self.images = {} if images is None else images
        self._painter, self._vocabulary = painter, painter.checkpoint.vocabulary
        self._stream = self._vocabulary.text_stream()
        self._image: list[int] = []  # ids of an image that has begun
        self._count = 0  # number of images that have begun
        self._layout: ImageLayout | None = None

    def feed(self, ids: Sequence[int]) -> Iterator[Event]:
        """Yields the events of the next ids."""
        for id_ in ids:
            if self._image:
                self._image.append(id_)
                yield from self._image_events(id_)
            elif id_ == self._vocabulary.image_start_id:
                yield from self._text(self._stream.end())
                self._image, self._layout = [id_], None
            elif id_ != self._vocabulary.turn_end_id:
                yield from self._text(self._stream.feed(id_))

    def end(self) -> Iterator[Event]:
        """Yields the events of the answer's end: what is left of a text, or an incomplete image."""
        yield from self._text(self._stream.end())
        if self._layout is not None:
            yield self._done(self._layout, whole=False)

    def _text(self, text: str) -> Iterator[Event]:
        if not text:
            return
        if self.parts and isinstance(self.parts[-1], str):
            self.parts[-1] += text
        else:
            self.parts.append(text)
        yield Text(text)

    def _image_events(self, id_: int) -> Iterator[Event]:
        vocabulary = self._vocabulary
        if len(self._image) == HEADER:
            self._layout = ImageLayout(vocabulary, *(vocabulary.grid_size(size) for size in self._image[1:]))
            self._count += 1
            yield ImageBegun(self._layout, self._count - 1)
        elif self._layout is not None and id_ == vocabulary.row_end_id:
            yield RowDone(self._codes(self._layout), self._layout)
        elif self._layout is not None and id_ == vocabulary.image_end_id:
            yield self._done(self._layout, whole=True)
            self._image, self._layout, self._stream = [], None, vocabulary.text_stream()

    def _codes(self, layout: ImageLayout) -> Tensor:
        """Codes of the complete rows so far, (rows so far, cols)."""
        ids = torch.tensor(self._image[HEADER:], dtype=torch.long)
        codes = self._vocabulary.id_to_code(ids[self._vocabulary.is_code(ids)])
        return codes[: len(codes) // layout.cols * layout.cols].view(-1, layout.cols)

    def _done(self, layout: ImageLayout, whole: bool) -> ImageDone:
        codes, index = self._codes(layout), self._count - 1
        found = self.images.get((index, len(codes)))
        if found is None or found.whole != whole:
            if whole:
                parts = self._painter.checkpoint.config.parts(layout.panels)
                picture = self._painter.image_tokenizer.decode(codes[None], parts)[0]
            else:
                picture = self._painter.preview(codes[None], layout)[0]
            found = self.images[index, len(codes)] = AnswerImage(codes, layout, picture, index, whole)
        self.parts.append(found)
        return ImageDone(found)


def read_answer(
    ids: Sequence[int], reason: str, painter: Painter, images: dict[tuple[int, int], AnswerImage] | None = None
) -> Answer:
    """Returns the answer with these ids, as far as they go.

    Args:
        reason: `Answer.reason`.
        images: as for `AnswerReader`.
    """
    reader = AnswerReader(painter, images)
    for _ in reader.feed(ids):
        pass
    for _ in reader.end():
        pass
    return Answer(tuple(reader.parts), list(ids), reason)


def unfinished(codes: Tensor, layout: ImageLayout, image_tokenizer: ImageTokenizer, parts: int) -> list[Image.Image]:
    """Returns pictures of unfinished images, at full size; rows without codes are grey.

    Args:
        parts: number of parts of an image that are decoded separately: `config.parts(layout.panels)`.

    Shapes: codes (B, rows so far, cols).
    """
    pictures, part_rows = [], layout.rows // parts
    for grid in codes:
        picture = Image.new("RGB", layout.size, _UNKNOWN)
        for part, rows in enumerate(grid.split(part_rows) if len(grid) else ()):
            picture.paste(image_tokenizer.decode(rows[None])[0], (0, part * part_rows * layout.vocabulary.cell))
        pictures.append(picture)
    return pictures
