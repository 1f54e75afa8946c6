"""The shell around the engine: turns I/O into events and instructions into I/O. One task owns the engine.

    inbox -> engine.handle(...)  -> engine.settle()  -> journal.commit (one transaction, its own thread)
          -> instructions: run a pass (its own thread), talk to agents (one ordered link each), answer, publish

Everything acknowledged was committed before: answers, launches and event streams are instructions too.
"""

from __future__ import annotations

import asyncio
import functools
import http.client
import logging
import os
import secrets as random_secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from orch import events as e
from orch._version import __version__
from orch.engine import NO_RECORD, Config, Engine
from orch.errors import JournalError, NotFound, OrchError, RuntimeLost, StaleEpoch, StateTypeError, UsageError
from orch.journal import KEPT_RUNS, Batch, Journal, Revision
from orch.loader import load_app
from orch.logtail import LogTail, last_lines, showable
from orch.paths import AppFolder, ServerInfo
from orch.peer import HttpPeer
from orch.program import Program, with_calls
from orch.runtimes.base import AgentDied, Handle, Runtime
from orch.runtimes.local import LocalRuntime
from orch.server.backend import ApiRoute, Event, StaticTarget, UpstreamTarget, ViewTarget, WaitingTarget
from orch.server.sockets import bind_socket
from orch.state import copy_json, format_pointer
from orch.wire import (
    AgentSpec,
    AgentStatus,
    Attach,
    Forget,
    Op,
    Placed,
    Push,
    PushReply,
    Shutdown,
    StartReply,
    decode,
    encode,
)
from orch.work import WorkSpec
from orch_drive.crash import crash_point

if TYPE_CHECKING:
    from orch.api import Route
    from orch.cli.options import RunOptions
    from orch.flow import Flow
    from orch.server.serve import HttpServer

__all__ = ["ConsoleLike", "Service", "serve"]

log = logging.getLogger(__name__)

POLL_EVERY = 2.0
POLL_TIMEOUT = 5.0
"""A slow link is no dead one."""
EVENTS_KEPT = 10_000
EVENT_RESERVE = 100_000
LOG_EVERY = 0.2
AGENT_STOP = 5.0
AGENT_TRIES = 3
SLOW_PASS = 5.0
UNREADABLE = 422
"""HTTP status of a request that does not fit its message type: nothing of it was done."""


class ConsoleLike(Protocol):
    """What the service says to the terminal."""

    def step(self, text: str) -> None: ...
    def work(self, name: str, stage: str, detail: str = "") -> None: ...
    def url(self, url_with_token: str) -> None: ...
    def log(self, work: str, line: str) -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...
    def error(self, text: str) -> None: ...
    def failed(self, name: str, detail: str) -> None: ...
    def secret(self, name: str) -> str: ...
    def stopping(self, seconds: float) -> None: ...
    def done(self, code: int, message: str = "") -> None: ...


def serve(options: RunOptions, folder: AppFolder, console: ConsoleLike, runtime: Runtime | None = None) -> int:
    """Run the app until it ends; the exit code. The folder's lock is held by the caller. `runtime`: instead of the one
    that the options name."""
    if runtime is None and options.mode != "local":
        raise UsageError(f"the runtime {options.mode!r} is not part of this version", hint="use --local")
    service = Service(options, folder, console, runtime or LocalRuntime(folder.run, folder.logs))
    try:
        code = asyncio.run(service.main())
    except OrchError as error:
        if not service.in_pass:
            raise
        console.error(_line(error))
        code = 1
    if service.in_pass:
        # A thread cannot be ended, and Python would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


@dataclass
class _Link:
    """The ordered stream of requests to one agent: sent one after another, equal neighbours in one request."""

    agent: str
    peer: HttpPeer
    handle: Handle | None = None
    queue: deque[tuple[str, Any]] = field(default_factory=deque)
    wake: asyncio.Event = field(default_factory=asyncio.Event)
    heard: float = 0.0
    """When it gave the last sign of life (monotonic), and when it was last asked for one."""
    asked: float = 0.0
    unanswered: float | None = None
    """Since when it has been asked in vain."""
    poll: asyncio.Task[None] | None = None
    poll_peer: HttpPeer = field(default_factory=lambda: HttpPeer(POLL_TIMEOUT, name="orch-poll"))
    attached: bool = False
    ask: bool = False
    """Its status is wanted although it pushes."""
    ending: bool = False
    """Given up, and being ended."""
    singly: int = 0
    """So many requests go one at a time: the agent could not read one of them."""
    task: asyncio.Task[None] = field(init=False)


