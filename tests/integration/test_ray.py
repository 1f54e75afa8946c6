"""The Ray runtime on real clusters of this machine: places, deaths of all kinds, and what travels."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import signal
import subprocess
import sys
import sysconfig
import uuid
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_flow import alive
from place_peer import LONG, NO_FLOW, Peer, parent, until
from raycluster import Node, RayCluster

from orch.errors import RuntimeLost
from orch.runtimes.base import AgentDied, BuildFailed, Handle, Infeasible
from orch.runtimes.pack import pack
from orch.runtimes.ray import RayRuntime
from orch.wire import AgentSpec

CHILDREN = Path(__file__).resolve().parent.parent / "children"
TOKEN = "the-token-of-these-agents"


class App:
    """The folder of an app, and the runtimes of its flow servers."""

    def __init__(self, folder: Path, cluster: RayCluster) -> None:
        self.cluster = cluster
        self.id = uuid.uuid4().hex[:12]
        self.folder = folder / "app"
        self.run = self.folder / ".orch" / "run"
        self.logs = self.folder / ".orch" / "logs"
        for path in (self.run, self.logs):
            path.mkdir(parents=True)
        self.runtimes: list[RayRuntime] = []

    def runtime(self, **options: Any) -> RayRuntime:
        given = {"app_id": self.id, "ship": False, **options}
        self.runtimes.append(RayRuntime(self.cluster.address, self.run, self.logs, self.folder, **given))
        return self.runtimes[-1]

    def spec(self, agent: str = "trainer", epoch: int = 1, **fields: Any) -> AgentSpec:
        given: dict[str, Any] = {
            "agent": agent,
            "work": agent,
            "epoch": epoch,
            "token": TOKEN,
            "flow_url": NO_FLOW,
            "app_dir": str(self.folder),
            "orch_dir": str(self.folder / ".orch"),
            "app_id": self.id,
            "app_name": "test",
            "app_file": str(self.folder / "app.py"),
            "run": 1,
            "compute": {"name": "cpu", "cpus": 0},
        }
        return AgentSpec(**{**given, **fields})

    def log(self) -> str:
        return (self.logs / "ray.log").read_text()


@pytest.fixture
async def app(tmp_path: Path, ray_cluster: RayCluster) -> AsyncIterator[App]:
    app = App(tmp_path, ray_cluster)
    app.runtime()
    yield app
    await app.runtimes[0].sweep()
    for runtime in app.runtimes:
        runtime.close()
    await asyncio.get_running_loop().shutdown_default_executor()  # its threads are the loop's, not a leak


@pytest.fixture
def machine(ray_cluster: RayCluster) -> Iterator[Callable[..., Node]]:
    """More machines of the cluster, until the end of the test."""
    nodes: list[Node] = []

    def add(**options: Any) -> Node:
        nodes.append(ray_cluster.add(**options))
        return nodes[-1]

    yield add
    for node in nodes:
        node.power_off()


async def all_gone(*pids: int) -> None:
    async def gone() -> bool:
        return not any(map(alive, pids))

    await until(gone)


def actor_of(handle: Handle) -> int:
    """The actor's process."""
    return parent(handle["pid"])


async def child(peer: Peer, name: str, **fields: Any) -> tuple[int, int]:
    """One of tests/children is up; its pid and its waiter's."""
    script = await peer.script("python", str(CHILDREN / name), **fields)
    ready = Path(f"/proc/{script}/cwd", "ready")

    async def up() -> bool:
        return ready.exists()

    await until(up)
    ready.unlink()
    return script, parent(script)


# ---- where and with what -------------------------------------------------------------------------------------------


@pytest.mark.slow
async def test_a_work_is_placed_where_its_compute_says(app: App, machine: Callable[..., Node]) -> None:
    machine(resources={"orch_here": 1})
    runtime = app.runtime(machine_of=lambda compute: f"orch_{compute['name']}")
    handle = await runtime.launch(app.spec(compute={"name": "here"}))
    elsewhere = await app.runtimes[0].launch(app.spec("other", compute={"name": "cpu"}))
    assert handle["node"] != elsewhere["node"]
    assert handle["url"] == f"http://{handle['node_ip']}:{handle['port']}"


