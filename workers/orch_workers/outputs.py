"""A script's files on the Drive: inputs before it starts, outputs while it runs and at its end, reloads of a service.

Everything here blocks; the agent calls it in threads, one call at a time for an attempt.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orch.wire import StartCall
from orch_drive import DriveConflict, DriveNotFound
from orch_drive.crash import crash_point
from orch_drive.drafts import OWN_FOLDER

if TYPE_CHECKING:
    from watchfiles._rust_notify import RustNotify

    from orch_drive import DriveStore, Manifest

__all__ = ["FileTransfer", "drives_of", "split_owner"]

log = logging.getLogger(__name__)

Fingerprint = tuple[tuple[str, int, int], ...]

_QUIET = 1.0
"""Seconds for which a file has to be left alone before an unfinished version takes it over; at most half a sync."""
_LONG = 1.0
"""Seconds after which a transfer is spoken of."""
_SAID_EVERY = 0.5
_ANYWAY = 15
"""Syncs after which an output is looked through although nothing was heard of it."""
_GROWS = (".csv", ".jsonl", ".ndjson", ".log", ".txt")
"""Files of these kinds may be cut at any place: they need not be quiet. So do TensorBoard's."""


def split_owner(path: str) -> tuple[str | None, str]:
    """`trainer:logs` -> ("trainer", "logs"), `*:logs` -> ("*", "logs"), `logs` -> (None, "logs")."""
    owner, colon, rest = path.partition(":")
    return (owner, rest) if colon and "/" not in owner else (None, path)


def drives_of(start: StartCall) -> set[str]:
    """Ids of the Drives that the script's files go to."""
    return {_drive_id(start)} if start.outputs else set()


def _drive_id(start: StartCall) -> str:
    from orch_drive.drive import APP_DRIVE, Drive

    return APP_DRIVE if not start.drive else Drive.from_state(start.drive).id


