"""Draws the example inputs of image-to-image tasks: assets/depth.png and assets/subject.png.

    python scripts/demo/make_assets.py --emoji_dir work/demo/emoji --save_path assets

Both show scenes that the demo checkpoint knows, at four times its base size.
"""

import argparse
import sys
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.outputs import OutputFolder

_DEPTH, _SUBJECT = "hedgehog", "penguin"  # named in the prompts of scripts/sample_i2i.sh
_SCALE = 4


def make(args: argparse.Namespace) -> None:
    """Writes both pictures."""
    output = OutputFolder(args.save_path, args.overwrite)
    output.claim(["depth.png", "subject.png"])

    import emoji
    import scenes
    from PIL import Image

    emoji.fetch(args.emoji_dir)
    size = (_SCALE * emoji.CELL, _SCALE * emoji.CELL)
    depth = scenes.depth(scenes.Scene((_DEPTH,), "white"), emoji.load(args.emoji_dir))
    subject = emoji.load(args.emoji_dir, size[0])[_SUBJECT]
    white = scenes.background("white")
    print(output.save("depth.png", depth.resize(size, Image.Resampling.BICUBIC)))
    print(output.save("subject.png", scenes.to_image(scenes.over(white, subject))))


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="make_assets.py", description="Draws assets/depth.png and assets/subject.png.")
    parser.add_argument("--emoji_dir", type=Path, default=Path("work/demo/emoji"), help="emoji packages")
    parser.add_argument("--save_path", default="assets", help="output folder")
    parser.add_argument("--overwrite", action="store_true", help="replace existing pictures")
    return cli.run(make, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
