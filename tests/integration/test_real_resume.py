"""What lives on, and how: kill -9 of the server, the agent, both; SIGHUP; --resume; an app file that has changed."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from testkit import RunningApp, wait_until

Apps = Callable[..., RunningApp]

SURVIVORS = """
import time
from orch import App, Flow, ScriptWork, ServiceWork, Work


class Counts(Work):
    def __init__(self):
        super().__init__(parallel=True, grace=1.0)
        self.n = 0
        self.goal = 0

    def run(self):
        while True:
            time.sleep(0.02)
            if self.n < self.goal:
                self.n += 1


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.kept = "default"
        self.rows = []
        self.codes = []
        self.done = ScriptWork("count.py", parallel=True)
        self.long = ScriptWork("count.py go", parallel=True, raise_exception=False, vars={"said": 0})
        self.service = ServiceWork("python -m http.server {port} --bind 127.0.0.1", grace=1.0)
        self.counts = Counts()

    def run(self):
        self.done.run()
        call = self.long.run()
        self.service.run()
        self.counts.run()
        if call.done and not self.codes:
            self.codes.append(call.exit_code)


app = App(Root())
"""
COUNT = """
import json, os, pathlib, sys, time, urllib.request
with open("starts", "a") as file:
    file.write(os.environ["ORCH_WORK"] + " " + str(os.getpid()) + "\\n")
n = 0
while sys.argv[1:] and not pathlib.Path("go").exists():
    n += 1
    print("line", n, flush=True)
    time.sleep(0.01)
    if pathlib.Path("say").exists():
        pathlib.Path("say").unlink()
        request = urllib.request.Request(
            os.environ["ORCH_STATE_URL"] + "/said", b"5", {"Authorization": "Bearer " + os.environ["ORCH_TOKEN"]},
            method="PUT")
        with urllib.request.urlopen(request) as answer:
            print("said", answer.status, flush=True)
raise SystemExit(7 if sys.argv[1:] else 0)
"""


def starts(app: RunningApp) -> list[str]:
    return (app.folder / "starts").read_text().splitlines()


def agent_record(app: RunningApp) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((app.folder / ".orch/run/agent-local.json").read_text())
    return record


def lines_of(app: RunningApp, name: str = "long") -> list[int]:
    """The numbers that the script has printed; they must be without a gap."""
    [log] = (app.folder / f".orch/logs/{name}").glob("*.log")
    return [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("line ")]


def test_deaths(orch_app: Apps) -> None:
    app = orch_app(SURVIVORS, {"count.py": COUNT})
    app.wait_state("/works/done/status/stage", lambda stage: stage == "succeeded")
    app.wait_state("/works/long/status/stage", lambda stage: stage == "running")
    wait_until(lambda: app.work("service")["status"]["is_ready"], 15, what="the service is ready")
    app.set("/works/counts/vars/goal", 5)
    app.wait_state("/works/counts/vars/n", lambda n: n == 5)
    app.set("/vars/kept", "written")
    begun = starts(app)
    assert len(begun) == 2
    service = {p.pid for p in app.processes() if "http.server" in p.cmdline()}
    log = len(lines_of(app))

    # The server dies; everything else goes on.
    app.kill()
    wait_until(lambda: len(lines_of(app)) > log + 5, what="the script goes on")
    before = time.monotonic()
    said = len(app.output())
    app.start()
    served = time.monotonic() - before
    said_now = app.output()[said:]
    assert "resum" in said_now
    assert str(agent_record(app)["pid"]) in said_now
    assert app.state("/vars/kept") == "written"
    assert app.get("/app")["run"] == 1
    wait_until(lambda: app.work("service")["status"]["is_ready"], 15, what="the service is still ready")
    assert {p.pid for p in app.processes() if "http.server" in p.cmdline()} == service
    assert app.work("long")["status"]["stage"] == "running"
    app.set("/works/counts/vars/goal", 9)
    app.wait_state("/works/counts/vars/n", lambda n: n == 9)
    assert starts(app) == begun
    assert served < 20

    # The agent dies: a new incarnation adopts, the state URL of the script is still good.
    old = agent_record(app)
    os.kill(old["pid"], signal.SIGKILL)
    wait_until(lambda: agent_record_or_none(app, old["epoch"]), 10, what="a new agent")
    (app.folder / "say").touch()
    app.wait_state("/works/long/vars/said", lambda value: value == 5)
    app.set("/works/counts/vars/goal", 12)
    app.wait_state("/works/counts/vars/n", lambda n: n == 12)
    wait_until(lambda: app.work("service")["status"]["is_ready"], 15, what="the service is ready again")
    assert {p.pid for p in app.processes() if "http.server" in p.cmdline()} == service
    assert starts(app) == begun

    # Both die, and the script ends meanwhile: its exit code is recorded, once.
    app.kill()
    os.kill(agent_record(app)["pid"], signal.SIGKILL)
    (app.folder / "go").touch()
    pid = int(next(line.split()[1] for line in begun if line.startswith("long")))
    wait_until(lambda: not psutil.pid_exists(pid), what="the script ends")
    app.start()
    app.wait_state("/vars/codes", lambda codes: codes == [7])
    status = app.work("long")["status"]
    assert (status["stage"], status["reason"], status["exit_code"]) == ("failed", "exit_code", 7)
    app.set("/works/counts/vars/goal", 15)
    app.wait_state("/works/counts/vars/n", lambda n: n == 15)
    numbers = lines_of(app)
    assert numbers == list(range(1, len(numbers) + 1))
    assert starts(app) == begun
    ended = [
        row
        for row in app.get("/history?limit=1000")
        for op in row["ops"]
        if "/works/long/" in op["path"] and op.get("value") == "failed"
    ]
    assert len({row["rev"] for row in ended}) == 1, ended

    # SIGHUP leaves the works running.
    app.process.send_signal(signal.SIGHUP)
    app.wait_exit()
    assert {p.pid for p in app.processes() if "http.server" in p.cmdline()} == service
    app.start()
    app.set("/works/counts/vars/goal", 18)
    app.wait_state("/works/counts/vars/n", lambda n: n == 18)
    assert app.get("/app")["run"] == 1
    assert {p.pid for p in app.processes() if "http.server" in p.cmdline()} == service

    # --fresh after a death: the old works are stopped first, one line each.
    app.kill()
    app.start("--fresh")
    assert app.get("/app")["run"] == 2
    assert app.state("/vars/kept") == "default"
    assert not service & {p.pid for p in app.processes()}


def agent_record_or_none(app: RunningApp, epoch: int) -> dict[str, Any] | None:
    try:
        record = agent_record(app)
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record if record["epoch"] > epoch else None


FIRST = """
from orch import App, Flow, List, ScriptWork