class FileTransfer:
    """The files of one attempt.

    Args:
        start: says which paths, and on which Drive.
        cwd: what they are relative to.
        drive_url: where the app's Drives live.
        epoch: of this agent; a newer one that has published fences it off.
        on_published: called, from the calling thread, with (Drive id, manifest as JSON) for each new version.
        on_moving: called, from the calling thread, with how far inputs and complete outputs are, when they take long;
            with an empty text when they are there.
        writers: (work, path) of every output that other works of this machine are writing now.
    """

    def __init__(
        self,
        start: StartCall,
        *,
        cwd: Path,
        drive_url: str,
        epoch: int,
        on_published: Callable[[str, dict[str, Any]], None],
        on_moving: Callable[[str], None] = lambda text: None,
        writers: Callable[[], list[tuple[str, Path]]],
    ) -> None:
        self._start = start
        self._cwd = cwd.resolve()
        self._host = socket.gethostname()
        self._drive_url = drive_url
        self._epoch = epoch
        self._on_published = on_published
        self._on_moving = on_moving
        self._writers = writers
        self._store_: DriveStore | None = None
        self._reported: dict[str, int] = {}
        self._synced: dict[str, Fingerprint] = {}
        self._loaded: dict[str, int] = {}
        self._watches: dict[str, _Watch] = {}
        self._seen: dict[str, tuple[int, int, float]] = {}
        self._quiet = min(_QUIET, start.sync_interval / 2)

    def output_paths(self) -> list[Path]:
        """Absolute."""
        return [self._cwd / path for path in self._start.outputs]

    # -- before the start

    def prepare(self) -> None:
        """Puts every input into the cwd, merged over what is there; a first attempt forgets unfinished versions.

        Raises DriveNotFound for a missing input, DriveConflict for a file that another work is writing, and what the
        Drive raises; all name the path.
        """
        for path in self._start.inputs:
            if not self._fetch(path, partial=False) and not self._may_be_missing(path):
                where = f"neither on the Drive {_drive_id(self._start)!r} nor in {self._cwd}"
                raise DriveNotFound(
                    f"the input {path!r} of {self._start.work} is {where}",
                    hint="publish it first: as another work's output, with Drive.put, or with `orch drive put`",
                )
        if self._start.attempt == 1:
            for path in self._start.outputs:
                self._store.discard_partial(self._start.work, path)
        for path in self._start.reload:
            self._fetch(path, partial=True)

    def _may_be_missing(self, path: str) -> bool:
        _, name = split_owner(path)
        return name in self._start.outputs or (self._cwd / name).exists()

    # -- while it runs

    def sync(self, *, ended: bool = False) -> None:
        """Publishes a partial version of each output that changed, and fetches each reload that changed. A file that is
        being written stays as it was until it is quiet, or the script has `ended`. Raises what the Drive raises; the
        next sync tries again."""
        for path in self._start.outputs:
            source = self._cwd / path
            watch = self._watches.setdefault(path, _Watch(source))
            if not watch.changed() and not ended:
                continue
            found = _fingerprint(source)
            if found is not None and self._synced.get(path) != found:
                busy = set() if ended else self._busy(source, found)
                if not (busy and busy.issuperset(self._news(path, found))):
                    self._publish(path, partial=True, leave=busy)
                if busy:
                    continue
                self._synced[path] = found
            watch.settled()
        if ended:
            self._watches.clear()
        for path in self._start.reload:
            self._fetch(path, partial=True)

    def _news(self, path: str, found: Fingerprint) -> set[str]:
        """Names of the files that changed since they were last published."""
        return {row[0] for row in set(found).difference(self._synced.get(path, ()))}

    def _busy(self, source: Path, found: Fingerprint) -> set[str]:
        """Names of the files that somebody may still be writing to.

        The file's time is enough if it lies back; where the file system's clock is another, it is the second look at
        the same size and time that shows it.
        """
        now, clock = time.monotonic(), time.time()
        busy: set[str] = set()
        for name, size, mtime_ns in found:
            where = os.path.join(source, name) if name else str(source)
            last = os.path.basename(where)
            if "tfevents" in last or last.endswith(_GROWS) or clock - mtime_ns / 1e9 >= self._quiet:
                self._seen.pop(where, None)
                continue
            seen = self._seen.get(where)
            if seen is None or seen[:2] != (size, mtime_ns):
                self._seen[where] = (size, mtime_ns, now)
                busy.add(name)
            elif now - seen[2] < self._quiet:
                busy.add(name)
        return busy

    # -- at its end

    def finish(self) -> list[str]:
        """Commits one complete version of each output; returns the Drive paths.

        Raises DriveNotFound naming the outputs that are missing (then nothing is committed), and what the Drive raises.
        """
        missing = [path for path in self._start.outputs if not (self._cwd / path).exists()]
        if missing:
            names = ", ".join(map(repr, missing))
            raise DriveNotFound(
                f"the script ended well, but its output {names} is not in {self._cwd}",
                hint="outputs are relative to the work's cwd",
            )
        for path in self._start.outputs:
            self._publish(path, partial=False)
        self._watches.clear()
        return list(self._start.outputs)

    # -- inside

    @property
    def _store(self) -> DriveStore:
        if self._store_ is None:
            from orch_drive import DriveStore

            self._store_ = DriveStore(self._drive_url, _drive_id(self._start))
        return self._store_

    def _publish(self, path: str, *, partial: bool, leave: Collection[str] = ()) -> None:
        with _Meter(f"publishing {path}", self._on_moving) as meter:
            manifest = self._store.publish(
                self._start.work,
                path,
                self._cwd / path,
                partial=partial,
                epoch=self._epoch,
                call=self._start.call,
                host=self._host,
                cwd=str(self._cwd),
                root=self._cwd,
                progress=None if partial else meter,
                leave=leave,
            )
        crash_point("agent.published")
        if self._reported.get(path) != manifest.serial:
            self._reported[path] = manifest.serial
            from orch_drive.manifest import to_json

            self._on_published(manifest.drive, to_json(manifest))

    def _fetch(self, path: str, *, partial: bool) -> bool:
        """False if nobody has published the path."""
        owner, name = split_owner(path)
        if owner == "*":
            index = self._store.index()
            owners = index.owners(name, partial=partial)
            for each in owners:
                self._put_here(path, index.resolve(name, component=each, partial=partial), Path(name, each))
            return bool(owners)
        manifest = self._store.resolve(name, component=owner, partial=partial)
        if manifest is None:
            return False
        self._put_here(path, manifest, Path(name))
        return True

    def _put_here(self, path: str, manifest: Manifest | None, place: Path) -> None:
        if manifest is None:
            return
        mark = f"{path}\0{manifest.component}"
        if self._loaded.get(mark) == manifest.serial:
            return
        dest = self._cwd / place
        from_here = (manifest.host, manifest.cwd) == (self._host, str(self._cwd))
        if from_here and (self._cwd / manifest.path).exists():
            return
        writers = [(work, output) for work, output in self._writers() if _touch(output, dest)]

        def refuse(name: str) -> bool:
            target = dest / name if manifest.is_dir else dest
            for work, output in writers:
                entry = manifest.entry(name)
                if _touch(output, target) and entry is not None and not _is(target, entry.size, entry.sha256):
                    raise DriveConflict(
                        f"{self._start.work} needs {path!r} in {target}, where {work} is writing its output",
                        hint="give one of them another cwd",
                    )
            return False

        with _Meter(f"fetching {path}", self._on_moving) as meter:
            skip = refuse if writers else None
            self._store.fetch(manifest, dest, skip=skip, progress=meter if path in self._start.inputs else None)
        self._loaded[mark] = manifest.serial


