"""What an agent reports, in order: numbered, coalesced, resent until the flow has journalled it."""

from __future__ import annotations

import asyncio
import http.client
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from orch.peer import HttpPeer
from orch.wire import PROTOCOL, Ended, Item, ItemResult, Progress, PushReply, Started, decode, encode
from orch_drive.crash import crash_point
from orch_workers.waiter import steady

__all__ = ["Outbox"]

log = logging.getLogger(__name__)

MAX_ITEMS = 500
MAX_BYTES = 1 << 20
RETRY_FIRST = 0.1
RETRY_MOST = 2.0
BEAT_TIMEOUT = 5.0


@dataclass(slots=True)
class _Entry:
    seq: int
    raw: bytes
    sent: bool = False


class _RawPush(msgspec.Struct):
    agent: str
    epoch: int
    seq: int
    items: list[msgspec.Raw]
    protocol: int = PROTOCOL


class Outbox:
    """The ordered list of what the flow has not journalled yet, and the one task that pushes it.

    An item is encoded when it is added, so it says what was true then; only progress that has not been sent is replaced
    by newer progress of the same call. Results and the fence are told to the callbacks in the event loop."""

    def __init__(
        self,
        agent: str,
        epoch: int,
        token: str,
        flow_url: str,
        *,
        on_result: Callable[[ItemResult], None],
        on_acked: Callable[[int], None],
        on_fenced: Callable[[], None],
        on_contact: Callable[[float], None],
    ) -> None:
        """`on_contact` is given the moment (`waiter.steady`) at which the answered push was sent."""
        self._agent = agent
        self._epoch = epoch
        self._token = token
        self.flow_url = flow_url
        self._on_result = on_result
        self._on_acked = on_acked
        self._on_fenced = on_fenced
        self._on_contact = on_contact
        self._entries: deque[_Entry] = deque()
        self._progress: dict[str, tuple[_Entry, Progress]] = {}
        self._wake = asyncio.Event()
        self._retry = asyncio.Event()
        self._empty = asyncio.Event()
        self._empty.set()
        self._peer = HttpPeer()
        self._pulse = HttpPeer(BEAT_TIMEOUT)  # a push may wait behind a pass, a heartbeat must not
        self.seq = 0
        self.acked = 0

    def add(self, item: Item) -> int:
        """Append an item; returns its number."""
        if isinstance(item, Progress):
            waiting = self._progress.get(item.call)
            if waiting is not None and not waiting[0].sent:
                entry, before = waiting
                merged = Progress(
                    work=item.work,
                    call=item.call,
                    progress=before.progress if item.progress is None else item.progress,
                    metrics={**before.metrics, **item.metrics},
                    moving=before.moving if item.moving is None else item.moving,
                )
                entry.raw = encode(merged)
                self._progress[item.call] = (entry, merged)
                return entry.seq
        self.seq += 1
        entry = _Entry(self.seq, encode(item))
        self._entries.append(entry)
        if isinstance(item, Progress):
            self._progress[item.call] = (entry, item)
        elif isinstance(item, Started | Ended):
            self._progress.pop(item.call, None)
        self._empty.clear()
        self._wake.set()
        return self.seq

    def attached(self, flow_url: str, acked: int) -> None:
        """The flow has said where it is and what it has journalled."""
        self.flow_url = flow_url
        self._acknowledge(acked)
        self._retry.set()

    async def flushed(self, timeout: float) -> bool:
        """True once everything added so far is journalled; False if that takes longer than `timeout` seconds."""
        try:
            await asyncio.wait_for(self._empty.wait(), timeout)
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Push until cancelled or fenced."""
        delay = RETRY_FIRST
        told = False
        while True:
            await self._wake.wait()
            batch = self._batch()
            if not batch:
                self._wake.clear()
                continue
            self._retry.clear()
            sent = steady()
            try:
                crash_point("agent.push.due")
                status, body = await self._post(self._peer, batch[0].seq, [msgspec.Raw(entry.raw) for entry in batch])
                crash_point("agent.push.answered")
                problem = "" if status == 200 else f"HTTP {status}: {body[:300].decode(errors='replace')}"
                reply = decode(PushReply, body) if status == 200 else PushReply(acked=self.acked)
            except (OSError, http.client.HTTPException, msgspec.MsgspecError) as error:
                status, problem = 0, f"{type(error).__name__}: {error}"
            if status == 200:
                if told:
                    log.info("the flow answers again")
                delay, told = RETRY_FIRST, False
                self._on_contact(sent)
                for result in reply.results:
                    self._on_result(result)
                self._acknowledge(reply.acked)
                continue
            if status == 409:
                self._fenced()
                return
            if not told:
                log.warning("the flow at %s does not take what is reported (%s); it is kept", self.flow_url, problem)
                told = True
            try:
                await asyncio.wait_for(self._retry.wait(), delay)
                delay = RETRY_FIRST
            except TimeoutError:
                delay = min(RETRY_MOST, delay * 2)

    async def beat(self) -> bool:
        """A heartbeat: True if the flow has answered it."""
        sent = steady()
        try:
            status, _ = await self._post(self._pulse, self.seq + 1, [])
        except (OSError, http.client.HTTPException):
            return False
        if status == 200:
            self._on_contact(sent)
        elif status == 409:
            self._fenced()
        return status == 200

    def close(self) -> None:
        self._peer.close()
        self._pulse.close()

    async def _post(self, peer: HttpPeer, seq: int, items: list[msgspec.Raw]) -> tuple[int, bytes]:
        push = _RawPush(self._agent, self._epoch, seq, items)
        return await peer.post(self.flow_url + "/agents/v1/push", msgspec.json.encode(push), self._token)

    def _fenced(self) -> None:
        log.warning("this agent (epoch %d) has been replaced by a newer one", self._epoch)
        self._on_fenced()

    def _batch(self) -> list[_Entry]:
        batch: list[_Entry] = []
        size = 0
        for entry in self._entries:
            if batch and (len(batch) >= MAX_ITEMS or size + len(entry.raw) > MAX_BYTES):
                break
            batch.append(entry)
            size += len(entry.raw)
            entry.sent = True
        return batch

    def _acknowledge(self, acked: int) -> None:
        if acked > self.seq:
            raise RuntimeError(f"the flow acknowledges item {acked}, the last one given out is {self.seq}")
        if acked <= self.acked:
            return
        while self._entries and self._entries[0].seq <= acked:
            self._entries.popleft()
        self._progress = {call: kept for call, kept in self._progress.items() if kept[0].seq > acked}
        self.acked = acked
        self._on_acked(acked)
        if not self._entries:
            self._empty.set()
