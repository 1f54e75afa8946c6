"""Hosts of a network that tests make and break: network namespaces with one TUN device each, and a switch between them.

The switch is a thread of this process: it cuts, loses and delays packets for each direction apart. Nothing leaves the
namespaces; the addresses exist only in them. Needs root and /dev/net/tun (Linux).
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Host", "Network", "missing"]

T = TypeVar("T")

_TUNSETIFF = 0x400454CA
_IFF_TUN, _IFF_NO_PI = 0x0001, 0x1000
_CLONE_NEWNET = 0x40000000
_numbers = count(1)


def missing() -> str:
    """Why there can be no such network here; empty if there can."""
    if not os.path.exists("/dev/net/tun") or not hasattr(os, "geteuid"):
        return "there is no /dev/net/tun"
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no ip command (iproute2)"
    return ""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@dataclass
class Link:
    """One direction between two hosts."""

    cut: bool = False
    loss: float = 0.0
    delay: float = 0.0
    """Seconds."""


class Host:
    """A namespace. `call` runs a function in a thread that lives in it: the sockets it opens are there."""

    def __init__(self, name: str, address: str) -> None:
        self.name = name
        self.address = address
        self.tun = -1
        self._pool: ThreadPoolExecutor | None = None

    def begin(self) -> None:
        _ip("netns", "add", self.name)
        self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        device = f"t{os.getpid() % 100_000}n{next(_numbers)}"
        fcntl.ioctl(self.tun, _TUNSETIFF, struct.pack("16sH", device.encode(), _IFF_TUN | _IFF_NO_PI))
        _ip("link", "set", device, "netns", self.name)
        for words in (
            ("link", "set", "lo", "up"),
            ("addr", "add", f"{self.address}/24", "dev", device),
            ("link", "set", device, "up"),
        ):
            _ip("-n", self.name, *words)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix=self.name, initializer=self._enter)

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.name}") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.name}")

    def call(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        assert self._pool is not None
        return self._pool.submit(function, *args, **kwargs).result()

    def command(self, *words: str) -> list[str]:
        """The command that runs this one in the namespace, with the same pid."""
        return ["ip", "netns", "exec", self.name, *words]

    def end(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        if self.tun >= 0:
            os.close(self.tun)
        with contextlib.suppress(subprocess.CalledProcessError):
            _ip("netns", "del", self.name)


class Network:
    """Hosts 10.77.<n>.1, .2, ... and the links between them. `random` is seeded: a test says which."""

    def __init__(self, *names: str, seed: int = 0) -> None:
        number = next(_numbers)
        self.hosts = [
            Host(f"orch-{os.getpid()}-{number}-{name}", f"10.77.{number % 250}.{i}") for i, name in enumerate(names, 1)
        ]
        self.links = {(a.address, b.address): Link() for a in self.hosts for b in self.hosts if a is not b}
        self.random = random.Random(seed)
        self._wake, self._waker = os.pipe()
        self._thread = threading.Thread(target=self._switch, name="switch", daemon=True)

    def between(self, one: Host, other: Host) -> tuple[Link, Link]:
        """The link from one to the other, and the one back."""
        return self.links[one.address, other.address], self.links[other.address, one.address]

    @contextlib.contextmanager
    def running(self) -> Iterator[Network]:
        try:
            for host in self.hosts:
                host.begin()
            self._thread.start()
            yield self
        finally:
            os.write(self._waker, b"x")
            if self._thread.is_alive():
                self._thread.join(5)
            for host in self.hosts:
                host.end()
            os.close(self._wake)
            os.close(self._waker)

    def _switch(self) -> None:
        by_address = {host.address: host for host in self.hosts}
        by_tun = {host.tun: host for host in self.hosts}
        order = count()
        waiting: list[tuple[float, int, int, bytes]] = []
        while True:
            timeout = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
            ready, _, _ = select.select([self._wake, *by_tun], [], [], timeout)
            if self._wake in ready:
                return
            for tun in ready:
                with contextlib.suppress(BlockingIOError):
                    packet = os.read(tun, 65_536)
                    if packet[0] >> 4 != 4:
                        continue  # only IPv4 is spoken here
                    source, target = (".".join(map(str, packet[i : i + 4])) for i in (12, 16))
                    link = self.links.get((source, target))
                    if link is None or link.cut or self.random.random() < link.loss:
                        continue
                    due = time.monotonic() + link.delay
                    heapq.heappush(waiting, (due, next(order), by_address[target].tun, packet))
            while waiting and waiting[0][0] <= time.monotonic():
                _, _, tun, packet = heapq.heappop(waiting)
                with contextlib.suppress(OSError):  # a full queue loses packets, as queues do
                    os.write(tun, packet)


def namespaces() -> list[str]:
    folder = Path("/run/netns")
    return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
