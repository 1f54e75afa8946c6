"""What the engine is told and what it answers: events, instructions, and what has to be journalled between. PURE."""

from __future__ import annotations

from typing import Any

import msgspec

from orch.contact import UNKNOWN_AFTER
from orch.program import PassInput, PassResult
from orch.wire import AgentStatus, Diff, ItemResult, Op, Place, Placed, Push, StartCall, StartReply, StopCall
from orch.work import WorkSpec

__all__ = [
    "AgentFailed",
    "AgentPolled",
    "AgentUp",
    "ApiRequest",
    "AskCall",
    "Batch",
    "Event",
    "Exit",
    "FileEvent",
    "FilePublished",
    "ForgetWorks",
    "Frontends",
    "Hidden",
    "Instruction",
    "LaunchAgent",
    "Layout",
    "Note",
    "PassEnded",
    "Patch",
    "PlaceWorks",
    "PlacedWorks",
    "PollAgent",
    "Pushed",
    "ReloadProgram",
    "ReplaceAgent",
    "Reply",
    "Rest",
    "RestartWork",
    "Revised",
    "RunMethod",
    "RunPass",
    "SendDiffs",
    "Shown",
    "StartAnswered",
    "StartCalls",
    "StopApp",
    "StopCalls",
    "StopWork",
    "Tick",
]


class Base(msgspec.Struct, frozen=True, kw_only=True):
    pass


# ---- events ----------------------------------------------------------------------------------------------------------


class Event(Base, frozen=True, kw_only=True):
    ticket: int = 0
    """Answered by `Reply(ticket)` when not 0."""


class Patch(Event, frozen=True, kw_only=True):
    ops: list[Op]
    cause: str
    match: tuple[str, int] | None = None
    known: bool = False
    """The flow's objects have it already: it was written to them between passes (tests do that)."""


class Pushed(Event, frozen=True, kw_only=True):
    push: Push


class AskCall(Event, frozen=True, kw_only=True):
    work: str
    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class StopWork(Event, frozen=True, kw_only=True):
    work: str


class RestartWork(Event, frozen=True, kw_only=True):
    work: str


class StopApp(Event, frozen=True, kw_only=True):
    message: str = ""
    code: int = 0
    kill: bool = False
    """Do not wait for the works' grace."""


class ApiRequest(Event, frozen=True, kw_only=True):
    method: Any
    """() -> value, run between passes."""


class PassEnded(Event, frozen=True, kw_only=True):
    result: PassResult


class AgentUp(Event, frozen=True, kw_only=True):
    """The runtime placed (or adopted) an agent and it answers."""

    agent: str
    epoch: int
    status: AgentStatus
    rev: int | None = None
    """The state that it was told of; None: the present one."""
    host: str = ""
    """The machine that it is on."""
    since: int | None = None
    """The first incarnation whose records it has; None: as `Config.shared_records` says."""
    dead: bool = False
    """What it has no records of has ended for certain: with its place."""


class AgentFailed(Event, frozen=True, kw_only=True):
    """It could not be placed."""

    agent: str
    message: str
    reason: str = "exception"
    epoch: int | None = None
    """The one that was to be launched last."""


class AgentWaits(Event, frozen=True, kw_only=True):
    """It is being launched, and waits for this; empty: not any more."""

    agent: str
    message: str


class AgentGone(Event, frozen=True, kw_only=True):
    """Its place has ended, and with it everything that ran there: that is certain."""

    agent: str
    epoch: int
    message: str


class Steady(Event, frozen=True, kw_only=True):
    """The time on a clock that nobody sets, about once a second while `Engine.waits_for_leases`."""

    clock: float


class PlacedWorks(Event, frozen=True, kw_only=True):
    agent: str
    placed: list[Placed]


class StartAnswered(Event, frozen=True, kw_only=True):
    replies: list[StartReply]
    works: list[str]


class AgentPolled(Event, frozen=True, kw_only=True):
    agent: str
    status: AgentStatus | None
    """None: it did not answer."""
    silence: float = UNKNOWN_AFTER
    """Seconds since its last sign of life, if it did not answer."""
    clock: float = 0.0
    """Now, on a clock that nobody sets."""
    reachable: bool = True
    """This machine reaches something else."""


