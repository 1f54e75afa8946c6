"""The whole HTTP face of an app: guard, then /view to the proxy, everything else to FastAPI."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from http import HTTPStatus
from importlib import resources
from itertools import chain
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match, Route

from orch._version import __version__
from orch.errors import OrchError
from orch.server import drive, events, openapi, shell, state, works
from orch.server.asgi import (
    HEAD_REQUEST,
    ClientGone,
    Message,
    Receive,
    Scope,
    Send,
    deny,
    header,
    respond,
)
from orch.server.auth import Guard
from orch.server.backend import Backend
from orch.server.context import Context
from orch.server.metrics import CONTENT_TYPE, exposition
from orch.server.open_routes import HEALTH_PATH, open_route
from orch.server.problems import Problem, problem_of
from orch.server.proxy import VIEW, Proxy, UpstreamBroke, from_view
from orch.server.user_routes import UserRoutes
from orch_drive import DriveError

__all__ = ["FlowApp", "create_app"]

log = logging.getLogger(__name__)

OWN_PAGES = [(b"content-security-policy", b"frame-ancestors 'self'"), (b"x-content-type-options", b"nosniff")]


def create_app(backend: Backend, *, allow_hosts: Collection[str] = (), closing: asyncio.Event | None = None) -> FlowApp:
    """The ASGI app on a backend. `allow_hosts`: names, besides localhost and IP addresses, that Host may be. When
    `closing` is set, whatever streams or waits ends."""
    return FlowApp(Context(backend, closing or asyncio.Event()), allow_hosts)


class FlowApp:
    """See `create_app`. `aclose()` gives the proxy's connections back."""

    def __init__(self, context: Context, allow_hosts: Collection[str]) -> None:
        self._context = context
        self._proxy = Proxy(context)
        self._api = _Api(context)
        _add_routes(self._api, context, self._proxy)
        self._user_routes = UserRoutes(self._api, context)
        self._api.router.default = self._not_found
        self._guard = Guard(self._route, context.backend, allow_hosts)

    async def aclose(self) -> None:
        """Close what the proxy keeps open."""
        await self._proxy.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = complete = False

        async def watch(message: Message) -> None:
            nonlocal started, complete
            started = True
            if message["type"] == "http.response.body" and not message.get("more_body", False):
                complete = True
            await send(message)

        try:
            await self._guard(scope, receive, watch)
        except ClientGone:
            return
        except UpstreamBroke:
            raise
        except Exception:
            log.exception("%s %s failed", scope.get("method", scope["type"]), scope.get("path"))
            if not started:
                problem = _internal()
                await deny(scope, receive, send, 500, problem.headers(), problem.body())
            elif not complete:
                raise  # the connection is cut, so that nobody takes what there is for the whole

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await open_route(self._context.backend, scope, receive, send):
            return
        path = scope.get("path", "")
        if path.startswith(VIEW):
            await self._proxy(scope, receive, send)
            return
        if scope["type"] == "http":
            self._user_routes.refresh()
            if scope["method"] == "HEAD":
                scope = {**scope, "method": "GET", HEAD_REQUEST: True}
                send = _without_body(send)
        await self._api(scope, receive, send)

    async def _not_found(self, scope: Scope, receive: Receive, send: Send) -> None:
        """No route. A page of a work that asks for an absolute path means one below its own view."""
        if scope["type"] == "http" and scope["method"] == "GET":
            component = from_view(header(scope, b"referer"), header(scope, b"host") or "")
            if component is not None:
                query = scope["query_string"]
                location = VIEW.encode() + component.encode() + scope["raw_path"] + (b"?" + query if query else b"")
                await respond(send, 307, [(b"location", location), (b"cache-control", b"no-store")])
                return
        problem = Problem.plain(404, f"there is nothing at {scope['path']}", hint="/docs lists the routes")
        await deny(scope, receive, send, 404, problem.headers(), problem.body())


