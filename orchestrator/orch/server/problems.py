"""Errors as RFC 9457 problem JSON. Every error that leaves the server is made here."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

import msgspec

from orch.errors import OrchError
from orch_drive.errors import DriveError

__all__ = ["JSON_TYPE", "Problem", "problem_of"]

JSON_TYPE = b"application/problem+json"
TYPE_PREFIX = "urn:orch:problem:"


class Problem(msgspec.Struct, frozen=True, kw_only=True):
    """A problem document. `type` names the class of the error (`urn:orch:problem:state-test-failed`), or is
    `about:blank` where the status says it all; `title` is the same for every problem of that type, `detail` speaks of
    this one, `hint` says what to do. `errors` lists the fields of an invalid request, as FastAPI does."""

    type: str = "about:blank"
    title: str
    status: int
    detail: Any = ""
    hint: str = ""
    errors: list[Any] | None = None

    def fields(self) -> dict[str, Any]:
        """The document."""
        fields: dict[str, Any] = msgspec.to_builtins(self)
        if self.errors is None:
            del fields["errors"]
        return fields

    def body(self) -> bytes:
        """The document as JSON."""
        return msgspec.json.encode(self.fields())

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What goes with the document."""
        headers = [(b"content-type", JSON_TYPE), (b"cache-control", b"no-store")]
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer"))
        return headers

    @classmethod
    def plain(cls, status: int, detail: Any = "", hint: str = "", errors: list[Any] | None = None) -> Problem:
        """A problem that is no orch error: its title is the status's name."""
        try:
            title = HTTPStatus(status).phrase
        except ValueError:
            title = "Error"
        return cls(title=title, status=status, detail=detail or title, hint=hint, errors=errors)


def problem_of(error: OrchError | DriveError) -> Problem:
    """The problem that an error of ours is."""
    kind = type(error)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", kind.__name__).lower()
    title = (kind.__doc__ or kind.__name__).strip().splitlines()[0]
    return Problem(
        type=TYPE_PREFIX + name,
        title=title,
        status=error.status,
        detail=str(error.args[0]) if error.args else title,
        hint=error.hint,
    )
