"""The Drive beside what this machine itself takes, in one run: JSON on stdout.

    python tests/benchmarks/drive.py [--only local|s3|sparse] [--rounds N]

Local figures stand beside `cp` and `sha256sum` of the same files, S3 figures beside the fastest client known (obstore's
asynchronous calls, without checksums of ours) on the same server. Seconds are the best of the rounds, a ratio is the
median of those of the rounds: figure and floor of a round are measured side by side, so that a noisy moment of the
machine hits both, and in a bucket each comes first in turn, with nothing left to be written by what was before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

from s3server import ACCESS, BUCKET, SECRET, S3Server

from orch_drive import DriveStore
from orch_drive.manifest import Manifest

MIB = 1 << 20
LARGE, COUNT, SMALL = 256 * MIB, 1000, 10 << 10


def seconds(act: Callable[[], object]) -> float:
    started = time.perf_counter()
    act()
    return time.perf_counter() - started


def in_turn(turn: int, *acts: tuple[list[float], Callable[[], object]]) -> None:
    for times, act in acts if turn % 2 else reversed(acts):
        os.sync()
        times.append(seconds(act))


def ratio(times: list[float], floors: list[float]) -> float:
    return statistics.median(time / floor for time, floor in zip(times, floors, strict=True))


def row(name: str, times: list[float], floor: str, floors: list[float], reach: str, reached: bool) -> dict[str, Any]:
    return {
        "name": name,
        "seconds": round(min(times), 4),
        "floor": floor,
        "floor_seconds": round(min(floors), 4),
        "ratio": round(ratio(times, floors), 3),
        "to_reach": reach,
        "reached": reached,
    }


def make_files(folder: Path) -> tuple[Path, Path]:
    large, small = folder / "large", folder / "small"
    large.mkdir()
    small.mkdir()
    with open(large / "file", "wb") as file:
        for _ in range(LARGE // MIB):
            file.write(os.urandom(MIB))
    for n in range(COUNT):
        (small / f"{n:04d}").write_bytes(os.urandom(SMALL))
    return large, small


def cp_and_sum(source: Path, folder: Path) -> float:
    target = folder / "cp"
    shutil.rmtree(target, ignore_errors=True)

    def act() -> None:
        subprocess.run(["cp", "-r", source, target], check=True)
        names = sorted(map(str, target.iterdir()))
        subprocess.run(["sha256sum", *names], check=True, stdout=subprocess.DEVNULL)

    return seconds(act)


def local(folder: Path, rounds: int) -> list[dict[str, Any]]:
    large, small = make_files(folder)
    out = []
    for name, source in (("256 MiB", large), (f"{COUNT} x 10 KiB", small)):
        puts, gets, unchanged, floors = [], [], [], []
        for n in range(rounds):
            floors.append(cp_and_sum(source, folder))
            base = folder / "store"
            store = DriveStore(str(base), f"app{n}")
            puts.append(seconds(lambda store=store, source=source: store.publish("t", "d", source)))
            unchanged.append(seconds(lambda store=store, source=source: store.publish("t", "d", source)))
            manifest = store.resolve("d")
            assert manifest is not None
            reader = DriveStore(str(base), f"app{n}")
            gets.append(seconds(lambda r=reader, m=manifest, n=n: r.fetch(m, folder / f"got{n}")))
            shutil.rmtree(folder / f"got{n}")
            shutil.rmtree(base)
        for what, times in (("put", puts), ("get", gets)):
            fast = ratio(times, floors) <= 1.25
            out.append(row(f"local {what} of {name}", times, "cp + sha256sum", floors, "<= 1.25x", fast))
        if source == small:
            fast = min(unchanged) <= 0.05
            out.append(row(f"local unchanged put of {name}", unchanged, "cp + sha256sum", floors, "<= 0.05 s", fast))
    return out


def s3(folder: Path, rounds: int) -> list[dict[str, Any]]:
    import obstore
    from obstore.store import S3Store

    large, small = make_files(folder)
    server = S3Server()
    out = []
    try:
        server.start()
        server.make_bucket()
        os.environ.update(server.env())
        bare = S3Store(
            BUCKET,
            endpoint=server.endpoint,
            region="us-east-1",
            access_key_id=ACCESS,
            secret_access_key=SECRET,
            unsigned_payload=True,
            client_options={"allow_http": True},
        )

        async def put_all(prefix: str, source: Path) -> None:
            lanes = asyncio.Semaphore(32)

            async def one(path: Path) -> None:
                async with lanes:
                    if path.stat().st_size > 16 * MIB:
                        await obstore.put_async(
                            bare, f"{prefix}/{path.name}", path, chunk_size=16 * MIB, max_concurrency=4
                        )
                    else:
                        await obstore.put_async(bare, f"{prefix}/{path.name}", path.read_bytes(), use_multipart=False)

            await asyncio.gather(*map(one, source.iterdir()))

        async def get_all(prefix: str, source: Path, target: Path) -> None:
            lanes = asyncio.Semaphore(32)
            target.mkdir()

            async def one(path: Path) -> None:
                async with lanes:
                    found = await obstore.get_async(bare, f"{prefix}/{path.name}")
                    with open(target / path.name, "wb") as file:
                        if path.stat().st_size > 16 * MIB:
                            async for piece in found.stream(8 * MIB):
                                file.write(piece)
                        else:
                            file.write(await found.bytes_async())

            await asyncio.gather(*map(one, source.iterdir()))

        for name, source in (("256 MiB", large), (f"{COUNT} x 10 KiB", small)):
            puts, gets, put_floors, get_floors = [], [], [], []
            for n in range(rounds):
                prefix = f"bare{n}-{source.name}"
                store = DriveStore(f"s3://{BUCKET}/{source.name}", f"app{n}")
                store.list()

                def put_floor(prefix: str = prefix, source: Path = source) -> None:
                    asyncio.run(put_all(prefix, source))

                def put(store: DriveStore = store, source: Path = source) -> None:
                    store.publish("t", "d", source)

                in_turn(n, (put_floors, put_floor), (puts, put))
                bare_got, got = folder / f"bare{n}-{source.name}", folder / f"got{n}-{source.name}"
                manifest = store.resolve("d")
                assert manifest is not None

                def get_floor(prefix: str = prefix, source: Path = source, target: Path = bare_got) -> None:
                    asyncio.run(get_all(prefix, source, target))

                def get(store: DriveStore = store, manifest: Manifest = manifest, target: Path = got) -> None:
                    store.fetch(manifest, target)

                in_turn(n, (get_floors, get_floor), (gets, get))
                shutil.rmtree(bare_got)
                shutil.rmtree(got)
            for what, times, floors in (("put", puts, put_floors), ("get", gets, get_floors)):
                fast = ratio(times, floors) <= 1 / 0.9
                out.append(row(f"s3 {what} of {name}", times, "obstore", floors, ">= 0.9x its speed", fast))
    finally:
        server.close()
    return out


SPARSE = """
import sys
from pathlib import Path
from orch_drive import DriveStore
DriveStore(sys.argv[1], "app").publish("t", "sparse", Path(sys.argv[2]))
# not ru_maxrss, which is inherited from the process that has started this one
print(next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024)
"""


def sparse(folder: Path, rounds: int) -> list[dict[str, Any]]:
    source = folder / "sparse"
    with open(source, "wb") as file:
        file.truncate(10 << 30)
    command = [sys.executable, "-P", "-c", SPARSE, str(folder / "store"), str(source)]
    started = time.perf_counter()
    peak = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    took = time.perf_counter() - started
    return [
        {
            "name": "memory of a put of a sparse file of 10 GiB",
            "MiB": round(peak, 1),
            "seconds": round(took, 2),
            "to_reach": "<= 200 MiB",
            "reached": peak <= 200,
        }
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["local", "s3", "sparse"])
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for part in (local, s3, sparse):
        if args.only in (None, part.__name__):
            with tempfile.TemporaryDirectory(prefix="orch-bench-") as folder:
                rows += part(Path(folder), args.rounds)
    load = os.getloadavg()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"load": round(load, 1), "peak_MiB": round(peak), "figures": rows}, indent=2))


if __name__ == "__main__":
    main()