class Hidden(Event, frozen=True, kw_only=True):
    """Pages' own servers, as the service declares them for the layout's frontends."""

    specs: list[WorkSpec]


class FilePublished(Event, frozen=True, kw_only=True):
    """A Drive path was published or deleted by way of REST."""

    drive: str
    manifest: dict[str, Any]


class Tick(Event, frozen=True, kw_only=True):
    pass


# ---- instructions ----------------------------------------------------------------------------------------------------


class Instruction(Base, frozen=True, kw_only=True):
    pass


class Reply(Instruction, frozen=True, kw_only=True):
    ticket: int
    value: Any = None
    error: BaseException | None = None


class RunPass(Instruction, frozen=True, kw_only=True):
    given: PassInput


class RunMethod(Instruction, frozen=True, kw_only=True):
    given: PassInput
    method: Any


class LaunchAgent(Instruction, frozen=True, kw_only=True):
    """Place an agent for the one Work that it is for."""

    agent: str


class ReleaseAgent(Instruction, frozen=True, kw_only=True):
    """Its Work needs it no more: end what runs there, and give the place back."""

    agent: str
    epoch: int
    """Whatever it says with an older one is refused from now on."""
    grace: float
    """Seconds that its script may take to end."""


class ReplaceAgent(Instruction, frozen=True, kw_only=True):
    """Nothing is known of this agent and its lease is over: end it if that can be done, and launch another one."""

    agent: str
    epoch: int
    """Of the new one; whatever an older one says is refused from now on."""


class PlaceWorks(Instruction, frozen=True, kw_only=True):
    agent: str
    works: list[Place]


class StartCalls(Instruction, frozen=True, kw_only=True):
    agent: str
    calls: list[StartCall]


class StopCalls(Instruction, frozen=True, kw_only=True):
    agent: str
    calls: list[StopCall]


class ForgetWorks(Instruction, frozen=True, kw_only=True):
    agent: str
    works: list[str]
    rev: int
    """What is placed of that name from this revision on is another one."""


class PollAgent(Instruction, frozen=True, kw_only=True):
    """Ask the agent for its status soon."""

    agent: str


class SendDiffs(Instruction, frozen=True, kw_only=True):
    agent: str
    diffs: list[Diff]


class Revised(Instruction, frozen=True, kw_only=True):
    """A revision was accepted (for event streams and long polls)."""

    rev: int
    cause: str
    at: float
    ops: list[Op]


class Shown(Instruction, frozen=True, kw_only=True):
    """A work's stage as a line for the console and the event stream."""

    work: str
    stage: str
    detail: str
    hidden: bool = False


class Layout(Instruction, frozen=True, kw_only=True):
    tabs: list[dict[str, Any]]


class Frontends(Instruction, frozen=True, kw_only=True):
    frontends: dict[str, dict[str, Any]]


class Routes(Instruction, frozen=True, kw_only=True):
    """The routes of configure_api, anew: flows came or went."""

    routes: list[Any]


class FileEvent(Instruction, frozen=True, kw_only=True):
    """A Drive manifest was committed."""

    drive: str
    manifest: dict[str, Any]


class Note(Instruction, frozen=True, kw_only=True):
    level: str
    text: str
    work: str = ""
    """Whose call's failure this tells of: `detail` says why, and the work's own log holds the rest of `text`."""
    detail: str = ""


class Exit(Instruction, frozen=True, kw_only=True):
    code: int
    message: str
    kill: bool = False


class ReloadProgram(Instruction, frozen=True, kw_only=True):
    """The flow's objects must take these values again (an API method raised); later diffs come with the next pass."""

    tree: dict[str, Any]


class Rest(Pushed, frozen=True, kw_only=True):
    """The part of a push that waits behind a pass, with the results of the part before it."""

    results: list[ItemResult] = msgspec.field(default_factory=list)


class Batch(msgspec.Struct, kw_only=True):
    """What has to be in the journal before the instructions are carried out."""

    revisions: list[Revised]
    facts: list[tuple[str, str, Any]]
    durable: bool = False
