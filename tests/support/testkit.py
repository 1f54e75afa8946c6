"""What tests and benchmarks share: polling with a deadline, real `orch run` processes, and the search for leaks.

Nothing here knows orch's insides: an app is started by its command line and read through REST and its files.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

__all__ = ["RunningApp", "free_port", "kill_all", "orch_command", "processes_marked", "wait_until"]

T = TypeVar("T")

APP_MARK = "ORCH_TEST_APP"
"""Environment variable that every process of one app under test inherits, agents and scripts included."""


def wait_until(
    predicate: Callable[[], T], timeout: float = 10.0, *, interval: float = 0.02, what: str | Callable[[], str] = ""
) -> T:
    """The first true answer of `predicate`, asked every `interval` seconds. AssertionError after `timeout` seconds.

    `what` says in words what was awaited; a callable is asked only on failure, so it may be expensive.
    """
    deadline = time.monotonic() + timeout
    while True:
        answer = predicate()
        if answer:
            return answer
        if time.monotonic() >= deadline:
            words = what() if callable(what) else what
            raise AssertionError(f"not within {timeout:g} s: {words or repr(predicate)} (last answer: {answer!r})")
        time.sleep(interval)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on just now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
    return port


def orch_command() -> list[str]:
    """How a shell starts orch here: the console script beside this Python."""
    script = Path(sys.executable).with_name("orch")
    if not script.exists():
        raise FileNotFoundError(f"{script} is missing: install the project into this environment (pip install -e .)")
    return [str(script)]


def processes_marked(name: str, value: str, among: Iterable[int] | None = None) -> list[psutil.Process]:
    """Live processes whose environment has `name=value`, this one excepted. Zombies are dead."""
    found = []
    for pid in psutil.pids() if among is None else among:
        if pid == os.getpid():
            continue
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def describe(processes: Iterable[psutil.Process]) -> str:
    """One line a process: pid and command line."""
    lines = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            lines.append(f"{process.pid} {' '.join(process.cmdline())[:200]}")
    return "; ".join(lines)


def kill_all(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for each, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=5)


class RunningApp:
    """One app under test: a folder with an app file, and the `orch run` in it.

    `start` may be called again after the server has ended (resume tests). `close` stops whatever is left and says what
    it had to kill.
    """

    where: tuple[str, ...] = ("--local",)

    def __init__(self, folder: Path, app: str = "app.py", *, env: Mapping[str, str] | None = None) -> None:
        self.folder = folder
        self.app = app
        self.mark = uuid.uuid4().hex
        self.env = {**os.environ, **(env or {}), APP_MARK: self.mark, "NO_COLOR": "1", "COLUMNS": "200"}
        self.process: subprocess.Popen[bytes] | None = None
        self.url = ""
        self.started_at = 0.0
        self.killed = False
        self.output_path = folder.parent / f"{folder.name}.output"
        self._client: httpx.Client | None = None

    # -- the server process

    def command(self) -> list[str]:
        """What runs the app, up to its options."""
        return [*orch_command(), "run", self.app]

    def spawn(self, *options: str, argv: Iterable[str] = (), port: int | None = None) -> subprocess.Popen[bytes]:
        """`orch run` in the folder, without waiting for anything. Its output goes to `output_path`."""
        command = [*self.command(), *self.where, "--no-open", "--port", str(port or free_port()), *options]
        if argv := list(argv):
            command += ["--", *argv]
        self._drop_client()
        self.killed = False
        with self.output_path.open("ab") as output:
            self.started_at = time.time()
            self.process = subprocess.Popen(
                command, cwd=self.folder, env=self.env, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        return self.process

    def start(
        self, *options: str, argv: Iterable[str] = (), port: int | None = None, timeout: float = 30
    ) -> RunningApp:
        """`spawn`, then wait until the app's state is served."""
        process = self.spawn(*options, argv=argv, port=port)

        def up() -> bool:
            if (code := process.poll()) is not None:
                raise AssertionError(f"orch run ended with {code} before it served:\n{self.output()}")
            info = self.server_json()
            if info.get("pid") != process.pid:
                return False
            self.url = str(info["url"])
            try:
                return httpx.get(f"{self.url}/healthz", timeout=1).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(up, timeout, what=lambda: f"orch run serves. Its output:\n{self.output()}")
        return self

    def start_client(self, url: str) -> None:
        """Speak to this address from now on, for callers that do their own waiting."""
        self._drop_client()
        self.url = url

    def server_json(self) -> dict[str, Any]:
        """`.orch/server.json`, empty while there is none."""
        try:
            info: dict[str, Any] = json.loads((self.folder / ".orch" / "server.json").read_text())
        except (FileNotFoundError, json.JSONDecodeError):
            return {}
        return info

    def output(self) -> str:
        """What `orch run` has printed so far, all starts together."""
        return self.output_path.read_text(errors="replace") if self.output_path.exists() else ""

    def wait_exit(self, timeout: float = 30) -> int:
        """The exit code of `orch run`."""
        assert self.process is not None, "not started"
        try:
            return self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"orch run still lives after {timeout:g} s:\n{self.output()}") from None

    def interrupt(self, timeout: float = 30) -> int:
        """Ctrl-C, as a terminal sends it, then the exit code."""
        assert self.process is not None, "not started"
        self.process.send_signal(signal.SIGINT)
        return self.wait_exit(timeout)

    def kill(self) -> None:
        """kill -9 of the server alone: agents and scripts are meant to live on (`close` then ends them silently)."""
        assert self.process is not None, "not started"
        self.killed = True
        self.process.kill()
        self.process.wait(10)

    def processes(self) -> list[psutil.Process]:
        """Every live process of this app, whoever started it."""
        return processes_marked(APP_MARK, self.mark)

    def close(self, grace: float = 15) -> str:
        """End everything. Returns what outlived an orderly stop ("" if nothing did, or `kill` ended the server)."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(grace)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        self._drop_client()
        deadline = time.monotonic() + 3
        while (left := self.processes()) and not self.killed and time.monotonic() < deadline:
            time.sleep(0.05)
        words = "" if self.killed else describe(left)
        kill_all(left)
        return words

    # -- REST

    @property
    def token(self) -> str:
        return (self.folder / ".orch" / "token").read_text().strip()

    @property
    def client(self) -> httpx.Client:
        """A client with the app's address and token."""
        if self._client is None:
            headers = {"Authorization": f"Bearer {self.token}"}
            self._client = httpx.Client(base_url=self.url, headers=headers, timeout=30)
        return self._client

    def _drop_client(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def request(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Any request, with the token. If the server has died meanwhile, an AssertionError shows its output."""
        try:
            return self.client.request(method, path, **options)
        except httpx.TransportError as error:
            time.sleep(0.5)  # a dying server closes its socket before it is gone
            if self.process is None or self.process.poll() is None:
                raise
            raise AssertionError(
                f"{error!r}: orch run ended with {self.process.returncode}:\n{self.output()}"
            ) from None

    def get(self, path: str) -> Any:
        """GET below /api/v1, as JSON."""
        answer = self.request("GET", f"/api/v1{path}")
        assert answer.status_code == 200, f"GET {path}: {answer.status_code} {answer.text}"
        return answer.json()

    def state(self, pointer: str = "") -> Any:
        """The value at a pointer, e.g. `/vars/x`."""
        return self.get(f"/state{pointer}")

    def patch(self, *ops: dict[str, Any]) -> int:
        """One JSON patch of the state; the revision it became."""
        answer = self.request(
            "PATCH", "/api/v1/state", content=json.dumps(ops), headers={"Content-Type": "application/json-patch+json"}
        )
        assert answer.status_code == 200, f"PATCH {ops}: {answer.status_code} {answer.text}"
        return int(answer.json()["rev"])

    def set(self, pointer: str, value: Any) -> int:
        """Replace one value of the state; the revision it became."""
        return self.patch({"op": "replace", "path": pointer, "value": value})

    def post(self, path: str, body: Any = None) -> Any:
        """POST below /api/v1, as JSON."""
        answer = self.request("POST", f"/api/v1{path}", json=body)
        assert answer.status_code < 300, f"POST {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def work(self, name: str) -> dict[str, Any]:
        """Status of one work, e.g. `ui.trainer`."""
        answer: dict[str, Any] = self.get(f"/works/{name}")
        return answer

    def wait_state(
        self, pointer: str, wanted: Callable[[Any], Any], timeout: float = 20, interval: float = 0.03
    ) -> Any:
        """The value at `pointer` once `wanted(value)` is true."""
        seen: list[Any] = [None]

        def look() -> bool:
            seen[0] = self.state(pointer)
            return bool(wanted(seen[0]))

        wait_until(
            look, timeout, interval=interval, what=lambda: f"{pointer} (is {seen[0]!r}). Output:\n{self.output()}"
        )
        return seen[0]

    def log(self, name: str, **params: str) -> str:
        """A work's log as text."""
        answer = self.request("GET", f"/api/v1/works/{name}/logs", params=params)
        assert answer.status_code == 200, f"logs of {name}: {answer.status_code} {answer.text}"
        return answer.text


# ---- leaks ----


class LeakCheck:
    """What a test may not leave behind: live processes, non-daemon threads, listening sockets."""

    def __init__(self, mark: str, value: str) -> None:
        self.mark, self.value = mark, value
        self.pids = set(psutil.pids())
        self.threads = set(threading.enumerate())
        self.ports = self._ports()

    @staticmethod
    def _ports() -> set[int]:
        connections = psutil.Process().net_connections(kind="tcp")
        return {found.laddr.port for found in connections if found.status == psutil.CONN_LISTEN}

    def new_processes(self) -> list[psutil.Process]:
        """Processes that were started since, even ones that left their parent: the mark is in their environment."""
        fresh = set(psutil.pids()) - self.pids
        return processes_marked(self.mark, self.value, among=fresh) if fresh else []

    def found(self) -> list[str]:
        """One line a leak."""
        leaks = []
        if processes := self.new_processes():
            leaks.append(f"processes: {describe(processes)}")
        threads = [t for t in threading.enumerate() if t not in self.threads and not t.daemon and t.is_alive()]
        if threads:
            leaks.append(f"threads: {', '.join(t.name for t in threads)}")
        if ports := self._ports() - self.ports:
            leaks.append(f"listening sockets: {', '.join(map(str, sorted(ports)))}")
        return leaks
