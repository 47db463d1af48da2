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
        """Codes of the lowest panel, (rows / panels, cols). They can be the given panel of the next request."""
        return self.codes.chunk(self.panels)[-1]


@dataclass(frozen=True)
class RowsDone:
    """The first rows of a batch are final: codes (B, rows so far, cols)."""

    jobs: tuple[ImageJob, ...]
    codes: Tensor
    layout: ImageLayout
