"""Generates images from prompts, and from prompts and pictures.

    lumina-mgpt generate --prompt "a hedgehog on a sky blue background" --save_path outputs
    lumina-mgpt generate --task depth --prompt "an owl on a pink background" --save_path pair
    lumina-mgpt generate --task i2i --i2i_task depth --image_path assets/depth.png \\
        --image_prompt "a hedgehog on a sky blue background" --save_path controlled

Files are named {prompt index}_{repeat}.png, both counted from 0. They contain the prompt and the settings as PNG text.
With a given picture, a single image is named {i2i_task}.png. Several images are named
{i2i_task}_{prompt index}_{repeat}.png. The picture is saved as {i2i_task}_ref_center_crop.png.

If an image NAME.png has two panels, its lower panel is also saved alone, as NAME_result.png. With --task multiview,
NAME.png is a contact sheet, and each image is also saved alone, as NAME_view_00.png and so on, or
NAME_view_0.png and so on for at most ten.

Under `accelerate launch` or torchrun, each process generates its share of the images. With --tensor_parallel N, N
processes have the same share, and the first of them writes the files and reports.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from lumina_mgpt import __version__, cli, launcher, prompt_files
from lumina_mgpt.cli import best_of, multiview, rewrite, tasks
from lumina_mgpt.cli.tasks import OutputPlan, preview_file, result_file
from lumina_mgpt.console import stops_delayed
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder

if TYPE_CHECKING:
    from PIL import Image

    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint, PreparedRequest
    from lumina_mgpt.request import GenerationRequest
    from lumina_mgpt.results import Result, RowsDone
    from lumina_mgpt.vqgan.tokenizer import ImageTokenizer


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES,
        prog="lumina-mgpt generate",
        description="Generates images from prompts, and from prompts and pictures.",
    )
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--prompt", "--image_prompt", action="append", help="what the image shows; may be given several times"
    )
    group.add_argument("--prompt_file", help="UTF-8 text file with one prompt per line (default: five example prompts)")
    tasks.add_task_options(parser)
    add_options(parser)
    return parser


def add_options(parser: cli.Parser) -> None:
    """Adds every option that does not select the task."""
    group = parser.add_argument_group("number and size")
    group.add_argument("-n", type=cli.whole, default=1, help="images of each prompt")
    cli.add_batch_size(group)
    add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    best_of.add_best_of(parser)
    rewrite.add_rewrite(parser)
    cli.add_output_options(parser)
    group.add_argument(
        "--preview", action="store_true", help="write each image as {name}.preview.png while its rows are sampled"
    )
    cli.add_checkpoint_options(parser)
    cli.add_tensor_parallel(parser)


def add_size_options(group: argparse._ActionsContainer) -> None:
    """Adds --width, --height and --target_size."""
    group.add_argument(
        "--width",
        type=cli.whole,
        help="width in pixels, a multiple of 32 (default: the checkpoint's base size; Lumina-mGPT: that of the given "
        "picture after its crop; multiview: as trained, else 384)",
    )
    group.add_argument(
        "--height",
        type=cli.whole,
        help="height in pixels of all panels together, a multiple of 32 per panel (default: square panels; for "
        "Lumina-mGPT as the width)",
    )
    cli.add_target_size(group)


def generate(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then loads the weights and generates the images."""
    run(args, tasks.read_plan)


def run(args: argparse.Namespace, read_plan: Callable[[argparse.Namespace], OutputPlan]) -> None:
    """Generates the images of a plan.

    Args:
        args: parsed command line, with the options of `add_options`.
        read_plan: makes the plan from `args`.
    """
    cli.quant_group(args)
    plan, rewriter, best = read_plan(args), rewrite.read_rewriter(args), best_of.read_best_of(args)
    plan = plan.with_candidates(best.count) if best and best.keep else plan
    _check_extras(args, plan)
    follows = launcher.follows(args.tensor_parallel)
    shared = plan.request.share[1] > 1 or args.tensor_parallel > 1
    output = OutputFolder(args.save_path, args.overwrite, shared)
    if not plan.examples:
        output.claim(plan.whole_files(), plan.keep, plan.preview_names())  # before a download

    from lumina_mgpt import autotune  # imports torch, which takes seconds
    from lumina_mgpt.devices import own_device
    from lumina_mgpt.scoring import check_scorer

    device = own_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    plan = plan.of_family(checkpoint.config.family)
    if plan.examples:
        prompts = prompt_files.example_prompts(checkpoint.folder)
        plan = plan.with_prompts(prompts, str(checkpoint.folder / prompt_files.PROMPTS_FILE))
    output.claim(plan.file_names(), plan.keep, plan.preview_names())
    if best:
        check_scorer(best.scorer, plan.request.prompts[0])
    if rewriter:
        plan = plan.rewritten(rewriter)
        best = replace(best, prompts=plan.originals) if best else None
    prepared = checkpoint.prepare(plan.request, plan.prompts_from)
    checkpoint.require_decoder()
    if plan.extract and prepared.picture:
        prepared = replace(prepared, panels=(plan.extract(prepared.picture),))
    if prepared.request.task.views > 1:
        _check_views(args, plan, best)
    if not follows:
        print_hints(prepared, checkpoint)
    with cli.model_processes(args, checkpoint, device) as parallel:
        text = best.text(checkpoint.config.family) if best else None
        pipeline = cli.load_pipeline(args, checkpoint, device, parallel, text)
        if args.fast:
            prepared = prepared.changed(speculation=autotune.fastest(pipeline, prepared))
        if follows:
            for _ in pipeline.stream(prepared):  # only the first process of a model writes and reports
                pass
            return
        described = plan.described() | describe(pipeline, prepared, loading_text(args)) | rewrite.described(args)
        described |= best.described(checkpoint.config.family) if best else {}
        print_plan(pipeline, prepared.request, described)
        if prepared.request.task.views > 1:
            multiview.make(pipeline, prepared, plan, output, described)
            return
        make(pipeline, prepared, plan, output, described, best)


