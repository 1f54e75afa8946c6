"""What 100 agents cost the flow server, one Work each: `python tests/benchmarks/agents.py [seconds]`; prints JSON.

The agents are played by one process of its own (100 ports, answers and heartbeats like real ones, every 2 s); the
scripts of their Works run for ever. The floor, measured in the same run, is a process that only asks the same agents
for their status as often, with the same HTTP client. Target: at most 10 % of a core.
"""

from __future__ import annotations

import asyncio
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import psutil

AGENTS = 100
EVERY = 2.0
TOKEN = "t"

APP = f"""
from orch import App, Flow, List, ScriptWork

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.works_ = List(*[ScriptWork("sleep 1000", parallel=True) for _ in range({AGENTS})])

    def run(self):
        for work in self.works_:
            work.run()

app = App(Root())
"""


# ---- the agents ------------------------------------------------------------------------------------------------------


class FakeAgent:
    def __init__(self) -> None:
        self.work = self.token = self.flow = ""
        self.epoch = 0
        self.call: dict[str, Any] | None = None
        self.port = 0
        self.tasks: list[asyncio.Future[None]] = []

    async def serve(self) -> None:
        server = await asyncio.start_server(self._client, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode().split("\r\n")
                length = next((int(line[15:]) for line in lines if line.lower().startswith("content-length:")), 0)
                body = json.loads(await reader.readexactly(length)) if length else None
                path = lines[0].split()[1]
                log = path.startswith("/v1/logs/")  # quiet ones: there is nothing more
                answer = b"" if log else msgspec.json.encode(self._answer(path, body))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    def _answer(self, path: str, body: Any) -> Any:
        kind = path.rsplit("/", 1)[1]
        if kind == "attach":
            self.flow = body["flow_url"]
            self.tasks.append(asyncio.ensure_future(self._push()))
        elif kind == "place":
            return [{"work": place["work"], "host": "127.0.0.1", "port": 1} for place in body]
        elif kind == "start":
            self.call = body[0]
            self.tasks.append(asyncio.ensure_future(self._started()))
            return [{"call": start["call"], "attempt": start["attempt"]} for start in body]
        return self._status() if kind in ("attach", "status") else {}

    def _status(self) -> dict[str, Any]:
        report = {"work": self.work, "host": "127.0.0.1", "port": 1}
        if self.call is not None:
            report |= {"call": self.call["call"], "attempt": self.call["attempt"], "stage": "running", "pid": 1}
        works = [report] if self.call is not None else []
        return {"agent": self.work, "epoch": self.epoch, "pid": 1, "seq": 1, "works": works}

    async def _started(self) -> None:
        assert self.call is not None
        item = {
            "type": "started",
            "work": self.work,
            "call": self.call["call"],
            "attempt": 1,
            "pid": 1,
            "at": time.time(),
        }
        await self._say(1, [item])

    async def _push(self) -> None:
        await asyncio.sleep(hash(self.work) % 100 / 100 * EVERY)
        while True:
            await self._say(2, [])
            await asyncio.sleep(EVERY)

    async def _say(self, seq: int, items: list[Any]) -> None:
        url = urlsplit(self.flow)
        body = json.dumps({"agent": self.work, "epoch": self.epoch, "seq": seq, "items": items}).encode()
        if not hasattr(self, "_link"):
            self._link = await asyncio.open_connection(url.hostname, url.port)
            self._turn = asyncio.Lock()
        reader, writer = self._link
        async with self._turn:
            writer.write(
                f"POST /agents/v1/push HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {self.token}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                + body
            )
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length:")[2].split()[0])
            answer = await reader.readexactly(length)
            assert head.split()[1] == "200", answer


async def play() -> None:
    """Reads one line an agent (its spec), answers with its port."""
    agents: list[FakeAgent] = []
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        spec = json.loads(line)
        agent = FakeAgent()
        agent.work, agent.epoch, agent.token = spec["agent"], spec["epoch"], spec["token"]
        await agent.serve()
        agents.append(agent)
        print(agent.port, flush=True)


# ---- the flow server, and the floor ----------------------------------------------------------------------------------


def serve(folder: Path) -> int:
    import orch.cli
    import orch.service
    from orch.runtimes.base import Handle
    from orch.runtimes.local import LocalRuntime
    from orch.wire import AgentSpec

    agents = subprocess.Popen(
        [sys.executable, __file__, "play"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert agents.stdin is not None and agents.stdout is not None

    class Played(LocalRuntime):
        own_places, shared_records, shared_files = True, False, False

        async def launch(self, spec: AgentSpec) -> Handle:
            agents.stdin.write(json.dumps({"agent": spec.agent, "epoch": spec.epoch, "token": spec.token}) + "\n")
            agents.stdin.flush()
            port = int(agents.stdout.readline())
            url = f"http://127.0.0.1:{port}"
            return {"agent": spec.agent, "epoch": spec.epoch, "url": url, "token": spec.token, "port": port, "pid": 0}

        async def poll(self, handle: Handle) -> str | None:
            return None

        async def kill(self, handle: Handle) -> None: ...

        async def ended(self, handle: Handle, timeout: float) -> bool:
            return True

    runtime = Played(folder / ".orch" / "run", folder / ".orch" / "logs")
    orch.service.serve = functools.partial(orch.service.serve, runtime=runtime)
    try:
        return orch.cli.main(["run", "--no-open", "--port", "0"])
    finally:
        agents.kill()


async def poll(ports: list[int]) -> None:
    """The floor."""
    from orch.peer import HttpPeer

    peers = [HttpPeer() for _ in ports]

    async def one(peer: HttpPeer, port: int) -> None:
        while True:
            await peer.get(f"http://127.0.0.1:{port}/v1/status", TOKEN)
            await asyncio.sleep(EVERY)

    await asyncio.gather(*(one(peer, port) for peer, port in zip(peers, ports, strict=True)))


def cpu(pid: int, seconds: float) -> float:
    """Share of a core."""
    process = psutil.Process(pid)
    before, begin = process.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, end = process.cpu_times(), time.monotonic()
    return (after.user + after.system - before.user - before.system) / (end - begin)


def main(seconds: float) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "app.py").write_text(APP)
        log = (folder / "out").open("w")
        server = subprocess.Popen([sys.executable, __file__, "serve"], cwd=folder, stdout=log, stderr=log)
        try:
            while (folder / "out").read_text().count("| running") < AGENTS:
                assert server.poll() is None, (folder / "out").read_text()
                time.sleep(0.2)
            time.sleep(5)
            flow = cpu(server.pid, seconds)
            played = psutil.Process(server.pid).children()
            agents = next(child for child in played if "play" in child.cmdline())
            ports = sorted({c.laddr.port for c in agents.net_connections("tcp") if c.status == psutil.CONN_LISTEN})
            floor = subprocess.Popen([sys.executable, __file__, "poll", *map(str, ports)])
            time.sleep(3)
            alone = cpu(floor.pid, seconds)
            floor.kill()
            floor.wait()
        finally:
            server.terminate()
            server.wait(30)
    print(json.dumps({
        "agents": AGENTS, "seconds": seconds, "flow_share_of_a_core": round(flow, 4), "target": 0.10,
        "floor_polling_alone": round(alone, 4), "load": os.getloadavg()[0],
    }, indent=1))  # fmt: skip


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["play"]:
            asyncio.run(play())
        case ["serve"]:
            sys.exit(serve(Path.cwd()))
        case ["poll", *given]:
            asyncio.run(poll([int(port) for port in given]))
        case given:
            main(float(given[0]) if given else 20.0)
