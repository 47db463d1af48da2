"""Trains an image tokenizer of either kind, a MoVQGAN or a VQGAN with plain norms.

The first steps train an autoencoder without codes. K-means then initializes the codes, and moving averages update them.
The loss has no perceptual or adversarial term, since these need other trained networks. L1 and L2 errors and a term on
pixel differences give sharp edges at small image sizes.
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
from lumina_mgpt.training.image_codebook import MovingCodes, kmeans
from lumina_mgpt.vqgan.model import VQGAN, VQGANConfig
from lumina_mgpt.vqgan.tokenizer import load_state_dict

logger = logging.getLogger(__name__)

_BESIDE_PICTURES = {".txt", ".json", ".jsonl"}  # captions


@dataclass(frozen=True)
class MoVQGANTrainingConfig:
    """Holds the options of a training of the image tokenizer.

    Args:
        minutes: length of the training; the learning rate decays linearly over it.
        decoder_of: file of trained weights to start from; only their decoder is trained. Encoder and codes do not
            change, so that existing tokens keep their meaning. None trains from scratch.
        pixels: approximate number of pixels in a batch, over all its pictures.
        lr: peak learning rate.
        warmup_steps: number of first steps in which the learning rate rises.
        continuous_steps: number of first steps without quantization; k-means then initializes the codes.
        commitment: weight of the commitment loss.
        decay: decay of the codes' moving averages per step.
        dead_below: a code is dead, and moves to a latent of the batch, if it has fewer latents per step than this.
        revive_every: number of steps from one move of dead codes to the next.
        revive_until: fraction of the run after which dead codes no longer move.
        save_minutes: minutes from one save to the next.
        seed: seed of initial weights and batches.
        device: device of the training.
    """

    minutes: float = 45.0
    decoder_of: str | None = None
    pixels: int = 4 * 96 * 96
    lr: float = 3e-3
    warmup_steps: int = 50
    continuous_steps: int = 400
    commitment: float = 0.25
    decay: float = 0.995
    dead_below: float = 0.05
    revive_every: int = 20
    revive_until: float = 0.8
    save_minutes: float = 3.0
    seed: int = 0
    device: torch.device = torch.device("cpu")


class Pictures:
    """Holds pictures in memory, grouped by folder and size; all pictures of a batch are from one group.

    Args:
        folders: weight of each folder. The probability that a batch is from a folder is proportional to its weight.

    Raises:
        InputError: a folder has no picture, or a picture cannot be opened.
    """

    def __init__(self, folders: dict[Path, float]) -> None:
        self.groups: list[tuple[float, np.ndarray]] = []
        self._first: dict[tuple[int, int], Path] = {}  # (width, height) -> a picture of that size
        for folder, weight in folders.items():
            by_size = defaultdict(list)
            found = sorted(folder.glob("*"))
            paths = [path for path in found if path.suffix.lower() in picture_suffixes()]
            if not paths:
                raise InputError(f"{folder} has no .png, .jpg or other picture; give another folder", "images")
            skipped = [path.name for path in found if path.suffix.lower() not in picture_suffixes() | _BESIDE_PICTURES]
            if skipped:
                logger.warning(
                    "images %s: entries left out, as they have no extension of a picture: %d, the first is %s",
                    folder,
                    len(skipped),
                    skipped[0],
                )
            for path in tqdm(paths, desc=f"reading {folder.name}", unit="picture"):
                try:
                    image = open_image(path)
                except InputError as error:
                    raise InputError(str(error), "images") from None
                by_size[image.size].append(np.asarray(image))
                self._first.setdefault(image.size, path)
            for images in by_size.values():
                self.groups.append((weight * len(images) / len(paths), np.stack(images)))
        total = sum(weight for weight, _ in self.groups)
        self.weights = [weight / total for weight, _ in self.groups]

    def check_sides(self, cell: int) -> None:
        """Checks that the sides of all pictures are multiples of `cell` pixels.

        Raises:
            InputError: a side of a picture is not such a multiple.
        """
        for (width, height), path in self._first.items():
            if width % cell or height % cell:
                raise InputError(
                    f"{path}: width and height must be multiples of {cell}, got {width}x{height}; crop or "
                    "scale the picture",
                    "images",
                )

    def batch(self, rng: np.random.Generator, pixels: int) -> Tensor:
        """Returns a batch of random pictures of one group, with about `pixels` pixels in total.

        Shapes: returns (B, 3, height, width) for B pictures; values are in [-1, 1].
        """
        _, images = self.groups[rng.choice(len(self.groups), p=self.weights)]
        count = max(1, pixels // (images.shape[1] * images.shape[2]))
        chosen = images[rng.integers(0, len(images), count)]
        batch = torch.from_numpy(chosen).permute(0, 3, 1, 2).float() / 127.5 - 1
        return batch.contiguous()  # channels-last convolutions are several times slower on a CPU


def _differences(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :, 1:] - x[:, :, :-1], x[:, :, :, 1:] - x[:, :, :, :-1]


def reconstruction_loss(out: Tensor, pixels: Tensor) -> Tensor:
    """Returns the squared error of pixels and of differences of neighbouring pixels, plus 0.1 times the L1 error.

    The squared error dominates, since training with L1 alone stalls at blurred images: while the position of an edge
    is uncertain, the median minimizes L1, and the median has no edge.

    Shapes: out and pixels (B, 3, height, width); returns a scalar.
    """
    error = out - pixels
    sharpness = sum(d.square().mean() for d in _differences(error))
    return error.square().mean() + sharpness + 0.1 * error.abs().mean()


class ConvMuon:
    """Trains wide convolutions with Muon, as matrices (out, in * k * k), and all other parameters with AdamW.

    Muon's updates are scaled to the size of AdamW's (arXiv 2502.16982), so that both use one learning rate.

    Source: https://kellerjordan.github.io/posts/muon/, which flattens convolutions in the same way.
    """

    def __init__(self, model: nn.Module, lr: float) -> None:
        trained = [p for p in model.parameters() if p.requires_grad]
        self.convolutions = [p for p in trained if p.ndim == 4 and min(p.shape[:2]) >= 16]
        wide = set(map(id, self.convolutions))
        others = [p for p in trained if id(p) not in wide]
        # Two-dimensional views of the convolutions, which Muon updates in place.
        self.matrices = [nn.Parameter(p.detach().view(len(p), -1)) for p in self.convolutions]
        self.adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=1e-4, fused=True)
        self.muon = torch.optim.Muon(self.matrices, lr=lr, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw")
        self.parameters = trained

    def step(self, lr: float) -> None:
        """Clips the gradients to norm 1, updates all parameters with learning rate `lr`, and clears the gradients."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for matrix, convolution in zip(self.matrices, self.convolutions, strict=True):
            assert convolution.grad is not None
            matrix.grad = convolution.grad.view_as(matrix)
        for optimizer in (self.adamw, self.muon):
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
        for parameter in self.parameters:
            parameter.grad = None

    def state_dict(self) -> dict:
        """Returns the state of both optimizers."""
        return {"adamw": self.adamw.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Restores a state that `state_dict` returned."""
        self.adamw.load_state_dict(state["adamw"])
        self.muon.load_state_dict(state["muon"])


def _load_trained(path: str) -> VQGAN:
    try:
        model = VQGAN.from_state_dict(load_state_dict(path))
    except InputError as error:
        raise InputError(str(error), "decoder_of") from None
    if not model.config.decoder:
        raise InputError(f"must name weights with a decoder, but {path} has the encoder only", "decoder_of")
    return model


class ImageTokenizerTrainer:
    """Trains an image tokenizer in one process for a given time; resumes from the state in `out_dir` if there is one.

    Args:
        config: sizes of the model; ignored if `settings.decoder_of` gives trained weights.
        out_dir: folder for weights, state and log.

    Raises:
        InputError: pictures, weights or saved state cannot be used.
    """

    def __init__(self, config: VQGANConfig, settings: MoVQGANTrainingConfig, pictures: Pictures, out_dir: Path) -> None:
        torch.manual_seed(settings.seed)
        self.model, self.settings, self.pictures, self.out_dir = VQGAN(config), settings, pictures, out_dir
        if settings.decoder_of:
            self.model = _load_trained(settings.decoder_of)
            self.model.float().train().requires_grad_(True)
            for part in (self.model.encoder, self.model.quant_conv):
                part.requires_grad_(False)
        pictures.check_sides(self.model.config.cell)
        self.model.to(settings.device).quantize.embedding.weight.requires_grad_(False)
        self.codes = MovingCodes(self.model.quantize.embedding.weight, settings.decay, settings.dead_below)
        self.optimizers = ConvMuon(self.model, settings.lr)
        self.step, self.elapsed, self.quantizing = 0, 0.0, bool(settings.decoder_of)
        self.latents: list[Tensor] = []
        out_dir.mkdir(parents=True, exist_ok=True)
        self.state_path = out_dir / "training.pt"
        if self.state_path.exists():
            self._restore()

    def _restore(self) -> None:
        try:
            with zipfile.ZipFile(self.state_path) as file:  # torch.load does not check checksums
                if damaged := file.testzip():
                    raise ValueError(f"checksum of {damaged}")
            state = torch.load(self.state_path, map_location=self.settings.device, weights_only=True)
            fixed = [name for name, p in self.model.named_parameters() if not p.requires_grad]
            if self.settings.decoder_of and any(
                not torch.equal(self.model.get_parameter(name), state["model"][name]) for name in fixed
            ):
                raise ValueError("its codes are not those of decoder_of")
            self.model.load_state_dict(state["model"])
            self.optimizers.load_state_dict(state["optimizers"])
            self.codes.sizes.copy_(state["sizes"])
            self.codes.sums.copy_(state["sums"])
            self.step, self.elapsed, self.quantizing = state["step"], state["elapsed"], state["quantizing"]
        except OSError as error:
            raise InputError(f"{self.state_path} cannot be read ({cause(error)}); {remedy(error)}", "out_dir") from None
        except (MemoryError, torch.OutOfMemoryError):  # says nothing about the state
            raise
        except Exception as error:  # the unpickler may raise any class for damaged bytes
            raise InputError(
                f"{self.state_path} is damaged or of another size ({cause(error)}); remove it to start again", "out_dir"
            ) from None
        logger.info("resumed at step %d, %.1f minutes", self.step, self.elapsed / 60)

    def save(self) -> None:
        """Writes the state as `training.pt`, and the weights as `movqgan.safetensors` or `vqgan.safetensors`.

        Raises:
            InputError: the folder cannot be written.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizers": self.optimizers.state_dict(),
            "sizes": self.codes.sizes,
            "sums": self.codes.sums,
            "step": self.step,
            "elapsed": self.elapsed,
            "quantizing": self.quantizing,
        }
        temporary = self.state_path.with_suffix(".part")
        try:
            torch.save(state, temporary)
            temporary.replace(self.state_path)
            export(self.model, self.out_dir / f"{self.model.config.kind}.safetensors")
        except (OSError, RuntimeError, SafetensorError) as error:  # torch reports a full disk as RuntimeError
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            todo = remedy(error, "check that the folder can be written and has space")
            raise InputError(f"{self.out_dir} cannot be written ({cause(error)}); {todo}", "out_dir") from None

    def _quantize(self, latent: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns the codes of a latent with straight-through gradient, and the commitment loss.

        Shapes: latent (B, Z, h, w), and so is the result.
        """
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
        """Trains on one batch; returns its loss and PSNR."""
        done = self.elapsed / (self.settings.minutes * 60)
        rate = self.settings.lr * min(1.0, (self.step + 1) / self.settings.warmup_steps) * max(0.02, 1 - done)
        pixels = pixels.to(self.settings.device)
        narrow = not self.settings.decoder_of  # bfloat16 would change the codes
        with torch.autocast(pixels.device.type, torch.bfloat16, enabled=narrow):
            latent = self.model.latent(pixels)
        commitment = latent.new_zeros(())
        if self.quantizing:
            latent, commitment = self._quantize(latent, generator)
        else:
            self.latents.append(rearrange(latent.detach().float(), "B Z h w -> (B h w) Z"))
            self.latents = self.latents[-100:]
        with torch.autocast(pixels.device.type, torch.bfloat16):
            out = self.model.decode_latent(latent)
        loss = reconstruction_loss(out.float(), pixels) + self.settings.commitment * commitment
        if not math.isfinite(loss.item()):
            raise InputError(f"the loss is {loss.item()} at step {self.step}; start again with a lower lr")
        loss.backward()
        self.optimizers.step(rate)
        return loss.item(), -10 * math.log10(F.mse_loss(out.detach().float().clamp(-1, 1), pixels).item() / 4 + 1e-12)

    def run(self) -> VQGAN:
        """Trains until `settings.minutes` have passed, and returns the model. The time before a resume counts.

        Raises:
            InputError: the disk is full, the loss is not finite, or the time ends before the codes are initialized.
        """
        budget = self.settings.minutes * 60
        last_save, psnr = self.elapsed, None
        log = self.out_dir / "log.jsonl"
        keep_until(log, self.step)
        with tqdm(total=round(budget), initial=round(self.elapsed), unit="s", desc=self.model.config.kind) as bar:
            while self.elapsed < budget:
                began = time.monotonic()
                rng = np.random.default_rng((self.settings.seed, self.step))
                generator = torch.Generator().manual_seed(self.step)
                self._start_codes(generator)
                loss, now = self._train_step(self.pictures.batch(rng, self.settings.pixels), generator)
                psnr = now if psnr is None else 0.98 * psnr + 0.02 * now
                self.step += 1
                self.elapsed += time.monotonic() - began
                if self.step % 20 == 0:
                    used = self.codes.used()
                    append_lines(
                        log,
                        [
                            {
                                "step": self.step,
                                "minutes": round(self.elapsed / 60, 2),
                                "loss": round(loss, 4),
                                "psnr": round(psnr, 2),
                                "codes_used": used,
                            }
                        ],
                    )
                    bar.set_postfix(step=self.step, loss=f"{loss:.3f}", dB=f"{psnr:.2f}", codes=used)
                bar.update(round(self.elapsed) - bar.n)
                if self.elapsed - last_save > self.settings.save_minutes * 60:
                    self.save()
                    last_save = self.elapsed
        if not self.quantizing:
            raise InputError(f"must leave time to train the codes, got {self.settings.minutes}; give more", "minutes")
        self.save()
        return self.model

    def _start_codes(self, generator: torch.Generator) -> None:
        """Initializes the codes by k-means, once enough steps and latents have passed; quantization begins."""
        count = len(self.codes.codes)
        enough = sum(map(len, self.latents)) >= 8 * count  # latents are not saved: a resumed run collects new ones
        if not self.quantizing and self.step >= self.settings.continuous_steps and enough:
            self.codes.start(kmeans(torch.cat(self.latents), count, generator=generator))
            self.quantizing, self.latents = True, []


def export(model: VQGAN, path: Path) -> None:
    """Writes the weights of an image tokenizer as safetensors in float16, under the released tensor names.

    Raises:
        OSError, SafetensorError: the file cannot be written; a partial file is removed.
    """
    temporary = path.with_suffix(".part")
    tensors = {key: value.to("cpu", torch.float16).contiguous() for key, value in model.state_dict().items()}
    try:
        write_tensors(temporary, tensors)
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
