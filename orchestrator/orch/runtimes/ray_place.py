"""The place of one Work on a machine of a Ray cluster: the actor that owns the Work's agent.

Ray gets this class by value, so it needs nothing of orch in the actor's process; the agent that it starts needs orch to
be installed there, or shipped. The agent dies with the actor (`bound` in its spec), and its scripts are stopped.

    <home>/<app id>/<agent>/<actor id>/    the agent's orch_dir: run/ (spec, records), logs/, works/

`home` is $ORCH_NODE_DIR, or a folder of this user's own among the temporary files.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from pathlib import Path
from typing import Any

__all__ = ["APP_FOLDER", "Place", "cleared"]

APP_FOLDER = "orch-app"
"""Folder of the app in what Ray unpacks: a level down and no identifier, because Ray puts the top on PYTHONPATH, where
a user's `queue.py` would be taken for the standard library's by Ray's own process."""
START_TIMEOUT = 30.0
LOOK_EVERY = 0.01
UNUSED = 120.0
"""Seconds after which a place leaves for which nobody has ever started an agent."""
LINGER = 1.0
"""Seconds between an agent's last end and the place's, in which the answers go out."""
KEPT = 3
"""Former places here whose logs are kept for somebody to look at."""
RAYS_OWN = ("RAY_JOB_ID", "RAY_RAYLET_PID", "RAY_CLIENT_MODE", "RAY_LD_PRELOAD_ON_WORKERS")
"""Environment that is meant for a worker of Ray, not for what a script of the user starts."""


class Place:
    """An asynchronous actor. Every method but `gone` answers soon, and may be called again."""

    def __init__(self, app_id: str, agent: str, keep_threads: bool) -> None:
        """keep_threads: leave OMP_NUM_THREADS as Ray sets it, which is by the CPUs that were asked for."""
        import ray

        context = ray.get_runtime_context()
        self._id: str = context.get_actor_id()
        self._node: str = context.get_node_id()
        self._ip: str = ray.util.get_node_ip_address()
        self._agent = agent
        self._keep_threads = keep_threads
        self._works = _home() / app_id / agent
        self._folder = self._works / self._id[:16]
        self._app = Path(os.getcwd(), APP_FOLDER)
        self._lock = asyncio.Lock()
        self._child: subprocess.Popen[bytes] | None = None
        self._ended: asyncio.Task[str] | None = None
        self._leaving: asyncio.Task[None] | None = None
        self._handle: dict[str, Any] = {}
        self._epoch = self._since = 0
        self._orphan_timeout: float | None = None
        self._unused = threading.Timer(UNUSED, _leave)
        self._unused.daemon = True
        self._unused.start()

    async def start(self, spec: dict[str, Any]) -> dict[str, Any]:
        """Start this incarnation of the agent, unless it is the one that runs, and wait until it answers. One that is
        older is killed first; its scripts go on and are adopted.

        Returns {"handle": ...}, or {"error": what kind, "message": ..., "hint": ...}.
        """
        async with self._lock:
            self._unused.cancel()
            try:
                return await self._start(spec)
            except OSError as error:
                return _problem("lost", f"{self._where}: {error}")

    async def gone(self, epoch: int) -> str:
        """Returns once this incarnation of the agent has ended: why."""
        if self._ended is None or self._epoch != epoch:
            return self._other(epoch)
        return await asyncio.shield(self._ended)

    async def look(self, epoch: int) -> str | None:
        """None if this incarnation of the agent is alive, else why not."""
        if self._ended is None or self._epoch != epoch:
            return self._other(epoch)
        return self._ended.result() if self._ended.done() else None

    async def living(self) -> int:
        """The incarnation that is alive, or 0."""
        return self._epoch if self._ended is not None and not self._ended.done() else 0

    @property
    def _where(self) -> str:
        return f"machine {self._ip} of the Ray cluster"

    def _other(self, epoch: int) -> str:
        return f"incarnation {self._epoch} has taken its place" if self._epoch > epoch else "it was never started"

    # -- starting

    async def _start(self, spec: dict[str, Any]) -> dict[str, Any]:
        epoch = spec["epoch"]
        if epoch < self._epoch:
            return _problem("lost", f"agent {self._agent}: {self._other(epoch)}")
        if epoch == self._epoch and self._ended is not None and not self._ended.done():
            return {"handle": self._handle}
        if not self._app.is_dir():
            return _problem("lost", f"{self._where} has not got the app's folder ({self._app} is missing)")
        former = self._child is not None
        await self._end_former()
        run = self._folder / "run"
        for folder in (run, self._folder / "logs"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        spec_file = run / f"agent-{self._agent}.spec"
        ready_file = run / f"agent-{self._agent}.json"
        _write(spec_file, json.dumps(self._localized(spec, former)).encode())
        log = self._folder / "logs" / f"agent-{self._agent}.log"
        self._since = self._since or epoch
        self._epoch, self._orphan_timeout = epoch, spec.get("orphan_timeout")
        # Here and not in a thread of its own: the kernel takes the end of the thread that forked for the parent's.
        child = self._child = self._spawn(spec_file, log)
        ended = self._ended = asyncio.create_task(self._attend(child))
        deadline = time.monotonic() + START_TIMEOUT
        while (ready := _read(ready_file)) is None or ready["epoch"] != epoch:
            if ended.done():
                kind = "died" if (child.returncode or 0) < 0 else "lost"
                return _problem(kind, f"{self._where}: the agent {ended.result()} while starting: {_tail(log)}")
            if time.monotonic() > deadline:
                child.kill()
                return _problem("lost", f"{self._where}: the agent did not answer within {START_TIMEOUT:.0f} s")
            await asyncio.sleep(LOOK_EVERY)  # a file appears by rename; there is nothing portable to wait on
        del ready["token"]  # it is the flow's, which has it
        self._handle = {
            **ready,
            "actor_id": self._id,
            "node": self._node,
            "node_ip": self._ip,
            "folder": str(self._folder),
            "since": self._since,
        }
        return {"handle": self._handle}

    async def _end_former(self) -> None:
        """No agent before this one lives, and no script of a place that was here earlier: an agent here cannot adopt
        those, and they may sit on what Ray has given to this place."""
        if self._child is not None and self._ended is not None:
            self._child.kill()
            await self._ended
            return
        others = [folder for folder in self._works.glob("*") if folder != self._folder and folder.is_dir()]
        for n, other in enumerate(sorted(others, key=lambda folder: folder.stat().st_mtime, reverse=True)):
            while _left_over(other):  # noqa: ASYNC110  # their waiters stop them; nothing tells of the end of all
                await asyncio.sleep(0.05)
            shutil.rmtree(other if n >= KEPT else other / "run", ignore_errors=True)

    def _localized(self, spec: dict[str, Any], former: bool) -> dict[str, Any]:
        """The spec with what is true on this machine."""
        app_file = spec.get("app_file", "")
        if app_file:
            app_file = str(self._app / os.path.relpath(app_file, spec["app_dir"]))
        return {
            **spec,
            "app_dir": str(self._app),
            "app_file": app_file,
            "orch_dir": str(self._folder),
            "bind": self._ip,
            "port": spec.get("port", 0) if former else 0,  # no script here knows the old one's
            "launcher": os.getpid(),
            "bound": True,
        }

    def _spawn(self, spec_file: Path, log: Path) -> subprocess.Popen[bytes]:
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "orch_workers", str(spec_file)],
                cwd=self._app,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    def _environment(self) -> dict[str, str]:
        """As on the user's own machine, where the app's folder is not on PYTHONPATH either."""
        env = {name: value for name, value in os.environ.items() if name not in RAYS_OWN}
        top = os.path.realpath(self._app.parent)
        paths = [path for path in env.pop("PYTHONPATH", "").split(os.pathsep) if path and os.path.realpath(path) != top]
        if paths:
            env["PYTHONPATH"] = os.pathsep.join(paths)
        if not self._keep_threads:
            env.pop("OMP_NUM_THREADS", None)
        return env

    # -- ending

    async def _attend(self, child: subprocess.Popen[bytes]) -> str:
        code = await asyncio.to_thread(child.wait)
        self._leaving = asyncio.create_task(self._after(child, code))
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    async def _after(self, child: subprocess.Popen[bytes], code: int) -> None:
        """The place leaves when its agent has, unless scripts wait for the next one: then not before nobody can be
        expected to start that any more."""
        await asyncio.sleep(LINGER)
        left = time.monotonic() + (self._orphan_timeout or float("inf"))
        while (code != 0 or _left_over(self._folder)) and time.monotonic() < left:
            await asyncio.sleep(LINGER)
            if self._child is not child:
                return
        async with self._lock:
            if self._child is child:
                shutil.rmtree(self._folder / "run", ignore_errors=True)
                _leave()


