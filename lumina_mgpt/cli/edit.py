"""Edits a picture over several turns.

    lumina-mgpt edit --image_path assets/subject.png --save_path edited \\
        --instruction "make the background red" --instruction "replace the penguin with a snowman"

Each turn's result is the next turn's picture, by its codes: never decoded and encoded again, which would let it drift.
Turn t writes edit_{t}.png, both panels, and edit_{t}_result.png; edit_strip.png shows all turns side by side, from the
picture given, edit_ref_center_crop.png, on.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.cli.tasks import Request, result_file
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder

_STRIP = "edit_strip.png"


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt edit", description="Edits a picture over several turns.")
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
    settings.with_seeds(len(args.instruction))  # checks the last one
    request = tasks.panel_request("edit", args.instruction, 1, ("--image_path", args.image_path), None)
    output = OutputFolder(args.save_path, args.overwrite)
    output.claim(file_names(request), request.keep)

    from lumina_mgpt.devices import resolve_device  # torch takes seconds to import: only now
    from lumina_mgpt.pipeline import Checkpoint

    device = resolve_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    layout = checkpoint.layout(args.width, args.height, request.task)
    start, *_ = checkpoint.prompt_ids(request.prompts, layout, request.task, option="--instruction")
    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast:
        speculation = pipeline.fastest(start, layout, settings, batches=len(request.prompts))
    make(pipeline, request, layout, settings, speculation, output, args)


def make(
    pipeline, request: Request, layout, settings, speculation, output: OutputFolder, args: argparse.Namespace
) -> None:
    """Edits turn by turn and saves each as soon as it is done; turn t has the seed t - 1 above --seed."""
    from lumina_mgpt.images import side_by_side

    described = request.described() | generate.describe(pipeline, layout, settings, speculation, args)
    panel = picture = request.panel(layout)
    strip, turns = [picture], len(request.prompts)
    seeds = settings.with_seeds(turns)
    total = turns * (layout.num_codes - layout.given)
    try:
        with tqdm(total=total, unit=" codes", dynamic_ncols=True, mininterval=cli.bar_interval()) as bar:
            for turn, (instruction, own) in enumerate(zip(request.prompts, seeds, strict=True), start=1):
                (result,) = pipeline.generate(
                    instruction, args.width, args.height, task=request.task, panel=panel, speculation=speculation,
                    on_row=lambda _: bar.update(layout.cols), **asdict(own),
                )  # fmt: skip
                if turn == 1:
                    output.save(request.panel_file, picture)
                panel = result.panel_codes
                strip.append(result.panel)
                text = described | {"instruction": instruction, "turn": turn, "seed": own.seed}
                output.save(result_file(f"edit_{turn}"), result.panel, text)
                path = output.save(f"edit_{turn}.png", result.image, text)
                output.save(_STRIP, side_by_side(strip), again=turn > 1)
                bar.write(f"{path}: {instruction}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(strip) - 1} of {turns} turns are in {output.folder}") from None


def file_names(request: Request) -> list[str]:
    """All that a run will write."""
    stems = [f"edit_{turn}" for turn in range(1, len(request.prompts) + 1)]
    return [request.panel_file, _STRIP, *(f"{stem}.png" for stem in stems), *map(result_file, stems)]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(edit, build_parser(), argv)

