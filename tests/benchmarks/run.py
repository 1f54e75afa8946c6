"""Measures orch on this machine: `python tests/benchmarks/run.py [GROUP ...] [--rounds N] [--json FILE]`.

Real `orch run` processes on the small apps in `apps/`. Each figure is the median of `--rounds` (5) rounds, beside its
target and a floor that was measured in the same run. JSON goes to stdout (or FILE), a table to stderr. A figure whose
floor is over twice its usual value is marked noisy: the machine was busy, nothing can be said. Missed targets do not
change the exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "support"))

import httpx  # noqa: E402
import psutil  # noqa: E402
from floors import measure_floor  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402
from testkit import RunningApp, free_port, orch_command, wait_until  # noqa: E402

ROUNDS = 5
log = Console(stderr=True, width=None if sys.stderr.isatty() else 120)


@dataclass
class Figure:
    """One measured number. `target` is an upper bound, unless `higher` says that more is better."""

    name: str
    unit: str
    samples: list[float]
    target: float | None = None
    higher: bool = False
    predecessor: float | None = None
    floor: str = ""
    note: str = ""
    value: float = field(init=False)
    floor_value: float | None = field(init=False, default=None)
    floor_ratio: float | None = field(init=False, default=None)
    met: bool | None = field(init=False, default=None)
    noisy: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        self.value = statistics.median(self.samples)
        if self.target is not None:
            self.met = self.value >= self.target if self.higher else self.value <= self.target
        if self.floor:
            floor = measure_floor(self.floor)
            scale = {"ms": 1000.0, "s": 1.0, "MiB": 1.0}.get(self.unit)
            self.noisy = floor.noisy
            self.floor_value = 1 / floor.value if scale is None else floor.value * scale
            self.floor_ratio = self.value / self.floor_value if self.floor_value else None


@contextlib.contextmanager
def running(name: str, *argv: str) -> Iterator[RunningApp]:
    """`orch run` on a copy of `apps/<name>.py`, until it serves; stopped at the end."""
    with tempfile.TemporaryDirectory(prefix="orch-bench-") as temporary:
        folder = Path(temporary, name)
        folder.mkdir()
        shutil.copy(HERE / "apps" / f"{name}.py", folder / "app.py")
        app = RunningApp(folder)
        try:
            app.start(argv=argv)
            app.wait_state("/app/stage", lambda stage: stage == "running")
            yield app
        except BaseException:
            log.print("\n".join(app.output().splitlines()[-20:]), style="dim", markup=False)
            raise
        finally:
            if left := app.close():
                log.print(f"outlived the app's stop: {left}", style="red", markup=False)


def percentile(values: list[float], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * share))]


# ---- groups --------------------------------------------------------------------------------------------------------


def work_delays(app: RunningApp, rounds: int) -> list[list[float]]:
    """A Work stamps a variable 100 times, 8 ms apart; the flow's passes say how old each stamp was."""
    found = []
    for number in range(1, rounds + 2):
        app.set("/vars/work_delays", [])
        app.set("/vars/round", number)
        found.append(app.wait_state("/vars/work_delays", bool, interval=0.2))
    return found[1:]  # the first round warms up


def latency(rounds: int) -> list[Figure]:
    with running("latency") as app:
        from_work = work_delays(app, rounds)

        from_ui, answered = [], []
        for _ in range(rounds):
            app.set("/vars/click_delays", [])
            times = []
            for _ in range(50):
                started = time.time()
                app.set("/vars/click", started)
                times.append(time.time() - started)
                time.sleep(0.005)
            app.set("/vars/click", -time.time())
            from_ui.append(statistics.median(app.wait_state("/vars/click_delays", bool)))
            answered.append(statistics.median(times))

        to_work = []
        poke = 0
        for _ in range(rounds):
            app.set("/vars/listener_delays", [])
            app.set("/vars/listen", True)
            app.wait_state("/works/listener/status", lambda status: status["stage"] == "running")
            time.sleep(0.3)  # quiet, as the figure wants it
            for _ in range(30):
                poke += 1
                app.set("/vars/poke", poke)
                time.sleep(0.02)
            poke += 1
            app.set("/vars/poke", -poke)
            to_work.append(statistics.median(app.wait_state("/vars/listener_delays", bool)))

    http = "loopback HTTP round trip"
    ms = 1000
    return [
        Figure("work -> flow p50", "ms", [percentile(d, 0.5) * ms for d in from_work], 5, predecessor=79, floor=http),
        Figure("work -> flow p95", "ms", [percentile(d, 0.95) * ms for d in from_work], predecessor=150, floor=http),
        Figure("UI PATCH -> flow p50", "ms", [d * ms for d in from_ui], 5, predecessor=91, floor=http),
        Figure("UI PATCH answered p50", "ms", [d * ms for d in answered], floor=http),
        Figure("flow -> quiet work p50", "ms", [d * ms for d in to_work], 10, floor=http),
    ]