def cleared(folder: str) -> None:
    """Blocks, on the machine of a place that is no more, until the scripts that it had there are gone."""
    while _left_over(Path(folder)):
        time.sleep(0.05)  # their waiters stop them; nothing tells of the end of all


# ---- helpers ---------------------------------------------------------------------------------------------------------


def _leave() -> None:
    """End this actor as Ray wants it, so that it counts as an end and not as a crash."""
    import ray

    ray.kill(ray.get_runtime_context().current_actor)


def _problem(kind: str, message: str, hint: str = "") -> dict[str, Any]:
    return {"error": kind, "message": message, "hint": hint}


def _home() -> Path:
    """Raises OSError if the folder is not this user's alone: others could put files in the agents' way."""
    home = Path(os.environ.get("ORCH_NODE_DIR") or Path(tempfile.gettempdir(), f"orch-{os.getuid()}"))
    home.mkdir(mode=0o700, parents=True, exist_ok=True)
    stat = home.stat()
    if stat.st_uid != os.getuid() or stat.st_mode & 0o022:
        raise OSError(f"{home} can be written by others: set ORCH_NODE_DIR on the cluster's machines")
    return home


def _write(path: Path, data: bytes) -> None:
    """In place at once, and never readable by others."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)
    os.replace(draft, path)


def _read(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found
    return None


def _tail(log: Path) -> str:
    with log.open(errors="replace") as file:
        lines = deque((line.strip() for line in file if line.strip()), maxlen=1)
    return lines[0] if lines else "no output"


def _left_over(folder: Path) -> bool:
    """Whether a waiter lives that an agent of that folder has started. (Where there is no /proc: no.)"""
    for path in folder.glob("run/processes/*.run.json"):
        record = _read(path)
        if record is not None and _lives(record["waiter_pid"], record["waiter_start"]):
            return True
    return False


def _lives(pid: int, start: str) -> bool:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return fields[0] not in "ZX" and fields[19] == start
