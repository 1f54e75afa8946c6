"""`orch run --ray`: a whole app on a real cluster of this machine, and what becomes of it when something dies."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from place_peer import parent
from raycluster import Node, RayCluster
from testkit import RunningApp, wait_until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's end is told to others by Linux only")

APP = """
from orch import App, BuildConfig, CloudCompute, Flow, ScriptWork, ServiceWork, Work

HERE, FAR = CloudCompute(cpus=0.1), CloudCompute("far", cpus=0)


class Counter(Work):
    def __init__(self, **options):
        super().__init__(**options)
        self.n = 0

    def run(self, times):
        for _ in range(times):
            self.n += 1
        return {"counted": self.n}


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.want = []
        self.trainer = ScriptWork(
            "train.py", outputs=["model.txt"], parallel=True, raise_exception=False, retries=1, retry_delay=0.1,
            grace=1.0, cloud_compute=HERE)
        self.reader = ScriptWork("read.py", inputs=["trainer:model.txt"], parallel=True, cloud_compute=HERE)
        self.counter = Counter(parallel=True, cloud_compute=HERE)
        self.web = ServiceWork("python -m http.server {port} --bind {host}", grace=1.0, cloud_compute=HERE)
        self.moon = ScriptWork("train.py", parallel=True, raise_exception=False, cloud_compute=CloudCompute("gpu"))
        self.image = ScriptWork(
            "train.py", parallel=True, raise_exception=False, cloud_compute=HERE,
            cloud_build_config=BuildConfig(image="nvidia/cuda:12"))
        self.far = ScriptWork(
            "train.py", parallel=True, raise_exception=False, on_lost="restart", lost_after=6.0, grace=1.0,
            cloud_compute=FAR)

    def run(self):
        for name in self.want:
            getattr(self, name).run(*([3] if name == "counter" else []))


app = App(Root())
"""
TRAIN = """
import os, pathlib, time
go = pathlib.Path(os.environ["TEST_GO"], os.environ["ORCH_WORK"])
pid = go.with_suffix("." + os.environ["ORCH_ATTEMPT"])
pid.with_suffix(".draft").write_text(str(os.getpid()))
pid.with_suffix(".draft").rename(pid)
n = 0
while not go.exists():
    n += 1
    print("line", n, flush=True)
    time.sleep(0.02)
