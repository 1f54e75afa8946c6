"""The disk under the journal fails, the journal itself is damaged or missing: one named error, nothing acknowledged is
lost, scripts go on, and the next `orch run` goes on from there."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from testkit import RunningApp, orch_command, wait_until

Apps = Callable[..., RunningApp]
DATA = Path(__file__).parents[1] / "data"

APP = """
from orch import App, Flow, ScriptWork

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = 0
        self.big = ""
        self.codes = []
        self.script = ScriptWork("waits.py", parallel=True, raise_exception=False)

    def run(self):
        call = self.script.run()
        if call.done and call.exit_code not in self.codes:
            self.codes.append(call.exit_code)

app = App(Root())
"""
WAITS = """
import pathlib, time
while not pathlib.Path("go").exists():
    time.sleep(0.02)
raise SystemExit(7)
"""


@pytest.fixture
def disk(app_folder: Callable[..., Path]) -> Iterator[Callable[..., None]]:
    """`.orch` of the app on a file system of its own; `disk("size=3m")` and `disk("ro")` change its mount."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = app_folder(APP, {"waits.py": WAITS}) / ".orch"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m,mode=700", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"mount is not permitted here: {made.stderr.decode().strip()}")

    def remount(options: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{options}", place], check=True, capture_output=True)

    remount.folder = place.parent  # type: ignore[attr-defined]
    yield remount
    subprocess.run(["umount", "-l", place], check=True)


def fill(app: RunningApp) -> httpx.Response:
    """Write until that is refused; the refusal. /vars/x is the last value that was acknowledged."""
    for number in range(1, 200):
        ops = [
            {"op": "replace", "path": "/vars/x", "value": number},
            {"op": "replace", "path": "/vars/big", "value": f"{number} " + "y" * 100_000},
        ]
        answer = app.client.patch(
            "/api/v1/state", content=json.dumps(ops), headers={"Content-Type": "application/json-patch+json"}
        )
        if answer.status_code != 200:
            app.acked = number - 1  # type: ignore[attr-defined]
            return answer
    raise AssertionError("the disk is large")


def script(app: RunningApp) -> list[int]:
    return [p.pid for p in app.processes() if p.cmdline()[-1:] == ["waits.py"]]


def errors(output: str) -> list[str]:
    """What was said after the last start, without notes and the works' lines."""
    assert "Traceback" not in output
    return [line for line in output.splitlines() if line.startswith("orch: ")]


def finish(app: RunningApp) -> None:
    """The script ends, and the app hears of it: exit code and all."""
    (app.folder / "go").touch()
    app.wait_state("/vars/codes", lambda codes: codes == [7])


def test_a_disk_that_fills_up(orch_app: Apps, disk: Callable[..., None]) -> None:
    app = orch_app(disk.folder)  # type: ignore[attr-defined]
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    wait_until(lambda: script(app), what="the script runs")
    living = script(app)

    # While it runs: the write is refused with the reason, the server ends, the rest lives.
    refused = fill(app)
    assert refused.status_code == 503
    problem = refused.json()
    assert problem["type"] == "urn:orch:problem:journal-error"
    assert "state.db: the disk is full" in problem["detail"]
    assert "free some space" in problem["hint"]
    assert app.wait_exit() == 1
    [said] = errors(app.output())
    assert "state.db: the disk is full" in said
    assert "free some space" in said
    assert "it resumes" in said
    assert script(app) == living

    # Started while there is no space: the same, and nothing is harmed.
    told = len(app.output())
    filler = app.folder / ".orch" / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\0" * 4096)
    app.spawn()
    assert app.wait_exit() == 1
    [said] = errors(app.output()[told:])
    assert str(app.folder / ".orch") in said
    assert "free some space" in said
    assert script(app) == living

    filler.unlink()
    disk("size=30m")
    app.start()
    assert app.state("/vars/x") == app.acked  # type: ignore[attr-defined]
    assert app.state("/vars/big").startswith(f"{app.acked} ")  # type: ignore[attr-defined]
    assert script(app) == living
    app.set("/vars/x", -1)
    finish(app)
    assert app.interrupt() == 130


@pytest.mark.parametrize("free", [0, 8, 32, 100])
def test_a_full_disk_at_the_first_start(orch_app: Apps, disk: Callable[..., None], free: int) -> None:
    """With so many KiB left it ends at the folder, at the app's files, in SQLite, at the first commit."""
    folder = disk.folder  # type: ignore[attr-defined]
    app = orch_app(folder, start=False)
    disk("size=1m")
    filler = folder / ".orch" / "filler"
    filler.write_bytes(b"\0" * (2**20 - free * 1024))
    app.spawn()
    assert app.wait_exit() == 1
    [said] = errors(app.output())
    assert str(folder / ".orch") in said
    assert "free some space" in said
    wait_until(lambda: not app.processes(), what="nothing of the app is left")
    filler.unlink()
    disk("size=30m")
    app.start()
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    finish(app)
    assert app.interrupt() == 130


def test_a_disk_that_fills_up_during_a_pass_that_does_not_end(orch_app: Apps, disk: Callable[..., None]) -> None:
    source = "import time\n" + APP.replace(
        "def run(self):", "def run(self):\n        while self.x:\n            time.sleep(0.01)"
    )
    (disk.folder / "app.py").write_text(source)  # type: ignore[attr-defined]
    app = orch_app(disk.folder)  # type: ignore[attr-defined]
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    app.set("/vars/x", 1)
    filler = app.folder / ".orch" / "filler"
    with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(b"\0" * 4096)
    # State waits for the pass, a stop does not.
    refused = app.client.post("/api/v1/works/script/stop")
    assert refused.status_code == 503
    assert app.wait_exit() == 1
    [said] = errors(app.output())
    assert "the disk is full" in said
    app.kill()  # (the agent and the script are left, as they should be)


def test_a_disk_that_is_read_only(orch_app: Apps, disk: Callable[..., None]) -> None:
    app = orch_app(disk.folder)  # type: ignore[attr-defined]
    app.set("/vars/x", 5)
    rev = app.get("/status")["rev"]
    assert app.interrupt() == 130
    disk("ro")
    told = len(app.output())
    app.spawn("--resume")
    assert app.wait_exit() in (1, 2)
    [said] = errors(app.output()[told:])
    assert str(app.folder / ".orch") in said
    assert "read-only" in said
    # It can still be looked at.
    for command in (["state", "get", "x"], ["state", "get", "x", "--rev", str(rev)]):
        done = subprocess.run([*orch_command(), *command], cwd=app.folder, capture_output=True, text=True, env=app.env)
        assert (done.returncode, done.stdout.strip()) == (0, "5"), done.stderr
    disk("rw")
    app.start("--resume")
    assert app.state("/vars/x") == 5
    finish(app)
    assert app.interrupt() == 130


def crash(app: RunningApp) -> Path:
    """kill -9 of everything, as a power cut does; where the journal is."""
    app.kill()
    for process in app.processes():
        process.kill()
    psutil.wait_procs(app.processes(), 5)
    app.killed = False
    return app.folder / ".orch" / "state.db"


def test_a_torn_end_of_the_log(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    app = orch_app(app_folder(APP, {"waits.py": WAITS}))
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    app.set("/vars/x", 1)
    wal = app.folder / ".orch" / "state.db-wal"
    before = wal.stat().st_size
    app.set("/vars/big", "y" * 20_000)
    crash(app)
    with wal.open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1000)
    assert wal.stat().st_size > before
    app.start()
    assert app.state("/vars/x") == 1
    assert app.state("/vars/big") == ""
    app.set("/vars/big", "z")
    # The waiter went too: that is the script's death, and the app goes on.
    app.wait_state("/works/script/status/reason", lambda reason: reason == "lost")
    app.kill()
    app.start()
    assert app.state("/vars/big") == "z"
    assert app.interrupt() == 130


@pytest.mark.parametrize("what", ["byte", "notes", "newer"])
def test_a_journal_that_cannot_be_read(orch_app: Apps, app_folder: Callable[..., Path], what: str) -> None:
    app = orch_app(app_folder(APP, {"waits.py": WAITS}))
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    app.set("/vars/x", 1234567)
    app.kill()
    living = wait_until(lambda: script(app), what="the script runs")
    database = app.folder / ".orch" / "state.db"
    kept = {path.name: path.read_bytes() for path in database.parent.glob("state.db*")}
    db = sqlite3.connect(database)
    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    if what == "newer":
        db.execute("PRAGMA user_version = 99")
    db.close()
    if what == "notes":
        database.write_bytes(b"these are notes " * 4096)
    elif what == "byte":
        content = database.read_bytes()
        assert content.count(b"1234567") >= 1
        database.write_bytes(content.replace(b"1234567", b"1234568"))
    wanted = {"byte": "is damaged: revision ", "notes": "not a database", "newer": "newer orch"}[what]
    told = len(app.output())
    app.spawn()
    assert app.wait_exit() == 1
    [said] = errors(app.output()[told:])
    assert str(database) in said
    assert wanted in said
    assert "--fresh" in said
    assert script(app) == living

    # Brought back from a copy it resumes ...
    for path in database.parent.glob("state.db*"):
        path.unlink()
    for name, content in kept.items():
        (database.parent / name).write_bytes(content)
    app.start()
    assert app.state("/vars/x") == 1234567
    assert script(app) == living
    assert app.interrupt() == 130

    # ... and without one the app can be started over.
    database.write_bytes(b"these are notes " * 4096)
    told = len(app.output())
    app.start("--fresh")
    assert app.state("/vars/x") == 0
    [aside] = [path for path in database.parent.glob("state.db.*")]
    assert aside.read_bytes().startswith(b"these are notes")
    assert f"{database} could not be read: it is {aside.name} now" in app.output()[told:]
    assert app.interrupt() == 130


def test_a_journal_that_is_gone(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    app = orch_app(app_folder(APP, {"waits.py": WAITS}))
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    app.set("/vars/x", 1)
    old = wait_until(lambda: script(app), what="the script runs")
    app.kill()
    for path in (app.folder / ".orch").glob("state.db*"):
        path.unlink()
    told = len(app.output())
    app.start()
    app.wait_state("/works/script/status/stage", lambda stage: stage == "running")
    assert app.state("/vars/x") == 0
    assert not set(old) & {p.pid for p in app.processes()}
    assert "shut down" in app.output()[told:], app.output()[told:]
    finish(app)
    assert app.interrupt() == 130


@pytest.mark.parametrize("old", sorted(DATA.glob("journal-*.db")), ids=lambda path: path.stem)
def test_a_journal_of_an_older_version_is_resumed(orch_app: Apps, app_folder: Callable[..., Path], old: Path) -> None:
    wanted: dict[str, Any] = json.loads((DATA / "journal.json").read_text())["state"]
    folder = app_folder((DATA / "journal_app.py").read_text())
    (folder / ".orch").mkdir()
    shutil.copy(old, folder / ".orch" / "state.db")
    look = [*orch_command(), "state", "get", "--json"]
    done = subprocess.run(look, cwd=folder, capture_output=True, text=True)
    assert json.loads(done.stdout) == wanted, done.stderr
    app = orch_app(folder, None, "--resume")
    assert app.get("/app")["run"] == 2
    state = app.state()
    assert state["vars"] == wanted["vars"]
    assert state["structures"] == wanted["structures"]
    assert state["works"]["adds"]["calls"] == wanted["works"]["adds"]["calls"]
    app.set("/vars/wanted", 4)
    app.wait_state("/works/adds/vars/total", lambda total: total == 10)
    assert app.interrupt() == 130
