"""A flow server and its agents in one thread and in virtual time (see virtual.py).

Service, Engine, Journal, Program, Agent, Outbox and Records are the real ones, and so are the routes. Played are: the
network (`Network` in place of HttpPeer, with faults), the processes (`Machine` in place of the Spawner: scripts, and
the waiters that outlive agents), and what places agents (`SimRuntime`).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import random
import secrets as real_secrets
import sys
import time as real_time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import pytest
from virtual import Clock, Party, VirtualExecutor, VirtualLoop, VirtualTime, here, steady

import orch.loader
from orch.app import App
from orch.cli.options import RunOptions
from orch.errors import RuntimeLost
from orch.flow import Flow
from orch.paths import AppFolder, agent_spec_file
from orch.peer import HttpPeer
from orch.runtimes.base import AgentDied, Handle, Infeasible
from orch.runtimes.local import LocalRuntime
from orch.server import open_routes
from orch.server.serve import HttpServer
from orch.server.sockets import bind_socket
from orch.service import Service
from orch.wire import LOCAL, AgentSpec, Push, decode, encode
from orch_workers import places, waiter
from orch_workers.agent import Agent
from orch_workers.process import ExitRecord, ProcessSpec, Spawner
from orch_workers.records import ReadyFile
from orch_workers.routes import make_app

__all__ = [
    "KINDS",
    "AgentProcess",
    "Behaviour",
    "Faults",
    "Machine",
    "Script",
    "ServerProcess",
    "World",
    "simulate",
    "simulation",
    "until",
]

KINDS = ("push", "heartbeat", "attach", "status", "place", "start", "stop", "forget", "state")
FATES = ("lost", "refused", "mute", "broken", "twice", "late", "slow", "slow answer")
"""lost: the request; mute: the answer; refused, broken: the same, and the sender hears of it at once; twice: executed
twice; late: and once more when newer ones have been; slow: it may arrive after newer ones."""
SERVER_HOST = "127.0.0.1"
TERM, KILL = 15, 9


@dataclass
class Faults:
    """How often what happens to a message of each kind; 0 for all: a good network."""

    share: dict[str, float] = field(default_factory=dict)
    slowest: float = 6.0
    latest: float = 20.0


@dataclass
class Endpoint:
    party: Party
    app: Any
    waiting: list[Callable[[], None]] = field(default_factory=list)
    """Resets what is asked and not answered."""


@dataclass
class Message:
    kind: str
    machine: Machine | None
    """The agent's."""
    up: bool
    """From agent to flow."""
    url: str
    method: str
    body: bytes
    token: str
    sender: Party


# ---- the network -----------------------------------------------------------------------------------------------------


