"""Edits a picture in several turns.

    lumina-mgpt edit --image_path assets/subject.png --save_path edited \\
        --instruction "make the background red" --instruction "replace the penguin with a snowman"

Each turn edits the codes of the previous result, so that no error of decoding and encoding accumulates. Turn t, counted
from 1, writes edit_{t}.png. The cropped picture is saved as edit_ref_center_crop.png. edit_strip.png shows the cropped
picture and all results side by side.

With Lumina-mGPT 2.0, edit_{t}.png has two panels, and edit_{t}_result.png is the result alone. With Lumina-mGPT, the
turns are those of one conversation, and the model sees all earlier pictures and instructions.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from tqdm import tqdm

from lumina_mgpt import cli, launcher
from lumina_mgpt.cli import generate, tasks
from lumina_mgpt.cli.tasks import OutputPlan, result_file
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint, PreparedRequest
    from lumina_mgpt.results import RowsDone

_STRIP = "edit_strip.png"


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES | {"prompts": "--instruction"},
        prog="lumina-mgpt edit",
        description="Edits a picture in several turns.",
    )
    group = parser.add_argument_group("picture and instructions")
    group.add_argument("--image_path", required=True, help="picture to edit; its center is cropped")
    group.add_argument("--instruction", action="append", required=True, help="what to change; one for each turn")
    generate.add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    cli.add_tensor_parallel(parser)
    return parser


def edit(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then loads the weights and edits the picture."""
    plan = read_plan(args)
    cli.quant_group(args)
    follows = launcher.follows(args.tensor_parallel)
    output = OutputFolder(args.save_path, args.overwrite, shared=args.tensor_parallel > 1)
    output.claim(whole_files(plan), plan.keep)  # before a download

    from lumina_mgpt import autotune  # imports torch, which takes seconds
    from lumina_mgpt.devices import own_device

    device = own_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    plan = plan.of_family(checkpoint.config.family)
    output.claim(file_names(plan), plan.keep)
    prepared = checkpoint.prepare(plan.request, plan.prompts_from)
    checkpoint.require_decoder()
    if prepared.pictures:
        cli.refuse_tensor_parallel(args, "turns of a conversation")
        require_context(checkpoint, prepared)
    with cli.model_processes(args, checkpoint, device) as parallel:
        pipeline = cli.load_pipeline(args, checkpoint, device, parallel)
        if args.fast:
            prepared = prepared.changed(speculation=autotune.fastest(pipeline, prepared))
        described = plan.described() | generate.describe(pipeline, prepared, generate.loading_text(args))
        make(pipeline, prepared, plan, None if follows else output, described)


def read_plan(args: argparse.Namespace) -> OutputPlan:
    """Opens the picture and returns the plan of this command. The plan has one prompt per turn."""
    sampling = cli.sampling_settings(args)
    processes = launcher.image_share(args.tensor_parallel)[1] * args.tensor_parallel
    if args.tensor_parallel > 1 and processes > args.tensor_parallel:
        rule = f"must be {processes}, the number of processes, since one model edits the picture"
        raise InputError(f"{rule}, got {args.tensor_parallel}; start fewer processes", "tensor_parallel")
    if not all(text.strip() for text in args.instruction):
        raise InputError("must not be empty, got ''; say what to change", "instruction")
    sampling.with_seeds(len(args.instruction))  # raises for the last one
    settings = {
        "sampling": sampling,
        "unset": cli.unset_sampling(args),
        "guide_again": args.cfg is not None,
        "speculation": cli.speculation_settings(args),
        "width": args.width,
        "height": args.height,
        "batch_size": 1,
    }
    source = ("image_path", args.image_path)
    return tasks.picture_plan("edit", args.instruction, source, None, settings)


def require_context(checkpoint: "Checkpoint", prepared: "PreparedRequest") -> None:
    """Raises InputError if the turns of one conversation exceed the model's context, before any is sampled."""
    from lumina_mgpt.unirep import ImageLayout

    turns, limit = len(prepared.starts), checkpoint.config.context
    picture = prepared.picture
    assert picture is not None
    given = ImageLayout.from_pixels(checkpoint.vocabulary, *picture.size).length
    total = sum(map(len, prepared.starts)) - (turns - 1) * given + turns * (prepared.layout.length + 1)
    if total > limit:
        rule = f"{turns} turns at {prepared.layout.length} ids an image take {total} ids, but this model sees {limit}"
        raise InputError(f"{rule}; give fewer, or make the image smaller", "prompts")


def make(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    plan: OutputPlan,
    output: OutputFolder | None,
    described: Mapping[str, object],
) -> None:
    """Edits turn by turn, and saves each result when its turn is done.

    Turn t, counted from 1, samples with the seed of the request plus t - 1.

    Args:
        prepared: the request, with one prompt per turn and the given picture.
        plan: names of the files.
        output: folder to save to; None to neither save nor report, as another process of the model does.
        described: settings for the text of the saved pictures.
    """
    from lumina_mgpt.editing import turns_of
    from lumina_mgpt.images import side_by_side

    layout, instructions = prepared.layout, prepared.request.prompts
    picture, turns = prepared.picture, len(instructions)
    assert picture is not None
    strip = [picture]
    total = turns * (layout.num_codes - layout.given)
    try:
        interval, silent = cli.bar_interval(), output is None
        with tqdm(total=total, unit=" codes", dynamic_ncols=True, mininterval=interval, disable=silent) as bar:

            def on_row(done: "RowsDone") -> None:
                bar.update(done.layout.cols)

            for number, edited in enumerate(turns_of(pipeline, prepared, on_row), start=1):
                if output is None:
                    continue
                instruction = instructions[number - 1]
                if number == 1:
                    output.save(plan.panel_file, picture)
                strip.append(edited.result)
                text = dict(described) | {"instruction": instruction, "turn": number, "seed": edited.seed}
                if layout.panels > 1:
                    output.save(result_file(f"edit_{number}"), edited.result, text)
                path = output.save(f"edit_{number}.png", edited.image, text)
                output.save(_STRIP, side_by_side(of_height(strip, picture.height)), again=number > 1)
                bar.write(f"{path}: {instruction}")
    except KeyboardInterrupt:
        saved = f"{len(strip) - 1} of {turns} turns are in {output.folder}" if output else ""
        raise KeyboardInterrupt(saved) from None


def of_height(images: "Sequence[Image.Image]", height: int) -> "list[Image.Image]":
    """Returns the images scaled to one height in pixels. Those of this height are not changed."""
    sizes = [(max(1, round(image.width * height / image.height)), height) for image in images]
    return [image if image.size == size else image.resize(size) for image, size in zip(images, sizes, strict=True)]


def whole_files(plan: OutputPlan) -> list[str]:
    """Returns those names of files of a run that do not depend on the family."""
    return [plan.panel_file, _STRIP, *(f"edit_{turn}.png" for turn in range(1, len(plan.request.prompts) + 1))]


def file_names(plan: OutputPlan) -> list[str]:
    """Returns the names of all files that a run of the plan writes."""
    stems = [f"edit_{turn}" for turn in range(1, len(plan.request.prompts) + 1)]
    return whole_files(plan) + (list(map(result_file, stems)) if plan.request.task.panels > 1 else [])


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(edit, build_parser(), argv)
