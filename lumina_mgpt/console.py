"""Output streams that never raise, and signals that raise exceptions."""

import os
import signal
import sys
import unicodedata
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO

_SIGNALS = ("SIGTERM", "SIGHUP", "SIGBREAK")  # besides SIGINT, which Python turns into KeyboardInterrupt; as available


class Stopped(KeyboardInterrupt):
    """Raised for a signal other than Ctrl-C that ends the program; `number` is the signal's number."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


class SafeStream:
    """A text stream that never raises. It escapes what it cannot encode and drops what it cannot write.

    A run therefore continues when the reader of its pipe exits (`| head -1`), a stream is closed or a disk is full.
    """

    def __init__(self, stream: TextIO | None) -> None:
        """Wraps a stream; None is a stream that was closed before Python started."""
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
            return self._stream is not None and self._stream.isatty()
        return False

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def __getattr__(self, name: str) -> object:
        return getattr(self._stream, name)

    def _give_up(self) -> None:
        """Redirects buffered and later output to the null device; otherwise Python reports an error at exit."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, stream.fileno())
            os.close(null)


def _open_closed_descriptors() -> None:
    """Opens the null device for closed descriptors 0, 1 and 2.

    Otherwise the next file that is opened gets the number, and libraries print into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number, which is this one


def _escaped(text: str, encoding: str) -> str:
    """Returns `text` with backslash escapes for characters that are not in `encoding`."""
    return text.encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str) -> str:
    """Returns `text` without control characters, which could steer a terminal, but with line breaks and tabs."""
    return "".join(letter for letter in text if letter in "\n\t" or unicodedata.category(letter) != "Cc")


@contextmanager
def safe_output() -> Iterator[None]:
    """Replaces sys.stdout and sys.stderr by streams that never raise, until the block ends."""
    _open_closed_descriptors()
    with ExitStack() as stack:
        for redirect, stream in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            safe = SafeStream(stream)
            stack.enter_context(redirect(safe))
            stack.callback(safe.flush)
        yield


@contextmanager
def stoppable() -> Iterator[None]:
    """Raises `Stopped` in the main thread at SIGTERM and SIGHUP, so that a command can remove unfinished files.

    A signal that the process already ignores (`nohup`) stays ignored. After the first signal, further SIGTERM and
    SIGHUP are ignored, because both the kernel and the shell send SIGHUP when a terminal closes. Ctrl-C still
    interrupts the clean-up.
    """
    handlers: dict[int, Any] = {}

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


@contextmanager
def stops_delayed() -> Iterator[None]:
    """Delays Ctrl-C, SIGTERM and SIGHUP until the block ends, so that a file and the count of files stay in step."""
    handlers: dict[int, Any] = {}
    waiting: list[int] = []
    for number in (getattr(signal, name) for name in ("SIGINT", *_SIGNALS) if hasattr(signal, name)):
        with suppress(ValueError):  # not in the main thread: the caller owns the signals
            if callable(signal.getsignal(number)):
                handlers[number] = signal.signal(number, lambda number, frame: waiting.append(number))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        if waiting:
            signal.raise_signal(waiting[0])