class Network:
    """Carries requests between parties, each with a fate of its own."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.loop = world.loop
        self.random = random.Random(f"network {world.seed}")
        self.faults = Faults()
        self.decide: Callable[[Message], str] = lambda message: ""
        """A fate that is not left to chance."""
        self.endpoints: dict[str, Endpoint] = {}
        self.cuts: dict[tuple[str, bool], float] = {}
        """(machine, up): until when nothing passes."""
        self.neutral = world.neutral

    def listen(self, netloc: str, endpoint: Endpoint) -> None:
        self.endpoints[netloc] = endpoint

        def gone() -> None:
            if self.endpoints.get(netloc) is endpoint:
                del self.endpoints[netloc]
            for reset in endpoint.waiting:
                reset()

        endpoint.party.at_end.append(gone)

    def cut(self, machine: Machine, up: bool, seconds: float) -> None:
        self.world.note(f"cut {machine.name} {'up' if up else 'down'} for {seconds:.1f} s")
        self.cuts[machine.name, up] = self.loop.now + seconds

    def is_cut(self, machine: Machine | None, up: bool) -> float:
        """Seconds for which nothing passes."""
        return max(0.0, self.cuts.get((machine.name if machine else "", up), 0.0) - self.loop.now)

    def good(self) -> None:
        self.faults = Faults()
        self.cuts.clear()

    def send(self, message: Message) -> asyncio.Future[tuple[int, bytes]]:
        answer: asyncio.Future[tuple[int, bytes]] = self.loop.create_future()
        fate = self.decide(message) or "ok"
        if fate == "ok" and self.random.random() < self.faults.share.get(message.kind, 0.0):
            fate = self.random.choice(FATES)
        self.world.trace.append((self.loop.now, message, fate))
        delay = self._delay(self.faults.slowest if fate == "slow" else 0.0)
        if fate == "lost":
            return answer
        if fate == "refused":
            self._later(delay, self._fail, message, answer)
            return answer
        self._later(delay, self._arrive, message, answer, fate)
        if fate in ("twice", "late"):
            again = self._delay(self.faults.latest if fate == "late" else 0.0)
            self._later(delay + again, self._arrive, message, None, "again")
        return answer

    def _delay(self, upto: float) -> float:
        return self.random.uniform(0.0003, 0.003) + (self.random.uniform(0.1, upto) if upto else 0.0)

    def _later(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        self.loop.at(self.loop.now + seconds, function, *args, context=self.neutral)

    def _passes(self, message: Message, up: bool, again: Callable[[], None]) -> bool:
        """Whether it passes the link now; else it is lost, or sent again by the kernel when the link is back."""
        left = self.is_cut(message.machine, up)
        if not left:
            return True
        if self.random.random() < 0.5:
            self._later(left + self._delay(1.0), again)
        return False

    def _arrive(self, message: Message, answer: asyncio.Future[Any] | None, fate: str) -> None:
        if self.world.over or not self._passes(message, message.up, lambda: self._arrive(message, answer, fate)):
            return
        endpoint = self.endpoints.get(urlsplit(message.url).netloc)
        if endpoint is None or endpoint.party.ended:
            self._later(self._delay(0.0), self._fail, message, answer)
            return
        if fate == "again":
            self.world.trace.append((self.loop.now, message, "arrives again"))

        def reset() -> None:
            self._later(self._delay(0.0), self._fail, message, answer)

        endpoint.waiting.append(reset)
        endpoint.party.task(self._serve(endpoint, message, answer, fate, reset))

    async def _serve(
        self, endpoint: Endpoint, message: Message, answer: Any, fate: str, reset: Callable[[], None]
    ) -> None:
        try:
            status, body = await call(endpoint.app, message.method, message.url, message.body, message.token)
        except Exception as error:
            self.world.fail(f"{message.kind}: {endpoint.party.name} raised {error!r}", error)
            return
        endpoint.waiting.remove(reset)
        if status >= 400 and status != 409:
            self.world.note(f"{message.kind} to {endpoint.party.name}: {status} {body[:200]!r}")
        if fate == "mute":
            return
        if fate == "broken":
            reset()
            return
        delay = self._delay(self.faults.slowest if fate == "slow answer" else 0.0)
        self._later(delay, self._return, message, answer, (status, body))

    def _return(self, message: Message, answer: asyncio.Future[Any] | None, reply: tuple[int, bytes]) -> None:
        if answer is None or not self._passes(message, not message.up, lambda: self._return(message, answer, reply)):
            return
        if not answer.done():
            answer.set_result(reply)

    def _fail(self, message: Message, answer: asyncio.Future[Any] | None) -> None:
        if answer is None or not self._passes(message, not message.up, lambda: self._fail(message, answer)):
            return
        if not answer.done():
            answer.set_exception(ConnectionResetError("connection reset"))


async def call(app: Any, method: str, url: str, body: bytes, token: str) -> tuple[int, bytes]:
    """One request to an ASGI app."""
    path = urlsplit(url).path
    headers = [
        (b"host", b"test"),
        (b"authorization", f"Bearer {token}".encode()),
        (b"content-type", b"application/json"),
    ]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "path": path,
        "raw_path": path.encode(), "query_string": b"", "root_path": "", "scheme": "http", "headers": headers,
        "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80),
    }  # fmt: skip
    incoming = [{"type": "http.request", "body": body, "more_body": False}]
    status, content = 0, b""

    async def receive() -> Any:
        return incoming.pop() if incoming else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal status, content
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            content += message.get("body", b"")

    await app(scope, receive, send)
    return status, content


class Peer:
    """`orch.peer.HttpPeer` on the network of the party that uses it."""

    def __init__(self, timeout: float = 10.0, *, name: str = "orch-peer") -> None:
        self._timeout = timeout
        self._turn = asyncio.Lock()
        self._origin = ""
        self._reused = False
        self._asked: asyncio.Future[Any] | None = None
        self._closed = False

    async def get(self, url: str, token: str) -> tuple[int, bytes]:
        return await self._request("GET", url, b"", token)

    async def post(self, url: str, body: bytes, token: str) -> tuple[int, bytes]:
        return await self._request("POST", url, body, token)

    def close(self) -> None:
        self._closed = True
        if self._asked is not None and not self._asked.done():
            self._asked.set_exception(ConnectionResetError("closed"))

    async def _request(self, method: str, url: str, body: bytes, token: str) -> tuple[int, bytes]:
        async with self._turn:
            origin = urlsplit(url).netloc
            reused, self._reused = self._reused and origin == self._origin, False
            self._origin = origin
            try:
                answer = await self._exchange(method, url, body, token)
            except OSError:
                if not reused or self._closed:
                    raise
                answer = await self._exchange(method, url, body, token)
            self._reused = True
            return answer

    async def _exchange(self, method: str, url: str, body: bytes, token: str) -> tuple[int, bytes]:
        party = here()
        assert party is not None
        world: World = party.world  # type: ignore[attr-defined]
        if self._closed or world.over:
            raise ConnectionResetError("closed")
        kind = urlsplit(url).path.rsplit("/", 1)[1]
        up = kind == "push"
        if up and not decode(Push, body).items:
            kind = "heartbeat"
        machine = party.machine if up else world.machine_at(url)  # type: ignore[attr-defined]
        self._asked = world.network.send(Message(kind, machine, up, url, method, body, token, party))
        async with asyncio.timeout(self._timeout):
            return await self._asked  # type: ignore[no-any-return]


# ---- machines and what runs on them ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Behaviour:
    """What a script does."""

    seconds: float = 1.0
    code: int = 0
    writes: float | None = None
    """Seconds between its writes."""
    hears: float | None = 0.0
    """Seconds from a TERM to its end; None: it ignores it."""
    lingers: float = 0.0
    """Seconds that a descendant needs to end."""
    listens: float | None = None
    """Seconds until it answers on its port."""


class Script:
    """A script and its waiter: they outlive the agent."""

    def __init__(self, machine: Machine, spec: ProcessSpec, contact: str) -> None:
        world = machine.world
        self.machine, self.world, self.spec = machine, world, spec
        self.key = spec.key
        self.work, self.call = spec.env["ORCH_WORK"], spec.env["ORCH_CALL"]
        self.attempt = int(spec.env["ORCH_ATTEMPT"])
        self.port = int(spec.env["ORCH_PORT"])
        self.pid = world.number()
        self.does = world.behave(self)
        self.begin = world.loop.now
        self.started_at = VirtualTime().time()
        self.recorded, self.gone = asyncio.Event(), asyncio.Event()
        self.exit: ExitRecord | None = None
        self.known = True
        """Its run record is there."""
        self.stopped = self.cut = False
        self.writes: list[tuple[int, str]] = []
        """Number and fate of each write: ok, later (202), maybe."""
        self._deadline = self._heard = float("inf")
        self._contact = contact
        self._poke = asyncio.Event()

    @property
    def lives(self) -> bool:
        return not self.gone.is_set()

    def listens(self) -> bool:
        wait = self.does.listens
        return wait is not None and self.exit is None and self.world.loop.now >= self.begin + wait

    def die(self) -> None:
        """With its machine: nobody is left who could write down how it has ended."""
        if self.lives:
            self.world.note(f"{self.key} dies with {self.machine.name}")
            self.gone.set()

    def stop(self, grace: float) -> None:
        now = self.machine.shows()
        if not self.stopped and self.does.hears is not None:
            self._heard = now + self.does.hears
        self.stopped = True
        self._deadline = min(self._deadline, now + grace)
        self._poke.set()

    async def live(self) -> None:
        """The waiter, with its script."""
        writing = asyncio.ensure_future(self._write()) if self.does.writes is not None else None
        natural = self.machine.shows() + self.does.seconds
        lease = self.spec.lease
        while True:
            now = self.machine.shows()
            due = min(natural, self._heard, self._deadline)
            if lease is not None and not self.stopped:
                over = self.machine.contacts.get(self._contact, 0.0) + lease
                if over <= now:
                    self.cut = True
                    self.stop(self.spec.lease_grace)
                    continue
                due = min(due, over)
            if now >= min(natural, self._heard, self._deadline):
                break
            self._poke.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._poke.wait(), due - now)
        if writing is not None:
            writing.cancel()
        code: int | None = self.does.code
        signal = None
        if natural > now:
            code, signal = None, (TERM if self._heard <= now else KILL)
        self.exit = ExitRecord(
            self.key, exit_code=code, signal=signal, at=VirtualTime().time(), stopped=self.stopped, cut=self.cut
        )
        self.world.note(f"{self.key} ends: code {code} signal {signal}{' cut' if self.cut else ''}")
        self.recorded.set()
        await asyncio.sleep(min(self.does.lingers, self.spec.grace))
        self.gone.set()

    async def _write(self) -> None:
        assert self.does.writes is not None
        number = 0
        while True:
            await asyncio.sleep(self.does.writes)
            number += 1
            value = [self.call, self.attempt, number]
            body = encode([{"op": "add", "path": "/log/-", "value": value}])
            while True:
                fate = await self._patch(body)
                if fate:
                    break
                await asyncio.sleep(0.3)
            self.writes.append((number, fate))

    async def _patch(self, body: bytes) -> str:
        """Empty if nobody was there who could have taken it."""
        env = self.spec.env
        url = env["ORCH_STATE_URL"]
        endpoint = self.world.network.endpoints.get(f"{self.machine.host}:{urlsplit(url).port}")
        if endpoint is None or not endpoint.party.runs:
            return ""
        answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def say(fate: str) -> None:
            if not answer.done():
                answer.set_result(fate)

        async def ask() -> None:
            status, content = await call(endpoint.app, "PATCH", url, body, env["ORCH_TOKEN"])
            say({200: "ok", 202: "later"}.get(status, f"refused {status} {content[:200]!r}"))

        def dead() -> None:
            say("maybe")

        endpoint.party.at_end.append(dead)
        endpoint.party.task(ask())
        fate = await answer
        endpoint.party.at_end.remove(dead)
        return fate


class Machine:
    """A computer: its clock, its disk, its waiters."""

    def __init__(self, world: World, folder: Path, clock: Clock) -> None:
        self.world = world
        self.name = f"m{len(world.machines)}"
        self.host = f"10.0.0.{len(world.machines)}"
        self.folder = folder
        self.clock = clock
        self.scripts: list[Script] = []
        self.contacts: dict[str, float] = {}
        self.party = world.party(f"waiters of {self.name}", self)
        self._ports = iter(range(20_000, 60_000))
        world.machines.append(self)

    def shows(self) -> float:
        return self.clock.shows(self.world.loop.now)

    def free_port(self) -> int:
        return next(self._ports)

    def end(self) -> None:
        """Power off."""
        self.party.kill()
        for script in self.scripts:
            script.die()

    def find(self, key: str) -> Script | None:
        """What its run record speaks of."""
        return next((script for script in self.scripts if script.known and script.key == key), None)

    def fork(self, spec: ProcessSpec, contact: str) -> Script:
        known = self.find(spec.key)
        if known is not None:
            return known
        if self.party.ended:
            raise RuntimeError(f"{self.name} is off")
        script = self.party.run(Script, self, spec, contact)
        self.world.started(script)
        self.scripts.append(script)
        self.party.task(script.live())
        return script


class SimProcess:
    """A handle, as `orch_workers.process.Process`."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self.key, self.pid, self.argv, self.started_at = script.key, script.pid, script.spec.argv, script.started_at
        self.pids = [script.pid]

    async def wait(self) -> ExitRecord:
        await self._script.recorded.wait()
        assert self._script.exit is not None
        return self._script.exit

    async def gone(self) -> None:
        await self._script.gone.wait()

    async def stop(self, grace: float) -> None:
        self._script.stop(grace)
        await self._script.gone.wait()

    def forget(self) -> None:
        self._script.known = False


