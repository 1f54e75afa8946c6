"""One process: group, waiter, logs to files, signal ladder, exit record. Knows no HTTP.

    Spawner --socket pair--> fork server (zygote.py) --fork--> waiter (waiter.py) --fork--> script

The agent holds only handles. What a handle knows stands in `<record_dir>/<key>.run.json`, how it ended in
`<key>.exit.json`; neither is written by the agent, so one that comes later knows as much as the one that started it.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import weakref
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from orch.paths import write_atomic
from orch_drive import crash
from orch_drive.crash import crash_point
from orch_workers import waiter, zygote

__all__ = ["ExitRecord", "Process", "ProcessSpec", "SpawnError", "Spawner"]

log = logging.getLogger(__name__)

if crash.armed():
    waiter.crash_point = crash_point

POLL = 0.02
"""Seconds between looks where the system cannot tell of an end by itself (not on Linux)."""
PATIENCE = 5.0
"""Seconds beyond the grace after which a waiter that does not do its work is no longer relied on."""


class SpawnError(Exception):
    """The attempt could not be started: no process was left behind.

    `message` is one line naming what failed; `traceback` is the user's, when app.py cannot be imported, else "".
    """

    def __init__(self, message: str, traceback: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.traceback = traceback


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """What to run: a command, or (with `python`) a Python Work in a fork of the warm fork server."""

    key: str
    """Names the attempt, "<call>.<attempt>": safe as a file name, used once."""
    argv: list[str]
    cwd: str
    env: dict[str, str]
    """The whole environment; nothing is inherited."""
    log: str
    """Path; standard output and error are appended to it."""
    grace: float = 10.0
    """Seconds between TERM and KILL."""
    lease: float | None = None
    """Seconds after the last contact (`Spawner.note_contact`) at which the waiter stops the script by itself."""
    lease_grace: float = 10.0
    """The grace of that stop."""
    header: str = ""
    """Written to the log as a line of its own before the start. Must hold no secrets."""
    python: dict[str, Any] | None = None
    """JSON payload for `orch_workers.pywork.main`."""


@dataclass(frozen=True, slots=True)
class ExitRecord:
    """How the main process of an attempt ended."""

    key: str
    exit_code: int | None = None
    """None if a signal ended it, or nobody knows."""
    signal: int | None = None
    at: float = 0.0
    """Seconds since the epoch."""
    error: str = ""
    """The command could not be started: what and where, in one line. `exit_code` is then 126 or 127, as in a shell."""
    stopped: bool = False
    """Its waiter had been asked to stop it."""
    cut: bool = False
    """Its lease had run out, or its guard had ended."""
    lost: bool = False
    """The waiter is gone and left no record."""

    @property
    def signal_name(self) -> str | None:
        """E.g. "SIGKILL"; None if no signal ended it."""
        if self.signal is None:
            return None
        try:
            return signal.Signals(self.signal).name
        except ValueError:  # a real-time signal
            return f"signal {self.signal}"


class Process:
    """Handle of one attempt's process; it can be stored and made again, and need not have been started from here."""

    def __init__(self, record_dir: Path, record: dict[str, Any]) -> None:
        self.record_dir = record_dir
        self.key: str = record["key"]
        self.pid: int = record["pid"]
        self.pgid: int = record["pgid"]
        self.waiter_pid: int = record["waiter_pid"]
        self.started_at: float = record["at"]
        self.argv: list[str] = record["argv"]
        self._pid_start: str = record["pid_start"]
        self._waiter_start: str = record["waiter_start"]
        self._boot_id: str = record["boot_id"]

    def __repr__(self) -> str:
        return f"<Process {self.key} pid={self.pid}>"

    def to_json(self) -> dict[str, Any]:
        """The run record: JSON."""
        return {
            "key": self.key,
            "waiter_pid": self.waiter_pid,
            "waiter_start": self._waiter_start,
            "pid": self.pid,
            "pid_start": self._pid_start,
            "pgid": self.pgid,
            "boot_id": self._boot_id,
            "at": self.started_at,
            "argv": self.argv,
        }

    @classmethod
    def from_json(cls, record_dir: Path, data: dict[str, Any]) -> Process:
        return cls(record_dir, data)

    # -- what is

    @property
    def alive(self) -> bool:
        """Whether the main process or its waiter lives: this very incarnation, by start time and boot."""
        return self._main_lives() or self._waiter_lives()

    @property
    def pids(self) -> list[int]:
        """The main process and what lives of its descendants (Linux; elsewhere the main process alone)."""
        return [self.pid, *(stat.pid for stat in waiter.descendants(self.waiter_pid) if stat.pid != self.pid)]

    @property
    def ended(self) -> ExitRecord | None:
        """The exit record, if there is one now."""
        try:
            with open(self._path("exit")) as file:
                record = json.load(file)
        except FileNotFoundError:
            return None
        fields = {name: record[name] for name in ("key", "exit_code", "signal", "at", "error", "stopped")}
        return ExitRecord(**fields, cut=record.get("cut", False))

    async def wait(self) -> ExitRecord:
        """Returns once the main process has ended, even if that was long ago.

        Without a waiter there is no record: what is left of the attempt is then killed, and the answer says `lost`.
        """
        bell = asyncio.Event()
        # Listen first, look then: what happens between the two rings the bell.
        with _records(self.record_dir).listen(f"{self.key}.exit.json", bell.set):
            async with _on_exit(self.waiter_pid, self._waiter_lives, bell.set):
                while True:
                    bell.clear()
                    waiting = self._waiter_lives()
                    record = self.ended
                    if record is not None:
                        return record
                    if not waiting:
                        break
                    await bell.wait()
        await self._kill_what_is_left()
        return ExitRecord(self.key, lost=True)

    async def gone(self) -> None:
        """Returns once the waiter is gone: then no descendant is left (except after `lost`, see `wait`)."""
        bell = asyncio.Event()
        async with _on_exit(self.waiter_pid, self._waiter_lives, bell.set):
            while self._waiter_lives():
                await bell.wait()
                bell.clear()
        if self._group_lives():  # it was killed before it had ended them
            await self._kill_what_is_left()

    # -- what to do

    async def stop(self, grace: float) -> None:
        """TERM to the whole group, KILL after `grace` seconds; returns when nothing is left. Again is harmless: another
        grace can only bring the end nearer. The waiter does it, also if this agent dies meanwhile."""
        if self._waiter_lives():
            try:
                waiter.write_record(self._path("stop"), {"grace": grace}, point="agent.stop")
            except OSError as error:  # the waiter then takes the grace that it was started with
                log.warning("the grace of %s cannot be recorded in %s: %s", self.key, self._path("stop"), error)
            self._signal_waiter(signal.SIGTERM)
            crash_point("agent.stop.signalled")
            try:
                async with asyncio.timeout(grace + PATIENCE):
                    await self.gone()
            except TimeoutError:
                log.warning("the waiter %d of %s does not end its processes: killing all", self.waiter_pid, self.key)
                self._signal_waiter(signal.SIGKILL)
                await self.gone()
        if self.ended is None or self._main_lives():
            await self._kill_what_is_left()

    def signal(self, sig: int) -> None:
        """Sends a signal to the whole group; nothing if the main process has ended."""
        if self._main_lives():
            try:
                os.killpg(self.pgid, sig)
            except ProcessLookupError:
                pass

    def forget(self) -> None:
        """Removes the records: the end has been journalled by whom it concerns."""
        # The run record first: an exit record alone says nothing, a run record alone would read as lost.
        for kind in ("run", "exit", "stop"):
            Path(self._path(kind)).unlink(missing_ok=True)
            crash_point("agent.forget", "all" if kind == "stop" else kind)
        waiter.unreserve(self._path("exit"), self.waiter_pid)

    # -- inside

    def _path(self, kind: str) -> str:
        return os.path.join(self.record_dir, f"{self.key}.{kind}.json")

    def _lives(self, pid: int, start: str) -> bool:
        stat = waiter.proc_stat(pid)
        return stat is not None and stat.state not in "ZX" and stat.start == start and self._boot_id == waiter.boot_id()

    def _main_lives(self) -> bool:
        return self._lives(self.pid, self._pid_start)

    def _waiter_lives(self) -> bool:
        return self._lives(self.waiter_pid, self._waiter_start)

    def _group_lives(self) -> bool:
        """Whether there is a group of that number: perhaps a stranger's, if this one is gone."""
        try:
            os.killpg(self.pgid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return True

    def _signal_waiter(self, sig: int) -> None:
        try:
            if sys.platform == "linux":
                fd = os.pidfd_open(self.waiter_pid)
                try:
                    if self._waiter_lives():  # asked after the open: the descriptor names this incarnation or none
                        signal.pidfd_send_signal(fd, sig)
                finally:
                    os.close(fd)
            elif self._waiter_lives():
                os.kill(self.waiter_pid, sig)
        except ProcessLookupError:
            pass

    async def _kill_what_is_left(self) -> None:
        """Without a waiter: KILL to everything of this attempt that can be found, until there is nothing."""
        if self._boot_id != waiter.boot_id():
            return
        pause = 0.005
        while victims := self._strays():
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                except (ProcessLookupError, PermissionError):
                    pass
            pause *= 2
            if pause > PATIENCE:
                log.warning("%s: processes %s do not die", self.key, victims)
                return
            await asyncio.sleep(pause)

    def _strays(self) -> list[int]:
        """Pids of this attempt found without the waiter's help: by session, or by the mark in their environment."""
        if sys.platform != "linux":
            return [-self.pgid] if self._main_lives() else []
        mark = f"ORCH_RUN_RECORD={self._path('run')}".encode()
        leader = waiter.proc_stat(self.waiter_pid)
        # A live process with the waiter's pid is another one, and so is then the session of that number.
        session = self.waiter_pid if leader is None or leader.start == self._waiter_start else None
        found: list[int] = []
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                stat = waiter.proc_stat(int(entry))
                if stat is None or stat.state in "ZX":
                    continue
                if stat.session == session or mark in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                    found.append(stat.pid)
            except (FileNotFoundError, ProcessLookupError, PermissionError):  # ended meanwhile, or another user's
                continue
        return found


# ---- being told instead of asking ------------------------------------------------------------------------------------


@asynccontextmanager
async def _on_exit(pid: int, lives: Callable[[], bool], ring: Callable[[], None]) -> AsyncIterator[None]:
    """Calls `ring` when the process ends, or at once if `lives()` says that it has. It need not be our child."""
    if sys.platform == "linux":
        loop = asyncio.get_running_loop()
        try:
            fd = os.pidfd_open(pid)
        except ProcessLookupError:
            ring()
            yield
            return
        try:
            if not lives():  # asked after the open: from here on the descriptor names the right incarnation
                ring()
            else:

                def ended() -> None:
                    loop.remove_reader(fd)  # it stays readable: once is enough
                    ring()

                loop.add_reader(fd, ended)
            yield
        finally:
            loop.remove_reader(fd)
            os.close(fd)
    else:

        async def look() -> None:
            while lives():  # noqa: ASYNC110  # no event tells of the end of a process that is no child
                await asyncio.sleep(POLL)
            ring()

        task = asyncio.create_task(look(), name=f"watch pid {pid}")
        try:
            yield
        finally:
            task.cancel()


class _Records:
    """Tells of records that appear in one folder: inotify on Linux, regular looks elsewhere."""

    _EVENT = struct.Struct("iIII")
    _IN_MOVED_TO, _IN_Q_OVERFLOW, _IN_FLAGS = 0x80, 0x4000, os.O_NONBLOCK | os.O_CLOEXEC

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.loop = asyncio.get_running_loop()
        self.listeners: dict[str, list[Callable[[], None]]] = {}
        self.fd: int | None = None
        self.timer: asyncio.TimerHandle | None = None

    @contextmanager
    def listen(self, name: str, ring: Callable[[], None]) -> Iterator[None]:
        """Calls `ring` whenever a file of that name is put in place by rename, and perhaps without need."""
        if not self.listeners:
            self._open()
        self.listeners.setdefault(name, []).append(ring)
        try:
            yield
        finally:
            self.listeners[name].remove(ring)
            if not self.listeners[name]:
                del self.listeners[name]
            if not self.listeners:
                self._close()

    def _open(self) -> None:
        if sys.platform == "linux":
            libc = ctypes.CDLL(None, use_errno=True)
            fd = libc.inotify_init1(self._IN_FLAGS)
            if fd >= 0:
                if libc.inotify_add_watch(fd, os.fsencode(self.folder), self._IN_MOVED_TO) >= 0:
                    self.fd = fd
                    self.loop.add_reader(fd, self._read)
                    return
                os.close(fd)
            log.info("no inotify for %s: %s", self.folder, os.strerror(ctypes.get_errno()))
        self._tick()

    def _close(self) -> None:
        if self.fd is not None:
            self.loop.remove_reader(self.fd)
            os.close(self.fd)
            self.fd = None
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None

    def _read(self) -> None:
        assert self.fd is not None
        data = os.read(self.fd, 1 << 16)
        at = 0
        while at < len(data):
            _, mask, _, length = self._EVENT.unpack_from(data, at)
            at += self._EVENT.size + length
            if mask & self._IN_Q_OVERFLOW:
                self._ring_all()
            else:
                for ring in self.listeners.get(os.fsdecode(data[at - length : at].rstrip(b"\0")), ()):
                    ring()

    def _tick(self) -> None:
        self._ring_all()
        self.timer = self.loop.call_later(POLL, self._tick)

    def _ring_all(self) -> None:
        for rings in self.listeners.values():
            for ring in rings:
                ring()


_watched: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[Path, _Records]] = weakref.WeakKeyDictionary()


