"""/view/<component>/...: the works' own servers and pages behind the app's one origin. HTTP, SSE and WebSocket.

What a proxied server sees: its own address as Host and Origin (Streamlit, for one, checks), where it is seen from
outside in X-Forwarded-Host, -Proto, -For and, if the prefix is stripped, -Prefix; never the app's token or cookie.
What the browser gets back: redirects and cookies that stay below /view/<component>/. Bodies are streamed both ways, as
they come.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, unquote, urlsplit

import httpx
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.typing import Subprotocol

from orch.errors import NotFound, OrchError
from orch.server import shell
from orch.server.asgi import RawHeaders, Receive, Scope, Send, deny, header, respond, wants_html
from orch.server.auth import AUTH_KIND, COOKIE_PREFIX, same_origin, without_token
from orch.server.backend import StaticTarget, UpstreamTarget, WaitingTarget
from orch.server.context import Context
from orch.server.problems import Problem, problem_of

__all__ = ["VIEW", "Proxy", "from_view"]

VIEW = "/view/"
CONNECT_TIMEOUT = 5.0
HANDSHAKE_TIMEOUT = 20.0
KEEPALIVE = 3.0
"""Seconds an idle connection is kept: less than servers usually do, as one that they just closed fails a request."""

HOP_BY_HOP = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)
NOT_FOR_UPSTREAM = HOP_BY_HOP | {
    b"host",
    b"origin",
    b"authorization",
    b"cookie",
    b"expect",
    b"forwarded",
    b"x-forwarded-host",
    b"x-forwarded-proto",
    b"x-forwarded-for",
    b"x-forwarded-port",
    b"x-forwarded-prefix",
    b"x-real-ip",
}
"""Request headers that are not passed on; those that name who asks are set anew."""
NOT_FOR_BROWSER = HOP_BY_HOP | {b"date"}
REPEATABLE = ("GET", "HEAD", "OPTIONS")


def from_view(referer: str | None, host: str) -> str | None:
    """The component whose page a request comes from, by its Referer; None if it comes from elsewhere."""
    if referer is None:
        return None
    parts = urlsplit(referer)
    if not same_origin(f"{parts.scheme}://{parts.netloc}", host) or not parts.path.startswith(VIEW):
        return None
    return unquote(parts.path.removeprefix(VIEW).partition("/")[0]) or None


class _Connect(connect):
    """A WebSocket connection that goes where it is sent and nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class _Route:
    """One request's way to its upstream: addresses and header rules, both directions."""

    def __init__(self, target: UpstreamTarget, scope: Scope, view: str, rest: bytes) -> None:
        self.target = target
        self.view = view
        self.host = f"[{target.host}]" if ":" in target.host else target.host
        self.authority = f"{self.host}:{target.port}"
        self.own_host = header(scope, b"host") or ""
        self._scope = scope
        raw_path = scope["raw_path"].partition(b"?")[0]
        path = raw_path if target.prefix == "keep" else rest
        query = without_token(scope["query_string"])
        self.path_and_query = path + (b"?" + query if query else b"")

    def request_headers(self) -> RawHeaders:
        """What the upstream is sent, without what the connection itself adds."""
        scope = self._scope
        named = {
            name.strip().lower()
            for key, value in scope["headers"]
            if key == b"connection"
            for name in value.split(b",")
        }
        websocket = scope["type"] == "websocket"
        headers: RawHeaders = []
        forwarded_for: list[bytes] = []
        proto = scope["scheme"].replace("ws", "http").encode()
        for key, value in scope["headers"]:
            if key == b"cookie":
                kept = _foreign_cookies(value)
                if kept:
                    headers.append((key, kept))
            elif key == b"referer":
                page, mark, query = value.partition(b"?")
                query = without_token(query)
                headers.append((key, page + mark + query if query else page))
            elif key == b"x-forwarded-for":
                forwarded_for.append(value)
            elif key == b"x-forwarded-proto":
                proto = value  # set by a TLS proxy in front of us; whoever asks has the app's token
            elif key in NOT_FOR_UPSTREAM or key in named or (websocket and key.startswith(b"sec-websocket-")):
                continue
            else:
                headers.append((key, value))
        if scope.get("client"):
            forwarded_for.append(scope["client"][0].encode())
        headers += [
            (b"x-forwarded-host", self.own_host.encode("latin-1")),
            (b"x-forwarded-proto", proto),
            (b"x-forwarded-for", b", ".join(forwarded_for)),
        ]
        if self.target.prefix != "keep":
            headers.append((b"x-forwarded-prefix", self.view.encode()))
        return headers

    def response_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> RawHeaders:
        """What the browser gets of the upstream's headers."""
        headers = [(key.lower(), value) for key, value in headers]
        named = {name.strip().lower() for key, value in headers if key == b"connection" for name in value.split(b",")}
        result: RawHeaders = []
        for key, value in headers:
            if key in NOT_FOR_BROWSER or key in named:
                continue
            if key in (b"location", b"content-location"):
                value = self.location(value.decode("latin-1")).encode("latin-1")
            elif key == b"set-cookie":
                cookie = self.cookie(value.decode("latin-1"))
                if cookie is None:
                    continue
                value = cookie.encode("latin-1")
            elif key == b"x-frame-options" and value.strip().lower() == b"deny":
                value = b"SAMEORIGIN"  # it is shown in a tab of this very origin
            result.append((key, value))
        return result

    def location(self, location: str) -> str:
        """A redirect's address, kept below the view if it is the upstream's own."""
        parts = urlsplit(location)
        if parts.netloc:
            own = {self.authority, self.own_host, f"localhost:{self.target.port}", f"127.0.0.1:{self.target.port}"}
            if parts.netloc.lower() not in {name.lower() for name in own}:
                return location
        elif not parts.path.startswith("/"):
            return location
        path = parts.path or "/"
        if path != self.view and not path.startswith(self.view + "/"):
            path = self.view + path
        query = f"?{parts.query}" if parts.query else ""
        fragment = f"#{parts.fragment}" if parts.fragment else ""
        return path + query + fragment

    def cookie(self, cookie: str) -> str | None:
        """A Set-Cookie with the view as its path and no domain; None if it would hide one of orch's own."""
        pair, *attributes = cookie.split(";")
        if pair.strip().startswith(COOKIE_PREFIX):
            return None
        kept = [item for item in attributes if item.partition("=")[0].strip().lower() not in ("path", "domain")]
        return ";".join([pair, *kept, f" Path={self.view}/"])


