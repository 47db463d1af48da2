"""Uni-Rep: images and text as one sequence of ids, and the layout of an image in it.

An image is `start grid_rows grid_cols row row ... end`. A row is its codes, then a row end. A conversation is
`bos turn turn_end turn turn_end ...` without role names; turns of the human and the assistant alternate.

Source: Lumina-mGPT (arXiv 2408.02657), section 2; Lumina-mGPT 2.0 (arXiv 2507.17801).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property

import torch
from torch import Tensor

from lumina_mgpt.checks import require
from lumina_mgpt.errors import InputError
from lumina_mgpt.vocabulary import GRID_UNIT, Vocabulary

HEADER = 3  # start, grid_rows, grid_cols
IGNORED = -100  # label of an id without a loss; the default of torch's cross entropy

Turn = tuple[str, Sequence["str | Tensor"]]  # role, "human" or "assistant", and its texts and (rows, cols) code grids


class UniRepError(ValueError):
    """An error in the ids or codes of an image.

    Attributes:
        position: index of the first wrong id, or the length of the sequence if ids are missing at its end.
        reason: what is wrong.
    """

    def __init__(self, position: int, reason: str) -> None:
        super().__init__(f"position {position}: {reason}")
        self.position, self.reason = position, reason


@dataclass(frozen=True)
class ImageLayout:
    """The ids of one image: which are forced by its size, and which are codes, given or sampled.

    A position is the index of a code in reading order. An offset is the index of an id, counted from image start. The
    first `given` codes are known: in an image-to-image task, the upper panel. The others are sampled.

    Args:
        grid_rows, grid_cols: size in grid units of 32 pixels, 1 ... vocabulary.max_grid.
        given: number of given codes, 0 ... rows · cols.
        panels: number of equal panels, one above another; the ids do not depend on it.

    Raises:
        InputError: the tokenizer has no name for the size.
    """

    vocabulary: Vocabulary
    grid_rows: int
    grid_cols: int
    given: int = 0
    panels: int = 1

    def __post_init__(self) -> None:
        self.vocabulary.grid_id(self.grid_rows), self.vocabulary.grid_id(self.grid_cols)
        assert 0 <= self.given <= self.num_codes, self.given

    @classmethod
    def from_pixels(
        cls, vocabulary: Vocabulary, width: int, height: int, *, panels: int = 1, given_panels: int = 0
    ) -> "ImageLayout":
        """Layout of an image of `width` × `height` pixels with equal panels, the first `given_panels` of them given.

        Raises:
            InputError: width is not a multiple of 32, height is not a multiple of 32 · panels, or the tokenizer has no
                id for one of the sides.
        """
        largest = vocabulary.max_grid * GRID_UNIT
        _check_side("width", width, GRID_UNIT, largest)
        _check_side("height", height, GRID_UNIT * panels, largest)
        given = (height // vocabulary.cell) * (width // vocabulary.cell) * given_panels // panels
        return cls(vocabulary, height // GRID_UNIT, width // GRID_UNIT, given, panels)

    @property
    def rows(self) -> int:
        return self.vocabulary.cells * self.grid_rows

    @property
    def cols(self) -> int:
        return self.vocabulary.cells * self.grid_cols

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the image in pixels."""
        return GRID_UNIT * self.grid_cols, GRID_UNIT * self.grid_rows

    @property
    def num_codes(self) -> int:
        return self.rows * self.cols

    @property
    def length(self) -> int:
        """Number of ids of the image, start and end included."""
        return image_length(self.grid_rows, self.grid_cols, self.vocabulary)

    @cached_property
    def ids(self) -> Tensor:
        """The forced ids, and -1 for each code. Shapes: (length,)."""
        vocabulary = self.vocabulary
        header = [vocabulary.image_start_id, vocabulary.grid_id(self.grid_rows), vocabulary.grid_id(self.grid_cols)]
        body = torch.full((self.rows, self.cols + 1), -1)
        body[:, -1] = vocabulary.row_end_id
        return torch.cat([torch.tensor(header), body.flatten(), torch.tensor([vocabulary.image_end_id])])

    @cached_property
    def code_offsets(self) -> Tensor:
        """Offset of each code in reading order. Shapes: (rows · cols,)."""
        return (self.ids < 0).nonzero().flatten()

    @property
    def prefix_length(self) -> int:
        """Number of ids before the first sampled code."""
        return self.offset_of(self.given) if self.given < self.num_codes else self.length

    def offset_of(self, position: int) -> int:
        """Offset of the code at a position: `code_offsets[position]` as an int."""
        return HEADER + position + position // self.cols

    def fill(self, codes: Tensor) -> Tensor:
        """Ids of an image, from image start to just before the first code that is still missing.

        If `codes` holds all codes, these are the ids of the whole image.

        Args:
            codes: the first n codes in reading order, n in 0 ... rows · cols.

        Shapes: codes (..., n) -> ids (..., m), where m is the number of ids.
        Ranges: codes in [0, num_image_codes).
        """
        n = codes.shape[-1]
        stop = self.offset_of(n) if n < self.num_codes else self.length
        ids = self.ids[:stop].to(codes.device).expand(*codes.shape[:-1], stop).clone()
        ids[..., self.code_offsets[:n].to(codes.device)] = self.vocabulary.code_to_id(codes)
        return ids


