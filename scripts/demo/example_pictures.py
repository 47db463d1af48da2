"""Writes the training pictures of the example in TRAIN.md, and prompts of what the checkpoint should not forget.

    python scripts/demo/example_pictures.py --out_dir work/example
    python scripts/demo/example_pictures.py --out_dir work/example --sheet work/example/sheet.png

The first command writes `lighthouse/` with pictures and captions, `known.txt` with prompts of known objects, and
`asked.txt` with the prompts of the comparison. The second one, after training, shows the pictures of `before/` and
`after/` side by side.
"""

import argparse
import random
import sys
from pathlib import Path

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.errors import InputError


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="example_pictures.py", description="Writes the pictures of TRAIN.md's example.")
    parser.add_argument("--out_dir", type=Path, default=Path("work/example"), help="output folder")
    parser.add_argument("--pictures", type=cli.whole, default=112, help="number of pictures of the new object")
    parser.add_argument("--known", type=cli.whole, default=96, help="number of prompts of known objects")
    parser.add_argument("--model_path", type=Path, default=Path(cli.DEMO), help="checkpoint, for its names.txt")
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed of sizes, positions and captions")
    parser.add_argument("--sheet", type=Path, help="write only the comparison, to this file")
    return parser


def write(args: argparse.Namespace) -> None:
    """Writes pictures, captions and prompts."""
    import emoji
    import lighthouse

    from lumina_mgpt.io import write_atomic

    if min(args.pictures, args.known) < 1:
        raise InputError(f"--pictures and --known must be at least 1, got {args.pictures} and {args.known}")
    names = prompt_files.known_names(args.model_path)
    if not names:
        raise InputError(f"--model_path {args.model_path} must hold names.txt, UTF-8 text; give the demo checkpoint")
    rng, folder = random.Random(args.seed), args.out_dir / "lighthouse"
    folder.mkdir(parents=True, exist_ok=True)
    for n in range(args.pictures):
        color = lighthouse.DRAWN[n % len(lighthouse.DRAWN)]
        lighthouse.draw(color, rng).save(folder / f"{n:03d}.png")
        write_atomic(folder / f"{n:03d}.txt", lighthouse.caption(color, rng) + "\n")
    chosen = [(emoji.with_article(rng.choice(names)), rng.choice(emoji.COLORS)) for _ in range(args.known)]
    known = [lighthouse.on_background(noun, color) for noun, color in chosen]
    write_atomic(args.out_dir / "known.txt", "\n".join(known) + "\n")
    write_atomic(args.out_dir / "asked.txt", "\n".join(lighthouse.ASKED) + "\n")
    print(f"{args.pictures} pictures in {folder}, {args.known} prompts in {args.out_dir / 'known.txt'}")


def write_sheet(args: argparse.Namespace) -> None:
    """Writes the comparison of the pictures before and after training."""
    import lighthouse

    from lumina_mgpt.images import open_image

    rows = {
        name: [open_image(args.out_dir / name / f"{n}_0.png") for n in range(len(lighthouse.ASKED))]
        for name in ("before", "after")
    }
    lighthouse.sheet(rows, lighthouse.ASKED).save(args.sheet)
    print(args.sheet)


def main(argv: list[str] | None = None) -> int:
    return cli.run(lambda args: write_sheet(args) if args.sheet else write(args), build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
