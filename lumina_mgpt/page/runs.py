"""Requests of the page to the engine, as streams of what the page shows. Every stream can be stopped."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

from PIL import Image

from lumina_mgpt.errors import InputError
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.results import Answer, AnswerImage, End, ImageBegun, ImageDone, Result, RowDone, Text
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.faults import ApiError
from lumina_mgpt.server.pictures import returned, settings_text
from lumina_mgpt.server.tickets import Busy, Closing, Event, Finished, Progress, Ticket

logger = logging.getLogger(__name__)

PREVIEWS = 48  # of an image; each decodes what is there so far
_UNKNOWN = (128, 128, 128)  # color of an image before its first row
_INTERVAL = 0.15  # seconds between two pictures that a browser gets
# Parameter of the library -> field of the page, where the names differ.
_FIELDS = {"prompts": "prompt", "panel": "picture", "pictures": "picture", "cfg": "guidance", "n": "number of images"}


class Desk:
    """The requests that run, by browser tab and part of the page."""

    def __init__(self) -> None:
        self._tickets: dict[tuple[str, str], Ticket] = {}

    @asynccontextmanager
    async def running(self, session: str, part: str, ticket: Ticket) -> AsyncIterator[None]:
        """Keeps a ticket during the block, and cancels it when the block ends early."""
        key = session, part
        self.stop(session, part)
        self._tickets[key] = ticket
        try:
            yield
        finally:
            ticket.cancel()  # does nothing if the ticket has ended
            if self._tickets.get(key) is ticket:
                del self._tickets[key]

    def stop(self, session: str, part: str) -> None:
        """Cancels a request, if it runs."""
        ticket = self._tickets.get((session, part))
        if ticket is not None:
            ticket.cancel()

    def leave(self, session: str) -> None:
        """Cancels all requests of a browser tab."""
        for key in [key for key in self._tickets if key[0] == session]:
            self.stop(*key)


async def _paced(ticket: Ticket, take: Callable[[Event], None]) -> AsyncIterator[None]:
    """Calls `take` with each event, and yields after events, at most once in _INTERVAL seconds.

    Raises:
        Exception: the error of the request.
    """
    changed = asyncio.Event()

    async def read() -> None:
        async for event in ticket:
            take(event)
            changed.set()

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: changed.set())
    try:
        while not reader.done():
            await changed.wait()
            changed.clear()
            yield
            await asyncio.wait((reader,), timeout=_INTERVAL)
        await reader
    finally:
        reader.cancel()


@dataclass(frozen=True)
class Images:
    """The images of a request as far as they are sampled.

    Attributes:
        pictures: one for each image: the part that is generated; None before the first row.
        results: the finished images, None for the others.
        rows: number of final rows of codes of all images together, and of all rows.
        over: whether nothing more comes.
    """

    pictures: tuple[Image.Image | None, ...]
    results: tuple[Result | None, ...]
    rows: tuple[int, int]
    over: bool = False

    @property
    def complete(self) -> bool:
        """Whether all images are finished."""
        return None not in self.results

    @property
    def words(self) -> str:
        """How far the request is."""
        if self.complete:
            return "done"
        done, of = self.rows
        return f"stopped at row {done} of {of}" if self.over else f"row {done} of {of}" if done else "waiting"


async def stream_images(
    engine: Engine, desk: Desk, place: tuple[str, str], prepared: PreparedRequest
) -> AsyncIterator[Images]:
    """Yields the images of a request while they grow. The last one has `over`.

    Args:
        place: session and part of the page, for `Desk`.

    Raises:
        InputError, Busy, Closing: as `Engine.submit` and its ticket.
    """
    request, layout = prepared.request, prepared.layout
    count, given = len(request.jobs), layout.given // layout.cols
    pictures: list[Image.Image | None] = [None] * count
    results: list[Result | None] = [None] * count
    rows = [given] * count

    def view(over: bool = False) -> Images:
        numbers = sum(rows) - given * count, (layout.rows - given) * count
        return Images(tuple(pictures), tuple(results), numbers, over)

    def take(event: Event) -> None:
        if isinstance(event, Progress):
            rows[event.image] = event.rows
            if event.picture is not None:
                pictures[event.image] = returned(event.picture, request)
        elif isinstance(event, Finished):
            result, rows[event.image] = event.result, layout.rows
            results[event.image] = result
            pictures[event.image] = _described(returned(result.image, request), prepared, result)

    ticket = engine.submit(prepared, previews=min(layout.rows, PREVIEWS))
    async with desk.running(*place, ticket):
        yield view()
        async for _ in _paced(ticket, take):
            yield view()
    yield view(over=True)


@dataclass(frozen=True)
class Reply:
    """An answer as far as it is sampled.

    Attributes:
        parts: texts and pictures in their order; the last picture may be unfinished.
        rows: number of final rows of the picture that grows, and of all its rows; None without one.
        answer: the answer, once it is complete.
        over: whether nothing more comes.
    """

    parts: tuple[str | Image.Image | AnswerImage, ...] = ()
    rows: tuple[int, int] | None = None
    answer: Answer | None = None
    over: bool = False

    @property
    def words(self) -> str:
        """How far the answer is."""
        if self.rows is not None:
            return f"row {self.rows[0]} of {self.rows[1]}"
        return "answering" if self.parts else "waiting"


async def stream_reply(desk: Desk, place: tuple[str, str], ticket: Ticket) -> AsyncIterator[Reply]:
    """Yields an answer while it is written. The last one has `over`, and no `answer` if it was stopped.

    Args:
        place: session and part of the page, for `Desk`.
        ticket: what `Engine.chat` returned with `previews`.

    Raises:
        InputError, Busy, Closing: as the ticket.
    """
    parts: list[str | Image.Image | AnswerImage] = []
    answer: Answer | None = None
    rows: tuple[int, int] | None = None

    def take(event: Event) -> None:
        nonlocal answer, rows
        _take(parts, event)
        if isinstance(event, End):
            answer = event.answer
        if isinstance(event, Progress):
            rows = event.rows, event.of
        elif not isinstance(event, RowDone):
            rows = None

    async with desk.running(*place, ticket):
        yield Reply()
        async for _ in _paced(ticket, take):
            yield Reply(tuple(parts), rows)
    yield Reply(tuple(parts), rows, answer, over=True)


def _take(parts: list[str | Image.Image | AnswerImage], event: Event) -> None:
    """Adds an event to the parts of an answer."""
    if isinstance(event, Text):
        if parts and isinstance(last := parts[-1], str):
            parts[-1] = last + event.text
        else:
            parts.append(event.text)
    elif isinstance(event, ImageBegun):
        parts.append(Image.new("RGB", event.layout.size, _UNKNOWN))
    elif isinstance(event, Progress) and event.picture is not None:
        parts[-1] = event.picture
    elif isinstance(event, ImageDone):
        parts[-1] = event.result


def _described(picture: Image.Image, prepared: PreparedRequest, result: Result) -> Image.Image:
    """Returns a picture with its settings, which become part of a PNG file."""
    picture.info = {name: str(value) for name, value in settings_text(prepared.request, result.job).items()}
    return picture


def message_of(error: Exception) -> str:
    """Returns what the page says about an error. One that a user cannot correct goes to the log."""
    if isinstance(error, InputError):
        field = _FIELDS.get(error.parameter or "", error.parameter)
        return f"{field} {error.message}" if field else error.message
    if isinstance(error, ApiError | Busy | Closing):
        return str(error)
    logger.error("a request of the page failed", exc_info=error)
    return "the server failed; its log says why"
