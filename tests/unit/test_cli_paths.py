"""The `.orch` folder: lock, token, records, names."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from orch.errors import UsageError
from orch.paths import AppFolder, AppRunning, ServerInfo, known_apps, write_atomic


@pytest.fixture(autouse=True)
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def folder(tmp_path: Path) -> AppFolder:
    (tmp_path / "app").mkdir()
    return AppFolder(tmp_path / "app")


def info(**changes: object) -> ServerInfo:
    values: dict[str, object] = {
        "url": "http://127.0.0.1:7501",
        "pid": os.getpid(),
        "app_id": "0123abcd",
        "name": "studio",
        "run": 3,
        "started": 5.0,
        "app_file": "/x/app.py",
    }
    return ServerInfo(**{**values, **changes})  # type: ignore[arg-type]


def test_looking_makes_nothing(folder: AppFolder) -> None:
    assert not folder.exists
    assert not folder.serving()
    assert folder.server_pid() is None
    assert folder.read_server() is None
    assert list(folder.agent_records()) == []
    assert os.listdir(folder.root) == []


def test_create(folder: AppFolder) -> None:
    folder.create()
    folder.create()
    assert (folder.orch / ".gitignore").read_text() == "*\n"
    assert stat.S_IMODE(folder.orch.stat().st_mode) == 0o700
    assert folder.run.is_dir() and folder.logs.is_dir() and folder.drive.is_dir() and folder.works.is_dir()


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / ".orch").touch()
    with pytest.raises(UsageError, match=r"cannot write .*\.orch: it is no folder"):
        AppFolder(tmp_path).create()


def test_token_is_made_once_and_only_ours(folder: AppFolder) -> None:
    token = folder.token()
    path = folder.orch / "token"
    assert len(token) >= 40
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o644)
    assert AppFolder(folder.root).token() == token
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text("")
    assert folder.token() not in ("", token)


def test_app_id_stays(folder: AppFolder) -> None:
    first = folder.app_id()
    folder.claim(folder.root / "app.py")
    assert folder.app_id() == first
    assert len(first) == 8 and int(first, 16) >= 0


def test_another_app_file_is_refused_unless_fresh(folder: AppFolder) -> None:
    assert folder.claimed_by() is None
    folder.claim(folder.root / "app.py")
    folder.claim(folder.root / "app.py")
    with pytest.raises(UsageError, match=r"belongs to the app in app.py, not to other.py") as caught:
        folder.claim(folder.root / "other.py")
    assert "--fresh" in caught.value.hint
    folder.claim(folder.root / "other.py", fresh=True)
    assert folder.claimed_by() == "other.py"


HOLD = """
import sys
from orch.paths import AppFolder
with AppFolder(sys.argv[1]).lock():
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_server_is_refused_with_pid_and_url(folder: AppFolder) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-P", "-c", HOLD, str(folder.root)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    with holder:
        try:
            assert holder.stdout.readline() == b"held\n"
            assert folder.serving()
            assert folder.server_pid() == holder.pid
            with pytest.raises(AppRunning, match="still starting"):
                folder.lock(timeout=0)
            folder.write_server(info(pid=holder.pid))
            with pytest.raises(AppRunning, match=f"pid {holder.pid} at http://127.0.0.1:7501") as caught:
                folder.lock(timeout=0)
            assert (caught.value.pid, caught.value.url) == (holder.pid, "http://127.0.0.1:7501")
            assert isinstance(caught.value, UsageError)
        finally:
            holder.kill()
    # kill -9 frees it.
    assert not folder.serving()
    with folder.lock(timeout=0):
        assert folder.server_pid() == os.getpid()
    assert not folder.serving()


def test_a_look_does_not_keep_a_server_from_starting(folder: AppFolder) -> None:
    import fcntl
    import threading

    folder.create()
    (folder.orch / "lock").touch()
    fd = os.open(folder.orch / "lock", os.O_RDONLY)
    fcntl.flock(fd, fcntl.LOCK_SH)
    timer = threading.Timer(0.1, os.close, [fd])
    timer.start()
    with folder.lock(timeout=10):
        pass
    timer.join()


def test_server_json(folder: AppFolder) -> None:
    folder.create()
    folder.write_server(info())
    assert folder.read_server() == info()
    path = folder.orch / "server.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.write_text('{"url": "x"}')
    with pytest.raises(UsageError, match=r"server.json lacks 'pid'"):
        folder.read_server()
    path.write_text("{")
    with pytest.raises(UsageError, match=r"server.json is not JSON"):
        folder.read_server()


def test_apps_are_known_by_name_latest_first(tmp_path: Path) -> None:
    for name, at in (("one", 1.0), ("two", 2.0)):
        folder = AppFolder(tmp_path / name)
        folder.root.mkdir()
        folder.create()
        folder.write_server(info(name=name, started=at))
        folder.write_server(info(name=name, started=at))
    assert [(app.name, app.folder) for app in known_apps()] == [("two", tmp_path / "two"), ("one", tmp_path / "one")]
    (tmp_path / "two" / ".orch").rename(tmp_path / "two" / "gone")
    assert [app.name for app in known_apps()] == ["one"]


def test_an_unwritable_list_of_apps_does_not_stop_the_app(
    folder: AppFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    folder.create()
    folder.write_server(info())
    assert folder.read_server() == info()
    assert "cannot be found by name" in caplog.text


def test_records_that_are_broken_are_left_alone(folder: AppFolder, caplog: pytest.LogCaptureFixture) -> None:
    folder.create()
    (folder.run / "agent-a.json").write_text('{"pid": 1}')
    (folder.run / "agent-b.json").write_text("{")
    (folder.run / "processes").mkdir()
    (folder.run / "processes" / "x.run.json").write_text("{}")
    assert [(path.name, record) for path, record in folder.agent_records()] == [("agent-a.json", {"pid": 1})]
    assert [path.name for path, _ in folder.run_records()] == ["x.run.json"]
    assert "agent-b.json is not JSON" in caplog.text


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_atomic(path, b"old")
    with pytest.raises(TypeError):
        write_atomic(path, "text")  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]
