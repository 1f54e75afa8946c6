"""The proxy on real sockets: a real uvicorn in front, a real server behind, HTTP, event streams, WebSockets, files."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from fake_backend import FakeBackend
from http_face import BEARER, served
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect
from testkit import free_port
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from orch.server.sockets import bind_socket

COOKIE = {"cookie": "orch_a1b2c3d4=app-token; theirs=1; orch_ffff=other"}
HTML = {"accept": "text/html"}


# ---- the server behind -----------------------------------------------------------------------------------------------


class Upstream:
    """An ordinary web server of somebody's script; remembers what happened to it."""

    def __init__(self) -> None:
        self.port = 0
        self.gone = asyncio.Event()
        self.closed: list[tuple[int, str]] = []
        methods = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"]
        self.app = Starlette(
            routes=[
                Route("/big", self.big),
                Route("/broken", self.broken),
                Route("/events", self.events),
                Route("/upload", self.upload, methods=["POST"]),
                Route("/go", self.go),
                Route("/cookies", self.cookies),
                Route("/hops", self.hops),
                WebSocketRoute("/ws{rest:path}", self.websocket),
                Route("/{path:path}", self.echo, methods=methods),
            ]
        )

    async def echo(self, request: Request) -> Response:
        return JSONResponse(
            {
                "method": request.method,
                "path": request.scope["raw_path"].decode(),
                "query": request.scope["query_string"].decode(),
                "headers": [[name, value] for name, value in request.headers.items()],
                "body": (await request.body()).decode(),
            }
        )

    async def big(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(64):
                yield b"x" * 128 * 1024

        return StreamingResponse(chunks(), headers={"content-length": str(64 * 128 * 1024)})

    async def broken(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"half"
            raise ConnectionResetError

        return StreamingResponse(chunks(), headers={"content-length": "8"})

    async def events(self, request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            try:
                for n in range(1000):
                    yield f"data: {n}\n\n".encode()
                    await asyncio.sleep(0.01 if n < 3 else 3600)
            finally:
                self.gone.set()

        return StreamingResponse(chunks(), media_type="text/event-stream")

    async def upload(self, request: Request) -> Response:
        digest, size = hashlib.sha256(), 0
        async for chunk in request.stream():
            digest.update(chunk)
            size += len(chunk)
        return JSONResponse(
            {
                "size": size,
                "sha256": digest.hexdigest(),
                "chunked": request.headers.get("transfer-encoding") == "chunked",
            }
        )

    async def go(self, request: Request) -> Response:
        return RedirectResponse(request.query_params["to"].replace("PORT", str(self.port)), 302)

    async def cookies(self, request: Request) -> Response:
        response = PlainTextResponse("ok")
        response.set_cookie("session", "1", path="/app", domain="127.0.0.1", httponly=True)
        response.set_cookie("plain", "2")
        response.set_cookie("orch_a1b2c3d4", "stolen")
        return response

    async def hops(self, request: Request) -> Response:
        headers = {
            "connection": "x-private, close",
            "x-private": "1",
            "keep-alive": "timeout=1",
            "x-frame-options": "DENY",
        }
        return PlainTextResponse("ok", headers=headers)

    async def websocket(self, socket: WebSocket) -> None:
        if socket.url.path.endswith("/refused"):
            await socket.send_denial_response(PlainTextResponse("not you", 418))
            return
        offered = socket.scope["subprotocols"]
        await socket.accept(subprotocol=offered[-1] if offered else None, headers=[(b"set-cookie", b"ws=1; Path=/")])
        if socket.url.path.endswith("/headers"):
            await socket.send_json([[name, value] for name, value in socket.headers.items()])
        try:
            while True:
                message = await socket.receive()
                if message["type"] == "websocket.disconnect":
                    self.closed.append((message["code"], message.get("reason") or ""))
                    return
                if message.get("text") == "flood":
                    while True:
                        await socket.send_text("x" * 1000)
                if message.get("text", "") and message["text"].startswith("close "):
                    _, code, reason = message["text"].split(" ", 2)
                    await socket.close(int(code), reason)
                    return
                if message.get("text") is not None:
                    await socket.send_text(message["text"])
                else:
                    await socket.send_bytes(message["bytes"])
        except (WebSocketDisconnect, OSError):
            self.closed.append((1006, ""))


class GuestServer(uvicorn.Server):
    async def serve(self, sockets: Any = None) -> None:
        await self._serve(sockets)


@asynccontextmanager
async def running(upstream: Upstream, port: int = 0) -> AsyncIterator[GuestServer]:
    sock = bind_socket("127.0.0.1", port)
    upstream.port = sock.getsockname()[1]
    config = uvicorn.Config(
        upstream.app,
        ws="websockets-sansio",
        ws_max_size=64 * 1024 * 1024,
        lifespan="off",
        log_config=None,
        log_level="critical",
        timeout_graceful_shutdown=1,
    )
    server = GuestServer(config)
    task = asyncio.create_task(server.serve([sock]))
    try:
        yield server
    finally:
        server.should_exit = True
        await task


@dataclass
class Setup:
    http: httpx.AsyncClient
    backend: FakeBackend
    upstream: Upstream

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.http.base_url.port}"

    def ws(self, path: str, origin: str | None = "own", **options: Any) -> connect:
        headers = options.pop("headers", COOKIE)
        return connect(
            f"ws://{self.host}{path}",
            origin=f"http://{self.host}" if origin == "own" else origin,  # type: ignore[arg-type]
            additional_headers=headers,
            max_size=None,
            proxy=None,
            **options,
        )


@pytest.fixture
async def setup(tmp_path: Path) -> AsyncIterator[Setup]:
    backend, upstream = FakeBackend(tmp_path), Upstream()
    async with running(upstream), served(backend) as http:
        backend.upstream("work", upstream.port)
        backend.upstream("ui.page", upstream.port, "keep")
        yield Setup(http, backend, upstream)


def headers_of(answer: httpx.Response) -> dict[str, str]:
    return dict(answer.json()["headers"])


# ---- HTTP ------------------------------------------------------------------------------------------------------------


async def test_paths_and_prefixes(setup: Setup) -> None:
    for path, sent in [
        ("/view/work/a/b%20c%2Fd?x=1&y=%26", "/a/b%20c%2Fd"),
        ("/view/work/", "/"),
        ("/view/work//double/", "//double/"),
        ("/view/ui.page/a%2Fb?x=1&y=%26", "/view/ui.page/a%2Fb"),
    ]:
        answer = await setup.http.get(path)
        assert answer.json()["path"] == sent
        assert answer.json()["query"] == ("x=1&y=%26" if "?" in path else "")
    stripped = headers_of(await setup.http.get("/view/work/"))
    assert stripped["x-forwarded-prefix"] == "/view/work"
    assert "x-forwarded-prefix" not in headers_of(await setup.http.get("/view/ui.page/"))


async def test_without_a_slash_the_browser_is_sent_to_the_one_with_it(setup: Setup) -> None:
    answer = await setup.http.get("/view/work?x=1")
    assert (answer.status_code, answer.headers["location"]) == (307, "/view/work/?x=1")


async def test_every_method_and_its_body(setup: Setup) -> None:
    for method in ("GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
        body = "" if method in ("GET", "OPTIONS") else f"body of {method}"
        answer = await setup.http.request(method, "/view/work/x", content=body or None)
        assert (answer.json()["method"], answer.json()["body"]) == (method, body)
    head = await setup.http.head("/view/work/x")
    assert (head.status_code, head.content) == (200, b"")
    assert int(head.headers["content-length"]) > 0


async def test_what_the_upstream_may_know(setup: Setup) -> None:
    sent = {
        **COOKIE,
        "authorization": "Bearer app-token",
        "origin": f"http://{setup.host}",
        "x-forwarded-host": "evil.example",
        "x-forwarded-prefix": "/evil",
        "connection": "keep-alive, x-hop",
        "x-hop": "1",
        "te": "trailers",
        "x-kept": "yes",
        "referer": f"http://{setup.host}/view/work/?token=app-token&y=2",
    }
    answer = await setup.http.get("/view/work/?token=wrong&x=1&token=app-toke", headers=sent)
    assert answer.json()["query"] == "x=1"
    got = headers_of(answer)
    assert got["cookie"] == "theirs=1"
    own = f"127.0.0.1:{setup.upstream.port}"
    assert (got["host"], got["origin"]) == (own, f"http://{own}")
    assert (got["x-forwarded-host"], got["x-forwarded-proto"]) == (setup.host, "http")
    assert got["x-forwarded-for"] == "127.0.0.1"
    assert got["x-forwarded-prefix"] == "/view/work"
    assert (got["x-kept"], got["referer"]) == ("yes", f"http://{setup.host}/view/work/?y=2")
    assert not {"authorization", "x-hop", "te", "token"} & got.keys()
    assert "app-token" not in answer.text


async def test_only_pages_of_the_app_reach_the_upstream(setup: Setup) -> None:
    setup.http.headers.pop("authorization")
    for origin in ("http://evil.example", "null", f"http://127.0.0.1:{setup.upstream.port}"):
        for method in ("GET", "POST"):
            answer = await setup.http.request(method, "/view/work/", headers={**COOKIE, "origin": origin})
            assert answer.status_code == 403
    own = {**COOKIE, "origin": f"http://{setup.host}"}
    assert (await setup.http.post("/view/work/", headers=own)).status_code == 200


@pytest.mark.parametrize(
    ("to", "location"),
    [
        ("/x?y=1#z", "/view/work/x?y=1#z"),
        ("/", "/view/work/"),
        ("x/y", "x/y"),
        ("?a=1", "?a=1"),
        ("http://127.0.0.1:PORT/x", "/view/work/x"),
        ("http://localhost:PORT", "/view/work/"),
        ("//127.0.0.1:PORT/x", "/view/work/x"),
        ("/view/work/x", "/view/work/x"),
        ("/view/works/x", "/view/work/view/works/x"),
        ("https://elsewhere.example/x", "https://elsewhere.example/x"),
    ],
)
async def test_redirects_stay_below_the_view(setup: Setup, to: str, location: str) -> None:
    answer = await setup.http.get("/view/work/go", params={"to": to})
    assert (answer.status_code, answer.headers["location"]) == (302, location)


async def test_cookies_get_the_path_of_the_view(setup: Setup) -> None:
    answer = await setup.http.get("/view/work/cookies")
    session, plain = answer.headers.get_list("set-cookie")
    assert session.startswith("session=1;")
    assert "HttpOnly" in session
    for cookie in (session, plain):
        assert cookie.endswith("; Path=/view/work/")
        assert cookie.lower().count("path=") == 1
        assert "domain" not in cookie.lower()


async def test_hop_by_hop_headers_end_here(setup: Setup) -> None:
    answer = await setup.http.get("/view/work/hops")
    assert "x-private" not in answer.headers
    assert "keep-alive" not in answer.headers
    assert answer.headers["x-frame-options"] == "SAMEORIGIN"
    assert len(answer.headers.get_list("date")) == 1


async def test_bodies_are_streamed_both_ways(setup: Setup) -> None:
    seen = 0
    async with setup.http.stream("GET", "/view/work/big") as answer:
        assert answer.headers["content-length"] == str(8 * 1024 * 1024)
        async for chunk in answer.aiter_raw():
            seen += len(chunk)
    assert seen == 8 * 1024 * 1024

    body = bytes(range(256)) * 4096
    for chunked in (False, True):

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(body), 100_000):
                yield body[start : start + 100_000]

        answer = await setup.http.post("/view/work/upload", content=pieces() if chunked else body)
        assert answer.json() == {"size": len(body), "sha256": hashlib.sha256(body).hexdigest(), "chunked": chunked}


async def test_events_arrive_one_by_one_and_end_with_the_browser(setup: Setup) -> None:
    async with setup.http.stream("GET", "/view/work/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        got = [line async for line in _take(lines, 6)]
        assert [line for line in got if line] == ["data: 0", "data: 1", "data: 2"]
        assert not setup.upstream.gone.is_set()
    await asyncio.wait_for(setup.upstream.gone.wait(), 5)


async def _take(items: AsyncIterator[str], count: int) -> AsyncIterator[str]:
    async for item in items:
        yield item
        count -= 1
        if not count:
            return


async def test_an_answer_that_breaks_off_is_not_taken_for_the_whole(setup: Setup) -> None:
    with pytest.raises(httpx.RemoteProtocolError):
        await setup.http.get("/view/work/broken")
    assert (await setup.http.get("/view/work/x")).status_code == 200


async def test_a_restarted_upstream_is_reached_at_once(setup: Setup) -> None:
    """Connections that were kept open to the old process do not fail the next request."""
    other = Upstream()
    async with running(other):
        port = other.port
        setup.backend.upstream("other", port)
        assert (await setup.http.get("/view/other/")).status_code == 200
    assert (await setup.http.get("/view/other/")).status_code == 502
    async with running(other, port):
        for _ in range(3):
            assert (await setup.http.get("/view/other/")).status_code == 200


async def test_what_does_not_answer(setup: Setup) -> None:
    setup.backend.upstream("dead", free_port())
    page = await setup.http.get("/view/dead/", headers=HTML)
    assert (page.status_code, page.headers["content-type"]) == (502, "text/html; charset=utf-8")
    assert "dead does not answer" in page.text
    data = await setup.http.get("/view/dead/api")
    assert (data.status_code, data.headers["content-type"]) == (502, "application/problem+json")

    setup.backend.waiting("later", "<b>loading</b>", "line 1", "line <2>")
    page = await setup.http.get("/view/later/", headers=HTML)
    assert page.status_code == 503
    assert "&lt;b&gt;loading" in page.text
    assert "line &lt;2&gt;" in page.text
    data = await setup.http.post("/view/later/api", content=b"x")
    assert (data.status_code, data.json()["status"], data.headers["retry-after"]) == (503, 503, "1")

    assert (await setup.http.get("/view/nobody/")).status_code == 404
    assert (await setup.http.get("/view/")).status_code == 404


async def test_absolute_paths_of_a_page_lead_back_to_its_view(setup: Setup) -> None:
    referer = {"referer": f"http://{setup.host}/view/work/index.html"}
    answer = await setup.http.get("/font-roboto/a%20b.woff2?v=1", headers=referer)
    assert (answer.status_code, answer.headers["location"]) == (307, "/view/work/font-roboto/a%20b.woff2?v=1")
    assert (await setup.http.get("/font-roboto/a.woff2")).status_code == 404
    evil = {"referer": "http://evil.example/view/work/"}
    assert (await setup.http.get("/font-roboto/a.woff2", headers=evil)).status_code == 404


# ---- WebSocket -------------------------------------------------------------------------------------------------------


async def test_messages_both_ways(setup: Setup) -> None:
    async with setup.ws("/view/work/ws") as socket:
        for message in ("text ä", b"\x00\xff", "", b"", "x" * 3_000_000, b"y" * 20_000_000):
            await socket.send(message)
            assert await socket.recv() == message


async def test_a_websocket_below_a_kept_prefix(setup: Setup) -> None:
    setup.upstream.app.router.routes.insert(0, WebSocketRoute("/view/ui.page/{rest:path}", setup.upstream.websocket))
    async with setup.ws("/view/ui.page/stream") as socket:
        await socket.send("a")
        assert await socket.recv() == "a"


async def test_what_the_upstream_of_a_websocket_may_know(setup: Setup) -> None:
    async with setup.ws("/view/work/ws/headers?token=x&y=1", headers={**COOKIE, **BEARER, "x-kept": "yes"}) as socket:
        got = dict(json.loads(await socket.recv()))
        own = f"127.0.0.1:{setup.upstream.port}"
        assert (got["host"], got["origin"], got["cookie"]) == (own, f"http://{own}", "theirs=1")
        assert (got["x-forwarded-host"], got["x-forwarded-prefix"]) == (setup.host, "/view/work")
        assert got["x-kept"] == "yes"
        assert "authorization" not in got
        assert socket.response is not None
        assert socket.response.headers["set-cookie"] == "ws=1; Path=/view/work/"


async def test_subprotocols(setup: Setup) -> None:
    async with setup.ws("/view/work/ws", subprotocols=["one", "two"]) as socket:
        assert socket.subprotocol == "two"
    async with setup.ws("/view/work/ws") as socket:
        assert socket.subprotocol is None


@pytest.mark.parametrize("origin", ["http://evil.example", "null", None])
async def test_a_websocket_of_a_foreign_page_is_refused(setup: Setup, origin: str | None) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await setup.ws("/view/work/ws", origin=origin)
    assert refused.value.response.status_code == 403
    if origin is not None:  # also with the token: a foreign page is a foreign page
        with pytest.raises(InvalidStatus):
            await setup.ws("/view/work/ws", origin=origin, headers=BEARER)


async def test_a_websocket_without_token_is_refused(setup: Setup) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await setup.ws("/view/work/ws", headers={})
    assert refused.value.response.status_code == 401


async def _closed(socket: ClientConnection) -> tuple[int, str]:
    with pytest.raises(ConnectionClosed) as closed:
        await socket.recv()
    assert closed.value.rcvd is not None
    return closed.value.rcvd.code, closed.value.rcvd.reason


async def test_close_codes_pass(setup: Setup) -> None:
    for code, reason in ((1000, "done"), (4321, "own code"), (1011, "ä")):
        async with setup.ws("/view/work/ws") as socket:
            await socket.send(f"close {code} {reason}")
            assert await _closed(socket) == (code, reason)
    for code in (1000, 4000):
        async with setup.ws("/view/work/ws") as socket:
            await socket.close(code, "bye")
    for _ in range(500):
        if len(setup.upstream.closed) == 2:
            break
        await asyncio.sleep(0.01)
    assert setup.upstream.closed == [(1000, "bye"), (4000, "bye")]


async def test_a_browser_that_leaves_in_a_flood_of_messages_is_no_error(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        socket = await setup.ws("/view/work/ws")
        await socket.send("flood")
        await socket.recv()
        socket.transport.abort()
        await socket.wait_closed()
    for _ in range(500):
        if len(setup.upstream.closed) == 5:
            break
        await asyncio.sleep(0.01)
    assert len(setup.upstream.closed) == 5  # each upstream connection has ended, too
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == []


async def test_refusals_of_the_upstream_pass(setup: Setup) -> None:
    with pytest.raises(InvalidStatus) as refused:
        await setup.ws("/view/work/ws/refused")
    assert refused.value.response.status_code == 418
    assert refused.value.response.body == b"not you"
    setup.backend.upstream("dead", free_port())
    setup.backend.waiting("later")
    for component, status in (("dead", 502), ("later", 503), ("nobody", 404)):
        with pytest.raises(InvalidStatus) as refused:
            await setup.ws(f"/view/{component}/ws")
        assert refused.value.response.status_code == status


async def test_a_dying_upstream_closes_the_browsers_websocket(setup: Setup) -> None:
    other = Upstream()
    async with running(other) as server:
        setup.backend.upstream("other", other.port)
        socket = await setup.ws("/view/other/ws")
        for connection in list(server.server_state.connections):
            connection.transport.abort()  # type: ignore[union-attr]
        code, _ = await asyncio.wait_for(_closed(socket), 5)
        assert code == 1014


# ---- files -----------------------------------------------------------------------------------------------------------


async def test_static_frontends(setup: Setup, tmp_path: Path) -> None:
    site = tmp_path / "site"
    (site / "sub").mkdir(parents=True)
    (site / "index.html").write_text("<h1>hello</h1>")
    (site / "sub" / "index.html").write_text("sub")
    (site / "ä b.txt").write_text("0123456789")
    (tmp_path / "secret.txt").write_text("secret")
    (site / "link.txt").symlink_to(tmp_path / "secret.txt")
    setup.backend.static("site", site)
    page = await setup.http.get("/view/site/")
    assert (page.text, page.headers["cache-control"]) == ("<h1>hello</h1>", "no-cache")
    assert (await setup.http.get("/view/site/sub/")).text == "sub"
    redirect = await setup.http.get("/view/site/sub")
    assert (redirect.status_code, redirect.headers["location"]) == (307, "/view/site/sub/")
    part = await setup.http.get("/view/site/%C3%A4%20b.txt", headers={"range": "bytes=2-4"})
    assert (part.status_code, part.text) == (206, "234")
    tag = {"if-none-match": page.headers["etag"]}
    assert (await setup.http.get("/view/site/", headers=tag)).status_code == 304
    for path in ("nothing", "..%2fsecret.txt", "%2e%2e/secret.txt", "sub/..%2f..%2fsecret.txt", "link.txt", "%00"):
        answer = await setup.http.get(f"/view/site/{path}")
        assert answer.status_code == 404, path
    assert (await setup.http.post("/view/site/")).status_code == 405
