"""The engine: every event goes through `handle(event, now)`, which answers with instructions. PURE.

It owns the state tree, the calls and the knowledge of agents. It reads no clock and does no I/O: the service (or a
test) feeds it events, commits what `take_batch()` returns, and only then carries the instructions out. Between two
commits the tree may be ahead of the journal; nobody outside sees it then.

Order. While a pass runs, diffs, calls' ends and requests for calls wait (`deferred`) and are applied after it; a call's
end closes its burst: the next pass starts at once, and what came behind the end waits for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec

from orch.calls import RETRIED, Call, Reason, Stage, call_key, json_arguments, number_of
from orch.contact import UNKNOWN_AFTER, Contacts, lease_for
from orch.errors import CallError, NotFound, OrchError, StaleEpoch, StateForbidden, StateMismatch
from orch.events import (
    AgentFailed,
    AgentGone,
    AgentPolled,
    AgentUp,
    AgentWaits,
    ApiRequest,
    AskCall,
    Batch,
    Event,
    Exit,
    FileEvent,
    FilePublished,
    ForgetWorks,
    Frontends,
    Hidden,
    Instruction,
    LaunchAgent,
    Layout,
    Note,
    PassEnded,
    Patch,
    PlacedWorks,
    PlaceWorks,
    PollAgent,
    Pushed,
    ReleaseAgent,
    ReloadProgram,
    ReplaceAgent,
    Reply,
    Rest,
    RestartWork,
    Revised,
    Routes,
    RunMethod,
    RunPass,
    SendDiffs,
    Shown,
    StartAnswered,
    StartCalls,
    Steady,
    StopApp,
    StopCalls,
    StopWork,
    Tick,
)
from orch.knowledge import KnownAgent, KnownWork
from orch.program import PassInput, PassResult, Schedule
from orch.schedule import following
from orch.scripts import argument_error, split_arguments
from orch.state import StateTree, copy_json, parse_pointer, split_pointer
from orch.wire import (
    LOCAL,
    AgentStatus,
    ComponentRecord,
    Diff,
    Ended,
    Item,
    ItemResult,
    Op,
    Place,
    Progress,
    Published,
    Push,
    PushReply,
    Ready,
    StartCall,
    Started,
    StopCall,
    VarOps,
    WorkVars,
)
from orch.work import WorkSpec

__all__ = ["NO_RECORD", "Config", "Engine"]

NO_RECORD = ComponentRecord(module="", qualname="")
SHOWN_CALLS = 20
SHOWN_FILES = 1_000
RESTART_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
READY_LONG = 60.0
OWN_PASSES = 100
OWN_PAUSE = 0.1


class Config(msgspec.Struct, frozen=True, kw_only=True):
    app: str
    run: int
    base_url: str
    """http://127.0.0.1:7501, without a slash at the end."""
    agent_of: Callable[[WorkSpec], str] = lambda spec: LOCAL
    """LOCAL: placed beside all others. Else an agent for this Work alone, launched when it is needed."""
    work_token: Callable[[str], str] = lambda name: ""
    forget_token: Callable[[str], None] = lambda name: None
    """A work was removed: what comes back under its name has another token."""
    env: Mapping[str, str] = msgspec.field(default_factory=dict)
    secrets: Mapping[str, str] = msgspec.field(default_factory=dict)
    page_secrets: Mapping[str, str] = msgspec.field(default_factory=dict)
    """What the pages' own servers get besides."""
    shared_records: bool = True
    """A new incarnation of an agent finds what the one before has written down, wherever it is."""
    idle_timeout: float = 60.0
    """Seconds after which a finished Work's own place is given back, if its CloudCompute does not say."""
    redact: Callable[[Any, str], None] | None = None
    """Raises when a secret's value is among what is to be stored: (value, where)."""
    hide: Callable[[str], str] = lambda text: text
    """Takes secrets out of what a failure says."""


