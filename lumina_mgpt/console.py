"""What a command prints and how it is stopped: neither a lost reader nor an encoding ends its work."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import TextIO

_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # besides SIGINT, which Python turns into KeyboardInterrupt; as available


class Stopped(KeyboardInterrupt):
    """A signal other than Ctrl-C that asks the program to end; `number` is the signal's."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class SafeStream:
    """A text stream that never raises: what it cannot encode is escaped, what it cannot write is dropped.

    A reader that leaves (`| head -1`), a closed stream and a full disk behind a redirection are no reason to end a run.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """`stream` None stands for a stream that was closed before Python started."""
        self._stream = stream

    def write(self, text: str) -> int:
        if self._stream is not None:
            try:
                self._stream.write(_escaped(text, self.encoding))
            except (OSError, ValueError):
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if self._stream is not None:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._give_up()

    def isatty(self) -> bool:
        with suppress(OSError, ValueError, AttributeError):
            return self._stream.isatty()
        return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Sends what is buffered, and everything later, to the null device; else Python complains when it exits."""
        stream, self._stream = self._stream, None
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _open_closed_descriptors() -> None:
    """Opens the null device where descriptor 0, 1 or 2 is closed, or the next file opened would receive what libraries
    print there."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _escaped(text: str, encoding: str) -> str:
    """`text` with backslash escapes for what `encoding` does not have."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


@contextmanager
def safe_output() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr by streams that never raise."""
    _open_closed_descriptors()
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            safe = SafeStream(stream)
            stack.enter_context(redirect(safe))
            stack.callback(safe.flush)
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises `Stopped` in the main thread at SIGTERM and SIGHUP, so that a command removes what it has not finished.

    A signal that was ignored before (`nohup`) stays ignored. Further ones are ignored while the command cleans up: at
    the end of a terminal both the kernel and the shell send SIGHUP. Ctrl-C still interrupts the clean-up.
    """
    handlers = {}

    def stop(number: int, frame: object) -> None:
        for other in handlers:
            signal.signal(other, signal.SIG_IGN)
        raise Stopped(number)

    for number in (getattr(signal, name) for name in _SIGNALS if hasattr(signal, name)):
        with suppress(ValueError):  # not in the main thread: the caller owns the signals
            if signal.getsignal(number) == signal.SIG_DFL:
                handlers[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
