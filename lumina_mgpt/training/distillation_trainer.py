"""Runs the training that distills guidance into the weights."""

import torch
from torch import Tensor

from lumina_mgpt.data.batches import MicroBatch
from lumina_mgpt.data.seeding import seed_of, uniform
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training import base
from lumina_mgpt.training.distillation import GuidanceLoss, codes_only, frozen_teacher, lone_images
from lumina_mgpt.training.distributed import Processes
from lumina_mgpt.training.options import TrainingConfig
from lumina_mgpt.training.own_samples import with_own_samples
from lumina_mgpt.training.trainer import Trainer


class DistillationTrainer(Trainer):
    """Trains a model to give, without guidance, the distribution that it has with guidance at the start.

    It differs from `Trainer` in the loss (`GuidanceLoss`), in its labels (image codes alone), and in the data: no
    sequence loses its context. `loss` in the metrics is the mean KL divergence from the teacher, in nats a code. `gap`
    is that of the initial weights without guidance.

    Raises:
        InputError: as for `Trainer`; or the weights are guided already, or the data hold no images in answers.
    """

    context_dropout = 0.0
    measured = "loss", "gap"

    def __init__(self, settings: TrainingConfig, processes: Processes) -> None:
        assert settings.distillation.guidance_scale
        super().__init__(settings, processes)
        data, vocabulary = self.dataset, self.dataset.vocabulary
        if not any(bool(vocabulary.is_code(data.sequence(start).labels).any()) for start, _ in data.spans):
            raise InputError(
                f"{settings.data.data_config} holds no images in answers, which guidance is distilled on; give records "
                "with images",
                "data_config",
            )

    def _make_module(self, model: Transformer) -> GuidanceLoss:
        """Returns the loss. Without adapters it holds a frozen copy of the initial weights, the teacher."""
        settings, teacher, print_of_teacher = self.settings, None, None
        if not settings.model.lora_rank:
            teacher = frozen_teacher(model, torch.bfloat16 if settings.runtime.precision == "bf16" else torch.float32)
            if self.processes.first:
                print_of_teacher = base.fingerprint(teacher.named_parameters())
        self.teacher = self.processes.of_first(print_of_teacher)
        return GuidanceLoss(model, teacher, settings.distillation.guidance_scale)

    def _identity(self) -> dict:
        return super()._identity() | {"teacher": self.teacher}

    def _next_batches(self) -> list[MicroBatch]:
        vocabulary, at, seed = self.dataset.vocabulary, self.at, self.settings.runtime.seed
        batches = [codes_only(batch, vocabulary) for batch in super()._next_batches()]
        if uniform(seed, "own samples", at) < self.settings.distillation.own_samples:
            noise = seed_of(seed, "own samples", at, self.processes.rank)
            batches = with_own_samples(batches, self.model, vocabulary, self.processes, noise)
        return batches

    def _losses(self, batch: MicroBatch) -> tuple[Tensor, Tensor, Tensor]:
        lone = lone_images(batch, self.dataset.vocabulary)
        *parts, lone_ids, lone_positions = self.processes.upload(batch.ids, batch.index, batch.targets, *lone)
        return self.module(*parts, batch.documents, lone_ids, lone_positions)


def trainer_of(settings: TrainingConfig) -> type[Trainer]:
    """Returns the class of the trainer for a run: one that distills guidance if the settings say so."""
    return DistillationTrainer if settings.distillation.guidance_scale else Trainer
