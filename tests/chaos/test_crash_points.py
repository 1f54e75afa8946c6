"""A process killed at every point where something is written, renamed, committed or sent, and what must still hold.

Each case runs the same small app with one `ORCH_CRASH_AT`, starts `orch run` again if it was the server that died, and
compares with the run that nothing happened to.
"""

from __future__ import annotations

import ast
import contextlib
import json
import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from testkit import RunningApp, orch_command, wait_until

from orch.backup import Backup
from orch.journal import Journal
from orch.paths import AppFolder
from orch_drive import DriveStore
from orch_drive.crash import POINTS

ROOT = Path(__file__).resolve().parents[2]

APP = """
from pathlib import Path
from orch import App, Flow, List, ScriptWork, ServiceWork, Work

STEP = ["python", str(Path(__file__).with_name("step.py"))]
AGAIN = {"retries": 3, "retry_delay": 0.05, "grace": 2.0}


class Adds(Work):
    def __init__(self):
        super().__init__(parallel=True, **AGAIN)
        self.rows = []

    def run(self, goal):
        while len(self.rows) < goal:
            self.rows.append(len(self.rows) + 1)
        return {"sum": sum(self.rows)}


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.go = False
        self.ends = []
        self.first = ScriptWork(STEP, outputs=["out"], sync_interval=0.1, vars={"count": 0}, **AGAIN)
        self.some = List(
            ScriptWork(
                STEP, parallel=True, cwd="{work_dir}", inputs=["first:out", "in.txt"], vars={"count": 0}, **AGAIN
            )
        )
        self.adds = Adds()
        self.server = ServiceWork(["python", "serve.py", "{port}"], grace=2.0)

    def run(self):
        self.server.run()
        first = self.first.run("6")
        calls = [first]
        if not self.ends:
            calls += [self.some[0].run("3"), self.adds.run(4)]
            if not all(call.done for call in calls):
                return
            for call in calls:
                self.ends.append([call.id, call.exit_code, call.result])
            self.ends.append(self.some[0].count)
            del self.some[0]
        if self.go and self.server.has_stopped:
            self.stop("done")


app = App(Root())
"""
STEP = """
import http.client, json, os, subprocess, sys, time
from urllib.parse import urlsplit

app = os.path.dirname(os.path.abspath(__file__))
me = [os.environ[name] for name in ("ORCH_WORK", "ORCH_CALL", "ORCH_ATTEMPT")]


def note(file, *words):
    with open(os.path.join(app, file), "a") as out:
        out.write(" ".join(map(str, words)) + "\\n")


note("starts", *me, "ORCH_CRASH_AT" in os.environ)
subprocess.Popen(["sleep", "100"])
url = urlsplit(os.environ["ORCH_STATE_URL"])
headers = {"Authorization": "Bearer " + os.environ["ORCH_TOKEN"]}
os.makedirs("out", exist_ok=True)
with open("out/a.txt", "w") as out:
    for n in range(1, int(sys.argv[1]) + 1):
        print("line", n, flush=True)
        print("row", n, file=out, flush=True)
        status = 0
        while status != 200:  # 202: it is kept, but not for sure; refused: the agent is being replaced
            try:
                connection = http.client.HTTPConnection(url.netloc, timeout=10)
                connection.request("PUT", url.path + "/count", str(n), headers)
                answer = connection.getresponse()
                status, body = answer.status, answer.read()
                assert status in (200, 202), body
            except OSError:
                pass
            except http.client.HTTPException:
                pass
            time.sleep(0.03)
        note("acks", me[0], n, json.loads(body)["rev"])
note("ends", *me)
"""
SERVE = """
import socket, sys

listener = socket.create_server(("127.0.0.1", int(sys.argv[1])))
while True:
    connection, _ = listener.accept()
    connection.recv(4096)
    connection.sendall(b"HTTP/1.0 200 OK\\r\\n\\r\\nhere")
    connection.close()
"""

DONE = ("succeeded", "failed", "stopped")
ELSEWHERE = {point for point in POINTS if point.startswith(("drive.prune.", "drive.part.", "flow.log."))}
"""Not reached by this app: the Drive's contract tests crash there, and those of Works with places of their own."""
LATER = {
    "flow.journal.written": (4,),
    "flow.journal.committed": (2, 3, 5, 9),
    "flow.snapshot.written": (2,),
    "flow.backup.sent": (2, 4),
    "flow.backup.written": (3,),
    "flow.push.committed": (3,),
    "agent.push.answered": (2,),
    "agent.accepted.renamed": (2,),
    "agent.ended.renamed": (2,),
    "agent.spawn.answered": (3,),
    "agent.published": (2,),
}
"""Times after the first that are another situation."""
CASES = [f"{point}:{n}" for point in POINTS if point not in ELSEWHERE for n in (1, *LATER.get(point, ()))]


