"""What the rows of the demo's evaluation share: the checkpoint, batches of pictures and of answers, contact sheets."""

import argparse
import random
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import evaluation
import numpy as np
import torch
from evaluation import Mean, Share
from finder import Finder
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.describing import answer_prompts
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.unirep import ImageLayout, Turn, generation_prompt

Figures = dict[str, Share | Mean]
Size = tuple[int, int]  # width and height in pixels

_BATCH = 30  # pictures, or answers, in a batch
_WORDS = 64  # ids of an answer at most
_ON_SHEET = 16


@dataclass
class Bench:
    """The checkpoint in the evaluation.

    Attributes:
        pictures: emoji by name.
        names: names that the demo knows; `unknown` are some that training never mentions.
        count: examples of a row.
        args: options of the evaluation: `cfg`, `seed` and `out_dir` are read.
    """

    pipeline: Pipeline
    pictures: dict[str, np.ndarray]
    names: list[str]
    unknown: Sequence[str]
    count: int
    args: argparse.Namespace

    @cached_property
    def finder(self) -> Finder:
        """What finds the known emoji in pictures."""
        return Finder(self.pictures, self.names)

    def rng(self, row: str) -> random.Random:
        """Random numbers of a row, independent of other rows."""
        return random.Random(f"{self.args.seed} {row}")

    # -- pictures ------------------------------------------------------------------------------------------------------

    def codes_of(self, image: Image.Image) -> Tensor:
        """Codes (rows, cols) of a picture whose sides are multiples of 32."""
        return self.pipeline.image_tokenizer.encode([image])[0]

    def shown(self, codes: Tensor) -> Image.Image:
        """The picture of codes (rows, cols)."""
        return self.pipeline.image_tokenizer.decode(codes[None])[0]

    def through_tokenizer(self, image: Image.Image, panels: int = 1) -> Image.Image:
        """The picture after encoding and decoding: the best that the model can give."""
        tokenizer, parts = self.pipeline.image_tokenizer, self.pipeline.checkpoint.config.parts(panels)
        return tokenizer.decode(tokenizer.encode([image], parts), parts)[0]

    def answered_in_pictures(
        self, asked: Sequence[Sequence[Turn]], sizes: Sequence[Size], label: str, **sampling: float
    ) -> list[Tensor]:
        """Codes (rows, cols) of the picture that answers each conversation, in order.

        Args:
            asked: conversations that end with a turn of the human; images are codes.
            sizes: (width, height) of each answer.
            label: name on the progress bar.
            sampling: values of `SamplingConfig` in place of those of the evaluation.
        """
        vocabulary, found = self.pipeline.checkpoint.vocabulary, dict[int, Tensor]()
        with tqdm(total=len(asked), desc=label, unit="picture", mininterval=cli.bar_interval()) as bar:
            for part in _batches(sizes):
                starts = [generation_prompt(asked[n], vocabulary) for n in part]
                layout = ImageLayout.from_pixels(vocabulary, *sizes[part[0]])
                usual = {"cfg": self.args.cfg, "seed": self.args.seed + part[0]}
                settings = SamplingConfig(**usual | sampling)
                codes = self.pipeline.sample(starts, layout, settings, range(len(part)))
                found.update(zip(part, codes, strict=True))
                bar.update(len(part))
        return [found[n] for n in range(len(asked))]

    # -- words ---------------------------------------------------------------------------------------------------------

    def answered_in_words(self, asked: Sequence[Sequence[Turn]], label: str) -> list[str]:
        """The words of the most probable answer to each conversation, among answers without images."""
        vocabulary, found = self.pipeline.checkpoint.vocabulary, dict[int, str]()
        settings = SamplingConfig(text_top_k=1)
        prompts = [generation_prompt(turns, vocabulary) for turns in asked]
        lengths = [(len(prompt) // 64, 0) for prompt in prompts]  # rows of a batch have similar lengths
        with tqdm(total=len(asked), desc=label, unit="answer", mininterval=cli.bar_interval()) as bar:
            for part in _batches(lengths):
                answers = answer_prompts(self.pipeline, [prompts[n] for n in part], settings, _WORDS, [0] * len(part))
                for n, ids in zip(part, answers, strict=True):
                    found[n] = vocabulary.decode_text(ids).strip()
                bar.update(len(part))
        return [found[n] for n in range(len(asked))]

    @torch.inference_mode()
    def begins_with_picture(self, asked: Sequence[Sequence[Turn]]) -> list[bool]:
        """Whether the most probable answer to each conversation begins with an image, not with words."""
        vocabulary, model = self.pipeline.checkpoint.vocabulary, self.pipeline.model
        allowed, found = vocabulary.text_mask(images=True), []
        for turns in asked:
            row = torch.tensor([generation_prompt(turns, vocabulary)], device=self.pipeline.device)
            logits = model.project(model(row)[0, -1:], None)[0].float().cpu()
            found.append(int(logits.where(allowed, -torch.inf).argmax()) == vocabulary.image_start_id)
        return found

    # -- sheets --------------------------------------------------------------------------------------------------------

    def sheet(self, row: str, images: Sequence[Image.Image], captions: Sequence[str], most: int = _ON_SHEET) -> None:
        """Writes a contact sheet with the first pictures of a row, at most `most`, eight side by side."""
        sheet = evaluation.contact_sheet(list(images[:most]), list(captions[:most]), 8)
        sheet.save(self.args.out_dir / f"{row.replace(' ', '_')}.png", optimize=True)


Row = Callable[[Bench], Figures]


def share(right: Iterable[bool]) -> Share:
    """The share of true values."""
    values = list(right)
    return Share(sum(values), len(values))


def most_frequent(answers: Sequence[str]) -> Share:
    """What always giving the most frequent answer would score."""
    return Share(Counter(answers).most_common(1)[0][1], len(answers))


def _batches(keys: Sequence[Size]) -> Iterable[list[int]]:
    """Indices of at most _BATCH entries with equal keys."""
    for key in sorted(set(keys)):
        same = [n for n, other in enumerate(keys) if other == key]
        yield from (same[start : start + _BATCH] for start in range(0, len(same), _BATCH))
