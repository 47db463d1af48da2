"""Products with plain weights: torch's `linear`, or a quicker library where that reads the weights more than once."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# What torch.compile itself calls for a matrix product on a CPU: oneDNN's, where `linear` in float32 is MKL's.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by oneDNN in float32 on a CPU when no gradient is wanted.

    With few rows, MKL reads a matrix once for each, and slowly. GB/s of weights on two cores, whose memory gives 32,
    for 11008 x 4096: 22 with one row and 11 with two by MKL, 33 and 28 by oneDNN. CPU ms of one thread, on a busy
    machine, for 4096 x 4096 with 4, 8 and 16 rows: 8.8, 9.5, 12.7 and 5.7, 6.2, 9.1. Both add in float32, in another
    order.

    Shapes: x (..., K), weight (N, K), bias (N,) or None -> (..., N).
    """
    if _ONEDNN and x.numel() and x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype:
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by the quicker product."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias)
