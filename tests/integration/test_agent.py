"""A real agent process with real scripts, against the flow's side of the protocol."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fake_flow import TOKEN, FakeFlow, alive, flow_with_agent

from orch.paths import agent_spec_file
from orch.wire import Diff, Ended, Forget, Progress, Ready, Started, VarOps
from orch_workers import agent


@pytest.fixture
async def flow(tmp_path: Path) -> AsyncIterator[FakeFlow]:
    async with flow_with_agent(tmp_path / "app") as flow:
        yield flow


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


async def read(http: httpx.AsyncClient, path: str = "") -> object:
    return (await http.get(path)).json()


# ---- what a script is given ----------------------------------------------------------------------------------------


async def test_command_lines(flow: FakeFlow) -> None:
    write(flow.folder, "show.py", "import json, sys; print(json.dumps([sys.executable, *sys.argv[1:]]))")
    placed = await flow.place("w")
    cases: list[tuple[object, dict[str, object], list[str]]] = [
        ("show.py a 'b c' $HOME", {}, ["a", "b c", "$HOME"]),
        (["show.py", "--port={port}", "{{port}}", "{other}"], {}, [f"--port={placed.port}", "{port}", "{other}"]),
        ("python3 show.py", {"script_args": ["{host}"], "args": ["{host}", "x y"]}, ["127.0.0.1", "{host}", "x y"]),
        ("{work_dir}/../../../show.py", {"base_path": "/view/w"}, []),
        ('python show.py "$@" $(echo sub) {base_path} "${HOME:0:1}"',
         {"shell": True, "args": ["p q", "{port}"], "base_path": "/v"},
         ["p q", "{port}", "sub", "/v", "/"]),
    ]  # fmt: skip
    for n, (command, fields, expected) in enumerate(cases, 1):
        await flow.start("w", command, n=n, **fields)
        ended = await flow.ended("w", n)
        assert (ended.reason, ended.exit_code) == (None, 0), ended
        assert json.loads(flow.log_of("w", n).splitlines()[-1]) == [sys.executable, *expected]


async def test_environment(flow: FakeFlow, monkeypatch: pytest.MonkeyPatch) -> None:
    placed = await flow.place("ui.w", {"lr": 0.5})
    await flow.start(
        "ui.w",
        ["python", "-c", "import json, os, orch_workers; print(json.dumps(dict(os.environ)))"],
        env={"OWN": "{host}:{port}", "PLAIN": "{x}"},
        secrets={"KEY": "s3cr3t {port}"},
        base_path="/view/ui.w",
    )
    await flow.ended("ui.w")
    env = json.loads(flow.log_of("ui.w").splitlines()[-1])
    assert env["OWN"] == f"127.0.0.1:{placed.port}" and env["PLAIN"] == "{x}" and env["KEY"] == "s3cr3t {port}"
    expected = {
        "ORCH_APP": "test", "ORCH_WORK": "ui.w", "ORCH_CALL": "1-ui.w-1", "ORCH_ATTEMPT": "1", "HOST": "127.0.0.1",
        "ORCH_HOST": "127.0.0.1", "PORT": str(placed.port), "ORCH_PORT": str(placed.port), "PYTHONUNBUFFERED": "1",
        "ORCH_BASE_PATH": "/view/ui.w", "ORCH_TOKEN": "token-ui.w", "GRADIO_ROOT_PATH": "/view/ui.w",
        "ORCH_STATE_URL": f"{flow.agent_url}/state/ui.w", "GRADIO_ANALYTICS_ENABLED": "False",
        "STREAMLIT_BROWSER_GATHER_USAGE_STATS": "false", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    assert {name: env[name] for name in expected} == expected
    assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert env.get("PYTHONPATH") == os.environ.get("PYTHONPATH") and "PYTHONSAFEPATH" not in env
    assert json.loads(Path(env["ORCH_STATE_FILE"]).read_text()) == {"lr": 0.5}
    # Secrets are given to scripts and to nothing else.
    for path in flow.orch_dir.rglob("*"):
        if path.is_file() and "logs" not in path.parts:
            assert b"s3cr3t" not in path.read_bytes(), path


async def test_what_cannot_be_started_says_what_and_where(flow: FakeFlow) -> None:
    await flow.place("w")
    cases: list[tuple[str, dict[str, object], list[str]]] = [
        ("nothing.py", {}, ["nothing.py", str(flow.folder)]),
        ("python sub/nothing.py --x", {}, ["sub/nothing.py", str(flow.folder)]),
        ("no-such-command-anywhere", {}, ["no-such-command-anywhere"]),
        ("echo 'unclosed", {}, ["unclosed", "split"]),
        ("echo", {"cwd": "not/there"}, [str(flow.folder / "not/there")]),
    ]
    for n, (command, fields, words) in enumerate(cases, 1):
        await flow.start("w", command, n=n, **fields)
        ended = await flow.ended("w", n)
        assert ended.reason == "exception"
        assert all(word in ended.message for word in words) and "\n" not in ended.message, ended.message
    assert not flow.of(Started)


# ---- how attempts end ------------------------------------------------------------------------------------------------


async def test_ends(flow: FakeFlow) -> None:
    await flow.place("w")
    await flow.start("w", ["bash", "-c", "echo out; echo err >&2; exit 3"])
    ended = await flow.ended("w")
    assert (ended.reason, ended.exit_code, ended.message) == ("exit_code", 3, "exit code 3")
    await flow.start("w", ["bash", "-c", "kill -9 $$"], n=2)
    ended = await flow.ended("w", 2)
    assert (ended.reason, ended.exit_code, ended.signal) == ("signal", None, "SIGKILL")
    await flow.start("w", "sleep 60", n=3, timeout=0.3, grace=1.0)
    ended = await flow.ended("w", 3)
    assert ended.reason == "timeout" and "0.3 s" in ended.message
    await flow.start("w", "sleep 60", n=4)
    started = await flow.until(lambda: flow.of(Started)[3:])
    await flow.stop("w", n=4)
    ended = await flow.ended("w", 4)
    assert ended.reason == "stopped" and ended.signal == "SIGTERM" and not alive(started[0].pid)
    await flow.start("w", ["bash", "-c", "trap 'exit 0' TERM; echo up; sleep 60 & wait"], n=5)
    await flow.until(lambda: (flow.orch_dir / "logs/w/1-w-5.log").exists() and "up" in flow.log_of("w", 5))
    await flow.stop("w", n=5, reason="replaced")
    assert (await flow.ended("w", 5)).reason == "replaced"
    seqs = [seq for seq, _, _ in flow.items]
    assert seqs == list(range(1, len(seqs) + 1))
    assert [item.call for item in flow.of(Ended)] == [f"1-w-{n}" for n in range(1, 6)]


async def test_term_is_ignored_then_kill_takes_the_group(flow: FakeFlow) -> None:
    await flow.place("w")
    script = "trap '' TERM; sleep 60 & echo $! ; echo $$; while :; do sleep 0.1; done"
    await flow.start("w", ["bash", "-c", script])
    log = flow.orch_dir / "logs/w/1-w-1.log"
    lines = await flow.until(lambda: len(lines := log.read_text().split("\n") if log.exists() else []) > 3 and lines)
    pids = [int(lines[1]), int(lines[2])]
    before = time.monotonic()
    await flow.stop("w", grace=0.4)
    ended = await flow.ended("w")
    assert ended.reason == "stopped" and ended.signal == "SIGKILL" and 0.4 <= time.monotonic() - before < 3
    assert not any(alive(pid) for pid in pids)


async def test_an_attempt_starts_once(flow: FakeFlow) -> None:
    await flow.place("w")
    first = await flow.start("w", ["bash", "-c", "echo x >> count; sleep 0.2"])
    again = await asyncio.gather(*(flow.start("w", ["bash", "-c", "echo x >> count"]) for _ in range(3)))
    assert first.accepted and all(reply.accepted for reply in again)
    await flow.ended("w")
    assert (await flow.start("w", ["bash", "-c", "echo x >> count"])).accepted
    await flow.start("w", ["bash", "-c", "echo y >> count"], attempt=2)
    assert (await flow.ended("w", 2)).attempt == 2
    assert (flow.folder / "count").read_text() == "x\ny\n"
    assert len(flow.of(Started)) == len(flow.of(Ended)) == 2
    refused = await flow.start("unknown", "true")
    assert not refused.accepted and "unknown" in refused.error


async def test_stop_before_the_start_and_of_unknown_calls(flow: FakeFlow) -> None:
    await flow.place("w")
    await flow.stop("nobody")
    await flow.start("w", ["bash", "-c", "trap '' TERM; touch stays; sleep 60"], grace=60.0)
    await flow.until(lambda: (flow.folder / "stays").exists())
    await flow.start("w", "touch never", n=2)  # waits until the first is gone
    await flow.stop("w", n=2)
    await flow.stop("w", n=1, grace=0.0)
    assert (await flow.ended("w", 1)).call == "1-w-1"
    assert (await flow.ended("w", 2)).reason == "stopped"
    assert not (flow.folder / "never").exists() and len(flow.of(Started)) == 1


# ---- placing, readiness, progress ------------------------------------------------------------------------------------


async def test_place_keeps_its_answer(flow: FakeFlow) -> None:
    first = await flow.place("w")
    other = await flow.place("x")
    assert first.port != other.port and first.host == "127.0.0.1"
    assert await flow.place("w") == first
    assert (await flow.place("y", port=4242)).port == 4242
    report = {work.work: work for work in (await flow.status()).works}
    assert report["w"].port == first.port and report["w"].stage == "not_started"


SERVER = """
import http.server, os, sys, time
time.sleep(0.3)
class H(http.server.BaseHTTPRequestHandler):
    up = time.time() + 0.4
    def do_GET(self):
        self.send_response(503 if time.time() < self.up else 404); self.end_headers()
    def log_message(self, *a): pass
