"""Edits a picture over several turns.

    python generate_examples/edit.py --image_path assets/subject.png --save_path edited \\
        --instruction "make the background red" --instruction "replace the penguin with a snowman"

Each turn's result is the next turn's picture, by its codes: never decoded and encoded again, which would let it drift.
Turn t writes edit_{t}.png, both panels, and edit_{t}_result.png; edit_strip.png shows all turns side by side, from the
picture given, edit_ref_center_crop.png, on.
"""

import argparse
import sys
from dataclasses import asdict, replace
from pathlib import Path

import generate  # the script beside this one
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.prompts import I2I_TASKS
from lumina_mgpt.tasks import result_file

_TASK = I2I_TASKS["edit"]
_GIVEN, _STRIP = "edit_ref_center_crop.png", "edit_strip.png"


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="edit.py", description="Edits a picture over several turns.")
    group = parser.add_argument_group("what to make")
    group.add_argument("--image_path", required=True, help="picture to edit, cut out of its middle")
    group.add_argument("--instruction", action="append", required=True, help="what to change; one a turn")
    generate.add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def edit(args: argparse.Namespace) -> None:
    """Checks everything that can be checked without weights, then loads and edits."""
    settings, speculation = cli.sampling_settings(args), cli.speculation_settings(args)
    cli.quant_group(args)
    if not all(text.strip() for text in args.instruction):
        raise InputError("--instruction must not be empty, got ''; say what to change")
    output = OutputFolder(args.save_path, args.overwrite)

    from lumina_mgpt.devices import resolve_device  # torch takes seconds to import: only now
    from lumina_mgpt.images import crop_panel, open_panel
    from lumina_mgpt.pipeline import Checkpoint, given_size

    picture = open_panel("--image_path", args.image_path)
    output.claim(file_names(len(args.instruction)), [Path(args.image_path)])
    device = resolve_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    layout = checkpoint.layout(args.width, args.height, _TASK)
    checkpoint.prompt_ids(args.instruction, layout, _TASK, option="--instruction")
    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast:
        (start,) = checkpoint.prompt_ids(args.instruction[:1], layout, _TASK)
        speculation = pipeline.fastest(start, layout, settings)
    make(pipeline, crop_panel(picture, given_size(layout)), layout, settings, speculation, output, args)


def make(pipeline, picture, layout, settings, speculation, output: OutputFolder, args: argparse.Namespace) -> None:
    """Edits turn by turn and saves each as soon as it is done; turn t has the seed t - 1 above --seed."""
    from lumina_mgpt.images import side_by_side

    described = {"image_path": args.image_path} | generate.describe(pipeline, layout, settings, speculation, args)
    output.save(_GIVEN, picture)
    panel, strip = picture, [picture]
    turns = len(args.instruction)
    try:
        with tqdm(total=turns * (layout.num_codes - layout.given), unit=" codes", dynamic_ncols=True) as bar:
            for turn, instruction in enumerate(args.instruction, start=1):
                own = replace(settings, seed=settings.seed + turn - 1)
                (result,) = pipeline.generate(
                    instruction, args.width, args.height, task=_TASK, panel=panel, speculation=speculation,
                    on_row=lambda _: bar.update(layout.cols), **asdict(own),
                )  # fmt: skip
                panel = result.panel_codes
                strip.append(result.panel)
                text = described | {"instruction": instruction, "turn": turn, "seed": own.seed}
                output.save(result_file(f"edit_{turn}"), result.panel, text)
                path = output.save(f"edit_{turn}.png", result.image, text)
                output.save(_STRIP, side_by_side(strip), again=turn > 1)
                bar.write(f"{path}: {instruction}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(strip) - 1} of {turns} turns are in {output.folder}") from None


def file_names(turns: int) -> list[str]:
    """All that a run will write."""
    stems = [f"edit_{turn}" for turn in range(1, turns + 1)]
    return [_GIVEN, _STRIP, *(f"{stem}.png" for stem in stems), *map(result_file, stems)]


def main(argv: list[str] | None = None) -> int:
    return cli.run(edit, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