class Service:
    """One flow server. Implements `orch.server.backend.Backend`."""

    def __init__(self, options: RunOptions, folder: AppFolder, console: ConsoleLike, runtime: Runtime) -> None:
        self.options = options
        self.folder = folder
        self.console = console
        self.app_id = folder.app_id()
        self.token = folder.token()
        self.drive_url = options.drive or folder.drive.as_uri()
        self.name = options.name or folder.root.name
        self.run = 0
        self._cut_off = False
        """Resuming a run whose server died: its agents and scripts may still live."""
        self.started = time.time()
        self.url = ""
        self.code = 0
        self._broken: JournalError | None = None
        """Why the journal cannot be written: this server must end, and leaves the rest as a kill would."""
        self._told_held = False
        self.interrupted = False
        self._detaching = False
        self._over = False
        self._secrets = {name: value for name, value in options.secrets.items() if value}
        self._secret_forms: dict[str, tuple[str, ...]] = {}
        self._inbox: asyncio.Queue[e.Event] = asyncio.Queue()
        self._tickets = count(1)
        self._futures: dict[int, asyncio.Future[Any]] = {}
        self._links: dict[str, _Link] = {}
        self._events: deque[Event] = deque(maxlen=EVENTS_KEPT)
        self._event_id = 0
        self._event_reserved = 0
        self._changed: asyncio.Future[None] | None = None
        self._settled: asyncio.Future[None] | None = None
        self._pages: dict[str, dict[str, Any]] = {}
        self._tails: dict[str, LogTail] = {}
        self._counters = {"revisions_total": 0.0, "pushes_total": 0.0, "passes_total": 0.0}
        self._journal_thread = ThreadPoolExecutor(1, thread_name_prefix="orch-journal")
        self._pass_thread = ThreadPoolExecutor(1, thread_name_prefix="orch-pass")
        self._pass_ident = 0
        self.in_pass = False
        self._epochs: dict[str, int] = {}
        self._earlier_secrets: dict[int, list[str]] = {}
        """By run, whose values are not known any more."""
        self._exit_kill = False
        self._routes: list[ApiRoute] = []
        self._agent_tokens: dict[str, str] = {}
        self._work_tokens: dict[str, str] = {}
        self._runtime = runtime

    # Made when the loop runs: they belong to it.
    _exit: asyncio.Event
    _begun: asyncio.Event
    _first_pass: asyncio.Event
    _group: asyncio.TaskGroup
    journal: Journal
    program: Program
    engine: Engine

    # -- the life of a server -----------------------------------------------------------------------------------------

    async def main(self) -> int:
        """Start, serve, stop. Returns the exit code. Raises OrchError when the app cannot be started."""
        loop = asyncio.get_running_loop()
        self._exit, self._begun, self._first_pass = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._changed = loop.create_future()
        self.journal = await self._journal(self._open_journal)
        try:
            previous = self._choose_run()
            sock = self._listen()
            self.console.step(f"loading {self.options.app_file.name}")
            agent_ready = asyncio.ensure_future(self._first_agent())
            await asyncio.sleep(0)  # the agent starts on the other core while app.py is imported
            try:
                # asyncio would keep Ctrl-C for the next await; app.py may never come to one.
                asyncios = signal.signal(signal.SIGINT, signal.default_int_handler)
                app = load_app(self.options.app_file, list(self.options.argv))
                signal.signal(signal.SIGINT, asyncios)
                self._begin(app, previous)
            except BaseException:
                agent_ready.cancel()
                await asyncio.wait([agent_ready])
                self._runtime.kill_started()
                raise
            self._install_signals(loop)
            await self._serve(sock, agent_ready)
        finally:
            await self._journal(self._close_journal)
            self._journal_thread.shutdown()
            self._pass_thread.shutdown(wait=False)
        code = 130 if self.interrupted and self.code == 0 else self.code
        if not self._detaching:
            # A failure was told when it happened.
            self.console.done(code, "" if self.code else self.redacted(self.engine.message))
        return code

    def _listen(self) -> socket.socket:
        """The port is ours, and known to the engine, before anything is served on it."""
        options = self.options
        wanted = options.port
        if self._cut_off and not options.port_given:
            # Pages that are still open look for the app where it was.
            wanted = self.folder.last_port() or wanted
        sock = bind_socket(options.host, wanted)
        port = sock.getsockname()[1]
        if wanted and port != wanted:
            self.console.note(f"port {wanted} is taken, serving on {port}")
        self.url = f"http://{_shown_host(options.host)}:{port}"
        return sock

    async def _serve(self, sock: socket.socket, agent_ready: asyncio.Future[AgentStatus | None]) -> None:
        """From the first pass until the app has ended, or this server leaves it running."""
        server: HttpServer | None = None
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                engine = group.create_task(self._loop(), name="engine")
                await self._first_pass.wait()
                # Importing the web server takes longer than everything before it: the app runs meanwhile.
                from orch.server.serve import HttpServer

                server = HttpServer(allow_hosts=self.options.allow_hosts, load=False)
                await server.start(self, self.options.host, sock)
                self._begun.set()
                tasks = [
                    group.create_task(self._poll_loop(), name="poll"),
                    group.create_task(self._log_loop(), name="logs"),
                    group.create_task(self._announce(server, agent_ready), name="start"),
                ]
                await self._exit.wait()
                for task in tasks:
                    task.cancel()
                await self._await_agent(agent_ready)
                await self._end_agents(kill=self._exit_kill)
                self._read_logs()
                for link in self._links.values():
                    link.task.cancel()
                    link.peer.close()
                    link.poll_peer.close()
                engine.cancel()
                self._refuse_the_rest()
        except* (OrchError, OSError) as group_error:
            if not self._begun.is_set() and not self._cut_off:
                # Nothing has been started but the agent, which nobody would come back to.
                agent_ready.cancel()
                await asyncio.wait([agent_ready])
                self._runtime.kill_started()
            raise _first(group_error) from None
        finally:
            if server is not None:
                await server.stop()

    def _refuse_the_rest(self) -> None:
        """Nobody takes events any more: who waits for an answer, or asks now, shall know it."""
        self._over = True
        for future in self._futures.values():
            if not future.done():
                future.set_exception(RuntimeLost("the app has ended"))

    async def _await_agent(self, agent_ready: asyncio.Future[AgentStatus | None]) -> None:
        """An app that fails in its first pass is over before its agent is up: one that came up later would stay."""
        await asyncio.wait([agent_ready], timeout=AGENT_STOP)
        agent_ready.cancel()
        await asyncio.gather(agent_ready, return_exceptions=True)
        if agent_ready.cancelled() and not self._detaching:
            self._runtime.kill_started()

    def _open_journal(self) -> Journal:
        path, durable = self.folder.state_db, self.options.durable
        if not self.options.fresh:
            return Journal.open(path, durable=durable)
        journal, aside = Journal.open_anew(path, durable=durable)
        if aside is not None:
            self.console.note(f"{path} could not be read: it is {aside.name} now")
        return journal

    def _close_journal(self) -> None:
        if not self._detaching and self.run and self._exit.is_set():
            how = "interrupted" if self.interrupted else self.engine.stage
            self._snapshot_batch()
            self.journal.end_run(self.run, how)
        self.journal.close()

    def _choose_run(self) -> Any:
        """The run to go on with, or None for a new one."""
        runs = self.journal.runs()
        last = runs[-1] if runs else None
        self.run = last.run + 1 if last is not None else 1  # the agent is told before the run is journalled
        options = self.options
        if last is None or options.fresh:
            if options.resume:
                self.console.note("there is no run to resume: this is the first one")
            if last is not None and last.how is None:
                self.journal.end_run(last.run, "abandoned")
            return None
        if last.how is None:
            self.console.note(f"run {last.run} was cut off: resuming it (--fresh starts over)")
            self._cut_off = True
            self.run = last.run
            return last
        if options.resume:
            self.console.note(f"resuming run {last.run}")
            self.run = last.run
            return last
        return None

    def _begin(self, app: Any, previous: Any) -> None:
        """Objects, tree, engine; the journal's run."""
        options = self.options
        self.folder.claim(options.app_file, fresh=options.fresh)
        earlier = [run for run in self.journal.runs() if previous is None or run.run != previous.run]
        self._earlier_secrets = {run.run: run.secrets for run in earlier}
        self.name = options.name or app.name or self.folder.root.name
        self.program = Program(app.root, log_tail=self._tail_of)
        loop = asyncio.get_running_loop()

        def stray() -> None:
            loop.call_soon_threadsafe(self._take_stray)

        self.program.on_stray = stray
        meta = {
            "app": self.name,
            "app_file": str(options.app_file),
            "version": __version__,
            "drive": self.drive_url,
            "secrets": sorted(self._secrets),
        }
        rev, tree, revs = 0, self.program.node(), None
        facts: dict[str, dict[str, Any]] = {}
        clean = True
        if previous is None:
            self.run = self.journal.next_run()
        else:
            self._ask_secrets(previous.meta.get("secrets", []))
            clean = previous.how is not None
            loaded = self.journal.load(self.run)
            facts = loaded.facts
            records = facts.get("component", {})
            for line in loaded.damage:
                self.console.warn(f"{line}; made good from an earlier one")
            for line in self.program.restore(loaded.state, records, facts.get("call", {})):
                self.console.note(line)
            tree = with_calls(self.program.node(), loaded.state)
            rev, revs = loaded.rev, msgspec.json.decode(loaded.tree.snapshot().revs)
        for kind, value in facts.get("token", {}).items():
            self._work_tokens[kind] = value
        self._event_id = int(facts.get("event", {}).get("reserved", 0)) if facts else 0
        self._event_reserved = self._event_id
        self._know_secrets()
        for name, value in self.program.variables():
            self.refuse_secrets(value, name)
        for spec in self.program.specs():
            self.refuse_secrets(spec, f"{spec.name}: its declaration")
        self._bind_drive()
        config = Config(
            app=self.name,
            run=self.run,
            base_url=self.url,
            work_token=self._work_token,
            forget_token=self._forget_token,
            env=dict(options.env),
            secrets=self._secrets,
            page_secrets={"ORCH_FLOW_TOKEN": self.token},
            shared_records=self._runtime.shared_records,
            redact=self.refuse_secrets if self._secrets else None,
            hide=self.redacted,
        )
        self.engine = Engine(config, tree, self.program.specs(), rev=rev, revs=revs)
        if previous is not None:
            self.engine.restore(facts, clean=clean)
            if self.engine.ending:
                self.console.note("it was being ended when its server died: ending it now")
        self._take_routes(self.program.api_routes())
        # An app that cannot be started leaves no run behind, which the next `orch run` would resume.
        if previous is None:
            self.journal.begin_run(meta)
        elif clean:
            self.journal.resume_run(self.run)

    def _ask_secrets(self, names: list[str]) -> None:
        """The run that is resumed had these; their values were never written down."""
        for name in names:
            if name not in self._secrets:
                value = os.environ.get(name) or self.console.secret(name)
                if not value:
                    raise UsageError(
                        f"run {self.run} was started with the secret {name}, which is not kept",
                        hint=f"give it again: --secret {name}",
                    )
                self._secrets[name] = value

    def _take_routes(self, routes: list[Any]) -> None:
        self._routes = [self._api_route(flow, route) for flow, route in routes]

    def _api_route(self, flow: Flow, route: Route) -> ApiRoute:
        name = flow.name

        async def invoke(answer: Callable[[], Any]) -> Any:
            def method() -> Any:
                if flow._find_program() is None:  # by a pass that this request has waited for
                    raise NotFound(f"the flow {name} was removed")
                return answer()

            value, _ = await self._ask(lambda ticket: e.ApiRequest(ticket=ticket, method=method))
            return value

        return ApiRoute(method=route.method, route=route.route, endpoint=route.endpoint, invoke=invoke)

    async def _announce(self, server: HttpServer, agent_ready: asyncio.Future[AgentStatus | None]) -> None:
        """The app runs already; now the rest of the HTTP routes, the agent, and the URL for the user."""
        self.folder.write_server(
            ServerInfo(
                url=self.url,
                pid=os.getpid(),
                app_id=self.app_id,
                name=self.name,
                run=self.run,
                started=self.started,
                app_file=str(self.options.app_file),
            )
        )
        try:
            await asyncio.shield(agent_ready)
        except RuntimeLost as error:
            self._put(e.AgentFailed(agent="local", message=_line(error)))
        await server.app()
        self.console.url(f"{self.url}/?token={self.token}")
        await asyncio.to_thread(self._clear_logs)

    def _clear_logs(self) -> None:
        from orch.leftovers import clear_logs

        clear_logs(self.folder, self.run - KEPT_RUNS + 1)

    def _install_signals(self, loop: asyncio.AbstractEventLoop) -> None:
        loop.add_signal_handler(signal.SIGINT, self._on_interrupt)
        loop.add_signal_handler(signal.SIGTERM, self._on_terminate)
        if hasattr(signal, "SIGHUP"):
            loop.add_signal_handler(signal.SIGHUP, self._on_hangup)

    def _on_interrupt(self) -> None:
        if not self.interrupted and self.engine.stage in ("starting", "running"):
            self.interrupted = True
            self.console.stopping(self._longest_grace())
            self._put(e.StopApp(message="interrupted"))
        else:
            self.interrupted = True
            self._put(e.StopApp(kill=True))

    def _on_terminate(self) -> None:
        self.console.stopping(self._longest_grace())
        self._put(e.StopApp(message="terminated"))

    def _on_hangup(self) -> None:
        self._detaching = True
        self._exit.set()

    def _longest_grace(self) -> float:
        return max((w.spec.grace for w in self.engine.works.values() if w.live), default=0.0)

    # -- the one loop -------------------------------------------------------------------------------------------------

    def _put(self, event: e.Event) -> None:
        self._inbox.put_nowait(event)

    async def _ask(self, make: Callable[[int], e.Event]) -> Any:
        """Put an event that is answered; its answer, or its error raised."""
        if self._broken is not None:
            raise self._broken
        if self._over:
            raise RuntimeLost("the app has ended")
        ticket = next(self._tickets)
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._futures[ticket] = future
        self._put(make(ticket))
        try:
            return await future
        finally:
            self._futures.pop(ticket, None)

    async def _loop(self) -> None:
        inbox, engine = self._inbox, self.engine
        await self._perform(engine.start(time.time()))
        while True:
            due = engine.next_due()
            events: list[e.Event] = []
            if due is None:
                events.append(await inbox.get())
            else:
                try:
                    async with asyncio.timeout(max(0.0, due - time.time())):
                        events.append(await inbox.get())
                except TimeoutError:
                    events.append(e.Tick())
            while not inbox.empty():
                events.append(inbox.get_nowait())
            out: list[e.Instruction] = []
            now = time.time()
            for event in events:
                out += engine.handle(event, now)
            out += engine.settle(now)
            await self._perform(out)

    async def _perform(self, instructions: list[e.Instruction]) -> None:
        """Commit what the instructions rest on, then carry them out."""
        batch = self.engine.take_batch()
        if batch is not None:
            await self._commit(batch)
        for instruction in instructions:
            self._do(instruction)

    async def _commit(self, batch: e.Batch) -> None:
        revisions = [Revision(rev=r.rev, at=r.at, cause=r.cause, ops=r.ops) for r in batch.revisions]
        self._counters["revisions_total"] += len(revisions)
        snapshot = None
        if self.journal.due_snapshot() or self.engine.tree.rev == len(revisions):
            snapshot = self.engine.tree.snapshot()
        loop = asyncio.get_running_loop()
        settled = self._settled = loop.create_future()
        try:
            await loop.run_in_executor(
                self._journal_thread,
                self.journal.commit,
                self.run,
                Batch(revisions=revisions, facts=batch.facts, snapshot=snapshot, durable=batch.durable),
            )
        except JournalError as error:
            # The tree holds more than the journal does, and nobody may see it: from now on this is every answer.
            self._broken = error
            settled.set_exception(error)
            settled.exception()
            for future in self._futures.values():
                if not future.done():
                    future.set_exception(error)
            raise
        finally:
            if self._broken is None:
                self._settled = None
                settled.set_result(None)
        if self.journal.held and not self._told_held:
            self.console.warn(
                f"{self.folder.state_db}-wal has grown to {self.journal.held / 2**20:.0f} MiB, because a program that"
                " reads the database keeps a transaction open: end that program"
            )
        self._told_held = self.journal.held > 0

    def _snapshot_batch(self) -> None:
        self.journal.commit(self.run, Batch(snapshot=self.engine.tree.snapshot()))

    def _do(self, instruction: e.Instruction) -> None:
        match instruction:
            case e.Revised():
                self._publish(
                    "diff",
                    {"rev": instruction.rev, "cause": instruction.cause, "at": instruction.at, "ops": instruction.ops},
                )
            case e.Reply(ticket=ticket):
                future = self._futures.get(ticket)
                if future is not None and not future.done():
                    if instruction.error is not None:
                        future.set_exception(instruction.error)
                    else:
                        future.set_result(instruction.value)
            case e.RunPass(given=given):
                self._in_pass_thread(functools.partial(self.program.run_pass, given))
            case e.RunMethod(given=given, method=method):
                self._in_pass_thread(functools.partial(self.program.run_method, given, method))
            case e.ReloadProgram(tree=tree):
                self._pass_thread.submit(self.program.reload, tree)
            case e.SendDiffs(agent=agent, diffs=diffs):
                self._send(agent, "state", diffs)
            case e.StartCalls(agent=agent, calls=calls):
                for call in calls:
                    self._follow(call.work, call.call)
                self._send(agent, "start", calls)
            case e.StopCalls(agent=agent, calls=stops):
                self._send(agent, "stop", stops)
            case e.PlaceWorks(agent=agent, works=works):
                self._send(agent, "place", works)
            case e.ForgetWorks(agent=agent, works=names, rev=rev):
                self._send(agent, "forget", [Forget(work=name, rev=rev) for name in names])
            case e.PollAgent(agent=agent):
                self._link(agent).ask = True
            case e.ReplaceAgent(agent=agent, epoch=epoch):
                self._epochs[agent] = epoch  # the old one is refused from here on
                self._link(agent).ending = True
                self._group.create_task(self._replace_silent(self._link(agent), epoch), name=f"replace-{agent}")
            case e.LaunchAgent():
                pass  # the local agent is started with the server
            case e.Shown():
                self._catch_up(instruction.work)
                self._publish(
                    "status",
                    {"work": instruction.work, "stage": instruction.stage, "detail": instruction.detail},
                )
                if not instruction.hidden:
                    self.console.work(instruction.work, instruction.stage, self.redacted(instruction.detail))
                elif instruction.stage == "failed" or (instruction.stage == "pending" and instruction.detail):
                    page, detail = instruction.work.removeprefix("_"), self.redacted(instruction.detail)
                    self.console.warn(f"page {page}: {detail}; `orch logs _{page}` tells more")
            case e.Layout(tabs=tabs):
                self._publish("layout", {"tabs": tabs})
            case e.Frontends(frontends=frontends):
                self._put(e.Hidden(specs=self._page_specs(frontends)))
            case e.Routes(routes=routes):
                self._take_routes(routes)
            case e.FileEvent(drive=drive, manifest=manifest):
                self._file_event(drive, manifest)
            case e.Note(level=level, text=text):
                if instruction.work:
                    self.console.failed(instruction.work, self.redacted(instruction.detail))
                else:
                    say = {"error": self.console.error, "warning": self.console.warn}.get(level, self.console.note)
                    say(self.redacted(text))
                self._publish("app", {"level": level, "text": text})
            case e.Exit(code=code, kill=kill):
                self.code, self._exit_kill = code, kill
                self._exit.set()
                self._first_pass.set()  # it may never end

    def _in_pass_thread(self, body: Callable[[], Any]) -> None:
        loop = asyncio.get_running_loop()
        self.in_pass = True
        slow = loop.call_later(SLOW_PASS, self._warn_slow)

        def work() -> None:
            self._pass_ident = threading.get_ident()
            try:
                event: e.Event = e.PassEnded(result=body())
            except BaseException as error:
                event = e.PassEnded(result=_broken(error))
            self.in_pass = False
            loop.call_soon_threadsafe(self._pass_over, event, slow)

        self._pass_thread.submit(work)

    def _warn_slow(self) -> None:
        frame = sys._current_frames().get(self._pass_ident)
        inside = [f for f in traceback.extract_stack(frame) if Path(f.filename).is_relative_to(self.folder.root)]
        where = f" ({Path(inside[-1].filename).name}:{inside[-1].lineno} in {inside[-1].name})" if inside else ""
        self.console.warn(
            f"a pass has not ended for {SLOW_PASS:.0f} s{where}: run() must not wait or loop, Works do that"
        )

    def _take_stray(self) -> None:
        """A thread of the user's own has written state between passes: the objects have it, the tree follows."""
        ops, self.program.stray = self.program.stray, []
        if ops:
            self._put(e.Patch(ops=ops, cause="flow", known=True))

    def _pass_over(self, event: e.Event, slow: asyncio.TimerHandle) -> None:
        slow.cancel()
        self._counters["passes_total"] += 1
        self._put(event)
        self._first_pass.set()

    def _publish(self, kind: str, data: dict[str, Any]) -> None:
        self._event_id += 1
        self._events.append(Event(id=self._event_id, kind=kind, data=data))
        self._wake_readers()
        if self._event_id > self._event_reserved:
            self._event_reserved = self._event_id + EVENT_RESERVE
            self.engine.note_fact("event", "reserved", self._event_reserved)

    def _wake_readers(self) -> None:
        changed = self._changed
        if changed is not None and not changed.done():
            self._changed = changed.get_loop().create_future()
            changed.set_result(None)

    # -- agents -------------------------------------------------------------------------------------------------------

    def _work_token(self, name: str) -> str:
        if name not in self._work_tokens:
            self._work_tokens[name] = random_secrets.token_urlsafe(24)
            self.engine.note_fact("token", name, self._work_tokens[name])
        return self._work_tokens[name]

    def _forget_token(self, name: str) -> None:
        if self._work_tokens.pop(name, None) is not None:
            self.engine.note_fact("token", name, None)

    async def _first_agent(self) -> AgentStatus | None:
        """Adopt the agent that an earlier server left here, or stop it and launch a new one."""
        left = self._runtime.found("local")
        alive = left is not None and await self._runtime.adopt(left)
        if left is not None and self._cut_off:
            self._agent_tokens["local"] = left["token"]
        if left is not None and alive and self._cut_off and await self._answers(left):
            self._epochs["local"] = left["epoch"]
            self.console.note(f"adopting the agent that is still running (pid {left['pid']})")
            try:
                return await self._attach("local", left)
            except AgentDied:
                alive = False
        if not self._cut_off:
            if left is not None or any(self.folder.run_records()):
                await asyncio.to_thread(self._end_leftovers)
        elif left is not None and alive:
            # It hangs, and its scripts need not know: they are adopted by the next one.
            self.console.note(f"the agent (pid {left['pid']}) does not answer: replacing it, its scripts go on")
            await self._runtime.kill(left)
        # Drive manifests outlive runs and records, and refuse an older epoch: epochs grow with time whatever is lost.
        epoch = max((left["epoch"] if left else 0) + 1, int(self.started * 1000))
        return await self._launch("local", epoch, left["port"] if left and self._cut_off else 0)

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

        end_agents(self.folder, self.console.note)
        end_scripts(self.folder, self.console.note)
        clear_records(self.folder)

    async def _launch(self, agent: str, epoch: int, port: int) -> AgentStatus | None:
        for tries in range(1, AGENT_TRIES):
            try:
                return await self._launch_once(agent, epoch, port)
            except AgentDied as error:
                self.console.warn(f"{_line(error)}: starting another one ({tries} of {AGENT_TRIES - 1})")
                epoch += 1
        return await self._launch_once(agent, epoch, port)

    async def _launch_once(self, agent: str, epoch: int, port: int) -> AgentStatus | None:
        # One token for all incarnations: one that is replaced must hear that (409), not that it is a stranger (401).
        token = self._agent_tokens.setdefault(agent, random_secrets.token_urlsafe(32))
        self._epochs[agent] = epoch
        options = self.options
        spec = AgentSpec(
            agent=agent,
            epoch=epoch,
            token=token,
            flow_url=self.url,
            app_dir=str(self.folder.root),
            orch_dir=str(self.folder.orch),
            app_id=self.app_id,
            app_name=self.name,
            run=self.run,
            app_file=str(options.app_file),
            app_argv=list(options.argv),
            drive_url=self.drive_url,
            port=port,
            orphan_timeout=_orphan_timeout(self._runtime),
            launcher=os.getpid(),
        )
        handle = await self._runtime.launch(spec)
        return await self._attach(agent, handle)

    async def _attach(self, agent: str, handle: Handle) -> AgentStatus | None:
        await self._begun.wait()
        link = self._link(agent)
        newest = self.engine.agents[agent].epoch if agent in self.engine.agents else 0
        if handle["epoch"] < newest:  # given up by a server that died before the next one was launched
            await self._runtime.kill(handle)
            return await self._launch(agent, newest, 0)
        link.handle = handle
        number = self.engine.know_agent(agent, handle["epoch"])
        told = False
        while True:
            await self._journalled()  # what an agent knows is never ahead of what survives
            link.queue.clear()  # what is said from here on is newer than what is attached, and the rest is said again
            rev = self.engine.tree.rev
            attach = Attach(
                flow_url=self.url,
                epoch=handle["epoch"],
                number=number,
                acked=self.engine.agents[agent].acked,
                works=self.engine.attach_vars(agent),
            )
            try:
                status, body = await link.peer.post(f"{handle['url']}/v1/attach", encode(attach), handle["token"])
                break
            except (OSError, http.client.HTTPException) as error:
                # Not hearing of it is no proof of anything: it may have scripts, and only a network lies between.
                why = f"the agent {agent} does not answer ({str(error) or type(error).__name__})"
                if await self._runtime.ended(handle, 1.0):
                    raise AgentDied(why, hint=f"see {self.folder.logs / f'agent-{agent}.log'}") from error
                if not told:
                    self.console.warn(f"{why}: asking it again")
                    told = True
        if status != 200:
            raise RuntimeLost(f"agent {agent} refuses this server: HTTP {status} {body[:200]!r}")
        crash_point("flow.agent.attached")
        known = decode(AgentStatus, body)
        link.heard = time.monotonic()
        link.attached = True
        host = urlsplit(handle["url"]).hostname or ""
        self._put(e.AgentUp(agent=agent, epoch=handle["epoch"], status=known, rev=rev, host=host))
        link.wake.set()
        return known

    def _link(self, agent: str) -> _Link:
        if agent not in self._links:
            link = self._links[agent] = _Link(agent, HttpPeer(name=f"orch-to-{agent}"))
            link.task = self._group.create_task(self._sender(link), name=f"link-{agent}")
        return self._links[agent]

    def _send(self, agent: str, kind: str, messages: Iterable[Any]) -> None:
        link = self._link(agent)
        link.queue.extend((kind, message) for message in messages)
        link.wake.set()

    async def _sender(self, link: _Link) -> None:
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
            except (OSError, http.client.HTTPException) as error:
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
            if status != 200:
                why = f"agent {link.agent} refused {kind}: HTTP {status} {body[:300].decode(errors='replace')}"
                if status == UNREADABLE and kind == "place":
                    self._put(e.PlacedWorks(agent=link.agent, placed=[Placed(work=m.work, error=why) for m in batch]))
                elif status == UNREADABLE and kind == "start":
                    no = [StartReply(call=m.call, attempt=m.attempt, accepted=False, error=why) for m in batch]
                    self._put(e.StartAnswered(replies=no, works=[message.work for message in batch]))
                else:
                    self.console.warn(why)
                continue
            if kind == "place":
                self._put(e.PlacedWorks(agent=link.agent, placed=decode(list[Placed], body)))
            elif kind == "start":
                replies = decode(list[StartReply], body)
                self._put(e.StartAnswered(replies=replies, works=[message.work for message in batch]))

    async def _poll_loop(self) -> None:
        """Liveness: a push counts; without one for POLL_EVERY the agent is asked; a dead local process is noticed."""
        while True:
            await asyncio.sleep(POLL_EVERY / 2)
            for link in [link for link in self._links.values() if link.handle is not None and link.attached]:
                await self._look_after(link)

    async def _look_after(self, link: _Link) -> None:
        assert link.handle is not None
        gone = await self._runtime.poll(link.handle)
        if not link.attached:
            return  # it is being replaced
        if gone is not None:
            await self._replace(link, gone)
            return
        now = time.monotonic()
        silence = now - link.heard
        if link.heard > link.asked:
            link.unanswered = None
        elif link.unanswered is not None and now - link.unanswered >= POLL_EVERY:
            # Only what was asked and not answered is silence: this process may have been stopped itself.
            reachable = await self._reachable(link, now)
            self._put(e.AgentPolled(agent=link.agent, status=None, silence=silence, clock=now, reachable=reachable))
        if (silence >= POLL_EVERY or link.ask) and (link.poll is None or link.poll.done()):
            link.ask = False
            link.asked = now
            link.unanswered = link.unanswered or now
            # A task of its own: one that does not answer must not keep the others waiting.
            link.poll = self._group.create_task(self._ask_status(link, link.handle), name=f"poll-{link.agent}")

    async def _ask_status(self, link: _Link, handle: Handle) -> None:
        try:
            status, body = await link.poll_peer.get(f"{handle['url']}/v1/status", handle["token"])
        except (OSError, http.client.HTTPException) as error:
            log.debug("agent %s does not answer: %s", link.agent, error)
            return
        if status != 200 or link.handle is not handle:
            return
        link.heard = time.monotonic()
        self._put(e.AgentPolled(agent=link.agent, status=decode(AgentStatus, body)))

    async def _reachable(self, silent: _Link, now: float) -> bool:
        """Whether this machine reaches anything but the silent agent."""
        others = (link for link in self._links.values() if link is not silent and link.attached)
        return any(now - link.heard < 2 * POLL_EVERY for link in others) or await self._runtime.reachable()

    async def _replace(self, link: _Link, why: str) -> None:
        """The agent's process is gone: a new incarnation adopts what it left."""
        assert link.handle is not None
        old = link.handle
        self.console.warn(f"agent {link.agent} (pid {old['pid']}) {why}: starting a new one")
        await self._launch_next(link, old["epoch"] + 1, old["port"])

    async def _replace_silent(self, link: _Link, epoch: int) -> None:
        """The agent has been given up: end it if that can be done, it may be only a network away; launch another."""
        assert link.handle is not None
        old = link.handle
        link.attached = False
        self.console.warn(f"agent {link.agent} is given up: starting a new one")
        await self._runtime.kill(old)
        link.ending = False
        await self._launch_next(link, epoch, old["port"])

    async def _launch_next(self, link: _Link, epoch: int, port: int) -> None:
        link.attached = False
        try:
            await self._launch(link.agent, epoch, port)
        except RuntimeLost as error:
            link.handle = None
            self._put(e.AgentFailed(agent=link.agent, message=_line(error)))

    async def _end_agents(self, *, kill: bool) -> None:
        """The app is over: agents stop what is left and exit. (A server that only leaves keeps them.)"""
        if self._detaching:
            return
        for agent, link in self._links.items():
            if link.handle is None:
                continue
            handle = link.handle
            try:
                crash_point("flow.shutdown.due")
                await link.peer.post(f"{handle['url']}/v1/shutdown", encode(Shutdown(kill=kill)), handle["token"])
                crash_point("flow.shutdown.answered")
                ended = await self._runtime.ended(handle, AGENT_STOP)
                crash_point("flow.shutdown.ended")
            except (OSError, http.client.HTTPException) as error:
                log.debug("agent %s does not answer: %s", agent, error)
                ended = False
            if not ended:
                await self._runtime.kill(handle)
                await asyncio.to_thread(self._end_leftovers)
        self._runtime.reap()

    # -- pages --------------------------------------------------------------------------------------------------------

    def _page_specs(self, frontends: dict[str, dict[str, Any]]) -> list[WorkSpec]:
        """Streamlit frontends as hidden services; static ones are served by this process."""
        self._pages = frontends
        specs = []
        installed = find_spec("streamlit") is not None
        for component, key in frontends.items():
            if "streamlit" not in key:
                continue
            try:
                ui = import_module("orch_ui")
                command = ui.frontend_command(f"/view/{component}", "{host}", "{port}")
                env = ui.frontend_env(self.url, "", key["scope"], key["streamlit"], str(self.options.app_file))
                del env["ORCH_FLOW_TOKEN"]  # a secret: it travels apart and is never written down
            except ImportError as error:
                self.console.warn(f"the page of {component} needs Streamlit ({error}): pip install 'orch[ui]'")
                continue
            if not installed:
                self.console.warn(
                    f"the page of {component} needs Streamlit, which is not installed: it comes with [ui]"
                )
            specs.append(
                WorkSpec(
                    name=f"_{component}",
                    pointer="",
                    kind="service",
                    record=NO_RECORD,
                    hidden=True,
                    parallel=True,
                    when_busy="replace",
                    raise_exception=False,
                    restart="always" if installed else "never",
                    health=f"/view/{component}/_stcore/health",
                    prefix="keep",
                    command=command,
                    env=env,
                    grace=2.0,
                    display_name=component,
                )
            )
        return specs

    def layout(self) -> list[dict[str, Any]]:
        return [self._tab(tab) for tab in self.engine.layout]

    def _tab(self, tab: dict[str, Any]) -> dict[str, Any]:
        if tab.get("tabs") is not None:
            return {**tab, "ready": True, "stage": "", "tabs": [self._tab(inner) for inner in tab["tabs"]]}
        component = tab.get("component")
        if component is None:
            return {"url": None, **tab, "ready": tab.get("url") is not None, "stage": ""}
        view = self.view(component)
        stage = view.stage if isinstance(view, WaitingTarget) else "running"
        return {**tab, "url": f"/view/{component}/", "ready": not isinstance(view, WaitingTarget), "stage": stage}

    def view(self, component: str) -> ViewTarget:
        page = self._pages.get(component)
        if page is not None and "static" in page:
            return StaticTarget(component, (self.folder.root / page["static"]).resolve())
        work = self.engine.hidden.get(f"_{component}") or self.engine.works.get(component)
        if work is None:
            raise NotFound(f"there is nothing to see of {component!r}")
        if work.ready and work.port:
            return UpstreamTarget(
                component, work.host or "127.0.0.1", work.port, f"/view/{component}", work.spec.prefix
            )
        call = work.book.shown
        stage = str(call.stage) if call is not None else "not_started"
        message = self.redacted(call.message) if call is not None else work.failed_to_place
        if stage == "stopped" and not message:
            message = f"`orch restart {component}` starts it again"
        elif stage == "running" and not message:
            message = f"nothing answers on port {work.port} yet" if work.port else ""
        lines = self._tail_of(work.spec.name) if stage in ("failed", "pending", "running") else []
        title = work.spec.display_name or component
        return WaitingTarget(component, title, stage, message, lines)

    # -- Backend: state -----------------------------------------------------------------------------------------------

    async def read(self, pointer: str, rev: int | None = None) -> tuple[Any, int, int]:
        await self._journalled()
        head = self.engine.tree.rev
        if rev is not None and rev != head:
            then = await self._journal(self.journal.at, self.run, rev)
            return then.get(pointer), then.value_rev(pointer), head
        value = self.engine.tree.get(pointer)
        return copy_json(value), self.engine.tree.value_rev(pointer), head

    async def _journalled(self) -> None:
        """Until what the tree holds is in the journal."""
        while self._settled is not None:
            await asyncio.shield(self._settled)

    async def _journal(self, method: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._journal_thread, method, *args)

    async def patch(self, ops: list[Op], *, cause: str, match: tuple[str, int] | None = None) -> int:
        rev = int(await self._ask(lambda ticket: e.Patch(ticket=ticket, ops=ops, cause=cause, match=match)))
        crash_point("flow.patch.committed")
        return rev

    async def wait_change(self, pointer: str, after: int, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                while True:
                    await self._journalled()
                    if self.engine.tree.value_rev(pointer) > after:
                        return True
                    assert self._changed is not None
                    await asyncio.shield(self._changed)
        except TimeoutError:
            return False

    async def history(self, pointer: str, limit: int) -> list[dict[str, Any]]:
        found = await self._journal(self.journal.history, self.run, pointer, limit)
        return [{"rev": r.rev, "at": r.at, "cause": r.cause, "ops": r.ops} for r in found]

    async def events(self, after: int | None) -> AsyncIterator[Event]:
        last = self._event_id if after is None else after
        if after is not None and (after > self._event_id or (self._events and after < self._events[0].id - 1)):
            # Events between are gone (or of another life): the reader has to look at the state again.
            last = self._event_id if not self._events or after > self._event_id else self._events[0].id - 1
            yield Event(id=last, kind="reset", data={"rev": self.engine.tree.rev})
        while True:
            changed = self._changed
            for event in self._since(last):
                last = event.id
                yield event
            if self._event_id == last:
                assert changed is not None
                await asyncio.shield(changed)

    def _since(self, last: int) -> list[Event]:
        if not self._events or self._events[-1].id <= last:
            return []
        newer = self._events[-1].id - last
        return [self._events[i] for i in range(max(0, len(self._events) - newer), len(self._events))]

    # -- Backend: works -----------------------------------------------------------------------------------------------

    async def works(self) -> list[dict[str, Any]]:
        await self._journalled()
        return [self.engine.describe(work) for work in self.engine.works.values()]

    async def work(self, name: str) -> dict[str, Any]:
        await self._journalled()
        return self.engine.describe(self.engine.find(name))

    async def stop_work(self, name: str) -> dict[str, Any]:
        return dict(await self._ask(lambda ticket: e.StopWork(ticket=ticket, work=name)))

    async def restart_work(self, name: str) -> dict[str, Any]:
        return dict(await self._ask(lambda ticket: e.RestartWork(ticket=ticket, work=name)))

    async def run_work(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        return dict(await self._ask(lambda t: e.AskCall(ticket=t, work=name, args=args, kwargs=kwargs)))

    def log_files(self, name: str, call: str | None) -> list[Path]:
        folder = self.folder.logs / name.removeprefix("root.")
        known = name.removeprefix("root.") in self.engine.works or folder.is_dir()
        if not known or "/" in name or name.startswith("."):
            self.engine.find(name)
        if call is not None:
            path = folder / f"{call}.log"
            if not path.is_file() or path.parent != folder:
                raise NotFound(f"{name} has no call {call!r} with a log")
            return showable([path], self._earlier_secrets)
        found = sorted(folder.glob("*.log"), key=lambda path: path.stat().st_mtime) if folder.is_dir() else []
        return showable(found, self._earlier_secrets)

    def _tail_of(self, name: str) -> list[str]:
        work = self.engine.works.get(name) or self.engine.hidden.get(name)
        call = work.book.shown if work is not None else None
        if call is None:
            return []
        return [self.redacted(line) for line in last_lines(self.folder.logs / name / f"{call.id}.log")]

    # -- Backend: app -------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        await self._journalled()
        engine = self.engine
        return {
            "stage": engine.stage,
            "message": self.redacted(engine.message),
            "rev": engine.tree.rev,
            "run": self.run,
            "passes": engine.passes,
            "uptime": time.time() - self.started,
            "works": {name: work.status(self.url)["stage"] for name, work in engine.works.items()},
            "agents": [
                {
                    "name": agent.name,
                    "epoch": agent.epoch,
                    "up": agent.up,
                    "silent": agent.silent,
                    "pid": (link.handle or {}).get("pid") if (link := self._links.get(agent.name)) else None,
                }
                for agent in engine.agents.values()
            ],
        }

    async def app_info(self) -> dict[str, Any]:
        return {
            "id": self.app_id,
            "name": self.name,
            "run": self.run,
            "stage": self.engine.stage,
            "message": self.redacted(self.engine.message),
            "url": self.url,
            "version": __version__,
            "file": str(self.options.app_file),
            "pid": os.getpid(),
            "drive": self.drive_url,
        }

    async def stop_app(self, message: str) -> None:
        self.refuse_secrets(message, "the message")
        self.console.stopping(self._longest_grace())
        await self._ask(lambda ticket: e.StopApp(ticket=ticket, message=message))

    async def published(self, drive: str, manifest: dict[str, Any]) -> None:
        await self._ask(lambda ticket: e.FilePublished(ticket=ticket, drive=drive, manifest=manifest))

    def last_event(self) -> int:
        return self._event_id

    def api_routes(self) -> list[ApiRoute]:
        return self._routes

    def metrics(self) -> dict[str, float]:
        stages: dict[str, float] = {}
        for work in self.engine.works.values():
            stage = work.status(self.url)["stage"]
            stages[f'works{{stage="{stage}"}}'] = stages.get(f'works{{stage="{stage}"}}', 0) + 1
        return {
            **self._counters,
            **stages,
            "revision": float(self.engine.tree.rev),
            "state_bytes": float(self.engine.tree.size),
            "pass_seconds": self.engine.pass_seconds,
            "uptime_seconds": time.time() - self.started,
            "agents": float(sum(agent.up for agent in self.engine.agents.values())),
        }

    def agent_token(self, agent: str) -> str | None:
        return self._agent_tokens.get(agent)

    async def push(self, push: Push) -> PushReply:
        link = self._links.get(push.agent)
        epoch = self._epochs.get(push.agent)
        if epoch is None:
            # Told that it is replaced, it would end its scripts; this server may yet adopt it.
            raise RuntimeLost(f"it is not decided yet what becomes of agent {push.agent}")
        try:
            if push.epoch != epoch:
                raise StaleEpoch(f"agent {push.agent} epoch {push.epoch} was replaced")
            if link is not None:
                link.heard = time.monotonic()
            self._counters["pushes_total"] += 1
            crash_point("flow.push.received")
            reply = await self._ask(lambda ticket: e.Pushed(ticket=ticket, push=push))
        except StaleEpoch:
            if link is not None and link.ending:
                # Told that it is replaced, it would end its scripts; on this machine its successor takes them over.
                raise RuntimeLost(f"agent {push.agent} is being replaced") from None
            raise
        assert isinstance(reply, PushReply)
        crash_point("flow.push.committed")
        return reply

    # -- secrets ------------------------------------------------------------------------------------------------------

    def secret_values(self) -> list[str]:
        return list(self._secrets.values())

    def redacted(self, text: str) -> str:
        for name, value in self._secrets.items():
            text = text.replace(value, f"<{name}>")
        return text

    def refuse_secrets(self, value: Any, where: str) -> None:
        if not self._secret_forms:
            return
        data = value if isinstance(value, bytes) else msgspec.json.encode(value)
        for name, forms in self._secret_forms.items():
            if any(form.encode() in data for form in forms):
                for form in forms:
                    where = where.replace(form, f"<{name}>")
                raise StateTypeError(
                    f"{where} holds the value of the secret {name}",
                    hint="secrets reach scripts by environment only, they are never stored",
                )

    def _know_secrets(self) -> None:
        """All are given: the longest first, so that one which contains another is replaced as a whole."""
        self._secrets = dict(sorted(self._secrets.items(), key=lambda item: -len(item[1])))
        for name, value in self._secrets.items():
            spellings = (value, format_pointer((value,))[1:])
            escaped = tuple(msgspec.json.encode(spelling).decode()[1:-1] for spelling in spellings)
            self._secret_forms[name] = tuple(dict.fromkeys(spellings + escaped))

    # -- logs and files -----------------------------------------------------------------------------------------------

    def _follow(self, work: str, call: str, *, late: bool = False) -> None:
        if call not in self._tails:
            self._tails[call] = tail = LogTail(work, call, self.folder.logs / work / f"{call}.log")
            if late:
                tail.come_late()

    def _catch_up(self, name: str) -> None:
        """A work has come to another stage: what its script said before that comes first. A script that was started by
        an earlier server is followed from now on."""
        work = self.engine.works.get(name) or self.engine.hidden.get(name)
        call = work.book.shown if work is not None else None
        if call is None:
            return
        if not call.done and call.attempt:
            self._follow(name, call.id, late=True)
        if call.id in self._tails:
            self._read_log(self._tails[call.id])

    async def _log_loop(self) -> None:
        while True:
            await asyncio.sleep(LOG_EVERY)
            self._read_logs()

    def _read_logs(self) -> None:
        for tail in list(self._tails.values()):
            self._read_log(tail)

    def _read_log(self, tail: LogTail) -> None:
        work, call = self.engine.works.get(tail.work) or self.engine.hidden.get(tail.work), tail.call
        over = work is None or work.book.calls.get(call) is None or work.book.calls[call].done
        for offset, lines in tail.read(final=over):
            shown = [self.redacted(line) for line in lines]
            self._publish("log", {"work": tail.work, "call": call, "file": tail.name, "offset": offset, "lines": shown})
            if work is None or not work.spec.hidden:
                for line in shown:
                    self.console.log(tail.work, line)
        if over:
            del self._tails[call]

    def _bind_drive(self) -> None:
        """Drives in the flow are answered from manifests held here, without I/O."""
        from orch_drive import DriveStore

        self._index: dict[str, Any] = {}
        self.program.drive_index = self._index_of
        if self.folder.drive.is_dir() and not self.options.drive and not self._cut_off:
            # Killed puts left bytes that no manifest speaks of; nobody writes at this moment.
            for folder in self.folder.drive.iterdir():
                if folder.is_dir():
                    self._pass_thread.submit(DriveStore(self.drive_url, folder.name).gc)

    def _index_of(self, drive: str) -> Any:
        """What is known of a drive's files: read once, then kept up to date by what is published."""
        from orch_drive import DriveStore

        if drive not in self._index:
            self._index[drive] = DriveStore(self.drive_url, drive).index(all_versions=True)
        return self._index[drive]

    def _file_event(self, drive: str, manifest: dict[str, Any]) -> None:
        from orch_drive.manifest import from_json

        parsed = from_json(manifest)
        if not parsed.partial:
            # In the passes' thread: a pass sees one picture of the files.
            self._pass_thread.submit(lambda: self._index_of(drive).add(parsed))


def _orphan_timeout(runtime: Runtime) -> float | None:
    """ORCH_ORPHAN_TIMEOUT (seconds), or what the runtime does. Raises UsageError."""
    given = os.environ.get("ORCH_ORPHAN_TIMEOUT")
    if not given:
        return runtime.orphan_timeout
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise UsageError(f"ORCH_ORPHAN_TIMEOUT={given!r} is no number of seconds", hint="leave it out for the default")
    return seconds


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _broken(error: BaseException) -> Any:
    """A pass that broke orch's own code: reported like a user's error, with its traceback."""
    from orch.program import PassResult

    text = "".join(traceback.format_exception(error))
    return PassResult(how="error", message=f"{type(error).__name__}: {error}", traceback=text, error=error)


def _line(error: OrchError) -> str:
    return f"{error.message} - {error.hint}" if error.hint else error.message


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
