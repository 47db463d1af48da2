"""Makes a picture of one prompt and a control picture.

    python generate_examples/generate_single_prompt_with_image.py --task canny --extract \\
        --input_image_path assets/subject.png --prompt "a penguin on a yellow background" --save_path controlled

The same as `generate.py --task i2i`, files too. `--width 768 --height 768` are two panels of 768 x 384.
"""

import argparse
from collections.abc import Sequence

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.maps import EXTRACTORS
from lumina_mgpt.prompts import I2I_TASKS


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="lumina-mgpt generate-with-image", description="Makes a picture of one prompt and a control picture."
    )
    group = parser.add_argument_group("what to make")
    group.add_argument("--task", required=True, choices=tuple(I2I_TASKS), help="as --i2i_task of generate.py")
    group.add_argument("--input_image_path", required=True, help="picture for the upper panel, cut out of its middle")
    group.add_argument("--prompt", help="what the lower panel is to show (predict_...: may be left out)")
    group.add_argument(
        "--extract", action="store_true",
        help=f"the picture is a photo: compute the map from it ({', '.join(EXTRACTORS)})",
    )  # fmt: skip
    tasks.add_panel_prompt(group)
    generate.add_options(parser)
    return parser


def read_request(args: argparse.Namespace) -> tasks.Request:
    prompts = prompt_files.read_prompts(None if args.prompt is None else [args.prompt], None)
    source = ("--input_image_path", args.input_image_path)
    return tasks.panel_request(args.task, prompts, args.n, source, args.panel_prompt, args.extract)


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(lambda args: generate.run(args, read_request), build_parser(), argv)