async def test_what_a_script_finds(app: App) -> None:
    files = {
        "app.py": "x = 1\n",
        "queue.py": "raise SystemExit('this is not the queue of the standard library')\n",
        "sub/tool.sh": "#!/bin/sh\necho tool\n",
        "data/large.bin": "0" * 1000,
        "data/small.bin": "0",
        ".orchignore": "data/*\n!data/small.bin\n",
        ".git/config": "no",
        "env/pyvenv.cfg": "home = /nowhere",
        "env/lib/x.py": "",
    }
    for name, text in files.items():
        path = app.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (app.folder / "sub/tool.sh").chmod(0o755)
    code = """
import json, os, pathlib, sys
print(json.dumps({"env": dict(os.environ), "path": sys.path, "cwd": os.getcwd(),
    "files": sorted(str(path) for path in pathlib.Path().rglob("*") if path.is_file())}))
"""
    handle = await app.runtimes[0].launch(app.spec())
    async with Peer(handle) as peer:
        ended = await peer.result("sh", "-c", f"sub/tool.sh && exec {sys.executable} -c '{code}'")
        assert ended["exit_code"] == 0, ended
    (log,) = app.cluster.node_dir.glob(f"{app.id}/trainer/*/logs/trainer/*.log")
    lines = log.read_text().splitlines()
    assert lines[1] == "tool"
    found = json.loads(lines[2])
    assert found["files"] == [".orchignore", "app.py", "data/small.bin", "queue.py", "sub/tool.sh"]
    assert str(app.folder) not in found["cwd"], "it has its own copy"
    assert found["cwd"] not in found["path"][1:] and os.path.dirname(found["cwd"]) not in found["path"]
    assert not {"OMP_NUM_THREADS", "RAY_JOB_ID", "RAY_RAYLET_PID"} & set(found["env"]) - set(app.cluster.env)


async def test_what_no_machine_has_is_named(app: App, machine: Callable[..., Node]) -> None:
    runtime = app.runtimes[0]
    cases: list[tuple[dict[str, Any], list[str]]] = [
        ({"name": "gpu"}, ["1 GPU", "none", "2 CPU"]),
        ({"name": "cpu", "cpus": 64}, ["64 CPU", "at most 2 CPU"]),
        ({"name": "cpu", "memory": 4096}, ["4.1e+03 GiB memory", "at most"]),
        ({"name": "A100"}, ["accelerator_type:A100", "none"]),
    ]
    for compute, words in cases:
        with pytest.raises(Infeasible) as caught:
            await runtime.launch(app.spec(compute=compute))
        assert all(word in caught.value.message for word in ["trainer", *words]), caught.value.message
    ours = app.runtime(machine_of=lambda compute: "orch_special", machines=[{"CPU": 4.0, "orch_other": 1.0}])
    with pytest.raises(Infeasible, match=r"1 orch_special, and the cluster offers none.*1 orch_other"):
        await ours.launch(app.spec())
    assert await runtime.sweep() == [], "nothing was asked of Ray"


@pytest.mark.slow
async def test_what_is_in_use_is_waited_for(app: App, machine: Callable[..., Node]) -> None:
    machine(resources={"orch_one": 1})
    runtime = app.runtimes[0]
    one = {"name": "one", "cpus": 0}
    first = await runtime.launch(app.spec("first", compute=one))
    second = asyncio.create_task(runtime.launch(app.spec("second", compute=one)))
    third = asyncio.create_task(runtime.launch(app.spec("third", compute=one)))

    async def both_wait() -> bool:
        return {"second", "third"} <= runtime.waiting.keys()

    await until(both_wait)
    assert not second.done() and not third.done()
    third.cancel()
    await asyncio.gather(third, return_exceptions=True)
    await runtime.kill(first)
    placed = await asyncio.wait_for(second, LONG)
    assert placed["node"] == first["node"] and await runtime.poll(placed) is None
    assert not runtime.waiting
    assert await runtime.sweep() == [f"orch-{app.id}-second is ended"], "who has stopped waiting is not placed later"


