"""Images: opens files of any format, crops as the released code does, and converts to and from tensors."""

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

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, Python prints warnings on stderr

_UNIT = 32  # sides are multiples of 32 pixels, the grid unit of unirep
_MAX_PIXELS = 178_956_970  # Pillow's limit of a decompression bomb
_MAX_RATIO = 4  # of the sides of a candidate size, as in the released code
_LARGEST_TARGET = 8192  # far above the sizes of any model; the number of patches grows with the square
_MAX_LENGTH = 16  # ratio of the sides; a longer picture, scaled to cover a crop, could fill the memory
_MAX_COVER = 64  # area ratio of scaled picture and crop: _MAX_LENGTH · _MAX_RATIO
_TILE_WIDTH, _TILE_LENGTH = 322, 323  # TIFF tags; a tile may be larger than its picture and is decoded whole
_NO_ALPHA = ("CMYK", "YCbCr", "LAB", "HSV")  # modes that Pillow converts to RGB but not to RGBA

# Formats that Pillow decodes without another program. Excluded: EPS and PostScript (Pillow starts Ghostscript), WMF and
# EMF (Windows only), BUFR, GRIB and HDF5 (need other libraries), MPEG (recognized, not decoded), FITS (its gzip blocks
# have no size limit) and IPTC (a wrapper around a picture of any format). The last four have no magic number and are
# tried after all others.
_FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "QOI", "PPM", "DDS", "BLP",
            "FTEX", "ICO", "CUR", "ICNS", "PSD", "GBR", "SGI", "SUN", "PCX", "DCX", "PIXAR", "FLI", "IM", "MSP",
            "MCIDAS", "XBM", "XPM", "XVTHUMB", "PCD", "TGA", "IMT", "SPIDER")  # fmt: skip


@cache
def picture_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that `open_image` reads and that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@cache
def picture_suffixes() -> frozenset[str]:
    """File name extensions of the formats that `open_image` reads, in lower case with the dot."""
    Image.init()
    formats = {*picture_formats(), "MPO"}  # the JPEG plugin opens MPO files
    return frozenset(suffix for suffix, name in Image.EXTENSION.items() if name in formats)


def open_image(path: str | os.PathLike, content: BinaryIO | None = None, alpha: bool = False) -> Image.Image:
    """Opens a picture as upright RGB: EXIF rotation applied, transparency over white, 16 bits scaled to 8.

    Of a file with several frames, reads the first. Starts no other program.

    Args:
        path: the file. If `content` is given, `path` only names the picture in messages.
        content: stream to read in place of the file.
        alpha: whether to return RGBA, which keeps the transparency.

    Raises:
        InputError: the file is missing, damaged or not a picture, or the picture has more than 178,956,970 pixels or a
            ratio of sides above 16.
    """
    if content is None and os.path.exists(path) and not os.path.isfile(path):  # reading a pipe may block forever
        raise InputError(f"{path} is not a regular file; give the path of a picture")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures and of invalid EXIF
            with Image.open(content or path, formats=picture_formats()) as image:  # reads only the header
                _check_size(path, image)
                image.load()
                _check_size(path, image)  # the picture in a container may have another size than its header
                return upright(image).convert("RGBA") if alpha else to_rgb(upright(image))
    except InputError:
        raise
    except Image.DecompressionBombError:
        raise InputError(_too_large(path)) from None
    except UnidentifiedImageError:
        raise InputError(f"{path} is not a picture of a supported format; give a PNG, JPEG or WebP file") from None
    except Exception as error:  # for a damaged file, decoders raise errors of any class
        reason = "not enough memory" if isinstance(error, MemoryError) else cause(error)
        hint = remedy(error, "check the path and the file")
        raise InputError(f"{path} cannot be read as a picture ({reason}); {hint}") from None


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
    """The image with its EXIF orientation applied; unmodified where the EXIF cannot be read."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception:  # a damaged block raises struct.error, SyntaxError, KeyError, ...; the pixels are intact
        return image


def open_panel(parameter: str, path: str | os.PathLike) -> Image.Image:
    """Opens a picture that the caller then crops to a panel.

    Args:
        parameter: name of the parameter that has the path, for messages.

    Raises:
        InputError: as for `open_image`, or a side is below 32 pixels.
    """
    try:
        image = open_image(path)
    except InputError as error:
        raise InputError(str(error), parameter) from None
    if min(image.size) < _UNIT:
        raise InputError(
            f"{path} must be at least {_UNIT} pixels on each side, got {image.width}x{image.height}; give a larger one",
            parameter,
        )
    return image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparency over white, 16-bit and float grey scaled to 8 bits."""
    if image.mode.startswith("I") or image.mode == "F":
        return _grey_to_8_bits(image).convert("RGB")
    if image.mode == "La":  # converts to no other mode
        image = image.convert("LA")
    if image.has_transparency_data and image.mode not in _NO_ALPHA:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 or 32 bits or of floats, scaled to 8 bits; NaN becomes black."""
    values = np.asarray(image)
    # Pillow opens 16-bit grey as I;16 or I. The range of floats is unknown and inferred from the largest value.
    largest = values.max(initial=0, where=np.isfinite(values))
    top = 65535.0 if image.mode.startswith("I") or largest > 255 else 255.0 if largest > 1 else 1.0
    grey = np.empty(values.shape, np.uint8)
    rows = max(1, 2**20 // image.width)  # bands of 2**20 pixels bound the memory of float64
    for first in range(0, image.height, rows):
        part = np.nan_to_num(values[first : first + rows].astype(np.float64), nan=0.0)
        grey[first : first + rows] = (part.clip(0, top) / top * 255).round()
    return Image.fromarray(grey)


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scales `image` to cover `size` (width, height) and returns the center of that size.

    Halves with a box filter while both sides are at least twice the target, then resizes with a bicubic filter.

    Source: `var_center_crop` of the released code, whose pixels it reproduces exactly.
    """
    width, height = size
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    # Rounding may give a side just below its target, which would crop outside of the picture.
    scaled = max(width, round(image.width * scale)), max(height, round(image.height * scale))
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    kept = left, top, left + width, top + height
    if math.prod(scaled) > _MAX_COVER * width * height:  # scale only the crop, to save memory
        (full_width, full_height), (scaled_width, scaled_height) = image.size, scaled
        box = (
            full_width * kept[0] / scaled_width,
            full_height * kept[1] / scaled_height,
            full_width * kept[2] / scaled_width,
            full_height * kept[3] / scaled_height,
        )
        return image.resize(size, Image.Resampling.BICUBIC, box=box)
    # Scaling the whole picture reproduces the released pixels bit for bit.
    return image.resize(scaled, Image.Resampling.BICUBIC).crop(kept)


