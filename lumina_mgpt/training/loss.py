"""Next-id loss over labelled positions."""

import torch
from torch import Tensor, nn

from lumina_mgpt.model.transformer import Transformer


def token_losses(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and of logsumexp² (the z-loss) in float32; a target below 0 counts nothing.

    With `smoothing`, in [0, 1), that share of each target is spread over all ids. Guidance multiplies differences of
    logits, so where all ids may be drawn it needs unlikely ones to be equally unlikely with and without a prompt, which
    one-hot targets never teach.

    Shapes: logits (L, V), targets (L,); returns two scalars.
    Source: label smoothing, arXiv 1512.00567, section 7; z-loss of PaLM (arXiv 2204.02311), section 5.
    """
    logits = logits.float()
    counted = targets >= 0
    total = logits.logsumexp(-1)  # (L,)
    chosen = logits.gather(-1, targets.clamp(min=0)[:, None])[:, 0]
    if smoothing:
        chosen = (1 - smoothing) * chosen + smoothing * logits.mean(-1)
    zero = total.new_zeros(())
    return torch.where(counted, total - chosen, zero).sum(), torch.where(counted, total.square(), zero).sum()


class LossModel(nn.Module):
    """The transformer with its loss as one module, so that what shards or compiles modules sees every product."""

    def __init__(self, model: Transformer, smoothing: float = 0.0) -> None:
        super().__init__()
        self.model, self.smoothing = model, smoothing
        self.losses = self._losses

    def _losses(self, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        return token_losses(self.model.project(rows), targets, self.smoothing)

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
