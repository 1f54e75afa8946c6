"""Works with places of their own (see support/places_serve.py): placed when needed, given back, lost, found again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import psutil
import pytest
from testkit import RunningApp, free_port, kill_all, wait_until

SUPPORT = Path(__file__).resolve().parent.parent / "support"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's end is told to others by Linux only")

APP = """
from orch import App, CloudCompute, Flow, List, ScriptWork, ServiceWork

QUICK = CloudCompute(idle_timeout=0.5)


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.want, self.codes, self.jobs_wanted, self.serve = [], [], 0, False
        self.jobs = List()
        self.trainer = ScriptWork(
            "train.py", outputs=["model.txt"], parallel=True, raise_exception=False, retries=0, grace=2.0,
            vars={"knob": 1, "said": 0})
        self.reader = ScriptWork("read.py", inputs=["trainer:model.txt"], parallel=True, cloud_compute=QUICK)
        self.again = ScriptWork("train.py", parallel=True, raise_exception=False, retries=1, retry_delay=0.1)
        self.moon = ScriptWork("train.py", parallel=True, raise_exception=False, cloud_compute=CloudCompute("moon"))
        self.web = ServiceWork("python -m http.server {port} --bind {host}", grace=1.0)

    def run(self):
        while len(self.jobs) < self.jobs_wanted:
            self.jobs.append(ScriptWork("train.py job", parallel=True, grace=2.0))
        while len(self.jobs) > self.jobs_wanted:
            self.jobs.pop()
        for job in self.jobs:
            job.run()
        for name in self.want:
            getattr(self, name).run()
        if self.serve:
            self.web.run()


app = App(Root())
"""
TRAIN = """
import json, os, pathlib, signal, sys, time, urllib.request
if sys.argv[1:] == ["job"]:
    signal.signal(signal.SIGTERM, lambda *_: (print("farewell", flush=True), os._exit(0)))
print("in", os.getcwd(), flush=True)
go = pathlib.Path(os.environ["TEST_GO"])
n = 0
while not (go / os.environ["ORCH_WORK"]).exists():
    n += 1
    print("line", n, flush=True)
    time.sleep(0.01)
knob = json.load(open(os.environ["ORCH_STATE_FILE"])).get("knob")
pathlib.Path("model.txt").write_text(f"trained with {knob}")
if knob:
    request = urllib.request.Request(
        os.environ["ORCH_STATE_URL"] + "/said", b"5", {"Authorization": "Bearer " + os.environ["ORCH_TOKEN"]},
        method="PUT")
    urllib.request.urlopen(request).close()
