"""Adds adapters to the weights that they were trained on. Needs peft.

    lumina-mgpt merge-lora --model_path Lumina-mGPT-2.0 --adapter outputs/adapter --save_path outputs/merged

The adapters must be in the format of peft. `lumina-mgpt export --adapter` writes this format.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.errors import caused_by


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt merge-lora", description="Adds adapters to the weights they were trained on.")
    parser.add_argument("--model_path", required=True, help="checkpoint folder, or hub id, that training started from")
    parser.add_argument("--adapter", required=True, type=Path, help="folder of adapter_model.safetensors")
    parser.add_argument("--save_path", required=True, type=Path, help="folder for the new checkpoint; must not exist")
    return parser


def merge(args: argparse.Namespace) -> None:
    from lumina_mgpt.io import new_folder, require_new
    from lumina_mgpt.model.convert import copy_companions
    from lumina_mgpt.model.hub import resolve
    from lumina_mgpt.model.reading import load_model, require_plain_weights
    from lumina_mgpt.model.writing import save_model
    from lumina_mgpt.training.base import check_beside_adapter
    from lumina_mgpt.training.merging import merge_adapter

    require_new(args.save_path, "save_path")  # before the weights are loaded
    with caused_by("model_path"):
        source = resolve(cli.checkpoint_path(args.model_path))
    require_plain_weights(source, "model_path", "merged")
    with new_folder(args.save_path, "save_path") as folder:
        model = load_model(source, None, "cpu")
        check_beside_adapter(model, args.adapter, args.model_path)
        merge_adapter(model, args.adapter, args.model_path)
        save_model(model, folder)
        copy_companions(source, folder)
    print(f"merged into {args.save_path}; use it as --model_path")


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(merge, build_parser(), argv)
