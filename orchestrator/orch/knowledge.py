"""What the engine knows of a Work and of an agent. PURE."""

from __future__ import annotations

from collections import deque
from typing import Any

from orch.calls import Book, Call, Stage
from orch.wire import Ended, ItemResult
from orch.work import Status, WorkSpec, WorkView

__all__ = ["KnownAgent", "KnownWork"]

ANSWERS_KEPT = 1_000


class KnownWork:
    """A Work as the engine knows it."""

    def __init__(self, spec: WorkSpec, run: int) -> None:
        self.spec = spec
        self.book = Book(spec.name, run, used=spec.used)
        self.born = 0
        """The revision that has made it: an agent that was told of an older state knows a predecessor of that name."""
        self.placed = False
        self.placing = False
        self.failed_to_place = ""
        self.agent = ""
        self.host = ""
        self.port: int | None = spec.port
        self.live = False
        """The current call's attempt was handed to the agent and has not ended."""
        self.sent_epoch = 0
        """The incarnation of the agent to which it was handed."""
        self.release_at: float | None = None
        """It has finished: when its place is given back."""
        self.main: KnownWork | None = None
        """The Work that this is a further machine of, and the further machines of this one."""
        self.parts: list[KnownWork] = []
        self.master_port = 0
        """Free on its machine when it was placed: where the scripts of its parts may meet."""
        self.part_failure: Ended | None = None
        """How the first of its parts has failed in this attempt."""
        self.waiting_end: Ended | None = None
        """Its own script has ended well; those of its parts have not yet."""
        self.ready = False
        self.ready_at: float | None = None
        self.stopping: str = ""
        self.deaths = 0
        self.since: float | None = None
        self.exit_code: int | None = None
        self.progress: float | None = None
        self.metrics: dict[str, Any] = {}
        self.moving = ""
        """How far the files of its attempt are on their way."""
        self.files: list[dict[str, Any]] = []
        self.num_successes = 0
        self.num_timeouts = 0
        self.shown: dict[str, Any] = {}
        """The status in the tree."""
        self.kept: dict[str, Any] = {}
        """What the journal has of it."""

    def status(self, base_url: str) -> dict[str, Any]:
        call = self.book.shown
        return {
            "stage": str(call.stage) if call is not None else str(Stage.NOT_STARTED),
            "reason": None if call is None or call.reason is None else str(call.reason),
            "message": self._message(call),
            "since": self.since,
            "host": self.host,
            "port": self.port if self.placed or self.spec.port else None,
            "url": self.url(base_url),
            "is_ready": self.ready,
            "exit_code": self.exit_code,
            "progress": self.progress,
            "metrics": self.metrics,
            "files": self.files,
            "num_successes": self.num_successes,
            "num_timeouts": self.num_timeouts,
            "held": self.book.held is not None,
        }

    def _message(self, call: Call | None) -> str:
        if call is None:
            return self.failed_to_place
        return (call.stage in (Stage.PENDING, Stage.RUNNING) and self.moving) or call.message

    def url(self, base_url: str) -> str:
        return f"{base_url}/view/{self.spec.name}/" if self.ready else ""

    def view(self, base_url: str) -> WorkView:
        call = self.book.shown
        status = Status() if call is None else Status(
            stage=call.stage, reason=call.reason, message=self._message(call), since=self.since
        )  # fmt: skip
        return WorkView(
            status=status,
            book=self.book.view(),
            host=self.host,
            port=self.port if self.placed or self.spec.port else None,
            url=self.url(base_url),
            ready=self.ready,
            exit_code=self.exit_code,
            progress=self.progress,
            metrics=dict(self.metrics),
            files=tuple(self.files),
            num_successes=self.num_successes,
            num_timeouts=self.num_timeouts,
        )


class KnownAgent:
    def __init__(self, name: str, epoch: int = 0) -> None:
        self.name = name
        self.epoch = epoch
        self.up = False
        self.launching = False
        self.expected = False
        """An earlier server knew it: it may live, and is being asked."""
        self.since = 0
        self.dead = False
        """See `AgentUp`."""
        self.silent = False
        """Contact is lost: nothing is known of its Works."""
        self.cut_off = False
        """It was said that this machine reaches nobody."""
        self.acked = 0
        self.said: deque[tuple[int, ItemResult]] = deque(maxlen=ANSWERS_KEPT)
        """What was answered to the last items, of which incarnation."""

    def said_since(self, seq: int) -> list[ItemResult]:
        return [result for epoch, result in self.said if epoch == self.epoch and seq <= result.seq]
