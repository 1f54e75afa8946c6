"""What every part of the server is given."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from orch.server.backend import Backend
from orch.server.redact import Redactor

__all__ = ["Context"]


@dataclass(slots=True)
class Context:
    """`closing` is set when the server stops: whatever waits or streams then ends."""

    backend: Backend
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    redactor: Redactor = field(init=False)

    def __post_init__(self) -> None:
        self.redactor = Redactor(lambda: self.backend.secret_values())
