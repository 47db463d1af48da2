"""Initializes heads of a checkpoint that attend to a fixed distance, before finetuning on tasks with two panels.

    python scripts/demo/point_heads.py --model_path work/demo/export-text --save_path work/demo/pointed \\
        --heads 1:155 1:154 --data_config configs/data/demo_omni.yaml

LAYER:DISTANCE replaces the head of the layer whose removal increases the loss least, LAYER.HEAD:DISTANCE that head. An
id predicts the next code. For panels of 12 x 12 codes with row ends, the same cell of the upper panel is therefore
12 * 13 - 1 = 155 back, the cell right of it 154 and the one below it 142.
"""

import argparse
import random
import sys
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.io import new_folder, require_new

_SEQUENCES = 60  # training sequences, for hidden states and losses


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="point_heads.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="checkpoint folder or hub id")
    parser.add_argument("--data_config", required=True, type=Path, help="YAML file of the training data")
    parser.add_argument(
        "--heads", nargs="+", required=True, metavar="HEAD", help="LAYER:DISTANCE or LAYER.HEAD:DISTANCE each, from 0"
    )
    parser.add_argument("--save_path", required=True, type=Path, help="new folder for the result")
    return parser


def run(args: argparse.Namespace) -> None:
    """Writes the checkpoint with initialized heads."""
    import pointed

    from lumina_mgpt.model.convert import copy_companions
    from lumina_mgpt.model.hub import resolve
    from lumina_mgpt.model.reading import load_model, require_plain_weights
    from lumina_mgpt.model.writing import save_model

    pointers = [pointed.Pointer.parse(text) for text in args.heads]
    require_new(args.save_path, "save_path")
    source = resolve(cli.checkpoint_path(args.model_path))
    require_plain_weights(source, "model_path", "edited")
    ids = _sequences(source, args.data_config)
    model = load_model(source, None, "cpu")
    dtype = model.embed_tokens.weight.dtype
    made = pointed.point(model.float(), pointers, ids)
    with new_folder(args.save_path, "save_path") as folder:
        save_model(model, folder, dtype)
        copy_companions(source, folder)
    print(f"pointed {', '.join(map(str, made))} in {args.save_path}; finetune it with --init_from")


def _sequences(source: Path, data_config: Path) -> list:
    """A fixed random choice of training sequences."""
    from lumina_mgpt.data.dataset import TokenDataset
    from lumina_mgpt.data.sources import read_sources
    from lumina_mgpt.pipeline import Checkpoint

    dataset = TokenDataset(read_sources(data_config), Checkpoint.open(source).vocabulary)
    order = dataset.epoch(0)
    chosen = random.Random(0).sample(range(len(order)), min(_SEQUENCES, len(order)))
    return [dataset.read(int(order[number]), 0)[0] for number in chosen]


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
