"""Linear layers with floating-point weights, computed by the faster of two libraries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# F.linear in float32 uses MKL; this operator uses oneDNN.
_ONEDNN = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
_AMX = torch.cpu.get_capabilities().get("amx_tile")
# With AMX, MKL is faster up to these numbers of rows, and for any number of rows up to this number of weights.
_MKL_ROWS, _MKL_WEIGHTS = (3, 1 << 19) if _AMX else (0, 0)
# Without AMX, it is faster for these few rows of a matrix that stays in the processor's cache.
_FEW_ROWS, _CACHED_WEIGHTS = (0, 0) if _AMX else (4, 1 << 20)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns `x @ weight.T + bias`.

    On a CPU, in float32 and without gradients, oneDNN computes it where oneDNN is faster than torch's default (MKL).
    This depends on the processor and on the number of rows of x. For a weight of 11008 x 4096, two cores read these
    GB/s of weights ("memory" is the limit of the memory):

        rows                          1    2    3    4    8   16   32
        with AMX         MKL         32   30   28   15   10    9    9
        (memory: 33)     oneDNN      28   24   23   22   20   16   12
        without AMX      MKL         22   11
        (memory: 32)     oneDNN      33   28

    A weight of 384 x 384 with AMX and the same rows takes, in microseconds: MKL 10, 10, 11, 21, 23, 32, 47; oneDNN 24,
    35, 35, 36, 39, 50, 67. Without AMX, a weight of 1024 x 384 takes on two cores, for 1, 2, 4 and 16 rows: MKL 16, 13,
    18, 76; oneDNN 26, 59, 59, 82. Both libraries accumulate in float32, in different orders.

    These are figures of Intel processors. Others are treated as those without AMX, which was not measured.

    Shapes: x (..., K), weight (N, K), bias (N,) or None -> (..., N).
    """
    if _ONEDNN and x.numel() and x.device.type == "cpu" and x.dtype == torch.float32 == weight.dtype:
        if not (torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()):
            few = x.numel() <= _FEW_ROWS * x.shape[-1] and weight.numel() <= _CACHED_WEIGHTS
            if not few and x.numel() > _MKL_ROWS * x.shape[-1] and weight.numel() > _MKL_WEIGHTS:
                return _ONEDNN(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """An `nn.Linear` whose forward calls the function `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the layer. Shapes: x (..., K) -> (..., N)."""
        return linear(x, self.weight, self.bias)
