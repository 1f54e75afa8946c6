"""`orch run` as a process: how it starts, refuses, says things and ends; nothing of it is left afterwards."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import psutil
from testkit import RunningApp, free_port, orch_command, wait_until

Apps = Callable[..., RunningApp]

STUBBORN = """
from orch import App, Flow, ScriptWork, ServiceWork, Work


class Sleeps(Work):
    def __init__(self):
        super().__init__(parallel=True, grace=0.5)
        self.up = False

    def run(self):
        import signal, subprocess, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "600"], start_new_session=True)
        self.up = True
        while True:
            time.sleep(1)


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.stubborn = ScriptWork("ignores_term.py", parallel=True, grace=0.5)
        self.forker = ScriptWork("setsid_grandchild.py stay", parallel=True, grace=0.5)
        self.shelled = ScriptWork("sleep 600 & sleep 601", shell=True, parallel=True, grace=0.5)
        self.service = ServiceWork("python -m http.server {port} --bind 127.0.0.1", grace=0.5)
        self.sleeps = Sleeps()
        self.code = ""

    def run(self):
        for work in self.works():
            work.run()
        if self.code == "stop":
            self.stop("all done")
        if self.code == "fail":
            self.fail("no use")
        if self.code == "raise":
            raise ValueError("a flow's error")


app = App(Root(), name="stubborn")
"""
CHILDREN = Path(__file__).parent.parent / "children"
FILES = {name: (CHILDREN / name).read_text() for name in ("ignores_term.py", "setsid_grandchild.py")}
SLEEPER = """
from orch import App, Flow, ScriptWork
class Root(Flow):
    def __init__(self):
        super().__init__()
        self.w = ScriptWork("sleep 600", parallel=True)
        self.n = 0
    def run(self):
        self.w.run()
