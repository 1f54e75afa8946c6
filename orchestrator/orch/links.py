"""The agents of one app: found or launched, attached, told things in order, looked after, replaced, released.

Each agent has one link: what is sent to it goes one request after another, equal neighbours in one. "local" is the
agent of this machine: it serves all Works, or, where Works have places of their own, the pages. It is started with the
server; an agent of a Work's own when the engine asks for it.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import secrets as random_secrets
import time
from collections import deque
from collections.abc import Coroutine, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urlsplit

import msgspec

from orch import events as e
from orch.errors import OrchError, RuntimeLost, StaleEpoch
from orch.mirror import LogMirror
from orch.peer import HttpPeer
from orch.runtimes.base import AgentDied, Handle, PlacementError, Runtime
from orch.wire import (
    LOCAL,
    AgentSpec,
    AgentStatus,
    Attach,
    Ended,
    Placed,
    Push,
    Shutdown,
    StartReply,
    decode,
    encode,
)
from orch_drive import DriveError
from orch_drive.crash import crash_point

if TYPE_CHECKING:
    from orch.engine import Engine
    from orch.paths import AppFolder

__all__ = ["Links"]

log = logging.getLogger(__name__)
T = TypeVar("T")

POLL_EVERY = 2.0
POLL_TIMEOUT = 5.0
"""A slow link is no dead one."""
AGENT_STOP = 5.0
"""Seconds from the last script's end to the agent's."""
AGENT_TRIES = 3
DRIVE_WITHIN = 5.0
LISTEN_AGAIN = 2.0
KILL_AGAIN = 10.0
UNREADABLE = 422
"""HTTP status of a request that does not fit its message type: nothing of it was done."""


ANSWERS: dict[str, Any] = {"place": list[Placed], "start": list[StartReply]}


class Teller(Protocol):
    """What is said to the terminal."""

    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


class Server(Protocol):
    """What links need of the flow server that they belong to."""

    folder: AppFolder
    engine: Engine
    drive_url: str
    agent_tokens: Mapping[str, str]
    """Of agents that an earlier server has launched."""

    @property
    def console(self) -> Teller: ...
    def put(self, event: e.Event) -> None: ...
    async def journalled(self) -> None: ...
    def agent_spec(self, agent: str, epoch: int, token: str, port: int) -> AgentSpec: ...
    def drive_epoch(self) -> int: ...
    async def listen_for(self, agent: str) -> None: ...
    def flow_url(self, agent: str) -> str: ...
    def runtime_of(self, agent: str) -> Runtime: ...
    def runtimes(self) -> list[Runtime]: ...


@dataclass
class Link:
    """The ordered stream of requests to one agent."""

    agent: str
    runtime: Runtime
    peer: HttpPeer
    handle: Handle | None = None
    queue: deque[tuple[str, Any]] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    heard: float = 0.0
    """When it gave the last sign of life (monotonic), and when it was last asked for one."""
    asked: float = 0.0
    unanswered: float | None = None
    """Since when it has been asked in vain."""
    gone: float | None = None
    """Of an agent that has ended and has no successor yet: when it was last heard."""
    poll: asyncio.Task[None] | None = None
    telling: asyncio.Task[None] | None = None
    poll_peer: HttpPeer = field(default_factory=lambda: HttpPeer(POLL_TIMEOUT, name="orch-poll"))
    attached: bool = False
    ask: bool = False
    """Its status is wanted although it pushes."""
    ending: bool = False
    """Given up, and being ended."""
    singly: int = 0
    """So many requests go one at a time: the agent could not read one of them."""
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while the agent is launched, replaced or released."""
    acts: set[asyncio.Task[Any]] = field(default_factory=set)
    """What has, or waits for, the turn, and is over when the agent is given up."""
    launched: int = 0
    """The last incarnation that was asked for."""
    former: list[Handle] = field(default_factory=list)
    """Given up, and to be ended before another one is launched."""
    waits: str = ""
    """What its launch waits for, as was told."""
    mirror: LogMirror | None = None
    """Where the agent's logs are on another machine."""
    sender: asyncio.Task[None] = field(init=False)

    @property
    def where(self) -> str:
        """For messages."""
        pid = (self.handle or {}).get("pid")
        return f"agent {self.agent} (pid {pid})" if pid else f"agent {self.agent}"

    async def close(self) -> None:
        self.sender.cancel()
        # In threads: where a machine does not answer, a request that is under way cannot be broken off at once.
        closing = [asyncio.to_thread(self.peer.close), asyncio.to_thread(self.poll_peer.close)]
        if self.mirror is not None:
            closing.append(self.mirror.close())
        await asyncio.gather(*closing)


