"""Makes pictures from prompts.

    python generate_examples/generate.py --prompt "a hedgehog on a sky blue background" --save_path outputs

Pictures are named {prompt index}_{repeat}.png, counted from 0, and carry their prompt and settings as PNG text.
Started by `accelerate launch` or torchrun, each process makes its share of them.
"""

import argparse
import sys
from dataclasses import asdict

from tqdm import tqdm

from lumina_mgpt import __version__, cli
from lumina_mgpt.outputs import OutputFolder


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="generate.py", description="Makes pictures from prompts.")
    group = parser.add_argument_group("what to make")
    group.add_argument("--prompt", action="append", help="what to show; may be given several times")
    group.add_argument("--prompt_file", help="UTF-8 text file with one prompt a line (default: five built-in prompts)")
    group.add_argument("-n", type=cli.whole, default=1, help="images of each prompt")
    for side in ("--width", "--height"):
        group.add_argument(side, type=cli.whole, help="pixels, a multiple of 32 (default: the checkpoint's base size)")
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    group.add_argument(
        "--preview", action="store_true",
        help="write each picture row by row while it grows, as {prompt index}_{repeat}.preview.png",
    )  # fmt: skip
    cli.add_checkpoint_options(parser)
    return parser


def generate(args: argparse.Namespace) -> None:
    """Checks everything that can be checked without weights, then loads and makes the pictures."""
    settings, speculation = cli.sampling_settings(args), cli.speculation_settings(args)
    cli.quant_group(args)
    prompts = cli.read_prompts(args.prompt, args.prompt_file)
    share = cli.process_share()
    output = OutputFolder(args.save_path, args.overwrite, shared=share[1] > 1)
    if prompts:
        output.claim(file_names(len(prompts), args, share))

    from lumina_mgpt.devices import own_device  # torch takes seconds to import: only now
    from lumina_mgpt.pipeline import Checkpoint, Pipeline

    device = own_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    if not prompts:
        prompts = cli.example_prompts(checkpoint.folder)
        output.claim(file_names(len(prompts), args, share))
    layout = checkpoint.layout(args.width, args.height)
    checkpoint.prompt_ids(prompts, layout)
    names = cli.known_names(checkpoint.folder)
    for hint in filter(None, (cli.unknown_hint(prompt, names) for prompt in prompts)):
        print(f"hint: {hint}", file=sys.stderr)

    loading = cli.loading_settings(args, checkpoint.config.int4_group)
    pipeline = Pipeline.from_pretrained(checkpoint, device, **loading)
    make(pipeline, prompts, layout, settings, speculation, output, args, share)


def make(
    pipeline, prompts: list[str], layout, settings, speculation, output: OutputFolder, args: argparse.Namespace,
    share: tuple[int, int],
) -> None:
    """Generates and saves; whatever ends it, finished pictures stay and unfinished ones leave nothing behind."""
    described = describe(pipeline, layout, settings, speculation, args)
    if share[0] == 0:
        print(", ".join(f"{key} {value}" for key, value in described.items()))
    total, saved, previews = len(range(share[0], len(prompts) * args.n, share[1])), 0, set()
    bar = tqdm(
        total=total * layout.num_codes, unit=" codes", desc=f"{total} image{'s' * (total > 1)}", dynamic_ncols=True,
        bar_format="{l_bar}{bar}| {n_fmt}/{total_fmt} codes, {rate_noinv_fmt}, {elapsed} gone, {remaining} left",
        disable=share[0] > 0,  # the first process's share stands for all
        mininterval=0.1 if sys.stderr.isatty() else 10,  # a log file wants a line now and then only
    )  # fmt: skip

    def on_row(done) -> None:
        bar.update(len(done.jobs) * layout.cols)
        if args.preview:
            for job, picture in zip(done.jobs, pipeline.preview(done.codes, layout), strict=True):
                previews.add(name := preview_name(job.prompt_index, job.repeat))
                output.save(name, picture, again=True)

    try:
        results = pipeline.stream(
            prompts, args.width, args.height, args.n, batch_size=args.batch_size, on_row=on_row,
            speculation=speculation, share=share, **asdict(settings),
        )  # fmt: skip
        for result in results:
            job = result.job
            text = {"prompt": job.prompt, "repeat": job.repeat} | described
            path = output.save(file_name(job.prompt_index, job.repeat), result.image, text)
            saved += 1
            output.discard(preview_name(job.prompt_index, job.repeat))
            bar.write(f"{path}: {job.prompt}")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{saved} of {total} images are in {output.folder}") from None
    finally:
        bar.close()
        for name in previews:
            output.discard(name)


def describe(pipeline, layout, settings, speculation, args: argparse.Namespace) -> dict[str, object]:
    """Everything that decides how a picture comes out, besides its prompt and repeat."""
    from lumina_mgpt.pipeline import pixel_size

    width, height = pixel_size(layout)
    sampling = asdict(settings) | {"top_k": min(settings.top_k, pipeline.checkpoint.config.num_image_codes)}
    if speculation is not None:
        sampling |= {"coupling": speculation.coupling, "window": speculation.window}
    movqgan = args.movqgan_path or pipeline.checkpoint.movqgan_path.name
    weights = {"model_path": args.model_path, "movqgan_path": movqgan}
    running = {"device": pipeline.device, "dtype": str(pipeline.dtype).removeprefix("torch."), "attn": args.attn}
    if args.movqgan_dtype != "fp32":
        running["movqgan_dtype"] = args.movqgan_dtype
    if pipeline.cache_dtype != pipeline.dtype:
        running["cache_dtype"] = str(pipeline.cache_dtype).removeprefix("torch.")
    group = pipeline.model.config.int4_group
    if group is not None:
        running |= {"quant": "int4", "quant_group": group}
    software = {"software": f"lumina_mgpt {__version__}"}
    return {"width": width, "height": height} | sampling | weights | running | software


def file_name(prompt_index: int, repeat: int) -> str:
    return f"{prompt_index}_{repeat}.png"


def preview_name(prompt_index: int, repeat: int) -> str:
    return f"{prompt_index}_{repeat}.preview.png"


def file_names(prompts: int, args: argparse.Namespace, share: tuple[int, int]) -> list[str]:
    """All that this process will write."""
    kinds = (file_name, preview_name) if args.preview else (file_name,)
    images = [(index, repeat) for index in range(prompts) for repeat in range(args.n)]
    return [kind(*image) for image in images[share[0] :: share[1]] for kind in kinds]


def main(argv: list[str] | None = None) -> int:
    return cli.run(generate, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
