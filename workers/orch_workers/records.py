"""What an agent writes down so that a later incarnation can go on: the works it was given, the calls it was told to
start.

    run/agent-<agent>.json    the address of the living agent (the ready file)
    run/agent-<agent>.works   the placed works: host, port, token
    run/calls/<key>.json      one attempt: what was asked, why it was stopped, how it ended; key = <call>.<attempt>
    run/processes/            records of the waiters (process.py)

All files are 0600 and replaced by rename. Secrets are in none of them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import msgspec

from orch.calls import number_of
from orch.paths import agent_spec_file, write_atomic
from orch.wire import Ended, Message, Place, Progress, Published, StartCall, decode, encode

__all__ = ["AttemptRecord", "PlaceRecord", "ReadyFile", "Records", "key_of", "order_of"]

log = logging.getLogger(__name__)

KEPT_ATTEMPTS = 50
"""Finished attempts of a work whose records are kept: a doubled start of one of them must not start it again."""


def key_of(call: str, attempt: int) -> str:
    return f"{call}.{attempt}"


def order_of(start: StartCall) -> tuple[int, int]:
    """A work's attempts are asked for in this order."""
    return number_of(start.call), start.attempt


class ReadyFile(Message, frozen=True, kw_only=True, omit_defaults=True):
    """Written once the agent's socket listens."""

    agent: str
    epoch: int
    pid: int
    pid_start: str
    boot_id: str
    url: str
    port: int
    token: str


class _Incarnation(Message, frozen=True, kw_only=True):
    """What all files of an incarnation say."""

    epoch: int


class PlaceRecord(Message, frozen=True, kw_only=True, omit_defaults=True):
    place: Place
    host: str
    port: int


class AttemptRecord(Message, frozen=True, kw_only=True, omit_defaults=True):
    agent: str
    run: int
    start: StartCall
    """Without its secrets."""
    stopping: str = ""
    """Why it is being stopped: stopped, replaced, timeout, lost (the flow has given it up); orphaned, fenced or
    spot_reclaimed if the agent has decided it."""
    told: Progress | None = None
    """What the script has reported of itself; with the end, all that was told of it."""
    published: list[Published] = msgspec.field(default_factory=list)
    """Complete versions that the flow has not acknowledged."""
    ended: Ended | None = None
    acked: bool = False
    """The flow has journalled the end."""

    @property
    def key(self) -> str:
        return key_of(self.start.call, self.start.attempt)


class Records:
    """The files of one agent name under `run/`. Methods raise OSError when the disk does."""

    def __init__(self, run_dir: Path, agent: str) -> None:
        self._run = run_dir
        self._agent = agent
        self._calls = run_dir / "calls"
        self.processes = run_dir / "processes"
        for folder in (run_dir, self._calls, self.processes):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @property
    def ready_file(self) -> Path:
        return self._run / f"agent-{self._agent}.json"

    def write_ready(self, ready: ReadyFile) -> None:
        write_atomic(self.ready_file, encode(ready), point="agent.ready")

    def remove_ready(self, epoch: int) -> None:
        """Take the ready file away unless a newer incarnation has written its own."""
        try:
            if decode(ReadyFile, self.ready_file.read_bytes()).epoch == epoch:
                self.ready_file.unlink()
        except FileNotFoundError:
            return

    def successor(self, epoch: int) -> bool:
        """Whether a newer incarnation is here, or is being started: its spec is written before it is."""
        for name in (self.ready_file, agent_spec_file(self._run, self._agent)):
            try:
                if decode(_Incarnation, name.read_bytes()).epoch > epoch:
                    return True
            except FileNotFoundError:
                continue
        return False

    def load_places(self) -> list[PlaceRecord]:
        try:
            return decode(list[PlaceRecord], (self._run / f"agent-{self._agent}.works").read_bytes())
        except FileNotFoundError:
            return []

    def write_places(self, places: list[PlaceRecord]) -> None:
        write_atomic(self._run / f"agent-{self._agent}.works", encode(places), point="agent.places")

    def drop_places(self) -> None:
        """Nothing runs here any more."""
        (self._run / f"agent-{self._agent}.works").unlink(missing_ok=True)

    def load_attempts(self) -> list[AttemptRecord]:
        """Of this agent's name, a work's in the order of its calls and attempts (a file's age says when its last news
        came). A file that cannot be read is left, with a log line."""
        found = []
        for path in self._calls.glob("*.json"):
            try:
                record = decode(AttemptRecord, path.read_bytes())
            except (OSError, msgspec.MsgspecError) as error:
                log.error("the call record %s cannot be read and is left alone: %s", path, error)
                continue
            if record.agent == self._agent:
                found.append(record)
        return sorted(found, key=lambda record: order_of(record.start))

    def write_attempt(self, record: AttemptRecord) -> None:
        news = "acked" if record.acked else "ended" if record.ended else "stopping" if record.stopping else "accepted"
        write_atomic(self._calls / f"{record.key}.json", encode(record), point=f"agent.{news}")

    def drop_attempt(self, key: str) -> None:
        (self._calls / f"{key}.json").unlink(missing_ok=True)

    def state_file(self, work: str) -> Path:
        """ORCH_STATE_FILE of a work."""
        return self._run / f"vars-{work}.json"

    def result_file(self, key: str) -> Path:
        """What a Python Work's process leaves: its result, or its exception."""
        return self.processes / f"{key}.result.json"
