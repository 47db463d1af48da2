"""Weight-only int4: the matrices of the layers held as 4-bit numbers, with a scale and a zero for each group of inputs.

A weight is `(q - 8) · scale + zero`, with q in 0 ... 15, and one bf16 scale and zero for each `group` neighbouring
inputs of an output: 4.25 bits a weight in groups of 128. Embeddings, norms and biases stay as they are; so does the
head on disk, while on a CPU its columns of image codes become int8 when they are loaded (not those of a tied one).

Three forms of one matrix: the portable one, which is on disk too and which anything can dequantize; and one for each of
torch's own kernels, on a CPU and on CUDA. (The one for CUDA follows torch's documentation; it was not run here.) On a
CPU with AMX the product is this project's own, of torch's form: see native.py.
"""

import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_mgpt.config import INT4_GROUPS
from lumina_mgpt.errors import InputError
from lumina_mgpt.kernels import dispatch, ops

logger = logging.getLogger(__name__)

# torch's operators under torch.ops.aten: one makes a kernel's form of a matrix, the other multiplies by it.
_CPU_OPS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
_CUDA_OPS = ("_convert_weight_to_int4pack", "_weight_int4pack_mm")
_INT8_OP = "_weight_int8pack_mm"  # on a CPU
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the inputs, by either kernel
# Shares of the range below and above its middle that a search begins with: nine tenths clip the outermost weights.
_STARTS = ((1.0, 1.0), (0.9, 1.0), (1.0, 0.9), (0.9, 0.9))
_FITS = 2
_TINY = 1e-30  # smaller scales are those of equal weights
_CHUNK = 1 << 18  # weights worked on at once: temporaries stay in a processor's cache


class Int4(NamedTuple):
    """The portable form of a matrix (N, K): two numbers a byte, the first in the high half; one scale and zero a group.

    Shapes: packed (N, K/2) uint8; scale and zero (N, K/group) bfloat16.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor


def quantize(weight: Tensor, group: int) -> Int4:
    """The portable form with the least squared error that a short search finds, on the device of the weight.

    Four starts (the whole range of a group, or one with either end or both drawn in), each improved twice by rounding
    and then fitting scale and zero by least squares; the best of the four is kept, judged with scale and zero as they
    will be stored. Squared error relative to that of plain rounding over the whole range (which is 0.0061, 0.0080 and
    0.0100 of the squared weights for normal weights):

        groups of         32     64    128
        normal weights  0.804  0.834  0.839
        demo's layers   0.805  0.833  0.840

    One start alone gives 0.88, 0.91 and 0.93; sixteen, fitted four times, 0.79 and 0.82 (32 and 128) in seven times the
    time. Storing scale and zero in bf16 instead of float32 changes these by less than 0.001.

    Shapes: weight (N, K), K a multiple of group.

    Raises:
        InputError: a weight is infinite or not a number.
    """
    N, K = weight.shape
    scale, zero = (torch.empty(N, K // group, dtype=torch.bfloat16, device=weight.device) for _ in range(2))
    packed = torch.empty(N, K // 2, dtype=torch.uint8, device=weight.device)
    rows = max(1, _CHUNK // K)
    for start in range(0, N, rows):
        part = slice(start, start + rows)
        groups = weight[part].float().unflatten(1, (-1, group))  # (rows, K/group, group)
        s, z = _search(groups)
        scale[part], zero[part] = s.squeeze(-1), z.squeeze(-1)
        packed[part] = pack_nibbles((_round(groups, s, z) + 8).flatten(1).to(torch.uint8))
    return Int4(packed, scale, zero)


def dequantize(matrix: Int4, dtype: torch.dtype = torch.float32) -> Tensor:
    """The weights that a portable form stands for, computed in float32 (float64 for float64). Shapes: -> (N, K)."""
    wide = torch.promote_types(dtype, torch.float32)
    scale, zero = (tensor.to(wide).unsqueeze(-1) for tensor in matrix[1:])  # (N, K/group, 1)
    numbers = unpack_nibbles(matrix.packed).to(wide).unflatten(1, (scale.shape[1], -1))  # (N, K/group, group)
    return torch.addcmul(zero, numbers - 8, scale).flatten(1).to(dtype)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """(N, K) of 0 ... 15 -> (N, K/2) bytes, uint8 both; the first of two in the high half, as torch wants on CUDA."""
    return numbers[:, ::2] << 4 | numbers[:, 1::2]


def unpack_nibbles(packed: Tensor) -> Tensor:
    """(N, K/2) bytes -> (N, K) of 0 ... 15, uint8 both."""
    return torch.stack((packed >> 4, packed & 15), -1).flatten(1)


def _search(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero of each group, rounded to bf16. Shapes: weights (..., group) -> two of (..., 1), float32."""
    low, high = weights.aminmax(dim=-1, keepdim=True)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        raise InputError("holds weights that are infinite or not a number")
    middle, half = (low + high) / 2, (high - low) / 2
    best = (torch.full_like(low, torch.inf), low, low)
    for below, above in _STARTS:
        scale = half * (below + above) / 15
        zero = middle - half * below + 8 * scale
        scale = torch.where(scale >= _TINY, scale, 1.0)  # of equal weights: all are zero then, whatever the scale
        for _ in range(_FITS):
            scale, zero = _fit(weights, _round(weights, scale, zero), scale)
        scale, zero = (tensor.bfloat16().float() for tensor in (scale, zero))
        error = torch.addcmul(zero, _round(weights, scale, zero), scale).sub_(weights).square_().sum(-1, keepdim=True)
        better = error < best[0]
        best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))
    return best[1], best[2]