def _without_body(send: Send) -> Send:
    async def head(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return head


def _internal() -> Problem:
    return Problem.plain(500, "something went wrong inside orch", hint="the server's log has the details")


class _Api(FastAPI):
    def __init__(self, context: Context) -> None:
        super().__init__(title="orch", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        self._context = context
        self.routers = [module.router(context) for module in (state, events, works, drive)]

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            self.openapi_schema = openapi.document(self, self._context.backend)
        return self.openapi_schema

    def methods(self, request: Request) -> str:
        """What can be done at this path, as an Allow header says it."""
        allowed: set[str] = set()
        for route in chain(self.routes, *(router.routes for router in self.routers)):
            if isinstance(route, Route) and route.matches(request.scope)[0] is not Match.NONE:
                allowed |= route.methods or set()
        return ", ".join(sorted(allowed | ({"HEAD"} if "GET" in allowed else set())))


def _add_routes(api: _Api, context: Context, proxy: Proxy) -> None:
    backend = context.backend
    _add_error_handlers(api, context)
    for router in api.routers:
        api.include_router(router)

    @api.get(HEALTH_PATH, tags=["server"], summary="Whether the server answers; needs no token")
    async def healthz() -> dict[str, str]:
        raise AssertionError("answered before the API is reached")

    @api.get(
        "/metrics",
        tags=["server"],
        summary="Numbers for Prometheus",
        response_class=Response,
        responses=openapi.content("text/plain"),
    )
    async def metrics() -> Response:
        numbers = {**backend.metrics(), "proxy_websockets": float(proxy.open_websockets)}
        return Response(exposition(numbers), media_type=CONTENT_TYPE)

    @api.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return _page(resources.files("orch.server").joinpath("docs.html").read_bytes())

    @api.get("/", include_in_schema=False)
    async def index() -> Response:
        info = await backend.app_info()
        return _page(shell.index_page(str(info.get("name", "")), backend.layout()))

    @api.get("/shell/{path:path}", include_in_schema=False)
    async def asset(path: str) -> Response:
        found = shell.asset(path)
        if found is None:
            raise HTTPException(404, f"the shell has no file {path}")
        return Response(found[0], headers={"content-type": found[1], "cache-control": "no-cache"})


def _page(body: bytes) -> Response:
    response = Response(body, media_type="text/html", headers={"cache-control": "no-store"})
    response.raw_headers.extend(OWN_PAGES)
    return response


def _add_error_handlers(api: _Api, context: Context) -> None:
    def respond(problem: Problem, headers: Mapping[str, str] | None = None) -> Response:
        # An error may quote what a script has said.
        response = Response(context.redactor.json(problem.fields()), problem.status, headers)
        response.raw_headers.extend(problem.headers())
        return response

    @api.exception_handler(OrchError)
    @api.exception_handler(DriveError)
    async def own(_: Request, error: Any) -> Response:
        problem = problem_of(error)
        if problem.status == 500:  # 503 says itself what is missing
            log.error("%s", error, exc_info=error)
        headers = {"accept-patch": state.PATCH_TYPE} if problem.status == 415 else None
        return respond(problem, headers)

    @api.exception_handler(HTTPException)
    async def http(request: Request, error: Any) -> Response:
        headers = error.headers
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            # Starlette names the methods of the first route at this path only.
            headers = {"allow": api.methods(request)}
        return respond(Problem.plain(error.status_code, error.detail), headers)

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: Any) -> Response:
        errors = [{"loc": list(item["loc"]), "msg": item["msg"], "type": item["type"]} for item in error.errors()]
        detail = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in errors)
        return respond(Problem.plain(422, detail, errors=errors))

    @api.exception_handler(ClientGone)
    async def gone(_: Request, error: Any) -> Response:
        return Response(status_code=499)

    @api.exception_handler(Exception)
    async def unexpected(_: Request, error: Any) -> Response:
        return respond(_internal())
