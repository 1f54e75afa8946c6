"""The embedded server: ports, its first answers, its end."""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from http_face import BEARER, served

from orch.errors import UsageError
from orch.server import serve
from orch.server.serve import HttpServer
from orch.server.sockets import bind_socket


def port_of(sock: socket.socket) -> int:
    return int(sock.getsockname()[1])


def test_a_taken_port_gives_the_next_free_one() -> None:
    with bind_socket("127.0.0.1", 0) as first:
        with bind_socket("127.0.0.1", port_of(first)) as second:
            assert port_of(first) < port_of(second) < port_of(first) + 100
        with pytest.raises(UsageError, match=str(port_of(first))):
            bind_socket("127.0.0.1", port_of(first), tries=1)


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no such host", 0), ("127.0.0.1", 70000)])
def test_an_address_that_is_not_ours(host: str, port: int) -> None:
    with pytest.raises(UsageError):
        bind_socket(host, port)


async def test_the_open_routes_do_not_wait_for_fastapi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = FakeBackend(tmp_path)
    create, go = serve._create, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(*args: Any) -> Any:
        asyncio.run_coroutine_threadsafe(go.wait(), loop).result()
        return create(*args)

    monkeypatch.setattr(serve, "_create", slow)
    async with served(backend) as http:
        assert (await http.get("/healthz")).status_code == 200
        push = {"agent": "local", "epoch": 2, "seq": 1, "items": []}
        agent = {"authorization": "Bearer agent-token"}
        assert (await http.post("/agents/v1/push", json=push, headers=agent)).status_code == 200
        waiting = asyncio.ensure_future(http.get("/api/v1/app"))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        go.set()
        assert (await waiting).status_code == 200


async def test_a_server_that_cannot_load_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise ImportError("fastapi is broken")

    monkeypatch.setattr(serve, "_create", broken)
    async with served(FakeBackend(tmp_path)) as http:
        answer = await http.get("/api/v1/app")
        assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
        assert "broken" not in answer.text
    assert "could not be loaded" in caplog.text


async def test_stop_frees_the_port_and_can_be_repeated(tmp_path: Path) -> None:
    server = HttpServer()
    port = await server.start(FakeBackend(tmp_path), "127.0.0.1", 0)
    await server.stop()
    await server.stop()
    with bind_socket("127.0.0.1", port, tries=1):
        pass
    await asyncio.get_running_loop().shutdown_default_executor()


async def test_the_name_it_listens_on_is_a_host_it_answers_for(tmp_path: Path) -> None:
    server = HttpServer(allow_hosts=["studio.lan"])
    with bind_socket("127.0.0.1", 0) as sock:
        port = await server.start(FakeBackend(tmp_path), "my.machine", sock)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", headers=BEARER, trust_env=False) as http:
            for host, status in (("my.machine", 200), ("studio.lan", 200), ("other.machine", 403)):
                assert (await http.get("/api/v1/app", headers={"host": host})).status_code == status
        await server.stop()
    await asyncio.get_running_loop().shutdown_default_executor()


def test_the_server_starts_without_fastapi_and_httpx() -> None:
    heavy = "{'fastapi', 'starlette', 'httpx', 'pydantic', 'websockets'}"
    code = f"import sys, orch.server.serve; print(*({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
