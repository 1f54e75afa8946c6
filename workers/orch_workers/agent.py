"""The agent: starts the works' processes of this machine, watches them, and reports to the flow.

Everything here runs in one event loop. An attempt of a call is one task (`_attend`); its facts reach the flow through
the outbox in the order in which they happened. What must survive the agent (which attempts were started, why they were
stopped, how they ended) is on disk before it is acted on or reported: a later incarnation adopts it (`_adopt`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import NotFound, OrchError, RuntimeLost, StateTypeError
from orch.paths import write_atomic
from orch.wire import (
    AgentSpec,
    AgentStatus,
    Attach,
    Diff,
    Ended,
    Forget,
    ItemResult,
    Op,
    Place,
    Placed,
    Progress,
    Published,
    Ready,
    StartCall,
    Started,
    StartReply,
    StopCall,
    VarOps,
    WorkReport,
    encode,
)
from orch_drive import DriveError, DriveStaleEpoch, crash
from orch_drive.drive import drives_in
from orch_workers import places
from orch_workers.fences import Fences
from orch_workers.live import LiveVars, names_of
from orch_workers.messages import Batch, Outcome, Told, WorkOrder
from orch_workers.metrics import MetricsReader
from orch_workers.outbox import Outbox
from orch_workers.outputs import FileTransfer, drives_of
from orch_workers.placeholders import command_line, fill, script_word
from orch_workers.process import ExitRecord, Process, ProcessSpec, Spawner, SpawnError
from orch_workers.progress import ProgressParser
from orch_workers.reclaim import await_reclaim
from orch_workers.records import KEPT_ATTEMPTS, AttemptRecord, PlaceRecord, Records, key_of, order_of
from orch_workers.waiter import die_with, steady

__all__ = ["Agent", "Attempt", "PlacedWork"]

log = logging.getLogger(__name__)

TICK = 0.5
"""Seconds between looks at the logs of running works."""
STATE_FILE_INTERVAL = 0.1
STATE_FILE_RETRY = 1.0
ACKNOWLEDGE_WITHIN = 2.0
"""Seconds that a script's PATCH waits for the flow before it is answered 202."""
TAIL_BYTES = 64 * 1024
SERVICE_PROBE = 0.05
SLOW_SERVICE_PROBE = 0.1
PLAIN_PROBE = 1.0
BEAT = 2.0
"""Seconds between heartbeats, at most: a short lease asks for more."""
BEAT_LEAST = 0.25
SUPERSEDED_AFTER = 10.0
"""Seconds for which the flow is asked when the Drive says that there is a newer incarnation."""
LITTLE_SPACE = 1 << 20
"""Bytes free on a disk below which a call's failure may come from that."""
LOG_PIECE = 1024 * 1024
"""Bytes of a log in one answer."""
MIN_SECRET = 4
"""Characters below which a secret cannot be told from ordinary text."""


@dataclass(slots=True, eq=False)
class Attempt:
    """One attempt of one call, from the moment it is accepted."""

    record: AttemptRecord
    secrets: dict[str, str]
    """Kept for what must be taken out of reports; unknown after an adoption."""
    log_file: Path
    process: Process | None = None
    stage: str = "starting"
    """starting, running, stopping, ended"""
    ready: bool = False
    stop_wanted: asyncio.Event = field(default_factory=asyncio.Event)
    stop_grace: float = 0.0
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """The process group is gone and the end is recorded."""
    transfer: FileTransfer | None = None
    log_offset: int = 0
    parser: ProgressParser = field(default_factory=ProgressParser)
    progress: float | None = None
    probe_at: float = 0.0
    probe_delay: float = SERVICE_PROBE
    probing: bool = False
    port_taken: bool = False
    """Somebody else listens on its port; that was said."""
    told: Progress | None = None
    """All that was told of it so far."""
    published: list[tuple[int, Published]] = field(default_factory=list)
    """Complete versions that the flow may not know of yet, with their numbers."""
    reports: bool = False
    """The script reports its own progress and metrics: nothing is read off its output any more."""
    metrics: MetricsReader | None = None
    metrics_known: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> StartCall:
        return self.record.start

    @property
    def key(self) -> str:
        return self.record.key


