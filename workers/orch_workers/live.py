"""One side's view of a work's vars while others write them too. PURE: no I/O, no clock.

The tree decides: `base` is the vars as the tree has them at `rev`; `pending` are this side's own changes that the tree
has not echoed yet. What this side sees is `base` with `pending` on top, so that its own writes never flicker and both
sides end equal once everything is echoed. This is client-side prediction with server reconciliation; the agent uses it
for each of its works, and a Python Work's process uses it again towards its agent.
"""

from __future__ import annotations

import contextlib
import copy
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

from orch.errors import OrchError
from orch.state import apply_ops
from orch.wire import Op

__all__ = ["LiveVars", "names_of"]

JSON = Any


def names_of(ops: Iterable[Op]) -> set[str]:
    """The vars (first pointer tokens) that these operations speak of."""
    names = set()
    for op in ops:
        names.add(_name(op["path"]))
        if "from" in op:
            names.add(_name(op["from"]))
    return names


def _name(pointer: str) -> str:
    return pointer.split("/", 2)[1].replace("~1", "/").replace("~0", "~") if "/" in pointer else ""


class LiveVars:
    """The vars of one work: `base` (the tree's) and `pending` (own, numbered, not yet echoed).

    Methods that take in news return operations that bring a copy of the view (kept elsewhere, e.g. as the attributes of
    a running work) up to date; where own changes wait on the same variable that is one `replace` of the variable.
    Containers are never shared with what is passed in or handed out.
    """

    def __init__(self, rev: int, vars: Mapping[str, JSON]) -> None:
        self.rev = rev
        self.base: dict[str, JSON] = copy.deepcopy(dict(vars))
        self.pending: deque[tuple[int, list[Op]]] = deque()
        self._waiting: dict[str, int] = {}

    def local(self, seq: int, ops: list[Op]) -> None:
        """This side changed something; `seq` counts up. The caller's own copy has the change already."""
        self.pending.append((seq, ops))
        for name in names_of(ops):
            self._waiting[name] = self._waiting.get(name, 0) + 1

    def remote(self, rev: int, ops: list[Op] | None, seq: int | None = None) -> list[Op]:
        """One accepted revision, in revision order. With `seq` it is the echo of an own change (`ops` None: taken as it
        was sent). Returns what changes in the view."""
        own = self._take(seq) if seq is not None else None
        if rev < self.rev or (rev == self.rev and own is None):
            # Known already; only several own changes in one revision come with the same number.
            return self._rebuild(names_of(own)) if own is not None else []
        self.rev = rev
        if ops is None:
            if own is None:
                return []
            apply_ops(self.base, copy.deepcopy(own))
            return []
        apply_ops(self.base, copy.deepcopy(ops))
        touched = names_of(ops)
        if own is not None:
            return self._rebuild(touched | names_of(own))
        if not any(name in self._waiting for name in touched):
            return ops
        return self._rebuild(touched)

    def drop(self, seq: int) -> list[Op]:
        """The tree did not take an own change, or it changed nothing. Returns what changes in the view."""
        own = self._take(seq)
        return self._rebuild(names_of(own)) if own is not None else []

    def waits_for(self, seq: int) -> list[Op] | None:
        """The own change of that number, if the tree has not echoed it."""
        return next((ops for number, ops in self.pending if number == seq), None)

    def reset(self, rev: int, vars: Mapping[str, JSON], acked: int) -> list[Op]:
        """Contact again: the vars as the tree has them at `rev`, own changes up to `acked` included. Returns what
        changes in the view; nothing if `rev` is older than what is known."""
        if rev < self.rev:
            return []
        before = self.base
        self.rev = rev
        self.base = copy.deepcopy(dict(vars))
        touched = {name for name in before.keys() | self.base.keys() if before.get(name) != self.base.get(name)}
        while self.pending and self.pending[0][0] <= acked:
            own = self._take(self.pending[0][0])
            touched |= names_of(own or [])
        return self._rebuild(touched)

    def value(self, name: str) -> JSON:
        """One variable as this side sees it. KeyError for an unknown name."""
        value = copy.deepcopy(self.base[name])
        if name not in self._waiting:
            return value
        holder = {name: value}
        for _, ops in self.pending:
            mine = [op for op in ops if _name(op["path"]) == name]
            if not mine:
                continue
            with contextlib.suppress(OrchError):  # the tree moved on: it will refuse this change and say so
                apply_ops(holder, copy.deepcopy(mine))
        return holder[name]

    def view(self) -> dict[str, JSON]:
        """All variables as this side sees them. What is not waited for is not copied: encode it at once or copy it."""
        return {name: self.value(name) if name in self._waiting else value for name, value in self.base.items()}

    def _take(self, seq: int) -> list[Op] | None:
        for index, (number, ops) in enumerate(self.pending):
            if number == seq:
                del self.pending[index]
                for name in names_of(ops):
                    self._waiting[name] -= 1
                    if not self._waiting[name]:
                        del self._waiting[name]
                return ops
        return None

    def _rebuild(self, names: Iterable[str]) -> list[Op]:
        known = sorted(name for name in names if name in self.base)
        return [
            {"op": "replace", "path": "/" + name.replace("~", "~0").replace("/", "~1"), "value": self.value(name)}
            for name in known
        ]
