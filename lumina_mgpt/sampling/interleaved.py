"""Samples answers in text and images.

The status of an answer is a function of its ids so far, and says how the next id is sampled:

- TEXT: from the logits of the conditional row, with top-k and temperature for text. Image codes, row ends, image ends,
  grid ids and bos are banned, and image starts where no image is wanted or fits.
- HEADER: the two grid ids, from the logits of the conditional row, with top-k and temperature for images. Only sizes
  that fit the model's context may be drawn.
- IMAGE: the image's codes, by `autoregressive` or `jacobi` as for a request of one image. With guidance, the
  unconditional row begins at the image's start, at position 0. It overwrites that of an earlier image.

Differs from the reference: the released code bans nothing in text, and draws grid ids from the whole vocabulary.

Source: Lumina-mGPT (arXiv 2408.02657), appendix F.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.sampling.autoregressive import Call, Step, check_not_nan, prompt_call, sample_codes
from lumina_mgpt.sampling.jacobi import jacobi_codes
from lumina_mgpt.sampling.logits import allowed_log_probs
from lumina_mgpt.sampling.noise import IDS, Key, gumbel_like, stream
from lumina_mgpt.unirep import HEADER, ImageLayout, Status, image_length, status
from lumina_mgpt.vocabulary import Vocabulary


@dataclass(frozen=True)
class Plan:
    """What an answer may hold.

    Attributes:
        images: number of images that are forced, one after another, before the turn end; 0: the model's choice.
        text_only: whether image starts are banned.
        layout: layout of forced images; None: the model draws the grid ids.
        limit: largest number of ids of the answer.
        context: largest number of ids of prompt and answer.
    """

    images: int
    text_only: bool
    layout: ImageLayout | None
    limit: int
    context: int


class AnswerSampler:
    """Samples one answer of a conversation.

    Attributes:
        prompt: ids of the conversation up to the answer.
        answer: ids of the answer so far.
        held: number of ids of prompt and answer that the cache holds of the conditional row.
        reason: why the answer ended, "turn end" or "length"; None before.
        before_step: called before each step inside an image but the first. An exception that it raises ends the answer.

    Args:
        text_step: the model. It feeds the conditional row alone, and returns the logits of the whole vocabulary.
        image_step: returns the model for one image. It feeds conditional and unconditional row (without guidance the
            conditional one alone), and returns the logits of the image codes. Both share one cache.
        turn: index of the answer in its conversation, for its noise.
        speculation: settings with a window, or None for one code a forward.
    """

    def __init__(
        self,
        text_step: Step,
        image_step: Callable[[], Step],
        vocabulary: Vocabulary,
        prompt: Sequence[int],
        held: int,
        plan: Plan,
        settings: SamplingConfig,
        turn: int = 0,
        speculation: Speculation | None = None,
    ) -> None:
        self.prompt, self.held, self.answer = list(prompt), held, list[int]()
        self.reason: str | None = None
        self._text_step, self._image_step, self._vocabulary = text_step, image_step, vocabulary
        self._plan, self._settings, self._turn, self._speculation = plan, settings, turn, speculation
        self.before_step: Callable[[], None] | None = None
        self._images = 0  # complete images of the answer
        self._text = _Draw(vocabulary.text_mask(True), settings.text_temperature, settings.text_top_k)
        self._only_text = _Draw(vocabulary.text_mask(False), settings.text_temperature, settings.text_top_k)

    @property
    def room(self) -> int:
        """Number of ids that the answer may still have."""
        return min(self._plan.limit, self._plan.context - len(self.prompt)) - len(self.answer)

    @torch.no_grad()
    def run(self) -> Iterator[list[int]]:
        """Yields the ids of the answer as they become final: text ids one by one, images by rows.

        `answer` already holds what is yielded.

        Raises:
            InputError: a logit is NaN, because half precision overflows or weights are broken.
        """
        while self.reason is None:
            if self.room <= 0:
                self.reason = "length"
                return
            now = status(self.answer, self._vocabulary)
            if now is Status.IMAGE:
                yield from self._image()
                continue
            id_ = self._text_id() if now is Status.TEXT else self._grid_id()
            self.answer.append(id_)
            if id_ == self._vocabulary.turn_end_id:
                self.reason = "turn end"
            yield [id_]

    def _text_id(self) -> int:
        plan = self._plan
        if plan.images:
            missing = self._images < plan.images
            return self._vocabulary.image_start_id if missing else self._vocabulary.turn_end_id
        fits = self._fits(0, 1, 1)
        return self._draw(self._text if fits and not plan.text_only else self._only_text)

    def _grid_id(self) -> int:
        vocabulary, layout = self._vocabulary, self._plan.layout
        first = self.answer[-1] == vocabulary.image_start_id
        if layout is not None:
            return vocabulary.grid_id(layout.grid_rows if first else layout.grid_cols)
        every = range(1, vocabulary.max_grid + 1)
        if first:
            sizes = [size for size in every if self._fits(1, size, 1)]
        else:
            rows = vocabulary.grid_size(self.answer[-1])
            sizes = [size for size in every if self._fits(2, rows, size)]
        return self._draw(_Draw(vocabulary.grid_mask(sizes), self._settings.temperature, self._settings.top_k))

    def _fits(self, begun: int, grid_rows: int, grid_cols: int) -> bool:
        """Whether the context has room for an image of this size, of which the answer holds the first `begun` ids."""
        length = len(self.prompt) + len(self.answer) - begun + image_length(grid_rows, grid_cols, self._vocabulary)
        return length <= self._plan.context

    def _draw(self, draw: "_Draw") -> int:
        """Feeds what the cache lacks of the conditional row, and draws the next id."""
        ids = self.prompt + self.answer
        call = prompt_call([ids], [self.held], self._vocabulary.bos_id)
        logits = self._text_step(*call)[:, 0]
        self.held = len(ids)
        key = (self._settings.seed, 0, stream(self._turn))
        return int(draw(logits, [key], [len(self.answer)]))

    def _image(self) -> Iterator[list[int]]:
        """Samples the codes of the image whose header is at the end of the answer, as far as there is room."""
        vocabulary, begin = self._vocabulary, len(self.answer) - HEADER
        layout = ImageLayout(vocabulary, *(vocabulary.grid_size(id_) for id_ in self.answer[-2:]))
        prompt, end = self.prompt + self.answer[:begin], HEADER + self.room
        stop = int((layout.code_offsets < end).sum())
        key: Key = (self._settings.seed, 0, stream(self._turn, self._images))
        arguments = (self._image_step(), [prompt], layout, self._settings, [key])
        if self._speculation is None:
            rows = sample_codes(*arguments, held=[self.held], stop=stop, kept=self.before_step)
        else:
            rows = jacobi_codes(*arguments, self._speculation, held=[self.held], stop=stop, kept=self.before_step)
        for codes in rows:
            # The cache certainly holds the codes before the last final one, and nothing overwrites them.
            self.held = len(prompt) + layout.offset_of(codes.shape[1] - 1)
            new = layout.fill(codes[0].cpu())[len(self.answer) - begin : end].tolist()
            self.answer += new
            if codes.shape[1] == layout.num_codes and end >= layout.length:
                self._images += 1
            yield new


@torch.no_grad()
def sample_texts(
    step: Step,
    prompts: Sequence[Sequence[int]],
    vocabulary: Vocabulary,
    settings: SamplingConfig,
    keys: Sequence[Key],
    limits: Sequence[int],
) -> list[list[int]]:
    """Returns the ids of one answer in text for each prompt, sampled in one batch. Prompts may differ in length.

    A row that is complete is fed its last id again until all are complete. No other row depends on it. Each answer is
    the one that `AnswerSampler` samples with the same key and only text allowed.

    Args:
        step: the model with an empty cache of one row per prompt; returns the logits of the whole vocabulary.
        keys: one key per prompt.
        limits: largest number of ids of each answer, at least 1.

    Raises:
        InputError: a logit is NaN, because half precision overflows or weights are broken.
    """
    draw = _Draw(vocabulary.text_mask(False), settings.text_temperature, settings.text_top_k)
    answers: list[list[int]] = [[] for _ in prompts]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    call = prompt_call(prompts, [0] * len(prompts), vocabulary.bos_id)
    running = [True] * len(prompts)
    while True:
        drawn = draw(step(*call)[:, 0], keys, [len(answer) for answer in answers]).tolist()
        for row, id_ in enumerate(drawn):
            if running[row]:
                answers[row].append(id_)
                running[row] = id_ != vocabulary.turn_end_id and len(answers[row]) < limits[row]
        if not any(running):
            return answers
        ids = torch.tensor([[answer[-1]] for answer in answers])
        positions = lengths + torch.tensor([len(answer) for answer in answers]) - 1
        call = Call(ids, positions[:, None], torch.zeros_like(ids))


class _Draw:
    """Draws ids among those that are allowed, with the Gumbel-max trick."""

    def __init__(self, allowed: Tensor, temperature: float, top_k: int) -> None:
        self._allowed, self._count = allowed, int(allowed.sum())
        self._temperature, self._top_k = temperature, top_k

    def __call__(self, logits: Tensor, keys: Sequence[Key], positions: Sequence[int]) -> Tensor:
        """Returns one id per row.

        Args:
            positions: index of each row's id in its answer.

        Shapes: logits (B, V) -> (B,) on the CPU.
        """
        if self._allowed.device != logits.device:
            self._allowed = self._allowed.to(logits.device)
        log_probs = allowed_log_probs(logits, self._allowed, self._count, self._temperature, self._top_k)
        check_not_nan(log_probs)
        if self._top_k > 1:
            log_probs = log_probs + gumbel_like(log_probs, keys, positions, IDS)
        return log_probs.argmax(-1).cpu()
