"""An incarnation that was cut off and comes back publishes nothing once its successor was placed."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from fake_flow import FakeFlow, alive, flow_with_agent
from testkit import RunningApp

from orch.wire import ComponentRecord, Ended, Published, Started
from orch_drive import DriveStore

GROWS = ["bash", "-c", "mkdir -p out; for n in $(seq 10000); do echo $n >> out/log.txt; sleep 0.02; done"]
APP = """
import os, time
from orch import Drive, Work

class Puts(Work):
    def __init__(self):
        super().__init__()
        self.models = Drive("models")
        self.done = []
        self.goal = 0
    def run(self):
        made_here = Drive("models")
        while self.goal >= 0:
            if len(self.done) < self.goal:
                for n, drive in enumerate((self.models, made_here)):
                    with open(f"m{n}.txt", "w") as file:
                        file.write(str(self.goal))
                    try:
                        drive.put(f"m{n}.txt")
                        self.done.append("put")
                    except Exception as error:
                        self.done.append(type(error).__name__)
            time.sleep(0.01)
"""


SHARES = """
from orch import App, Flow, ScriptWork

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.trainer = ScriptWork(["bash", "-c", "echo 1 > model.txt"], outputs=["model.txt"])
    def run(self):
        self.trainer.run()
        self.stop()

app = App(Root())
"""


@pytest.fixture(params=["local", "s3"])
def drive_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"file://{tmp_path}/drive"


@asynccontextmanager
async def successor(tmp_path: Path, drive_url: str, **fields: Any) -> AsyncIterator[FakeFlow]:
    """The next incarnation on another machine: it shares nothing with the first one but the Drive."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    flow = FakeFlow(folder)
    flow.epoch = 2
    async with flow.serving():
        await flow.start_agent(drive_url=drive_url, **fields)
        yield flow


async def fenced(store: DriveStore, epoch: int) -> None:
    async with asyncio.timeout(20):
        while store.highest_epoch() < epoch:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["paused", "cut off"])
async def test_an_old_incarnation_that_comes_back_publishes_nothing(tmp_path: Path, drive_url: str, how: str) -> None:
    store = DriveStore(drive_url, "app")
    async with flow_with_agent(tmp_path / "app", drive_url=drive_url) as old:
        assert old.agent is not None
        await old.place("trainer", drives=["app"])
        await old.start("trainer", GROWS, outputs=["out"], sync_interval=0.1)
        await old.until(lambda: len(old.of(Published)) > 1)
        script = old.of(Started)[0].pid
        if how == "paused":
            os.kill(old.agent.pid, signal.SIGSTOP)
        else:
            old.away = True
        async with successor(tmp_path, drive_url) as new:
            await new.place("trainer", drives=["app"])
            await fenced(store, 2)
            before = store.resolve("out", partial=True)
            # In a bucket a publish that was under way may have taken its place, and does not count (docs/limits.md).
            assert before is None or before.epoch == 1, "what it had published stays"
            assert before is not None or drive_url.startswith("s3:")
            log = (old.folder / "agent.log").read_bytes
            if how == "paused":
                os.kill(old.agent.pid, signal.SIGCONT)
            await old.until(lambda: b"is fenced" in log() or b"is in epoch 2" in log(), 30)
            assert alive(script), "it is for the flow to say that this is the old one"
            after = DriveStore(drive_url, "app").resolve("out", partial=True)
            assert (after and (after.serial, after.entries)) == (before and (before.serial, before.entries))

            old.epoch, old.away = 2, False  # the flow is heard again, and has replaced it
            await asyncio.wait_for(old.agent.wait(), 30)
            assert not alive(script) and not any(isinstance(item, Ended) for _, item, _ in old.items)

            await new.start("trainer", ["bash", "-c", "mkdir -p out; echo new > out/log.txt"], outputs=["out"])
            assert (await new.ended("trainer")).reason is None
    assert DriveStore(drive_url, "app").read_bytes("out/log.txt") == b"new\n"


@pytest.mark.slow
async def test_what_never_hears_of_its_flow_again_stops_itself(tmp_path: Path) -> None:
    """The Drive's word is the only one that it gets."""
    drive_url = f"file://{tmp_path}/drive"
    async with flow_with_agent(tmp_path / "app", drive_url=drive_url) as old:
        assert old.agent is not None
        await old.place("trainer", drives=["app"])
        await old.start("trainer", GROWS, outputs=["out"], sync_interval=0.1)
        await old.until(lambda: old.of(Published))
        script = old.of(Started)[0].pid
        old.away = True
        DriveStore(drive_url, "app").fence("trainer", 2)
        await asyncio.wait_for(old.agent.wait(), 40)
        assert not alive(script)


READS = """
from orch import Work

class Reads(Work):
    def run(self, drive):
        return [drive.list(), type(drive.id).__name__]
"""


