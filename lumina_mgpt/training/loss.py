"""Next-id loss over labelled positions."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lumina_mgpt.model.transformer import Transformer

TAIL_MASS = 1.5e-3  # probability that all unlikely ids together are drawn to
WHOLE_LOGITS = 1 << 25  # up to so many (128 MiB in float32) the plain loss is as lean, and can be compiled
CHUNK_LOGITS = 1 << 26  # of one chunk, where that is not too few rows; each chunk reads the head and its gradient anew
SUM_ROWS = 32  # of logits whose exponentials are there at once, for their sum
MIN_ROWS, MIN_ROWS_ON_GPU = 64, 512  # of one chunk: with fewer, reading the head takes longer than multiplying by it


def token_losses(logits: Tensor, targets: Tensor, tail_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and of logsumexp² (the z-loss) in float32; a target below 0 counts nothing.

    `tail_weight` times the mean squared distance of unlikely ids from one level, in log-probability, is added to the
    cross-entropy. Cross-entropy leaves it open how unlikely they are, and guidance multiplies the differences that
    follow between the laws with and without a prompt: at scale 4 and without top-k, a deviation of 1.5 nats gives them
    a tenth of every draw.

    Shapes: logits (L, V), targets (L,); returns two scalars.
    Source: z-loss of PaLM (arXiv 2204.02311), section 5; the tail term is this project's own.
    """
    logits = logits.float()
    counted = targets >= 0
    total = logits.logsumexp(-1)  # (L,)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    if tail_weight:
        level = math.log(TAIL_MASS / logits.shape[-1])
        above = logits - total[:, None] - level  # (L, V)
        unlikely = above < -level / 2
        chosen = chosen - tail_weight * torch.where(unlikely, above.square(), 0.0).mean(-1)
    zero = total.new_zeros(())
    return torch.where(counted, total - chosen, zero).sum(), torch.where(counted, total.square(), zero).sum()


class ChunkedLoss(torch.autograd.Function):
    """The loss of some rows without their logits ever being there all at once.

    Logits of a few rows are made, their gradient is taken, and both are used up before the next rows come: backward
    only scales what forward has left, and no product with the head is made twice. Needs, beyond the gradient of the
    head itself, a float for each logit of a chunk (three with the tail term).

    Shapes: rows (L, D), weight (V, D), targets (L,); returns total = cross + z_weight * z, and cross and z without
    gradients.
    Source: the idea is that of Liger Kernel's fused linear cross-entropy (arXiv 2410.10989).
    """

    @staticmethod
    def forward(ctx, rows: Tensor, weight: Tensor, targets: Tensor, z_weight: float, tail_weight: float):
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        wants_rows, wants_weight = ctx.needs_input_grad[:2]
        with torch.autocast(kind, enabled=False):
            narrow, head = rows.to(dtype), weight.to(dtype)
            d_rows = torch.empty_like(rows) if wants_rows else None
            direct = weight.dtype == dtype  # else the gradient is wider than what is multiplied
            d_weight = (torch.empty_like if direct else torch.zeros_like)(weight) if wants_weight else None
            cross = z = rows.new_zeros((), dtype=torch.float32)
            least = MIN_ROWS if kind == "cpu" else MIN_ROWS_ON_GPU
            for span in _spans(len(rows), max(least, CHUNK_LOGITS // len(head))):
                chunk = narrow[span]
                part_cross, part_z, d_logits = _with_gradient(chunk @ head.T, targets[span], z_weight, tail_weight)
                d_logits = d_logits.to(dtype)
                cross, z = cross + part_cross, z + part_z
                if wants_rows:
                    d_rows[span] = d_logits @ head
                if wants_weight and direct:
                    d_weight.addmm_(d_logits.T, chunk, beta=int(span.start > 0))
                elif wants_weight:  # in slabs: a whole product beside the sum would be another head
                    for slab in _spans(len(head), max(1, CHUNK_LOGITS // head.shape[1])):
                        d_weight[slab] += d_logits[:, slab].T @ chunk
                del d_logits  # before the next ones are made
        ctx.gradients = d_rows, d_weight
        ctx.mark_non_differentiable(cross, z)
        return cross + z_weight * z, cross, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, *_):
        d_rows, d_weight = ctx.gradients
        ctx.gradients = None  # so that the weight's can become its .grad, and not a copy of it
        return *(None if part is None else part.mul_(d_total) for part in (d_rows, d_weight)), None, None, None


def _spans(length: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _with_gradient(logits: Tensor, targets: Tensor, z_weight: float, tail_weight: float):
    """Both sums of `token_losses`, and the gradient of cross + z_weight * z by the logits, which takes their place."""
    logits, counted, labels = logits.float(), (targets >= 0).float(), targets.clamp(min=0)[:, None]
    total = torch.cat([part.logsumexp(-1) for part in logits.split(SUM_ROWS)])  # (L,)
    logs = logits.sub_(total[:, None])
    cross, scale = -logs.gather(-1, labels)[:, 0], 1 + 2 * z_weight * total
    pull = None
    if tail_weight:
        level = math.log(TAIL_MASS / logits.shape[-1])
        pull = logs - level
        pull.masked_fill_(pull >= -level / 2, 0.0)
        cross = cross + tail_weight * pull.square().mean(-1)
        pull.mul_(2 * tail_weight / logits.shape[-1])
        scale = scale - pull.sum(-1)
    gradient = logs.exp_().mul_((scale * counted)[:, None])
    if pull is not None:
        gradient.add_(pull.mul_(counted[:, None]))
    gradient.scatter_add_(-1, labels, -counted[:, None])
    return (cross * counted).sum(), (total.square() * counted).sum(), gradient


class LossModel(nn.Module):
    """The transformer with its loss as one module, so that what shards or compiles modules sees every product."""

    def __init__(self, model: Transformer, z_weight: float = 0.0, tail_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.z_weight, self.tail_weight = model, z_weight, tail_weight
        self.whole_losses = self._whole_losses

    def _whole_losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cross, z = token_losses(self.model.project(rows), targets, self.tail_weight)
        return cross + self.z_weight * z, cross.detach(), z.detach()

    def compile_parts(self) -> None:
        """Compiles each layer, once for every batch shape, and the loss of few logits, once for all."""
        torch._dynamo.config.recompile_limit = 64  # widths x (first and later layers): more than the default of 8
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.whole_losses = torch.compile(self._whole_losses, dynamic=True)  # labels are never quite as many

    def forward(self, ids: Tensor, index: Tensor, targets: Tensor,
                documents: tuple[int, ...] = ()) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """The sum to be minimized, and its parts without gradients: cross-entropy and z-loss.

        Only the positions in `index` reach the head. Few logits are made at once, many in chunks.

        Shapes: ids (B, T); index (L,) into the flattened ids; targets (L,), -100 where nothing is counted. `documents`
        are those of `Transformer.forward`.
        """
        hidden = self.model(ids, documents=documents)  # (B, T, D)
        rows = hidden.flatten(0, 1)[index]
        head = self.model.lm_head.weight
        if len(rows) * len(head) <= WHOLE_LOGITS:
            return self.whole_losses(rows, targets)
        return ChunkedLoss.apply(rows, head, targets, self.z_weight, self.tail_weight)
