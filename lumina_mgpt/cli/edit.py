"""Edits a picture in several turns.

    lumina-mgpt edit --image_path assets/subject.png --save_path edited \\
        --instruction "make the background red" --instruction "replace the penguin with a snowman"

Each turn edits the codes of the previous result, so that no error of decoding and encoding accumulates. Turn t, counted
from 1, writes edit_{t}.png with both panels, and edit_{t}_result.png with the result alone. The cropped picture is
saved as edit_ref_center_crop.png. edit_strip.png shows the cropped picture and all results side by side.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.cli.tasks import OutputPlan, result_file
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder

if TYPE_CHECKING:
    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import PreparedRequest

_STRIP = "edit_strip.png"


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES | {"prompts": "--instruction"},
        prog="lumina-mgpt edit",
        description="Edits a picture in several turns.",
    )
    group = parser.add_argument_group("picture and instructions")
    group.add_argument("--image_path", required=True, help="picture to edit; its center is cropped to the panel's size")
    group.add_argument("--instruction", action="append", required=True, help="what to change; one for each turn")
    generate.add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def edit(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then loads the weights and edits the picture."""
    plan = read_plan(args)
    cli.quant_group(args)
    output = OutputFolder(args.save_path, args.overwrite)
    output.claim(file_names(plan), plan.keep)

    from lumina_mgpt import autotune  # imports torch, which takes seconds
    from lumina_mgpt.devices import resolve_device
    from lumina_mgpt.preparation import Checkpoint

    device = resolve_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    prepared = checkpoint.prepare(plan.request, plan.prompts_from)
    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast:
        prepared = prepared.changed(speculation=autotune.fastest(pipeline, prepared))
    described = plan.described() | generate.describe(pipeline, prepared, generate.loading_text(args))
    make(pipeline, prepared, plan, output, described)


def read_plan(args: argparse.Namespace) -> OutputPlan:
    """Opens the picture and returns the plan of this command. The plan has one prompt per turn."""
    sampling = cli.sampling_settings(args)
    if not all(text.strip() for text in args.instruction):
        raise InputError("must not be empty, got ''; say what to change", "instruction")
    sampling.with_seeds(len(args.instruction))  # raises for the last one
    settings = {
        "sampling": sampling,
        "speculation": cli.speculation_settings(args),
        "width": args.width,
        "height": args.height,
        "batch_size": 1,
    }
    source = ("image_path", args.image_path)
    return tasks.picture_plan("edit", args.instruction, source, None, settings)


def make(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    plan: OutputPlan,
    output: OutputFolder,
    described: Mapping[str, object],
) -> None:
    """Edits turn by turn, and saves each result when its turn is done.

    Turn t, counted from 1, samples with the seed of the request plus t - 1.

    Args:
        prepared: the request, with one prompt per turn and the given panel.
        plan: names of the files.
        output: folder to save to.
        described: settings for the text of the saved pictures.
    """
    from lumina_mgpt.images import side_by_side

    layout, turns = prepared.layout, len(prepared.request.prompts)
    panel, picture = prepared.panels[0], prepared.picture
    assert picture is not None
    strip = [picture]
    total = turns * (layout.num_codes - layout.given)
    try:
        with tqdm(total=total, unit=" codes", dynamic_ncols=True, mininterval=cli.bar_interval()) as bar:

            def on_row(_: object) -> None:
                bar.update(layout.cols)

            for turn, sampling in enumerate(prepared.request.sampling.with_seeds(turns), start=1):
                request = prepared.single(turn - 1, panel, sampling=sampling)
                (result,) = pipeline.stream(request, on_row)
                if turn == 1:
                    output.save(plan.panel_file, picture)
                panel = result.panel_codes
                strip.append(result.panel)
                instruction = result.job.prompt
                text = dict(described) | {"instruction": instruction, "turn": turn, "seed": sampling.seed}
                output.save(result_file(f"edit_{turn}"), result.panel, text)
                path = output.save(f"edit_{turn}.png", result.image, text)
                output.save(_STRIP, side_by_side(strip), again=turn > 1)
                bar.write(f"{path}: {instruction}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{len(strip) - 1} of {turns} turns are in {output.folder}") from None


def file_names(plan: OutputPlan) -> list[str]:
    """Returns the names of all files that a run of the plan writes."""
    stems = [f"edit_{turn}" for turn in range(1, len(plan.request.prompts) + 1)]
    return [plan.panel_file, _STRIP, *(f"{stem}.png" for stem in stems), *map(result_file, stems)]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(edit, build_parser(), argv)
