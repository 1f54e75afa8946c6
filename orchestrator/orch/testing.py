"""Run an app in-process: the real engine and the real passes, a fake runtime, a fake clock, no sockets, no processes.

    tester = AppTester(Studio())
    tester.fake("train").run_for = 30.0
    tester.set("ui.train_start", True)
    tester.until(lambda: tester.flow.train.has_succeeded)

Time stands still unless nothing can happen at this moment: then it moves to the next thing that is due.
"""

from __future__ import annotations

import heapq
import inspect
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from typing import Any

import msgspec

from orch.api import Route
from orch.calls import Call
from orch.component import decode_argument, short_name
from orch.engine import Config, Engine
from orch.errors import OrchError
from orch.events import (
    AgentPolled,
    AgentUp,
    ApiRequest,
    AskCall,
    Event,
    Exit,
    FileEvent,
    ForgetWorks,
    Instruction,
    LaunchAgent,
    Note,
    PassEnded,
    Patch,
    PlacedWorks,
    PlaceWorks,
    PollAgent,
    Pushed,
    ReloadProgram,
    ReplaceAgent,
    Reply,
    RestartWork,
    Routes,
    RunMethod,
    RunPass,
    StartCalls,
    StopApp,
    StopCalls,
    StopWork,
    Tick,
)
from orch.flow import Flow
from orch.program import Program, with_calls
from orch.wire import (
    AgentStatus,
    Ended,
    Item,
    Op,
    Placed,
    Progress,
    Published,
    Push,
    Ready,
    StartCall,
    Started,
    VarOps,
    WorkReport,
)
from orch.work import Work
from orch_drive.manifest import Entry, Manifest, ManifestIndex, from_json

__all__ = ["AppTester", "FakeClock", "FakeWork"]

POLL_EVERY = 2.0


