"""ComfyUI's pictures, tensors (B, H, W, C) of float32 in 0 ... 1, to PIL and back."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.errors import InputError

_MODES = {1: "L", 3: "RGB", 4: "RGBA"}
_SMALLEST = 32  # pixels of a side, as for picture files


def to_pictures(image: Tensor) -> list[Image.Image]:
    """Returns the pictures of a batch. Values outside 0 ... 1 are clamped, NaN becomes black.

    A picture that ComfyUI read from an 8-bit file gives exactly the file's values.

    Shapes: image (B, H, W, C) with 1, 3 or 4 channels.

    Raises:
        InputError: the shape is another one, or a side has fewer than 32 pixels.
    """
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[3] not in _MODES or not len(image):
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"must have the shape (pictures, height, width, 1, 3 or 4), got {found}", "image")
    height, width, channels = image.shape[1:]
    if min(height, width) < _SMALLEST:
        rule = f"must be at least {_SMALLEST} pixels on each side"
        raise InputError(f"{rule}, got {width}x{height}; give a larger one", "image")
    values = (image.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    values = values[..., 0] if channels == 1 else values
    return [Image.fromarray(np.ascontiguousarray(array)) for array in values]


def to_batch(pictures: Sequence[Image.Image]) -> Tensor:
    """Returns RGB pictures of one size as a batch. Shapes: -> (B, H, W, 3) float32. Ranges: 0 ... 1."""
    return torch.from_numpy(np.stack([np.asarray(picture.convert("RGB")) for picture in pictures])).float() / 255
