"""Generates an image from one prompt and a control picture.

    lumina-mgpt generate-with-image --task canny --extract --input_image_path assets/subject.png \\
        --prompt "a penguin on a yellow background" --save_path controlled

This command does the same as `lumina-mgpt generate --task i2i` and names its files in the same way. With Lumina-mGPT
2.0, the size is that of both panels together: `--width 768 --height 768` gives two panels of 768 x 384 pixels.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.families import task_names
from lumina_mgpt.maps import EXTRACTORS


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES | {"panel": "--input_image_path", "i2i_task": "--task"},
        prog="lumina-mgpt generate-with-image",
        description="Generates an image from one prompt and a control picture.",
    )
    group = parser.add_argument_group("prompt and picture")
    group.add_argument(
        "--task", required=True, choices=task_names(i2i=True), help="as --i2i_task of lumina-mgpt generate"
    )
    group.add_argument(
        "--input_image_path",
        required=True,
        help="given picture, cropped at its center; Lumina-mGPT 2.0: the upper panel",
    )
    group.add_argument("--prompt", help="what the image shows; optional for predict_... and no_edit")
    group.add_argument(
        "--extract",
        action="store_true",
        help=f"the picture is a photo: compute the map from it ({', '.join(EXTRACTORS)})",
    )
    tasks.add_panel_prompt(group)
    generate.add_options(parser)
    return parser


def read_plan(args: argparse.Namespace) -> tasks.OutputPlan:
    """Opens the picture and returns the plan of this command."""
    settings = tasks.request_settings(args)
    prompts = prompt_files.read_prompts(None if args.prompt is None else [args.prompt], None)
    source = ("input_image_path", args.input_image_path)
    plan = tasks.picture_plan(args.task, prompts, source, args.panel_prompt, settings, args.extract)
    return replace(plan, preview=args.preview)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(lambda args: generate.run(args, read_plan), build_parser(), argv)
