"""Gives heads of a checkpoint a fixed distance to look back, before it is finetuned on tasks with two panels.

    python scripts/point_heads.py --model_path work/demo/export-text --save_path work/demo/pointed \\
        --heads 1.1:155 1.5:154 --data_config configs/data/demo_omni.yaml

LAYER.HEAD:DISTANCE. The code that an id predicts is the next one: the same cell of an upper panel of 12 rows of 12
codes and an end of line is 12 * 13 - 1 = 155 back, the cell right of it 154, the one below it 142. What the heads did
before is lost; `--measure` tells how much each one matters, and changes nothing.
"""

import argparse
import random
import shutil
import sys
from pathlib import Path

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError

_SEQUENCES = 60  # of the data, to see hidden states, or losses, of


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="point_heads.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", required=True, help="checkpoint folder, or hub id, to start from")
    parser.add_argument("--data_config", required=True, type=Path, help="YAML of the records to be trained on")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--heads", nargs="+", metavar="HEAD", help="LAYER.HEAD:DISTANCE each, layers and heads from 0")
    what.add_argument("--measure", action="store_true", help="print what the loss grows by without each head")
    parser.add_argument("--save_path", type=Path, help="folder for the new checkpoint, not there yet")
    return parser


def run(args: argparse.Namespace) -> None:
    from lumina_mgpt.model.checkpoint import COMPANIONS, load_model, resolve, save_model
    from lumina_mgpt.model.convert import check_target
    from lumina_mgpt.training import pointed

    if args.measure == bool(args.save_path):
        raise InputError("--save_path goes with --heads, and only with it; --measure writes nothing")
    pointers = [pointed.Pointer.parse(text) for text in args.heads or []]
    if args.save_path:
        check_target(args.save_path)
    source = resolve(cli.checkpoint_path(args.model_path))
    ids = _sequences(source, args.data_config)
    model = load_model(source, None, "cpu")
    if model.config.int4_group:
        raise InputError(f"--model_path {source} holds int4 weights; give the checkpoint that they were made of")
    dtype = model.embed_tokens.weight.dtype
    model = model.float()
    if args.measure:
        _print_losses(model, ids)
        return
    pointed.point(model, pointers, ids)
    save_model(model, args.save_path, dtype)
    for file in sorted({file for pattern in COMPANIONS for file in source.glob(pattern)}):
        shutil.copyfile(file, args.save_path / file.name)
    print(f"{len(pointers)} heads pointed in {args.save_path}; give it to finetune.py as --init_from")


def _sequences(source: Path, data_config: Path) -> list:
    """Some of the training sequences, the same ones each time."""
    from lumina_mgpt.data.dataset import TokenDataset, read_sources
    from lumina_mgpt.pipeline import Checkpoint

    dataset = TokenDataset(read_sources(data_config), Checkpoint.open(source).vocabulary)
    order = dataset.epoch(0)
    chosen = random.Random(0).sample(range(len(order)), min(_SEQUENCES, len(order)))
    return [dataset.read(int(order[number]), 0)[0] for number in chosen]


def _print_losses(model, ids: list) -> None:
    from lumina_mgpt.training.pointed import loss_without

    config = model.config
    print("| layer | head | loss grows by, nats an id |\n| --- | --- | --- |")
    whole = loss_without(model, None, ids)
    heads = [(layer, head) for layer in range(config.num_hidden_layers) for head in range(config.num_attention_heads)]
    for layer, head in tqdm(heads, desc="heads", mininterval=cli.bar_interval()):
        tqdm.write(f"| {layer} | {head} | {loss_without(model, (layer, head), ids) - whole:.3f} |", sys.stdout)


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
