"""Services under a real `orch run`: readiness, the proxy, deaths, replacing, and whose port it is."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import psutil
from testkit import RunningApp, free_port, wait_until

Apps = Callable[..., RunningApp]

SERVICES = """
from orch import App, Flow, ScriptWork, ServiceWork


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.words = ["one"]
        self.up = ServiceWork("serve.py {port}", grace=2.0)
        self.kept = ServiceWork("serve.py {port} {base_path}")
        self.once = ServiceWork("serve.py {port}", restart="never")
        self.bad = ServiceWork(["serve.py", "{port}", "fail"], health="/health")
        self.wait = ServiceWork("serve.py {port} late", parallel=False)
        self.plain = ScriptWork("serve.py {port}", parallel=True, raise_exception=False)
        self.forked = ScriptWork("python serve.py {port} & wait", shell=True, parallel=True, raise_exception=False)
        self.mute = ScriptWork("sleep 600", port=MUTE, parallel=True, raise_exception=False)
        self.squatted = ServiceWork("sleep 600", port=MUTE2)
        self.seen = []
        self.url = ""

    def run(self):
        for work in (self.plain, self.forked, self.mute, self.squatted, self.kept, self.once, self.bad):
            work.run()
        self.up.run(self.words)
        self.url = self.up.url
        self.wait.run()
        self.seen = [self.wait.is_ready, self.wait.url != ""]


app = App(Root())
"""
SERVE = """
import http.server, json, os, pathlib, sys, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        told = {"path": self.path, "headers": dict(self.headers), "argv": sys.argv[2:], "pid": os.getpid(),
                "env": {k: v for k, v in os.environ.items() if k.startswith(("GRADIO", "ORCH_BASE"))}}
        body = json.dumps(told).encode()
        self.send_response(503 if "fail" in sys.argv and not pathlib.Path("healthy").exists() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass

if "late" in sys.argv:
    while not pathlib.Path("late").exists():
        time.sleep(0.01)
http.server.ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


class Listener:
    """Somebody else's server on a port: answers every request with 200."""

    def __init__(self, port: int) -> None:
        self.process = psutil.Popen(
            ["python3", "-P", "-m", "http.server", str(port), "--bind", "127.0.0.1"], cwd="/", stdout=-3, stderr=-3
        )
        wait_until(lambda: httpx_ok(f"http://127.0.0.1:{port}/"), what="the foreign server answers")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(10)


def httpx_ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=2).status_code < 500
    except httpx.TransportError:
        return False


def ready(app: RunningApp, name: str) -> bool:
    return bool(app.work(name)["status"]["is_ready"])


def test_services(orch_app: Apps) -> None:
    ports = [free_port(), free_port()]
    foreign = Listener(ports[0]), Listener(ports[1])
    try:
        source = SERVICES.replace("MUTE2", str(ports[1])).replace("MUTE", str(ports[0]))
        app = orch_app(source, {"serve.py": SERVE})
        check_services(app)
    finally:
        for server in foreign:
            server.close()


def check_services(app: RunningApp) -> None:
    def page(name: str, path: str = "") -> dict[str, Any]:
        answer = app.request("GET", f"/view/{name}/{path}", headers={"X-Mine": "yes"})
        assert answer.status_code == 200, answer.text
        value: dict[str, Any] = answer.json()
        return value

    for name in ("up", "kept", "once", "plain", "forked"):
        wait_until(lambda name=name: ready(app, name), 15, what=lambda name=name: f"{name}: {app.work(name)}")
    status = app.work("up")["status"]
    assert status["url"] == f"{app.url}/view/up/"
    app.wait_state("/vars/url", lambda url: url == status["url"])

    # The prefix: kept if the command names it, else stripped and told.
    told = page("up", "deep/x?a=1")
    headers = {name.lower(): value for name, value in told["headers"].items()}
    assert told["path"] == "/deep/x?a=1"
    assert headers["x-forwarded-prefix"] == "/view/up"
    assert headers["x-mine"] == "yes"
    assert "authorization" not in headers
    assert told["argv"] == ["one"]
    assert told["env"]["GRADIO_ROOT_PATH"] == "/view/up"
    kept = page("kept", "deep")
    assert (kept["path"], kept["argv"]) == ("/view/kept/deep", ["/view/kept"])
    assert "GRADIO_ROOT_PATH" not in kept["env"]
    assert page("plain")["path"] == "/"

    # Not parallel: the pass waits until it is ready, not until it ends.
    assert app.state("/vars/seen") == []
    (app.folder / "late").touch()
    app.wait_state("/vars/seen", lambda seen: seen == [True, True])

    # health: 503 is not ready.
    assert not ready(app, "bad")
    assert app.work("bad")["status"]["url"] == ""
    (app.folder / "healthy").touch()
    wait_until(lambda: ready(app, "bad"), what="bad gets well")

    # Killed: noticed, named, started again; other arguments replace it; the same ones do nothing.
    calls = app.work("up")["calls"]
    os.kill(told["pid"], signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(lambda: not ready(app, "up"), 1.5, what="the death is noticed")
    wait_until(lambda: ready(app, "up"), 10, what=lambda: f"up again: {app.work('up')}")
    assert time.monotonic() - killed_at > 0.9, "the first delay is 1 s"
    assert "SIGKILL" in app.output()
    again = page("up")
    assert again["pid"] != told["pid"]
    assert app.work("up")["calls"].keys() == calls.keys()
    app.set("/vars/words", ["two"])

    def replaced() -> bool:
        answer = app.request("GET", "/view/up/")
        return answer.status_code == 200 and answer.json()["argv"] == ["two"]

    wait_until(replaced, 15, what=lambda: f"replaced: {app.output()}")
    assert not psutil.pid_exists(again["pid"])
    latest = app.work("up")["call"]
    pid = page("up")["pid"]
    app.set("/vars/seen", [])
    app.wait_state("/vars/seen", lambda seen: seen == [True, True])
    assert (app.work("up")["call"], page("up")["pid"]) == (latest, pid)

    once = page("once")["pid"]
    os.kill(once, signal.SIGKILL)
    app.wait_state("/works/once/status/stage", lambda stage: stage == "failed")
    assert "SIGKILL" in app.work("once")["status"]["message"]

    # A port that somebody else listens on makes nobody ready, whatever it answers.
    for name in ("mute", "squatted"):
        assert app.work(name)["status"]["stage"] == "running"
        assert not ready(app, name)
        assert app.work(name)["status"]["url"] == ""
    assert app.request("GET", "/view/mute/").status_code in (200, 503)
    assert "Directory listing" not in app.request("GET", "/view/mute/", headers={"Accept": "text/html"}).text

    # Stopped by hand it is held, and gives its port back.
    port = app.work("up")["status"]["port"]
    app.post("/works/up/stop")
    app.wait_state("/works/up/status/stage", lambda stage: stage == "stopped")
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(("127.0.0.1", port))
    assert app.work("up")["status"]["url"] == ""
    app.post("/works/up/restart")
    wait_until(lambda: ready(app, "up"), 15, what="up after a restart by hand")
    assert page("up")["argv"] == ["two"]
