"""The app: OpenAI's API over an engine, with `/health` and `/metrics`."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse, RedirectResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lumina_mgpt import __version__
from lumina_mgpt.server import chat, faults, images, values
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.guards import BodyGuard, KeyGuard
from lumina_mgpt.server.limits import Limits
from lumina_mgpt.server.metrics import Meter, Metrics

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
        await asyncio.to_thread(engine.close)

    app = FastAPI(title="Lumina-mGPT", version=__version__, lifespan=lifespan)
    metrics = Metrics(engine)
    faults.add_handlers(app)
    # The last one sees a request first.
    app.add_middleware(BodyGuard, limit=limits.body)
    if api_key is not None:
        app.add_middleware(KeyGuard, key=api_key)
    app.add_middleware(Meter, metrics=metrics)
    app.include_router(images.routes(engine, limits))
    app.include_router(chat.routes(engine, limits))
    _add_information(app, engine, metrics)
    if page is not None:
        page(app, engine)
    else:
        app.add_api_route("/", lambda: RedirectResponse("/docs"), include_in_schema=False)
    return app


def _add_information(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    """Adds the endpoints that tell about the server."""
    family, begun = engine.checkpoint.config.family, int(time.time())
    model = {
        "id": engine.name,
        "object": "model",
        "created": begun,
        "owned_by": "lumina-mgpt",
        "size": "{}x{}".format(*engine.checkpoint.base_size()),
        "tasks": [name for name, task in family.tasks.items() if task.views == 1],
        "edit_tasks": list(family.i2i_tasks),
        "chat": engine.pipeline.writes_text,
    }

    @app.get("/health")
    def health() -> JSONResponse:
        """Says whether the server takes requests."""
        state = {"status": "ok" if engine.alive else "closing", "model": engine.name}
        return JSONResponse(
            state | {"waiting": engine.waiting, "running": engine.running}, 200 if engine.alive else 503
        )

    @app.get("/metrics")
    def prometheus() -> Response:
        """Metrics in Prometheus' text format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @app.get("/v1/models")
    def models() -> dict[str, object]:
        """Lists the one model, with its usual size and its tasks."""
        return {"object": "list", "data": [model]}

    @app.get("/v1/models/{name:path}")
    def one_model(name: str) -> dict[str, object]:
        """Describes the model."""
        values.check_model(engine, name)
        return model
