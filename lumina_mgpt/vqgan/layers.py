"""Layers of encoder and decoder: a convolution without large temporaries, norms, residual blocks and attention.

A norm is plain (`z_channels` None) or spatial: modulated by a latent of `z_channels` channels. Layers take the latent
in both cases; plain norms ignore it.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lumina_mgpt.cuda import torch_attention

_GROUPS = 32  # of all group norms


def convolve(conv: nn.Conv2d, x: Tensor, scale: int = 1, band_pixels: int = 1 << 17) -> Tensor:
    """Enlarges `x` by nearest neighbour and convolves it with a 3x3 kernel, without large temporaries.

    In inference, feature maps above `band_pixels` pixels are processed in bands of rows with one row of halo, which
    gives the same result. This avoids the enlarged copy, and the copies with which the backend reorders its operands:
    gigabytes at 1024 x 1024 with 256 channels.
    """
    B, _, H, W = x.shape
    if torch.is_grad_enabled() or H * W * scale * scale <= band_pixels:
        return conv(F.interpolate(x, scale_factor=scale, mode="nearest") if scale > 1 else x)
    out = x.new_empty(B, conv.out_channels, H * scale, W * scale)
    rows = max(1, band_pixels // (W * scale * scale))
    for top in range(0, H, rows):
        bottom = min(H, top + rows)
        halo_top, halo_bottom = max(0, top - 1), min(H, bottom + 1)
        band = x[:, :, halo_top:halo_bottom]
        if scale > 1:
            band = F.interpolate(band, scale_factor=scale, mode="nearest")
        start = (top - halo_top) * scale
        out[:, :, top * scale : bottom * scale] = conv(band)[:, :, start : start + (bottom - top) * scale]
    return out


class SpatialNorm(nn.Module):
    """Group norm whose scale and shift at each cell come from the quantized latent (MoVQ, equations 3 and 4)."""

    def __init__(self, width: int, z_channels: int) -> None:
        super().__init__()
        self.norm_layer = nn.GroupNorm(_GROUPS, width, eps=1e-6)
        self.conv_y = nn.Conv2d(z_channels, width, 1)
        self.conv_b = nn.Conv2d(z_channels, width, 1)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        # A 1x1 convolution commutes with nearest-neighbour enlargement, so it runs on the small latent.
        x = self.norm_layer(x)
        scale, shift = self.conv_y(latent), self.conv_b(latent)
        if torch.is_grad_enabled():
            size = x.shape[-2:]
            return torch.addcmul(F.interpolate(shift, size), x, F.interpolate(scale, size))
        # Inference broadcasts over the pixels of a cell instead of enlarging scale and shift.
        h, w = latent.shape[-2:]
        cells = rearrange(x, "B C (h i) (w j) -> B C h i w j", h=h, w=w)
        cells.mul_(scale[:, :, :, None, :, None]).add_(shift[:, :, :, None, :, None])
        return x


class Norm(nn.GroupNorm):
    """Group norm with the signature of `SpatialNorm`. It ignores the latent."""

    def __init__(self, width: int) -> None:
        super().__init__(_GROUPS, width, eps=1e-6)

    def forward(self, input: Tensor, latent: Tensor | None = None) -> Tensor:
        return super().forward(input)


def make_norm(width: int, z_channels: int | None) -> nn.Module:
    """Returns a plain norm if `z_channels` is None, else a spatial one."""
    return Norm(width) if z_channels is None else SpatialNorm(width, z_channels)


class ResnetBlock(nn.Module):
    """Two convolutions with norms on a residual branch."""

    def __init__(self, inp: int, out: int, z_channels: int | None) -> None:
        super().__init__()
        self.norm1 = make_norm(inp, z_channels)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.norm2 = make_norm(out, z_channels)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor, latent: Tensor | None) -> Tensor:
        inplace = not torch.is_grad_enabled()
        h = F.silu(self.norm1(x, latent), inplace=inplace)
        h = convolve(self.conv1, h)
        h = F.silu(self.norm2(h, latent), inplace=inplace)
        h = convolve(self.conv2, h)
        if hasattr(self, "nin_shortcut"):  # last, when the fewest other tensors are in memory
            x = self.nin_shortcut(x)
        return h.add_(x) if inplace else x + h


class AttentionBlock(nn.Module):
    """Single-head attention over all cells of a feature map, in chunks that avoid a large matrix of cells x cells."""

    def __init__(self, width: int, z_channels: int | None) -> None:
        super().__init__()
        self.norm = make_norm(width, z_channels)
        self.q = nn.Conv2d(width, width, 1)
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, latent: Tensor | None) -> Tensor:
        h = self.norm(x, latent)
        q, k, v = (rearrange(conv(h), "B C h w -> B 1 (h w) C") for conv in (self.q, self.k, self.v))
        h = rearrange(self._attend(q, k, v), "B 1 (h w) C -> B C h w", w=x.shape[-1])
        return x + self.proj_out(h)

    @staticmethod
    def _attend(q: Tensor, k: Tensor, v: Tensor, queries: int = 2048) -> Tensor:
        # For head widths without a fused kernel (512 and 1024 here) SDPA computes the full matrix, so queries are
        # split into chunks, and the matrix has at most chunk x cells entries.
        if q.shape[-2] <= queries:
            return torch_attention(q, k, v)
        return torch.cat([torch_attention(part, k, v) for part in q.split(queries, -2)], -2)
