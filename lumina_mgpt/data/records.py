"""Row of an input -> Record -> conversation.

Before: inputs.py reads the rows. Next: image_codes.py encodes the images of each Record, and pre_tokenize.py builds ids
and labels from the conversation.
"""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from lumina_mgpt import prompts
from lumina_mgpt.data.seeding import uniform
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import SECOND, Family

Panels = tuple[Path, ...]  # files of one image's panels, from the top; most images have one panel

IMAGE_MARK = "<|image|>"
LLAVA_MARK = "<image>"
ROLES = {"human": "human", "gpt": "assistant", "assistant": "assistant"}
_TURNS = ("human", "assistant")
_FORMS = {"conversations", "image"}, {"image_path", "prompt"}
# Keys of other formats whose content would be ignored -> key to use instead. Further keys (id, width, url, ...) are
# metadata.
_OTHERS = {
    "caption": "prompt",
    "text": "prompt",
    "messages": "conversations",
    "system": "the first turn",
    "video": "image",
    "audio": "image",
}
_SIMILAR = 0.85  # of two keys, by difflib: finds `images` and `promt`, but not `image_id` and `image_url`
_OF_TURNS = ("weight", "loss", "mask", "train")  # keys of other formats that select what of a turn carries loss


@dataclass(frozen=True)
class Record:
    """One training example before tokenization.

    Attributes:
        images: for each image, the files of its panels.
        turns: (role, parts) of each turn of a conversation. A part is a text, or an index into `images`.
        caption: prompt of a text-to-image record, which has no `turns`. `conversation` makes the instruction from it,
            once the size of the cropped image is known.
    """

    images: tuple[Panels, ...]
    turns: tuple[tuple[str, tuple[str | int, ...]], ...] = ()
    caption: str | None = None


def parse_record(raw: object) -> Record:
    """Parses a row of an input into a Record.

    A row has the keys `image_path` and `prompt` (text to image), or `conversations` and `image`. A conversation in
    words alone needs no `image`. Relative paths start at the working directory. The image mark is `<|image|>`; in
    conversations, LLaVA's mark `<image>` means the same.

    Args:
        raw: the row, or an InputError that says why there is no row.

    Raises:
        InputError: the row has neither form, its image marks do not match its images, or `raw` is an error.
    """
    if isinstance(raw, InputError):
        raise raw
    if not isinstance(raw, dict):
        raise InputError(f"a record must be a mapping, got a {type(raw).__name__}")
    _check_keys(raw)
    if "conversations" in raw:
        return _parse_conversation(raw)
    path, caption = raw["image_path"], raw["prompt"]
    caption = _unicode(caption, "prompt") if isinstance(caption, str) else ""
    if not isinstance(path, str) or not path or not caption.strip():
        raise InputError("image_path and prompt must be non-empty texts")
    if LLAVA_MARK in caption:
        raise InputError(
            f"prompt must describe the picture in words, got the mark {LLAVA_MARK}; remove it, or write the record "
            "with conversations"
        )
    return Record(((Path(path),),), caption=caption)


def _check_keys(raw: dict) -> None:
    """Raises InputError unless a row has one form, and no keys with a meaning in other formats."""
    mixed = all(form & set(raw) for form in _FORMS)
    if not mixed:
        for key in set(raw).difference(*_FORMS):
            if meant := _meant(key.lower()):
                raise InputError(
                    f"a record must not have the key {key!r}, which is not read; use {meant}, or remove it"
                )
    if mixed or not ("conversations" in raw or _FORMS[1] <= set(raw)):
        raise InputError(f"a record has `conversations` and `image`, or `image_path` and `prompt`; got {_shown(raw)}")


@lru_cache(maxsize=4096)
def _meant(key: str) -> str | None:
    """The key to write instead of one that is not read; None for metadata."""
    close = difflib.get_close_matches(key, sorted(set().union(*_FORMS)), n=1, cutoff=_SIMILAR)
    return _OTHERS.get(key) or (close[0] if close else None)


def _shown(keys: Iterable[str]) -> str:
    return ", ".join(sorted(keys))[:200] or "nothing"


