"""The Ray runtime: each Work has a place of its own on a Ray cluster, an actor, and in it an agent of its own.

Ray decides where, waits for what is in use, and launches machines if it can. Everything else is between the flow and
its agents, as on one machine. What is lost is lost to the flow only when it is certain: an actor that died on a machine
that lives. A machine that Ray gives up may just be out of its reach.

Ray itself is loaded by a process of its own (ray_driver), never here.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import secrets
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import OrchError, RuntimeLost, UsageError
from orch.paths import write_atomic
from orch.runtimes.base import AgentDied, BuildFailed, Handle, Infeasible
from orch.runtimes.pack import pack
from orch.runtimes.ray_place import APP_FOLDER
from orch.wire import AgentSpec
from orch_drive.crash import crash_point
from orch_drive.drafts import process_exists

__all__ = ["RayRuntime"]

log = logging.getLogger(__name__)

NAMESPACE = "orch"
ERRORS: dict[str, type[RuntimeLost]] = {"died": AgentDied, "infeasible": Infeasible, "build_failed": BuildFailed}
CONNECT = 60.0
"""Seconds in which the driver must be connected, the upload of the app's folder included it is more."""
ANSWER = 15.0
"""Seconds for an answer that asks the cluster."""
SIGN_OF_LIFE = 3.0
LONGEST_GRACE = 3600.0
"""Seconds that the scripts of a place that is gone may take to end."""
FIRST_LOOK = 5.0
KILL_WAIT = 10.0
FAREWELL = 5.0
PAUSE, LONGEST_PAUSE = 2.0, 15.0
"""Seconds between attempts to reach a cluster that has gone."""


