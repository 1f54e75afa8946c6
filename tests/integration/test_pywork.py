"""Python Works in processes of their own, forked from the warm fork server, under a real agent."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from fake_flow import FakeFlow, alive, flow_with_agent

from orch.wire import ComponentRecord, Diff, Ended, Op, Published, Started, VarOps, decode, encode
from orch_workers.messages import Batch, Changes, Taken

APP = '''
import os, sys, time
from pathlib import Path
from orch import Work, Drive

LOADED_IN = os.getpid()

class Add(Work):
    def __init__(self, step=1):
        super().__init__()
        self.total = 0
        self._step = step
    def run(self, *values, times=1):
        for value in values:
            self.total += value * times * self._step
        return {"total": self.total, "loaded here": LOADED_IN == os.getpid(), "argv": sys.argv[1:], "cwd": os.getcwd(),
                "work": os.environ["ORCH_WORK"], "port": self.port}

class Bad(Work):
    def __init__(self):
        super().__init__()
        self.saw = ""
    def run(self, how):
        if how == "raise":
            raise ValueError("no such luck")
        if how == "exit":
            raise SystemExit(5)
        return object()
    def on_exception(self, error):
        self.saw = repr(error)

class Quiet(Work):
    """Sees what others write, while it sleeps."""
    def __init__(self):
        super().__init__()
        self.value = 0
        self.rows = [1]
        self.seen = []
    def run(self):
        held = self.rows
        while self.value != "stop":
            if not self.seen or self.seen[-1] != self.value:
                self.seen.append(self.value)
            time.sleep(0.001)
        return [list(held), list(self.rows)]

class Loop(Work):
    def __init__(self):
        super().__init__()
        self.n = 0
        self.rows = []
    def run(self, count, pause=0.0):
        started = time.perf_counter()
        for i in range(count):
            self.n = i + 1
            self.rows.append(i)
            if pause:
                time.sleep(pause)
        return time.perf_counter() - started

class Next(Work):
    """Reads what it wrote."""
    def __init__(self):
        super().__init__()
        self.goal = 0
        self.rows = []
    def run(self):
        while self.goal < 100:
            if len(self.rows) < self.goal:
                self.rows.append(len(self.rows) + 1)
            time.sleep(0.001)

class Stamp(Work):
    def __init__(self):
        super().__init__()
        self.at = 0.0
    def run(self, count):
        for _ in range(count):
            time.sleep(0.02)
            self.at = time.time()

class Stops(Work):
    def __init__(self):
        super().__init__()
        self.phase = ""
    def on_start(self):
        self.phase = "started"
    def run(self):
        try:
            while True:
                time.sleep(60)
        except Exception:
            self.phase = "swallowed"
    def on_exit(self):
        self.phase = "exited"

class Drives(Work):
    def __init__(self):
        super().__init__()
        self.drive = Drive("models")
    def run(self, other):
        Path("m.txt").write_text("hello")
        other.put("m.txt")
        self.drive.put("m.txt")
        return self.drive.list(".")
'''


@pytest.fixture
async def flow(tmp_path: Path) -> AsyncIterator[FakeFlow]:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "myapp.py").write_text(APP)
    async with flow_with_agent(folder, app_file=str(folder / "myapp.py"), app_argv=["--fast"]) as flow:
        yield flow


async def start(
    flow: FakeFlow, name: str, cls: str, *args: Any, vars: dict[str, Any], n: int = 1, **fields: Any
) -> None:
    await flow.place(name, vars, python=True)
    record = ComponentRecord(module="myapp", qualname=cls, kwargs=fields.pop("init", {}))
    reply = await flow.start(name, kind="python", record=record, args=list(args), n=n, **fields)
    assert reply.accepted, reply.error


async def test_result_and_state(flow: FakeFlow) -> None:
    await start(flow, "ui.add", "Add", 1, 2, vars={"total": 10}, kwargs={"times": 2}, init={"step": 3})
    ended = await flow.ended("ui.add")
    assert ended.reason is None and ended.exit_code == 0, ended
    placed = (await flow.status()).works[0]
    assert ended.result == {
        "total": 28, "loaded here": False, "argv": ["--fast"], "cwd": str(flow.folder), "work": "ui.add",
        "port": placed.port,
    }  # fmt: skip
    assert flow.vars["ui.add"] == {"total": 28}
    kinds = [type(item) for _, item, _ in flow.items]
    assert kinds[0] is Started and kinds[-1] is Ended and set(kinds[1:-1]) == {VarOps}
    # A second call goes on from the state, not from the constructor.
    await start(flow, "ui.add", "Add", 1, vars={}, n=2)
    assert (await flow.ended("ui.add", 2)).result["total"] == 29


async def test_failures_name_what_happened(flow: FakeFlow) -> None:
    await start(flow, "bad", "Bad", "raise", vars={"saw": ""})
    ended = await flow.ended("bad")
    assert (ended.reason, ended.message) == ("exception", "ValueError: no such luck")
    assert 'raise ValueError("no such luck")' in ended.traceback and "pywork" not in ended.traceback
    assert flow.vars["bad"] == {"saw": "ValueError('no such luck')"}
    assert "ValueError: no such luck" in flow.log_of("bad")
    await start(flow, "bad", "Bad", "object", vars={}, n=2)
    ended = await flow.ended("bad", 2)
    assert ended.reason == "exception" and "bad.run()" in ended.message and "object" in ended.message
    await start(flow, "bad", "Bad", "exit", vars={}, n=3)
    ended = await flow.ended("bad", 3)
    assert (ended.reason, ended.exit_code) == ("exit_code", 5)
    await start(flow, "bad", "Missing", vars={}, n=4)
    ended = await flow.ended("bad", 4)
    assert ended.reason == "exception" and "myapp:Missing" in ended.message


async def test_an_app_that_cannot_be_imported(tmp_path: Path) -> None:
    folder = tmp_path / "app"
    folder.mkdir()
    (folder / "broken.py").write_text("import nothing_of_that_name\n")
    async with flow_with_agent(folder, app_file=str(folder / "broken.py")) as flow:
        await flow.place("w", python=True)
        await flow.start("w", kind="python", record=ComponentRecord(module="broken", qualname="W"))
        ended = await flow.ended("w")
        assert ended.reason == "exception" and "nothing_of_that_name" in ended.message
        assert "broken.py" in ended.traceback
        await flow.start("w", "true", n=2)  # scripts go on
        assert (await flow.ended("w", 2)).reason is None


async def test_remote_writes_reach_code_that_sleeps(flow: FakeFlow) -> None:
    await start(flow, "q", "Quiet", vars={"value": 0, "rows": [1], "seen": []})
    await flow.until(lambda: flow.vars["q"]["seen"])
    delays = []
    for value in range(1, 21):
        before = time.perf_counter()
        flow.write("q", {"op": "replace", "path": "/value", "value": value})
        await flow.until(lambda: flow.vars["q"]["seen"][-1] == value)  # noqa: B023 - awaited at once
        delays.append(time.perf_counter() - before)
    flow.write("q", {"op": "add", "path": "/rows/-", "value": 2}, {"op": "replace", "path": "/value", "value": "stop"})
    ended = await flow.ended("q")
    assert ended.result == [[1], [1, 2]]  # what the code held did not change under it
    assert flow.vars["q"]["seen"] == list(range(21))
    print(f"flow -> work -> flow: p50 {statistics.median(delays) * 1e3:.1f} ms, max {max(delays) * 1e3:.1f} ms")
    assert statistics.median(delays) < 0.2


async def test_both_sides_end_equal(flow: FakeFlow) -> None:
    await start(flow, "l", "Loop", 2000, 0.0005, vars={"n": 0, "rows": []})
    await flow.until(lambda: flow.vars["l"]["n"])
    for i in range(100):
        flow.write("l", {"op": "add", "path": "/rows/-", "value": f"f{i}"})
        await asyncio.sleep(0.005)
    ended = await flow.ended("l", timeout=30)
    assert ended.reason is None, ended
    rows = flow.vars["l"]["rows"]
    assert [row for row in rows if isinstance(row, int)] == list(range(2000))
    assert [row for row in rows if isinstance(row, str)] == [f"f{i}" for i in range(100)]
    assert flow.vars["l"]["n"] == 2000
    async with flow.script("l") as http:
        assert (await http.get("")).json() == flow.vars["l"]


async def test_throughput_and_latency(flow: FakeFlow) -> None:
    await start(flow, "l", "Loop", 5000, vars={"n": 0, "rows": []})
    await flow.ended("l", timeout=60)
    assert flow.vars["l"] == {"n": 5000, "rows": list(range(5000))}
    [started], at = flow.of(Started, "l"), {seq: when for seq, _, when in flow.items}
    took = max(at.values()) - started.at
    await start(flow, "s", "Stamp", 100, vars={"at": 0.0})
    await flow.ended("s", timeout=60)
    delays = [
        when - item.ops[0]["value"] for _, item, when in flow.items if isinstance(item, VarOps) and item.work == "s"
    ]
    print(f"10,000 changes in {took:.2f} s, {len(flow.of(VarOps, 'l'))} items, {flow.pushes} pushes")
    print(f"work -> flow: p50 {statistics.median(delays) * 1e3:.2f} ms, max {max(delays) * 1e3:.1f} ms")
    assert len(delays) == 100 and statistics.median(delays) < 0.1


async def test_stop_runs_on_exit(flow: FakeFlow) -> None:
    await start(flow, "st", "Stops", vars={"phase": ""})
    await flow.until(lambda: flow.vars["st"]["phase"] == "started")
    [started] = flow.of(Started)
    await flow.stop("st")
    ended = await flow.ended("st")
    assert ended.reason == "stopped" and flow.vars["st"] == {"phase": "exited"} and not alive(started.pid)


async def test_drives_of_a_work_are_its_own(flow: FakeFlow) -> None:
    drive = {"$drive": {"id": "models", "root_folder": None}}
    await start(flow, "d", "Drives", {"$drive": {"id": "other", "root_folder": None}}, vars={"drive": drive})
    ended = await flow.ended("d")
    assert ended.result == ["m.txt"], ended
    assert [(item.drive, item.manifest["component"], item.call) for item in flow.of(Published)] == [
        ("other", "d", "1-d-1"),
        ("models", "d", "1-d-1"),
    ]


async def test_state_survives_the_agent(flow: FakeFlow) -> None:
    await start(flow, "l", "Loop", 300, 0.01, vars={"n": 0, "rows": []})
    await flow.until(lambda: flow.vars["l"]["n"] > 20)
    port = int(flow.agent_url.rpartition(":")[2])
    await flow.kill_agent()
    await asyncio.sleep(0.5)
    flow.epoch, flow.acked = 2, 0
    await flow.start_agent(port=port, app_file=str(flow.folder / "myapp.py"))
    await flow.attach()
    ended = await flow.ended("l", timeout=30)
    assert ended.reason is None, ended
    assert flow.vars["l"]["n"] == 300
    assert flow.vars["l"]["rows"] == list(range(300))  # nothing lost, nothing twice


async def test_what_a_dead_agent_passed_on_is_not_seen_twice(flow: FakeFlow) -> None:
    await start(flow, "l", "Next", vars={"goal": 0, "rows": []})
    await flow.until(lambda: flow.of(Started))
    flow.silent = True  # what comes now is in the tree, and its process never hears so from this agent
    port = int(flow.agent_url.rpartition(":")[2])
    await flow.ask("/v1/state", [Diff(work="l", rev=flow.write("l", goal(9)), ops=[goal(9)])])
    await flow.until(lambda: len(flow.vars["l"]["rows"]) == 9)
    await flow.kill_agent()
    flow.write("l", goal(20))
    flow.silent, flow.epoch, flow.acked = False, 2, 0
    await flow.start_agent(port=port, app_file=str(flow.folder / "myapp.py"))
    await flow.attach()
    await flow.until(lambda: len(flow.vars["l"]["rows"]) == 20)
    assert flow.vars["l"]["rows"] == list(range(1, 21))
    flow.write("l", goal(100))
    assert (await flow.ended("l")).reason is None


async def test_a_new_agent_takes_no_change_before_those_that_the_former_one_took(flow: FakeFlow) -> None:
    await flow.place("l", {"rows": []})

    async def say(*numbers: int, after: int) -> int:
        batches = [Batch(n=n, ops=[{"op": "add", "path": "/rows/-", "value": n}]) for n in numbers]
        async with flow.script("l", "live") as http:
            answer = await http.post(
                str(http.base_url).rstrip("/"), content=encode(Changes(session="1-l-1.1", batches=batches, after=after))
            )
        return decode(Taken, answer.content).n

    assert await say(5, 6, after=4) == 0  # 3 and 4 died with the former agent
    assert await say(3, 4, 5, 6, after=0) == 6
    assert await say(6, 7, after=5) == 7
    await flow.until(lambda: flow.vars["l"]["rows"] == [3, 4, 5, 6, 7])


def goal(value: int) -> Op:
    return {"op": "replace", "path": "/goal", "value": value}


async def test_changes_that_only_a_killed_agent_knew_are_sent_again_in_order(flow: FakeFlow) -> None:
    await start(flow, "l", "Loop", 200, 0.01, vars={"n": 0, "rows": []})
    await flow.until(lambda: flow.vars["l"]["n"] > 10)
    flow.away = True
    before = len(flow.vars["l"]["rows"])
    async with flow.script("l") as http:
        while len((await http.get("/rows")).json()) < before + 20:
            await asyncio.sleep(0.01)
    port = int(flow.agent_url.rpartition(":")[2])
    await flow.kill_agent()
    flow.epoch, flow.acked = 2, 0
    await flow.start_agent(port=port, app_file=str(flow.folder / "myapp.py"))
    flow.away = False
    await flow.attach()
    assert (await flow.ended("l", timeout=30)).reason is None
    assert flow.vars["l"] == {"n": 200, "rows": list(range(200))}


async def test_the_end_reaches_a_new_agent(flow: FakeFlow) -> None:
    await start(flow, "l", "Loop", 30, 0.02, vars={"n": 0, "rows": []})
    await flow.until(lambda: flow.vars["l"]["n"] > 2)
    [started] = flow.of(Started)
    port = int(flow.agent_url.rpartition(":")[2])
    await flow.kill_agent()
    await flow.until(lambda: not alive(started.pid), timeout=20)
    flow.epoch, flow.acked = 2, 0
    await flow.start_agent(port=port, app_file=str(flow.folder / "myapp.py"))
    await flow.attach()
    ended = await flow.ended("l")
    assert ended.reason is None and isinstance(ended.result, float)
    assert flow.vars["l"]["n"] == 30 and flow.vars["l"]["rows"] == list(range(30))
