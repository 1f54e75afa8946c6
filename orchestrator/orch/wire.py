"""Messages between the flow server and its agents. PURE: no I/O, no clock.

Protocol version 1. JSON bodies, `Authorization: Bearer <agent token>` both ways (the token is shared by one flow and
one agent and opens nothing else). Times are seconds since the epoch (float), durations are seconds.

flow -> agent
    POST /v1/attach    Attach            -> AgentStatus   who the flow is now, and the vars as the tree has them
    GET  /v1/status                      -> AgentStatus   the poll; every fact in it is idempotent
    POST /v1/place     list[Place]       -> list[Placed]  give a work its port, directory and token; again = same answer
    POST /v1/start     list[StartCall]   -> list[StartReply]   at most one start per (call, attempt)
    POST /v1/stop      list[StopCall]    -> {}            TERM, after `grace` KILL; unknown calls are ignored
    POST /v1/forget    list[Forget]      -> {}            the works are gone: stop them, drop their buffers
    POST /v1/state     list[Diff]        -> {}            revisions that touch these works' vars, in revision order
    POST /v1/shutdown  Shutdown          -> {}            stop every script, then exit

agent -> flow
    POST <flow>/agents/v1/push   Push    -> PushReply     409 when the epoch is stale

Order. An agent numbers what it reports (`seq`, from 1 in an incarnation). A push carries items `seq, seq+1, ...`; the
flow skips what it already has, so a push sent twice takes effect once. The flow tells an agent about every accepted
revision under its works' vars, its own included: those carry the `seq` that caused them (and no ops when they were
taken as sent), which is how an agent orders its own writes among the others'.

Contact. Only an answer of the flow to a push proves to an agent that the flow has heard it; a push without items is a
heartbeat, and is answered at once. A lease counts from the moment at which the answered push was sent, the flow's
patience from the moment at which it was received: the lease is the shorter one, whichever way a link is cut.
"""

from __future__ import annotations

from typing import Any, TypeVar

import msgspec

__all__ = [
    "LOCAL",
    "PROTOCOL",
    "AgentSpec",
    "AgentStatus",
    "Attach",
    "ComponentRecord",
    "Diff",
    "Ended",
    "Forget",
    "Item",
    "ItemResult",
    "Op",
    "Place",
    "Placed",
    "Progress",
    "Published",
    "Push",
    "PushReply",
    "Ready",
    "Shutdown",
    "StartCall",
    "StartReply",
    "Started",
    "StopCall",
    "VarOps",
    "WorkReport",
    "WorkVars",
    "decode",
    "encode",
]

PROTOCOL = 1

LOCAL = "local"
"""The agent of the flow server's own machine. One that is for a single Work has that Work's name."""

Op = dict[str, Any]
"""One RFC 6902 operation: {"op", "path", "value"?, "from"?}. In messages to and from agents, paths are relative to the
work's `vars` (`/retrain`)."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all messages: immutable, unknown fields are ignored (an older peer may send fewer, a newer one more)."""


class AgentSpec(Message, frozen=True, kw_only=True):
    """Everything an agent needs to start; it is read from a 0600 file named on its command line."""

    agent: str
    epoch: int
    token: str
    flow_url: str
    app_dir: str
    orch_dir: str
    app_id: str
    app_name: str
    run: int
    app_file: str = ""
    app_argv: list[str] = msgspec.field(default_factory=list)
    drive_url: str = ""
    bind: str = "127.0.0.1"
    port: int = 0
    work: str = ""
    """The one Work that it is for; empty: all that are placed on its machine."""
    compute: dict[str, Any] = msgspec.field(default_factory=dict)
    """The fields of the Work's CloudCompute: what the machine has to have."""
    build: dict[str, Any] = msgspec.field(default_factory=dict)
    """The fields of the Work's BuildConfig: what the environment has to have."""
    launcher: int = 0
    """Pid of who starts it: until somebody has attached, the agent lives no longer than that process (Linux)."""
    bound: bool = False
    """It lives no longer than its launcher even then, and neither do its scripts: the launcher is the place that an
    engine has given them, and frees what they hold when it ends."""
    orphan_timeout: float | None = None
    protocol: int = PROTOCOL


