"""An AWS of a test's own: moto's EC2, IAM, STS, SSM and S3 in a network namespace, and for each RunInstances a machine.

A machine is a set of namespaces (network, processes, mounts) with the private address that moto gave, sshd, a home and
temporary folders of its own, and its profile's credentials at the metadata address; killing its first process is a
power loss. A laptop is another namespace. A bridge joins them, and nothing else: there is no way out, and an address
that is not in the world's own subnets is refused. Needs root (Linux), iproute2, openssh-server, rsync, and moto.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

__all__ = ["Machine", "World", "missing"]

T = TypeVar("T")

HERE = Path(__file__).parent
REPO = HERE.parent.parent
REGION = "us-west-2"
CLOUD = "198.18.0.1"
"""Where this world's AWS answers, and the machines' and the laptop's neighbour."""
LAPTOP = "198.18.0.2"
SUBNETS = tuple(ipaddress.ip_network(net) for net in ("172.31.0.0/16", "198.18.0.0/15"))
"""moto's default VPC, and what its public addresses are taken from (see `ec2_server`)."""
_CLONE_NEWNET = 0x40000000
_numbers = count(1)


def missing() -> str:
    """Why there can be no such world here; empty if there can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    for program, package in (
        ("ip", "iproute2"),
        ("rsync", "rsync"),
        ("ssh", "openssh-client"),
        ("unshare", "util-linux"),
    ):
        if shutil.which(program) is None:
            return f"there is no {program} command ({package})"
    if not Path("/usr/sbin/sshd").exists():
        return "there is no sshd (openssh-server)"
    for module in ("moto", "ray", "boto3"):
        try:
            __import__(module)
        except ImportError:
            return f"{module} is not installed"
    return ""


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def own(address: str) -> str:
    """The address, if it is the world's own. Raises ValueError."""
    if not any(ipaddress.ip_address(address) in net for net in SUBNETS):
        raise ValueError(f"{address} is not an address of this world")
    return address


@dataclass
class Place:
    """A network namespace on the bridge."""

    name: str
    port: str
    """Its end of the cable at the bridge: down means that the link is cut."""

    def command(self, *words: str) -> list[str]:
        return ["ip", "netns", "exec", self.name, *words]