print("lines", n, flush=True)
raise SystemExit(3 if (go / "fail").exists() else 0)
"""


class PlacesApp(RunningApp):
    def command(self) -> list[str]:
        return [sys.executable, "-P", str(SUPPORT / "places_serve.py"), "run", self.app]

    def places(self) -> dict[str, dict[str, object]]:
        found = {}
        for path in (self.folder / ".orch" / "run" / "places").glob("*.json"):
            with contextlib.suppress(FileNotFoundError):  # given back at this moment
                found[path.stem] = json.loads(path.read_bytes())
        return found

    def go(self, name: str) -> None:
        (self.folder.parent / "go" / name).touch()

    def stage(self, name: str) -> str:
        return str(self.work(name)["status"]["stage"])

    def until(self, name: str, stage: str, timeout: float = 30) -> dict[str, object]:
        wait_until(lambda: self.stage(name) == stage, timeout, what=lambda: f"{name} {stage}, is {self.work(name)}")
        return self.work(name)

    def whole(self, name: str) -> bool:
        """No line of its log is missing or twice."""
        lines = self.log(name).splitlines()
        numbers = [int(line.split()[1]) for line in lines if line.startswith("line ")]
        return numbers == list(range(1, len(numbers) + 1)) and lines[-1] == f"lines {len(numbers)}"


@pytest.fixture
def app(tmp_path: Path) -> Iterator[PlacesApp]:
    folder = tmp_path / "app"
    folder.mkdir()
    (tmp_path / "go").mkdir()
    for name, text in {"app.py": APP, "train.py": TRAIN, "read.py": "print(open('model.txt').read())"}.items():
        (folder / name).write_text(text)
    app = PlacesApp(folder, env={"TEST_GO": str(tmp_path / "go")})
    yield app
    assert app.close() == ""


def test_a_work_is_placed_when_it_is_needed_and_its_log_comes_home(app: PlacesApp) -> None:
    app.start()
    app.until("trainer", "not_started")
    assert not app.places()
    app.set("/vars/want", ["trainer"])
    app.until("trainer", "running")
    assert list(app.places()) == ["trainer"]
    app.set("/works/trainer/vars/knob", 7)
    wait_until(lambda: "line 20" in app.log("trainer"), what="its lines are here while it runs")
    app.go("trainer")
    app.until("trainer", "succeeded")
    assert app.whole("trainer")
    assert app.state("/works/trainer/vars/said") == 5
    assert ".machines" in app.log("trainer").splitlines()[1]
    assert not (app.folder / "model.txt").exists()
    app.set("/vars/want", ["trainer", "reader"])
    app.until("reader", "succeeded")
    assert "trained with 7" in app.log("reader")
    assert "trained with 7" in app.output()


def test_a_finished_work_gives_its_place_back_and_gets_another(app: PlacesApp) -> None:
    app.start()
    app.go("trainer")
    app.set("/vars/want", ["trainer"])
    app.until("trainer", "succeeded")
    app.set("/vars/want", ["trainer", "reader"])
    app.until("reader", "succeeded")
    first = app.places().get("reader")
    wait_until(lambda: list(app.places()) == ["trainer"], what="reader's place is given back")
    if first is not None:
        assert not psutil.pid_exists(int(str(first["place_pid"])))
    app.post("/works/reader/run", {"args": ["again"]})
    wait_until(lambda: len(app.work("reader")["calls"]) == 2 and app.stage("reader") == "succeeded", 30)
    if first is not None:
        wait_until(lambda: app.places().get("reader", first)["epoch"] != first["epoch"] or "reader" not in app.places())


def test_what_cannot_be_placed_fails_alone(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["moon", "trainer"])
    failed = app.until("moon", "failed")
    assert failed["status"]["reason"] == "infeasible"  # type: ignore[index]
    assert "moon" in failed["status"]["message"]  # type: ignore[index]
    app.until("trainer", "running")
    app.go("trainer")
    app.until("trainer", "succeeded")


def test_a_place_that_ends_takes_its_script_and_the_retry_gets_another(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer", "again"])
    app.until("trainer", "running")
    app.until("again", "running")
    wait_until(lambda: "line 1\n" in app.log("again"), what="the log's first lines are here")
    first = app.places()
    for place in first.values():
        os.kill(int(str(place["place_pid"])), signal.SIGKILL)
    lost = app.until("trainer", "failed")
    assert lost["status"]["reason"] == "lost"  # type: ignore[index]
    wait_until(lambda: app.work("again")["attempt"] == 2 and app.stage("again") == "running", 30)
    assert app.places()["again"]["machine"] != first["again"]["machine"]
    app.go("again")
    app.until("again", "succeeded")
    log = app.log("again")
    assert "attempt 1" in log and "attempt 2" in log
    second = [line for line in log.partition("attempt 2")[2].splitlines() if line.startswith("line ")]
    assert [line.split()[1] for line in second] == [str(n + 1) for n in range(len(second))]


def test_an_agent_that_is_killed_is_followed_by_one_in_its_place(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer"])
    app.until("trainer", "running")
    first = app.places()["trainer"]
    os.kill(int(str(first["pid"])), signal.SIGKILL)
    epochs = lambda: {agent["name"]: agent["epoch"] for agent in app.get("/status")["agents"] if agent["up"]}  # noqa: E731
    wait_until(lambda: epochs().get("trainer", first["epoch"]) != first["epoch"], 30, what="another agent")
    assert app.places()["trainer"]["place_pid"] == first["place_pid"]
    app.go("trainer")
    done = app.until("trainer", "succeeded")
    assert done["attempt"] == 1
    assert app.whole("trainer")


@pytest.mark.parametrize("ends", ["after", "while"], ids=["it ends later", "it ends while nobody serves"])
def test_a_server_finds_the_agents_of_the_one_before(app: PlacesApp, ends: str) -> None:
    app.start()
    app.set("/vars/want", ["trainer"])
    app.set("/vars/serve", True)
    app.until("trainer", "running")
    wait_until(lambda: app.work("web")["status"]["is_ready"], 30)
    app.kill()
    places = app.places()
    if ends == "while":
        app.go("trainer")
        wait_until(lambda: _record(places["trainer"], "exit"), what="its exit record")
    app.start()
    if ends == "after":
        app.until("trainer", "running")
        size = len(app.log("trainer"))
        wait_until(lambda: len(app.log("trainer")) > size, what="its lines go on coming")
        app.go("trainer")
    done = app.until("trainer", "succeeded")
    assert done["attempt"] == 1
    assert app.whole("trainer")
    assert {name: place["pid"] for name, place in app.places().items()} == {
        name: place["pid"] for name, place in places.items()
    }
    url = app.work("web")["url"]
    assert "train.py" in httpx.get(url, headers={"Authorization": f"Bearer {app.token}"}).text


def test_a_server_that_is_killed_while_it_brings_a_log_brings_the_rest_later(app: PlacesApp) -> None:
    app.env["ORCH_CRASH_AT"] = "flow.log.appended:2"
    app.start()
    app.set("/vars/want", ["trainer"])
    app.wait_exit()
    app.killed = True
    del app.env["ORCH_CRASH_AT"]
    app.start()
    app.until("trainer", "running")
    app.go("trainer")
    app.until("trainer", "succeeded")
    assert app.whole("trainer")


def _record(place: dict[str, object], kind: str) -> bool:
    return any(Path(str(place["machine"]), "orch", "run", "processes").glob(f"*.{kind}.json"))


def test_a_place_that_ends_while_nobody_serves(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer", "again"])
    app.until("trainer", "running")
    app.until("again", "running")
    app.kill()
    for place in app.places().values():
        os.kill(int(str(place["place_pid"])), signal.SIGKILL)
    app.start()
    assert app.until("trainer", "failed")["status"]["reason"] == "lost"  # type: ignore[index]
    wait_until(lambda: app.work("again")["attempt"] == 2 and app.stage("again") == "running", 30)
    app.go("again")
    app.until("again", "succeeded")


def test_a_removed_work_gives_its_place_back(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/jobs_wanted", 2)
    wait_until(lambda: "jobs.1" in app.get("/status")["works"], what="they are made by the next pass")
    app.until("jobs.0", "running")
    wait_until(lambda: "line 1" in app.log("jobs.1"), 20, what="jobs.1 runs")
    app.set("/vars/jobs_wanted", 1)
    wait_until(lambda: list(app.places()) == ["jobs.0"], 20, what=lambda: str(app.places()))
    assert len(app.get("/status")["agents"]) == 2, "the pages' and that of jobs.0"
    (log,) = (app.folder / ".orch" / "logs" / "jobs.1").glob("*.log")
    assert log.read_text().endswith("farewell\n")
    app.set("/vars/jobs_wanted", 2)
    wait_until(lambda: "jobs.2" in app.get("/status")["works"], what="it is made by the next pass")
    app.until("jobs.2", "running")


def test_the_end_of_the_app_leaves_nothing(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer", "again"])
    app.until("trainer", "running")
    app.set("/vars/jobs_wanted", 3)  # (perhaps they are being placed)
    assert app.interrupt() in (0, 130)
    assert not app.places()
    wait_until(lambda: not app.processes(), 5, what="all is gone")


def test_a_new_run_ends_what_a_killed_one_has_left(app: PlacesApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer"])
    app.until("trainer", "running")
    left = app.places()["trainer"]
    app.kill()
    app.start("--fresh")
    wait_until(lambda: not psutil.pid_exists(int(str(left["place_pid"]))), 20, what="the old place is given back")
    assert app.stage("trainer") == "not_started"


def test_an_app_whose_disk_is_lost_goes_on_from_the_copy_of_its_journal(tmp_path: Path, app: PlacesApp) -> None:
    app.env["ORCH_BACKUP"] = f"file://{tmp_path}/copy"
    drive, port = f"file://{tmp_path}/drive", free_port()
    app.start("--drive", drive, port=port)
    app.set("/vars/want", ["again"])
    app.go("again")
    app.until("again", "succeeded")
    app.set("/vars/want", ["again", "trainer"])
    app.until("trainer", "running")
    places = app.places()
    old = places["trainer"]
    app.kill()
    (app.folder / ".orch").rename(tmp_path / "lost")
    app.start("--drive", drive, port=port)
    assert "was brought from" in app.output()
    assert app.state("/vars/want") == ["again", "trainer"]
    assert app.stage("again") == "succeeded"
    unknown = app.until("trainer", "unknown")
    assert unknown["attempt"] == 1, "nobody knows what became of it: it is not started again"
    wait_until(
        lambda: not psutil.pid_exists(int(str(old["pid"]))), 20, what="the old agent is told that it is replaced"
    )
    app.go("trainer")
    app.post("/works/trainer/restart")
    app.until("trainer", "succeeded")
    app.interrupt()
    kill_all(app.processes())  # what only the lost disk knew


class Metadata(BaseHTTPRequestHandler):
    """Of an EC2 machine: `notice` says whether it is taken away."""

    notice = b""

    def do_PUT(self) -> None:
        self._say(b"a-token")

    def do_GET(self) -> None:
        given = self.headers.get("X-aws-ec2-metadata-token") == "a-token"
        self._say(self.notice if given and self.path == "/latest/meta-data/spot/instance-action" else b"")

    def _say(self, body: bytes) -> None:
        self.send_response(200 if body else 404)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def test_a_spot_machine_that_is_taken_away_is_followed_by_another(app: PlacesApp) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        app.env["AWS_EC2_METADATA_SERVICE_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
        text = (app.folder / "app.py").read_text()
        spot = "retries=1, retry_delay=0.1, cloud_compute=CloudCompute(interruptible=True))"
        (app.folder / "app.py").write_text(text.replace("retries=1, retry_delay=0.1)", spot))
        app.start()
        app.set("/vars/want", ["again"])
        app.until("again", "running")
        first = app.places()["again"]
        Metadata.notice = b'{"action": "terminate", "time": "2026-01-01T00:02:00Z"}'
        wait_until(lambda: "EC2 will terminate this spot machine" in app.output(), 30)
        Metadata.notice = b""
        wait_until(lambda: app.work("again")["attempt"] == 2 and app.stage("again") == "running", 30)
        assert app.places()["again"]["machine"] != first["machine"]
        app.go("again")
        app.until("again", "succeeded")
        server.shutdown()
    finally:
        server.server_close()


GANG = """
from orch import App, CloudCompute, Flow, ScriptWork


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.want = []
        self.sums = ScriptWork(
            "ranks.py", parallel=True, raise_exception=False, outputs=["sum.txt"], grace=2.0, cache_calls=False,
            cloud_compute=CloudCompute(count=2), retries=1, retry_delay=0.1)

    def run(self):
        for words in self.want:
            self.sums.run(words)