class FakeClock:
    """Seconds since the epoch, moved by hand."""

    def __init__(self, now: float = 1_000_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class FakeWork:
    """What the fake runtime does when a Work's call is started. All times in seconds.

    Attributes:
        publishes: Drive paths of files that a successful attempt publishes, one complete version each.
        run_for: the attempt ends by itself after so long; None: it runs until it is stopped.
        exit_code: what it exits with (0: success). A list gives one per attempt, the last one stays.
        result: of a successful call. exception: message of an exception instead of an exit code.
        start_error: the attempt cannot be started, with this message.
        start_after, ready_after: until it runs, until it answers on its port (None: never).
        stop_after: how long a stop takes.
    """

    def __init__(self, name: str, *, service: bool) -> None:
        self.name = name
        self.run_for: float | None = None if service else 1.0
        self.exit_code: int | list[int] = 0
        self.result: Any = None
        self.exception = ""
        self.publishes: list[str] = []
        self.start_error = ""
        self.start_after = 0.0
        self.ready_after: float | None = 0.0 if service else None
        self.stop_after = 0.0
        self.starts: list[StartCall] = []
        self.current: StartCall | None = None
        self.ready = False
        self.port = 0

    def code(self) -> int:
        if isinstance(self.exit_code, int):
            return self.exit_code
        return self.exit_code[min(len(self.starts), len(self.exit_code)) - 1]


class AppTester:
    """Runs `flow` with everything around it faked but the engine.

    Args:
        flow: the root Flow (or a Work).
        works: how the fakes behave, by short name: {"train": {"run_for": 5.0, "exit_code": 1}}.
        now: where the fake clock starts.
    """

    def __init__(
        self, flow: Flow | Work, *, works: dict[str, dict[str, Any]] | None = None, now: float = 1_000_000_000.0
    ) -> None:
        self.clock = FakeClock(now)
        self.flow: Any = flow
        self.fakes: dict[str, FakeWork] = {}
        self.notes: list[str] = []
        self.exit_code: int | None = None
        self.message = ""
        self.passes = 0
        self.revisions: list[Any] = []
        self.facts: dict[str, dict[str, Any]] = {}
        self.routes: list[tuple[Flow, Route]] = []
        """What `configure_api` of every flow gives."""
        self._wanted = works or {}
        self._class = type(flow)
        self._record = flow._record
        self._tickets = count(1)
        self._answers: dict[int, Reply] = {}
        self._queue: deque[Callable[[], None]] = deque()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._order = count()
        self._seq = 0
        self._unacked: list[tuple[int, Item]] = []
        self._drives: dict[str, ManifestIndex] = {}
        self._epoch = 1
        self._silent_since: float | None = None
        self._undelivered: list[Instruction] = []
        self._begin_server(Program(flow))

    def _begin_server(
        self, program: Program, tree: dict[str, Any] | None = None, rev: int = 0, *, clean: bool = False
    ) -> None:
        self.program = program
        program.drive_index = self._drive
        self.flow = program.root
        self.routes = program.api_routes()
        config = Config(app="test", run=1, base_url="http://testserver")
        self.engine = Engine(config, tree or program.node(), program.specs(), rev=rev)
        if tree is not None:
            self.engine.restore(self.facts, clean=clean)
        self._carry_out(self.engine.start(self.clock.now))

    # -- what tests say
    def fake(self, name: str) -> FakeWork:
        """The fake behind a Work, to be told how to behave."""
        name = short_name(name)
        if name not in self.fakes:
            try:
                spec = self.engine.find(name).spec
                service = spec.kind == "service"
            except OrchError:
                service = False
            fake = self.fakes[name] = FakeWork(name, service=service)
            for key, value in self._wanted.get(name, {}).items():
                if not hasattr(fake, key):
                    raise AttributeError(f"FakeWork has no setting {key!r}")
                setattr(fake, key, value)
        return self.fakes[name]

    @property
    def now(self) -> float:
        return self.clock.now

    @property
    def state(self) -> dict[str, Any]:
        """The state tree as it is now: a copy, which stays as it is."""
        return dict(_copied(self.engine.tree.root))

    @property
    def rev(self) -> int:
        return self.engine.tree.rev

    @property
    def stage(self) -> str:
        return self.engine.stage

    @property
    def layout(self) -> list[dict[str, Any]]:
        return self.engine.layout

    def calls(self, name: str) -> list[Call]:
        """Every call of a Work in this run, oldest first."""
        return list(self.engine.find(name).book.calls.values())

    def patch(self, ops: list[Op], *, cause: str = "api", match: tuple[str, int] | None = None) -> int:
        """A diff from outside, as REST would bring it. Returns the revision; raises what REST would answer.

        `match`: a pointer and the revision that the request speaks of (`If-Match`).
        """
        return int(self._ask(lambda ticket: Patch(ticket=ticket, ops=ops, cause=cause, match=match)))

    def set(self, where: str, value: Any) -> int:
        """Assign a variable: a pointer, or a dotted name like `ui.train_start`."""
        return self.patch([{"op": "replace", "path": self.pointer(where), "value": value}], cause="ui")

    def pointer(self, where: str) -> str:
        if where.startswith("/"):
            return where
        *path, attribute = where.split(".")
        component = self.program.find(".".join(["root", *[p for p in path if p != "root"]]))
        return f"{component._pointer}/vars/{attribute}"

    def run_work(self, name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
        answer = self._ask(lambda t: AskCall(ticket=t, work=name, args=list(args), kwargs=kwargs))
        return dict(answer)

    def stop_work(self, name: str) -> None:
        self._ask(lambda ticket: StopWork(ticket=ticket, work=name))

    def restart_work(self, name: str) -> None:
        self._ask(lambda ticket: RestartWork(ticket=ticket, work=name))

    def stop(self) -> None:
        self._ask(lambda ticket: StopApp(ticket=ticket))

    def call_method(self, method: Callable[[], Any]) -> Any:
        """What a request to a `configure_api` route does."""
        return self._ask(lambda ticket: ApiRequest(ticket=ticket, method=method))[0]

    def work_sets(self, name: str, ops: list[Op]) -> None:
        """The running work's own writes (pointers relative to its vars)."""
        self._report(VarOps(work=name, ops=ops))

    def report(self, name: str, *, progress: float | None = None, metrics: dict[str, Any] | None = None) -> None:
        fake = self.fake(name)
        assert fake.current is not None, f"{name} is not running"
        self._report(Progress(work=name, call=fake.current.call, progress=progress, metrics=metrics or {}))

    def publish(self, name: str, path: str, files: dict[str, int] | None = None, *, partial: bool = False) -> None:
        """The work publishes a version of a path of `Drive("app")`.

        Args:
            files: size by name, relative to `path`, which is a folder then; without it `path` is a file of one byte.
        """
        names = {path.rpartition("/")[2]: 1} if files is None else files
        name = short_name(name)
        versions = self._drive("app").versions(path, component=name)
        manifest = Manifest(
            drive="app",
            component=name,
            path=path,
            version=0 if partial else 1 + max((info.version for info in versions), default=0),
            serial=next(self._order) + 1,
            is_dir=files is not None,
            entries=[Entry(name=entry, size=size, sha256="") for entry, size in names.items()],
            partial=partial,
            epoch=self._epoch,
            at=self.now,
        )
        self._report(Published(work=name, drive="app", manifest=msgspec.to_builtins(manifest)))

    def kill(self, work: str | Work) -> None:
        """The Work's process gets SIGKILL from somebody."""
        fake = self.fake(work if isinstance(work, str) else short_name(work.name))
        if fake.current is None:
            raise AssertionError(f"{fake.name} is not running")
        self._finish(fake, fake.current, reason="signal", signal="SIGKILL", message="killed by SIGKILL")

    def lose_contact(self) -> None:
        """From now on nothing passes between flow and agent; the works go on, but for those whose lease runs out."""
        self._silent_since = self.now
        self._later(POLL_EVERY, lambda: self._poll_in_vain(self._silent_since))
        for fake in self.fakes.values():
            if fake.current is not None and fake.current.lease is not None:
                self._later(fake.current.lease, partial(self._lease_over, fake, fake.current, self.now))

    def regain_contact(self) -> None:
        """What was said meanwhile arrives, in order, on both sides."""
        self._silent_since = None
        instructions, self._undelivered = self._undelivered, []
        self._event(AgentPolled(agent="local", status=self._agent_up("local").status))
        for instruction in instructions:
            self._do(instruction)
        self._push()
        self._settle()

    def restart_server(self) -> None:
        """kill -9 of the flow server, and a new one: only what was journalled survives. The agent lives on, or is
        replaced if it does not answer."""
        if self._silent_since is not None:
            self._new_agent(self._epoch + 1)
        self._continue(clean=False)

    def resume(self) -> None:
        """The run ended and is gone on with (`orch run --resume`): no process of it lives any more."""
        for fake in self.fakes.values():
            fake.current, fake.ready, fake.port = None, False, 0
        self._unacked.clear()
        self._new_agent(self._epoch + 1)
        self.exit_code, self.message = None, ""
        self._continue(clean=True)

    def _continue(self, *, clean: bool) -> None:
        self._queue.clear()
        tree = self.state
        program = Program(self._class(*decode_argument(self._record.args), **decode_argument(self._record.kwargs)))
        self.notes += program.restore(tree, self.facts.get("component", {}), self.facts.get("call", {}))
        self._begin_server(program, with_calls(program.node(), tree), self.engine.tree.rev, clean=clean)

    # -- time
    def step(self) -> bool:
        """Let the next thing happen: one pass, one report, or, if nothing can, time moves on. False: nothing will
        ever."""
        self._take_stray()
        if self._queue:
            self._queue.popleft()()
            self._settle()
            return True
        due = self._due[0][0] if self._due else None
        timer = self.engine.next_due()
        moments = [moment for moment in (due, timer) if moment is not None]
        if not moments:
            self._settle()
            return bool(self._queue)
        self.clock.now = max(self.clock.now, min(moments))
        while self._due and self._due[0][0] <= self.clock.now:
            self._queue.append(heapq.heappop(self._due)[2])
        if timer is not None and timer <= self.clock.now:
            self._event(Tick())
        self._settle()
        return True

    def until(self, predicate: Callable[..., Any], *, timeout: float = 3_600.0) -> None:
        """Step until `predicate()` (or `predicate(tester)`) holds. AssertionError after `timeout` seconds of fake
        time."""
        takes = any(p.default is p.empty for p in inspect.signature(predicate).parameters.values())
        end = self.clock.now + timeout
        steps = 0
        while not (predicate(self) if takes else predicate()):
            steps += 1
            if not self.step() or self.clock.now > end or steps > 100_000:
                raise AssertionError(f"it did not come true within {timeout:g} s; the state is {self.state!r}")

    def settle(self) -> None:
        """Let everything happen that can happen at this moment."""
        for _ in range(100_000):
            self._take_stray()
            self._settle()
            timer = self.engine.next_due()
            if not self._queue and not (self._due and self._due[0][0] <= self.now) and (not timer or timer > self.now):
                return
            self.step()
        raise AssertionError("it never comes to rest")

    def advance(self, seconds: float) -> None:
        """Let `seconds` of time pass, with everything that is due in them."""
        end = self.clock.now + seconds
        self.settle()
        while True:
            moments = [m for m in (self._due[0][0] if self._due else None, self.engine.next_due()) if m is not None]
            if not moments or min(moments) > end:
                break
            self.step()
            self.settle()
        self.clock.now = end

    # -- the wheels
    def _drive(self, drive: str) -> ManifestIndex:
        return self._drives.setdefault(drive, ManifestIndex())

    def _ask(self, make: Callable[[int], Event]) -> Any:
        ticket = next(self._tickets)
        self._event(make(ticket))
        self._settle()
        for _ in range(100_000):
            if ticket in self._answers:
                break
            self.step()
        answer = self._answers.pop(ticket)
        if answer.error is not None:
            raise answer.error
        return answer.value

    def _take_stray(self) -> None:
        if self.program.stray:
            ops, self.program.stray = self.program.stray, []
            self._event(Patch(ops=ops, cause="api", known=True))

    def _event(self, event: Event) -> None:
        self._carry_out(self.engine.handle(event, self.clock.now))

    def _settle(self) -> None:
        if not self._queue:
            self._carry_out(self.engine.settle(self.clock.now))

    def _commit(self) -> None:
        batch = self.engine.take_batch()
        if batch is None:
            return
        self.revisions += batch.revisions
        for kind, key, value in batch.facts:
            kept = self.facts.setdefault(kind, {})
            if value is None:
                kept.pop(key, None)
            else:
                kept[key] = _copied(value)

    def _carry_out(self, instructions: Iterable[Instruction]) -> None:
        self._commit()
        for instruction in instructions:
            self._do(instruction)

    def _new_agent(self, epoch: int) -> None:
        """A new incarnation, which finds the records of the one before: of what was not taken yet, the ends."""
        ends = [item for _, item in self._unacked if isinstance(item, Ended)]
        self._epoch, self._seq, self._unacked = epoch, len(ends), list(enumerate(ends, 1))
        self._silent_since, self._undelivered = None, []

    def _poll_in_vain(self, since: float | None) -> None:
        if since is not None and since == self._silent_since:
            silence = self.now - since
            self._later(POLL_EVERY, lambda: self._poll_in_vain(since))
            self._event(AgentPolled(agent="local", status=None, silence=silence, clock=self.now))

    def _lease_over(self, fake: FakeWork, call: StartCall, since: float) -> None:
        if since == self._silent_since:
            self._finish(fake, call, reason="lost", message="its lease had run out", cut=True)

    def _do(self, instruction: Instruction) -> None:
        to_agent = PlaceWorks | StartCalls | StopCalls | ForgetWorks
        if self._silent_since is not None and isinstance(instruction, to_agent):
            self._undelivered.append(instruction)
            return
        match instruction:
            case ReplaceAgent(agent=agent, epoch=epoch):
                self._new_agent(epoch)
                self._queue.append(lambda: self._attach(agent))
            case RunPass(given=given):
                self.passes += 1
                self._queue.append(lambda: self._event(PassEnded(result=self.program.run_pass(given))))
            case RunMethod(given=given, method=method):
                self._queue.append(lambda: self._event(PassEnded(result=self.program.run_method(given, method))))
            case Reply(ticket=ticket):
                self._answers[ticket] = instruction
            case LaunchAgent(agent=agent):
                self._queue.append(lambda: self._attach(agent))
            case PlaceWorks(agent=agent, works=works):
                placed = [self._place(place.work, place.port) for place in works]
                self._queue.append(lambda: self._event(PlacedWorks(agent=agent, placed=placed)))
            case StartCalls(calls=calls):
                for call in calls:
                    self._launch(call)
            case StopCalls(calls=calls):
                for stop in calls:
                    fake = self.fake(stop.work)
                    if fake.current is not None and fake.current.call == stop.call:
                        after = min(fake.stop_after, stop.grace)
                        self._later(after, partial(self._finish, fake, fake.current, reason=stop.reason))
            case ForgetWorks(works=names):
                for name in names:
                    forgotten = self.fake(name)
                    forgotten.current, forgotten.ready, forgotten.port = None, False, 0
            case PollAgent(agent=agent) if self._silent_since is None:
                status = self._agent_up(agent).status
                self._queue.append(lambda: self._event(AgentPolled(agent=agent, status=status)))
            case Routes(routes=routes):
                self.routes = routes
            case FileEvent(drive=drive, manifest=manifest):
                self._drive(drive).add(from_json(manifest))
            case Note(text=text):
                self.notes.append(text)
            case Exit(code=code, message=message):
                self.exit_code, self.message = code, message
            case ReloadProgram(tree=tree):
                self.program.reload(tree)

    def _agent_up(self, agent: str) -> AgentUp:
        works = [
            WorkReport(
                work=fake.name,
                host="127.0.0.1",
                port=fake.port,
                call=fake.starts[-1].call if fake.starts else None,
                attempt=fake.starts[-1].attempt if fake.starts else 0,
                stage="running" if fake.current else ("ended" if fake.starts else "not_started"),
                ready=fake.ready,
            )
            for fake in self.fakes.values()
            if fake.port
        ]
        status = AgentStatus(agent=agent, epoch=self._epoch, pid=0, seq=self._seq, works=works)
        return AgentUp(agent=agent, epoch=self._epoch, status=status)

    def _place(self, name: str, port: int | None) -> Placed:
        fake = self.fake(name)
        fake.port = port or fake.port or 20_000 + len(self.fakes)
        return Placed(work=name, host="127.0.0.1", port=fake.port)

    def _later(self, seconds: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._due, (self.clock.now + seconds, next(self._order), what))

    def _attach(self, agent: str) -> None:
        self._event(self._agent_up(agent))
        self._push()

    def _report(self, *items: Item) -> None:
        for item in items:
            self._seq += 1
            self._unacked.append((self._seq, item))
        self._push()
        self._settle()

    def _push(self) -> None:
        """What the flow has not journalled yet, again and again: it takes each item once."""
        if not self._unacked or self._silent_since is not None:
            return
        first = self._unacked[0][0]
        items = [item for _, item in self._unacked]
        self._event(Pushed(push=Push(agent="local", epoch=self._epoch, seq=first, items=items)))
        known = self.engine.agents["local"]
        if known.epoch == self._epoch:  # else it waits behind a pass
            self._unacked = [(seq, item) for seq, item in self._unacked if seq > known.acked]

    def _launch(self, call: StartCall) -> None:
        fake = self.fake(call.work)
        if any((start.call, start.attempt) == (call.call, call.attempt) for start in fake.starts):
            return  # asked twice, started once
        fake.starts.append(call)
        fake.current = call
        if fake.start_error:
            self._later(0.0, lambda: self._finish(fake, call, reason="exception", message=fake.start_error))
            return
        self._later(fake.start_after, lambda: self._begin(fake, call))

    def _begin(self, fake: FakeWork, call: StartCall) -> None:
        if fake.current is not call:
            return
        self._report(Started(work=fake.name, call=call.call, attempt=call.attempt, pid=1, at=self.now))
        if fake.ready_after is not None:
            self._later(fake.ready_after, lambda: self._answering(fake, call))
        if call.timeout is not None and (fake.run_for is None or call.timeout < fake.run_for):
            message = f"timeout after {call.timeout:g} s"
            self._later(call.timeout, lambda: self._finish(fake, call, reason="timeout", message=message))
        elif fake.run_for is not None:
            self._later(fake.run_for, lambda: self._exit(fake, call))

    def _answering(self, fake: FakeWork, call: StartCall) -> None:
        if fake.current is call:
            fake.ready = True
            self._report(Ready(work=fake.name, call=call.call, attempt=call.attempt, at=self.now))

    def _exit(self, fake: FakeWork, call: StartCall) -> None:
        if fake.exception:
            self._finish(fake, call, reason="exception", message=fake.exception, exit_code=1)
            return
        code = fake.code()
        for path in fake.publishes if code == 0 else ():
            self.publish(fake.name, path)
        reason = None if code == 0 else "exit_code"
        message = "" if code == 0 else f"exit code {code}"
        result = fake.result if code == 0 else None
        if code == 0 and result is None and call.kind != "python":
            result = list(fake.publishes)
        self._finish(fake, call, reason=reason, message=message, exit_code=code, result=result)

    def _finish(self, fake: FakeWork, call: StartCall, **how: Any) -> None:
        if fake.current is not call:
            return
        fake.current, fake.ready = None, False
        self._report(Ended(work=fake.name, call=call.call, attempt=call.attempt, at=self.now, **how))


def _copied(value: Any) -> Any:
    return msgspec.json.decode(msgspec.json.encode(value))
