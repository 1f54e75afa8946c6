"""/api/v1/works: what the works do, their logs, and stop, restart, run; /api/v1/layout, status, app."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Iterator
from typing import Annotated, Any, TypeVar

import msgspec
from fastapi import APIRouter, Query, Request, Response

from orch.errors import StateError
from orch.server.context import Context
from orch.server.logs import LogReader, compile_pattern, parse_since
from orch.server.openapi import content, problems
from orch.server.responses import Json, Stream, json_body

__all__ = ["follow_logs", "router"]

T = TypeVar("T")
LOG_POLL = 0.2
"""Seconds between two looks at a log that is followed."""


class RunBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/works/{name}/run."""

    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class StopBody(msgspec.Struct, forbid_unknown_fields=True):
    """Body of POST /api/v1/app/stop."""

    message: str = ""


RUN_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "additionalProperties": False,
                    "properties": {"args": {"type": "array", "items": {}}, "kwargs": {"type": "object"}},
                },
                "example": {"args": ["--max_epochs=2"], "kwargs": {}},
            }
        }
    }
}
STOP_BODY: dict[str, Any] = {
    "requestBody": {
        "content": {"application/json": {"schema": {"type": "object", "properties": {"message": {"type": "string"}}}}}
    }
}


async def _body(request: Request, kind: type[T]) -> T:
    value = await json_body(request, empty={})
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise StateError(f"the body does not fit: {error}") from None


async def follow_logs(reader: LogReader, *, follow: bool) -> AsyncGenerator[bytes, None]:
    """The log's bytes; with `follow` endlessly."""
    while True:
        chunks = reader.read()
        while (chunk := await asyncio.to_thread(_take, chunks)) is not None:
            yield chunk
        if not follow:
            return
        await asyncio.sleep(LOG_POLL)


def _take(chunks: Iterator[bytes]) -> bytes | None:
    """About 64 KiB at once: a hop to a thread costs more than reading a line."""
    taken: list[bytes] = []
    size = 0
    for chunk in chunks:
        taken.append(chunk)
        size += len(chunk)
        if size >= 64 * 1024:
            break
    return b"".join(taken) if taken else None


def router(context: Context) -> APIRouter:
    """The routes, on this context."""
    routes = APIRouter(prefix="/api/v1")
    backend = context.backend

    @routes.get("/works", tags=["works"], summary="Every work: status, calls, url, progress, agent")
    async def works() -> Response:
        return Json(context, await backend.works())

    @routes.get("/works/{name}", tags=["works"], summary="One work", responses=problems(404))
    async def work(name: str) -> Response:
        return Json(context, await backend.work(name))

    @routes.post(
        "/works/{name}/stop",
        tags=["works"],
        summary="Stop the work's call and hold the work",
        responses=problems(404),
    )
    async def stop(name: str) -> Response:
        return Json(context, await backend.stop_work(name))

    @routes.post(
        "/works/{name}/restart",
        tags=["works"],
        summary="Stop, then the latest call again",
        responses=problems(404, 422),
    )
    async def restart(name: str) -> Response:
        return Json(context, await backend.restart_work(name))

    @routes.post(
        "/works/{name}/run",
        tags=["works"],
        summary="Ask for a call",
        responses=problems(400, 404, 413),
        openapi_extra=RUN_BODY,
    )
    async def run(name: str, request: Request) -> Response:
        body = await _body(request, RunBody)
        return Json(context, await backend.run_work(name, body.args, body.kwargs))

    @routes.get(
        "/works/{name}/logs",
        tags=["works"],
        summary="What the work's scripts wrote, as text",
        response_class=Response,
        responses=content("text/plain") | problems(404),
    )
    async def logs(
        name: str,
        call: Annotated[str | None, Query(description="only this call, by its id")] = None,
        tail: Annotated[int | None, Query(description="only the last lines", ge=0)] = None,
        since: Annotated[
            str | None,
            Query(description="only attempts that had not ended then: 90, 5m, 1h30m (ago), or an ISO 8601 time"),
        ] = None,
        follow: Annotated[bool, Query(description="go on with what is written, until the client leaves")] = False,
        grep: Annotated[str | None, Query(description="only lines in which this regular expression is found")] = None,
    ) -> Response:
        reader = LogReader(
            lambda: backend.log_files(name, call),
            context.redactor.stream,
            tail=tail,
            since=None if since is None else parse_since(since, time.time()),
            pattern=None if grep is None else compile_pattern(grep),
            follow=follow,
        )
        backend.log_files(name, call)  # an unknown name is a 404, not a broken stream
        return Stream(context, "text/plain; charset=utf-8", follow_logs(reader, follow=follow))

    @routes.get("/layout", tags=["app"], summary="The tabs")
    async def layout() -> Response:
        return Json(context, backend.layout())

    @routes.get("/status", tags=["app"], summary="The app in one glance")
    async def status() -> Response:
        return Json(context, await backend.status())

    @routes.get("/app", tags=["app"], summary="Which app this is")
    async def app() -> Response:
        return Json(context, await backend.app_info())

    @routes.post(
        "/app/stop",
        tags=["app"],
        summary="Stop the works and end the app",
        responses=problems(400, 413, 422),
        openapi_extra=STOP_BODY,
    )
    async def stop_app(request: Request) -> Response:
        body = await _body(request, StopBody)
        await backend.stop_app(body.message)
        return Json(context, {"stage": "stopping"})

    return routes
