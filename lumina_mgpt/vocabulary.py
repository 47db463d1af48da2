"""The vocabulary: converts text, image codes and grid sizes to ids and back. No other module contains an id."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, read_json, read_text
from lumina_mgpt.prompts import PICTURE

# Names in the released tokenizer. It uses reserved names of Chameleon's vocabulary for grid sizes and separators.
END_OF_TEXT = "<|endoftext|>"
IMAGE_START = "<racm3:break>"
IMAGE_END = "<eoss>"
ROW_END = "<reserved08799>"
TURN_END = "<reserved08706>"
# In the released tokenizer, never generated. Tokenizers trained here contain them to have the same names.
UNUSED_SEPARATORS = ("<reserved08796>", "<reserved08797>", "<reserved08798>")
# The released code adds the mark of a picture to the tokenizer at run time; it has no id here.
IMAGE_PLACEHOLDER = PICTURE
GRID_UNIT = 32  # side of a grid unit, pixels
REQUIRED_GRID = 64  # every tokenizer has names for the sizes 1 ... 64, the released one for more


def grid_name(size: int) -> str:
    """Name of the special token for a grid size. Ranges: size in 0 ... 91199, as the name has five digits."""
    return f"<reserved{8800 + size:05d}>"


def special_names() -> list[str]:
    """All special names that a tokenizer for this model must contain, in a fixed order."""
    grids = [grid_name(size) for size in range(1, REQUIRED_GRID + 1)]
    return [END_OF_TEXT, IMAGE_START, IMAGE_END, *UNUSED_SEPARATORS, ROW_END, *grids, TURN_END]


class Vocabulary:
    """Converts text, image codes and grid sizes to ids and back.

    Attributes:
        bos_id, image_start_id, image_end_id, row_end_id, turn_end_id: control ids.
        max_grid: the largest grid size such that the tokenizer has names for all sizes 1 ... max_grid.
        code_slice: slice of the image codes' ids. Samplers read only these logits.
        num_image_codes, vocab_size: as in the model's configuration.
        cell: side in pixels of the square that one image code stands for.
        cells: number of image codes along the side of a grid unit.

    Args:
        tokenizer: the text tokenizer, with the special names.
        bos: name of the id that begins a sequence.
        image_code_offset, num_image_codes: image code c has the id `image_code_offset + c`.
        vocab_size: number of rows of the embedding.
        cell: as the attribute.
        codes_are_named: whether the tokenizer has a name for each image code.
        source: name of the tokenizer in messages.

    Raises:
        InputError: the tokenizer lacks a special name. Or the id of a text or control token is that of an image code,
            or not below `vocab_size`.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        image_code_offset: int,
        num_image_codes: int,
        *,
        vocab_size: int,
        cell: int = 8,
        codes_are_named: bool = False,
        bos: str = END_OF_TEXT,
        source: str | Path = "the tokenizer",
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self.vocab_size = vocab_size
        self.cell, self.cells = cell, GRID_UNIT // cell
        self.num_image_codes = num_image_codes
        self.code_slice = slice(image_code_offset, image_code_offset + num_image_codes)
        self.bos_id = self._id_of(bos)
        self.image_start_id = self._id_of(IMAGE_START)
        self.image_end_id = self._id_of(IMAGE_END)
        self.row_end_id = self._id_of(ROW_END)
        self.turn_end_id = self._id_of(TURN_END)
        self._grid_ids = self._find_grids()
        self._grid_sizes = {id_: size for size, id_ in self._grid_ids.items()}
        self.max_grid = len(self._grid_ids)
        added = tokenizer.get_added_tokens_decoder()
        self._control_ids = {id_ for id_, token in added.items() if token.special} | self._used_special_ids()
        self._code_names = {_code_name(code): image_code_offset + code for code in range(num_image_codes)}
        if not codes_are_named:
            self._code_names = {}
        self._check_text_ids()

    @classmethod
    def from_folder(cls, folder: str | Path, config: ModelConfig) -> "Vocabulary":
        """The vocabulary of a checkpoint folder, from its `tokenizer.json`.

        The tokenizer's other files name bos; where they name none, eos takes its place.

        Raises:
            InputError: a file is missing or damaged, or the tokenizer does not fit `config`.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not os.path.lexists(path) and os.path.isdir(folder):
            raise InputError(f"{path} is missing; a checkpoint folder has config.json, safetensors and a tokenizer")
        text = read_text(path)
        try:
            tokenizer = Tokenizer.from_str(text)
        except Exception as error:  # tokenizers raises plain Exception for what it cannot parse
            raise InputError(f"{path} is not a tokenizer file ({cause(error)}); download it again") from None
        # The file may contain settings of its training, which would silently change prompts.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(
            tokenizer,
            config.image_code_offset,
            config.num_image_codes,
            vocab_size=config.vocab_size,
            cell=config.family.cell,
            codes_are_named=config.family.codes_are_named,
            bos=_bos_name(folder),
            source=path,
        )

    # -- text ----------------------------------------------------------------------------------------------------------

    def encode_text(self, text: str) -> list[int]:
        """Ids of a text, without bos and separators.

        Raises:
            InputError: the text contains the name of a control id, or is not valid Unicode.
        """
        try:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
        except (TypeError, UnicodeEncodeError):  # lone surrogates, from an argument or file that is not UTF-8
            raise InputError(f"the text must be valid Unicode, got {ascii(text)[:200]}; save it as UTF-8") from None
        for id_, token in zip(encoding.ids, encoding.tokens, strict=True):
            if id_ in self._control_ids or not self._usable(id_):
                raise InputError(_control_message(token, text))
        if IMAGE_PLACEHOLDER in text:
            raise InputError(_control_message(IMAGE_PLACEHOLDER, text))
        return encoding.ids

    def decode_text(self, ids: list[int]) -> str:
        """Text of ids, without the names of special tokens.

        Raises:
            ValueError: an id is an image code.
        """
        codes = [id_ for id_ in ids if self.code_slice.start <= id_ < self.code_slice.stop]
        if codes:
            raise ValueError(f"id {codes[0]} is an image code, not text")
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def text_stream(self) -> "TextStream":
        """Returns a decoder that takes the ids of one text one by one."""
        return TextStream(self._tokenizer)

    def text_mask(self, images: bool) -> Tensor:
        """Whether each id may occur in a generated text, (vocab_size,) bool.

        Image codes, row ends, image ends, grid ids and bos may not. Turn ends may.

        Differs from the reference: the released code allows all ids in a text.

        Args:
            images: whether image starts may occur.
        """
        banned = {self.bos_id, self.image_end_id, self.row_end_id, *self._grid_ids.values()}
        mask = self._mask(banned | (set() if images else {self.image_start_id})).logical_not()
        mask[self.code_slice] = False
        return mask

    def grid_mask(self, sizes: Iterable[int]) -> Tensor:
        """Whether each id is that of one of these grid sizes, (vocab_size,) bool."""
        return self._mask(self.grid_id(size) for size in sizes)

    def _mask(self, ids: Iterable[int]) -> Tensor:
        mask = torch.zeros(self.vocab_size, dtype=torch.bool)
        mask[list(ids)] = True
        return mask

    # -- grid sizes ----------------------------------------------------------------------------------------------------

    def grid_id(self, size: int) -> int:
        """Id of a grid size. Ranges: size in 1 ... max_grid, in grid units of 32 pixels.

        Raises:
            InputError: the tokenizer has no name for that size.
        """
        if size not in self._grid_ids:
            raise InputError(
                f"a side must be 1 to {self.max_grid} grid units of 32 pixels, got {size} ({self._source})"
            )
        return self._grid_ids[size]

    def grid_size(self, id_: int) -> int:
        """Grid size of an id.

        Raises:
            ValueError: the id is not a grid size.
        """
        if int(id_) not in self._grid_sizes:
            raise ValueError(f"id {int(id_)} is not a grid size")
        return self._grid_sizes[int(id_)]

    # -- image codes ---------------------------------------------------------------------------------------------------

    def code_to_id(self, codes: Tensor) -> Tensor:
        """Ids of image codes, in the shape of `codes`. Ranges: codes in [0, num_image_codes).

        Raises:
            ValueError: a code is out of range. The message has its value and index.
        """
        _check_range(codes, slice(0, self.num_image_codes), "image code")
        return codes.long() + self.code_slice.start

    def id_to_code(self, ids: Tensor) -> Tensor:
        """Image codes of ids, in the shape of `ids`.

        Raises:
            ValueError: an id is not an image code. The message has its value and index.
        """
        _check_range(ids, self.code_slice, "id of an image code")
        return ids.long() - self.code_slice.start

    def is_code(self, ids: Tensor) -> Tensor:
        """Whether each id is an image code, as a bool tensor of the same shape."""
        return (ids >= self.code_slice.start) & (ids < self.code_slice.stop)

    def describe(self, id_: int) -> str:
        """Meaning of an id, for messages."""
        named = {
            self.image_start_id: "image start",
            self.image_end_id: "image end",
            self.row_end_id: "row end",
            self.turn_end_id: "turn end",
            self.bos_id: "beginning of sequence",
        }
        if id_ in named:
            return named[id_]
        if id_ in self._grid_sizes:
            return f"grid size {self._grid_sizes[id_]}"
        if self.code_slice.start <= id_ < self.code_slice.stop:
            return f"image code {id_ - self.code_slice.start}"
        return f"id {id_}"

    # -- construction --------------------------------------------------------------------------------------------------

    def _id_of(self, name: str) -> int:
        try:
            id_ = self._tokenizer.token_to_id(name)
        except UnicodeEncodeError:  # lone surrogates in a file
            id_ = None
        if id_ is None:
            raise InputError(f"{self._source} has no token named {name}; use the checkpoint's own tokenizer")
        return id_

    def _find_grids(self) -> dict[int, int]:
        grids = {size: self._id_of(grid_name(size)) for size in range(1, REQUIRED_GRID + 1)}
        size = REQUIRED_GRID + 1
        # Only names with usable ids: a tokenizer may have more names than the embedding has rows.
        while (id_ := self._tokenizer.token_to_id(grid_name(size))) is not None and self._usable(id_):
            grids[size] = id_
            size += 1
        return grids

    def _usable(self, id_: int) -> bool:
        return id_ < self.vocab_size and not self.code_slice.start <= id_ < self.code_slice.stop

    def _used_special_ids(self) -> set[int]:
        named = (self.bos_id, self.image_start_id, self.image_end_id, self.row_end_id, self.turn_end_id)
        return {*named, *self._grid_ids.values()}

    def _check_text_ids(self) -> None:
        """Raises InputError for a text or control id that is an image code or not a row of the embedding.

        Names of image codes must have the ids of their codes. Other added names may have any id; `encode_text` refuses
        them.
        """
        for code_name, code_id in self._code_names.items():
            if (found := self._id_of(code_name)) != code_id:
                rule = f"{code_name!r} must have id {code_id}, got {found}"
                raise InputError(f"{self._source}: {rule}; use tokenizer and config.json of one checkpoint")
        text = self._tokenizer.get_vocab(with_added_tokens=False)
        used = list(text.items()) + [(self._tokenizer.id_to_token(id_), id_) for id_ in self._used_special_ids()]
        for name, id_ in used:
            if not self._usable(id_) and name not in self._code_names:
                codes = f"{self.code_slice.start} ... {self.code_slice.stop - 1}"
                raise InputError(
                    f"{self._source}: {name!r} has id {id_}, which must be below vocab_size = {self.vocab_size} and "
                    f"not among the image codes {codes}; use tokenizer and config.json of one checkpoint"
                )


class TextStream:
    """Decodes the ids of one text as they come, and gives out whole characters only.

    A byte-level tokenizer may split a character over several ids. All pieces together are the text that
    `Vocabulary.decode_text` returns for all ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._given = 0  # number of characters given out

    def feed(self, id_: int) -> str:
        """Returns the characters that this id completes; may be empty."""
        self._ids.append(id_)
        text = self._stream.step(self._tokenizer, id_) or ""
        self._given += len(text)
        return text

    def end(self) -> str:
        """Returns what is left of the text. An incomplete character becomes U+FFFD."""
        rest = self._tokenizer.decode(self._ids, skip_special_tokens=True)[self._given :]
        self._given += len(rest)
        return rest