class Links:
    """Made by the server before its engine is there: the agent of this machine starts while app.py is imported."""

    def __init__(self, server: Server, *, started: float, cut_off: bool, brought: bool = False) -> None:
        """`started`: seconds since the epoch, now. `cut_off`: the run that is resumed was not ended, so its agents and
        scripts may still live. `brought`: its journal comes from another disk, and nothing else."""
        self._server = server
        self._started = started
        self._cut_off = cut_off
        self._brought = brought
        self._links: dict[str, Link] = {}
        self._epochs: dict[str, int] = {}
        self._tokens: dict[str, str] = {}
        self.begun = asyncio.Event()
        """Pushes are answered."""
        self._group: asyncio.TaskGroup | None = None
        self._tasks: set[asyncio.Task[Any]] = set()
        self._past: int | None = None
        """All epochs are higher."""
        self._swept = asyncio.Event()
        """Nothing of an earlier run is left."""
        self._left: dict[str, Handle] = {}
        """Of Works' own agents: what an earlier server knew of them, until it is taken up by their links."""
        self._found: list[str] = []

    def start(self, group: asyncio.TaskGroup) -> None:
        """The engine runs: there may be something to send."""
        self._group = group

    def begin(self) -> None:
        """Pushes are answered: agents may be attached."""
        self.begun.set()
        self._task(self._poll_loop(), "poll")
        for agent in self._found:
            link = self._link(agent)
            if link.handle is not None:
                self._act(link, self._find_again(agent, link.handle), "find")
            elif link.former:  # released by a server that died before it was done
                self._task(self._release(link, None, 0.0), f"release-{agent}")

    def expect(self) -> None:
        """Before the engine of a run that was cut off starts: which agents it may hear of again."""
        engine = self._server.engine
        for agent in [*engine.agents, *engine.released]:
            left = None if agent == LOCAL else self._server.runtime_of(agent).found(agent)
            known = engine.agents.get(agent)
            if left is None:
                engine.forget_agent(agent)
                continue
            self._left[agent] = left
            self._found.append(agent)
            if known is not None:
                known.expected = left["epoch"] >= known.epoch

    def token(self, agent: str) -> str | None:
        return self._tokens.get(agent)

    def pid(self, agent: str) -> int | None:
        link = self._links.get(agent)
        return None if link is None or link.handle is None else link.handle.get("pid")

    def _task(self, work: Coroutine[Any, Any, Any], name: str) -> asyncio.Task[Any]:
        assert self._group is not None
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _act(self, link: Link, work: Coroutine[Any, Any, Any], name: str) -> None:
        task = self._task(work, f"{name}-{link.agent}")
        link.acts.add(task)
        task.add_done_callback(link.acts.discard)

    # -- found or launched --------------------------------------------------------------------------------------------

    async def first(self) -> AgentStatus | None:
        """This machine's agent: adopt the one that an earlier server left here, or stop it and launch a new one."""
        runtime, console = self._server.runtime_of(LOCAL), self._server.console
        if not self._cut_off:
            try:
                for other in self._server.runtimes():
                    for line in await other.sweep():
                        console.note(line)
            except RuntimeLost as error:  # there is nowhere to run anything
                self._server.put(e.StopApp(code=1, message=error.line))
                return None
        self._swept.set()
        left = runtime.found(LOCAL)
        if left is not None and self._cut_off:
            self._tokens[LOCAL] = left["token"]
        if left is not None and self._cut_off and not runtime.shared_records:
            return await self._find_again(LOCAL, left)
        alive = left is not None and await runtime.adopt(left)
        if left is not None and alive and self._cut_off and await self._answers(left):
            self._epochs[LOCAL] = left["epoch"]
            console.note(f"adopting the agent that is still running (pid {left['pid']})")
            try:
                return await self._attach(LOCAL, left)
            except AgentDied:
                alive = False
        if not self._cut_off:
            if left is not None or any(self._server.folder.run_records()):
                await asyncio.to_thread(self._end_leftovers)
        elif left is not None and alive:
            # It hangs, and its scripts need not know: they are adopted by the next one.
            console.note(f"the agent (pid {left['pid']}) does not answer: replacing it, its scripts go on")
            await runtime.kill(left)
        return await self._launch(LOCAL, await self._after(left), left["port"] if left and self._cut_off else 0)

    async def _find_again(self, agent: str, left: Handle) -> AgentStatus | None:
        """An agent of a machine that may not be reached now: not hearing of it is no proof of its end."""
        self._tokens[agent], self._epochs[agent] = left["token"], left["epoch"]
        await self.begun.wait()
        link = self._link(agent)
        async with link.turn:
            await self._listen_for(link)
            why = await self._poll(link, left)
            if why is None:
                try:
                    return await self._attach(agent, left)
                except RuntimeLost as error:
                    why = error.message
            if link.ending:  # given up meanwhile
                return None
            return await self._next_or_none(link, left, why)

    async def _listen_for(self, link: Link) -> None:
        """Agents can be answered where they are, sooner or later."""
        begin, told = time.monotonic(), False
        while True:
            try:
                await self._server.listen_for(link.agent)
                return
            except OrchError as error:
                if not told:
                    self._server.console.warn(f"{error.line}: asking again")
                told = True
            await self._tell_silence(link, time.monotonic() - begin)
            await asyncio.sleep(LISTEN_AGAIN)

    async def _after(self, left: Handle | None, agent: str = LOCAL) -> int:
        """The epoch of the next incarnation."""
        # Drives outlive runs and records, and refuse an older epoch: epochs grow with time whatever is lost.
        if self._past is None:
            self._past = max(int(self._started * 1000), await self._past_epoch() + 1)
        return max(self._epochs.get(agent, 0) + 1, (left["epoch"] if left else 0) + 1, self._past)

    async def _past_epoch(self) -> int:
        """The highest that the app's Drives have seen: the clock may have been set back, or be behind that of another
        machine that ran the app before."""
        server = self._server
        try:
            return await asyncio.wait_for(asyncio.to_thread(server.drive_epoch), DRIVE_WITHIN)
        except DriveError as error:
            server.console.warn(f"{error.message} - {error.hint}" if error.hint else error.message)
        except TimeoutError:
            server.console.warn(f"the Drive at {server.drive_url} does not answer")
        except Exception as error:  # whatever the library of some other storage raises
            server.console.warn(f"the Drive at {server.drive_url} cannot be used: {type(error).__name__}: {error}")
        return 0

    async def _answers(self, handle: Handle) -> bool:
        peer = HttpPeer(timeout=2.0)
        try:
            status, _ = await peer.get(f"{handle['url']}/v1/status", handle["token"])
            return status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            await asyncio.to_thread(peer.close)

    def _end_leftovers(self) -> None:
        from orch.leftovers import clear_records, end_agents, end_scripts

        end_agents(self._server.folder, self._server.console.note)
        end_scripts(self._server.folder, self._server.console.note)
        clear_records(self._server.folder)

    def launch(self, agent: str) -> None:
        """The engine asks for an agent of a Work's own. (This machine's is started with the server.)"""
        if agent != LOCAL:
            link = self._link(agent)
            self._act(link, self._bring(link), "launch")

    async def _bring(self, link: Link) -> None:
        await self._swept.wait()
        async with link.turn:
            await self._clear(link)
            known = self._server.engine.agents.get(link.agent)
            if known is not None and known.launching:
                await self._launch_next(link, max(known.epoch + 1, await self._after(None, link.agent)), 0)

    async def _launch(self, agent: str, epoch: int, port: int, *, dead: bool = False) -> AgentStatus | None:
        for tries in range(1, AGENT_TRIES):
            try:
                return await self._launch_once(agent, epoch, port, dead)
            except AgentDied as error:
                if self._epochs.get(agent) != epoch:  # given up meanwhile
                    return None
                self._server.console.warn(f"{error.line}: starting another one ({tries} of {AGENT_TRIES - 1})")
                epoch += 1
        return await self._launch_once(agent, epoch, port, dead)

    async def _launch_once(self, agent: str, epoch: int, port: int, dead: bool) -> AgentStatus | None:
        # One token for all incarnations: one that is replaced must hear that (409), not that it is a stranger (401).
        if agent not in self._tokens:
            self._tokens[agent] = self._server.agent_tokens.get(agent) or random_secrets.token_urlsafe(32)
            if agent != LOCAL:
                self._server.engine.note_fact("agent_token", agent, self._tokens[agent])
        token = self._tokens[agent]
        self._epochs[agent] = epoch
        runtime = self._server.runtime_of(agent)
        await self._server.listen_for(agent)
        if agent in self._links:
            self._links[agent].launched = epoch
        handle = await runtime.launch(self._server.agent_spec(agent, epoch, token, port))
        if agent in self._links:
            self._links[agent].handle = handle  # whoever gives it up from here on has to end it
        return await self._attach(agent, handle, dead=dead)

    # -- attached -----------------------------------------------------------------------------------------------------

    async def _attach(self, agent: str, handle: Handle, *, dead: bool = False) -> AgentStatus | None:
        """None if it was given up meanwhile. Raises AgentDied, RuntimeLost."""
        await self.begun.wait()
        await self._server.listen_for(agent)
        link, engine = self._link(agent), self._server.engine
        newest = engine.agents[agent].epoch if agent in engine.agents else 0
        if handle["epoch"] < newest:  # given up by a server that died before the next one was launched
            await link.runtime.kill(handle)
            return await self._launch(agent, newest, 0)
        link.handle = handle
        number = engine.know_agent(agent, handle["epoch"])
        begin = time.monotonic() if link.gone is None else link.gone
        told = False
        while True:
            await self._server.journalled()  # what an agent knows is never ahead of what survives
            link.queue.clear()  # what is said from here on is newer than what is attached, and the rest is said again
            rev = engine.tree.rev
            attach = Attach(
                flow_url=self._server.flow_url(agent),
                epoch=handle["epoch"],
                number=number,
                acked=engine.agents[agent].acked,
                works=engine.attach_vars(agent),
            )
            try:
                status, body = await link.peer.post(f"{handle['url']}/v1/attach", encode(attach), handle["token"])
                break
            except (OSError, http.client.HTTPException) as error:
                # Not hearing of it is no proof of anything: it may have scripts, and only a network lies between.
                why = f"the agent {agent} does not answer ({str(error) or type(error).__name__})"
                if await link.runtime.ended(handle, 1.0):
                    log_file = self._server.folder.logs / f"agent-{agent}.log"
                    raise AgentDied(why, hint=f"see {log_file}") from error
                if link.handle is not handle:
                    return None
                if not told:
                    self._server.console.warn(f"{why}: asking it again")
                    told = True
                await self._tell_silence(link, time.monotonic() - begin)
        if link.handle is not handle:
            return None
        if status != 200:
            raise RuntimeLost(f"agent {agent} refuses this server: HTTP {status} {body[:200]!r}")
        crash_point("flow.agent.attached")
        known = _decoded(AgentStatus, body)
        if known is None:
            raise RuntimeLost(f"what answers in place of agent {agent} is none: {body[:200]!r}")
        link.heard = time.monotonic()
        link.unanswered = link.gone = None
        link.attached = True
        if (mirror := self._mirror(link, handle)) is not None:
            for report in known.works:
                if report.call is not None:
                    mirror.add(report.work, report.call, ended=report.stage == "ended")
        host = urlsplit(handle["url"]).hostname or ""
        since = 0 if link.runtime.shared_records else _since(handle)
        epoch = handle["epoch"]
        self._server.put(e.AgentUp(agent=agent, epoch=epoch, status=known, rev=rev, host=host, since=since, dead=dead))
        link.wake.set()
        return known

    def _link(self, agent: str) -> Link:
        if agent not in self._links:
            link = Link(agent, self._server.runtime_of(agent), HttpPeer(name=f"orch-to-{agent}"))
            self._links[agent] = link
            link.sender = self._task(self._sender(link), f"link-{agent}")
            left = self._left.pop(agent, None)
            if left is not None:
                known = self._server.engine.agents.get(agent)
                self._tokens[agent], self._epochs[agent] = left["token"], left["epoch"]
                if known is not None and known.expected:
                    link.handle = left
                    self._mirror(link, left)
                else:
                    self._leave(link, left)
        return self._links[agent]

    def _mirror(self, link: Link, handle: Handle) -> LogMirror | None:
        """Where the logs are that it brings here, if they are on another machine."""
        if link.runtime.shared_files:
            return None
        if link.mirror is None:
            link.mirror = LogMirror(self._server.folder.logs)
        link.mirror.follow(handle["url"], handle["token"], _since(handle))
        return link.mirror

    # -- told ---------------------------------------------------------------------------------------------------------

    def send(self, agent: str, kind: str, messages: Iterable[Any]) -> None:
        """`kind` is the endpoint. What cannot be delivered waits; a new incarnation is told everything anew."""
        link = self._link(agent)
        link.queue.extend((kind, message) for message in messages)
        link.wake.set()

    async def _sender(self, link: Link) -> None:
        delay = 0.05
        while True:
            if not link.queue or not link.attached:
                link.wake.clear()
                await link.wake.wait()
                continue
            kind = link.queue[0][0]
            batch: list[Any] = []
            for queued, message in link.queue:
                if queued != kind or len(batch) >= (1 if link.singly else 1000):
                    break
                batch.append(message)
            try:
                assert link.handle is not None
                handle = link.handle
                crash_point("flow", f"{kind}.due")
                status, body = await link.peer.post(f"{handle['url']}/v1/{kind}", encode(batch), handle["token"])
                answer = decode(ANSWERS[kind], body) if status == 200 and kind in ANSWERS else []
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
                log.debug("agent %s: %s", link.agent, error)
                await asyncio.sleep(delay)
                delay = min(1.0, delay * 2)
                continue
            crash_point("flow", f"{kind}.answered")
            if link.handle is not handle:
                continue  # replaced meanwhile: that answer was another one's, and the queue a new one
            link.heard = time.monotonic()
            if status == RuntimeLost.status:  # it leaves: its successor will be asked
                await asyncio.sleep(delay)
                delay = min(1.0, delay * 2)
                continue
            delay = 0.05
            if status == UNREADABLE and len(batch) > 1:
                link.singly = len(batch)
                continue
            link.singly = max(0, link.singly - len(batch))
            for _ in batch:
                link.queue.popleft()
            self._take_answer(link, kind, batch, status, body, answer)

    def _take_answer(
        self, link: Link, kind: str, batch: list[Any], status: int, body: bytes, answer: list[Any]
    ) -> None:
        put = self._server.put
        if status != 200:
            why = f"agent {link.agent} refused {kind}: HTTP {status} {body[:300].decode(errors='replace')}"
            if status == UNREADABLE and kind == "place":
                put(e.PlacedWorks(agent=link.agent, placed=[Placed(work=m.work, error=why) for m in batch]))
            elif status == UNREADABLE and kind == "start":
                no = [StartReply(call=m.call, attempt=m.attempt, accepted=False, error=why) for m in batch]
                put(e.StartAnswered(replies=no, works=[message.work for message in batch]))
            else:
                self._server.console.warn(why)
        elif kind == "place":
            put(e.PlacedWorks(agent=link.agent, placed=answer))
        elif kind == "start":
            put(e.StartAnswered(replies=answer, works=[message.work for message in batch]))

    # -- heard --------------------------------------------------------------------------------------------------------

    async def hear(self, push: Push) -> None:
        """Before a push is taken. Raises StaleEpoch for one of a replaced agent."""
        link = self._links.get(push.agent)
        epoch = self._epochs.get(push.agent)
        if epoch is None:
            # Told that it is replaced, it would end its scripts; this server may yet adopt it.
            raise RuntimeLost(f"it is not decided yet what becomes of agent {push.agent}")
        if push.epoch != epoch:
            raise self.stale(push)
        if link is not None:
            link.heard = time.monotonic()
            if link.mirror is not None:
                for item in push.items:
                    if isinstance(item, Ended):  # whoever hears of the end finds the whole log
                        await link.mirror.complete(item.work, item.call)

    def stale(self, push: Push) -> StaleEpoch | RuntimeLost:
        """What an agent is to hear whose epoch was refused."""
        link = self._links.get(push.agent)
        if link is not None and link.ending and link.runtime.shared_records:
            # Told that it is replaced, it would end its scripts; on this machine its successor takes them over.
            return RuntimeLost(f"agent {push.agent} is being replaced")
        return StaleEpoch(f"agent {push.agent} epoch {push.epoch} was replaced")

    def ask(self, agent: str) -> None:
        """Its status is wanted soon."""
        self._link(agent).ask = True

    def follow(self, agent: str, work: str, call: str) -> int:
        """Bring what the call says to this machine, if it is on another one. Bytes of it that are here."""
        link = self._links.get(agent)
        if link is None or link.mirror is None:
            return 0
        link.mirror.add(work, call)
        return link.mirror.size(work, call)

    async def _poll_loop(self) -> None:
        """Liveness: a push counts; without one for POLL_EVERY the agent is asked; a dead local process is noticed."""
        while True:
            await asyncio.sleep(POLL_EVERY / 2)
            for link in [link for link in self._links.values() if link.handle is not None and link.attached]:
                await self._look_after(link)
            for link in list(self._links.values()):
                if link.gone is not None:
                    self._be_silent(link, time.monotonic() - link.gone)
                waits = link.runtime.waits(link.agent) if not link.attached else ""
                if waits != link.waits:
                    link.waits = waits
                    self._server.put(e.AgentWaits(agent=link.agent, message=waits))
            if self._server.engine.waits_for_leases:
                self._server.put(e.Steady(clock=time.monotonic()))

    async def _look_after(self, link: Link) -> None:
        handle = link.handle
        assert handle is not None
        gone = await self._poll(link, handle)
        if not link.attached or link.handle is not handle:
            return  # it is being replaced, or has been
        if gone is not None:
            link.attached, link.gone = False, link.heard
            self._act(link, self._bury(link, handle, gone), "replace")
            return
        now = time.monotonic()
        silence = now - link.heard
        if link.heard > link.asked:
            link.unanswered = None
        elif link.unanswered is not None and now - link.unanswered >= POLL_EVERY:
            # Only what was asked and not answered is silence: this process may have been stopped itself.
            self._be_silent(link, silence)
        if (silence >= POLL_EVERY or link.ask) and (link.poll is None or link.poll.done()):
            link.ask = False
            link.asked = now
            link.unanswered = link.unanswered or now
            # A task of its own: one that does not answer must not keep the others waiting.
            link.poll = self._task(self._ask_status(link, handle), f"poll-{link.agent}")

    async def _poll(self, link: Link, handle: Handle) -> str | None:
        try:
            return await link.runtime.poll(handle)
        except (OrchError, OSError) as error:
            log.warning("nothing is known of agent %s: %s", link.agent, error)
            return None

    def _be_silent(self, link: Link, silence: float) -> None:
        if link.telling is None or link.telling.done():
            link.telling = self._task(self._tell_silence(link, silence), f"silent-{link.agent}")

    async def _tell_silence(self, link: Link, silence: float) -> None:
        now, handle, heard = time.monotonic(), link.handle, link.heard
        reachable = await self._reachable(link, now)
        if link.handle is not handle or link.heard != heard:
            return
        self._server.put(e.AgentPolled(agent=link.agent, status=None, silence=silence, clock=now, reachable=reachable))

    async def _ask_status(self, link: Link, handle: Handle) -> None:
        try:
            status, body = await link.poll_peer.get(f"{handle['url']}/v1/status", handle["token"])
        except (OSError, http.client.HTTPException) as error:
            log.debug("agent %s does not answer: %s", link.agent, error)
            return
        known = _decoded(AgentStatus, body) if status == 200 else None
        if known is None or link.handle is not handle:
            return
        link.heard = time.monotonic()
        self._server.put(e.AgentPolled(agent=link.agent, status=known))

    async def _reachable(self, silent: Link, now: float) -> bool:
        """Whether this machine reaches anything but the silent agent. (Its own agent, where others are elsewhere, says
        nothing of that.)"""
        alike = (link for link in self._links.values() if link.runtime is silent.runtime)
        others = (link for link in alike if link is not silent and link.attached)
        return any(now - link.heard < 2 * POLL_EVERY for link in others) or await silent.runtime.reachable()

    # -- replaced, released, ended ------------------------------------------------------------------------------------

    async def _bury(self, link: Link, old: Handle, why: str) -> None:
        """The agent's process is gone."""
        async with link.turn:
            if link.handle is old:
                await self._next_or_none(link, old, why)

    async def _next_or_none(self, link: Link, old: Handle, why: str) -> AgentStatus | None:
        """A new incarnation adopts what it left; if its place is gone too, the engine decides whether there is
        anything left to do."""
        own = link.runtime.own_places
        if not own or await link.runtime.adoptable(old):
            self._server.console.warn(f"{link.where} {why}: starting a new one")
            epoch = await self._after(old, link.agent)
            return await self._launch_next(link, epoch, old["port"], old=old, dead=own)
        self._server.console.warn(f"{link.where} {why}")
        await self._kill(link, old)
        await self._lose(link, old, why)
        return None

    async def _lose(self, link: Link, old: Handle, why: str) -> None:
        """Its place has ended, that is certain."""
        epoch = await self._after(old, link.agent)
        link.handle = link.gone = None
        link.attached = False
        self._epochs[link.agent] = epoch
        self._server.put(e.AgentGone(agent=link.agent, epoch=epoch, message=why))

    def _leave(self, link: Link, handle: Handle | None) -> None:
        """The engine has given this agent up: whatever is being done about it is over, and it is to be ended."""
        if link.runtime.own_places:
            for act in link.acts:
                act.cancel()
        if handle is not None:
            link.former.append(handle)
        link.handle = link.gone = None
        link.attached = False
        link.queue.clear()

    async def _clear(self, link: Link) -> None:
        """End what was given up, if that can be done."""
        while link.former:
            await self._kill(link, link.former[0])
            del link.former[0]

    async def _kill(self, link: Link, handle: Handle) -> None:
        """Also a later incarnation in its place, of which nothing came."""
        try:
            await link.runtime.kill({**handle, "epoch": max(handle["epoch"], link.launched)})
        except (OrchError, OSError) as error:
            self._server.console.warn(f"agent {link.agent} cannot be ended: {error}")

    def replace(self, agent: str, epoch: int) -> None:
        """The engine has given this agent up: from here on it is refused, and epoch `epoch` takes its place."""
        link = self._link(agent)
        self._leave(link, link.handle)
        self._epochs[agent] = epoch = max(epoch, self._epochs.get(agent, 0) + 1)
        link.ending = True
        self._act(link, self._replace_silent(link, epoch), "replace")

    async def _replace_silent(self, link: Link, epoch: int) -> None:
        """End it if that can be done, it may be only a network away; launch another."""
        async with link.turn:
            self._server.console.warn(f"agent {link.agent} is given up: starting a new one")
            port = link.former[-1]["port"] if link.former else 0
            await self._clear(link)
            link.ending = False
            await self._launch_next(link, epoch, port)

    async def _launch_next(
        self, link: Link, epoch: int, port: int, *, old: Handle | None = None, dead: bool = False
    ) -> AgentStatus | None:
        """`old`: of which it is the successor, in the same place if that is still there."""
        link.attached = False
        try:
            return await self._launch(link.agent, epoch, port, dead=dead)
        except (OrchError, OSError) as error:
            line = error.line if isinstance(error, OrchError) else str(error)
            reason = error.reason if isinstance(error, PlacementError) else "exception"
            for each in (link.handle, old):
                if each is not None:
                    await self._kill(link, each)
            link.handle = link.gone = None
            if old is not None and link.runtime.own_places and not await link.runtime.adoptable(old):
                await self._lose(link, old, line)
            else:
                epoch = self._epochs[link.agent]
                self._server.put(e.AgentFailed(agent=link.agent, epoch=epoch, message=line, reason=reason))
            return None

    def release(self, agent: str, epoch: int, grace: float) -> None:
        """Its Work needs it no more: from here on it is refused; its scripts end, its place is given back."""
        link = self._link(agent)
        handle = link.handle
        self._leave(link, handle)
        self._epochs[agent] = max(epoch, self._epochs.get(agent, 0) + 1)
        self._task(self._release(link, handle, grace), f"release-{agent}")

    async def _release(self, link: Link, handle: Handle | None, grace: float) -> None:
        while True:
            async with link.turn:
                if handle is not None and handle in link.former:
                    if link.mirror is not None:
                        link.mirror.hurry = True
                    await self._end(link, handle, kill=False, timeout=grace + AGENT_STOP)
                handle = None
                await self._clear(link)
                left = None if link.handle is not None else link.runtime.found(link.agent)
                if left is None:
                    break
                link.former.append(left)  # out of reach
            await asyncio.sleep(KILL_AGAIN)
        engine, agent = self._server.engine, link.agent
        if agent in engine.agents or self._links.get(agent) is not link:
            return
        del self._links[agent]  # its Work was removed
        engine.forget_agent(agent)
        engine.note_fact("agent_token", agent, None)
        self._tokens.pop(agent, None)
        await link.close()

    async def end(self, *, kill: bool) -> None:
        """The app is over: agents stop what is left and exit."""
        self._cancel_tasks()  # nothing is launched or looked after any more
        links = [(link, link.handle) for link in self._links.values() if link.handle is not None]
        ended = await asyncio.gather(*(self._end(*each, kill=kill, timeout=AGENT_STOP) for each in links))
        if not all(over for over, (link, _) in zip(ended, links, strict=True) if link.runtime.shared_records):
            await asyncio.to_thread(self._end_leftovers)
        for runtime in self._server.runtimes():
            runtime.reap()
            try:
                for line in await runtime.sweep():
                    self._server.console.note(line)
            except RuntimeLost as error:
                self._server.console.warn(error.line)

    async def _end(self, link: Link, handle: Handle, *, kill: bool, timeout: float) -> bool:
        """Whether the agent has ended by itself."""
        ended = False
        try:
            crash_point("flow.shutdown.due")
            await link.peer.post(f"{handle['url']}/v1/shutdown", encode(Shutdown(kill=kill)), handle["token"])
            crash_point("flow.shutdown.answered")
            ended = await link.runtime.ended(handle, timeout)
            crash_point("flow.shutdown.ended")
        except (OSError, http.client.HTTPException) as error:
            log.debug("agent %s does not answer: %s", link.agent, error)
        if not ended or link.runtime.own_places:
            await self._kill(link, handle)
        return ended

    async def close(self) -> None:
        self._cancel_tasks()
        await asyncio.gather(*(link.close() for link in self._links.values()))
        for runtime in self._server.runtimes():
            runtime.close()

    def _cancel_tasks(self) -> None:
        for task in list(self._tasks):
            task.cancel()


def _since(handle: Handle) -> int:
    """The first incarnation in its place."""
    return int(handle["since"] if "since" in handle else handle["epoch"])


def _decoded(kind: type[T], body: bytes) -> T | None:
    """None if it is none: something else may answer where an agent was."""
    try:
        return decode(kind, body)
    except msgspec.MsgspecError:
        return None