class _Meter:
    """Says how far a transfer is, if it takes long, and then at most twice a second."""

    def __init__(self, what: str, say: Callable[[str], None]) -> None:
        self._what = what
        self._say = say
        self._next = time.monotonic() + _LONG
        self._said = False

    def __enter__(self) -> _Meter:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._said:
            self._say("")

    def __call__(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now >= self._next and done < total:
            self._next = now + _SAID_EVERY
            self._said = True
            self._say(f"{self._what}: {_amounts(done, total)}")


def _amounts(done: int, total: int) -> str:
    """For example `1.2 of 5.0 GiB`."""
    power = min(4, max(0, total.bit_length() - 1) // 10)
    unit = ("B", "KiB", "MiB", "GiB", "TiB")[power]
    return f"{done / 1024**power:.1f} of {total / 1024**power:.1f} {unit}"


class _Watch:
    """Says whether something below an output may have changed, without walking through it.

    The kernel tells (watchfiles); where it cannot, or has run out of watches, the answer is always yes. So it is for a
    single file, for a folder that was just made or replaced, and now and then in any case.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._notify: RustNotify | None = None
        self._place: tuple[int, int] | None = None
        self._dirty = True
        self._looks = 0

    def changed(self) -> bool:
        try:
            status = os.stat(self._path)
        except FileNotFoundError:
            self._place = self._notify = None
            self._dirty = True
            return False
        if not self._path.is_dir():
            return True
        self._looks += 1
        if (status.st_dev, status.st_ino) != self._place:
            self._place = status.st_dev, status.st_ino
            self._notify = self._begin()
            self._dirty = True
        elif self._notify is None or self._looks % _ANYWAY == 0 or self._notify.watch(1, 1, 1, None) != "timeout":
            self._dirty = True
        return self._dirty

    def settled(self) -> None:
        """All that has been heard of is published."""
        self._dirty = False

    def _begin(self) -> RustNotify | None:
        try:
            from watchfiles._rust_notify import RustNotify

            return RustNotify([str(self._path)], False, False, 300, True, True)
        except (ImportError, OSError, RuntimeError) as error:
            log.info("%s is not watched but looked through at each sync: %s", self._path, error)
            return None


def _touch(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _is(path: Path, size: int, sha256: str) -> bool:
    try:
        if path.stat().st_size != size:
            return False
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except FileNotFoundError:
        return False


def _fingerprint(path: Path) -> Fingerprint | None:
    """Name below the path, size and time of every file; None if there is nothing. No file is opened."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    if not path.is_dir():
        return (("", status.st_size, status.st_mtime_ns),)
    return tuple(sorted(_files(str(path), "")))


def _files(folder: str, above: str) -> Iterator[tuple[str, int, int]]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name == OWN_FOLDER:
                    continue
                if entry.is_dir(follow_symlinks=False):
                    yield from _files(entry.path, f"{above}{entry.name}/")
                    continue
                try:
                    status = entry.stat()
                except FileNotFoundError:  # vanished, or a dangling link
                    continue
                yield above + entry.name, status.st_size, status.st_mtime_ns
    except FileNotFoundError:
        return
