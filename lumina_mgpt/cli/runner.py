"""Runs a command, prints its messages on stderr and returns its exit status."""

import argparse
import contextlib
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

from lumina_mgpt.cli.parser import Parser
from lumina_mgpt.console import Stopped, safe_output, stoppable
from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause, remedy

REFUSED = 2


def run(
    work: Callable[[argparse.Namespace], int | None],
    parser: Parser,
    argv: Sequence[str] | None,
    stopped: str = "",
    smaller: str = "--batch_size 1, a smaller --window, --width or --height, or --dtype bf16",
) -> int:
    """Parses the options, calls `work` with them and returns the exit status.

    The status is what `work` returns, with 0 for None. It is 2, with one line on stderr, after an InputError, for a
    missing or unreadable file, and for a lack of memory. After signal n, it is 128 + n, such as 130 for Ctrl-C. Other
    exceptions are bugs and keep their traceback.

    Args:
        work: the command, a function of the parsed options.
        parser: parser of the command's options.
        argv: options to parse; None: those of this process.
        stopped: end of the message after a signal. If the KeyboardInterrupt has a text, that text replaces it.
        smaller: options of the command that save memory.
    """
    with safe_output(), stoppable(), _logged():
        try:
            return work(parser.parse_args(argv)) or 0
        except InputError as error:
            return _refuse(parser.render(error))
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
            if _lost_process(error):
                return _refuse("another process of this run ended or does not answer; its own message says why")
            if not isinstance(error, MemoryError) and not re.search(r"out of memory|can't allocate memory", str(error)):
                raise
            return _refuse(f"out of memory; try {smaller}")


def _lost_process(error: BaseException) -> bool:
    """Returns whether an exception says that a collective call of torch failed: a process ended, or was too late."""
    if "torch" not in sys.modules:
        return False
    import torch.distributed as dist

    gloo = r"gloo/transport|Connection (closed|reset) by peer|Broken pipe"
    return isinstance(error, getattr(dist, "DistError", ())) or bool(re.search(gloo, str(error)))


def _signal_of(stop: BaseException | None) -> int:
    """Returns the number of the signal behind an exception that a command may have raised from a `Stopped`."""
    while stop is not None and not isinstance(stop, Stopped):
        stop = stop.__context__
    return signal.SIGINT if stop is None else stop.number


@contextlib.contextmanager
def _logged() -> Iterator[None]:
    """Prints the package's log on stderr. Of several processes, only the first prints more than warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("lumina_mgpt")
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return REFUSED
