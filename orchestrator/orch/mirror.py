"""Logs of calls that run on another machine, brought to this one: whole and in order, a piece at a time.

The copy's own size is where it goes on, so nothing is fetched twice and nothing is missing, whoever dies between. Where
the next attempt of a call is started on another machine, its log goes on there: that agent is told from where
(`log_from`).
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import os
from pathlib import Path

from orch.peer import HttpPeer
from orch_drive.crash import crash_point

__all__ = ["LogMirror"]

log = logging.getLogger(__name__)

SOON, LATE = 0.2, 3.0
"""Seconds between looks at a log that grows, and at one that is quiet."""
PATIENCE = 5.0
"""Seconds in which a log is completed before its call's end is told; what is missing then follows."""
TIMEOUT = 5.0


class LogMirror:
    """The logs of one agent's calls. Used from one event loop."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._peer = HttpPeer(TIMEOUT, name="orch-logs")
        self._url = self._token = ""
        self._place = 0
        self._closed = False
        self.hurry = False
        """The agent is about to leave."""
        self._told = ""
        self._open: dict[tuple[str, str], None] = {}
        self._ended: set[tuple[str, str]] = set()
        self._turn = asyncio.Lock()
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def follow(self, url: str, token: str, place: int) -> None:
        """Where the agent is now. In another place there is nothing of what was written in the one before."""
        if place != self._place:
            self._open.clear()
            self._ended.clear()
        self._url, self._token, self._place = url, token, place
        self._wake.set()

    def add(self, work: str, call: str, *, ended: bool = False) -> None:
        """`ended`: it grows no more, and needs to be brought once."""
        self._open[work, call] = None
        if ended:
            self._ended.add((work, call))
        self._wake.set()
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._run(), name="orch-mirror")

    def size(self, work: str, call: str) -> int:
        """Bytes that are here."""
        path = self._path(work, call)
        return path.stat().st_size if path.exists() else 0

    def _path(self, work: str, call: str) -> Path:
        return self._logs / work / f"{call}.log"

    async def complete(self, work: str, call: str) -> None:
        """The call has ended: returns when its log is here, or after `PATIENCE`."""
        self.add(work, call, ended=True)
        try:
            async with asyncio.timeout(PATIENCE):
                while (work, call) in self._open and not self._closed:
                    if not await self._bring(work, call):
                        await asyncio.sleep(SOON)
        except TimeoutError:
            log.warning("the log of %s is not complete yet", call)

    async def close(self) -> None:
        self._closed = True
        if self._task is not None:
            self._task.cancel()
        await asyncio.to_thread(self._peer.close)

    async def _run(self) -> None:
        delay = SOON
        while True:
            grown = False
            for work, call in list(self._open):
                grown |= bool(await self._bring(work, call))
            delay = SOON if grown or self.hurry else min(LATE, delay * 1.5)
            self._wake.clear()
            try:
                async with asyncio.timeout(delay if self._open else None):
                    await self._wake.wait()
                    delay = SOON
            except TimeoutError:
                pass

    async def _bring(self, work: str, call: str) -> bool | None:
        """What there is more of one log, to its present end. True if there was any; None if the agent does not
        answer."""
        grown = False
        async with self._turn:
            while (work, call) in self._open and not self._closed:
                place = self._place
                try:
                    offset = self.size(work, call)
                    status, data = await self._peer.get(
                        f"{self._url}/v1/logs/{work}/{call}?offset={offset}", self._token
                    )
                    if (status != 200 and status != 404) or place != self._place:
                        return None
                    if status == 200 and data:
                        grown = True
                        await asyncio.to_thread(_append, self._path(work, call), data)
                        continue
                except (OSError, http.client.HTTPException) as error:
                    self._tell(call, error)
                    return None
                if (work, call) in self._ended:
                    self._ended.discard((work, call))
                    del self._open[work, call]
                return grown
        return grown

    def _tell(self, call: str, error: Exception) -> None:
        """A disk that is full is worth a line; an agent that does not answer is somebody else's business."""
        path = getattr(error, "filename", None)
        if path is None:
            log.debug("log of %s: %s", call, error)
        elif str(error) != self._told:
            self._told = str(error)
            log.warning("the log of %s cannot be written, trying again: %s", call, error)


def _append(path: Path, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as file:
        file.write(data)
    crash_point("flow.log.appended")
