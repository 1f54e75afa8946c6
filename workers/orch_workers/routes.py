"""The agent's HTTP: request -> agent, nothing more.

The flow's routes (/v1, see orch.wire) need the agent's token; a work's own routes (/state, /report, /live) need that
work's. Bodies are read raw and decoded by msgspec: these routes are hot, and the messages are defined once, in wire.py.
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from http import HTTPStatus
from typing import Any

import msgspec
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from orch.errors import NotFound, OrchError
from orch.state import format_pointer, parse_pointer
from orch.wire import Attach, Diff, Forget, ItemResult, Op, Place, Shutdown, StartCall, StopCall, decode, encode
from orch_workers.agent import Agent, PlacedWork
from orch_workers.messages import Changes, Report, Taken

__all__ = ["make_app"]

MAX_BODY = 4 * 1024 * 1024
"""Bytes of a script's request: above the largest state value (2 MiB), whatever its encoding."""


class Refused(OrchError):
    """The request is refused."""

    def __init__(self, status: int, message: str, *, hint: str = "") -> None:
        super().__init__(message, hint=hint)
        self.status = status


def make_app(agent: Agent) -> FastAPI:
    app = FastAPI(title="orch agent", docs_url=None, redoc_url=None, openapi_url=None)

    def flow_route(path: str, handler: Callable[[Request], Awaitable[Any]], method: str = "POST") -> None:
        async def endpoint(request: Request) -> Response:
            _need_token(request, agent.spec.token)
            return _json(await handler(request))

        app.add_api_route(path, endpoint, methods=[method], response_model=None)

    async def attach(request: Request) -> Any:
        return agent.attach(_read(Attach, await request.body()))

    async def status(request: Request) -> Any:
        return agent.status()

    async def place(request: Request) -> Any:
        return agent.place(_read(list[Place], await request.body()))

    async def start(request: Request) -> Any:
        return agent.start(_read(list[StartCall], await request.body()))

    async def stop(request: Request) -> Any:
        agent.stop(_read(list[StopCall], await request.body()))
        return {}

    async def forget(request: Request) -> Any:
        agent.forget(_read(list[Forget], await request.body()))
        return {}

    async def state(request: Request) -> Any:
        agent.apply(_read(list[Diff], await request.body()))
        return {}

    async def shutdown(request: Request) -> Any:
        agent.begin_shutdown(kill=_read(Shutdown, await request.body() or b"{}").kill)
        return {}

    flow_route("/v1/attach", attach)
    flow_route("/v1/status", status, "GET")
    flow_route("/v1/place", place)
    flow_route("/v1/start", start)
    flow_route("/v1/stop", stop)
    flow_route("/v1/forget", forget)
    flow_route("/v1/state", state)
    flow_route("/v1/shutdown", shutdown)

    @app.get("/v1/logs/{work}/{call}", response_model=None)
    async def read_log(work: str, call: str, offset: int, request: Request) -> Response:
        _need_token(request, agent.spec.token)
        return Response(agent.read_log(work, call, offset), media_type="text/plain")

    def own(request: Request, name: str) -> PlacedWork:
        """The work that the request speaks of, if its token is that work's."""
        work = agent.works.get(name)
        # An unknown work and a wrong token look the same: a script shall not learn what else runs here.
        _need_token(request, work.place.token if work is not None else secrets.token_hex())
        assert work is not None
        return work

    @app.get("/state/{name}", response_model=None)
    async def read_vars(name: str, request: Request) -> Response:
        work = own(request, name)
        await agent.fresh(work)
        return _json(work.live.view())

    @app.get("/state/{name}/{pointer:path}", response_model=None)
    async def read_var(name: str, pointer: str, request: Request) -> Response:
        work = own(request, name)
        await agent.fresh(work)
        return _json(_value(work, pointer) if pointer else work.live.view())

    @app.patch("/state/{name}", response_model=None)
    @app.patch("/state/{name}/", response_model=None)
    async def patch_vars(name: str, request: Request) -> Response:
        work = own(request, name)
        return _patched(await agent.patch(work, _read(list[dict[str, Any]], await _body(request))))

    @app.put("/state/{name}/{pointer:path}", response_model=None)
    async def put_var(name: str, pointer: str, request: Request) -> Response:
        work = own(request, name)
        await agent.fresh(work)
        value = _read(Any, await _body(request))
        return _patched(await agent.patch(work, [_assignment(work, pointer, value)]))

    @app.post("/report/{name}", response_model=None)
    async def report(name: str, request: Request) -> Response:
        work = own(request, name)
        told = _read(Report, await _body(request))
        agent.report(work, told.progress, told.metrics)
        return _json({})

    @app.post("/live/{name}", response_model=None)
    async def take_changes(name: str, request: Request) -> Response:
        work = own(request, name)
        changes = _read(Changes, await request.body())
        return _json(Taken(n=agent.receive(work, changes.session, changes.batches, changes.after)))

    @app.get("/live/{name}", response_model=None)
    async def listen(name: str, session: str, request: Request) -> Response:
        work = own(request, name)
        link = agent.connect(work, session)

        async def lines() -> AsyncIterator[bytes]:
            try:
                while (line := await link.get()) is not None:
                    yield line
            finally:
                agent.disconnect(work, link)

        return StreamingResponse(lines(), media_type="application/jsonl")

    @app.exception_handler(OrchError)
    async def problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, OrchError)
        return _problem(error.status, error.message, error.hint)

    return app