def _foreign_cookies(value: bytes) -> bytes:
    prefix = COOKIE_PREFIX.encode()
    return b"; ".join(pair.strip() for pair in value.split(b";") if not pair.strip().startswith(prefix))


class _Body:
    """The browser's request body as it arrives, and the news that the browser has gone."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._read = asyncio.Event()
        self._gone = asyncio.Event()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body. Raises ConnectionAbortedError if the browser leaves in the middle of it."""
        try:
            while True:
                message = await self._receive()
                if message["type"] == "http.disconnect":
                    self._gone.set()
                    raise ConnectionAbortedError
                if chunk := message.get("body"):
                    yield chunk
                if not message.get("more_body", False):
                    return
        finally:
            self.skip()

    def skip(self) -> None:
        """Nobody wants (more of) the body."""
        self._read.set()

    async def gone(self) -> None:
        """Returns when the browser has gone. Only one may receive at a time, so it waits for the body's end."""
        await self._read.wait()
        while not self._gone.is_set():
            if (await self._receive())["type"] == "http.disconnect":
                self._gone.set()


class Proxy:
    """ASGI app for everything below /view/."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._transport = httpx.AsyncHTTPTransport(
            verify=False,
            trust_env=False,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=64, keepalive_expiry=KEEPALIVE),
        )
        self.open_websockets = 0

    async def close(self) -> None:
        """Close the kept connections."""
        await self._transport.aclose()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        raw_path = (scope.get("raw_path") or quote(scope["path"]).encode()).partition(b"?")[0]
        scope["raw_path"] = raw_path
        segment, slash, rest = raw_path.removeprefix(VIEW.encode()).partition(b"/")
        component = unquote(segment.decode("latin-1"))
        origin = header(scope, b"origin")
        # With the Bearer token it is a program, which may say what it likes; a browser's page cannot send one.
        foreign = origin is not None and not same_origin(origin, header(scope, b"host") or "")
        if foreign and (scope["type"] == "websocket" or scope.get(AUTH_KIND) != "bearer"):
            problem = Problem.plain(403, f"this request comes from a page of {origin}, not of this app")
            await deny(scope, receive, send, 403, problem.headers(), problem.body())
            return
        try:
            if not component:
                raise NotFound("/view/ needs a component's name", hint="/view/<component>/")
            target = self._context.backend.view(component)
        except OrchError as error:
            problem = problem_of(error)
            await deny(scope, receive, send, problem.status, problem.headers(), problem.body())
            return
        if not slash and scope["type"] == "http":
            query = without_token(scope["query_string"])
            location = VIEW.encode() + segment + b"/" + (b"?" + query if query else b"")
            await respond(send, 307, [(b"location", location)])
        elif isinstance(target, UpstreamTarget):
            route = _Route(target, scope, VIEW + segment.decode("latin-1"), b"/" + rest)
            if scope["type"] == "websocket":
                await self._websocket(route, scope, receive, send)
            else:
                await self._http(route, scope, receive, send)
        elif isinstance(target, StaticTarget):
            await self._static(target, VIEW + segment.decode("latin-1"), scope, receive, send)
        else:
            await self._waiting(target, 503, scope, receive, send)

    # -- HTTP

    async def _http(self, route: _Route, scope: Scope, receive: Receive, send: Send) -> None:
        body = _Body(receive)
        work = asyncio.ensure_future(self._forward(route, body, scope, receive, send))
        gone = asyncio.ensure_future(body.gone())
        closing = asyncio.ensure_future(self._context.closing.wait())
        try:
            await asyncio.wait({work, gone, closing}, return_when=asyncio.FIRST_COMPLETED)
            finished = work.done()
        finally:
            for task in (work, gone, closing):
                task.cancel()
            await asyncio.gather(work, gone, closing, return_exceptions=True)
        if finished:
            work.result()

    async def _forward(self, route: _Route, body: _Body, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            response = await self._ask(route, body, scope)
        except ConnectionAbortedError:
            return
        except (httpx.TransportError, OSError) as error:
            body.skip()
            await self._unreachable(route, error, scope, receive, send)
            return
        body.skip()
        try:
            headers = route.response_headers(response.headers.raw)
            await send({"type": "http.response.start", "status": response.status_code, "headers": headers})
            async for chunk in _raw(response):
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        finally:
            await response.aclose()

    async def _ask(self, route: _Route, body: _Body, scope: Scope) -> httpx.Response:
        headers = [(b"host", route.authority.encode()), *route.request_headers()]
        if header(scope, b"origin") is not None:
            headers.append((b"origin", f"http://{route.authority}".encode()))
        has_body = any(key in (b"content-length", b"transfer-encoding") for key, _ in scope["headers"])
        if has_body and not any(key == b"content-length" for key, _ in headers):
            headers.append((b"transfer-encoding", b"chunked"))
        if not has_body:
            body.skip()

        def request() -> httpx.Request:
            return httpx.Request(
                scope["method"],
                f"http://{route.authority}/",
                headers=headers,
                content=body.chunks() if has_body else b"",
                extensions={
                    "timeout": {"connect": CONNECT_TIMEOUT, "read": None, "write": None, "pool": None},
                    "target": route.path_and_query,
                },
            )

        try:
            return await self._transport.handle_async_request(request())
        except (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError):
            # A kept connection that the server closed in this very moment: once more, on a new one.
            if has_body or scope["method"] not in REPEATABLE:
                raise
            return await self._transport.handle_async_request(request())

    async def _unreachable(self, route: _Route, error: Exception, scope: Scope, receive: Receive, send: Send) -> None:
        reason = str(error) or type(error).__name__
        target = WaitingTarget(
            component=route.target.component,
            title=f"{route.target.component} does not answer",
            stage="unreachable",
            message=f"{route.authority}: {reason}",
        )
        await self._waiting(target, 502, scope, receive, send)

    async def _waiting(self, target: WaitingTarget, status: int, scope: Scope, receive: Receive, send: Send) -> None:
        if wants_html(scope):
            page = shell.waiting_page(target, self._context.redactor)
            headers = [
                (b"content-type", b"text/html; charset=utf-8"),
                (b"cache-control", b"no-store"),
                (b"retry-after", b"1"),
            ]
            await respond(send, status, headers, page)
            return
        message = f"{target.component} is not ready: {target.stage}"
        if target.message:
            message += f", {self._context.redactor.text(target.message)}"
        problem = Problem.plain(status, message, hint="try again, or look at the work's log")
        await deny(scope, receive, send, status, [*problem.headers(), (b"retry-after", b"1")], problem.body())

    # -- files

    async def _static(self, target: StaticTarget, view: str, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_fresh(message: Any) -> None:
            if message["type"] == "http.response.start":
                # Of a redirect only the path: a TLS proxy in front of us has another scheme.
                fields = [(k, _path_of(v) if k == b"location" else v) for k, v in message.get("headers", [])]
                message["headers"] = [*fields, (b"cache-control", b"no-cache")]
            await send(message)

        problem = Problem.plain(404, f"{scope['path']} is not among the files of {target.component}")
        if not await asyncio.to_thread(target.folder.is_dir):
            problem = Problem.plain(404, f"the folder {target.folder} of {target.component} does not exist")
        elif scope["type"] == "http":
            files = StaticFiles(directory=target.folder, html=True, check_dir=False)
            inner = {**scope, "root_path": scope.get("root_path", "") + unquote(view), "app_root_path": ""}
            try:
                await files(inner, receive, send_fresh)
                return
            except HTTPException as error:
                if error.status_code != HTTPStatus.NOT_FOUND:
                    problem = Problem.plain(error.status_code, error.detail)
        await deny(scope, receive, send, problem.status, problem.headers(), problem.body())

    # -- WebSocket

    async def _websocket(self, route: _Route, scope: Scope, receive: Receive, send: Send) -> None:
        await receive()  # websocket.connect
        try:
            upstream = await _Connect(
                f"ws://{route.authority}{route.path_and_query.decode('latin-1')}",
                origin=f"http://{route.authority}",  # type: ignore[arg-type]
                subprotocols=[Subprotocol(name) for name in scope["subprotocols"]] or None,
                additional_headers=[
                    (key.decode("latin-1"), value.decode("latin-1")) for key, value in route.request_headers()
                ],
                user_agent_header=None,
                compression=None,
                open_timeout=HANDSHAKE_TIMEOUT,
                # No pings of ours: a server that loads a model in its event loop is busy, not gone.
                ping_interval=None,
                close_timeout=2,
                max_size=None,
                proxy=None,
            )
        except InvalidStatus as error:
            answer = error.response
            kind = answer.headers.get("Content-Type", "text/plain").encode("latin-1")
            await deny(scope, receive, send, answer.status_code, [(b"content-type", kind)], bytes(answer.body or b""))
            return
        except (OSError, TimeoutError, InvalidHandshake) as error:
            await self._unreachable(route, error, scope, receive, send)
            return
        self.open_websockets += 1
        try:
            cookies = [
                (key, value)
                for key, value in route.response_headers(
                    (key.encode("latin-1"), value.encode("latin-1"))
                    for key, value in (upstream.response.headers.raw_items() if upstream.response else ())
                )
                if key == b"set-cookie"
            ]
            await send({"type": "websocket.accept", "subprotocol": upstream.subprotocol, "headers": cookies})
            await _relay(upstream, receive, send)
        finally:
            self.open_websockets -= 1


def _path_of(url: bytes) -> bytes:
    parts = urlsplit(url)
    return parts.path + (b"?" + parts.query if parts.query else b"")


async def _raw(response: httpx.Response) -> AsyncGenerator[bytes, None]:
    """The body as it is on the wire: whatever encoding it has is the browser's business. An upstream that breaks off
    breaks us off too, except in an event stream, which the browser takes up again by itself."""
    stream = response.stream
    assert isinstance(stream, httpx.AsyncByteStream)
    try:
        async for chunk in stream:
            yield chunk
    except httpx.TransportError as error:
        if not response.headers.get("content-type", "").startswith("text/event-stream"):
            raise UpstreamBroke(str(error)) from error


class UpstreamBroke(Exception):
    """The proxied server ended in the middle of its answer: the browser's connection is cut, so that it knows."""


