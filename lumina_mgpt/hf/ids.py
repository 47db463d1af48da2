"""Ids as transformers passes them between processor, model and pipelines: rows with pads, in which images may begin."""

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.checks import excerpt, whole_number
from lumina_mgpt.errors import InputError
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.unirep import HEADER, ImageLayout, Status, UniRepError, split, status
from lumina_mgpt.vocabulary import TURN_END, Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer


def unpadded(input_ids: Tensor, attention_mask: Tensor | None, vocabulary: Vocabulary) -> list[list[int]]:
    """Returns the ids of each row without pads.

    Shapes: input_ids, attention_mask (B, T) or (T,).

    Raises:
        InputError: the shapes differ, a row is empty, or an id is not of the vocabulary.
    """
    if isinstance(input_ids, Tensor) and input_ids.dim() == 1:
        input_ids = input_ids[None]
        attention_mask = None if attention_mask is None else attention_mask[None]
    rows = require_shapes(input_ids, attention_mask=attention_mask).tolist()
    if attention_mask is not None:
        masks = attention_mask.tolist()
        rows = [[id_ for id_, real in zip(*pair, strict=True) if real] for pair in zip(rows, masks, strict=True)]
    for row in rows:
        if not row or not 0 <= min(row) <= max(row) < vocabulary.vocab_size:
            got = f"{min(row)} ... {max(row)}" if row else "an empty row"
            raise InputError(f"must be ids in 0 ... {vocabulary.vocab_size - 1}, got {got}", "input_ids")
    return rows


def require_shapes(input_ids: Any, **others: Tensor | None) -> Tensor:
    """Returns `input_ids`, and checks that other tensors have its shape.

    Raises:
        InputError: `input_ids` is no tensor (B, T) of ids, or a tensor in `others` has another shape.
    """
    if not isinstance(input_ids, Tensor) or input_ids.dim() != 2 or input_ids.is_floating_point():
        got = str(tuple(input_ids.shape)) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InputError(f"must be a tensor of ids (B, T), got {got}; use the processor's", "input_ids")
    for name, tensor in others.items():
        if tensor is not None and tensor.shape != input_ids.shape:
            rule = f"must have the shape of input_ids, {tuple(input_ids.shape)}"
            raise InputError(f"{rule}, got {tuple(tensor.shape)}; use the processor's", name)
    return input_ids


def rows_of(ids: Any, parameter: str = "generated_outputs") -> list[list[int]]:
    """Returns rows of ids, given as a tensor, an array or lists, which may have different lengths.

    Raises:
        InputError: they are something else.
    """
    try:
        rows = [torch.as_tensor(row) for row in ids]
        known = all(row.dim() == 1 and (not len(row) or not row.is_floating_point()) for row in rows)
    except (TypeError, ValueError, RuntimeError):
        known = False
    if not known:
        raise InputError(f"must be rows of ids, got {excerpt(ids)}; pass what generate() returns", parameter)
    return [row.tolist() for row in rows]


def padded(rows: Sequence[Sequence[int]], pad: int, left: bool = False, length: int = 0) -> Tensor:
    """Returns rows of ids as one tensor (B, T), with pads at the right, or at the left.

    Args:
        length: least length of a row.
    """
    length = max(length, *map(len, rows))
    pads = [[pad] * (length - len(row)) for row in rows]
    return torch.tensor([[*fill, *row] if left else [*row, *fill] for fill, row in zip(pads, rows, strict=True)])


def begun_image(row: Sequence[int], vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Returns the ids before the incomplete image at the end of a row, and those of the image; there may be none."""
    if status(row, vocabulary) is Status.TEXT:
        return list(row), []
    at = len(row) - 1 - list(row)[::-1].index(vocabulary.image_start_id)
    return list(row[:at]), list(row[at:])


def begun_layout(image: Sequence[int], vocabulary: Vocabulary) -> tuple[ImageLayout, Tensor]:
    """Returns the layout of an image that has begun, and its codes so far.

    Args:
        image: ids of the image, at least the header.

    Shapes: -> codes (layout.given,).

    Raises:
        InputError: they are not the first ids of an image, or no code is missing.
    """
    try:
        if len(image) < HEADER:
            raise ValueError("a grid size is missing")
        rows, cols = (vocabulary.grid_size(id_) for id_ in image[1:HEADER])
        ids = torch.tensor(image[HEADER:], dtype=torch.long)
        codes = vocabulary.id_to_code(ids[vocabulary.is_code(ids)])
        whole = ImageLayout(vocabulary, rows, cols)
        if len(codes) >= whole.num_codes:
            raise ValueError("no code is missing")
        layout = ImageLayout(vocabulary, rows, cols, len(codes))
        if layout.fill(codes)[: len(image)].tolist() != list(image):
            raise ValueError("the row ends are not where the grid size puts them")
    except ValueError as error:
        raise InputError(
            f"must end with the first ids of an image: {error}; use the processor's", "input_ids"
        ) from None
    return layout, codes


def text_of(ids: Sequence[int], vocabulary: Vocabulary, turn_ends: bool = False) -> str:
    """Returns ids as text, with `<|image|>` in the place of each image.

    Args:
        turn_ends: whether the text has the names of turn ends. The processor reads such a text as a conversation.
    """
    complete, begun = begun_image(ids, vocabulary)
    text = ""
    try:
        parts = split(complete, vocabulary)
    except UniRepError as error:
        raise InputError(f"must hold complete images: {error}", "ids") from None
    for part in parts:
        text += PICTURE if isinstance(part, Tensor) else _runs(part, vocabulary, turn_ends)
    return text + (PICTURE if begun else "")


def decode_last_image(
    ids: Sequence[int], checkpoint: Checkpoint, tokenizer: ImageTokenizer, panels: int = 1
) -> Image.Image:
    """Returns the last image of a row of ids.

    Args:
        panels: number of panels of the image.

    Raises:
        InputError: the row holds no image, or a wrong one.
    """
    try:
        grids = [part for part in split(begun_image(ids, checkpoint.vocabulary)[0], checkpoint.vocabulary)]
    except UniRepError as error:
        raise InputError(f"must hold complete images: {error}", "ids") from None
    images = [part for part in grids if isinstance(part, Tensor)]
    if not images:
        raise InputError("must hold an image, got none; pass what generate(generation_mode='image') returns", "ids")
    height = len(images[-1])
    rule = "must be the number of panels of the image, of equal height"
    if height % whole_number("panels", panels, 1, height, rule):
        raise InputError(f"{rule}, got {panels}", "panels")
    return tokenizer.decode(images[-1][None], checkpoint.config.parts(panels))[0]


def _runs(ids: Sequence[int], vocabulary: Vocabulary, turn_ends: bool) -> str:
    """Returns the text of ids without images, turn by turn."""
    turns: list[list[int]] = [[]]
    for id_ in ids:
        if id_ == vocabulary.turn_end_id:
            turns.append([])
        else:
            turns[-1].append(id_)
    return (TURN_END if turn_ends else "").join(vocabulary.decode_text(turn) for turn in turns)
