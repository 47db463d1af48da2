"""Weight-only quantization: int4 matrices in the layers, and an int8 head on the CPU.

Embeddings, norms and biases keep their dtype. The head keeps its dtype on disk. On a CPU, the part of the head that
computes logits of image codes becomes int8 after loading, unless the head is tied to the embedding.

An int4 matrix has one of four forms: the portable form of int4.py, the packed form of torch's CPU or CUDA kernel, or
that of this project's native CPU kernel, which `kernels.dispatch` chooses where the processor and the sizes allow it.
The CUDA form follows torch's source and was never run on a GPU. torch's CUDA kernel reads all weights again for every
16 rows of its input; for many rows the weights are therefore dequantized once, one matrix at a time, and multiplied in
bf16.
"""

import logging

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lumina_mgpt.config import INT4_GROUPS
from lumina_mgpt.errors import InputError
from lumina_mgpt.kernels import dispatch, ops
from lumina_mgpt.model import pages
from lumina_mgpt.model.int4 import CHUNK, TINY, Int4, dequantize, dequantize_packed, quantize, unpack_nibbles

logger = logging.getLogger(__name__)

# Operators under torch.ops.aten. The first of a pair packs a matrix for the kernel, the second multiplies by it.
_CPU_OPS = ("_convert_weight_to_int4pack_for_cpu", "_weight_int4pack_mm_for_cpu")
_CUDA_OPS = ("_convert_weight_to_int4pack", "_weight_int4pack_mm")
_INT8_OP = "_weight_int8pack_mm"  # CPU only
# Up to so many rows torch's CUDA kernel multiplies: it reads the weights at most twice, as dequantizing them does.
KERNEL_ROWS = 32
_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of the inputs of torch's CPU kernels


