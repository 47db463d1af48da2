"""Given panels: pictures, their paths or their codes, fitted to a layout and encoded."""

import os
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import crop_panel, open_panel
from lumina_mgpt.unirep import CODE_CELL, ImageLayout
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

Panel = Image.Image | Tensor | str | os.PathLike  # a picture of any size and mode, its codes (rows, cols), or its path


def pixel_size(layout: ImageLayout) -> tuple[int, int]:
    """Returns width and height in pixels of the whole image."""
    return layout.cols * CODE_CELL, layout.rows * CODE_CELL


def given_size(layout: ImageLayout) -> tuple[int, int]:
    """Returns width and height in pixels of the given panel; the height is 0 where no panel is given."""
    return layout.cols * CODE_CELL, layout.given // layout.cols * CODE_CELL


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
    for number, panel in enumerate(panels):
        if not isinstance(panel, Panel):
            kinds = "a picture (PIL.Image), its path or its codes (torch.Tensor)"
            raise InputError(f"(number {number}) must be {kinds}, got {type(panel).__name__}; convert it", "panel")
    if len(panels) not in ((1, count) if layout.given else (0,)):
        several = f", or {count}, one for each prompt" if count > 1 else ""
        rule = f"be 1 picture{several}" if layout.given else "be left out, as this task generates every panel"
        raise InputError(f"must {rule}, got {len(panels)}; correct it, or choose another task", "panel")
    return tuple(_fit(panel, layout, num_codes) for panel in panels)


def _fit(panel: Panel, layout: ImageLayout, num_codes: int) -> Image.Image | Tensor:
    width, height = given_size(layout)
    if isinstance(panel, str | os.PathLike):
        panel = open_panel("panel", panel)
    if isinstance(panel, Image.Image):
        return crop_panel(panel, (width, height))
    shape = height // CODE_CELL, layout.cols
    if panel.shape != shape:
        rule = f"must have codes of the shape {shape} for {width}x{height} pixels"
        raise InputError(f"{rule}, got {tuple(panel.shape)}", "panel")
    if panel.dtype != torch.long or not 0 <= panel.min() <= panel.max() < num_codes:
        found = f"{panel.dtype} in {panel.min()} ... {panel.max()}"
        raise InputError(f"must have codes of type int64 in 0 ... {num_codes - 1}, got {found}", "panel")
    return panel


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
    codes = [tokenizer.encode([panel])[0] if isinstance(panel, Image.Image) else panel for panel in panels]
    return torch.stack([grid.flatten() for grid in codes]).expand(count, -1)
