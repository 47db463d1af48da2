"""Runs the app with uvicorn: opens the socket, reports the address, and shuts down in order."""

import asyncio
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI

from lumina_mgpt.errors import InputError
from lumina_mgpt.io import cause
from lumina_mgpt.server.engine import Engine

_BACKLOG = 2048


def open_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that listens.

    Args:
        port: 0 ... 65535; 0 takes a free one.

    Raises:
        InputError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except (OSError, OverflowError) as error:
        name = "host" if isinstance(error, socket.gaierror) else "port"
        value = host if name == "host" else port
        reason = cause(error) if isinstance(error, OSError) else "out of range"
        raise InputError(f"{value} cannot be used ({reason}); choose another {name}", name) from None


def address(listener: socket.socket) -> str:
    """Returns the URL of a listening socket, for a browser on the same machine."""
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """At the first signal, refuses what waits, finishes what runs, and ends.

    Args:
        on_ready: called when requests are accepted.
    """

    def __init__(self, app: FastAPI, engine: Engine, on_ready: Callable[[], None]) -> None:
        super().__init__(uvicorn.Config(app, log_config=None, access_log=False))
        self._engine, self._on_ready = engine, on_ready
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self.started:
            self._on_ready()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._loop is not None:  # later, because the signal may come while this thread holds the engine's lock
            self._loop.call_soon_threadsafe(self._engine.drain)
        super().handle_exit(signal.Signals(sig), frame)
