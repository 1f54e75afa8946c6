"""Crash points: tests end the process at a named step, the way kill -9 or a power cut would."""

from __future__ import annotations

import os
from collections import Counter

__all__ = ["crash_point"]

_hits: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """End the process at once (status 137) if `ORCH_CRASH_AT` is `name:n` and this is the n-th hit of `name`."""
    wanted = os.environ.get("ORCH_CRASH_AT")
    if not wanted:
        return
    target, _, count = wanted.rpartition(":")
    if target == name:
        _hits[name] += 1
        if _hits[name] == int(count):
            os._exit(137)
