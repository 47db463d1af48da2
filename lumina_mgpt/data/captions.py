"""What a caption file says: common to folders and tars."""

from lumina_mgpt.errors import InputError

RESOURCE_FORK = "._"  # macOS writes such a file beside each of its own; it holds no picture


def caption_of(text: str, where: str) -> str:
    """A caption with \\n as its line ends and no blanks around it.

    Raises:
        InputError: it is empty; names `where`.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").strip()
    if not text:
        raise InputError(f"{where} is empty; write there what the picture shows")
    return text
