"""The engine: one thread that runs the model, and a bounded queue in front of it.

    engine = Engine(pipeline)
    ticket = engine.submit(GenerationRequest.of("a hedgehog", n=2, seed=5), previews=3)
    for event in ticket:
        ...

Images of one layout and the same settings that wait at the same time share a batch. Each image has the seed and repeat
of its own request, so it is the image that the command line makes.
"""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from lumina_mgpt.conversation import AnswerStream
from lumina_mgpt.errors import InputError
from lumina_mgpt.panels import Panel
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.request import GenerationRequest
from lumina_mgpt.results import End, ImageBegun, Result, RowDone
from lumina_mgpt.server.batch import AllLeft, Batch, Order, Work, preview_rows
from lumina_mgpt.server.tickets import Busy, Closing, Finished, Progress, Ticket

logger = logging.getLogger(__name__)

LARGEST_BATCH = 16  # images; on two CPU cores the demo makes twice as many images a second as with 8
QUEUE_LIMIT = 256  # images and answers that wait
GATHER_SECONDS = 0.02  # an idle engine waits this long for requests that arrive together


class Observer:
    """Is told about the engine's work, and ignores it. Methods of a subclass must be fast and must not raise."""

    def batch(self, images: int) -> None:
        """A batch of images begins."""

    def image(self, seconds: float, codes: int) -> None:
        """An image is finished, so many seconds after its request."""

    def answer(self, seconds: float, ids: int) -> None:
        """An answer is finished."""

    def cancelled(self) -> None:
        """A request is cancelled before its end."""

    def refused(self) -> None:
        """A request is refused because the queue is full."""


@dataclass
class _Chat:
    """An answer that waits. It runs alone, because a conversation has a cache of its own."""

    ticket: Ticket
    start: Callable[[], AnswerStream]
    previews: int = 0
    arrived: float = field(default_factory=time.monotonic)