class Crashed:
    """The app of a case, from its start to the end of its run, whatever dies on the way."""

    def __init__(self, folder: Path, crash: str) -> None:
        folder.mkdir()
        for name, text in {"app.py": APP, "step.py": STEP, "serve.py": SERVE, "in.txt": "input\n"}.items():
            (folder / name).write_text(text)
        state = folder.parent / "xdg"
        env = {"XDG_STATE_HOME": str(state), **({"ORCH_CRASH_AT": crash} if crash else {})}
        self.backup = f"file://{folder.parent}/backup" if crash.startswith("flow.backup.") else ""
        self.app = RunningApp(folder, env={**env, **({"ORCH_BACKUP": self.backup} if self.backup else {})})
        self.folder, self.orch = folder, folder / ".orch"
        self.crash = crash
        self.lives = 0
        self.told: list[str] = []
        DriveStore((self.orch / "drive").as_uri(), "app").publish("user", "in.txt", folder / "in.txt")

    def live(self) -> None:
        """Start the app, and start it again until its run has ended."""
        code = -signal.SIGKILL
        while code == -signal.SIGKILL and not self.run_ended():
            self.lives += 1
            assert self.lives <= 2, self.app.output()
            self.app.spawn()
            wait_until(self.over_or_told, 40, what=self.story)
            try:
                code = self.app.wait_exit(30)
            except AssertionError:
                raise AssertionError(self.story()) from None
        assert code in (0, -signal.SIGKILL), self.story()
        assert self.run_ended() == "stopped", self.story()

    def over_or_told(self) -> bool:
        """Somebody at the page: once the first results are in they write a variable, then stop a work, each until the
        server has said that it is done."""
        process = self.app.process
        assert process is not None
        info = self.app.server_json()
        if process.poll() is not None:
            return True
        if info.get("pid") != process.pid:
            return False
        headers = {"Authorization": f"Bearer {(self.orch / 'token').read_text()}"}
        try:
            with httpx.Client(base_url=f"{info['url']}/api/v1", headers=headers, timeout=10) as client:
                if not self.told and client.get("/state/vars/ends").json():
                    answer = client.put("/state/vars/go", content="true")
                    assert answer.status_code == 200, answer.text
                    self.told.append("go")
                    with (self.folder / "acks").open("a") as acks:
                        acks.write(f"- true {answer.json()['rev']}\n")
                if self.told == ["go"]:
                    answer = client.post("/works/server/stop")
                    if answer.status_code == 503 and "has ended" in answer.text:
                        return False  # a stop was heard before the server died, and this one comes at the very end
                    assert answer.status_code == 200, answer.text
                    self.told.append("stop")
        except httpx.TransportError:
            return False
        return len(self.told) == 2

    def story(self) -> str:
        logs = (*self.orch.glob("logs/agent-local.log"), *self.orch.glob("run/processes/*.log"))
        return "\n".join([self.app.output(), *(f"{path.name}:\n{path.read_text()}" for path in logs)])

    # -- what is left

    def journal(self, look: Callable[[Journal], Any]) -> Any:
        journal = Journal.open(self.orch / "state.db", readonly=True)
        with contextlib.closing(journal):
            return look(journal)

    def run_ended(self) -> str | None:
        if not (self.orch / "state.db").exists():
            return None

        def how(journal: Journal) -> str | None:
            runs = journal.runs()
            assert len(runs) <= 1, runs
            return runs[-1].how if runs else None

        try:
            return self.journal(how)
        except Exception as error:  # killed before the tables were there
            assert "no such table" in str(error), error
            return None

    def state(self) -> Any:
        return self.journal(lambda journal: journal.load(1).state)

    def calls(self) -> Iterator[dict[str, Any]]:
        """Every call as the tree showed it, revision by revision."""
        for revision in self.journal(lambda journal: journal.revisions(1, 0, 10_000)):
            for op in revision.ops:
                if "/calls/" in op["path"] and op["op"] != "remove":
                    yield op["value"]

    def lines(self, name: str) -> list[list[str]]:
        return [line.split() for line in (self.folder / name).read_text().splitlines()]


def outcome(state: dict[str, Any]) -> dict[str, Any]:
    """What does not depend on when and how often something was tried."""
    works = {}
    for name, work in state["works"].items():
        status = work["status"]
        works[name] = {
            "vars": work["vars"],
            "status": [status[key] for key in ("stage", "reason", "exit_code", "num_successes", "is_ready")],
            "calls": {
                call: [value[key] for key in ("stage", "reason", "exit_code", "result", "args")]
                for call, value in work["calls"].items()
            },
        }
    return {"vars": state["vars"], "works": works, "structures": state["structures"], "stage": state["app"]["stage"]}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    crashed = Crashed(tmp_path_factory.mktemp("undisturbed") / "app", "")
    crashed.live()
    return outcome(crashed.state())


@pytest.mark.slow
@pytest.mark.parametrize("crash", CASES)
def test_a_crash_loses_nothing(tmp_path: Path, undisturbed: Any, crash: str) -> None:
    crashed = Crashed(tmp_path / "app", crash)
    try:
        crashed.live()
        check(crashed, undisturbed)
    finally:
        left = crashed.app.close()
    assert not left


