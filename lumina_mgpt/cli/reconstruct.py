"""Encodes and decodes pictures, to show what the image tokenizer preserves of them.

    lumina-mgpt reconstruct assets/subject.png assets/depth.png --save_path reconstructed

For each picture, this command writes two files. {name}_reconstruction.png is the decoded picture. {name}_codes.png
holds the codes as 16-bit grey, one pixel per code. It also prints a line with the PSNR of the reconstruction.

--through_model adds {name}_no_edit.png: the model edits the picture with the instruction "no edit". The result shows
what the model preserves of the picture (Lumina-mGPT, arXiv 2408.02657, appendix C).
"""

import argparse
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.request import GenerationRequest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import Checkpoint, PreparedRequest
    from lumina_mgpt.results import Result
    from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

    Copy = Callable[[str, Tensor], tuple[Result, dict[str, object]]]

_INSTRUCTION = "no edit"
_OF_MODEL = (
    "cfg",
    "top_k",
    "temperature",
    "seed",
    "speculative_jacobi",
    "fast",
    "dtype",
    "attn",
    "quant",
    "cache_dtype",
    "compile",
    "no_cuda_graphs",
)


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES,
        prog="lumina-mgpt reconstruct",
        description="Shows what the image tokenizer preserves of pictures.",
    )
    parser.add_argument("images", nargs="+", help="pictures")
    parser.add_argument(
        "--target_size",
        type=cli.whole,
        metavar="SIZE",
        help="crop to about SIZE x SIZE pixels at the nearest aspect ratio (default: the checkpoint's base size)",
    )
    parser.add_argument("--keep_size", action="store_true", help="do not crop pictures whose sides are multiples of 32")
    parser.add_argument("--through_model", action="store_true", help="also let the model copy each picture")
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def reconstruct(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then encodes and decodes the pictures."""
    settings = {
        "sampling": cli.sampling_settings(args),
        "unset": cli.unset_sampling(args),
        "guide_again": args.cfg is not None,
        "speculation": cli.speculation_settings(args),
    }
    cli.quant_group(args)
    check_options(args)
    stems = [Path(path).stem for path in args.images]
    twice = [stem for stem, count in Counter(stems).items() if count > 1]
    if twice:
        raise InputError(f"pictures must have different names, got {twice[0]} several times; use a run for each")
    output = OutputFolder(args.save_path, args.overwrite)

    from lumina_mgpt.devices import DTYPES, resolve_device  # imports torch, which takes seconds
    from lumina_mgpt.vqgan.tokenizer import ImageTokenizer

    device = resolve_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    checkpoint.require_decoder()
    crops = dict(zip(stems, crop_pictures(args.images, checkpoint.config.base_size, args.keep_size), strict=True))
    prepared = {}
    if args.through_model:
        for (stem, crop), path in zip(crops.items(), args.images, strict=True):
            prepared[stem] = prepare(checkpoint, crop, path, settings)
    output.claim(file_names(stems, args.through_model), [Path(path) for path in args.images])
    if not args.through_model:
        assert checkpoint.movqgan_path is not None
        images = ImageTokenizer.from_checkpoint(checkpoint.movqgan_path, device, DTYPES[args.movqgan_dtype])
        show(crops, images, None, output)
        return
    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast:
        from lumina_mgpt import autotune

        speculation = autotune.fastest(pipeline, next(iter(prepared.values())))
        prepared = {stem: one.changed(speculation=speculation) for stem, one in prepared.items()}
    show(crops, pipeline.image_tokenizer, partial(through_model, pipeline, prepared), output)


def check_options(args: argparse.Namespace) -> None:
    """Raises InputError for an option that has no effect without --through_model."""
    parser = build_parser()
    for name in () if args.through_model else _OF_MODEL:
        if getattr(args, name) != parser.get_default(name):
            rule = "is for the model and has no effect without --through_model"
            raise InputError(f"--{name} {rule}; add that, or leave it out")


def crop_pictures(paths: Sequence[str], target: int, keep_size: bool) -> "list[Image.Image]":
    """Returns the pictures, each cropped to about `target` x `target` pixels at the nearest aspect ratio.

    Args:
        paths: files of the pictures.
        target: side in pixels of a square with about as many pixels as each crop.
        keep_size: leave pictures whose sides are multiples of 32 uncropped.
    """
    from lumina_mgpt.images import best_size, candidate_sizes, center_crop, open_panel
    from lumina_mgpt.unirep import GRID_UNIT

    sizes, crops = candidate_sizes(target), []
    for path in paths:
        picture = open_panel("images", path)
        keep = keep_size and not (picture.width % GRID_UNIT or picture.height % GRID_UNIT)
        crops.append(picture if keep else center_crop(picture, best_size(picture.size, sizes)))
    return crops


def prepare(checkpoint: "Checkpoint", crop: "Image.Image", path: str, settings: Mapping[str, Any]) -> "PreparedRequest":
    """Returns the request for the model's copy of a picture.

    Args:
        crop: the cropped picture.
        path: file of the picture, for the error message.
        settings: sampling and speculation of the request.

    Raises:
        InputError: the copy exceeds the model's context.
    """
    family = checkpoint.config.family
    task = family.i2i_tasks.get("no_edit", family.i2i_tasks["edit"])
    request = GenerationRequest(
        [_INSTRUCTION], crop.width, task.panels * crop.height, task=task, panels=(crop,), **settings
    )
    try:
        return checkpoint.prepare(request, crop=False)
    except InputError as error:
        raise InputError(f"--through_model, {path}: {error} (--target_size)") from None


def through_model(
    pipeline: "Pipeline", prepared: "Mapping[str, PreparedRequest]", stem: str, codes: "Tensor"
) -> "tuple[Result, dict[str, object]]":
    """Returns the model's copy of a picture, and the settings for the text of its file.

    Args:
        pipeline: the loaded model.
        prepared: file stem of a picture -> its request.
        stem: file stem of the picture to copy.
        codes: codes of this picture.

    Shapes: codes (rows, cols).
    """
    request = prepared[stem].single(0, codes)
    (result,) = pipeline.stream(request)
    return result, {"instruction": _INSTRUCTION} | asdict(request.request.sampling)


def show(
    crops: "Mapping[str, Image.Image]", images: "ImageTokenizer", copy: "Copy | None", output: OutputFolder
) -> None:
    """Writes the files and prints a table with one row per picture.

    Args:
        crops: file stem -> cropped picture.
        images: image tokenizer.
        copy: function of a file stem and the picture's codes. It returns the model's copy and the settings for the text
            of its file. None without --through_model.
        output: folder to save to.
    """
    import numpy as np
    from PIL import Image

    from lumina_mgpt.images import psnr

    columns = ("image", "pixels", "codes", "different codes", "PSNR", *(("no edit", "codes kept") if copy else ()))
    for line in (columns, ["---"] * len(columns)):
        print(f"| {' | '.join(line)} |")
    for stem, crop in crops.items():
        codes = images.encode([crop])  # (1, rows, cols)
        decoded = images.decode(codes)[0]
        _, rows, cols = codes.shape
        cells = [stem, f"{crop.width}x{crop.height}", f"{rows} rows of {cols}", str(len(codes.unique()))]
        cells.append(f"{psnr(decoded, crop):.2f} dB")
        output.save(f"{stem}_codes.png", Image.fromarray(codes[0].numpy().astype(np.uint16)))
        output.save(f"{stem}_reconstruction.png", decoded, {"psnr": cells[-1]})
        if copy:
            result, text = copy(stem, codes[0])
            kept = (result.panel_codes == codes[0]).float().mean()
            cells += [f"{psnr(result.panel, crop):.2f} dB", f"{100 * kept:.1f} %"]
            output.save(f"{stem}_no_edit.png", result.panel, text)
        print(f"| {' | '.join(cells)} |", flush=True)


def file_names(stems: Sequence[str], through_model: bool) -> list[str]:
    """Returns the names of all files that a run writes.

    Args:
        stems: file stems of the pictures.
        through_model: whether the run also writes the model's copies.
    """
    kinds = ["codes", "reconstruction"] + ["no_edit"] * through_model
    return [f"{stem}_{kind}.png" for stem in stems for kind in kinds]


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(reconstruct, build_parser(), argv)
