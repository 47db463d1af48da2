"""What a run tells about itself: a progress bar, one JSON line a step, TensorBoard, the share of peak FLOPs."""

import math
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.data.batches import MicroBatch
from lumina_mgpt.errors import package_error
from lumina_mgpt.io import append_lines, keep_until

_FLUSH_SECONDS = 5
# Of the dense bf16 products, from NVIDIA's data sheets; the first that is part of the device's name holds.
_PEAK_TFLOPS = {
    "B200": 2250.0, "H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "A6000": 155.0, "4090": 165.0,
    "3090": 71.0,
}  # fmt: skip


def peak_flops(device: torch.device, told: float = 0.0) -> float:
    """FLOPs a second that a device could do: `told` is in TFLOPs; 0 where it is not known."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return 1e12 * (told or next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), 0.0))


def batch_flops(config: ModelConfig, batch: MicroBatch) -> float:
    """FLOPs that forward and backward of a micro-batch cannot do without: none for padding or recomputing.

    Six for each weight and id (the head: and label), and twelve for each channel and pair of ids that see each other.
    Source: PaLM (arXiv 2204.02311), appendix B; halved for attention, which is causal.
    """
    D, inner = config.hidden_size, config.intermediate_size
    layer = 2 * D * D + 2 * D * config.num_key_value_heads * config.head_dim + 3 * D * inner
    pairs = sum(n * n for n in batch.documents) / 2 if batch.documents else batch.tokens * batch.ids.shape[1] / 2
    products = layer * batch.tokens * config.num_hidden_layers + config.vocab_size * D * batch.labelled
    return 6.0 * products + 12.0 * config.num_hidden_layers * D * pairs


class Metrics:
    """Bar, `metrics.jsonl` and TensorBoard's files of the first process; silent on the others.

    Raises:
        InputError: TensorBoard is asked for and not installed.
    """

    def __init__(self, folder: Path, step: int, progress: float, active: bool, tensorboard: bool = False) -> None:
        self.active, self.path, self.waiting = active, folder / "metrics.jsonl", []
        self.flushed, self.writer, self.make_writer = 0.0, None, None
        if not active:
            return
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except Exception as error:  # whatever one of its own imports raises
                raise package_error(error, "--tensorboard", "tensorboard", ("tensorboard", "torch.utils.tensorboard"),
                                    "leave it out: metrics.jsonl holds the same") from None  # fmt: skip
            self.make_writer = lambda: SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        form = "{l_bar}{bar}| [{elapsed}<{remaining}{postfix}]"
        self.bar = tqdm(total=1.0, initial=min(1.0, progress), bar_format=form, dynamic_ncols=True, smoothing=0.05)

    def begin(self, step: int) -> None:
        """Readies the file of an earlier run of which `step` steps count."""
        if self.active:
            keep_until(self.path, step)
            self.writer = self.make_writer() if self.make_writer else None

    def step(self, row: dict) -> None:
        """Takes one step's numbers; what is not finite becomes null, which every reader of JSON knows."""
        if not self.active:
            return
        row = {key: value if _finite(value) else None for key, value in row.items()}
        self.waiting.append(row)
        self.bar.update(max(0.0, min(1.0, row["progress"]) - self.bar.n))
        loss = "left out" if row["loss"] is None or "skipped" in row else f"{row['loss']:.3f}"
        share = f" {100 * row['peak_share']:.1f} % of peak" if "peak_share" in row else ""
        self.bar.set_postfix_str(
            f"step {row['step']} loss {loss} lr {row['lr']:.1e} {row['tokens_per_second']:.0f} tok/s{share}"
        )
        if self.writer:
            for key, value in row.items():
                if key not in ("step", "skipped") and value is not None:
                    self.writer.add_scalar(key, value, row["step"])
        if time.monotonic() - self.flushed > _FLUSH_SECONDS:
            self.flush()

    def pictures(self, step: int, pictures: list[Image.Image]) -> None:
        for n, picture in enumerate(pictures if self.writer else []):
            self.writer.add_image(f"samples/{n}", np.asarray(picture), step, dataformats="HWC")

    def flush(self) -> None:
        if self.active:
            append_lines(self.path, self.waiting)
            self.waiting, self.flushed = [], time.monotonic()
        if self.writer:
            self.writer.flush()

    def close(self) -> None:
        if self.active:
            self.flush()
            self.bar.close()
        if self.writer:
            self.writer.close()


def _finite(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
