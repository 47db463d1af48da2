"""Writes a demo checkpoint in files of at most 15 MB each, with examples and another decoder of its image tokenizer.

    python scripts/demo/publish.py --model_path work/demo/export-last --save_path work/demo/demo \\
        --movqgan_path work/demo/decoder/movqgan.safetensors

Several checkpoints of one training, each with a share, give the mean of their weights. If the later ones learn one task
and forget a little of others, the mean is often better at most tasks than each of them (model soups, arXiv 2203.05482).

Examples are `prompts.txt` and `examples.json`, in place of those of the checkpoint.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt import cli
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import Family
from lumina_mgpt.io import new_folder, require_new, write_atomic
from lumina_mgpt.prompt_files import CHAT, EXAMPLES_FILE, PROMPTS_FILE

if TYPE_CHECKING:
    from lumina_mgpt.model.transformer import Transformer

LARGEST = 15_000_000  # bytes of a weight file
PROMPTS = (  # of one object each, as they are drawn in the base size
    "a hedgehog on a sky blue background",
    "a strawberry on a white background",
    "a green fox on a lavender background",
    "a blue owl on a pink background",
    "a rocket on a navy background",
)
EXAMPLES = {
    "edit": ["make the background red", "replace the penguin with a snowman", "remove the penguin"],
    "subject": ["the same on a navy background"],
    "detect": ["The penguin."],
    "depth": ["on a sky blue background"],
    "canny": ["on a yellow background"],
    "normal": ["on a pink background"],
    "chat": [
        "Draw three strawberries on a white background.",
        "Draw a fox to the left of an owl on a sky blue background.",
        "Describe the picture.",
        "What is to the right of the fox?",
        "How many owls are there?",
        "What colour is the background?",
        "Make the background pink.",
        "Draw a green fox on a lavender background.",
        "What colour is the fox?",
        "Where is the fox?",
        "Is there a cactus?",
        "Replace the fox with a cactus.",
        "Do you know what a printer is?",
        "Generate 8 object views of 64x64 according to the following prompt:\na red mug on a white background",
    ],
}


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="publish.py", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--model_path",
        type=weighted,
        nargs="+",
        required=True,
        metavar="CHECKPOINT[=SHARE]",
        help="checkpoint folder or hub id; of several, the mean of their weights",
    )
    parser.add_argument("--movqgan_path", type=Path, help="weights of the image tokenizer (default: the checkpoint's)")
    parser.add_argument("--save_path", required=True, type=Path, help="new folder for the result")
    return parser


def shown(family: Family) -> set[str]:
    """The kinds of examples that serve a checkpoint of this family."""
    return {*family.i2i_tasks, *([CHAT] if family.answers_in_text else [])}


def weighted(text: str) -> tuple[str, float]:
    """Converts an option value `CHECKPOINT` or `CHECKPOINT=SHARE` to both. The default share is 1."""
    name, found, share = text.rpartition("=")
    try:
        value = float(share) if found else None
    except ValueError:  # an = in a path
        value = None
    if value is None:
        return text, 1.0
    if not name or not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"must be CHECKPOINT or CHECKPOINT=SHARE, above 0 up to 1e6, got {text}")
    return name, value


def mean(shares: Sequence[tuple[Path, float]]) -> "Transformer":
    """Returns the model whose weights are the weighted mean of those of several folders, computed in float32.

    Raises:
        InputError: a folder has int4 weights, or a checkpoint of another kind than the first one.
    """
    import torch

    from lumina_mgpt.model.reading import load_model, require_plain_weights

    (first, _), *_ = shares
    total, sums = sum(share for _, share in shares), {}
    for folder, share in shares:
        require_plain_weights(folder, "model_path", "copied")
        model = load_model(folder, None, "cpu")
        for name in ("config.json", "tokenizer.json"):
            if (folder / name).read_bytes() != (first / name).read_bytes():
                rule = f"must name checkpoints of one training, but {name} of {folder} differs from that of {first}"
                raise InputError(f"{rule}; leave one of them out", "model_path")
        for name, weight in model.named_parameters():
            sums[name] = sums.get(name, 0.0) + share / total * weight.detach().float()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(sums[name])
    return model


def run(args: argparse.Namespace) -> None:
    """Writes the checkpoint."""
    from lumina_mgpt.model.convert import copy_companions
    from lumina_mgpt.model.hub import resolve
    from lumina_mgpt.model.writing import save_model

    require_new(args.save_path, "save_path")
    sources = [(resolve(cli.checkpoint_path(name)), share) for name, share in args.model_path]
    model = mean(sources)
    with new_folder(args.save_path, "save_path") as folder:
        save_model(model, folder, max_shard_bytes=LARGEST)
        copy_companions(sources[0][0], folder)
        write_atomic(folder / PROMPTS_FILE, "".join(f"{prompt}\n" for prompt in PROMPTS))
        offered = {name: texts for name, texts in EXAMPLES.items() if name in shown(model.config.family)}
        write_atomic(folder / EXAMPLES_FILE, json.dumps(offered, indent=1) + "\n")
        if args.movqgan_path:
            shutil.copyfile(args.movqgan_path, folder / "movqgan.safetensors")
        sizes = {file.name: file.stat().st_size for file in sorted(folder.glob("*.safetensors"))}
    print(f"{args.save_path}: " + ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in sizes.items()))


def main(argv: list[str] | None = None) -> int:
    return cli.run(run, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
