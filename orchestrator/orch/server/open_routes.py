"""What is served without the app's token: /healthz, and where agents push what happened on their machine.

Both answer before FastAPI is loaded; the push is the hot path: no framework between the socket and the service.
"""

from __future__ import annotations

import hmac

import msgspec

from orch._version import __version__
from orch.errors import OrchError
from orch.server.asgi import ClientGone, Receive, Scope, Send, header, read_body, respond
from orch.server.backend import Backend
from orch.server.problems import Problem, problem_of
from orch.wire import Push, decode, encode

__all__ = ["HEALTH_PATH", "PUSH_PATH", "health", "open_route", "push"]

HEALTH_PATH = "/healthz"
PUSH_PATH = "/agents/v1/push"
MAX_PUSH = 64 * 1024 * 1024


async def open_route(backend: Backend, scope: Scope, receive: Receive, send: Send) -> bool:
    """Answer the request if it is for one of these routes; whether it was."""
    if scope["type"] != "http":
        return False
    if scope["path"] == PUSH_PATH:
        await push(backend, scope, receive, send)
        return True
    if scope["path"] == HEALTH_PATH and scope["method"] in ("GET", "HEAD"):
        await health(scope, send)
        return True
    return False


async def health(scope: Scope, send: Send) -> None:
    """GET /healthz: the server answers, and nothing else about it."""
    body = encode({"status": "ok", "version": __version__}) if scope["method"] == "GET" else b""
    await respond(send, 200, [(b"content-type", b"application/json"), (b"cache-control", b"no-store")], body)


async def push(backend: Backend, scope: Scope, receive: Receive, send: Send) -> None:
    """POST /agents/v1/push. 401 without the agent's own token, 409 for a stale epoch, 400 or 422 for a body that does
    not fit; the agent keeps what it could not deliver."""
    try:
        problem, reply = await _push(backend, scope, receive)
    except OrchError as error:
        problem, reply = problem_of(error), b""
    except ClientGone:
        return
    if problem is not None:
        await respond(send, problem.status, problem.headers(), problem.body())
    else:
        await respond(send, 200, [(b"content-type", b"application/json")], reply)


async def _push(backend: Backend, scope: Scope, receive: Receive) -> tuple[Problem | None, bytes]:
    if scope["method"] != "POST":
        return Problem.plain(405, "agents POST here"), b""
    scheme, _, credentials = (header(scope, b"authorization") or "").partition(" ")
    if scheme.lower() != "bearer":
        return Problem.plain(401, "the agent's token is missing"), b""
    body = await read_body(scope, receive, MAX_PUSH)
    try:
        message = decode(Push, body)
    except msgspec.ValidationError as error:
        return Problem.plain(422, f"not a push: {error}"), b""
    except msgspec.DecodeError as error:
        return Problem.plain(400, f"not JSON: {error}"), b""
    expected = backend.agent_token(message.agent)
    if expected is None or not hmac.compare_digest(credentials.strip().encode(), expected.encode()):
        return Problem.plain(401, f"this is not the token of the agent {message.agent!r}"), b""
    return None, encode(await backend.push(message))
