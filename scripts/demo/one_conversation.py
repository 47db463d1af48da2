"""Draws, reads, edits and shows views of an object in a single conversation, as one picture.

    python scripts/demo/one_conversation.py --model_path assets/demo --save_path assets/conversation.png

It needs a checkpoint that writes text, as the demo does.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError


@dataclass(frozen=True)
class Step:
    """A turn of the human, and what kind of answer it gets."""

    text: str
    want: str
    size: tuple[int, int] | None = None
    views: int = 1


_DRAW = "Generate an image of 192x96 according to the following prompt:\n{}"
_TURN = "Generate 8 object views of 64x64 according to the following prompt:\n{}"
STEPS = (
    Step(_DRAW.format("a fox to the left of an owl on a sky blue background"), "image", (192, 96)),
    Step("What is to the right of the fox?", "text"),
    Step("Change the background to pink.", "image", (192, 96)),
    Step("What colour is the background?", "text"),
    Step("Describe the picture.", "text"),
    Step(_TURN.format("a red mug on a white background"), "images", (64, 64), 8),
)
_GAP, _LINE = 10, 16  # pixels between turns, and of a line of text
_WIDTH = 8 * 64 + 9 * 4 + 2 * _GAP


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="one_conversation.py", description=__doc__.split("\n")[0])
    parser.add_argument("--model_path", default=cli.DEMO, help="checkpoint folder or hub id")
    parser.add_argument("--cfg", type=cli.number, default=4.0, help="guidance scale")
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed")
    parser.add_argument("--save_path", type=Path, default=Path("conversation.png"), help="the picture, a .png file")
    return parser


def talk(pipeline: Any, cfg: float, seed: int) -> list[tuple[str, str, list]]:
    """(words of the human, words of the answer, pictures of the answer) of each of STEPS."""
    conversation, turns = pipeline.conversation(), []
    for step in STEPS:
        settings = {"text_top_k": 1, "cfg": cfg, "seed": seed}
        stream = conversation.say(step.text, want=step.want, size=step.size, views=step.views, **settings)
        for _ in stream:
            pass
        answer = stream.answer
        turns.append(
            (step.text.split("\n")[-1], "" if answer.images else answer.text, [part.image for part in answer.images])
        )
    return turns


def drawn(turns: list[tuple[str, str, list]]) -> Any:
    """The conversation as one picture: what the human says on the left, the answers below it."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    heights = [
        _LINE + max([_LINE * bool(words), *(image.height + 4 for image in images)]) for _, words, images in turns
    ]
    sheet = Image.new("RGB", (_WIDTH, sum(heights) + _GAP * (len(turns) + 1)), "white")
    pen, top = ImageDraw.Draw(sheet), _GAP
    for (said, words, images), height in zip(turns, heights, strict=True):
        pen.text((_GAP, top), said, fill=(30, 60, 140), font=font)
        pen.text((_GAP + 4, top + _LINE), words, fill="black", font=font)
        left = _GAP
        for image in images:
            sheet.paste(image, (left, top + _LINE + 2))
            left += image.width + 4
        top += height + _GAP
    return sheet


def run(args: argparse.Namespace) -> None:
    """Writes the picture."""
    if args.save_path.suffix != ".png":
        raise InputError(f"must end in .png, got {args.save_path}; try conversation.png", "save_path")
    from lumina_mgpt.pipeline import Checkpoint, Pipeline

    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path))
    if not checkpoint.config.family.answers_in_text:
        raise InputError(f"must write text, which {args.model_path} cannot; train it with train_more.sh", "model_path")
    turns = talk(Pipeline.from_pretrained(checkpoint), args.cfg, args.seed)
    args.save_path.parent.mkdir(parents=True, exist_ok=True)
    drawn(turns).save(args.save_path, optimize=True)
    for said, words, images in turns:
        print(f"{said}\n  {words or f'{len(images)} pictures'}")


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
