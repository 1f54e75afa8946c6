"""Deaths that the kill matrix does not hold: a waiter's, an agent's that nobody has attached to, and processes that are
paused instead of dead."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import psutil
import pytest
from testkit import RunningApp, wait_until
from victims import (
    SCRIPT,
    Victim,
    agent_record,
    final_revisions,
    lives,
    numbers_without_gap,
    orch,
    script_records,
    starts,
)

from orch_workers.records import Records

Apps = Callable[..., RunningApp]

APP = """
from orch import App, Flow, ScriptWork


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.reasons = []
        self.work = ScriptWork("script.py ASK 0", parallel=True, raise_exception=False, grace=GRACE)

    def run(self):
        call = self.work.run()
        if call.done and call.reason not in self.reasons:
            self.reasons.append(call.reason)


app = App(Root())
"""


def running(orch_app: Apps, ask: str, *, grace: float = 60.0) -> Victim:
    """An app whose one script runs."""
    source = APP.replace("ASK", ask).replace("GRACE", str(grace))
    victim = Victim(orch_app(source, {"script.py": SCRIPT}, start=False))
    victim.start()
    wait_until(lambda: starts(victim.app), what="the script runs")
    victim.app.wait_state("/works/work/status/stage", lambda stage: stage == "running")
    return victim


def nothing_left(app: RunningApp) -> None:
    wait_until(lambda: not app.processes(), what=lambda: f"nothing is left: {app.processes()}")


@pytest.mark.parametrize("also", [(), ("agent",), ("server", "agent")], ids=lambda who: "+".join(who) or "alone")
def test_a_waiter_is_part_of_its_script(orch_app: Apps, also: tuple[str, ...]) -> None:
    victim = running(orch_app, "waits")
    app = victim.app
    [record] = script_records(app, "work")
    os.kill(record["waiter_pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(record["pid"]), what="the script is gone with it")
    victim.kill(*also)
    if "server" in also:
        victim.start()
    app.wait_state("/vars/reasons", lambda reasons: reasons == ["lost"])
    status = app.work("work")["status"]
    assert (status["stage"], status["reason"], status["exit_code"]) == ("failed", "lost", None)
    assert final_revisions(app) == {"1-work-1": 1}
    assert len(starts(app)) == 1


def test_scripts_of_a_later_run_outlive_their_agent(orch_app: Apps) -> None:
    victim = running(orch_app, "waits")
    app = victim.app
    assert app.interrupt() == 130
    nothing_left(app)
    victim.start()
    app.wait_state("/works/work/status/stage", lambda stage: stage == "running")
    [record] = script_records(app, "work")
    victim.kill("agent")
    victim.go(["work"])
    app.wait_state("/works/work/status/stage", lambda stage: stage == "succeeded")
    assert [(call, n) for _, call, n in starts(app)] == [("1-work-1", 1), ("2-work-1", 1)]
    assert record["key"] == "2-work-1.1"
    numbers_without_gap(app, "work")


def test_a_stop_that_was_answered_is_not_lost(orch_app: Apps) -> None:
    victim = running(orch_app, "stops")
    app = victim.app
    os.kill(agent_record(app)["pid"], signal.SIGSTOP)  # it will never hear of it
    app.post("/works/work/stop")
    victim.kill("server", "agent")
    assert not (app.folder / "stopping-work").exists()
    victim.start()
    wait_until(lambda: (app.folder / "stopping-work").exists(), what=lambda: f"its TERM:\n{app.output()}")
    victim.go(["work"])
    app.wait_state("/works/work/status/stage", lambda stage: stage == "stopped")
    status = app.work("work")["status"]
    assert (status["reason"], status["exit_code"], status["held"]) == ("stopped", 5, True)
    assert len(starts(app)) == 1


def test_a_paused_agent_is_replaced_by_a_new_server_and_harms_nobody(orch_app: Apps) -> None:
    victim = running(orch_app, "waits")
    app = victim.app
    paused = agent_record(app)["pid"]
    os.kill(paused, signal.SIGSTOP)
    victim.kill("server")
    victim.start()
    assert agent_record(app)["pid"] != paused
    assert not lives(paused)
    victim.go(["work"])
    app.wait_state("/works/work/status/stage", lambda stage: stage == "succeeded")
    assert len(starts(app)) == 1
    numbers_without_gap(app, "work")


@pytest.mark.parametrize("who", [("agent",), ("server", "agent"), ("server", "agent", "script")], ids="+".join)
def test_down_ends_what_is_paused(orch_app: Apps, who: tuple[str, ...]) -> None:
    """Gracefully: the script hears its TERM."""
    victim = running(orch_app, "hears")
    app = victim.app
    assert app.process is not None
    pids = {
        "server": app.process.pid,
        "agent": agent_record(app)["pid"],
        "script": script_records(app, "work")[0]["pid"],
    }
    for each in who:
        os.kill(pids[each], signal.SIGSTOP)
    ended = orch(app, "down", "--timeout", "20")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    nothing_left(app)
    assert (app.folder / "stopping-work").exists(), ended.stdout


def test_down_ends_all_of_a_stubborn_family(orch_app: Apps) -> None:
    """The script ignores TERM and has a descendant in a session of its own; server and agent are dead."""
    victim = running(orch_app, "ignores", grace=0.5)
    app = victim.app
    wait_until(lambda: (app.folder / "left-work").exists(), what="its descendant")
    victim.kill("server", "agent")
    assert len(app.processes()) >= 3
    ended = orch(app, "down")
    assert ended.returncode == 0, ended.stdout + ended.stderr
    nothing_left(app)


def test_an_agent_that_nobody_has_attached_to_ends_with_its_server(orch_app: Apps) -> None:
    app = orch_app(APP.replace("ASK", "waits").replace("GRACE", "1"), {"script.py": SCRIPT}, start=False)
    app.spawn()
    wait_until(lambda: len(app.processes()) > 1, interval=0.001, what="the agent's process")
    app.kill()
    nothing_left(app)
    victim = Victim(app)
    victim.start()
    victim.go(["work"])
    app.wait_state("/works/work/status/stage", lambda stage: stage == "succeeded")
    assert len(starts(app)) == 1


def test_a_former_agent_finds_what_its_successor_is_started_from(orch_app: Apps) -> None:
    app = orch_app(STUBBORN)
    app.wait_state("/works/w/status/stage", lambda stage: stage == "running")
    epoch = agent_record(app)["epoch"]
    (app.folder / ".orch/run/agent-local.json").unlink()  # the spec alone must tell it: it is written first
    records = Records(app.folder / ".orch/run", "local")
    assert records.successor(epoch - 1) and not records.successor(epoch)


def test_a_stop_that_was_answered_is_not_undone_by_the_servers_death(orch_app: Apps) -> None:
    app = orch_app(STUBBORN)
    app.wait_state("/works/w/status/stage", lambda stage: stage == "running")
    wait_until(lambda: "sleep" in [p.name() for p in app.processes()])
    app.post("/app/stop")
    assert app.state("/app/stage") == "stopping"
    app.kill()
    app.spawn()
    assert app.wait_exit() == 0
    assert "ending it now" in app.output()
    assert not app.processes()
    app.start()  # and that is over
    assert app.state("/app/run") == 2


STUBBORN = """
    from orch import App, Flow, ScriptWork

    class Root(Flow):
        def __init__(self):
            super().__init__()
            self.w = ScriptWork("trap '' TERM; sleep 600 & wait; wait", shell=True, parallel=True, grace=3.0)

        def run(self):
            self.w.run()

    app = App(Root())
"""
