"""Calls and Python Works under a real `orch run`: results, errors, live state both ways, Drives, stopping."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import psutil
from testkit import RunningApp, wait_until

Apps = Callable[..., RunningApp]

PYTHON = """
import time
from orch import App, Drive, Flow, Work


class Adds(Work):
    def __init__(self, **options):
        super().__init__(parallel=True, raise_exception=False, **options)
        self.rows = []
        self.told = {}

    def run(self, *args, **kwargs):
        self.rows.append(list(args))
        self.told["a"] = {"b": 1}
        self.told["a"]["b"] += 1
        own = [self.status.stage, self.is_running, self.host, bool(self.port)]
        return {"sum": sum(args), "kwargs": kwargs, "own": own}


class Odd(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False)

    def run(self):
        return {1, 2}


class Breaks(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False)
        self.said = []

    def on_start(self):
        self.said.append("start")

    def on_exception(self, error):
        self.said.append(f"exception {error}")

    def on_exit(self):
        self.said.append("exit")

    def run(self):
        print("a word before")
        raise ValueError("no luck")


class Waits(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False, grace=5.0)
        self.said = []
        self.knob = 0
        self.echo = 0

    def on_exit(self):
        self.said.append("exit")

    def run(self):
        self.said.append("run")
        while True:
            time.sleep(0.01)
            if self.knob != self.echo:
                self.echo = self.knob


class Puts(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False)
        self.drive = Drive("models")
        self.go = False

    def run(self, drive):
        with open("model.txt", "w") as file:
            file.write("weights")
        self.drive.put("model.txt")
        drive.put("model.txt")
        while not self.go:
            time.sleep(0.01)
        return self.drive.list()


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.adds, self.odd, self.breaks, self.waits, self.puts = Adds(), Odd(), Breaks(), Waits(), Puts()
        self.drive = Drive("models")
        self.models = []
        self.echo = 0
        self.sum = 0
        self.passes = 0

    def run(self):
        call = self.adds.run(1, 2, c=[3])
        self.odd.run()
        self.breaks.run()
        self.waits.run()
        self.puts.run(Drive("other"))
        self.echo = self.waits.echo
        self.models = [str(path) for path in self.drive.list("*.txt")]
        if call.succeeded:
            self.sum = call.result["sum"]


app = App(Root())
"""


def test_python_works(orch_app: Apps) -> None:
    app = orch_app(PYTHON)
    app.wait_state("/works/adds/status/stage", lambda stage: stage == "succeeded")
    [call] = app.work("adds")["calls"].values()
    assert call["result"] == {"sum": 3, "kwargs": {"c": [3]}, "own": ["running", True, "127.0.0.1", True]}
    assert app.state("/works/adds/vars") == {"rows": [[1, 2]], "told": {"a": {"b": 2}}}
    app.wait_state("/vars/sum", lambda value: value == 3)

    app.wait_state("/works/odd/status/stage", lambda stage: stage == "failed")
    message = app.work("odd")["status"]["message"]
    assert "odd" in message
    assert "set" in message

    app.wait_state("/works/breaks/status/stage", lambda stage: stage == "failed")
    status = app.work("breaks")["status"]
    assert (status["reason"], "ValueError: no luck" in status["message"]) == ("exception", True)
    log = app.log("breaks")
    assert "a word before" in log
    assert 'raise ValueError("no luck")' in log
    assert app.state("/works/breaks/vars/said")[:2] == ["start", "exception no luck"]

    # Both ways while it sleeps.
    app.wait_state("/works/waits/status/stage", lambda stage: stage == "running")
    for number in (1, 2, 3):
        app.set("/works/waits/vars/knob", number)
        app.wait_state("/vars/echo", lambda value, number=number: value == number, timeout=5)

    # A put wakes the flow, whose list() is answered from what the server holds.
    app.wait_state("/vars/models", lambda models: models == ["model.txt"])
    app.set("/works/puts/vars/go", True)
    app.wait_state("/works/puts/status/stage", lambda stage: stage == "succeeded")
    assert app.request("GET", "/api/v1/drive/models/model.txt").text == "weights"
    [row] = app.get("/drive/other")
    assert row["component"].removeprefix("root.") == "puts"

    # A stop runs on_exit; the work is held until restart, another run, or other arguments.
    app.post("/works/waits/stop")
    app.wait_state("/works/waits/status/stage", lambda stage: stage == "stopped")
    app.wait_state("/works/waits/vars/said", lambda said: said == ["run", "exit"])
    app.set("/works/adds/vars/rows", [])
    assert app.work("waits")["status"]["stage"] == "stopped"
    app.post("/works/waits/restart")
    app.wait_state("/works/waits/vars/said", lambda said: said == ["run", "exit", "run"])


CALLS = """
from orch import App, Flow, ScriptWork


