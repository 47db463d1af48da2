"""Caption files, as folder.py and archive.py read them."""

from lumina_mgpt.errors import InputError

RESOURCE_FORK = "._"  # prefix of macOS metadata files, which hold no picture


def caption_of(text: str, where: str) -> str:
    r"""A caption with `\n` line ends and without surrounding white space.

    Args:
        text: content of the file.
        where: name of the file, for the error.

    Raises:
        InputError: the caption is empty.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise InputError(f"{where} is empty; write a caption of the picture into it")
    return text