def _check_extras(args: argparse.Namespace, plan: OutputPlan) -> None:
    """Raises InputError if --best_of or --rewrite does not fit the other options."""
    if args.best_of is not None:
        cli.refuse_tensor_parallel(args, "the best of several candidates")
    if args.rewrite is None:
        return
    if plan.request.instruction is not None:
        raise InputError("expands --prompt, and --instruction replaces that; leave one of them out", "rewrite")
    if not plan.examples and not all(plan.request.prompts):
        raise InputError("expands --prompt, which is not given; give one, or leave it out", "rewrite")
    if plan.request.share[1] > 1 or args.tensor_parallel > 1:
        rule = "must be used in one process, as each process would get other words"
        raise InputError(f"{rule}; rewrite the prompts to a file first, for --prompt_file", "rewrite")


def _check_views(args: argparse.Namespace, plan: OutputPlan, best: "best_of.BestOf | None") -> None:
    """Refuses options that have no effect on several images of one answer."""
    cli.refuse_tensor_parallel(args, "images of one answer")
    if best:
        raise InputError("must be left out for several images of one answer; leave it out", "best_of")
    if args.batch_size is not None:
        rule = f"--batch_size {args.batch_size} has no effect with --task {plan.task}"
        raise InputError(f"{rule}, which samples one answer at a time; leave it out")


def print_hints(prepared: "PreparedRequest", checkpoint: "Checkpoint") -> None:
    """Prints a hint for each prompt that contains none of the names that a small checkpoint knows.

    With a given picture, and for views of an object, the function prints no hint.
    """
    unlisted = prepared.picture or prepared.request.task.views > 1
    names = [] if unlisted else prompt_files.known_names(checkpoint.folder)
    for prompt in filter(None, prepared.request.prompts):
        hint = prompt_files.unknown_hint(prompt, names)
        if hint:
            print(f"hint: {hint}", file=sys.stderr)


def make(
    pipeline: "Pipeline",
    prepared: "PreparedRequest",
    plan: OutputPlan,
    output: OutputFolder,
    described: Mapping[str, object],
    best: best_of.BestOf | None = None,
) -> None:
    """Generates the images and saves each when it is finished.

    After an error or a stop, finished images stay, and all previews are removed.

    Args:
        prepared: the request to generate.
        plan: names of the files.
        output: folder to save to.
        described: settings for the text of the saved pictures.
        best: how to choose the best of several candidates; None to draw each image once.
    """
    request, layout = prepared.request, prepared.layout
    rank = request.share[0]
    total, saved, previews = len(request.jobs), 0, set()
    drawn = total * (best.count if best else 1)
    bar = cli.codes_bar(total, drawn * (layout.num_codes - layout.given), shown=rank == 0)
    box_finder = BoxFinder(pipeline.image_tokenizer, prepared.picture) if request.task.box else None

    def on_row(done: "RowsDone") -> None:
        bar.update(len(done.jobs) * layout.cols)
        if plan.preview:
            for job, picture in zip(done.jobs, pipeline.preview(done.codes, layout), strict=True):
                previews.add(name := preview_file(plan.stem(job)))
                output.save(name, picture, again=True)

    try:
        for chosen in best_of.chosen_images(pipeline, prepared, best, on_row):
            result = chosen.result
            if prepared.picture and not saved and rank == 0:
                output.save(plan.panel_file, prepared.picture)
            with stops_delayed():  # else a picture could be saved and not counted
                box = box_finder.found_in(result.image) if box_finder else {}
                path = save_result(result, plan, output, {**described, **chosen.text, **box})
                save_candidates(chosen, plan, output, described)
                saved += 1
            bar.write(f"{path}: {result.job.prompt}" + "".join(f"; {key} {value}" for key, value in box.items()))
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved} of {total} images are in {output.folder}") from None
    finally:
        bar.close()
        for name in previews:
            output.discard(name)


