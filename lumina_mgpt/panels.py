"""Panels that the user gives: pictures, or their paths or codes, as codes of the right size."""

import os
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import crop_panel, open_panel
from lumina_mgpt.movqgan.tokenizer import ImageTokenizer
from lumina_mgpt.unirep import CODE_CELL, ImageLayout

Panel = Image.Image | Tensor | str | os.PathLike  # a picture of any size and mode, its codes (rows, cols), or its path


def pixel_size(layout: ImageLayout) -> tuple[int, int]:
    """Width and height in pixels of the image that a layout describes."""
    return layout.cols * CODE_CELL, layout.rows * CODE_CELL


def given_size(layout: ImageLayout) -> tuple[int, int]:
    """Width and height in pixels of the panel that is given; its height is 0 where there is none."""
    return layout.cols * CODE_CELL, layout.given // layout.cols * CODE_CELL


def given_codes(
    panel: Panel | Sequence[Panel] | None, layout: ImageLayout, count: int, tokenizer: ImageTokenizer
) -> Tensor:
    """Codes of the given panel of each of `count` prompts, in reading order.

    Shapes: -> (count, layout.given).

    Raises:
        InputError: a panel is of a type that is not supported, a picture cannot be read, there are too many or too few
            panels for the task and the prompts, or codes do not fit the layout.
    """
    panels = [] if panel is None else list(panel) if isinstance(panel, list | tuple) else [panel]
    for number, one in enumerate(panels):
        if not isinstance(one, Panel):
            raise InputError(f"panel (number {number}) must be a picture (PIL.Image), its path or its codes "
                             f"(torch.Tensor), got {type(one).__name__}; convert it")  # fmt: skip
    if len(panels) not in ((1, count) if layout.given else (0,)):
        rule = f"1 or {count} (one a prompt)" if layout.given else "none, as this task generates every panel"
        raise InputError(f"--image_path must give {rule}, got {len(panels)}; or choose another task")
    if not panels:
        return torch.empty((count, 0), dtype=torch.long)
    return torch.stack([_codes(one, layout, tokenizer).flatten() for one in panels]).expand(count, -1)


def _codes(panel: Panel, layout: ImageLayout, tokenizer: ImageTokenizer) -> Tensor:
    size = given_size(layout)
    if isinstance(panel, str | os.PathLike):
        panel = open_panel("panel", panel)
    codes = tokenizer.encode([crop_panel(panel, size)])[0] if isinstance(panel, Image.Image) else panel
    if codes.shape != (size[1] // CODE_CELL, layout.cols):
        raise InputError(f"the codes of a panel of {size[0]}x{size[1]} must have the shape "
                         f"{(size[1] // CODE_CELL, layout.cols)}, got {tuple(codes.shape)}")  # fmt: skip
    if codes.dtype != torch.long or not 0 <= codes.min() <= codes.max() < tokenizer.num_codes:
        raise InputError(f"the codes of a panel must be int64 in 0 ... {tokenizer.num_codes - 1}, "
                         f"got {codes.dtype} in {codes.min()} ... {codes.max()}")  # fmt: skip
    return codes