async def test_another_app_under_the_same_names_stops_nobody(tmp_path: Path) -> None:
    """The flow answers: then this incarnation is the one that counts, whatever a shared Drive says."""
    folder, drive_url = tmp_path / "app", f"file://{tmp_path}/drive"
    folder.mkdir()
    (folder / "myapp.py").write_text(READS)
    async with flow_with_agent(folder, drive_url=drive_url, app_file=str(folder / "myapp.py")) as flow:
        for work in ("trainer", "reads"):
            DriveStore(drive_url, "app").fence(work, 7)
        await flow.place("trainer", drives=["app"])
        await flow.place("other")
        await flow.place("reads", python=True)
        await flow.start("other", "sleep 60")
        await flow.start("trainer", GROWS, outputs=["out"])
        ended = await flow.ended("trainer")
        assert ended.reason == "exception" and "fenced at epoch 7" in ended.message, ended
        record = ComponentRecord(module="myapp", qualname="Reads")
        state = {"$drive": {"id": "app", "root_folder": None}}
        await flow.start("reads", kind="python", record=record, args=[state])
        ended = await flow.ended("reads")
        assert (ended.reason, ended.result) == (None, [[], "str"]), ended
        [other] = await flow.until(lambda: flow.of(Started, "other"))
        assert alive(other.pid) and not flow.of(Started, "trainer")


async def test_a_python_work_goes_on_publishing_under_the_next_agent(tmp_path: Path) -> None:
    """Its process is adopted, not replaced: no put of it is refused. The next call is a new incarnation."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "myapp.py").write_text(APP)
    state = {"$drive": {"id": "models", "root_folder": None}}
    fields = {"app_file": str(folder / "myapp.py"), "drive_url": f"file://{tmp_path}/drive"}
    store = DriveStore(fields["drive_url"], "models")
    record = ComponentRecord(module="myapp", qualname="Puts")
    async with flow_with_agent(folder, **fields) as flow:
        await flow.place("p", {"models": state, "done": [], "goal": 2}, python=True, drives=["models"])
        await flow.start("p", kind="python", record=record)
        await flow.until(lambda: len(flow.vars["p"]["done"]) == 2)
        assert store.highest_epoch() == 1 and store.resolve("m1.txt") is not None
        port = int(flow.agent_url.rpartition(":")[2])
        await flow.kill_agent()
        flow.epoch, flow.acked = 2, 0
        await flow.start_agent(port=port, **fields)
        await flow.attach()
        flow.write("p", {"op": "replace", "path": "/goal", "value": 4})
        await flow.until(lambda: len(flow.vars["p"]["done"]) == 4)
        assert flow.vars["p"]["done"] == ["put"] * 4
        async with successor(tmp_path, fields["drive_url"]) as new:
            await new.place("p", {}, python=True, drives=["models"])
            await fenced(store, 2)
            flow.write("p", {"op": "replace", "path": "/goal", "value": 6})
            await flow.until(lambda: len(flow.vars["p"]["done"]) == 6)
        assert flow.vars["p"]["done"][4:] == ["DriveStaleEpoch"] * 2, "also one that was made in run()"
        assert store.read_bytes("m0.txt") == b"4"
        flow.write("p", {"op": "replace", "path": "/goal", "value": -1})
        assert (await flow.ended("p")).reason is None


async def test_a_drive_that_can_only_be_read_is_no_obstacle(tmp_path: Path) -> None:
    """A Work may hold a Drive that it only reads from; what it publishes has to be fenced off."""
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "myapp.py").write_text(
        "from orch import Work\nclass Reads(Work):\n    def run(self, drive): return 'read'\n"
    )
    (tmp_path / "taken").write_text("")
    gone = {"$drive": {"id": f"file://{tmp_path}/taken/shared", "root_folder": None}}
    async with flow_with_agent(folder, app_file=str(folder / "myapp.py")) as flow:
        await flow.place("reads", python=True)
        record = ComponentRecord(module="myapp", qualname="Reads")
        await flow.start("reads", kind="python", record=record, args=[gone])
        ended = await flow.ended("reads")
        assert (ended.reason, ended.result) == (None, "read"), ended
        await flow.place("writes", drives=[gone["$drive"]["id"]])
        await flow.start("writes", GROWS, outputs=["out"], drive=gone)
        ended = await flow.ended("writes")
        assert ended.reason == "exception" and "taken" in ended.message, ended
        assert not flow.of(Started, "writes")


def test_a_clock_that_was_set_back_makes_no_new_agent_an_old_one(
    app_folder: Callable[..., Path], orch_app: Callable[..., RunningApp]
) -> None:
    """The app ran before, perhaps elsewhere, when it was later."""
    folder = app_folder(SHARES)
    store = DriveStore((folder / ".orch/drive").as_uri(), "app")
    later = int((time.time() + 3600) * 1000)
    store.fence("trainer", later)
    app = orch_app(folder, start=False)
    app.spawn()
    assert app.wait_exit(60) == 0, app.output()
    assert store.read_bytes("model.txt") == b"1\n" and store.highest_epoch() > later