async def _relay(upstream: ClientConnection, receive: Receive, send: Send) -> None:
    """Messages both ways until one side closes; its code and reason reach the other."""

    async def to_browser() -> None:
        try:
            try:
                while True:
                    data = await upstream.recv()
                    key = "text" if isinstance(data, str) else "bytes"
                    await send({"type": "websocket.send", key: data})
            except ConnectionClosed as closed:
                code = closed.rcvd.code if closed.rcvd else 1006
                reason = closed.rcvd.reason if closed.rcvd else ""
                await send({"type": "websocket.close", "code": _sendable(code, 1014), "reason": reason})
        except OSError:
            return  # what ASGI servers raise once the browser is gone

    async def to_upstream() -> None:
        while True:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                code, reason = message.get("code") or 1000, message.get("reason") or ""
                await upstream.close(_sendable(code, 1001), reason)
                return
            text = message.get("text")
            try:
                await upstream.send(text if text is not None else message["bytes"])
            except ConnectionClosed:
                await browser  # it tells why
                return

    browser = asyncio.ensure_future(to_browser())
    tasks = (browser, asyncio.ensure_future(to_upstream()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finished = [task for task in tasks if task.done()]
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await upstream.close()
    for task in finished:
        task.result()


def _sendable(code: int, instead: int) -> int:
    """Codes that only tell of a missing one are never on the wire: 1005 (none was given), 1006 (no close at all)."""
    if code == 1005:
        return 1000
    return code if re.fullmatch(r"100[0-37-9]|101[0-4]|[34]\d\d\d", str(code)) else instead
