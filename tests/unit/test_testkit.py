"""The leak check sees what it is there for, and `wait_until` keeps its deadline."""

import asyncio
import os
import socket
import subprocess
import sys
import threading
import time

import pytest
from testkit import LeakCheck, kill_all, processes_marked, wait_until

pytest_plugins = ["pytester"]
MARK = "ORCH_TEST_SESSION"


@pytest.fixture
def check() -> LeakCheck:
    return LeakCheck(MARK, os.environ[MARK])


def test_a_detached_grandchild_is_a_leak(check: LeakCheck) -> None:
    code = "import subprocess as s; print(s.Popen(['sleep', '60'], start_new_session=True, stdout=-3, stderr=-3).pid)"
    pid = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True).stdout)
    found = processes_marked(MARK, os.environ[MARK], among=[pid])
    wait_until(lambda: any("sleep 60" in leak for leak in check.found()), 2)
    kill_all(found)
    assert check.found() == []


def test_a_thread_is_a_leak(check: LeakCheck) -> None:
    end = threading.Event()
    thread = threading.Thread(target=end.wait, name="forgotten")
    thread.start()
    assert check.found() == ["threads: forgotten"]
    end.set()
    thread.join()
    assert check.found() == []


def test_a_listening_socket_is_a_leak(check: LeakCheck) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert check.found() == [f"listening sockets: {server.getsockname()[1]}"]
    assert check.found() == []


def test_a_forgotten_task_fails_its_test(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> None:
    conftest = request.config.rootpath / "tests" / "conftest.py"
    pytester.makeconftest(conftest.read_text().replace("LEAK_PATIENCE = 3.0", "LEAK_PATIENCE = 0.1"))
    pytester.makeini("[pytest]\nasyncio_mode = auto\nasyncio_default_fixture_loop_scope = function\n")
    pytester.makepyfile(
        """
        import asyncio
        async def test_it():
            test_it.task = asyncio.create_task(asyncio.sleep(60), name="forgotten")
        """
    )
    support = str(request.config.rootpath / "tests" / "support")
    result = pytester.runpytest_subprocess("-o", f"pythonpath={support}", "-p", "no:cacheprovider")
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*left tasks behind*forgotten*"])


async def test_a_finished_task_is_none() -> None:
    await asyncio.create_task(asyncio.sleep(0))


def test_wait_until_keeps_its_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"not within 0\.1 s: the moon"):
        wait_until(lambda: False, 0.1, what="the moon")
    assert time.monotonic() - started < 1
    assert wait_until(lambda: "yes", 0.1) == "yes"
