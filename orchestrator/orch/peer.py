"""A plain HTTP/1.1 client for one peer: how the flow and an agent talk to each other.

The standard library's client in one thread, on one kept-alive connection: a third of the memory and half of the latency
of an async client, and nothing to import at start.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import socket
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

__all__ = ["HttpPeer"]

log = logging.getLogger(__name__)


class HttpPeer:
    """Used by one request at a time; requests wait for each other. `timeout`: seconds for connecting and for each
    read."""

    def __init__(self, timeout: float = 10.0, *, name: str = "orch-peer") -> None:
        self._timeout = timeout
        self._connection: http.client.HTTPConnection | None = None
        self._origin = ""
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    async def get(self, url: str, token: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError or http.client.HTTPException."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._request, "GET", url, b"", token)

    async def post(self, url: str, body: bytes, token: str) -> tuple[int, bytes]:
        """(status, body). Raises OSError or http.client.HTTPException."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._request, "POST", url, body, token)

    def close(self) -> None:
        """Break off a request that is under way; the peer cannot be used again."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        connection = self._connection
        if connection is not None and connection.sock is not None:
            try:
                connection.sock.shutdown(socket.SHUT_RDWR)  # wakes the thread; close() alone would not
            except OSError:
                log.debug("the connection was closed already")
        self._thread.shutdown(wait=True)
        if connection is not None:
            connection.close()

    def _request(self, method: str, url: str, body: bytes, token: str) -> tuple[int, bytes]:
        parts = urlsplit(url)
        origin = f"{parts.scheme}://{parts.netloc}"
        if origin != self._origin and self._connection is not None:
            self._drop()
        self._origin = origin
        reused = self._connection is not None and self._connection.sock is not None
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        try:
            return self._exchange(parts.scheme, parts.netloc, method, path, body, token)
        except (OSError, http.client.HTTPException):
            self._drop()
            if not reused:
                raise
        # The server may have closed a connection that was idle: that says nothing about whether it is there. Every
        # message between flow and agent takes effect once, however often it is sent.
        try:
            return self._exchange(parts.scheme, parts.netloc, method, path, body, token)
        except (OSError, http.client.HTTPException):
            self._drop()
            raise

    def _exchange(self, scheme: str, netloc: str, method: str, path: str, body: bytes, token: str) -> tuple[int, bytes]:
        if self._connection is None:
            kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
            self._connection = kind(netloc, timeout=self._timeout)
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        self._connection.request(method, path, body if method == "POST" else None, headers)
        response = self._connection.getresponse()
        return response.status, response.read()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None
