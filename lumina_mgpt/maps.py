"""Computes control maps, such as edges, from a picture without a trained network."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from lumina_mgpt.errors import package_error


def canny(image: Image.Image) -> Image.Image:
    """Returns the Canny edges of a picture, white on black.

    The thresholds are 100 and 200, the defaults of ControlNet's Canny annotator.

    Raises:
        InputError: OpenCV is not installed or fails to import.
    """
    try:
        import cv2
    except Exception as error:  # any error that cv2's own imports raise
        raise package_error(error, "canny (OpenCV)", "opencv-python-headless", ("cv2",)) from None
    from lumina_mgpt.images import to_rgb  # imports torch, which takes seconds

    grey = cv2.cvtColor(np.asarray(to_rgb(image)), cv2.COLOR_RGB2GRAY)
    return Image.fromarray(cv2.Canny(grey, 100, 200)).convert("RGB")


# The other maps need trained networks; the model itself predicts them.
EXTRACTORS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny})
