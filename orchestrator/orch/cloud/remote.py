"""The Flow VM over SSH: commands there, and its port here. All that passes between here and the machines does it so."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from orch.cloud.cluster import SSH_USER
from orch.errors import OrchError, RuntimeLost, UsageError

__all__ = ["Remote", "free_port", "needed_programs"]

CONNECT = 15
"""Seconds."""


def needed_programs() -> None:
    """Raises UsageError if a program is missing that Ray's launcher or this module starts."""
    for program in ("ssh", "ssh-keygen", "rsync"):
        if shutil.which(program) is None:
            raise UsageError(f"run: --cloud aws needs {program}, which is not installed", hint=f"install {program}")


def free_port(wanted: int) -> int:
    """That port on 127.0.0.1, else the next free one."""
    for port in [*range(wanted, min(wanted + 200, 65536)), 0]:
        with contextlib.closing(socket.socket()) as probe:
            with contextlib.suppress(OSError):
                probe.bind(("127.0.0.1", port))
                return int(probe.getsockname()[1])
    raise OrchError("there is no free port on 127.0.0.1")


def _sockets() -> Path:
    """Control sockets have short names: their path has room for about a hundred characters."""
    folder = Path(tempfile.gettempdir()) / f"orch-ssh-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o077 or folder.is_symlink():
        raise OrchError(f"{folder} is not this user's alone", hint="remove it")
    return folder


@dataclass(frozen=True, slots=True)
class Remote:
    """One Flow VM. `folder` is the app's on this machine; the first connection to an instance notes its host key there,
    every later one insists on it."""

    folder: Path
    instance: str
    address: str

    def _options(self) -> list[str]:
        return [
            "-F", "none",
            "-i", str(self.folder / "key"),
            *(word for option in (
                "IdentitiesOnly=yes",
                "BatchMode=yes",
                "StrictHostKeyChecking=accept-new",
                f"UserKnownHostsFile={self.folder / 'known_hosts'}",
                f"HostKeyAlias={self.instance}",
                f"ConnectTimeout={CONNECT}",
                "ServerAliveInterval=5",
                "ServerAliveCountMax=3",
                "ExitOnForwardFailure=yes",
                "LogLevel=ERROR",
                f"ControlPath={self._control}",
            ) for word in ("-o", option)),
        ]  # fmt: skip

    @property
    def _control(self) -> Path:
        name = hashlib.sha256(f"{self.folder} {self.instance} {self.address}".encode()).hexdigest()[:20]
        return _sockets() / name

    @property
    def _target(self) -> str:
        return f"{SSH_USER}@{self.address}"

    def command(self, *words: str) -> list[str]:
        return ["ssh", *self._options(), "-o", "ControlMaster=no", self._target, *words]

    def reachable(self, timeout: float) -> bool:
        """Waits until SSH answers there."""
        deadline = time.monotonic() + timeout
        while True:
            if self._quiet(self.command("true"), timeout=CONNECT + 5).returncode == 0:
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(1)

    def run(self, script: str, *, stdin: bytes | IO[bytes] | None = None, timeout: float = 600.0) -> str:
        """A bash script there; its stdout. Raises RuntimeLost if the machine cannot be reached, OrchError with the last
        line of what it said if it fails."""
        words = self.command("bash", "-c", _quoted(script))
        try:
            if isinstance(stdin, bytes) or stdin is None:
                done = subprocess.run(words, input=stdin or b"", capture_output=True, timeout=timeout)
            else:
                done = subprocess.run(words, stdin=stdin, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise RuntimeLost(f"the Flow VM {self.instance} has not answered in {timeout:.0f} s") from error
        if done.returncode == 0:
            return done.stdout.decode(errors="replace")
        lines = (
            done.stderr.decode(errors="replace").strip() or done.stdout.decode(errors="replace").strip()
        ).splitlines()
        last = lines[-1] if lines else f"exit code {done.returncode}"
        if done.returncode == 255:
            raise RuntimeLost(
                f"the Flow VM {self.instance} ({self.address}) cannot be reached: {last}",
                hint="is this machine online, and the VM up (`orch run --cloud aws` starts it again)?",
            )
        raise OrchError(f"on the Flow VM: {last.removeprefix('orch: ')}")

    # ---- its port here

    def forwarded(self) -> bool:
        """Whether the connection that holds the port is up."""
        if not self._control.exists():
            return False
        return self._quiet(["ssh", *self._options(), "-O", "check", self._target], timeout=10).returncode == 0

    def forward(self, local: int, remote: int) -> None:
        """127.0.0.1:local here is 127.0.0.1:remote there, until `close` or until the network breaks; it outlives this
        process. Raises RuntimeLost."""
        self.close()
        words = ["ssh", *self._options(), "-o", "ControlMaster=yes", "-o", "ControlPersist=no", "-f", "-N", "-T"]
        words += ["-L", f"127.0.0.1:{local}:127.0.0.1:{remote}", self._target]
        log = self.folder / "forward.log"
        with log.open("wb") as file:
            # Not a pipe: the connection lives on, and would hold it open.
            code = subprocess.run(
                words, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, timeout=60
            ).returncode
        if code != 0:
            said = log.read_text(errors="replace").strip().splitlines()
            why = said[-1] if said else f"exit code {code}"
            raise RuntimeLost(f"the port of the Flow VM {self.instance} cannot be forwarded: {why}")

    def close(self) -> None:
        if self._control.exists():
            self._quiet(["ssh", *self._options(), "-O", "exit", self._target], timeout=10)
            # It gives the port back after it has answered, and its socket with it.
            deadline = time.monotonic() + 2.0
            while self._control.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            self._control.unlink(missing_ok=True)

    def _quiet(self, words: Sequence[str], *, timeout: float) -> subprocess.CompletedProcess[bytes]:
        try:
            return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(words, 255, b"", b"no answer in time")


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)
