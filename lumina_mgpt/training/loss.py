"""Computes the next-id loss over labelled positions, whole or in chunks of positions."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lumina_mgpt.model.transformer import Transformer

TAIL_MASS = 1.5e-3  # total probability that the tail term pulls the unlikely ids towards; chosen
WHOLE_LOGITS = 1 << 25  # up to this number (128 MiB in float32) the loss is not split, and can be compiled
# Logits of one chunk. Each chunk reads the head and its gradient once more. On a CPU, products of 525 rows are 4 %
# faster than those of 391.
CHUNK_LOGITS, CHUNK_LOGITS_ON_CPU = 1 << 26, 3 << 25
CACHE_LOGITS = 1 << 19  # on a CPU: logits of a few rows, 2 MiB, that are computed in the processor's cache
SLAB_ROWS = 1 << 12  # on a CPU: rows of the head's gradient that are added together, in the processor's cache
SUM_LOGITS = 1 << 23  # on a GPU: logits that are computed together; with fewer, a GPU waits for the next launch
MIN_ROWS, MIN_ROWS_ON_GPU = 64, 512  # of one chunk: with fewer, reading the head takes longer than the product


def token_losses(logits: Tensor, targets: Tensor, tail_weight: float = 0.0) -> tuple[Tensor, Tensor]:
    """Returns two sums over the labelled positions: cross-entropy and logsumexp² (the z-loss), in float32.

    `tail_weight` adds a tail term to the cross-entropy. It pulls the log-probabilities of unlikely ids to
    log(TAIL_MASS / V), by their mean squared distance. Cross-entropy hardly constrains these probabilities. The
    conditional and the unconditional distribution therefore differ in them, and guidance multiplies the difference.
    At guidance scale 4 and without top-k, a deviation of 1.5 nats gives the unlikely ids a tenth of the probability.

    Args:
        targets: label of each position; positions with a label below 0 are not counted.
        tail_weight: weight of the tail term, at least 0.

    Shapes: logits (L, V), targets (L,) for L positions and V ids; returns two scalars.
    Source: z-loss of PaLM (arXiv 2204.02311), section 5. The tail term is not from a paper.
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
    """Computes head and loss together, and holds the logits of only one chunk of rows at a time.

    The forward pass also computes the gradients of each chunk, and the backward pass only scales them. No product with
    the head is therefore computed twice. Besides the gradient of the head, the function needs memory for the logits of
    one chunk, which all chunks share.

    Args:
        rows: hidden states of the labelled positions.
        weight: weight of the head.
        targets: label of each row.
        z_weight, tail_weight: weights of the z-loss and of the tail term, see `token_losses`.
        memory: a tensor that the gradient of the weight overwrites; None to allocate one.

    Shapes: rows (L, D), weight and memory (V, D), targets (L,). Returns three scalars: the sum cross + z_weight * z,
    and its parts cross and z without gradients.
    Source: fused linear cross-entropy of Liger Kernel (arXiv 2410.10989).
    """

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weight: Tensor,
        targets: Tensor,
        z_weight: float,
        tail_weight: float,
        memory: Tensor | None = None,
    ):
        kind = rows.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else rows.dtype
        with torch.autocast(kind, enabled=False):
            narrow, head = rows.to(dtype), weight.to(dtype)
            d_rows = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
            direct = weight.dtype == dtype  # otherwise products are narrower than the gradient
            d_weight = _gradient_like(weight, memory, direct) if ctx.needs_input_grad[1] else None
            cross = z = rows.new_zeros((), dtype=torch.float32)
            spans = _spans(len(rows), chunk_rows(len(head), kind != "cpu"))
            logits = narrow.new_empty(max((span.stop - span.start for span in spans), default=0), len(head))
            for span in spans:
                chunk, d_logits = narrow[span], logits[: span.stop - span.start]
                torch.mm(chunk, head.T, out=d_logits)
                part_cross, part_z = _with_gradient(d_logits, targets[span], z_weight, tail_weight)
                cross, z = cross + part_cross, z + part_z
                if d_rows is not None:
                    d_rows[span] = d_logits @ head
                if d_weight is not None and direct:
                    d_weight.addmm_(d_logits.T, chunk, beta=int(span.start > 0))
                elif d_weight is not None:
                    _add_product(d_weight, d_logits, chunk)
        ctx.gradients = d_rows, d_weight
        ctx.mark_non_differentiable(cross, z)
        return cross + z_weight * z, cross, z

    @staticmethod
    @once_differentiable
    def backward(ctx, d_total: Tensor, *_):
        d_rows, d_weight = ctx.gradients
        ctx.gradients = None  # lets autograd use the tensor as .grad without a copy
        return *(None if part is None else part.mul_(d_total) for part in (d_rows, d_weight)), None, None, None, None


