"""Which files are pictures, and what their captions say: common to folders and tars."""

from functools import cache

from PIL import Image

from lumina_mgpt.errors import InputError

# EPS starts Ghostscript and WMF the drawing system of Windows. BUFR, GRIB and HDF5 have no decoder in Pillow, MPEG is
# video.
_NOT_DECODED_HERE = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
RESOURCE_FORK = "._"  # macOS writes such a file beside each of its own; it holds no picture


@cache
def picture_kinds() -> frozenset[str]:
    """Extensions, in lower case and without dot, of the formats that Pillow decodes by itself."""
    Image.init()
    formats = (set(Image.OPEN) | {"MPO"}) - _NOT_DECODED_HERE  # MPO is opened as JPEG
    return frozenset(end[1:].lower() for end, form in Image.registered_extensions().items() if form in formats)


def caption_of(text: str, where: str) -> str:
    """A caption with \\n as its line ends and no blanks around it.

    Raises:
        InputError: it is empty; names `where`.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise InputError(f"{where} is empty; write there what the picture shows")
    return text
