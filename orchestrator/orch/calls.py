"""Calls: identity, what asking means, how an attempt's end is judged. PURE.

A Work is asked for calls; a `Book` keeps those of one Work in one run. The flow's passes see a frozen `BookView`; the
engine owns the Book. `MOVES` is the transition table; a move that is not in it raises with the call's story.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from enum import StrEnum
from typing import Any

import msgspec

from orch.state import to_json

__all__ = ["Book", "BookView", "Call", "InvalidMove", "Reason", "Stage", "call_key"]


class Stage(StrEnum):
    NOT_STARTED = "not_started"
    PENDING = "pending"
    RUNNING = "running"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    STOPPED = "stopped"
    UNKNOWN = "unknown"


class Reason(StrEnum):
    EXIT_CODE = "exit_code"
    SIGNAL = "signal"
    TIMEOUT = "timeout"
    EXCEPTION = "exception"
    LOST = "lost"
    STOPPED = "stopped"
    REPLACED = "replaced"
    SPOT_RECLAIMED = "spot_reclaimed"
    INFEASIBLE = "infeasible"
    BUILD_FAILED = "build_failed"


RETRIED = frozenset(
    {Reason.EXIT_CODE, Reason.SIGNAL, Reason.EXCEPTION, Reason.TIMEOUT, Reason.SPOT_RECLAIMED, Reason.LOST}
)

MOVES: Mapping[Stage, frozenset[Stage]] = {
    Stage.PENDING: frozenset(
        {Stage.RUNNING, Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED, Stage.PENDING, Stage.UNKNOWN}
    ),
    Stage.RUNNING: frozenset({Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED, Stage.PENDING, Stage.UNKNOWN}),
    Stage.UNKNOWN: frozenset({Stage.RUNNING, Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED, Stage.PENDING}),
    Stage.SUCCEEDED: frozenset(),
    Stage.FAILED: frozenset(),
    Stage.STOPPED: frozenset(),
}


class InvalidMove(RuntimeError):
    """A call was asked to go where its stage does not lead."""


class Call(msgspec.Struct, frozen=True, kw_only=True):
    """One request to a Work, as it stood when it was looked at: an immutable snapshot, ask again for a newer one.

    Times are seconds since the epoch. `attempt` counts from 1; 0 means that none has been started.
    """

    id: str
    work: str
    key: str
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    stage: Stage = Stage.PENDING
    reason: Reason | None = None
    message: str = ""
    result: Any = None
    exit_code: int | None = None
    attempt: int = 0
    restarts: int = 0
    """Attempts that `on_lost="restart"` has given it: they are not counted as retries."""
    asked_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None
    due: float | None = None
    """A retry waits until then."""
    fresh: bool = False
    """Finished, uncached, not handed over to the flow yet."""
    forgotten: bool = False
    """A failure that does not count any more: the same arguments start a new call."""

    @property
    def done(self) -> bool:
        return self.stage in (Stage.SUCCEEDED, Stage.FAILED, Stage.STOPPED)

    @property
    def succeeded(self) -> bool:
        return self.stage is Stage.SUCCEEDED

    @property
    def failed(self) -> bool:
        return self.stage is Stage.FAILED

    def __bool__(self) -> bool:
        raise TypeError("a Call is neither true nor false: ask for .succeeded, .failed, .done or .result")

    def move(self, stage: Stage, **changes: Any) -> Call:
        """The same call in another stage. Raises InvalidMove."""
        if stage not in MOVES[self.stage]:
            raise InvalidMove(f"call {self.id} (attempt {self.attempt}) cannot go from {self.stage} to {stage}")
        return msgspec.structs.replace(self, stage=stage, **changes)

    def replace(self, **changes: Any) -> Call:
        return msgspec.structs.replace(self, **changes)

    def public(self) -> dict[str, Any]:
        """What the state tree and REST show."""
        return {
            "id": self.id,
            "args": list(self.args),
            "kwargs": dict(self.kwargs),
            "stage": str(self.stage),
            "reason": None if self.reason is None else str(self.reason),
            "message": self.message,
            "result": self.result,
            "exit_code": self.exit_code,
            "attempt": self.attempt,
            "started_at": self.started_at,
            "finished_at": self.finished_at,
        }


def call_key(args: Iterable[Any], kwargs: Mapping[str, Any]) -> str:
    """sha256 of the canonical JSON of the arguments: keys sorted at every depth, order of positions kept."""
    canonical = msgspec.json.encode([list(args), dict(kwargs)], order="deterministic")
    return hashlib.sha256(canonical).hexdigest()


def json_arguments(work: str, args: Iterable[Any], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments as plain JSON. Raises StateTypeError naming the argument."""
    plain = tuple(to_json(value, f"{work}.run() argument {i}") for i, value in enumerate(args))
    return plain, {name: to_json(value, f"{work}.run() argument {name}") for name, value in kwargs.items()}