def chunk_rows(vocabulary: int, gpu: bool) -> int:
    """Returns the largest number of rows in a chunk of `ChunkedLoss`."""
    least, logits = (MIN_ROWS_ON_GPU, CHUNK_LOGITS) if gpu else (MIN_ROWS, CHUNK_LOGITS_ON_CPU)
    return max(least, logits // vocabulary)


def _spans(length: int, most: int) -> list[slice]:
    """Returns spans of about the same length, which is at most `most`."""
    step = math.ceil(length / max(1, math.ceil(length / most)))
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


def _gradient_like(weight: Tensor, memory: Tensor | None, direct: bool) -> Tensor:
    """Returns a tensor for the gradient of a weight: of any values if the first product overwrites it, else zeros."""
    if memory is None or memory.shape != weight.shape or memory.dtype != weight.dtype:
        return (torch.empty_like if direct else torch.zeros_like)(weight)
    return memory if direct else memory.zero_()


def _add_product(total: Tensor, d_logits: Tensor, chunk: Tensor) -> None:
    """Adds `d_logits.T @ chunk` to `total`, whose dtype is wider, without the memory of a whole product.

    Shapes: total (V, D), d_logits (L, V), chunk (L, D).
    """
    count = SLAB_ROWS if total.device.type == "cpu" else max(1, CHUNK_LOGITS // total.shape[1])
    product = chunk.new_empty(min(count, len(total)), total.shape[1])
    wide = torch.empty_like(product, dtype=total.dtype)  # a sum of two dtypes would allocate it for each slab
    for slab in _spans(len(total), count):
        size = slab.stop - slab.start
        torch.mm(d_logits[:, slab].T, chunk, out=product[:size])
        total[slab] += wide[:size].copy_(product[:size])


def _with_gradient(logits: Tensor, targets: Tensor, z_weight: float, tail_weight: float) -> tuple[Tensor, Tensor]:
    """Returns both sums of `token_losses`. The gradient of cross + z_weight * z overwrites the logits.

    It computes a few rows at a time: on a CPU, so that they stay in the processor's cache; on a GPU, about SUM_LOGITS
    logits, to save memory.
    """
    count = max(1, SUM_LOGITS // logits.shape[-1])
    if logits.device.type == "cpu":
        threads = torch.get_num_threads()  # the same number of rows for each
        count = threads * max(1, CACHE_LOGITS // (threads * logits.shape[-1]))
    sums, narrow = [], logits.dtype != torch.float32
    memory = logits.new_empty((min(count, len(logits)), logits.shape[1]) if narrow else 0, dtype=torch.float32)
    for part, labels in zip(logits.split(count), targets.split(count), strict=True):
        wide = memory[: len(part)].copy_(part) if narrow else part
        sums.append(_block_with_gradient(wide, labels, z_weight, tail_weight))
        if narrow:
            part.copy_(wide)
    cross, z = torch.stack(sums).sum(0)
    return cross, z


def _block_with_gradient(logits: Tensor, targets: Tensor, z_weight: float, tail_weight: float) -> Tensor:
    """Returns both sums of `_with_gradient` as one tensor; the gradient overwrites the logits, which are float32."""
    counted, labels = (targets >= 0).float()[:, None], targets.clamp(min=0)[:, None]  # (L, 1)
    chosen, peak = logits.gather(-1, labels), logits.amax(-1, keepdim=True)
    logs, pull = logits.sub_(peak), None
    if tail_weight:
        level = math.log(TAIL_MASS / logits.shape[-1])
        pull = logs - (logs.exp().sum(-1, keepdim=True).log_() + level)
        pull.masked_fill_(pull >= -level / 2, 0.0)
    gradient = logs.exp_()
    mass = gradient.sum(-1, keepdim=True)
    total = mass.log().add_(peak)  # logsumexp
    cross, scale = total - chosen, 1 + 2 * z_weight * total
    if pull is not None:
        cross = cross + tail_weight * pull.square().mean(-1, keepdim=True)
        pull.mul_(2 * tail_weight / logits.shape[-1])
        scale = scale - pull.sum(-1, keepdim=True)
    gradient.mul_(scale * counted / mass)
    if pull is not None:
        gradient.add_(pull.mul_(counted))
    gradient.scatter_add_(-1, labels, -counted)
    return torch.stack(((cross * counted).sum(), (total.square() * counted).sum()))


class LossModel(nn.Module):
    """Joins the transformer and its loss in one module, so that sharding and compilation include the head.

    Args:
        z_weight: weight of the z-loss.
        tail_weight: weight of the tail term, see `token_losses`.
    """

    def __init__(self, model: Transformer, z_weight: float = 0.0, tail_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.z_weight, self.tail_weight = model, z_weight, tail_weight
        self.whole_losses = self._whole_losses
        self._chunked = False  # whether the last loss was computed in chunks
        self._memory: Tensor | None = None  # the head's gradient of the last step, for that of the next

    def _whole_losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cross, z = token_losses(self.model.project(rows), targets, self.tail_weight)
        return cross + self.z_weight * z, cross.detach(), z.detach()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears all gradients; on a CPU, keeps the memory of the head's gradient for the next step.

        To give the memory back to the system and to get it again takes longer than to use it.
        """
        gradient = self.model.lm_head.weight.grad
        if set_to_none and self._chunked and type(gradient) is Tensor and gradient.device.type == "cpu":
            self._memory = gradient
        super().zero_grad(set_to_none)

    def compile_parts(self) -> None:
        """Compiles each layer for each batch shape, and the whole loss for all shapes.

        Sets torch's recompile limit to 64, for the whole process. The default of 8 is less than the number of batch
        widths times two kinds of layers.
        """
        torch._dynamo.config.recompile_limit = 64
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.whole_losses = torch.compile(self._whole_losses, dynamic=True)  # the number of labels varies

    def forward(
        self, ids: Tensor, index: Tensor, targets: Tensor, documents: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the loss to minimize, and its parts without gradients: cross-entropy and z-loss.

        All three are sums over positions. The head projects only the positions in `index`. If these have more than
        WHOLE_LOGITS logits, it projects them in chunks.

        Args:
            index: labelled positions, as indices into the flattened ids.
            targets: label of each position in `index`, -100 for padding.
            documents: lengths of packed sequences, see `Transformer.forward`.

        Shapes: ids (B, T) for B sequences of T ids, index (L,), targets (L,); returns three scalars.
        """
        hidden = self.model(ids, documents=documents)  # (B, T, D)
        rows = hidden.flatten(0, 1)[index]
        head = self.model.lm_head.weight
        self._chunked = len(rows) * len(head) > WHOLE_LOGITS
        memory, self._memory = self._memory, None
        if not self._chunked:
            return self.whole_losses(rows, targets)
        return ChunkedLoss.apply(rows, head, targets, self.z_weight, self.tail_weight, memory)
