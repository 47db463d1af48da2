"""Chat messages in the format of transformers, as texts with marks and as the pictures of these marks."""

from collections.abc import Mapping, Sequence
from typing import Any

from lumina_mgpt.checks import excerpt
from lumina_mgpt.errors import InputError
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.vocabulary import TURN_END, Vocabulary

_SOURCES = ("image", "url", "path", "base64")  # keys of a picture


def render(messages: Sequence[Mapping[str, Any]], vocabulary: Vocabulary, open_end: bool = False) -> str:
    """Returns a conversation as text: turns, each followed by a turn end, with a mark for each picture.

    A space separates a picture from text, as in the released code.

    Args:
        messages: see `LuminaMGPTProcessor.apply_chat_template`.
        open_end: whether the last message is an incomplete answer.

    Raises:
        InputError: a message is malformed, roles do not alternate, or a text contains a control name.
    """
    if not messages:
        raise InputError("must hold at least one message", "conversation")
    turns = []
    for index, message in enumerate(messages):
        _check_role(index, message)
        turn = ""
        for part in _parts(message):
            if part["type"] == "image":
                turn += f" {PICTURE}" if turn and not turn[-1].isspace() else PICTURE
            else:
                text = _text(part)
                vocabulary.encode_text(text)  # refuses control names
                turn += f" {text}" if turn.endswith(PICTURE) and text and not text[0].isspace() else text
        turns.append(turn)
    if open_end and len(turns) % 2:
        raise InputError("must be False, because the last message is the user's", "continue_final_message")
    return TURN_END.join(turns) + ("" if open_end else TURN_END)


def pictures_of(messages: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Returns the pictures of a conversation, or where they are.

    Raises:
        InputError: a picture has no source.
    """
    pictures = []
    for message in messages:
        for part in _parts(message):
            if part["type"] == "image":
                found = [part[key] for key in _SOURCES if part.get(key) is not None]
                if len(found) != 1:
                    raise InputError(f"an image must have one of the keys {', '.join(_SOURCES)}", "conversation")
                encoded = part.get("base64") is not None and not str(found[0]).startswith("data:image/")
                pictures.append(f"data:image/png;base64,{found[0]}" if encoded else found[0])
    return pictures


def _check_role(index: int, message: Mapping[str, Any]) -> None:
    known = isinstance(message, Mapping) and {"role", "content"} <= message.keys()
    if not known:
        raise InputError(f"message {index + 1} must have role and content, got {excerpt(message)}", "conversation")
    expected = ("user", "assistant")[index % 2]
    if message["role"] != expected:
        rule = f"message {index + 1} must have the role {expected}, got {excerpt(message['role'])}"
        raise InputError(f"{rule}; user and assistant alternate, and there is no system message", "conversation")


def _parts(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message["content"]
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    for part in parts if isinstance(parts, Sequence) else [parts]:
        if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
            raise InputError(
                f"content must be text, or parts of type text or image, got {excerpt(part)}", "conversation"
            )
    return list(parts)


def _text(part: Mapping[str, Any]) -> str:
    text = part.get("text")
    if not isinstance(text, str):
        raise InputError(f"a part of type text must have a text, got {excerpt(text)}", "conversation")
    return text