@pytest.mark.slow
async def test_a_place_is_given_back_when_its_agent_has_left(app: App, machine: Callable[..., Node]) -> None:
    machine(resources={"orch_one": 1})
    runtime = app.runtimes[0]
    first = await runtime.launch(app.spec("first", compute={"name": "one", "cpus": 0}))
    actor = actor_of(first)
    async with Peer(first) as peer:
        await child(peer, "hears_term.py")
        await peer.ask("/v1/shutdown", {"kill": False})
    assert await runtime.ended(first, LONG) and "code 0" in str(await runtime.poll(first))
    await runtime.launch(app.spec("second", compute={"name": "one", "cpus": 0}))
    assert not alive(actor)


# ---- deaths --------------------------------------------------------------------------------------------------------


async def test_the_end_of_an_actor_is_that_of_agent_and_script(app: App) -> None:
    runtime = app.runtimes[0]
    handle = await runtime.launch(app.spec())
    async with Peer(handle) as peer:
        script, waiter = await child(peer, "hears_term.py")
    os.kill(actor_of(handle), signal.SIGKILL)
    assert await runtime.ended(handle, LONG)
    assert "actor has died" in str(await runtime.poll(handle))
    await all_gone(handle["pid"], script, waiter)
    (record,) = app.cluster.node_dir.glob(f"{app.id}/trainer/*/run/processes/*.exit.json")
    assert json.loads(record.read_bytes())["exit_code"] == 7, "it was asked before it was killed"
    # The next one cannot adopt what was there, on the same machine neither, and says so.
    other = await runtime.launch(app.spec(epoch=2))
    assert other["since"] == 2


async def test_the_end_of_a_place_is_told_when_its_scripts_are_gone(app: App) -> None:
    runtime = app.runtimes[0]
    handle = await runtime.launch(app.spec())
    async with Peer(handle) as peer:
        script, waiter = await child(peer, "ignores_term.py", grace=2.0)
    os.kill(actor_of(handle), signal.SIGKILL)
    assert await runtime.ended(handle, LONG) and alive(script)
    assert not await runtime.adoptable(handle)
    assert not alive(script) and not alive(waiter), "another one could be started beside it"


async def test_a_new_place_waits_for_what_the_old_one_has_left(app: App) -> None:
    runtime = app.runtimes[0]
    handle = await runtime.launch(app.spec())
    async with Peer(handle) as peer:
        script, waiter = await child(peer, "ignores_term.py", grace=3.0)
    os.kill(actor_of(handle), signal.SIGKILL)
    await runtime.launch(app.spec(epoch=2))
    assert not alive(script) and not alive(waiter), "there were two of it"


async def test_scripts_outlive_the_agent_and_not_the_actor_after_it(app: App) -> None:
    runtime = app.runtimes[0]
    handle = await runtime.launch(app.spec())
    async with Peer(handle) as peer:
        script, waiter = await child(peer, "hears_term.py")
    actor = actor_of(handle)
    os.kill(handle["pid"], signal.SIGKILL)
    assert await runtime.ended(handle, LONG) and "SIGKILL" in str(await runtime.poll(handle))
    assert alive(script) and alive(actor)
    os.kill(actor, signal.SIGKILL)
    await all_gone(script, waiter)


@pytest.mark.slow
async def test_a_machine_that_ray_gives_up_is_not_dead_for_that(app: App, machine: Callable[..., Node]) -> None:
    node = machine(resources={"orch_far": 2})
    runtime = app.runtimes[0]
    handle = await runtime.launch(app.spec(compute={"name": "far", "cpus": 0}))
    second = await runtime.launch(app.spec("second", compute={"name": "far", "cpus": 0}))
    os.kill(second["pid"], signal.SIGKILL)
    assert await runtime.ended(second, LONG) and await runtime.adoptable(second)
    machines = app.cluster.alive()
    (raylet,) = node.processes("raylet")
    raylet.suspend()

    async def given_up() -> bool:
        return await asyncio.to_thread(app.cluster.alive) == machines - 1

    await until(given_up)
    assert alive(handle["pid"])
    assert not await runtime.ended(handle, 3.0), "nobody can know that"
    assert await runtime.poll(handle) is None and await runtime.adopt(handle)
    assert await runtime.adoptable(second), "its scripts may go on there"
    other = app.runtime()
    assert await other.adopt(handle) and await other.poll(handle) is None
    async with Peer(handle) as peer:
        assert (await peer.ask("/v1/status"))["epoch"] == 1
    with pytest.raises(Infeasible, match="orch_far"):
        await app.runtime(machine_of=lambda _: "orch_far").launch(app.spec(epoch=2))
    node.power_off()
    await all_gone(handle["pid"])
    assert await runtime.poll(handle) is None