class SimSpawner:
    """`orch_workers.process.Spawner`."""

    def __init__(self, record_dir: Path, *, contact: str, **_: Any) -> None:
        self.machine = _machine()
        self.contact = contact

    async def start(self, spec: ProcessSpec) -> SimProcess:
        world = self.machine.world
        asked: asyncio.Future[Script] = asyncio.get_running_loop().create_future()

        def fork() -> None:  # once it has been asked for, it comes, whatever becomes of this agent
            if not self.machine.party.ended:
                asked.set_result(self.machine.fork(spec, self.contact))

        world.loop.at(world.loop.now + world.random.random() ** 3 * 0.05, fork, context=world.neutral)
        script = await asked
        await asyncio.sleep(world.random.random() ** 3 * 0.05)
        return SimProcess(script)

    async def warm(self) -> None: ...
    async def _light_server(self) -> None: ...
    async def aclose(self) -> None: ...

    def note_contact(self, at: float) -> None:
        self.machine.contacts[self.contact] = at

    @staticmethod
    def adopt(record_dir: Path) -> list[SimProcess]:
        return [SimProcess(script) for script in _machine().scripts if script.known]


class SimPlaces:
    """`orch_workers.places`."""

    def address_of(self, bind: str) -> str:
        return _machine().host

    def free_port(self, taken: Any, host: str = "") -> int:
        return _machine().free_port()

    def accepts(self, host: str, port: int) -> bool:
        return any(script.port == port and script.listens() for script in _machine().scripts)

    def listens(self, port: int, pids: Any) -> bool:
        return True

    async def answers(self, host: str, port: int, path: str, timeout: float = 2.0) -> bool:
        return self.accepts(host, port)


