"""Server and agent are killed at random times while 30 works run: nothing is lost, doubled or harmed, nothing grows.

ORCH_SOAK_SECONDS says how long (default 20; `.ci/run` asks for three minutes), ORCH_SOAK_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import psutil
import pytest
from testkit import RunningApp, wait_until
from victims import SCRIPT, Victim, agent_record, numbers_without_gap, script_records, starts

SECONDS = float(os.environ.get("ORCH_SOAK_SECONDS") or 20)
SEED = int(os.environ.get("ORCH_SOAK_SEED") or random.randrange(1_000_000))
PAUSE = (5.0, 20.0) if SECONDS >= 120 else (1.0, 4.0)
"""Seconds between two kills."""
DIFFS = 5_000
COUNTERS = 4

APP = """
import time
from orch import App, Dict, Flow, ScriptWork, ServiceWork, Work


class Counts(Work):
    def __init__(self):
        super().__init__(parallel=True, grace=1.0)
        self.goal = 0
        self.pause = 0.02
        self.rows = []

    def run(self):
        while True:
            time.sleep(self.pause)
            if len(self.rows) < self.goal:
                self.rows.append(len(self.rows) + 1)


def script(what, **options):
    return ScriptWork(f"script.py {what}", parallel=True, raise_exception=False, grace=5.0, **options)


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.closing = False
        self.asked = {}
        self.ended = {}
        self.wrong = []
        self.shorts = Dict({f"s{i}": ScriptWork(f"short.py {i}", parallel=True, raise_exception=False,
                                                cache_calls=False) for i in range(12)})
        self.longs = Dict({f"l{i}": script(f"waits {i}", outputs=[f"out-longs.l{i}"]) for i in range(10)})
        self.services = Dict({f"v{i}": ServiceWork("python -m http.server {port} --bind 127.0.0.1", grace=1.0)
                              for i in range(4)})
        self.counts = Dict({f"c{i}": Counts() for i in range(4)})

    def run(self):
        for name, work in self.shorts.items():
            if self.closing and self.ended.get(name, 0) == self.asked.get(name, 0):
                continue
            call = work.run()
            number = int(call.id.rpartition("-")[2])
            self.asked[name] = number
            if call.done:
                self.ended[name] = self.ended.get(name, 0) + 1
                if (call.exit_code, self.ended[name]) != (number % 3, number):
                    self.wrong.append([call.id, call.exit_code, str(call.reason), self.ended[name]])
        for group in (self.longs, self.services, self.counts):
            for work in group.values():
                work.run()


app = App(Root())
"""
SHORT = """
import os, time
work, call, attempt = (os.environ["ORCH_" + name] for name in ("WORK", "CALL", "ATTEMPT"))
with open("starts", "a") as file:
    file.write(f"{work} {call} {attempt} {os.getpid()}\\n")
for n in range(1, 6):
    print("line", n, flush=True)
    time.sleep(0.1)
raise SystemExit(int(call.rpartition("-")[2]) % 3)
"""


class Samples:
    """RSS, descriptors and threads of server and agent while they live."""

    GROWTH: ClassVar = {"rss_mib": 40.0, "fds": 24.0, "threads": 10.0}
    """That much over the time watched says nothing: imports, caches, connections that come and go."""
    WARM = 3.0
    """Seconds until an incarnation has loaded what it needs."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, int], list[tuple[float, dict[str, float]]]] = defaultdict(list)
        self.born: dict[tuple[str, int], float] = {}

    def take(self, role: str, pid: int | None) -> None:
        if pid is None:
            return
        now = time.monotonic()
        try:
            process = psutil.Process(pid)
            row = {
                "rss_mib": process.memory_info().rss / 2**20,
                "fds": float(process.num_fds()),
                "threads": float(process.num_threads()),
            }
        except psutil.Error:  # killed just now
            return
        if now - self.born.setdefault((role, pid), now) >= self.WARM:
            self.rows[role, pid].append((now, row))

    def slopes(self) -> dict[str, float]:
        """Growth a minute over the whole time, by role and figure. AssertionError if one is not flat, there or within
        one incarnation."""
        found = {}
        for role in ("server", "agent"):
            incarnations = [rows for (of, _), rows in self.rows.items() if of == role]
            whole = [row for rows in incarnations for row in rows]
            for figure, allowed in self.GROWTH.items():
                for rows in [*incarnations, whole]:
                    if len(rows) < 8:
                        continue
                    times, values = [at for at, _ in rows], [row[figure] for _, row in rows]
                    slope = statistics.linear_regression(times, values).slope
                    grown = slope * (max(times) - min(times))
                    assert grown < allowed, f"{figure} of the {role} grew by {grown:.1f}: {values}"
                    if rows is whole:
                        found[f"{role} {figure} a minute"] = round(slope * 60, 2)
        return found


