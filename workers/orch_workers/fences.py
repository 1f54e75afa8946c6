"""An agent shuts older incarnations of its works out of the Drives before it starts anything of them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orch_drive import DriveStore

__all__ = ["Fences"]


class Fences:
    """Those of one incarnation: `epoch`."""

    def __init__(self, drive_url: str, epoch: int) -> None:
        self._drive_url = drive_url
        self._epoch = epoch
        self._stores: dict[str, DriveStore] = {}
        self._set: dict[tuple[str, str], asyncio.Future[None]] = {}

    async def set(self, work: str, drives: Iterable[str]) -> None:
        """Returns when none of these Drives accepts anything more from older incarnations of the work. Each is asked
        once, and again if it failed. Raises DriveStaleEpoch if this incarnation is an older one itself, DriveError."""
        await asyncio.gather(*(self._one(work, drive) for drive in drives))

    async def _one(self, work: str, drive: str) -> None:
        key = work, drive
        asked = self._set.get(key)
        if asked is None or (asked.done() and (asked.cancelled() or asked.exception() is not None)):
            asked = self._set[key] = asyncio.ensure_future(asyncio.to_thread(self._fence, work, drive))
        await asyncio.shield(asked)  # others may wait for it too

    def _fence(self, work: str, drive: str) -> None:
        from orch_drive import DriveError, DriveStore, DriveUnavailable

        try:
            store = self._stores.get(drive)
            if store is None:
                store = self._stores[drive] = DriveStore(self._drive_url, drive)
            store.fence(work, self._epoch)
        except DriveError:
            raise
        except Exception as error:  # whatever the library of some other storage raises
            raise DriveUnavailable(f"the Drive {drive!r} cannot be used: {type(error).__name__}: {error}") from error
