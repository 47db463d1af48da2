"""Pictures in and out: opening what users have, crops of the released system, pixels as tensors."""

import logging
import math
import os
import warnings
from collections.abc import Sequence
from functools import cache
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy

logging.getLogger("PIL").addHandler(logging.NullHandler())  # what Pillow logs is no output of a command

_UNIT = 32  # candidate sizes are walked in patches of 32 pixels
_MAX_PIXELS = 178_956_970  # Pillow's own limit; from half of it on it would warn
_MAX_RATIO = 4
_LARGEST_TARGET = 8192  # far above what a model sees; the list of sizes grows with its square
_MAX_LENGTH = 16  # times the width: scaled to cover a crop, a longer picture could fill the memory
_MAX_COVER = 64  # times the area of a crop: what a picture within the limit has, scaled to cover a crop of up to 1 : 4
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags; a tile is decoded whole and may be larger than its picture
_NO_ALPHA = ("CMYK", "YCbCr", "LAB", "HSV")  # converted to RGB only, whatever transparency a file declares

# Formats that Pillow decodes by itself. Not here: EPS and PostScript (Pillow starts Ghostscript), WMF and EMF (drawn by
# Windows only), BUFR, GRIB and HDF5 (read by other libraries only), MPEG (only recognized), FITS (measurements, whose
# gzip blocks have no limit) and IPTC (a wrapper that opens a picture of any format).
# The last four have no magic number: all others are tried before them.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "QOI", "PPM", "DDS", "BLP",
            "FTEX", "ICO", "CUR", "ICNS", "PSD", "GBR", "SGI", "SUN", "PCX", "DCX", "PIXAR", "FLI", "IM", "MSP",
            "MCIDAS", "XBM", "XPM", "XVTHUMB", "PCD", "TGA", "IMT", "SPIDER")  # fmt: skip


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that `open_image` reads, as far as this Pillow has their plugins."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def picture_suffixes() -> frozenset[str]:
    """File name extensions of the formats that `open_image` reads, in lower case with their dot."""
    Image.init()
    formats = {*picture_formats(), "MPO"}  # the JPEG plugin opens MPO files
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def open_image(path: str | os.PathLike, content: BinaryIO | None = None, alpha: bool = False) -> Image.Image:
    """Opens any picture as upright RGB: EXIF rotation applied, alpha over white, 16 bits scaled to 8.

    Of several frames the first is read. No other program is started.

    Args:
        content: read instead of the file; `path` is then a name for messages.
        alpha: return RGBA, with its transparency, instead of RGB.

    Raises:
        InputError: no such file, not a picture, damaged, more than 178,956,970 pixels, or more than 16 times as long
            as wide.
    """
    if content is None and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe may wait forever
        raise InputError(f"{path} is not a regular file; give the path of a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half the pixel limit, EXIF that makes no sense
            with Image.open(content or path, formats=picture_formats()) as image:  # reads the header
                _check_size(path, image)
                image.load()
                _check_size(path, image)  # a container may hold a picture of another size than it says
                return upright(image).convert("RGBA") if alpha else to_rgb(upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(_too_large(path)) from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture that can be read; give a PNG, JPEG or WebP file") from None
    except Exception as error:  # decoders raise errors of any class for damaged files
        reason = "not enough memory" if isinstance(error, MemoryError) else cause(error)
        todo = remedy(error, "check the path and the file")
        raise InputError(f"{path} cannot be read as a picture ({reason}); {todo}") from None


def _check_size(path: str | os.PathLike, image: Image.Image) -> None:
    tiles = [size for key in (_TILE_WIDTH, _TILE_LENGTH) if (size := getattr(image, "tag_v2", {}).get(key))]
    if image.width * image.height > _MAX_PIXELS or math.prod(tiles) > _MAX_PIXELS:
        raise InputError(_too_large(path))
    short, long = sorted(image.size)
    if long > _MAX_LENGTH * short:
        raise InputError(
            f"{path} must be at most {_MAX_LENGTH} times as long as wide, got {image.width}x{image.height}; give "
            "another picture, or a part of it"
        )


def _too_large(path: str | os.PathLike) -> str:
    return f"{path}: the picture has more than {_MAX_PIXELS} pixels; shrink it first"


def upright(image: Image.Image) -> Image.Image:
    """Turned and mirrored as its EXIF orientation says; unmodified where its EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged block raises struct.error, SyntaxError, KeyError, ...: the picture itself is loaded
        return image


def open_panel(parameter: str, path: str | os.PathLike) -> Image.Image:
    """Opens the picture that a parameter names, to be cropped to a panel later.

    Raises:
        InputError: as `open_image`, naming the parameter; also for a side below 32 pixels.
    """
    try:
        image = open_image(path)
    except InputError as error:
        raise InputError(str(error), parameter) from None
    if min(image.size) < _UNIT:
        raise InputError(
            f"{path} must be at least {_UNIT} pixels on each side, got {image.width}x{image.height}; give another "
            "picture",
            parameter,
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to RGB: transparency is laid over white, 16-bit and float grey are scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode == "La":  # converts to no other mode
        image = image.convert("LA")
    if image.has_transparency_data and image.mode not in _NO_ALPHA:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """16-bit, 32-bit and float grey to 8 bits; not a number becomes black."""
    values = np.asarray(image)
    # Pillow opens 16-bit grey as I;16 or I; floats tell their range only by their largest value.
    largest = values.max(initial=0, where=np.isfinite(values))
    top = 65535.0 if image.mode.startswith("I") or largest > 255 else 255.0 if largest > 1 else 1.0
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // image.width)  # float64 of the whole picture would take eight times its size, several times
    for first in range(0, image.height, rows):
        part = np.nan_to_num(values[first : first + rows].astype(np.float64), nan=0.0)
        grey[first : first + rows] = (part.clip(0, top) / top * 255).round()
    return Image.fromarray(grey)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales `image` to cover `size` (width, height) and cuts the middle, as the released system does.

    Halves with a box filter while both sides are at least twice the target, then resizes with a bicubic filter.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    # A side that the scale fits exactly may come out a little below its target: never cut outside of the picture.
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    kept = left, top, left + width, top + height
    if math.prod(scaled) > _MAX_COVER * width * height:  # scales the part that is kept alone, to save memory
        box = [side * at / whole for side, at, whole in zip(image.size * 2, kept, scaled * 2, strict=True)]
        return image.resize(size, Image.Resampling.BICUBIC, box=tuple(box))
    # Scales the whole picture: only this gives the pixels of the released system, bit for bit.
    return image.resize(scaled, Image.Resampling.BICUBIC).crop(kept)


def crop_panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture of any mode, turned and over white as when it is opened, cropped to `size` (width, height)."""
    return center_crop(to_rgb(upright(image)), size)


def candidate_sizes(target: int) -> list[tuple[int, int]]:
    """Sizes (width, height) of about `target` x `target` pixels in steps of 32, sides' ratio at most 4.

    A staircase: begin with all patches in one row; add a row where the patches suffice, else give up a column.

    Raises:
        InputError: `target` is no positive multiple of 32, or over 8192.
    """
    if target > _LARGEST_TARGET:
        raise InputError(f"--target_size must be at most {_LARGEST_TARGET}, got {target}; try 1024")
    if target < _UNIT or target % _UNIT:
        nearest = max(1, target // _UNIT) * _UNIT
        raise InputError(f"--target_size must be a multiple of {_UNIT}, got {target}; try {nearest}")
    patches = (target // _UNIT) ** 2
    columns, rows, sizes = patches, 1, []
    while columns > 0:
        if max(columns, rows) <= _MAX_RATIO * min(columns, rows):
            sizes.append((columns * _UNIT, rows * _UNIT))
        if columns * (rows + 1) <= patches:
            rows += 1
        else:
            columns -= 1
    return sizes


def best_size(size: tuple[int, int], candidates: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The candidate (width, height) whose shape loses least of a picture of `size`; ties go to the larger tuple."""

    def kept(candidate: tuple[int, int]) -> float:
        ratios = candidate[0] / size[0], candidate[1] / size[1]
        return min(ratios) / max(ratios)

    return max(candidates, key=lambda candidate: (kept(candidate), candidate))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one height in one row, without gaps."""
    return Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1))


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images of one width one above another, without gaps: the panels of one picture."""
    return Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=0))


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB; 100 where the pictures are equal."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return -10 * math.log10(max(float((difference**2).mean()) / 255**2, 1e-10))


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Images of one size and any mode -> (B, 3, H, W) float32 in [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 255 * 2 - 1).contiguous()


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W) in [-1, 1] (values outside are clamped) -> RGB images."""
    values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
