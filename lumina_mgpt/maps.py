"""Control maps computed from a picture, by libraries that need neither weights nor a network."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from PIL import Image

from lumina_mgpt.errors import package_error


def canny(image: Image.Image) -> Image.Image:
    """Canny edges of a picture, white on black (OpenCV; thresholds 100 and 200, as is usual for control images).

    Raises:
        InputError: OpenCV is not installed, or fails to import; nothing else here needs it.
    """
    try:
        import cv2
    except Exception as error:  # whatever one of its own imports raises
        raise package_error(error, "canny (OpenCV)", "opencv-python-headless", ("cv2",)) from None
    from lumina_mgpt.images import to_rgb  # imports torch, which takes seconds

    grey = cv2.cvtColor(np.asarray(to_rgb(image)), cv2.COLOR_RGB2GRAY)
    return Image.fromarray(cv2.Canny(grey, 100, 200)).convert("RGB")


# Depth, pose and the others need trained networks: the model itself predicts them.
EXTRACTORS: Mapping[str, Callable[[Image.Image], Image.Image]] = MappingProxyType({"canny": canny})