class Child(Flow):
    def __init__(self):
        super().__init__()
        self.inner = 1

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.kept = 1
        self.gone = 1
        self.kind = 1
        self.child = Child()
        self.ok = ScriptWork(["python", "note.py", "ok"], parallel=True, vars={"v": 1})
        self.bad = ScriptWork(["python", "note.py", "bad"], parallel=True, raise_exception=False)
        self.made = List(Child())
        self.count = 0

    def run(self):
        self.ok.run()
        self.bad.run()
        if self.count > len(self.made):
            self.made.append(Child())

app = App(Root())
"""
NOTE = """
import sys
open("notes", "a").write(sys.argv[1] + "\\n")
raise SystemExit(sys.argv[1] == "bad")
"""


def test_resume_and_a_changed_app(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    folder = app_folder(FIRST, {"note.py": NOTE})
    app = orch_app(folder)

    def notes() -> list[str]:
        return sorted((folder / "notes").read_text().split())

    for name in ("ok", "bad"):
        app.wait_state(f"/works/{name}/status/stage", lambda stage: stage in ("succeeded", "failed"))
    for pointer in ("/vars/kept", "/vars/gone", "/vars/kind", "/flows/child/vars/inner", "/works/ok/vars/v"):
        app.set(pointer, 5)
    app.set("/vars/count", 3)
    app.wait_state("/structures/made/order", lambda order: len(order) == 3)
    app.set("/structures/made/flows/2/vars/inner", 22)
    assert app.interrupt() == 130

    # --resume: finished calls stay finished, failures are forgotten and run again.
    app.start("--resume")
    wait_until(lambda: notes() == ["bad", "bad", "ok"], what=lambda: f"{notes()} {app.output()}")
    assert app.state("/works/ok/status/stage") == "succeeded"
    assert app.state("/structures/made/flows/2/vars/inner") == 22
    assert app.state("/structures/made/order") == ["0", "1", "2"]
    assert app.interrupt() == 130

    # Another app.py: what still exists keeps its value, the rest is said.
    changed = (folder / "app.py").read_text()
    changed = changed.replace("self.gone = 1", "self.new = 'fresh'").replace(
        "self.inner = 1", "self.inner, self.more = 1, 2"
    )
    (folder / "app.py").write_text(changed)
    said = len(app.output())
    app.start("--resume")
    state = app.state()
    assert state["vars"]["kept"] == 5
    assert state["vars"]["new"] == "fresh"
    assert "gone" not in state["vars"]
    assert state["flows"]["child"]["vars"] == {"inner": 5, "more": 2}
    assert state["works"]["ok"]["vars"] == {"v": 5}
    assert state["structures"]["made"]["flows"]["2"]["vars"] == {"inner": 22, "more": 2}
    news = app.output()[said:]
    for word in ("gone", "new", "more"):
        assert any(word in line for line in news.splitlines()), (word, news)
    assert app.interrupt() == 130

    # A new run otherwise.
    app.start()
    assert app.state("/vars/kept") == 1
    run = app.get("/app")["run"]
    assert run == 2
    assert app.interrupt() == 130


TALKS = """
from orch import App, Flow, ScriptWork

