"""Server-sent events, and requests that end when their client leaves."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from fastapi import Request
from fastapi.responses import StreamingResponse

from lumina_mgpt.server.faults import api_error
from lumina_mgpt.server.tickets import Ticket


@asynccontextmanager
async def attended(request: Request, ticket: Ticket, end: bool = True) -> AsyncIterator[None]:
    """Cancels the ticket when the client disconnects during the block.

    Args:
        end: whether to cancel it also at the end of the block, if the request is not done by then.
    """

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        ticket.cancel()

    task = asyncio.create_task(watch())
    try:
        yield
    except BaseException:
        ticket.cancel()
        raise
    finally:
        if end:
            ticket.cancel()  # does nothing if the ticket has ended
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def sse(data: Mapping[str, object], name: str | None = None) -> str:
    """Returns one event.

    Args:
        name: name of the event.
    """
    return (f"event: {name}\n" if name else "") + f"data: {json.dumps(data)}\n\n"


def event_stream(events: AsyncIterator[str]) -> StreamingResponse:
    """Returns the response that sends events. An error becomes the last event."""

    async def guarded() -> AsyncIterator[str]:
        try:
            async for event in events:
                yield event
        except Exception as error:
            yield sse(api_error(error).body, "error")

    return StreamingResponse(guarded(), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
