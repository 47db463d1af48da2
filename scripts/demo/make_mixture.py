"""Writes the pictures and records of the demo's second training: drawing, reading, conversations, maps and views.

    python scripts/demo/make_mixture.py --out_dir work/demo

The records of a kind are in `out_dir/records/KIND.jsonl`, the pictures in `out_dir/drawn`. A kind whose file exists is
not made again.
"""

import argparse
import random
import sys
from pathlib import Path

from lumina_mgpt import cli


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="make_mixture.py", description=__doc__.split("\n")[0])
    parser.add_argument("--out_dir", type=Path, default=Path("work/demo"), help="output folder")
    parser.add_argument("--emoji_dir", type=Path, help="folder of the emoji packages (default: OUT_DIR/emoji)")
    parser.add_argument("--scale", type=cli.number, default=1.0, help="factor of the numbers of records")
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed")
    return parser


def write(args: argparse.Namespace) -> None:
    """Writes all records."""
    import emoji
    import examples
    import mixture
    import words

    folder = args.emoji_dir or args.out_dir / "emoji"
    emoji.fetch(folder)
    names, (unknown, _) = emoji.known_names(), words.unknown_names(folder)
    pictures = emoji.load(folder) | emoji.load(folder, names=unknown)
    total = 0
    for kind, source in mixture.kinds().items():
        path = args.out_dir / "records" / f"{kind}.jsonl"
        count = max(1, round(source.count * args.scale))
        total += count
        if path.exists():
            continue
        todo = source.examples(names, count, random.Random(f"{args.seed} {kind}"), unknown)
        examples.write(path, todo, args.out_dir / "drawn", pictures)
    print(f"{total} records of {len(mixture.kinds())} kinds in {args.out_dir / 'records'}")


def main(argv: list[str] | None = None) -> int:
    return cli.run(write, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
