"""kill -9 of the flow server, the agent, the page's server, or all of them, while scripts start, run, stop and finish.

One app has a work in each phase, and every phase is held by a file, not by time; so one kill hits all of them. What
must come out is what comes out of the same app without a kill.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import pytest
from testkit import RunningApp, wait_until
from victims import (
    SCRIPT,
    Victim,
    agent_record,
    comparable,
    final_revisions,
    numbers_without_gap,
    orch,
    script_records,
    starts,
)

Apps = Callable[..., RunningApp]

APP = """
import time
from orch import App, Flow, ScriptWork, ServiceWork, StreamlitFrontend, Work


def page(state):
    import streamlit
    streamlit.write(state.asked)


class Counts(Work):
    def __init__(self):
        super().__init__(parallel=True, grace=1.0)
        self.goal = 0
        self.n = 0
        self.seen = []

    def run(self):
        while True:
            time.sleep(0.02)
            if self.n < self.goal:
                self.n += 1
                self.seen.append(self.n)


def script(what, **options):
    return ScriptWork(f"script.py {what}", parallel=True, raise_exception=False, grace=60.0, **options)


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.asked = False
        self.swapped = False
        self.codes = {}
        self.outputs = []
        self.next = script("leaves 0")
        self.asks = script("plain 4")
        self.again = script("plain 6", retries=1, retry_delay=0.5)
        self.runs = script("waits 7", outputs=["out-runs"], sync_interval=0.2)
        self.saves = script("waits 0", outputs=["out-saves"], sync_interval=0.2)
        self.stops = script("stops 0")
        self.swaps = script("stops 8", when_busy="replace")
        self.told = script("writes 0", outputs=["out-told"])
        self.ends = script("writes 0", outputs=["out-ends"])
        self.service = ServiceWork("python -m http.server {port} --bind 127.0.0.1", grace=1.0)
        self.counts = Counts()

    def run(self):
        calls = [self.next.run("first")]
        if calls[0].done:
            calls.append(self.next.run("second"))
        calls += [self.runs.run(), self.saves.run(), self.stops.run(), self.told.run(), self.ends.run()]
        calls.append(self.swaps.run("new" if self.swapped else "old"))
        if self.asked:
            calls += [self.asks.run(), self.again.run()]
        self.service.run()
        self.counts.run()
        for call in calls:
            if call.done and call.id not in self.codes:
                self.codes[call.id] = call.exit_code

    def configure_layout(self):
        return LAYOUT


