"""Distills guidance into the weights: the loss, and the rows of ids that it needs.

The teacher is the model that the run starts from, with guidance. The student is the model in training, without. After
the training, the student gives the teacher's distribution with one row for each image instead of two.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lumina_mgpt.data.batches import MicroBatch
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.training.adapters import without_adapters
from lumina_mgpt.training.loss import CHUNK_LOGITS, LossModel
from lumina_mgpt.unirep import IGNORED
from lumina_mgpt.vocabulary import Vocabulary

_LOGIT_TENSORS = 8  # tensors of the size of the logits that one chunk holds: of teacher, student and gradients


def codes_only(batch: MicroBatch, vocabulary: Vocabulary) -> MicroBatch:
    """Returns a copy of a micro-batch whose labels are its image codes alone, since only codes are guided."""
    targets = batch.targets.where(vocabulary.is_code(batch.targets), IGNORED)
    return replace(batch, targets=targets, labelled=int((targets != IGNORED).sum()))


class LoneImages(NamedTuple):
    """The unconditional rows of a micro-batch: each of its images alone, from image start at position 0.

    Attributes:
        ids: one row for each image with labelled codes; after its end, a row goes on with any ids.
        positions: where the flattened `ids` hold the ids at `MicroBatch.index`; 0 without a label.

    Shapes: ids (R, U) for R images of at most U ids, positions (L,).
    """

    ids: Tensor
    positions: Tensor


def image_starts(batch: MicroBatch, vocabulary: Vocabulary) -> Tensor:
    """Returns the position of the image start before each position in `batch.index`, in the flattened ids.

    Shapes: -> (L,); meaningless for positions without a label.
    """
    flat = batch.ids.flatten()
    begun = torch.arange(len(flat)).where(flat == vocabulary.image_start_id, 0)
    return begun.cummax(0).values[batch.index]


def lone_images(batch: MicroBatch, vocabulary: Vocabulary) -> LoneImages:
    """Returns the unconditional rows of a micro-batch, as a sampler feeds them.

    Args:
        batch: what `codes_only` returns, on the CPU.
    """
    flat, counted = batch.ids.flatten(), batch.targets != IGNORED
    starts, positions = image_starts(batch, vocabulary), torch.zeros_like(batch.index)
    used = starts[counted].unique()  # sorted
    if not len(used):  # a process without a batch: its forward passes must still match those of the others
        return LoneImages(flat.new_full((1, 1), vocabulary.image_start_id), positions)
    offsets = (batch.index - starts)[counted]
    width = int(offsets.max()) + 1
    positions[counted] = torch.searchsorted(used, starts[counted]) * width + offsets
    columns = (used[:, None] + torch.arange(width)).clamp(max=len(flat) - 1)  # (R, U)
    return LoneImages(flat[columns], positions)


def frozen_teacher(model: Transformer, dtype: torch.dtype) -> Transformer:
    """Returns a frozen copy of a model, whose head holds the image codes alone."""
    teacher, config = copy.deepcopy(model), model.config
    teacher.lm_head.slice_columns(slice(config.image_code_offset, config.image_code_offset + config.num_image_codes))
    teacher.dropout = 0.0
    return teacher.requires_grad_(False).to(dtype).eval()


class GuidanceLoss(LossModel):
    """Computes the divergence KL(teacher ‖ student) of the distributions of image codes.

    The teacher's logits are uncond + scale · (cond - uncond), as in sampling. The loss has the gradient
    softmax(student) - softmax(teacher) with respect to the student's logits.

    Guidance is linear in the logits, and so is the head in its input. Guidance is therefore applied to the input of the
    head, which is then multiplied once, not twice.

    Args:
        model: the student.
        teacher: what `frozen_teacher` returns for the initial weights; None if the student has adapters. Without its
            adapters it is then the teacher, and needs no copy.
        scale: guidance scale of the teacher.

    Source: arXiv 2210.03142, section 3.1, for diffusion models; KL over the vocabulary as in arXiv 1503.02531 and, on
        own samples, in arXiv 2306.13649.
    """

    def __init__(self, model: Transformer, teacher: Transformer | None, scale: float) -> None:
        super().__init__(model)
        self.teacher, self.scale = teacher, scale
        config = model.config
        self.codes = slice(config.image_code_offset, config.image_code_offset + config.num_image_codes)

    def compile_parts(self) -> None:
        """Compiles each layer of student and teacher for each batch shape. Sets torch's recompile limit to 64."""
        super().compile_parts()
        for layer in self.teacher.layers if self.teacher is not None else ():
            layer.compile(dynamic=False)

    @contextmanager
    def _teaching(self) -> Iterator[tuple[Transformer, Tensor]]:
        """Yields the teacher and the rows of image codes of its head. Nothing in the block has a gradient."""
        with torch.no_grad():
            if self.teacher is not None:
                yield self.teacher, self.teacher.lm_head.weight
            else:
                with without_adapters(self.model):
                    yield self.model, self.model.lm_head.weight[self.codes]

    def forward(
        self,
        ids: Tensor,
        index: Tensor,
        targets: Tensor,
        documents: tuple[int, ...] = (),
        lone_ids: Tensor | None = None,
        lone_positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the divergence, the same without gradient, and that of the teacher without guidance.

        The last one is what the divergence would be without training, so that their ratio shows the progress. All
        three are sums over the positions with a label, in nats.

        Args:
            index, targets, documents: as for `LossModel.forward`; a target only says that its position counts.
            lone_ids, lone_positions: what `lone_images` returns.

        Shapes: ids (B, T), index and targets (L,), lone_ids (R, U), lone_positions (L,); returns three scalars.
        """
        assert lone_ids is not None and lone_positions is not None
        with self._teaching() as (teacher, teacher_head):
            cond = teacher(ids, documents=documents).flatten(0, 1)[index].float()  # (L, D)
            uncond = teacher(lone_ids).flatten(0, 1)[lone_positions].float()  # (L, D)
            guided = uncond + self.scale * (cond - uncond)
        rows, head = self.model(ids, documents=documents).flatten(0, 1)[index], self.model.lm_head.weight[self.codes]
        step = max(1, CHUNK_LOGITS // (_LOGIT_TENSORS * len(head)))
        parts = []
        for first in range(0, len(index), step):
            span = slice(first, first + step)
            given = rows[span], head, guided[span], cond[span], teacher_head, targets[span]
            # With several chunks, the backward pass computes the logits again, so that memory holds those of one.
            parts.append(
                checkpoint(divergences, *given, use_reentrant=False) if len(index) > step else divergences(*given)
            )
        total, gap = (torch.stack(column).sum() for column in zip(*parts, strict=True))
        return total, total.detach(), gap


def divergences(
    rows: Tensor, head: Tensor, guided: Tensor, cond: Tensor, teacher_head: Tensor, targets: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns KL(teacher ‖ student), and KL(teacher ‖ teacher without guidance), as sums over positions in nats.

    Args:
        rows: input of the student's head.
        guided, cond: input of the teacher's head with guidance, and without.
        targets: below 0 for positions that do not count.

    Shapes: rows, guided, cond (L, D), head and teacher_head (C, D), targets (L,); returns two scalars.
    """
    student = F.linear(rows, head).float().log_softmax(-1)  # (L, C)
    with torch.no_grad():
        narrow = teacher_head.dtype
        teacher, plain = (F.linear(x.to(narrow), teacher_head).float().log_softmax(-1) for x in (guided, cond))
        probs = teacher.exp() * (targets >= 0)[:, None]
        gap = (probs * (teacher - plain)).sum()
    return (probs * (teacher - student)).sum(), gap
