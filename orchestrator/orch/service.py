"""The shell around the engine: turns I/O into events and instructions into I/O. One task owns the engine.

    inbox -> engine.handle(...)  -> engine.settle()  -> journal.commit (one transaction, its own thread)
          -> instructions: run a pass (its own thread), talk to agents (one ordered link each), answer, publish

Everything acknowledged was committed before: answers, launches and event streams are instructions too.
"""

from __future__ import annotations

import asyncio
import functools
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
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

import msgspec

from orch import events as e
from orch._version import __version__
from orch.backup import SHIP_EVERY, Backup
from orch.engine import NO_RECORD, Config, Engine
from orch.errors import JournalError, NotFound, OrchError, RuntimeLost, StaleEpoch, StateTypeError, UsageError
from orch.journal import KEPT_RUNS, Batch, Journal, Revision
from orch.links import Links
from orch.loader import load_app
from orch.logtail import LogTail, last_lines, showable
from orch.paths import AppFolder, ServerInfo
from orch.program import Program, with_calls
from orch.runtimes.base import Runtime
from orch.runtimes.local import LocalRuntime
from orch.server.backend import ApiRoute, Event, StaticTarget, UpstreamTarget, ViewTarget, WaitingTarget
from orch.server.sockets import bind_socket
from orch.state import copy_json, format_pointer
from orch.wire import LOCAL, AgentSpec, AgentStatus, Forget, Op, Push, PushReply
from orch.work import WorkSpec
from orch_drive.crash import crash_point
from orch_drive.drive import APP_DRIVE

if TYPE_CHECKING:
    from orch.api import Route
    from orch.cli.options import RunOptions
    from orch.flow import Flow
    from orch.server.serve import HttpServer

__all__ = ["ConsoleLike", "Service", "serve"]

log = logging.getLogger(__name__)

