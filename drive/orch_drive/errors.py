"""Every error that the Drive raises on purpose, drawn as a tree.

    DriveError                    base: `hint` says what to do, `status` is the HTTP status it becomes
    |-- DriveNotFound             no such path or version
    |-- DriveAmbiguous            several components publish the path
    |-- DrivePathError            (ValueError) a path that is refused: absolute, `..`, a link that leaves the root
    |-- DriveConflict             a local file that differs, a file that keeps changing, two writers
    |-- DriveStaleEpoch           an older incarnation of the component tried to write
    |-- DriveCorrupt              stored bytes do not match their manifest; they are never handed out
    |-- DriveNotHere              (in a Flow) only list() and versions()
    `-- DriveUnavailable          not connected, disk full, no permission

The docstring of a class is the message that is used when none is given.
"""

from __future__ import annotations

__all__ = [
    "DriveAmbiguous",
    "DriveConflict",
    "DriveCorrupt",
    "DriveError",
    "DriveNotFound",
    "DriveNotHere",
    "DrivePathError",
    "DriveStaleEpoch",
    "DriveUnavailable",
]


class DriveError(Exception):
    """Something went wrong in the Drive."""

    status: int = 500
    hint: str = ""

    def __init__(self, message: str = "", *, hint: str = "") -> None:
        super().__init__(message or (type(self).__doc__ or "").strip().splitlines()[0])
        if hint:
            self.hint = hint

    @property
    def message(self) -> str:
        return str(self.args[0])


class DriveNotFound(DriveError):
    """There is no such path on the Drive."""

    status = 404


class DriveAmbiguous(DriveError):
    """Several components publish this path."""

    status = 409


class DrivePathError(DriveError, ValueError):
    """The path cannot be used on a Drive."""

    status = 422


class DriveConflict(DriveError):
    """Something else is in the way."""

    status = 409


class DriveStaleEpoch(DriveError):
    """A newer incarnation of this component has already published here."""

    status = 409


class DriveCorrupt(DriveError):
    """Stored bytes do not match their manifest."""

    status = 500


class DriveNotHere(DriveError):
    """In a Flow only list() and versions() can be used."""

    status = 403


class DriveUnavailable(DriveError):
    """The Drive's storage cannot be used."""

    status = 503