@pytest.mark.slow
async def test_a_machine_is_lost_while_an_agent_is_placed_there(app: App, machine: Callable[..., Node]) -> None:
    node = machine(resources={"orch_doomed": 1})
    runtime = app.runtimes[0]
    placing = asyncio.create_task(runtime.launch(app.spec(compute={"name": "doomed", "cpus": 0})))
    folder = app.cluster.node_dir / app.id

    async def begun() -> bool:
        return folder.exists() or placing.done()

    await until(begun)
    node.power_off()

    async def told() -> bool:
        return placing.done() or bool(runtime.waits("trainer"))

    await until(told)
    if not placing.done():  # Ray had not begun there, and looks for another such machine
        placing.cancel()
        await asyncio.wait([placing])
        return
    with pytest.raises((AgentDied, RuntimeLost)) as caught:
        placed = await placing
        raise RuntimeLost(f"it was faster: {placed}")
    assert "trainer" in caught.value.message


async def test_another_process_adopts(app: App) -> None:
    handle = await app.runtimes[0].launch(app.spec())
    code = """
import asyncio, json, os, signal, sys
from pathlib import Path
from orch.runtimes.ray import RayRuntime

async def main():
    address, run, logs, app, app_id = sys.argv[1:]
    runtime = RayRuntime(address, Path(run), Path(logs), Path(app), app_id=app_id, ship=False)
    handle = runtime.found("trainer")
    told = [await runtime.adopt(handle), await runtime.poll(handle)]
    os.kill(handle["pid"], signal.SIGKILL)
    told += [await runtime.ended(handle, 60), await runtime.poll(handle), await runtime.adopt(handle)]
    runtime.close()
    print(json.dumps(told))

asyncio.run(main())
"""
    arguments = [app.cluster.address, str(app.run), str(app.logs), str(app.folder), app.id]
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, *arguments, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    assert json.loads(output) == [True, None, True, "was killed by SIGKILL", False]
    assert await app.runtimes[0].ended(handle, LONG), "the first one hears of it as well"


@pytest.mark.slow
async def test_the_cluster_s_head_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = RayCluster()
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "5")  # the driver's alone: of nothing else here
    try:
        head = cluster.start()
        app = App(tmp_path, cluster)
        runtime = app.runtime()
        handle = await runtime.launch(app.spec())
        (gcs,) = head.processes("gcs_server")
        head.process.send_signal(signal.SIGSTOP)  # else it ends the rest of the machine when it misses one
        gcs.kill()
        before = asyncio.get_running_loop().time()
        assert await runtime.poll(handle) is None
        assert asyncio.get_running_loop().time() - before < 0.5
        assert not await runtime.reachable()
        async with Peer(handle) as peer:
            script, waiter = await child(peer, "hears_term.py")

        async def driver_gone() -> bool:
            return "The program will terminate" in app.log()

        await until(driver_gone)
        assert await runtime.poll(handle) is None and await runtime.adopt(handle) and alive(handle["pid"])
        waiting = asyncio.create_task(runtime.launch(app.spec("other")))

        async def waits() -> bool:
            return "other" in runtime.waiting

        await until(waits)
        head.power_off()
        await all_gone(handle["pid"], script, waiter)
        assert await runtime.poll(handle) is None, "of another cluster nobody can know"
        cluster.start()
        placed = await asyncio.wait_for(waiting, LONG)
        assert await runtime.reachable() and await runtime.poll(placed) is None
        for each in app.runtimes:
            await each.sweep()
            each.close()
    finally:
        cluster.close()
        await asyncio.get_running_loop().shutdown_default_executor()


