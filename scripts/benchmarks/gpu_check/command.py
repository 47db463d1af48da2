"""The command line: options, the stages in their order, and the end of the run."""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from gpu_check import basics, kernels, parity, report, speed, training
from gpu_check.check import Clock, Stage, run_stages
from gpu_check.setup import Setup
from lumina_mgpt import cli
from lumina_mgpt.checks import excerpt
from lumina_mgpt.devices import resolve_device
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, write_atomic
from lumina_mgpt.training.distributed import return_freed_memory

STAGES = (
    Stage("environment", "versions, the GPU and its memory", basics.environment, share=15, least=1),
    Stage("parity", "logits and images against the CPU", parity.parity, share=60, least=10),
    Stage("flash", "flash attention against torch's", parity.flash, share=20, least=5),
    Stage("int4", "int4 products against dequantized ones", kernels.int4, share=30, least=5),
    Stage("steps", "compiled and captured steps against eager ones", kernels.steps, share=105, least=10),
    Stage("memory", "memory of the model against the estimate", speed.memory, share=45, least=5),
    Stage("bandwidth", "steps against the memory's bandwidth", speed.bandwidth, share=70, least=10),
    Stage("batches", "images a minute in batches", speed.batches, share=75, least=10),
    Stage("training", "training steps and their memory", training.training, share=120, least=15),
)
_RESERVE = 0.02  # part of the time for the report


def build_parser() -> cli.Parser:
    parser = cli.Parser(
        prog="gpu_check.sh",
        description="Checks results, speed and memory on this machine's GPU; without one, tests itself on the CPU. "
        "Prints a verdict a stage, a markdown table and one line of JSON. The exit status is 1 if a stage failed.",
    )
    parser.add_argument("--device", default="auto", help="auto, cuda, cuda:N or cpu")
    parser.add_argument("--minutes", type=cli.number, default=9.0, help="time of the whole run")
    parser.add_argument("--json", type=Path, help="file for the JSON line")
    parser.add_argument("--table", type=Path, help="file for the markdown table")
    parser.add_argument("--stages", help="names with commas between them, of " + ", ".join(s.name for s in STAGES))
    parser.add_argument("--first_generation", type=Path, help="folder of a small first-generation checkpoint")
    parser.add_argument("--self_test", action="store_true", help="small models, as without a GPU")
    return parser


def check(args: argparse.Namespace, began: float | None = None, clock: Clock = time.monotonic) -> int:
    """Runs the chosen stages. Returns the exit status: 1 if a stage failed.

    Args:
        began: the time on `clock` when the run began.
    """
    began = clock() if began is None else began
    stages, setup = chosen_stages(args.stages), setup_of(args)
    if not 0 <= args.minutes <= 1440:
        raise InputError(f"must be in 0 ... 1440, got {args.minutes:g}; try 9", "minutes")
    for name in ("json", "table"):
        require_target(name, getattr(args, name))
    name = basics.name_of(setup.device)
    kind = f"self-test on a {'GPU' if setup.device.type == 'cuda' else 'CPU'}, with small models" if setup.small else ""
    print(f"{name}, {args.minutes:g} minutes at most{kind and ': ' + kind}\n", flush=True)
    if setup.device.type == "cpu":
        return_freed_memory()  # otherwise the memory of one stage hides that of the next
    outcomes = run_stages(stages, setup, (1 - _RESERVE) * args.minutes, began, clock)
    versions = basics.versions_of()
    facts = {
        "check": "gpu",
        "device": name,
        "self_test": setup.small,
        "versions": versions,
        "seconds": round(clock() - began, 1),
        "failed": [outcome.name for outcome in outcomes if outcome.verdict == "failed"],
    }
    title = (
        f"{name}, torch {versions['torch']}, CUDA {versions['cuda'] or 'none'}, {setup.sizes.name} with random weights"
    )
    table = report.markdown(outcomes, title + (f" ({kind})" if kind else ""))
    line = report.json_text(outcomes, facts)
    print(table)
    print(line, flush=True)
    for path, content in ((args.table, table), (args.json, line + "\n")):
        if path is not None:
            write_atomic(path, content)
    return 1 if facts["failed"] else 0


def chosen_stages(names: str | None) -> list[Stage]:
    """Returns the stages with these names, in the order of STAGES.

    Raises:
        InputError: a name is unknown.
    """
    if names is None:
        return list(STAGES)
    wanted = [name.strip() for name in names.split(",")]
    known = [stage.name for stage in STAGES]
    for name in wanted:
        if name not in known:
            raise InputError(
                f"must be names of {', '.join(known)}, got {excerpt(name)}; leave it out for all", "stages"
            )
    return [stage for stage in STAGES if stage.name in wanted]


def setup_of(args: argparse.Namespace) -> Setup:
    """Returns the device and the sizes.

    Raises:
        InputError: the device is missing, or the folder of the first generation is not a checkpoint.
    """
    device = resolve_device(args.device)
    if device.type == "mps" and args.device == "auto":
        device = resolve_device("cpu")
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # FSDP and graphs use the current device
    if device.type not in ("cuda", "cpu"):
        raise InputError(f"must be auto, cuda or cpu, got {args.device}; try auto", "device")
    folder = args.first_generation
    if folder is not None and not (folder / "config.json").is_file():
        raise InputError(f"must be the folder of a checkpoint with its config.json, got {folder}", "first_generation")
    return Setup(device, args.self_test or device.type == "cpu", folder)


def require_target(name: str, path: Path | None) -> None:
    """Raises InputError unless a file can be written there, before minutes of measurements."""
    if path is None:
        return
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise InputError(f"must be a file in a folder that exists, got {path}", name)
    try:
        tempfile.TemporaryFile(dir=path.resolve().parent).close()
    except OSError as error:
        raise InputError(f"{path} cannot be written ({cause(error)}); choose another folder", name) from None


def main(argv: list[str] | None = None, began: float | None = None) -> int:
    stopped = "figures so far are above, and no file is written"
    return cli.run(lambda args: check(args, began), build_parser(), argv, stopped=stopped)
