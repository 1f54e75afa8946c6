"""The `orch` command on a real app, in processes of its own: what a user types, what it answers, its exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

APP = """
from orch import App, Flow, ScriptWork, ServiceWork


class Child(Flow):
    def __init__(self):
        super().__init__()
        self.words = ["a"]


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.count = 1
        self.child = Child()
        self.once = ScriptWork("once.py", outputs=["out"])
        self.up = ServiceWork("python -u up.py {port}", grace=1.0)

    def run(self):
        self.up.run()
        self.once.run([str(self.count)])


app = App(Root(), name="cli test")
"""
ONCE = """
import pathlib, sys
print("once", sys.argv[1], flush=True)
pathlib.Path("out").mkdir(exist_ok=True)
pathlib.Path("out", "n.txt").write_text(sys.argv[1])
"""
UP = """
import http.server, sys
print("listening", flush=True)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), http.server.SimpleHTTPRequestHandler).serve_forever()
"""


class Cli:
    """Types commands in an app's folder."""

    def __init__(self, folder: Path, state: Path) -> None:
        self.folder = folder
        self.env = {**os.environ, "XDG_STATE_HOME": str(state), "NO_COLOR": "1"}

    def __call__(self, *words: str, code: int = 0, cwd: Path | None = None) -> tuple[str, str]:
        """(stdout, stderr). Fails unless it ends with that exit code."""
        done = subprocess.run(
            [sys.executable, "-P", "-m", "orch.cli", *words],
            cwd=cwd or self.folder,
            env=self.env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, f"orch {words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout, done.stderr

    def json(self, *words: str) -> Any:
        return json.loads(self(*words, "--json")[0])

    def start(self, *words: str) -> str:
        """The URL of an app in the background."""
        return self("run", "--port", "0", "-d", *words)[0].splitlines()[-1]

    def wait(self, work: str, stage: str) -> None:
        """Until the work has come to the stage: watches the events."""
        follow = subprocess.Popen(
            [sys.executable, "-P", "-m", "orch.cli", "events", "-f", "--kind", "status", "--json"],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert follow.stdout is not None
        with follow:
            for line in follow.stdout:
                data = json.loads(line)["data"]
                if (data["work"], data["stage"]) == (work, stage):
                    break
            follow.terminate()


@pytest.fixture
def cli(app_folder: Callable[..., Path], tmp_path: Path) -> Iterator[Cli]:
    cli = Cli(app_folder(APP, {"once.py": ONCE, "up.py": UP}), tmp_path / "state")
    yield cli
    cli("down", "--timeout", "10")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_an_app_from_start_to_end(cli: Cli, tmp_path: Path) -> None:
    url = cli.start()
    base, _, token = url.partition("/?token=")
    assert base.startswith("http://127.0.0.1:")
    assert (cli.folder / ".orch" / "token").read_text() == token
    cli.wait("once", "succeeded")
    cli.wait("up", "ready")

    # ps, status
    lines = cli("ps")[0].splitlines()
    assert lines[0] == f"cli test  run 1  running  {base}"
    assert lines[2].split() == ["WORK", "STAGE", "REASON", "CALL", "ATTEMPT", "SINCE", "PROGRESS", "URL"]
    rows = {line.split()[0]: line.split() for line in lines[3:]}
    assert rows["once"][1:5] == ["succeeded", "-", "1-once-1", "1"]
    assert rows["up"][1] == "running" and rows["up"][-1].endswith("/view/up/")
    found = cli.json("ps")
    assert found["app"]["server"] is True
    assert {work["name"] for work in found["works"]} == {"once", "up"}
    status = cli.json("status")
    assert (status["name"], status["stage"], status["url"]) == ("cli test", "running", base)
    assert f"url          {base}" in cli("status")[0]

    # one app a folder, by folder, name, URL and app file
    said = cli("run", code=2)[1]
    assert said.count("\n") == 1
    assert f"pid {status['pid']} at {base}" in said
    for app in (str(cli.folder), "cli test", base, url, str(cli.folder / "app.py")):
        assert cli("state", "get", "count", "--app", app, cwd=tmp_path)[0] == "1\n"
    assert cli("open", "--print", "--app", "cli test", cwd=tmp_path)[0].strip() == url

    # state
    assert cli("state", "get", "child.words")[0].split() == ["[", '"a"', "]"]
    assert cli("state", "set", "child.words", '["b"]')[0].startswith('/flows/child/vars/words = ["b"] (revision ')
    err = cli("state", "set", "/flows/child/vars/words/0", "two words")[1]
    assert err == 'orch: taken as the string "two words"\n'
    assert cli.json("state", "get", "/flows/child/vars") == {"words": ["two words"]}
    assert re.match(r"\d+ 2\d{3}-\d\d-\d\d \d\d:\d\d:\d\d api ", cli("state", "history", "child.words")[0])
    history = cli.json("state", "history", "child.words")
    assert [revision["cause"] for revision in history[-2:]] == ["api", "api"]
    assert cli("state", "get", "child.nope", code=1)[1] == "orch: state: child has no 'nope'; there is: words\n"
    assert "orch: " in cli("state", "set", "app.stage", "stopped", code=1)[1]
    assert cli("state", "set", "count", "NaN")[1] == 'orch: taken as the string "NaN"\n'
    cli("state", "set", "count", "2")
    cli.wait("once", "succeeded")

    # logs
    assert "once 1\n" in cli("logs", "once")[0]
    assert cli("logs", "once", "--grep", "^once 1$")[0] == "once 1\n"
    assert cli("logs", "up", "--tail", "1", "--grep", "listening")[0] == "listening\n"
    assert {json.loads(line)["work"] for line in cli("logs", "--json")[0].splitlines()} == {"once", "up"}
    assert "up | listening\n" in cli("logs")[0]
    assert "no-such" in cli("logs", "no-such", code=1)[1]

    # drive
    files = cli.json("drive", "ls")
    assert [(file["path"], file["component"]) for file in files] == [("out/n.txt", "once")]
    assert cli("drive", "put", "once.py", "code/x.py")[0] == "code/x.py: published as version 1\n"
    for place, path in ((".", "once.py"), ("tmp/", "tmp/once.py")):
        assert cli("drive", "put", "once.py", place)[0] == f"{path}: published as version 1\n"
        cli("drive", "rm", path)
    assert [file["path"] for file in cli.json("drive", "ls", "**/*.py")] == ["code/x.py"]
    assert cli("drive", "get", "code/x.py", "got.py")[0].startswith("got.py: version 1, 1 of 1 files")
    assert (cli.folder / "got.py").read_text() == (cli.folder / "once.py").read_text()
    assert cli("drive", "verify")[0] == ".: 2 files verified\n"
    assert cli.json("drive", "versions", "out")[0]["version"] == 1
    assert "bucket" in cli("drive", "get", "code/x.py", "--link", code=2)[1]
    cli("drive", "rm", "code/x.py")
    assert "code" in cli("drive", "ls", "code", code=1)[1]

    # works, and the end
    assert cli("stop", "up")[0] == "up: stopped\n"
    assert cli("restart", "up")[0] == "up: restarting\n"
    assert "no-such" in cli("restart", "no-such", code=1)[1]
    assert cli("stop")[0] == "cli test: stopped\n"

    # afterwards
    assert cli("ps")[0].splitlines()[0] == "cli test  run 1  stopped, server not running"
    assert cli.json("state", "get", "count") == 2
    assert "once 1\n" in cli("logs", "once")[0]
    assert cli("drive", "verify")[0] == ".: 1 file verified\n"
    assert cli("stop", code=2)[1] == f"orch: the app in {cli.folder} is not running; `orch run` starts it\n"
    (cli.folder / "other.py").write_text(APP)
    said = cli("run", "other.py", code=2)[1]
    assert "belongs to the app in app.py, not to other.py; `orch run app.py`, or --fresh" in said


def test_an_app_by_its_address(cli: Cli, tmp_path: Path) -> None:
    """--app URL: of this machine it is the app itself, of another one all goes by REST."""
    address = cli.start()
    cli.wait("once", "succeeded")
    parts = urlsplit(address)
    far = Cli(tmp_path, tmp_path / "nobody")  # knows no app: as on another machine
    assert cli("ps", "--app", f"http://localhost:{parts.port}")[0].startswith("cli test  run 1  running")
    assert "no token" in far("ps", "--app", f"http://localhost:{parts.port}", code=2)[1]
    found = {row["check"]: row["found"] for row in far.json("doctor", "--app", str(cli.folder))}
    assert found == {row["check"]: row["found"] for row in cli.json("doctor", "--app", "cli test")}
    assert found["server"].startswith("running")

    here = ("--app", address)
    (tmp_path / "in").mkdir()
    for name in ("a.txt", "b.txt"):
        (tmp_path / "in" / name).write_text(name)
    (tmp_path / "in" / ".orch").mkdir()
    (tmp_path / "in" / ".orch" / "token").write_text("not for others")
    assert far("drive", "put", "in", "data", *here)[0] == "data: published as version 1, 2 files\n"
    assert [file["path"] for file in far.json("drive", "ls", "data", *here)] == ["data/a.txt", "data/b.txt"]
    assert far("drive", "get", "data", "got", *here)[0] == "got: version 1, 2 of 2 files written\n"
    assert (tmp_path / "got" / "b.txt").read_text() == "b.txt"
    (tmp_path / "got" / "b.txt").write_text("mine")
    (tmp_path / "got" / "a.txt").unlink()
    refused = far("drive", "get", "data", "got", *here, code=1)[1]
    assert refused == "orch: got/b.txt exists and differs from the Drive's; --overwrite replaces it\n"
    assert not (tmp_path / "got" / "a.txt").exists()
    assert far.json("drive", "get", "data", "got", "--overwrite", *here)["files"] == ["a.txt", "b.txt"]
    assert far.json("drive", "get", "data/a.txt", "got", *here) == {"to": "got/a.txt", "version": 1, "files": []}
    assert far("drive", "get", "nothing", *here, code=1)[1] == cli("drive", "get", "nothing", code=1)[1]
    assert "bucket" in far("drive", "get", "data/a.txt", "--link", *here, code=1)[1]
    refused = far("down", *here, code=2)[1]
    assert "is not an app of this machine" in refused and parts.query not in refused
    assert "all ended" in cli("down", *here)[0]


def test_a_start_in_the_background_says_what_a_start_says(cli: Cli) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        said = cli("run", "-d", "--port", str(port))[0].splitlines()
        assert any(line.startswith(f"orch port {port} is taken, serving on ") for line in said)
        os.kill(cli.json("status")["pid"], signal.SIGKILL)
        said = cli("run", "-d", "--port", str(port))[0].splitlines()
        assert "orch run 1 was cut off: resuming it (--fresh starts over)" in said
        assert said[-1].startswith("http://127.0.0.1:")
        assert not any("listening" in line for line in said)


def test_watching_ends_with_the_app(cli: Cli) -> None:
    cli.start()
    terminal, end = pty.openpty()
    command = [sys.executable, "-P", "-m", "orch.cli", "ps", "--watch"]
    with (
        os.fdopen(terminal, "rb", buffering=0) as screen,
        subprocess.Popen(command, cwd=cli.folder, env=cli.env, stdin=end, stdout=end, stderr=end) as watch,
    ):
        os.close(end)
        seen = b""
        try:
            while b"running" not in seen:
                seen += screen.read(65536)
            cli("stop")
            while piece := screen.read(65536):
                seen += piece
        except OSError:  # EIO: nobody writes to it any more (Linux)
            assert watch.wait(10) is not None
        assert watch.wait(10) == 0, seen.decode()
    assert b"stopped, server not running" in seen


def test_down_after_the_server_was_killed(cli: Cli) -> None:
    cli.start()
    cli.wait("up", "ready")
    pid = cli.json("status")["pid"]
    os.kill(pid, signal.SIGKILL)
    (agent,) = (cli.folder / ".orch" / "run").glob("agent-*.json")
    agent_pid = json.loads(agent.read_text())["pid"]
    head = cli("ps")[0].splitlines()[0]
    assert head.startswith("cli test  run 1  server not running  1 script still run")
    assert cli("down")[0].splitlines() == [f"{agent.stem} (pid {agent_pid}): shut down", "all ended"]
    assert cli("down")[0] == "nothing was running\n"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("x = (", "was never closed"),
        ("x = 1", "defines no App"),
        ("import nothing_of_that_name", "app.py, line 1: ModuleNotFoundError"),
    ],
)
def test_a_broken_app_is_one_line_also_in_the_background(cli: Cli, source: str, said: str) -> None:
    (cli.folder / "app.py").write_text(source)
    for words in ([], ["-d"]):
        err = cli("run", "--port", "0", *words, code=2)[1]
        (line,) = [line for line in err.splitlines() if line.startswith("orch: ")]
        assert said in line
        assert "Traceback" not in err


def test_dry_run_starts_and_writes_nothing(cli: Cli) -> None:
    out = cli("run", "--dry-run", "--env", "A=1", "--secret", "KEY=hunter2")[0]
    assert "cli test" in out and "once.py" in out and "a new one, number 1" in out
    assert "hunter2" not in out
    assert not (cli.folder / ".orch").exists()
