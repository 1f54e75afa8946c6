"""/api/v1/events: what happens, as server-sent events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from orch.server.backend import Event
from orch.server.context import Context
from orch.server.openapi import content, header, problems
from orch.server.responses import BadBody, Stream

__all__ = ["HEARTBEAT", "router", "sse"]

HEARTBEAT = 15.0
"""Seconds of silence after which a comment is sent: it keeps middle boxes from closing, and shows a dead client."""


async def sse(
    context: Context,
    events: AsyncIterator[Event],
    kinds: frozenset[str],
    *,
    last: int | None = None,
    heartbeat: float = HEARTBEAT,
) -> AsyncGenerator[bytes, None]:
    """Events as `id:`, `event:` and `data:` lines. Ends with `events`, which it closes, or after the event `last`."""
    yield b"retry: 1000\n\n"
    coming: asyncio.Future[Event] | None = None
    try:
        while True:
            if coming is None:
                coming = asyncio.ensure_future(_next(events))
            done, _ = await asyncio.wait({coming}, timeout=heartbeat)
            if not done:
                yield b": still here\n\n"
                continue
            try:
                event = coming.result()
            except _Ended:
                return
            finally:
                coming = None
            if not kinds or event.kind in kinds:
                data = context.redactor.json(event.data)
                yield b"id: %d\nevent: %s\ndata: %s\n\n" % (event.id, event.kind.encode(), data)
            if last is not None and event.id >= last:
                return
    finally:
        if coming is not None:
            coming.cancel()
            await asyncio.gather(coming, return_exceptions=True)
        close = getattr(events, "aclose", None)
        if close is not None:
            await close()


async def _next(events: AsyncIterator[Event]) -> Event:
    try:
        return await anext(events)
    except StopAsyncIteration:
        raise _Ended from None


class _Ended(Exception):
    """StopAsyncIteration cannot be a task's result."""


def router(context: Context) -> APIRouter:
    """The route, on this context."""
    routes = APIRouter(prefix="/api/v1", tags=["events"])

    @routes.get(
        "/events",
        summary="Server-sent events: diffs, statuses, log lines, in order",
        response_class=Response,
        responses=content("text/event-stream") | problems(400),
        openapi_extra={"parameters": [header("Last-Event-ID", "as `after`, and counts more: what a browser repeats")]},
    )
    async def events(
        request: Request,
        after: Annotated[int | None, Query(description="only events after this id; without: from now on", ge=0)] = None,
        kinds: Annotated[
            str, Query(description="only these, e.g. diff,status (of: diff, status, log, app, layout)")
        ] = "",
        follow: Annotated[bool, Query(description="go on as they come; else end with the newest one")] = True,
    ) -> Response:
        # A browser that reconnects repeats its URL, so what it has seen last counts more than the URL.
        last_id = request.headers.get("last-event-id")
        if last_id is not None:
            if not last_id.isdigit():
                raise BadBody(f"Last-Event-ID: {last_id!r} is no event id")
            after = int(last_id)
        wanted = frozenset(filter(None, kinds.split(",")))
        last = None if follow else context.backend.last_event()
        if last is not None and (after is None or after >= last):
            return Response(status_code=200, media_type="text/event-stream")
        return Stream(context, "text/event-stream", sse(context, context.backend.events(after), wanted, last=last))

    return routes
