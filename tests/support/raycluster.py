"""A Ray cluster of the tests' own on this machine: nodes are `ray start` processes, ended by pid and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
from testkit import kill_all, wait_until

from orch_workers.places import free_port

STARTED = "Ray runtime started"


class Node:
    """One `ray start --block` with everything below it."""

    def __init__(self, cluster: RayCluster, *options: str, env: dict[str, str] | None = None, python: str = "") -> None:
        self.log = cluster.folder / f"node{len(cluster.nodes)}.log"
        ray = [python or sys.executable, "-m", "ray.scripts.scripts"]
        command = [*ray, "start", "--block", "--disable-usage-stats", "--object-store-memory=80000000"]
        # Else each machine takes the same ports of its own, which are then in the way of the next one's.
        command += ["--min-worker-port=0", "--max-worker-port=0", *options]
        with self.log.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=cluster.folder,
                env={**cluster.env, **(env or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        cluster.nodes.append(self)
        wait_until(self._up, 60, what=lambda: f"ray start: {self.log.read_text()[-2000:]}")

    def _up(self) -> bool:
        assert self.process.poll() is None, self.log.read_text()[-2000:]
        return STARTED in self.log.read_text()

    def processes(self, name: str = "") -> list[psutil.Process]:
        """What this node consists of, or those of its processes whose program has that name."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            found = [own, *own.children(recursive=True)]
            return [process for process in found if not name or _program(process) == name]
        return []

    def power_off(self) -> None:
        """Nothing of it has a chance to say goodbye, agents and scripts neither, as on a machine that is off."""
        processes = self.processes()
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()
        kill_all(processes)
        self.process.wait()


def _program(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error, IndexError):
        return os.path.basename(process.cmdline()[0])
    return ""


class RayCluster:
    """Call `start`, then `add`. `address` is for drivers on this machine, `node_dir` holds the folders of places."""

    def __init__(self, **env: str) -> None:
        # Ray puts sockets below its folder, and the path of a socket is short.
        self.folder = Path(tempfile.mkdtemp(prefix="orch-ray-"))
        self.node_dir = self.folder / "places"
        # Not the mark of the leak check: Ray starts and ends workers as it likes.
        kept = {name: value for name, value in os.environ.items() if name != "ORCH_TEST_SESSION"}
        self.env = {
            **kept,
            "ORCH_NODE_DIR": str(self.node_dir),
            "RAY_health_check_initial_delay_ms": "0",
            "RAY_health_check_period_ms": "500",
            "RAY_health_check_timeout_ms": "500",
            "RAY_health_check_failure_threshold": "3",
            **env,
        }
        self.port = free_port(())
        self.address = f"127.0.0.1:{self.port}"
        self.nodes: list[Node] = []

    def start(self, *options: str, python: str = "", cpus: int = 2) -> Node:
        """The head."""
        return Node(
            self,
            "--head",
            f"--port={self.port}",
            f"--num-cpus={cpus}",
            "--include-dashboard=false",
            f"--ray-client-server-port={free_port(())}",
            f"--temp-dir={self.folder}/t",
            *options,
            python=python,
        )

    def add(self, *, cpus: int = 0, resources: dict[str, float] | None = None, **env: str) -> Node:
        """One more machine."""
        return Node(
            self,
            f"--address={self.address}",
            f"--num-cpus={cpus}",
            f"--resources={json.dumps(resources or {})}",
            env=env,
        )

    def alive(self) -> int:
        """How many machines Ray believes to be alive."""
        code = (
            "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR');"
            "print('alive', sum(node['Alive'] for node in ray.nodes()))"
        )
        command = [sys.executable, "-c", code, self.address]
        answer = subprocess.run(command, cwd=self.folder, env=self.env, capture_output=True, text=True, check=True)
        (line,) = [line for line in answer.stdout.splitlines() if line.startswith("alive ")]  # Ray says more, at will
        return int(line.split()[1])

    def said(self, word: str) -> list[Path]:
        """Every file of Ray's own in which that word stands: logs, records, packages."""
        found = []
        for path in (self.folder / "t").rglob("*"):
            with contextlib.suppress(OSError):
                if path.is_file() and not path.is_symlink() and word.encode() in path.read_bytes():
                    found.append(path)
        return found

    def places(self) -> list[psutil.Process]:
        """Living agents and waiters of this cluster."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get("ORCH_NODE_DIR") == str(self.node_dir) and not _is_rays(process):
                    found.append(process)
        return found

    def close(self) -> None:
        for node in reversed(self.nodes):
            node.power_off()
        kill_all(self.places())
        shutil.rmtree(self.folder, ignore_errors=True)


def _is_rays(process: psutil.Process) -> bool:
    words: list[Any] = process.cmdline()
    return not any("orch_workers" in word or "orch-waiter" in word for word in words)
