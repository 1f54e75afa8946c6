"""`orch down` with real processes: everything that the records name is ended, and nobody else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from orch.errors import OrchError
from orch.leftovers import clear_logs, take_down
from orch.paths import AppFolder
from orch.processes import Proc, boot_id, descendants, find, send, wait_gone

STUBBORN = "import signal,time; signal.signal(15, signal.SIG_IGN); print('up', flush=True); time.sleep(600)"
PATIENT = "import time; print('up', flush=True); time.sleep(600)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AppFolder:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    folder = AppFolder(tmp_path)
    folder.create()
    return folder


@contextmanager
def child(code: str, *args: str, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A Python that has said that it is up."""
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", code, *args],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, **(env or {})},
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def reap(process: subprocess.Popen[bytes]) -> int:
    return process.wait(timeout=10)


def start_of(pid: int) -> str:
    proc = find(pid)
    assert proc is not None
    return proc.start


def processes(folder: AppFolder) -> Path:
    place = folder.run / "processes"
    place.mkdir(exist_ok=True)
    return place


def record_script(
    folder: AppFolder, process: subprocess.Popen[bytes], *, name: str = "1-trainer-1.1", **changes: object
) -> None:
    record = {
        "pid": process.pid,
        "pid_start": start_of(process.pid),
        "pgid": process.pid,
        "waiter_pid": None,
        "waiter_start": None,
        "boot_id": boot_id(),
    }
    (processes(folder) / f"{name}.run.json").write_text(json.dumps({**record, **changes}))


def test_nothing_to_do(folder: AppFolder, tmp_path: Path) -> None:
    said: list[str] = []
    take_down(AppFolder(tmp_path / "elsewhere"), said.append)
    take_down(folder, said.append)
    assert said == [f"nothing to end: no app has been run in {tmp_path / 'elsewhere'}", "nothing was running"]


SERVER = """
import signal, sys
from orch.paths import AppFolder
with AppFolder(sys.argv[1]).lock():
    if len(sys.argv) > 2:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print("up", flush=True)
    signal.pause() if len(sys.argv) == 2 else [signal.pause() for _ in range(9)]
"""


def test_a_server_is_ended(folder: AppFolder) -> None:
    said: list[str] = []
    with child(SERVER, str(folder.root)) as server:
        reaper = threading.Thread(target=reap, args=(server,))
        reaper.start()
        take_down(folder, said.append)
        reaper.join()
        assert server.returncode == -signal.SIGTERM
    assert said == [f"server (pid {server.pid}): stopped", "all ended"]


def test_a_server_that_does_not_end_is_killed(folder: AppFolder) -> None:
    said: list[str] = []
    with child(SERVER, str(folder.root), "stubborn") as server:
        reaper = threading.Thread(target=reap, args=(server,))
        reaper.start()
        take_down(folder, said.append, timeout=0.2)
        reaper.join()
        assert server.returncode == -signal.SIGKILL
    assert said[0].startswith(f"server (pid {server.pid}): killed")


def test_a_script_without_server_and_agent_is_stopped(folder: AppFolder) -> None:
    said: list[str] = []
    with child(PATIENT) as script:
        record_script(folder, script)
        reaper = threading.Thread(target=reap, args=(script,))
        reaper.start()
        take_down(folder, said.append)
        reaper.join()
        assert script.returncode == -signal.SIGTERM
    assert said == [f"script 1-trainer-1.1 (pid {script.pid}): stopped", "all ended"]


def test_a_script_that_ignores_term_is_killed_after_the_grace(folder: AppFolder) -> None:
    said: list[str] = []
    with child(STUBBORN) as script:
        record_script(folder, script)
        reaper = threading.Thread(target=reap, args=(script,))
        reaper.start()
        take_down(folder, said.append, grace=0.2)
        reaper.join()
        assert script.returncode == -signal.SIGKILL
    assert "killed, it had not ended within 0 s" in said[0]


SLOW = """
import signal, sys, threading
ended = threading.Event()
signal.signal(15, lambda *_: ended.set())
print("up", flush=True)
ended.wait()
threading.Event().wait(0.6)
sys.exit(3)
"""


def test_each_script_has_the_grace_of_its_work(folder: AppFolder) -> None:
    """What its agent wrote down counts, not what is usual."""
    said: list[str] = []
    calls = folder.run / "calls"
    calls.mkdir(parents=True)
    with child(STUBBORN) as stubborn, child(SLOW) as slow:
        threads = []
        for script, name, grace in ((stubborn, "1-a-1.1", 0.2), (slow, "1-b-1.1", 30.0)):
            record_script(folder, script, name=name)
            (calls / f"{name}.json").write_text(json.dumps({"start": {"grace": grace}}))
            threads.append(threading.Thread(target=reap, args=(script,)))
            threads[-1].start()
        began = time.monotonic()
        take_down(folder, said.append, grace=0.4)
        for thread in threads:
            thread.join()
        assert (stubborn.returncode, slow.returncode) == (-signal.SIGKILL, 3)
        assert time.monotonic() - began < 20
    assert [line.split(": ")[1].partition(",")[0] for line in sorted(said[:2])] == ["killed", "stopped"]


FAMILY = """
import subprocess, sys
code = "import time; print('up', flush=True); time.sleep(600)"
inner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
inner.stdout.readline()
print(inner.pid, flush=True)
inner.wait()
"""