@dataclass(slots=True, eq=False)
class PlacedWork:
    """A work that the flow has put on this agent."""

    place: Place
    host: str
    port: int
    live: LiveVars
    attempt: Attempt | None = None
    """The latest one."""
    wants_state_file: bool = False
    state_file_timer: asyncio.TimerHandle | None = None
    session: str = ""
    """The Python Work's process that is connected; it numbers its changes from 1."""
    received: int = 0
    echoed: int = 0
    said: tuple[str, int] = ("", 0)
    """A session and its last number that is in the tree, as the flow has told at its attach."""
    origins: dict[int, int] = field(default_factory=dict)
    """Item number -> the process's own number, for changes on their way to the flow and back."""
    settled: dict[int, int] = field(default_factory=dict)
    """Item number -> revision by which its echo must have come."""
    fresh: asyncio.Event = field(default_factory=asyncio.Event)
    """The vars are the tree's: not yet after an adoption, until the flow has attached."""
    links: list[asyncio.Queue[bytes | None]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.place.work


class Agent:
    """All works of one machine. `url` and `port` are where this agent listens."""

    def __init__(self, spec: AgentSpec, port: int) -> None:
        self.spec = spec
        self.port = port
        self.local_url = f"http://127.0.0.1:{port}"
        self.works: dict[str, PlacedWork] = {}
        self.attempts: dict[str, Attempt] = {}
        self.leaving = asyncio.Event()
        """Set when the agent shall exit; scripts live on."""
        self.records = Records(Path(spec.orch_dir, "run"), spec.agent)
        self._spawner = Spawner(
            self.records.processes,
            contact=f"contact-{spec.agent}",
            guard=spec.launcher if spec.bound else 0,
            warm_app=spec.app_file or None,
            argv=spec.app_argv,
        )
        self._outbox = Outbox(
            spec.agent,
            spec.epoch,
            spec.token,
            spec.flow_url,
            on_result=self._on_result,
            on_acked=self._on_acked,
            on_fenced=self._on_fenced,
            on_contact=self._on_contact,
        )
        self._fences = Fences(spec.drive_url, spec.epoch)
        self._ends: dict[int, Attempt] = {}
        self._patches: dict[int, asyncio.Future[ItemResult]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: BaseException | None = None
        self._probe_wake = asyncio.Event()
        self._tick_wake = asyncio.Event()
        self._warming: asyncio.Task[None] | None = None
        self._contact = steady()
        """When the flow has heard of this agent for sure."""
        self._beat_wake = asyncio.Event()
        self._attach = 0
        """The number of the last one."""
        self._shutting_down = False
        self._reclaimed = ""
        """That this machine is going to be taken away."""

    # -- life ---------------------------------------------------------------------------------------------------------

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopts what an earlier incarnation left, then works until left. A task that fails ends the agent, loudly."""
        self._adopt()
        self._spawn(self._prepare())
        for work in (
            self._outbox.run(),
            self._probe_loop(),
            self._tick_loop(),
            self._heartbeat(),
            self._orphan_guard(),
            self._reclaim_guard(),
        ):
            self._spawn(work)
        try:
            yield
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            self.close_links()
            for placed in self.works.values():
                if placed.state_file_timer is not None:
                    placed.state_file_timer.cancel()
                    self._refresh_state_file(placed)
                    if placed.state_file_timer is not None:
                        placed.state_file_timer.cancel()
            self._outbox.close()
            await self._spawner.aclose()
        if self._failed is not None:
            raise self._failed

    async def flushed(self, timeout: float) -> bool:
        """True once the flow has journalled everything that is reported so far."""
        return await self._outbox.flushed(timeout)

    def close_links(self) -> None:
        """End the streams to the Python Works' processes, which connect again to the next incarnation."""
        for work in self.works.values():
            self._close_links(work)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)
        return task

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the agent cannot go on", exc_info=error)
            self._failed = self._failed or error
            self.leaving.set()

    def _adopt(self) -> None:
        for place in self.records.load_places():
            self._install(place.place, place.host, place.port).fresh.clear()
        processes = {process.key: process for process in Spawner.adopt(self.records.processes)}
        for record in self.records.load_attempts():
            if record.run != self.spec.run:
                if record.key in processes:
                    log.warning("%s is left over from another run and is stopped", record.key)
                    self._spawn(_stop_leftover(processes[record.key], record.start.grace))
                self.records.drop_attempt(record.key)
                continue
            process = processes.get(record.key)
            if process is None and record.ended is None and not record.stopping:
                # Its secrets were never written down: the flow asks for the same attempt again. Should a waiter have
                # been on its way nevertheless, its record wins, see `Spawner.start`.
                log.info("%s was accepted but not started when the former agent ended", record.key)
                self.records.drop_attempt(record.key)
                continue
            work = self.works.get(record.start.work)
            attempt = self._make_attempt(record, {})
            attempt.process = process
            attempt.told, attempt.reports = record.told, record.told is not None
            if work is not None:
                work.attempt = attempt
            if not record.acked:
                attempt.published = [(self._outbox.add(item), item) for item in record.published]
                if record.told is not None:
                    self._outbox.add(record.told)
            if record.ended is not None:
                attempt.stage = "ended"
                if not record.acked:
                    self._ends[self._outbox.add(record.ended)] = attempt
                self._spawn(_see_off(attempt))
                continue
            if process is not None:
                log.info("%s (pid %d) is adopted", record.key, process.pid)
                if record.stopping:  # perhaps the former agent had no time to
                    self._spawn(_stop_process(process, record.start.grace))
            self._spawn(self._attend(attempt))
        for work in self.works.values():
            self._fence_off(work)
        self._prune()

    async def _orphan_guard(self) -> None:
        limit = self.spec.orphan_timeout
        if limit is None:
            return
        while (left := self._contact + limit - steady()) > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.leaving.wait(), left)
                return
        log.warning("no contact with the flow for %.0f s: stopping all scripts (orphan guard)", limit)
        await self.shutdown(kill=False, reason="orphaned")

    async def _reclaim_guard(self) -> None:
        """A spot machine that is taken away: its scripts have two minutes in which to save what they have."""
        if not self.spec.compute.get("interruptible"):
            return
        self._reclaimed = await await_reclaim()
        log.warning("%s: stopping all scripts", self._reclaimed)
        for attempt in list(self.attempts.values()):
            if not attempt.over.is_set():
                self._stop_attempt(attempt, "spot_reclaimed", attempt.start.grace)

    # -- contact with the flow ----------------------------------------------------------------------------------------

    def _on_contact(self, at: float) -> None:
        if at <= self._contact:
            return
        self._contact = at
        if self._leases():
            self._note_contact()

    def _note_contact(self) -> None:
        try:
            self._spawner.note_contact(self._contact)
        except OSError as error:  # the leases run out, which is the safe side
            log.error("the contact with the flow cannot be noted: %s", error)

    def _leases(self) -> list[float]:
        return [
            attempt.start.lease
            for attempt in self.attempts.values()
            if attempt.start.lease is not None and not attempt.over.is_set()
        ]

    async def _heartbeat(self) -> None:
        """Leases and the orphan guard count from the last answer of the flow: without news there is no answer."""
        while True:
            orphaned = self.spec.orphan_timeout
            limits = [*self._leases(), *([] if orphaned is None else [orphaned])]
            if not limits:
                self._beat_wake.clear()
                await self._beat_wake.wait()
                continue
            await self._outbox.beat()
            period = min([BEAT, *(limit / 4 for limit in limits)])
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._beat_wake.wait(), max(BEAT_LEAST, period))
            self._beat_wake.clear()

    async def _await_contact(self, attempt: Attempt) -> None:
        """What has a lease is started in contact only: its waiter counts from the last one."""
        lease = attempt.start.lease
        if lease is None:
            return
        self._beat_wake.set()
        while not attempt.stop_wanted.is_set():
            if await self._outbox.beat():
                self._note_contact()
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(attempt.stop_wanted.wait(), BEAT_LEAST)

    def _on_fenced(self) -> None:
        """The flow has replaced this agent. A successor on this machine goes on with the scripts; without one they must
        not go on."""
        if self.records.successor(self.spec.epoch):
            self.leaving.set()
        elif not self._shutting_down:
            self._spawn(self.shutdown(kill=False, reason="fenced"))

    # -- what the flow asks -------------------------------------------------------------------------------------------

    def attach(self, attach: Attach) -> AgentStatus:
        """The flow (perhaps a new one) says who it is and what it knows. OrchError 409 if its epoch is another one."""
        if attach.epoch != self.spec.epoch:
            error = OrchError(f"this is epoch {self.spec.epoch} of agent {self.spec.agent}, not {attach.epoch}")
            error.status = 409
            raise error
        if attach.number < self._attach:
            return self.status()
        self._attach = attach.number
        if not self.spec.bound:
            die_with(0)
        for name, known in attach.works.items():
            work = self.works.get(name)
            if work is None:
                continue
            self._placed_since(work, known.rev)
            if known.rev >= work.live.rev:
                work.live.reset(known.rev, known.vars, attach.acked)
                if known.said is not None:
                    self._heard_before(work, key_of(*known.said[:2]), known.said[2])
                for seq in [seq for seq in work.origins if seq <= attach.acked]:
                    work.echoed = max(work.echoed, work.origins.pop(seq))
            work.fresh.set()
            self._greet(work)
            self._vars_changed(work)
        self._outbox.attached(attach.flow_url, attach.acked)
        return self.status()

    def status(self) -> AgentStatus:
        return AgentStatus(
            agent=self.spec.agent,
            epoch=self.spec.epoch,
            pid=os.getpid(),
            seq=self._outbox.seq,
            works=[_report(work) for work in self.works.values()],
        )

    def place(self, asked: list[Place]) -> list[Placed]:
        answers: list[Placed] = []
        new: list[str] = []
        for place in asked:
            work = self.works.get(place.work)
            if work is None:
                try:
                    host, port = self._address(place)
                except OSError as error:
                    answers.append(Placed(work=place.work, error=str(error)))
                    continue
                work = self._install(place, host, port)
                new.append(work.name)
            elif not work.fresh.is_set():  # adopted: the address stays, the vars are the tree's
                token = work.place.token if work.attempt is not None and work.attempt.stage != "ended" else place.token
                work.place = msgspec.structs.replace(place, token=token)
                work.live = LiveVars(place.rev, place.vars)
                work.fresh.set()
            elif place.rev > work.live.rev:  # it has come back under its name before this agent heard that it had gone
                work.place = place
                work.live.reset(place.rev, place.vars, 0)
                self._greet(work)
                self._vars_changed(work)
            self._placed_since(work, place.rev)
            self._fence_off(work)
            meeting = places.free_port({work.port, self.port}) if place.master else 0
            answers.append(Placed(work=work.name, host=work.host, port=work.port, master_port=meeting))
            if place.python and self._warming is None:
                self._warming = self._spawn(self._warm())
        try:
            self._write_places()
        except OSError as error:  # a later incarnation would not know them
            for name in new:
                del self.works[name]
            message = f"its place cannot be recorded: {_explain(error)}"
            return [Placed(work=a.work, error=message) if a.work in new else a for a in answers]
        return answers

    def start(self, asked: list[StartCall]) -> list[StartReply]:
        """Accepts each attempt once; the answer is given when the intent is on disk. Raises RuntimeLost when this agent
        leaves: its successor will be asked."""
        if self._shutting_down:
            raise RuntimeLost("the agent is shutting down")
        if self._reclaimed:
            raise RuntimeLost(self._reclaimed)
        replies = []
        for start in asked:
            error = self._accept(start)
            replies.append(StartReply(call=start.call, attempt=start.attempt, accepted=not error, error=error))
        return replies

    def stop(self, asked: list[StopCall]) -> None:
        for stop in asked:
            attempt = self.attempts.get(key_of(stop.call, stop.attempt))
            if attempt is not None:
                self._stop_attempt(attempt, stop.reason, stop.grace)

    def forget(self, asked: list[Forget]) -> None:
        for gone in asked:
            name, work = gone.work, self.works.get(gone.work)
            if work is None or work.place.rev >= gone.rev:
                continue
            del self.works[name]
            if work.attempt is not None:
                self._stop_attempt(work.attempt, "stopped", work.attempt.start.grace)
            self._close_links(work)
            if work.state_file_timer is not None:
                work.state_file_timer.cancel()
            self.records.state_file(name).unlink(missing_ok=True)
        try:
            self._write_places()
        except OSError as error:
            log.error("the places of the works cannot be recorded: %s", _explain(error))

    def apply(self, diffs: list[Diff]) -> None:
        """Revisions under the works' vars, in revision order."""
        for diff in diffs:
            work = self.works.get(diff.work)
            if work is None:
                continue
            number = work.origins.pop(diff.seq, None) if diff.seq is not None else None
            sent = work.live.waits_for(diff.seq) if diff.seq is not None else None
            work.live.remote(diff.rev, diff.ops, diff.seq)
            if number is not None:
                work.echoed = max(work.echoed, number)
                self._tell(work, Told(rev=diff.rev, ops=diff.ops, n=number))
            else:
                self._tell(work, Told(rev=diff.rev, ops=diff.ops if diff.ops is not None else sent or []))
            self._vars_changed(work)
        for work in self.works.values():  # only now: one revision may hold several own changes
            self._settle(work)

    def read_log(self, work: str, call: str, offset: int) -> bytes:
        """What a call's log has from `offset` on, `LOG_PIECE` bytes at most; offsets count what was written elsewhere
        too. NotFound."""
        if {work, call} & {".", ".."}:
            raise NotFound(f"there is no log {work}/{call}")
        try:
            with self._log_file(work, call).open("rb") as file:
                file.seek(max(0, offset - self._log_from(call)))
                return file.read(LOG_PIECE)
        except FileNotFoundError:
            raise NotFound(f"there is no log {work}/{call}") from None

    def _log_from(self, call: str, new: int = 0) -> int:
        """Where the log begins that is here: with the first attempt that was started here, and all later ones say so
        too, because records are pruned. `new`: of a first one."""
        return next((a.start.log_from for a in self.attempts.values() if a.start.call == call), new)

    def _log_file(self, work: str, call: str) -> Path:
        return Path(self.spec.orch_dir, "logs", work, f"{call}.log")

    def begin_shutdown(self, *, kill: bool) -> None:
        """`shutdown` in the background."""
        self._spawn(self.shutdown(kill=kill))

    async def shutdown(self, *, kill: bool, reason: str = "stopped") -> None:
        """Stop every script (at once with `kill`), report the ends if the flow listens, then leave."""
        if self._shutting_down and not kill:
            return
        self._shutting_down = True
        running = [attempt for attempt in self.attempts.values() if not attempt.over.is_set()]
        for attempt in running:
            self._stop_attempt(attempt, reason, 0.0 if kill else attempt.start.grace)
        await asyncio.gather(*(attempt.over.wait() for attempt in running))
        if reason == "fenced" or not await self._outbox.flushed(2.0):
            log.warning("the flow does not answer: the ends of the works stay recorded in %s", self.records.processes)
        self.records.drop_places()
        self.leaving.set()

    # -- placing ------------------------------------------------------------------------------------------------------

    def _address(self, place: Place) -> tuple[str, int]:
        host = place.host or places.address_of(self.spec.bind)
        taken = {work.port for work in self.works.values()} | {self.port}
        return host, place.port or places.free_port(taken)

    def _install(self, place: Place, host: str, port: int) -> PlacedWork:
        work = PlacedWork(place, host, port, LiveVars(place.rev, place.vars))
        work.fresh.set()
        self.works[place.work] = work
        return work

    @staticmethod
    def _placed_since(work: PlacedWork, rev: int) -> None:
        """The flow counts on it: a `forget` of an earlier revision speaks of a predecessor of that name."""
        if rev > work.place.rev:
            work.place = msgspec.structs.replace(work.place, rev=rev)

    def _write_places(self) -> None:
        self.records.write_places([PlaceRecord(place=w.place, host=w.host, port=w.port) for w in self.works.values()])

    async def _prepare(self) -> None:
        """The first script shall not wait for the fork server."""
        try:
            await self._spawner._light_server()
        except SpawnError as error:
            log.error("scripts cannot be started: %s", error.message)

    async def _warm(self) -> None:
        try:
            await self._spawner.warm()
        except SpawnError as error:
            log.error("app.py cannot be imported for Python Works: %s\n%s", error.message, error.traceback)
            self._warming = None

    # -- vars: scripts, processes and the flow -------------------------------------------------------------------------

    def work(self, name: str) -> PlacedWork:
        """The placed work of that name. NotFound."""
        try:
            return self.works[name]
        except KeyError:
            raise NotFound(f"no work {name!r} is placed on this agent") from None

    async def fresh(self, work: PlacedWork) -> None:
        """Waits a moment for the flow, if this agent has adopted the work and does not know its vars yet."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(work.fresh.wait(), ACKNOWLEDGE_WITHIN)

    async def patch(self, work: PlacedWork, ops: list[Op]) -> ItemResult | None:
        """A script's change of its vars. None if the flow has not answered in time: it is kept and goes on its way.

        Raises NotFound for an unknown variable, StateTypeError for what is no list of operations."""
        check_ops(ops)
        unknown = sorted(names_of(ops) - work.live.base.keys())
        if unknown:
            declared = ", ".join(sorted(work.live.base)) or "none"
            raise NotFound(f"{work.name} has no variable {unknown[0]!r}", hint=f"declared: {declared}")
        if not ops:
            return ItemResult(seq=0, rev=work.live.rev)
        seq = self._change(work, ops)
        answer: asyncio.Future[ItemResult] = asyncio.get_running_loop().create_future()
        self._patches[seq] = answer
        try:
            return await asyncio.wait_for(answer, ACKNOWLEDGE_WITHIN)
        except TimeoutError:
            return None
        finally:
            self._patches.pop(seq, None)

    def receive(self, work: PlacedWork, session: str, batches: list[Batch], after: int = 0) -> int:
        """Changes made by a Python Work's process; each is taken once. Returns the last number taken."""
        self._session(work, session)
        if after > work.received:
            return work.received  # a former agent took what is missing: the process sends again from what is answered
        for batch in batches:
            if batch.n <= work.received:
                continue
            work.received = batch.n
            if batch.ops:
                work.origins[self._change(work, batch.ops, batch.n)] = batch.n
            for manifest in batch.published:
                self._publish(work.name, work.attempt, str(manifest.get("drive", "")), manifest)
            if batch.published and work.attempt is not None:
                # The process says it once: it is written down before it is answered.
                self._note(work.attempt, published=self._unacknowledged(work.attempt))
        return work.received

    def _publish(self, work: str, attempt: Attempt | None, drive: str, manifest: dict[str, Any]) -> None:
        call = attempt.start.call if attempt is not None else None
        item = Published(work=work, drive=drive, manifest=manifest, call=call)
        seq = self._outbox.add(item)
        if attempt is not None and not manifest.get("partial"):
            attempt.published.append((seq, item))

    def _unacknowledged(self, attempt: Attempt) -> list[Published]:
        attempt.published = [(seq, item) for seq, item in attempt.published if seq > self._outbox.acked]
        return [item for _, item in attempt.published]

    def connect(self, work: PlacedWork, session: str) -> asyncio.Queue[bytes | None]:
        """A Python Work's process listens: the lines for it, None at the end."""
        self._session(work, session)
        link: asyncio.Queue[bytes | None] = asyncio.Queue()
        work.links.append(link)
        link.put_nowait(self._greeting(work))
        return link

    def disconnect(self, work: PlacedWork, link: asyncio.Queue[bytes | None]) -> None:
        if link in work.links:
            work.links.remove(link)

    def report(self, work: PlacedWork, progress: float | None, metrics: Mapping[str, Any]) -> None:
        """What a script tells about itself."""
        attempt = work.attempt
        if attempt is None or attempt.stage == "ended":
            return
        attempt.reports = True
        if progress is not None:
            progress = min(1.0, max(0.0, progress))
        # The script says it once: it is written down before it is answered.
        self._note(attempt, told=self._tell_progress(attempt, progress, metrics))

    def _tell_progress(self, attempt: Attempt, progress: float | None, metrics: Mapping[str, Any]) -> Progress:
        """Reports what is news; all that was told of this attempt so far."""
        work, call = attempt.start.work, attempt.start.call
        self._outbox.add(Progress(work=work, call=call, progress=progress, metrics=dict(metrics)))
        before = attempt.told
        attempt.told = Progress(
            work=work,
            call=call,
            progress=before.progress if progress is None and before is not None else progress,
            metrics={**(before.metrics if before is not None else {}), **metrics},
        )
        return attempt.told

    def _tell_moving(self, attempt: Attempt, text: str) -> None:
        if attempt.record.ended is None:
            self._outbox.add(Progress(work=attempt.start.work, call=attempt.start.call, moving=text))

    def _session(self, work: PlacedWork, session: str) -> None:
        if session != work.session:
            work.session = session
            work.received = work.echoed = work.said[1] if work.said[0] == session else 0
            work.origins.clear()

    def _heard_before(self, work: PlacedWork, session: str, n: int) -> None:
        """Changes that a former agent has passed on are in the vars: nobody may see them on top of them once more."""
        work.said = session, n
        if work.session == session:
            work.received, work.echoed = max(work.received, n), max(work.echoed, n)
            for seq in [seq for seq, number in work.origins.items() if number <= n]:
                del work.origins[seq]
                work.live.drop(seq)

    def _change(self, work: PlacedWork, ops: list[Op], n: int = 0) -> int:
        start = work.attempt.start if work.attempt is not None else None
        item = VarOps(
            work=work.name,
            ops=ops,
            call=start.call if start is not None else None,
            base_rev=work.live.rev,
            attempt=start.attempt if start is not None and n else 0,
            n=n,
        )
        seq = self._outbox.add(item)
        work.live.local(seq, ops)
        self._vars_changed(work)
        return seq

    def _on_result(self, result: ItemResult) -> None:
        waiting = self._patches.get(result.seq)
        if waiting is not None and not waiting.done():
            waiting.set_result(result)
        for work in self.works.values():
            if work.live.waits_for(result.seq) is None:
                continue
            if result.error or not result.rev:
                self._dropped(work, result.seq, result.error)
            else:
                work.settled[result.seq] = result.rev
                self._settle(work)
            return

    def _settle(self, work: PlacedWork) -> None:
        """Own changes that became no revision of their own (they changed nothing) have no echo to wait for."""
        for seq in [seq for seq, rev in work.settled.items() if rev <= work.live.rev]:
            del work.settled[seq]
            if work.live.waits_for(seq) is not None:
                self._dropped(work, seq, "")

    def _dropped(self, work: PlacedWork, seq: int, error: str) -> None:
        work.live.drop(seq)
        number = work.origins.pop(seq, None)
        if error:
            log.warning("the flow refuses a change of %s: %s", work.name, error)
        if number is not None:
            work.echoed = max(work.echoed, number)
            self._tell(work, Told(rev=work.live.rev, n=number, drop=True, error=error))
        self._vars_changed(work)

    def _greeting(self, work: PlacedWork) -> bytes:
        return _line(Told(rev=work.live.rev, vars=work.live.base, received=work.received, n=work.echoed))

    def _greet(self, work: PlacedWork) -> None:
        if work.links:
            greeting = self._greeting(work)
            for link in work.links:
                link.put_nowait(greeting)

    def _tell(self, work: PlacedWork, message: Told) -> None:
        if work.links:
            line = _line(message)
            for link in work.links:
                link.put_nowait(line)

    def _close_links(self, work: PlacedWork) -> None:
        for link in work.links:
            link.put_nowait(None)
        work.links.clear()

    def _vars_changed(self, work: PlacedWork) -> None:
        if work.wants_state_file and work.state_file_timer is None:
            loop = asyncio.get_running_loop()
            work.state_file_timer = loop.call_later(STATE_FILE_INTERVAL, self._refresh_state_file, work)

    def _refresh_state_file(self, work: PlacedWork) -> None:
        work.state_file_timer = None
        try:
            self._write_state_file(work)
        except OSError as error:
            log.warning("the vars of %s cannot be written, trying again: %s", work.name, _explain(error))
            loop = asyncio.get_running_loop()
            work.state_file_timer = loop.call_later(STATE_FILE_RETRY, self._refresh_state_file, work)

    def _write_state_file(self, work: PlacedWork) -> None:
        write_atomic(self.records.state_file(work.name), msgspec.json.encode(work.live.view()), point="agent.vars")

    # -- starting and ending attempts ----------------------------------------------------------------------------------

    def _make_attempt(self, record: AttemptRecord, secrets: dict[str, str]) -> Attempt:
        attempt = Attempt(record, secrets, self._log_file(record.start.work, record.start.call))
        if record.stopping:
            attempt.stop_wanted.set()
        self.attempts[record.key] = attempt
        return attempt

    def _accept(self, start: StartCall) -> str:
        """Why it cannot be started, or an empty string. The same attempt again is accepted and not started again."""
        key = key_of(start.call, start.attempt)
        if key in self.attempts:
            return ""
        work = self.works.get(start.work)
        if work is None:
            return f"{start.work} is not placed on this agent"
        if work.attempt is not None and order_of(work.attempt.start) > order_of(start):
            return f"{work.attempt.key} came after it"  # a message that was under way for long
        kept = msgspec.structs.replace(start, secrets={}, log_from=self._log_from(start.call, start.log_from))
        record = AttemptRecord(agent=self.spec.agent, run=self.spec.run, start=kept)
        try:
            self.records.write_attempt(record)
        except OSError as error:
            return f"the call cannot be recorded: {_explain(error)}"
        before = work.attempt or self._left_over(start.work)
        attempt = work.attempt = self._make_attempt(record, dict(start.secrets))
        self._spawn(self._attend(attempt, before))
        return ""

    def _left_over(self, work: str) -> Attempt | None:
        """What still lives of a work that was forgotten and has come back under its name."""
        return next((a for a in self.attempts.values() if a.start.work == work and not a.over.is_set()), None)

    def _note(self, attempt: Attempt, **news: Any) -> None:
        """Writes news of an attempt down. A full disk loses what a later incarnation would know, not the news."""
        attempt.record = msgspec.structs.replace(attempt.record, **news)
        try:
            self.records.write_attempt(attempt.record)
        except OSError as error:
            log.error("the record of %s cannot be written: %s", attempt.key, error)

    def _stop_attempt(self, attempt: Attempt, reason: str, grace: float) -> None:
        if attempt.record.ended is not None:
            return
        if not attempt.record.stopping:
            self._note(attempt, stopping=reason)
        attempt.stop_grace = grace
        if attempt.stage == "running":
            attempt.stage = "stopping"
        attempt.stop_wanted.set()
        if attempt.process is not None:
            self._spawn(_stop_process(attempt.process, grace))

    async def _attend(self, attempt: Attempt, before: Attempt | None = None) -> None:
        """One attempt from acceptance to its end."""
        try:
            if before is not None:
                if not before.stop_wanted.is_set():  # the flow has given it up: never beside the new one
                    self._stop_attempt(before, "lost", before.start.grace)
                await before.over.wait()
            if attempt.process is None and not await self._launch(attempt):
                return
        except (DriveError, SpawnError, OrchError, OSError, ValueError) as error:
            trace = error.traceback if isinstance(error, SpawnError) else ""
            self._end(attempt, "exception", _explain(error), traceback=trace)
        finally:
            if attempt.record.ended is not None:
                attempt.over.set()
        if attempt.over.is_set():
            return
        try:
            await self._see_through(attempt)
        except Exception:
            log.exception("%s cannot be attended any more: it is stopped", attempt.key)
            if attempt.process is not None:
                await attempt.process.stop(attempt.start.grace)
            if attempt.record.ended is None:
                self._end(attempt, "exception", "the agent failed while it attended the script, see its log")
        attempt.over.set()

    async def _launch(self, attempt: Attempt) -> bool:
        """Inputs, command, process. False if a stop came first."""
        if attempt.stop_wanted.is_set():
            self._end_unstarted(attempt)
            return False
        start = attempt.start
        work = self.work(start.work)
        values = self._values(start)
        os.makedirs(values["work_dir"], exist_ok=True)
        cwd = self._cwd(start)
        if not cwd.is_dir():
            raise NotFound(f"the working directory {cwd} of {work.name} does not exist")
        attempt.transfer = self._transfer(attempt, cwd)
        try:
            await self._fences.set(work.name, self._drives(attempt))
        except DriveError as error:
            if isinstance(error, DriveStaleEpoch) and await self._superseded():
                await attempt.stop_wanted.wait()  # as all that is here is stopped, or left to a successor
                self._end_unstarted(attempt)
                return False
            if start.outputs:
                raise
            log.warning("%s", _explain(error))  # a Python Work may only read from it; else its put says so
        if start.inputs or start.outputs or start.reload:
            await asyncio.to_thread(attempt.transfer.prepare)
        await self._await_contact(attempt)
        if attempt.stop_wanted.is_set():
            self._end_unstarted(attempt)
            return False
        env = self._environment(work, attempt, values)
        argv: list[str] = []
        order: dict[str, Any] | None = None
        if start.kind == "python":
            order = msgspec.to_builtins(self._order(work, attempt, cwd))
        else:
            argv = command_line(
                start.command, start.script_args, start.args, shell=start.shell, values=values, python=sys.executable
            )
            _check_program(argv, cwd, env, shell=start.shell)
            work.wants_state_file = True
            self._write_state_file(work)
        attempt.parser = ProgressParser(argv)
        attempt.log_file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            attempt.log_offset = attempt.log_file.stat().st_size
        attempt.process = await self._spawner.start(
            ProcessSpec(
                key=attempt.key,
                argv=argv,
                cwd=str(cwd),
                env=env,
                log=str(attempt.log_file),
                grace=start.grace,
                lease=start.lease,
                lease_grace=start.lease_grace,
                header=_header(attempt),
                python=order,
            )
        )
        if attempt.stop_wanted.is_set():
            self._spawn(_stop_process(attempt.process, attempt.stop_grace))
        return True

    async def _see_through(self, attempt: Attempt) -> None:
        """From a living process to the reported end."""
        process, start = attempt.process, attempt.start
        assert process is not None
        if attempt.transfer is None:  # adopted
            attempt.transfer = self._transfer(attempt, self._cwd(start))
            if start.work in self.works and start.kind != "python":
                self.works[start.work].wants_state_file = True
            attempt.parser = ProgressParser(process.argv)
            attempt.log_offset = max(0, _size(attempt.log_file) - TAIL_BYTES)
        attempt.stage = "stopping" if attempt.stop_wanted.is_set() else "running"
        self._outbox.add(
            Started(work=start.work, call=start.call, attempt=start.attempt, pid=process.pid, at=process.started_at)
        )
        if start.outputs:
            attempt.metrics = MetricsReader(attempt.transfer.output_paths(), since=process.started_at)
        attempt.probe_at = asyncio.get_running_loop().time()
        attempt.probe_delay = SERVICE_PROBE
        self._probe_wake.set()
        self._tick_wake.set()
        helpers = []
        if start.timeout is not None:
            remaining = process.started_at + start.timeout - time.time()
            helpers.append(asyncio.create_task(self._time_out(attempt, remaining)))
        if start.outputs or start.reload:
            helpers.append(asyncio.create_task(self._sync_loop(attempt)))
        try:
            exited = await process.wait()
        finally:
            for helper in helpers:
                helper.cancel()
            await asyncio.gather(*helpers, return_exceptions=True)
        if attempt.record.stopping:
            await process.gone()
        await self._conclude(attempt, exited)
        await process.gone()

    async def _conclude(self, attempt: Attempt, exited: ExitRecord) -> None:
        """The process has ended: what became of it, its outputs, and the end itself."""
        start = attempt.start
        work = self.works.get(start.work)
        progress = self._read_log(attempt)
        metrics = await self._read_metrics(attempt, final=True)
        if (progress is not None or metrics) and not attempt.reports:
            self._tell_progress(attempt, progress, metrics)
        outcome = self._outcome(attempt) if start.kind == "python" else Outcome()
        if work is not None and outcome.unsent:
            self.receive(work, outcome.session, outcome.unsent)
        cut = ""
        if exited.cut:
            cut = "its place has ended: stopped"
            if start.lease is not None:
                cut = f"the flow could not be reached for {start.lease:g} s: stopped, its lease had run out"
        elif exited.stopped or exited.lost:
            cut = self._cut(attempt)
        if cut:
            reason: str | None = "lost"
            message = cut
        elif attempt.record.stopping and (exited.stopped or exited.lost):
            reason = attempt.record.stopping
            message = f"timeout after {start.timeout:g} s" if reason == "timeout" and start.timeout else ""
            if reason == "spot_reclaimed":
                message = self._reclaimed or "the spot machine is taken away"
        elif exited.lost:
            reason, message = "lost", "the process is gone and left no exit code"
        elif exited.error:
            reason, message = "exception", exited.error
        elif outcome.error:
            reason, message = "exception", outcome.error
        elif exited.signal is not None:
            reason, message = "signal", f"ended by {exited.signal_name}"
        elif exited.exit_code:
            reason, message = "exit_code", f"exit code {exited.exit_code}"
        else:
            reason, message = None, ""
        result = outcome.result if start.kind == "python" else []
        if start.outputs and attempt.transfer is not None:
            try:
                await self._fences.set(start.work, self._drives(attempt))
                if reason is None:
                    result = await asyncio.to_thread(attempt.transfer.finish)
                else:  # what a failed call has left stays readable as partial
                    await asyncio.to_thread(attempt.transfer.sync, ended=True)
            except (DriveError, OrchError, OSError) as error:
                if reason is None:
                    reason, message = "exception", _explain(error)
                else:
                    log.warning("the last outputs of %s are not published: %s", attempt.key, _explain(error))
        if reason in ("exit_code", "signal", "exception"):
            message += _little_space(self._cwd(start), Path(self.spec.orch_dir))
        trace = outcome.traceback
        self._end(attempt, reason, message, exited=exited, result=result, traceback=trace, cut=bool(cut))

    def _cut(self, attempt: Attempt) -> str:
        """Why this agent has stopped it by itself: what to say, empty if it was told to."""
        if attempt.record.stopping == "orphaned":
            return f"the flow could not be reached for {self.spec.orphan_timeout or 0:g} s: stopped (orphan guard)"
        if attempt.record.stopping == "fenced":
            return "the flow has replaced this agent: stopped"
        return ""

    def _end_unstarted(self, attempt: Attempt) -> None:
        cut = self._cut(attempt)
        reason = "lost" if cut else attempt.record.stopping
        self._end(attempt, reason, cut or "stopped before it was started", cut=bool(cut))

    def _outcome(self, attempt: Attempt) -> Outcome:
        path = self.records.result_file(attempt.key)
        try:
            return msgspec.json.decode(path.read_bytes(), type=Outcome)
        except FileNotFoundError:
            return Outcome()
        except msgspec.MsgspecError as error:
            return Outcome(error=f"the result in {path} cannot be read: {error}")

    def _end(
        self,
        attempt: Attempt,
        reason: str | None,
        message: str,
        *,
        exited: ExitRecord | None = None,
        result: Any = None,
        traceback: str = "",
        cut: bool = False,
    ) -> None:
        """Records the end, then reports it: exactly one an attempt."""
        start = attempt.start
        if attempt.record.ended is not None:
            raise RuntimeError(f"{attempt.key} ended twice")
        ended = Ended(
            work=start.work,
            call=start.call,
            attempt=start.attempt,
            at=exited.at if exited is not None and exited.at else time.time(),
            reason=reason,
            exit_code=exited.exit_code if exited is not None else None,
            signal=exited.signal_name if exited is not None else None,
            message=_redact(message, attempt.secrets),
            traceback=_redact(traceback, attempt.secrets),
            result=result if reason is None else None,
            cut=cut,
        )
        self._note(attempt, told=attempt.told, published=self._unacknowledged(attempt), ended=ended)
        attempt.stage = "ended"
        attempt.ready = False
        self._ends[self._outbox.add(ended)] = attempt

    def _on_acked(self, acked: int) -> None:
        for seq in [seq for seq in self._ends if seq <= acked]:
            self._spawn(self._forget_attempt(self._ends.pop(seq)))

    async def _forget_attempt(self, attempt: Attempt) -> None:
        """The flow has journalled the end: the process's records are not needed any more."""
        await attempt.over.wait()
        self._note(attempt, acked=True)
        if attempt.process is not None:
            attempt.process.forget()
        self.records.result_file(attempt.key).unlink(missing_ok=True)
        self._prune()

    def _prune(self) -> None:
        if len(self.attempts) <= KEPT_ATTEMPTS:
            return
        per_work: dict[str, list[Attempt]] = {}
        for attempt in self.attempts.values():
            if attempt.record.acked:
                per_work.setdefault(attempt.start.work, []).append(attempt)
        for finished in per_work.values():
            for attempt in finished[:-KEPT_ATTEMPTS]:
                del self.attempts[attempt.key]
                self.records.drop_attempt(attempt.key)

    async def _time_out(self, attempt: Attempt, remaining: float) -> None:
        await asyncio.sleep(max(0.0, remaining))
        self._stop_attempt(attempt, "timeout", attempt.start.grace)

    # -- what a process is given ---------------------------------------------------------------------------------------

    def _values(self, start: StartCall) -> dict[str, str]:
        """What the placeholders mean."""
        work = self.works.get(start.work)
        return {
            "host": work.host if work else "",
            "port": str(work.port) if work else "",
            "base_path": start.base_path,
            "work_dir": str(Path(self.spec.orch_dir, "works", start.work)),
        }

    def _cwd(self, start: StartCall) -> Path:
        return Path(self.spec.app_dir, fill(start.cwd, self._values(start)) if start.cwd else "")

    def _environment(self, work: PlacedWork, attempt: Attempt, values: Mapping[str, str]) -> dict[str, str]:
        start = attempt.start
        env = {name: value for name, value in os.environ.items() if name not in (crash.VARIABLE, crash.HOME)}
        env.update(
            ORCH_APP=self.spec.app_name,
            ORCH_WORK=work.name,
            ORCH_CALL=start.call,
            ORCH_ATTEMPT=str(start.attempt),
            ORCH_HOST=work.host,
            ORCH_PORT=str(work.port),
            HOST=work.host,
            PORT=str(work.port),
            ORCH_BASE_PATH=start.base_path,
            ORCH_STATE_URL=f"{self.local_url}/state/{work.name}",
            ORCH_REPORT_URL=f"{self.local_url}/report/{work.name}",
            ORCH_TOKEN=work.place.token,
            ORCH_STATE_FILE=str(self.records.state_file(work.name)),
            ORCH_DRIVE_URL=self.spec.drive_url,
            PYTHONUNBUFFERED="1",
            STREAMLIT_BROWSER_GATHER_USAGE_STATS="false",
            GRADIO_ANALYTICS_ENABLED="False",
            HF_HUB_DISABLE_TELEMETRY="1",
            DO_NOT_TRACK="1",
        )
        # Lightning draws its bar with rich where rich is installed, and rich draws none into a file unless told to.
        env.setdefault("TTY_COMPATIBLE", "1")
        if start.prefix == "strip" and start.base_path:
            env["GRADIO_ROOT_PATH"] = start.base_path
        env.update({name: fill(value, values) for name, value in start.env.items()})
        env.update(attempt.secrets)
        folder = str(Path(sys.executable).parent)
        env["PATH"] = folder + os.pathsep + env.get("PATH", os.defpath)
        return env

    def _order(self, work: PlacedWork, attempt: Attempt, cwd: Path) -> WorkOrder:
        start = attempt.start
        if start.record is None:
            raise ValueError(f"{work.name}: a Python Work needs the record of its class")
        return WorkOrder(
            work=work.name,
            record=start.record,
            args=start.args,
            kwargs=start.kwargs,
            rev=work.live.rev,
            vars=work.live.base,
            host=work.host,
            port=work.port,
            url=f"{self.local_url}/live/{work.name}",
            result_file=str(self.records.result_file(attempt.key)),
            session=attempt.key,
            drive_url=self.spec.drive_url,
            epoch=self.spec.epoch,
            call=start.call,
            cwd=str(cwd),
            secrets=list(attempt.secrets),
        )

    # -- files ---------------------------------------------------------------------------------------------------------

    def _transfer(self, attempt: Attempt, cwd: Path) -> FileTransfer:
        loop = asyncio.get_running_loop()

        def published(drive: str, manifest: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(self._publish, attempt.start.work, attempt, drive, manifest)

        def moving(text: str) -> None:
            loop.call_soon_threadsafe(self._tell_moving, attempt, text)

        return FileTransfer(
            attempt.start,
            cwd=cwd,
            drive_url=self.spec.drive_url,
            epoch=self.spec.epoch,
            on_published=published,
            on_moving=moving,
            writers=lambda: self._writers(attempt),
        )

    def _drives(self, attempt: Attempt) -> set[str]:
        """Ids of the Drives that an attempt writes to, or may write to."""
        start, work = attempt.start, self.works.get(attempt.start.work)
        if start.kind != "python":
            return drives_of(start)
        made = start.record and [start.record.args, start.record.kwargs]
        return drives_in([start.args, start.kwargs, made, work and work.live.base])

    def _fence_off(self, work: PlacedWork) -> None:
        """Older incarnations of a work that is placed here publish nothing more.

        The process of a Python Work that is adopted goes on in the epoch in which it was started: it has no predecessor
        that would not have been fenced off then.
        """
        attempt = work.attempt
        adopted = attempt is not None and attempt.start.kind == "python" and not attempt.over.is_set()
        if work.place.drives and not adopted:
            self._spawn(self._set_fences(work))

    async def _set_fences(self, work: PlacedWork) -> None:
        try:
            await self._fences.set(work.name, work.place.drives)
        except DriveStaleEpoch as error:
            log.warning("%s", error)
            await self._superseded()
        except DriveError as error:  # its next call asks again
            log.warning("%s is not fenced off yet: %s", work.name, _explain(error))

    async def _superseded(self) -> bool:
        """The Drive knows a newer incarnation. True if this one stops itself, as it does unless the flow answers that
        this is the one that counts: then another app uses the Drive under the same names."""
        deadline = steady() + SUPERSEDED_AFTER
        while not self.leaving.is_set() and not self._shutting_down:
            if await self._outbox.beat():
                return False
            if steady() > deadline:
                self._on_fenced()
                break
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.leaving.wait(), BEAT_LEAST)
        return True

    def _writers(self, asking: Attempt) -> list[tuple[str, Path]]:
        """(work, path) of every output that another work is writing now."""
        return [
            (attempt.start.work, path)
            for attempt in list(self.attempts.values())
            if attempt is not asking and attempt.transfer is not None and attempt.stage in ("running", "stopping")
            for path in attempt.transfer.output_paths()
        ]

    async def _sync_loop(self, attempt: Attempt) -> None:
        transfer, interval = attempt.transfer, max(0.1, attempt.start.sync_interval)
        assert transfer is not None
        told = ""
        while True:
            await asyncio.sleep(interval)
            try:
                await self._fences.set(attempt.start.work, self._drives(attempt))
                # Shielded: a cancelled wait would leave the thread publishing beside the final publish.
                job = asyncio.ensure_future(asyncio.to_thread(transfer.sync))
                try:
                    await asyncio.shield(job)
                except asyncio.CancelledError:
                    await asyncio.wait([job])
                    raise
                told = ""
            except (DriveError, OrchError, OSError) as error:
                if _explain(error) != told:
                    log.warning("files of %s are not in step: %s", attempt.start.work, _explain(error))
                    told = _explain(error)
                if isinstance(error, DriveStaleEpoch):
                    await self._superseded()

    # -- watching ------------------------------------------------------------------------------------------------------

    def _running(self) -> list[Attempt]:
        return [
            work.attempt
            for work in self.works.values()
            if work.attempt is not None and work.attempt.stage in ("running", "stopping")
        ]

    async def _tick_loop(self) -> None:
        ticks = 0
        while True:
            running = self._running()
            if not running:
                self._tick_wake.clear()
                await self._tick_wake.wait()
                continue
            await asyncio.sleep(TICK)
            ticks += 1
            for attempt in running:
                if attempt.stage == "ended":
                    continue
                progress = self._read_log(attempt)
                metrics = await self._read_metrics(attempt) if ticks % 2 == 0 else {}
                if (progress is not None or metrics) and attempt.stage != "ended" and not attempt.reports:
                    self._tell_progress(attempt, progress, metrics)

    def _read_log(self, attempt: Attempt) -> float | None:
        """Feeds what is new in the log to the parser; returns the progress if it is another one."""
        size = _size(attempt.log_file)
        if size <= attempt.log_offset:
            return None
        with attempt.log_file.open("rb") as file:
            if size - attempt.log_offset > TAIL_BYTES:
                attempt.log_offset = size - TAIL_BYTES
                attempt.parser.feed(b"\n")
            file.seek(attempt.log_offset)
            data = file.read(TAIL_BYTES)
        attempt.log_offset += len(data)
        progress = attempt.parser.feed(data)
        if progress is None or progress == attempt.progress:
            return None
        attempt.progress = progress
        return progress

    async def _read_metrics(self, attempt: Attempt, *, final: bool = False) -> dict[str, Any]:
        """Metrics in the logs among the outputs that are news, or all of them at the end."""
        if attempt.metrics is None or attempt.reports:
            return {}
        try:
            values = await asyncio.to_thread(attempt.metrics.poll, final=final)
        except (OSError, ValueError) as error:
            log.warning("metrics of %s cannot be read: %s", attempt.start.work, error)
            attempt.metrics = None
            return {}
        new = {name: value for name, value in values.items() if final or attempt.metrics_known.get(name) != value}
        attempt.metrics_known.update(new)
        return new

    async def _probe_loop(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = [attempt for attempt in self._running() if not attempt.ready and not attempt.probing]
            self._probe_wake.clear()
            if not waiting:
                await self._probe_wake.wait()
                continue
            now = loop.time()
            due = [attempt for attempt in waiting if attempt.probe_at <= now]
            for attempt in due:
                self._probe(attempt, now)
            pause = min(attempt.probe_at for attempt in waiting) - loop.time()
            if pause > 0:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._probe_wake.wait(), pause)

    def _probe(self, attempt: Attempt, now: float) -> None:
        work = self.works[attempt.start.work]
        if places.accepts(work.host, work.port):
            attempt.probing = True
            self._spawn(self._ask(attempt, work, attempt.start.health))
        if attempt.start.kind == "service":
            age = time.time() - (attempt.process.started_at if attempt.process else 0)
            attempt.probe_at = now + (SERVICE_PROBE if age < 10 else SLOW_SERVICE_PROBE)
        else:
            # A work that never listens is asked for ever: all of them at the same moment, so that it stays one look.
            attempt.probe_delay = min(PLAIN_PROBE, attempt.probe_delay * 2)
            attempt.probe_at = now + attempt.probe_delay
            if attempt.probe_delay == PLAIN_PROBE:
                attempt.probe_at = math.floor(now) + PLAIN_PROBE

    async def _ask(self, attempt: Attempt, work: PlacedWork, path: str | None) -> None:
        process = attempt.process
        try:
            if process is None or (path is not None and not await places.answers(work.host, work.port, path)):
                return
            if await asyncio.to_thread(lambda: places.listens(work.port, process.pids)):
                self._set_ready(attempt)
                return
            if not attempt.port_taken:
                attempt.port_taken = True
                log.warning("port %d of %s is another process's: not taken for its server", work.port, work.name)
            attempt.probe_at = asyncio.get_running_loop().time() + PLAIN_PROBE
        finally:
            attempt.probing = False
            self._probe_wake.set()

    def _set_ready(self, attempt: Attempt) -> None:
        if attempt.ready or attempt.stage not in ("running", "stopping"):
            return
        attempt.ready = True
        start = attempt.start
        self._outbox.add(Ready(work=start.work, call=start.call, attempt=start.attempt, at=time.time()))