def _read(kind: Any, body: bytes) -> Any:
    """The body as that kind of message. Raises Refused 422 naming the field."""
    try:
        return decode(kind, body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Refused(422, f"the body is not what is expected here: {error}", hint="send JSON") from error


async def _body(request: Request) -> bytes:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(413, f"the body is over {MAX_BODY // 1024 // 1024} MiB")
    return body


def _need_token(request: Request, token: str) -> None:
    given = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not secrets.compare_digest(given.encode(), token.encode()):
        raise Refused(401, "the token is missing or wrong", hint="send `Authorization: Bearer $ORCH_TOKEN`")


def _tokens(work: PlacedWork, pointer: str) -> tuple[str, ...]:
    tokens = parse_pointer("/" + pointer)
    if tokens[0] not in work.live.base:
        declared = ", ".join(sorted(work.live.base)) or "none"
        raise NotFound(f"{work.name} has no variable {tokens[0]!r}", hint=f"declared: {declared}")
    return tokens


def _value(work: PlacedWork, pointer: str) -> Any:
    tokens = _tokens(work, pointer)
    value = work.live.value(tokens[0])
    for token in tokens[1:]:
        if isinstance(value, dict) and token in value:
            value = value[token]
        elif isinstance(value, list) and token.isdigit() and int(token) < len(value):
            value = value[int(token)]
        else:
            raise NotFound(f"{work.name} has nothing at {format_pointer(tokens)}")
    return value


def _assignment(work: PlacedWork, pointer: str, value: Any) -> Op:
    """PUT as an operation: a dict's key may be new, a list's element must exist."""
    tokens = _tokens(work, pointer)
    parent = _value(work, format_pointer(tokens[:-1])[1:]) if len(tokens) > 1 else None
    return {"op": "add" if isinstance(parent, dict) else "replace", "path": format_pointer(tokens), "value": value}


def _patched(result: ItemResult | None) -> Response:
    if result is None:
        return _json({"rev": None}, 202)
    if result.error:
        raise Refused(result.status or 409, result.error)
    return _json({"rev": result.rev})


def _json(value: Any, status: int = 200) -> Response:
    return Response(encode(value), status, media_type="application/json")


def _problem(status: int, detail: str, hint: str) -> Response:
    """RFC 9457."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail, "hint": hint}
    return Response(encode(body), status, media_type="application/problem+json")
