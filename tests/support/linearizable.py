"""Is a history of concurrent reads and compare-and-sets of one register linearizable?

The search is that of J. M. Wing and C. Gong ("Testing and Verifying Concurrent Objects", JPDC 17, 1993) with the memory
of visited configurations of G. Lowe ("Testing for Linearizability", Concurrency and Computation 29(4), 2017): pick any
operation that no other one precedes in real time, apply it to the register, go on with the rest, take it back if that
leads nowhere, and never visit a pair (operations applied, register) twice. Registers are independent, so that each is
checked alone (linearizability is local: M. Herlihy and J. Wing, TOPLAS 12(3), 1990).

An operation whose answer was lost may have taken effect at any time after its invocation, or never.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Operation", "Register", "explain"]


class Register(NamedTuple):
    """A value and the revision that it dates from; None if no answer has told it yet."""

    value: Any
    rev: int | None


@dataclass(frozen=True)
class Operation:
    """One operation as its client saw it.

    kind: "read" (found `value` of revision `rev`), "test" (sets `value` if the register holds `expected`) or "match"
    (sets `value` if the register dates from revision `expected`). outcome: "ok" (a set became revision `rev`), "failed"
    (the condition did not hold) or "unknown".
    """

    kind: str
    outcome: str
    invoked: float
    answered: float = math.inf
    expected: Any = None
    value: Any = None
    rev: int | None = None

    def apply(self, register: Register) -> Register | None:
        """The register after this operation; None if it cannot have had its outcome at this moment."""
        if self.kind == "read":
            fits = register.value == self.value and register.rev in (None, self.rev)
            return Register(self.value, self.rev) if fits else None
        if self.kind == "test":
            holds = register.value == self.expected
        elif register.rev is None:
            # The revision of a set whose answer was lost: it may be the expected one, and it may not.
            holds = self.outcome != "failed"
        else:
            holds = register.rev == self.expected
        if self.outcome == "failed":
            return None if holds else register
        if not holds or (self.rev is not None and register.rev is not None and self.rev <= register.rev):
            return None
        return Register(self.value, self.rev)


def explain(history: Iterable[Operation], initial: Register) -> Operation | None:
    """None if the history is linearizable; else the earliest answered operation that no order has got past."""
    known = sorted((op for op in history if op.outcome != "unknown"), key=lambda op: op.invoked)
    lost = sorted((op for op in history if op.outcome == "unknown" and op.kind != "read"), key=lambda op: op.invoked)
    # A configuration: how many known operations from the first on are all applied, which ones behind those are
    # (bits), which lost ones are (bits), and the register.
    start = (0, 0, 0, initial)
    todo, visited = [start], {start}
    furthest = 0
    while todo:
        done, beyond, gone, register = todo.pop()
        furthest = max(furthest, done)
        if done == len(known):
            return None
        deadline = math.inf  # nothing that was invoked later can come first
        at = done
        reachable = []
        while at < len(known) and known[at].invoked <= deadline:
            if not beyond >> (at - done) & 1:
                reachable.append(at)
                deadline = min(deadline, known[at].answered)
            at += 1
        following = []
        for at in reachable:
            if known[at].invoked <= deadline and (after := known[at].apply(register)) is not None:
                first, bits = done, beyond | 1 << (at - done)
                while bits & 1:
                    first, bits = first + 1, bits >> 1
                following.append((first, bits, gone, after))
        for number, op in enumerate(lost):
            if op.invoked > deadline:
                break
            if not gone >> number & 1 and (after := op.apply(register)) is not None:
                following.append((done, beyond, gone | 1 << number, after))
        for configuration in following:
            if configuration not in visited:
                visited.add(configuration)
                todo.append(configuration)
    return known[furthest]
