"""Messages between the agent and a Python Work's process. PURE: no I/O, no clock.

    agent -> process at the start    WorkOrder (JSON, through the fork server)
    POST /live/<work>                Changes -> Taken   what the running code changed, numbered from 1 in a process
    GET  /live/<work>?session=       lines of JSON, endlessly: first Told with `vars`, then one Told a revision
    <key>.result.json                Outcome, written before the process exits

A change is kept by the process until the tree has echoed it, and numbered, so a new agent can be told it again.
"""

from __future__ import annotations

from typing import Any

import msgspec

from orch.wire import ComponentRecord, Message, Op

__all__ = ["Batch", "Changes", "Outcome", "Report", "Taken", "Told", "WorkOrder"]


class WorkOrder(Message, frozen=True, kw_only=True, omit_defaults=True):
    """All that a Python Work's process needs to know. The token comes by environment."""

    work: str
    record: ComponentRecord
    rev: int
    vars: dict[str, Any]
    url: str
    """Of the live state: http://127.0.0.1:<agent>/live/<work>."""
    session: str
    result_file: str
    host: str
    port: int
    drive_url: str
    epoch: int
    call: str
    cwd: str
    secrets: list[str] = msgspec.field(default_factory=list)
    """Names of the environment variables whose values must not be written down."""
    args: list[Any] = msgspec.field(default_factory=list)
    kwargs: dict[str, Any] = msgspec.field(default_factory=dict)


class Batch(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Changes of one moment: they become one item, and one revision."""

    n: int
    ops: list[Op] = msgspec.field(default_factory=list)
    published: list[dict[str, Any]] = msgspec.field(default_factory=list)
    """Manifests of what the code put on a Drive."""


class Changes(Message, frozen=True, kw_only=True, omit_defaults=True):
    session: str
    batches: list[Batch]
    after: int = 0
    """The last change before these that the tree has not echoed: an agent that does not have it takes nothing."""


class Taken(Message, frozen=True, kw_only=True, omit_defaults=True):
    n: int
    """Last number that the agent has."""


class Told(Message, frozen=True, kw_only=True, omit_defaults=True):
    """One accepted revision under the work's vars; or, with `vars`, how things stand."""

    rev: int
    ops: list[Op] | None = None
    n: int | None = None
    """The process's own change that this is the echo of (ops None: taken as sent); with `vars`: the last one that is
    in them."""
    drop: bool = False
    """The own change `n` did not become part of the tree: it was refused (`error` says why) or changed nothing."""
    error: str = ""
    vars: dict[str, Any] | None = None
    received: int = 0
    """With `vars`: the last number that the agent has."""


class Report(Message, frozen=True, kw_only=True, omit_defaults=True):
    """POST /report/<work>: what a script tells about itself, see report.py."""

    progress: float | None = None
    """0..1"""
    metrics: dict[str, float | str] = msgspec.field(default_factory=dict)


class Outcome(Message, frozen=True, kw_only=True, omit_defaults=True):
    """How `run` ended, as the process itself tells it."""

    result: Any = None
    error: str = ""
    traceback: str = ""
    session: str = ""
    unsent: list[Batch] = msgspec.field(default_factory=list)
    """Changes that the tree had not echoed: an agent that has not taken them does it now."""