class Engine:
    """State machine of one run. Not thread-safe: one caller at a time."""

    def __init__(
        self, config: Config, tree: dict[str, Any], specs: Iterable[WorkSpec], *, rev: int = 0, revs: Any = None
    ) -> None:
        self.config = config
        self.run = config.run
        self.works: dict[str, KnownWork] = {}
        self.agents: dict[str, KnownAgent] = {}
        self.contacts = Contacts()
        self.stage = "starting"
        self.message = ""
        self.code = 0
        self.layout: list[dict[str, Any]] = []
        self.schedules: dict[str, Schedule] = {}
        self.released: dict[str, int] = {}
        """Epochs of agents whose Works were removed, until nothing is left of them: what comes back under such a name
        is another one."""
        self._kept_pages: dict[str, tuple[list[Call], Mapping[str, Any]]] = {}
        """Of a resumed run: the pages' servers, until the first pass declares them."""
        self._attaches: dict[str, int] = {}
        """By agent: the number of the last attach."""
        self._doubts: dict[str, float | None] = {}
        """Works whose script may be running where nobody can ask: since when (steady clock) its lease runs out."""
        self._said: dict[str, list[Any]] = {}
        """By work: call, attempt and number of its process's last change."""
        self.passes = 0
        self.pass_seconds = 0.0
        self._slow = False
        self.hidden: dict[str, KnownWork] = {}
        """The pages' servers."""
        self.parts: dict[str, KnownWork] = {}
        """The further machines of Works that have several, as Works of their own (see `_start_parts`)."""

        self._out: list[Instruction] = []
        self._revisions: list[Revised] = []
        self._facts: dict[tuple[str, str], Any] = {}
        self._durable = False
        self._ops: list[Op] = []
        self._dirty: dict[str, None] = {}

        self._deferred: deque[Event] = deque()
        self._passing = False
        self._pass_ticket = 0
        self._fresh_seen: set[str] = set()
        self._woken = True
        self._own = 0
        self._own_names: list[str] = []
        self._own_at = 0.0
        self._only_own = False
        self._pass_ops: list[Op] = []
        self._pass_views: dict[str, None] = {}
        self._pass_schedules: dict[str, Schedule] = {}
        self._close_burst = False
        self._stop_deadline: float | None = None
        self._exited = False
        self.ending: tuple[int, str] | None = None
        """Of a resumed run: the exit code and message with which it was about to end."""

        tree.setdefault("app", {})
        tree["app"] = {"name": config.app, "run": config.run, "stage": self.stage, "message": ""}
        self.tree = StateTree(tree, rev, revs=revs)
        if not rev:
            self.tree.check_limits()
        for spec in specs:
            self._add_work(spec, KnownWork(spec, self.run))

    @property
    def _alive(self) -> bool:
        return self.stage in ("starting", "running")

    # -- bookkeeping
    def _add_work(self, spec: WorkSpec, work: KnownWork) -> None:
        (self.hidden if spec.hidden else self.works)[spec.name] = work
        work.agent = self.config.agent_of(spec)
        self._add_agent(work.agent)
        self._touch(work)
        if not self._apart(work) or spec.kind == "python":
            return
        for rank in range(1, spec.compute.get("count", 1)):
            # Outputs are those of the first machine, and so are the vars.
            part = KnownWork(
                msgspec.structs.replace(
                    spec, name=f"{spec.name}~{rank}", pointer="", hidden=True, outputs=[], retries=0
                ),
                self.run,
            )
            part.main, part.agent = work, part.spec.name
            work.parts.append(part)
            self.parts[part.spec.name] = part
            self._add_agent(part.agent)

    def _add_agent(self, name: str) -> None:
        if name not in self.agents:
            self.agents[name] = KnownAgent(name, self.released.pop(name, 0))

    def _all(self) -> list[KnownWork]:
        return [*self.works.values(), *self.hidden.values(), *self.parts.values()]

    def known(self, name: str) -> KnownWork | None:
        return self.works.get(name) or self.hidden.get(name) or self.parts.get(name)

    def _apart(self, work: KnownWork) -> bool:
        """Whether it has a place of its own."""
        return work.agent != LOCAL

    def work_of(self, agent: str) -> WorkSpec | None:
        """The Work that an agent of its own is for."""
        return next((work.spec for work in self._all() if work.agent == agent), None)

    def find(self, name: str) -> KnownWork:
        work = self.works.get(name.removeprefix("root.")) or self.known(name)
        if work is None:
            raise NotFound(f"there is no work {name!r}", hint=f"works: {', '.join(self.works) or 'none'}")
        return work

    def _touch(self, work: KnownWork) -> None:
        self._dirty[work.spec.name] = None

    def know_agent(self, agent: str, epoch: int) -> int:
        """The runtime has launched this incarnation: reports of older ones are refused from now on. Returns the number
        of the attach that follows."""
        known = self.agents.setdefault(agent, KnownAgent(agent))
        if known.epoch != epoch:
            known.epoch, known.acked = epoch, 0
            known.up, known.launching = False, agent != LOCAL
        self._note_agent(known)
        number = self._attaches[agent] = self._attaches.get(agent, 0) + 1
        self._fact("attach", agent, number)
        return number

    def forget_agent(self, agent: str) -> None:
        """Nothing is left of it; unless its Work has come back, there is nothing to know any more."""
        if self.released.pop(agent, None) is not None:
            self._fact("agent", agent, None)

    def _note_agent(self, agent: KnownAgent) -> None:
        self._fact("agent", agent.name, {"epoch": agent.epoch, "acked": agent.acked})

    def note_fact(self, kind: str, key: str, value: Any) -> None:
        """Something of the service's own, journalled with the next batch."""
        self._fact(kind, key, value)

    def _fact(self, kind: str, key: str, value: Any) -> None:
        self._facts[kind, key] = value

    def _emit(self, instruction: Instruction) -> None:
        self._out.append(instruction)

    def _answer(self, event: Event, value: Any = None, error: BaseException | None = None) -> None:
        if event.ticket:
            self._emit(Reply(ticket=event.ticket, value=value, error=error))

    def _show(self, now: float) -> None:
        """Operations that bring the statuses in the tree up to date, into the revision that is being made."""
        for name in self._dirty:
            work = self.known(name)
            if work is None:
                continue
            for call_id in sorted(work.book.touched):
                call = work.book.calls[call_id]
                self._fact("call", call_id, msgspec.to_builtins(call))
            for call_id in work.book.forget(newest=SHOWN_CALLS, caches=self._caches(work)):
                self._fact("call", call_id, None)
            stage_before = work.shown.get("stage")
            call_now = work.book.shown
            stage_now = str(call_now.stage) if call_now is not None else str(Stage.NOT_STARTED)
            if stage_now != stage_before and stage_before is not None:
                work.since = now
            status = work.status(self.config.base_url)
            kept = {
                **status,
                "deaths": work.deaths,
                "held_key": work.book.held,
                "stopping": work.stopping,
                "sent_epoch": work.sent_epoch,
                "part_failure": work.part_failure and msgspec.to_builtins(work.part_failure),
                "waiting_end": work.waiting_end and msgspec.to_builtins(work.waiting_end),
                "master_port": work.master_port,
            }
            if kept != work.kept:
                work.kept = kept
                self._fact("work", name, kept)
            if status != work.shown:
                silent = stage_before is None and stage_now == Stage.NOT_STARTED
                if not silent and (stage_before, work.shown.get("reason"), work.shown.get("is_ready")) != (
                    stage_now,
                    status["reason"],
                    status["is_ready"],
                ):
                    detail = status["message"] or (status["url"] if status["is_ready"] else "")
                    shown = "ready" if status["is_ready"] and stage_now == "running" else stage_now
                    self._emit(Shown(work=name, stage=shown, detail=detail, hidden=work.spec.hidden))
            if not work.spec.hidden:
                at = work.spec.pointer
                if not work.shown:
                    self._ops.append({"op": "replace", "path": f"{at}/status", "value": status})
                else:
                    self._ops += [
                        {"op": "replace", "path": f"{at}/status/{field}", "value": value}
                        for field, value in status.items()
                        if work.shown.get(field) != value or type(work.shown.get(field)) is not type(value)
                    ]
                self._show_calls(work)
                if status != work.shown or work.book.touched:
                    self._pass_views[name] = None
            work.shown = status
            work.book.touched.clear()
        self._dirty.clear()

    def _show_calls(self, work: KnownWork) -> None:
        node = self.tree.get(work.spec.pointer)["calls"]
        at = f"{work.spec.pointer}/calls"
        for call_id in sorted(work.book.touched, key=lambda c: int(c.rsplit("-", 1)[1])):
            self._ops.append({"op": "add", "path": f"{at}/{call_id}", "value": work.book.calls[call_id].public()})
        known = list(dict.fromkeys([*node, *sorted(work.book.touched, key=lambda c: int(c.rsplit("-", 1)[1]))]))
        for call_id in known[: max(0, len(known) - SHOWN_CALLS)]:
            self._ops.append({"op": "remove", "path": f"{at}/{call_id}"})

    def _revise(self, ops: list[Op], cause: str, now: float) -> int:
        """One revision of what was applied already (`ops`), plus the statuses that became due with it."""
        rev = self.tree.rev + 1 if not ops else self.tree.rev
        self._show(now)
        extra, self._ops = self._ops, []
        if extra:
            # Statuses are written by nobody else: they cannot be refused.
            extra = self.tree.apply(extra, rev, guard=False)
        if not ops and not extra:
            return self.tree.rev
        revision = Revised(rev=rev, cause=cause, at=now, ops=[*ops, *extra])
        self._revisions.append(revision)
        self._emit(revision)
        return rev

    # -- the door
    def handle(self, event: Event, now: float) -> list[Instruction]:
        """Apply one event. Instructions may only be carried out after `take_batch()` has been committed."""
        self._dispatch(event, now)
        self._drain(now)
        return self._taken()

    def settle(self, now: float) -> list[Instruction]:
        """A burst is over: start a pass if anything asks for one."""
        self._revise([], "flow", now)
        self._maybe_pass(now)
        return self._taken()

    def take_batch(self) -> Batch | None:
        if not (self._revisions or self._facts):
            return None
        facts = [(kind, key, value) for (kind, key), value in self._facts.items()]
        batch = Batch(revisions=self._revisions, facts=facts, durable=self._durable)
        self._revisions, self._facts, self._durable = [], {}, False
        return batch

    def next_due(self) -> float | None:
        """When the next `Tick` is worth sending (seconds since the epoch)."""
        dues = [s.due for s in self.schedules.values() if not s.ticked] if self.stage == "running" else []
        for work in self._all():
            current = work.book.current
            busy = any(each.placing or each.live for each in (work, *work.parts))  # (then it goes on by itself)
            if current is not None and not busy:
                due = work.book.calls[current].due
                if due is not None:
                    dues.append(due)
            if work.release_at is not None and self._alive:
                dues.append(work.release_at)
        if self._woken and self._only_own and self._own > OWN_PASSES:
            dues.append(self._own_at + OWN_PAUSE)
        if self._stop_deadline is not None:
            dues.append(self._stop_deadline)
        return min(dues, default=None)

    def _taken(self) -> list[Instruction]:
        taken, self._out = self._out, []
        return taken

    def _dispatch(self, event: Event, now: float) -> None:
        ordered = isinstance(event, Patch | Pushed | AskCall | RestartWork | ApiRequest | StartAnswered)
        if isinstance(event, Pushed) and not event.push.items:
            ordered = False  # a heartbeat: leases do not wait for passes
        if isinstance(event, Pushed) and not self._alive:
            ordered = False  # an app that ends does not wait for a pass that may never end
        if isinstance(event, Patch) and event.known:
            ordered = False
        if ordered and (self._passing or self._deferred):
            self._deferred.append(event)
        else:
            self._now(event, now)

    def _drain(self, now: float) -> None:
        while self._deferred and not self._passing:
            if self._close_burst:
                self._revise([], "flow", now)
                self._maybe_pass(now)
                if self._passing:
                    return
            self._now(self._deferred.popleft(), now)
        if self._close_burst and not self._passing:
            self._revise([], "flow", now)
            self._maybe_pass(now)

    def _now(self, event: Event, now: float) -> None:
        handlers: dict[type[Event], Callable[[Any, float], None]] = {
            Patch: self._patch,
            Pushed: self._pushed,
            Rest: self._pushed,
            AskCall: self._ask_call,
            StopWork: self._stop_work,
            RestartWork: self._restart_work,
            StopApp: self._stop_app,
            ApiRequest: self._api_request,
            PassEnded: self._pass_ended,
            AgentUp: self._agent_up,
            AgentFailed: self._agent_failed,
            AgentGone: self._agent_gone,
            AgentWaits: self._agent_waits,
            Steady: self._steady,
            PlacedWorks: self._placed_works,
            StartAnswered: self._start_answered,
            AgentPolled: self._agent_polled,
            Hidden: self._hidden_works,
            FilePublished: self._file_published,
            Tick: self._tick,
        }
        try:
            handlers[type(event)](event, now)
        except OrchError as error:
            self._answer(event, error=error)

    # -- state from outside
    def _patch(self, event: Patch, now: float) -> None:
        if event.match is not None:
            pointer, expected = event.match
            actual = self.tree.value_rev(pointer)
            if actual != expected:
                raise StateMismatch(
                    f"{pointer or '/'} was changed at revision {actual}, the request speaks of {expected}",
                    hint="read it again and repeat the request",
                )
        rev = self._apply_vars(event.ops, event.cause, now, known=event.known)
        self._answer(event, rev)

    def _apply_vars(
        self, ops: list[Op], cause: str, now: float, *, origin: tuple[str, int] | None = None, known: bool = False
    ) -> int:
        """Validate and apply a user's diff as one revision; tell the agents and the flow."""
        if self.config.redact is not None:
            for op in ops:
                self.config.redact([op.get("path"), op.get("value")], str(op.get("path", "")))
        self._revise([], "flow", now)
        applied = self.tree.apply(ops, self.tree.rev + 1, guard=True)
        rev = self.tree.rev
        if origin is not None and not applied:
            self._emit(SendDiffs(agent=self._agent_of(origin[0]), diffs=[
                Diff(work=origin[0], rev=rev, ops=[], seq=origin[1])
            ]))  # fmt: skip
        if not applied:
            return rev
        if not known:
            self._pass_ops += applied
        self._wake()
        self._tell_agents(applied, rev, origin=origin, as_sent=len(applied) == len(ops))
        self._revise(applied, cause, now)
        return rev

    def _tell_agents(
        self, ops: list[Op], rev: int, *, origin: tuple[str, int] | None = None, as_sent: bool = False
    ) -> None:
        """Diffs for the works whose vars these operations touch."""
        by_work: dict[str, list[Op]] = {}
        for op in ops:
            target = split_pointer(parse_pointer(op["path"]))
            if target is None or len(target.component) < 2 or target.component[-2] != "works":
                continue
            name = ".".join(_dotted(target.component))
            if self.works.get(name) is None:
                continue
            at = self.works[name].spec.pointer + "/vars"
            relative = {**op, "path": op["path"][len(at) :]}
            if "from" in op:
                relative["from"] = op["from"][len(at) :]
            by_work.setdefault(name, []).append(relative)
        for name, changes in by_work.items():
            work = self.works[name]
            agent = self.agents[work.agent]
            nowhere = self._apart(work) and not (agent.launching or agent.expected)
            if not work.placed and not work.placing and (agent.up or nowhere):
                continue  # (one that is being attached may have it: it was told of an older revision)
            seq = origin[1] if origin is not None and origin[0] == name else None
            diff = Diff(work=name, rev=rev, ops=None if seq is not None and as_sent else changes, seq=seq)
            self._emit(SendDiffs(agent=work.agent, diffs=[diff]))

    # -- what agents report
    def _pushed(self, event: Pushed, now: float) -> None:
        push = event.push
        agent = self.agents.get(push.agent)
        if agent is None or push.epoch < agent.epoch:
            raise StaleEpoch(f"agent {push.agent} epoch {push.epoch} was replaced")
        if push.epoch > agent.epoch:
            agent.epoch, agent.acked = push.epoch, 0
        self._heard(agent)
        # Sent again, because the answer was lost: a script may wait for what was said of its change.
        results: list[ItemResult] = [] if isinstance(event, Rest) else agent.said_since(push.seq)
        for i, item in enumerate(push.items):
            seq = push.seq + i
            if seq <= agent.acked:
                continue
            if self._close_burst and not self._passing:
                self._revise([], "flow", now)
                self._maybe_pass(now)
            if self._passing and self._alive:
                # The rest of the push belongs behind the pass that a call's end has started.
                rest = Push(agent=push.agent, epoch=push.epoch, seq=seq, items=push.items[i:])
                self._deferred.appendleft(Rest(ticket=event.ticket, push=rest, results=results))
                self._note_agent(agent)
                return
            results.append(self._item(item, seq, now, push.agent))
            if agent.epoch != push.epoch:  # released by what it has just said
                self._answer(event, PushReply(acked=push.seq + len(push.items) - 1))
                return
            agent.acked = seq
            agent.said.append((agent.epoch, results[-1]))
        if push.items:
            self._note_agent(agent)
        earlier = event.results if isinstance(event, Rest) else []
        notable = [result for result in [*earlier, *results] if result.rev or result.error]
        self._answer(event, PushReply(acked=agent.acked, results=notable))

    def _item(self, item: Item, seq: int, now: float, agent: str) -> ItemResult:
        try:
            if self._agent_of(item.work, agent) != agent:
                raise StateForbidden(f"agent {agent} has nothing to say about {item.work}")
            rev = self._report(item, seq, now)
        except OrchError as error:
            hint = f" - {error.hint}" if error.hint else ""
            self._emit(Note(level="warning", text=f"{item.work}: a change was refused: {error.message}{hint}"))
            if isinstance(item, VarOps):
                self._emit(SendDiffs(agent=agent, diffs=[
                    Diff(work=item.work, rev=self.tree.rev, ops=[], seq=seq)
                ]))  # fmt: skip
            return ItemResult(seq=seq, error=error.message + hint, status=error.status)
        return ItemResult(seq=seq, rev=rev)

    def _agent_of(self, work: str, unknown: str = LOCAL) -> str:
        known = self.known(work)
        return known.agent if known is not None else unknown

    def _report(self, item: Item, seq: int, now: float) -> int:
        work = self.known(item.work)
        if work is None:
            if isinstance(item, VarOps):
                raise NotFound(f"there is no work {item.work!r} any more")
            self._emit(Note(level="info", text=f"{item.work}: a late report was dropped, the work was removed"))
            return 0
        match item:
            case VarOps() if work.spec.hidden:
                raise StateForbidden(f"{item.work} has no variables")
            case VarOps(call=call) if call is not None and call not in work.book.calls:
                raise NotFound(f"there is no call {call!r} any more")
            case VarOps():
                if item.n and self._said_before(item):
                    self._emit(SendDiffs(agent=work.agent, diffs=[
                        Diff(work=item.work, rev=self.tree.rev, ops=[], seq=seq)
                    ]))  # fmt: skip
                    return self.tree.rev
                at = work.spec.pointer + "/vars"
                ops = [
                    {**op, "path": at + op["path"], **({"from": at + op["from"]} if "from" in op else {})}
                    for op in item.ops
                ]
                return self._apply_vars(ops, f"work:{item.work}", now, origin=(item.work, seq))
            case Started():
                self._started(work, item)
            case Ready():
                self._ready(work, item)
            case Ended():
                self._ended(work, item, now)
            case Progress():
                self._progressed(work, item)
            case Published():
                self._published(work, item)
        return 0

    def _said_before(self, item: VarOps) -> bool:
        """A process that a new agent has adopted says again what it has not seen echoed."""
        at = [item.call, item.attempt, item.n]
        last = self._said.get(item.work)
        if last is not None and last[:2] == at[:2] and item.n <= last[2]:
            return True
        self._said[item.work] = at
        self._fact("said", item.work, at)
        return False

    def _current(self, work: KnownWork, call: str, attempt: int) -> Call | None:
        """The call that a report speaks of, if it is the one that the work is at."""
        if work.book.current != call:
            return None
        current = work.book.calls[call]
        return current if current.attempt == attempt else None

    def _started(self, work: KnownWork, item: Started) -> None:
        call = self._current(work, item.call, item.attempt)
        if call is None:  # given up while its start was under way
            self._emit(self._stop_message(work, item.call, item.attempt, Reason.LOST))
            return
        if call.stage is Stage.RUNNING or not work.live:  # (its end is journalled already)
            return
        work.moving = ""
        first = call.started_at if call.started_at is not None and call.attempt > 1 else item.at
        work.book.put(call.move(Stage.RUNNING, started_at=first, due=None, reason=None, message=""))
        self._touch(work)
        self._wake()

    def _ready(self, work: KnownWork, item: Ready) -> None:
        if self._current(work, item.call, item.attempt) is None or not work.live or work.ready == item.ready:
            return
        self._be_ready(work, item.ready, item.at)

    def _be_ready(self, work: KnownWork, ready: bool, at: float) -> None:
        if work.ready_at is not None and at - work.ready_at >= READY_LONG:
            work.deaths = 0
        work.ready = ready
        work.ready_at = at if ready else None
        self._touch(work)
        self._wake()

    def _progressed(self, work: KnownWork, item: Progress) -> None:
        if work.book.current != item.call:
            return
        if item.progress is not None:
            work.progress = item.progress
        if item.moving is not None:
            work.moving = item.moving
        if item.metrics:
            if self.config.redact is not None:
                self.config.redact(item.metrics, f"{work.spec.name}: metrics")
            work.metrics = {**work.metrics, **item.metrics}
        self._touch(work)
        self._wake()

    def _published(self, work: KnownWork, item: Published) -> None:
        self._emit(FileEvent(drive=item.drive, manifest=item.manifest))
        if item.manifest.get("partial"):
            return
        inside, version = item.manifest["path"], item.manifest["version"]
        published = [
            {"path": _drive_path(item.manifest, entry["name"]), "size": entry["size"], "version": version}
            for entry in item.manifest.get("entries", [])
        ]
        kept = [f for f in work.files if inside not in (".", f["path"]) and not f["path"].startswith(inside + "/")]
        work.files = (published + kept)[:SHOWN_FILES]
        self._touch(work)
        self._wake()

    def _file_published(self, event: FilePublished, now: float) -> None:
        self._emit(FileEvent(drive=event.drive, manifest=event.manifest))
        self._wake()
        self._answer(event)

    def _ended(self, work: KnownWork, item: Ended, now: float) -> None:
        call = self._current(work, item.call, item.attempt)
        if call is None or call.done or (call.stage is Stage.PENDING and call.due is not None):
            return
        if work.main is not None:
            if item.reason == Reason.SPOT_RECLAIMED and work.placed:
                self._release(work)
            self._part_ended(work, call, item, now)
            self._maybe_exit(now)
            return
        if work.parts and work.live:
            if work.part_failure is not None and not work.stopping:
                failure = work.part_failure
                item = msgspec.structs.replace(
                    item, reason=failure.reason, message=failure.message, exit_code=failure.exit_code, cut=failure.cut
                )
            elif item.reason is None and any(part.live for part in work.parts) and not work.stopping:
                work.waiting_end = item
                self._touch(work)
                return
            self._stop_parts(work, now)
        work.live = False
        self._be_ready(work, False, item.at)
        work.exit_code = item.exit_code
        self._durable = True
        self._close_burst = True
        reason = _reason_of(item)
        ended = call.replace(exit_code=item.exit_code, finished_at=item.at, due=None)
        if reason is Reason.TIMEOUT:
            work.num_timeouts += 1
        if work.stopping or reason in (Reason.STOPPED, Reason.REPLACED):
            if reason is None and work.spec.kind != "service":
                self._succeed(work, ended, item)
            else:
                why = Reason(work.stopping) if work.stopping else (reason or Reason.STOPPED)
                self._end(work, ended.move(Stage.STOPPED, reason=why, message=item.message))
        elif item.cut and work.spec.on_lost == "restart":
            self._start_again(work, ended, item.message, now)
        elif work.spec.kind == "service" and self._restarts(work, reason, cut=item.cut):
            delay = RESTART_DELAYS[min(work.deaths, len(RESTART_DELAYS) - 1)]
            work.deaths += 1
            said = item.message or f"exit code {item.exit_code}"
            message = f"{said}; restart in {delay:g} s"
            why = reason or Reason.EXIT_CODE
            work.book.put(ended.move(Stage.PENDING, reason=why, message=message, due=now + delay))
        elif reason is None:
            self._succeed(work, ended, item)
        elif reason in RETRIED and self._retries(work, ended, cut=item.cut):
            message = f"{item.message or reason}; retry {call.attempt - call.restarts} of {work.spec.retries}"
            due = now + work.spec.retry_delay
            work.book.put(ended.move(Stage.PENDING, reason=reason, message=message, due=due))
        else:
            failed = ended.move(Stage.FAILED, reason=reason, message=item.message)
            self._end(work, failed)
            if work.spec.raise_exception:
                # Without an exit code nothing ran that could have written the traceback to the work's log.
                logged = work.spec.name if item.exit_code is not None or not item.traceback else ""
                where = f"\n{item.traceback}" if item.traceback else ""
                self._fail_app(f"{work.spec.name} failed: {item.message or reason}{where}", now, logged, failed.message)
        if reason is Reason.SPOT_RECLAIMED and self._apart(work) and work.placed:
            self._release(work)  # the next attempt is placed elsewhere
        self._advance(work, now)
        self._maybe_exit(now)

    @staticmethod
    def _restarts(work: KnownWork, reason: Reason | None, *, cut: bool) -> bool:
        if cut and work.spec.on_lost == "fail":
            return False
        return work.spec.restart == "always" or (work.spec.restart == "on_failure" and reason is not None)

    @staticmethod
    def _retries(work: KnownWork, call: Call, *, cut: bool) -> bool:
        if work.spec.kind == "service" or (cut and work.spec.on_lost == "fail"):
            return False
        return call.attempt - call.restarts <= work.spec.retries

    def _start_again(self, work: KnownWork, call: Call, why: str, now: float) -> None:
        """The next attempt of a call that was cut off: as `on_lost="restart"` says, whatever the retries are."""
        message = f"{why}; started again"
        restarts = call.restarts + 1
        work.book.put(call.move(Stage.PENDING, reason=Reason.LOST, message=message, due=now, restarts=restarts))

    def _succeed(self, work: KnownWork, call: Call, item: Ended) -> None:
        work.num_successes += 1
        self._end(work, call.move(Stage.SUCCEEDED, reason=None, message=item.message, result=item.result))

    def _end(self, work: KnownWork, call: Call) -> None:
        fresh = not work.spec.cache_calls and work.spec.kind != "service"
        work.book.finish(call.replace(fresh=fresh))
        work.stopping = ""

    # -- starting and stopping calls
    def _advance(self, work: KnownWork, now: float) -> None:
        """Start the next call of a free Work, or the next attempt of its current one."""
        if not self._alive:
            return
        book = work.book
        if book.current is None:
            if not book.queue:
                self._idle(work, now)
                return
            if not self._all_placed(work):
                return
            call = book.take()
            assert call is not None
            work.progress, work.metrics, work.exit_code, work.ready = None, {}, None, False
            work.deaths = 0
        else:
            call = book.calls[book.current]
            if work.live or work.stopping or (call.due is not None and call.due > now):
                return
            if not self._all_placed(work):
                return
        launched = book.put(call.replace(attempt=call.attempt + 1, due=None, finished_at=None))
        work.live, work.release_at = True, None
        work.sent_epoch = self.agents[work.agent].epoch
        work.ready = False
        work.moving = ""
        self._durable = True
        self._touch(work)
        self._emit(StartCalls(agent=work.agent, calls=[self._start_message(work, launched)]))
        self._start_parts(work, launched, now)

    # -- Works on several machines
    def _all_placed(self, work: KnownWork) -> bool:
        """Whether a call can start; asks for the places that are missing."""
        for each in (work, *work.parts):
            each.release_at = None
            if not each.placed:
                self._place(each)
        return all(each.placed for each in (work, *work.parts)) and not any(part.live for part in work.parts)

    def _start_parts(self, work: KnownWork, call: Call, now: float) -> None:
        """An attempt of such a Work is one script a machine, started together. Each further one is a call of its own to
        a part; the attempt ends when all have ended, or when one has failed: then the others are stopped."""
        work.part_failure = work.waiting_end = None
        for part in work.parts:
            part.book.add(part.book.new(call.args, call.kwargs, now))
            self._advance(part, now)

    def _ranks(self, work: KnownWork) -> dict[str, str]:
        """What each machine's script is told, as torchrun and Lightning read it."""
        main = work.main or work
        if not main.parts:
            return {}
        rank = 0 if work is main else 1 + main.parts.index(work)
        count = str(1 + len(main.parts))
        return {
            "MASTER_ADDR": main.host,
            "MASTER_PORT": str(main.master_port),
            "NODE_RANK": str(rank),
            "NUM_NODES": count,
            "RANK": str(rank),
            "WORLD_SIZE": count,
        }

    def _part_ended(self, part: KnownWork, call: Call, item: Ended, now: float) -> None:
        main = part.main
        assert main is not None
        part.live = False
        ended = call.replace(exit_code=item.exit_code, finished_at=item.at, due=None)
        stopped, failed = part.stopping, _reason_of(item)
        if stopped:
            self._end(part, ended.move(Stage.STOPPED, reason=Reason(stopped), message=item.message))
        elif failed is None:
            self._end(part, ended.move(Stage.SUCCEEDED, reason=None, message=item.message))
        else:
            self._end(part, ended.move(Stage.FAILED, reason=failed, message=item.message))
        self._touch(part)
        if main.live and main.book.current is not None:
            if failed is not None and not stopped:
                self._part_failed(main, main.book.calls[main.book.current], part, item, now)
            if main.waiting_end is not None and not any(each.live for each in main.parts):
                self._ended(main, main.waiting_end, now)
        self._advance(main, now)

    def _part_failed(self, main: KnownWork, call: Call, part: KnownWork, item: Ended, now: float) -> None:
        if main.part_failure is not None or main.stopping:
            return
        message = f"machine {main.parts.index(part) + 1}: {item.message or item.reason}"
        main.part_failure = msgspec.structs.replace(item, message=message)
        self._touch(main)
        self._stop_parts(main, now)
        if main.waiting_end is None:
            self._emit(self._stop_message(main, call.id, call.attempt, Reason.STOPPED))

    def _stop_parts(self, main: KnownWork, now: float) -> None:
        for part in main.parts:
            if part.live:
                self._cancel(part, Reason.STOPPED, now)

    def _start_message(self, work: KnownWork, call: Call) -> StartCall:
        spec = work.spec
        lease, lease_grace = lease_for(spec.lost_after, spec.grace)
        args = list(call.args)
        if spec.kind != "python":
            args = list(split_arguments(call.args))
        return StartCall(
            work=spec.name,
            call=call.id,
            attempt=call.attempt,
            kind=spec.kind,
            record=spec.record if spec.kind == "python" else None,
            command=spec.command,
            script_args=spec.script_args,
            args=args,
            kwargs=call.kwargs,
            shell=spec.shell,
            cwd=spec.cwd,
            env={**self._ranks(work), **self.config.env, **spec.env},
            secrets={**self.config.secrets, **(self.config.page_secrets if spec.name in self.hidden else {})},
            base_path=f"/view/{spec.display_name if spec.name in self.hidden else (work.main or work).spec.name}",
            prefix=spec.prefix,
            health=spec.health,
            timeout=spec.timeout,
            grace=spec.grace,
            lease=lease if spec.on_lost != "wait" else None,
            lease_grace=lease_grace,
            drive=spec.drive,
            inputs=spec.inputs,
            outputs=spec.outputs,
            reload=spec.reload,
            sync_interval=spec.sync_interval,
        )

    def _place(self, work: KnownWork) -> None:
        if work.placing or work.placed:
            return
        work.placing = True
        agent = self.agents[work.agent]
        if not agent.up:
            if not agent.launching and not agent.expected:
                agent.launching = True
                self._touch(work)
                self._emit(LaunchAgent(agent=agent.name))
            return
        self._emit(PlaceWorks(agent=agent.name, works=[self._place_message(work)]))

    def _idle(self, work: KnownWork, now: float) -> None:
        """It has finished and nothing waits: a place of its own is given back after a while."""
        idle = work.spec.compute.get("idle_timeout")
        for each in (work, *work.parts):
            if self._apart(each) and each.placed and not each.live and work.book.calls and each.release_at is None:
                each.release_at = now + (self.config.idle_timeout if idle is None else idle)

    def _release(self, work: KnownWork, grace: float = 0.0) -> None:
        """From the moment in which this is journalled, its agent is refused."""
        agent = self.agents[work.agent]
        agent.epoch, agent.acked = agent.epoch + 1, 0
        agent.up = agent.launching = agent.expected = agent.silent = False
        self._note_agent(agent)
        self._unplace(work)
        self.contacts.forget(agent.name)
        self._emit(ReleaseAgent(agent=agent.name, epoch=agent.epoch, grace=grace))

    def _unplace(self, work: KnownWork) -> None:
        work.placed = work.placing = False
        work.release_at = None
        work.host, work.port = work.spec.host or "", work.spec.port  # the next machine has other free ports
        self._touch(work)

    def _place_message(self, work: KnownWork) -> Place:
        values = {} if work.spec.hidden else self.tree.get(work.spec.pointer + "/vars")
        return Place(
            work=work.spec.name,
            token=self.config.work_token(work.spec.name),
            rev=self.tree.rev,
            vars=copy_json(values),
            host=work.spec.host,
            port=work.port,
            python=work.spec.kind == "python",
            drives=work.spec.drives(values),
            master=bool(work.parts),
        )

    def _cancel(self, work: KnownWork, reason: Reason, now: float, *, kill: bool = False) -> None:
        """Stop the current call and drop the waiting ones."""
        book = work.book
        self._touch(work)
        for waiting in list(book.queue):
            book.finish(book.calls[waiting].move(Stage.STOPPED, reason=reason, finished_at=now))
        if book.current is None:
            return
        call = book.calls[book.current]
        book.last = call.id
        if not work.live:
            self._end(work, call.move(Stage.STOPPED, reason=reason, message="", finished_at=now, due=None))
            return
        if work.stopping and not kill:
            return
        self._stop_parts(work, now)
        work.stopping = str(reason)
        work.ready = False
        self._emit(self._stop_message(work, call.id, call.attempt, reason, kill=kill))

    @staticmethod
    def _stop_message(work: KnownWork, call: str, attempt: int, reason: Reason, *, kill: bool = False) -> StopCalls:
        grace = 0.0 if kill else work.spec.grace
        stop = StopCall(work=work.spec.name, call=call, attempt=attempt, grace=grace, reason=str(reason))
        return StopCalls(agent=work.agent, calls=[stop])

    # -- asked from outside the flow
    def _ask_call(self, event: AskCall, now: float) -> None:
        work = self.find(event.work)
        self._refuse_when_ending(work)
        args, kwargs = json_arguments(work.spec.name, event.args, event.kwargs)
        if self.config.redact is not None:
            self.config.redact([args, kwargs], f"{work.spec.name}: call arguments")
        key = call_key(args, kwargs)
        book = work.book
        found_id = book.latest.get(key)
        found = book.calls[found_id] if found_id is not None else None
        if found is not None and (not found.done or (found.succeeded and self._caches(work))):
            self._answer(event, self.describe(work))
            return
        call = book.new(args, kwargs, now)
        error = self._bad_arguments(work, args, kwargs)
        if error:
            raise CallError(f"{work.spec.name}: {error}")
        if work.spec.when_busy == "replace":
            self._cancel(work, Reason.REPLACED, now)
        book.add(call)
        self._touch(work)
        self._wake()
        self._advance(work, now)
        self._revise([], "api", now)
        self._answer(event, self.describe(work))

    @staticmethod
    def _caches(work: KnownWork) -> bool:
        return work.spec.cache_calls and work.spec.kind != "service"

    @staticmethod
    def _bad_arguments(work: KnownWork, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        if work.spec.kind == "python":
            return ""
        return argument_error(args, kwargs)

    def _refuse_when_ending(self, work: KnownWork) -> None:
        if not self._alive:
            raise CallError(f"{work.spec.name}: the app is {self.stage}, no call can be started")

    def _stop_work(self, event: StopWork, now: float) -> None:
        work = self.find(event.work)
        shown = work.book.shown
        if shown is not None:
            self._abandon(work, now)
            self._cancel(work, Reason.STOPPED, now)
            self._advance(work, now)
            latest = work.book.shown if work.book.shown is not None else shown
            work.book.held = latest.key
            self._wake()
        self._revise([], "api", now)
        self._answer(event, self.describe(work))

    def _abandon(self, work: KnownWork, now: float) -> None:
        """Somebody has decided about a script that nobody can be asked about any more. If it lives, it is refused."""
        call = None if work.book.current is None else work.book.calls[work.book.current]
        agent = self.agents[work.agent]
        if call is None or call.stage is not Stage.UNKNOWN:
            return
        asked = work.sent_epoch >= agent.since if agent.up else agent.expected or agent.launching
        if asked:
            return
        work.live = False
        self._end(work, call.move(Stage.STOPPED, reason=Reason.STOPPED, message=call.message, finished_at=now))
        self._touch(work)

    def _restart_work(self, event: RestartWork, now: float) -> None:
        work = self.find(event.work)
        self._refuse_when_ending(work)
        self._abandon(work, now)
        self._restart(work, now)
        self._revise([], "api", now)
        self._answer(event, self.describe(work))

    def _restart(self, work: KnownWork, now: float) -> None:
        book = work.book
        latest = book.calls[book.queue[-1]] if book.queue else book.shown
        if latest is None:  # (a pass has checked it before)
            raise CallError(
                f"{work.spec.name} has never been asked for a call, there is nothing to restart",
                hint=f"POST /api/v1/works/{work.spec.name}/run starts one",
            )
        self._cancel(work, Reason.STOPPED, now)
        book.forget_failures()
        book.add(book.new(latest.args, latest.kwargs, now))
        self._touch(work)
        self._wake()
        self._advance(work, now)

    # -- passes
    def _wake(self) -> None:
        self._woken = True
        self._only_own = False

    def _maybe_pass(self, now: float) -> None:
        if self._passing or not self._woken or not self._alive:
            self._close_burst = self._close_burst and bool(self._passing)
            return
        if not self._only_own:
            self._own = 0
        elif self._own > OWN_PASSES and now < self._own_at + OWN_PAUSE:
            return
        given = self._pass_input(now)
        self._woken = self._only_own = False
        self._passing = True
        self._emit(RunPass(given=given))

    def _pass_input(self, now: float) -> PassInput:
        self._close_burst = False
        self._fresh_seen = {
            call
            for work in self.works.values()
            if not work.spec.cache_calls
            for call in work.book.latest.values()
            if work.book.calls[call].fresh
        }
        views = {n: self.works[n].view(self.config.base_url) for n in self._pass_views if n in self.works}
        given = PassInput(run=self.run, now=now, ops=self._pass_ops, views=views, schedules=dict(self._pass_schedules))
        self._pass_ops, self._pass_views, self._pass_schedules = [], {}, {}
        return given

    def _api_request(self, event: ApiRequest, now: float) -> None:
        if not self._alive:
            raise CallError(f"the app is {self.stage}")
        self._revise([], "flow", now)
        self._passing = True
        self._pass_ticket = event.ticket
        self._emit(RunMethod(given=self._pass_input(now), method=event.method))

    def _pass_ended(self, event: PassEnded, now: float) -> None:
        result = event.result
        self._passing = False
        method, self._pass_ticket = self._pass_ticket, 0
        self.passes += 1
        self.pass_seconds = result.seconds if self.passes == 1 else 0.9 * self.pass_seconds + 0.1 * result.seconds
        if result.how == "error":
            if method:
                self._emit(ReloadProgram(tree=copy_json(self.tree.root)))
                self._emit(Reply(ticket=method, error=result.error))
                return
            self._fail_app(f"{result.message}\n{result.traceback}", now)
            return
        try:
            rev = self._commit_pass(result, method != 0, now)
        except OrchError as error:
            self._emit(ReloadProgram(tree=copy_json(self.tree.root)))
            if method:
                self._emit(Reply(ticket=method, error=error))
            else:
                self._fail_app(f"a pass cannot be committed: {error.message}", now)
            return
        if method:
            self._emit(Reply(ticket=method, value=(result.value, rev)))
        if result.how == "stop":
            self._end_app(0, result.message, now)
        elif result.how == "fail":
            self._fail_app(result.message, now)
        if self.stage == "starting" and result.how in ("end", "blocked") and not method:
            self._set_stage("running", "", now)
        if self.passes >= 5 and self.pass_seconds > 1.0 and not self._slow:
            self._emit(
                Note(
                    level="warning",
                    text=f"passes take {self.pass_seconds:.1f} s on average: "
                    "a Flow orchestrates, computing belongs in a Work",
                )
            )
        self._slow = self.passes >= 5 and self.pass_seconds > 1.0

    def _commit_pass(self, result: PassResult, method: bool, now: float) -> int:
        """What the pass changed and asked for, as one revision in one transaction."""
        if self.config.redact is not None:
            for op in result.ops:
                self.config.redact([op["path"], op.get("value")], op["path"])
            for spec in result.created:
                self.config.redact(spec, f"{spec.name}: its declaration")
            for name, record in result.records.items():
                self.config.redact(record, f"{name}: constructor arguments")
            for ask in result.asks:
                for call in ask.new.values():
                    self.config.redact([call.args, call.kwargs], f"{ask.work}: call arguments")
        self._revise([], "flow", now)
        ops = result.ops
        if ops:
            ops = self.tree.apply(result.ops, self.tree.rev + 1, guard=False)
        for name in result.removed:
            self._remove_work(name, now)
        for spec in result.created:
            work = KnownWork(spec, self.run)
            work.born = self.tree.rev
            self._add_work(spec, work)
        for name, record in result.records.items():
            self._fact("component", name, record)
        for key, schedule in result.schedules.items():
            self._keep_schedule(key, schedule)
        asked, unfit = self._asks(result, now)
        self._hand_over(result, method, now)
        if result.layout is not None:
            self.layout = result.layout
            self._emit(Layout(tabs=result.layout))
            self._emit(Frontends(frontends=result.frontends))
        if result.routes is not None:
            self._emit(Routes(routes=result.routes))
        if ops:
            rev = self.tree.rev
            self._tell_agents(ops, rev)
            self._revise(ops, "flow" if not method else "api", now)
        else:
            rev = self._revise([], "flow" if not method else "api", now)
        for spec in result.created:
            if spec.start_with_flow:
                for work in (self.works[spec.name], *self.works[spec.name].parts):
                    self._place(work)
        for work in asked:
            self._advance(work, now)
        self._own_change(result.how, ops, method, now)
        self._revise([], "flow", now)
        for call in unfit:
            self._fail_app(f"{call.work} failed: {call.message}", now, call.work, call.message)
        return rev

    def _asks(self, result: PassResult, now: float) -> tuple[list[KnownWork], list[Call]]:
        """Takes the wishes up. Returns the works that were asked, and the calls whose failure fails the app."""
        asked: list[KnownWork] = []
        unfit: list[Call] = []
        for ask in result.asks if self._alive else []:
            work = self.works.get(ask.work)
            if work is None:
                continue
            if ask.stop:
                self._cancel(work, Reason.STOPPED, now)
            if ask.restart:
                self._restart(work, now)
            for call in ask.new.values():
                if ask.replace and not call.done:
                    self._cancel(work, Reason.REPLACED, now)
                work.book.add(call)
                self._touch(work)
                self._wake()
                if call.failed and work.spec.raise_exception:
                    unfit.append(call)
            asked.append(work)
        return asked, unfit

    def _hand_over(self, result: PassResult, method: bool, now: float) -> None:
        """Finished uncached calls that this pass has used up. (An API method is no pass: nothing lapses with it.)"""
        seen = {call for ask in result.asks for call in ask.seen}
        for call_id in self._fresh_seen:
            work = next((w for w in self.works.values() if call_id in w.book.calls), None)
            if work is None:
                continue
            call = work.book.calls[call_id]
            reached = not method and result.how in ("end", "stop", "fail")
            if call.fresh and (reached or (work.spec.parallel and call_id in seen)):
                work.book.put(call.replace(fresh=False))
                self._touch(work)
        self._fresh_seen = set()

    def _own_change(self, how: str, ops: list[Op], method: bool, now: float) -> None:
        """A pass that reached its end is followed by another one if it changed state itself."""
        if method and ops:
            self._wake()
        if method or not ops or how != "end":
            return
        if not self._woken:
            self._woken = self._only_own = True
        self._own += 1
        self._own_at = now
        if self._own == OWN_PASSES:
            names = sorted({op["path"] for op in ops})
            if names == self._own_names:
                return
            self._own_names = names
            self._emit(
                Note(
                    level="warning",
                    text=f"{OWN_PASSES} passes in a row were caused by nothing but their own changes of "
                    f"{', '.join(names[:5])}: from now on at most 10 a second",
                )
            )

    def _remove_work(self, name: str, now: float) -> None:
        work = self.works.pop(name, None)
        if work is None:
            return
        self._pass_views.pop(name, None)
        self._dirty.pop(name, None)
        self._fact("work", name, None)
        self.config.forget_token(name)
        if self._apart(work):
            for each in (work, *work.parts):
                self._release(each, each.spec.grace if each.live else 0.0)
                self.released[each.agent] = self.agents.pop(each.agent).epoch
                self._attaches.pop(each.agent, None)
                self._fact("attach", each.agent, None)
                self.parts.pop(each.spec.name, None)
        elif work.placed or work.placing:
            self._emit(ForgetWorks(agent=work.agent, works=[name], rev=self.tree.rev))

    # -- agents
    def _agent_up(self, event: AgentUp, now: float) -> None:
        agent = self.agents.get(event.agent)
        if agent is None and event.agent == LOCAL:
            agent = self.agents[LOCAL] = KnownAgent(LOCAL)
        if agent is None or event.epoch < agent.epoch:
            return  # it was given up meanwhile
        if event.epoch != agent.epoch:
            agent.epoch, agent.acked = event.epoch, 0
        agent.up, agent.launching, agent.expected = True, False, False
        unrecorded = 0 if self.config.shared_records else event.epoch
        agent.since, agent.dead = unrecorded if event.since is None else event.since, event.dead
        self.contacts.know(agent.name, event.host)
        self._heard(agent)
        self._note_agent(agent)
        known = {report.work: report for report in event.status.works}
        wanted: list[Place] = []
        for work in self._all():
            if work.agent != agent.name:
                continue
            if event.rev is not None and work.born > event.rev:
                known.pop(work.spec.name, None)
            report = known.get(work.spec.name)
            if report is not None:
                work.host, work.port, work.placed, work.placing = report.host, report.port, True, False
                self._touch(work)
                if report.ready != work.ready and self._current(work, report.call or "", report.attempt) is not None:
                    self._be_ready(work, report.ready, now)
            if work.placing or (report is None and work.placed):
                work.placing, work.placed = True, False
                wanted.append(self._place_message(work))
        if wanted:
            self._emit(PlaceWorks(agent=agent.name, works=wanted))
        self._reconcile(event.status, now)
        for work in self._all():
            if work.agent == agent.name and work.placed:
                self._resend(work, known.get(work.spec.name), now)
                self._advance(work, now)
        self._wake()
        self._maybe_exit(now)

    def _resend(self, work: KnownWork, report: Any, now: float) -> None:
        """The current attempt was to be started, but this agent knows nothing of it: the same request again."""
        call = work.book.calls[work.book.current] if work.book.current is not None else None
        if call is None or not work.live:
            return
        if report is None or (report.call, report.attempt) != (call.id, call.attempt):
            agent = self.agents[work.agent]
            recorded = work.sent_epoch >= agent.since
            if not recorded and not agent.dead:
                # Another machine: the incarnation to which it was given may have started it, and it may be running.
                # (It may be unknown already, for another reason.)
                self._doubt(work, f"agent {work.agent} was replaced, and nobody knows what became of the script")
                return
            if not recorded and not work.stopping:
                self._lost(work, call, "its place is gone, and the script with it", now)
                return
            if work.stopping:
                self._end(work, call.move(Stage.STOPPED, reason=Reason(work.stopping), finished_at=call.started_at))
                work.live = False
                return
            if call.stage is not Stage.PENDING:
                self._lost(work, call, "the agent has no record of the script any more", now)
                return
            self._emit(StartCalls(agent=work.agent, calls=[self._start_message(work, call)]))
            self._emit(PollAgent(agent=work.agent))  # it may have it already, and say nothing about it any more

    def _doubt(self, work: KnownWork, message: str) -> None:
        """Its script may be running where nobody can ask; a leased one no longer than its lease."""
        assert work.book.current is not None
        call = work.book.calls[work.book.current]
        work.book.put(call.replace(stage=Stage.UNKNOWN, reason=None, message=message))
        self._touch(work)
        self._wake()
        if work.spec.on_lost != "wait":
            self._doubts[work.spec.name] = None

    def _lost(self, work: KnownWork, call: Call, why: str, now: float, *, cut: bool = False) -> None:
        """The attempt has ended, and nobody knows how. `cut`: because its lease is over."""
        lost = Ended(
            work=work.spec.name,
            call=call.id,
            attempt=call.attempt,
            at=now,
            reason=str(Reason.LOST),
            message=why,
            cut=cut,
        )
        self._ended(work, lost, now)

    def _reconcile(self, status: AgentStatus, now: float) -> None:
        """A poll's facts are the items' facts; those that were not seen yet take effect here."""
        for report in status.works:
            work = self.known(report.work)
            if work is None:
                if report.work not in self._kept_pages:  # e.g. app.py declares it no longer
                    self._emit(ForgetWorks(agent=status.agent, works=[report.work], rev=self.tree.rev + 1))
                continue
            if report.call is None:
                continue
            call = self._current(work, report.call, report.attempt)
            going = report.stage in ("starting", "running", "stopping")
            if call is None or call.done or not work.live:
                if going:  # given up while nobody could say so
                    self._emit(self._stop_message(work, report.call, report.attempt, Reason.LOST))
                continue
            if going and work.stopping and report.stage != "stopping":  # again, if it has got lost
                self._emit(self._stop_message(work, call.id, call.attempt, Reason(work.stopping)))
            if call.stage in (Stage.PENDING, Stage.UNKNOWN) and report.stage in ("running", "stopping"):
                work.book.put(call.move(Stage.RUNNING, reason=None, message="", started_at=call.started_at or now))
                self._touch(work)
                self._wake()
            if report.ready and not work.ready:
                self._be_ready(work, True, now)

    def _agent_failed(self, event: AgentFailed, now: float) -> None:
        agent = self.agents.get(event.agent)
        if agent is None or (event.epoch is not None and event.epoch < agent.epoch):
            return
        agent.up = agent.launching = agent.expected = False
        self.contacts.forget(agent.name)
        for work in self._all():
            if work.agent == agent.name and self._apart(work) and work.live:
                # Whatever it was started on may be running: nobody is there who could be asked.
                self._unplace(work)
                self._doubt(work, f"agent {agent.name} is gone, and there is no other: {event.message}")
            if work.agent != agent.name or not work.placing:
                continue
            work.placing = False
            work.failed_to_place = event.message
            self._touch(work)
            self._wake()
            if self._apart(work):
                self._place_failed(work, event.message, now, Reason(event.reason))
        if self._alive and agent.name == LOCAL:
            self._fail_app(f"agent {event.agent} cannot be placed: {event.message}", now)
        self._maybe_exit(now)

    def _agent_waits(self, event: AgentWaits, now: float) -> None:
        for work in self._all():
            if work.agent == event.agent and work.placing:
                work.failed_to_place = event.message
                waiting = work.book.current or next(iter(work.book.queue), None)
                if waiting is not None:
                    work.book.put(work.book.calls[waiting].replace(message=event.message))
                self._touch(work)

    def _agent_gone(self, event: AgentGone, now: float) -> None:
        agent = self.agents.get(event.agent)
        if agent is None or event.epoch <= agent.epoch:
            return
        agent.epoch, agent.acked = event.epoch, 0
        agent.up = agent.launching = agent.expected = agent.silent = False
        self._note_agent(agent)
        self.contacts.forget(agent.name)
        for work in [work for work in self._all() if work.agent == agent.name]:
            waits = work.placing
            self._unplace(work)
            current = work.book.current
            if work.live and current is not None:
                self._lost(work, work.book.calls[current], event.message, now)
            elif waits and self._alive:
                self._place(work)
        self._wake()

    def _steady(self, event: Steady, now: float) -> None:
        """Leases of scripts that nobody can ask about: when they are over, so are the scripts."""
        for name, since in list(self._doubts.items()):
            work = self.known(name)
            call = None if work is None or work.book.current is None else work.book.calls[work.book.current]
            if work is None or call is None or call.stage is not Stage.UNKNOWN or not work.live:
                del self._doubts[name]
            elif since is None:
                self._doubts[name] = event.clock
            elif event.clock - since >= work.spec.lost_after and self._alive:
                del self._doubts[name]
                self._give_up(work, now)

    @property
    def waits_for_leases(self) -> bool:
        """Whether `Steady` is wanted."""
        return bool(self._doubts)

    def _placed_works(self, event: PlacedWorks, now: float) -> None:
        for placed in event.placed:
            work = self.known(placed.work)
            if work is None:
                continue
            work.placing = False
            self._touch(work)
            self._wake()
            if placed.error:
                work.failed_to_place = placed.error
                self._place_failed(work, placed.error, now)
                continue
            work.placed, work.failed_to_place = True, ""
            work.host, work.port, work.master_port = placed.host, placed.port, placed.master_port
            if work.live:
                self._resend(work, None, now)
            self._advance(work.main or work, now)

    def _place_failed(self, work: KnownWork, message: str, now: float, reason: Reason = Reason.EXCEPTION) -> None:
        work = work.main or work
        # (An attempt that is under way waits for no place: that is for the next one.)
        for waiting in [*work.book.queue, *([work.book.current] if work.book.current and not work.live else [])]:
            call = work.book.calls[waiting]
            self._end(work, call.move(Stage.FAILED, reason=reason, message=message, finished_at=now, due=None))
        if work.spec.raise_exception and work.book.calls:
            self._fail_app(f"{work.spec.name} failed: {message}", now, work.spec.name, message)

    def _start_answered(self, event: StartAnswered, now: float) -> None:
        for name, reply in zip(event.works, event.replies, strict=True):
            if reply.accepted:
                continue
            work = self.known(name)
            if work is not None:
                self._ended(
                    work,
                    Ended(
                        work=name,
                        call=reply.call,
                        attempt=reply.attempt,
                        at=now,
                        reason="exception",
                        message=reply.error,
                    ),
                    now,
                )

    def _agent_polled(self, event: AgentPolled, now: float) -> None:
        agent = self.agents.get(event.agent)
        if agent is None:
            return
        if event.status is not None:
            if event.status.epoch == agent.epoch:  # else it is the answer of one that was replaced meanwhile
                self._heard(agent)
                self._reconcile(event.status, now)
            return
        if not (agent.up or agent.expected or (agent.launching and agent.name != LOCAL)):
            return
        self.contacts.missed(agent.name, event.silence, event.clock)
        live = [work for work in self._all() if work.agent == agent.name and work.live]
        leased = [work for work in live if work.spec.on_lost != "wait"]
        if event.silence < min([UNKNOWN_AFTER, *(work.spec.lost_after for work in leased)]):
            return
        agent.silent = True
        for work in live:
            assert work.book.current is not None
            current = work.book.calls[work.book.current]
            if current.stage is Stage.RUNNING:
                work.book.put(current.move(Stage.UNKNOWN, message=f"no contact with agent {agent.name}"))
                self._touch(work)
                self._wake()
        for work in [work for work in self._all() if work.agent == agent.name and self._apart(work)]:
            if not work.live and event.silence >= work.spec.lost_after and self._alive and self._may_act(agent, event):
                # Nothing of it is there: another place does as well.
                waits = work.placing
                self._release(work)
                if waits:
                    self._place(work)
                self._advance(work.main or work, now)
                return
        overdue = [work for work in leased if event.silence >= work.spec.lost_after]
        if len(overdue) < len(leased) and not self.config.shared_records:
            return  # a new agent elsewhere is the end of whatever runs here: only when every lease is over
        if not overdue or not self._alive or not self._may_act(agent, event):
            return
        self._replace(agent)
        for work in overdue:
            self._give_up(work, now)

    def _heard(self, agent: KnownAgent) -> None:
        said = self.contacts.heard(agent.name)
        if said:
            self._emit(Note(level="warning", text=said))
        if agent.silent:
            self._emit(PollAgent(agent=agent.name))  # what its Works are doing
        agent.silent = agent.cut_off = False

    def _may_act(self, agent: KnownAgent, event: AgentPolled) -> bool:
        """Whether this silence is one agent's, and not that of the network around the flow."""
        held, said = self.contacts.held(agent.name, event.clock)
        if not held and not event.reachable:
            held = True
            if not agent.cut_off:
                said = f"agent {agent.name} is silent, but so is everything else: nothing is done about it"
            agent.cut_off = True
        if said:
            self._emit(Note(level="warning", text=said))
        return not held

    def _give_up(self, work: KnownWork, now: float) -> None:
        """Its lease is over: whatever the script was doing, it has ended."""
        assert work.book.current is not None
        why = f"no contact with agent {work.agent} for {work.spec.lost_after:g} s"
        self._lost(work, work.book.calls[work.book.current], why, now, cut=True)
        self._wake()

    def _replace(self, agent: KnownAgent) -> None:
        """From the moment in which this is journalled, the old incarnation is refused."""
        agent.epoch, agent.acked = agent.epoch + 1, 0
        agent.up, agent.launching, agent.expected = False, True, False
        self._note_agent(agent)
        for work in self._all():
            if work.agent == agent.name and work.placed:
                if self._apart(work):
                    self._unplace(work)
                work.placed, work.placing = False, True
        self._emit(ReplaceAgent(agent=agent.name, epoch=agent.epoch))

    def _hidden_works(self, event: Hidden, now: float) -> None:
        names = {spec.name for spec in event.specs}
        for name in [n for n in self.hidden if n not in names]:
            work = self.hidden.pop(name)
            if work.placed or work.placing:
                self._emit(ForgetWorks(agent=work.agent, works=[name], rev=self.tree.rev + 1))
        for spec in event.specs:
            work = self.hidden.get(spec.name) or KnownWork(spec, self.run)
            fresh = spec.name not in self.hidden
            changed = work.spec.command != spec.command
            work.spec = spec
            if fresh:
                self._add_work(spec, work)
                if spec.name in self._kept_pages:
                    calls, kept = self._kept_pages.pop(spec.name)
                    self._restore_work(work, calls, kept, clean=False)
                    if work.live:
                        self._place(work)
            if changed or (fresh and work.book.current is None):
                self._cancel(work, Reason.REPLACED, now)
                work.book.add(work.book.new((), {}, now))
                self._touch(work)
            self._advance(work, now)

    def _tick(self, event: Tick, now: float) -> None:
        for work in self._all():
            if work.release_at is not None and work.release_at <= now:
                self._release(work)
            current = work.book.current
            if current is not None and not work.live:
                due = work.book.calls[current].due
                if due is not None and due <= now:
                    self._advance(work, now)
        for key, schedule in self.schedules.items():
            if schedule.due <= now and not schedule.ticked:
                self._keep_schedule(key, msgspec.structs.replace(schedule, ticked=True))
                self._wake()
        if self._stop_deadline is not None and now >= self._stop_deadline:
            self._exit(kill=True)

    def _keep_schedule(self, key: str, schedule: Schedule) -> None:
        self.schedules[key] = schedule
        self._fact("schedule", key, msgspec.to_builtins(schedule))

    # -- the app's life
    def start(self, now: float) -> list[Instruction]:
        """The app begins: place what starts with it, and ask for the first pass."""
        for work in self._all():
            self._touch(work)
        for work in [*self.works.values(), *self.parts.values()]:
            if work.spec.start_with_flow or work.book.current is not None or work.book.queue:
                self._place(work)
        for key, schedule in self.schedules.items():
            if schedule.due <= now and not schedule.ticked and not schedule.catch_up:
                due = following(schedule.cron, schedule.tz, schedule.due, now)
                self._keep_schedule(key, msgspec.structs.replace(schedule, due=due))
            self._pass_schedules[key] = self.schedules[key]
        if self.ending is not None:
            self._end_app(*self.ending, now)
        self._woken = True
        return self.settle(now)

    def _set_stage(self, stage: str, message: str, now: float) -> None:
        message = self.config.hide(message)
        if stage == self.stage and message == self.message:
            return
        self.stage, self.message = stage, message
        self._ops.append({"op": "replace", "path": "/app/stage", "value": stage})
        self._ops.append({"op": "replace", "path": "/app/message", "value": message})
        self._fact("app", "stage", {"stage": stage, "message": message})
        self._revise([], "flow", now)

    def _fail_app(self, message: str, now: float, work: str = "", detail: str = "") -> None:
        if self._alive:
            self._emit(Note(level="error", text=message, work=work, detail=detail))
        self._end_app(1, message, now)

    def _end_app(self, code: int, message: str, now: float) -> None:
        if not self._alive:
            return
        self.code = code
        self._set_stage("failed" if code else "stopping", message, now)
        longest = 0.0
        for work in self._all():
            if work.live:
                longest = max(longest, work.spec.grace)
            self._cancel(work, Reason.STOPPED, now)
        self._stop_deadline = now + longest + 2.0
        self._revise([], "flow", now)
        for event in list(self._deferred):
            if isinstance(event, AskCall | RestartWork | ApiRequest):
                self._answer(event, error=CallError(f"the app is {self.stage}"))
                self._deferred.remove(event)
        self._maybe_exit(now)

    def _stop_app(self, event: StopApp, now: float) -> None:
        if event.kill and self._stop_deadline is not None:
            self._exit(kill=True)
        elif self._alive and event.code:
            self._fail_app(event.message, now)
        elif self._alive:
            self._end_app(0, event.message, now)
        self._answer(event, {"stage": self.stage})

    def _maybe_exit(self, now: float) -> None:
        if self._stop_deadline is None or any(work.live for work in self._all()):
            return
        if self.stage == "stopping":
            self._set_stage("stopped", self.message, now)
        self._exit(kill=False)

    def _exit(self, *, kill: bool) -> None:
        if not self._exited:
            self._exited = True
            self._emit(Exit(code=self.code, message=self.message, kill=kill))
        self._stop_deadline = None

    # -- resume
    def restore(self, facts: Mapping[str, Mapping[str, Any]], *, clean: bool) -> None:
        """Take over what the journal knows of calls, works, agents and schedules. Before `start`.

        Args:
            clean: the run had ended; nothing can still be running, failures are forgotten (`--resume`).
        """
        calls: dict[str, list[Call]] = {}
        for value in facts.get("call", {}).values():
            call = msgspec.convert(value, Call)
            if call.work in self.works and number_of(call.id) > self.works[call.work].spec.used:
                calls.setdefault(call.work, []).append(call)
            elif call.work in self.parts:
                calls.setdefault(call.work, []).append(call)
            elif call.work.startswith("_") and not clean:
                calls.setdefault(call.work, []).append(call)
        for name, book_calls in calls.items():
            kept = facts.get("work", {}).get(name) or {}
            if name in self.works or name in self.parts:
                self._restore_work(self.works.get(name) or self.parts[name], book_calls, kept, clean=clean)
            else:
                self._kept_pages[name] = (book_calls, kept)  # the layout declares it again in the first pass
        for name, value in facts.get("agent", {}).items():
            if name not in self.agents and name != LOCAL:
                self.released[name] = value["epoch"]
                if clean:
                    self.forget_agent(name)
                continue
            agent = self.agents.setdefault(name, KnownAgent(name))
            agent.epoch, agent.acked = value["epoch"], value["acked"] if not clean else 0
        self._attaches = dict(facts.get("attach", {}))
        self._said = dict(facts.get("said", {}))
        app = facts.get("app", {}).get("stage", {})
        if not clean and app.get("stage") in ("stopping", "stopped", "failed"):
            self.ending = (int(app["stage"] == "failed"), app["message"])
        for key, value in facts.get("schedule", {}).items():
            self.schedules[key] = msgspec.convert(value, Schedule)

    def _restore_work(self, work: KnownWork, calls: list[Call], kept: Mapping[str, Any], *, clean: bool) -> None:
        book = work.book
        book.restore(calls, held=None if clean else kept.get("held_key"))
        if clean:
            for call in [call for call in book.calls.values() if not call.done]:
                book.finish(call.move(Stage.STOPPED, reason=Reason.STOPPED, finished_at=call.started_at, due=None))
            book.forget_failures()
        current = None if book.current is None else book.calls[book.current]
        work.live = current is not None and current.due is None and current.attempt > 0
        work.stopping = kept.get("stopping", "") if work.live else ""
        work.since = kept.get("since")
        work.deaths = kept.get("deaths", 0)
        if work.live:
            work.part_failure, work.waiting_end = (
                msgspec.convert(item, Ended) if (item := kept.get(name)) else None
                for name in ("part_failure", "waiting_end")
            )
        work.master_port = kept.get("master_port", 0)
        work.sent_epoch = kept.get("sent_epoch", 0)
        work.num_successes = kept.get("num_successes", 0)
        work.num_timeouts = kept.get("num_timeouts", 0)
        work.exit_code = kept.get("exit_code")
        work.files = kept.get("files", [])
        work.metrics = kept.get("metrics", {})
        work.progress = kept.get("progress")
        if work.port is None and not clean:
            work.port = kept.get("port")
        self._touch(work)

    # -- reading
    def describe(self, work: KnownWork) -> dict[str, Any]:
        """What REST shows of a Work: `status` and `calls` as in the tree."""
        calls = list(work.book.calls.values())[-SHOWN_CALLS:]
        status, shown = work.status(self.config.base_url), work.book.shown
        return {
            "name": work.spec.name,
            "kind": work.spec.kind,
            "display_name": work.spec.display_name,
            "status": status,
            "url": status["url"],
            "progress": status["progress"],
            "call": None if shown is None else shown.id,
            "attempt": 0 if shown is None else shown.attempt,
            "calls": {call.id: call.public() for call in calls},
            "agent": work.agent if work.placed else None,
            "cloud_compute": work.spec.compute,
        }

    def attach_vars(self, agent: str) -> dict[str, WorkVars]:
        return {
            work.spec.name: WorkVars(
                rev=self.tree.rev,
                vars=copy_json(self.tree.get(work.spec.pointer + "/vars")),
                said=tuple(said) if (said := self._said.get(work.spec.name)) else None,
            )
            for work in self.works.values()
            if work.agent == agent
        }


def _reason_of(item: Ended) -> Reason | None:
    """None: success."""
    if item.reason is None:
        return None
    return Reason(item.reason) if item.reason in Reason._value2member_map_ else Reason.EXCEPTION


def _dotted(component: tuple[str, ...]) -> list[str]:
    """Dotted short name of a component's pointer tokens."""
    parts: list[str] = []
    i = 0
    while i < len(component):
        if component[i] == "structures":
            parts += [component[i + 1], component[i + 3]]
            i += 4
        else:
            parts.append(component[i + 1])
            i += 2
    return parts


def _drive_path(manifest: Mapping[str, Any], name: str) -> str:
    """Where a file of a published version is on the Drive."""
    if not manifest["is_dir"]:
        return str(manifest["path"])
    return name if manifest["path"] == "." else f"{manifest['path']}/{name}"
