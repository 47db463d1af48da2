"""Records -> code grids: reads, crops and encodes the images of records in batches.

Before: records.py parses the records. Next: pre_tokenize.py builds ids and labels from codes and texts.
"""

from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from PIL import Image

from lumina_mgpt.data.inputs import Input
from lumina_mgpt.data.job import PreTokenizeConfig
from lumina_mgpt.data.records import Panels, Record
from lumina_mgpt.devices import batch_limit
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_image, stacked
from lumina_mgpt.unirep import GRID_UNIT
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

Size = tuple[int, int]  # width, height in pixels


class ImageCodes:
    """Encodes the images of records and keeps the codes. An image that several records share is encoded once.

    Args:
        tokenizer: encodes the images.
        config: sizes of images and batches, and whether to encode panels separately.
        source: the input that the records come from.
        records: all records that `encode` will be called with. They show how long to keep each image's codes.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, config: PreTokenizeConfig, source: Input, records: Iterable[Record]
    ) -> None:
        self.tokenizer, self.config, self.source = tokenizer, config, source
        self._sizes = candidate_sizes(config.target_size)
        self._codes: dict[Panels, tuple[torch.Tensor, Size] | InputError] = {}
        self._uses = Counter(part for record in records for part in self._parts(record))

    def encode(self, records: Iterable[Record]) -> None:
        """Encodes those images of `records` that are not encoded yet. All images of a batch have the same size.

        On a CUDA GPU, a batch has at most as many images as fit into 90 % of the free memory.
        """
        new = [part for record in records for part in self._parts(record) if part not in self._codes]
        waiting: dict[Size, list[tuple[Panels, Image.Image]]] = {}
        for part, image in self._read(list(dict.fromkeys(new))):
            if isinstance(image, InputError):
                self._codes[part] = image
                continue
            batch = waiting.setdefault(image.size, [])
            batch.append((part, image))
            if len(batch) >= self._batch_size(image.size):
                self._encode_batch(waiting.pop(image.size))
        for batch in waiting.values():
            self._encode_batch(batch)

    def of(self, image: Panels) -> tuple[torch.Tensor, Size]:
        """The codes of an encoded image, and the image's width and height after the crop, in pixels.

        Args:
            image: files of the image's panels.

        Shapes: codes (rows, cols).

        Raises:
            InputError: the image could not be read, or its panels differ in size.
        """
        found = []
        for part in self._split(image):
            item = self._codes[part]
            if isinstance(item, InputError):
                raise item
            found.append(item)
        _check_panels([size for _, size in found])
        codes = torch.cat([grid for grid, _ in found])
        return codes, (found[0][1][0], sum(height for _, (_, height) in found))

    def release(self, records: Iterable[Record]) -> None:
        """Marks `records` as done, and frees the codes that no remaining record uses."""
        for record in records:
            self._uses.subtract(self._parts(record))
        for part in [part for part in self._codes if not self._uses[part]]:
            del self._codes[part]

    def _batch_size(self, size: Size) -> int:
        """Returns the number of images of a size that are encoded at once."""
        device = self.tokenizer.device
        if device.type != "cuda":
            return self.config.batch_size
        fitting = batch_limit(device) // self.tokenizer.working_bytes(size[0] * size[1])
        return max(1, min(self.config.batch_size, fitting))

    def _split(self, image: Panels) -> list[Panels]:
        """The parts of an image that are encoded separately."""
        return [(panel,) for panel in image] if self.config.panels_apart else [image]

    def _parts(self, record: Record) -> list[Panels]:
        return list(dict.fromkeys(part for image in record.images for part in self._split(image)))

    def _read(self, parts: list[Panels]) -> Iterator[tuple[Panels, Image.Image | InputError]]:
        """Cropped images, or errors, in order. Threads read at most two batches ahead."""
        waiting: deque[tuple[Panels, Future]] = deque()
        with ThreadPoolExecutor(self.config.workers) as pool:
            for part in parts:
                waiting.append((part, pool.submit(self._read_one, part)))
                if len(waiting) > 2 * self.config.batch_size:
                    first, future = waiting.popleft()
                    yield first, future.result()
            yield from ((part, future.result()) for part, future in waiting)

    def _read_one(self, part: Panels) -> Image.Image | InputError:
        try:
            panels = [self._crop(open_image(path, self.source.open(path))) for path in part]
            _check_panels([panel.size for panel in panels])
            return stacked(panels)
        except InputError as error:
            return error

    def _crop(self, image: Image.Image) -> Image.Image:
        if self.config.keep_size and not (image.width % GRID_UNIT or image.height % GRID_UNIT):
            return image
        return center_crop(image, best_size(image.size, self._sizes))

    @torch.no_grad()
    def _encode_batch(self, batch: list[tuple[Panels, Image.Image]]) -> None:
        codes = self.tokenizer.encode([image for _, image in batch])  # (B, rows, cols)
        for (part, image), grid in zip(batch, codes, strict=True):
            self._codes[part] = grid, image.size


def _check_panels(sizes: list[Size]) -> None:
    """Raises InputError if the panels of an image differ in size."""
    if len(set(sizes)) > 1:
        shown = ", ".join(f"{width}x{height}" for width, height in sizes)
        raise InputError(f"panels of one picture must have one size after the crop, got {shown}")
