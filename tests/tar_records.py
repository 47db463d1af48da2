"""Runs pre-tokenization of tar archives, and makes the pictures in them."""

import io
from pathlib import Path

from commands import main_of
from PIL import Image


def picture(color: str = "red", form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), color).save(buffer, form)
    return buffer.getvalue()


def command(in_filename: Path, out: Path, checkpoint: Path) -> int:
    return main_of("pre_tokenize")(["--in_filename", str(in_filename), "--out_dir", str(out), "--model_path",
                                    str(checkpoint), "--target_size", "64", "--device", "cpu"])  # fmt: skip
