"""Runs the stages: each gets a share of the time, records its figures, and ends in a verdict."""

import gc
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from gpu_check.setup import Setup

OUT_OF_TIME = "out of time"
Clock = Callable[[], float]
Value = float | int | str | list[float] | None


class OutOfTime(BaseException):
    """Ends a stage whose time is over. Not an Exception, so that no library swallows it."""


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        key: its name in the JSON line.
        what: its name in the table.
        value: a number, a list of numbers, a text or None.
        measured: the value with its unit, for the table; empty for a value that is in the JSON line only.
        expected: what the value should be; empty where nothing is expected of it.
        good: whether the value is as expected.
    """

    key: str
    what: str
    value: Value
    measured: str
    expected: str = ""
    good: bool = True


@dataclass(frozen=True)
class Outcome:
    """The end of a stage.

    Attributes:
        verdict: `ok`, `failed` or `skipped`.
        reason: why it failed or was skipped, or what it left out.
        trace: the end of the traceback of an unexpected error.
    """

    name: str
    verdict: str
    reason: str
    seconds: float
    figures: tuple[Figure, ...]
    left_out: tuple[str, ...] = ()
    trace: str = ""


@dataclass
class Check:
    """What a stage gets: the setup, its time, and the place for its figures."""

    setup: Setup
    deadline: float = float("inf")
    clock: Clock = time.monotonic
    figures: list[Figure] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    traces: list[str] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.setup.device

    def record(
        self, key: str, what: str, value: Value, measured: str = "", expected: str = "", good: bool = True
    ) -> None:
        """Records and prints a figure. A figure that is not good fails the stage."""
        self.figures.append(Figure(key, what, value, measured, expected, good))
        if not measured:
            return
        note = f" (expected: {expected})" if expected else ""
        print(f"    {what}: {measured}{note}{'' if good else '  <- failed'}", flush=True)
        if not good:
            self.problems.append(f"{what}: {measured}, expected: {expected}")

    def leave_out(self, what: str, reason: str) -> None:
        """Records and prints that a part of the stage does not run."""
        self.left_out.append(f"{what}: {reason}")
        print(f"    {what}: not run, {reason}", flush=True)

    def has(self, what: str, seconds: float) -> bool:
        """Returns whether the stage has `seconds` left on a GPU; leaves `what` out otherwise."""
        if self.deadline - self.clock() >= self.setup.seconds(seconds):
            return True
        self.leave_out(what, OUT_OF_TIME)
        return False

    def fits(self, what: str, needed: float) -> bool:
        """Returns whether `needed` bytes are free on the device; leaves `what` out otherwise."""
        free = self.setup.free_bytes()
        if free is None or needed <= free:
            return True
        self.leave_out(what, f"needs {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free")
        return False

    @contextmanager
    def part(self, what: str) -> Iterator[None]:
        """Turns an error of the block into a problem of the stage, which goes on. Frees the memory of the block."""
        try:
            yield
        except Exception as error:  # any error of any library: the other parts can still tell something
            self.problems.append(f"{what}: {_summary(error)}")
            self.traces.append(traceback.format_exc())
            traceback.print_exc()
        finally:
            free_memory(self.device)


@dataclass(frozen=True)
class Stage:
    """One stage.

    Attributes:
        share: seconds that it may take on an H100, of nine minutes; time that a stage leaves goes to later ones.
        least: with fewer seconds left on a GPU, the stage does not start.
    """

    name: str
    title: str
    work: Callable[[Check], None]
    share: float
    least: float


def run_stages(
    stages: Sequence[Stage], setup: Setup, minutes: float, began: float, clock: Clock = time.monotonic
) -> list[Outcome]:
    """Runs all stages and prints their verdicts.

    Args:
        minutes: time of the whole run.
        began: the time on `clock` when the run began.
    """
    whole, passed, outcomes = sum(stage.share for stage in stages), 0.0, []
    for number, stage in enumerate(stages, start=1):
        passed += stage.share
        deadline = began + 60 * minutes * passed / whole
        print(f"[{number}/{len(stages)}] {stage.name}: {stage.title}", flush=True)
        outcome = run_stage(stage, Check(setup, deadline, clock))
        outcomes.append(outcome)
        reason = f": {outcome.reason}" if outcome.reason else ""
        print(f"{stage.name}: {outcome.verdict}{reason} ({outcome.seconds:.1f} s)\n", flush=True)
    return outcomes


def run_stage(stage: Stage, check: Check) -> Outcome:
    """Runs one stage to its end, an error or its deadline."""
    began = check.clock()
    left, stopped = check.deadline - began, False
    if left <= 0 or left < check.setup.seconds(stage.least):
        return Outcome(stage.name, "skipped", f"not run, {OUT_OF_TIME}", 0.0, ())
    try:
        with _stopped_after(left), check.part(stage.name):
            stage.work(check)
    except OutOfTime:
        stopped = True
        check.left_out.append(f"the rest: {OUT_OF_TIME}")
    finally:
        free_memory(check.device)
    verdict, reason = "ok", "; ".join(check.left_out)
    if check.problems:
        verdict, reason = "failed", "; ".join(check.problems)
    elif not check.figures:
        verdict, reason = "skipped", f"stopped, {OUT_OF_TIME}" if stopped else reason or "it measured nothing"
    trace = "\n".join("\n".join(trace.splitlines()[-12:]) for trace in check.traces)
    seconds = check.clock() - began
    return Outcome(stage.name, verdict, reason, seconds, tuple(check.figures), tuple(check.left_out), trace)


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in the block after this time, in the main thread of a POSIX system. A native call ends first.

    The exception comes again every second, in case a destructor swallows it.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, min(max(seconds, 1e-3), 1e6), 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def free_memory(device: torch.device) -> None:
    """Frees the memory of objects that nothing uses, and the GPU memory that torch keeps for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _summary(error: BaseException) -> str:
    """Returns class and text of an error in one line of at most 300 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]
