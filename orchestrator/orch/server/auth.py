"""Who may talk to the server: Host, token, cookie, Origin. Plain ASGI, in front of everything else.

A request is let through when it carries the app's token, as `Authorization: Bearer` or in the cookie `orch_<app id>`. A
browser gets the cookie from `?token=` on any page, which is answered by a redirect to the same page without it. What a
browser could be tricked into sending with its cookie is checked further: writes and WebSockets need an Origin equal to
Host, and Host must be a name that no foreign DNS server answers for (DNS rebinding).
"""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Collection, Iterable
from urllib.parse import unquote_plus, urlsplit

from orch.server.asgi import App, Receive, Scope, Send, deny, header, respond, wants_html
from orch.server.backend import Backend
from orch.server.problems import Problem

__all__ = ["AUTH_KIND", "COOKIE_PREFIX", "OPEN_PATHS", "Guard", "same_origin", "without_token"]

COOKIE_PREFIX = "orch_"
OPEN_PATHS = ("/healthz", "/agents/v1/push")
"""Served without the app's token; agents bring their own, checked there."""
AUTH_KIND = "orch.auth"
"""Key in a scope that was let through: "bearer" or "cookie"."""
SAFE_METHODS = ("GET", "HEAD", "OPTIONS")

LOGIN_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Sign in - orch</title>
<style>body{font:16px/1.5 system-ui,sans-serif;max-width:34rem;margin:15vh auto;padding:0 1rem;color:#222}
code{background:#eee;padding:.1em .35em;border-radius:4px}@media(prefers-color-scheme:dark){body{background:#16181d;
color:#ddd}code{background:#2a2d35}}</style>
<h1>This app needs its token</h1>
<p>Run <code>orch open</code> in the app's folder, or use the address that <code>orch run</code> printed: it ends with
<code>?token=...</code>. The token is in the file <code>.orch/token</code> beside the app file.</p></html>"""


def _netloc(scheme: str, netloc: str) -> str:
    """Host and port in one spelling, the scheme's default port left out."""
    default = {"http": ":80", "https": ":443"}.get(scheme, "")
    netloc = netloc.lower()
    return netloc.removesuffix(default) if default else netloc


def same_origin(origin: str, host: str) -> bool:
    """Whether the browser's page (its Origin) was served by the host that the request is for."""
    parts = urlsplit(origin)
    return bool(parts.netloc) and _netloc(parts.scheme, parts.netloc) == _netloc(parts.scheme, host)


def without_token(query: bytes) -> bytes:
    """A query string without its `token` parameters, the others as they were."""
    return b"&".join(part for part in query.split(b"&") if part.partition(b"=")[0] != b"token")


def _query_token(query: bytes) -> str | None:
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"token":
            return unquote_plus(value.decode("latin-1"))
    return None


def _host_name(host: str) -> str:
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


class Guard:
    """ASGI middleware: lets a request through, or answers it with 400, 401, 403 or the 303 that sets the cookie."""

    def __init__(self, app: App, backend: Backend, allow_hosts: Collection[str] = ()) -> None:
        self._app = app
        self._backend = backend
        self._allow_hosts = {_host_name(name).lower().rstrip(".") for name in allow_hosts}
        self._cookie = COOKIE_PREFIX + backend.app_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket") or scope["path"] in OPEN_PATHS:
            await self._app(scope, receive, send)
            return
        host = header(scope, b"host") or ""
        problem = self._check_host(host)
        if problem is None and scope["type"] == "http" and scope["method"] == "GET":
            token = _query_token(scope["query_string"])
            if token is not None and self._is_token(token):
                await self._welcome(scope, send)
                return
        if problem is None:
            problem = self._check_token(scope, host)
        if problem is None:
            await self._app(scope, receive, send)
        elif problem.status == 401 and wants_html(scope):
            html_headers = [(b"content-type", b"text/html; charset=utf-8"), (b"cache-control", b"no-store")]
            await respond(send, 401, html_headers, LOGIN_PAGE.encode())
        else:
            await deny(scope, receive, send, problem.status, problem.headers(), problem.body())

    def _is_token(self, candidate: str) -> bool:
        return hmac.compare_digest(candidate.encode("utf-8"), self._backend.token.encode("utf-8"))

    def _check_host(self, host: str) -> Problem | None:
        name = _host_name(host).lower().rstrip(".")
        if not name:
            return Problem.plain(400, "the request has no Host header")
        if name == "localhost" or name.endswith(".localhost") or name in self._allow_hosts:
            return None
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return Problem.plain(
                403,
                f"this server does not answer for the host name {name!r}",
                hint=f"start the app with --allow-host {name}, or use its IP address",
            )
        return None

    def _check_token(self, scope: Scope, host: str) -> Problem | None:
        scheme, _, credentials = (header(scope, b"authorization") or "").partition(" ")
        origin = header(scope, b"origin")
        websocket = scope["type"] == "websocket"
        if scheme.lower() == "bearer" and self._is_token(credentials.strip()):
            scope[AUTH_KIND] = "bearer"
            return None
        if not any(self._is_token(value) for value in self._cookies(scope)):
            return Problem.plain(
                401,
                "the app's token is missing or wrong",
                hint="send `Authorization: Bearer <token>`; the token is in .orch/token",
            )
        scope[AUTH_KIND] = "cookie"
        if (websocket or scope["method"] not in SAFE_METHODS) and (origin is None or not same_origin(origin, host)):
            return Problem.plain(
                403,
                f"with a cookie this request must come from a page of this app, not from {origin or 'no origin'}",
                hint="send the token as `Authorization: Bearer <token>` instead",
            )
        return None

    def _cookies(self, scope: Scope) -> Iterable[str]:
        for key, value in scope["headers"]:
            if key != b"cookie":
                continue
            for pair in value.decode("latin-1").split(";"):
                name, _, content = pair.strip().partition("=")
                if name == self._cookie:
                    yield content.strip('"')

    async def _welcome(self, scope: Scope, send: Send) -> None:
        path = scope.get("raw_path") or scope["path"].encode()
        # "//host/x" would send the browser, and its Referer, to another host.
        location = b"/" + path.lstrip(b"/\\")
        query = without_token(scope["query_string"])
        if query:
            location += b"?" + query
        headers = [
            (b"location", location),
            (b"set-cookie", self._set_cookie().encode()),
            (b"cache-control", b"no-store"),
            (b"referrer-policy", b"no-referrer"),
        ]
        await respond(send, 303, headers)

    def _set_cookie(self) -> str:
        return f"{self._cookie}={self._backend.token}; HttpOnly; Path=/; SameSite=Lax"
