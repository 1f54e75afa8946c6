"""What starting and keeping processes costs, without agent and flow; run by hand, prints JSON.

Times are medians in seconds, beside the floor of one `subprocess.run`; memory is the proportional set size.
"""

from __future__ import annotations

import asyncio
import json
import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from orch_workers.process import Process, ProcessSpec, Spawner

ROUNDS = 5


def pss(pid: int) -> int:
    """KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


async def measure() -> dict[str, float]:
    result: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        spawner = Spawner(folder / "run")
        count = 0

        async def start(n: int, *argv: str) -> list[Process]:
            nonlocal count
            specs = []
            for _ in range(n):
                count += 1
                key = f"1-bench-{count}.1"
                log = str(folder / "logs" / f"{key}.log")
                specs.append(ProcessSpec(key, list(argv), name, dict(os.environ), log, grace=1.0))
            return list(await asyncio.gather(*(spawner.start(spec) for spec in specs)))

        async def timed(label: str, n: int) -> None:
            began = time.perf_counter()
            processes = await start(n, "sleep", "600")
            result.setdefault(label, []).append(time.perf_counter() - began)
            if n == 32:
                result.setdefault("pss_kib_per_waiter_of_32", []).append(
                    sum(pss(process.waiter_pid) for process in processes) / n
                )
            began = time.perf_counter()
            await asyncio.gather(*(process.stop(1.0) for process in processes))
            result.setdefault(f"stop_{n}", []).append(time.perf_counter() - began)

        await start(1, "true")
        for _ in range(ROUNDS):
            began = time.perf_counter()
            subprocess.run(["true"], check=True)
            result.setdefault("floor_subprocess_run_true", []).append(time.perf_counter() - began)
            await timed("start_1", 1)
            await timed("start_32", 32)
            (process,) = await start(1, "true")
            ended = await process.wait()
            result.setdefault("end_seen_after", []).append(time.time() - ended.at)
        await timed("start_500", 500)
        await spawner.aclose()
    return {label: round(statistics.median(values), 5) for label, values in result.items()}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(measure()), indent=2))
