"""Trains a small MoVQGAN on folders of PNG pictures, on a CPU, in a given number of minutes.

python scripts/train_movqgan.py --images work/demo/pictures/single=3 work/demo/pictures/maps=1 --out_dir work/movqgan

Ends with `movqgan.safetensors` in --out_dir, under the names of the released files. Run again after a stop, it goes on.
"""

import argparse
import logging
import sys
from pathlib import Path

import torch

from lumina_mgpt.errors import InputError
from lumina_mgpt.movqgan.model import MoVQGANConfig
from lumina_mgpt.training.movqgan import MoVQGANTraining, Pictures, Trainer

SIZES = {"ch": 32, "blocks": 1, "num_codes": 2048}
MEANING = {"ch": "width of the finest level, a multiple of 32", "blocks": "residual blocks a level",
           "num_codes": "codes to choose from"}  # fmt: skip


def weighted_folder(text: str) -> tuple[Path, float]:
    """`folder` or `folder=weight`."""
    folder, _, weight = text.partition("=")
    try:
        value = float(weight or 1)
    except ValueError:
        value = 0.0
    if not value > 0:
        raise argparse.ArgumentTypeError(f"must be FOLDER or FOLDER=WEIGHT with a weight above 0, got {text}")
    return Path(folder), value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=weighted_folder, nargs="+", required=True, metavar="FOLDER[=WEIGHT]")
    parser.add_argument("--out_dir", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=45.0)
    for name, value in SIZES.items():
        parser.add_argument(f"--{name}", type=int, help=f"{MEANING[name]} (default: {value})")
    parser.add_argument("--decoder_of", help="finished weights: train on their decoder alone; codes keep their meaning")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for name, value in SIZES.items():
            if args.decoder_of and getattr(args, name) is not None:
                raise InputError(f"--{name} {getattr(args, name)} means nothing with --decoder_of, whose file has its "
                                 "sizes; leave it out")  # fmt: skip
            setattr(args, name, value if getattr(args, name) is None else getattr(args, name))
        if args.ch < 32 or args.ch % 32:
            raise InputError(f"--ch must be a multiple of 32 (group norm has 32 groups), got {args.ch}; try 32")
        for name in ("minutes", "blocks", "num_codes", "lr", "threads"):
            if not getattr(args, name) > 0:
                raise InputError(f"--{name} must be above 0, got {getattr(args, name)}")
        torch.set_num_threads(args.threads)
        config = MoVQGANConfig(ch=args.ch, blocks=args.blocks, num_codes=args.num_codes)
        settings = MoVQGANTraining(minutes=args.minutes, decoder_of=args.decoder_of, lr=args.lr, seed=args.seed)
        Trainer(config, settings, Pictures(dict(args.images)), args.out_dir).run()
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("train_movqgan.py: stopped; run the same command again to go on from the last save", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