def _round(weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """The nearest of the sixteen numbers, -8 ... 7."""
    return weights.sub(zero).div_(scale).round_().clamp_(-8, 7)


def _fit(weights: Tensor, numbers: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares of `weights = numbers · scale + zero`; where all numbers are equal, the scale stays what it was."""
    mean = numbers.mean(-1, keepdim=True)
    deviations = numbers - mean
    spread = deviations.square().sum(-1, keepdim=True)
    slope = (deviations * weights).sum(-1, keepdim=True) / spread
    scale = torch.where(slope >= _TINY, slope, scale)  # not where it is 0/0
    return scale, weights.mean(-1, keepdim=True) - scale * mean


def has_int8_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `int8_linear` works here."""
    return device.type == "cpu" and dtype in _CPU_DTYPES and hasattr(torch.ops.aten, _INT8_OP)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds to int8, the largest weight of each output being 127; scales as torch's kernel wants them.

    Shapes: weight (N, K) -> (N, K) int8 and (N,) of the weight's own dtype.
    """
    least = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps  # fp16 needs the subnormal ones
    scale = (weight.abs().amax(1).float() / 127).clamp_(min=max(least, _TINY)).to(weight.dtype)
    numbers = torch.empty_like(weight, dtype=torch.int8)
    rows = max(1, _CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):  # a float32 copy of the whole would be the peak of loading
        part = slice(start, start + rows)
        numbers[part] = (weight[part].float() / scale[part, None].float()).round_().clamp_(-127, 127).to(torch.int8)
    return numbers, scale


def int8_linear(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """`x @ (numbers · scale).T`, by torch's kernel for a CPU or, in bf16 where it works, this project's own.

    Shapes: x (..., K), numbers (N, K), scale (N,) -> (..., N).
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    own = dispatch.serves_int8(rows, numbers)
    multiply = torch.ops.lumina_mgpt.int8_linear if own else getattr(torch.ops.aten, _INT8_OP)
    return multiply(rows, numbers, scale).unflatten(0, x.shape[:-1])


class Int4Linear(nn.Module):
    """`x @ W.T + bias` with W in int4. Its buffers are the portable form until `pack` makes a kernel's form of them.

    Shapes: weight_int4 (N, K/2) uint8, weight_scale and weight_zero (N, K/group) bfloat16; these names are on disk too.
    """

    def __init__(self, inputs: int, outputs: int, group: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.group = group
        self.kernel: str | None = None  # "cpu" or "cuda" once packed
        self.native = False  # whether `native` multiplies then
        self.register_buffer("weight_int4", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        for leaf in ("weight_scale", "weight_zero"):
            self.register_buffer(leaf, torch.empty(outputs, inputs // group, dtype=torch.bfloat16))
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> Int4:
        """The portable form, before `pack`."""
        return Int4(self.weight_int4, self.weight_scale, self.weight_zero)

    def take(self, leaf: str, tensor: Tensor, device: torch.device | str) -> None:
        """Puts one tensor of a file in place: a part of the portable form, or the `weight` (N, K) to be quantized.

        Raises:
            InputError: the tensor has another kind of number, or weights are not finite.
        """
        if leaf == "weight":
            self.weight_int4, self.weight_scale, self.weight_zero = quantize(tensor.to(device), self.group)
            return
        wanted = getattr(self, leaf).dtype
        if tensor.dtype != wanted:
            raise InputError(f"must hold {wanted}, got {tensor.dtype}")
        if wanted.is_floating_point and not tensor.isfinite().all():
            raise InputError("holds values that are infinite or not a number")
        # A copy of its own: what safetensors returns is a view of the file.
        setattr(self, leaf, torch.empty(tensor.shape, dtype=wanted, device=device).copy_(tensor))

    def pack(self, dtype: torch.dtype) -> None:
        """Changes to the form that the kernel for inputs of `dtype` here needs; stays portable where there is none."""
        weight, N = self.weight_int4, len(self.weight_int4)
        self.kernel = _kernel(weight.device, dtype, N, 2 * weight.shape[1])
        if self.kernel is None:
            return
        if self.kernel == "cpu":
            packed = getattr(torch.ops.aten, _CPU_OPS[0])(unpack_nibbles(weight).int(), 1)  # the 1 means nothing here
        else:
            tiles = next(count for count in (8, 4, 2) if 2 * weight.shape[1] % (16 * count) == 0)
            packed = getattr(torch.ops.aten, _CUDA_OPS[0])(weight, tiles)
        pairs = torch.stack((self.weight_scale, self.weight_zero), -1).transpose(0, 1).to(dtype)  # (K/group, N, 2)
        self.native = self.kernel == "cpu" and dispatch.serves_int4(weight.device, dtype, N, self.group)
        if self.native:
            pairs = ops.blocked_scales(pairs)
        del self.weight_int4, self.weight_scale, self.weight_zero
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", pairs.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: x (..., K) -> (..., N)."""
        if self.kernel is None:
            return F.linear(x, dequantize(self.matrix, x.dtype), self.bias)
        if self.native:
            return _native(x, self)[0]
        multiply = getattr(torch.ops.aten, (_CPU_OPS if self.kernel == "cpu" else _CUDA_OPS)[1])
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        out = multiply(rows, self.packed, self.group, self.scale_and_zero).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def products(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """What each of several modules makes of x; in one call, which costs less, where all are int4 and `native`.

    Shapes: x (..., K) -> (..., N) of each.
    """
    if all(isinstance(linear, Int4Linear) and linear.native for linear in linears):
        return _native(x, *linears)
    return [linear(x) for linear in linears]


def _native(x: Tensor, *linears: Int4Linear) -> list[Tensor]:
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("packed int4 weights have no gradient")
    rows, group = x.reshape(-1, x.shape[-1]).contiguous(), linears[0].group
    packed, pairs = ([getattr(linear, leaf) for linear in linears] for leaf in ("packed", "scale_and_zero"))
    outs = [out.unflatten(0, x.shape[:-1]) for out in torch.ops.lumina_mgpt.int4_linear(rows, packed, group, pairs)]
    return [out if of.bias is None else out + of.bias for of, out in zip(linears, outs, strict=True)]


def _kernel(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> str | None:
    """Which of torch's kernels multiplies such inputs by such a matrix. Sources: its shape checks, in torch 2.13."""
    if device.type == "cpu" and dtype in _CPU_DTYPES and outputs % 16 == 0:
        return "cpu"
    if device.type == "cuda" and dtype == torch.bfloat16 and outputs % 8 == 0 and inputs % 32 == 0:
        return "cuda" if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return None


def require_kernel(device: torch.device | str) -> None:
    """Refuses a build of torch that lacks the int4 kernel of this device.

    Raises:
        InputError: naming the operator that is missing.
    """
    ops = {"cpu": _CPU_OPS, "cuda": _CUDA_OPS}.get(torch.device(device).type, ())
    missing = [name for name in ops if not hasattr(torch.ops.aten, name)]
    if missing:
        raise InputError(
            f"int4 weights need torch's operator {missing[0]}, which torch {torch.__version__} lacks; "
            "install the torch of requirements.txt, or use weights that are not quantized, without --quant"
        )


def swap(model: nn.Module, group: int) -> None:
    """Puts an empty Int4Linear in the place of every matrix of `model.layers`, on the device that it was on.

    Raises:
        InputError: a matrix cannot be cut into such groups; then none was replaced.
    """
    found = {name: module for name, module in model.layers.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in found.items():
        if linear.in_features % group:
            fitting = [str(other) for other in INT4_GROUPS if linear.in_features % other == 0]
            remedy = f"try --quant_group {fitting[-1]}" if fitting else "this model cannot be quantized so"
            raise InputError(
                f"--quant_group must divide the {linear.in_features} inputs of layers.{name}, got {group}; {remedy}"
            )
    for name, linear in found.items():
        owner, _, leaf = name.rpartition(".")
        with linear.weight.device:
            replacement = Int4Linear(linear.in_features, linear.out_features, group, linear.bias)
        setattr(model.layers.get_submodule(owner), leaf, replacement)


def pack(model: nn.Module, dtype: torch.dtype) -> None:
    """Makes every Int4Linear ready for inputs of `dtype`, one after the other, and says so where there is no kernel."""
    slow = 0
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack(dtype)
            slow += module.kernel is None
    if slow:
        logger.warning(
            "no int4 kernel for %s in %s fits %d matrices: they are dequantized at every step, which is slow",
            next(model.parameters()).device, str(dtype).removeprefix("torch."), slow,
        )  # fmt: skip