def _machine() -> Machine:
    party = here()
    assert party is not None
    return party.machine  # type: ignore[attr-defined, no-any-return]


# ---- agents and servers ----------------------------------------------------------------------------------------------


class AgentProcess:
    """`python -m orch_workers`."""

    def __init__(self, world: World, machine: Machine, spec: AgentSpec, launcher: Party) -> None:
        self.world, self.machine, self.spec = world, machine, spec
        self.party = world.party(f"agent {spec.work or ''}{spec.epoch % 100_000}", machine)
        self.party.process = self  # type: ignore[attr-defined]
        self.pid = world.number()
        self.agent: Agent | None = None
        self.ready: asyncio.Future[Handle] = world.loop.create_future()
        self.attached = False
        world.agents.append(self)

        def launcher_gone() -> None:
            if not self.attached:
                self.party.kill()

        if not spec.bound:
            launcher.at_end.append(launcher_gone)
        self.party.at_end.append(self._gone)
        self.party.task(self._main())

    def _gone(self) -> None:
        if not self.ready.done():
            kind = RuntimeLost if self.party.runs else AgentDied
            self.ready.set_exception(kind("the agent exited"))
            self.ready.exception()

    async def _main(self) -> None:
        try:
            await self._serve()
        except Exception as error:
            self.world.fail(f"{self.party.name} cannot go on: {error!r}", error)
        self.party.end()

    async def _serve(self) -> None:
        spec, machine = self.spec, self.machine
        await asyncio.sleep(self.world.random.uniform(0.05, 1.0))
        port = spec.port or machine.free_port()
        netloc = f"{machine.host}:{port}"
        if netloc in self.world.network.endpoints:
            return  # the port is taken
        agent = self.agent = Agent(spec, port)
        handle: Handle = {
            "agent": spec.agent, "epoch": spec.epoch, "pid": self.pid, "url": f"http://{netloc}", "port": port,
            "token": spec.token,
        }  # fmt: skip
        agent.records.write_ready(
            ReadyFile(
                agent=spec.agent, epoch=spec.epoch, pid=self.pid, pid_start="", boot_id="", url=handle["url"],
                port=port, token=spec.token,
            )
        )  # fmt: skip
        async with agent.running():
            self.world.network.listen(netloc, Endpoint(self.party, make_app(agent)))
            if not spec.bound:
                self.world.handles[spec.agent] = handle
            self.ready.set_result(handle)
            await agent.leaving.wait()
            await agent.flushed(0.5)
            agent.close_links()
        agent.records.remove_ready(spec.epoch)
        if self.world.handles.get(spec.agent) is handle:
            del self.world.handles[spec.agent]


