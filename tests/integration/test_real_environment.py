"""--env, --env-file and secrets; the files of a running app and their modes. A secret's value is written nowhere."""

from __future__ import annotations

import json
import sqlite3
import stat
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest
from testkit import RunningApp, orch_command, wait_until

Apps = Callable[..., RunningApp]

SECRET = 'hunter2-"quoted"\\tail-93181'
OTHER = "from-the-environment-55102"

APP = """
import os, sys
from orch import App, Flow, ScriptWork, ServiceWork, Work


class Tells(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False)
        self.told = ""

    def run(self):
        self.told = os.environ["FROM_FILE"] + " " + os.environ["FROM_OPTION"]
        print("python says", os.environ["PASSWORD"])
        raise RuntimeError("it is " + os.environ["PASSWORD"])


class Leaks(Work):
    def __init__(self):
        super().__init__(parallel=True, raise_exception=False)
        self.value = ""

    def run(self):
        self.value = "x" + os.environ["KEY"]
        return os.environ["KEY"]


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.note = ""
        self.table = {}
        self.argv = sys.argv[1:]
        self.script = ScriptWork("tell.py", parallel=True, raise_exception=False, env={"OWN": "own", "BOTH": "work"},
                                 vars={"reply": ""})
        self.free = ScriptWork("tell.py", parallel=True, raise_exception=False)
        self.tells = Tells()
        self.leaks = Leaks()
        self.fails = ScriptWork("fail.py", parallel=True, raise_exception=False)

    def run(self):
        self.script.run()
        self.tells.run()
        self.leaks.run()
        self.fails.run()


app = App(Root())
"""
TELL = """
import json, os, time, urllib.error, urllib.request
names = ["FROM_FILE", "FROM_OPTION", "QUOTED", "BOTH", "PASSWORD", "KEY"]
with open("told.json", "w") as file:
    json.dump({name: os.environ.get(name) for name in [*names, "OWN"]}, file)
secret = os.environ["PASSWORD"]
print("the password is", secret, flush=True)
print("in pieces: " + secret[:8], end="", flush=True)
time.sleep(0.3)
print(secret[8:], flush=True)
request = urllib.request.Request(
    os.environ["ORCH_STATE_URL"] + "/reply", json.dumps("mine is " + secret).encode(),
    {"Authorization": "Bearer " + os.environ["ORCH_TOKEN"]}, method="PUT")
try:
    urllib.request.urlopen(request)
    print("it was taken")
except urllib.error.HTTPError as error:
    print("refused:", error.code, error.read().decode())
"""
FAIL = """
raise SystemExit("cannot log in with " + os.environ["PASSWORD"])
"""
ENV_FILE = """
# a comment
FROM_FILE=file value
export QUOTED="a b"
FROM_OPTION=overridden
"""


def holders(value: str, folder: Path) -> list[str]:
    """Files below the folder that hold the value, as it is or JSON-escaped."""
    needles = {value.encode(), json.dumps(value)[1:-1].encode()}
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]


