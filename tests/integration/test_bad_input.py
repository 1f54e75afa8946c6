"""What a newcomer gets wrong: each gets one clear line that says what and where, and the command ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ORCH = [sys.executable, "-P", "-m", "orch.cli"]
RAISES = """
from orch import App, Flow
class Root(Flow):
    def run(self):
        raise ValueError("no such luck")
app = App(Root())
"""
LOOPS = """
from orch import App, Flow
class Root(Flow):
    def __init__(self):
        super().__init__()
        {in_init}
    def run(self):
        print("looping", flush=True)
        while True:
            pass
app = App(Root())
"""
WORKS = """
from orch import App, Flow
class Root(Flow):
    def run(self):
        self.stop("fine")
app = App(Root())
"""


def run(folder: Path, *words: str, code: int) -> str:
    """What `orch run` says, stderr included, if it ends with that code."""
    done = subprocess.run(
        [*ORCH, "run", *words, "--port", "0"],
        cwd=folder,
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state")},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == code, done.stdout
    return done.stdout


def alive(folder: Path) -> list[str]:
    """Command lines of processes that were started for the app in this folder."""
    done = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    return [line for line in done.stdout.splitlines() if str(folder / ".orch") in line]


@pytest.mark.timeout(60)
def test_a_first_pass_that_raises_ends_the_command_and_its_agent(app_folder: Callable[..., Path]) -> None:
    folder = app_folder(RAISES)
    said = run(folder, code=1)
    assert "orch: ValueError: no such luck (app.py:5 in run)" in said
    assert alive(folder) == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize("where", ["init", "run"])
def test_ctrl_c_ends_an_app_that_loops(app_folder: Callable[..., Path], where: str) -> None:
    loop = "print('looping', flush=True)\n        while True: pass"
    folder = app_folder(LOOPS.format(in_init=loop if where == "init" else "pass"))
    with subprocess.Popen(
        [*ORCH, "run", "--port", "0"],
        cwd=folder,
        env={**os.environ, "XDG_STATE_HOME": str(folder / "state")},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert any("looping" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(20) == 130
        finally:
            process.kill()
    assert alive(folder) == []


def test_a_file_that_cannot_be_loaded_does_not_take_the_folder(app_folder: Callable[..., Path]) -> None:
    folder = app_folder(WORKS, {"json.py": WORKS, "broken.py": "def x(:"})
    assert "give the app file another name" in run(folder, "json.py", code=2)
    assert "broken.py, line 1: invalid syntax" in run(folder, "broken.py", code=2)
    assert "stopped: fine" in run(folder, code=0)
    assert "belongs to the app in app.py" in run(folder, "broken.py", code=2)


def test_without_any_standard_stream(app_folder: Callable[..., Path]) -> None:
    folder = app_folder(WORKS)
    command = " ".join([*ORCH, "run", "--port", "0"])
    done = subprocess.run(
        ["sh", "-c", f"{command} <&- >&-"], cwd=folder, capture_output=True, text=True, timeout=40, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_is_in_the_way_is_named(app_folder: Callable[..., Path]) -> None:
    folder = app_folder(WORKS)
    (folder / ".orch").write_text("")
    assert f"cannot write {folder / '.orch'}: it is no folder; move it away" in run(folder, code=2)
    (folder / ".orch").unlink()
    (folder / ".orch").mkdir()
    (folder / ".orch" / "token").write_bytes(b"\xff\x00")
    assert "stopped: fine" in run(folder, code=0)
    assert (folder / ".orch" / "token").read_bytes().isascii()


STAYS = """
from orch import App, Flow, StaticFrontend
class Root(Flow):
    def configure_layout(self):
        return StaticFrontend("nowhere")
app = App(Root())
"""


@pytest.mark.timeout(90)
def test_a_server_that_was_killed_comes_back_where_it_was(app_folder: Callable[..., Path], tmp_path: Path) -> None:
    folder = app_folder(STAYS)
    env = {**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")}

    def orch(*words: str) -> str:
        return subprocess.run(
            [*ORCH, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=40, check=True
        ).stdout

    def fetch(url: str) -> str:
        from urllib.error import HTTPError
        from urllib.request import Request, urlopen

        token = (folder / ".orch" / "token").read_text()
        with pytest.raises(HTTPError) as caught:
            urlopen(Request(url, headers={"Authorization": f"Bearer {token}"}))
        with caught.value as error:
            return f"{error.code} {error.read().decode()}"

    try:
        url = orch("run", "-d", "--port", "0").split()[-1]
        # What a page shows is missing: not a fault of orch.
        said = fetch(url.split("/?")[0] + "/view/root/")
        assert said.startswith("404") and f"the folder {folder / 'nowhere'} of root does not exist" in said
        os.kill(json.loads((folder / ".orch" / "server.json").read_text())["pid"], signal.SIGKILL)
        assert orch("run", "-d").split()[-1] == url
    finally:
        orch("down")


BEGINS = """
from orch import App, Flow, Get
class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = {value}
    def run(self):
        self.stop(f"fine {{len(self.x)}}")
    def answer(self):
        return 1
    def configure_api(self):
        return [Get("/a", self.answer){more}]
app = App(Root())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("value", "more", "said", "code"),
    [
        ('"x" * 3_000_000', "", "/vars/x would take 2.9 MiB", 1),
        ('""', ", self.nope", "root.configure_api(): AttributeError", 2),
    ],
)
def test_an_app_that_cannot_begin_leaves_no_run_behind(
    tmp_path: Path, value: str, more: str, said: str, code: int
) -> None:
    app = tmp_path / "app.py"
    app.write_text(BEGINS.format(value='"12"', more=""))
    run(tmp_path, code=0)
    app.write_text(BEGINS.format(value=value, more=more))
    assert said in run(tmp_path, code=code)
    app.write_text(BEGINS.format(value='"12"', more=""))
    assert "resuming run 1" in run(tmp_path, "--resume", code=0)
