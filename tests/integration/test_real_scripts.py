"""Scripts under a real `orch run`: command lines, environment, ends, files, variables, progress, misbehaving
programs."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from testkit import RunningApp, free_port, wait_until

Apps = Callable[..., RunningApp]
CHILDREN = Path(__file__).parent.parent / "children"
DONE = ("succeeded", "failed", "stopped")

SHOW = """
import json, os, shutil, sys
told = {"argv": sys.argv, "env": dict(os.environ), "cwd": os.getcwd(), "python": sys.executable,
        "which": [shutil.which("python"), shutil.which("python3")]}
with open(os.path.join(os.environ["SHOWS"], "shown-" + os.environ["ORCH_WORK"] + ".json"), "w") as file:
    json.dump(told, file)
"""


def call_of(app: RunningApp, name: str) -> dict[str, Any]:
    """The call that a work's status speaks of."""
    work = app.work(name)
    call: dict[str, Any] = work["calls"][work["call"]]
    return call


def ends(app: RunningApp, names: list[str], timeout: float = 30) -> dict[str, dict[str, Any]]:
    """The calls of these works, once all have ended."""

    def all_done() -> bool:
        stages = app.get("/status")["works"]
        return all(stages[name] in DONE for name in names)

    wait_until(all_done, timeout, what=lambda: f"{names}: {app.get('/status')}\n{app.output()}")
    return {name: call_of(app, name) for name in names}


COMMANDS = """
import os
from orch import App, Flow, ScriptWork

OPTIONS = dict(parallel=True, raise_exception=False, env={"SHOWS": os.path.dirname(__file__)})

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.listed = ScriptWork(["show.py", "a b", "{port}", "{{port}}", "{host}", "$HOME", "$(id)", "{other}"],
                                 args="x 'y z' {work_dir} {base_path}", **OPTIONS)
        self.text = ScriptWork("python show.py 'one two' $HOME *.py > out", **OPTIONS)
        self.three = ScriptWork(["python3", "-u", "show.py"], args=["a b"], cwd="sub", **OPTIONS)
        self.shelled = ScriptWork('printf "%s|" "$HOME" "{port}" "$(echo sub)" "$#" "$@" > shell.txt', shell=True,
                                  args="fixed", **OPTIONS)
        self.placed = ScriptWork(["show.py"], cwd="{work_dir}", port=PORT, **{
            **OPTIONS, "env": {**OPTIONS["env"], "P": "{port} {{port}} {host}", "Q": "$HOME"}})

    def run(self):
        self.listed.run("p 'q r' {port} $HOME", ["s t", "{port}"], 3, 2.5, True)
        self.text.run()
        self.three.run("")
        self.shelled.run("a 'b c'", ["$HOME d"])
        self.placed.run()

app = App(Root())
"""


