"""Processes by pid and start time: a pid alone may have been given to somebody else since it was written down."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Proc", "boot_id", "descendants", "find", "group_members", "send", "wait_gone"]


@dataclass(frozen=True, slots=True)
class Proc:
    """One process that was alive when it was looked at. `start` means something only in comparison."""

    pid: int
    start: str


@dataclass(frozen=True, slots=True)
class _Row:
    parent: int
    group: int
    start: str


def boot_id() -> str:
    """Changes with every boot of the machine; empty where there is none (then start times must do)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _row(pid: int) -> _Row | None:
    """None: no such process, or only its zombie."""
    if not sys.platform.startswith("linux"):
        return _ps(pid).get(pid)
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name, in parentheses, may itself hold spaces and parentheses.
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else _Row(int(fields[1]), int(fields[2]), fields[19])


def _ps(pid: int | None = None) -> dict[int, _Row]:
    choice = ["-p", str(pid)] if pid is not None else ["-A"]
    output = subprocess.run(
        ["ps", *choice, "-o", "pid=,ppid=,pgid=,stat=,lstart="], capture_output=True, text=True, check=False
    ).stdout
    rows = {}
    for line in output.splitlines():
        words = line.split(None, 4)
        if not words[3].startswith("Z"):
            rows[int(words[0])] = _Row(int(words[1]), int(words[2]), words[4])
    return rows


def find(pid: object, start: object = None, boot: object = None) -> Proc | None:
    """The living process that a record speaks of; None if it is gone, or its pid is another's by now."""
    if not isinstance(pid, int) or pid <= 1:
        return None
    here = boot_id()
    if boot and here and boot != here:
        return None
    row = _row(pid)
    if row is None or (start is not None and str(start) != row.start):
        return None
    return Proc(pid, row.start)


def _all() -> dict[int, _Row]:
    if not sys.platform.startswith("linux"):
        return _ps()
    return {int(name): row for name in os.listdir("/proc") if name.isdigit() and (row := _row(int(name)))}


def descendants(root: Proc) -> list[Proc]:
    """Everything below it, whatever its group or session."""
    rows = _all()
    found: list[Proc] = []
    level = {root.pid}
    while level:
        level = {pid for pid, row in rows.items() if row.parent in level}
        found += [Proc(pid, rows[pid].start) for pid in sorted(level)]
    return found


def group_members(group: object, variable: str) -> list[Proc]:
    """What is left of a process group whose leader may be gone. Only processes that have the environment variable
    count, where that can be seen (Linux): the number could be another group's by now."""
    found = []
    for pid, row in _all().items():
        if row.group != group:
            continue
        if sys.platform.startswith("linux"):
            try:
                environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            # It reads as empty for an instant while a program is being started.
            if environment != [b""] and not any(entry.startswith(variable.encode() + b"=") for entry in environment):
                continue
        found.append(Proc(pid, row.start))
    return found


def send(proc: Proc, number: signal.Signals) -> bool:
    """Signal it if it is still the same process. Raises PermissionError."""
    if find(proc.pid, proc.start) is None:
        return False
    try:
        os.kill(proc.pid, number)
    except ProcessLookupError:
        return False
    return True


def wait_gone(procs: Iterable[Proc], timeout: float) -> list[Proc]:
    """Wait until all are gone, at most `timeout` seconds; those that are not."""
    deadline = time.monotonic() + timeout
    left = [proc for proc in procs if find(proc.pid, proc.start) is not None]
    while left and (rest := deadline - time.monotonic()) > 0:
        _wait_one(left[0], rest)
        left = [proc for proc in left if find(proc.pid, proc.start) is not None]
    return left


def _wait_one(proc: Proc, timeout: float) -> None:
    if hasattr(os, "pidfd_open"):
        try:
            fd = os.pidfd_open(proc.pid)
        except ProcessLookupError:
            return
        try:
            poll = select.poll()
            poll.register(fd, select.POLLIN)
            poll.poll(timeout * 1000)
        finally:
            os.close(fd)
    else:
        time.sleep(min(timeout, 0.02))
