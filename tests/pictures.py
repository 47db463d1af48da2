"""Small pictures in every format that Pillow writes, and random damage of files."""

import io
import random
import warnings
from functools import cache

import numpy as np
from PIL import Image

from lumina_mgpt.images import picture_formats

MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "F",
         "I;16", "I;16L", "I;16B", "I;16N")  # fmt: skip
TIFF_COMPRESSIONS = ("tiff_lzw", "jpeg", "tiff_deflate", "packbits", "group4")


def in_mode(mode: str, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """A picture in a mode; blank where Pillow cannot convert to it."""
    values = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    image = Image.fromarray(values).resize(size)
    try:
        return image.convert(mode)
    except ValueError:
        return Image.new(mode, size)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes | None:
    """The bytes of an image file; None if Pillow cannot write the mode in the format."""
    file = io.BytesIO()
    if kind == "AVIF":
        options["speed"] = 10
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated formats
        try:
            image.save(file, kind, **options)
        except Exception:
            return None
    return file.getvalue()


@cache
def every_file() -> dict[str, bytes]:
    """Files by name, one for each format and mode that Pillow writes and `open_image` reads."""
    Image.init()
    kinds = [kind for kind in Image.SAVE if kind in {*picture_formats(), "MPO"}]
    files = {f"{kind}, {mode}": encoded(in_mode(mode), kind) for kind in kinds for mode in MODES}
    for name in TIFF_COMPRESSIONS:
        mode = "1" if name == "group4" else "RGB"
        files[f"TIFF, {name}"] = encoded(in_mode(mode), "TIFF", compression=name)
    frames = [in_mode("RGB"), Image.new("RGB", (24, 20), "red")]
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "AVIF"):
        files[f"{kind}, frames"] = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    return {name: data for name, data in files.items() if data is not None}


def damaged(data: bytes, rng: random.Random) -> bytes:
    """`data` with bytes replaced, truncated, inserted or removed, or with extreme values in the header."""
    result = bytearray(data)
    match rng.randrange(5):
        case 0:
            for _ in range(rng.randint(1, 8)):
                result[rng.randrange(len(result))] = rng.randrange(256)
        case 1:
            del result[rng.randrange(len(result)) :]
        case 2:
            start = rng.randrange(len(result))
            result[start:start] = rng.randbytes(rng.randint(1, 16))
        case 3:
            start = rng.randrange(len(result))
            del result[start : start + rng.randint(1, 16)]
        case _:
            for _ in range(rng.randint(1, 4)):
                result[rng.randrange(min(64, len(result)))] = rng.choice((0, 1, 127, 128, 255))
    return bytes(result)
