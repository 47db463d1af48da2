"""What a user writes down about a picture, in both accepted forms, as one conversation."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from lumina_mgpt import prompts
from lumina_mgpt.data.seeding import unit
from lumina_mgpt.errors import InputError

IMAGE_MARK = "<|image|>"
LLAVA_MARK = "<image>"
PLAIN_SHARE = 0.1  # of the text-to-image instructions, as released, do not name the size
ROLES = {"human": "human", "gpt": "assistant", "assistant": "assistant"}
_FORMS = {"conversations", "image"}, {"image_path", "prompt"}
# Keys of other formats that would change what is learnt. Other keys (id, width, url, ...) are taken for metadata.
_OTHERS = {"caption": "prompt", "text": "prompt", "messages": "conversations", "system": "the first turn",
           "video": "image", "audio": "image"}  # fmt: skip
_SIMILAR = 0.85  # of two keys, by difflib: `images` and `promt` are, `image_id` and `image_url` are not
_OF_TURNS = ("weight", "loss", "mask", "train")  # would change what of a turn is learnt


@dataclass(frozen=True)
class Record:
    """One training example before tokenization.

    `images` are pictures, each of them the paths of its panels from above (mostly one). `turns` are (role, parts); a
    part is a text or the index of an image. A `caption` (the short form) becomes its two turns only when the size of
    its picture is known.
    """

    images: tuple[tuple[Path, ...], ...]
    turns: tuple[tuple[str, tuple[str | int, ...]], ...] = ()
    caption: str | None = None


def parse_record(raw: object) -> Record:
    """One input row as a Record; relative image paths start at the working directory, as in the released code.

    `<image>`, the mark of LLaVA, is read as `<|image|>`.

    Raises:
        InputError: the row has neither form, or its image marks and images do not match. Or `raw` is one, the reason
            why its source has no record there.
    """
    if isinstance(raw, InputError):
        raise raw
    if not isinstance(raw, dict):
        raise InputError(f"a record must be a mapping, got a {type(raw).__name__}")
    _check_keys(raw)
    if "conversations" in raw:
        return _parse_conversation(raw)
    if "image_path" in raw and "prompt" in raw:
        path, caption = raw["image_path"], raw["prompt"]
        caption = _unicode(caption, "prompt") if isinstance(caption, str) else ""
        if not isinstance(path, str) or not path or not caption.strip():
            raise InputError("image_path and prompt must be non-empty texts")
        if LLAVA_MARK in caption:
            raise InputError(f"prompt must describe the picture in words, got the mark {LLAVA_MARK}; remove it, or "
                             "write the record with conversations")  # fmt: skip
        return Record(((Path(path),),), caption=caption)
    raise InputError(f"a record has `conversations` and `image`, or `image_path` and `prompt`; got {_shown(raw)}")


def _check_keys(raw: dict) -> None:
    """Raises InputError for a key that has a meaning in other formats and is not read here."""
    if all(form & set(raw) for form in _FORMS):
        raise InputError(f"a record has `conversations` and `image`, or `image_path` and `prompt`; got {_shown(raw)}")
    for key in set(raw).difference(*_FORMS):
        if meant := _meant(key.lower()):
            raise InputError(f"a record must not have the key {key!r}, which is not read; use {meant}, or remove it")


@lru_cache(maxsize=4096)
def _meant(key: str) -> str | None:
    """What to write in place of a key; None for one that is taken for metadata."""
    close = difflib.get_close_matches(key, sorted(set().union(*_FORMS)), n=1, cutoff=_SIMILAR)
    return _OTHERS.get(key) or (close[0] if close else None)


def _shown(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys))[:200] or "nothing"


def _unicode(text: str, where: str) -> str:
    """The text without a byte order mark, which a reader of its file may have left.

    Raises:
        InputError: JSON escapes give half of a character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{where} must be Unicode text, got half of a character (\\u{ord(text[error.start]):04x}); "
                         "correct it") from None  # fmt: skip
    return text.removeprefix("\ufeff")


def _parse_conversation(raw: dict) -> Record:
    images = raw.get("image", [])
    images = [images] if isinstance(images, str) else images
    turns = raw["conversations"]
    if not isinstance(images, list):
        raise InputError("image must be a path or a list, in which a list of paths is one picture's panels from above")
    stacks = [[image] if isinstance(image, str) else image for image in images]
    if not all(isinstance(stack, list) and stack and all(isinstance(path, str) for path in stack) for stack in stacks):
        raise InputError(f"an entry of image must be a path, or a list of the paths of its panels, got "
                         f"{str(images)[:200]}")  # fmt: skip
    if not isinstance(turns, list) or len(turns) < 2:
        raise InputError("conversations must be a list of at least two turns")
    texts = []
    for n, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role != ("human", "assistant")[n % 2] or not isinstance(turn.get("value"), str):
            raise InputError(f"turn {n} must be from {('human', 'gpt')[n % 2]} with a text as its value")
        for key in _OF_TURNS:
            if key in turn:
                raise InputError(f"turn {n} must not have the key {key!r}, which is not read; remove it")
        texts.append(_unicode(turn["value"], f"turn {n}").replace(LLAVA_MARK, IMAGE_MARK))
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks == 0 and images:  # as released, an unmentioned image goes before the first human text
        texts[0] = f"{IMAGE_MARK} " * len(images) + texts[0]
    elif marks != len(images):
        raise InputError(f"{marks} {IMAGE_MARK} or {LLAVA_MARK} marks for {len(images)} images; write one mark an "
                         "image, or none")  # fmt: skip
    counter = iter(range(len(images)))
    pieces = (tuple(_parts(text, counter)) for text in texts)
    paths = tuple(tuple(map(Path, stack)) for stack in stacks)
    return Record(paths, tuple(zip(_roles(len(texts)), pieces, strict=True)))


def _roles(count: int) -> list[str]:
    return [("human", "assistant")[n % 2] for n in range(count)]


def _parts(text: str, counter) -> list[str | int]:
    pieces = re.split(f"({re.escape(IMAGE_MARK)})", text)
    return [next(counter) if piece == IMAGE_MARK else piece for piece in pieces if piece]


def is_plain(seed: int, record: int) -> bool:
    """Whether the instruction of this record leaves the size out: a function of (seed, record) alone."""
    return unit(seed, "plain", record) < PLAIN_SHARE


def conversation(record: Record, codes: list, sizes: list[tuple[int, int]], plain: bool) -> list[tuple[str, list]]:
    """The turns that Uni-Rep encodes: texts and code grids.

    Shapes: each of `codes` (rows, cols); `sizes` are (width, height) in pixels after the crop.
    """
    if record.caption is not None:
        width, height = sizes[0]
        text = prompts.text_to_image_plain(record.caption) if plain else prompts.text_to_image(
            record.caption, width, height)  # fmt: skip
        return [("human", [text]), ("assistant", [codes[0]])]
    return [(role, [codes[part] if isinstance(part, int) else part for part in parts]) for role, parts in record.turns]