def image_length(grid_rows: int, grid_cols: int, vocabulary: Vocabulary) -> int:
    """Returns the number of ids of an image of this size in grid units, start and end included."""
    return HEADER + vocabulary.cells * grid_rows * (vocabulary.cells * grid_cols + 1) + 1


class Status(Enum):
    """What the next id of an answer is."""

    TEXT = "text, or a control id between texts and images"
    HEADER = "a grid size of an image"
    IMAGE = "any other id of an image"


def status(ids: Sequence[int], vocabulary: Vocabulary) -> Status:
    """Returns what follows these ids of an answer. Source: arXiv 2408.02657, appendix F."""
    for back, id_ in enumerate(reversed(ids)):
        if id_ == vocabulary.image_end_id:
            return Status.TEXT
        if id_ == vocabulary.image_start_id:
            return Status.HEADER if back < HEADER - 1 else Status.IMAGE
    return Status.TEXT


def split(ids: Sequence[int], vocabulary: Vocabulary) -> list[list[int] | Tensor]:
    """Splits ids into runs of text and control ids, and the codes (rows, cols) of the images between them.

    Raises:
        UniRepError: the ids of an image are wrong or incomplete. Its position counts from the first of `ids`.
    """
    parts: list[list[int] | Tensor] = []
    at = 0
    while at < len(ids):
        begin = _find(ids, vocabulary.image_start_id, at)
        if begin > at:
            parts.append(list(ids[at:begin]))
        if begin == len(ids):
            break
        at = min(len(ids), _find(ids, vocabulary.image_end_id, begin) + 1)
        try:
            parts.append(decode_image(ids[begin:at], vocabulary))
        except UniRepError as error:
            raise UniRepError(begin + error.position, error.reason) from None
    return parts


def encode_image(codes: Tensor, vocabulary: Vocabulary) -> list[int]:
    """Ids of the image with these codes.

    Shapes: codes (rows, cols), both multiples of `vocabulary.cells`. Ranges: codes in [0, num_image_codes).

    Raises:
        UniRepError: the shape is not that of a grid, or a code is out of range.
    """
    return _layout_of(codes, vocabulary).fill(_flat(codes, vocabulary)).tolist()


def decode_image(ids: Sequence[int] | Tensor, vocabulary: Vocabulary) -> Tensor:
    """Codes (rows, cols) of one image from its ids, image start to image end.

    Raises:
        UniRepError: the ids are not those of one image. The message has the first wrong id and the expected one.
    """
    ids = torch.as_tensor(ids, dtype=torch.long).flatten()
    layout = _read_header(ids, vocabulary)
    shared = min(len(ids), layout.length)
    expected, found = layout.ids[:shared].to(ids.device), ids[:shared]
    wrong = torch.where(expected < 0, ~vocabulary.is_code(found), found != expected).nonzero().flatten()
    if len(wrong):
        raise _mismatch(layout, int(wrong[0]), int(ids[wrong[0]]))
    if len(ids) < layout.length:
        whole = f"a grid of {layout.grid_rows}×{layout.grid_cols} has {layout.length} ids"
        raise UniRepError(len(ids), f"the image is incomplete: expected {_expected(layout, len(ids))}; {whole}")
    if len(ids) > layout.length:
        raise UniRepError(layout.length, f"{vocabulary.describe(int(ids[layout.length]))} after the image's end")
    return vocabulary.id_to_code(ids[layout.code_offsets.to(ids.device)]).view(layout.rows, layout.cols)


