"""Given pictures, their paths or their codes: fitted as the panel of a layout, or as a picture of an instruction."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.checks import require
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import best_size, candidate_sizes, crop_panel, open_panel, upright
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.unirep import ImageLayout, UniRepError, encode_image
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

Panel = Image.Image | Tensor | str | os.PathLike  # a picture of any size and mode, its codes (rows, cols), or its path


def given_size(layout: ImageLayout) -> tuple[int, int]:
    """Returns width and height in pixels of the given panel; the height is 0 where no panel is given."""
    return layout.size[0], layout.given // layout.cols * layout.vocabulary.cell


def fit_panels(
    panels: Sequence[Panel], layout: ImageLayout, count: int, num_codes: int
) -> tuple[Image.Image | Tensor, ...]:
    """Returns the given panels, fitted to a layout: opens paths, crops pictures and checks codes.

    Args:
        panels: one panel for all prompts or one per prompt; none if the layout has no given panel.
        count: number of prompts.
        num_codes: size of the image tokenizer's codebook.

    Raises:
        InputError: a panel has an unsupported type, a picture cannot be read, the number of panels does not fit the
            task and the prompts, or codes do not fit the layout.
    """
    _check_count(panels, count, wanted=layout.given > 0)
    return tuple(_fit(panel, layout, num_codes) for panel in panels)


def fit_pictures(
    pictures: Sequence[Panel], vocabulary: Vocabulary, count: int, side: int
) -> tuple[Image.Image | Tensor, ...]:
    """Returns the pictures of instructions: opens paths, crops pictures to their best size, and checks codes.

    Args:
        pictures: one picture for all prompts or one per prompt. Codes (rows, cols) are used unmodified.
        count: number of prompts.
        side: the sizes to crop to have about the area of a square of this side in pixels.

    Raises:
        InputError: a picture has an unsupported type or cannot be read, the number of pictures does not fit the
            prompts, or codes are not those of an image.
    """
    _check_count(pictures, count, wanted=True)
    sizes = candidate_sizes(side)
    fitted: list[Image.Image | Tensor] = []
    for picture in pictures:
        if isinstance(picture, str | os.PathLike):
            picture = open_panel("panel", picture)
        if isinstance(picture, Image.Image):
            fitted.append(crop_panel(picture, best_size(upright(picture).size, sizes)))
        else:
            _check_codes(picture, vocabulary.num_image_codes)
            try:
                encode_image(picture, vocabulary)
            except UniRepError as error:
                raise InputError(f"must have the codes of an image: {error}", "panel") from None
            fitted.append(picture)
    return tuple(fitted)


def _check_count(panels: Sequence[Panel], count: int, wanted: bool) -> None:
    for number, panel in enumerate(panels):
        if not isinstance(panel, Panel):
            kinds = "a picture (PIL.Image), its path or its codes (torch.Tensor)"
            raise InputError(f"(number {number}) must be {kinds}, got {type(panel).__name__}; convert it", "panel")
    if len(panels) not in ((1, count) if wanted else (0,)):
        several = f", or {count}, one for each prompt" if count > 1 else ""
        rule = f"be 1 picture{several}" if wanted else "be left out, as this task generates every panel"
        raise InputError(f"must {rule}, got {len(panels)}; correct it, or choose another task", "panel")


def _fit(panel: Panel, layout: ImageLayout, num_codes: int) -> Image.Image | Tensor:
    width, height = given_size(layout)
    if isinstance(panel, str | os.PathLike):
        panel = open_panel("panel", panel)
    if isinstance(panel, Image.Image):
        return crop_panel(panel, (width, height))
    shape = layout.given // layout.cols, layout.cols
    if panel.shape != shape:
        rule = f"must have codes of the shape {shape} for {width}x{height} pixels"
        raise InputError(f"{rule}, got {tuple(panel.shape)}", "panel")
    _check_codes(panel, num_codes)
    return panel


def _check_codes(panel: Tensor, num_codes: int) -> None:
    if panel.dtype != torch.long or not 0 <= panel.min() <= panel.max() < num_codes:
        found = f"{panel.dtype} in {panel.min()} ... {panel.max()}"
        raise InputError(f"must have codes of type int64 in 0 ... {num_codes - 1}, got {found}", "panel")


def turn_parts(text: str, pictures: Sequence[Panel]) -> list[str | Panel]:
    """Returns a turn as texts and pictures: each `<|image|>` of the text stands for the next picture.

    Pictures without marks come before the text, each followed by a space, as in the released code.

    Raises:
        InputError: there are marks, but not one for each picture.
    """
    single = isinstance(pictures, str) or not isinstance(pictures, Sequence)
    require(not single, "pictures", pictures, "must be a sequence of pictures; put it in a list")
    marks = text.count(PICTURE)
    if not marks:
        text = f"{PICTURE} " * len(pictures) + text
    elif marks != len(pictures):
        rule = f"must be as many as the text has marks {PICTURE}: {marks}"
        raise InputError(f"{rule}, got {len(pictures)}; write one mark for each, or none", "pictures")
    texts, parts = text.split(PICTURE), list[str | Panel]()
    for index, piece in enumerate(texts):
        parts += [piece] if piece else []
        parts += [_as_path(pictures[index])] if index < len(pictures) else []
    return parts


def _as_path(picture: Panel) -> Panel:
    return Path(picture) if isinstance(picture, str) else picture


def encode_panels(
    panels: Sequence[Image.Image | Tensor], layout: ImageLayout, count: int, tokenizer: ImageTokenizer
) -> Tensor:
    """Returns the codes of each prompt's given panel, in reading order.

    Args:
        panels: what `fit_panels` returns.
        count: number of prompts.

    Shapes: -> (count, layout.given).
    """
    if not panels:
        return torch.empty((count, 0), dtype=torch.long)
    return torch.stack([grid.flatten() for grid in encode_pictures(panels, tokenizer)]).expand(count, -1)


def encode_pictures(pictures: Sequence[Image.Image | Tensor], tokenizer: ImageTokenizer) -> list[Tensor]:
    """Returns the codes (rows, cols) of each picture: what `fit_pictures` or `fit_panels` returns."""
    return [tokenizer.encode([one])[0] if isinstance(one, Image.Image) else one for one in pictures]