def test_several_are_ended_at_the_same_time(folder: AppFolder) -> None:
    with child(STUBBORN) as one, child(STUBBORN) as two, child(STUBBORN) as three:
        threads = []
        for number, script in enumerate((one, two, three), 1):
            record_script(folder, script, name=f"1-trainer-{number}.1")
            threads.append(threading.Thread(target=reap, args=(script,)))
            threads[-1].start()
        began = time.monotonic()
        take_down(folder, lambda line: None, grace=1.0)
        assert time.monotonic() - began < 2.5
        for thread in threads:
            thread.join()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_what_a_script_left_in_another_session_goes_too(folder: AppFolder) -> None:
    with child(FAMILY) as script:
        root = find(script.pid)
        assert root is not None
        (inner,) = descendants(root)
        record_script(folder, script)
        reaper = threading.Thread(target=reap, args=(script,))
        reaper.start()
        take_down(folder, lambda line: None)
        reaper.join()
        assert not wait_gone([inner], 5)


ORPHAN = """
import subprocess, sys, os
code = "import time; time.sleep(600)"
inner = subprocess.Popen([sys.executable, "-c", code])
print(inner.pid, flush=True)
os._exit(0)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc")
def test_what_is_left_of_a_dead_scripts_group_goes_too(folder: AppFolder) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", ORPHAN],
        stdout=subprocess.PIPE,
        start_new_session=True,
        env={**os.environ, "ORCH_CALL": "1-trainer-1"},
    )
    with process:
        assert process.stdout is not None
        inner = find(int(process.stdout.readline()))
        process.wait()
    assert inner is not None
    record = {"pid": process.pid, "pid_start": "1", "pgid": process.pid, "boot_id": boot_id()}
    (processes(folder) / "1-trainer-1.1.run.json").write_text(json.dumps(record))
    take_down(folder, lambda line: None)
    assert not wait_gone([inner], 0)


@pytest.mark.parametrize("change", [{"pid_start": "1"}, {"boot_id": "another boot"}])
def test_a_pid_that_is_somebody_elses_by_now_is_left_alone(folder: AppFolder, change: dict[str, object]) -> None:
    said: list[str] = []
    with child(PATIENT) as other:
        record_script(folder, other, pgid=None, **change)
        (folder.run / "agent-a.json").write_text(json.dumps({"pid": other.pid, "pid_start": "1", "boot_id": boot_id()}))
        take_down(folder, said.append)
        assert other.poll() is None
    assert said == ["nothing was running"]


# ---- agents --------------------------------------------------------------------------------------------------------

AGENT = """
import http.server, json, os, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["content-length"]))
        good = self.headers["authorization"] == "Bearer secret" and self.path == "/v1/shutdown"
        self.send_response(200 if good and json.loads(body) == {"kill": False} else 401)
        self.end_headers()
        if good:
            self.server.ended = True
    def log_message(self, *args): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
server.ended = False
print(server.server_port, flush=True)
while not server.ended:
    server.handle_request()
"""


@pytest.mark.parametrize(
    ("token", "code", "how"), [("secret", 0, "shut down"), ("wrong", -signal.SIGKILL, "killed (it answered 401)")]
)
def test_an_agent_is_asked_and_killed_if_it_refuses(folder: AppFolder, token: str, code: int, how: str) -> None:
    said: list[str] = []
    process = subprocess.Popen([sys.executable, "-P", "-c", AGENT], stdout=subprocess.PIPE, start_new_session=True)
    with process:
        assert process.stdout is not None
        port = int(process.stdout.readline())
        record = {
            "agent": "a",
            "epoch": 1,
            "pid": process.pid,
            "pid_start": start_of(process.pid),
            "boot_id": boot_id(),
            "url": f"http://127.0.0.1:{port}",
            "port": port,
            "token": token,
        }
        (folder.run / "agent-a.json").write_text(json.dumps(record))
        reaper = threading.Thread(target=reap, args=(process,))
        reaper.start()
        take_down(folder, said.append, timeout=5)
        reaper.join()
        assert process.returncode == code
    assert said == [f"agent-a (pid {process.pid}): {how}", "all ended"]


def test_what_cannot_be_ended_is_named(folder: AppFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orch.leftovers.send", lambda proc, number: False)
    monkeypatch.setattr("orch.leftovers.KILL_WAIT", 0.1)
    with child(PATIENT) as script:
        record_script(folder, script)
        with pytest.raises(OrchError, match=r"could not be ended: script 1-trainer-1\.1"):
            take_down(folder, lambda line: None, grace=0.1)


# ---- processes -----------------------------------------------------------------------------------------------------


def test_a_process_is_its_pid_and_its_start() -> None:
    me = find(os.getpid())
    assert me == Proc(os.getpid(), start_of(os.getpid()))
    assert find(os.getpid(), me.start, boot_id()) == me
    assert find(os.getpid(), "0") is None
    assert find(None) is None and find(0) is None and find(-1) is None and find(1) is None
    assert not send(Proc(os.getpid(), "0"), signal.SIGKILL)


def test_a_zombie_is_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    proc = find(process.pid)
    if proc is not None:
        assert wait_gone([proc], 10) == []
    assert find(process.pid) is None
    process.wait()


def test_waiting_has_an_end() -> None:
    with child(PATIENT) as process:
        proc = find(process.pid)
        assert proc is not None
        assert wait_gone([proc], 0.05) == [proc]


def test_logs_of_forgotten_runs_go(folder: AppFolder) -> None:
    logs = folder.logs / "ui.trainer"
    logs.mkdir(parents=True)
    for name in ("1-ui.trainer-1.log", "3-ui.trainer-1.log", "12-ui.trainer-1.log"):
        (logs / name).touch()
    (folder.logs / "agent-local.log").touch()
    clear_logs(folder, 3)
    assert {path.name for path in folder.logs.rglob("*.log")} == {
        "3-ui.trainer-1.log", "12-ui.trainer-1.log", "agent-local.log",
    }  # fmt: skip
