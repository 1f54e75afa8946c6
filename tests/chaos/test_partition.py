"""A flow and its agents on hosts of their own, and what happens when the network between them breaks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import netns
import pytest
from netns import Host, Network
from testkit import RunningApp, free_port, wait_until

from orch.journal import Journal

SERVE = Path(netns.__file__).with_name("netns_serve.py")
pytestmark = [
    pytest.mark.skipif(bool(netns.missing()), reason=netns.missing() or "-"),
    pytest.mark.slow,
    pytest.mark.timeout(240),
]

APP = """
    from orch import App, Flow, ScriptWork

    class Root(Flow):
        def __init__(self):
            super().__init__()
            self.stages = []
            self.w = ScriptWork("python ticker.py", parallel=True, raise_exception=False, vars={{"n": 0}}, {options})

        def run(self):
            call = self.w.run()
            seen = [str(call.stage), call.attempt]
            if not self.stages or self.stages[-1] != seen:
                self.stages.append(seen)

    app = App(Root())
"""

TICKER = """
    import json, os, time, urllib.request

    who = f"{os.environ['ORCH_HOST']}#{os.environ['ORCH_ATTEMPT']}"

    def write(n):
        request = urllib.request.Request(
            os.environ["ORCH_STATE_URL"] + "/n", str(n).encode(), method="PUT",
            headers={"Authorization": "Bearer " + os.environ["ORCH_TOKEN"]},
        )
        urllib.request.urlopen(request, timeout=600).close()  # the agent may be paused for long

    with open("ticks", "a", buffering=1) as ticks:
        for n in range(1, 1_000_000):
            ticks.write(f"{time.monotonic():.3f} {who} {n}\\n")
            print(n, flush=True)
            if n % 20 == 0:
                write(n)
            if os.path.exists("finish"):
                write(n)
                break
            time.sleep(0.05)
