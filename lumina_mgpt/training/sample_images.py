"""Pictures of fixed prompts while a model trains, so that one can see what it has learned."""

import logging
from pathlib import Path

import torch
from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.movqgan.tokenizer import ImageTokenizer, find_movqgan
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.prompt_files import PROMPTS_FILE, example_prompts, read_prompts
from lumina_mgpt.training.adapters import plain_copy
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.options import Settings
from lumina_mgpt.vocabulary import Vocabulary

logger = logging.getLogger(__name__)


class Sampler:
    """Draws the same prompts with the same noise each time; all processes call it together, the first draws.

    It draws with a copy of the weights (in bf16 on a GPU), so that neither sharding nor compilation nor a random number
    of the training is touched; that copy is the memory it takes.

    Raises:
        InputError: there is no image tokenizer, or it does not fit, or a prompt cannot be drawn.
    """

    def __init__(self, settings: Settings, folder: Path, model: Transformer, vocabulary: Vocabulary,
                 processes: Processes) -> None:  # fmt: skip
        self.processes, self.model, self.seed = processes, model, settings.seed
        self.folder = Path(settings.output_dir) / "samples"
        self.prompts, named = read_prompts(None, settings.sample_prompts, "sample_prompts"), "sample_prompts"
        if not self.prompts:
            self.prompts, named = example_prompts(folder), str(folder / PROMPTS_FILE)
        self.checkpoint = Checkpoint(folder, model.config, vocabulary, find_movqgan(folder, settings.movqgan_path))
        self.images = None
        if processes.first:
            self.images = ImageTokenizer.from_checkpoint(self.checkpoint.movqgan_path, processes.device)
            self.images.require_codes(model.config, self.checkpoint.movqgan_path)
        self.checkpoint.prompt_ids(self.prompts, self.checkpoint.layout(), parameter=named)

    @torch.no_grad()
    def draw(self, step: int) -> list[Image.Image]:
        """Writes `samples/step-N/0.png` and so on; returns the pictures on the first process.

        A picture that cannot be written is reported and does not end the training.
        """
        device = self.processes.device
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        copy = plain_copy(self.model, dtype, device, self.processes.first)
        if not self.processes.first:
            self.processes.barrier()
            return []
        results = Pipeline(self.checkpoint, copy, self.images).generate(self.prompts, seed=self.seed)
        place = OutputFolder(self.folder / f"step-{step:08d}", overwrite=True, parameter="output_dir")
        try:
            for n, result in enumerate(results):
                place.save(f"{n}.png", result.image)
        except InputError as error:
            logger.warning("the samples of step %d are not all written: %s", step, error)
        self.processes.barrier()
        return [result.image for result in results]