def _records(folder: Path) -> _Records:
    folders = _watched.setdefault(asyncio.get_running_loop(), {})
    if folder not in folders:
        folders[folder] = _Records(folder)
    return folders[folder]


# ---- starting --------------------------------------------------------------------------------------------------------


class Spawner:
    """Starts processes through fork servers, which it starts when they are needed, and again when one died.

    `record_dir` is where the records go (made if missing), `contact` the file there that leases are counted from.
    `guard`: pid of this process's parent, if nothing that is started may outlive that (Linux). `warm_app` is the app
    file that Python Works need imported, `argv` its arguments. Needs a running event loop; one Spawner belongs to one
    loop.
    """

    def __init__(
        self,
        record_dir: Path,
        *,
        contact: str = "contact",
        guard: int = 0,
        warm_app: str | None = None,
        argv: Sequence[str] = (),
    ) -> None:
        self.record_dir = Path(record_dir).absolute()
        self._contact = self.record_dir / contact
        self._guard = guard
        self.record_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._warm_argv = ["--warm", os.path.abspath(warm_app) if warm_app else "", *argv]
        self._light: _Zygote | None = None
        self._warm: _Zygote | None = None
        self._lock = asyncio.Lock()
        self._warm_lock = asyncio.Lock()
        self._closed = False

    async def start(self, spec: ProcessSpec) -> Process:
        """Returns once the process exists and its start is recorded. A command that cannot be executed is no error
        here: its exit record says so. Asked again for the same key, it answers with what was started the first time.

        Raises SpawnError.
        """
        path = self.record_dir / f"{spec.key}.run.json"
        if os.sep in spec.key or any(character.isspace() for character in spec.key):
            raise SpawnError(f"the key {spec.key!r} is no file name")
        body = json.dumps(asdict(spec)).encode()
        for _ in range(3):
            server = await (self._light_server() if spec.python is None else self._warm_server())
            try:
                crash_point("agent.spawn.due")
                answer = await server.start(spec, body)
                crash_point("agent.spawn.answered")
                return Process(self.record_dir, answer)
            except _ServerGone as gone:
                # Nobody is left who could start it, and the record, if there is one, is on disk: asking again is safe.
                reason = str(gone)
            except SpawnError:
                if not path.exists():
                    raise
            if path.exists():
                return Process(self.record_dir, json.loads(path.read_text()))
        raise SpawnError(f"{spec.key} was not started: {reason}")

    async def warm(self) -> None:
        """Starts the fork server for Python Works and waits until it has imported app.py. Raises SpawnError."""
        await self._warm_server()

    def note_contact(self, at: float) -> None:
        """The flow was in contact at `at` (seconds, `waiter.steady`): what leases count from. Raises OSError."""
        write_atomic(self._contact, repr(at).encode())

    async def aclose(self) -> None:
        """Stops the fork servers; what they started goes on."""
        self._closed = True
        async with self._lock, self._warm_lock:
            for server in (self._light, self._warm):
                if server is not None:
                    await server.aclose()
            self._light = self._warm = None

    @staticmethod
    def adopt(record_dir: Path) -> list[Process]:
        """Every attempt that has a run record: alive, ended or lost, which `Process.wait` tells."""
        folder = Path(record_dir).absolute()
        processes: list[Process] = []
        for path in sorted(folder.glob("*.run.json")):
            try:
                processes.append(Process(folder, json.loads(path.read_text())))
            except (ValueError, KeyError, TypeError) as error:
                log.error("%s is no run record, its process is not adopted: %s", path, error)
        return processes

    async def _light_server(self) -> _Zygote:
        async with self._lock:
            if self._light is None or not self._light.open:
                self._light = await self._open(self._light, [])
            return self._light

    async def _warm_server(self) -> _Zygote:
        async with self._warm_lock:
            if self._warm is None or not self._warm.open:
                self._warm = await self._open(self._warm, self._warm_argv)
            return self._warm

    async def _open(self, old: _Zygote | None, warm: list[str]) -> _Zygote:
        if self._closed:
            raise SpawnError("the agent is stopping")
        if old is not None:
            await old.aclose()
        return await _Zygote.launch(self.record_dir, [str(self._contact), str(self._guard)], warm)


