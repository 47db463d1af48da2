"""The app: OpenAI's API over an engine, with `/health` and `/metrics`."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse

from lumina_mgpt import __version__
from lumina_mgpt.server import faults
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.limits import Limits

Page = Callable[[FastAPI, Engine], object]


def create_app(
    engine: Engine, page: Page | None = None, *, limits: Limits | None = None, api_key: str | None = None
) -> FastAPI:
    """Returns the app. When the app shuts down, it closes the engine.

    Args:
        page: mounts a page at `/`; called with the app and the engine after all other routes are there. None: `/` leads
            to the description of the API.
        limits: limits of a request.
        api_key: key that every request but `/health` must have: as a bearer token, or as the password of HTTP basic
            authentication, which a browser asks for. None: no key.
    """
    limits = limits or Limits()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        engine.close()

    app = FastAPI(title="Lumina-mGPT", version=__version__, lifespan=lifespan)
    faults.add_handlers(app)

    @app.get("/health")
    def health() -> JSONResponse:
        """Says whether the server takes requests."""
        state = {"status": "ok" if engine.alive else "closing", "model": engine.name}
        return JSONResponse(state | {"waiting": engine.waiting, "running": engine.running}, 200 if engine.alive else 503)

    if page is not None:
        page(app, engine)
    else:
        app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    return app