def print_plan(pipeline: "Pipeline", request: "GenerationRequest", described: Mapping[str, object]) -> None:
    """Prints the settings, and which of the images this process makes. Only the first of several processes prints."""
    rank, processes = request.share
    if rank:
        return
    print(", ".join(f"{key} {value}" for key, value in described.items()))
    if processes > 1:
        numbers = f"0, {processes}, {2 * processes} and so on"
        everything = len(request.prompts) * request.n
        maker = "model" if pipeline.parallel else "process"
        print(f"{maker} 0 of {processes} makes {len(request.jobs)} of {everything} images: numbers {numbers}")


class BoxFinder:
    """Finds the box that the model drew into a picture.

    Args:
        images: image tokenizer that decoded the image with the box.
        picture: the given picture. It is encoded and decoded, too, so that only the box differs.
    """

    def __init__(self, images: "ImageTokenizer", picture: "Image.Image | None") -> None:
        self.reference = None if picture is None else images.decode(images.encode([picture]))[0]

    def found_in(self, image: "Image.Image") -> dict[str, str]:
        """Returns what to report of an image: its box as left, top, right and bottom in pixels, or "not found"."""
        from lumina_mgpt.boxes import find_box

        if self.reference is None or image.size != self.reference.size:
            return {"box": "not looked for, because the picture has another size"}
        box = find_box(image, self.reference)
        return {"box": "not found" if box is None else " ".join(map(str, box))}


def save_result(result: "Result", plan: OutputPlan, output: OutputFolder, described: Mapping[str, object]) -> object:
    """Saves an image, and its lowest panel if it has several, and removes its preview. Returns the image's path."""
    job, stem = result.job, plan.stem(result.job)
    text = plan.prompt_text(job) | dict(described)
    if result.panels > 1:
        output.save(result_file(stem), result.panel, text)
    path = output.save(f"{stem}.png", result.image, text)
    if plan.preview:
        output.discard(preview_file(stem))
    return path


def save_candidates(
    chosen: best_of.Chosen, plan: OutputPlan, output: OutputFolder, described: Mapping[str, object]
) -> None:
    """Saves the candidates of an image that are to be kept, beside it."""
    for candidate, text in chosen.candidates:
        name = best_of.candidate_file(plan.stem(chosen.result.job), candidate.job.repeat)
        output.save(name, candidate.image, plan.prompt_text(candidate.job) | dict(described) | text)


def loading_text(args: argparse.Namespace) -> dict[str, str | None]:
    """Returns those options about the checkpoint that become part of a picture's text."""
    return {name: getattr(args, name) for name in ("model_path", "movqgan_path", "attn", "movqgan_dtype")}


def describe(pipeline: "Pipeline", prepared: "PreparedRequest", loading: Mapping[str, str | None]) -> dict[str, object]:
    """Returns the settings that all images of a run share, for the text of the saved pictures.

    Args:
        loading: the result of `loading_text`.
    """
    request = prepared.request
    width, height = prepared.layout.size
    num_codes = pipeline.checkpoint.config.num_image_codes
    sampling = asdict(request.sampling) | {"top_k": min(request.sampling.top_k, num_codes)}
    sampling = {name: value for name, value in sampling.items() if not name.startswith("text_")}  # images have no text
    speculation = pipeline.with_window(request.speculation)
    if speculation is not None:
        sampling |= {"coupling": speculation.coupling, "window": speculation.window}
    return {"width": width, "height": height} | sampling | describe_pipeline(pipeline, loading)


def describe_pipeline(pipeline: "Pipeline", loading: Mapping[str, str | None]) -> dict[str, object]:
    """Returns the settings of a loaded checkpoint, for the text of the saved pictures.

    Args:
        loading: the result of `loading_text`.
    """
    file = pipeline.checkpoint.movqgan_path
    movqgan = loading["movqgan_path"] or (file.name if file else None)
    weights = {"model_path": loading["model_path"], "movqgan_path": movqgan}
    running: dict[str, object] = {"device": pipeline.device, "dtype": str(pipeline.dtype).removeprefix("torch.")}
    running["attn"] = loading["attn"]
    if pipeline.parallel:
        running["tensor_parallel"] = pipeline.parallel.size
    if pipeline.compiled:
        running["compile"] = True
    if loading["movqgan_dtype"] != "fp32":
        running["movqgan_dtype"] = loading["movqgan_dtype"]
    if pipeline.cache_dtype != pipeline.dtype:
        running["cache_dtype"] = str(pipeline.cache_dtype).removeprefix("torch.")
    group = pipeline.model.config.int4_group
    if group is not None:
        running |= {"quant": "int4", "quant_group": group}
    software = {"software": f"lumina_mgpt {__version__}"}
    return weights | running | software


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(generate, build_parser(), argv)
