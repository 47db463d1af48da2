"""Emoji in other colours: every pixel gets the hue of a named colour and keeps its place between dark and bright."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

# Object colours, RGB. Names of backgrounds mean other shades, so that a red object differs from a red background.
OBJECT_COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (205, 35, 40),
        "orange": (240, 130, 20),
        "yellow": (245, 210, 40),
        "green": (40, 160, 60),
        "blue": (40, 90, 215),
        "purple": (130, 60, 190),
        "pink": (245, 130, 185),
    }
)
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
_STRETCH = (0.25, 6.0)  # limits of the exponent: more would leave no shading


def colored(picture: np.ndarray, color: str) -> np.ndarray:
    """The picture in an object colour.

    The luminance of each pixel is raised to a power, and scaled where the power would be extreme, so that the median
    pixel has the luminance of the colour. Darker pixels are then mixtures of the colour with black, brighter ones with
    white. Outlines therefore stay dark, highlights bright, and white objects become coloured, too.

    Args:
        picture: RGBA.
        color: key of OBJECT_COLORS.

    Shapes: picture and result (side, side, 4) float32. Ranges: [0, 1].
    """
    wanted = np.asarray(OBJECT_COLORS[color], np.float32) / 255
    level = float(wanted @ _LUMA)
    luma = (picture[..., :3] @ _LUMA).clip(1e-3, 1 - 1e-3)  # (side, side)
    median = float(np.median(luma[picture[..., 3] > 0.5]))
    power = float(np.clip(np.log(level) / np.log(median), *_STRETCH))
    luma = (luma**power * (level / median**power)).clip(0, 1)[..., None]
    dark, bright = luma / level, (luma - level) / (1 - level)
    rgb = np.where(luma < level, wanted * dark, wanted + (1 - wanted) * bright.clip(0, 1))
    return np.concatenate([rgb, picture[..., 3:]], -1).astype(np.float32)