def _unicode(text: str, where: str) -> str:
    """The text without a byte order mark, which another program may have copied from a file.

    Raises:
        InputError: a JSON escape gives half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where} must be Unicode text, got half of a character (\\u{ord(text[error.start]):04x}); correct it"
        ) from None
    return text.removeprefix("\ufeff")


def parse_prompt(raw: object) -> Record:
    """Parses a conversation whose last turn is the human's, which the model is to answer.

    It has the keys `conversations` and `image` as a record, and no others. Each image has one file.

    Raises:
        InputError: `raw` has another form, or its image marks do not match its images.
    """
    if not isinstance(raw, dict):
        raise InputError(f"a conversation must be a mapping, got a {type(raw).__name__}")
    if unknown := set(raw) - _FORMS[0]:
        raise InputError(f"a conversation has the keys conversations and image only, got {_shown(unknown)}; remove it")
    if "conversations" not in raw:
        raise InputError(f"a conversation must have the key conversations, got {_shown(raw)}; add it")
    record = _parse_conversation(raw, fewest=1)
    if len(record.turns) % 2 == 0:
        raise InputError(f"the last turn must be the human's, got {len(record.turns)} turns; remove the answer")
    for number, turn in enumerate(raw["conversations"]):
        if unknown := set(turn) - {"from", "value"}:
            raise InputError(f"turn {number} has the keys from and value only, got {_shown(unknown)}; remove it")
    if any(len(panels) > 1 for panels in record.images):
        raise InputError("an entry of image must be a path here, got a list of panels; give one file an image")
    return record


def _parse_conversation(raw: dict, fewest: int = 2) -> Record:
    images = _image_paths(raw.get("image", []))
    texts = _turn_texts(raw["conversations"], fewest)
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks == 0 and images:  # as in the released code, images without marks precede the first human text
        texts[0] = f"{IMAGE_MARK} " * len(images) + texts[0]
    elif marks != len(images):
        raise InputError(
            f"{marks} {IMAGE_MARK} or {LLAVA_MARK} marks for {len(images)} images; write one mark an image, or none"
        )
    counter = iter(range(len(images)))
    turns = [(_TURNS[n % 2], tuple(_parts(text, counter))) for n, text in enumerate(texts)]
    return Record(images, tuple(turns))


def _image_paths(image: object) -> tuple[Panels, ...]:
    """Files of the images in `image` of a row: a path, a list of paths and of lists of panels, or null for none."""
    images = [image] if isinstance(image, str) else [] if image is None else image
    if not isinstance(images, list):
        raise InputError("image must be a path or a list, in which a list of paths is one picture's panels from above")
    stacks = [[entry] if isinstance(entry, str) else entry for entry in images]
    if not all(isinstance(stack, list) and stack and all(isinstance(path, str) for path in stack) for stack in stacks):
        raise InputError(
            f"an entry of image must be a path, or a list of the paths of its panels, got {str(images)[:200]}"
        )
    return tuple(tuple(map(Path, stack)) for stack in stacks)


def _turn_texts(turns: object, fewest: int) -> list[str]:
    """Texts of the turns, human and assistant in turn, with `<|image|>` as the only image mark."""
    if not isinstance(turns, list) or len(turns) < fewest:
        raise InputError(f"conversations must be a list of at least {'two turns' if fewest == 2 else 'one turn'}")
    texts = []
    for n, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role != _TURNS[n % 2] or not isinstance(turn.get("value"), str):
            raise InputError(f"turn {n} must be from {('human', 'gpt')[n % 2]} with a text as its value")
        for key in _OF_TURNS:
            if key in turn:
                raise InputError(f"turn {n} must not have the key {key!r}, which is not read; remove it")
        texts.append(_unicode(turn["value"], f"turn {n}").replace(LLAVA_MARK, IMAGE_MARK))
    return texts


def _parts(text: str, counter) -> list[str | int]:
    """Texts between the image marks, and the next numbers of `counter` for the marks."""
    pieces = re.split(f"({re.escape(IMAGE_MARK)})", text)
    return [next(counter) if piece == IMAGE_MARK else piece for piece in pieces if piece]


def is_plain(seed: int, record: int, family: Family = SECOND) -> bool:
    """Whether the instruction of a text-to-image record leaves out the image size.

    One in ten does so in the second generation, none in the first.

    Args:
        seed: seed of the pre-tokenization. Seed and record determine the result.
        record: index of the record in the input.
        family: family of the checkpoint.
    """
    return uniform(seed, "plain", record) < family.plain_share


def require_no_panels(record: Record, family: Family) -> None:
    """Raises an error if an image of a record has several panels, and the model's images have none.

    Raises:
        InputError: as above.
    """
    stack = next((image for image in record.images if len(image) > 1), None)
    if stack and not family.has_panels:
        raise InputError(
            f"an image of {family.name} has no panels, got a list of {len(stack)} files for one image; list them as "
            f"images of their own, with one {IMAGE_MARK} each"
        )


def conversation(
    record: Record, codes: list[Tensor], sizes: list[tuple[int, int]], plain: bool
) -> list[tuple[str, list[str | Tensor]]]:
    """The turns of a record as (role, parts), for `unirep.encode_conversation`. A part is a text or a code grid.

    Args:
        record: the record to convert.
        codes: code grid of each image.
        sizes: (width, height) of each image after the crop, in pixels.
        plain: leave the size out of a text-to-image instruction.

    Shapes: each code grid (rows, cols).
    """
    if record.caption is not None:
        width, height = sizes[0]
        instruction = (
            prompts.text_to_image_plain(record.caption)
            if plain
            else prompts.text_to_image(record.caption, width, height)
        )
        return [("human", [instruction]), ("assistant", [codes[0]])]
    return [(role, [codes[part] if isinstance(part, int) else part for part in parts]) for role, parts in record.turns]
