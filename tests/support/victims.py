"""What the tests that kill share: the script that they watch, who is who in a running app, and what a life left."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import httpx
import psutil
from testkit import RunningApp, free_port, orch_command, wait_until

__all__ = [
    "SCRIPT",
    "Victim",
    "agent_record",
    "comparable",
    "final_revisions",
    "lives",
    "numbers_without_gap",
    "orch",
    "script_records",
    "starts",
]

SCRIPT = """
import json, os, pathlib, signal, sys, time
from orch_workers import report

work, call, attempt = (os.environ["ORCH_" + name] for name in ("WORK", "CALL", "ATTEMPT"))
ask, code = sys.argv[1:3]
with open("starts", "a") as file:
    file.write(f"{work} {call} {attempt} {os.getpid()}\\n")


def exists(kind):
    return pathlib.Path(f"{kind}-{work}").exists()


def on_term(*_):
    pathlib.Path(f"stopping-{work}").touch()
    while ask == "stops" and not exists("go"):
        time.sleep(0.01)
    print("stopped", flush=True)
    sys.exit(5)


if ask in ("stops", "hears"):
    signal.signal(signal.SIGTERM, on_term)
if ask == "ignores":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if ask in ("leaves", "ignores") and os.fork() == 0:  # a descendant keeps the waiter busy after the script's end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ask == "ignores":
        os.setsid()
    pathlib.Path(f"left-{work}").touch()
    while not exists("go"):
        time.sleep(0.01)
    os._exit(0)
while ask == "leaves" and not exists("left"):
    time.sleep(0.01)
n = 0
while ask not in ("plain", "leaves") and not exists("go"):
    n += 1
    print("line", n, flush=True)
    if n % 25 == 1 and ask == "waits":
        report(progress=0.5, loss=1 / n)
    time.sleep(0.02)
if ask == "waits":
    report(progress=1.0, loss=0.25)
if ask in ("waits", "writes"):
    folder = pathlib.Path("out-" + work)
    folder.mkdir(exist_ok=True)
    (folder / "metrics.csv").write_text("step,acc\\n1,0.5\\n2,0.75\\n")
    for i in range(20):
        (folder / f"part{i}").write_text(f"{work} {i} " * 1000)
print("end", flush=True)
raise SystemExit(int(code))
"""
"""`script.py ASK CODE`: what it does until the file go-<work> is there, and its exit code."""


def starts(app: RunningApp) -> list[tuple[str, str, int]]:
    """(work, call, attempt) of every start of SCRIPT, in order."""
    path = app.folder / "starts"
    lines = path.read_text().splitlines() if path.exists() else []
    return [(work, call, int(attempt)) for work, call, attempt, _ in (line.split() for line in lines)]


def numbers_without_gap(app: RunningApp, work: str) -> int:
    """How many lines the script of `work` has numbered. AssertionError if one is missing or doubled."""
    count = 0
    for log in (app.folder / ".orch/logs" / work).glob("*.log"):
        numbers = [int(n) for n in re.findall(r"^line (\d+)$", log.read_text(), re.MULTILINE)]
        assert numbers == list(range(1, len(numbers) + 1)), f"{log}: {numbers}"
        count += len(numbers)
    return count


def agent_record(app: RunningApp) -> dict[str, Any]:
    """What the living agent has written down; empty without one."""
    try:
        record: dict[str, Any] = json.loads((app.folder / ".orch/run/agent-local.json").read_text())
    except FileNotFoundError:
        return {}
    return record


def script_records(app: RunningApp, work: str, kind: str = "run") -> list[dict[str, Any]]:
    """The waiters' records of a work (`run` or `exit`), or the agent's of its calls (`call`), oldest first."""
    run = app.folder / ".orch/run"
    pattern = f"calls/*-{work}-*.json" if kind == "call" else f"processes/*-{work}-*.{kind}.json"
    found = []
    for path in sorted(run.glob(pattern)):
        with contextlib.suppress(FileNotFoundError):
            found.append(json.loads(path.read_text()))
    return found


def orch(app: RunningApp, *words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """An `orch` command in the app's folder."""
    return subprocess.run(
        [*orch_command(), *words],
        cwd=app.folder,
        env=app.env,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def final_revisions(app: RunningApp) -> Counter[str]:
    """How many revisions said that an attempt of a call has ended, by call."""
    found: Counter[str] = Counter()
    for row in app.get("/history?limit=1000"):
        for op in row["ops"]:
            matched = re.fullmatch(r".*/calls/([^/]+)", op["path"])
            if matched and op["op"] == "add" and op["value"]["stage"] in ("succeeded", "failed", "stopped"):
                found[matched[1]] += 1
    return found


_PASSING = {"since", "started_at", "finished_at", "port", "url", "version", "size"}
"""Fields that differ between two runs of one app, whatever happens to them."""


def comparable(tree: Any) -> Any:
    """The state without times and ports."""
    if isinstance(tree, dict):
        return {key: comparable(value) for key, value in tree.items() if key not in _PASSING}
    if isinstance(tree, list):
        return [comparable(value) for value in tree]
    return tree


class Victim:
    """A running app whose processes are killed and brought back. `recovered` holds seconds, by what
    was waited for."""

    def __init__(self, app: RunningApp) -> None:
        self.app = app
        self.port = free_port()
        self.recovered: dict[str, list[float]] = {}

    def start(self, *options: str) -> None:
        """`orch run`, on the same port each time; returns once the state is served and the agent is there."""
        again = self.app.process is not None
        begun = time.monotonic()
        process = self.app.spawn(*options, port=self.port)
        self.app.start_client(f"http://127.0.0.1:{self.port}")

        def served() -> bool:
            code = process.poll()
            assert code is None, f"orch run ended with {code}:\n{self.app.output()}"
            try:
                return httpx.get(f"{self.app.url}/api/v1/state", headers=self._bearer(), timeout=5).status_code == 200
            except (httpx.TransportError, FileNotFoundError):
                return False

        wait_until(served, 20, what=lambda: f"the state is served:\n{self.app.output()}")
        if again:
            self._took("served after a restart", begun)
        self.wait_agent(begun, "agent back after a restart" if again else "")

    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.app.token}"}

    def _took(self, what: str, begun: float) -> None:
        self.recovered.setdefault(what, []).append(time.monotonic() - begun)

    def wait_agent(self, begun: float, what: str, *, than: int = 0) -> None:
        """Until an agent (of another pid `than` this one) is attached. Both waits are ten or five times the promise."""

        def back() -> bool:
            return any(
                a["up"] and not a["silent"] and a["pid"] not in (None, than) for a in self.app.get("/status")["agents"]
            )

        wait_until(back, 25, what=lambda: f"the agent is back:\n{self.app.output()}")
        if what:
            self._took(what, begun)

    def kill(self, *who: str) -> None:
        """kill -9 of "server", "agent", "page"; the server first, so that it brings nothing back."""
        if "server" in who:
            self.app.kill()
        begun = time.monotonic()
        agent = agent_record(self.app)
        if "agent" in who and agent:
            os.kill(agent["pid"], signal.SIGKILL)
            wait_until(lambda: not lives(agent["pid"]), what="the agent is gone")
        if "page" in who:
            for record in script_records(self.app, "_root"):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(record["pid"], signal.SIGKILL)
        if "agent" in who and "server" not in who:
            self.wait_agent(begun, "agent replaced", than=agent["pid"])

    def go(self, works: Iterable[str]) -> None:
        """The scripts of these works may end."""
        for work in works:
            (self.app.folder / f"go-{work}").touch()


def lives(pid: int) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False
