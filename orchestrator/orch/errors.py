"""Every error that orch raises on purpose, drawn as a tree.

    OrchError                     base: `hint` says what to do, `status` is the HTTP status it becomes
    |-- UsageError                a command line or an app file that cannot be used
    |-- StateError
    |   |-- StateTypeError        (AttributeError) a value that is no state, or a name that may not be state
    |   |-- StatePathError        a pointer that names nothing
    |   |-- StateForbidden        a write outside `vars`
    |   |-- StateTestFailed       a failing `test` operation
    |   |-- StateMismatch         If-Match / base_rev speaks of an older value
    |   |-- StateTooLarge         one value over 2 MiB, or the tree over 32 MiB
    |   `-- StateConflict         (AppState) somebody else changed what was read
    |-- CallError                 a call that cannot be asked for
    |-- WorkFailed                a call failed and `raise_exception` is set
    |-- NotFound                  no such component, call, route, file
    |-- StaleEpoch                a message of an older incarnation
    |-- DriveError                see orch_drive
    |-- JournalError              the state database cannot be read or written
    |   `-- JournalUnreadable     what it holds is damaged, of a newer orch, or of another program
    `-- RuntimeLost               an agent cannot be placed or reached

The docstring of a class is the message that is used when none is given.
"""

from __future__ import annotations

__all__ = [
    "CallError",
    "JournalError",
    "JournalUnreadable",
    "NotFound",
    "OrchError",
    "RuntimeLost",
    "StaleEpoch",
    "StateConflict",
    "StateError",
    "StateForbidden",
    "StateMismatch",
    "StatePathError",
    "StateTestFailed",
    "StateTooLarge",
    "StateTypeError",
    "UsageError",
    "WorkFailed",
]


class OrchError(Exception):
    """Something went wrong in orch."""

    status: int = 500
    hint: str = ""

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        if hint:
            self.hint = hint

    @property
    def message(self) -> str:
        return str(self.args[0])

    @property
    def line(self) -> str:
        """Message and hint in one."""
        return f"{self.message} - {self.hint}" if self.hint else self.message


class UsageError(OrchError):
    """The command cannot be used like this."""

    status = 400


class StateError(OrchError):
    """The state cannot be read or written like this."""

    status = 422


class StateTypeError(StateError, AttributeError):
    """The value is not JSON state."""

    status = 422


class StatePathError(StateError):
    """The pointer names nothing in the state."""

    status = 409


class StateForbidden(StateError):
    """Only values below `vars` can be written."""

    status = 403


class StateTestFailed(StateError):
    """A `test` operation found another value."""

    status = 409


class StateMismatch(StateError):
    """The value has changed since the revision that the request speaks of."""

    status = 412


class StateTooLarge(StateError):
    """The value or the tree is too large."""

    status = 422


class StateConflict(StateError):
    """Changed elsewhere, please repeat."""

    status = 409


class CallError(OrchError):
    """The call cannot be asked for."""

    status = 422


class WorkFailed(OrchError):
    """A work failed."""


class NotFound(OrchError):
    """There is nothing of that name."""

    status = 404


class StaleEpoch(OrchError):
    """The message comes from an older incarnation."""

    status = 409


class JournalError(OrchError):
    """The state database cannot be used."""

    status = 503


class JournalUnreadable(JournalError):
    """The state database holds what this orch cannot read."""


class RuntimeLost(OrchError):
    """The agent cannot be reached."""

    status = 503
