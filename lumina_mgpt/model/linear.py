"""Products with plain weights: torch's `linear`, or another library where that one is quicker."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# oneDNN's, where `linear` in float32 is MKL's.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
# Where MKL is the quicker one: for so few rows, or so small a matrix, on processors with AMX.
_MKL_ROWS, _MKL_NUMBERS = (3, 1 << 19) if torch.cpu.get_capabilities().get("amx_tile") else (0, 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, by oneDNN in float32 on a CPU where that is quicker and no gradient is wanted.

    Which is quicker depends on the processor. GB/s of weights on two cores, for 11008 x 4096:

        rows                          1    2    3    4    8   16   32
        with AMX         MKL         32   30   28   15   10    9    9
        (memory: 33)     oneDNN      28   24   23   22   20   16   12
        without          MKL         22   11
        (memory: 32)     oneDNN      33   28

    And us for 384 x 384, with AMX: MKL 10, 10, 11, 21, 23, 32, 47, oneDNN 24, 35, 35, 36, 39, 50, 67. Both add in
    float32, in another order.

    Shapes: x (..., K), weight (N, K), bias (N,) or None -> (..., N).
    """
    if _ONEDNN and x.numel() and x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype:
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            if x.numel() > _MKL_ROWS * x.shape[-1] and weight.numel() > _MKL_NUMBERS:
                return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear` by the quicker product."""

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias)
