"""Stand-ins on a CPU for CUDA kernels and for a device that torch was not built with.

Layouts and checks are those of the sources. int4: aten/src/ATen/native/cuda/int4mm.cu. flash: flash-attn 2.
"""

import ctypes
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


def sdpa_choice(capability: tuple[int, int], q: Tensor, k: Tensor, mask: Tensor | None, causal: bool) -> str:
    """Returns the attention kernel that torch selects. Source: its sdp_utils.cpp, version 2.13."""
    major, H = capability[0], q.shape[-1]
    half = q.dtype == torch.float16 or q.dtype == torch.bfloat16 and major >= 8
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    if cudnn and major in (9, 10) and half and H <= 128 and H % 8 == 0 and k.shape[2] > 1:  # since torch 2.11
        return "cudnn"
    if major >= 8 and half and mask is None and H <= 256 and not (causal and q.shape[2] != k.shape[2]):
        return "flash"
    grouped = q.shape[1] != k.shape[1]  # the efficient kernel does not take grouped heads
    aligned = (half or q.dtype == torch.float32) and H % (8 if half else 4) == 0
    return "efficient" if aligned and not grouped else "math"


def flash(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, causal: bool) -> Tensor:
    """Returns attention over the first `lengths` keys of each row. The causal mask is aligned to the last of them.

    Shapes: q (B, T, N, H); k, v (B, S, K, H); lengths (B,) int32; returns (B, T, N, H).
    """
    (B, T, N, H), (S, K) = q.shape, k.shape[1:3]
    assert q.dtype in HALVES and q.dtype == k.dtype == v.dtype and lengths.dtype == torch.int32 and H <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1 and lengths.is_contiguous() and N % K == 0
    assert B == len(k) == len(v) == len(lengths) and int(lengths.max()) <= S, "lengths beyond the cache"
    last = lengths[:, None] - (T - torch.arange(T) if causal else 1)  # (B, T)
    k, v = (x.float().repeat_interleave(N // K, 2).transpose(1, 2) for x in (k, v))
    scores = q.float().transpose(1, 2) @ k.mT * H**-0.5
    weights = scores.masked_fill((torch.arange(S) > last[..., None])[:, None], -torch.inf).softmax(-1).nan_to_num()
    return (weights @ v).transpose(1, 2).to(q.dtype)


def _places(K: int, tiles: int) -> Tensor:
    """Returns which byte of a row each place of the packed form holds.

    Shapes: -> (super tiles, lane % 4, pairs of tiles, four bytes).
    """
    sizes = (K // (16 * tiles), 4, tiles // 2, 4)
    outer, lane, pair, byte = torch.meshgrid(*map(torch.arange, sizes), indexing="ij")
    return (outer * tiles + 2 * pair) * 8 + byte // 2 * 8 + byte % 2 * 4 + lane


def _pack(weight: Tensor, tiles: int) -> Tensor:
    """`_convert_weight_to_int4pack`: the form in which the kernel reads a matrix."""
    N, K = len(weight), 2 * weight.shape[1]
    assert weight.dtype == torch.uint8 and weight.is_contiguous() and tiles in (2, 4, 8)
    assert K % (16 * tiles) == N % 8 == 0
    v = weight.view(N // 8, 8, -1).long()[:, :, _places(K, tiles)]
    packed = (torch.cat((v >> 4, v & 15), -1) << torch.arange(0, 32, 4)).sum(-1).permute(0, 2, 1, 3, 4).flatten(2, 3)
    return (packed - (packed >> 31 << 32)).int()


def _multiply(x: Tensor, packed: Tensor, group: int, pairs: Tensor) -> Tensor:
    """`_weight_int4pack_mm`: the product of `x` and a packed matrix."""
    K, N, tiles = x.shape[1], 8 * len(packed), 2 * packed.shape[3]
    assert x.dtype == pairs.dtype == torch.bfloat16 and packed.dtype == torch.int32 and group in (32, 64, 128, 256)
    assert x.is_contiguous() and packed.is_contiguous() and packed.shape[1:3] == (K // (16 * tiles), 32)
    assert pairs.is_contiguous() and pairs.shape == (K // group, N, 2) and K % group == 0
    nibbles = packed.long().unflatten(2, (8, 4)).permute(0, 2, 1, 3, 4)[..., None] >> torch.arange(0, 32, 4) & 15
    numbers, at = torch.empty(N // 8, 8, K), 2 * _places(K, tiles)
    numbers[:, :, at], numbers[:, :, at + 1] = nibbles[..., :4].float(), nibbles[..., 4:].float()
    scale, zero = (part.T.float().repeat_interleave(group, 1) for part in pairs.unbind(-1))
    return (x.float() @ ((numbers.view(N, K) - 8) * scale + zero).bfloat16().float().T).bfloat16()


INT4 = {"_convert_weight_to_int4pack": _pack, "_weight_int4pack_mm": _multiply}


_MACHINE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
};
struct Hooks : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
};
extern "C" void stand_in(bool on) {  // torch keeps one object of hooks from its first use on: it gets other methods
  static Guard guard; static Hooks hooks;
  static void** kept = (void**)&at::detail::getCUDAHooks(); static void* own = *kept;
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(on ? &guard : nullptr);
  *kept = on ? *(void**)&hooks : own;
}
"""


@cache
def machine() -> ctypes.CDLL:
    """Returns a library with what `to` and autograd ask of a device, which a build without CUDA lacks."""
    home = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "machine.cpp"), Path(folder, "machine.so")
        source.write_text(_MACHINE)
        command = ["g++", "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", str(source), "-o", str(library)]
        subprocess.run([*command, f"-L{home / 'lib'}", "-lc10", "-ltorch_cpu"], check=True)
        return ctypes.CDLL(str(library))
