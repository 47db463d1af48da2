"""Progress bars of commands."""

import contextlib
import os
import sys


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