app = App(Root(), name="victim")
"""
PAGE = '[{"name": "page", "content": StreamlitFrontend(page)}]'
NO_PAGE = '[{"name": "service", "content": self.service}]'
HELD = ("next", "runs", "saves", "stops", "swaps", "told", "ends")
SCRIPTS = (*HELD, "asks", "again")
LASTING = ("runs", "saves", "stops", "swaps", "service", "counts")


@pytest.fixture
def victim(orch_app: Apps, request: pytest.FixtureRequest) -> Victim:
    layout = PAGE if getattr(request, "param", False) else NO_PAGE
    return Victim(orch_app(APP.replace("LAYOUT", layout), {"script.py": SCRIPT}, start=False))


def stage(app: RunningApp, work: str) -> str:
    return str(app.work(work)["status"]["stage"])


def reach_the_phases(victim: Victim, *, paused: list[int]) -> dict[str, set[int]]:
    """Every held work is in its phase when this returns. `paused` gets the pids that are stopped until the kill.

    Returns the pids that must outlive whatever comes.
    """
    app = victim.app
    victim.start()
    assert app.process is not None
    wait_until(lambda: all(stage(app, w) == "running" for w in HELD if w != "next"), 20, what="the scripts run")
    wait_until(lambda: app.work("service")["status"]["is_ready"], 20, what="the service is ready")
    wait_until(lambda: len(app.work("next")["calls"]) == 2, 20, what="the second call of `next` is accepted")
    wait_until(lambda: len(script_records(app, "next", "call")) == 2, what="the agent has written it down")
    wait_until(lambda: all(numbers_without_gap(app, w) > 3 for w in HELD if w != "next"), 20, what="all say lines")
    app.set("/works/counts/vars/goal", 5)
    app.wait_state("/works/counts/vars/n", lambda n: n == 5)
    # stopping: both have had their TERM, and go on
    app.post("/works/stops/stop")
    app.set("/vars/swapped", True)
    wait_until(lambda: all((app.folder / f"stopping-{w}").exists() for w in ("stops", "swaps")), what="they stop")
    survivors = {w: {r["pid"] for r in script_records(app, w)} for w in LASTING}
    # starting: asked for an instant before the kill
    app.set("/vars/asked", True)
    # finishing: the agent has recorded the end but the flow has not; the script has ended but no agent knows
    paused.append(app.process.pid)
    app.process.send_signal(signal.SIGSTOP)
    victim.go(["told"])
    wait_until(lambda: script_records(app, "told", "call")[0].get("ended"), 20, what="the agent has recorded the end")
    agent = agent_record(app)["pid"]
    paused.append(agent)
    os.kill(agent, signal.SIGSTOP)
    victim.go(["ends"])
    wait_until(lambda: script_records(app, "ends", "exit"), 20, what="the waiter has recorded the end")
    return survivors


def finish(victim: Victim) -> Any:
    """Let everything end; the final state without times and ports, once nothing is left to happen."""
    app = victim.app
    victim.go(HELD)
    app.set("/works/counts/vars/goal", 9)
    app.wait_state("/works/counts/vars/n", lambda n: n == 9)

    def over() -> bool:
        state = app.state()
        works = state["works"]
        return (
            all(works[w]["status"]["stage"] in ("succeeded", "failed", "stopped") for w in SCRIPTS)
            and len(works["next"]["calls"]) == len(works["swaps"]["calls"]) == 2
            and len(state["vars"]["codes"]) == len(CODES)
            and works["service"]["status"]["is_ready"]
        )

    def where() -> str:
        works = app.state()["works"]
        found = {name: (work["status"]["stage"], list(work["calls"])) for name, work in works.items()}
        return f"all ends: {found} {app.state('/vars')}\n{app.output()}\n{agent_log(app)}"

    wait_until(over, 30, what=where)
    return comparable(app.state())


def agent_log(app: RunningApp) -> str:
    return (app.folder / ".orch/logs/agent-local.log").read_text()


def outputs(app: RunningApp, work: str) -> dict[str, str]:
    """The files of the last complete version on the Drive."""
    files = app.work(work)["status"]["files"]
    return {f["path"]: app.request("GET", f"/api/v1/drive/app/{f['path']}").text for f in files}


def check(victim: Victim, survivors: dict[str, set[int]], state: Any, expected: Any) -> None:
    app = victim.app
    seen = starts(app)
    assert len(seen) == len(set(seen)), f"an attempt was started twice: {seen}"
    assert sorted((w, call.rpartition("-")[2], n) for w, call, n in seen) == STARTS
    assert state == expected
    ends = final_revisions(app)
    assert {call: n for call, n in ends.items() if n != 1} == {}, "an end was recorded more than once"
    assert len(ends) == len(STARTS) - 1  # one call had two attempts
    for work in HELD:
        numbers_without_gap(app, work)
    for work in ("service", "counts"):
        assert {r["pid"] for r in script_records(app, work)} == survivors[work]
    for work in ("saves", "told", "ends"):
        found = outputs(app, work)
        assert len(found) == 21
        assert all(found[f"out-{work}/part{i}"] == f"{work} {i} " * 1000 for i in range(20))
    assert app.state("/works/counts/vars/seen") == list(range(1, 10))


STARTS = sorted(
    [("again", "1", 2), ("next", "2", 1), ("swaps", "2", 1), *((work, "1", 1) for work in SCRIPTS)]
)  # (work, number of the call, attempt)
CODES = {"next-1": 0, "next-2": 0, "asks-1": 4, "again-1": 6, "runs-1": 7, "saves-1": 0, "stops-1": 5, "swaps-2": 8}
CODES |= {"told-1": 0, "ends-1": 0}


def resume(paused: list[int]) -> None:
    for pid in paused:
        if psutil.pid_exists(pid):
            os.kill(pid, signal.SIGCONT)


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The final state of the app without a kill."""
    folder = tmp_path_factory.mktemp("undisturbed") / "app"
    folder.mkdir()
    (folder / "app.py").write_text(APP.replace("LAYOUT", NO_PAGE))
    (folder / "script.py").write_text(SCRIPT)
    app = RunningApp(folder)
    victim = Victim(app)
    try:
        survivors = reach_the_phases(victim, paused=(paused := []))
        resume(paused)
        state = finish(victim)
        check(victim, survivors, state, state)
        assert {call[2:]: code for call, code in state["vars"]["codes"].items()} == CODES
        told = {w: (state["works"][w]["status"]["progress"], state["works"][w]["status"]["metrics"]) for w in HELD}
        assert told["runs"] == told["saves"] == (1.0, {"loss": 0.25})
        assert told["told"] == told["ends"] == (None, {"acc": 0.75, "step": 2})
        yield state
    finally:
        app.close()


CELLS = [
    *[pytest.param(("server",), down, False, id=f"server-{down}") for down in (20, 2, 0)],
    *[pytest.param(("server", "agent"), down, False, id=f"server+agent-{down}") for down in (20, 2, 0)],
    *[pytest.param(("server", "agent", "page"), down, True, id=f"all-{down}") for down in (20, 2, 0)],
    pytest.param(("agent",), 0, False, id="agent"),  # without it the server waits for nothing
    pytest.param(("page",), 0, True, id="page"),
]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("who", "down", "victim"), CELLS, indirect=["victim"])
def test_kill(
    victim: Victim, who: tuple[str, ...], down: float, expected: Any, record_property: Callable[[str, Any], None]
) -> None:
    app = victim.app
    paused: list[int] = []
    survivors = reach_the_phases(victim, paused=paused)
    if "server" not in who:
        resume(paused[:1])
    victim.kill(*who)
    resume(paused)
    if "server" in who:
        begun = time.monotonic()
        listed = orch(app, "ps", "--json")
        assert listed.returncode == 0, listed.stderr
        assert all(f'"{work}"' in listed.stdout for work in SCRIPTS), listed.stdout
        assert_unharmed(survivors)
        wait_until(lambda: time.monotonic() > begun + down, down + 5, what="the down time is over")
        victim.start()
    assert_unharmed(survivors)
    if "page" in who:
        wait_until(lambda: app.get("/layout")[0]["ready"], 40, what=lambda: f"the page is back:\n{app.output()}")
    state = finish(victim)
    check(victim, survivors, state, expected)
    record_property("measured", victim.recovered)

    # The same death again, and then `orch down`: the service and the Python Work still run.
    victim.kill(*who)
    ended = orch(app, "down")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    wait_until(lambda: not app.processes(), what=lambda: f"nothing is left: {app.processes()}\n{ended.stdout}")


def assert_unharmed(survivors: dict[str, set[int]]) -> None:
    dead = {work: pid for work, pids in survivors.items() for pid in pids if not psutil.pid_exists(pid)}
    assert not dead, f"harmed: {dead}"