def check(crashed: Crashed, undisturbed: Any) -> None:
    point, _, times = crashed.crash.rpartition(":")
    assert (crashed.orch / f"run/crashed-{point}-{times}").exists(), f"{point} was not reached {times} times"
    left = crashed.app.processes()
    assert not left, f"outlived the app: {left}\n{crashed.story()}"

    # Each attempt's script was started at most once, and did not hear of this test.
    starts = [tuple(line) for line in crashed.lines("starts")]
    assert all(count == 1 for count in Counter(starts).values()), starts
    assert {last for *_, last in starts} == {"False"}

    # What the scripts printed is there, in order; one that was not killed has printed all.
    for work, call, attempt, _ in starts:
        log = (crashed.orch / f"logs/{work}/{call}.log").read_text()
        said = log.split(f"--- {call} attempt {attempt} ")
        assert len(said) == 2, log
        printed = [line for line in said[1].partition("---\n")[2].partition("---")[0].splitlines()]
        assert printed == [f"line {n + 1}" for n in range(len(printed))], log
        if [work, call, attempt] in crashed.lines("ends"):
            assert len(printed) == {"first": 6, "some.0": 3}[work], log

    # Each attempt ended once, each call was done once.
    ends: dict[str, set[tuple[int, float]]] = {}
    done: Counter[str] = Counter()
    last: dict[str, str] = {}
    for call in crashed.calls():
        stopped_waiting = call["stage"] == "stopped" and last.get(call["id"]) == "pending"  # between two attempts
        if call["finished_at"] is not None and not stopped_waiting:
            ends.setdefault(call["id"], set()).add((call["attempt"], call["finished_at"]))
        if call["stage"] in DONE and last.get(call["id"]) not in DONE:
            done[call["id"]] += 1
        last[call["id"]] = call["stage"]
    for call_id, found in ends.items():
        assert len({attempt for attempt, _ in found}) == len(found), (call_id, found)
    assert set(done.values()) == {1}, done

    # Every acknowledged write was journalled with the revision that was told, and the end is the same.
    for who, value, rev in crashed.lines("acks"):
        path = {"-": "vars/go", "first": "works/first/vars/count", "some.0": "structures/some/works/0/vars/count"}[who]
        found = crashed.journal(lambda journal, rev=int(rev): journal.at(1, rev).root)
        for key in path.split("/"):
            found = found[key]
        assert found == json.loads(value), (who, value, rev)
    assert outcome(crashed.state()) == undisturbed, crashed.story()

    if crashed.backup:  # another machine would go on with the same
        elsewhere = crashed.folder.parent / "elsewhere"
        elsewhere.mkdir()
        assert Backup(crashed.backup, elsewhere / "state.db").claim(fresh=False)
        with contextlib.closing(Journal.open(elsewhere / "state.db", readonly=True)) as copy:
            assert outcome(copy.load(1).state) == undisturbed
            assert copy.runs()[-1].how == "stopped"

    # The outputs are there once, whole.
    store = DriveStore((crashed.orch / "drive").as_uri(), "app")
    assert [version.version for version in store.versions("out") if not version.partial] == [1]
    assert store.verify("out") == 1
    manifest = store.resolve("out")
    assert manifest is not None
    store.fetch(manifest, crashed.folder.parent / "got")
    assert (crashed.folder.parent / "got/a.txt").read_text() == "".join(f"row {n}\n" for n in range(1, 7))

    # What a killed process had begun to write is gone with the next start, and with the next clean one from the Drive.
    with AppFolder(crashed.folder).lock():
        pass
    store.gc()
    assert not store.storage.listing("tmp")
    drafts = [
        path for path in crashed.folder.rglob("*") if path.name.endswith(".tmp") or path.name.startswith(".orch-")
    ]
    assert not drafts
    assert not list((crashed.folder.parent / "xdg").rglob("*.tmp"))


def test_every_point_is_entered_and_every_entry_is_a_point() -> None:
    def points(tree: ast.AST) -> Iterator[str]:
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name == "crash_point":
                if isinstance(node.args[0], ast.Constant):
                    yield f"{node.args[0].value}{'.' * (len(node.args) > 1)}"
            for keyword in node.keywords:
                if keyword.arg == "point" and isinstance(keyword.value, ast.Constant):
                    yield f"{keyword.value.value}."

    called = set()
    for package in ("orchestrator/orch", "workers/orch_workers", "drive/orch_drive", "ui/orch_ui"):
        for path in (ROOT / package).rglob("*.py"):
            called |= set(points(ast.parse(path.read_text())))
    assert len(called) > 40
    for name in called:
        assert any(point == name or (name.endswith(".") and point.startswith(name)) for point in POINTS), name
    assert len(set(POINTS)) == len(POINTS)


def test_a_name_that_does_not_exist_is_refused() -> None:
    env = {**os.environ, "ORCH_CRASH_AT": "flow.nowhere:1"}
    answer = subprocess.run([*orch_command(), "run"], env=env, capture_output=True, text=True, timeout=60)
    assert answer.returncode != 0
    assert "ORCH_CRASH_AT" in answer.stderr