EVENTS_KEPT = 10_000
EVENT_RESERVE = 100_000
LOG_EVERY = 0.2
AGENT_STOP = 5.0
SLOW_PASS = 5.0


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
    service = Service(options, folder, console, runtime or _runtime(options, folder))
    try:
        code = asyncio.run(service.main())
    except OrchError as error:
        if not service.in_pass:
            raise
        console.error(error.line)
        code = 1
    if service.in_pass:
        # A thread cannot be ended, and Python would wait for it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


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
        self._earlier_secrets: dict[int, list[str]] = {}
        """By run, whose values are not known any more."""
        self._exit_kill = False
        self._routes: list[ApiRoute] = []
        self.agent_tokens: Mapping[str, str] = {}
        self._work_tokens: dict[str, str] = {}
        self._runtime = runtime
        copied_to = os.environ.get("ORCH_BACKUP")
        self._backup = Backup(copied_to, folder.state_db) if copied_to else None
        self._backup_thread = ThreadPoolExecutor(1, thread_name_prefix="orch-backup")
        self._brought = False
        """The journal comes from another disk: nothing else that was written beside it is here."""
        self._url_elsewhere = ""
        self._opening = asyncio.Lock()
        self._door: HttpServer | None = None
        """Where agents of other machines are answered."""
        self._local: Runtime = runtime if not runtime.own_places else LocalRuntime(folder.run, folder.logs)

    # Made when the loop runs: they belong to it.
    _exit: asyncio.Event
    _begun: asyncio.Event
    _first_pass: asyncio.Event
    _links: Links
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
            self._links = Links(self, started=self.started, cut_off=self._cut_off, brought=self._brought)
            agent_ready = asyncio.ensure_future(self._links.first())
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
                self._kill_started()
                raise
            self._install_signals(loop)
            await self._serve(sock, agent_ready)
        finally:
            await self._journal(self._close_journal)
            self._journal_thread.shutdown()
            self._backup_thread.shutdown()
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
                self._links.start(group)
                engine = group.create_task(self._loop(), name="engine")
                await self._first_pass.wait()
                # Importing the web server takes longer than everything before it: the app runs meanwhile.
                from orch.server.serve import HttpServer

                server = HttpServer(allow_hosts=self.options.allow_hosts, load=False)
                await server.start(self, self.options.host, sock)
                self._begun.set()
                self._links.begin()
                tasks = [
                    group.create_task(self._log_loop(), name="logs"),
                    group.create_task(self._backup_loop(), name="backup"),
                    group.create_task(self._announce(server, agent_ready), name="start"),
                ]
                await self._exit.wait()
                for task in tasks:
                    task.cancel()
                await self._await_agent(agent_ready)
                if not self._detaching:  # (a server that only leaves keeps its agents)
                    await self._links.end(kill=self._exit_kill)
                self._read_logs()
                await self._links.close()
                engine.cancel()
                self._refuse_the_rest()
        except* (OrchError, OSError) as group_error:
            if not self._begun.is_set() and not self._cut_off:
                # Nothing has been started but the agent, which nobody would come back to.
                agent_ready.cancel()
                await asyncio.wait([agent_ready])
                self._kill_started()
            raise _first(group_error) from None
        finally:
            for each in (server, self._door):
                if each is not None:
                    await each.stop()

    def _kill_started(self) -> None:
        for runtime in self.runtimes():
            runtime.kill_started()

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
            self._kill_started()

    def _open_journal(self) -> Journal:
        path, durable = self.folder.state_db, self.options.durable
        if self._backup is not None and self._backup.claim(fresh=self.options.fresh):
            self.console.note(f"the journal was brought from {self._backup.url}")
            self._brought = True
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
            if self._backup is not None and self._backup.based:
                self._backup.end_run(self.run, how)
                self._backup.ship(self.console.warn)
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
        self.agent_tokens = facts.get("agent_token", {})
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
            agent_of=_own_agent if self._runtime.own_places else _this_machines,
            shared_records=self._runtime.shared_records,
            redact=self.refuse_secrets if self._secrets else None,
            hide=self.redacted,
        )
        self.engine = Engine(config, tree, self.program.specs(), rev=rev, revs=revs)
        if previous is not None:
            self.engine.restore(facts, clean=clean)
            self._links.expect()
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
            self.put(e.AgentFailed(agent=LOCAL, message=error.line))
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
            self.put(e.StopApp(message="interrupted"))
        else:
            self.interrupted = True
            self.put(e.StopApp(kill=True))

    def _on_terminate(self) -> None:
        self.console.stopping(self._longest_grace())
        self.put(e.StopApp(message="terminated"))

    def _on_hangup(self) -> None:
        self._detaching = True
        self._exit.set()

    def _longest_grace(self) -> float:
        return max((w.spec.grace for w in self.engine.works.values() if w.live), default=0.0)

    # -- the one loop -------------------------------------------------------------------------------------------------

    def put(self, event: e.Event) -> None:
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
        self.put(make(ticket))
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
        if self._backup is not None:
            await self._back_up(batch, revisions)
        if self.journal.held and not self._told_held:
            self.console.warn(
                f"{self.folder.state_db}-wal has grown to {self.journal.held / 2**20:.0f} MiB, because a program that"
                " reads the database keeps a transaction open: end that program"
            )
        self._told_held = self.journal.held > 0

    async def _back_up(self, batch: e.Batch, revisions: list[Revision]) -> None:
        """What is done about the batch next is known elsewhere before. Raises JournalError."""
        backup = self._backup
        assert backup is not None
        if backup.based:
            backup.add(self.run, Batch(revisions=revisions, facts=batch.facts))
            if batch.durable:
                await self._in_backup(backup.ship, self.console.warn)
        if backup.due:
            first = not backup.based
            based = self._in_backup(backup.put_base, *await self._journal(backup.copy, self.journal))
            if first:
                await based
            else:
                based.add_done_callback(self._new_base)

    def _in_backup(self, method: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        return asyncio.get_running_loop().run_in_executor(self._backup_thread, method, *args)

    def _new_base(self, done: asyncio.Future[Any]) -> None:
        if not done.cancelled() and (error := done.exception()) is not None:
            self.console.warn(str(error))

    async def _backup_loop(self) -> None:
        while self._backup is not None:
            await asyncio.sleep(SHIP_EVERY)
            await self._in_backup(self._backup.ship, self.console.warn)

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
                self._links.send(agent, "state", diffs)
            case e.StartCalls(agent=agent, calls=calls):
                for call in calls:
                    self._follow(call.work, call.call)
                    here = self._links.follow(agent, call.work, call.call)
                    self._links.send(agent, "start", [msgspec.structs.replace(call, log_from=here) if here else call])
            case e.StopCalls(agent=agent, calls=stops):
                self._links.send(agent, "stop", stops)
            case e.PlaceWorks(agent=agent, works=works):
                self._links.send(agent, "place", works)
            case e.ForgetWorks(agent=agent, works=names, rev=rev):
                self._links.send(agent, "forget", [Forget(work=name, rev=rev) for name in names])
            case e.PollAgent(agent=agent):
                self._links.ask(agent)
            case e.ReplaceAgent(agent=agent, epoch=epoch):
                self._links.replace(agent, epoch)
            case e.LaunchAgent(agent=agent):
                self._links.launch(agent)
            case e.ReleaseAgent(agent=agent, epoch=epoch, grace=grace):
                self._links.release(agent, epoch, grace)
            case e.Shown():
                self._catch_up(instruction.work)
                self._publish(
                    "status",
                    {"work": instruction.work, "stage": instruction.stage, "detail": instruction.detail},
                )
                if not instruction.hidden:
                    self.console.work(instruction.work, instruction.stage, self.redacted(instruction.detail))
                elif "~" in instruction.work:
                    pass  # the Work itself tells of its further machines
                elif instruction.stage == "failed" or (instruction.stage == "pending" and instruction.detail):
                    page, detail = instruction.work.removeprefix("_"), self.redacted(instruction.detail)
                    self.console.warn(f"page {page}: {detail}; `orch logs _{page}` tells more")
            case e.Layout(tabs=tabs):
                self._publish("layout", {"tabs": tabs})
            case e.Frontends(frontends=frontends):
                self.put(e.Hidden(specs=self._page_specs(frontends)))
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
            self.put(e.Patch(ops=ops, cause="flow", known=True))

    def _pass_over(self, event: e.Event, slow: asyncio.TimerHandle) -> None:
        slow.cancel()
        self._counters["passes_total"] += 1
        self.put(event)
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

    # -- what agents are told of this server --------------------------------------------------------------------------

    def runtime_of(self, agent: str) -> Runtime:
        return self._local if agent == LOCAL else self._runtime

    def runtimes(self) -> list[Runtime]:
        return [self._local] if self._local is self._runtime else [self._local, self._runtime]

    def drive_epoch(self) -> int:
        """The highest epoch that the app's Drives have seen. Raises DriveError."""
        from orch_drive import DriveStore

        names = {APP_DRIVE}
        if not self.options.drive and self.folder.drive.is_dir():
            names.update(folder.name for folder in self.folder.drive.iterdir() if folder.is_dir())
        return max(DriveStore(self.drive_url, name).highest_epoch() for name in names)

    def flow_url(self, agent: str) -> str:
        """Where that agent reaches this server."""
        return self.url if agent == LOCAL else self._url_elsewhere or self.url

    async def listen_for(self, agent: str) -> None:
        """Agents of other machines reach this server too: where they are, and only there. Raises RuntimeLost."""
        if self.runtime_of(agent) is self._local or self._url_elsewhere:
            return
        async with self._opening:
            if not self._url_elsewhere:
                self._url_elsewhere = await self._open_to(await self._runtime.host())

    async def _open_to(self, host: str) -> str:
        from orch.server.serve import HttpServer

        port = urlsplit(self.url).port or 0
        if self.options.host not in ("0.0.0.0", "::", "", host):
            sock = bind_socket(host, port)
            port = sock.getsockname()[1]
            self._door = HttpServer(load=False)
            await self._door.start(self, host, sock)
        return f"http://{_shown_host(host)}:{port}"

    def agent_spec(self, agent: str, epoch: int, token: str, port: int) -> AgentSpec:
        options, runtime = self.options, self.runtime_of(agent)
        work = self.engine.work_of(agent) if agent != LOCAL else None
        return AgentSpec(
            agent=agent,
            epoch=epoch,
            token=token,
            flow_url=self.flow_url(agent),
            app_dir=str(self.folder.root),
            orch_dir=str(self.folder.orch),
            app_id=self.app_id,
            app_name=self.name,
            run=self.run,
            app_file=str(options.app_file),
            app_argv=list(options.argv),
            drive_url=self.drive_url,
            port=port,
            orphan_timeout=_orphan_timeout(runtime),
            work=work.name if work is not None else "",
            compute=work.compute if work is not None else {},
            build=work.build if work is not None else {},
            launcher=os.getpid(),
        )

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
        await self.journalled()
        head = self.engine.tree.rev
        if rev is not None and rev != head:
            then = await self._journal(self.journal.at, self.run, rev)
            return then.get(pointer), then.value_rev(pointer), head
        value = self.engine.tree.get(pointer)
        return copy_json(value), self.engine.tree.value_rev(pointer), head

    async def journalled(self) -> None:
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
                    await self.journalled()
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
        await self.journalled()
        return [self.engine.describe(work) for work in self.engine.works.values()]

    async def work(self, name: str) -> dict[str, Any]:
        await self.journalled()
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
        work = self.engine.known(name)
        call = work.book.shown if work is not None else None
        if call is None:
            return []
        return [self.redacted(line) for line in last_lines(self.folder.logs / name / f"{call.id}.log")]

    # -- Backend: app -------------------------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        await self.journalled()
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
                    "pid": self._links.pid(agent.name),
                }
                for agent in engine.agents.values()
                if agent.name == LOCAL or agent.up or agent.launching or agent.expected or agent.silent
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
        return self._links.token(agent)

    async def push(self, push: Push) -> PushReply:
        await self._links.hear(push)
        self._counters["pushes_total"] += 1
        crash_point("flow.push.received")
        try:
            reply = await self._ask(lambda ticket: e.Pushed(ticket=ticket, push=push))
        except StaleEpoch:
            raise self._links.stale(push) from None
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
        work = self.engine.known(name)
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
        work, call = self.engine.known(tail.work), tail.call
        over = work is None or work.book.calls.get(call) is None or work.book.calls[call].done
        for offset, lines in tail.read(final=over):
            shown = [self.redacted(line) for line in lines]
            self._publish("log", {"work": tail.work, "call": call, "file": tail.name, "offset": offset, "lines": shown})
            if work is None or not work.spec.hidden or work.main is not None:
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


def _runtime(options: RunOptions, folder: AppFolder) -> Runtime:
    """The one that the options name. Raises UsageError."""
    if options.mode == "local":
        return LocalRuntime(folder.run, folder.logs)
    from orch.cloud.cluster import facts_of_head
    from orch.runtimes.ray import RayRuntime

    ours = facts_of_head() or (None, ())
    return RayRuntime(
        options.address or "auto",
        folder.run,
        folder.logs,
        folder.root,
        app_id=folder.app_id(),
        machine_of=ours[0],
        machines=ours[1],
    )


def _this_machines(spec: WorkSpec) -> str:
    return LOCAL


def _own_agent(spec: WorkSpec) -> str:
    """Pages are served beside the flow. A Work may be called "local"."""
    return LOCAL if spec.hidden else spec.name if spec.name != LOCAL else "local-work"


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


def _shown_host(host: str) -> str:
    if host in ("0.0.0.0", "::", ""):
        return "127.0.0.1"
    return f"[{host}]" if ":" in host else host