class Child(Flow):
    def __init__(self):
        super().__init__()
        self.n = 0

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.talks = ScriptWork(["python", "talks.py"], parallel=True)
        self.sleeps = ScriptWork("sleep 600", parallel=True)
        self.child = Child()

    def run(self):
        for work in self.works():
            work.run()

app = App(Root())
"""
TALKER = """
import pathlib, time
print("x" * 10_000, flush=True)
for number in range(1, 4):
    print("line", number, flush=True)
    while not pathlib.Path(f"go{number}").exists():
        time.sleep(0.02)
print("no line end", end="")
"""


def test_a_resumed_run_shows_its_scripts_and_ends_what_is_gone(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    folder = app_folder(TALKS, {"talks.py": TALKER})
    app = orch_app(folder)
    wait_until(lambda: "talks | line 1" in app.output(), what=app.output)
    app.wait_state("/works/sleeps/status/stage", lambda stage: stage == "running")
    app.kill()
    said = len(app.output())
    (folder / "go1").touch()
    changed = TALKS.replace('self.sleeps = ScriptWork("sleep 600", parallel=True)', "").replace(
        "self.child = Child()", ""
    )
    (folder / "app.py").write_text(changed)

    def news() -> list[str]:
        return app.output()[said:].splitlines()

    app.start()
    for name in ("sleeps", "child"):
        assert f"orch {name}: no longer declared, its kept state is dropped" in news()
    wait_until(lambda: "talks | line 2" in news(), what=app.output)
    assert not any("x" * 100 in line for line in news())
    wait_until(lambda: not any(p.name() == "sleep" for p in app.processes()), what="the removed work's script is gone")
    (folder / "go2").touch()
    wait_until(lambda: "talks | line 3" in news(), what=app.output)
    (folder / "go3").touch()
    wait_until(lambda: "talks | succeeded" in news(), what=app.output)
    assert news().index("talks | no line end") < news().index("talks | succeeded")
    assert app.interrupt() == 130


KEEPS_COUNTING = """
import time
from orch import App, Flow, Work


class Counts(Work):
    def __init__(self):
        super().__init__(parallel=True)
        self.rows = []
        self.end = False

    def run(self):
        while not self.end:
            self.rows.append(len(self.rows))
            print(len(self.rows), flush=True)
            time.sleep(0.01)
        return len(self.rows)


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.counts = Counts()

    def run(self):
        self.counts.run()


app = App(Root())
"""


def test_no_change_of_a_work_is_lost_with_server_and_agent(orch_app: Apps) -> None:
    app = orch_app(KEEPS_COUNTING)
    app.wait_state("/works/counts/vars/rows", lambda rows: len(rows) > 10)
    log = app.folder / ".orch/logs/counts/1-counts-1.log"
    app.kill()
    seen = len(log.read_text().splitlines())
    wait_until(lambda: len(log.read_text().splitlines()) > seen + 20, what="changes that only the agent knows")
    os.kill(agent_record(app)["pid"], signal.SIGKILL)
    app.start()
    app.wait_state("/works/counts/vars/rows", lambda rows: len(rows) > seen + 50)
    app.set("/works/counts/vars/end", True)
    app.wait_state("/works/counts/status/stage", lambda stage: stage == "succeeded")
    [call] = app.work("counts")["calls"].values()
    rows = app.state("/works/counts/vars/rows")
    assert (rows, call["result"], call["attempt"]) == (list(range(len(rows))), len(rows), 1)
    app.killed = False
