"""One suite over the runtimes with real processes: local and Ray. A `House` is what a runtime places agents in; several
runtime objects of one house are flow servers of one app, one after another."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_flow import alive
from place_peer import LONG, NO_FLOW, Peer, parent, until
from raycluster import RayCluster

from orch.errors import RuntimeLost
from orch.runtimes.base import AgentDied, Handle, Runtime
from orch.runtimes.local import LocalRuntime
from orch.runtimes.ray import RayRuntime
from orch.wire import AgentSpec

TOKEN = "the-token-of-this-agent"


class House:
    kind = "local"

    def __init__(self, folder: Path) -> None:
        self.app_id = uuid.uuid4().hex[:12]
        self.app = folder / "app"
        self.orch = self.app / ".orch"
        self.run = self.orch / "run"
        self.logs = self.orch / "logs"
        for path in (self.run, self.logs):
            path.mkdir(parents=True)
        self.runtimes: list[Runtime] = []
        self.closed = False
        """The last runtime is, and what it had started is gone."""

    def runtime(self) -> Runtime:
        """Of one more flow server."""
        self.runtimes.append(self.make())
        return self.runtimes[-1]

    def make(self) -> Runtime:
        return LocalRuntime(self.run, self.logs)

    def spec(self, epoch: int = 1, **fields: Any) -> AgentSpec:
        given: dict[str, Any] = {
            "agent": "trainer",
            "work": "trainer",
            "epoch": epoch,
            "token": TOKEN,
            "flow_url": NO_FLOW,
            "app_dir": str(self.app),
            "orch_dir": str(self.orch),
            "app_id": self.app_id,
            "app_name": "test",
            "run": 1,
            "launcher": os.getpid(),
            "drive_url": f"file://{self.orch}/drive",
        }
        return AgentSpec(**{**given, **fields})

    async def end(self) -> None:
        for runtime in self.runtimes:
            handle = runtime.found("trainer")
            if handle is not None:
                await runtime.kill(handle)
            runtime.close()

    def crashing(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """From now on an agent kills itself as it starts, if its spec has these fields."""
        monkeypatch.setenv("ORCH_CRASH_AT", "agent.spec.read:1")
        return {}


class RayHouse(House):
    kind = "ray"

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        super().__init__(folder)
        self.cluster = cluster

    def make(self) -> Runtime:
        return RayRuntime(self.cluster.address, self.run, self.logs, self.app, app_id=self.app_id, ship=False)

    def crashing(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        self.cluster.add(resources={"orch_crashing": 1}, ORCH_CRASH_AT="agent.spec.read:1")
        return {"compute": {"name": "crashing", "cpus": 0}}

    async def end(self) -> None:
        last = self.runtimes[-1]
        assert isinstance(last, RayRuntime)
        if not self.closed:
            await last.sweep()
        for runtime in self.runtimes:
            runtime.close()


@pytest.fixture(params=["local", "ray"])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    if request.param == "local":
        yield House(tmp_path)
    else:
        yield RayHouse(tmp_path, request.getfixturevalue("ray_cluster"))


@pytest.fixture
async def runtime(house: House) -> AsyncIterator[Runtime]:
    yield house.runtime()
    await house.end()
    await asyncio.get_running_loop().shutdown_default_executor()  # its threads are the loop's, not a leak


async def why(runtime: Runtime, handle: Handle) -> str:
    """Waits until the runtime knows that the agent has ended."""
    return str(await until(lambda: runtime.poll(handle)))


async def test_launch_answers_when_the_agent_does(runtime: Runtime, house: House) -> None:
    handle = await runtime.launch(house.spec())
    json.dumps(handle)
    assert {"agent": "trainer", "epoch": 1, "token": TOKEN}.items() <= handle.items()
    assert handle["url"].endswith(f":{handle['port']}") and alive(handle["pid"])
    assert runtime.shared_records or handle["since"] == handle["epoch"]
    async with Peer(handle) as peer:
        assert (await peer.ask("/v1/status"))["epoch"] == 1
        stranger = await peer.http.get("/v1/status", headers={"Authorization": "Bearer no"})
        assert stranger.status_code == 401
    assert await runtime.poll(handle) is None
    assert await runtime.adopt(handle)
    assert await runtime.reachable()
    assert not await runtime.ended(handle, 0.01)


async def test_another_server_finds_and_adopts_it(runtime: Runtime, house: House) -> None:
    handle = await runtime.launch(house.spec())
    async with Peer(handle) as peer:
        await peer.attach()
    runtime.close()
    assert alive(handle["pid"])
    other = house.runtime()
    found = other.found("trainer")
    assert found is not None and {**found, **handle} == {**handle, **found}
    assert other.found("server") is None
    assert await other.adopt(found) and await other.poll(found) is None
    os.kill(handle["pid"], signal.SIGKILL)
    await why(other, found)
    assert not await other.adopt(found)


async def test_the_end_of_an_agent_is_noticed_and_named(runtime: Runtime, house: House) -> None:
    handle = await runtime.launch(house.spec())
    os.kill(handle["pid"], signal.SIGKILL)
    assert await runtime.ended(handle, LONG)
    reason = await why(runtime, handle)
    assert "SIGKILL" in reason or "code -9" in reason
    assert not await runtime.adopt(handle)


async def test_the_next_incarnation_adopts_the_scripts_of_the_one_before(runtime: Runtime, house: House) -> None:
    first = await runtime.launch(house.spec())
    async with Peer(first) as peer:
        script = await peer.script("sleep", "600")
        waiter = parent(script)
    os.kill(first["pid"], signal.SIGKILL)
    await why(runtime, first)
    second = await runtime.launch(house.spec(2, port=first["port"]))
    assert (second["epoch"], second["port"]) == (2, first["port"]), "scripts know it under that address"
    assert second["pid"] != first["pid"] and alive(script)
    assert runtime.shared_records or second["since"] == 1
    assert await runtime.poll(first) is not None and await runtime.poll(second) is None
    assert not await runtime.adopt(first) and await runtime.adopt(second)
    async with Peer(second) as peer:
        work = await peer.work()
        assert (work["stage"], work["pid"], work["call"]) == ("running", script, "1-trainer-1")
        await peer.attach()
        await peer.ask("/v1/shutdown", {"kill": True})
    assert await runtime.ended(second, LONG)
    assert not alive(script) and not alive(waiter)


async def test_kill_ends_the_agent(runtime: Runtime, house: House) -> None:
    handle = await runtime.launch(house.spec())
    await runtime.kill(handle)
    assert await runtime.ended(handle, LONG) and await runtime.poll(handle) is not None

    async def gone() -> bool:
        return not alive(handle["pid"])

    await until(gone)
    await runtime.kill(handle)  # again is harmless
    newer = await runtime.launch(house.spec(2))
    await runtime.kill(handle)
    assert await runtime.poll(newer) is None and alive(newer["pid"]), "it was another one's end"


async def test_a_spec_that_cannot_be_used_says_why(runtime: Runtime, house: House) -> None:
    with pytest.raises(RuntimeLost, match="speaks") as caught:
        await runtime.launch(house.spec(protocol=99))
    assert not isinstance(caught.value, AgentDied)
    assert await runtime.launch(house.spec(2))


async def test_an_agent_that_is_killed_as_it_starts(
    runtime: Runtime, house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = house.crashing(monkeypatch)
    with pytest.raises(AgentDied, match="while starting"):
        await runtime.launch(house.spec(**fields))


async def test_what_was_started_for_nothing_is_ended(runtime: Runtime, house: House) -> None:
    handle = await runtime.launch(house.spec())
    runtime.kill_started()
    house.closed = True

    async def gone() -> bool:
        return not alive(handle["pid"])

    await until(gone)


async def test_two_works_have_agents_that_know_nothing_of_each_other(runtime: Runtime, house: House) -> None:
    if house.kind == "local":
        pytest.skip("there one agent serves all")
    one, other = await asyncio.gather(
        runtime.launch(house.spec(compute={"cpus": 0.5})),
        runtime.launch(house.spec(agent="models.0", work="models.0", compute={"cpus": 0.5})),
    )
    assert one["pid"] != other["pid"] and one["url"] != other["url"]
    await runtime.kill(one)
    assert await runtime.poll(other) is None and alive(other["pid"])
    assert (runtime.found("models.0") or {})["pid"] == other["pid"]
