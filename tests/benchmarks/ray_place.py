"""From asking for a place on a Ray cluster until its agent answers, beside a bare actor: JSON on stdout.

    python tests/benchmarks/ray_place.py [--rounds N] [--many N]

The floor is an actor that does nothing, with the same resources and the same app folder as its runtime environment,
made by a driver that is connected already, until its first method answers. They take turns on one cluster of this
machine, and so does an actor without any environment, which Ray may have a process ready for: it shows what sending a
folder costs in Ray itself. Then the same for several at once.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from raycluster import RayCluster

from orch.runtimes.pack import pack
from orch.runtimes.ray import RayRuntime
from orch.runtimes.ray_place import APP_FOLDER
from orch.wire import AgentSpec

REACH = 1.3

BARE = """
import sys, ray
env = {"working_dir": sys.argv[2]} if sys.argv[2] else None
ray.init(address=sys.argv[1], namespace=sys.argv[3], runtime_env=env, log_to_driver=False, logging_level="ERROR")

@ray.remote
class Bare:
    async def answer(self):
        return 1

print("ready", flush=True)
for line in sys.stdin:
    actors = [Bare.options(num_cpus=0.01, lifetime="detached", name=f"bare-{n}").remote() for n in range(int(line))]
    ray.get([actor.answer.remote() for actor in actors])
    print("placed", flush=True)
    sys.stdin.readline()
    for actor in actors:
        ray.kill(actor)
    print("gone", flush=True)
"""


class BareDriver:
    def __init__(self, address: str, package: str, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", BARE, address, package, f"bare{len(package)}"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._until("ready")

    def _until(self, word: str) -> None:
        assert self.process.stdout is not None
        while (line := self.process.stdout.readline().strip()) != word:
            assert line or self.process.poll() is None, "the bare driver has ended"

    def place(self, count: int) -> float:
        assert self.process.stdin is not None
        began = time.perf_counter()
        print(count, file=self.process.stdin, flush=True)
        self._until("placed")
        took = time.perf_counter() - began
        print(file=self.process.stdin, flush=True)
        self._until("gone")
        return took

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


async def place(runtime: RayRuntime, app: Path, app_id: str, count: int, epoch: int) -> float:
    def spec(n: int) -> AgentSpec:
        return AgentSpec(
            agent=f"w{n}",
            work=f"w{n}",
            epoch=epoch,
            token="benchmark",
            flow_url="http://127.0.0.1:9",
            app_dir=str(app),
            orch_dir=str(app),
            app_id=app_id,
            app_name="benchmark",
            run=1,
            compute={"cpus": 0.01},
        )

    began = time.perf_counter()
    handles = await asyncio.gather(*(runtime.launch(spec(n)) for n in range(count)))
    took = time.perf_counter() - began
    await asyncio.gather(*(runtime.kill(handle) for handle in handles))
    return took


async def measure(rounds: int, many: int) -> dict[str, Any]:
    cluster = RayCluster()
    folder = Path(tempfile.mkdtemp(dir=cluster.folder))
    try:
        cluster.start()
        app, app_id = folder / "app", uuid.uuid4().hex[:8]
        app.mkdir()
        (app / "app.py").write_text("x = 1\n")
        package = folder / "app.zip"
        pack(app, package, APP_FOLDER)
        bare = BareDriver(cluster.address, str(package), folder)
        plain = BareDriver(cluster.address, "", folder)
        runtime = RayRuntime(cluster.address, folder, folder, app, app_id=app_id, ship=False)
        result: dict[str, Any] = {}
        try:
            await place(runtime, app, app_id, 1, 1)  # both drivers connected, the folder unpacked
            bare.place(1)
            epoch = 1
            for count, times in ((1, rounds), (many, max(2, rounds // 5))):
                taken: list[list[float]] = [[], [], []]
                for n in range(times):
                    for who in range(3):
                        epoch += 1
                        which = (who + n) % 3
                        if which == 0:
                            taken[0].append(await place(runtime, app, app_id, count, epoch))
                        else:
                            taken[which].append((bare, plain)[which - 1].place(count))
                ours, floor, without = map(statistics.median, taken)
                result[f"placed_{count}"] = {
                    "seconds": round(ours, 3),
                    "floor": f"{count} bare actor(s), same resources and runtime environment",
                    "floor_seconds": round(floor, 3),
                    "ratio": round(ours / floor, 3),
                    "to_reach": f"<= {REACH} for one",
                    "reached": ours / floor <= REACH,
                    "without_environment_seconds": round(without, 3),
                    "samples": [[round(value, 3) for value in values] for values in taken],
                }
        finally:
            await runtime.sweep()
            runtime.close()
            bare.close()
            plain.close()
        return result
    finally:
        cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--many", type=int, default=8)
    options = parser.parse_args()
    print(json.dumps(asyncio.run(measure(options.rounds, options.many)), indent=2))


if __name__ == "__main__":
    main()
