"""Opens a checkpoint's small files and prepares requests for it: layouts, prompt ids and panels. Loads no weights."""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError, caused_by
from lumina_mgpt.images import candidate_sizes
from lumina_mgpt.model.hub import resolve
from lumina_mgpt.panels import encode_panels, encode_pictures, fit_panels, fit_pictures
from lumina_mgpt.prompts import PICTURE, TASKS, Task
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.unirep import ImageLayout, generation_prompt
from lumina_mgpt.vocabulary import GRID_UNIT, Vocabulary
from lumina_mgpt.vqgan.tokenizer import (
    ImageTokenizer,
    find_image_tokenizer,
    look_for_image_tokenizer,
    missing_file,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedRequest:
    """A request that was checked against a checkpoint.

    Attributes:
        layout: layout of every image.
        starts: ids of each prompt, up to image start. Before `Pipeline.stream` encodes them, pictures in the
            instructions count as code 0.
        panels: the given panels, fitted to the layout, one for all prompts or one per prompt. Each is a picture, or
            codes (rows, cols).
        pictures: the same for the pictures in the instructions. A request has panels or pictures, or neither.
    """

    request: GenerationRequest
    layout: ImageLayout
    starts: Sequence[Sequence[int]]
    panels: Sequence[Image.Image | Tensor]
    pictures: Sequence[Image.Image | Tensor] = ()

    @property
    def picture(self) -> Image.Image | None:
        """The first given panel, or picture of an instruction, if it is a picture."""
        given = next(iter((*self.panels, *self.pictures)), None)
        return given if isinstance(given, Image.Image) else None

    def changed(self, **settings: Any) -> "PreparedRequest":
        """Returns a copy whose request has other settings.

        Args:
            settings: any of `sampling`, `speculation`, `batch_size`, `share` and `n`.
        """
        return replace(self, request=replace(self.request, **settings))

    def single(self, index: int, panel: Image.Image | Tensor, **settings: Any) -> "PreparedRequest":
        """Returns a copy for one prompt alone, with `panel` as its given panel or the picture of its instruction.

        Args:
            index: index of the prompt.
            panel: a picture or codes that already fit the layout of this request.
            settings: as in `changed`.
        """
        request = replace(self.request, prompts=self.request.prompts[index : index + 1], panels=(panel,), **settings)
        copy = replace(self, request=request, starts=self.starts[index : index + 1])
        return replace(copy, pictures=(panel,)) if self.pictures else replace(copy, panels=(panel,))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose small files were read and checked; no weights are loaded yet.

    Attributes:
        movqgan_path: file of the image tokenizer, also if it is a VQGAN. It is None for a checkpoint of the first
            generation without such a file, whose language model may hold the encoder.
    """

    folder: Path
    config: ModelConfig
    vocabulary: Vocabulary
    movqgan_path: Path | None

    @classmethod
    def open(
        cls, model_path: str | Path, movqgan_path: str | Path | None = None, target_size: int | None = None
    ) -> "Checkpoint":
        """Opens a local folder, or downloads a hub id.

        Args:
            target_size: side in pixels of the square images that the weights were trained on (default: `base_size` of
                `config.json`). The released files do not hold it.

        Raises:
            InputError: there is no checkpoint of that name, it is incomplete, weights of a MoVQGAN are missing, or
                `target_size` is not a multiple of 32.
        """
        _require_utf8("model_path", model_path)
        with caused_by("model_path"):
            folder = resolve(model_path)
            config = ModelConfig.from_json(folder / "config.json")
            vocabulary = Vocabulary.from_folder(folder, config)
        kind = config.family.image_tokenizer
        find = find_image_tokenizer if kind == "movqgan" else look_for_image_tokenizer
        movqgan = find(folder, movqgan_path, kind)
        if movqgan is not None and movqgan.suffix == ".safetensors":
            _require_utf8("movqgan_path", movqgan)
        if target_size is not None:
            candidate_sizes(target_size)  # raises for a wrong size
            config = replace(config, base_size=target_size)
        return cls(folder, config, vocabulary, movqgan)

    def require_decoder(self) -> None:
        """Raises InputError if there is no file of the image tokenizer, without which no image can be made."""
        if self.movqgan_path is None:
            raise InputError(missing_file(self.folder, self.config.family.image_tokenizer))

    def base_size(self, panels: int = 1) -> tuple[int, int]:
        """Returns the default width and height in pixels of an image: square panels, one above the other.

        The side of a panel is `config.base_size`. If the codes of several such panels exceed the model's context, the
        panels are smaller: all together have at most the area of one. With the released weights, an image of two
        panels is 512 × 1024, as in their examples.
        """
        side = self.config.base_size
        if panels > 1 and panels * (side // self.vocabulary.cell) ** 2 > self.config.context:
            side = max(GRID_UNIT, math.isqrt(side**2 // panels) // GRID_UNIT * GRID_UNIT)
        return side, panels * side

    def layout(self, width: int | None = None, height: int | None = None, task: Task = TASKS["t2i"]) -> ImageLayout:
        """Returns the layout of an image.

        Args:
            width, height: pixels of the whole image, all panels together (default: `base_size`).

        Raises:
            InputError: a side is not a multiple of 32 (the height: of 32 · panels), or too long.
        """
        base = self.base_size(task.panels)
        if task.side is not None:
            base = min(base[0], task.side), min(base[1], task.side)
        width = base[0] if width is None else width
        height = base[1] if height is None else height
        return ImageLayout.from_pixels(
            self.vocabulary, width, height, panels=task.panels, given_panels=task.given_panels
        )

    def prompt_ids(
        self,
        texts: Sequence[str],
        layout: ImageLayout,
        task: Task = TASKS["t2i"],
        shown: str | None = None,
        parameter: str = "prompts",
        pictures: Sequence[Tensor] = (),
    ) -> list[list[int]]:
        """Returns the ids of each prompt's instruction, up to image start.

        Args:
            layout: layout of the images.
            shown: what the panel that the instruction describes displays (default: the task's `shown`).
            pictures: codes (rows, cols) of the pictures in the instructions, one for all texts or one per text.
            parameter: name of the texts' parameter, for errors.

        Raises:
            InputError: a text contains the name of a special token, or prompt and image exceed the model's context.
        """
        try:
            self.vocabulary.encode_text(shown or "")
        except InputError as error:
            raise InputError(f"cannot be encoded: {error}", "shown") from None
        width, height = layout.size
        source = "" if parameter == "prompts" else f" of {parameter}"
        encoded = []
        for index, text in enumerate([texts] if isinstance(texts, str) else texts):
            try:
                parts = task.parts(text, width, height, shown)
                grid = pictures[index % len(pictures)] if pictures else None
                turn = [part if part is not None else grid for part in parts]
                ids = generation_prompt([("human", [part for part in turn if part is not None])], self.vocabulary)
            except InputError as error:
                raise InputError(f"(number {index}): {error}", parameter) from None
            limit, length = self.config.context, task.views * layout.length
            if len(ids) + length > limit:
                each = f"views={task.views} of width={width}" if task.views > 1 else f"width={width}"
                fewer = "ask for fewer, make them" if task.views > 1 else "make the image"
                raise InputError(
                    f"{each} height={height} take {length} ids and the prompt (number {index}{source}) "
                    f"{len(ids)}, but this model sees {limit}; {fewer} smaller or the prompt shorter"
                )
            encoded.append(ids)
        return encoded

    def prepare(self, request: GenerationRequest, parameter: str = "prompts", crop: bool = True) -> PreparedRequest:
        """Returns the request with its layout, prompt ids and panels.

        Args:
            parameter: name of the prompts' parameter, for errors.
            crop: whether to check and crop the given pictures. Without, they fit the task already.

        Raises:
            InputError: the size does not fit the model, a prompt cannot be encoded, or a panel cannot be used.
        """
        request = self._for_family(request)
        task, count = request.task, len(request.prompts)
        parameter = parameter if request.instruction is None else "instruction"
        given: Any = request.panels
        if not task.takes_picture:
            layout = self.layout(request.width, request.height, task)
            panels = fit_panels(given, layout, count, self.config.num_image_codes) if crop else given
            starts = self.prompt_ids(request.prompts, layout, task, request.shown, parameter)
            return PreparedRequest(request, layout, starts, panels)
        pictures = fit_pictures(given, self.vocabulary, count, self.config.base_size) if crop else given
        grids = [blank_grid(picture, self.vocabulary.cell) for picture in pictures]
        width, height = (cells * self.vocabulary.cell for cells in reversed(grids[0].shape))
        layout = self.layout(request.width or width, request.height or height, task)
        starts = self.prompt_ids(request.prompts, layout, task, request.shown, parameter, grids)
        return PreparedRequest(request, layout, starts, (), pictures)

    def encode(self, prepared: PreparedRequest, tokenizer: ImageTokenizer) -> tuple[PreparedRequest, Tensor]:
        """Encodes the given pictures of a request.

        Returns the request, whose prompts hold the codes of the pictures in the instructions, and the codes of each
        prompt's given panel.

        Shapes: -> (prompts, layout.given).
        """
        request, layout = prepared.request, prepared.layout
        if prepared.pictures:
            codes = encode_pictures(prepared.pictures, tokenizer)
            starts = self.prompt_ids(request.prompts, layout, request.task, request.shown, pictures=codes)
            prepared = replace(prepared, starts=starts, pictures=codes)
        return prepared, encode_panels(prepared.panels, layout, len(request.prompts), tokenizer)

    def _for_family(self, request: GenerationRequest) -> GenerationRequest:
        """Returns the request with its worded task and the sampling defaults of the task and the family.

        Raises:
            InputError: the family does not have the task, the task makes one image and `views` asks for several, or
                `instruction` has a mark of a picture that the task does not take.
        """
        family, task = self.config.family, request.task
        if task not in (*family.tasks.values(), *family.i2i_tasks.values()):
            names = ", ".join(dict.fromkeys((*family.tasks, *family.i2i_tasks)))
            raise InputError(f"must be a task of {family.name} ({names}), got {task.template!r}", "task")
        if request.views is not None and request.views > 1 and task.views == 1:
            rule = "must be left out for a task that makes one image"
            raise InputError(f"{rule}, got {request.views}; use n={request.views}", "views")
        marks = 0 if request.instruction is None else request.instruction.count(PICTURE)
        if marks > task.takes_picture:
            rule = f"must have {'one mark' if task.takes_picture else 'no mark'} {PICTURE}"
            takes = f"the task takes {'one picture' if task.takes_picture else 'no picture'} in its instruction"
            raise InputError(f"{rule}, because {takes}, got {marks}; remove it", "instruction")
        if request.shown is not None and task.panels == 1:
            rule = "must be left out for a task without panels"
            raise InputError(f"{rule}, got {request.shown!r}; give instruction=TEXT", "shown")
        sampling: Any = {name: value for name, value in self.config.sampling_of(task).items() if name in request.unset}
        changed: dict[str, Any] = {"sampling": replace(request.sampling, **sampling)} if sampling else {}
        self._check_guidance(changed.get("sampling", request.sampling).cfg, request.guide_again)
        if request.worded_task != task:
            changed["task"] = request.worded_task
        return replace(request, **changed) if changed else request

    def _check_guidance(self, cfg: float, again: bool) -> None:
        """Refuses to guide weights that are guided already; with `again`, logs a hint only."""
        if not self.config.guided or cfg == 1.0:
            return
        twice = f"these weights give guidance {self.config.guided_scale:g} by themselves, so cfg={cfg:g} guides twice"
        if not again:
            raise InputError(f"must be 1, got {cfg:g}: {twice}; leave it out", "cfg")
        logger.warning("hint: %s; leave it out, or give 1", twice)


def blank_grid(picture: Image.Image | Tensor, cell: int) -> Tensor:
    """Returns codes 0 in the shape (rows, cols) of a picture's codes."""
    shape = picture.shape if isinstance(picture, Tensor) else (picture.height // cell, picture.width // cell)
    return torch.zeros(shape, dtype=torch.long)


def _require_utf8(parameter: str, path: str | Path) -> None:
    """Refuses a path that the libraries for weights and tokenizers cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        rule = "must be UTF-8, which the libraries that read weights and tokenizers need"
        raise InputError(f"{path} {rule}; rename the folder, or give a link to it", parameter) from None