def crop_panel(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Returns the `center_crop` of a picture of any mode, after EXIF rotation and with transparency over white."""
    return center_crop(to_rgb(upright(image)), size)


def candidate_sizes(target: int) -> list[tuple[int, int]]:
    """Returns sizes (width, height) of at most target² pixels: multiples of 32, ratio of sides at most 4.

    The area target² is (target / 32)² patches of 32 × 32 pixels. The search starts with all patches in one row. Each
    step adds a row if there are enough patches, and otherwise removes a column.

    Raises:
        InputError: `target` is not a positive multiple of 32, or is above 8192.

    Source: `generate_crop_size_list` of the released code.
    """
    if target > _LARGEST_TARGET:
        raise InputError(f"must be at most {_LARGEST_TARGET}, got {target}; try 1024", "target_size")
    if target < _UNIT or target % _UNIT:
        nearest = max(1, target // _UNIT) * _UNIT
        raise InputError(f"must be a multiple of {_UNIT}, got {target}; try {nearest}", "target_size")
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
    """Returns the candidate to which a picture of `size` is cropped with the least loss; of ties, the larger tuple.

    Args:
        size, candidates: all as (width, height).
    """

    def kept(candidate: tuple[int, int]) -> float:
        ratios = candidate[0] / size[0], candidate[1] / size[1]
        return min(ratios) / max(ratios)

    return max(candidates, key=lambda candidate: (kept(candidate), candidate))


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """Images of the same height side by side, without gaps."""
    return Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=1))


def stacked(images: Sequence[Image.Image]) -> Image.Image:
    """Images of the same width one above the other, without gaps, as the panels of an image."""
    return Image.fromarray(np.concatenate([np.asarray(image.convert("RGB")) for image in images], axis=0))


def psnr(image: Image.Image, reference: Image.Image) -> float:
    """Peak signal-to-noise ratio in dB of two images; 100, the largest value, for equal images."""
    difference = np.asarray(image, np.float64) - np.asarray(reference, np.float64)
    return -10 * math.log10(max(float((difference**2).mean()) / 255**2, 1e-10))


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pixels of images of the same size and any mode. Shapes: -> (B, 3, H, W) float32. Ranges: [-1, 1]."""
    stacked = torch.from_numpy(np.stack([np.asarray(to_rgb(image)) for image in images]))
    return (stacked.permute(0, 3, 1, 2).float() / 255 * 2 - 1).contiguous()


def to_images(pixels: Tensor, truncate: bool = False) -> list[Image.Image]:
    """RGB images of pixels, clamped to [-1, 1]. Shapes: pixels (B, 3, H, W).

    Differs from the reference: the released code of the first generation cuts fractions off, which makes half of all
    values one lower. This rounds them.

    Args:
        truncate: cut fractions off, in the operations of the released code, to compare with its images.
    """
    if truncate:
        values = ((pixels.float().clamp(-1, 1) + 1) / 2 * 255).to(torch.uint8)
    else:
        values = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return [Image.fromarray(array) for array in values.permute(0, 2, 3, 1).cpu().numpy()]
