"""Trains a MoVQGAN from scratch on a CPU: autoencoder warm-up, k-means codes, then codes by moving averages.

No perceptual or adversarial term: both need networks trained elsewhere, and at small sizes L1 + L2 with a term on
pixel differences keeps edges sharp enough.
"""

import logging
import math
import time
import zipfile
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm import tqdm

from lumina_mgpt.errors import InputError
from lumina_mgpt.images import open_image, picture_suffixes
from lumina_mgpt.io import append_lines, cause, keep_until, remedy, write_tensors
from lumina_mgpt.movqgan.model import MoVQGAN, MoVQGANConfig
from lumina_mgpt.movqgan.tokenizer import load_state_dict

log = logging.getLogger(__name__)

_BESIDE_PICTURES = {".txt", ".json", ".jsonl"}  # captions


@dataclass(frozen=True)
class MoVQGANTraining:
    """Settings; `minutes` is the whole budget and the learning rate falls linearly over it.

    `decoder_of` names finished weights: encoder and codes stay as they are there, so that tokens made with them keep
    their meaning, and only what turns codes into pixels is trained on.
    """

    minutes: float = 45.0
    decoder_of: str | None = None
    pixels: int = 4 * 96 * 96  # of one batch
    lr: float = 3e-3
    warmup_steps: int = 50
    continuous_steps: int = 400  # without quantization, so that codes are not fitted to noise
    commitment: float = 0.25
    decay: float = 0.995  # of the codes' moving averages (van den Oord et al. 2017, appendix A.1)
    dead_below: float = 0.05  # codes used less often than this per step are moved to a latent of the batch
    revive_every: int = 20
    revive_until: float = 0.8  # part of the budget after which codes are left where they are
    save_minutes: float = 3.0
    seed: int = 0


