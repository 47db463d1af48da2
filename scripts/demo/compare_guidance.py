"""Compares weights with distilled guidance with the original weights: evaluation, speed, codes a forward, cache.

    python scripts/demo/compare_guidance.py --original assets/demo --guided work/demo/guidance/run/export \
        --figures work/demo/guidance/evaluation/demo/figures.json work/demo/guidance/evaluation/export/figures.json

`--figures` are two files of scripts/demo/evaluate.py, the original first. The speeds are those of the original with
guidance, the original without, and the other weights without. The three are timed in turn, so that a change in the load
of the machine affects all of them.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from tqdm import tqdm

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.devices import cache_bytes
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import read_json
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.request import image_count

_ROUNDS = 3  # times that each setting is timed; the median counts
_LIMIT = 0.02  # largest loss of a figure that the comparison accepts


@dataclass
class Timed:
    """Times of one setting: of the pipeline `weights` at guidance `cfg`."""

    name: str
    weights: Pipeline
    cfg: float
    seconds: list[float] = field(default_factory=list)  # an image, in each round
    codes: float = 0.0  # a forward, after that of the prompt


def compared_figures(before: dict, after: dict) -> Iterator[tuple[str, list[float], list[float]]]:
    """Yields the name of each figure with its value and standard error, before and after."""
    for row, cells in before.items():
        for name, found in cells.items() if isinstance(cells, dict) else ():
            if name in (
                "reconstruction",
                "panel",
                "prompt",
                "tokenizer",
                "most frequent answer",
            ):  # not of the model's own pictures
                continue
            if row not in after or name not in after[row]:
                raise InputError(f"the second file lacks {row}, {name}; evaluate both with the same rows", "figures")
            yield row if name == "value" else f"{row}: {name}", found, after[row][name]


def print_figures(before: dict, after: dict) -> bool:
    """Prints the figures of two evaluations. Returns whether all are within _LIMIT of the original's, or above."""
    print("| row | original | distilled | difference | standard error |")
    print("| --- | --- | --- | --- | --- |")
    worst = 0.0
    for name, (old, old_error), (new, new_error) in compared_figures(before, after):
        error = (old_error**2 + new_error**2) ** 0.5
        print(f"| {name} | {old:.3f} | {new:.3f} | {new - old:+.3f} | {error:.3f} |")
        worst = min(worst, new - old)
    verdict = "within" if worst >= -_LIMIT else "outside"
    print(f"\nlargest loss {-worst:.3f}: {verdict} {_LIMIT}\n")
    return worst >= -_LIMIT


def time_all(settings: list[Timed], prompts: list[str], batch: int, images: int, speculative: bool, seed: int) -> None:
    """Samples `images` images of each setting in batches, in turn, and notes seconds and codes a forward."""
    for round_ in range(_ROUNDS):
        for timed in settings if round_ % 2 == 0 else settings[::-1]:
            pipeline = timed.weights
            layout = pipeline.checkpoint.layout()
            starts = pipeline.checkpoint.prompt_ids(prompts, layout)
            forwards, began = 0, time.perf_counter()
            for first in range(0, images, batch):
                numbers = range(first, min(first + batch, images))
                pipeline.sample(
                    [starts[n % len(starts)] for n in numbers],
                    layout,
                    SamplingConfig(cfg=timed.cfg, seed=seed),
                    list(numbers),
                    speculation=Speculation() if speculative else None,
                )
                forwards += pipeline.forwards - 1
            timed.seconds.append((time.perf_counter() - began) / images)
            timed.codes = (layout.num_codes - 1) * -(-images // batch) / forwards


def print_speeds(original: Pipeline, guided: Pipeline, args: argparse.Namespace) -> None:
    """Prints images a second as ratios, and codes a forward, for one image and for batches of 32."""
    scale = guided.checkpoint.config.guided_scale
    prompts = prompt_files.example_prompts(original.checkpoint.folder)
    print("| batch | sampling | distilled to guidance | distilled to original without | codes a forward: three |")
    print("| --- | --- | --- | --- | --- |")
    ways = [(batch, speculative) for batch in (1, 32) for speculative in (False, True)]
    for batch, speculative in tqdm(ways, unit="setting"):
        settings = [
            Timed("guidance", original, scale),
            Timed("original without", original, 1.0),
            Timed("distilled", guided, 1.0),
        ]
        images = args.images if batch > 1 else max(1, args.images // 16)
        time_all(settings, prompts, batch, images, speculative, args.seed)
        with_guidance, without, distilled = (median(timed.seconds) for timed in settings)
        codes = ", ".join(f"{timed.codes:.2f}" for timed in settings)
        way = "speculative" if speculative else "plain"
        print(
            f"| {batch} | {way} | {with_guidance / distilled:.2f} | {without / distilled:.2f} | {codes} |", flush=True
        )
    layout = guided.checkpoint.layout()
    slots = max(map(len, guided.checkpoint.prompt_ids(prompts, layout))) + layout.length
    each = cache_bytes(guided.checkpoint.config, slots, guided.cache_dtype)
    print(f"\ncache of an image: {2 * each / 1e6:.2f} MB with guidance, {each / 1e6:.2f} MB without")


def compare(args: argparse.Namespace) -> int:
    image_count("images", args.images)
    figures = [read_json(path) for path in args.figures or ()]
    original, guided = (Pipeline.from_pretrained(path, args.device) for path in (args.original, args.guided))
    if not guided.checkpoint.config.guided:
        raise InputError(f"{args.guided} has no distilled guidance; give an export of distill-guidance", "guided")
    passed = print_figures(*figures) if figures else True
    print_speeds(original, guided, args)
    print(json.dumps({"guided_scale": guided.checkpoint.config.guided_scale, "figures_passed": passed}))
    return 0 if passed else 1


def main(argv: list[str] | None = None) -> int:
    parser = cli.Parser(prog="compare_guidance.py", description=__doc__.split("\n")[0])
    parser.add_argument("--original", default="assets/demo", help="checkpoint that the training started from")
    parser.add_argument("--guided", required=True, help="export of distill-guidance")
    parser.add_argument("--figures", nargs=2, type=Path, help="figures.json of the original, and of the other")
    parser.add_argument(
        "--images", type=cli.whole, default=64, help="images in batches; one by one a sixteenth of them"
    )
    parser.add_argument("--seed", type=cli.whole, default=0, help="seed of the noise")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="device")
    return cli.run(compare, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
