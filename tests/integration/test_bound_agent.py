"""An agent that is bound to its launcher, the place that an engine has given it: neither it nor its scripts outlive
that process, and scripts outlive the agent alone."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_flow import TOKEN, FakeFlow, alive

from orch.wire import AgentSpec, Ended, Started, encode

CHILDREN = Path(__file__).resolve().parent.parent / "children"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's end is told to others by Linux only")


class Place:
    """The launcher, its agent, and the flow's side of it."""

    def __init__(self, flow: FakeFlow) -> None:
        self.flow = flow
        self.spec = flow.folder / "spec.json"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, epoch: int = 1, port: int = 0) -> None:
        """An incarnation of the agent: the place is made, or asked for another one."""
        self.flow.epoch = epoch
        self.spec.write_bytes(encode(self._spec(epoch, port)))
        self.spec.chmod(0o600)
        if self.process is None:
            command = [sys.executable, str(CHILDREN / "place.py"), str(self.spec)]
            self.process = await asyncio.create_subprocess_exec(*command)
        else:
            self.spec.with_name("again").touch()
        await self.flow.until(lambda: self.ready().get("epoch") == epoch, 20)
        self.flow.agent_url = self.ready()["url"]
        await self.flow.attach()

    def _spec(self, epoch: int, port: int) -> AgentSpec:
        flow = self.flow
        return AgentSpec(
            agent="local",
            epoch=epoch,
            token=TOKEN,
            flow_url=flow.url,
            app_dir=str(flow.folder),
            orch_dir=str(flow.orch_dir),
            app_id="abc",
            app_name="test",
            run=1,
            port=port,
        )

    def ready(self) -> dict[str, object]:
        path = self.flow.orch_dir / "run" / "agent-local.json"
        return json.loads(path.read_bytes()) if path.exists() else {}

    async def kill(self) -> None:
        assert self.process is not None
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()

    def kill_agent(self) -> int:
        pid = int(str(self.ready()["pid"]))
        os.kill(pid, signal.SIGKILL)
        return pid

    async def script(self, name: str, **fields: object) -> tuple[int, int]:
        """Starts one of tests/children; (its pid, its waiter's pid)."""
        await self.flow.place("w")
        n = len(self.flow.of(Started)) + 1
        await self.flow.start("w", ["python", str(CHILDREN / name)], n=n, **fields)
        started = (await self.flow.until(lambda: self.flow.of(Started)[n - 1 :]))[0]
        await self.flow.until(lambda: (self.flow.folder / "ready").exists())
        run = json.loads((self.flow.orch_dir / "run" / "processes" / f"{started.call}.1.run.json").read_bytes())
        return started.pid, run["waiter_pid"]

    def exit_record(self) -> dict[str, object]:
        return json.loads((self.flow.orch_dir / "run" / "processes" / "1-w-1.1.exit.json").read_bytes())


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    folder = tmp_path / "app"
    folder.mkdir()
    flow = FakeFlow(folder)
    async with flow.serving():
        place = Place(flow)
        await place.start()
        yield place
        await place.kill()


async def test_the_end_of_the_place_ends_agent_and_script(place: Place) -> None:
    script, waiter = await place.script("hears_term.py")
    agent = int(str(place.ready()["pid"]))
    await place.kill()
    await place.flow.until(lambda: not any(map(alive, (agent, script, waiter))))
    assert place.exit_record()["exit_code"] == 7, "it was asked before it was killed"
    assert place.exit_record()["cut"] is True


async def test_a_script_that_does_not_listen_is_killed_after_its_grace(place: Place) -> None:
    script, waiter = await place.script("ignores_term.py", grace=0.3)
    await place.kill()
    await place.flow.until(lambda: not any(map(alive, (script, waiter))))
    assert place.exit_record()["signal"] == signal.SIGKILL


async def test_the_end_of_the_place_after_that_of_the_agent(place: Place) -> None:
    script, waiter = await place.script("hears_term.py")
    agent = place.kill_agent()
    await place.flow.until(lambda: not alive(agent))
    assert alive(script) and alive(waiter), "scripts outlive the agent alone"
    await place.kill()
    await place.flow.until(lambda: not any(map(alive, (script, waiter))))
    assert place.exit_record()["exit_code"] == 7


async def test_both_at_once(place: Place) -> None:
    script, waiter = await place.script("hears_term.py")
    assert place.process is not None
    place.process.send_signal(signal.SIGSTOP)  # it cannot notice the one before it goes itself
    place.kill_agent()
    await place.kill()
    await place.flow.until(lambda: not any(map(alive, (script, waiter))))


async def test_the_next_agent_in_the_place_adopts_and_is_bound_too(place: Place) -> None:
    script, waiter = await place.script("waits_for_go.py")
    port = int(str(place.ready()["port"]))
    first = place.kill_agent()
    place.flow.acked = 0
    await place.start(2, port)
    second = int(str(place.ready()["pid"]))
    assert second != first and alive(script)
    report = (await place.flow.status()).works[0]
    assert (report.call, report.pid, report.stage) == ("1-w-1", script, "running")
    (place.flow.folder / "draft").write_text("5")
    (place.flow.folder / "draft").rename(place.flow.folder / "go")
    assert (await place.flow.ended("w")).exit_code == 5
    (place.flow.folder / "go").unlink()
    (place.flow.folder / "ready").unlink()
    other, waiter = await place.script("hears_term.py")
    await place.kill()
    await place.flow.until(lambda: not any(map(alive, (second, other, waiter))))
    assert len(place.flow.of(Ended)) == 1