class RayRuntime:
    """Agents are bound to actors; a handle is what the agent wrote into its ready file, with the names of its actor.

    Args:
        address: as `ray.init` takes it: "auto" or "host:port", of a machine of the cluster that this one is part of.
        run_dir, log_dir: the app's, on this machine; handles are kept in the one, the driver's log in the other.
        app_dir: the app's folder; it travels as it is when the first agent is placed.
        app_id: names the app's actors: `orch-<app id>-<agent>`.
        machine_of: on a cluster of ours the custom resource of which each machine for such a CloudCompute (its fields)
            has one. None: the cluster is somebody else's, and what a machine is goes by its CPUs, GPUs and memory.
        machines: what each kind of machine that could still be launched has in total, in Ray's names and units.
        ship: send orch along; None: if the cluster's Python has not this very version of it.
    """

    name = "ray"
    orphan_timeout: float | None = 1800.0
    shared_records = False
    own_places = True
    shared_files = False

    def __init__(
        self,
        address: str,
        run_dir: Path,
        log_dir: Path,
        app_dir: Path,
        *,
        app_id: str,
        machine_of: Callable[[Mapping[str, Any]], str] | None = None,
        machines: Sequence[Mapping[str, float]] = (),
        ship: bool | None = None,
    ) -> None:
        missing = [name for name in ("ray", "pathspec") if importlib.util.find_spec(name) is None]
        if missing:
            raise UsageError(
                f"the Ray runtime needs {' and '.join(missing)}, which is not installed",
                hint="pip install 'orch[ray]', with the version of Ray that the cluster has",
            )
        self._address = address
        self._run = run_dir
        self._app_dir = app_dir
        self._app_id = app_id
        self._machine_of = machine_of
        self._package = run_dir / f"app-{secrets.token_hex(4)}-{os.getpid()}.zip"
        self._driver = _Driver(
            log_dir / "ray.log",
            {
                "address": address,
                "namespace": NAMESPACE,
                "machines": [dict(machine) for machine in machines],
                "ship": ship,
            },
            self._prepare,
            self._hear,
            self._watch_again,
        )
        self._unpackable: OrchError | None = None
        self._known: dict[tuple[str, int], Handle] = {}
        self._gone: dict[tuple[str, int], str] = {}
        self._bells: dict[tuple[str, int], asyncio.Event] = {}
        self._launched: list[str] = []
        self.waiting: dict[str, str] = {}
        """Agents that wait for the cluster, and for what: for people to read."""

    # -- the seam

    async def launch(self, spec: AgentSpec) -> Handle:
        name = self._actor(spec.agent)
        build = self._environment(spec)
        request: dict[str, Any] = {
            "name": name,
            "spec": msgspec.to_builtins(spec),
            "machine": self._machine_of(spec.compute) if self._machine_of is not None else "",
            "build": build,
        }
        self._launched.append(name)
        try:
            while True:
                try:
                    await self._driver.start()
                    if self._unpackable is not None:
                        raise RuntimeLost(self._unpackable.message, hint=self._unpackable.hint) from self._unpackable
                    found = await self._driver.ask("launch", None, **request)
                    break
                except _Gone as error:
                    if not self._driver.lost:
                        raise RuntimeLost(str(error)) from None
                    self.waiting[spec.agent] = str(error)
                    await asyncio.sleep(PAUSE)
        finally:
            self.waiting.pop(spec.agent, None)
        crash_point("flow.agent.spawned")
        handle: Handle = {**found, "token": spec.token, "address": self._address}
        write_atomic(self._file(spec.agent), msgspec.json.encode(handle), mode=0o600)
        self._known[_key(handle)] = handle
        crash_point("flow.agent.found")
        return handle

    async def poll(self, handle: Handle) -> str | None:
        if _key(handle) not in self._known:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._watch(handle), FIRST_LOOK)
        return self._gone.get(_key(handle))

    async def kill(self, handle: Handle) -> None:
        try:
            if await self._driver.ask("kill", ANSWER, handle=_public(handle)):
                await self.ended(handle, KILL_WAIT)
        except (_Gone, TimeoutError, RuntimeLost) as error:
            log.warning("the actor of agent %s cannot be ended: %s", handle["agent"], error)
            return
        left = self.found(handle["agent"])
        if left is not None and left["epoch"] <= handle["epoch"]:
            self._file(handle["agent"]).unlink(missing_ok=True)

    async def adoptable(self, handle: Handle) -> bool:
        try:
            return bool(await self._driver.ask("lives", LONGEST_GRACE, handle=_public(handle)))
        except (_Gone, TimeoutError, RuntimeLost):
            return True  # the launch that follows will tell

    async def host(self) -> str:
        try:
            return str(await self._driver.ask("host", CONNECT))
        except (_Gone, TimeoutError) as error:
            raise RuntimeLost(f"the Ray cluster does not answer: {error}") from None

    def waits(self, agent: str) -> str:
        return self.waiting.get(agent, "")

    async def ended(self, handle: Handle, timeout: float) -> bool:
        await self._watch(handle)
        if _key(handle) not in self._gone:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._bell(handle).wait(), timeout)
        return _key(handle) in self._gone

    async def adopt(self, handle: Handle) -> bool:
        await self._watch(handle)
        return _key(handle) not in self._gone

    async def reachable(self) -> bool:
        try:
            return bool(await self._driver.ask("reach", SIGN_OF_LIFE))
        except (_Gone, TimeoutError, RuntimeLost):
            return False

    def found(self, agent: str) -> Handle | None:
        try:
            return msgspec.json.decode(self._file(agent).read_bytes(), type=dict)
        except (FileNotFoundError, msgspec.DecodeError):
            return None

    def kill_started(self) -> None:
        for name in self._launched:
            self._driver.send({"id": 0, "do": "sweep", "with": {"prefix": name, "exact": True}})
        self._launched.clear()
        self._driver.close()

    def reap(self) -> None:
        pass  # actors leave when their agents do

    def close(self) -> None:
        self._driver.close()
        self._package.unlink(missing_ok=True)

    async def sweep(self) -> list[str]:
        """End every place of this app on the cluster, whoever started it; the actors' names."""
        try:
            found: list[str] = await self._driver.ask("sweep", CONNECT, prefix=self._actor(""))
        except (_Gone, TimeoutError) as error:
            raise RuntimeLost(f"the Ray cluster does not answer: {error}") from None
        for path in self._run.glob("ray-*.json"):
            path.unlink()
        return [f"{name} is ended" for name in found]

    # -- inside

    def _actor(self, agent: str) -> str:
        return f"orch-{self._app_id}-{agent}"

    def _file(self, agent: str) -> Path:
        return self._run / f"ray-{agent}.json"

    def _bell(self, handle: Handle) -> asyncio.Event:
        return self._bells.setdefault(_key(handle), asyncio.Event())

    async def _watch(self, handle: Handle) -> None:
        """Know from now on whether its agent has ended, and now what is known now."""
        key = _key(handle)
        if key in self._known:
            return
        self._known[key] = handle
        try:
            why = await self._driver.ask("watch", ANSWER, handle=_public(handle))
        except (_Gone, TimeoutError, RuntimeLost) as error:
            log.warning("nothing is known of agent %s: %s", handle["agent"], error)
            return
        if why is not None:
            self._ended(key, why)

    def _watch_again(self) -> None:
        """A new driver watches nobody."""
        for key, handle in self._known.items():
            if key not in self._gone:
                self._driver.send({"id": 0, "do": "watch", "with": {"handle": _public(handle)}})

    def _ended(self, key: tuple[str, int], why: str) -> None:
        self._gone[key] = why
        if key in self._bells:
            self._bells[key].set()

    def _hear(self, event: dict[str, Any]) -> None:
        if "gone" in event:
            actor, epoch = event["gone"]
            self._ended((actor, epoch), event["why"])
        elif "waiting" in event:
            self.waiting[event["waiting"]] = "waits for a machine of the Ray cluster, or for its environment there"

    def _prepare(self) -> dict[str, Any]:
        """What the driver is to upload. In a thread. A folder that cannot be sent keeps nobody from adopting."""
        if not self._package.exists() and self._unpackable is None:
            for old in self._run.glob("app-*.zip"):
                if not process_exists(int(old.stem.rpartition("-")[2])):
                    old.unlink(missing_ok=True)
            try:
                pack(self._app_dir, self._package, APP_FOLDER)
            except OrchError as error:
                self._unpackable = error
        package = str(self._package) if self._unpackable is None else None
        return {"package": package, "modules": _own_folders(), "packages": _own_needs()}

    def _environment(self, spec: AgentSpec) -> dict[str, Any] | None:
        """The BuildConfig as Ray's runtime environment. Raises BuildFailed."""
        build = spec.build
        who = spec.work or spec.agent
        if build.get("image"):
            raise BuildFailed(
                f"{who}: BuildConfig(image={build['image']!r}) cannot be had on a Ray cluster",
                hint="start the cluster's machines with that image",
            )
        python = build.get("python")
        here = f"{sys.version_info.major}.{sys.version_info.minor}"
        if python and python != here and not python.startswith(here + "."):
            raise BuildFailed(
                f"{who}: BuildConfig(python={python!r}), and the cluster runs Python {here}",
                hint="all processes of a Ray cluster run the same Python",
            )
        if build.get("commands"):
            raise BuildFailed(
                f"{who}: build_commands() cannot be run on a Ray cluster",
                hint="run them where the cluster's machines are set up, or give requirements",
            )
        requirements = build.get("requirements") or []
        if isinstance(requirements, str):
            requirements = _read_requirements(self._app_dir / requirements, who)
        return {"pip": {"packages": list(requirements), "pip_check": False}} if requirements else None


