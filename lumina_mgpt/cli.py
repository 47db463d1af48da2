"""What the entry scripts share: groups of options, checks that need no weights, and how a run ends.

Nothing here imports torch before it must, so that `--help` and most errors come at once.
"""

import argparse
import contextlib
import difflib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lumina_mgpt.config import (
    COUPLINGS,
    DEFAULT_INT4_GROUP,
    INT4_GROUPS,
    SamplingConfig,
    Speculation,
    check_counts,
    excerpt,
)
from lumina_mgpt.console import Stopped, safe_output, stoppable
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, lines_of, read_text, remedy

if TYPE_CHECKING:
    import torch

    from lumina_mgpt.pipeline import Checkpoint, Pipeline

DEMO = "assets/demo"
_PROJECT = Path(__file__).resolve().parent.parent
REFUSED = 2
PROMPTS_FILE = "prompts.txt"  # of a checkpoint folder: prompts that it can do

EXAMPLE_PROMPTS = (
    "A red fox curled up asleep in fresh snow under a birch tree, soft morning light, close-up photograph",
    "An old lighthouse on a rocky cape at dusk, its beam crossing a stormy violet sky, oil painting",
    "A bowl of ramen with a soft-boiled egg and spring onions on a wooden counter, steam rising, food photography",
    "A glass greenhouse full of giant ferns, sunbeams through the panes, a small robot watering the plants",
    "A paper-cut landscape of mountains, a river and a hot-air balloon in shades of teal and orange",
)


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows a default where an option has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        bare = action.default is None or action.default is False
        return action.help if bare else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """An argument parser that raises InputError instead of printing its usage, and takes no abbreviated options."""

    def __init__(self, **kwargs) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **kwargs)

    def error(self, message: str):
        message = message.removeprefix("argument ").replace(": must", " must", 1)
        raise InputError(f"{message}; --help lists every option")


def whole(text: str) -> int:
    """Type of a whole-number option."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number, got {excerpt(text)}") from None


def number(text: str) -> float:
    """Type of an option that takes any number."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number, got {excerpt(text)}") from None


def add_checkpoint_options(parser: argparse.ArgumentParser) -> None:
    """Options that say which weights run, and where."""
    group = parser.add_argument_group("checkpoint and device")
    group.add_argument("--model_path", default=DEMO, help="checkpoint folder, or hub id")
    group.add_argument("--movqgan_path", help="MoVQGAN weights, where the checkpoint folder holds none")
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="auto: a GPU if any")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "fp32", "bf16", "fp16"),
        help="of the transformer; auto: bf16 on CUDA, on a CPU fp32 (bf16 with --quant, or where memory is short)",
    )  # fmt: skip
    group.add_argument("--attn", default="sdpa", choices=("sdpa", "flash"), help="flash needs flash-attn and a GPU")
    group.add_argument("--quant", action="store_true", help="int4 weights, made while loading; quantize.py keeps them")
    group.add_argument(
        "--quant_group", type=whole, choices=INT4_GROUPS,
        help=f"weights that share a scale; fewer: nearer to the original, larger (default: {DEFAULT_INT4_GROUP})",
    )  # fmt: skip
    group.add_argument(
        "--cache_dtype", default="auto", choices=("auto", "int8"),
        help="of keys and values; auto: the transformer's; int8: half of bf16, a scale a token and head",
    )  # fmt: skip
    group.add_argument(
        "--compile", action="store_true",
        help="compile the steps: minutes before the first image, for many of them or large models",
    )  # fmt: skip
    group.add_argument(
        "--movqgan_dtype", default="fp32", choices=("fp32", "bf16", "fp16"), help="of the image tokenizer"
    )


def load_pipeline(args: argparse.Namespace, checkpoint: "Checkpoint", device: "torch.device") -> "Pipeline":
    """The pipeline of an opened checkpoint that `add_checkpoint_options` asks for."""
    import torch

    from lumina_mgpt.devices import DTYPES
    from lumina_mgpt.pipeline import Pipeline

    stored = checkpoint.config.int4_group
    with ReadingBar("int4 while loading" if args.quant and not stored else "loading", delay=3) as bar:
        return Pipeline.from_pretrained(
            checkpoint, device, args.dtype, attn=args.attn, quant=quant_group(args, stored), on_read=bar,
            cache_dtype=torch.int8 if args.cache_dtype == "int8" else None, movqgan_dtype=DTYPES[args.movqgan_dtype],
            compile=args.compile,
        )  # fmt: skip


