"""Writes a training checkpoint as a model folder in the released layout. The training may still be running.

lumina-mgpt export --output_dir outputs/finetune --save_path outputs/now
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError

# The base checkpoint is an option of the training, not of this command.
ALIASES = {"init_from": "--init_from"}


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        ALIASES, prog="lumina-mgpt export", description="Writes a training checkpoint in the released layout."
    )
    parser.add_argument("--output_dir", required=True, type=Path, help="output folder of the training")
    parser.add_argument("--save_path", required=True, type=Path, help="folder for the weights; it must not exist yet")
    parser.add_argument("--step", type=cli.whole, help="step of the checkpoint (default: the newest)")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp16", "fp32"), help="of the weights written")
    parser.add_argument("--adapter", action="store_true", help="write the adapters of --lora_rank only, not merged")
    return parser


def export(args: argparse.Namespace) -> None:
    from lumina_mgpt.io import new_folder, require_new
    from lumina_mgpt.training.adapters import save_adapter
    from lumina_mgpt.training.base import write_beside_adapter
    from lumina_mgpt.training.export import export_checkpoint
    from lumina_mgpt.training.loading import trained_model
    from lumina_mgpt.training.run_folder import find

    require_new(args.save_path, "--save_path")  # before the weights are loaded
    checkpoint = find(args.output_dir, args.step)
    if not args.adapter:
        folder = export_checkpoint(args.output_dir, args.save_path, args.dtype, checkpoint, "--save_path")
        print(f"exported to {folder}")
        return
    model, settings = trained_model(checkpoint)
    if not settings.model.lora_rank:
        raise InputError(f"needs a run with --lora_rank, {args.output_dir} has none; export it without", "adapter")
    with new_folder(args.save_path, "--save_path") as part:
        save_adapter(model, part, settings.model)
        write_beside_adapter(model, part)
    print(f"adapters of {settings.model.init_from} in {args.save_path}; lumina-mgpt merge-lora adds them")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(export, build_parser(), argv)
