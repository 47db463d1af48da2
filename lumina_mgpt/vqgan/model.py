"""VQGAN, the image tokenizer of both generations: encoder, codebook and decoder.

The first generation has Chameleon's VQGAN (Esser et al. 2021, "Taming Transformers for High-Resolution Image
Synthesis", arXiv 2012.09841): five levels, 16 x 16 pixels a latent cell, attention in the middle block only, plain
group norms. The second has MoVQGAN (Zheng et al. 2022, "MoVQ: Modulating Quantized Vectors for High-Fidelity Image
Generation", arXiv 2209.09002): four levels, 8 x 8 pixels a cell, attention also in the coarsest level. Scale and shift
of the norms in its decoder are 1x1 convolutions of the quantized latent. Both have the same kinds of layers otherwise.

Module names are the keys of the released state dicts: `encoder.*`, `decoder.*`, `quantize.embedding.weight`,
`quant_conv.*`, `post_quant_conv.*`.

Shape letters: B batch, C channels, Z latent channels; h, w latent cells; H, W pixels or positions of a feature map.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from lumina_mgpt.errors import InputError
from lumina_mgpt.meta import on_meta
from lumina_mgpt.vqgan.layers import AttentionBlock, Norm, ResnetBlock, convolve, make_norm

_IGNORED = ("loss.", "ema_", "model_ema.", "quantize.embedding.cluster", "quantize.embedding.embed_avg")
_CHUNK_CELLS = 4096  # cells whose distances to all codes are computed at once: 256 MiB for 16,384 codes


@dataclass(frozen=True)
class VQGANConfig:
    """Sizes of a VQGAN.

    Of the released MoVQGAN files, 67M has (ch, blocks) = (128, 2), 102M (128, 4) and 270M (256, 2). The other defaults
    are theirs too. Chameleon's file has (128, 2), mult (1, 1, 2, 2, 4), 256 channels of latent and codes, 8192 codes,
    no attention levels, plain norms.

    Attributes:
        ch: channels of the first feature map.
        blocks: number of residual blocks per level of the encoder.
        mult: channels of each level, as multiples of `ch`.
        z_channels: channels of the latent that the decoder takes.
        embed_dim: width of a codebook entry.
        num_codes: number of codebook entries.
        attention_levels: indices of the levels with attention.
        spatial: whether the quantized latent modulates the norms of the decoder, as in MoVQGAN. If not, they are plain.
        decoder: whether there is a decoder. Language model files of the first generation hold a VQGAN without one.
    """

    ch: int
    blocks: int
    mult: tuple[int, ...] = (1, 2, 2, 4)
    z_channels: int = 4
    embed_dim: int = 4
    num_codes: int = 16384
    attention_levels: tuple[int, ...] = (3,)
    spatial: bool = True
    decoder: bool = True

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
                spatial=any(".norm_layer." in key for key in state),
                decoder=any(key.startswith("decoder.") for key in state),
            )
        except (KeyError, ValueError) as error:
            fault = f"it has no {error.args[0]}" if isinstance(error, KeyError) else str(error)
            raise InputError(f"not a VQGAN state dict in the released names: {fault}; see the README") from None

    @property
    def kind(self) -> str:
        """The kind of image tokenizer, `movqgan` or `vqgan`; names of its files begin with it."""
        return "movqgan" if self.spatial else "vqgan"

    @property
    def cell(self) -> int:
        """Side of the square that one code stands for, in pixels."""
        return 2 ** (len(self.mult) - 1)


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
            x = convolve(self.upsample.conv, x, scale=2)
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
        x = convolve(self.conv_in, pixels)
        for level in self.down:
            x = level(x, None)
        x = self.mid(x, None)
        return self.conv_out(F.silu(self.norm_out(x, None)))


class Decoder(nn.Module):
    """Decoder network, which converts latents to pixels. If norms are spatial, the quantized latent modulates them."""

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        widths, z = [config.ch * m for m in config.mult], config.embed_dim if config.spatial else None
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
        self.norm_out = make_norm(widths[0], z)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Returns the pixels of `x`, the quantized latent after a 1x1 convolution. `latent` modulates spatial norms.

        Shapes: x, latent (B, Z, h, w) -> (B, 3, H, W).
        """
        x = self.mid(self.conv_in(x), latent)
        for level in reversed(self.up):
            x = level(x, latent)
        return convolve(self.conv_out, F.silu(self.norm_out(x, latent), inplace=not torch.is_grad_enabled()))


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
    """Encoder, quantizer and, unless `config.decoder` is false, decoder."""

    decoder: Decoder

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        if config.decoder:
            self.decoder = Decoder(config)
        self.quantize = Quantizer(config.num_codes, config.embed_dim)
        self.quant_conv = nn.Conv2d(config.z_channels, config.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.embed_dim, config.z_channels, 1)

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor]) -> "VQGAN":
        """Returns a model with the tensors of a state dict, without gradients.

        Sizes, the kind of norms and whether there is a decoder follow from the tensors. Training state (`loss.*`,
        `ema_*`) is ignored.

        Raises:
            InputError: keys are missing or unknown, or a tensor has the wrong shape.
        """
        state = {key: value for key, value in state.items() if not key.startswith(_IGNORED) and "ema_" not in key}
        config = VQGANConfig.from_state_dict(state)
        try:
            with on_meta():
                model = cls(config)
            model.load_state_dict(state, assign=True)
        except (RuntimeError, ValueError) as error:  # ValueError: a width that 32 does not divide
            raise InputError("VQGAN state dict does not fit: " + " ".join(str(error).split())[:500]) from None
        return model.requires_grad_(False).eval()

    def place(self, device: torch.device | str, dtype: torch.dtype) -> "VQGAN":
        """Moves the model to a device, converts its weights, and returns it.

        Args:
            dtype: type of the decoder. Encoder and codebook are at least float32, since half types change codes.
        """
        self.to(device=device, dtype=torch.promote_types(dtype, torch.float32))
        self.post_quant_conv.to(dtype)
        if self.config.decoder:
            self.decoder.to(dtype)
        if torch.device(device).type == "cpu":  # convolutions and norms are faster there with adjacent channels
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def latent(self, pixels: Tensor) -> Tensor:
        """Returns the latents of images before quantization.

        Shapes: pixels (B, 3, H, W) in [-1, 1] -> (B, Z, h, w), where h = H / cell and w = W / cell.
        """
        return self.quant_conv(self.encoder(pixels))

    def decode_latent(self, latent: Tensor) -> Tensor:
        """Returns the pixels of quantized latents. Values lie roughly in [-1, 1] and are not clamped.

        Shapes: latent (B, Z, h, w) -> (B, 3, h * cell, w * cell).

        Raises:
            InputError: the model has no decoder.
        """
        if not self.config.decoder:
            raise InputError("this VQGAN has no decoder, so it turns no codes into images; give a whole VQGAN file")
        return self.decoder(self.post_quant_conv(latent), latent)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Returns the codes of images.

        Shapes: pixels (B, 3, H, W) in [-1, 1], H and W multiples of the cell -> (B, H / cell, W / cell) int64.
        """
        return self.quantize.nearest(rearrange(self.latent(pixels), "B Z h w -> B h w Z"))

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Returns the pixels of the images that the codes stand for.

        Shapes: codes (B, h, w) in [0, num_codes) -> (B, 3, h * cell, w * cell) float32 in [-1, 1].

        Raises:
            InputError: a code is outside the codebook, or the model has no decoder.
        """
        least, most = torch.stack(codes.aminmax()).tolist() if codes.numel() else (0, 0)  # one wait for a GPU
        if not 0 <= least <= most < self.config.num_codes:
            raise InputError(f"codes must be in 0 ... {self.config.num_codes - 1}, got {least} ... {most}")
        latent = rearrange(self.quantize.embedding(codes), "B h w Z -> B Z h w")
        latent = latent.to(self.post_quant_conv.weight.dtype)
        return self.decode_latent(latent.contiguous()).float().clamp_(-1, 1)
