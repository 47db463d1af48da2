"""The processor for transformers: texts and pictures to ids, and ids to texts and pictures."""

import json
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from lumina_mgpt.answers import read_answer
from lumina_mgpt.checks import excerpt, require
from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.hf import files
from lumina_mgpt.hf.configuration import LuminaMGPTConfig
from lumina_mgpt.hf.ids import decode_last_image, padded, rows_of, text_of
from lumina_mgpt.hf.inputs import flat, picture_of, shares, texts_of
from lumina_mgpt.hf.messages import pictures_of, render
from lumina_mgpt.panels import encode_panels, encode_pictures, fit_pictures, turn_parts
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.prompts import PICTURE
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.unirep import IGNORED, ImageLayout, Turn, encode_conversation
from lumina_mgpt.vocabulary import TURN_END
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

Row = tuple[list[int], list[int]]  # ids and labels


class LuminaMGPTProcessor(ProcessorMixin):
    """Turns texts and pictures into ids, and ids into texts and pictures.

    It holds the image tokenizer, so that ids are complete: the model sees codes, never pixels. Janus and Emu3 give
    pixels to the model instead, which then replaces placeholder ids. Here, logits and loss are functions of the ids
    alone, and a data set can be tokenized once.

    Args:
        checkpoint: the files of the checkpoint.
        device: device of the image tokenizer.
    """

    model_input_names = ["input_ids", "attention_mask"]
    chat_template = None  # `apply_chat_template` needs none

    def __init__(self, checkpoint: Checkpoint, device: str | torch.device = "auto") -> None:
        self.checkpoint = checkpoint
        self.vocabulary = checkpoint.vocabulary
        self.device = resolve_device(device)

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *,
        device: str | torch.device = "auto",
        movqgan_path: str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> "LuminaMGPTProcessor":
        """Loads the tokenizers of a checkpoint, but no weights of the language model.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id.
            device: device of the image tokenizer, which is loaded at its first use.
            movqgan_path: file of the image tokenizer, if it is not in the folder.
            kwargs: `revision`, `token` and the like, for the hub.

        Raises:
            InputError: a file is missing or damaged.
        """
        folder = files.folder_of(pretrained_model_name_or_path, kwargs, weights=False)
        return cls(files.open_checkpoint(folder, movqgan_path), device)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> list[str]:
        """Writes tokenizer, image tokenizer and a `processor_config.json`; also config.json if there is none.

        Raises:
            InputError: a file cannot be written, or the folder should be pushed to the hub.
        """
        require(not push_to_hub, "push_to_hub", True, "must be False; push the folder with `hf upload`")
        folder = Path(save_directory)
        files.copy_files(self.checkpoint, folder)
        if not (folder / "config.json").exists():
            config = LuminaMGPTConfig.from_pretrained(self.checkpoint.folder)
            config.auto_map = dict(files.AUTO_MAP)
            config.save_pretrained(folder)
        (folder / "processor_config.json").write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return [str(file) for file in sorted(folder.iterdir())]

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoProcessor") -> None:
        """Does nothing: `save_pretrained` always writes an `auto_map`, and no copy of this module."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `processor_config.json`."""
        return {
            "processor_class": type(self).__name__,
            "auto_map": {"AutoProcessor": files.AUTO_MAP["AutoProcessor"]},
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.checkpoint.folder)!r})"

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The text tokenizer as a class of transformers, for code that asks for it. The processor uses `vocabulary`."""
        path, bos = str(self.checkpoint.folder / "tokenizer.json"), self.vocabulary.bos_id
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=path, padding_side="left")
        name = tokenizer.convert_ids_to_tokens(bos)
        tokenizer.bos_token, tokenizer.pad_token, tokenizer.eos_token = name, name, TURN_END
        return tokenizer

    @cached_property
    def image_tokenizer(self) -> ImageTokenizer:
        """The image tokenizer, loaded at its first use."""
        return files.image_tokenizer(self.checkpoint, self.device)

    # -- texts and pictures to ids -------------------------------------------------------------------------------------

    def __call__(
        self,
        text: str | Sequence[str] | None = None,
        images: Any = None,
        *,
        generation_mode: str = "text",
        height: int | None = None,
        width: int | None = None,
        task: str = "t2i",
        return_labels: bool = False,
        return_tensors: str | None = "pt",
        padding: bool | str = True,
        padding_side: str = "left",
        **others: Any,
    ) -> BatchFeature:
        """Returns `input_ids` and `attention_mask`, and with `return_labels` also `labels`.

        Args:
            text: turns of the human, or conversations as `apply_chat_template` writes them: turns of human and
                assistant, separated by turn ends. `<|image|>` stands for a picture.
            images: pictures (PIL, arrays, paths, URLs) or codes (rows, cols), for all marks in the order of the texts;
                or one list a text. Where a text of one turn has no marks, its pictures come before it. Pictures are
                cropped to the candidate size that fits best.
            generation_mode: "text" takes texts as they are. "image" takes them as prompts of `task`: it adds the
                instruction, and the start and size of the image.
            height, width, task: for "image", as the commands' options. Pictures are then the task's given pictures, one
                for all texts or one a text.
            return_labels: whether to return labels: the ids of assistants' turns, -100 elsewhere.
            return_tensors: "pt", or None for lists without pads.
            padding, padding_side: whether and where to add pads, "left" or "right".

        Shapes: all (B, T).

        Raises:
            InputError: an argument is unknown, a text or picture cannot be encoded, or marks and pictures do not match.
        """
        for name, value in others.items():
            require(value is None or value is False, name, excerpt(value), "must be left out; it is not supported")
        require(generation_mode in ("text", "image"), "generation_mode", generation_mode, "must be text or image")
        texts = texts_of(text, images)
        if generation_mode == "image":
            rows = [(ids, [IGNORED] * len(ids)) for ids in self._image_prompts(texts, images, height, width, task)]
        else:
            for name, side in (("height", height), ("width", width)):
                require(side is None, name, side, "must be left out without generation_mode=image")
            rows = [self._encode(*pair) for pair in zip(texts, shares(texts, images), strict=True)]
        features = [
            {"input_ids": ids, "attention_mask": [1] * len(ids)} | ({"labels": labels} if return_labels else {})
            for ids, labels in rows
        ]
        if return_tensors is None:
            return BatchFeature({name: [feature[name] for feature in features] for name in features[0]})
        require(padding in (True, False, "longest"), "padding", padding, "must be True (or longest) or False")
        require(return_tensors == "pt", "return_tensors", return_tensors, "must be pt or None")
        if not padding and len({len(ids) for ids, _ in rows}) > 1:
            raise InputError("must be True, because the texts have different lengths", "padding")
        return self.pad(features, padding_side)

    def pad(self, features: Sequence[Mapping[str, Any]], padding_side: str = "left") -> BatchFeature:
        """Returns examples of different lengths as one batch. A `transformers.Trainer` takes it as `data_collator`.

        Args:
            features: `input_ids` and maybe `attention_mask` and `labels` of each example, as lists or tensors (T,).

        Shapes: -> (B, T) each.
        """
        require(padding_side in ("left", "right"), "padding_side", padding_side, "must be left or right")
        rows = [{name: torch.as_tensor(row).tolist() for name, row in feature.items()} for feature in features]
        for row in rows:
            row.setdefault("attention_mask", [1] * len(row["input_ids"]))
        pads = {"input_ids": self.vocabulary.bos_id, "attention_mask": 0, "labels": IGNORED}
        left = padding_side == "left"
        return BatchFeature(
            {name: padded([row[name] for row in rows], pad, left) for name, pad in pads.items() if name in rows[0]}
        )

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        chat_template: None = None,
        *,
        tokenize: bool = False,
        continue_final_message: bool = False,
        add_generation_prompt: bool = False,
        return_dict: bool = True,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Returns a conversation, or each of a batch, as text or as ids.

        Args:
            conversation: messages with `role`, "user" or "assistant" in turn, and `content`: a text, or a list of
                `{"type": "text", "text": ...}` and `{"type": "image", "image": ...}`. An image is a picture, or, under
                the key `url`, `path` or `base64`, where it is; without any of these, a mark for a later call.
            tokenize: whether to return what a call of the processor returns; else the text for such a call.
            continue_final_message: whether the last message, the assistant's, is incomplete.
            add_generation_prompt: has no effect: the answer begins after the turn end of the last message.
            return_dict: False returns `input_ids` alone.
            processor_kwargs, kwargs: arguments of the processor's call.

        Raises:
            InputError: a message is malformed, or cannot be encoded.
        """
        require(chat_template is None, "chat_template", excerpt(chat_template), "must be left out")
        known = isinstance(conversation, Sequence) and not isinstance(conversation, str)
        require(known, "conversation", conversation, "must be a list of messages")
        single = not conversation or isinstance(conversation[0], Mapping)
        batch: Any = [conversation] if single else conversation
        texts = [render(messages, self.vocabulary, continue_final_message) for messages in batch]
        if not tokenize:
            return texts[0] if single else texts
        pictures = [pictures_of(messages) for messages in batch]
        arguments = {**kwargs, **(processor_kwargs or {})}
        if arguments.get("generation_mode") == "image":
            images: Any = [picture for row in pictures for picture in row] or None
        else:
            images = pictures if any(pictures) else None
        features = self(text=texts, images=images, **arguments)
        return features if return_dict else features["input_ids"]

    def _encode(self, text: str, images: Sequence[Any]) -> Row:
        """Returns ids and labels of one conversation."""
        pieces = text.split(TURN_END)
        closed = len(pieces) > 1 and not pieces[-1]
        pieces = pieces[:-1] if closed else pieces
        turns: list[Turn] = []
        given = iter(images)
        if len(pieces) > 1 and sum(piece.count(PICTURE) for piece in pieces) != len(images):
            raise InputError(f"must be as many as the text has marks {PICTURE}, got {len(images)}", "images")
        for index, piece in enumerate(pieces):
            share = list(images) if len(pieces) == 1 else [next(given) for _ in range(piece.count(PICTURE))]
            parts = [part if isinstance(part, str) else self._codes(part) for part in turn_parts(piece, share)]
            turns.append((("human", "assistant")[index % 2], parts))
        ids, labels = encode_conversation(turns, self.vocabulary)
        if not closed and len(turns) % 2 == 0:  # the assistant's turn goes on
            ids, labels = ids[:-1], labels[:-1]
        return ids, labels

    def _codes(self, picture: Any) -> Tensor:
        fitted = fit_pictures([picture], self.vocabulary, 1, self.checkpoint.config.base_size)
        if isinstance(fitted[0], Tensor):
            return fitted[0]
        return encode_pictures(fitted, self.image_tokenizer)[0]

    def _image_prompts(
        self, texts: Sequence[str], images: Any, height: int | None, width: int | None, task: str
    ) -> list[list[int]]:
        """Returns the ids of each prompt's instruction, and of its image as far as it is known."""
        texts = [text.removesuffix(TURN_END) for text in texts]
        if any(TURN_END in text for text in texts):
            raise InputError("must be one prompt each with generation_mode=image, got a conversation of turns", "text")
        given = [picture_of(image) for image in flat(images)]
        texts = [text.replace(PICTURE, "").strip() for text in texts] if given else texts
        request = GenerationRequest(
            texts, width, height, task=self.checkpoint.config.family.task(task, i2i=bool(given)), panels=given
        )
        prepared, starts = self.checkpoint.prepare(request, parameter="text"), None
        if prepared.pictures:
            codes = encode_pictures(prepared.pictures, self.image_tokenizer)
            starts = self.checkpoint.prompt_ids(texts, prepared.layout, request.task, pictures=codes, parameter="text")
        tokenizer: Any = self.image_tokenizer if prepared.panels else None
        panels = encode_panels(prepared.panels, prepared.layout, len(texts), tokenizer)
        begun = prepared.layout.fill(panels).tolist()
        return [list(start) + image for start, image in zip(starts or prepared.starts, begun, strict=True)]

    # -- ids to texts and pictures -------------------------------------------------------------------------------------

    def decode(self, token_ids: Any, skip_special_tokens: bool = True, **kwargs: Any) -> str:
        """Returns ids as text, with `<|image|>` in the place of each image.

        Args:
            token_ids: ids (T,), as list or tensor.
            skip_special_tokens: False shows the names of turn ends.
        """
        return text_of(torch.as_tensor(token_ids).tolist(), self.vocabulary, turn_ends=not skip_special_tokens)

    def batch_decode(self, sequences: Any, skip_special_tokens: bool = True, **kwargs: Any) -> list[str]:
        """Returns each row of ids as `decode` does."""
        return [self.decode(row, skip_special_tokens) for row in rows_of(sequences, "sequences")]

    def post_process_image_text_to_text(
        self, generated_outputs: Any, skip_special_tokens: bool = True, **kwargs: Any
    ) -> list[str]:
        """Returns each row of ids as `decode` does."""
        return self.batch_decode(generated_outputs, skip_special_tokens)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        panels: int = 1,
        **kwargs: Any,
    ) -> list[Any]:
        """Returns what ids stand for.

        Args:
            generated_outputs: rows of ids; for "image" also pixels, as `model.decode_image_tokens` returns them.
            generation_mode: "text" (or None) returns a text a row. "image" returns the picture (PIL) that ends each
                row. "any" returns a list of texts and pictures a row.
            panels: number of panels of an image, for "image", as the task has them.

        Shapes: generated_outputs (B, T), or (B, height, width, 3).

        Raises:
            InputError: the mode is unknown, or a row holds no image, or ids that are not those of an image.
        """
        if generation_mode in (None, "text"):
            return self.batch_decode(generated_outputs, skip_special_tokens)
        require(generation_mode in ("image", "any"), "generation_mode", generation_mode, "must be text, image or any")
        if generation_mode == "image" and isinstance(generated_outputs, Tensor) and generated_outputs.dim() == 4:
            return [Image.fromarray(pixels.cpu().numpy()) for pixels in generated_outputs]
        rows = rows_of(generated_outputs)
        if generation_mode == "any":
            return [self._parts(row) for row in rows]
        return [decode_last_image(row, self.checkpoint, self.image_tokenizer, panels) for row in rows]

    def preview(self, codes: Tensor, layout: ImageLayout) -> list[Image.Image]:
        """Returns pictures of unfinished images: see `Pipeline.preview`."""
        return Pipeline.preview(self, codes, layout)  # type: ignore[arg-type]  # it has what that method uses

    def _parts(self, ids: list[int]) -> list[str | Image.Image]:
        painter: Any = self
        parts = read_answer([id_ for id_ in ids if id_ != self.vocabulary.bos_id], "", painter).parts
        return [part if isinstance(part, str) else part.image for part in parts]
