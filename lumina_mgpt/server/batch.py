"""One batch of images of several requests: which images may share it, and how it runs."""

import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.request import ImageJob
from lumina_mgpt.results import Result
from lumina_mgpt.server.tickets import Progress, Ticket
from lumina_mgpt.unirep import ImageLayout


class AllLeft(Exception):
    """Ends a batch whose images are all cancelled."""


class Order:
    """A request for images, with its pictures encoded when its first image is sampled.

    Attributes:
        left: number of images that are not finished.
        arrived: time of arrival, as `time.monotonic` gives it.

    Args:
        previews: number of previews of each image.
    """

    def __init__(self, prepared: PreparedRequest, ticket: Ticket, previews: int) -> None:
        self.prepared, self.ticket = prepared, ticket
        self.left = len(prepared.request.jobs)
        self.arrived = time.monotonic()
        self._encoded: tuple[PreparedRequest, Tensor] | None = None
        self.shown = preview_rows(prepared.layout, previews)

    def encoded(self, pipeline: Pipeline) -> tuple[PreparedRequest, Tensor]:
        """Returns what `Pipeline.encode` returns; the pictures are encoded once."""
        if self._encoded is None:
            self._encoded = pipeline.encode(self.prepared)
        return self._encoded


@dataclass(frozen=True)
class Work:
    """One image that waits, or is sampled.

    Attributes:
        image: index of the image in its request.
    """

    order: Order
    job: ImageJob
    image: int

    @property
    def ticket(self) -> Ticket:
        return self.order.ticket

    @property
    def key(self) -> Hashable:
        """Images with equal keys can share a batch."""
        request, layout = self.order.prepared.request, self.order.prepared.layout
        shape = layout.rows, layout.cols, layout.given, layout.panels
        return shape, batch_settings(request.sampling), request.speculation


def batch_settings(sampling: SamplingConfig) -> SamplingConfig:
    """Returns the settings that all images of a batch share: all but the seed and those of text."""
    default = SamplingConfig()
    return replace(
        sampling, seed=default.seed, text_top_k=default.text_top_k, text_temperature=default.text_temperature
    )


def preview_rows(layout: ImageLayout, previews: int) -> frozenset[int]:
    """Returns after which numbers of rows a preview is due: evenly spaced in the rows that are sampled."""
    given = layout.given // layout.cols
    sampled = layout.rows - given
    return frozenset(given + round(sampled * part / (previews + 1)) for part in range(1, previews + 1)) - {given}


@dataclass
class Batch:
    """Images that are sampled together.

    Attributes:
        works: the images. Those whose ticket ends leave at the next step.
    """

    pipeline: Pipeline
    works: list[Work]

    def run(self, on_result: Callable[[Work, Result], None]) -> None:
        """Samples the images and decodes one after another. Calls `on_result` with each that was not cancelled.

        Raises:
            InputError: pictures cannot be encoded, or the model gives logits that are not numbers.
        """
        first = self.works[0].order.prepared
        encoded = [work.order.encoded(self.pipeline) for work in self.works]
        prompts = [work.job.prompt_index for work in self.works]
        given = [codes[prompt] for (_, codes), prompt in zip(encoded, prompts, strict=True)]
        try:
            codes = self.pipeline.sample(
                [prepared.starts[prompt] for (prepared, _), prompt in zip(encoded, prompts, strict=True)],
                first.layout,
                batch_settings(first.request.sampling),
                [work.job.repeat for work in self.works],
                given=torch.stack(given),
                on_row=self._on_row,
                speculation=first.request.speculation,
                keys=[(work.order.prepared.request.sampling.seed, work.job.repeat) for work in self.works],
                kept=self._kept,
            )
        except AllLeft:
            return
        for work, grid in zip(self.works, codes, strict=True):
            if not work.ticket.ended:
                seed = work.order.prepared.request.sampling.seed
                on_result(work, self.pipeline.result(work.job, seed, grid, first.layout))

    def _kept(self) -> list[int] | None:
        """Says which images go on. A compiled model keeps its shape until all images have left."""
        places = [place for place, work in enumerate(self.works) if not work.ticket.ended]
        if len(places) == len(self.works):
            return None
        if not places:
            raise AllLeft
        if self.pipeline.compiled:
            return None
        self.works = [self.works[place] for place in places]
        return places

    def _on_row(self, row: int, codes: Tensor) -> None:
        """Reports progress, with a picture where a preview is due. Shapes: codes (B, row + 1, cols)."""
        layout = self.works[0].order.prepared.layout
        for work, grid in zip(self.works, codes, strict=True):
            if work.ticket.ended:
                continue
            due = row + 1 in work.order.shown
            picture = self.pipeline.preview(grid[None], layout)[0] if due else None
            work.ticket.post(Progress(work.image, row + 1, layout.rows, picture))
