"""Shows what the image tokenizer keeps of pictures: image, codes, image again.

    lumina-mgpt reconstruct assets/subject.png assets/depth.png --save_path reconstructed

Of each picture: {its name}_reconstruction.png; {its name}_codes.png, its codes as 16-bit grey, one pixel a code; and a
line with their PSNR. --through_model adds {its name}_no_edit.png: the model edits the picture with the instruction "no
edit", which shows what it, too, keeps (Lumina-mGPT, arXiv 2408.02657).
"""

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.prompts import I2I_TASKS

_TASK, _INSTRUCTION = I2I_TASKS["edit"], "no edit"
_OF_MODEL = ("cfg", "top_k", "temperature", "seed", "speculative_jacobi", "fast", "dtype", "attn", "quant",
             "cache_dtype", "compile")  # fmt: skip


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="lumina-mgpt reconstruct", description="Shows what the image tokenizer keeps of pictures.")
    parser.add_argument("images", nargs="+", help="pictures")
    parser.add_argument(
        "--target_size", type=cli.whole, metavar="SIZE",
        help="area SIZE x SIZE at the nearest aspect ratio (default: the checkpoint's base size)",
    )  # fmt: skip
    parser.add_argument("--keep_size", action="store_true", help="leave pictures whose sides are multiples of 32 uncut")
    parser.add_argument("--through_model", action="store_true", help="let the model copy each picture, too")
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def reconstruct(args: argparse.Namespace) -> None:
    """Checks, crops, then encodes and decodes one picture after another."""
    settings, speculation = cli.sampling_settings(args), cli.speculation_settings(args)
    cli.quant_group(args)
    check_options(args)
    stems = [Path(path).stem for path in args.images]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(f"pictures must have different names, got {twice[0]} several times; take one after the other")
    output = OutputFolder(args.save_path, args.overwrite)

    from lumina_mgpt.devices import DTYPES, resolve_device  # torch takes seconds to import: only now
    from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_panel
    from lumina_mgpt.movqgan.tokenizer import ImageTokenizer
    from lumina_mgpt.pipeline import Checkpoint
    from lumina_mgpt.unirep import GRID_UNIT

    device = resolve_device(args.device)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    target = checkpoint.config.base_size if args.target_size is None else args.target_size
    sizes, crops = candidate_sizes(target), []
    for path in args.images:
        picture = open_panel("image", path)
        keep = args.keep_size and not (picture.width % GRID_UNIT or picture.height % GRID_UNIT)
        crops.append(picture if keep else center_crop(picture, best_size(picture.size, sizes)))
        if args.through_model:
            check_length(checkpoint, crops[-1].size, path)
    output.claim(file_names(stems, args.through_model), [Path(path) for path in args.images])
    if args.through_model:
        pipeline = cli.load_pipeline(args, checkpoint, device)
        if args.fast:
            layout = checkpoint.layout(crops[0].width, _TASK.panels * crops[0].height, _TASK)
            (start,) = checkpoint.prompt_ids([_INSTRUCTION], layout, _TASK)
            speculation = pipeline.fastest(start, layout, settings)
        images, copy = pipeline.image_tokenizer, partial(through_model, pipeline, settings, speculation)
    else:
        images, copy = ImageTokenizer.from_checkpoint(checkpoint.movqgan_path, device, DTYPES[args.movqgan_dtype]), None
    show(dict(zip(stems, crops, strict=True)), images, copy, output)


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for an option that would be passed over."""
    for name in () if args.through_model else _OF_MODEL:
        if getattr(args, name) != build_parser().get_default(name):
            raise InputError(f"--{name} is for the model and means nothing without --through_model; add that, or leave "
                             "it out")  # fmt: skip


def check_length(checkpoint, size: tuple[int, int], path: str) -> None:
    """Raises InputError where the model does not see two panels of that size."""
    try:
        layout = checkpoint.layout(size[0], _TASK.panels * size[1], _TASK)
        checkpoint.prompt_ids([_INSTRUCTION], layout, _TASK)
    except InputError as error:
        raise InputError(f"--through_model, {path}: {error} (--target_size)") from None


def through_model(pipeline, settings, speculation, codes):
    """The model's copy of a picture given by its codes (rows, cols), and what decides how it comes out."""
    rows, cols = codes.shape
    cell = pipeline.image_tokenizer.cell
    (result,) = pipeline.generate(
        _INSTRUCTION, cell * cols, _TASK.panels * cell * rows, task=_TASK, panel=codes, speculation=speculation,
        **asdict(settings),
    )  # fmt: skip
    return result, {"instruction": _INSTRUCTION} | asdict(settings)


def show(crops: dict, images, copy: Callable | None, output: OutputFolder) -> None:
    """Writes the pictures, and a table as it goes; `copy` makes the model's result of codes, if it is to be asked."""
    import numpy as np
    from PIL import Image

    from lumina_mgpt.images import psnr

    more = ("no edit", "codes kept") if copy else ()
    columns = ("image", "pixels", "codes", "different codes", "PSNR", *more)
    for line in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(line)} |")
    for stem, crop in crops.items():
        codes = images.encode([crop])  # (1, rows, cols)
        again = images.decode(codes)[0]
        _, rows, cols = codes.shape
        cells = [stem, f"{crop.width}x{crop.height}", f"{rows} rows of {cols}", str(len(codes.unique()))]
        cells.append(f"{psnr(again, crop):.2f} dB")
        output.save(f"{stem}_codes.png", Image.fromarray(codes[0].numpy().astype(np.uint16)))
        output.save(f"{stem}_reconstruction.png", again, {"psnr": cells[-1]})
        if copy:
            result, described = copy(codes[0])
            kept = (result.panel_codes == codes[0]).float().mean()
            cells += [f"{psnr(result.panel, crop):.2f} dB", f"{100 * kept:.1f} %"]
            output.save(f"{stem}_no_edit.png", result.panel, described)
        print(f"| {' | '.join(cells)} |", flush=True)


def file_names(stems: list[str], through_model: bool) -> list[str]:
    """All that a run will write."""
    kinds = ["codes", "reconstruction"] + ["no_edit"] * through_model
    return [f"{stem}_{kind}.png" for stem in stems for kind in kinds]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(reconstruct, build_parser(), argv)