def encode_conversation(turns: Sequence[Turn], vocabulary: Vocabulary) -> tuple[list[int], list[int]]:
    """Ids and labels of a conversation: bos, then the turns, each followed by a turn end.

    In an assistant turn and its turn end, the label of an id is the id itself. All other labels are -100.

    Raises:
        InputError: the first turn is not the human's, the roles do not alternate, or a text contains a control name.
        UniRepError: the shape of a code grid is wrong, or a code is out of range.
    """
    ids, labels = [vocabulary.bos_id], [IGNORED]
    for index, (role, parts) in enumerate(turns):
        expected = ("human", "assistant")[index % 2]
        if role != expected:
            raise InputError(f"turn {index + 1} must be the {expected}'s, got {role!r}; human and assistant alternate")
        turn = encode_turn(parts, vocabulary)
        ids += turn
        labels += turn if role == "assistant" else [IGNORED] * len(turn)
    return ids, labels


def encode_turn(parts: Sequence["str | Tensor"], vocabulary: Vocabulary) -> list[int]:
    """Ids of one turn: its texts and code grids, then a turn end. Raises: as `encode_conversation`."""
    return [id_ for part in parts for id_ in _encode_part(part, vocabulary)] + [vocabulary.turn_end_id]


def turn_list(turns: Sequence[tuple[str, Sequence]]) -> list[tuple[str, list]]:
    """Returns the turns of a caller as (role, list of parts). A text in place of the parts is the only part.

    Raises:
        InputError: `turns` has another form.
    """
    rule = "must be a sequence of turns (role, parts), such as ('human', ['What is this?'])"
    require(isinstance(turns, Sequence) and not isinstance(turns, str), "turns", turns, rule)
    for turn in turns:
        pair = isinstance(turn, tuple | list) and len(turn) == 2 and isinstance(turn[1], Sequence)
        require(pair, "turns", turn, rule)
    return [(role, [parts] if isinstance(parts, str) else list(parts)) for role, parts in turns]


def generation_prompt(text: str | Sequence[Turn], vocabulary: Vocabulary) -> list[int]:
    """Ids of a prompt, which the model continues with the assistant's answer.

    Args:
        text: text of the human's turn, or several turns that end with one of the human.

    Raises:
        InputError: as for `encode_conversation`, or the last turn is the assistant's.
    """
    turns: Sequence[Turn] = [("human", [text])] if isinstance(text, str) else text
    if len(turns) % 2 == 0:
        raise InputError(f"a prompt must end with a turn of the human, got {len(turns)} turns; remove the answer")
    return encode_conversation(turns, vocabulary)[0]


def drop_context(
    ids: list[int], labels: list[int], vocabulary: Vocabulary, several: bool = False
) -> tuple[list[int], list[int]]:
    """Ids and labels of an unconditional training sample: the answer's image alone, without prompt and turn end.

    A sequence is returned unmodified unless the assistant's last turn ends in an image. One with a single image is also
    returned unmodified if that turn begins with text. Training drops the context of 10 % of the sequences, because
    classifier-free guidance needs a model that also samples without a prompt.

    Args:
        ids, labels: what `encode_conversation` returns.
        several: whether to drop the context of a sequence with several images too, which is then everything before the
            start of the last image. If not, such a sequence is returned unmodified.

    Source: Lumina-mGPT (arXiv 2408.02657) for several images; the
        released code of Lumina-mGPT 2.0 for a single one.
    """
    ends_in_image = ids[-2:] == [vocabulary.image_end_id, vocabulary.turn_end_id]
    images = ids.count(vocabulary.image_end_id)
    if not ends_in_image or (images > 1 and not several):
        return ids, labels
    if images > 1:
        start = len(ids) - 1 - ids[::-1].index(vocabulary.image_start_id)
        answered = labels[start] != IGNORED
        return (ids[start:-1], labels[start:-1]) if answered else (ids, labels)
    kept = [(id_, label) for id_, label in zip(ids[:-1], labels[:-1], strict=True) if label != IGNORED]
    if not kept or kept[0][0] != vocabulary.image_start_id:  # the answer has text before its image
        return ids, labels
    return [id_ for id_, _ in kept], [label for _, label in kept]


