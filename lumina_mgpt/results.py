"""What a pipeline returns and reports."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from lumina_mgpt.request import ImageJob
from lumina_mgpt.unirep import ImageLayout


@dataclass(frozen=True)
class Result:
    """One generated image.

    Attributes:
        job: the prompt and repeat of the image.
        codes: image codes (rows, cols).
        ids: ids from image start to image end.
        panels: number of equal panels, one above the other.
    """

    job: ImageJob
    seed: int
    image: Image.Image
    codes: Tensor
    ids: list[int]
    panels: int = 1

    @property
    def panel(self) -> Image.Image:
        """The lowest panel, which is the result of a task with several panels."""
        width, height = self.image.size
        return self.image.crop((0, height - height // self.panels, width, height))

    @property
    def panel_codes(self) -> Tensor:
        """Codes of the lowest panel, (rows / panels, cols). Another request can take them as its given panel."""
        return self.codes.chunk(self.panels)[-1]


@dataclass(frozen=True)
class RowsDone:
    """Progress of a batch of B images: their first rows are final.

    Attributes:
        jobs: the images of the batch.
        codes: codes of the final rows (B, rows so far, cols).
        layout: layout of every image.
    """

    jobs: tuple[ImageJob, ...]
    codes: Tensor
    layout: ImageLayout
