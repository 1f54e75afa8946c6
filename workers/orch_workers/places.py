"""Where the works of a machine live: ports, and who listens on them."""

from __future__ import annotations

import asyncio
import os
import random
import socket
from collections.abc import Container, Iterable
from pathlib import Path

__all__ = ["accepts", "address_of", "answers", "free_port", "is_loopback", "listens", "machine_address"]

_LOWEST = 10_240
_LISTEN = "0A"
"""A listening socket's state in /proc/net/tcp."""
_PATIENCE = 0.02
"""Seconds for a connection on this machine; a busy kernel does not answer within the call."""


def is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def machine_address() -> str:
    """The address under which other machines reach this one: that of the interface which leads outside."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # TEST-NET-1; a UDP connect sends nothing
        except OSError:
            return "127.0.0.1"
        return str(probe.getsockname()[0])


def address_of(bind: str) -> str:
    """Where others reach what listens on `bind`."""
    return machine_address() if bind in ("0.0.0.0", "") else bind


def free_port(taken: Container[int], host: str = "") -> int:
    """A TCP port that nobody listens on and that is not in `taken`.

    It lies below the ephemeral range: there no outgoing connection can sit on it between now and the moment, perhaps
    hours later, when a script binds it. Raises OSError if all are taken."""
    try:
        highest = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError):
        highest = 32_768
    highest = max(highest, _LOWEST + 1_000)
    first = random.randrange(_LOWEST, highest)
    port: int
    for port in (*range(first, highest), *range(_LOWEST, first)):
        if port not in taken and _can_bind(host, port):
            return port
    raise OSError(f"no free TCP port between {_LOWEST} and {highest}")


def _can_bind(host: str, port: int) -> bool:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
        return True


def accepts(host: str, port: int) -> bool:
    """Whether somebody listens there, on this machine: loopback answers in 20 us (reading /proc/net/tcp, which would
    serve all ports at once, costs as much as 300 of these)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.settimeout(_PATIENCE)
        return probe.connect_ex((_target(host), port)) == 0


def listens(port: int, pids: Iterable[int]) -> bool:
    """Whether one of these processes is who listens on the port; True where that cannot be seen (not on Linux).

    A socket of root's counts for everybody: container engines listen in the name of what they run.
    """
    listening: set[str] = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            rows = Path(table).read_text().splitlines()[1:]
        except OSError:
            continue
        for row in rows:
            _, local, _, state, _, _, _, uid, _, inode, *_ = row.split()
            if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
                if uid == "0" != str(os.getuid()):
                    return True
                listening.add(f"socket:[{inode}]")
    if not listening:
        return not os.path.exists("/proc/net/tcp")
    for pid in pids:
        try:
            descriptors = os.listdir(f"/proc/{pid}/fd")
        except OSError:  # ended, or another user's
            continue
        for descriptor in descriptors:
            try:
                if os.readlink(f"/proc/{pid}/fd/{descriptor}") in listening:
                    return True
            except OSError:  # closed meanwhile
                continue
    return False


async def answers(host: str, port: int, path: str, timeout: float = 2.0) -> bool:
    """Whether a GET of `path` there has an answer with a status below 500."""
    target = _target(host)
    try:
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(target, port)
            try:
                writer.write(
                    f"GET {path} HTTP/1.1\r\nHost: {target}:{port}\r\nUser-Agent: orch-health\r\n"
                    "Accept: */*\r\nConnection: close\r\n\r\n".encode("ascii")
                )
                status_line = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    parts = status_line.split(None, 2)
    return len(parts) > 1 and parts[0].startswith(b"HTTP/") and parts[1].isdigit() and int(parts[1]) < 500


def _target(host: str) -> str:
    return "127.0.0.1" if host in ("0.0.0.0", "localhost", "") else host