class Pictures:
    """Pictures in memory by group and size; a batch is drawn from one group and one size."""

    def __init__(self, folders: dict[Path, float]) -> None:
        """folder -> weight of being drawn from.

        Raises:
            InputError: a folder has no picture, or a picture cannot be opened.
        """
        self.groups: list[tuple[float, np.ndarray]] = []
        self._first: dict[tuple[int, int], Path] = {}  # (width, height) -> a picture of that size
        for folder, weight in folders.items():
            by_size = defaultdict(list)
            found = sorted(folder.glob("*"))
            paths = [path for path in found if path.suffix.lower() in picture_suffixes()]
            if not paths:
                raise InputError(f"--images {folder} has no .png, .jpg or other picture; run make_data.py or "
                                 "give another folder")  # fmt: skip
            skipped = [path.name for path in found if path.suffix.lower() not in picture_suffixes() | _BESIDE_PICTURES]
            if skipped:
                log.warning("--images %s: entries left out, as they have no extension of a picture: %d, the first is "
                            "%s", folder, len(skipped), skipped[0])  # fmt: skip
            for path in tqdm(paths, desc=f"reading {folder.name}", unit="picture"):
                try:
                    image = open_image(path)
                except InputError as error:
                    raise InputError(f"--images {error}") from None
                by_size[image.size].append(np.asarray(image))
                self._first.setdefault(image.size, path)
            for images in by_size.values():
                self.groups.append((weight * len(images) / len(paths), np.stack(images)))
        total = sum(weight for weight, _ in self.groups)
        self.weights = [weight / total for weight, _ in self.groups]

    def check_sides(self, cell: int) -> None:
        """Raises InputError for a picture whose sides are not multiples of `cell` pixels."""
        for (width, height), path in self._first.items():
            if width % cell or height % cell:
                raise InputError(f"--images {path}: width and height must be multiples of {cell}, got "
                                 f"{width}x{height}; crop or scale the picture")  # fmt: skip

    def batch(self, rng: np.random.Generator, pixels: int) -> Tensor:
        """(B, 3, H, W) in [-1, 1], B such that B * H * W is about `pixels`."""
        _, images = self.groups[rng.choice(len(self.groups), p=self.weights)]
        count = max(1, pixels // (images.shape[1] * images.shape[2]))
        chosen = images[rng.integers(0, len(images), count)]
        pixels = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
        return pixels.contiguous()  # channels-last convolutions are several times slower on a CPU


def kmeans(points: Tensor, count: int, steps: int = 12, generator: torch.Generator | None = None) -> Tensor:
    """Lloyd's algorithm; (N, Z) -> (count, Z). Empty centres are put on random points."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]].clone()
    for _ in range(steps):
        nearest = torch.cat([torch.cdist(part, centres).argmin(1) for part in points.split(8192)])
        sizes = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.zeros_like(centres).index_add_(0, nearest, points) / sizes.clamp(min=1)
        empty = (sizes == 0).squeeze(1)
        centres[empty] = points[torch.randint(len(points), (int(empty.sum()),), generator=generator)]
    return centres


class MovingCodes:
    """Codes as moving averages of the latents that fall to them."""

    def __init__(self, model: MoVQGAN, settings: MoVQGANTraining) -> None:
        self.codes = model.quantize.embedding.weight
        self.settings = settings
        self.sizes = torch.zeros(len(self.codes))
        self.sums = torch.zeros_like(self.codes)

    def start(self, centres: Tensor) -> None:
        self.codes.data.copy_(centres)
        self.sizes.fill_(1.0)
        self.sums.copy_(centres)

    @torch.no_grad()
    def update(self, flat: Tensor, nearest: Tensor) -> None:
        """flat (N, Z) latents, nearest (N,) their codes."""
        decay, count = self.settings.decay, len(self.codes)
        self.sizes.mul_(decay).add_(torch.bincount(nearest, minlength=count), alpha=1 - decay)
        self.sums.mul_(decay).add_(torch.zeros_like(self.sums).index_add_(0, nearest, flat), alpha=1 - decay)
        alive = self.sizes > 1e-4
        self.codes.data[alive] = self.sums[alive] / self.sizes[alive, None]

    @torch.no_grad()
    def revive(self, flat: Tensor, generator: torch.Generator) -> int:
        """Moves dead codes to latents of the batch, those far from any code first; returns how many."""
        dead = (self.sizes < self.settings.dead_below).nonzero().squeeze(1)
        far = torch.cat([torch.cdist(part, self.codes).min(1).values for part in flat.split(8192)])
        dead = dead[: len(flat) // 8]  # a batch has only so many latents that stand for something new
        if len(dead):
            chosen = torch.multinomial(far + 1e-6, len(dead), generator=generator)
            self.codes.data[dead] = flat[chosen]
            self.sums[dead], self.sizes[dead] = flat[chosen], 1.0
        return len(dead)


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


def reconstruction_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """Mean squared error of pixels and of the differences of neighbouring pixels, with a little L1.

    Squares first: the median of an edge whose place is still uncertain is no edge at all, so that L1 alone stalls at
    blurred cells, where the mean keeps pulling towards the right place.
    """
    error = out - pixels
    sharpness = sum(d.square().mean() for d in _differences(error))
    return error.square().mean() + sharpness + 0.1 * error.abs().mean()


class ConvMuon:
    """Muon for the wide convolutions, each as the matrix (out, in * k * k), AdamW for all other parameters.

    Source: https://kellerjordan.github.io/posts/muon/, where convolutions are flattened alike; steps are scaled to
    AdamW's size (arXiv 2502.16982), so one learning rate serves both.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.convolutions = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) >= 16]
        wide = set(map(id, self.convolutions))
        others = [p for p in trained if id(p) not in wide]
        # Two-dimensional parameters on the same storage: what Muon does to them, it does to the convolutions.
        self.matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.convolutions]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw")
        self.parameters = trained

    def step(self, lr: float) -> None:
        """One step at that learning rate; gradients are cleared."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for matrix, convolution in zip(self.matrices, self.convolutions, strict=True):
            matrix.grad = convolution.grad.view_as(matrix)
        for optimizer in (self.adamw, self.muon):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])


class Trainer:
    """One process, time-boxed; `run` returns the final model. State is saved every few minutes and found again."""

    def __init__(self, config: MoVQGANConfig, settings: MoVQGANTraining, pictures: Pictures, out_dir: Path) -> None:
        torch.manual_seed(settings.seed)
        self.model, self.settings, self.pictures, self.out_dir = MoVQGAN(config), settings, pictures, out_dir
        if settings.decoder_of:  # of the size that it has, whatever `config` says
            try:
                self.model = MoVQGAN.from_state_dict(load_state_dict(settings.decoder_of))
            except InputError as error:
                raise InputError(f"--decoder_of: {error}") from None
            self.model.float().train().requires_grad_(True)
            for part in (self.model.encoder, self.model.quant_conv):
                part.requires_grad_(False)
        pictures.check_sides(self.model.config.cell)
        self.model.quantize.embedding.weight.requires_grad_(False)
        self.codes = MovingCodes(self.model, settings)
        self.optimizers = ConvMuon(self.model, settings.lr)
        self.step, self.elapsed, self.quantizing = 0, 0.0, bool(settings.decoder_of)
        self.latents: list[Tensor] = []
        out_dir.mkdir(parents=True, exist_ok=True)
        self.state_path = out_dir / "training.pt"
        if self.state_path.exists():
            self._restore()

    def _restore(self) -> None:
        try:
            with zipfile.ZipFile(self.state_path) as file:  # torch.load does not compare the checksums
                if damaged := file.testzip():
                    raise ValueError(f"checksum of {damaged}")
            state = torch.load(self.state_path, weights_only=True)
            fixed = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            if self.settings.decoder_of and any(
                not torch.equal(self.model.get_parameter(name), state["model"][name]) for name in fixed
            ):
                raise ValueError("its codes are not those of --decoder_of")
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.codes.sizes.copy_(state["sizes"])
            self.codes.sums.copy_(state["sums"])
            self.step, self.elapsed, self.quantizing = state["step"], state["elapsed"], state["quantizing"]
        except OSError as error:
            raise InputError(f"--out_dir: {self.state_path} cannot be read ({cause(error)}); {remedy(error)}") from None
        except Exception as error:  # the unpickler raises errors of any class for damaged bytes
            raise InputError(
                f"--out_dir: {self.state_path} is damaged or of another size ({cause(error)}); remove it to start anew"
            ) from None
        log.info("resumed at step %d, %.1f minutes", self.step, self.elapsed / 60)

    def save(self) -> None:
        state = {
            "model": self.model.state_dict(), "optimizers": self.optimizers.state_dict(), "sizes": self.codes.sizes,
            "sums": self.codes.sums, "step": self.step, "elapsed": self.elapsed, "quantizing": self.quantizing,
        }  # fmt: skip
        temporary = self.state_path.with_suffix(".part")
        try:
            torch.save(state, temporary)
            temporary.replace(self.state_path)
            export(self.model, self.out_dir / "movqgan.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            todo = remedy(error, "check that the folder can be written and has space")
            raise InputError(f"--out_dir {self.out_dir} cannot be written ({cause(error)}); {todo}") from None

    def _quantize(self, latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Straight-through codes of a latent (B, Z, h, w), and the commitment loss."""
        cells = rearrange(latent.float(), "B Z h w -> B h w Z")
        flat = cells.detach().reshape(-1, cells.shape[-1])
        nearest = self.model.quantize.nearest(cells.detach())
        chosen = self.model.quantize.embedding(nearest)
        if self.settings.decoder_of:
            return rearrange(chosen, "B h w Z -> B Z h w"), chosen.new_zeros(())
        self.codes.update(flat, nearest.flatten())
        reviving = self.elapsed < self.settings.revive_until * self.settings.minutes * 60
        if reviving and self.step % self.settings.revive_every == 0:
            self.codes.revive(flat, generator)
        commitment = F.mse_loss(cells, chosen)
        return rearrange(cells + (chosen - cells).detach(), "B h w Z -> B Z h w"), commitment

    def _train_step(self, pixels: Tensor, generator: torch.Generator) -> tuple[float, float]:
        done = self.elapsed / (self.settings.minutes * 60)
        rate = self.settings.lr * min(1.0, (self.step + 1) / self.settings.warmup_steps) * max(0.02, 1 - done)
        with torch.autocast("cpu", torch.bfloat16):
            latent = self.model.latent(pixels)
        commitment = latent.new_zeros(())
        if self.quantizing:
            latent, commitment = self._quantize(latent, generator)
        else:
            self.latents.append(rearrange(latent.detach().float(), "B Z h w -> (B h w) Z"))
            self.latents = self.latents[-100:]
        with torch.autocast("cpu", torch.bfloat16):
            out = self.model.decode_latent(latent)
        loss = reconstruction_loss(out.float(), pixels) + self.settings.commitment * commitment
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {self.step}; start again with a lower --lr")
        loss.backward()
        self.optimizers.step(rate)
        return loss.item(), -10 * math.log10(F.mse_loss(out.detach().float().clamp(-1, 1), pixels).item() / 4 + 1e-12)

    def run(self) -> MoVQGAN:
        """Trains until the budget is used, counting the minutes of earlier runs.

        Raises:
            InputError: the disk is full, the loss is not finite, or the budget ends before there are codes.
        """
        budget = self.settings.minutes * 60
        bar = tqdm(total=round(budget), initial=round(self.elapsed), unit="s", desc="movqgan")
        last_save, psnr = self.elapsed, None
        metrics = self.out_dir / "log.jsonl"
        keep_until(metrics, self.step)
        while self.elapsed < budget:
            began = time.monotonic()
            rng = np.random.default_rng((self.settings.seed, self.step))
            generator = torch.Generator().manual_seed(self.step)
            enough = sum(map(len, self.latents)) >= 8 * len(self.codes.codes)  # a resumed run gathers them anew
            if not self.quantizing and self.step >= self.settings.continuous_steps and enough:
                self.codes.start(kmeans(torch.cat(self.latents), len(self.codes.codes), generator=generator))
                self.quantizing, self.latents = True, []
            loss, now = self._train_step(self.pictures.batch(rng, self.settings.pixels), generator)
            psnr = now if psnr is None else 0.98 * psnr + 0.02 * now
            self.step += 1
            self.elapsed += time.monotonic() - began
            if self.step % 20 == 0:
                used = int((self.codes.sizes >= self.settings.dead_below).sum())
                line = {"step": self.step, "minutes": round(self.elapsed / 60, 2), "loss": round(loss, 4),
                        "psnr": round(psnr, 2), "codes_used": used}  # fmt: skip
                append_lines(metrics, [line])
                bar.set_postfix(step=self.step, loss=f"{loss:.3f}", dB=f"{psnr:.2f}", codes=used)
            bar.update(round(self.elapsed) - bar.n)
            if self.elapsed - last_save > self.settings.save_minutes * 60:
                self.save()
                last_save = self.elapsed
        bar.close()
        if not self.quantizing:
            raise InputError(f"--minutes {self.settings.minutes} end before the codes begin; give more")
        self.save()
        return self.model


def export(model: MoVQGAN, path: Path) -> None:
    """Writes the weights as safetensors under the released names, in float16: half the size, and the codes that later
    trainings see are made by the very weights that are shipped."""
    temporary = path.with_suffix(".part")
    tensors = {key: value.to(torch.float16).contiguous() for key, value in model.state_dict().items()}
    try:
        write_tensors(temporary, tensors)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
