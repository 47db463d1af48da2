"""Trains a small image tokenizer on folders of pictures, in a given number of minutes.

lumina-mgpt train-movqgan --images work/demo/pictures/single=3 work/demo/pictures/maps=1 --out_dir work/movqgan

By default it is a MoVQGAN, as in the second generation, with 8 x 8 pixels a code: `movqgan.safetensors` in --out_dir.
With --norms plain it is a VQGAN, as in the first generation, with 16 x 16 pixels a code: `vqgan.safetensors`. The
tensors have the same names as in the released files. To resume after a stop, run the same command again.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError

if TYPE_CHECKING:
    from lumina_mgpt.vqgan.model import VQGANConfig

# By norms: multiples of `ch` by level as in the released files, and channels of a code. MoVQGAN's codes have 4 as well,
# Chameleon's 256; fewer suit small models.
LEVELS = {"spatial": (1, 2, 2, 4), "plain": (1, 1, 2, 2, 4)}
CODE_CHANNELS = {"spatial": 4, "plain": 8}
SIZES = {"ch": 32, "blocks": 1, "num_codes": 2048}
OF_THE_FILE = ("norms", "mult", "z_channels", *SIZES)  # what the file of --decoder_of determines
LARGEST = {
    "ch": 512,
    "blocks": 16,
    "num_codes": 65536,
    "z_channels": 1024,
    "threads": 1024,
    "minutes": 1e6,
    "lr": 10.0,
    "pixels": 10**9,
}
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
    parser.add_argument(
        "--norms",
        choices=tuple(LEVELS),
        help="norms of the decoder: spatial, a MoVQGAN with 8 x 8 pixels a code; plain, a VQGAN with 16 x 16 (default: "
        "spatial)",
    )
    parser.add_argument(
        "--mult",
        type=cli.whole,
        nargs="+",
        metavar="N",
        help="width of each level from fine to coarse, as a multiple of --ch (default: 1 2 2 4; plain: 1 1 2 2 4)",
    )
    parser.add_argument("--z_channels", type=cli.whole, help="channels of a code (default: 4; plain: 8)")
    parser.add_argument("--decoder_of", help="trained weights: train only their decoder; codes keep their meaning")
    parser.add_argument("--lr", type=cli.number, default=3e-3, help="peak learning rate")
    parser.add_argument(
        "--pixels", type=cli.whole, help="pixels in a batch, over all its pictures (default: 36864; on CUDA 600000)"
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N, mps or cpu")
    parser.add_argument("--threads", type=cli.whole, default=2, help="CPU threads")
    parser.add_argument("--seed", type=cli.whole, default=0, help="of weights and batches")
    return parser


def check_sizes(args: argparse.Namespace) -> None:
    """Replaces the sizes that were not given by their defaults, and checks all of them."""
    for name in OF_THE_FILE:
        value = getattr(args, name)
        if args.decoder_of and value is not None:
            shown = " ".join(map(str, value)) if isinstance(value, list) else value
            raise InputError(f"{shown} means nothing with --decoder_of, whose file determines it; leave it out", name)
    args.norms = args.norms or "spatial"
    defaults = {**SIZES, "mult": LEVELS[args.norms], "z_channels": CODE_CHANNELS[args.norms]}
    for name, value in defaults.items():
        setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
    if args.ch < 32 or args.ch % 32:
        raise InputError(f"must be a multiple of 32 (group norm has 32 groups), got {args.ch}; try 32", "ch")
    levels, got = LEVELS[args.norms], " ".join(map(str, args.mult))
    if len(args.mult) != len(levels) or not all(1 <= multiple <= 16 for multiple in args.mult):
        cell, example = 2 ** (len(levels) - 1), " ".join(map(str, levels))
        rule = f"must be {len(levels)} numbers in 1 ... 16 for {args.norms} norms ({cell} x {cell} pixels a code)"
        raise InputError(f"{rule}, got {got}; try {example}", "mult")


def model_config(args: argparse.Namespace) -> "VQGANConfig":
    """Returns the sizes of the model that checked options describe."""
    from lumina_mgpt.vqgan.model import VQGANConfig  # takes seconds: after the checks

    spatial = args.norms == "spatial"
    return VQGANConfig(
        ch=args.ch,
        blocks=args.blocks,
        mult=tuple(args.mult),
        z_channels=args.z_channels,
        embed_dim=args.z_channels,
        num_codes=args.num_codes,
        attention_levels=(len(args.mult) - 1,) if spatial else (),  # as in the released files
        spatial=spatial,
    )


def train(args: argparse.Namespace) -> None:
    check_sizes(args)
    for name, largest in LARGEST.items():
        value = getattr(args, name)
        if value is not None and not 0 < value <= largest:
            raise InputError(f"must be above 0 and at most {largest:g}, got {value}; leave it out", name)
    if not 0 <= args.seed < 2**63:
        raise InputError(f"must be a whole number in 0 ... 2**63 - 1, got {args.seed}; try 0", "seed")
    folders = Counter(folder for folder, _ in args.images)
    twice = [folder for folder, count in folders.items() if count > 1]
    if twice:
        raise InputError(f"must name different folders, got {twice[0]} twice; give it a larger weight", "images")

    import torch  # takes seconds: after the checks

    from lumina_mgpt.devices import resolve_device
    from lumina_mgpt.training.image_tokenizer import ImageTokenizerTrainer, MoVQGANTrainingConfig, Pictures

    device = resolve_device(args.device)
    pixels = args.pixels or (600_000 if device.type == "cuda" else 4 * 96 * 96)
    torch.set_num_threads(args.threads)
    config = model_config(args)
    settings = MoVQGANTrainingConfig(
        minutes=args.minutes,
        decoder_of=args.decoder_of,
        pixels=pixels,
        lr=args.lr,
        seed=args.seed,
        device=device,
    )
    ImageTokenizerTrainer(config, settings, Pictures(dict(args.images)), args.out_dir).run()


def main(argv: Sequence[str] | None = None) -> int:
    stopped = "the same command goes on from the last save"
    return cli.run(train, build_parser(), argv, stopped, smaller="a smaller --pixels")
