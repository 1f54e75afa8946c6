"""The HTTP server inside the flow server's event loop: uvicorn, without its signals, logs and lifespan.

It answers within milliseconds of its start: /healthz and the agents' pushes need nothing but this file, while FastAPI
(most of a second to import) is loaded in a thread; requests for the rest wait until it is there.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import socket
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

import uvicorn

from orch.server.asgi import Receive, Scope, Send, deny
from orch.server.backend import Backend
from orch.server.open_routes import open_route
from orch.server.problems import Problem
from orch.server.sockets import bind_socket

if TYPE_CHECKING:
    from orch.server.app import FlowApp

__all__ = ["HttpServer"]

log = logging.getLogger(__name__)

MAX_FRAME = 256 * 1024 * 1024
"""Largest WebSocket message from a browser, in bytes."""
GRACE = 2
"""Seconds that open requests have to end when the server stops."""


class _Uvicorn(uvicorn.Server):
    """uvicorn's server as a guest: the loop and the signals belong to somebody else."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.leave = asyncio.Event()
        self.listening = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listening.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def main_loop(self) -> None:
        # One tick a second (it sets the Date header) instead of ten: an idle app shall cost nothing.
        while not self.leave.is_set():
            await self.on_tick(0)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self.leave.wait()


class _Front:
    """What uvicorn calls: the open routes at once, everything else when the app is there."""

    def __init__(self, server: HttpServer, backend: Backend) -> None:
        self._server = server
        self._backend = backend

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if await open_route(self._backend, scope, receive, send):
            return
        try:
            app = await self._server.app()
        except Exception:
            log.exception("the HTTP server could not be loaded")
            problem = Problem.plain(500, "the server could not be loaded", hint="its log has the details")
            await deny(scope, receive, send, 500, problem.headers(), problem.body())
            return
        await app(scope, receive, send)


class HttpServer:
    """Serves a backend over HTTP in the running event loop.

    Args:
        allow_hosts: names, besides localhost and IP addresses, that a request's Host may be.
        load: begin to load FastAPI at `start`; else at the first request that needs it, or at `app()`.
    """

    def __init__(self, *, allow_hosts: Collection[str] = (), load: bool = True) -> None:
        self._allow_hosts = set(allow_hosts)
        self._load_at_start = load
        self._closing = asyncio.Event()
        self._backend: Backend | None = None
        self._app: asyncio.Task[FlowApp] | None = None
        self._uvicorn: _Uvicorn | None = None
        self._serving: asyncio.Task[None] | None = None

    async def start(self, backend: Backend, host: str, port: int | socket.socket) -> int:
        """Serve on `host` and `port` (see `bind_socket`), or on a socket that is bound already. Returns the port when
        connections are answered. Raises UsageError."""
        sock = port if isinstance(port, socket.socket) else bind_socket(host, port)
        if not _is_address(host):
            self._allow_hosts.add(host)
        self._backend = backend
        config = uvicorn.Config(
            _Front(self, backend),
            http="httptools",
            ws="websockets-sansio",
            ws_max_size=MAX_FRAME,
            ws_per_message_deflate=False,
            interface="asgi3",
            lifespan="off",
            log_config=None,
            log_level="critical",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=GRACE,
            timeout_keep_alive=30,
        )
        self._uvicorn = _Uvicorn(config)
        self._serving = asyncio.create_task(self._uvicorn.serve([sock]), name="orch-http")
        listening = asyncio.create_task(self._uvicorn.listening.wait())
        await asyncio.wait({listening, self._serving}, return_when=asyncio.FIRST_COMPLETED)
        listening.cancel()
        if self._serving.done():
            self._serving.result()
        if self._load_at_start:
            self._loading()
        return int(sock.getsockname()[1])

    async def app(self) -> FlowApp:
        """The app behind the open routes, loaded if it is not yet."""
        return await asyncio.shield(self._loading())

    async def stop(self) -> None:
        """End long-lived answers, then the open ones after at most GRACE seconds, and free the port. A second call does
        nothing."""
        self._closing.set()
        if self._uvicorn is not None and self._serving is not None:
            self._uvicorn.leave.set()
            await self._serving
        self._uvicorn = self._serving = None
        if self._app is not None:
            app, self._app = self._app, None
            await asyncio.wait({app})
            if app.exception() is None:
                await app.result().aclose()

    def _loading(self) -> asyncio.Task[FlowApp]:
        if self._app is None:
            self._app = asyncio.create_task(self._load(), name="orch-http-load")
        return self._app

    async def _load(self) -> FlowApp:
        assert self._backend is not None
        return await asyncio.to_thread(_create, self._backend, frozenset(self._allow_hosts), self._closing)


def _create(backend: Backend, allow_hosts: frozenset[str], closing: asyncio.Event) -> FlowApp:
    from orch.server.app import create_app

    return create_app(backend, allow_hosts=allow_hosts, closing=closing)


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
