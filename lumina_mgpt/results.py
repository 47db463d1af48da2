"""What a pipeline returns and reports."""

from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from lumina_mgpt.prompts import PICTURE
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


@dataclass(frozen=True, eq=False)
class AnswerImage:
    """One image of an answer.

    Attributes:
        codes: codes of the complete rows, (rows so far, cols).
        layout: layout of the whole image.
        image: the picture at full size. Where rows are missing, it is grey.
        index: index of the image in its answer.
        whole: whether the image is complete. False: the answer ended inside it.
    """

    codes: Tensor
    layout: ImageLayout
    image: Image.Image
    index: int
    whole: bool = True


@dataclass(frozen=True)
class Answer:
    """What the model answered in one turn.

    Attributes:
        parts: texts and images in their order. A text is never empty.
        ids: generated and forced ids, the turn end included.
        reason: why the answer ended: "turn end", "length" (token limit or context), or "stopped" (by the caller).
    """

    parts: tuple[str | AnswerImage, ...]
    ids: list[int]
    reason: str = "turn end"

    @property
    def text(self) -> str:
        """All texts, with `<|image|>` in the place of each of `images`, an incomplete one included.

        Differs from the reference: the released decoder drops an incomplete image, and writes the names of control ids.
        """
        return "".join(part if isinstance(part, str) else PICTURE for part in self.parts)

    @property
    def images(self) -> list[AnswerImage]:
        """All images in their order. The last one may be incomplete."""
        return [part for part in self.parts if isinstance(part, AnswerImage)]


@dataclass(frozen=True)
class Text:
    """A piece of text: one or more whole characters."""

    text: str


@dataclass(frozen=True)
class ImageBegun:
    """An image begins, and its size is known.

    Attributes:
        index: index of the image in its answer.
    """

    layout: ImageLayout
    index: int


@dataclass(frozen=True, eq=False)
class RowDone:
    """The first rows of an image are final.

    Attributes:
        codes: codes of these rows, (rows so far, cols).
        layout: layout of the whole image.
    """

    codes: Tensor
    layout: ImageLayout


@dataclass(frozen=True)
class ImageDone:
    """An image is complete, or the answer ended inside it (`result.whole` is False)."""

    result: AnswerImage

    @property
    def codes(self) -> Tensor:
        """Codes of the complete rows, (rows so far, cols)."""
        return self.result.codes

    @property
    def image(self) -> Image.Image:
        """The picture. Where rows are missing, it is grey."""
        return self.result.image


@dataclass(frozen=True)
class End:
    """The last event of an answer. `reason` is that of `answer`."""

    answer: Answer

    @property
    def reason(self) -> str:
        """Why the answer ended: see `Answer.reason`."""
        return self.answer.reason


Event = Text | ImageBegun | RowDone | ImageDone | End