class ComponentRecord(Message, frozen=True, kw_only=True):
    """How to build a component again: an importable class and its JSON constructor arguments."""

    module: str
    qualname: str
    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class WorkVars(Message, frozen=True, kw_only=True):
    """The vars of one work as the tree has them at `rev`."""

    rev: int
    vars: dict[str, Any]
    said: tuple[str, int, int] | None = None
    """Call, attempt and number of the last change of a Python Work's process that is in them."""


class Attach(Message, frozen=True, kw_only=True):
    flow_url: str
    epoch: int
    number: int = 0
    """Counts up from server to server: an older one that comes late changes nothing."""
    acked: int = 0
    """The last item number of this (agent, epoch) that the flow has journalled."""
    works: dict[str, WorkVars] = msgspec.field(default_factory=dict)


class Place(Message, frozen=True, kw_only=True):
    """Put a work on this agent. `port=None`: the agent picks a free one and keeps it for the work's life."""

    work: str
    token: str
    rev: int
    vars: dict[str, Any]
    host: str | None = None
    port: int | None = None
    python: bool = False
    """A Python Work: warm the fork server now."""
    master: bool = False
    """The scripts of several machines meet here: another free port is wanted."""
    drives: list[str] = msgspec.field(default_factory=list)
    """Ids of the Drives that it is declared to write to: older incarnations are shut out of them at once."""


class Placed(Message, frozen=True, kw_only=True):
    work: str
    host: str = ""
    port: int = 0
    master_port: int = 0
    error: str = ""


class StartCall(Message, frozen=True, kw_only=True):
    """One attempt of one call. The agent starts it at most once, whatever is sent twice."""

    work: str
    call: str
    attempt: int
    kind: str
    """"script", "service" or "python"."""
    record: ComponentRecord | None = None
    command: list[str] | str = ""
    """As the user wrote it; `{host}`, `{port}`, `{base_path}`, `{work_dir}` are replaced by the agent."""
    script_args: list[str] = msgspec.field(default_factory=list)
    """Constructor `args`, split; placeholders are replaced."""
    args: list[Any] = msgspec.field(default_factory=list)
    """`run(*args)`: for scripts already split into words, never replaced in; for Python Works JSON values."""
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)
    shell: bool = False
    cwd: str | None = None
    env: dict[str, str] = msgspec.field(default_factory=dict)
    secrets: dict[str, str] = msgspec.field(default_factory=dict)
    """Environment too, but never written to any file or log by the agent."""
    base_path: str = ""
    """The work's place behind the proxy, e.g. /view/diag."""
    prefix: str = "strip"
    health: str | None = None
    timeout: float | None = None
    grace: float = 10.0
    lease: float | None = None
    """Seconds after the last answer of the flow at which the script is stopped; None: it outlives any silence."""
    lease_grace: float = 10.0
    """Seconds between TERM and KILL when the lease has run out."""
    drive: dict[str, Any] | None = None
    inputs: list[str] = msgspec.field(default_factory=list)
    outputs: list[str] = msgspec.field(default_factory=list)
    reload: list[str] = msgspec.field(default_factory=list)
    sync_interval: float = 2.0
    log_from: int = 0
    """Bytes of the call's log that came from another machine: here it begins after them."""


class StartReply(Message, frozen=True, kw_only=True):
    call: str
    attempt: int
    accepted: bool = True
    error: str = ""


class StopCall(Message, frozen=True, kw_only=True):
    work: str
    call: str
    attempt: int
    grace: float = 10.0
    reason: str = "stopped"
    """"stopped" or "replaced": reported back in `Ended.reason`."""


class Forget(Message, frozen=True, kw_only=True):
    """A work was removed. Its name may come back, and this message may come late: what was placed at `rev` or later is
    another work."""

    work: str
    rev: int