def _key(handle: Handle) -> tuple[str, int]:
    return handle["actor_id"], handle["epoch"]


def _public(handle: Handle) -> dict[str, Any]:
    return {name: handle[name] for name in ("agent", "epoch", "actor", "actor_id", "node", "folder")}


def _read_requirements(path: Path, who: str) -> list[str]:
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise BuildFailed(f"{who}: the requirements file {path} cannot be read: {error.strerror}") from error
    return [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]


def _own_folders() -> list[str]:
    """The packages that an agent needs."""
    folders = []
    for name in ("orch", "orch_drive", "orch_workers", "orch_ui"):
        found = importlib.util.find_spec(name)
        if found is not None and found.submodule_search_locations:
            folders.append(os.path.abspath(next(iter(found.submodule_search_locations))))
    return folders


def _own_needs() -> list[str]:
    """What these need; of extras only what a Drive in a bucket needs, if it is here."""
    needs = [line.partition(";") for line in importlib.metadata.requires("orch") or []]
    core = ["".join(parts) for parts in needs if "extra" not in parts[2]]
    bucket = [parts[0].strip() for parts in needs if re.search(r"""extra == ['"]s3['"]""", parts[2])]
    return core + (bucket if importlib.util.find_spec("obstore") is not None else [])


class _Gone(Exception):
    """The driver has ended, or cannot connect: why."""


