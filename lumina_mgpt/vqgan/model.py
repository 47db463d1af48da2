"""MoVQGAN (Zheng et al. 2022, "MoVQ: Modulating Quantized Vectors for High-Fidelity Image Generation").

The encoder is that of VQGAN. It halves the resolution between levels, so with four levels a latent cell covers 8 x 8
pixels. Every norm of the decoder is a group norm. Its scale and shift are 1x1 convolutions of the quantized latent.

Module names are the keys of the released state dict: `encoder.*`, `decoder.*`, `quantize.embedding.weight`,
`quant_conv.*`, `post_quant_conv.*`.

Shape letters: B batch, C channels, Z latent channels; h, w latent cells; H, W pixels or positions of a feature map.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lumina_mgpt.cuda import torch_attention
from lumina_mgpt.errors import InputError

_IGNORED = ("loss.", "ema_", "model_ema.", "quantize.embedding.cluster", "quantize.embedding.embed_avg")
_GROUPS = 32  # of all group norms
_CHUNK_CELLS = 4096  # cells whose distances to all codes are computed at once: 256 MiB for 16,384 codes


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN. Of the released files, 67M has (ch, blocks) = (128, 2), 102M (128, 4) and 270M (256, 2).

    Attributes:
        ch: channels of the first feature map.
        blocks: number of residual blocks per level of the encoder.
        mult: channels of each level, as multiples of `ch`.
        z_channels: channels of the latent that the decoder takes.
        embed_dim: width of a codebook entry.
        num_codes: number of codebook entries.
        attention_levels: indices of the levels with attention.
    """

    ch: int
    blocks: int
    mult: tuple[int, ...] = (1, 2, 2, 4)
    z_channels: int = 4
    embed_dim: int = 4
    num_codes: int = 16384
    attention_levels: tuple[int, ...] = (3,)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "VQGANConfig":
        """Returns the sizes that follow from the names and shapes of a state dict.

        Raises:
            InputError: a tensor that determines a size is missing.
        """

        def count(template: str) -> int:
            n = 0
            while template.format(n) in state:
                n += 1
            return n

        try:
            ch = state["encoder.conv_in.weight"].shape[0]
            state["encoder.down.0.block.0.conv1.weight"]  # absent under other programs' names
            levels = count("encoder.down.{}.block.0.conv1.weight")
            widths = [state[f"encoder.down.{n}.block.0.conv1.weight"].shape[0] for n in range(levels)]
            embed_dim, z_channels = state["quant_conv.weight"].shape[:2]
            attention = (n for n in range(levels) if f"encoder.down.{n}.attn.0.q.weight" in state)
            return cls(
                ch=ch,
                blocks=count("encoder.down.0.block.{}.conv1.weight"),
                mult=tuple(width // ch for width in widths),
                z_channels=z_channels,
                embed_dim=embed_dim,
                num_codes=state["quantize.embedding.weight"].shape[0],
                attention_levels=tuple(attention),
            )
        except (KeyError, ValueError) as error:
            fault = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"not a MoVQGAN state dict in the released names: {fault}; see the README") from None

    @property
    def cell(self) -> int:
        """Side of the square that one code stands for, in pixels."""
        return 2 ** (len(self.mult) - 1)


def _conv(conv: nn.Conv2d, x: Tensor, scale: int = 1, band_pixels: int = 1 << 17) -> Tensor:
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


def _norm(width: int, z_channels: int | None) -> nn.Module:
    return Norm(width) if z_channels is None else SpatialNorm(width, z_channels)


class ResnetBlock(nn.Module):
    """Two convolutions with norms on a residual branch."""

    def __init__(self, inp: int, out: int, z_channels: int | None) -> None:
        super().__init__()
        self.norm1 = _norm(inp, z_channels)
        self.conv1 = nn.Conv2d(inp, out, 3, padding=1)
        self.norm2 = _norm(out, z_channels)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1)
        if inp != out:
            self.nin_shortcut = nn.Conv2d(inp, out, 1)

    def forward(self, x: Tensor, latent: Tensor | None) -> Tensor:
        inplace = not torch.is_grad_enabled()
        h = F.silu(self.norm1(x, latent), inplace=inplace)
        h = _conv(self.conv1, h)
        h = F.silu(self.norm2(h, latent), inplace=inplace)
        h = _conv(self.conv2, h)
        if hasattr(self, "nin_shortcut"):  # last, when the fewest other tensors are in memory
            x = self.nin_shortcut(x)
        return h.add_(x) if inplace else x + h


class AttentionBlock(nn.Module):
    """Single-head attention over all cells of a feature map, in chunks that avoid a large matrix of cells x cells."""

    def __init__(self, width: int, z_channels: int | None) -> None:
        super().__init__()
        self.norm = _norm(width, z_channels)
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


class _Middle(nn.Module):
    def __init__(self, width: int, z_channels: int | None) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(width, width, z_channels)
        self.attn_1 = AttentionBlock(width, z_channels)
        self.block_2 = ResnetBlock(width, width, z_channels)

    def forward(self, x: Tensor, latent: Tensor | None) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x, latent), latent), latent)


class _Resample(nn.Module):
    def __init__(self, width: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=stride, padding=0 if stride == 2 else 1)


