"""`orch run --cloud aws` from a laptop to an EC2, both of the test's own (`ec2_world`): the studio, unchanged, on
machines that are made, cut off, lost, replaced, given back and ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ec2_world
import pytest
from ec2_world import Machine, World
from testkit import wait_until

REPO = Path(__file__).resolve().parents[2]
TRAIN_ARGS = (
    "--trainer.max_epochs=1 --trainer.limit_train_batches=8 --trainer.limit_val_batches=2 "
    "--trainer.callbacks=ModelCheckpoint --trainer.callbacks.monitor=val_acc"
)
SECRET = "the-laptops-own-secret-access-key"
KEY = "AKIALAPTOPLAPTOPLAPT"

pytestmark = [
    pytest.mark.skipif(bool(ec2_world.missing()), reason=ec2_world.missing() or "-"),
    pytest.mark.slow,
    pytest.mark.timeout(480),
    pytest.mark.xdist_group("aws"),
]

APP = """
    from app import Studio
    from orch import App, CloudCompute, ServiceWork

    class Watched(Studio):
        def __init__(self):
            super().__init__()
            self.watch = ServiceWork(
                "watch.py", on_lost="restart", lost_after=25.0, grace=2.0,
                cloud_compute=CloudCompute("cpu", interruptible=True, idle_timeout=5),
            )

        def run(self):
            self.watch.run()
            super().run()

    app = App(Watched(), name="The Studio")
"""

WATCH = """
    import http.server, os, socket

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(f"{socket.gethostname()} {os.environ['ORCH_ATTEMPT']}".encode())

    http.server.ThreadingHTTPServer((os.environ["HOST"], int(os.environ["PORT"])), Answer).serve_forever()
"""


class Laptop:
    """A user's machine: what is typed there."""

    def __init__(self, world: World, app: Path) -> None:
        self.world = world
        self.app = app
        self.url = ""
        home = world.folder / "laptop"
        home.mkdir()
        self.env = {
            "HOME": str(home),
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
            "LANG": "C.UTF-8",
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": ec2_world.REGION,
            "AWS_DEFAULT_REGION": ec2_world.REGION,
            "AWS_ENDPOINT_URL": world.endpoint,
            "ORCH_AWS_SSH_FROM": f"{ec2_world.LAPTOP}/32",
            **{name: value for name, value in os.environ.items() if name.startswith("ORCH_TEST")},
        }

    def begin(self, *words: str, **how: Any) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.world.laptop.command(*words),
            cwd=self.app,
            env=self.env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **how,
        )

    def types(self, *words: str, timeout: float = 60, fails: bool = False) -> str:
        process = self.begin(*words)
        try:
            said, _ = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            said, _ = process.communicate()
            pytest.fail(f"{' '.join(words)} takes longer than {timeout} s:\n{said}\n{self.story()}")
        assert (process.returncode != 0) == fails, f"{' '.join(words)}: {process.returncode}\n{said}\n{self.story()}"
        return said

    def orch(self, verb: str, *words: str, **how: Any) -> str:
        return self.types("orch", *verb.split(), "--app", "the-studio", *words, **how)

    def state(self, path: str) -> Any:
        return json.loads(self.page(f"api/v1/state{path}"))

    def page(self, path: str = "") -> str:
        """A page of the app, as a browser here gets it; what `orch open` says again if that has changed."""
        for _ in range(2):
            if not self.url:
                self.url = self.orch("open", "--print").strip()
            address, _, token = self.url.partition("/?token=")
            bearer = f"Authorization: Bearer {token}"
            process = self.begin("curl", "-sS", "-m", "20", "-L", "-f", "-H", bearer, f"{address}/{path}")
            said, _ = process.communicate(timeout=60)
            if process.returncode == 0:
                return said
            self.url = ""
        pytest.fail(f"/{path}: {said}")

    def looks(self) -> str:
        process = self.begin("orch", "ps", "--app", "the-studio")
        return process.communicate(timeout=60)[0]

    def story(self) -> str:
        """For a failure: what the machines have said."""
        world = self.world
        logs = [*world.folder.glob("i-*/console"), *Path(self.env["HOME"]).rglob("launch.log")]
        parts = [f"== {log}\n{log.read_text(errors='replace')[-2500:]}" for log in logs if log.exists()]
        return "\n".join([f"trouble: {world.trouble[:3]}", *parts])


