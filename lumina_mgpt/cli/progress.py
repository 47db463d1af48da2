"""Progress bars of commands."""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


def bar_interval() -> float:
    """Returns seconds between updates of a progress bar: 0.1 on a terminal, 10 in a log file."""
    return 0.1 if sys.stderr.isatty() else 10


class ReadingBar(contextlib.AbstractContextManager):
    """A progress bar for the `on_read` of `load_model`.

    It appears with the first weight, after the checks, so that their errors stay a single line.

    Args:
        words: description of the bar.
        delay: seconds before the bar appears.
    """

    def __init__(self, words: str, delay: float = 0) -> None:
        self.words, self.delay = words, delay
        self.bar: tqdm | None = None

    def __call__(self, done: int, total: int) -> None:
        from tqdm import tqdm

        if self.bar is None:
            self.bar = tqdm(
                total=total,
                unit=" weights",
                unit_scale=True,
                desc=self.words,
                delay=self.delay,
                dynamic_ncols=True,
                mininterval=bar_interval(),
                disable=os.environ.get("RANK", "0") != "0",  # one process shows it
            )
        self.bar.update(done - self.bar.n)

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