def size(rounds: int) -> list[Figure]:
    """The same diff in a dict of 10 and of 10,000 keys."""
    costs = {}
    for keys in (10, 10_000):
        with running("latency", str(keys)) as app:
            costs[keys] = [statistics.median(delays) * 1000 for delays in work_delays(app, rounds)]
    ratio = statistics.median(costs[10_000]) / statistics.median(costs[10])
    http = "loopback HTTP round trip"
    return [
        Figure("diff at 10 keys p50", "ms", costs[10], floor=http),
        Figure("diff at 10,000 keys p50", "ms", costs[10_000], predecessor=1100, floor=http),
        Figure("diff at 10,000 keys / at 10", "x", [ratio], 1.5),
    ]


def throughput(rounds: int) -> list[Figure]:
    figures = []
    for works, count, predecessor in ((1, 4000, 500), (8, 1000, 419)):
        rates = []
        with running("throughput", str(works), str(count)) as app:
            for number in range(1, rounds + 1):
                app.set("/vars/round", number)
                app.wait_state("/vars/finished", lambda done, wanted=number: done == wanted, timeout=60, interval=0.2)
                assert app.state("/vars/complete"), "list appends were lost or reordered"
                rates.append(works * (count + 100) / app.state("/vars/seconds"))
        figures.append(
            Figure(
                f"assignments from {works}",
                "1/s",
                rates,
                2000,
                higher=True,
                predecessor=predecessor,
                floor="loopback HTTP round trip",
            )
        )
    return figures


def first(rounds: int) -> list[Figure]:
    """From the command to the first pass and to the first HTTP answer."""
    passes, answers = [], []
    for _ in range(rounds):
        with tempfile.TemporaryDirectory(prefix="orch-bench-") as temporary:
            folder = Path(temporary, "first")
            folder.mkdir()
            shutil.copy(HERE / "apps" / "first.py", folder / "app.py")
            app, port = RunningApp(folder), free_port()
            process = app.spawn(port=port)

            def answered(port: int = port, process: subprocess.Popen[bytes] = process, app: RunningApp = app) -> bool:
                assert process.poll() is None, app.output()
                with contextlib.suppress(httpx.TransportError):
                    return httpx.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
                return False

            wait_until(answered, 20, interval=0.002)
            answers.append(time.time() - app.started_at)
            app.start_client(f"http://127.0.0.1:{port}")
            passes.append(app.wait_state("/vars/first_pass", bool) - app.started_at)
            app.close()
    floor = "python -c pass"
    return [
        Figure("command -> first pass", "s", passes, 0.8, predecessor=1.48, floor=floor),
        Figure("command -> first HTTP answer", "s", answers, 1.2, floor=floor),
    ]


def fleet(kind: str, count: int, target: float | None, predecessor: float | None) -> Callable[[int], list[Figure]]:
    def measure(rounds: int) -> list[Figure]:
        times = []
        with running("fleet", kind, str(count)) as app:
            for number in range(1, rounds + 2):
                app.set("/vars/round", number)
                app.wait_state("/vars/running", lambda seen, wanted=number: seen == wanted, timeout=60, interval=0.2)
                times.append(float(app.state("/vars/seconds")))
                app.set("/vars/halted", number)
                wait_until(lambda: not busy(app), 60, interval=0.2, what="all stopped")
        name = "script" if kind == "script" else "Python Work"
        floor = f"spawn of {count}"
        return [
            Figure(
                f"{count} {name}{'s' if count > 1 else ''} asked -> running",
                "s",
                times[1:],
                target,
                predecessor=predecessor,
                floor=floor,
            )
        ]

    return measure