def has_int8_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether `int8_linear` supports inputs of this dtype on this device."""
    return device.type == "cpu" and dtype in _CPU_DTYPES and hasattr(torch.ops.aten, _INT8_OP)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rounds each row of a matrix to int8. The scale of a row maps its largest magnitude to 127.

    Shapes: weight (N, K) -> numbers (N, K) int8, scale (N,) in the dtype of `weight`.
    """
    least = torch.finfo(weight.dtype).smallest_normal * torch.finfo(weight.dtype).eps  # fp16 needs subnormal scales
    scale = (weight.abs().amax(1).float() / 127).clamp_(min=max(least, TINY)).to(weight.dtype)
    numbers = torch.empty_like(weight, dtype=torch.int8)
    rows = max(1, CHUNK // weight.shape[1])
    for start in range(0, len(weight), rows):  # a float32 copy of the whole matrix would be the peak of loading
        part = slice(start, start + rows)
        numbers[part] = (weight[part].float() / scale[part, None].float()).round_().clamp_(-127, 127).to(torch.int8)
    return numbers, scale


def int8_linear(x: Tensor, numbers: Tensor, scale: Tensor) -> Tensor:
    """Returns `x @ W.T` for the int8 matrix W, whose row n is `numbers[n] · scale[n]`.

    The native kernel computes it where it supports the inputs, otherwise torch's CPU kernel does.

    Shapes: x (..., K), numbers (N, K) int8, scale (N,) -> (..., N).
    """
    rows = x.reshape(-1, x.shape[-1]).contiguous()
    native = dispatch.serves_int8(rows, numbers)
    multiply = torch.ops.lumina_mgpt.int8_linear if native else getattr(torch.ops.aten, _INT8_OP)
    return multiply(rows, numbers, scale).unflatten(0, x.shape[:-1])


class Int4Linear(nn.Module):
    """A linear layer with an int4 matrix. Its buffers hold the portable form until `pack` converts them for a kernel.

    Attributes:
        kernel: "cpu" or "cuda" after `pack`, the device whose kernel takes the matrix; None for the portable form.
        native: whether the matrix has the form of the native kernel, not that of torch's.

    Shapes: weight_int4 (N, K/2) uint8; weight_scale and weight_zero (N, K/group) bfloat16. These buffers have the same
    names on disk.
    """

    weight_int4: Tensor
    weight_scale: Tensor
    weight_zero: Tensor
    packed: Tensor
    scale_and_zero: Tensor
    bias: nn.Parameter | None

    def __init__(self, inputs: int, outputs: int, group: int, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.group = group
        self.kernel: str | None = None
        self.native = False
        self.register_buffer("weight_int4", torch.empty(outputs, inputs // 2, dtype=torch.uint8))
        for leaf in ("weight_scale", "weight_zero"):
            self.register_buffer(leaf, torch.empty(outputs, inputs // group, dtype=torch.bfloat16))
        self.register_parameter("bias", bias)

    @property
    def matrix(self) -> Int4:
        """The portable form of the matrix. Not available once `pack` has converted it."""
        return Int4(self.weight_int4, self.weight_scale, self.weight_zero)

    def load(self, leaf: str, tensor: Tensor, device: torch.device | str) -> None:
        """Sets one buffer from a tensor on disk, or quantizes a floating-point matrix and sets all three buffers.

        Args:
            leaf: name of the buffer that `tensor` holds, or `weight` if `tensor` is a floating-point matrix (N, K).
            device: device of the buffers.

        Raises:
            InputError: the dtype of the tensor is not that of the buffer, or it holds infinite values or NaN.
        """
        if leaf == "weight":
            self.weight_int4, self.weight_scale, self.weight_zero = quantize(tensor.to(device), self.group)
            return
        wanted = getattr(self, leaf).dtype
        if tensor.dtype != wanted:
            raise InputError(f"must hold {wanted}, got {tensor.dtype}")
        if wanted.is_floating_point and not tensor.isfinite().all():
            raise InputError("holds values that are infinite or not a number")
        # safetensors returns a view of the mapped file, so the buffer needs a copy.
        setattr(self, leaf, torch.empty(tensor.shape, dtype=wanted, device=device).copy_(tensor))

    def pack(self, dtype: torch.dtype) -> None:
        """Converts the buffers for the kernel that supports inputs of `dtype`.

        Without such a kernel, the buffers keep the portable form.
        """
        weight, N = self.weight_int4, len(self.weight_int4)
        self.kernel = _kernel(weight.device, dtype, N, 2 * weight.shape[1])
        if self.kernel is None:
            return
        self.native = self.kernel == "cpu" and dispatch.serves_int4(weight.device, dtype, N, self.group)
        if self.native:
            packed = pages.copied(ops.blocked_numbers(unpack_nibbles(weight)))
        elif self.kernel == "cpu":
            packed = getattr(torch.ops.aten, _CPU_OPS[0])(unpack_nibbles(weight).int(), 1)  # the CPU ignores the 1
        else:
            tiles = next(count for count in (8, 4, 2) if 2 * weight.shape[1] % (16 * count) == 0)
            packed = getattr(torch.ops.aten, _CUDA_OPS[0])(weight, tiles)
        pairs = torch.stack((self.weight_scale, self.weight_zero), -1).transpose(0, 1).to(dtype)  # (K/group, N, 2)
        if self.native:
            pairs = pages.copied(ops.blocked_scales(pairs))
        del self.weight_int4, self.weight_scale, self.weight_zero
        self.register_buffer("packed", packed)
        self.register_buffer("scale_and_zero", pairs.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Returns the output of the layer. Shapes: x (..., K) -> (..., N)."""
        if self.kernel is None:
            return F.linear(x, dequantize(self.matrix, x.dtype), self.bias)
        if self.native:
            return native(x, [self])[0]
        multiply = getattr(torch.ops.aten, (_CPU_OPS if self.kernel == "cpu" else _CUDA_OPS)[1])
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if self.kernel == "cuda" and len(rows) > KERNEL_ROWS:
            return F.linear(x, dequantize_packed(self.packed, self.scale_and_zero, self.group), self.bias)
        out = multiply(rows, self.packed, self.group, self.scale_and_zero).unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def apply_all(x: Tensor, *linears: nn.Module) -> list[Tensor]:
    """Returns the output of each module for the input `x`. Uses one kernel call if the native kernel serves all.

    Forward hooks of the modules do not run then.

    Shapes: x (..., K) -> one (..., N) per module, each with its own N.
    """
    int4 = [linear for linear in linears if isinstance(linear, Int4Linear) and linear.native]
    if len(int4) == len(linears):
        return native(x, int4)
    return [linear(x) for linear in linears]


def native(
    x: Tensor,
    linears: list[Int4Linear],
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> list[Tensor]:
    """Returns the outputs of modules whose matrices have the native form, for the same input.

    Args:
        norm: weights of an RMS norm that applies to x first; None for no norm.
        eps: of the norm.
        gated: whether to return one output: silu of the output of the first of two modules times that of the second.
        residual: is added to the output of a single module; None for none.

    `gated` and `residual` need modules without biases. Forward hooks of the modules do not run.

    Shapes: x (..., K) -> one (..., N) per module, each with its own N; norm (K,), residual (..., N).

    Raises:
        RuntimeError: x requires a gradient.
    """
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("packed int4 weights have no gradient")
    assert not (gated or residual is not None) or all(linear.bias is None for linear in linears)
    rows, group = x.reshape(-1, x.shape[-1]).contiguous(), linears[0].group
    packed, scales = [linear.packed for linear in linears], [linear.scale_and_zero for linear in linears]
    added = None if residual is None else residual.reshape(len(rows), -1).contiguous()
    found = torch.ops.lumina_mgpt.int4_linear(rows, packed, group, scales, norm, eps, gated, added)
    outs = [out.unflatten(0, x.shape[:-1]) for out in found]
    return [out if of.bias is None else out + of.bias for of, out in zip(linears, outs, strict=not gated)]


def _kernel(device: torch.device, dtype: torch.dtype, outputs: int, inputs: int) -> str | None:
    """Returns which of torch's kernels takes these inputs and this matrix. Source: its shape checks in torch 2.13."""
    if device.type == "cpu" and dtype in _CPU_DTYPES and outputs % 16 == 0:
        return "cpu"
    if device.type == "cuda" and dtype == torch.bfloat16 and outputs % 8 == 0 and inputs % 32 == 0:
        return "cuda" if torch.cuda.get_device_capability(device) >= (8, 0) else None
    return None


def require_kernel(device: torch.device | str) -> None:
    """Raises an error if this build of torch lacks the int4 kernel for this device.

    Raises:
        InputError: an operator of the kernel is missing.
    """
    operators = {"cpu": _CPU_OPS, "cuda": _CUDA_OPS}.get(torch.device(device).type, ())
    missing = [name for name in operators if not hasattr(torch.ops.aten, name)]
    if missing:
        raise InputError(
            f"int4 weights need torch's operator {missing[0]}, which torch {torch.__version__} lacks; "
            "install the torch of requirements.txt, or use weights without quantization"
        )


def replace_linears(model: nn.Module, group: int) -> None:
    """Replaces every linear layer in `model.layers` by an Int4Linear without weights yet, on the same device.

    Args:
        group: number of weights that share a scale.

    Raises:
        InputError: `group` does not divide the number of inputs of a layer. No layer is replaced then.
    """
    layers = model.get_submodule("layers")
    found = {name: module for name, module in layers.named_modules() if isinstance(module, nn.Linear)}
    for name, linear in found.items():
        if linear.in_features % group:
            fitting = [other for other in INT4_GROUPS if linear.in_features % other == 0]
            remedy = f"try quant={fitting[-1]}" if fitting else "this model cannot be quantized to int4"
            rule = f"must divide the {linear.in_features} inputs of layers.{name}, got {group}"
            raise InputError(f"{rule}; {remedy}", "quant")
    for name, linear in found.items():
        owner, _, leaf = name.rpartition(".")
        with linear.weight.device:
            replacement = Int4Linear(linear.in_features, linear.out_features, group, linear.bias)
        setattr(layers.get_submodule(owner), leaf, replacement)


def pack_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Packs every Int4Linear for inputs of `dtype`. Logs a warning if there is no kernel for some of them."""
    without = 0
    for module in model.modules():
        if isinstance(module, Int4Linear):
            module.pack(dtype)
            without += module.kernel is None
    if without:
        logger.warning(
            "no int4 kernel for %s in %s fits %d matrices: they are dequantized at every step, which is slow",
            next(model.parameters()).device,
            str(dtype).removeprefix("torch."),
            without,
        )
