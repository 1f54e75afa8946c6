"""Crash points: a test ends a process at a named step, as kill -9 would.

`ORCH_CRASH_AT=name:n`, set for `orch run`, kills the process that reaches the point `name` for the n-th time, counted
from 1 in each process. Agents, fork servers and waiters inherit the variable, users' scripts do not. A process that has
called `once_in` leaves a file there first, by which every later one knows that it has happened: what is started in its
place passes the same point unharmed. Remove `.orch/run/crashed-*` to have it happen again.

Standard library only: everything else of orch, the waiter included, may import it.
"""

from __future__ import annotations

import os
import signal

__all__ = ["HOME", "POINTS", "VARIABLE", "armed", "crash_point", "once_in"]

VARIABLE = "ORCH_CRASH_AT"
HOME = "ORCH_CRASH_HOME"
"""Tells a fork server, which has no packages, where this one lies."""

_FILE = ("written", "renamed")
_SYNCED_FILE = ("written", "synced", "renamed")


def _steps(name: str, steps: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{name}.{step}" for step in steps)


POINTS: tuple[str, ...] = (
    # The flow server.
    *_steps("flow.token", _FILE),
    *_steps("flow.app", _FILE),
    *_steps("flow.server", _FILE),
    *_steps("flow.known", _FILE),
    *_steps("flow.spec", _FILE),
    *_steps("flow.journal", ("begun", "written", "committed")),
    "flow.snapshot.written",
    *_steps("flow.agent", ("spawned", "found", "attached")),
    *_steps("flow.place", ("due", "answered")),
    *_steps("flow.start", ("due", "answered")),
    *_steps("flow.stop", ("due", "answered")),
    *_steps("flow.state", ("due", "answered")),
    *_steps("flow.forget", ("due", "answered")),
    *_steps("flow.push", ("received", "committed")),
    "flow.patch.committed",
    *_steps("flow.shutdown", ("due", "answered", "ended")),
    *_steps("flow.backup", (*_FILE, "sent", "copied", "based")),
    "flow.log.appended",
    # An agent.
    "agent.spec.read",
    *_steps("agent.ready", _FILE),
    *_steps("agent.places", _FILE),
    *_steps("agent.accepted", _FILE),
    *_steps("agent.stopping", _FILE),
    *_steps("agent.ended", _FILE),
    *_steps("agent.acked", _FILE),
    *_steps("agent.vars", _FILE),
    *_steps("agent.spawn", ("due", "answered")),
    *_steps("agent.push", ("due", "answered")),
    "agent.published",
    *_steps("agent.stop", (*_SYNCED_FILE, "signalled")),
    *_steps("agent.forget", ("run", "exit", "all")),
    # A fork server, a waiter and the process that becomes the script.
    *_steps("zygote", ("asked", "forked")),
    "waiter.forked",
    *_steps("waiter.run", (*_SYNCED_FILE, "told")),
    *_steps("waiter.exit", _SYNCED_FILE),
    *_steps("pywork.result", _FILE),
    # Whoever writes to a Drive, or reads from it.
    *_steps("drive.blob", _SYNCED_FILE),
    "drive.part.sent",
    *_steps("drive.manifest", _SYNCED_FILE),
    *_steps("drive.file", _FILE),
    *_steps("drive.prune", ("manifest", "blob")),
)
"""Every point there is; a test crashes at each."""

_target, _, _count = os.environ.get(VARIABLE, "").rpartition(":")
_left = 0
if _target:
    if _target not in POINTS or not _count.isdigit() or _count == "0":
        raise SystemExit(f"orch: {VARIABLE} is name:n with a name out of orch_drive/crash.py and n from 1")
    _left = int(_count)
_marks = ""


def armed() -> bool:
    """Whether some process shall crash."""
    return bool(_target)


def once_in(folder: str | os.PathLike[str]) -> None:
    """From now on crash only if nobody who uses this folder has."""
    global _marks
    _marks = os.fspath(folder)


def crash_point(name: str, step: str = "") -> None:
    """Ends the process at once if the environment asked for it, at this point (`name.step`) and this time."""
    if not _target:
        return
    point = f"{name}.{step}" if step else name
    if point not in POINTS:
        raise LookupError(f"{point} is no crash point: enter it in {__file__}")
    if point == _target:
        _reached()


def _reached() -> None:
    global _left
    _left -= 1
    if _left:
        return
    if _marks:
        try:
            os.close(os.open(os.path.join(_marks, f"crashed-{_target}-{_count}"), os.O_CREAT | os.O_EXCL, 0o600))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