@pytest.fixture
def laptop(tmp_path: Path) -> Iterator[Laptop]:
    app = tmp_path / "studio"
    app.mkdir()
    shutil.copy(REPO / "app.py", app)
    shutil.copytree(REPO / "scripts", app / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
    (app / "cloud_app.py").write_text(textwrap.dedent(APP))
    (app / "watch.py").write_text(textwrap.dedent(WATCH))
    (app / ".orchignore").write_text("private/\n")
    (app / "private").mkdir()
    (app / "private" / "diary").write_text("nobody's business")
    sources = (REPO / name for name in ("orchestrator", "workers", "drive", "ui"))
    world = World(tmp_path / "world", (Path(sys.prefix), Path(sys.base_prefix), *sources))
    with world.running():
        yield Laptop(world, app)


def machine_of(laptop: Laptop, work: str) -> Machine:
    """The machine that the flow says the work is on."""
    host = laptop.state(f"/works/{work}/status")["host"]
    return next(machine for machine in laptop.world.machines.values() if machine.private == host)


def flow_machine(laptop: Laptop) -> Machine:
    (name,) = [one["InstanceId"] for one in alive(laptop) if {"Key": "ray-node-type", "Value": "head"} in one["Tags"]]
    return laptop.world.machines[name]


def alive(laptop: Laptop) -> list[dict[str, Any]]:
    return laptop.world.instances("pending", "running")


def scripts(machine: Machine, name: str) -> list[str]:
    if machine.process is None or machine.process.poll() is not None:
        return []
    return [line for line in machine.run("ps", "axo", "args").splitlines() if name in line and "python" in line]


def stage(laptop: Laptop, work: str) -> str:
    return str(laptop.state(f"/works/{work}/status/stage"))


def until(laptop: Laptop, condition: Callable[[], Any], timeout: float, what: str) -> Any:
    return wait_until(condition, timeout, interval=1.0, what=lambda: f"{what}\n{laptop.looks()}\n{laptop.story()}")


def test_the_studio_from_a_laptop_on_ec2(laptop: Laptop, record_property: Callable[[str, object], None]) -> None:
    world = laptop.world
    took: dict[str, float] = {}

    def lap(name: str, since: float) -> float:
        took[name] = round(time.monotonic() - since, 1)
        print(name, took[name])
        return time.monotonic()

    # Up: the Flow VM alone, and the page through the forward.
    began = time.monotonic()
    said = laptop.types("orch", "run", "cloud_app.py", "--cloud", "aws", "-y", "-d", timeout=150)
    clock = lap("up", began)
    assert "The Studio, in AWS region us-west-2" in said and "http://127.0.0.1:" in said
    flow = flow_machine(laptop)
    assert "<html" in laptop.page().lower()
    laptop.orch("state set", "/flows/ui/vars/train_args", json.dumps(TRAIN_ARGS))
    laptop.orch("state set", "/flows/ui/vars/train_start", "true")

    # The laptop goes away while its training begins, and comes back.
    until(laptop, lambda: stage(laptop, "train") == "running", 120, "the training runs on a machine of its own")
    clock = lap("a Work runs on a new VM", clock)
    world.cut(world.laptop)
    controls = Path("/tmp") / f"orch-ssh-{os.getuid()}"
    before = len(list(controls.iterdir()))
    wait_until(lambda: len(list(controls.iterdir())) < before, 40, what="the forward notices that the network is gone")
    world.cut(world.laptop, False)
    until(laptop, lambda: stage(laptop, "train") == "succeeded", 120, "the training succeeds")
    clock = lap("trained", clock)

    # Its model is on the Drive in the bucket, and served by another machine.
    assert "lightning_logs/version_0/model.pt2" in laptop.orch("drive ls")
    trainer = machine_of(laptop, "train")
    laptop.orch("state set", "/flows/ui/vars/model", '"version_0"')
    until(laptop, lambda: laptop.state("/works/eval/status")["is_ready"], 120, "the new model is served")
    assert "gradio" in laptop.page("view/eval/").lower()
    assert machine_of(laptop, "eval").private != trainer.private
    assert len({machine_of(laptop, work).private for work in ("diag", "eval", "train", "watch")}) == 4
    clock = lap("served", clock)

    # A machine is cut off: unknown; its script ends by itself before another one starts elsewhere.
    until(laptop, lambda: laptop.state("/works/watch/status")["is_ready"], 60, "the watch is up")
    lost = machine_of(laptop, "watch")
    assert scripts(lost, "watch.py")
    world.cut(lost)
    until(laptop, lambda: stage(laptop, "watch") == "unknown", 40, "its silence is noticed")
    assert scripts(lost, "watch.py"), "silence is no death"
    wait_until(lambda: not scripts(lost, "watch.py"), 40, what="the cut off script ends by itself")
    ended = time.time()
    until(
        laptop,
        lambda: (status := laptop.state("/works/watch/status"))["is_ready"] and status["host"] != lost.private,
        120,
        "another machine has taken over",
    )
    assert laptop.state("/works/watch/status")["since"] > ended - 1.0
    assert laptop.page("view/watch/").endswith(" 2")
    if lost.instance in world.machines:  # (Ray may have given it up by now)
        world.cut(lost, False)
        assert not scripts(lost, "watch.py")
    clock = lap("cut off and replaced", clock)

    # What is not used any more is given back.
    until(laptop, lambda: trainer.instance not in world.machines, 150, "the idle machine of the training is removed")
    clock = lap("idle VM removed", clock)

    # The Flow VM is lost, disk and all. A new one goes on from the copy of the journal.
    models = laptop.state("/flows/ui/vars/models")
    assert "version_0" in models
    world.aws("ec2", "terminate_instances", InstanceIds=[flow.instance])
    wait_until(lambda: flow.instance not in world.machines, 20, what="the Flow VM is gone")
    assert "no Flow VM" in laptop.orch("ps", fails=True)
    follower = laptop.begin("orch", "run", "cloud_app.py", "--cloud", "aws", "-y", start_new_session=True)
    try:
        until(
            laptop,
            lambda: any(one["InstanceId"] != flow.instance for one in alive(laptop)) and reached(laptop),
            240,
            "the app is back on a new Flow VM",
        )
        assert laptop.state("/flows/ui/vars/models") == models
        assert laptop.state("/works/train/status/stage") == "succeeded"
        assert laptop.state("/app/run") == 1
    finally:
        follower.send_signal(signal.SIGINT)
        said, _ = follower.communicate(timeout=30)
    assert follower.returncode == 130 and "it goes on on AWS" in said, said
    assert laptop.state("/app/stage") == "running"
    clock = lap("Flow VM lost and replaced", clock)

    # Nothing of the laptop's is on a machine but the app's folder, and no machine did what its role does not allow.
    flow = flow_machine(laptop)
    disk = ("find", "/home", "/tmp", "/run", "/etc", "/root", "-xdev", "-type", "f")
    assert flow.run(*disk, "-name", "watch.py") and not flow.run(*disk, "-name", "diary"), "what .orchignore names"
    assert not flow.run(*disk, "-exec", "grep", "-ls", SECRET, "{}", "+", check=False), "a credential of the laptop"
    asked = Counter((one["from"], one["key"], one["service"], one["action"]) for one in world.asked())
    assert {source for source, key, _, _ in asked if key == KEY} == {ec2_world.LAPTOP}
    for role in ("flow", "work"):
        allowed = permissions(laptop, role)
        used = {
            f"{service}:{action}"
            for _, key, service, action in asked
            if world.role_of(key) == f"orch-the-studio-{role}-us-west-2" and service != "s3"
        }
        assert used <= allowed, f"the {role} role lacks {used - allowed}"
    assert "ec2:RunInstances" in permissions(laptop, "flow") and not permissions(laptop, "work") & {"ec2:RunInstances"}

    # Down.
    said = laptop.types("orch", "down", "the-studio", "--timeout", "20", timeout=120)
    assert "no VM is left" in said and "s3://orch-123456789012-us-west-2/the-studio" in said
    assert not world.instances("pending", "running", "stopping", "stopped")
    said = laptop.types("orch", "down", "the-studio", "--purge")
    assert "removed: role orch-the-studio-flow-us-west-2" in said
    assert not [role for role in world.aws("iam", "list_roles")["Roles"] if "the-studio" in role["RoleName"]]
    lap("down", clock)
    assert not world.trouble
    record_property("measured", {**took, "all": round(time.monotonic() - began, 1)})


def reached(laptop: Laptop) -> bool:
    process = laptop.begin("orch", "state", "get", "--app", "the-studio", "/app/stage")
    said, _ = process.communicate(timeout=60)
    return process.returncode == 0 and "running" in said


def permissions(laptop: Laptop, role: str) -> set[str]:
    found = laptop.world.aws("iam", "get_role_policy", RoleName=f"orch-the-studio-{role}-us-west-2", PolicyName="orch")[
        "PolicyDocument"
    ]
    return {
        action
        for statement in found["Statement"]
        for action in ([statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"])
    }