@pytest.mark.slow
@pytest.mark.timeout(SECONDS * 1.5 + 150)
def test_soak(orch_app: Callable[..., RunningApp], record_property: Callable[[str, Any], None]) -> None:
    print(f"ORCH_SOAK_SECONDS={SECONDS:g} ORCH_SOAK_SEED={SEED}")
    chance = random.Random(SEED)
    victim = Victim(orch_app(APP, {"script.py": SCRIPT, "short.py": SHORT}, start=False))
    app, samples, kills = victim.app, Samples(), Counter[str]()
    victim.start()
    lasting = [f"longs.l{i}" for i in range(10)] + [f"services.v{i}" for i in range(4)]
    lasting += [f"counts.c{i}" for i in range(COUNTERS)]
    wait_until(lambda: all(script_records(app, work) for work in lasting), 40, what="30 works run")
    pids = {work: [record["pid"] for record in script_records(app, work)] for work in lasting}
    pause = max(0.01, SECONDS * 0.8 / (DIFFS / COUNTERS))
    for i in range(COUNTERS):
        at = f"/structures/counts/works/c{i}/vars"
        app.patch(
            {"op": "replace", "path": f"{at}/pause", "value": pause},
            {"op": "replace", "path": f"{at}/goal", "value": DIFFS // COUNTERS},
        )

    def watch(until: float) -> bool:
        assert app.process is not None
        samples.take("server", app.process.pid)
        samples.take("agent", agent_record(app).get("pid"))
        return time.monotonic() >= until

    over = time.monotonic() + SECONDS
    while time.monotonic() < over:
        until = time.monotonic() + chance.uniform(*PAUSE)
        wait_until(lambda until=until: watch(until), PAUSE[1] + 5, interval=0.25)
        who = chance.choice([("server",), ("agent",), ("server", "agent")])
        victim.kill(*who)
        kills["+".join(who)] += 1
        if "server" in who:
            if chance.random() < 0.3:  # and again before it is up
                app.spawn(port=victim.port)
                until = time.monotonic() + chance.uniform(0.0, 1.5)
                wait_until(lambda until=until: time.monotonic() >= until)
                app.kill()
                kills["server while it starts"] += 1
            victim.start()

    app.set("/vars/closing", True)
    victim.go([f"longs.l{i}" for i in range(10)])

    def ended() -> bool:
        state = app.state()
        groups = state["structures"]
        return (
            state["vars"]["asked"] == state["vars"]["ended"]
            and all(w["status"]["stage"] in ("succeeded", "failed") for w in groups["longs"]["works"].values())
            and all(len(w["vars"]["rows"]) >= DIFFS // COUNTERS for w in groups["counts"]["works"].values())
            and all(w["status"]["is_ready"] for w in groups["services"]["works"].values())
        )

    def where() -> str:
        state = app.state()
        groups = state["structures"].items()
        stages = {f"{of}.{name}": w["status"]["stage"] for of, g in groups for name, w in g["works"].items()}
        rows = [len(w["vars"]["rows"]) for w in state["structures"]["counts"]["works"].values()]
        ready = [w["status"]["is_ready"] for w in state["structures"]["services"]["works"].values()]
        log = (app.folder / ".orch/logs/agent-local.log").read_text()
        return f"all ends: {state['vars']} {stages} rows: {rows} ready: {ready}\n{app.output()[-3000:]}\n{log}"

    wait_until(ended, 60, interval=0.2, what=where)
    state = app.state()
    seen = starts(app)
    assert len(seen) == len(set(seen)), [start for start, n in Counter(seen).items() if n > 1]
    longs = state["structures"]["longs"]["works"]
    harmed = state["vars"]["wrong"]  # exit codes that are not the scripts', ends that came twice or not at all
    harmed += [name for name, work in longs.items() if work["status"]["exit_code"] != int(name[1:])]
    harmed += [work for work in lasting[10:] if [record["pid"] for record in script_records(app, work)] != pids[work]]
    assert harmed == []
    short = Counter(work.partition(".")[2] for work, _, _ in seen if work.startswith("shorts."))
    assert short == state["vars"]["ended"]
    assert len([work for work, _, _ in seen if work.startswith("longs.")]) == 10
    for name, work in longs.items():
        numbers_without_gap(app, f"longs.{name}")
        assert work["status"]["metrics"] == {"loss": 0.25}
        assert len(work["status"]["files"]) == (21 if name == "l0" else 0)
    for i in range(COUNTERS):
        rows = state["structures"]["counts"]["works"][f"c{i}"]["vars"]["rows"]
        assert rows == list(range(1, DIFFS // COUNTERS + 1)), "a diff was lost or doubled"
    record_property(
        "measured",
        {
            "seconds": SECONDS,
            "seed": SEED,
            "kills survived": dict(kills),
            "scripts harmed": len(harmed),
            "scripts ended": len(seen),
        }
        | victim.recovered
        | samples.slopes(),
    )
