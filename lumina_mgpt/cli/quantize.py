"""Makes a checkpoint with int4 weights. Loading it needs no quantization. The 7B takes 6.3 GB instead of 15.8 GB.

    lumina-mgpt quantize --model_path assets/demo --save_path work/demo-int4

The new folder also holds the tokenizer and image tokenizer files. The folder is written completely or not at all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.config import DEFAULT_INT4_GROUP, INT4_GROUPS
from lumina_mgpt.errors import caused_by
from lumina_mgpt.io import require_new


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        {"quant": "--group"}, prog="lumina-mgpt quantize", description="Makes a checkpoint with int4 weights."
    )
    parser.add_argument("--model_path", required=True, help="checkpoint folder, or hub id")
    parser.add_argument("--save_path", required=True, type=Path, help="folder for the new checkpoint; must be new")
    parser.add_argument(
        "--group", type=cli.whole, choices=INT4_GROUPS, default=DEFAULT_INT4_GROUP, help="weights that share a scale"
    )
    return parser


def quantize(args: argparse.Namespace) -> None:
    """Quantizes the checkpoint and prints its size before and after."""
    from lumina_mgpt.model.convert import quantize_checkpoint  # torch takes seconds to import
    from lumina_mgpt.model.hub import resolve

    require_new(args.save_path, "save_path")
    with caused_by("model_path"):
        source = resolve(cli.checkpoint_path(args.model_path))
    with cli.ReadingBar(f"int4, groups of {args.group}") as bar:
        try:
            quantize_checkpoint(source, args.save_path, args.group, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing was written") from None
    before, after = (weight_bytes(folder) / 1e6 for folder in (source, args.save_path))
    print(f"{args.save_path}: {after:.1f} MB of weights, {before:.1f} before; use it as --model_path")


def weight_bytes(folder: Path) -> int:
    """Returns the size of a folder's transformer weights in bytes."""
    files = {file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(quantize, build_parser(), argv)
