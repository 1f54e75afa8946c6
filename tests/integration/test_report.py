"""`report` in real scripts: what arrives at the agent's address, and that nothing reaches the script."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from testkit import wait_until


class Listener(ThreadingHTTPServer):
    got: list[tuple[str, dict[str, Any]]]
    status = 200


class Handler(BaseHTTPRequestHandler):
    server: Listener

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.got.append((self.headers["Authorization"], body))
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def listener() -> Iterator[Listener]:
    server = Listener(("127.0.0.1", 0), Handler)
    server.got = []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def run(code: str, url: str = "", *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": "/usr/bin:/bin", **({"ORCH_REPORT_URL": url, "ORCH_TOKEN": "secret"} if url else {}), **env}
    code = "from orch_workers import report\n" + code
    return subprocess.run(
        [sys.executable, *options, "-P", "-c", code], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def url_of(listener: Listener) -> str:
    return f"http://127.0.0.1:{listener.server_port}/report/trainer"


def test_the_last_values_arrive(listener: Listener) -> None:
    ended = run(
        "for n in range(1, 5001): report(loss=1 / n, progress=n / 5000)\nreport(acc=1)",
        url_of(listener),
        http_proxy="http://127.0.0.1:9",
    )
    assert (ended.returncode, ended.stderr) == (0, "")
    assert {token for token, _ in listener.got} == {"Bearer secret"}
    assert len(listener.got) <= 3  # 5,000 reports within a fraction of a second
    told: dict[str, float] = {}
    for _, body in listener.got:
        told.update(body["metrics"])
    assert told == {"loss": 1 / 5000, "acc": 1.0}
    assert [body["progress"] for _, body in listener.got if "progress" in body][-1] == 1.0


def test_what_is_no_number_is_one_warning(listener: Listener) -> None:
    code = "report(loss=float('nan')); report(loss='x'); report(a=[1]); report(b=2)\nprint('on')"
    for option in ("default", "error"):
        listener.got.clear()
        ended = run(code, url_of(listener), "-W", option)
        assert (ended.returncode, ended.stdout) == (0, "on\n"), ended.stderr
        assert ended.stderr.count("is no finite number") == (1 if option == "default" else 0)
        assert [body["metrics"] for _, body in listener.got] == [{"b": 2.0}]


def test_outside_orch_it_does_nothing() -> None:
    ended = run("import threading; report(loss=float('nan'), progress=0.5); print(threading.active_count())")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "1\n", "")


def test_an_agent_that_is_away_or_refuses_is_no_harm(listener: Listener) -> None:
    listener.status = 500
    for url in ("http://127.0.0.1:9/report", "nonsense", url_of(listener)):
        ended = run("report(loss=0.1); print('on')", url)
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "on\n", "")
    assert listener.got


def test_what_a_dead_agent_missed_is_sent_again(listener: Listener) -> None:
    listener.status = 500
    env = {"ORCH_REPORT_URL": url_of(listener), "ORCH_TOKEN": "secret"}
    code = "from orch_workers import report; report(loss=0.1); input()"
    command = [sys.executable, "-P", "-c", code]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as script:
        wait_until(lambda: listener.got, what="the report")
        listener.got.clear()
        listener.status = 200
        wait_until(lambda: listener.got, what="the same report again")
        assert listener.got[0][1]["metrics"] == {"loss": 0.1}
        _, words = script.communicate("\n")
    assert (script.returncode, words) == (0, "")


def test_forked_children_report_for_themselves(listener: Listener) -> None:
    code = (
        "import os\nreport(parent=1)\npid = os.fork()\nif pid == 0:\n    report(child=2)\nelse:\n    os.waitpid(pid, 0)"
    )
    ended = run(code, url_of(listener))
    assert ended.returncode == 0, ended.stderr
    assert sorted(name for _, body in listener.got for name in body["metrics"]) == ["child", "parent"]


def test_the_import_stays_light() -> None:
    heavy = "{'asyncio', 'httpx', 'msgspec', 'orch', 'orch_drive', 'fastapi'}"
    ended = run(f"import sys; report(x=1); print({heavy} & set(sys.modules))")
    assert ended.stdout == "set()\n"


def test_it_does_not_matter_which_way_it_is_imported() -> None:
    ended = run("import orch_workers.report\nfrom orch_workers import report\nreport(x=1); orch_workers.report(x=1)")
    assert (ended.returncode, ended.stderr) == (0, "")
