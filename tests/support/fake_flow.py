"""The flow's side of the agent protocol (orch.wire) in a few lines, and real agents to talk to it.

It keeps the vars of the works, gives each accepted item a revision, tells the agent about revisions in order, and
remembers every item. It can go away and come back.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import uvicorn
from fastapi import FastAPI, Request, Response

from orch.errors import OrchError
from orch.state import apply_ops, copy_json, same
from orch.wire import (
    AgentSpec,
    AgentStatus,
    Attach,
    Diff,
    Ended,
    Item,
    ItemResult,
    Op,
    Place,
    Placed,
    Push,
    PushReply,
    StartCall,
    StartReply,
    StopCall,
    VarOps,
    WorkVars,
    decode,
    encode,
)

if TYPE_CHECKING:
    from netns import Host

TOKEN = "agent-token"


class FakeFlow:
    """Serves pushes; `items` are (seq, item, when) in the order of their numbers."""

    def __init__(self, folder: Path, address: str = "127.0.0.1") -> None:
        self.folder = folder
        self.address = address
        self.orch_dir = folder / ".orch"
        self.orch_dir.mkdir(exist_ok=True)
        self.url = ""
        self.agent_url = ""
        self.items: list[tuple[int, Item, float]] = []
        self.acked = 0
        self.epoch = 1
        self.rev = 0
        self.vars: dict[str, dict[str, Any]] = {}
        self.taken: dict[Any, int] = {}
        self.pushes = 0
        self.bodies: list[bytes] = []
        """Of all pushes, those that were not taken too."""
        self.away = False
        self.silent = False
        """It takes what is pushed, but its diffs do not reach the agent."""
        self.reject: Callable[[VarOps], str] = lambda item: ""
        self.on_item: Callable[[Item], None] = lambda item: None
        self.changed = asyncio.Event()
        self._diffs: asyncio.Queue[Diff] = asyncio.Queue()
        self._client = httpx.AsyncClient(timeout=10, trust_env=False)
        self.agent: asyncio.subprocess.Process | None = None
        self.log = b""

    # -- serving

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[FakeFlow]:
        app = FastAPI()
        app.add_api_route("/agents/v1/push", self._push, methods=["POST"], response_model=None)
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # see orch_workers.__main__
        listener.bind((self.address, 0))
        listener.listen(128)
        self.url = f"http://{self.address}:{listener.getsockname()[1]}"

        class Server(uvicorn.Server):
            @contextlib.contextmanager
            def capture_signals(self) -> Iterator[None]:
                yield

        server = Server(
            uvicorn.Config(
                app, log_config=None, access_log=False, lifespan="off", ws="none", timeout_graceful_shutdown=1
            )
        )
        serving = asyncio.create_task(server.serve([listener]))
        telling = asyncio.create_task(self._tell())
        try:
            yield self
        finally:
            await self.end_agent()
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)
            await self._client.aclose()
            server.should_exit = True
            await serving

    async def _push(self, request: Request) -> Response:
        assert request.headers["authorization"] == f"Bearer {TOKEN}"
        self.bodies.append(await request.body())
        self.changed.set()
        if self.away:
            return Response(status_code=503)
        push = decode(Push, self.bodies[-1])
        if push.epoch != self.epoch:
            return Response(status_code=409)
        self.pushes += 1
        results = []
        for seq, item in enumerate(push.items, push.seq):
            if seq <= self.acked:
                continue
            assert seq == self.acked + 1, "a gap in the item numbers"
            self.acked = seq
            self.items.append((seq, item, time.time()))
            if isinstance(item, VarOps):
                results.append(self._accept(seq, item))
            self.on_item(item)
        self.changed.set()
        return Response(encode(PushReply(acked=self.acked, results=results)), media_type="application/json")

    def _accept(self, seq: int, item: VarOps) -> ItemResult:
        origin = (item.call, item.attempt)
        if item.n and item.n <= self.taken.get(origin, 0):
            return ItemResult(seq=seq)
        if item.n:
            self.taken[origin] = item.n
        error = self.reject(item)
        if error:
            return ItemResult(seq=seq, error=error, status=422)
        old = self.vars[item.work]
        new = copy_json(old)
        try:
            apply_ops(new, item.ops)
        except OrchError as problem:
            return ItemResult(seq=seq, error=problem.message, status=problem.status)
        if same(old, new):
            return ItemResult(seq=seq)
        self.vars[item.work] = new
        self.rev += 1
        self._diffs.put_nowait(Diff(work=item.work, rev=self.rev, seq=seq))
        return ItemResult(seq=seq, rev=self.rev)

    def write(self, work: str, *ops: Op) -> int:
        """The flow changes a work's vars itself."""
        apply_ops(self.vars[work], list(ops))
        self.rev += 1
        self._diffs.put_nowait(Diff(work=work, rev=self.rev, ops=list(ops)))
        return self.rev

    async def _tell(self) -> None:
        while True:
            diffs = [await self._diffs.get()]
            while not self._diffs.empty():
                diffs.append(self._diffs.get_nowait())
            if self.silent:
                continue
            with contextlib.suppress(httpx.HTTPError):
                await self.ask("/v1/state", diffs)

    # -- the agent

    async def start_agent(self, *, port: int = 0, host: Host | None = None, **fields: Any) -> None:
        """A new incarnation, here or on a host of a test's own network; returns when it answers."""
        if host is not None:
            fields["bind"] = host.address
        spec = AgentSpec(
            agent="local",
            epoch=self.epoch,
            token=TOKEN,
            flow_url=self.url,
            app_dir=str(self.folder),
            orch_dir=str(self.orch_dir),
            app_id="abc",
            app_name="test",
            port=port,
            **{"run": 1, "drive_url": f"file://{self.orch_dir}/drive", **fields},
        )
        path = self.folder / "spec.json"
        path.write_bytes(encode(spec))
        path.chmod(0o600)
        ready = self.orch_dir / "run" / "agent-local.json"
        ready.unlink(missing_ok=True)
        command = [sys.executable, "-P", "-m", "orch_workers", str(path)]
        if host is not None:
            command = host.command(*command)
        with (self.folder / "agent.log").open("ab") as log:
            self.agent = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 20
        while not ready.exists():
            assert self.agent.returncode is None, (self.folder / "agent.log").read_text()
            assert time.monotonic() < deadline, "no agent"
            await asyncio.sleep(0.01)
        self.agent_url = json.loads(ready.read_bytes())["url"]

    async def end_agent(self) -> None:
        """Scripts included."""
        if self.agent is None:
            return
        if self.agent.returncode is None:
            self.away = False
            with contextlib.suppress(httpx.HTTPError):
                await self.ask("/v1/shutdown", {"kill": True})
            try:
                await asyncio.wait_for(self.agent.wait(), 10)
            except TimeoutError:
                self.agent.kill()
                await self.agent.wait()
                raise
        self.agent = None

    async def kill_agent(self) -> None:
        assert self.agent is not None
        self.agent.kill()
        await self.agent.wait()
        self.agent = None

    async def attach(self) -> AgentStatus:
        said = {call.split("-")[1]: (call, attempt, n) for (call, attempt), n in self.taken.items() if n}
        works = {
            name: WorkVars(rev=self.rev, vars=copy_json(values), said=said.get(name))
            for name, values in self.vars.items()
        }
        body = Attach(flow_url=self.url, epoch=self.epoch, acked=self.acked, works=works)
        return decode(AgentStatus, await self.ask("/v1/attach", body))

    async def ask(self, path: str, body: Any = None, *, method: str = "POST") -> bytes:
        response = await self._client.request(
            method,
            self.agent_url + path,
            content=encode(body) if body is not None else None,
            headers={"Authorization": f"Bearer {TOKEN}"},
        )
        response.raise_for_status()
        return response.content

    async def place(self, work: str, vars: dict[str, Any] | None = None, **fields: Any) -> Placed:
        self.vars.setdefault(work, dict(vars or {}))
        place = Place(work=work, token=f"token-{work}", rev=self.rev, vars=self.vars[work], **fields)
        placed: Placed = decode(list[Placed], await self.ask("/v1/place", [place]))[0]
        return placed

    async def start(
        self, work: str, command: Any = "", *, kind: str = "script", n: int = 1, **fields: Any
    ) -> StartReply:
        fields.setdefault("attempt", 1)
        start = StartCall(work=work, call=f"1-{work}-{n}", kind=kind, command=command, **fields)
        replies: list[StartReply] = decode(list[StartReply], await self.ask("/v1/start", [start]))
        return replies[0]

    async def stop(
        self, work: str, *, n: int = 1, attempt: int = 1, grace: float = 5.0, reason: str = "stopped"
    ) -> None:
        stop = StopCall(work=work, call=f"1-{work}-{n}", attempt=attempt, grace=grace, reason=reason)
        await self.ask("/v1/stop", [stop])

    async def status(self) -> AgentStatus:
        return decode(AgentStatus, await self.ask("/v1/status", method="GET"))

    def script(self, work: str, route: str = "state") -> httpx.AsyncClient:
        """A client as a script would have it: base URL ORCH_STATE_URL."""
        return httpx.AsyncClient(
            base_url=f"{self.agent_url}/{route}/{work}",
            headers={"Authorization": f"Bearer token-{work}"},
            timeout=10,
            trust_env=False,
        )

    # -- waiting

    def of(self, kind: type[Any], work: str | None = None) -> list[Any]:
        return [item for _, item, _ in self.items if isinstance(item, kind) and (work is None or item.work == work)]

    async def until(self, what: Callable[[], Any], timeout: float = 15.0) -> Any:
        """The first true value of `what()`, asked whenever items arrive (and every 10 ms)."""
        deadline = time.monotonic() + timeout
        while not (value := what()):
            if time.monotonic() > deadline:
                raise AssertionError(f"not within {timeout} s; items: {[i for _, i, _ in self.items][-10:]}")
            self.changed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.changed.wait(), 0.01)
        return value

    async def until_async(self, what: Callable[[], Awaitable[Any]], value: Any, timeout: float = 10.0) -> None:
        """Ask until the answer is `value`."""
        deadline = time.monotonic() + timeout
        while (answer := await what()) != value:
            assert time.monotonic() < deadline, f"still {answer!r}, not {value!r}"
            await asyncio.sleep(0.005)

    async def ended(self, work: str, count: int = 1, timeout: float = 15.0) -> Ended:
        """The `count`-th end of an attempt of that work."""
        ends: list[Ended] = await self.until(
            lambda: found if len(found := self.of(Ended, work)) >= count else None, timeout
        )
        return ends[count - 1]

    def log_of(self, work: str, n: int = 1) -> str:
        return (self.orch_dir / "logs" / work / f"1-{work}-{n}.log").read_text(errors="replace")


@contextlib.asynccontextmanager
async def flow_with_agent(folder: Path, **fields: Any) -> AsyncIterator[FakeFlow]:
    folder.mkdir(exist_ok=True)
    flow = FakeFlow(folder)
    async with flow.serving():
        await flow.start_agent(**fields)
        yield flow


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False
