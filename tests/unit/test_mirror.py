from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

import orch.mirror
from orch.mirror import LogMirror

CALL = ("job", "1-job-1")


class Agents:
    """What agents have, by the host in their URL; stands in for HttpPeer."""

    def __init__(self) -> None:
        self.logs: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.answering: Callable[[], Awaitable[None]] | None = None

    def __call__(self, timeout: float, *, name: str) -> Agents:
        return self

    async def get(self, url: str, token: str) -> tuple[int, bytes]:
        parts = urlsplit(url)
        self.asked.append(f"{parts.hostname}{parts.path}")
        data = self.logs.get(parts.hostname or "")
        if self.answering is not None:
            await self.answering()
        return (404, b"") if data is None else (200, data[int(parse_qs(parts.query)["offset"][0]) :])

    def close(self) -> None: ...


@pytest.fixture
async def agents(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agents]:
    agents = Agents()
    monkeypatch.setattr(orch.mirror, "HttpPeer", agents)
    monkeypatch.setattr(orch.mirror, "SOON", 0.001)
    monkeypatch.setattr(orch.mirror, "LATE", 0.005)
    yield agents
    await asyncio.get_running_loop().shutdown_default_executor()


async def until(what: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not what():
            await asyncio.sleep(0.001)


def here(tmp_path: Path) -> bytes:
    path = tmp_path / "job" / "1-job-1.log"
    return path.read_bytes() if path.exists() else b""


async def test_a_disk_that_is_full_for_a_while_costs_nothing(
    agents: Agents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, append = True, orch.mirror._append

    def write(path: Path, data: bytes) -> None:
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        append(path, data)

    monkeypatch.setattr(orch.mirror, "_append", write)
    monkeypatch.setattr(orch.mirror, "PATIENCE", 0.05)
    agents.logs["a"] = b"one\n"
    mirror = LogMirror(tmp_path)
    mirror.follow("http://a", "", 1)
    await mirror.complete(*CALL)
    assert here(tmp_path) == b""
    full = False
    await until(lambda: here(tmp_path) == b"one\n")
    await mirror.close()


async def test_what_was_open_in_the_former_place_is_not_asked_for_in_the_next(agents: Agents, tmp_path: Path) -> None:
    agents.logs["a"] = b"one\n"
    mirror = LogMirror(tmp_path)
    mirror.follow("http://a", "", 1)
    mirror.add(*CALL)
    await until(lambda: here(tmp_path))
    mirror.follow("http://b", "", 2)
    agents.asked.clear()
    mirror.add("job", "1-job-2")
    await until(lambda: len(agents.asked) >= 5)
    assert set(agents.asked) == {"b/v1/logs/job/1-job-2"}
    await mirror.close()


async def test_an_answer_from_the_former_place_that_comes_late_is_not_taken(agents: Agents, tmp_path: Path) -> None:
    agents.logs["a"] = b"one\n"
    mirror = LogMirror(tmp_path)

    async def moved() -> None:
        mirror.follow("http://b", "", 2)

    agents.answering = moved
    mirror.follow("http://a", "", 1)
    await mirror.complete(*CALL)
    assert here(tmp_path) == b""
    await mirror.close()


async def test_an_ended_call_is_looked_at_once(agents: Agents, tmp_path: Path) -> None:
    agents.logs["a"] = b"one\n"
    mirror = LogMirror(tmp_path)
    mirror.follow("http://a", "", 1)
    mirror.add(*CALL, ended=True)
    await until(lambda: here(tmp_path) == b"one\n" and not mirror._open)
    await mirror.close()


async def test_one_that_is_closed_keeps_nobody_waiting(agents: Agents, tmp_path: Path) -> None:
    mirror = LogMirror(tmp_path)
    mirror.follow("http://nobody", "", 1)

    async def gone() -> None:
        await mirror.close()
        raise ConnectionResetError

    agents.answering = gone
    async with asyncio.timeout(1):
        await mirror.complete(*CALL)