class SimRuntime:
    """`shared_records`: all incarnations of an agent are on one machine; else each is on one of its own."""

    name = "sim"

    def __init__(self, world: World) -> None:
        self.world = world
        self.orphan_timeout: float | None = None
        self.shared_records = world.shared
        self.shared_files, self.own_places = True, False
        self._launched: list[AgentProcess] = []

    async def launch(self, spec: AgentSpec) -> Handle:
        world, server = self.world, here()
        assert server is not None
        machine = world.machines[0] if self.shared_records else world.machine()
        (machine.folder / "run").mkdir(parents=True, exist_ok=True)
        agent_spec_file(machine.folder / "run", spec.agent).write_bytes(encode(spec))
        world.handles.pop(spec.agent, None)
        process = AgentProcess(world, machine, msgspec.structs.replace(spec, orch_dir=str(machine.folder)), server)
        self._launched.append(process)
        return await asyncio.shield(process.ready)

    def _process(self, handle: Handle) -> AgentProcess:
        return next(process for process in self.world.agents if process.pid == handle["pid"])

    def _cut(self, there: AgentProcess | SimPlace) -> bool:
        """A machine that cannot be reached cannot be asked, nor can anything on it be ended."""
        if self.shared_records:
            return False
        network = self.world.network
        return bool(network.is_cut(there.machine, True) or network.is_cut(there.machine, False))

    async def poll(self, handle: Handle) -> str | None:
        process = self._process(handle)
        return "is gone" if process.party.ended and not self._cut(process) else None

    async def adopt(self, handle: Handle) -> bool:
        return await self.poll(handle) is None

    async def kill(self, handle: Handle) -> None:
        process = self._process(handle)
        if not self._cut(process):
            process.party.kill()

    async def ended(self, handle: Handle, timeout: float) -> bool:
        over = asyncio.Event()
        process = self._process(handle)
        process.party.at_end.append(over.set)
        if process.party.ended:
            return True
        try:
            await asyncio.wait_for(over.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def adoptable(self, handle: Handle) -> bool:
        return self.shared_records

    async def sweep(self) -> list[str]:
        return []

    async def host(self) -> str:
        return "127.0.0.1"

    def waits(self, agent: str) -> str:
        return ""

    async def reachable(self) -> bool:
        return True

    def found(self, agent: str) -> Handle | None:
        return self.world.handles.get(agent)

    def kill_started(self) -> None:
        for process in self._launched:
            process.party.kill()

    def reap(self) -> None: ...

    def close(self) -> None: ...


class SimPlace:
    """What an engine has given to the agent of one Work: a machine, until the engine takes it back."""

    def __init__(self, world: World, agent: str) -> None:
        self.world, self.agent = world, agent
        self.machine = world.machine()
        self.since = 0
        self.process: AgentProcess | None = None
        self.told = False
        """A server has got its handle."""
        self.given_up = False
        """It could not be reached when it was to end: the engine knows nothing of it any more."""
        world.places.append(self)

    @property
    def lives(self) -> bool:
        return not self.machine.party.ended

    @property
    def epoch(self) -> int:
        """Of its agent."""
        return 0 if self.process is None else self.process.spec.epoch

    def start(self, spec: AgentSpec) -> AgentProcess:
        """Another incarnation; a former one is killed, its scripts go on."""
        port = 0
        if self.process is not None:
            self.process.party.kill()
            port = spec.port
        self.since = self.since or spec.epoch
        there = msgspec.structs.replace(spec, orch_dir=str(self.machine.folder), port=port, bound=True)
        (self.machine.folder / "run").mkdir(parents=True, exist_ok=True)
        agent_spec_file(self.machine.folder / "run", spec.agent).write_bytes(encode(there))
        process = self.process = AgentProcess(self.world, self.machine, there, self.machine.party)
        process.party.at_end.append(lambda: self._left(process))
        return process

    def _left(self, process: AgentProcess) -> None:
        """An agent that has left by itself has nothing here any more; one that was killed is waited for."""
        if not process.party.runs:
            return

        def leave() -> None:
            if self.process is process:
                self.end()

        self.world.loop.at(self.world.loop.now + 1.0, leave, context=self.world.neutral)

    def end(self) -> None:
        if self.lives:
            self.world.note(f"the place of {self.agent}, {self.machine.name}, ends")
            if self.process is not None:
                self.process.party.kill()
            self.machine.end()


class PlacesRuntime(SimRuntime):
    """Gives each Work's agent a place of its own, as `orch.runtimes.ray` does."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.shared_records, self.own_places = False, True
        self.orphan_timeout = 1_800.0

    async def launch(self, spec: AgentSpec) -> Handle:
        world, server = self.world, here()
        assert server is not None
        if spec.epoch <= world.epochs.get(spec.agent, 0):
            world.fail(f"epoch {spec.epoch} of {spec.agent} is not above {world.epochs[spec.agent]}")
        world.epochs[spec.agent] = spec.epoch
        place = self._taken(spec.agent)
        while place is not None and self._cut(place):  # it cannot be asked, so it is not known to have ended
            await asyncio.sleep(0.5)
            place = self._taken(spec.agent)
        new = place is None
        if place is None:
            await asyncio.sleep(world.random.choice(world.waits))  # others have what it needs
            while world.full:
                await asyncio.sleep(0.1)
            if world.none_fits:
                raise Infeasible(f"{spec.agent} cannot be placed: no machine has what it needs")
            place = SimPlace(world, spec.agent)
        process = place.start(spec)
        try:
            found = await asyncio.shield(process.ready)
        except asyncio.CancelledError:
            if new:
                place.end()
            raise
        world.handles[spec.agent] = handle = {**found, "since": place.since}
        place.told = True
        return handle

    def _taken(self, agent: str) -> SimPlace | None:
        """What is known under that name."""
        known = (place for place in self.world.places if place.agent == agent and place.lives and not place.given_up)
        return next(known, None)

    def _place(self, handle: Handle) -> SimPlace:
        machine = self._process(handle).machine
        return next(place for place in self.world.places if place.machine is machine)

    async def poll(self, handle: Handle) -> str | None:
        place = self._place(handle)
        if self._cut(place):
            return None
        if not place.lives:
            return "has lost its place"
        return "is gone" if self._process(handle).party.ended else None

    async def adoptable(self, handle: Handle) -> bool:
        place = self._place(handle)
        return self._cut(place) or (place.lives and not place.given_up)

    async def kill(self, handle: Handle) -> None:
        place = self._place(handle)
        if place.epoch > handle["epoch"]:
            return
        if not self._cut(place):
            place.end()
        elif self.world.random.random() >= self.world.frees:
            return  # nothing can be done
        place.given_up = True
        self._end_later(place)
        if self.world.handles.get(place.agent) == handle:
            del self.world.handles[place.agent]

    def _end_later(self, place: SimPlace) -> None:
        """It hears of it when it can be reached."""
        if self._cut(place):
            self.world.loop.at(self.world.loop.now + 1.0, self._end_later, place, context=self.world.neutral)
        else:
            place.end()

    async def sweep(self) -> list[str]:
        left = [place for place in self.world.places if place.lives]
        for place in left:
            place.end()
        self.world.handles = {agent: handle for agent, handle in self.world.handles.items() if agent == LOCAL}
        return [f"the place of {place.agent} is ended" for place in left]


class Console:
    """Everything that is said goes into the trace."""

    def __init__(self, world: World) -> None:
        self.world = world

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *args: self.world.note(f"[{name}] {' '.join(map(str, args))}"[:300])


class SeededSecrets:
    """The module `secrets`, for a life that can be repeated."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(f"secrets {seed}")

    def token_urlsafe(self, size: int = 32) -> str:
        return self._random.randbytes(size).hex()

    def __getattr__(self, name: str) -> Any:
        return getattr(real_secrets, name)


class FakeSocket:
    def __init__(self, port: int) -> None:
        self.port = port

    def getsockname(self) -> tuple[str, int]:
        return SERVER_HOST, self.port


class FakeServer:
    """`orch.server.serve.HttpServer`."""

    def __init__(self, **_: Any) -> None: ...

    async def start(self, backend: Any, host: str, sock: Any) -> int:
        party = here()
        assert party is not None

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await open_routes.push(backend, scope, receive, send)

        party.world.network.listen(f"{SERVER_HOST}:{sock.port}", Endpoint(party, app))  # type: ignore[attr-defined]
        return int(sock.port)

    async def app(self) -> None: ...
    async def stop(self) -> None: ...


class ServerProcess:
    """`orch run`."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.party = world.party(f"server {world.number()}", world.machines[0])
        self.party.clock = Clock()
        self.service: Service | None = None
        self.code: int | None = None
        self.task = self.party.task(self._main())

    async def _main(self) -> None:
        world = self.world
        app_file = world.folder / "app.py"
        options = RunOptions(app_file=app_file)
        runtime = PlacesRuntime(world) if world.own_places else SimRuntime(world)
        self.service = Service(options, AppFolder(world.folder), Console(world), runtime)
        try:
            self.code = await self.service.main()
        except Exception as error:
            world.fail(f"{self.party.name} cannot go on: {error!r}", error)
        self.party.end()

    @property
    def serves(self) -> bool:
        return self.service is not None and hasattr(self.service, "_begun") and self.service._begun.is_set()

    def kill(self) -> None:
        self.world.note(f"kill {self.party.name}")
        self.party.kill()
        journal = getattr(self.service, "journal", None)
        if journal is not None:
            journal._db.close()

    async def ask(self, make: Callable[[Service], Any]) -> Any:
        """A REST request, so to speak; ConnectionResetError if the server is killed meanwhile."""
        if not self.serves or self.party.ended:
            raise ConnectionRefusedError
        service = self.service
        assert service is not None
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        async def ask() -> None:
            try:
                value = await make(service)
            except Exception as error:
                if not answer.done():
                    answer.set_exception(error)
            else:
                if not answer.done():
                    answer.set_result(value)

        def dead() -> None:
            if not answer.done():
                answer.set_exception(ConnectionResetError("the server was killed"))

        self.party.at_end.append(dead)
        self.party.task(ask())
        try:
            return await answer
        finally:
            self.party.at_end.remove(dead)


class World:
    """Everything of one seed."""

    def __init__(
        self,
        loop: VirtualLoop,
        folder: Path,
        seed: int,
        *,
        shared: bool = True,
        own_places: bool = False,
        rate: Callable[[], float] = lambda: 1.0,
        make_flow: Callable[[], Flow],
        behave: Callable[[Script], Behaviour],
        started: Callable[[Script], None] = lambda script: None,
    ) -> None:
        self.loop, self.folder, self.seed, self.shared = loop, folder, seed, shared
        self.own_places = own_places
        self.neutral = contextvars.copy_context()
        self.random = loop.random
        self.trace: list[tuple[float, Any, str]] = []
        self.failures: list[str] = []
        self.over = False
        self.machines: list[Machine] = []
        self.agents: list[AgentProcess] = []
        self.handles: dict[str, Handle] = {}
        """What the runtime can find again, whoever asks."""
        self.places: list[SimPlace] = []
        self.epochs: dict[str, int] = {}
        """By agent with a place of its own: the newest that was launched."""
        self.network = Network(self)
        self.make_flow, self.behave, self.on_start = make_flow, behave, started
        self.rate = rate
        self.port_taken = False
        self.waits = [0.0, 0.0, 1.0, 10.0]
        self.full = self.none_fits = False
        """No place is free; or there is none at all."""
        self.frees = 0.5
        """How often an engine can take back what cannot be reached, by knowing nothing of it any more."""
        self._numbers = 1000
        self._next_port = 7500
        folder.mkdir(exist_ok=True)
        (folder / "app.py").touch()
        AppFolder(folder).create()
        self.machine()

    def number(self) -> int:
        self._numbers += 1
        return self._numbers

    def party(self, name: str, machine: Machine) -> Party:
        party = Party(self.loop, name, machine.clock)
        party.world, party.machine = self, machine  # type: ignore[attr-defined]
        return party

    def machine(self) -> Machine:
        """A new one; the first one is where the server is."""
        first = not self.machines
        folder = self.folder / ".orch" if first else self.folder / f"m{len(self.machines)}"
        folder.mkdir(exist_ok=True)
        return Machine(self, folder, Clock(self.rate(), self.random.uniform(-2.0, 2.0)))

    def machine_at(self, url: str) -> Machine:
        return next(machine for machine in self.machines if machine.host == urlsplit(url).hostname)

    def scripts(self) -> Iterator[Script]:
        for machine in self.machines:
            yield from machine.scripts

    def started(self, script: Script) -> None:
        self.note(f"{script.key} starts on {script.machine.name}: {script.does}")
        self.on_start(script)

    def living(self) -> list[AgentProcess]:
        return [process for process in self.agents if not process.party.ended and process.agent is not None]

    def agent(self) -> AgentProcess | None:
        """The newest that lives, if there is one."""
        living = self.living()
        return living[-1] if living else None

    def port(self, wanted: int) -> int:
        """For a server: the one that it had, unless that is taken."""
        if self.port_taken:
            self._next_port += 1
            return self._next_port
        return wanted

    def note(self, text: str) -> None:
        self.trace.append((self.loop.now, None, text))

    def fail(self, text: str, error: BaseException | None = None) -> None:
        if self.over:
            return
        if error is not None:
            text += "\n" + "".join(traceback.format_exception(error))
        self.note(f"FAILURE {text}")
        self.failures.append(text)

    def lines(self) -> list[str]:
        """The trace, to be read."""
        shown = []
        for now, message, text in self.trace:
            if message is None:
                shown.append(f"{now:9.3f}  {text}")
            else:
                body = message.body[:400].decode(errors="replace")
                shown.append(f"{now:9.3f}  {message.sender.name} {message.kind} ({text}) {body}")
        return shown


@contextlib.contextmanager
def simulation(seed: int, *, limit: float = float("inf")) -> Iterator[VirtualLoop]:
    """A loop in virtual time, and the modules that take it as theirs."""
    loop = VirtualLoop(random.Random(f"loop {seed}"), limit=limit)

    def load_app(path: Path, argv: list[str]) -> App:
        party = here()
        assert party is not None
        return App(party.world.make_flow(), name="simulated")  # type: ignore[attr-defined]

    def bind(host: str, port: int, **_: Any) -> FakeSocket:
        party = here()
        assert party is not None
        return FakeSocket(party.world.port(port))  # type: ignore[attr-defined]

    def attached(parent: int) -> None:
        party = here()
        assert party is not None
        party.process.attached = True  # type: ignore[attr-defined]

    def local(run_dir: Path, log_dir: Path) -> SimRuntime:
        party = here()
        assert party is not None
        return SimRuntime(party.world)  # type: ignore[attr-defined]

    stand_ins = {
        id(original): (original, double)
        for original, double in [
            (real_time, VirtualTime()),
            (real_secrets, SeededSecrets(seed)),
            (ThreadPoolExecutor, VirtualExecutor),
            (HttpPeer, Peer),
            (bind_socket, bind),
            (orch.loader.load_app, load_app),
            (HttpServer, FakeServer),
            (waiter.steady, steady),
            (waiter.die_with, attached),
            (places, SimPlaces()),
            (Spawner, SimSpawner),
            (LocalRuntime, local),
        ]
    }
    with pytest.MonkeyPatch.context() as patch:
        for module in [sys.modules[name] for name in sys.modules if name.split(".")[0] in ("orch", "orch_workers")]:
            for name, value in list(vars(module).items()):
                if id(value) in stand_ins:
                    patch.setattr(module, name, stand_ins[id(value)][1])
        asyncio.set_event_loop(loop)
        try:
            yield loop
        finally:
            try:
                loop.finish()
            finally:
                asyncio.set_event_loop(None)


def simulate(
    folder: Path,
    life: Callable[[World], Coroutine[Any, Any, None]],
    *,
    flow: type[Flow] = Flow,
    own_places: bool = False,
    **does: Any,
) -> World:
    """A life in virtual time on a good network."""

    def behave(script: Script) -> Behaviour:
        return Behaviour(**{"seconds": 1e9, **does})

    with simulation(0, limit=1_000.0) as loop:
        world = World(loop, folder, 0, make_flow=flow, behave=behave, own_places=own_places)
        world.waits = [0.0]
        try:
            loop.run_until_complete(life(world))
        finally:
            world.over = True
        assert not world.failures
        return world


async def until(what: Callable[[], Any], seconds: float = 60.0) -> Any:
    """The first true value."""
    async with asyncio.timeout(seconds):
        while not (value := what()):
            await asyncio.sleep(0.01)
    return value
