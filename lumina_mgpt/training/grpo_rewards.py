"""Scores the images of a step with all rewards of a run."""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from lumina_mgpt.config import SamplingConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.scoring import QUESTION, Scorer, make_scorer, scores_of
from lumina_mgpt.training.grpo_objective import Inputs, image_inputs, padded
from lumina_mgpt.training.grpo_options import Reward
from lumina_mgpt.unirep import IGNORED, ImageLayout, encode_conversation
from lumina_mgpt.vocabulary import Vocabulary

# Inputs and possible ids -> log-probability of each target, from the frozen reference.
Likelihood = Callable[[Inputs, slice | None, SamplingConfig], Tensor]


class Rewards:
    """The rewards of a run.

    A reward of the model itself (`own`, `reading`, `bayes`) comes from the frozen reference. The trained model could
    raise its own reading without better images.

    Args:
        rewards: names and weights.
        batch: images that the reference reads together.
        by_code: whether scores are those of each code, which only `bayes` has.

    Raises:
        InputError: a function cannot be loaded.
    """

    def __init__(self, rewards: Sequence[Reward], batch: int, by_code: bool = False) -> None:
        self.rewards, self.batch, self.by_code = rewards, batch, by_code
        self.scorers = []
        for reward in rewards:
            try:
                self.scorers.append(make_scorer(reward.name))
            except InputError as error:
                raise InputError(error.message, "reward") from None

    @property
    def names(self) -> list[str]:
        return [reward.name for reward in self.rewards]

    @property
    def need_pictures(self) -> bool:
        """Whether a reward needs images, not only codes."""
        return any(scorer.function is not None for scorer in self.scorers)

    def check(self, prompt: str, size: tuple[int, int], family: Family) -> None:
        """Calls each function with two plain pictures, so that its faults are found before any sampling.

        Args:
            size: width and height of the pictures.

        Raises:
            InputError: a function raises, or does not return one finite number for each picture; or the model cannot
                give a reward of its own.
        """
        for scorer in self.scorers:
            if scorer.name == "reading" and not family.answers_in_text:
                raise InputError("reading needs a checkpoint that describes images; give bayes", "reward")
        pictures = [Image.new("RGB", size, color) for color in ("gray", "white")]
        for scorer in self.scorers:
            if scorer.function is not None:
                _call(scorer, pictures, [prompt] * 2)

    def of_functions(self, pictures: list[Image.Image], prompts: list[str]) -> list[Tensor | None]:
        """Returns the scores (B,) of each reward that is a function, and None for each other reward.

        Args:
            pictures: the decoded images; may be empty if `need_pictures` is false.
            prompts: the prompt of each image.

        Raises:
            InputError: a function fails, or does not return one finite number for each picture.
        """
        return [
            None if scorer.function is None else torch.tensor(_call(scorer, pictures, prompts), dtype=torch.float64)
            for scorer in self.scorers
        ]

    def with_own(
        self,
        found: list[Tensor | None],
        prompts: list[str],
        starts: Sequence[Sequence[int]],
        codes: Tensor,
        layout: ImageLayout,
        family: Family,
        likelihood: Likelihood,
    ) -> Tensor:
        """Returns the scores of all rewards for B images, without weights. All processes call the method together.

        With `by_code`, these are the scores of each code, whose sum is that of the image.

        Args:
            found: what `of_functions` returned.
            prompts: the prompt of each image.
            starts: its ids, up to image start.
            codes: codes of the images, (B, rows, cols), on the CPU.

        Shapes: -> (B, rewards), or (B, rewards, codes) with `by_code`, float64 on the CPU.
        """
        columns = []
        for scorer, scores in zip(self.scorers, found, strict=True):
            parts = [] if scores is None else [scores]
            for at in range(0, len(codes) if scores is None else 0, self.batch):
                span = slice(at, at + self.batch)
                if scorer.kind(family) == "reading":
                    parts.append(_reading(prompts[span], codes[span], layout.vocabulary, likelihood))
                else:
                    each = _bayes(starts[span], codes[span], layout, likelihood)
                    parts.append(each if self.by_code else each.sum(1))
            columns.append(torch.cat(parts))
        return torch.stack(columns, 1)

    def total(self, scores: Tensor) -> Tensor:
        """Returns the weighted sum of the scores. Shapes: (B, rewards, ...) -> (B, ...)."""
        weights = torch.tensor([reward.weight for reward in self.rewards], dtype=torch.float64)
        return torch.einsum("br...,r->b...", scores, weights)


def _call(scorer: Scorer, pictures: list[Image.Image], prompts: list[str]) -> tuple[float, ...]:
    assert scorer.function is not None
    try:
        return scores_of(scorer.function, scorer.name, pictures, prompts)
    except InputError as error:
        raise InputError(error.message, "reward") from error


def _bayes(starts: Sequence[Sequence[int]], codes: Tensor, layout: ImageLayout, likelihood: Likelihood) -> Tensor:
    """Returns log P(code | prompt, codes before) - log P(code | codes before) of each code, in nats.

    Their sum is `scoring.bayes_score`. A score is the change of log P(prompt | codes so far) by the code.

    Shapes: codes (B, rows, cols) -> (B, rows · cols).
    """
    columns = layout.vocabulary.code_slice
    settings = SamplingConfig(cfg=1.0, top_k=layout.vocabulary.num_image_codes)
    nothing: list[list[int]] = [[]] * len(codes)  # the unconditional rows of guidance
    both = [
        likelihood(image_inputs(rows, codes, layout, guided=False), columns, settings).cpu().double()
        for rows in (starts, nothing)
    ]
    return (both[0] - both[1]).view(len(codes), -1)


def _reading(prompts: Sequence[str], codes: Tensor, vocabulary: Vocabulary, likelihood: Likelihood) -> Tensor:
    """Returns log P(prompt | image, question) of each image, in nats: `scoring.read_score` for a batch."""
    rows, before, targets = [], [], []
    for prompt, grid in zip(prompts, codes, strict=True):
        ids, labels = encode_conversation([("human", [QUESTION, grid]), ("assistant", [prompt])], vocabulary)
        places = torch.tensor([at for at, label in enumerate(labels) if label != IGNORED])
        rows.append(ids)
        before.append(places - 1)
        targets.append(torch.tensor(ids)[places])
    settings = SamplingConfig(cfg=1.0, top_k=vocabulary.vocab_size)
    found = likelihood(padded(rows, before, torch.cat(targets), vocabulary.bos_id), None, settings).cpu().double()
    return torch.stack([part.sum() for part in found.split([len(part) for part in targets])])
