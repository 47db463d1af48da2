"""Measures the demo from end to end. Prints a table and one line of JSON.

    python scripts/benchmarks/bench_demo.py start     # one command, against `import torch`
    python scripts/benchmarks/bench_demo.py images    # images a second in one process

`start` runs `python -c "import torch"` and `lumina-mgpt generate --prompt ...` in turn, each in its own process. The
ratio is that of a pair of runs next to each other; memory is the largest resident memory of the process.

`images` makes the images of one prompt in one process, with decoding and PNG files, and says what each part takes. The
settings of a repeat run one after another, and then those of the next repeat.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from lumina_mgpt import cli
from lumina_mgpt.config import COUPLINGS, Speculation
from lumina_mgpt.errors import InputError

if TYPE_CHECKING:
    from lumina_mgpt.pipeline import Pipeline

PROMPT = "a hedgehog on a sky blue background"


@dataclass(frozen=True)
class Run:
    """What one process took: seconds by the clock, seconds of the processor, and its largest resident memory."""

    seconds: float
    processor: float
    peak_mib: float


def run_process(options: list[str]) -> Run:
    """Runs this interpreter with `options` to its end.

    The peak is never below the memory of the calling process, which the system counts in: do not import torch there.

    Raises:
        InputError: its exit status is not 0.
    """
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, *options], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    message = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        last = (message.strip() or "no message").splitlines()[-1]
        raise InputError(f"{' '.join(options)} must end with status 0, got {process.returncode}: {last}; run it alone")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return Run(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 2**20)


def spread(values: list[float], digits: int = 2) -> dict[str, float]:
    """Returns median, least and largest of some values."""
    return {
        "median": round(median(values), digits),
        "least": round(min(values), digits),
        "largest": round(max(values), digits),
    }


def start(args: argparse.Namespace) -> None:
    """Measures one command against `import torch`, in alternating runs."""
    at_least("runs", args.runs)
    with tempfile.TemporaryDirectory() as folder:
        command = ["-m", "lumina_mgpt", "generate", "--prompt", PROMPT, "--save_path", folder, "--overwrite"]
        command += [
            "--model_path",
            str(args.model_path),
            *(["--speculative_jacobi"] if args.speculative_jacobi else []),
        ]
        kinds = {"import torch": ["-c", "import torch"], "generate": command}
        for options in kinds.values():  # fills the system's cache of files
            run_process(options)
        pairs = [[run_process(options) for options in kinds.values()] for _ in range(args.runs)]
    print("| process | seconds | processor seconds | peak MiB |\n| --- | --- | --- | --- |")
    for name, runs in zip(kinds, zip(*pairs, strict=True), strict=True):
        cells = (median(run.seconds for run in runs), median(run.processor for run in runs))
        peak = median(run.peak_mib for run in runs)
        print(f"| {name} | {cells[0]:.2f} | {cells[1]:.2f} | {peak:.0f} |")
    report = {
        "runs": args.runs,
        "import_seconds": spread([base.seconds for base, _ in pairs]),
        "generate_seconds": spread([run.seconds for _, run in pairs]),
        "seconds_ratio": spread([run.seconds / base.seconds for base, run in pairs]),
        "processor_ratio": spread([run.processor / base.processor for base, run in pairs]),
        "import_peak_mib": spread([base.peak_mib for base, _ in pairs], 0),
        "peak_above_import_mib": spread([run.peak_mib - base.peak_mib for base, run in pairs], 0),
    }
    print(json.dumps(report))


class Meter:
    """Adds up the time that calls of a method take, by the clock."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def of(self, work: Callable) -> Callable:
        """Returns `work` with its time added to `seconds`."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def make_images(pipeline: "Pipeline", count: int, batch_size: int | None, speculation: Speculation | None) -> dict:
    """Makes `count` images of one prompt with their files, and returns what that took."""
    from lumina_mgpt.outputs import OutputFolder
    from lumina_mgpt.request import GenerationRequest

    request = GenerationRequest.of(PROMPT, n=count, batch_size=batch_size, speculation=speculation)
    sampling, decoding, forwards = Meter(), Meter(), 0
    sample, result = pipeline.sample, pipeline.result

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal forwards
        codes = sample(*args, **kwargs)
        forwards += pipeline.forwards
        return codes

    # Attributes of the instance hide its methods.
    pipeline.sample, pipeline.result = sampling.of(counted), decoding.of(result)  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            output = OutputFolder(folder)
            began, processor = time.perf_counter(), time.process_time()
            for index, made in enumerate(pipeline.stream(request)):
                output.save(f"{index}.png", made.image)
            seconds, processor = time.perf_counter() - began, time.process_time() - processor
    finally:
        del pipeline.sample, pipeline.result  # type: ignore[method-assign]
    return {
        "images_a_second": count / seconds,
        "processor_seconds_an_image": processor / count,
        "sampling_share": sampling.seconds / seconds,
        "decoding_share": decoding.seconds / seconds,
        "forwards": forwards,
    }


def images(args: argparse.Namespace) -> None:
    """Measures images a second of each setting."""
    for name in ("n", "repeats", "threads"):
        at_least(name, getattr(args, name))
    import torch

    from lumina_mgpt import Pipeline

    torch.set_num_threads(args.threads)
    pipeline = Pipeline.from_pretrained(cli.checkpoint_path(args.model_path), device="cpu")
    settings: list[tuple[int | None, Speculation | None]] = []
    for size in args.batch_size or [None]:
        settings += [(size, None)] if "plain" in args.coupling else []
        couplings = [name for name in args.coupling if name != "plain"]
        settings += [(size, Speculation(name, window)) for name in couplings for window in args.window]
    make_images(pipeline, 1, None, None)
    found = [[make_images(pipeline, args.n, *setting) for setting in settings] for _ in range(args.repeats)]
    print("| sampler | window | batch | images a second | sampling | decoding | files | forwards |")
    print("| --- " * 8 + "|")
    rows = []
    for (size, speculation), runs in zip(settings, zip(*found, strict=True), strict=True):
        rates = [run["images_a_second"] for run in runs]
        shares = [median(run[f"{part}_share"] for run in runs) for part in ("sampling", "decoding")]
        name, window = (speculation.coupling, speculation.window) if speculation else ("plain", None)
        cells = [
            name,
            window or "-",
            size or "auto",
            f"{median(rates):.2f}",
            *(f"{100 * share:.0f} %" for share in shares),
        ]
        print("| " + " | ".join(map(str, [*cells, f"{100 * (1 - sum(shares)):.0f} %", runs[0]["forwards"]])) + " |")
        rows.append(
            {
                "coupling": name,
                "window": window,
                "batch_size": size,
                "images_a_second": spread(rates),
                "processor_seconds_an_image": spread([run["processor_seconds_an_image"] for run in runs], 3),
                "sampling_share": round(shares[0], 3),
                "decoding_share": round(shares[1], 3),
                "forwards": runs[0]["forwards"],
            }
        )
    print(json.dumps({"n": args.n, "repeats": args.repeats, "threads": args.threads, "rows": rows}))


def at_least(name: str, value: int, least: int = 1) -> None:
    """Raises InputError if a number is too small."""
    if value < least:
        raise InputError(f"must be at least {least}, got {value}; try {max(least, 3)}", name)


def build_parser() -> cli.Parser:
    names = {"n": "-n", "runs": "--runs", "repeats": "--repeats", "threads": "--threads"}  # options of the parts
    parser = cli.Parser(names, prog="bench_demo.py", description="Measures the demo from end to end.")
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("start", help="one command, against `import torch`")
    one.add_argument("--runs", type=cli.whole, default=7, help="pairs of runs")
    one.add_argument("--speculative_jacobi", action="store_true", help="with speculative sampling")
    many = parts.add_parser("images", help="images a second in one process")
    many.add_argument("-n", type=cli.whole, default=32, help="images of a run")
    many.add_argument("--repeats", type=cli.whole, default=3, help="runs of each setting")
    many.add_argument("--batch_size", type=cli.whole, nargs="+", help="images sampled together (default: automatic)")
    couplings = ("plain", *COUPLINGS)
    many.add_argument("--coupling", nargs="+", choices=couplings, default=["plain", "noise"], help="samplers")
    many.add_argument("--window", type=cli.whole, nargs="+", default=[16, 32], help="drafts a forward")
    many.add_argument("--threads", type=cli.whole, default=os.cpu_count() or 1, help="CPU threads")
    for part in (one, many):
        part.add_argument("--model_path", type=Path, default=Path(cli.DEMO), help="checkpoint folder")
    return parser


def bench(args: argparse.Namespace) -> None:
    (start if args.part == "start" else images)(args)


def main(argv: list[str] | None = None) -> int:
    return cli.run(bench, build_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
