"""What a caller of the engine holds: a ticket, whose events tell what becomes of the request."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from PIL import Image

from lumina_mgpt.results import Event as AnswerEvent
from lumina_mgpt.results import Result


@dataclass(frozen=True)
class Progress:
    """Rows of one image are final.

    Attributes:
        image: index of the image in its request, from 0.
        rows: number of final rows of codes.
        of: number of all rows.
        picture: the unfinished image at full size, grey where rows are missing; None where no preview is due.
    """

    image: int
    rows: int
    of: int
    picture: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """One image is complete. Attributes: index of the image in its request, and the image."""

    image: int
    result: Result


class Busy(Exception):
    """The queue is full. `retry_after` is the estimated time in seconds until a part of it is done."""

    def __init__(self, waiting: int, retry_after: int) -> None:
        super().__init__(f"{waiting} images wait already; try again in {retry_after} s")
        self.retry_after = retry_after


class Closing(Exception):
    """The engine shuts down and takes no more work."""


@dataclass(frozen=True)
class _Last:
    """The last event of a ticket. `error` is why the request failed, None if it is done or cancelled."""

    error: Exception | None = None


Event = Progress | Finished | AnswerEvent


class Ticket:
    """A request that the engine has accepted.

    Iterate over it once, with `for` in a thread or with `async for` in an event loop, to get its events: `Progress`
    and `Finished` of images, or the events of an answer. The iteration ends when the request is done or cancelled. It
    raises the error of a request that fails.

    Attributes:
        prompt_length: number of ids of a conversation before its answer; 0 until the answer begins.

    Args:
        on_cancel: called once, when the ticket is cancelled before its end.
    """

    def __init__(self, on_cancel: Callable[["Ticket"], None]) -> None:
        self._on_cancel = on_cancel
        self._lock = threading.Lock()
        self._early: list[Event | _Last] = []
        self._listener: Callable[[Event | _Last], None] | None = None
        self._ended = False
        self.prompt_length = 0

    @property
    def ended(self) -> bool:
        """Whether the request is done, failed or cancelled."""
        return self._ended

    def cancel(self) -> None:
        """Ends the request: images that wait are not sampled, and running ones leave their batch at the next step."""
        if self.end():
            self._on_cancel(self)

    def post(self, event: Event) -> None:
        """Reports an event, unless the ticket has ended. The engine calls it."""
        with self._lock:
            if not self._ended:
                self._report(event)

    def end(self, error: Exception | None = None) -> bool:
        """Reports the last event. Returns False if the ticket has ended before. The engine calls it."""
        with self._lock:
            if self._ended:
                return False
            self._ended = True
            self._report(_Last(error))
            return True

    def _report(self, event: Event | _Last) -> None:
        if self._listener is None:
            self._early.append(event)
        else:
            self._listener(event)

    def _listen(self, listener: Callable[[Event | _Last], None]) -> None:
        with self._lock:
            for event in self._early:
                listener(event)
            self._early, self._listener = [], listener

    def __iter__(self) -> Iterator[Event]:
        events: queue.SimpleQueue[Event | _Last] = queue.SimpleQueue()
        self._listen(events.put)
        while not isinstance(event := events.get(), _Last):
            yield event
        if event.error is not None:
            raise event.error

    async def __aiter__(self) -> AsyncIterator[Event]:
        events: asyncio.Queue[Event | _Last] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def put(event: Event | _Last) -> None:
            with suppress(RuntimeError):  # the loop is closed, so that nobody waits
                loop.call_soon_threadsafe(events.put_nowait, event)

        self._listen(put)
        while not isinstance(event := await events.get(), _Last):
            yield event
        if event.error is not None:
            raise event.error