def script(*words, **options):
    return ScriptWork(list(words), **{"parallel": True, "raise_exception": False, **options})


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.queued = script("wait.py")
        self.replaced = script("wait.py", when_busy="replace", grace=0.3)
        self.again = script("wait.py", cache_calls=False)
        self.first = script("wait.py", parallel=False)
        self.second = script("wait.py", parallel=False)
        self.asks = []
        self.ask = 0
        self.order = []
        self.blocked = []
        self.held = ""

    def run(self):
        self.order = [self.queued.run([str(n)]).id for n in (2, 1, 2)]
        if self.asks:
            for word in self.asks:
                self.replaced.run(["forever", word])
        if self.ask:
            call = self.again.run(["again"])
            if call.done:
                self.ask = 0
        self.blocked = ["before"]
        self.first.run(["b1"])
        self.blocked.append("between")
        self.second.run(["b2"])
        self.blocked.append("after")


app = App(Root())
"""
WAIT = """
import os, pathlib, signal, subprocess, sys, time
word = sys.argv[-1]
with open("journal", "a") as file:
    file.write(f"{os.environ['ORCH_WORK']} {word}\\n")
if "forever" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    pathlib.Path("pids-" + word).write_text(f"{os.getpid()} {child.pid}")
    signal.pause()
    while True:
        signal.pause()
while not pathlib.Path("go-" + word).exists():
    time.sleep(0.01)
"""


def test_calls(orch_app: Apps) -> None:
    app = orch_app(CALLS, {"wait.py": WAIT})

    def journal(name: str) -> list[str]:
        path = app.folder / "journal"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.split()[1] for line in lines if line.split()[0] == name]

    # One after another, in the order asked; equal arguments are one call.
    wait_until(lambda: journal("queued") == ["2"], 15, what="the first call runs")
    (app.folder / "go-2").touch()
    wait_until(lambda: journal("queued") == ["2", "1"], what="the second call runs")
    assert app.state("/vars/blocked") == ["before"]
    (app.folder / "go-1").touch()
    for name in ("b1", "b2"):
        (app.folder / f"go-{name}").touch()
    app.wait_state("/vars/blocked", lambda value: value == ["before", "between", "after"])
    order = app.state("/vars/order")
    assert order[0] == order[2] != order[1]
    assert journal("queued") == ["2", "1"]
    assert order[0] == "1-queued-1"

    # Replaced: the old one is gone, group and session, before the new one starts.
    app.set("/vars/asks", ["a"])
    wait_until(lambda: (app.folder / "pids-a").exists() and (app.folder / "pids-a").read_text(), what="a runs")
    app.set("/vars/asks", ["b", "c", "d"])
    wait_until(lambda: journal("replaced") == ["a", "d"], what="only the last of one pass counts")
    for pid in (app.folder / "pids-a").read_text().split():
        assert not psutil.pid_exists(int(pid))
    calls = {call["args"][0][1]: call for call in app.work("replaced")["calls"].values()}
    assert (calls["a"]["stage"], calls["a"]["reason"]) == ("stopped", "replaced")

    # Uncached: while one runs it is the same call, later a new one; a flag reset when it is done asks once.
    for number in (1, 2):
        (app.folder / "go-again").unlink(missing_ok=True)
        app.set("/vars/ask", number)
        wait_until(lambda number=number: journal("again") == ["again"] * number, what=f"call {number}")
        (app.folder / "go-again").touch()
        app.wait_state("/vars/ask", lambda value: value == 0)
    assert journal("again") == ["again"] * 2
    assert len(app.work("again")["calls"]) == 2

    # REST: a run of other arguments, a bad body, an unknown work, keyword arguments of a script.
    answer = app.post("/works/again/run", {"args": [["again"]]})
    assert answer["name"] == "again"
    assert len(answer["calls"]) == 3
    app.wait_state("/works/again/status/stage", lambda stage: stage == "succeeded")
    refused: dict[str, Any] = {}
    refused["unknown"] = app.request("POST", "/api/v1/works/nobody/run", json={})
    refused["body"] = app.request("POST", "/api/v1/works/again/run", json={"arguments": []})
    refused["no json"] = app.request("POST", "/api/v1/works/again/run", content=b"{")
    refused["keyword"] = app.request("POST", "/api/v1/works/again/run", json={"kwargs": {"x": 1}})
    assert {name: answer.status_code for name, answer in refused.items()} == {
        "unknown": 404, "body": 422, "no json": 400, "keyword": 422,
    }, refused["keyword"].text  # fmt: skip
    for answer in refused.values():
        assert answer.headers["content-type"] == "application/problem+json"
        assert {"type", "title", "status", "detail"} <= answer.json().keys()
    assert "keyword" in refused["keyword"].json()["detail"]


UNREADABLE = """
from orch import App, Flow, ScriptWork

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.first = ScriptWork("true", parallel=True)
        self.odd = ScriptWork("true", parallel=True, raise_exception=False)
        self.odd._options["cwd"] = 5
        self.last = ScriptWork("true", parallel=True)

    def run(self):
        for work in self.works():
            work.run()

app = App(Root())
"""


def test_a_request_that_the_agent_cannot_read_fails_its_call_alone(orch_app: Apps) -> None:
    app = orch_app(UNREADABLE)
    wait_until(lambda: not {"pending", "running"} & set(app.get("/status")["works"].values()), 20, what=app.output)
    assert app.get("/status")["works"] == {"first": "succeeded", "odd": "failed", "last": "succeeded"}
    assert "cwd" in app.work("odd")["status"]["message"]