def bar_interval() -> float:
    """Seconds between two states of a progress bar: a log file wants a line now and then only."""
    return 0.1 if sys.stderr.isatty() else 10


class ReadingBar(contextlib.AbstractContextManager):
    """A progress bar for `load_model`'s `on_read`: from the first weight on, and not before `delay` seconds are gone.

    Not earlier, so that an error of the checks that come first is one line.
    """

    def __init__(self, words: str, delay: float = 0) -> None:
        self.words, self.delay, self.bar = words, delay, None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                total=total, unit=" weights", unit_scale=True, desc=self.words, delay=self.delay, dynamic_ncols=True,
                mininterval=bar_interval(), disable=os.environ.get("RANK", "0") != "0",  # one process shows it
            )  # fmt: skip
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()


def quant_group(args: argparse.Namespace, stored: int | None = None) -> int | None:
    """The group size that --quant asks for, None without it; `stored` is that of a checkpoint which is int4 already."""
    if args.quant:
        return args.quant_group or stored or DEFAULT_INT4_GROUP
    if args.quant_group is not None:
        raise InputError(f"--quant_group {args.quant_group} means nothing without --quant; add that, or leave it out")
    return None


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how codes are drawn."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--cfg", type=number, default=SamplingConfig.cfg, help="guidance scale; 1: no guidance")
    group.add_argument(
        "--top_k", type=whole, default=SamplingConfig.top_k,
        help="draw from this many likeliest codes (never more than there are); 1: always the likeliest",
    )  # fmt: skip
    group.add_argument("--temperature", type=number, default=SamplingConfig.temperature, help="> 0; less is smoother")
    group.add_argument("--seed", type=whole, default=SamplingConfig.seed, help="same seed and prompt, same image")


def add_batch_size(group) -> None:
    group.add_argument(
        "--batch_size", type=whole, help="images made at once; changes speed and memory only (default: up to 8)"
    )


def add_speculation_options(parser: argparse.ArgumentParser) -> None:
    """Options of speculative Jacobi sampling."""
    group = parser.add_argument_group("speculation")
    group.add_argument(
        "--speculative_jacobi", action="store_true",
        help="several codes a forward; exact: the same image, or with --coupling maximal one of the same distribution",
    )  # fmt: skip
    group.add_argument(
        "--fast", action="store_true",
        help="times a few forwards and takes the quickest window and coupling, for long runs --compile too; exact",
    )  # fmt: skip
    group.add_argument("--coupling", choices=COUPLINGS, help=f"how drafts are judged (default: {Speculation.coupling})")
    group.add_argument("--window", type=whole, help="drafts judged by one forward (default: by device and precision)")


