"""The flow's side of one agent, as far as tests of runtimes need it: no pushes, only questions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx

from orch.wire import Attach, Place, StartCall, encode

LONG = 60.0
NO_FLOW = "http://127.0.0.1:9"


async def until(what: Callable[[], Awaitable[Any]], timeout: float = LONG) -> Any:
    """The first true answer of an asynchronous question."""
    async with asyncio.timeout(timeout):
        while not (answer := await what()):
            await asyncio.sleep(0.01)
    return answer


class Peer:
    def __init__(self, handle: dict[str, Any]) -> None:
        self.handle = handle
        self.http = httpx.AsyncClient(
            base_url=handle["url"],
            headers={"Authorization": f"Bearer {handle['token']}"},
            timeout=10,
            trust_env=False,
        )

    async def __aenter__(self) -> Peer:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.http.aclose()

    async def ask(self, path: str, body: Any = None) -> Any:
        answer = await (self.http.post(path, content=encode(body)) if body is not None else self.http.get(path))
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def attach(self) -> Any:
        return await self.ask("/v1/attach", Attach(flow_url=NO_FLOW, epoch=self.handle["epoch"]))

    async def start(self, *argv: str, n: int = 1, **fields: Any) -> None:
        """Starts a script as a call of the agent's work."""
        name = self.handle["agent"]
        await self.attach()
        await self.ask("/v1/place", [Place(work=name, token="of-the-work", rev=1, vars={})])
        call = {"work": name, "call": f"1-{name}-{n}", "attempt": 1, "kind": "script", **fields}
        await self.ask("/v1/start", [StartCall(command=list(argv), **call)])

    async def script(self, *argv: str, **fields: Any) -> int:
        """`start`, then the pid."""
        await self.start(*argv, **fields)

        async def pid() -> Any:
            work = await self.work()
            assert work.get("stage") != "ended", work
            return work.get("stage") == "running" and work["pid"]

        return int(await until(pid))

    async def result(self, *argv: str, **fields: Any) -> Any:
        """`start`, then how it ended."""
        await self.start(*argv, **fields)

        async def ended() -> Any:
            return (await self.work()).get("ended")

        return await until(ended)

    async def work(self) -> Any:
        return (await self.ask("/v1/status"))["works"][0]


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