app = App(Root())
"""


def wait_up(app: RunningApp) -> list[psutil.Process]:
    """Every process of the app, once all its scripts run."""
    wait_until(lambda: (app.folder / "ready").exists() and (app.folder / "child").exists(), 20, what=app.output)
    app.wait_state("/works/sleeps/vars/up", bool)
    wait_until(lambda: app.work("service")["status"]["is_ready"], 15, what="the service is ready")
    (app.folder / "ready").unlink()
    (app.folder / "child").unlink()
    return app.processes()


def orch(app: RunningApp, *words: str, code: int = 0) -> str:
    done = subprocess.run(
        [*orch_command(), *words], cwd=app.folder, env=app.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == code, f"orch {words}: {done.returncode}\n{done.stdout}\n{done.stderr}\n{app.output()}"
    return done.stdout or done.stderr


def assert_gone(app: RunningApp, processes: list[psutil.Process]) -> None:
    assert len(processes) >= 10, processes
    wait_until(lambda: not app.processes(), 3, what=lambda: f"gone: {app.processes()}")


def test_nothing_outlives_any_way_to_end(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    folder = app_folder(STUBBORN, FILES)
    app = orch_app(folder)
    runs = []

    processes = wait_up(app)
    runs.append(app.get("/app")["run"])
    assert app.interrupt() == 130
    assert_gone(app, processes)

    app.start()
    processes = wait_up(app)
    runs.append(app.get("/app")["run"])
    app.set("/vars/code", "raise")
    assert app.wait_exit() == 1
    assert_gone(app, processes)
    assert "ValueError: a flow's error" in app.output()
    assert 'raise ValueError("a flow' in app.output()

    app.start()
    processes = wait_up(app)
    runs.append(app.get("/app")["run"])
    orch(app, "stop")
    assert app.wait_exit() == 0
    assert_gone(app, processes)
    assert runs == [1, 2, 3]

    # kill -9 of server and agent: what is left is ended by `orch down`.
    app.start()
    processes = wait_up(app)
    agent = json.loads((folder / ".orch/run/agent-local.json").read_text())["pid"]
    app.kill()
    psutil.Process(agent).kill()
    wait_until(lambda: not psutil.pid_exists(agent) or psutil.Process(agent).status() == "zombie", what="agent dead")
    assert len(app.processes()) > 5
    said = orch(app, "down")
    assert "script" in said
    assert_gone(app, processes)
    assert "nothing" in orch(app, "down")


def test_two_ctrl_c_kill_at_once(orch_app: Apps) -> None:
    app = orch_app(STUBBORN.replace("grace=0.5", "grace=60.0"), FILES)
    processes = wait_up(app)
    app.process.send_signal(signal.SIGINT)
    wait_until(lambda: app.get("/status")["stage"] == "stopping", what="stopping")
    app.process.send_signal(signal.SIGINT)
    assert app.wait_exit(10) == 130
    assert_gone(app, processes)


def test_one_server_a_folder_and_usage_errors(orch_app: Apps) -> None:
    app = orch_app(SLEEPER)
    pid = app.process.pid
    said = orch(app, "run", "--no-open", code=2)
    assert str(pid) in said
    assert app.url in said
    said = orch(app, "run", "-d", code=2)
    assert str(pid) in said
    app.set("/vars/n", 7)
    assert app.interrupt() == 130

    # Another app file: refused unless --fresh.
    (app.folder / "other.py").write_text((app.folder / "app.py").read_text())
    said = orch(app, "run", "other.py", "--no-open", "--port", "0", code=2)
    assert "app.py" in said
    assert "--fresh" in said
    assert orch(app, "run", "nope.py", code=2)
    assert orch(app, "run", "--resume", "--fresh", code=2)
    assert orch(app, "run", "--port", "many", code=2)
    assert orch(app, "run", "--env", "novalue", code=2)
    assert orch(app, "nonsense", code=2)
    (app.folder / "two.py").write_text("from orch import App, Work\na = App(Work())\nb = App(Work())\n")
    assert "two.py" in orch(app, "run", "two.py", "--fresh", code=2)

    # A taken port: the next free one, and it says so, also when it was asked for.
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        app.start(port=port)
        assert app.url != f"http://127.0.0.1:{port}"
        assert f"port {port} is taken" in app.output()
        assert app.state("/vars/n") == 0, "a run that ended cleanly is followed by a new one"
        assert app.interrupt() == 130

    # --resume after a clean end: state is kept; then a new run again.
    app.start()
    app.set("/vars/n", 9)
    run = app.get("/app")["run"]
    assert app.interrupt() == 130
    app.start("--resume")
    assert (app.state("/vars/n"), app.get("/app")["run"]) == (9, run)
    assert app.interrupt() == 130

    # In the background.
    said = orch(app, "run", "-d", "--port", str(free_port()), "--name", "behind")
    url = next(word for word in said.split() if word.startswith("http"))
    info = app.server_json()
    assert url.startswith(info["url"])
    assert "token=" in url
    assert httpx.get(f"{info['url']}/healthz").status_code == 200
    assert orch(app, "status", "--json")
    server = psutil.Process(info["pid"])
    orch(app, "stop")
    server.wait(10)
    assert not app.processes()


def test_what_it_says(orch_app: Apps) -> None:
    """The works' output prefixed with their names; the URL with its token; the routes' address rules."""
    source = """
    import sys
    from orch import App, Flow, ScriptWork, Get
    class Child(Flow):
        def __init__(self):
            super().__init__()
            self.deep = ScriptWork(["python", "-c", "print('a line'); print('bar\\\\rof\\\\rreturns')"], parallel=True)
    class Root(Flow):
        def __init__(self):
            super().__init__()
            self.child = Child()
            self.argv = sys.argv
        def run(self):
            self.child.deep.run()
    app = App(Root())
    """
    app = orch_app(source, None, "--allow-host", "my.example", argv=("--flag", "--", "x y"))
    app.wait_state("/flows/child/works/deep/status/stage", lambda stage: stage == "succeeded")
    wait_until(lambda: re.search(r"child\.deep\s.*a line", app.output()), what=app.output)
    wait_until(lambda: f"{app.url}/?token={app.token}" in app.output(), what=app.output)
    argv = app.state("/vars/argv")
    assert (Path(argv[0]).name, argv[1:]) == ("app.py", ["--flag", "--", "x y"])
    for host, status in (("my.example", 200), ("evil.example", 403), ("localhost:1", 200), ("[::1]:9", 200)):
        answer = app.request("GET", "/api/v1/app", headers={"Host": host})
        assert answer.status_code == status, (host, answer.text)
    os.kill(app.process.pid, signal.SIGINT)
    assert app.wait_exit() == 130
    # After the end: logs and state are readable without a server.
    assert "a line" in orch(app, "logs", "child.deep")
    assert "--flag" in orch(app, "state", "get", "/vars/argv", "--json")


ENDS = """
from orch import App, Flow, ScriptWork, Work
class Py(Work):
    def run(self):
        raise ValueError("a work's error")
class Root(Flow):
    def __init__(self):
        super().__init__()
        self.n = 0
        self.how = ""
        self.w = ScriptWork(["python", "-c", "raise SystemExit(4)"], parallel=True)
        self.py = Py(parallel=True)
    def run(self):
        if self.how == "python":
            self.py.run()
        if self.how == "stop":
            self.n = 1
            self.stop("all done")
        if self.how == "fail":
            self.fail("no use")
        if self.how == "work":
            self.w.run()
app = App(Root())
"""


def test_exit_codes(orch_app: Apps) -> None:
    app = orch_app(ENDS, start=False)
    for how, code, said in (("stop", 0, "all done"), ("fail", 1, "no use"), ("work", 1, "exit code 4")):
        before = len(app.output())
        app.start()
        app.set("/vars/how", how)
        assert app.wait_exit() == code, (how, app.output())
        assert said in app.output()[before:], how
        assert "Traceback" not in app.output()[before:]
        assert app.output()[before:].count(said) == 1, app.output()[before:]

    # The failed call is named once, its traceback is in its log's lines.
    before = len(app.output())
    app.start()
    app.set("/vars/how", "python")
    assert app.wait_exit() == 1
    lines = app.output()[before:].splitlines()
    said_by = [line.partition(" ")[0] for line in lines if "ValueError: a work's error" in line]
    assert sorted(said_by) == ["orch:", "py"], lines
    assert sum("Traceback" in line for line in lines) == 1, lines
    assert json.loads(orch(app, "state", "get", "/app", "--json"))["run"] == 4