@dataclass
class Machine(Place):
    instance: str
    private: str
    public: str
    folder: Path
    process: subprocess.Popen[bytes] | None = None
    inner: int = 0

    def run(self, *words: str, user: str = "root", check: bool = True, timeout: float = 60) -> str:
        """A command in the machine, as if typed there."""
        done = subprocess.run(
            ["nsenter", f"--target={self.inner}", "--all", "--", "runuser", "-u", user, "--", *words],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        if check and done.returncode != 0:
            raise RuntimeError(f"{self.instance}: {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout


@dataclass
class World:
    """`folder` holds the world's logs and the laptop's home. `machine_env` is the environment of every SSH session."""

    folder: Path
    image: tuple[Path, ...] = ()
    machine_env: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._mark = f"{os.getpid() % 100_000}x{next(_numbers)}"
        self._bridge = f"ob{self._mark}"
        self.cloud = Place(f"orch-aws-{self._mark}", "")
        self.laptop = Place(f"orch-laptop-{self._mark}", f"ol{self._mark}")
        self.machines: dict[str, Machine] = {}
        self._refused: set[str] = set()
        self._server: subprocess.Popen[bytes] | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="ec2", daemon=True)
        self._pool: ThreadPoolExecutor | None = None
        self.trouble: list[str] = []
        self.endpoint = f"http://{CLOUD}:80"
        self.requests = self.folder / "requests.jsonl"

    # ---- as a whole -------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def running(self) -> Iterator[World]:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.requests.touch()
        try:
            self._begin()
            yield self
        finally:
            self._end()

    def _begin(self) -> None:
        _ip("netns", "add", self.cloud.name)
        for words in (
            ("link", "set", "lo", "up"),
            ("link", "add", self._bridge, "type", "bridge"),
            ("link", "set", self._bridge, "up"),
            ("addr", "add", f"{CLOUD}/15", "dev", self._bridge),
            ("addr", "add", "169.254.169.254/32", "dev", self._bridge),
            ("route", "add", "172.31.0.0/16", "dev", self._bridge),
        ):
            _ip("-n", self.cloud.name, *words)
        self._join(self.laptop, [f"{LAPTOP}/15"], [])
        with open(self.folder / "aws.log", "ab") as log:
            self._server = subprocess.Popen(
                self.cloud.command(sys.executable, str(HERE / "ec2_server.py"), "80", str(self.requests)),
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aws", initializer=self._enter)
        deadline = time.monotonic() + 60
        while True:
            try:
                self.call(lambda: self.client("ec2").describe_vpcs())
                break
            except Exception:
                if self._server.poll() is not None or time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self._thread.start()

    def _end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join(30)
        for machine in list(self.machines.values()):
            self._power_off(machine)
        if self._pool is not None:
            self._pool.shutdown()
        if self._server is not None and self._server.poll() is None:
            os.killpg(self._server.pid, signal.SIGKILL)
            self._server.wait()
        for place in (self.laptop, self.cloud):
            done = subprocess.run(["ip", "netns", "pids", place.name], capture_output=True, text=True)
            for pid in done.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            with contextlib.suppress(RuntimeError):
                _ip("netns", "del", place.name)

    def _join(self, place: Place, addresses: list[str], routes: list[str]) -> None:
        """A namespace with a cable to the bridge."""
        for address in addresses:
            own(address.partition("/")[0])
        _ip("netns", "add", place.name)
        _ip(
            "-n", self.cloud.name, "link", "add", place.port, "type", "veth",
            "peer", "name", "eth0", "netns", place.name,
        )  # fmt: skip
        _ip("-n", self.cloud.name, "link", "set", place.port, "master", self._bridge, "up")
        _ip("-n", place.name, "link", "set", "lo", "up")
        _ip("-n", place.name, "link", "set", "eth0", "up")
        for address in addresses:
            _ip("-n", place.name, "addr", "add", address, "dev", "eth0")
        for route in routes:
            _ip("-n", place.name, "route", "add", route, "dev", "eth0")

    def cut(self, place: Place, off: bool = True) -> None:
        """Pulls the cable of a place, or puts it back."""
        _ip("-n", self.cloud.name, "link", "set", place.port, "down" if off else "up")

    # ---- its AWS ----------------------------------------------------------------------------------------------------

    def _enter(self) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        with open(f"/run/netns/{self.cloud.name}") as namespace:
            if libc.setns(namespace.fileno(), _CLONE_NEWNET) != 0:
                raise OSError(ctypes.get_errno(), f"setns to {self.cloud.name}")

    def call(self, function: Callable[[], T]) -> T:
        """Runs it in a thread that lives beside the AWS."""
        assert self._pool is not None
        return self._pool.submit(function).result()

    def client(self, service: str) -> Any:
        import boto3

        session = boto3.session.Session(
            aws_access_key_id="AKIAROOTROOTROOTROOT", aws_secret_access_key="root", region_name=REGION
        )
        return session.client(service, endpoint_url=f"http://{CLOUD}:80")

    def aws(self, service: str, action: str, **words: Any) -> dict[str, Any]:
        """One call by the account's owner."""
        return dict(self.call(lambda: getattr(self.client(service), action)(**words)))

    def instances(self, *states: str) -> list[dict[str, Any]]:
        answer = self.aws("ec2", "describe_instances")
        found = [one for reservation in answer["Reservations"] for one in reservation["Instances"]]
        return [one for one in found if not states or one["State"]["Name"] in states]

    def asked(self) -> list[dict[str, str]]:
        """Every signed request so far: from, key, service, action."""
        return [line for line in self._told() if "action" in line]

    def role_of(self, key: str) -> str:
        """The role whose credentials, as a machine got them, these are; empty if it is none."""
        return next((line["role"] for line in self._told() if line.get("session") == key), "")

    def _told(self) -> list[dict[str, str]]:
        return [json.loads(line) for line in self.requests.read_text().splitlines()]

    # ---- its machines -----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Makes and ends machines as the EC2 says."""
        while not self._stop.wait(0.2):
            try:
                alive = {one["InstanceId"]: one for one in self.instances("pending", "running")}
                for gone in [machine for name, machine in self.machines.items() if name not in alive]:
                    self._power_off(gone)
                for name, one in alive.items():
                    if name not in self.machines and name not in self._refused:
                        self._refused.add(name)
                        self.machines[name] = self._power_on(one)
            except Exception as error:
                self.trouble.append(repr(error))

    def _power_on(self, one: dict[str, Any]) -> Machine:
        number = next(_numbers)
        name = one["InstanceId"]
        folder = self.folder / name
        folder.mkdir()
        machine = Machine(
            f"orch-{name}",
            f"om{self._mark}n{number}"[:15],
            name,
            one["PrivateIpAddress"],
            one["PublicIpAddress"],
            folder,
        )
        addresses = [f"{machine.private}/16", f"{machine.public}/32"]
        self._join(machine, addresses, ["198.18.0.0/15", "169.254.169.254/32"])
        attribute = self.aws("ec2", "describe_instance_attribute", InstanceId=name, Attribute="userData")
        import base64

        data = base64.b64decode(attribute["UserData"].get("Value", "")).decode()
        (folder / "user-data").write_text(data)
        key = ""
        if "KeyName" in one:
            found = self.aws("ec2", "describe_key_pairs", KeyNames=[one["KeyName"]], IncludePublicKey=True)
            key = found["KeyPairs"][0].get("PublicKey", "")
        (folder / "key").write_text(key)
        env = {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_REGION": REGION,
            **self.machine_env,
        }
        (folder / "env").write_text(" ".join(f"{name}={value}" for name, value in env.items()))
        (folder / "image").write_text("\n".join(str(path) for path in self.image))
        with open(folder / "console", "ab") as console:
            # --kill-child: the first process ends with this one, and with the first process all others.
            machine.process = subprocess.Popen(
                machine.command(
                    "unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc",
                    "bash", str(HERE / "ec2_machine.sh"), "ip-" + machine.private.replace(".", "-"),
                    *(str(folder / each) for each in ("key", "user-data", "env", "image")),
                ),
                stdout=console, stderr=console, stdin=subprocess.DEVNULL, start_new_session=True,
                env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"},
            )  # fmt: skip
        deadline = time.monotonic() + 30
        while not machine.inner and time.monotonic() < deadline and machine.process.poll() is None:
            machine.inner = _child(machine.process.pid)
            time.sleep(0.02)
        return machine

    def _power_off(self, machine: Machine) -> None:
        """As if the plug were pulled: no process there has a word in it."""
        if machine.process is not None and machine.process.poll() is None:
            if machine.inner:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(machine.inner, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(machine.process.pid, signal.SIGKILL)
            machine.process.wait()
        with contextlib.suppress(RuntimeError):
            _ip("netns", "del", machine.name)
        self.machines.pop(machine.instance, None)

    def kill(self, machine: Machine) -> None:
        """Power loss: EC2 goes on calling it running, as it does for minutes."""
        assert machine.process is not None
        os.kill(machine.inner, signal.SIGKILL)
        machine.process.wait()


def _child(pid: int) -> int:
    try:
        words = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return 0
    return int(words[0]) if words else 0
