"""Times sampling: settings side by side on the same prompts and seeds, as a table, a plot, and one line of JSON.

    python scripts/bench.py --coupling plain independent maximal noise --window 16 32 64

`codes a forward` counts the codes of an image over the forwards after its prompt. `of bandwidth` is the rate at which a
forward goes through weights and cache, over the read bandwidth of memory measured here: near 100 % reading is all that
it does; more means that the weights stay in the processor's caches.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from lumina_mgpt import cli
from lumina_mgpt.config import COUPLINGS, SamplingConfig, Speculation
from lumina_mgpt.devices import cache_bytes, resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.measure import peak_bytes, read_bandwidth
from lumina_mgpt.pipeline import Checkpoint, Pipeline
from lumina_mgpt.sampling.drafts import BIRTHS


@dataclass(frozen=True)
class Row:
    """One setting. Units: seconds an image, milliseconds a forward, `bandwidth` a share of what was measured."""

    coupling: str
    window: int
    birth: str
    seconds: float
    codes: float
    milliseconds: float
    bandwidth: float


def measure(pipeline: Pipeline, prompts: list[str], settings: SamplingConfig, speculation: Speculation | None,
            args, bandwidth: float) -> Row:  # fmt: skip
    """Makes one image of each prompt, `--batch_size` at once, from image start to its last code."""
    checkpoint = pipeline.checkpoint
    layout = checkpoint.layout(args.width, args.height)
    starts = checkpoint.prompt_ids(prompts, layout)
    forwards, seconds = 0, 0.0
    batches = range(0, len(starts), args.batch_size)
    for first in batches:
        batch = starts[first : first + args.batch_size]
        began = time.perf_counter()
        pipeline.sample(batch, layout, settings, [0] * len(batch), speculation=speculation)
        seconds += time.perf_counter() - began
        forwards += pipeline.forwards
    steps = forwards - len(batches)  # after the prompts
    rows = min(args.batch_size, len(starts)) * (1 if settings.cfg == 1 else 2)
    half = rows * cache_bytes(checkpoint.config, max(map(len, starts)) + layout.length // 2, pipeline.cache_dtype)
    layers = sum(t.nbytes for part in ("parameters", "buffers") for t in getattr(pipeline.model.layers, part)())
    head = checkpoint.config.num_image_codes * checkpoint.config.hidden_size * pipeline.dtype.itemsize
    each = seconds / forwards
    return Row(
        coupling=speculation.coupling if speculation else "plain",
        window=speculation.window if speculation else 1,
        birth=speculation.birth if speculation else "-",
        seconds=seconds / len(starts),
        codes=(layout.num_codes - 1) * len(batches) / steps,
        milliseconds=1000 * each,
        bandwidth=(layers + head + half) / each / bandwidth,
    )


def plot(rows: list[Row], path: Path) -> None:
    """Codes a forward over the window, one line a coupling and birth."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for key in dict.fromkeys((row.coupling, row.birth) for row in rows):
        line = sorted((row.window, row.codes) for row in rows if (row.coupling, row.birth) == key)
        axes.plot(*zip(*line, strict=True), "o-", label=" ".join(key).removesuffix(" -"))
    axes.set_xscale("log", base=2)
    axes.set_xlabel("window (drafts a forward)")
    axes.set_ylabel("codes a forward")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def check_plot(path: Path) -> None:
    """Raises InputError before an hour of work and not after it."""
    try:
        import matplotlib
    except ImportError:
        raise InputError(f"--plot {path} needs matplotlib; pip install matplotlib, or leave it out") from None
    matplotlib.use("Agg")
    if path.suffix != ".png" or not path.resolve().parent.is_dir():
        raise InputError(f"--plot must be a .png file in a folder that exists, got {path}")


def build_parser() -> cli.Parser:
    parser = cli.Parser(prog="bench.py", description="Times sampling, settings side by side.")
    group = parser.add_argument_group("what to time")
    couplings = ("plain", *COUPLINGS)
    group.add_argument("--coupling", nargs="+", choices=couplings, default=list(couplings), help="ways of sampling")
    group.add_argument("--window", nargs="+", type=cli.whole, default=[16, 32, 64], help="drafts a forward")
    group.add_argument("--birth", nargs="+", choices=sorted(BIRTHS), default=[Speculation.birth], help="first drafts")
    group.add_argument("--prompt_file", help="one prompt a line (default: the checkpoint's own)")
    for side in ("--width", "--height"):
        group.add_argument(side, type=cli.whole, help="pixels (default: the checkpoint's base size)")
    group.add_argument("--threads", type=cli.whole, default=torch.get_num_threads(), help="CPU threads")
    group.add_argument("--plot", type=Path, help="PNG of codes a forward by window (needs matplotlib)")
    cli.add_sampling_options(parser)
    cli.add_checkpoint_options(parser)
    parser.set_defaults(batch_size=1)
    return parser


def bench(args) -> None:
    settings = cli.sampling_settings(args)
    todo = [None] if "plain" in args.coupling else []
    todo += [Speculation(coupling, window, birth) for coupling in args.coupling if coupling != "plain"
             for birth in args.birth for window in args.window]  # fmt: skip
    if not 1 <= args.threads <= 1024:
        raise InputError(f"--threads must be in 1 ... 1024, got {args.threads}; try {torch.get_num_threads()}")
    if args.plot:
        check_plot(args.plot)
    torch.set_num_threads(args.threads)
    checkpoint = Checkpoint.open(cli.checkpoint_path(args.model_path), args.movqgan_path)
    prompts = cli.read_prompts(None, args.prompt_file) if args.prompt_file else cli.example_prompts(checkpoint.folder)
    pipeline = cli.load_pipeline(args, checkpoint, resolve_device(args.device))
    bandwidth = read_bandwidth(pipeline.device)
    measure(pipeline, prompts[:1], settings, None, args, bandwidth)  # warm-up
    rows = [measure(pipeline, prompts, settings, choice, args, bandwidth) for choice in tqdm(todo, unit="setting")]
    print("| coupling | window | drafts from | s an image | codes a forward | ms a forward | of bandwidth |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        print(f"| {row.coupling} | {row.window} | {row.birth} | {row.seconds:.2f} | {row.codes:.2f} | "
              f"{row.milliseconds:.1f} | {100 * row.bandwidth:.0f} % |")  # fmt: skip
    if args.plot:
        plot([row for row in rows if row.coupling != "plain"], args.plot)
    peak = peak_bytes(pipeline.device)
    print(json.dumps({
        "model": str(args.model_path), "device": str(pipeline.device), "dtype": str(pipeline.dtype).split(".")[1],
        "quant_group": pipeline.model.config.int4_group, "cache_dtype": args.cache_dtype, "threads": args.threads,
        "images": len(prompts), "bandwidth_gb_s": round(bandwidth / 1e9, 2), "peak_gb": peak and round(peak / 1e9, 2),
        "sampling": asdict(settings), "rows": [asdict(row) for row in rows],
    }))  # fmt: skip


if __name__ == "__main__":
    sys.exit(cli.run(bench, build_parser(), None))