class BookView(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass sees of a Work's calls."""

    latest: Mapping[str, Call] = msgspec.field(default_factory=dict)
    """By key: the latest call with those arguments."""
    last: Call | None = None
    """The current call, else the latest one asked for."""
    newest: Call | None = None
    """The call with the highest number."""
    counter: int = 0
    held: str | None = None
    """Key of the call that a user's stop holds back."""


class Book:
    """The calls of one Work in one run. The engine owns it; every change marks the call for the journal."""

    __slots__ = ("ageing", "calls", "counter", "current", "held", "last", "latest", "name", "queue", "run", "touched")

    def __init__(self, name: str, run: int, *, used: int = 0) -> None:
        """`used`: numbers that an earlier work of this name has given its calls."""
        self.name = name
        self.run = run
        self.calls: dict[str, Call] = {}
        self.latest: dict[str, str] = {}
        self.queue: list[str] = []
        self.current: str | None = None
        self.last: str | None = None
        self.counter = used
        self.held: str | None = None
        self.touched: set[str] = set()
        self.ageing: set[str] = set()
        """Calls that may be of no more use, now or once newer ones have come."""

    def add(self, call: Call) -> None:
        """A newly asked call: it waits at the end of the queue, unless it is done already."""
        self.counter = max(self.counter, number_of(call.id))
        self.put(call)
        if call.key in self.latest:
            self.ageing.add(self.latest[call.key])
        self.latest[call.key] = call.id
        self.held = None
        if call.done:
            self.last = call.id
        else:
            self.queue.append(call.id)

    def put(self, call: Call) -> Call:
        self.calls[call.id] = call
        self.touched.add(call.id)
        self.ageing.add(call.id)
        return call

    def forget(self, *, newest: int, caches: bool) -> list[str]:
        """Drop calls that no question can ask for again, but for the `newest` ones; their ids. So a Work that is called
        for years has no more to remember than one that is called for a day. Results that `caches` keeps stay."""
        gone = []
        for name in sorted(self.ageing, key=number_of):
            if number_of(name) > self.counter - newest:
                break
            if name == self.last:
                continue
            self.ageing.discard(name)  # it comes back when it is touched, or another one takes its place
            call = self.calls[name]
            answers = self.latest.get(call.key) == name
            kept = answers and ((caches and call.stage is not Stage.STOPPED) or call.key == self.held)
            if not call.done or call.fresh or kept:
                continue
            if answers:
                del self.latest[call.key]
            del self.calls[name]
            self.touched.discard(name)
            gone.append(name)
        return gone

    def new(self, args: tuple[Any, ...], kwargs: dict[str, Any], now: float) -> Call:
        return Call(
            id=call_id(self.run, self.name, self.counter + 1),
            work=self.name,
            key=call_key(args, kwargs),
            args=args,
            kwargs=kwargs,
            asked_at=now,
        )

    def take(self) -> Call | None:
        """The next call to run, if the Work is free."""
        if self.current is not None or not self.queue:
            return None
        self.current = self.last = self.queue.pop(0)
        return self.calls[self.current]

    def finish(self, call: Call) -> Call:
        """`call` is done: it leaves the queue or the Work."""
        if self.current == call.id:
            self.current = None
        if call.id in self.queue:
            self.queue.remove(call.id)
        self.last = call.id
        return self.put(call)

    def forget_failures(self) -> None:
        """The same arguments start anew."""
        for key, call in list(self.latest.items()):
            if self.calls[call].failed:
                del self.latest[key]
                self.put(self.calls[call].replace(forgotten=True))

    @property
    def shown(self) -> Call | None:
        """The current call, else the latest."""
        which = self.current or self.last or (self.queue[0] if self.queue else None)
        return None if which is None else self.calls[which]

    def view(self) -> BookView:
        calls = self.calls
        newest = calls.get(call_id(self.run, self.name, self.counter))
        return BookView(
            latest={key: calls[call] for key, call in self.latest.items()},
            last=self.shown,
            newest=newest,
            counter=self.counter,
            held=self.held,
        )

    def restore(self, calls: Iterable[Call], *, held: str | None) -> None:
        """Fill an empty book from the journal, in the order asked."""
        for call in sorted(calls, key=lambda c: number_of(c.id)):
            self.calls[call.id] = call
            self.ageing.add(call.id)
            if not call.forgotten:
                self.latest[call.key] = call.id
            self.counter = max(self.counter, number_of(call.id))
            if call.done:
                self.last = call.id
            elif call.attempt:
                self.current = self.last = call.id
            else:
                self.queue.append(call.id)
        self.held = held


def call_id(run: int, work: str, number: int) -> str:
    return f"{run}-{work}-{number}"


def number_of(call: str) -> int:
    return int(call.rsplit("-", 1)[1])


def work_of(call: str) -> str:
    """Short name of the work of a call id."""
    return call.split("-", 1)[1].rsplit("-", 1)[0]
