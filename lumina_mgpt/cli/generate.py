"""Makes pictures from prompts, and of pictures.

    python generate_examples/generate.py --prompt "a hedgehog on a sky blue background" --save_path outputs
    python generate_examples/generate.py --task depth --prompt "an owl on a pink background" --save_path pair
    python generate_examples/generate.py --task i2i --i2i_task depth --image_path assets/depth.png \\
        --image_prompt "a hedgehog on a sky blue background" --save_path controlled

Pictures are named {prompt index}_{repeat}.png, counted from 0, and carry their prompt and settings as PNG text. What is
made of a given panel is named by its task, {i2i_task}.png, and lies beside that panel,
{i2i_task}_ref_center_crop.png. The lower panel of a dual-panel picture is written alone too, as {its name}_result.png.
Started by `accelerate launch` or torchrun, each process makes its share of them.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from tqdm import tqdm

from lumina_mgpt import __version__, cli, prompt_files
from lumina_mgpt.cli import tasks
from lumina_mgpt.cli.tasks import Request, result_file
from lumina_mgpt.launcher import process_share
from lumina_mgpt.outputs import OutputFolder


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt generate", description="Makes pictures from prompts, and of pictures.")
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", "--image_prompt", action="append", help="what to show; may be given several times")
    group.add_argument("--prompt_file", help="UTF-8 text file with one prompt a line (default: five built-in prompts)")
    tasks.add_task_options(parser)
    add_options(parser)
    return parser


def add_options(parser: cli.Parser) -> None:
    """Every option that does not say what to make."""
    group = parser.add_argument_group("how many, how large")
    group.add_argument("-n", type=cli.whole, default=1, help="images of each prompt")
    cli.add_batch_size(group)
    add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    group.add_argument(
        "--preview", action="store_true",
        help="write each picture row by row while it grows, as {its name}.preview.png",
    )  # fmt: skip
    cli.add_checkpoint_options(parser)


def add_size_options(group) -> None:
    for side in ("--width", "--height"):
        group.add_argument(
            side, type=cli.whole,
            help="pixels of all panels, a multiple of 32, the height of 32 a panel (default: panels of the base size)",
        )  # fmt: skip


def generate(args: argparse.Namespace) -> None:
    """Checks everything that can be checked without weights, then loads and makes the pictures."""
    run(args, tasks.read_request)


def run(args: argparse.Namespace, read_request: Callable[[argparse.Namespace], Request]) -> None:
    """`generate`, for any command that has its options and turns them into a request."""
    settings, speculation = cli.sampling_settings(args), cli.speculation_settings(args)
    cli.quant_group(args)
    share, request = process_share(), read_request(args)
    output = OutputFolder(args.save_path, args.overwrite, shared=share[1] > 1)
    if request.prompts:
        output.claim(file_names(request, share), request.keep, preview_files(request, args, share))

    from lumina_mgpt.devices import own_device  # torch takes seconds to import: only now
    from lumina_mgpt.pipeline import Checkpoint

    device = own_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    if not request.prompts:
        own = checkpoint.folder / prompt_files.PROMPTS_FILE
        request = replace(request, prompts=prompt_files.example_prompts(checkpoint.folder), option=str(own))
        output.claim(file_names(request, share), temporary=preview_files(request, args, share))
    layout = checkpoint.layout(args.width, args.height, request.task)
    checkpoint.prompt_ids(request.prompts, layout, request.task, request.shown, request.option)
    panel = request.panel(layout)
    # Where there is a panel, the prompt need not name what it shows.
    names = prompt_files.known_names(checkpoint.folder) if panel is None else []
    for hint in filter(None, (prompt_files.unknown_hint(prompt, names) for prompt in filter(None, request.prompts))):
        print(f"hint: {hint}", file=sys.stderr)

    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast:
        (start,) = checkpoint.prompt_ids(request.prompts[:1], layout, request.task, request.shown)
        batch = args.batch_size or pipeline.batch_size(len(start), layout, settings)
        total = images_of(request, share)
        speculation = pipeline.fastest(start, layout, settings, min(batch, max(1, total)), -(-total // batch))
    make(pipeline, request, panel, layout, settings, speculation, output, args, share)


def images_of(request: Request, share: tuple[int, int]) -> int:
    """How many images of a request are this process's."""
    return len(range(share[0], len(request.prompts) * request.n, share[1]))


