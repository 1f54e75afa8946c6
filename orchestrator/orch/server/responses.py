"""Bodies in and out of the FastAPI routes: JSON by msgspec, limits, entity tags, endless streams."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orch.errors import OrchError, StateError
from orch.server import asgi
from orch.server.context import Context

__all__ = ["MAX_BODY", "BadBody", "Json", "Stream", "UnsupportedType", "etag", "json_body", "parse_etags"]

MAX_BODY = 4 * 1024 * 1024


class BadBody(OrchError):
    """The body is not what this route reads."""

    status = 400


class UnsupportedType(OrchError):
    """The body's content type is not the one this route reads."""

    status = 415


class Json(Response):
    """A value as JSON, secrets left out."""

    def __init__(self, context: Context, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(context.redactor.json(value), status, {"cache-control": "no-cache", **(headers or {})})
        self.headers["content-type"] = "application/json"


class Stream(Response):
    """A body that grows until the generator ends, the client leaves or the server stops. `release` is called then, also
    if the generator was never begun."""

    def __init__(
        self,
        context: Context,
        media_type: str,
        chunks: AsyncGenerator[bytes, None],
        *,
        status: int = 200,
        release: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(None, status, {"cache-control": "no-store", "x-accel-buffering": "no"}, media_type)
        del self.headers["content-length"]
        self._context = context
        self._chunks = chunks
        self._release = release

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await asgi.stream(
                scope, receive, send, self.status_code, self.raw_headers, self._chunks, self._context.closing
            )
        finally:
            if self._release is not None:
                self._release()


async def json_body(request: Request, *, empty: Any = msgspec.UNSET) -> Any:
    """The body's JSON value, checked to be JSON state as far as its text goes. `empty` is the value of no body.

    Raises BodyTooLarge (413), BadBody (400: no JSON), StateError (422: what Python's JSON may write and JSON does not
    know, such as NaN or half a surrogate pair).
    """
    data = await asgi.read_body(request.scope, request.receive, MAX_BODY)
    if not data.strip() and empty is not msgspec.UNSET:
        return empty
    try:
        return msgspec.json.decode(data)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        reason = str(error)
    try:
        json.loads(data)
    except RecursionError:
        raise StateError("the body is nested too deeply") from None
    except ValueError:
        raise BadBody(f"the body is not JSON: {reason}") from None
    raise StateError(
        "the body holds what JSON does not know (NaN, Infinity, a number out of range or half a surrogate pair)",
        hint="send null, or a string",
    )


def etag(rev: int) -> str:
    """The entity tag of a value that last changed at `rev`."""
    return f'"{rev}"'


def parse_etags(text: str) -> tuple[set[str], set[str], bool]:
    """(strong tags, weak tags, is `*`) of an If-Match or If-None-Match header; a bare number counts as a strong tag."""
    if text.strip() == "*":
        return set(), set(), True
    strong: set[str] = set()
    weak: set[str] = set()
    for mark, quoted, bare in re.findall(r'(W/)?"([^"]*)"|(\d+)', text):
        (weak if mark else strong).add(quoted or bare)
    return strong, weak, False