def _bos_name(folder: Path) -> str:
    """Name of bos, or of eos for a tokenizer without bos, as in the released code."""
    settings: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = folder / name
        if not os.path.lexists(path):
            continue
        content = read_json(path)
        settings |= {key: value for key, value in content.items() if value is not None}
    for key in ("bos_token", "eos_token"):
        token = settings.get(key)
        if isinstance(token, dict):  # a serialized AddedToken
            token = token.get("content")
        if isinstance(token, str) and token:
            return token
    raise InputError(f"{folder / 'tokenizer_config.json'} has neither bos_token nor eos_token; add one of them")


def _code_name(code: int) -> str:
    """Name of an image code in tokenizers of the first generation: its digits as the letters A ... J.

    Source: `vocab.py` of Chameleon's released code.
    """
    return "IMGIMG" + "".join(chr(ord("A") + int(digit)) for digit in str(code)) + "Z"


def _check_range(values: Tensor, allowed: slice, what: str) -> None:
    wrong = (values < allowed.start) | (values >= allowed.stop)
    if wrong.any():
        index = wrong.nonzero()[0].tolist()
        value = values[tuple(index)].item()
        raise ValueError(f"{what} must be in {allowed.start} ... {allowed.stop - 1}, got {value} at {index}")


def _control_message(name: str, text: str) -> str:
    start = max(0, text.find(name))
    excerpt = re.sub(r"\s+", " ", text[max(0, start - 20) : start + len(name) + 20])
    return f"the text must not contain {name}, a control name of the model, got {excerpt!r}; remove or respell it"
