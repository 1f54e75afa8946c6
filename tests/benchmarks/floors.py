"""What this machine itself takes for the least that a figure could be. Measured beside the figure, in the same run."""

from __future__ import annotations

import http.client
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

__all__ = ["FLOORS", "Floor", "measure_floor"]

USUAL = {
    "loopback HTTP round trip": 0.00016,
    "python -c pass": 0.0145,
    "end of a bare script": 0.0007,
    "spawn of 1": 0.00025,
    "spawn of 32": 0.016,
    "spawn of 500": 0.25,
    "bare python process": 5.6,
    "cp of 64 MiB": 0.018,
}
"""On a quiet machine with 2 cores. A floor over twice its usual value marks the figures beside it as noisy."""

SERVER = """
import asyncio, sys

async def serve(reader, writer):
    while await reader.readuntil(b"\\r\\n\\r\\n"):
        writer.write(b"HTTP/1.1 200 OK\\r\\nContent-Length: 2\\r\\n\\r\\nok")

async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""

ENDING = "import os, sys, time\nopen(sys.argv[1], 'w').write(repr(time.time()))\nos._exit(0)"


@dataclass(frozen=True, slots=True)
class Floor:
    """`value` in the unit of the figures that it belongs to (seconds, MiB)."""

    name: str
    value: float
    noisy: bool


def http_round_trip() -> float:
    """Median seconds of a GET with keep-alive against a minimal server in another process."""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", SERVER], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        connection = http.client.HTTPConnection("127.0.0.1", int(server.stdout.readline()))
        times = []
        for _ in range(300):
            started = time.perf_counter()
            connection.request("GET", "/")
            connection.getresponse().read()
            times.append(time.perf_counter() - started)
        connection.close()
        server.kill()
    return statistics.median(times[50:])


def python_pass() -> float:
    """Median seconds of `python -c pass`."""

    def once() -> float:
        started = time.perf_counter()
        subprocess.run([sys.executable, "-c", "pass"], check=True)
        return time.perf_counter() - started

    return statistics.median(once() for _ in range(7))


def bare_end() -> float:
    """Median seconds from a script's last line to its parent's knowing."""
    times = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "ended")
        for _ in range(7):
            subprocess.run([sys.executable, "-c", ENDING, str(path)], check=True)
            times.append(time.time() - float(path.read_text()))
    return statistics.median(times)


def spawn(count: int) -> Callable[[], float]:
    """Median seconds to start `count` processes, one after another."""

    def measure() -> float:
        times = []
        for _ in range(5):
            started = time.perf_counter()
            children = [subprocess.Popen(["sleep", "60000"], start_new_session=True) for _ in range(count)]
            times.append(time.perf_counter() - started)
            for child in children:
                child.kill()
            for child in children:
                child.wait()
        return statistics.median(times)

    return measure


def python_process() -> float:
    """PSS in MiB of a Python that sleeps."""
    with subprocess.Popen([sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        size = psutil.Process(child.pid).memory_full_info().pss / 2**20
        child.kill()
    return float(size)


def cp() -> float:
    """Median seconds of a `cp` of 64 MiB that is in the page cache."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "source"), Path(folder, "target")
        source.write_bytes(b"orch" * 2**24)
        times = []
        for _ in range(5):
            started = time.perf_counter()
            shutil.copyfile(source, target)
            times.append(time.perf_counter() - started)
            target.unlink()
    return statistics.median(times)


FLOORS: dict[str, Callable[[], float]] = {
    "loopback HTTP round trip": http_round_trip,
    "python -c pass": python_pass,
    "end of a bare script": bare_end,
    "spawn of 1": spawn(1),
    "spawn of 32": spawn(32),
    "spawn of 500": spawn(500),
    "bare python process": python_process,
    "cp of 64 MiB": cp,
}


def measure_floor(name: str) -> Floor:
    """The floor as it is now."""
    value = FLOORS[name]()
    return Floor(name, value, value > 2 * USUAL[name])