"""


class Remote(RunningApp):
    """An app whose flow lives on one host, its agents on the others."""

    def __init__(self, folder: Path, flow: Host, workers: list[Host]) -> None:
        super().__init__(folder)
        self.flow = flow
        self.places = ",".join(f"{worker.name}={worker.address}" for worker in workers)

    def command(self) -> list[str]:
        return [sys.executable, "-P", str(SERVE), self.places, "run", self.app]

    def ticks(self) -> list[tuple[float, str, int]]:
        path = self.folder / "ticks"
        lines = path.read_text().splitlines() if path.exists() else []
        return [(float(at), who, int(n)) for at, who, n in (line.split() for line in lines)]

    def stage(self) -> tuple[str, int]:
        status = self.flow.call(self.work, "w")
        return status["status"]["stage"], status["attempt"]

    def until(self, what: Callable[[], Any], timeout: float = 60) -> Any:
        return wait_until(what, timeout, interval=0.1, what=lambda: f"{self.stage()} {self.output()[-3000:]}")

    def agent_log(self, worker: Host) -> str:
        return (self.folder / f".disk-{worker.address}" / "logs" / "agent-local.log").read_text()

    def log_numbers(self, worker: Host) -> list[int]:
        [log] = (self.folder / f".disk-{worker.address}" / "logs" / "w").glob("*.log")
        return [int(line) for line in log.read_text().splitlines() if not line.startswith("---")]

    def finish(self) -> int:
        """The script ends by itself; the number that it wrote last."""
        (self.folder / "finish").touch()
        self.until(lambda: self.stage()[0] == "succeeded")
        return self.ticks()[-1][2]


@contextlib.contextmanager
def remote(app_folder: Callable[..., Path], options: str, seed: int = 0) -> Iterator[tuple[Network, Remote]]:
    folder = app_folder(APP.format(options=options), {"ticker.py": TICKER})
    with Network("flow", "one", "two", seed=seed).running() as network:
        flow, *workers = network.hosts
        app = Remote(folder, flow, workers)
        try:
            flow.call(app.start, "--host", flow.address, port=free_port())
            app.until(lambda: len(app.ticks()) > 20)
            yield network, app
        finally:
            heal(network)
            left = flow.call(app.close)
        assert not left, left


def heal(network: Network) -> None:
    for link in network.links.values():
        link.cut, link.loss, link.delay = False, 0.0, 0.0


@pytest.mark.parametrize("which", ["both ways", "from the flow", "to the flow"])
def test_a_cut_link_leads_to_one_new_copy_and_never_two(app_folder: Callable[..., Path], which: str) -> None:
    with remote(app_folder, "on_lost='restart', lost_after=15.0, grace=0.5") as (network, app):
        flow, one, two = network.hosts
        to, back = network.between(flow, one)
        to.cut, back.cut = which != "to the flow", which != "from the flow"
        app.until(lambda: app.stage()[0] == "unknown")
        app.until(lambda: app.stage() == ("running", 2))
        app.until(lambda: [who for _, who, _ in app.ticks()][-1] == f"{two.address}#2")
        heal(network)
        wait_until(lambda: "replaced by a newer one" in app.agent_log(one), 30)  # it is told, and leaves
        last = app.finish()
        ticks = app.ticks()
        whose = [who for _, who, _ in ticks]
        assert set(whose) == {f"{one.address}#1", f"{two.address}#2"}
        assert whose == sorted(whose, key=lambda who: who[-1]), "two copies at the same time"
        ends = [at for at, who, _ in ticks if who.endswith("#1")]
        begins = [at for at, who, _ in ticks if who.endswith("#2")]
        assert ends[-1] < begins[0]
        assert flow.call(app.state, "/works/w/vars/n") == last
        assert [call["attempt"] for call in flow.call(app.state, "/works/w/calls").values()] == [2]


def test_who_waits_harms_nothing_and_misses_nothing(app_folder: Callable[..., Path]) -> None:
    with remote(app_folder, "on_lost='wait'") as (network, app):
        flow, one, _ = network.hosts
        for link in network.between(flow, one):
            link.cut = True
        app.until(lambda: app.stage()[0] == "unknown")
        seen = flow.call(app.state, "/works/w/vars/n")
        wait_until(lambda: app.ticks()[-1][2] > seen + 60, 30)
        heal(network)
        app.until(lambda: app.stage() == ("running", 1))
        last = app.finish()
        assert app.log_numbers(one) == [n for _, _, n in app.ticks()] == list(range(1, last + 1))
        values = [op["value"] for op in written(app)]
        assert values == sorted(set(values)) and values[-1] == last  # each once, in order
        assert set(range(20, last, 20)) <= set(values)


def written(app: Remote) -> list[dict[str, Any]]:
    """What the script wrote to its variable, as the journal has it."""
    kept = Journal.open(app.folder / ".orch" / "state.db", readonly=True)
    try:
        revisions = kept.revisions(1, 0, 10_000)
    finally:
        kept.close()
    return [op for revision in revisions for op in revision.ops if op["path"] == "/works/w/vars/n"]


@pytest.mark.parametrize("loss, delay", [(0.3, 0.0), (0.0, 1.0)])
def test_a_poor_link_is_a_link(app_folder: Callable[..., Path], loss: float, delay: float) -> None:
    """30 % of the packets lost; or two seconds for each round trip."""
    with remote(app_folder, "on_lost='restart', lost_after=60.0, grace=1.0", seed=7) as (network, app):
        flow, one, _ = network.hosts
        for link in network.between(flow, one):
            link.loss, link.delay = loss, delay
        begin = app.ticks()[-1][2]
        wait_until(lambda: app.ticks()[-1][2] > begin + 150, 60)  # many heartbeats
        assert app.stage()[1] == 1
        last = app.finish()
        assert app.stage() == ("succeeded", 1)
        assert flow.call(app.state, "/works/w/vars/n") == last
        assert [n for _, _, n in app.ticks()] == list(range(1, last + 1))
        values = [op["value"] for op in written(app)]
        assert values == sorted(set(values))


def test_paused_is_not_dead(orch_app: Callable[..., RunningApp]) -> None:
    """SIGSTOP of the agent for ORCH_TEST_PAUSE seconds (default 15), then CONT."""
    pause = float(os.environ.get("ORCH_TEST_PAUSE", "15"))
    app = orch_app(APP.format(options="retries=3, lost_after=11.0"), {"ticker.py": TICKER})
    app.wait_state("/works/w/vars/n", lambda n: n >= 20)
    [agent] = app.get("/status")["agents"]
    os.kill(agent["pid"], signal.SIGSTOP)
    try:
        stopped = time.monotonic()
        app.wait_state("/works/w/status/stage", lambda stage: stage == "unknown", timeout=30)
        assert "no contact" in app.work("w")["status"]["message"]
        time.sleep(max(0.0, stopped + pause - time.monotonic()))  # the pause is what is tested
    finally:
        os.kill(agent["pid"], signal.SIGCONT)
    app.wait_state("/works/w/status/stage", lambda stage: stage == "running")
    [after] = app.get("/status")["agents"]
    assert (after["pid"], after["epoch"]) == (agent["pid"], agent["epoch"])
    (app.folder / "finish").touch()
    app.wait_state("/works/w/status/stage", lambda stage: stage == "succeeded")
    assert app.work("w")["attempt"] == 1
    numbers = [int(line) for line in re.findall(r"^\d+$", app.log("w"), re.MULTILINE)]
    assert numbers == list(range(1, len(numbers) + 1))
    stages = [stage for stage, _ in app.state("/vars/stages")]
    assert stages[stages.index("running") :] == ["running", "unknown", "running", "succeeded"]
