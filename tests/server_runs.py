"""Running servers, and OpenAI's client for them."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass

from openai import OpenAI

from lumina_mgpt.server.app import create_app
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.running import Server, address, open_socket

PATIENCE = 60  # seconds for what takes one on an idle machine


@dataclass
class Served:
    """A server that runs in a thread."""

    url: str
    engine: Engine
    server: Server
    client: OpenAI


@contextlib.contextmanager
def serving(engine: Engine, key: str | None = None, **options: object) -> Iterator[Served]:
    """Serves an engine until the block ends. Options are those of `create_app`."""
    ready = threading.Event()
    with open_socket("127.0.0.1", 0) as listener:
        server = Server(create_app(engine, api_key=key, **options), engine, ready.set)
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        assert ready.wait(PATIENCE)
        url = address(listener)
        try:
            yield Served(url, engine, server, OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0))
        finally:
            server.should_exit = True
            thread.join(PATIENCE)
            assert not thread.is_alive()


@dataclass
class Gate:
    """Holds the model before a forward, so that a test decides what happens meanwhile."""

    reached: threading.Event
    opened: threading.Event
    rows: list[int]

    def open(self) -> None:
        self.opened.set()
