"""The local runtime: one agent process on this machine serves all Works. It outlives the flow server."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import msgspec

from orch.errors import RuntimeLost
from orch.paths import agent_spec_file, write_atomic
from orch.processes import find, send, wait_gone
from orch.runtimes.base import AgentDied, Handle
from orch.wire import AgentSpec, encode
from orch_drive.crash import crash_point

__all__ = ["LocalRuntime"]

START_TIMEOUT = 30.0
LOOK_EVERY = 0.01
KILL_WAIT = 5.0


class LocalRuntime:
    """Agents are processes in a session of their own; a handle is what the agent wrote into its ready file."""

    name = "local"
    orphan_timeout: float | None = None
    shared_records = True
    own_places = False
    shared_files = True

    def __init__(self, run_dir: Path, log_dir: Path) -> None:
        self._run = run_dir
        self._logs = log_dir
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def ready_file(self, agent: str) -> Path:
        return self._run / f"agent-{agent}.json"

    async def launch(self, spec: AgentSpec) -> Handle:
        spec_file = agent_spec_file(self._run, spec.agent)
        write_atomic(spec_file, encode(spec), mode=0o600, point="flow.spec")
        # What a former incarnation wrote stays until this one replaces it: scripts know its port.
        ready = self.ready_file(spec.agent)
        log = self._logs / f"agent-{spec.agent}.log"
        process = self._spawn(spec.app_dir, spec_file, log)
        crash_point("flow.agent.spawned")
        deadline = asyncio.get_running_loop().time() + START_TIMEOUT
        while True:
            handle = self._read(ready)
            if handle is not None and handle["epoch"] == spec.epoch:
                crash_point("flow.agent.found")
                return handle
            if process.poll() is not None:
                kind = AgentDied if process.returncode < 0 else RuntimeLost
                raise kind(
                    f"the agent exited with code {process.returncode} while starting: {_tail(log)}", hint=f"see {log}"
                )
            if asyncio.get_running_loop().time() > deadline:
                process.kill()
                raise RuntimeLost(f"the agent did not answer within {START_TIMEOUT:.0f} s", hint=f"see {log}")
            # A file appears by rename; there is nothing portable to wait on.
            await asyncio.sleep(LOOK_EVERY)

    def _spawn(self, app_dir: str, spec_file: Path, log: Path) -> subprocess.Popen[bytes]:
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            process = subprocess.Popen(
                self._command(spec_file),
                cwd=app_dir,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._children[process.pid] = process
        return process

    def _command(self, spec_file: Path) -> list[str]:
        # -P: the app's folder must not shadow the standard library of our own process.
        return [sys.executable, "-P", "-m", "orch_workers", str(spec_file)]

    async def poll(self, handle: Handle) -> str | None:
        child = self._children.get(handle["pid"])
        if child is not None and child.poll() is not None:
            return f"exited with code {child.returncode}"
        return None if await self.adopt(handle) else "its process is gone"

    async def ended(self, handle: Handle, timeout: float) -> bool:
        child = self._children.get(handle["pid"])
        if child is not None:
            try:
                await asyncio.to_thread(child.wait, timeout)
            except subprocess.TimeoutExpired:
                return False
            return True
        agent = find(handle["pid"], handle.get("pid_start"), handle.get("boot_id"))
        return agent is None or not await asyncio.to_thread(wait_gone, [agent], timeout)

    async def kill(self, handle: Handle) -> None:
        agent = find(handle["pid"], handle.get("pid_start"), handle.get("boot_id"))
        if agent is not None:
            send(agent, signal.SIGKILL)
        child = self._children.pop(handle["pid"], None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        elif agent is not None:
            await asyncio.to_thread(wait_gone, [agent], KILL_WAIT)

    async def adopt(self, handle: Handle) -> bool:
        return find(handle["pid"], handle.get("pid_start"), handle.get("boot_id")) is not None

    async def adoptable(self, handle: Handle) -> bool:
        return True

    async def sweep(self) -> list[str]:
        return []  # `orch.leftovers` finds what they have written down

    async def host(self) -> str:
        return "127.0.0.1"

    def waits(self, agent: str) -> str:
        return ""

    async def reachable(self) -> bool:
        return True  # its agents are on this machine

    def found(self, agent: str) -> Handle | None:
        """The handle that an agent of an earlier server left here."""
        return self._read(self.ready_file(agent))

    def kill_started(self) -> None:
        """End every agent that this object has started: the app cannot be loaded, they have nothing to do."""
        for child in self._children.values():
            child.kill()
            child.wait()
        self._children.clear()

    def reap(self) -> None:
        """Collect agents that have exited."""
        for pid, child in list(self._children.items()):
            if child.poll() is not None:
                del self._children[pid]

    def close(self) -> None:
        pass  # nothing is held but children, and they live on

    @staticmethod
    def _read(path: Path) -> Handle | None:
        try:
            return msgspec.json.decode(path.read_bytes(), type=dict)
        except (FileNotFoundError, msgspec.DecodeError):
            return None


def _tail(path: Path) -> str:
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"
