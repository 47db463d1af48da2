"""Trains a small MoVQGAN on folders of pictures, on a CPU, in a given number of minutes.

lumina-mgpt train-movqgan --images work/demo/pictures/single=3 work/demo/pictures/maps=1 --out_dir work/movqgan

The command writes `movqgan.safetensors` to --out_dir. Its tensors have the same names as in the released MoVQGAN files.
To resume after a stop, run the same command again.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError

SIZES = {"ch": 32, "blocks": 1, "num_codes": 2048}
LARGEST = {"ch": 512, "blocks": 16, "num_codes": 65536, "threads": 1024, "minutes": 1e6, "lr": 10.0}
MEANING = {
    "ch": "width of the finest level, a multiple of 32",
    "blocks": "residual blocks a level",
    "num_codes": "size of the codebook",
}


def weighted_folder(text: str) -> tuple[Path, float]:
    """Converts an option value `FOLDER` or `FOLDER=WEIGHT` to folder and weight. The default weight is 1."""
    folder, _, weight = text.partition("=")
    try:
        value = float(weight or 1)
    except ValueError:
        value = 0.0
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be FOLDER or FOLDER=WEIGHT, a weight above 0 up to 1e6, got {text}")
    return Path(folder), value


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt train-movqgan", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--images",
        type=weighted_folder,
        nargs="+",
        required=True,
        metavar="FOLDER[=WEIGHT]",
        help="folders of pictures, each with the weight of its choice",
    )
    parser.add_argument("--out_dir", type=Path, required=True, help="folder for weights and training state")
    parser.add_argument("--minutes", type=cli.number, default=45.0, help="length of the training")
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=cli.whole, help=f"{MEANING[name]} (default: {value})")
    parser.add_argument("--decoder_of", help="trained weights: train only their decoder; codes keep their meaning")
    parser.add_argument("--lr", type=cli.number, default=3e-3, help="peak learning rate")
    parser.add_argument("--threads", type=cli.whole, default=2, help="CPU threads")
    parser.add_argument("--seed", type=cli.whole, default=0, help="of weights and batches")
    return parser


def train(args: argparse.Namespace) -> None:
    for name, value in SIZES.items():
        if args.decoder_of and getattr(args, name) is not None:
            raise InputError(
                f"{getattr(args, name)} means nothing with --decoder_of, whose file has its sizes; leave it out", name
            )
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.ch < 32 or args.ch % 32:
        raise InputError(f"must be a multiple of 32 (group norm has 32 groups), got {args.ch}; try 32", "ch")
    for name, largest in LARGEST.items():
        if not 0 < getattr(args, name) <= largest:
            raise InputError(f"must be above 0 and at most {largest:g}, got {getattr(args, name)}", name)
    if not 0 <= args.seed < 2**63:
        raise InputError(f"must be a whole number in 0 ... 2**63 - 1, got {args.seed}; try 0", "seed")
    folders = Counter(folder for folder, _ in args.images)
    twice = [folder for folder, count in folders.items() if count > 1]
    if twice:
        raise InputError(f"must name different folders, got {twice[0]} twice; give it a larger weight", "images")

    import torch  # takes seconds: after the checks

    from lumina_mgpt.training.image_tokenizer import ImageTokenizerTrainer, MoVQGANTrainingConfig, Pictures
    from lumina_mgpt.vqgan.model import VQGANConfig

    torch.set_num_threads(args.threads)
    config = VQGANConfig(ch=args.ch, blocks=args.blocks, num_codes=args.num_codes)
    settings = MoVQGANTrainingConfig(minutes=args.minutes, decoder_of=args.decoder_of, lr=args.lr, seed=args.seed)
    ImageTokenizerTrainer(config, settings, Pictures(dict(args.images)), args.out_dir).run()


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(train, build_parser(), argv, stopped="the same command goes on from the last save")
