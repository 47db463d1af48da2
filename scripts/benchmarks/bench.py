"""Times samplers on the same prompts and seeds. Prints tables and one line of JSON, and can plot.

    python scripts/benchmarks/bench.py --coupling plain independent maximal noise --window 16 32 64

`codes a step` is the number of codes of an image divided by the forwards after its prompt, ± the standard error over
images or batches. `of bandwidth` is the rate at which a step reads weights and cache, relative to the read bandwidth of
memory measured in the same run: near 100 % a step is bound by memory, above 100 % the weights are in the CPU's caches.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean, stdev

from common import add_threads, print_header, print_row, set_threads
from tqdm import tqdm

from lumina_mgpt import cli, prompt_files
from lumina_mgpt.config import COUPLINGS, PROPOSALS, SamplingConfig, Speculation
from lumina_mgpt.devices import cache_bytes, resolve_device
from lumina_mgpt.errors import InputError, package_error
from lumina_mgpt.measure import peak_bytes, read_bandwidth
from lumina_mgpt.outputs import OutputFolder
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.request import image_count


@dataclass(frozen=True)
class Row:
    """Measurements of one setting. A step is one forward with the sampling after it."""

    coupling: str
    window: int
    proposal: str
    seconds_an_image: float
    codes_a_step: float
    codes_error: float  # standard error
    ms_a_step: float
    bytes_over_bandwidth: float  # weights and cache read in a step, relative to what the memory delivers in its time


def measure(
    pipeline: Pipeline,
    prompts: list[str],
    settings: SamplingConfig,
    speculation: Speculation | None,
    args,
    bandwidth: float,
) -> Row:
    """Samples `args.n` images of each prompt, `args.batch_size` at a time."""
    checkpoint = pipeline.checkpoint
    layout = checkpoint.layout(args.width, args.height)
    jobs = [(start, repeat) for start in checkpoint.prompt_ids(prompts, layout) for repeat in range(args.n)]
    if speculation is None:
        jobs = jobs[:: args.n]  # one code a forward for every image
    batches = [jobs[first : first + args.batch_size] for first in range(0, len(jobs), args.batch_size)]
    steps, began = [], time.perf_counter()
    for batch in batches:
        starts, repeats = zip(*batch, strict=True)
        pipeline.sample(starts, layout, settings, repeats, speculation=speculation)
        steps.append(pipeline.forwards - 1)  # after the prompt
    seconds = time.perf_counter() - began
    codes, each = (layout.num_codes - 1) / fmean(steps), seconds / (sum(steps) + len(steps))
    error = codes * stdev(steps) / fmean(steps) / len(steps) ** 0.5 if len(steps) > 1 else 0.0
    return Row(
        coupling=speculation.coupling if speculation else "plain",
        window=speculation.window if speculation and speculation.window else 1,
        proposal=speculation.proposal if speculation else "-",
        seconds_an_image=seconds / len(jobs),
        codes_a_step=codes,
        codes_error=error,
        ms_a_step=1000 * each,
        bytes_over_bandwidth=step_bytes(pipeline, layout, jobs, settings, args.batch_size) / each / bandwidth,
    )


def step_bytes(pipeline: Pipeline, layout, jobs: list, settings: SamplingConfig, batch_size: int) -> int:
    """Bytes that a step reads: the layers, the image codes' rows of the head, and the cache at half of the image."""
    config = pipeline.checkpoint.config
    rows = min(batch_size, len(jobs)) * (1 if settings.cfg == 1 else 2)
    cache = rows * cache_bytes(config, max(len(start) for start, _ in jobs) + layout.length // 2, pipeline.cache_dtype)
    layers = sum(t.nbytes for part in ("parameters", "buffers") for t in getattr(pipeline.model.layers, part)())
    head = pipeline.model.lm_head.weight
    return layers + config.num_image_codes * config.hidden_size * head.itemsize + cache


def print_tables(rows: list[Row]) -> None:
    """Prints a row a setting, and then codes a step by window and coupling."""
    print_header("coupling", "window", "proposal", "s an image", "codes a step", "ms a step", "of bandwidth")
    for row in rows:
        print_row(
            row.coupling,
            row.window,
            row.proposal,
            f"{row.seconds_an_image:.2f}",
            codes_of(row),
            f"{row.ms_a_step:.1f}",
            f"{100 * row.bytes_over_bandwidth:.0f} %",
        )
    found = {(row.window, way_of(row)): codes_of(row) for row in rows if row.coupling != "plain"}
    if found:
        ways = list(dict.fromkeys(way for _, way in found))
        print()
        print_header("window", *ways)
        for window in sorted({window for window, _ in found}):
            print_row(window, *(found[window, way] for way in ways))
    print()


def way_of(row: Row) -> str:
    return row.coupling if row.proposal == Speculation.proposal else f"{row.coupling}, proposal {row.proposal}"


def codes_of(row: Row) -> str:
    return f"{row.codes_a_step:.2f}" + (f" ± {row.codes_error:.2f}" if row.codes_error else "")


def plot(rows: list[Row], path: Path) -> None:
    """Plots codes a step by window with standard errors, one line for each coupling and proposal."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way in dict.fromkeys(way_of(row) for row in rows):
        line = sorted((row.window, row.codes_a_step, row.codes_error) for row in rows if way_of(row) == way)
        windows, codes, errors = zip(*line, strict=True)
        axes.errorbar(windows, codes, errors, fmt="o-", capsize=3, label=way)
    ticks = sorted({row.window for row in rows})
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, labels=map(str, ticks))
    axes.set_ylim(bottom=0)
    axes.set_xlabel("window (drafts a forward)")
    axes.set_ylabel("codes a forward")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def check_plot(path: Path) -> None:
    """Raises InputError where matplotlib is missing or `path` cannot be written, before the measurements."""
    try:
        import matplotlib
    except Exception as error:  # its imports may raise any exception
        raise package_error(error, f"--plot {path}", "matplotlib", otherwise="leave it out") from None
    matplotlib.use("Agg")
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise InputError(f"--plot must be a .png file in a folder that exists, got {path}")
    OutputFolder(path.parent, overwrite=True, parameter="plot").claim([path.name])


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench.py", description="Times samplers on the same prompts and seeds.")
    group = parser.add_argument_group("what to time")
    couplings = ("plain", *COUPLINGS)
    group.add_argument("--coupling", nargs="+", choices=couplings, default=list(couplings), help="samplers")
    group.add_argument("--window", nargs="+", type=cli.whole, default=[16, 32, 64], help="drafts a forward")
    group.add_argument(
        "--proposal",
        nargs="+",
        choices=sorted(PROPOSALS),
        default=[Speculation.proposal],
        help="distribution that drafts are initialized from",
    )
    group.add_argument("-n", type=cli.whole, default=1, help="images of each prompt (plain sampling makes one)")
    group.add_argument("--prompt_file", help="one prompt a line (default: the checkpoint's own)")
    for side in ("--width", "--height"):
        group.add_argument(side, type=cli.whole, help="pixels (default: the checkpoint's base size)")
    add_threads(group)
    group.add_argument("--plot", type=Path, help="PNG of codes a forward by window (needs matplotlib)")
    cli.add_sampling_options(parser)
    cli.add_batch_size(parser)
    cli.add_checkpoint_options(parser)
    parser.set_defaults(batch_size=1)
    return parser


def bench(args) -> None:
    """Measures all settings and prints them."""
    settings = cli.sampling_settings(args)
    for name in ("n", "batch_size"):
        image_count(name, getattr(args, name))
    todo: list[Speculation | None] = [None] if "plain" in args.coupling else []
    todo += [
        Speculation(coupling, window, proposal)
        for coupling in args.coupling
        if coupling != "plain"
        for proposal in args.proposal
        for window in args.window
    ]
    if args.plot:
        check_plot(args.plot)
    set_threads(args.threads)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    if args.cfg is None and checkpoint.config.guided:
        settings = replace(settings, cfg=1.0)
    prompts = prompt_files.read_prompts(None, args.prompt_file) if args.prompt_file else []
    prompts = prompts or prompt_files.example_prompts(checkpoint.folder)
    pipeline = cli.load_pipeline(args, checkpoint, resolve_device(args.device))
    bandwidth = read_bandwidth(pipeline.device)
    measure(pipeline, prompts[:1], settings, None, args, bandwidth)  # warm-up
    rows = [measure(pipeline, prompts, settings, choice, args, bandwidth) for choice in tqdm(todo, unit="setting")]
    print_tables(rows)
    if args.plot:
        plot([row for row in rows if row.coupling != "plain"], args.plot)
    peak = peak_bytes(pipeline.device)
    print(
        json.dumps(
            {
                "model": str(args.model_path),
                "device": str(pipeline.device),
                "dtype": str(pipeline.dtype).split(".")[1],
                "quant": pipeline.model.config.int4_group,
                "cache_dtype": args.cache_dtype,
                "threads": args.threads,
                "images": len(prompts) * args.n,
                "bandwidth_gb_s": round(bandwidth / 1e9, 2),
                "peak_gb": peak and round(peak / 1e9, 2),
                "sampling": asdict(settings),
                "rows": [asdict(row) for row in rows],
            }
        )
    )


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
