"""Builds the page and mounts it in the server's app."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any

import gradio as gr
from fastapi import FastAPI
from starlette.routing import Mount

from lumina_mgpt.page.chat_part import ChatPart
from lumina_mgpt.page.edit_part import EditPart
from lumina_mgpt.page.fields import Frame
from lumina_mgpt.page.guard import UploadsOnly
from lumina_mgpt.page.images_part import ImagesPart
from lumina_mgpt.page.offers import Offer
from lumina_mgpt.page.runs import Desk
from lumina_mgpt.server.engine import Engine
from lumina_mgpt.server.limits import Limits

_POLL = 0.2  # seconds between two looks at whether the engine shuts down
_KEPT = 600, 24 * 3600  # seconds between two removals of temporary files, and their age
_FONT = ["system-ui", "sans-serif"]  # fonts of the system: none comes from the network
_MONO = ["ui-monospace", "monospace"]
_CSS = """
.gradio-container { max-width: 1200px !important; margin: 0 auto !important; }
.work { display: grid !important; grid-template: "ask made" auto "set made" 1fr / 1fr 1fr; }
.work > * { min-width: 0 !important; }
.ask { grid-area: ask; }
.made { grid-area: made; }
.set { grid-area: set; }
@media (max-width: 760px) { .work { grid-template: "ask" auto "made" auto "set" auto / 100%; } }
.images .grid-wrap { max-height: none !important; height: auto !important; overflow: visible !important; }
.turns img { width: 256px !important; max-width: 100% !important; height: auto !important; }
.turns img { object-fit: contain !important; }
button[title="Share"] { display: none !important; }
.status p { margin: 0 0 4px; overflow-wrap: anywhere; }
.status .error { color: #b91c1c; font-weight: 600; }
.dark .status .error { color: #fca5a5; }
"""


def _theme() -> gr.Theme:
    """Returns a theme with fonts of the system and dark enough hints."""
    theme = gr.themes.Default(font=_FONT, font_mono=_MONO)
    return theme.set(body_text_color_subdued="*neutral_600", block_info_text_color="*neutral_600")


def build(frame: Frame) -> gr.Blocks:
    """Returns the page."""
    offer, config = frame.offer, frame.engine.checkpoint.config
    with gr.Blocks(title=f"Lumina-mGPT · {frame.engine.name}", analytics_enabled=False, delete_cache=_KEPT) as blocks:
        gr.Markdown(f"## Lumina-mGPT\nCheckpoint {frame.engine.name}, {config.family.name}", elem_id="heading")
        with gr.Tab("Image", id="text"):
            ImagesPart(frame, "text", given=False)
        with gr.Tab("Tasks", id="task"):
            ImagesPart(frame, "task", given=True)
        if offer.edit is not None:
            with gr.Tab("Edit", id="edit"):
                EditPart(frame, offer.edit)
        if frame.engine.pipeline.writes_text:
            with gr.Tab("Chat", id="chat"):
                ChatPart(frame)

        def leave(request: gr.Request) -> None:
            frame.desk.leave(str(request.session_hash))

        blocks.unload(leave)
    return blocks.queue(default_concurrency_limit=None)


def mount(app: FastAPI, engine: Engine, options: Sequence[str] = (), limits: Limits | None = None) -> None:
    """Mounts the page at `/`.

    Args:
        app: the server's app, with all its other routes.
        options: options that every command line on the page shows, such as `--model_path`.
        limits: limits of a request.
    """
    limits = limits or Limits()
    frame = Frame(engine, Offer.of(engine.checkpoint), limits, tuple(options), Desk())
    blocks = build(frame)
    gr.mount_gradio_app(
        app,
        blocks,
        path="/",
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=limits.body,
        ssr_mode=False,
        enable_monitoring=False,
        pwa=False,
        mcp_server=False,
        theme=_theme(),
        css=_CSS,
    )
    app.add_middleware(UploadsOnly)
    _end_with(app, engine)


def _end_with(app: FastAPI, engine: Engine) -> None:
    """Ends the connections of open pages when the engine shuts down: the server waits for them."""
    old = app.router.lifespan_context
    page = next(route.app for route in reversed(app.routes) if isinstance(route, Mount))

    async def watch() -> None:
        while engine.alive:
            await asyncio.sleep(_POLL)
        page.stop_event.set()  # type: ignore[attr-defined]

    @asynccontextmanager
    async def lifespan(of: FastAPI) -> AsyncIterator[Any]:
        async with old(of) as state:
            task = asyncio.create_task(watch())
            yield state
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    app.router.lifespan_context = lifespan
