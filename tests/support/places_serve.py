"""`python places_serve.py run APP OPTIONS`: an `orch run` in which every Work has a place of its own, as on a cluster.

A place is a folder with a copy of the app, and a process (tests/children/place.py) that its agent and its scripts do
not outlive. Nothing but the Drive is shared: what a script writes elsewhere stays in its place, logs come by HTTP. A
Work whose compute is called "moon" cannot be placed.
"""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec

import orch.cli
import orch.service
from orch.paths import AppFolder, write_atomic
from orch.processes import find, send, wait_gone
from orch.runtimes.base import AgentDied, Handle, Infeasible
from orch.wire import AgentSpec, encode
from orch_workers.waiter import proc_stat

PLACE = Path(__file__).resolve().parent.parent / "children" / "place.py"
START_TIMEOUT = 30.0


class PlacesRuntime:
    name = "places"
    orphan_timeout: float | None = 600.0
    shared_records = False
    own_places = True
    shared_files = False

    def __init__(self, root: Path) -> None:
        self._root = root
        self._places = AppFolder(root).run / "places"
        self._machines = root / ".machines"
        self._children: dict[int, subprocess.Popen[bytes]] = {}

    def _file(self, agent: str) -> Path:
        return self._places / f"{agent}.json"

    def found(self, agent: str) -> Handle | None:
        try:
            found: Handle = json.loads(self._file(agent).read_bytes())
        except FileNotFoundError:
            return None
        return found if "url" in found else None

    @staticmethod
    def _place(handle: Handle | None) -> Any:
        return None if handle is None else find(handle["place_pid"], handle["place_start"])

    async def launch(self, spec: AgentSpec) -> Handle:
        if spec.compute["name"] == "moon":
            raise Infeasible(f"{spec.work} wants the machine 'moon', which nobody has")
        former = self.found(spec.agent)
        if self._place(former) is not None and former is not None:
            machine, since, pid = Path(former["machine"]), former["since"], former["place_pid"]
            agent = find(former["pid"], former["pid_start"])
            if agent is not None:
                send(agent, 9)
                await asyncio.to_thread(wait_gone, [agent], 5.0)
            self._write(spec, machine)
            (machine / "again").touch()
        else:
            machine, since = self._machines / f"{spec.agent}-{spec.epoch}", spec.epoch
            shutil.copytree(self._root, machine / "app", ignore=shutil.ignore_patterns(".*"))
            self._write(spec, machine)
            with (machine / "place.log").open("ab") as output:
                place = subprocess.Popen(
                    [sys.executable, str(PLACE), str(machine / "spec.json")],
                    stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
                )  # fmt: skip
            pid = place.pid
            self._children[pid] = place
        stat = proc_stat(pid)
        if stat is None:
            raise AgentDied("its place has ended")
        handle = {
            "agent": spec.agent, "epoch": spec.epoch, "machine": str(machine), "since": since, "place_pid": pid,
            "place_start": stat.start,
        }  # fmt: skip
        self._places.mkdir(exist_ok=True)
        write_atomic(self._file(spec.agent), json.dumps(handle).encode(), mode=0o600)
        ready = await self._ready(machine / "orch" / "run" / f"agent-{spec.agent}.json", spec.epoch)
        handle = {**handle, **ready}
        write_atomic(self._file(spec.agent), json.dumps(handle).encode(), mode=0o600)
        return handle

    @staticmethod
    def _write(spec: AgentSpec, machine: Path) -> None:
        app = machine / "app"
        there = msgspec.structs.replace(
            spec, app_dir=str(app), orch_dir=str(machine / "orch"), app_file=str(app / Path(spec.app_file).name)
        )
        write_atomic(machine / "spec.json", encode(there), mode=0o600)

    @staticmethod
    async def _ready(path: Path, epoch: int) -> dict[str, Any]:
        async with asyncio.timeout(START_TIMEOUT):
            while True:
                if path.exists() and (ready := json.loads(path.read_bytes()))["epoch"] == epoch:
                    return dict(ready)
                await asyncio.sleep(0.01)

    async def poll(self, handle: Handle) -> str | None:
        if self._place(handle) is None:
            return "has lost its place"
        return None if find(handle["pid"], handle["pid_start"]) is not None else "is gone"

    async def adopt(self, handle: Handle) -> bool:
        return await self.poll(handle) is None

    async def adoptable(self, handle: Handle) -> bool:
        return self._place(handle) is not None

    async def ended(self, handle: Handle, timeout: float) -> bool:
        agent = find(handle["pid"], handle["pid_start"])
        return agent is None or not await asyncio.to_thread(wait_gone, [agent], timeout)

    async def kill(self, handle: Handle) -> None:
        place = self._place(handle)
        if place is not None:
            send(place, 9)
            await asyncio.to_thread(wait_gone, [place], 5.0)
        child = self._children.pop(handle["place_pid"], None)
        if child is not None:
            await asyncio.to_thread(child.wait)
        path = self._file(handle["agent"])
        if path.exists() and json.loads(path.read_bytes())["epoch"] <= handle["epoch"]:
            path.unlink()

    async def host(self) -> str:
        return "127.0.0.1"

    def waits(self, agent: str) -> str:
        return ""

    def close(self) -> None: ...

    async def reachable(self) -> bool:
        return True

    async def sweep(self) -> list[str]:
        ended = []
        for path in sorted(self._places.glob("*.json")):
            handle = json.loads(path.read_bytes())
            ended.append(f"the place of {handle['agent']} is given back")
            await self.kill(handle)
        return ended

    def kill_started(self) -> None: ...

    def reap(self) -> None: ...


def main() -> int:
    places = PlacesRuntime(Path.cwd())
    orch.service.serve = functools.partial(orch.service.serve, runtime=places)
    return orch.cli.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
