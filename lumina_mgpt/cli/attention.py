"""Shows what the last code of an image attends to, as figure 5 of the Lumina-mGPT paper (arXiv 2408.02657).

    lumina-mgpt attention --prompt "a hedgehog on a sky blue background" --save_path attention

The command generates an image, or takes the picture of --image_path as the image. It writes the image as image.png;
attention.png with a heat map over the codes of the image and the share of each kind of id; and the numbers as
attention.json. Weights are averaged over layers and heads.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.cli import generate
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import write_atomic
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.request import GenerationRequest

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from lumina_mgpt.attention_map import AttentionMap
    from lumina_mgpt.pipeline import Pipeline
    from lumina_mgpt.preparation import PreparedRequest

_FILES = ("image.png", "attention.png", "attention.json")


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        cli.ALIASES, prog="lumina-mgpt attention", description="Shows what the last code of an image attends to."
    )
    group = parser.add_argument_group("prompt and image")
    group.add_argument("--prompt", required=True, help="what the image shows")
    group.add_argument(
        "--image_path",
        help="the image itself, cropped at its center to --width and --height (default: generate an image)",
    )
    generate.add_size_options(group)
    cli.add_sampling_options(parser)
    cli.add_speculation_options(parser)
    cli.add_output_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def attend(args: argparse.Namespace) -> None:
    """Checks everything that needs no weights, then loads the weights and writes the files."""
    cli.quant_group(args)
    (prompt,) = prompt_files.read_prompts([args.prompt], None)
    request = GenerationRequest(
        prompt,
        args.width,
        args.height,
        sampling=cli.sampling_settings(args),
        unset=cli.unset_sampling(args),
        guide_again=args.cfg is not None,
        speculation=cli.speculation_settings(args),
    )
    if args.image_path is not None:
        refuse_sampling(args)
    output = OutputFolder(args.save_path, args.overwrite)

    from lumina_mgpt import autotune  # imports torch, which takes seconds
    from lumina_mgpt.attention_map import attention_map, draw
    from lumina_mgpt.devices import resolve_device
    from lumina_mgpt.images import crop_panel, open_panel

    picture = None if args.image_path is None else open_panel("image_path", args.image_path)
    output.claim(_FILES, [] if picture is None else [Path(args.image_path)])
    device = resolve_device(args.device)
    checkpoint = cli.open_checkpoint(args)
    prepared = checkpoint.prepare(request)
    checkpoint.require_decoder()
    pipeline = cli.load_pipeline(args, checkpoint, device)
    if args.fast and picture is None:
        prepared = prepared.changed(speculation=autotune.fastest(pipeline, prepared))
    if picture is None:
        image, codes = sampled(pipeline, prepared)
    else:
        image = crop_panel(picture, prepared.layout.size)
        codes = pipeline.image_tokenizer.encode([image])[0]
    attention = attention_map(pipeline.model, checkpoint.vocabulary, prepared.starts[0], codes)
    loading = generate.loading_text(args)
    if picture is None:
        text = generate.describe(pipeline, prepared, loading)
    else:
        text = {"image_path": args.image_path} | generate.describe_pipeline(pipeline, loading)
    text |= {"prompt": prompt}
    output.save("image.png", image, text)
    path = output.save("attention.png", draw(attention, image), text)
    write_atomic(output.folder / "attention.json", json.dumps(numbers(attention, prompt)) + "\n")
    print(", ".join(f"{kind} {100 * share:.1f} %" for kind, share in attention.shares().items()))
    print(f"{path}, and the numbers in attention.json")


def refuse_sampling(args: argparse.Namespace) -> None:
    """Raises InputError for an option of sampling, which has no effect on a given picture."""
    given: dict[str, object] = dict(cli.given_sampling(args))
    given |= {name: None for name in ("speculative_jacobi", "fast") if getattr(args, name)}
    for name, value in given.items():
        shown = f"--{name}" if value is None else f"--{name} {value}"
        raise InputError(f"{shown} has no effect with --image_path, which samples nothing; leave one of them out")


def sampled(pipeline: "Pipeline", prepared: "PreparedRequest") -> "tuple[Image.Image, Tensor]":
    """Returns the generated image and its codes (rows, cols). A bar counts the codes."""
    layout = prepared.layout
    with cli.codes_bar(1, layout.num_codes, shown=True) as bar:

        def on_row(_: object) -> None:
            bar.update(layout.cols)

        (result,) = pipeline.stream(prepared, on_row)
    return result.image, result.codes


def numbers(attention: "AttentionMap", prompt: str) -> dict[str, object]:
    """Returns the content of attention.json.

    `shares`, and `counts` of ids, are by kind of id; `layers` holds the shares in each layer; `codes` the weight of
    each code, row by row.
    """
    width, height = attention.layout.size
    return {
        "prompt": prompt,
        "width": width,
        "height": height,
        "shares": attention.shares(),
        "counts": attention.counts,
        "layers": [attention.shares(weights) for weights in attention.layers],
        "codes": attention.grid.tolist(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    return cli.run(attend, build_parser(), argv)