def speculation_settings(args: argparse.Namespace) -> Speculation | None:
    """The speculation options of a command line, checked; None where there is to be none."""
    given = {name: getattr(args, name) for name in ("coupling", "window") if getattr(args, name) is not None}
    if args.fast and (args.speculative_jacobi or given):
        raise InputError("--fast chooses --speculative_jacobi, --coupling and --window itself; leave those out, or it")
    if args.speculative_jacobi:
        return Speculation(**given)
    for name, value in given.items():
        raise InputError(f"--{name} {value} means nothing without --speculative_jacobi; add that, or leave it out")
    return None


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Options that say where pictures go."""
    group = parser.add_argument_group("output")
    group.add_argument("--save_path", default="outputs", help="folder for the pictures")
    group.add_argument("--overwrite", action="store_true", help="replace pictures of the same name")


def checkpoint_path(text: str) -> str | Path:
    """The demo checkpoint is found from any working folder; every other path or hub id is taken as given."""
    return _PROJECT / DEMO if text == DEMO and not Path(DEMO).exists() else text


def sampling_settings(args: argparse.Namespace) -> SamplingConfig:
    """The sampling options of a command line, checked."""
    check_counts(getattr(args, "n", 1), getattr(args, "batch_size", None))
    return SamplingConfig(cfg=args.cfg, top_k=args.top_k, temperature=args.temperature, seed=args.seed)


def read_prompts(prompts: Sequence[str] | None, file: str | None, option: str = "--prompt_file") -> list[str]:
    """Prompts of the command line, then those of the file, one a line; blank lines there mean nothing.

    Args:
        option: what messages call the file.

    Raises:
        InputError: a prompt is empty, or the file cannot be read, is not UTF-8, or holds no prompt.
    """
    result = list(prompts or ())
    if any(not prompt.strip() for prompt in result):
        raise InputError("--prompt must not be empty, got ''; say what the image should show")
    if file is not None:
        lines = _not_blank(read_text(file, option))
        if not lines:
            raise InputError(f"{option} {file} must hold at least one prompt, got none; write one a line")
        result += lines
    return result


def example_prompts(folder: Path) -> list[str]:
    """Five prompts that the checkpoint in `folder` can do: its own `prompts.txt`, else photographs and paintings.

    Raises:
        InputError: that file cannot be read, or is not UTF-8.
    """
    file = folder / PROMPTS_FILE
    return (_not_blank(read_text(file)) if file.exists() else [])[:5] or list(EXAMPLE_PROMPTS)


def known_names(folder: Path) -> list[str]:
    """What a small checkpoint can draw, from its `names.txt`; empty for one that has no such list."""
    try:
        return _not_blank(read_text(folder / "names.txt"))
    except InputError:  # only hints are made of it
        return []


def unknown_hint(prompt: str, names: Sequence[str]) -> str | None:
    """A hint for a prompt that mentions nothing of `names`, with those that are spelt alike; None if it does."""
    text = prompt.lower()
    if not names or any(re.search(rf"\b{_plural_too(name.lower())}\b", text) for name in names):
        return None
    words = re.findall(r"[\w'-]+", text)
    phrases = [" ".join(words[i : i + size]) for size in (3, 2, 1) for i in range(len(words) - size + 1)]
    close: dict[str, float] = {}
    for phrase in phrases:
        for name in difflib.get_close_matches(phrase, names, n=3, cutoff=0.7):
            close[name] = max(close.get(name, 0.0), difflib.SequenceMatcher(None, phrase, name).ratio())
    best = sorted(close, key=lambda name: -close[name])[:3]
    suggestion = f"did you mean {' or '.join(best)}?" if best else f"it knows {', '.join(names[:3])} and so on"
    return f"{prompt!r} names nothing of the {len(names)} things that this checkpoint knows; {suggestion} (names.txt)"


def _plural_too(name: str) -> str:
    """A pattern for a name and its regular plural: cat, cats; box, boxes; cherry, cherries."""
    stem = re.escape(name)
    return f"(?:{stem}(?:e?s)?|{stem[:-1]}ies)" if name.endswith("y") else f"{stem}(?:e?s)?"


def run(
    work: Callable[[argparse.Namespace], int | None], parser: Parser, argv: Sequence[str] | None, stopped: str = ""
) -> int:
    """Parses and works; returns the exit status.

    That is what `work` returns (None: 0), 2 with a one-line error on stderr for what a user can correct, and 128 + n
    for signal n (130: Ctrl-C), whose message ends in `stopped` or the text of the KeyboardInterrupt. Other exceptions
    are bugs and keep their traceback.
    """
    with safe_output(), stoppable(), _logged():
        try:
            return work(parser.parse_args(argv)) or 0
        except InputError as error:
            return _refuse(str(error))
        except OSError as error:
            if error.filename is None:
                raise
            return _refuse(f"{error.filename}: {cause(error)}; {remedy(error)}")
        except KeyboardInterrupt as stop:
            number = _signal_of(stop)
            name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            print(f"stopped by {name}; {str(stop) or stopped or 'finished images are kept'}", file=sys.stderr)
            return 128 + number
        except (RuntimeError, MemoryError) as error:
            if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
                raise
            return _refuse(
                "out of memory; try --batch_size 1, a smaller --window or --width and --height, or --dtype bf16"
            )


def _signal_of(stop: KeyboardInterrupt) -> int:
    """Number of the signal behind an exception: a command may have replaced a `Stopped` to say what is kept."""
    while stop is not None and not isinstance(stop, Stopped):
        stop = stop.__context__
    return signal.SIGINT if stop is None else stop.number


@contextlib.contextmanager
def _logged():
    """Prints what the package logs on stderr."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("lumina_mgpt")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return REFUSED


def _not_blank(text: str) -> list[str]:
    return [line.strip() for line in lines_of(text) if line.strip()]