class Engine:
    """Runs requests of many callers on one pipeline. All methods can be called from any thread.

    Args:
        pipeline: the loaded checkpoint. Nobody else may use it while the engine runs.
        name: name of the model in answers.
        batch_size: largest number of images of a batch (default: as many as fit the pipeline's cache limit, at most
            16).
        queue_limit: largest number of images and answers that wait.
        gather: seconds that an idle engine waits for requests that arrive together.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        name: str = "lumina-mgpt",
        batch_size: int | None = None,
        queue_limit: int = QUEUE_LIMIT,
        gather: float = GATHER_SECONDS,
    ) -> None:
        self.pipeline, self.checkpoint, self.name = pipeline, pipeline.checkpoint, name
        self.queue_limit = queue_limit
        self.observer = Observer()
        self._batch_size, self._gather = batch_size, gather
        self._changed = threading.Condition()
        self._queue: deque[Work | _Chat] = deque()
        self._closing = False
        self._seconds = 1.0  # moving average of the time of one image or answer
        self.running = 0  # images and answers that run
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Number of images and answers that wait."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._thread.is_alive() and not self._closing

    def submit(self, request: GenerationRequest | PreparedRequest, previews: int = 0) -> Ticket:
        """Accepts a request for images.

        Args:
            previews: number of previews of each image, after evenly spaced rows. With the number of rows of codes or
                more, there is one after each row.

        Raises:
            InputError: the request does not fit the checkpoint.
            Busy: the queue is full.
            Closing: the engine shuts down.
        """
        prepared = request if isinstance(request, PreparedRequest) else self.checkpoint.prepare(request)
        ticket = Ticket(self._remove)
        order = Order(prepared, ticket, previews)
        self._enqueue([Work(order, job, image) for image, job in enumerate(prepared.request.jobs)])
        return ticket

    def chat(self, turns: Sequence[tuple[str, Sequence[str | Panel]]], *, previews: int = 0, **settings: Any) -> Ticket:
        """Accepts a conversation that the model answers. The events of the ticket are those of `Pipeline.chat`.

        Args:
            turns, settings: arguments of `Pipeline.chat`. An error in them is raised by the ticket's iterator.
            previews: number of previews of each image, as for `submit`; each is a `Progress` among the events.

        Raises:
            Busy: the queue is full.
            Closing: the engine shuts down.
        """
        ticket = Ticket(self._remove)
        self._enqueue([_Chat(ticket, lambda: self.pipeline.chat(turns, **settings), previews)])
        return ticket

    def drain(self) -> None:
        """Takes no more requests and refuses those that wait. What runs goes on."""
        with self._changed:
            self._closing = True
            waiting = {item.ticket for item in self._queue}
            self._queue.clear()
            self._changed.notify_all()
        for ticket in waiting:
            ticket.end(Closing("the server shuts down"))

    def close(self) -> None:
        """Does `drain`, and returns when what runs is finished."""
        self.drain()
        self._thread.join()

    def _enqueue(self, items: Sequence[Work | _Chat]) -> None:
        with self._changed:
            if self._closing:
                raise Closing("the server shuts down")
            waiting = len(self._queue)
            if waiting + len(items) > self.queue_limit:
                self.observer.refused()
                raise Busy(waiting, max(1, math.ceil(self._seconds * len(items))))
            self._queue.extend(items)
            self._changed.notify_all()

    def _remove(self, ticket: Ticket) -> None:
        self.observer.cancelled()
        self._discard({ticket})

    def _discard(self, tickets: set[Ticket]) -> None:
        """Removes what waits of these requests."""
        with self._changed:
            self._queue = deque(item for item in self._queue if item.ticket not in tickets)

    def _run(self) -> None:
        """Runs batches and answers until the engine is closed."""
        while (items := self._next()) is not None:
            if not items:
                continue
            self.running, begun = len(items), time.monotonic()
            try:
                if isinstance(items[0], _Chat):
                    self._answer(items[0])
                else:
                    self._sample([item for item in items if isinstance(item, Work)])
            except Exception as error:  # whatever fails, the engine goes on with the next requests
                if not isinstance(error, InputError):
                    logger.exception("a batch failed")
                for item in items:
                    item.ticket.end(error)
                self._discard({item.ticket for item in items})
            finally:
                self._seconds += 0.2 * ((time.monotonic() - begun) / len(items) - self._seconds)
                self.running = 0

    def _next(self) -> list[Work | _Chat] | None:
        """Waits for work, and returns the images of one batch or one answer; None when the engine is closed."""
        with self._changed:
            if not self._queue and not self._closing:
                self._changed.wait_for(lambda: self._queue or self._closing)
                if len(self._queue) < (self._batch_size or LARGEST_BATCH):
                    self._changed.wait_for(lambda: self._closing, timeout=self._gather)
            if self._closing:
                return None
            if not self._queue:  # cancelled meanwhile
                return []
            first = self._queue[0]
            if isinstance(first, _Chat):
                return [self._queue.popleft()]
            fitting = [item for item in self._queue if isinstance(item, Work) and item.key == first.key]
            batch = fitting[: self._largest_batch(fitting)]
            taken = set(map(id, batch))
            self._queue = deque(item for item in self._queue if id(item) not in taken)
            return list(batch)

    def _largest_batch(self, works: Sequence[Work]) -> int:
        if self._batch_size is not None:
            return self._batch_size
        prepared = works[0].order.prepared
        longest = max(len(start) for work in works for start in work.order.prepared.starts)
        request = prepared.request
        return self.pipeline.batch_size(
            longest, prepared.layout, request.sampling, request.speculation, largest=LARGEST_BATCH
        )

    def _sample(self, works: list[Work]) -> None:
        works = [work for work in works if not work.ticket.ended and self._encodes(work)]
        if works:
            self.observer.batch(len(works))
            Batch(self.pipeline, works).run(self._finish)

    def _encodes(self, work: Work) -> bool:
        """Encodes the pictures of a request. If that fails, ends this request alone and returns False."""
        try:
            work.order.encoded(self.pipeline)
            return True
        except Exception as error:
            if not isinstance(error, InputError):
                logger.exception("a picture cannot be encoded")
            work.ticket.end(error)
            return False

    def _finish(self, work: Work, result: Result) -> None:
        order = work.order
        self.observer.image(time.monotonic() - order.arrived, result.codes.numel())
        order.left -= 1
        work.ticket.post(Finished(work.image, result))
        if not order.left:
            work.ticket.end()

    def _answer(self, chat: _Chat) -> None:
        def check() -> None:
            if chat.ticket.ended:
                raise AllLeft

        with suppress(AllLeft):
            check()
            stream = chat.start()
            stream.before_each_step(check)
            chat.ticket.prompt_length = stream.prompt_length
            image = 0
            for event in stream:
                check()
                chat.ticket.post(event)
                if isinstance(event, ImageBegun):
                    image = event.index
                elif isinstance(event, RowDone) and len(event.codes) in preview_rows(event.layout, chat.previews):
                    picture = self.pipeline.preview(event.codes[None], event.layout)[0]
                    chat.ticket.post(Progress(image, len(event.codes), event.layout.rows, picture))
                if isinstance(event, End):
                    self.observer.answer(time.monotonic() - chat.arrived, len(event.answer.ids))
            chat.ticket.end()