# -- details -----------------------------------------------------------------------------------------------------------


def _find(ids: Sequence[int], wanted: int, start: int) -> int:
    """Index of the first `wanted` id from `start` on; the number of ids if there is none."""
    return next((index for index in range(start, len(ids)) if ids[index] == wanted), len(ids))


def _check_side(parameter: str, pixels: int, unit: int, largest: int) -> None:
    largest -= largest % unit
    if pixels > 0 and pixels % unit:
        below, above = pixels - pixels % unit, pixels - pixels % unit + unit
        nearby = [str(side) for side in (below, above) if unit <= side <= largest] or [str(largest)]
        raise InputError(f"must be a multiple of {unit}, got {pixels}; try {' or '.join(nearby)}", parameter)
    if not unit <= pixels <= largest:
        nearest = min(max(pixels, unit), largest)
        raise InputError(f"must be {unit} to {largest} pixels, got {pixels}; try {nearest}", parameter)


def _encode_part(part: str | Tensor, vocabulary: Vocabulary) -> list[int]:
    return vocabulary.encode_text(part) if isinstance(part, str) else encode_image(part, vocabulary)


def _layout_of(codes: Tensor, vocabulary: Vocabulary) -> ImageLayout:
    if codes.dim() != 2:
        raise UniRepError(0, f"a code grid must have the shape (rows, cols), got {tuple(codes.shape)}")
    rows, cols = codes.shape
    unit = vocabulary.cells
    limit = vocabulary.max_grid * unit
    for position, what, count in ((1, "rows", rows), (2, "columns", cols)):
        if count % unit or not 0 < count <= limit:
            raise UniRepError(position, f"{what} must be a multiple of {unit} in {unit} ... {limit}, got {count}")
    return ImageLayout(vocabulary, rows // unit, cols // unit)


def _flat(codes: Tensor, vocabulary: Vocabulary) -> Tensor:
    try:
        vocabulary.code_to_id(codes)
    except ValueError as error:
        raise UniRepError(HEADER, str(error)) from None
    return codes.flatten()


def _read_header(ids: Tensor, vocabulary: Vocabulary) -> ImageLayout:
    sizes = []
    for position, expected in enumerate(("image start", "grid rows", "grid columns")):
        if position >= len(ids):
            raise UniRepError(position, f"the image is incomplete: expected {expected}")
        found = int(ids[position])
        try:
            if position:
                sizes.append(vocabulary.grid_size(found))
            elif found != vocabulary.image_start_id:
                raise ValueError
        except ValueError:
            raise UniRepError(position, f"expected {expected}, found {vocabulary.describe(found)}") from None
    return ImageLayout(vocabulary, *sizes)


def _row_and_column(layout: ImageLayout, offset: int) -> str:
    row, col = divmod(offset - HEADER, layout.cols + 1)
    return f"row {row}, column {col}"


def _expected(layout: ImageLayout, offset: int) -> str:
    forced = int(layout.ids[offset])
    return "an image code" if forced < 0 else layout.vocabulary.describe(forced)


def _mismatch(layout: ImageLayout, offset: int, found: int) -> UniRepError:
    vocabulary = layout.vocabulary
    if offset == layout.length - 1:
        return UniRepError(offset, f"expected image end after {layout.rows} rows, found {vocabulary.describe(found)}")
    hint = ""
    if layout.ids[offset] < 0 and found in (vocabulary.row_end_id, vocabulary.image_end_id):
        hint = f"; the row has fewer than {layout.cols} codes"
    elif layout.ids[offset] >= 0 and vocabulary.is_code(torch.tensor(found)):
        hint = f"; the row has more than {layout.cols} codes"
    expected, got = _expected(layout, offset), vocabulary.describe(found)
    return UniRepError(offset, f"{_row_and_column(layout, offset)}: expected {expected}, found {got}{hint}")
