"""Writes a training checkpoint in the released layout, which generate.py loads; also while the training goes on.

    lumina-mgpt export --output_dir outputs/finetune --save_path outputs/now
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt export", description="Writes a training checkpoint in the released layout.")
    parser.add_argument("--output_dir", required=True, type=Path, help="that of the training")
    parser.add_argument("--save_path", required=True, type=Path, help="folder for the weights, not there yet")
    parser.add_argument("--step", type=cli.whole, help="of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of the weights written")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of --lora_rank only, not merged")
    return parser


def export(args: argparse.Namespace) -> None:
    from lumina_mgpt.io import new_folder
    from lumina_mgpt.model.convert import check_target
    from lumina_mgpt.training import checkpoint
    from lumina_mgpt.training.adapters import save_adapter
    from lumina_mgpt.training.base import write_beside_adapter

    check_target(args.save_path)
    if not args.adapter:
        folder = checkpoint.export(args.output_dir, args.save_path, args.dtype, args.step, parameter="--save_path")
        print(f"exported to {folder}")
        return
    model, settings = checkpoint.trained_model(checkpoint.find(args.output_dir, args.step))
    if not settings.lora_rank:
        raise InputError(f"--adapter: {args.output_dir} was trained without --lora_rank; export it whole")
    with new_folder(args.save_path, "--save_path") as part:
        save_adapter(model, part, settings)
        write_beside_adapter(model, part)
    print(f"adapters of {settings.init_from} in {args.save_path}; lumina-mgpt merge-lora adds them")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(export, build_parser(), argv)

