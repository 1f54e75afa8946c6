"""The little ASGI that the server's own layers need, so that they work before FastAPI is imported."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from orch.errors import OrchError

__all__ = [
    "App",
    "BodyTooLarge",
    "ClientGone",
    "Message",
    "RawHeaders",
    "Receive",
    "Scope",
    "Send",
    "deny",
    "header",
    "read_body",
    "respond",
    "stream",
    "until",
    "wants_html",
]

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
RawHeaders = list[tuple[bytes, bytes]]

HEAD_REQUEST = "orch.head"
"""Key in a scope: the client sent HEAD, which is answered as GET without a body."""


class BodyTooLarge(OrchError):
    """The request's body is too large."""

    status = 413


class ClientGone(Exception):
    """The client went away before its request was complete; there is nobody to answer."""


def header(scope: Scope, name: bytes) -> str | None:
    """First value of a request header, None without one. `name` is lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return bytes(value).decode("latin-1")
    return None


def wants_html(scope: Scope) -> bool:
    """Whether a person reads the answer: a tab or frame that is loaded, or a page's script that asks for HTML."""
    return (
        scope["type"] == "http"
        and scope["method"] in ("GET", "HEAD")
        and "text/html" in (header(scope, b"accept") or "")
    )


async def read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body. Raises BodyTooLarge before more than `limit` bytes are held, ClientGone if it never arrives."""
    announced = header(scope, b"content-length")
    if announced is not None and announced.isdigit() and int(announced) > limit:
        raise BodyTooLarge(f"the body has {int(announced):,} bytes, at most {limit:,} are allowed")
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        chunk = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise BodyTooLarge(f"the body has more than {limit:,} bytes")
        chunks.append(chunk)
        if not message.get("more_body", False):
            return b"".join(chunks)


async def respond(send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes = b"") -> None:
    """Send one complete response."""
    fields = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fields})
    await send({"type": "http.response.body", "body": body})


async def deny(
    scope: Scope, receive: Receive, send: Send, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes
) -> None:
    """Answer a request, or refuse a WebSocket's handshake, with this response."""
    if scope["type"] != "websocket":
        await respond(send, status, headers, body)
        return
    if "websocket.http.response" in scope.get("extensions", {}):
        fields = [*headers, (b"content-length", str(len(body)).encode())]
        await send({"type": "websocket.http.response.start", "status": status, "headers": fields})
        await send({"type": "websocket.http.response.body", "body": body})
    else:
        await send({"type": "websocket.close", "code": 1008, "reason": str(status)})


async def until(stop: asyncio.Event, work: Awaitable[None]) -> bool:
    """Run `work` to its end (True), or cancel it when `stop` is set (False). Raises what `work` raises."""
    task = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finished = task.done()
    finally:
        for pending in (task, stopping):
            pending.cancel()
        await asyncio.gather(task, stopping, return_exceptions=True)
    if finished:
        task.result()
    return finished


async def stream(
    scope: Scope,
    receive: Receive,
    send: Send,
    status: int,
    headers: Iterable[tuple[bytes, bytes]],
    chunks: AsyncGenerator[bytes, None],
    closing: asyncio.Event,
) -> None:
    """Send an endless or long body: it ends with the generator, when the client leaves, or when the server closes."""
    await send({"type": "http.response.start", "status": status, "headers": list(headers)})
    if not scope.get(HEAD_REQUEST):
        gone = asyncio.Event()

        async def copy() -> None:
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        async def closed() -> None:
            await closing.wait()
            gone.set()

        watchers = [asyncio.ensure_future(watch()), asyncio.ensure_future(closed())]
        try:
            await until(gone, copy())
        finally:
            for watcher in watchers:
                watcher.cancel()
            await asyncio.gather(*watchers, return_exceptions=True)
            with contextlib.suppress(RuntimeError):  # never started
                await chunks.aclose()
    await send({"type": "http.response.body", "body": b""})
