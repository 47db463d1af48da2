"""Samples the groups of a step with the project's sampler, and draws a sheet of them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lumina_mgpt.data.seeding import seed_of
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.training.adapters import plain_copy
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.grpo_options import GrpoOptions
from lumina_mgpt.training.grpo_prompts import Prompts
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

_ROWS, _COLUMNS = 8, 8  # of a sheet
_BATCH = 32  # images sampled together on a CPU
_TEXT = 14  # pixels of a line of text


@dataclass(frozen=True)
class Groups:
    """The images of one process in one step, ordered by prompt.

    Attributes:
        prompts: the prompt of each image.
        starts: its ids, up to image start.
        codes: codes of the images, (B, rows, cols), on the CPU.
        codes_per_forward: codes of an image that a forward gave, on average: 1 without speculation.
    """

    prompts: list[str]
    starts: list[Sequence[int]]
    codes: Tensor
    codes_per_forward: float


class GroupSampler:
    """Samples images from the policy.

    It uses a copy of the whole weights, as `SampleImages` does. All processes call `draw` together.

    Args:
        narrow: whether the copy on a GPU is in bfloat16.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        images: ImageTokenizer,
        prompts: Prompts,
        options: GrpoOptions,
        processes: Processes,
        narrow: bool,
    ) -> None:
        self.checkpoint, self.images, self.prompts, self.options = checkpoint, images, prompts, options
        self.processes = processes
        self.dtype = torch.bfloat16 if narrow and processes.device.type != "cpu" else torch.float32

    @torch.no_grad()
    def draw(self, model: Transformer, indices: Sequence[int], *key: int | str) -> Groups:
        """Returns this process's images of a step.

        The noise of an image depends on the key and on its number in the step, not on the number of processes or the
        batch.

        Args:
            model: the model in training.
            indices: the prompts of the step, of all processes. Process r of n takes r, r + n and so on.
            key: key of the noise, such as seed and step.
        """
        options, world = self.options, self.processes.world
        size, layout = options.group_size, self.prompts.layout
        slots = range(self.processes.rank, len(indices), world)
        starts = [self.prompts.starts[indices[slot]] for slot in slots for _ in range(size)]
        texts = [self.prompts.texts[indices[slot]] for slot in slots for _ in range(size)]
        numbers = [slot * size + number for slot in slots for number in range(size)]
        settings = options.sampling(layout.vocabulary.num_image_codes, seed_of(*key))
        pipeline = Pipeline(self.checkpoint, plain_copy(model, self.dtype, self.processes.device), self.images)
        parts, forwards, batch = [], 0, options.sample_batch or _BATCH
        if not options.sample_batch and pipeline.device.type == "cuda":
            batch = pipeline.batch_size(max(map(len, starts)), layout, settings, options.speculation)
        for at in range(0, len(starts), batch):  # equal prompts in a batch are read once
            span = slice(at, at + batch)
            parts.append(
                pipeline.sample(starts[span], layout, settings, numbers[span], speculation=options.speculation)
            )
            forwards += pipeline.forwards
        return Groups(texts, starts, torch.cat(parts), len(parts) * layout.num_codes / forwards)

    def decode(self, codes: Tensor) -> list[Image.Image]:
        """Returns the pictures of codes. Shapes: codes (B, rows, cols)."""
        parts = self.checkpoint.config.parts(self.prompts.layout.panels)
        return [self.images.decode(grid[None], parts)[0] for grid in codes]  # one by one, as `Pipeline` does


def sheet(pictures: Sequence[Image.Image], prompts: Sequence[str], rewards: Sequence[float], size: int) -> Image.Image:
    """Returns a sheet of the first groups: a row for each prompt, with the reward below each picture.

    Args:
        pictures, prompts, rewards: of each image, ordered by group.
        size: number of images of a group.
    """
    width, height = pictures[0].size
    groups, columns = min(_ROWS, len(pictures) // size), min(_COLUMNS, size)
    row, font = height + 2 * _TEXT + 8, ImageFont.load_default(10)
    canvas = Image.new("RGB", (columns * (width + 4), groups * row), "white")
    draw = ImageDraw.Draw(canvas)
    for group in range(groups):
        draw.text((2, group * row), prompts[group * size], fill="black", font=font)
        for column in range(columns):
            number, left = group * size + column, column * (width + 4) + 2
            canvas.paste(pictures[number], (left, group * row + _TEXT))
            draw.text((left, group * row + _TEXT + height), f"{rewards[number]:.3g}", fill="black", font=font)
    return canvas
