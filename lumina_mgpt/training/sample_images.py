"""Generates pictures of fixed prompts during training."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.prompt_files import PROMPTS_FILE, example_prompts, read_prompts
from lumina_mgpt.prompts import TASKS, Task
from lumina_mgpt.training.adapters import plain_copy
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.run_folder import name_of
from lumina_mgpt.vocabulary import Vocabulary
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer, find_image_tokenizer

logger = logging.getLogger(__name__)


class SampleImages:
    """Generates pictures of the same prompts with the same seed at each call of `draw`.

    All processes call the methods together, and each generates its share of the pictures. It uses a copy of the whole
    weights, which is bfloat16 on a GPU. It therefore needs memory for the copy, but does not change the sharding, the
    compilation or the random numbers of the training.

    Args:
        settings: training configuration; `sample_prompts` and `movqgan_path` name the files to use.
        folder: folder of the tokenizer, and of the prompts and the image tokenizer if `settings` does not name them.
        model: the model in training.
        width, height, task: size and task of the pictures; see `Checkpoint.layout`.
        sampling: fields of SamplingConfig that differ from the defaults of the checkpoint's family.

    Raises:
        InputError: there is no image tokenizer, it does not fit the model, or a prompt cannot be used.
    """

    def __init__(
        self,
        settings: TrainingConfig,
        folder: Path,
        model: Transformer,
        vocabulary: Vocabulary,
        processes: Processes,
        width: int | None = None,
        height: int | None = None,
        task: Task = TASKS["t2i"],
        **sampling: Any,
    ) -> None:
        options, self.task, self.sampling = settings.logging, task, sampling
        self.processes, self.model, self.seed = processes, model, settings.runtime.seed
        self.folder = Path(settings.output_dir) / "samples"
        self.prompts, named = read_prompts(None, options.sample_prompts, "sample_prompts"), "sample_prompts"
        if not self.prompts:
            self.prompts, named = example_prompts(folder), str(folder / PROMPTS_FILE)
        kind = model.config.family.image_tokenizer
        path = find_image_tokenizer(folder, options.movqgan_path, kind)
        self.checkpoint = Checkpoint(folder, model.config, vocabulary, path)
        self.group, self.images = processes.long_timeout_group(), None
        self.own_prompts = self.prompts[processes.rank :: processes.world]
        if self.own_prompts:
            self.images = ImageTokenizer.from_checkpoint(path, processes.device)
            self.images.require_codes(model.config, path)
            self.images.require_decoder()
        self.layout = self.checkpoint.layout(width, height, task)
        self.checkpoint.prompt_ids(self.prompts, self.layout, task, parameter=named)

    @torch.no_grad()
    def draw(self, step: int) -> list[Image.Image]:
        """Writes one picture per prompt to `samples/step-N`, as `0.png` and so on, and returns the pictures.

        Only the first process returns them; the others return an empty list. If a picture cannot be written, a warning
        is logged and the training continues.

        Args:
            step: number N of the current step.
        """
        results = self._generate()
        pictures = self._gathered(results)
        if not self.processes.first:
            return []
        target = OutputFolder(self.folder / name_of(step), overwrite=True, parameter="output_dir")
        try:
            for n, picture in enumerate(pictures):
                target.save(f"{n}.png", picture)
        except InputError as error:
            logger.warning("the samples of step %d are not all written: %s", step, error)
        return pictures

    def _generate(self) -> list[Image.Image]:
        """Returns the pictures of this process's prompts."""
        device = self.processes.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        copy = plain_copy(self.model, dtype, device, bool(self.own_prompts))
        if self.images is None:
            return []
        results = Pipeline(self.checkpoint, copy, self.images).generate(
            self.own_prompts, *self.layout.size, seed=self.seed, task=self.task, **self.sampling
        )
        return [result.image for result in results]

    def _gathered(self, own: list[Image.Image]) -> list[Image.Image]:
        """Returns the pictures of all prompts in order. Waits until all processes have generated theirs."""
        if self.processes.world == 1:
            return own
        width, height = self.layout.size
        world, count = self.processes.world, len(self.prompts)
        pixels = torch.zeros(-(-count // world), height, width, 3, dtype=torch.uint8)
        for n, picture in enumerate(own):
            pixels[n] = torch.from_numpy(np.array(picture))
        parts = [torch.empty_like(pixels) for _ in range(world)]
        dist.all_gather(parts, pixels, group=self.group)
        return [Image.fromarray(parts[n % world][n // world].numpy()) for n in range(count)]
