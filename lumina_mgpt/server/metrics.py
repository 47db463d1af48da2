"""Metrics for Prometheus."""

import time

from prometheus_client import (
    GC_COLLECTOR,
    PLATFORM_COLLECTOR,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lumina_mgpt.server.engine import Engine, Observer

_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500)
_BATCH = (1, 2, 4, 8, 16, 32, 64)


class Metrics(Observer):
    """Counts the work of an engine, in a registry of its own."""

    def __init__(self, engine: Engine) -> None:
        self.registry = registry = CollectorRegistry()
        for collector in (PROCESS_COLLECTOR, PLATFORM_COLLECTOR, GC_COLLECTOR):
            registry.register(collector)
        of_request = ("method", "path")
        self.requests = Counter("lumina_requests", "Answered HTTP requests", (*of_request, "status"), registry=registry)
        self.request_seconds = Histogram(
            "lumina_request_seconds", "Time of an HTTP request", of_request, buckets=_SECONDS, registry=registry
        )
        self._batches = Histogram("lumina_batch_images", "Images of a batch", buckets=_BATCH, registry=registry)
        self._images = Histogram(
            "lumina_image_seconds", "Time from a request to its image", buckets=_SECONDS, registry=registry
        )
        self._answers = Histogram(
            "lumina_answer_seconds", "Time from a request to its answer", buckets=_SECONDS, registry=registry
        )
        self._codes = Counter("lumina_image_codes", "Codes of finished images", registry=registry)
        self._ids = Counter("lumina_answer_ids", "Ids of finished answers", registry=registry)
        self._cancelled = Counter("lumina_cancelled", "Requests whose client left", registry=registry)
        self._refused = Counter("lumina_refused", "Requests refused because the queue was full", registry=registry)
        waiting = Gauge("lumina_waiting", "Images and answers that wait", registry=registry)
        waiting.set_function(lambda: engine.waiting)
        running = Gauge("lumina_running", "Images and answers that run", registry=registry)
        running.set_function(lambda: engine.running)
        engine.observer = self

    def text(self) -> bytes:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def batch(self, images: int) -> None:
        self._batches.observe(images)

    def image(self, seconds: float, codes: int) -> None:
        self._images.observe(seconds)
        self._codes.inc(codes)

    def answer(self, seconds: float, ids: int) -> None:
        self._answers.observe(seconds)
        self._ids.inc(ids)

    def cancelled(self) -> None:
        self._cancelled.inc()

    def refused(self) -> None:
        self._refused.inc()


class Meter:
    """Middleware that counts and times HTTP requests by path and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, begun = 500, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "")
            path = route if route.startswith(("/v1/", "/health", "/metrics")) else "other"
            method = scope["method"] if scope["method"] in ("GET", "POST") else "other"
            self._metrics.requests.labels(method, path, status).inc()
            self._metrics.request_seconds.labels(method, path).observe(time.monotonic() - begun)
