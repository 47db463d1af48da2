"""The progress bars that commands show."""

import contextlib
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm


_BAR = "{l_bar}{bar}| {n_fmt}/{total_fmt} codes, {rate_noinv_fmt}, {elapsed} elapsed, {remaining} left"


def bar_interval() -> float:
    """Returns the time between updates of a progress bar in seconds: 0.1 on a terminal, 10 in a log file."""
    return 0.1 if sys.stderr.isatty() else 10


def codes_bar(images: int, codes: int, shown: bool) -> "tqdm":
    """Returns a bar that counts codes. Only the first of several processes shows one."""
    from tqdm import tqdm

    return tqdm(
        total=codes,
        unit=" codes",
        desc=f"{images} image{'s' * (images > 1)}",
        dynamic_ncols=True,
        bar_format=_BAR,
        disable=not shown,
        mininterval=bar_interval(),
    )


class ReadingBar(contextlib.AbstractContextManager):
    """A progress bar that counts weights while they are read. It serves as the `on_read` of `load_model`.

    The bar does not appear before the first weight is read. The checks are done by then, so that an error of a check
    prints a single line and no bar.

    Args:
        words: text in front of the bar.
        delay: seconds from the first weight until the bar appears.
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