class _Driver:
    """The process that speaks to Ray: started when it is needed, and again when it has ended."""

    def __init__(
        self,
        log_file: Path,
        config: dict[str, Any],
        prepare: Callable[[], dict[str, Any]],
        on_event: Callable[[dict[str, Any]], None],
        on_ready: Callable[[], None],
    ) -> None:
        self.lost = False
        """It was connected and is not, because the cluster's head has gone; it is being tried again."""
        self._log = log_file
        self._config = config
        self._prepare = prepare
        self._on_event = on_event
        self._on_ready = on_ready
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        """None unless it is connected."""
        self._starting: asyncio.Task[None] | None = None
        self._reading: asyncio.Task[None] | None = None
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._number = 0
        self._closed = False

    async def start(self) -> None:
        """Returns once it is connected to the cluster. Raises _Gone."""
        if self._closed:
            raise _Gone("the runtime is closed")
        if self.lost:
            raise _Gone("the head of the Ray cluster has gone")
        if self._writer is not None:
            return
        if self._starting is None or self._starting.done():
            self._starting = asyncio.create_task(self._start(), name="ray driver starts")
        # Shielded: whoever has no time to wait leaves it to the others.
        await asyncio.shield(self._starting)

    async def ask(self, do: str, timeout: float | None, **fields: Any) -> Any:
        """Raises _Gone, TimeoutError, and the error that the driver answers with."""
        async with asyncio.timeout(timeout):
            await self.start()
            self._number += 1
            number = self._number
            answer = self._answers[number] = asyncio.get_running_loop().create_future()
            try:
                self.send({"id": number, "do": do, "with": fields})
                return await answer
            except asyncio.CancelledError:
                self.send({"do": "cancel", "of": number})
                raise
            finally:
                self._answers.pop(number, None)

    def send(self, request: dict[str, Any]) -> None:
        """Nothing if it is not connected."""
        if self._writer is not None:
            self._writer.write(json.dumps(request).encode() + b"\n")

    def close(self) -> None:
        """It carries out what it has been told, then ends; blocks for a moment."""
        self._closed = True
        for task in (self._starting, self._reading):
            if task is not None:
                task.cancel()
        process, writer = self._process, self._writer
        self._process = self._writer = None
        if process is None:
            return
        if writer is None:
            process.kill()
        else:
            with contextlib.suppress(OSError):
                writer.get_extra_info("socket").shutdown(socket.SHUT_WR)
        try:
            process.wait(FAREWELL)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if writer is not None:
            writer.close()

    async def _start(self) -> None:
        if self._process is not None:
            await asyncio.to_thread(self._process.wait)
        await self._knock()
        config = {**self._config, **await asyncio.to_thread(self._prepare)}
        ours, theirs = socket.socketpair()
        with theirs:
            process = self._process = self._spawn(theirs)
        reader, writer = await asyncio.open_unix_connection(sock=ours, limit=1 << 24)
        connected = False
        try:
            writer.write(json.dumps(config).encode() + b"\n")
            async with asyncio.timeout(CONNECT):
                answer = json.loads(await reader.readline() or b"null")
            if answer is None:
                raise _Gone(f"the process that speaks to the Ray cluster has ended, see {self._log}")
            if not answer["ready"]:
                raise _Gone(f"no Ray cluster at {self._config['address']}: {answer['message']}")
            connected = True
        except TimeoutError:
            raise _Gone(f"the Ray cluster at {self._config['address']} does not answer") from None
        except ConnectionError as error:
            raise _Gone(f"the process that speaks to the Ray cluster has ended: {error}, see {self._log}") from None
        finally:
            if not connected:
                writer.close()
                process.kill()
                process.wait()
        self._writer = writer
        self.lost = False
        self._reading = asyncio.create_task(self._read(reader, writer), name="ray driver answers")
        self._on_ready()

    async def _knock(self) -> None:
        """Ray itself takes half a minute, and half a second of computing, to say that nobody is there."""
        host, _, port = self._config["address"].rpartition(":")
        if not host or not port.isdigit() or "//" in host:
            return
        try:
            async with asyncio.timeout(SIGN_OF_LIFE):
                _, writer = await asyncio.open_connection(host, int(port))
        except (OSError, TimeoutError) as error:
            why = getattr(error, "strerror", None) or "no answer"
            raise _Gone(f"no Ray cluster at {self._config['address']}: {why}") from None
        writer.close()

    def _spawn(self, control: socket.socket) -> subprocess.Popen[bytes]:
        with os.fdopen(os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            return subprocess.Popen(
                [sys.executable, "-P", "-m", "orch.runtimes.ray_driver"],
                stdin=control.fileno(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )

    async def _read(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                while line := await reader.readline():
                    self._take(json.loads(line))
        finally:
            writer.close()
        self._writer = None
        self.lost = True
        log.warning("the head of the Ray cluster has gone: agents are asked themselves, none can be placed or ended")
        for answer in self._answers.values():
            if not answer.done():
                answer.set_exception(_Gone("the head of the Ray cluster has gone"))
        pause = PAUSE
        while self.lost:
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
            with contextlib.suppress(_Gone):
                await self._start()
        log.warning("the Ray cluster answers again")

    def _take(self, message: dict[str, Any]) -> None:
        if "id" not in message:
            self._on_event(message)
            return
        answer = self._answers.get(message["id"])
        if answer is None or answer.done():
            return
        if "error" in message:
            kind = ERRORS.get(message["error"], RuntimeLost)
            answer.set_exception(kind(message["message"], hint=message["hint"]))
        else:
            answer.set_result(message["ok"])