def test_command_lines_and_environment(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    port = free_port()
    folder = app_folder(
        COMMANDS.replace("PORT", str(port)),
        {"show.py": SHOW, "sub/show.py": SHOW, "queue.py": "raise ImportError('the wrong queue')"},
    )
    work_dir = folder / ".orch/works/placed"
    work_dir.mkdir(parents=True)
    (work_dir / "show.py").write_text("import runpy; runpy.run_path('" + str(folder / "show.py") + "')")
    app = orch_app(folder)
    calls = ends(app, ["listed", "text", "three", "shelled", "placed"])
    said = {name: (call["stage"], call["message"]) for name, call in calls.items()}
    assert all(stage == "succeeded" for stage, _ in said.values()), (said, app.output())
    shown = {path.stem[6:]: json.loads(path.read_text()) for path in folder.glob("shown-*.json")}

    listed, text, three, placed = (shown[name] for name in ("listed", "text", "three", "placed"))
    own = str(app.work("listed")["status"]["port"])
    assert listed["argv"] == [
        "show.py", "a b", own, "{port}", "127.0.0.1", "$HOME", "$(id)", "{other}",
        "x", "y z", str(folder / ".orch/works/listed"), "/view/listed",
        "p", "q r", "{port}", "$HOME", "s t", "{port}", "3", "2.5", "True",
    ]  # fmt: skip
    assert text["argv"] == ["show.py", "one two", "$HOME", "*.py", ">", "out"]
    assert three["argv"] == ["show.py", "a b"]
    assert (folder / "shell.txt").read_text() == "|".join(
        [os.environ["HOME"], str(app.work("shelled")["status"]["port"]), "sub", "4", "fixed", "a", "b c", "$HOME d", ""]
    )
    bin_folder = os.path.dirname(sys.executable)
    for told in shown.values():
        assert os.path.dirname(told["python"]) == bin_folder
        assert told["env"]["PATH"].split(os.pathsep)[0] == bin_folder
        assert [os.path.dirname(found) for found in told["which"]] == [bin_folder, bin_folder]
    assert [listed["cwd"], three["cwd"], placed["cwd"]] == [str(folder), str(folder / "sub"), str(work_dir)]

    env = placed["env"]
    assert env["P"] == f"{port} {{port}} 127.0.0.1"
    assert env["Q"] == "$HOME"
    assert app.work("placed")["status"]["port"] == port
    assert {name: env[name] for name in ("ORCH_WORK", "ORCH_CALL", "ORCH_ATTEMPT", "ORCH_BASE_PATH")} == {
        "ORCH_WORK": "placed",
        "ORCH_CALL": calls["placed"]["id"],
        "ORCH_ATTEMPT": "1",
        "ORCH_BASE_PATH": "/view/placed",
    }
    assert env["ORCH_APP"] == app.get("/app")["name"]
    assert env["ORCH_HOST"] == env["HOST"] == "127.0.0.1"
    assert env["ORCH_PORT"] == env["PORT"] == str(port)
    assert env["ORCH_STATE_URL"].startswith("http://127.0.0.1:")
    assert env["ORCH_TOKEN"] not in (app.token, listed["env"]["ORCH_TOKEN"], "")
    assert env["ORCH_STATE_FILE"]
    assert (env["STREAMLIT_BROWSER_GATHER_USAGE_STATS"], env["GRADIO_ANALYTICS_ENABLED"]) == ("false", "False")
    assert env["HF_HUB_DISABLE_TELEMETRY"] == "1"
    assert calls["listed"]["result"] == []


ENDS = """
from orch import App, Flow, ScriptWork

def script(*words, **options):
    return ScriptWork(list(words), parallel=True, **{"raise_exception": False, **options})

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.code = script("code.py")
        self.crash = script("crash.py")
        self.slow = script("ignores_term.py", timeout=0.3, grace=0.2, retries=1, retry_delay=0.05)
        self.third = script("third.py", retries=4, retry_delay=0.05)
        self.gone = script("no_such.py", retries=3, retry_delay=0.05)
        self.unknown = script("no-such-program")
        self.nowhere = script("code.py", cwd="no/such/folder")
        self.split = script("code.py")
        self.sub = script("code.py", "7", shell=False)
        self.queue = script("queue.py")
        self.closes = script("closes_stdout.py")
        self.line = script("long_line.py")
        self.flood = script("floods.py")
        self.bar = script("carriage_returns.py")
        self.fork = script("forks_and_exits.py", grace=0.3)
        self.setsid = script("setsid_grandchild.py", cwd="second", grace=0.3)
        self.daemon = script("daemon.py", cwd="third", grace=0.3)
        self.seen = {}

    def run(self):
        self.split.run("an 'open quote")
        for work in self.works():
            if work is not self.split:
                work.run()
        self.seen = {work.name: str(work.status.reason) for work in self.works() if work.has_failed}

app = App(Root())
"""
END_SCRIPTS = {
    "code.py": "import sys; print('one'); print('two', file=sys.stderr); raise SystemExit(int((sys.argv + ['3'])[1]))",
    "crash.py": "import os, signal; print('before', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
    "third.py": "import os, sys; print('try', os.environ['ORCH_ATTEMPT']); sys.exit(os.environ['ORCH_ATTEMPT'] != '3')",
    "go": "0",
}


def test_ends_and_misbehaving_programs(orch_app: Apps) -> None:
    files = {**END_SCRIPTS, **{path.name: path.read_text() for path in CHILDREN.glob("*.py")}}
    files |= {"second/setsid_grandchild.py": files["setsid_grandchild.py"], "third/daemon.py": files["daemon.py"]}
    app = orch_app(ENDS, files)
    calls = ends(app, list(app.get("/status")["works"]), 60)
    told = {name: (call["stage"], call["reason"], call["exit_code"]) for name, call in calls.items()}
    failed = "failed"
    assert told == {
        "code": (failed, "exit_code", 3),
        "crash": (failed, "signal", None),
        "slow": (failed, "timeout", None),
        "third": ("succeeded", None, 0),
        "gone": (failed, "exception", None),
        "unknown": (failed, "exception", None),
        "nowhere": (failed, "exception", None),
        "split": (failed, "exception", None),
        "sub": (failed, "exit_code", 7),
        "queue": ("succeeded", None, 0),
        "closes": (failed, "exit_code", 5),
        "line": ("succeeded", None, 0),
        "flood": ("succeeded", None, 0),
        "bar": ("succeeded", None, 0),
        "fork": (failed, "exit_code", 3),
        "setsid": ("succeeded", None, 0),
        "daemon": ("succeeded", None, 0),
    }
    said = {name: call["message"] for name, call in calls.items()}
    assert "SIGSEGV" in said["crash"]
    assert "0.3 s" in said["slow"]
    assert "no_such.py" in said["gone"]
    assert str(app.folder) in said["gone"]
    assert "no-such-program" in said["unknown"]
    assert "no/such/folder" in said["nowhere"]
    assert "quot" in said["split"]
    attempts = {name: call["attempt"] for name, call in calls.items()}
    assert (attempts["slow"], attempts["third"], attempts["gone"], attempts["code"]) == (2, 3, 4, 1)
    assert app.work("slow")["status"]["num_timeouts"] == 2
    assert app.work("third")["status"]["num_successes"] == 1
    app.wait_state("/vars/seen", lambda seen: "signal" in seen.values() and "timeout" in seen.values())

    # One log a call, one header line an attempt, in order, complete and private.
    log = app.log("third")
    assert [line for line in log.splitlines() if line.startswith("try")] == ["try 1", "try 2", "try 3"]
    assert log.count("--- ") == 3
    path = app.folder / ".orch/logs/third" / f"{calls['third']['id']}.log"
    assert path.stat().st_mode & 0o777 == 0o600
    assert {"one", "two"} <= set(app.log("code").splitlines())
    flood = app.folder / ".orch/logs/flood" / f"{calls['flood']['id']}.log"
    assert flood.stat().st_size > 20_000_000
    line = app.folder / ".orch/logs/line" / f"{calls['line']['id']}.log"
    assert line.stat().st_size > 100_000_000
    assert line.read_bytes().endswith(b"\nthe end\n")
    assert app.work("bar")["progress"] == 1.0
    assert "I am the user's queue" in app.log("queue")

    # A call ends with its main process; what is left of its descendants goes too, whatever its group and session.
    for left in (app.folder / "child", app.folder / "second/child", app.folder / "third/child"):
        pid = int(left.read_text())
        wait_until(lambda pid=pid: not psutil.pid_exists(pid), 5, what=f"{left} is gone")
    # The console stays readable: nobody prints a 100 MB line.
    assert max(map(len, app.output().splitlines())) < 200_000
    assert app.get("/status")["stage"] == "running"


FILES = """
from orch import App, Drive, Flow, ScriptWork

def script(*words, **options):
    return ScriptWork(list(words), parallel=True, raise_exception=False, **options)

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.step = 0
        self.one = script("make.py", "1", outputs=["logs"], cwd="one", sync_interval=0.1)
        self.two = script("make.py", "2", outputs=["logs"], cwd="two", sync_interval=0.1)
        self.all = script("look.py", inputs=["*:logs", "one:logs/only1.txt"], cwd="all")
        self.ambiguous = script("look.py", inputs=["logs/shared.txt"], cwd="ambiguous")
        self.missing = script("look.py", inputs=["no/such/file.txt"], cwd="missing")
        self.has_it = script("look.py", inputs=["own.txt"], cwd="has_it")
        self.lazy = script("look.py", outputs=["never.txt"], cwd="lazy")
        self.breaks = script("make.py", "3", "fail", outputs=["broken"], cwd="breaks", sync_interval=0.1)
        self.drive = Drive("app")
        self.seen = []
        self.files = []

    def run(self):
        if self.step >= 1:
            first = [self.one.run(), self.two.run(), self.breaks.run()]
            if all(call.done for call in first):
                for work in (self.all, self.ambiguous, self.missing, self.has_it, self.lazy):
                    work.run()
            self.files = [[file["path"], file["size"]] for file in self.one.files]
        self.seen = [str(path) for path in self.drive.list("logs", component_name="root.one", recursive=True)]

app = App(Root())
"""
MAKE = """
import os, pathlib, sys, time
name = "broken" if sys.argv[2:] else "logs"
pathlib.Path(name, "deep").mkdir(parents=True, exist_ok=True)
pathlib.Path(name, "shared.txt").write_text("from " + sys.argv[1])
pathlib.Path(name, f"only{sys.argv[1]}.txt").write_text(sys.argv[1] * 10)
pathlib.Path(name, "deep", "x.bin").write_bytes(os.urandom(1000))
while not pathlib.Path("go").exists():
    time.sleep(0.01)
pathlib.Path(name, "last.txt").write_text("last")
sys.exit(9 if sys.argv[2:] else 0)
"""
LOOK = """
import pathlib
print(sorted(str(p) for p in pathlib.Path(".").rglob("*") if p.is_file()), flush=True)
"""


def test_inputs_and_outputs(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    files: dict[str, str] = {f"{name}/make.py": MAKE for name in ("one", "two", "breaks")}
    files |= {f"{name}/look.py": LOOK for name in ("all", "ambiguous", "missing", "has_it", "lazy")}
    files |= {"has_it/own.txt": "mine", "all/logs/mine.txt": "kept"}
    app = orch_app(app_folder(FILES, files))
    app.set("/vars/step", 1)

    # While they run: partial versions, which list() does not see.
    wait_until(lambda: list((app.folder / ".orch/drive").rglob("*one*")), 15, what="a partial version")
    assert app.state("/vars/seen") == []
    assert app.work("one")["status"]["files"] == []
    for name in ("one", "two", "breaks"):
        (app.folder / name / "go").touch()
    names = ["one", "two", "all", "ambiguous", "missing", "has_it", "lazy", "breaks"]
    calls = ends(app, names)
    told = {name: (call["stage"], call["message"]) for name, call in calls.items()}

    paths = ["logs/deep/x.bin", "logs/last.txt", "logs/only1.txt", "logs/shared.txt"]
    assert told["one"] == ("succeeded", "")
    assert calls["one"]["result"] == ["logs"]
    shown = app.work("one")["status"]["files"]
    assert sorted(file["path"] for file in shown) == paths
    assert {file["path"]: file["size"] for file in shown}["logs/deep/x.bin"] == 1000
    assert all(file["version"] for file in shown)
    app.wait_state("/vars/seen", lambda seen: len(seen) == 4)
    app.wait_state("/vars/files", lambda seen: sorted(path for path, _ in seen) == paths)

    assert told["all"] == ("succeeded", "")
    seen = app.log("all")
    for path in ("logs/one/only1.txt", "logs/two/only2.txt", "logs/one/deep/x.bin", "logs/mine.txt", "logs/only1.txt"):
        assert f"'{path}'" in seen, (path, seen)
    assert (app.folder / "all/logs/two/shared.txt").read_text() == "from 2"
    assert told["ambiguous"][0] == "failed"
    assert "one" in told["ambiguous"][1]
    assert "two" in told["ambiguous"][1]
    assert told["missing"][0] == "failed"
    assert "no/such/file.txt" in told["missing"][1]
    assert told["has_it"] == ("succeeded", "")
    assert told["lazy"][0] == "failed"
    assert "never.txt" in told["lazy"][1]
    assert told["breaks"][0] == "failed"
    assert "9" in told["breaks"][1]
    assert app.work("breaks")["status"]["files"] == []
    listed = app.request("GET", "/api/v1/drive/app/broken")
    assert listed.status_code == 404 or listed.json() == [], listed.text


VARS = """
from orch import App, Flow, ScriptWork

def script(*words, **options):
    return ScriptWork(list(words), parallel=True, raise_exception=False, **options)

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.talker = script("talk.py", vars={"n": 1, "rows": [], "knob": 0.5, "d": {"a": 1}, "answer": ""})
        self.quiet = script("talk.py", "quiet", vars={"secret": "of the other"})
        self.bar = script("bar.py", "tqdm")
        self.epoch = script("bar.py", "epoch")
        self.csv = script("csv_log.py", outputs=["lightning_logs"], sync_interval=0.1)
        self.told = script("reports.py")
        self.seen = 0
        self.heard = 0.0

    def run(self):
        for work in self.works():
            if work is not self.quiet:
                work.run()
        self.seen = self.talker.n
        if self.talker.n == 5:
            self.talker.knob = 0.75
        if self.bar.progress is not None:
            self.heard = max(self.heard, self.bar.progress)

app = App(Root())
"""
TALK = """
import json, os, time, urllib.error, urllib.request
url, token, live = (os.environ[name] for name in ("ORCH_STATE_URL", "ORCH_TOKEN", "ORCH_STATE_FILE"))

def ask(method="GET", path="", value=None, key=token, base=url):
    body = None if method == "GET" else json.dumps(value).encode()
    request = urllib.request.Request(base + path, body, {"Authorization": "Bearer " + key}, method=method)
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()

told = {"vars": ask(), "file": json.load(open(live))}
told["put"] = ask("PUT", "/n", 5)[0]
told["patch"] = ask("PATCH", "", [{"op": "add", "path": "/rows/-", "value": {"x": 1}},
                                  {"op": "replace", "path": "/d/a", "value": 2}])[0]
told["one"] = ask("GET", "/d/a")
told["unknown"] = [ask("GET", "/nope")[0], ask("PUT", "/nope", 1)[0],
                   ask("PATCH", "", [{"op": "replace", "path": "/nope", "value": 1}])[0]]
told["bad token"] = [ask(key="wrong")[0], ask("PUT", "/n", 7, key="wrong")[0]]
told["other"] = ask(base=url.replace("talker", "quiet"))[0]
told["flow"] = [ask(base=os.environ["ORCH_STATE_URL"].split("/state/")[0], path="/v1/status")[0]]
told["no json"] = ask("PATCH", "", {"op": 1})[0]
told["again"] = ask()[1]
while json.load(open(live))["knob"] != 0.75:
    time.sleep(0.01)
told["knob"] = ask("GET", "/knob")
ask("PUT", "/answer", json.dumps(told))
"""
BAR = """
import sys, time
for n in range(1, 5):
    if sys.argv[1] == "tqdm":
        sys.stderr.write(f"\\r{n * 25:3d}%|{'#' * n}| {n}/4 [00:00<00:00, 3.0it/s]")
        sys.stderr.flush()
    else:
        print(f"Epoch {n}/4 loss=0.5", flush=True)
"""
CSV_LOG = """
import pathlib
folder = pathlib.Path("lightning_logs/version_0")
folder.mkdir(parents=True)
(folder / "metrics.csv").write_text("epoch,step,train_loss,val_acc\\n0,1,0.9,\\n0,2,,0.7\\n1,3,0.25,\\n1,4,,0.875\\n")
"""
REPORTS = """
from orch_workers import report
report(loss=0.5, progress=0.25)
report(loss=0.125, acc=0.75)
import pathlib, time
while not pathlib.Path("heard").exists():
    time.sleep(0.01)
"""


def test_variables_progress_and_metrics(orch_app: Apps) -> None:
    scripts = {"talk.py": TALK, "bar.py": BAR, "csv_log.py": CSV_LOG, "reports.py": REPORTS}
    app = orch_app(VARS, scripts)
    names = ["talker", "bar", "epoch", "csv", "told"]
    app.wait_state("/works/told/status", lambda status: status["progress"] == 0.25 and "acc" in status["metrics"])
    (app.folder / "heard").touch()
    calls = ends(app, names)
    assert {call["stage"] for call in calls.values()} == {"succeeded"}, (calls, app.output())

    told = json.loads(app.state("/works/talker/vars/answer"))
    declared = {"n": 1, "rows": [], "knob": 0.5, "d": {"a": 1}, "answer": ""}
    assert told["vars"] == [200, declared]
    assert told["file"] == declared
    assert (told["put"], told["patch"], told["one"]) == (200, 200, [200, 2])
    assert told["unknown"] == [404, 404, 404]
    assert told["bad token"] == [401, 401]
    assert told["other"] == 401
    assert told["flow"] == [401]
    assert told["no json"] in (400, 422)
    assert told["again"] == {**declared, "n": 5, "rows": [{"x": 1}], "d": {"a": 2}} or told["again"]["knob"] == 0.75
    assert told["knob"] == [200, 0.75]
    values = app.state("/works/talker/vars")
    assert {**values, "answer": ""} == {**declared, "n": 5, "rows": [{"x": 1}], "knob": 0.75, "d": {"a": 2}}
    assert app.state("/vars/seen") == 5
    causes = [row["cause"] for row in app.get("/history/works/talker/vars/n?limit=5")]
    assert causes == ["work:talker"]

    assert app.work("bar")["progress"] == 1.0
    assert app.work("epoch")["progress"] == 1.0
    assert app.state("/vars/heard") == 1.0
    metrics = app.work("csv")["status"]["metrics"]
    assert (metrics["train_loss"], metrics["val_acc"]) == (0.25, 0.875)
    assert app.work("told")["status"]["metrics"] == {"loss": 0.125, "acc": 0.75}
