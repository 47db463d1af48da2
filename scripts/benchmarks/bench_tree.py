"""Measures codes a forward with a tree of alternatives beside the drafts, at equal numbers of codes read.

    python scripts/benchmarks/bench_tree.py --window 32 64 144 --tree none noise regular:3,3 grow:16 --n 5

A window is the number of codes that a forward reads of an image: drafts and nodes of the tree together. `none` and
`noise` are windows without a tree, with the couplings `maximal` and `noise`. The other trees are functions of
`lumina_mgpt.sampling.tree` and their arguments. After each image of all prompts, the script prints a table, with
standard errors over images, and one line of JSON with the forwards of each image. `codes read` is the mean over all
forwards, which is less than the window where the image ends.
"""

import json
import sys
from statistics import fmean, stdev

import torch
from common import add_threads, print_header, print_row, set_threads

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.config import SamplingConfig, Speculation
from lumina_mgpt.errors import InputError
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.step import CachedStep
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.sampling import tree as trees
from lumina_mgpt.sampling.jacobi import sample_jacobi, spare_slots

SHAPES = {"regular": trees.regular, "chains": trees.chains, "grow": trees.grow}


class CountingStep(CachedStep):
    """A step that counts the codes that it reads of the conditional row, without the prompt."""

    codes_read = 0

    def __call__(self, ids, positions, read, *tree):
        if self.calls:
            self.codes_read += read.shape[1]
        return super().__call__(ids, positions, read, *tree)


def parse(text: str) -> tuple[str, trees.Tree]:
    """Returns the coupling and the tree that `text` names.

    Raises:
        InputError: `text` names no tree.
    """
    if text in ("none", "noise"):
        return "noise" if text == "noise" else "maximal", ()
    name, _, numbers = text.partition(":")
    try:
        return "maximal", SHAPES[name](*map(int, numbers.split(",")))
    except (KeyError, ValueError, TypeError):
        raise InputError(f"must be none, noise, regular:3,3, chains:3,2 or grow:16, got {text}", "tree") from None


def forwards(pipeline: Pipeline, start: list[int], settings: SamplingConfig, repeat: int, window: int, text: str):
    """Returns the number of forwards after the prompt of one image, and the number of codes that they read."""
    layout = pipeline.checkpoint.layout()
    coupling, tree = parse(text)
    spare = spare_slots(layout, window, len(tree))
    rows = 1 if settings.cfg == 1 else 2
    config, dtype = pipeline.model.config, pipeline.dtype
    cache = KVCache(config, rows, len(start) + layout.length, dtype, pipeline.device, spare)
    step = CountingStep(pipeline.model, cache, layout.vocabulary.code_slice)
    arguments = step, [start], layout, settings, [(settings.seed, repeat)], Speculation(coupling, window)
    if tree:
        trees.sample_tree(*arguments, tree)
    else:
        sample_jacobi(*arguments)
    return step.calls - 1, step.codes_read


def print_table(found: dict[tuple[int, str], list[tuple[int, int]]], codes: int) -> None:
    print_header("window", "tree", "nodes", "images", "codes a forward", "codes read")
    for (window, text), counts in found.items():
        steps = [step for step, _ in counts]
        mean = fmean(steps)
        error = codes / mean**2 * stdev(steps) / len(steps) ** 0.5 if len(steps) > 1 else 0.0
        read = sum(read for _, read in counts) / sum(steps)
        nodes = len(parse(text)[1])
        print_row(window, text, nodes, len(steps), f"{codes / mean:.2f} ± {error:.2f}", f"{read:.1f}")
    counted = [{"window": window, "tree": text, "counts": counts} for (window, text), counts in found.items()]
    print("\n" + json.dumps(counted), flush=True)


def bench(args) -> None:
    settings = cli.sampling_settings(args)
    for text in args.tree:
        parse(text)
    set_threads(args.threads)
    pipeline = Pipeline.from_pretrained(cli.checkpoint_path(args.model_path), device="cpu")
    layout = pipeline.checkpoint.layout()
    starts = pipeline.checkpoint.prompt_ids(prompt_files.example_prompts(pipeline.checkpoint.folder), layout)
    found: dict[tuple[int, str], list[tuple[int, int]]] = {}
    for repeat in range(args.first, args.first + args.n):
        for start in starts:
            for window in args.window:
                for text in args.tree:
                    if len(parse(text)[1]) < window:
                        counts = forwards(pipeline, start, settings, repeat, window, text)
                        found.setdefault((window, text), []).append(counts)
        print_table(found, layout.num_codes - 1)


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench_tree.py", description="Measures codes a forward with trees of alternatives.")
    group = parser.add_argument_group("what to measure")
    group.add_argument("--window", nargs="+", type=cli.whole, default=[32, 64, 144], help="codes that a forward reads")
    group.add_argument("--tree", nargs="+", default=["none", "noise", "grow:16"], help="trees")
    group.add_argument("--n", type=cli.whole, default=5, help="images of each prompt")
    group.add_argument("--first", type=int, default=0, help="repeat of the first image")
    add_threads(group)
    cli.add_sampling_options(parser)
    cli.add_checkpoint_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    torch.set_grad_enabled(False)
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