def test_environment_and_secrets(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    folder = app_folder(APP, {"tell.py": TELL, "fail.py": FAIL, "my.env": ENV_FILE})
    app = orch_app(
        folder, None, "--env", "FROM_OPTION=option=value", "--env-file", "my.env", "--env", "BOTH=flow",
        "--secret", f"PASSWORD={SECRET}", "--secret", "KEY", argv=("--x", "1 2"), env={"KEY": OTHER},
    )  # fmt: skip
    stream: list[str] = []
    listener = threading.Thread(target=listen, args=(app, stream))
    listener.start()
    try:
        check_environment(app, folder)
    finally:
        app.interrupt()
        listener.join(10)
    assert not listener.is_alive()
    assert "the password is" in "".join(stream)
    check_nowhere(app, folder, stream)


def listen(app: RunningApp, into: list[str]) -> None:
    """Every event of the app, until it ends."""
    headers = {"Authorization": f"Bearer {app.token}"}
    try:
        with httpx.stream("GET", f"{app.url}/api/v1/events?after=0", headers=headers, timeout=30) as answer:
            into.extend(answer.iter_text())
    except httpx.TransportError:
        pass  # the app has ended


def check_environment(app: RunningApp, folder: Path) -> None:
    for name in ("script", "tells", "leaks", "fails"):
        app.wait_state(f"/works/{name}/status/stage", lambda stage: stage in ("succeeded", "failed"))
    assert app.state("/vars/argv") == ["--x", "1 2"]
    told = json.loads((folder / "told.json").read_text())
    assert told == {
        "FROM_FILE": "file value", "FROM_OPTION": "option=value", "QUOTED": "a b", "BOTH": "work",
        "PASSWORD": SECRET, "KEY": OTHER, "OWN": "own",
    }  # fmt: skip
    assert app.state("/works/tells/vars/told") == "file value option=value"

    # Shown redacted, in whatever pieces it was written.
    log = app.log("script")
    assert "the password is" in log
    assert "in pieces: " in log
    assert "refused: 422" in log, log
    assert "PASSWORD" in log.split("refused:")[1]
    assert app.state("/works/script/vars/reply") == ""
    assert "cannot log in with" in app.log("fails")
    assert "it is " in app.work("tells")["status"]["message"]

    # A Python Work cannot put it into state or result either: refused, and its name is said.
    assert app.state("/works/leaks/vars/value") == ""
    status = app.work("leaks")["status"]
    assert status["stage"] == "failed"
    assert "KEY" in status["message"], status

    # REST refuses it, saying its name.
    def refused(answer: httpx.Response) -> None:
        assert answer.status_code == 422, answer.text
        assert "PASSWORD" in answer.json()["detail"], answer.text
        assert SECRET not in answer.text
        assert json.dumps(SECRET)[1:-1] not in answer.text

    body = [{"op": "replace", "path": "/vars/note", "value": {"deep": ["a " + SECRET]}}]
    headers = {"Content-Type": "application/json-patch+json"}
    refused(app.request("PATCH", "/api/v1/state", content=json.dumps(body), headers=headers))
    refused(app.request("PUT", "/api/v1/state/vars/note", json=SECRET))
    refused(app.request("POST", "/api/v1/works/free/run", json={"args": [["--password", SECRET]]}))
    assert app.state("/vars/note") == ""
    # As a dict's key it is a value too.
    body[0]["value"] = {SECRET: 1}
    refused(app.request("PATCH", "/api/v1/state", content=json.dumps(body), headers=headers))
    pointer = "/vars/table/" + SECRET.replace("~", "~0").replace("/", "~1")
    body[0] = {"op": "add", "path": pointer, "value": 1}
    refused(app.request("PATCH", "/api/v1/state", content=json.dumps(body), headers=headers))
    refused(app.request("PUT", f"/api/v1/state{quote(pointer)}", json=1))
    assert app.state("/vars/table") == {}
    # What is no state either.
    refused(app.request("POST", "/api/v1/app/stop", json={"message": "because of " + SECRET}))
    refused(app.request("PUT", "/api/v1/drive/app/note.txt", content=SECRET.join(("x" * 500_000, "y"))))
    answer = app.request("PUT", f"/api/v1/drive/app/{OTHER}", content=b"x")
    assert (answer.status_code, "secret KEY" in answer.json()["detail"]) == (422, True)
    assert app.get("/drive/app") == []

    for path in ("/state", "/works", "/status", "/app", "/layout"):
        text = app.request("GET", f"/api/v1{path}").text
        assert SECRET not in text
        assert json.dumps(SECRET)[1:-1] not in text
        assert OTHER not in text
    processes = app.processes()
    assert len(processes) >= 2
    for process in processes:
        words = " ".join(process.cmdline())
        assert SECRET not in words, words
        assert OTHER not in words
    check_files(folder)


def check_files(folder: Path) -> None:
    orch = folder / ".orch"

    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert (orch / ".gitignore").read_text().strip() == "*"
    assert mode(orch / "token") == 0o600
    assert {mode(path) for path in (orch / "logs").rglob("*.log")} == {0o600}
    for path in (orch / "run").rglob("*"):
        if path.is_file():
            assert mode(path) & 0o077 == 0, f"{path} can be read by others"
    assert mode(orch / "state.db") & 0o077 == 0
    info = json.loads((orch / "server.json").read_text())
    assert info["pid"]
    assert info["url"].startswith("http://127.0.0.1:")
    with sqlite3.connect(f"file:{orch / 'state.db'}?mode=ro", uri=True) as database:
        assert database.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    database.close()
    for name in ("logs", "drive", "works", "run"):
        assert (orch / name).is_dir(), name


def check_nowhere(app: RunningApp, folder: Path, stream: list[str]) -> None:
    """Neither in what orch wrote, nor on the terminal, nor on the event stream. Logs are the scripts' own bytes."""
    shown = app.output() + "".join(stream)
    for value in (SECRET, OTHER):
        assert value not in shown
        assert json.dumps(value)[1:-1] not in shown
        found = [path for path in holders(value, folder / ".orch") if not path.startswith("logs/")]
        assert not found, found
        assert not [path for path in holders(value, folder / ".orch/logs") if path.startswith("agent-")]


@pytest.mark.parametrize(
    "attribute, words",
    [
        ("self.kept = {'deep': [value]}", "root.kept holds the value of the secret PASSWORD"),
        ("self.kept = ScriptWork(['echo', value])", "kept: its declaration holds the value of the secret PASSWORD"),
        ("self.kept = []", "not stored: <PASSWORD>"),
    ],
)
def test_what_would_be_stored_at_the_start_is_refused(orch_app: Apps, attribute: str, words: str) -> None:
    source = f"""
import os
from orch import App, Flow, ScriptWork
class Root(Flow):
    def __init__(self):
        super().__init__()
        value = os.environ["PASSWORD"]
        {attribute}
    def run(self):
        self.fail("not stored: " + os.environ["PASSWORD"])
app = App(Root())
"""
    app = orch_app(source, env={"PASSWORD": OTHER}, start=False)
    app.spawn("--secret", "PASSWORD")
    assert app.wait_exit() == 1, app.output()
    assert words in app.output(), app.output()
    assert OTHER not in app.output()
    assert not holders(OTHER, app.folder)


def test_a_resumed_run_asks_for_its_secrets(orch_app: Apps) -> None:
    source = """
    from orch import App, Flow, ScriptWork
    class Root(Flow):
        def __init__(self):
            super().__init__()
            self.again = ScriptWork(["python", "-c", "import os; print(len(os.environ['PASSWORD']))"], parallel=True)
        def run(self):
            self.again.run()
    app = App(Root())
    """
    app = orch_app(source, None, "--secret", "PASSWORD=12345678")
    app.wait_state("/works/again/status/stage", lambda stage: stage == "succeeded")
    assert app.interrupt() == 130
    app.spawn("--resume")
    assert app.wait_exit() == 2
    assert "PASSWORD" in app.output()
    app.start("--resume", "--secret", "PASSWORD=123456789")
    assert app.get("/app")["run"] == 1
    app.post("/works/again/run", {"args": [["x"]]})
    wait_until(lambda: "\n9\n" in app.log("again"), what=lambda: app.log("again"))
    assert app.interrupt() == 130

    # Afterwards nobody knows what to take out of its logs: they are not shown, neither here nor in a later run.
    done = subprocess.run(
        [*orch_command(), "logs", "again"], cwd=app.folder, env=app.env, capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "PASSWORD" in done.stderr
    assert ".orch/logs/again" in done.stderr
    app.start("--secret=PASSWORD=1234")
    app.wait_state("/works/again/status/stage", lambda stage: stage == "succeeded")
    log = app.log("again")
    assert "\n4\n" in log
    assert "1-again-1" not in log
    refused = app.request("GET", "/api/v1/works/again/logs?call=1-again-1")
    assert (refused.status_code, "PASSWORD" in refused.json()["detail"]) == (404, True)
