"""What a request to the pipeline is made of, and what comes of it."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from lumina_mgpt.unirep import ImageLayout


@dataclass(frozen=True)
class Job:
    """One image to make: `prompt_index` counts the prompts, `repeat` the images of one prompt, both from 0."""

    prompt: str
    prompt_index: int
    repeat: int


@dataclass(frozen=True)
class Result:
    """One image, its codes (rows, cols), its ids from image start to image end, and the number of its panels."""

    job: Job
    seed: int
    image: Image.Image
    codes: Tensor
    ids: list[int]
    panels: int = 1

    @property
    def panel(self) -> Image.Image:
        """The lowest panel alone: what was asked for, where the image has several."""
        width, height = self.image.size
        return self.image.crop((0, height - height // self.panels, width, height))

    @property
    def panel_codes(self) -> Tensor:
        """Its codes (rows / panels, cols), which may be given to the next request as they are."""
        return self.codes.chunk(self.panels)[-1]


@dataclass(frozen=True)
class RowsDone:
    """What `on_row` is told: the first rows of a batch, codes (B, rows so far, cols), are final."""

    jobs: tuple[Job, ...]
    codes: Tensor
    layout: ImageLayout
