"""Records the metrics of a run: a progress bar, one JSON line per step, and TensorBoard files; counts FLOPs."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import MicroBatch
from lumina_mgpt.errors import package_error
from lumina_mgpt.io import append_lines, keep_until
from lumina_mgpt.training.memory import layer_weights

_FLUSH_SECONDS = 5
# Dense bf16 TFLOP/s, from NVIDIA's data sheets. The first key that is part of the device's name counts.
_PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "A6000": 155.0,
    "4090": 165.0,
    "3090": 71.0,
}


def peak_flops(device: torch.device, tflops: float = 0.0) -> float:
    """Returns the peak FLOP/s of a device; 0 if the device is not known.

    Args:
        tflops: the peak in TFLOP/s if the caller knows it; 0 to look it up by the device's name.
    """
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return 1e12 * (tflops or next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), 0.0))


def batch_flops(config: ModelConfig, batch: MicroBatch) -> float:
    """Returns the FLOPs of the forward and backward pass of a micro-batch, without padding and recomputation.

    Each weight of a layer takes 6 FLOPs per id, and each weight of the head takes 6 per labelled position. Attention
    takes 12 FLOPs in each layer, per channel and pair of ids of which one attends to the other.

    Source: PaLM (arXiv 2204.02311), appendix B, with half its attention term, since attention is causal.
    """
    pairs = sum(n * n for n in batch.documents) / 2 if batch.documents else batch.tokens * batch.ids.shape[1] / 2
    products = layer_weights(config) * batch.tokens + config.vocab_size * config.hidden_size * batch.labelled
    return 6.0 * products + 12.0 * config.num_hidden_layers * config.hidden_size * pairs


class Metrics:
    """Shows a progress bar, and writes `metrics.jsonl` and TensorBoard files.

    Only the first process does this. On the other processes, the methods do nothing.

    Args:
        folder: output folder of the run.
        step: number of the step that the run starts from: 0, or that of the checkpoint it resumes from.
        progress: fraction of the run that has passed at that step, in [0, 1].
        active: whether this is the first process.
        tensorboard: whether TensorBoard files are written.

    Raises:
        InputError: TensorBoard is requested and not installed.
    """

    def __init__(self, folder: Path, step: int, progress: float, active: bool, tensorboard: bool = False) -> None:
        self.active, self.path, self.waiting = active, folder / "metrics.jsonl", list[dict]()
        self.flushed, self.writer = 0.0, None
        self.make_writer: Callable[[], Any] | None = None
        if not active:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except Exception as error:  # a failing import of TensorBoard may raise any class
                modules = ("tensorboard", "torch.utils.tensorboard")
                raise package_error(
                    error, "tensorboard=True", "tensorboard", modules, "leave it out: metrics.jsonl holds the same"
                ) from None
            self.make_writer = lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        form = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=1.0, initial=min(1.0, progress), bar_format=form, dynamic_ncols=True, smoothing=0.05)

    def begin(self, step: int) -> None:
        """Removes the lines of steps after `step` from `metrics.jsonl`, and opens the TensorBoard files."""
        if self.active:
            keep_until(self.path, step)
            self.writer = self.make_writer() if self.make_writer else None

    def step(self, row: dict) -> None:
        """Records the metrics of one step.

        Numbers that are not finite become null, since JSON has no such numbers.

        Args:
            row: metrics by name, with at least step, progress, loss, lr and tokens_per_second.
        """
        if not self.active:
            return
        row = {key: value if _finite(value) else None for key, value in row.items()}
        self.waiting.append(row)
        self.bar.update(max(0.0, min(1.0, row["progress"]) - self.bar.n))
        loss = "skipped" if row["loss"] is None or "skipped" in row else f"{row['loss']:.3f}"
        name = "loss"
        if row.get("reward") is not None:  # says more than the loss, whose value is near 0
            name, loss = "reward", f"{row['reward']:.3f}"
        share = f" {100 * row['peak_share']:.1f} % of peak" if "peak_share" in row else ""
        self.bar.set_postfix_str(
            f"step {row['step']} {name} {loss} lr {row['lr']:.1e} {row['tokens_per_second']:.0f} tok/s{share}"
        )
        if self.writer:
            for key, value in row.items():
                if key not in ("step", "skipped") and value is not None:
                    self.writer.add_scalar(key, value, row["step"])
        if time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def pictures(self, step: int, pictures: list[Image.Image]) -> None:
        """Adds the sample pictures of a step to TensorBoard, if TensorBoard files are written."""
        if self.writer:
            for n, picture in enumerate(pictures):
                self.writer.add_image(f"samples/{n}", np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        """Writes the recorded rows to the disk.

        Raises:
            InputError: the file cannot be written.
        """
        if self.active:
            append_lines(self.path, self.waiting)
            self.waiting, self.flushed = [], time.monotonic()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        """Writes the recorded rows, and closes the progress bar and the files."""
        if self.active:
            self.flush()
            self.bar.close()
        if self.writer:
            self.writer.close()


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