class Diff(Message, frozen=True, kw_only=True):
    """One accepted revision under one work's vars."""

    work: str
    rev: int
    ops: list[Op] | None = None
    seq: int | None = None
    """Set when this agent's own item caused it; `ops` is then None if it was taken as sent."""


class Shutdown(Message, frozen=True, kw_only=True):
    kill: bool = False


# ---- what agents report ---------------------------------------------------------------------------------------------


class VarOps(Message, tag="vars", frozen=True, kw_only=True):
    work: str
    ops: list[Op]
    call: str | None = None
    base_rev: int | None = None
    attempt: int = 0
    n: int = 0
    """Of a Python Work: its process's own number of this change, from 1 in an attempt. A process that a new agent
    adopts says again what it has not seen echoed: what the flow has of this (call, attempt) up to `n` is not taken
    twice."""


class Started(Message, tag="started", frozen=True, kw_only=True):
    work: str
    call: str
    attempt: int
    pid: int
    at: float


class Ready(Message, tag="ready", frozen=True, kw_only=True):
    """The work answers on its port (`ready=False`: it did and does not any more)."""

    work: str
    call: str
    attempt: int
    at: float
    ready: bool = True


class Ended(Message, tag="ended", frozen=True, kw_only=True):
    """An attempt is over: its outputs are published and its last diff lies before this item."""

    work: str
    call: str
    attempt: int
    at: float
    reason: str | None = None
    """None: success. Else a Reason: exit_code, signal, timeout, exception, lost, stopped, replaced."""
    exit_code: int | None = None
    signal: str | None = None
    message: str = ""
    traceback: str = ""
    result: Any = None
    cut: bool = False
    """It was stopped because the flow could not be reached (lease, orphan guard, fence); the reason is then lost."""


class Progress(Message, tag="progress", frozen=True, kw_only=True):
    """At most twice a second a work. None / empty: unchanged."""

    work: str
    call: str
    progress: float | None = None
    metrics: dict[str, Any] = msgspec.field(default_factory=dict)
    moving: str | None = None
    """How far the files of the attempt are on their way, before and after the script; empty: they are there."""


class Published(Message, tag="published", frozen=True, kw_only=True):
    """A version of a Drive path was committed. `manifest` is the manifest's JSON (see orch_drive.manifest)."""

    work: str
    drive: str
    manifest: dict[str, Any]
    call: str | None = None


Item = VarOps | Started | Ready | Ended | Progress | Published


class Push(Message, frozen=True, kw_only=True):
    agent: str
    epoch: int
    seq: int
    """Number of the first item."""
    items: list[Item]
    protocol: int = PROTOCOL


class ItemResult(Message, frozen=True, kw_only=True):
    seq: int
    rev: int = 0
    error: str = ""
    status: int = 0
    """HTTP status of the error, for a script that is waiting for its PATCH."""


class PushReply(Message, frozen=True, kw_only=True):
    acked: int
    """Last item number that is journalled."""
    results: list[ItemResult] = msgspec.field(default_factory=list)


class WorkReport(Message, frozen=True, kw_only=True):
    """What an agent knows of one placed work: the same facts as the items, for the poll."""

    work: str
    host: str
    port: int
    call: str | None = None
    attempt: int = 0
    stage: str = "not_started"
    """not_started, starting, running, stopping, ended"""
    pid: int | None = None
    ready: bool = False
    ended: Ended | None = None


class AgentStatus(Message, frozen=True, kw_only=True):
    agent: str
    epoch: int
    pid: int
    seq: int
    """Last item number given out."""
    works: list[WorkReport] = msgspec.field(default_factory=list)
    protocol: int = PROTOCOL


T = TypeVar("T")


def encode(message: Any) -> bytes:
    """JSON bytes of a message or a list of messages."""
    return msgspec.json.encode(message)


def decode(kind: type[T], data: bytes | str) -> T:
    """The message of that kind, checked. Raises msgspec.ValidationError naming the field that does not fit."""
    return msgspec.json.decode(data, type=kind)