def make(
    pipeline, request: Request, panel, layout, settings, speculation, output: OutputFolder, args: argparse.Namespace,
    share: tuple[int, int],
) -> None:
    """Generates and saves; whatever ends it, finished pictures stay and unfinished ones leave nothing behind."""
    described = request.described() | describe(pipeline, layout, settings, speculation, args)
    if share[0] == 0:
        print(", ".join(f"{key} {value}" for key, value in described.items()))
    total, saved, previews = images_of(request, share), 0, set()
    if share[0] == 0 and share[1] > 1:
        print(f"process 0 of {share[1]} makes {total} of {len(request.prompts) * request.n} images: numbers 0, "
              f"{share[1]}, {2 * share[1]} and so on; the other processes make the others")  # fmt: skip
    codes = total * (layout.num_codes - layout.given)
    bar = tqdm(
        total=codes, unit=" codes", desc=f"{total} image{'s' * (total > 1)}", dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} codes, {rate_noinv_fmt}, {elapsed} gone, {remaining} left",
        disable=share[0] > 0,  # the first process's share stands for all
        mininterval=cli.bar_interval(),
    )  # fmt: skip

    def on_row(done) -> None:
        bar.update(len(done.jobs) * layout.cols)
        if args.preview:
            for job, picture in zip(done.jobs, pipeline.preview(done.codes, layout), strict=True):
                previews.add(name := preview_file(request.stem(job.prompt_index, job.repeat)))
                output.save(name, picture, again=True)

    try:
        results = pipeline.stream(
            request.prompts, args.width, args.height, request.n, batch_size=args.batch_size, on_row=on_row,
            speculation=speculation, task=request.task, panel=panel, shown=request.shown, share=share,
            **asdict(settings),
        )  # fmt: skip
        for result in results:
            job = result.job
            text = {"prompt": job.prompt, "repeat": job.repeat} | described
            stem = request.stem(job.prompt_index, job.repeat)
            if panel is not None and not saved and share[0] == 0:
                output.save(request.panel_file, panel)
            if result.panels > 1:
                output.save(result_file(stem), result.panel, text)
            path = output.save(f"{stem}.png", result.image, text)
            saved += 1
            if args.preview:
                output.discard(preview_file(stem))
            bar.write(f"{path}: {job.prompt}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved} of {total} images are in {output.folder}") from None
    finally:
        bar.close()
        for name in previews:
            output.discard(name)


def describe(pipeline, layout, settings, speculation, args: argparse.Namespace) -> dict[str, object]:
    """Everything that decides how a picture comes out, besides its prompt and repeat."""
    from lumina_mgpt.panels import pixel_size

    width, height = pixel_size(layout)
    sampling = asdict(settings) | {"top_k": min(settings.top_k, pipeline.checkpoint.config.num_image_codes)}
    if speculation is not None:
        sampling |= {"coupling": speculation.coupling, "window": pipeline.with_window(speculation).window}
    movqgan = args.movqgan_path or pipeline.checkpoint.movqgan_path.name
    weights = {"model_path": args.model_path, "movqgan_path": movqgan}
    running = {"device": pipeline.device, "dtype": str(pipeline.dtype).removeprefix("torch."), "attn": args.attn}
    if pipeline.compiled:
        running["compile"] = True
    if args.movqgan_dtype != "fp32":
        running["movqgan_dtype"] = args.movqgan_dtype
    if pipeline.cache_dtype != pipeline.dtype:
        running["cache_dtype"] = str(pipeline.cache_dtype).removeprefix("torch.")
    group = pipeline.model.config.int4_group
    if group is not None:
        running |= {"quant": "int4", "quant_group": group}
    software = {"software": f"lumina_mgpt {__version__}"}
    return {"width": width, "height": height} | sampling | weights | running | software


def preview_file(stem: str) -> str:
    return f"{stem}.preview.png"


def file_names(request: Request, share: tuple[int, int]) -> list[str]:
    """All results of this process."""
    kinds = ["{}.png".format] + [result_file] * (request.task.panels > 1)
    panel = [] if request.picture is None or share[0] else [request.panel_file]
    return [kind(stem) for stem in stems(request, share) for kind in kinds] + panel


def preview_files(request: Request, args: argparse.Namespace, share: tuple[int, int]) -> list[str]:
    """All previews of this process, which it removes again."""
    return [preview_file(stem) for stem in stems(request, share)] if args.preview else []


def stems(request: Request, share: tuple[int, int]) -> list[str]:
    """Names without suffix of this process's images."""
    jobs = [(index, repeat) for index in range(len(request.prompts)) for repeat in range(request.n)]
    return [request.stem(*job) for job in jobs[share[0] :: share[1]]]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(generate, build_parser(), argv)

