"""Next-id loss over labelled positions."""

import math

import torch
from torch import Tensor, nn

from lumina_mgpt.model.transformer import Transformer

TAIL_MASS = 1.5e-3  # probability that all unlikely ids together are drawn to


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


class LossModel(nn.Module):
    """The transformer with its loss as one module, so that what shards or compiles modules sees every product."""

    def __init__(self, model: Transformer, tail_weight: float = 0.0) -> None:
        super().__init__()
        self.model, self.tail_weight = model, tail_weight
        self.losses = self._losses

    def _losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(self.model.project(rows), targets, self.tail_weight)

    def compile_parts(self) -> None:
        """Compiles each layer, once for every batch shape, and the loss, once for all."""
        torch._dynamo.config.recompile_limit = 64  # widths x (first and later layers): more than the default of 8
        for layer in self.model.layers:
            layer.compile(dynamic=False)
        self.losses = torch.compile(self._losses, dynamic=True)  # the number of labels is never quite the same

    def forward(self, ids: Tensor, index: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Sums of cross-entropy and z-loss; only the positions in `index` reach the head.

        Shapes: ids (B, T); index (L,) into the flattened ids; targets (L,), -100 where nothing is counted.
        """
        hidden = self.model(ids)  # (B, T, D)
        return self.losses(hidden.flatten(0, 1)[index], targets)