pathlib.Path("model.txt").write_text("trained")
print("lines", n, flush=True)
"""


class RayApp(RunningApp):
    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        super().__init__(folder)
        self.cluster = cluster
        self.where = ("--ray", cluster.address, "--env", f"TEST_GO={folder.parent / 'go'}")

    def go(self, name: str) -> None:
        (self.folder.parent / "go" / name).touch()

    def until(self, name: str, stage: str, timeout: float = 60) -> dict[str, object]:
        def status() -> dict[str, object]:
            found: dict[str, object] = self.work(name)["status"]
            return found

        wait_until(lambda: status()["stage"] == stage, timeout, what=lambda: f"{name} {stage}, is {self.work(name)}")
        return status()

    def pid(self, name: str, attempt: int = 1, timeout: float = 60) -> int:
        """Of the script, once it has begun."""
        path = self.folder.parent / "go" / f"{name}.{attempt}"
        wait_until(path.exists, timeout, what=lambda: f"attempt {attempt} of {name} begins: {self.work(name)}")
        return int(path.read_text())

    def handle(self, name: str) -> dict[str, object]:
        found: dict[str, object] = json.loads((self.folder / ".orch" / "run" / f"ray-{name}.json").read_bytes())
        return found


@pytest.fixture
def app(tmp_path: Path, ray_cluster: RayCluster) -> Iterator[RayApp]:
    folder = tmp_path / "app"
    folder.mkdir()
    (tmp_path / "go").mkdir()
    for name, text in {"app.py": APP, "train.py": TRAIN, "read.py": "print(open('model.txt').read())"}.items():
        (folder / name).write_text(text)
    app = RayApp(folder, ray_cluster)
    yield app
    assert app.close() == ""
    wait_until(lambda: not ray_cluster.places(), 20, what=lambda: f"places are left: {ray_cluster.places()}")


@pytest.fixture
def machine(ray_cluster: RayCluster) -> Iterator[Callable[..., Node]]:
    nodes: list[Node] = []

    def add(**options: object) -> Node:
        nodes.append(ray_cluster.add(**options))  # type: ignore[arg-type]
        return nodes[-1]

    yield add
    for node in nodes:
        node.power_off()


@pytest.mark.slow
def test_an_app_runs_as_on_one_machine(app: RayApp) -> None:
    app.start()
    app.go("trainer")
    app.set("/vars/want", ["trainer", "web", "moon", "image"])
    app.until("trainer", "succeeded")
    app.set("/vars/want", ["trainer", "web", "reader", "counter"])
    app.until("reader", "succeeded")
    assert "trained" in app.log("reader").splitlines()
    assert not (app.folder / "model.txt").exists(), "it was made elsewhere"
    app.until("counter", "succeeded")
    assert app.state("/works/counter/vars/n") == 3
    wait_until(lambda: app.work("web")["status"]["is_ready"], 60, what="the server is ready")
    assert "train.py" in app.request("GET", "/view/web/").text
    status = app.until("moon", "failed")
    assert status["reason"] == "infeasible" and "1 GPU" in str(status["message"])
    status = app.until("image", "failed")
    assert status["reason"] == "build_failed" and "nvidia/cuda:12" in str(status["message"])
    assert app.interrupt(60) == 130


@pytest.mark.slow
def test_the_flow_server_is_killed_and_an_agent_then(app: RayApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer"])
    script = app.pid("trainer")
    app.kill()
    app.start()
    assert app.until("trainer", "running") and psutil.pid_exists(script)
    os.kill(int(str(app.handle("trainer")["pid"])), signal.SIGKILL)
    before = app.handle("trainer")["epoch"]
    wait_until(lambda: app.handle("trainer")["epoch"] != before, 60, what="another agent is in its place")
    app.go("trainer")
    app.until("trainer", "succeeded")
    assert app.pid("trainer") == script and not (app.folder.parent / "go" / "trainer.2").exists()
    numbers = [int(line.split()[1]) for line in app.log("trainer").splitlines() if line.startswith("line ")]
    assert numbers == list(range(1, len(numbers) + 1))


@pytest.mark.slow
def test_an_actor_is_killed(app: RayApp) -> None:
    app.start()
    app.set("/vars/want", ["trainer"])
    script = app.pid("trainer")
    first = app.handle("trainer")
    os.kill(parent(int(str(first["pid"]))), signal.SIGKILL)
    again = app.pid("trainer", 2)
    assert again != script and not psutil.pid_exists(script)
    assert app.handle("trainer")["actor_id"] != first["actor_id"]
    app.go("trainer")
    app.until("trainer", "succeeded")


@pytest.mark.slow
def test_a_machine_is_lost_and_replaced(app: RayApp, machine: Callable[..., Node]) -> None:
    lost = machine(resources={"orch_far": 1})
    app.start()
    app.set("/vars/want", ["far"])
    script = app.pid("far")
    first = app.handle("far")
    lost.power_off()
    assert not psutil.pid_exists(script)
    app.until("far", "pending")
    wait_until(lambda: "waits for a machine" in str(app.work("far")["status"]["message"]), 60, what="it waits")
    assert not (app.folder.parent / "go" / "far.2").exists(), "no other machine is like it"
    machine(resources={"orch_far": 1})
    again = app.pid("far", 2)
    assert again != script and app.handle("far")["node"] != first["node"]
    app.go("far")
    app.until("far", "succeeded")


def test_a_cluster_that_is_not_there_is_told_at_once(app: RayApp) -> None:
    process = app.spawn("--ray", "127.0.0.1:1")
    assert process.wait(60) == 1
    assert "no Ray cluster at 127.0.0.1:1" in app.output()


PAIR = """
from orch import App, CloudCompute, Flow, ScriptWork


class Root(Flow):
    def __init__(self):
        super().__init__()
        pair = CloudCompute("pair", cpus=0, count=2)
        self.plain = ScriptWork("sums.py", parallel=True, raise_exception=False, cloud_compute=pair)
        self.torchrun = ScriptWork(
            "torchrun --nnodes $NUM_NODES --node-rank $NODE_RANK --master-addr $MASTER_ADDR --master-port $MASTER_PORT"
            " sums.py", shell=True, parallel=True, raise_exception=False,
            cloud_compute=CloudCompute("pair", cpus=0, count=2, idle_timeout=0))

    def run(self):
        if self.torchrun.run().done:
            self.plain.run()


app = App(Root())
"""
SUMS = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
value = torch.tensor([float(dist.get_rank() + 1)])
dist.all_reduce(value)
print("rank", dist.get_rank(), "of", dist.get_world_size(), "sum", value.item(), flush=True)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_a_script_of_torch_distributed_runs_on_two_machines(app: RayApp, machine: Callable[..., Node]) -> None:
    (app.folder / "app.py").write_text(PAIR)
    (app.folder / "sums.py").write_text(SUMS)
    for _ in range(2):
        machine(resources={"orch_pair": 1})
    app.start()
    for name in ("torchrun", "plain"):
        app.until(name, "succeeded", 120)
        assert "rank 0 of 2 sum 3.0" in app.log(name)
        assert "rank 1 of 2 sum 3.0" in app.log(f"{name}~1")
