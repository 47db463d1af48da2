"""What folder.py and archive.py share to read caption files."""

from lumina_mgpt.errors import InputError

RESOURCE_FORK = "._"  # prefix of macOS metadata files, which hold no picture


def caption_of(text: str, where: str) -> str:
    r"""The caption in `text`, with `\n` as line ends and without surrounding white space.

    Args:
        text: content of the caption file.
        where: name of the caption file, for the error message.

    Raises:
        InputError: the caption is empty.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise InputError(f"{where} is empty; write a caption of the picture into it")
    return text