app = App(Root())
"""
RANKS = """
import os, pathlib, socket, sys, time
rank, count = int(os.environ["NODE_RANK"]), int(os.environ["NUM_NODES"])
here = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
print("rank", rank, "of", count, flush=True)
if rank:
    for _ in range(500):
        try:
            link = socket.create_connection(here)
            break
        except ConnectionRefusedError:
            time.sleep(0.02)
    link.sendall(b"41")
    link.close()
else:
    with socket.create_server(here) as server:
        link, _ = server.accept()
        number = int(link.recv(10)) + 1
    pathlib.Path("sum.txt").write_text(str(number))
    print("sum", number, flush=True)
if "fail" in sys.argv and rank == 1 and os.environ["ORCH_CALL"].endswith("-1"):
    raise SystemExit(5)
if sys.argv[1:] and sys.argv[1] != "quick":
    while not pathlib.Path(os.environ["TEST_GO"], sys.argv[1]).exists():
        time.sleep(0.01)
"""


@pytest.fixture
def gang(tmp_path: Path) -> Iterator[PlacesApp]:
    folder = tmp_path / "app"
    folder.mkdir()
    (tmp_path / "go").mkdir()
    (folder / "app.py").write_text(GANG)
    (folder / "ranks.py").write_text(RANKS)
    app = PlacesApp(folder, env={"TEST_GO": str(tmp_path / "go")})
    yield app
    assert app.close() == ""


def test_a_work_on_two_machines_starts_on_both_and_ends_when_both_have(gang: PlacesApp) -> None:
    gang.start()
    gang.set("/vars/want", ["quick"])
    gang.until("sums", "succeeded")
    assert "rank 0 of 2" in gang.log("sums") and "sum 42" in gang.log("sums")
    assert "rank 1 of 2" in gang.log("sums~1")
    assert set(gang.places()) == {"sums", "sums~1"}
    assert gang.work("sums")["status"]["files"][0]["path"] == "sum.txt"


def test_a_machine_that_fails_stops_the_others_and_the_retry_starts_all(gang: PlacesApp) -> None:
    gang.start()
    gang.set("/vars/want", ["go fail"])
    wait_until(lambda: gang.work("sums")["attempt"] == 2 and gang.stage("sums") == "running", 30)
    gang.go("go")
    done = gang.until("sums", "succeeded")
    assert done["attempt"] == 2
    assert gang.log("sums").count("sum 42") == 2


def test_a_machine_that_is_lost_ends_the_attempt(gang: PlacesApp) -> None:
    gang.start()
    gang.set("/vars/want", ["go"])
    wait_until(lambda: "sum 42" in gang.log("sums"), 30)
    os.kill(int(str(gang.places()["sums~1"]["place_pid"])), signal.SIGKILL)
    wait_until(lambda: gang.work("sums")["attempt"] == 2 and gang.stage("sums") == "running", 30)
    gang.go("go")
    gang.until("sums", "succeeded")


def test_the_end_of_one_machine_is_not_forgotten_with_the_server(gang: PlacesApp) -> None:
    gang.start()
    gang.set("/vars/want", ["go"])
    wait_until(lambda: "sum 42" in gang.log("sums"), 30)
    gang.kill()
    gang.go("go")
    wait_until(lambda: all(_record(place, "exit") for place in gang.places().values()), what="both have ended")
    gang.start()
    done = gang.until("sums", "succeeded")
    assert done["attempt"] == 1


def test_a_stop_stops_all_machines(gang: PlacesApp) -> None:
    gang.start()
    gang.set("/vars/want", ["go"])
    wait_until(lambda: "sum 42" in gang.log("sums"), 30)
    gang.post("/works/sums/stop")
    gang.until("sums", "stopped")
    gang.until("sums~1", "stopped")
