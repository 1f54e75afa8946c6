"""The HTTP face of an app over a fake backend: in memory, or on a real port."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from fake_backend import FakeBackend

from orch.server.app import create_app
from orch.server.serve import HttpServer

__all__ = ["BEARER", "in_memory", "served"]

BEARER = {"authorization": f"Bearer {FakeBackend.token}"}
BASE = "http://127.0.0.1:7501"


@asynccontextmanager
async def in_memory(backend: FakeBackend, *, token: bool = True, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app without any socket. It cannot read a stream before its end."""
    app = create_app(backend, **options)
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url=BASE, headers=BEARER if token else {}) as client:
        yield client
    await app.aclose()
    await asyncio.get_running_loop().shutdown_default_executor()  # its threads are the loop's, not a leak


@asynccontextmanager
async def served(backend: FakeBackend, *, token: bool = True, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app on a real port of 127.0.0.1."""
    server = HttpServer(**options)
    port = await server.start(backend, "127.0.0.1", 0)
    try:
        async with httpx.AsyncClient(
            base_url=f"http://127.0.0.1:{port}", headers=BEARER if token else {}, trust_env=False, timeout=20
        ) as client:
            yield client
    finally:
        await server.stop()
        await asyncio.get_running_loop().shutdown_default_executor()