# ---- helpers ---------------------------------------------------------------------------------------------------------


def check_ops(ops: list[Op]) -> None:
    """Raises StateTypeError, saying which operation is no RFC 6902 operation."""
    for index, op in enumerate(ops):
        kind, path = op.get("op"), op.get("path")
        if kind not in ("add", "remove", "replace", "move", "copy", "test"):
            raise StateTypeError(f"operation {index}: op {kind!r} is not one of add, remove, replace, move, copy, test")
        paths = [path, op.get("from")] if kind in ("move", "copy") else [path]
        for pointer in paths:
            if not isinstance(pointer, str) or not pointer.startswith("/"):
                raise StateTypeError(f"operation {index}: {pointer!r} is no pointer to a variable, like /retrain")
        if kind in ("add", "replace", "test") and "value" not in op:
            raise StateTypeError(f"operation {index}: {kind} needs a value")


def _line(message: Told) -> bytes:
    return encode(message) + b"\n"


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size
    except FileNotFoundError:
        return 0


def _little_space(*folders: Path) -> str:
    """What to add to a failure if the disk of one of these folders is full, or nearly."""
    for folder in folders:
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(folder).free
            if free < LITTLE_SPACE:
                return f" (the disk that holds {folder} is full: {free // 1024} KiB are free)"
    return ""


