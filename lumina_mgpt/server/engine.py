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
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from lumina_mgpt.conversation import AnswerStream
from lumina_mgpt.panels import Panel
from lumina_mgpt.pipeline import Pipeline
from lumina_mgpt.preparation import PreparedRequest
from lumina_mgpt.request import GenerationRequest, ImageJob
from lumina_mgpt.server.batch import Batch, Work, settings_key
from lumina_mgpt.server.tickets import Busy, Closing, Ticket

logger = logging.getLogger(__name__)

LARGEST_BATCH = 16  # images; on two CPU cores the demo makes twice as many images a second as with 8
QUEUE_LIMIT = 256  # images and answers that wait
GATHER_SECONDS = 0.02  # an idle engine waits this long for requests that arrive together


class Observer(Protocol):
    """What wants to know about the engine's work, such as metrics. Its methods must be fast and must not raise."""

    def batch(self, images: int) -> None: ...

    def image(self, seconds: float, codes: int) -> None: ...

    def answer(self, seconds: float, ids: int) -> None: ...

    def cancelled(self) -> None: ...

    def refused(self) -> None: ...


class Silent:
    """An observer that ignores everything."""

    def batch(self, images: int) -> None:
        pass

    def image(self, seconds: float, codes: int) -> None:
        pass

    def answer(self, seconds: float, ids: int) -> None:
        pass

    def cancelled(self) -> None:
        pass

    def refused(self) -> None:
        pass


@dataclass
class _Chat:
    """An answer that waits. It runs alone, because a conversation has a cache of its own."""

    ticket: Ticket
    start: Callable[[], AnswerStream]
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
        self.queue_limit, self.observer = queue_limit, Silent()  # type: Observer
        self._batch_size, self._gather = batch_size, gather
        self._changed = threading.Condition()
        self._queue: deque[Work | _Chat] = deque()
        self._closing = False
        self._seconds = 1.0  # moving average of the time of one image
        self.running = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
