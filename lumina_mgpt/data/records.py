"""What a user writes down about a picture, in both accepted forms, as one conversation."""

import re
from dataclasses import dataclass
from pathlib import Path

from lumina_mgpt import prompts
from lumina_mgpt.data.seeding import unit
from lumina_mgpt.errors import InputError

IMAGE_MARK = "<|image|>"
PLAIN_SHARE = 0.1  # of the text-to-image instructions, as released, do not name the size
ROLES = {"human": "human", "gpt": "assistant", "assistant": "assistant"}


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

    Raises:
        InputError: the row has neither form, or its image marks and images do not match.
    """
    if not isinstance(raw, dict):
        raise InputError(f"a record must be a mapping, got a {type(raw).__name__}")
    if "conversations" in raw:
        return _parse_conversation(raw)
    if "image_path" in raw and "prompt" in raw:
        path, caption = raw["image_path"], raw["prompt"]
        if not isinstance(path, str) or not isinstance(caption, str) or not caption.strip():
            raise InputError("image_path and prompt must be non-empty texts")
        return Record(((Path(path),),), caption=caption)
    raise InputError(f"a record has `conversations` and `image`, or `image_path` and `prompt`; got {sorted(raw)}")


def _parse_conversation(raw: dict) -> Record:
    images = raw.get("image", [])
    images = [images] if isinstance(images, str) else images
    turns = raw["conversations"]
    if not isinstance(images, list):
        raise InputError("image must be a path or a list, in which a list of paths is one picture's panels from above")
    stacks = [[image] if isinstance(image, str) else image for image in images]
    if not all(isinstance(stack, list) and stack and all(isinstance(path, str) for path in stack) for stack in stacks):
        raise InputError(f"an entry of image must be a path, or a list of the paths of its panels, got {images}")
    if not isinstance(turns, list) or len(turns) < 2:
        raise InputError("conversations must be a list of at least two turns")
    texts = []
    for n, turn in enumerate(turns):
        role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
        if role != ("human", "assistant")[n % 2] or not isinstance(turn.get("value"), str):
            raise InputError(f"turn {n} must be from {('human', 'gpt')[n % 2]} with a text as its value")
        texts.append(turn["value"])
    marks = sum(text.count(IMAGE_MARK) for text in texts)
    if marks == 0 and images:  # as released, an unmentioned image goes before the first human text
        texts[0] = f"{IMAGE_MARK} " * len(images) + texts[0]
    elif marks != len(images):
        raise InputError(f"{marks} {IMAGE_MARK} marks for {len(images)} images; write one mark an image, or none")
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