class _ServerGone(Exception):
    """A fork server ended while it had requests."""


class _Zygote:
    """A running fork server and the requests that it has not answered."""

    def __init__(
        self, child: subprocess.Popen[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self.child = child
        self.reader = reader
        self.writer = writer
        self.pending: dict[str, asyncio.Future[dict[str, Any]]] = {}
        self.open = True
        self.replies: asyncio.Task[None] | None = None

    @classmethod
    async def launch(cls, record_dir: Path, bounds: list[str], warm: list[str]) -> _Zygote:
        """Starts it and waits until it is ready. Raises SpawnError."""
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                child = cls._popen(record_dir, bounds, warm, theirs)
            except OSError as error:
                ours.close()
                raise SpawnError(f"the fork server cannot be started: {error}") from error
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 22)
        server = cls(child, reader, writer)
        try:
            answer = json.loads(await reader.readline() or b"null")
            if answer is None:
                raise SpawnError(f"the fork server ended before it was ready, see {cls._log(record_dir, warm)}")
            if not answer["ready"]:
                raise SpawnError(answer["error"], answer["traceback"])
        except BaseException:
            await server.aclose()
            raise
        server.replies = asyncio.create_task(server._read(), name=f"replies of fork server {child.pid}")
        return server

    @staticmethod
    def _log(record_dir: Path, warm: list[str]) -> Path:
        return record_dir / ("warm.log" if warm else "zygote.log")

    @classmethod
    def _popen(
        cls, record_dir: Path, bounds: list[str], warm: list[str], control: socket.socket
    ) -> subprocess.Popen[bytes]:
        # Light: isolated, without site-packages. Warm: with what the user installed, but never the cwd on sys.path.
        flags = ["-P"] if warm else ["-I", "-S", "-X", "utf8"]
        command = [sys.executable, *flags, zygote.__file__, str(record_dir), *bounds, *warm]
        cwd = os.path.dirname(warm[1]) if warm and warm[1] else None
        output = os.open(cls._log(record_dir, warm), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            return subprocess.Popen(
                command,
                stdin=control.fileno(),
                stdout=output,
                stderr=output,
                cwd=cwd,
                env={**os.environ, crash.HOME: str(Path(crash.__file__).parents[1])} if crash.armed() else None,
                start_new_session=True,
            )
        finally:
            os.close(output)

    async def start(self, spec: ProcessSpec, body: bytes) -> dict[str, Any]:
        key = spec.key
        if key in self.pending:
            return await asyncio.shield(self.pending[key])
        if not self.open:
            raise _ServerGone("the fork server has ended")
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.pending[key] = answer
        lease = "-" if spec.lease is None else f"{spec.lease}:{spec.lease_grace}"
        self.writer.write(b"%s %r %s %s\n" % (key.encode(), float(spec.grace), lease.encode(), body))
        return await answer

    async def _read(self) -> None:
        try:
            while line := await self.reader.readline():
                self._take(json.loads(line))
        except ConnectionError:
            pass
        finally:
            # End of file: the fork server is gone, and with it every waiter that had not answered.
            self.open = False
            for answer in self.pending.values():
                if not answer.done():
                    answer.set_exception(_ServerGone("the fork server ended"))
            self.pending.clear()

    def _take(self, message: dict[str, Any]) -> None:
        key = message.get("started") or message.get("failed") or message["reaped"]
        answer = self.pending.pop(key, None)
        if answer is None or answer.done():
            return
        if "started" in message:
            answer.set_result(message)
        else:
            answer.set_exception(SpawnError(message.get("error", "its waiter was killed before the start")))

    async def aclose(self) -> None:
        self.open = False
        self.writer.close()
        if self.replies is not None:
            self.replies.cancel()
            await asyncio.gather(self.replies, return_exceptions=True)
        bell = asyncio.Event()
        async with _on_exit(self.child.pid, lambda: self.child.poll() is None, bell.set):
            try:
                async with asyncio.timeout(2.0):
                    while self.child.poll() is None:
                        await bell.wait()
                        bell.clear()
            except TimeoutError:  # e.g. an app.py that never finishes its import
                self.child.kill()
        self.child.wait()
