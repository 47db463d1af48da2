"""Makes a checkpoint with int4 weights, which loads without quantizing again: the 7B in 6.3 GB instead of 15.8.

    lumina-mgpt quantize --model_path assets/demo --save_path work/demo-int4

The new folder holds all that generate.py needs; it is written whole or not at all.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.config import DEFAULT_INT4_GROUP, INT4_GROUPS
from lumina_mgpt.errors import InputError


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt quantize", description="Makes a checkpoint with int4 weights.")
    parser.add_argument("--model_path", required=True, help="checkpoint folder, or hub id")
    parser.add_argument("--save_path", required=True, type=Path, help="folder for the new checkpoint, not there yet")
    parser.add_argument(
        "--group", type=cli.whole, choices=INT4_GROUPS, default=DEFAULT_INT4_GROUP, help="weights that share a scale"
    )
    return parser


def quantize(args: argparse.Namespace) -> None:
    """Checks, then reads, quantizes and writes with a bar, and says what came out."""
    from lumina_mgpt.model.convert import check_target, quantize_checkpoint
    from lumina_mgpt.model.hub import resolve  # torch takes seconds to import: only now

    check_target(args.save_path)
    try:
        source = resolve(cli.checkpoint_path(args.model_path))
    except InputError as error:
        raise InputError(f"--model_path {error}") from None
    with cli.ReadingBar(f"int4, groups of {args.group}") as bar:
        try:
            quantize_checkpoint(source, args.save_path, args.group, bar)
        except KeyboardInterrupt:
            raise KeyboardInterrupt("nothing was written") from None
    before, after = (size(folder) / 1e6 for folder in (source, args.save_path))
    print(f"{args.save_path}: {after:.1f} MB of weights, {before:.1f} before; use it as --model_path")


def size(folder: Path) -> int:
    """Bytes of the transformer's weights."""
    files = {file for pattern in ("model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(quantize, build_parser(), argv)