class _Level(nn.Module):
    """Blocks of one resolution, each followed by attention if the level has it, then a change of resolution."""

    downsample: _Resample
    upsample: _Resample

    def __init__(self, inp: int, out: int, blocks: int, attention: bool, z_channels: int | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(inp if i == 0 else out, out, z_channels) for i in range(blocks))
        self.attn = nn.ModuleList(AttentionBlock(out, z_channels) for _ in range(blocks if attention else 0))

    def forward(self, x: Tensor, latent: Tensor | None) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x, latent)
            if self.attn:
                x = self.attn[i](x, latent)
        if hasattr(self, "downsample"):  # as VQGAN: pads on the right and at the bottom only
            x = self.downsample.conv(F.pad(x, (0, 1, 0, 1)))
        if hasattr(self, "upsample"):
            x = _conv(self.upsample.conv, x, scale=2)
        return x


class Encoder(nn.Module):
    """Encoder network, which converts pixels to latents."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths = [config.ch * m for m in config.mult]
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for n, (inp, out) in enumerate(zip([config.ch, *widths], widths, strict=False)):
            level = _Level(inp, out, config.blocks, n in config.attention_levels, None)
            if n < len(widths) - 1:
                level.downsample = _Resample(out, stride=2)
            self.down.append(level)
        self.mid = _Middle(widths[-1], None)
        self.norm_out = Norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], config.z_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the latents of images. Shapes: pixels (B, 3, H, W) -> (B, Z, h, w)."""
        x = _conv(self.conv_in, pixels)
        for level in self.down:
            x = level(x, None)
        x = self.mid(x, None)
        return self.conv_out(F.silu(self.norm_out(x, None)))


class Decoder(nn.Module):
    """Decoder network, which converts latents to pixels. The quantized latent modulates every norm."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, z = [config.ch * m for m in config.mult], config.embed_dim
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = _Middle(widths[-1], z)
        levels: list[_Level] = []
        for n in reversed(range(len(widths))):
            inp = widths[min(n + 1, len(widths) - 1)]
            level = _Level(inp, widths[n], config.blocks + 1, n in config.attention_levels, z)
            if n:
                level.upsample = _Resample(widths[n], stride=1)
            levels.insert(0, level)
        self.up = nn.ModuleList(levels)  # index 0 is the finest level, as in the released names
        self.norm_out = SpatialNorm(widths[0], z)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Returns the pixels of `x`, the quantized latent after a 1x1 convolution. `latent` modulates the norms.

        Shapes: x, latent (B, Z, h, w) -> (B, 3, H, W).
        """
        x = self.mid(self.conv_in(x), latent)
        for level in reversed(self.up):
            x = level(x, latent)
        return _conv(self.conv_out, F.silu(self.norm_out(x, latent), inplace=not torch.is_grad_enabled()))


class Quantizer(nn.Module):
    """The codebook, with one embedding per code."""

    def __init__(self, num_codes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, width)

    def nearest(self, latent: Tensor) -> Tensor:
        """Returns the code whose embedding is nearest to each latent vector. Shapes: latent (..., Z) -> (...) int64."""
        table = self.embedding.weight.float()
        flat = latent.reshape(-1, latent.shape[-1]).float()
        half_norms = table.square().sum(1) / 2  # argmin |x - e|^2 = argmin |e|^2 / 2 - x.e
        chunks = [(half_norms - part @ table.T).argmin(1) for part in flat.split(_CHUNK_CELLS)]
        return torch.cat(chunks).reshape(latent.shape[:-1])


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = Quantizer(config.num_codes, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "VQGAN":
        """Returns a model with the tensors of a state dict. Ignores training state (`loss.*`, `ema_*`).

        Raises:
            InputError: keys are missing or unknown, or a tensor has the wrong shape.
        """
        state = {key: value for key, value in state.items() if not key.startswith(_IGNORED) and "ema_" not in key}
        config = VQGANConfig.from_state_dict(state)
        try:
            with torch.device("meta"):
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except (RuntimeError, ValueError) as error:  # ValueError: a width that 32 does not divide
            raise InputError("MoVQGAN state dict does not fit: " + " ".join(str(error).split())[:500]) from None
        return model.requires_grad_(False).eval()

    def latent(self, pixels: Tensor) -> Tensor:
        """Returns the latents of images before quantization.

        Shapes: pixels (B, 3, H, W) in [-1, 1] -> (B, Z, H/8, W/8).
        """
        return self.quant_conv(self.encoder(pixels))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Returns the pixels of quantized latents. Values lie roughly in [-1, 1] and are not clamped.

        Shapes: latent (B, Z, h, w) -> (B, 3, 8h, 8w).
        """
        return self.decoder(self.post_quant_conv(latent), latent)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Returns the codes of images.

        Shapes: pixels (B, 3, H, W) in [-1, 1], H and W multiples of 8 -> (B, H/8, W/8) int64.
        """
        return self.quantize.nearest(rearrange(self.latent(pixels), "B Z h w -> B h w Z"))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Returns the pixels of the images that the codes stand for.

        Shapes: codes (B, h, w) in [0, num_codes) -> (B, 3, 8h, 8w) float32 in [-1, 1].

        Raises:
            InputError: a code is outside the codebook.
        """
        least, most = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # one wait for a GPU
        if not 0 <= least <= most < self.config.num_codes:
            raise InputError(f"codes must be in 0 ... {self.config.num_codes - 1}, got {least} ... {most}")
        latent = rearrange(self.quantize.embedding(codes), "B h w Z -> B Z h w")
        return self.decode_latent(latent.contiguous()).float().clamp_(-1, 1)