async def test_no_cluster_there(app: App) -> None:
    app.cluster = RayCluster()  # never started
    runtime = app.runtime()
    with pytest.raises(RuntimeLost, match=f"no Ray cluster at {app.cluster.address}"):
        await runtime.launch(app.spec())
    assert not await runtime.reachable()
    app.cluster.close()


# ---- what travels --------------------------------------------------------------------------------------------------


async def test_the_token_stands_in_none_of_rays_files(app: App) -> None:
    handle = await app.runtimes[0].launch(app.spec())
    async with Peer(handle) as peer:
        await peer.attach()
    await app.runtimes[0].kill(handle)
    assert app.cluster.said(app.id), "the search finds what is there"
    assert not app.cluster.said(TOKEN)
    assert TOKEN not in app.log()
    for path in app.cluster.node_dir.rglob("*"):
        if path.is_file() and TOKEN.encode() in path.read_bytes():
            assert path.stat().st_mode & 0o077 == 0, path


async def test_a_folder_that_is_too_large(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = await app.runtimes[0].launch(app.spec())
    (app.folder / "big.bin").write_bytes(os.urandom(10_000))
    monkeypatch.setattr("orch.runtimes.ray.pack", functools.partial(pack, limit=1000))
    runtime = app.runtime()
    assert await runtime.adopt(handle), "what runs is not touched by that"
    with pytest.raises(RuntimeLost, match=r"too large.*big\.bin") as caught:
        await runtime.launch(app.spec("other"))
    assert ".orchignore" in caught.value.hint


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Python that has what this one has, but not orch; small, because Ray copies the environment that it runs in."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "more.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = folder / "bin" / "python"
    if subprocess.run([str(python), "-c", "import orch"], capture_output=True, check=False).returncode == 0:
        pytest.skip("orch is not installed with `pip install -e`: there is no Python without it")
    return python


@pytest.mark.slow
async def test_environments(tmp_path: Path, bare_python: Path) -> None:
    """orch is sent to machines that have not got it; requirements are installed, or it is said why not."""
    wheel = tmp_path / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny.py", "WORD = 'tiny it is'\n")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    cluster = RayCluster()
    try:
        cluster.start(python=str(bare_python))
        app = App(tmp_path, cluster)
        (app.folder / "requirements.txt").write_text(f"# offline\n--no-index\n{wheel}\n")
        runtime = app.runtime(ship=None)
        handle = await runtime.launch(app.spec("plain"))
        async with Peer(handle) as peer:
            ended = await peer.result("python", "-c", "import orch_workers; import tiny")
            assert ended["exit_code"] == 1, "orch is there, tiny is not"
        handle = await runtime.launch(app.spec("built", build={"requirements": "requirements.txt"}))
        async with Peer(handle) as peer:
            ended = await peer.result("python", "-c", "import orch_workers, tiny, sys; sys.exit(tiny.WORD)")
        (log,) = cluster.node_dir.glob(f"{app.id}/built/*/logs/built/*.log")
        assert "tiny it is" in log.read_text()
        missing = {"requirements": ["--no-index", "no-such-package-anywhere"]}
        with pytest.raises(BuildFailed, match="no-such-package-anywhere") as caught:
            await runtime.launch(app.spec("unbuilt", build=missing))
        assert "environment of unbuilt" in caught.value.message
        await runtime.sweep()
        runtime.close()
    finally:
        cluster.close()
        await asyncio.get_running_loop().shutdown_default_executor()


async def test_environments_that_cannot_be_had(app: App) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": "nvidia/cuda:12"}, "nvidia/cuda:12"),
        ({"python": "3.7"}, r"3\.7"),
        ({"requirements": "none.txt"}, "none.txt"),
        ({"commands": ["apt-get install x"]}, "build_commands"),
    ]
    for build, words in cases:
        with pytest.raises(BuildFailed, match=words):
            await app.runtimes[0].launch(app.spec(build=build))