http.server.HTTPServer((os.environ["HOST"], int(os.environ["PORT"])), H).serve_forever()
"""


async def test_ready_when_the_port_answers(flow: FakeFlow) -> None:
    write(flow.folder, "server.py", SERVER)
    await flow.place("svc")
    await flow.place("plain")
    await flow.place("quiet")
    await flow.start("svc", "server.py", kind="service", health="/")
    await flow.start("plain", "server.py")
    await flow.start("quiet", "sleep 60")
    await flow.until(lambda: len(flow.of(Ready)) == 2)
    started = {item.work: item.at for item in flow.of(Started)}
    ready = {item.work: item.at for item in flow.of(Ready)}
    assert ready["svc"] - started["svc"] > 0.7  # not while it answers 503
    assert ready["plain"] - started["plain"] > 0.3
    assert {work.work: work.ready for work in (await flow.status()).works} == {
        "svc": True,
        "plain": True,
        "quiet": False,
    }


async def test_progress_and_metrics(flow: FakeFlow) -> None:
    write(
        flow.folder, "bar.py", "import sys, time\nfor i in range(0, 101, 5):\n"
        "    sys.stderr.write(f'\\r{i:3d}%|###| {i}/100 [00:01<00:01]'); sys.stderr.flush(); time.sleep(0.08)\n"
    )  # fmt: skip
    await flow.place("bar")
    await flow.place("rep")
    await flow.start("bar", "bar.py")
    code = "from orch_workers import report\nfor i in range(5): report(progress=i / 4, loss=1.0 / (i + 1))"
    await flow.start("rep", ["python", "-c", code])
    await flow.ended("bar")
    await flow.ended("rep")
    seen = [item.progress for item in flow.of(Progress, "bar")]
    assert len(seen) >= 2 and seen == sorted(seen) and 0 < seen[0] < 1, seen
    reported = flow.of(Progress, "rep")
    assert reported[-1].progress == 1.0 and reported[-1].metrics == {"loss": 0.2}


# ---- vars of scripts -------------------------------------------------------------------------------------------------


async def test_state_over_http(flow: FakeFlow) -> None:
    await flow.place("w", {"retrain": False, "rows": [1], "d": {"a": 1}})
    await flow.place("other", {"secret": 1})
    async with flow.script("w") as http:
        assert (await http.get("")).json() == {"retrain": False, "rows": [1], "d": {"a": 1}}
        assert (await http.get("/rows")).json() == [1] and (await http.get("/d/a")).json() == 1
        patched = await http.patch("", json=[{"op": "replace", "path": "/retrain", "value": True}])
        assert patched.status_code == 200 and patched.json() == {"rev": 1}
        assert (await http.put("/d/new", json=[2])).json() == {"rev": 2}
        assert (await http.put("/rows/0", content="5")).json() == {"rev": 3}
        assert (await http.patch("", json=[{"op": "add", "path": "/rows/-", "value": 6}])).json() == {"rev": 4}
        assert flow.vars["w"] == {"retrain": True, "rows": [5, 6], "d": {"a": 1, "new": [2]}}
        assert (await http.get("")).json() == flow.vars["w"]
        flow.write("w", {"op": "replace", "path": "/retrain", "value": False})
        await flow.until_async(lambda: read(http, "/retrain"), False)
        for request, status, word in [
            (http.put("/nope", json=1), 404, "nope"),
            (http.get("/nope"), 404, "nope"),
            (http.get("/d/zzz"), 404, "/d/zzz"),
            (http.patch("", json=[{"op": "replace", "path": "/nope", "value": 1}]), 404, "nope"),
            (http.patch("", json={"op": "replace"}), 422, "array"),
            (http.patch("", json=[{"op": "change", "path": "/d"}]), 422, "change"),
            (http.put("/retrain", content="NaN"), 422, "expected"),
            (http.put("/retrain", content="[1,"), 422, "expected"),
            (http.put("/retrain", content="1e999"), 422, "range"),
            (http.put("/retrain", content=b'"\xff"'), 422, "utf-8"),
            (http.put("/retrain", content="[" * 5000 + "]" * 5000), 422, "depth"),
            (http.patch("", json=[{"op": "test", "path": "/retrain", "value": 7}]), 409, "not 7"),
            (http.put("/retrain", content=b"1" * 5_000_000), 413, "MiB"),
        ]:
            answer = await request
            assert answer.status_code == status, answer.text
            assert answer.headers["content-type"] == "application/problem+json" and word in answer.json()["detail"]
    for token, url in [
        ("token-other", "/state/w"),
        ("wrong", "/state/w"),
        (TOKEN, "/state/w"),
        ("token-w", "/v1/status"),
    ]:
        async with httpx.AsyncClient(base_url=flow.agent_url, trust_env=False) as http:
            assert (await http.get(url, headers={"Authorization": f"Bearer {token}"})).status_code == 401


async def test_state_file_follows(flow: FakeFlow) -> None:
    await flow.place("w", {"lr": 0.0})
    await flow.start("w", ["bash", "-c", "while :; do cat $ORCH_STATE_FILE; echo; sleep 0.02; done"])
    await flow.until(lambda: flow.of(Started))
    for i in range(1, 51):
        flow.write("w", {"op": "replace", "path": "/lr", "value": i})
        await asyncio.sleep(0.01)
    path = flow.orch_dir / "run" / "vars-w.json"
    await flow.until(lambda: json.loads(path.read_text()) == {"lr": 50})
    await flow.until(lambda: '{"lr":50}' in flow.log_of("w"))
    seen = {line for line in flow.log_of("w").splitlines() if line.startswith("{")}
    assert 3 <= len(seen) <= 20 and all(json.loads(line) for line in seen)


async def test_the_state_file_is_there_without_any_vars(flow: FakeFlow) -> None:
    await flow.place("w")
    await flow.start("w", ["bash", "-c", "cat $ORCH_STATE_FILE"])
    assert (await flow.ended("w")).exit_code == 0
    assert flow.log_of("w").splitlines()[-1] == "{}"


async def test_records_that_cannot_be_written_stop_nothing_else(flow: FakeFlow) -> None:
    await flow.place("w", {"x": 1})
    await flow.start("w", ["python", "-c", "import os, time\nwhile not os.path.exists('go'): time.sleep(0.01)"])
    await flow.until(lambda: flow.of(Started, "w"))
    state_file = flow.orch_dir / "run" / "vars-w.json"
    (flow.orch_dir / "run").rename(flow.orch_dir / "away")
    flow.write("w", {"op": "replace", "path": "/x", "value": 2})
    placed = await flow.place("late")
    assert "agent-local.works" in placed.error and str(flow.orch_dir) in placed.error
    reply = await flow.start("w", "true", n=2)
    assert not reply.accepted and "1-w-2.1.json" in reply.error
    (flow.orch_dir / "away").rename(flow.orch_dir / "run")
    await flow.until(lambda: json.loads(state_file.read_text()) == {"x": 2})
    assert not (await flow.place("late")).error
    (flow.folder / "go").touch()
    assert (await flow.ended("w")).exit_code == 0


def test_a_failure_on_a_full_disk_names_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert agent._little_space(tmp_path) == ""
    monkeypatch.setattr(agent, "LITTLE_SPACE", 1 << 62)
    assert str(tmp_path) in agent._little_space(tmp_path / "not there", tmp_path)


async def test_a_patch_while_the_flow_is_away_is_kept(flow: FakeFlow) -> None:
    await flow.place("w", {"n": 0, "rows": []})
    flow.away = True
    async with flow.script("w") as http:
        before = time.monotonic()
        answers = await asyncio.gather(
            *(http.patch("", json=[{"op": "add", "path": "/rows/-", "value": i}]) for i in range(5))
        )
        assert [(a.status_code, a.json()) for a in answers] == [(202, {"rev": None})] * 5
        assert 1.9 < time.monotonic() - before < 4
        assert sorted((await http.get("/rows")).json()) == [0, 1, 2, 3, 4]
    await flow.start("w", "true", n=1)
    flow.away = False
    await flow.ended("w")
    assert sorted(flow.vars["w"]["rows"]) == [0, 1, 2, 3, 4]
    kinds = [type(item) for _, item, _ in flow.items]
    assert kinds == [VarOps] * 5 + [Started, Ended]


# ---- incarnations ----------------------------------------------------------------------------------------------------


async def test_a_new_agent_adopts_and_reports(flow: FakeFlow) -> None:
    placed = await flow.place("long", {"x": 1})
    await flow.place("short")
    port = int(flow.agent_url.rpartition(":")[2])
    await flow.start("long", ["bash", "-c", "sleep 1.2; exit 7"])
    await flow.start("short", ["bash", "-c", "sleep 0.3; exit 4"])
    await flow.until(lambda: len(flow.of(Started)) == 2)
    await flow.kill_agent()
    await asyncio.sleep(0.4)  # `short` ends while no agent lives
    flow.epoch, flow.acked = 2, 0
    await flow.start_agent(port=port)
    await flow.attach()
    short = await flow.ended("short")
    assert (short.reason, short.exit_code) == ("exit_code", 4)
    assert (await flow.place("long")) == placed
    assert (await flow.start("short", "touch doubled")).accepted
    long = await flow.ended("long")
    assert (long.reason, long.exit_code) == ("exit_code", 7)
    async with flow.script("long") as http:
        assert (await http.get("")).json() == {"x": 1}
    assert len(flow.of(Ended)) == 2 and not (flow.folder / "doubled").exists()


async def test_sigterm_and_a_successor_leave_scripts_alone(flow: FakeFlow) -> None:
    await flow.place("w")
    await flow.start("w", "sleep 60")
    [started] = await flow.until(lambda: flow.of(Started))
    assert flow.agent is not None
    flow.agent.send_signal(signal.SIGTERM)
    assert await asyncio.wait_for(flow.agent.wait(), 5) == 0
    assert alive(started.pid)
    assert (flow.orch_dir / "run" / "agent-local.json").exists()  # the script looks for an agent on that port
    flow.acked = 0
    await flow.start_agent()
    agent_spec_file(flow.orch_dir / "run", "local").write_text('{"epoch": 3}')
    flow.epoch = 3  # somebody newer has taken over
    await flow.place("x")
    await flow.start("x", "sleep 60")
    assert await asyncio.wait_for(flow.agent.wait(), 10) == 0
    assert alive(started.pid)
    flow.acked = 0
    await flow.start_agent()
    await flow.attach()
    await flow.ask("/v1/shutdown", {})
    assert await asyncio.wait_for(flow.agent.wait(), 10) == 0
    assert {ended.work for ended in flow.of(Ended)} == {"w", "x"} and not alive(started.pid)


async def test_an_agent_that_another_one_has_replaced_leaves(flow: FakeFlow) -> None:
    await flow.place("w")
    await flow.start("w", ["sleep", "600"])
    started = (await flow.until(lambda: flow.of(Started)))[0]
    ready = flow.orch_dir / "run" / "agent-local.json"
    others = json.dumps({**json.loads(ready.read_bytes()), "pid": os.getpid()})
    ready.write_text(others)
    assert flow.agent is not None
    assert await asyncio.wait_for(flow.agent.wait(), 15) == 0
    assert alive(started.pid)
    flow.epoch, flow.acked = 2, 0
    await flow.start_agent()
    await flow.attach()
    await flow.stop("w")
    assert (await flow.ended("w")).reason == "stopped"


async def test_forget_stops_and_drops(flow: FakeFlow) -> None:
    await flow.place("w", {"x": 1})
    await flow.start("w", "sleep 60")
    [started] = await flow.until(lambda: flow.of(Started))
    await flow.ask("/v1/forget", [Forget(work="w", rev=9), Forget(work="unknown", rev=9)])
    await flow.until(lambda: not alive(started.pid))
    assert (await flow.status()).works == []
    await flow.ask("/v1/state", [Diff(work="w", rev=9, ops=[])])


async def test_a_late_forget_leaves_a_work_that_came_back_under_the_name(flow: FakeFlow) -> None:
    flow.rev = 3
    await flow.place("w")
    gone = [Forget(work="w", rev=4)]
    await flow.ask("/v1/forget", gone)
    assert (await flow.status()).works == []
    flow.rev = 4
    await flow.place("w")
    await flow.start("w", "sleep 60")
    [started] = await flow.until(lambda: flow.of(Started))
    await flow.ask("/v1/forget", gone)
    assert [work.work for work in (await flow.status()).works] == ["w"] and alive(started.pid)


async def test_attach_moves_to_another_flow(flow: FakeFlow, tmp_path: Path) -> None:
    await flow.place("w", {"n": 1})
    flow.away = True
    async with flow.script("w") as http:
        assert (await http.put("/n", json=2)).status_code == 202
    other = FakeFlow(flow.folder)
    other.vars, other.agent_url = {"w": {"n": 1, "new": True}}, flow.agent_url
    other.rev = 7
    async with other.serving():
        await other.attach()
        await other.until(lambda: other.vars["w"]["n"] == 2)
        async with flow.script("w") as http:
            await other.until(lambda: other.rev == 8)
            await other.until_async(lambda: read(http), {"n": 2, "new": True})
    with pytest.raises(httpx.HTTPStatusError, match="409"):
        flow.epoch = 2
        await flow.attach()
    flow.epoch = 1


async def test_a_crowd_starts_at_once(flow: FakeFlow) -> None:
    names = [f"w{i}" for i in range(32)]
    for name in names:
        await flow.place(name)
    await asyncio.gather(*(flow.start(name, "sleep 60") for name in names))
    await flow.until(lambda: len(flow.of(Started)) == 32)
    await flow.ask("/v1/shutdown", {"kill": True})
    await flow.until(lambda: len(flow.of(Ended)) == 32)


async def test_another_run_starts_clean(flow: FakeFlow) -> None:
    await flow.place("w", {"x": 5})
    await flow.start("w", "sleep 60")
    [started] = await flow.until(lambda: flow.of(Started))
    await flow.start("w", "true", n=2)
    flow.away = True
    flow.rev = 100
    flow.write("w", {"op": "replace", "path": "/x", "value": 6})
    await flow.kill_agent()
    flow.away, flow.epoch, flow.acked, flow.rev, flow.vars = False, 2, 0, 0, {"w": {"x": 1}}
    flow.items.clear()
    await flow.start_agent(run=2)
    await flow.until(lambda: not alive(started.pid))
    await flow.place("w")
    async with flow.script("w") as http:
        assert await read(http) == {"x": 1}
        assert (await http.put("/x", json=2)).json() == {"rev": 1}
    assert [type(item) for _, item, _ in flow.items] == [VarOps]


async def test_orphan_guard(tmp_path: Path) -> None:
    async with flow_with_agent(tmp_path / "app", orphan_timeout=1.5) as flow:
        await flow.place("w")
        await flow.start("w", "sleep 60")
        [started] = await flow.until(lambda: flow.of(Started))
        for _ in range(4):
            await asyncio.sleep(0.5)
            await flow.status()
        assert alive(started.pid) and flow.agent is not None
        flow.away = True
        assert await asyncio.wait_for(flow.agent.wait(), 10) == 0
        assert not alive(started.pid)