def _explain(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    hint = getattr(error, "hint", "")
    return f"{error} ({hint})" if hint else str(error)


def _redact(text: str, secrets: Mapping[str, str]) -> str:
    """What a script says of its secrets does not travel on."""
    for value in secrets.values():
        if len(value) >= MIN_SECRET:
            text = text.replace(value, "***")
    return text


async def _stop_leftover(process: Process, grace: float) -> None:
    await process.stop(grace)
    process.forget()


async def _see_off(attempt: Attempt) -> None:
    """Its end is recorded; what is left of its descendants may still be ending."""
    if attempt.process is not None:
        await attempt.process.gone()
    attempt.over.set()


async def _stop_process(process: Process, grace: float) -> None:
    await process.stop(grace)


def _header(attempt: Attempt) -> str:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    return f"--- {attempt.start.call} attempt {attempt.start.attempt} {stamp} ---"


def _check_program(argv: list[str], cwd: Path, env: Mapping[str, str], *, shell: bool) -> None:
    """Raises NotFound if the program or the Python script is not there: clearer than what exec or Python say."""
    script = None if shell else script_word(argv, sys.executable)
    if script is not None and not Path(cwd, script).exists():
        raise NotFound(
            f"no script {script!r} in {cwd}",
            hint="paths in a command are relative to the work's cwd (by default the folder of app.py)",
        )
    if os.sep not in argv[0] and shutil.which(argv[0], path=env["PATH"]) is None:
        raise NotFound(f"command not found: {argv[0]} (looked in {env['PATH']})")


def _report(work: PlacedWork) -> WorkReport:
    attempt = work.attempt
    if attempt is None:
        return WorkReport(work=work.name, host=work.host, port=work.port)
    return WorkReport(
        work=work.name,
        host=work.host,
        port=work.port,
        call=attempt.start.call,
        attempt=attempt.start.attempt,
        stage=attempt.stage,
        pid=attempt.process.pid if attempt.process is not None else None,
        ready=attempt.ready,
        ended=attempt.record.ended,
    )