def busy(app: RunningApp) -> int:
    return sum(work["status"]["stage"] in ("pending", "running") for work in app.get("/works"))


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of all threads; from the scheduler in nanoseconds where there is one (ticks are 10 ms)."""
    tasks = Path(f"/proc/{process.pid}/task")
    if tasks.is_dir():
        return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks.iterdir()) / 1e9
    times = process.cpu_times()
    return float(times.user + times.system)


def idle(rounds: int) -> list[Figure]:
    """CPU of server and agent while scripts sleep, in windows of 4 s; memory of everything but server and scripts."""
    server: dict[int, list[float]] = {}
    agent: dict[int, list[float]] = {}
    memory: list[float] = []
    for count in (4, 32, 36):
        with running("fleet", "script", str(count)) as app:
            app.set("/vars/round", 1)
            app.wait_state("/vars/running", lambda seen: seen == 1, timeout=60, interval=0.2)
            time.sleep(2)
            found = [p for p in app.processes() if p.name() != "sleep"]
            flow = [p for p in found if p.pid == app.server_json()["pid"]]
            others = [p for p in found if p not in flow]
            if count == 32:
                for _ in range(rounds):
                    memory.append(sum(p.memory_full_info().pss for p in others) / 2**20 / count)
                    time.sleep(0.2)
                continue
            server[count], agent[count] = [], []
            for _ in range(rounds):
                before = [(p, cpu_seconds(p)) for p in found]
                started = time.monotonic()
                time.sleep(4)
                seconds = time.monotonic() - started
                used = {p: (cpu_seconds(p) - then) / seconds * 100 for p, then in before}
                server[count].append(sum(used[p] for p in flow))
                agent[count].append(sum(used[p] for p in others))
    more = [(b - a) / 32 for a, b in zip(server[4], server[36], strict=True)]
    more_agent = [(b - a) / 32 for a, b in zip(agent[4], agent[36], strict=True)]
    core = "% of a core"
    return [
        Figure("idle server, 4 Works", core, server[4], 1, predecessor=100),
        Figure("idle server, each further Work", core, more, 0.05),
        Figure("idle agent and waiters, 4 Works", core, agent[4]),
        Figure("idle agent and waiters, each further Work", core, more_agent),
        Figure("agent + waiters at 32, per Work", "MiB", memory, 3, predecessor=10.8, floor="bare python process"),
    ]


def scripts(rounds: int) -> list[Figure]:
    seen, cost = [], []
    with running("scripts") as app:
        for number in range(1, 2 * (rounds + 2) + 1):
            app.set("/vars/round", number)
            app.wait_state("/vars/finished", lambda done, wanted=number: done == wanted, interval=0.1)
            if number > 4:
                (seen if number % 2 else cost).append(
                    app.state("/vars/seen_after" if number % 2 else "/vars/cost") * 1000
                )
    return [
        Figure("script's end -> seen by the flow", "ms", seen, 20, predecessor=154, floor="end of a bare script"),
        Figure("script `python -c pass`, asked -> done", "ms", cost, floor="python -c pass"),
    ]


def version(rounds: int) -> list[Figure]:
    times = []
    for _ in range(max(rounds, 5)):
        started = time.perf_counter()
        subprocess.run([*orch_command(), "--version"], check=True, stdout=subprocess.DEVNULL)
        times.append(time.perf_counter() - started)
    return [Figure("orch --version", "s", times, 0.2, floor="python -c pass")]


def imports(rounds: int) -> list[Figure]:
    code = "import time as t; then = t.perf_counter(); from orch import App, Flow, Work; print(t.perf_counter() - then)"
    done = [subprocess.run([sys.executable, "-P", "-c", code], check=True, stdout=-1) for _ in range(max(rounds, 5))]
    return [Figure("import orch", "s", [float(one.stdout) for one in done], 0.15, floor="python -c pass")]


GROUPS: dict[str, Callable[[int], list[Figure]]] = {
    "version": version,
    "imports": imports,
    "first": first,
    "latency": latency,
    "size": size,
    "throughput": throughput,
    "scripts": scripts,
    "script-1": fleet("script", 1, None, None),
    "script-32": fleet("script", 32, 0.25, 0.73),
    "script-500": fleet("script", 500, 4, None),
    "python-32": fleet("python", 32, 0.6, None),
    "idle": idle,
}


def table(figures: list[Figure]) -> Table:
    out = Table(title=f"orch on {os.cpu_count()} cores, Python {platform.python_version()}")
    for name in ("figure", "value", "target", "", "predecessor", "floor", "x floor"):
        out.add_column(name, justify="left" if name in ("figure", "") else "right")
    for f in figures:
        verdict = "noisy" if f.noisy else "" if f.met is None else "met" if f.met else "MISSED"
        cells: list[Any] = [
            f.name, f"{f.value:.4g} {f.unit}", f.target, verdict, f.predecessor,
            f.floor_value and f"{f.floor_value:.4g}", f.floor_ratio and f"{f.floor_ratio:.1f}",
        ]  # fmt: skip
        out.add_row(*("" if cell is None else str(cell) for cell in cells))
    return out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help=f"of {', '.join(GROUPS)} (default: all)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds a figure (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there instead of to stdout")
    args = parser.parse_args()
    if unknown := [name for name in args.groups if name not in GROUPS]:
        parser.error(f"no such group: {', '.join(unknown)}; there are {', '.join(GROUPS)}")
    started = time.time()
    figures: list[Figure] = []
    failed: dict[str, str] = {}
    for name in args.groups or GROUPS:
        log.print(f"{name} ...", style="dim")
        try:
            figures += GROUPS[name](args.rounds)
        except (AssertionError, OSError, KeyError, subprocess.SubprocessError, httpx.HTTPError) as error:
            failed[name] = f"{type(error).__name__}: {error}"
            log.print(f"{name} could not be measured: {failed[name]}", style="red", markup=False)
    report = {
        "at": started,
        "seconds": time.time() - started,
        "machine": {
            "cores": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "system": platform.platform(),
            "python": platform.python_version(),
            "load": os.getloadavg(),
        },
        "rounds": args.rounds,
        "figures": [asdict(figure) for figure in figures],
        "failed": failed,
    }
    log.print(table(figures))
    text = json.dumps(report, indent=1)
    if args.json:
        Path(args.json).write_text(text + "\n")
    else:
        print(text)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
