"""An app onto AWS, back to it, and off again. What is said on the way goes to `say`; the command line is `cli.cloud`.

What can be asked without cost comes first, what costs comes last; everything that is made is found again by its name or
tag, so that a start that was interrupted is gone on with by the next one, or taken down.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import ipaddress
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orch.app import App
from orch.cloud.apps import CloudApp, find_app, remember
from orch.cloud.aws import Account, CloudError, explained_text
from orch.cloud.cluster import Found, Made, cluster_config, cluster_name
from orch.cloud.plan import FLOW, Image, Plan, make_plan
from orch.cloud.policies import flow_prefix
from orch.cloud.remote import Remote, free_port
from orch.cloud.wheel import build_wheel
from orch.errors import OrchError, RuntimeLost, UsageError
from orch.paths import write_atomic
from orch.program import Program

__all__ = ["Reached", "bring_up", "caller", "find_app", "plan_of", "reach", "start_app", "take_down"]

Say = Callable[[str], None]

UV = "0.9.30"
CPU_IMAGE = Image(
    "Ubuntu 24.04 LTS", parameter="/aws/service/canonical/ubuntu/server/24.04/stable/current/amd64/hvm/ebs-gp3/ami-id"
)
GPU_IMAGE = Image(
    "AWS Deep Learning Base, Ubuntu 24.04",
    parameter="/aws/service/deeplearning/ami/x86_64/base-oss-nvidia-driver-gpu-ubuntu-24.04/latest/ami-id",
)
CHECK_IP = "https://checkip.amazonaws.com"
PYTHON = 'cd; exec "$(cat ~/.orch-path)/bin/python" -P'


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan_of(
    app: App,
    app_file: Path,
    *,
    name: str | None,
    drive: str | None,
    region: str,
    environ: Mapping[str, str] = os.environ,
) -> Plan:
    """What the app needs of AWS. Nothing is asked, nothing is made. Raises UsageError."""
    if drive is not None and not drive.startswith("s3://"):
        raise UsageError(f"run: --drive {drive} is out of the machines' reach", hint="--drive s3://bucket/prefix")
    try:
        ray = importlib.metadata.version("ray")
    except importlib.metadata.PackageNotFoundError:
        raise UsageError("run: --cloud aws needs ray, which is not installed", hint="pip install 'orch[aws]'") from None
    computes = [(spec.name, spec.compute) for spec in Program(app.root).specs() if not spec.hidden]
    requirements = app_file.parent / "requirements.txt"
    return make_plan(
        name or app.name or app_file.parent.name,
        computes,
        region=region,
        ray=ray,
        python=f"{sys.version_info[0]}.{sys.version_info[1]}",
        cpu_image=_image(environ.get("ORCH_AWS_IMAGE"), CPU_IMAGE),
        gpu_image=_image(environ.get("ORCH_AWS_GPU_IMAGE") or environ.get("ORCH_AWS_IMAGE"), GPU_IMAGE),
        flow_type=environ.get("ORCH_AWS_FLOW_TYPE") or "m6i.large",
        drive=drive,
        requirements=requirements.name if requirements.is_file() else None,
    )


def _image(ami: str | None, default: Image) -> Image:
    return Image("own image", ami=ami) if ami else default


# ---- up ------------------------------------------------------------------------------------------------------------


def bring_up(plan: Plan, app_file: Path, account: Account, say: Say) -> CloudApp:
    """The Flow VM is up and has a living Ray; its record is written. The app is not started yet."""
    number, partition = account.who()
    say(f"AWS account {number}, region {plan.region}")
    app = find_app(plan.name)
    cluster = cluster_name(plan.slug)
    if app is None:
        if account.instances(cluster):
            raise UsageError(
                f"there is an app {plan.slug} in this account and region already, started from another machine",
                hint="choose another --name, or end it from there",
            )
        app = _new(plan, app_file, number, partition, account)
    elif (app.account, app.region) != (number, plan.region):
        raise UsageError(
            f"{app.name} lives in account {app.account}, region {app.region}, not here ({number}, {plan.region})",
            hint=f"set AWS_PROFILE and AWS_REGION as then, choose another --name, or `orch down {app.slug} --purge`",
        )
    app = remember(app, name=plan.name, app_file=str(app_file))
    if plan.drive is None and account.make_bucket(app.bucket):
        say(f"made the bucket {app.bucket}")
    app, made = _make(plan, app, account, say)
    config = cluster_config(plan, made)
    digest = hashlib.sha256(
        json.dumps(config, sort_keys=True).encode() + (made.shipped / "wanted").read_bytes()
    ).hexdigest()
    config_file = app.folder / "cluster.json"
    write_atomic(config_file, json.dumps(config, indent=1).encode())
    there = {one["InstanceId"]: one for one in account.instances(cluster)}
    flow = there.get(app.flow)
    if flow is not None:
        found = _look(_remote(app, flow))
        if found.get("serving"):
            raise UsageError(
                f"{app.name} is already running on AWS: Flow VM {app.flow}, pid {found['pid']}",
                hint=f"`orch open --app {app.slug}` shows it, `orch stop --app {app.slug}` ends it",
            )
        if digest == app.config and found.get("ray"):
            say(f"the Flow VM {app.flow} is up as it shall be")
            return app
    # A new Ray on the Flow VM knows none of the Work VMs that the old one had.
    stale = [name for name, one in there.items() if not _is_flow(one)]
    if stale:
        account.terminate(stale)
        say(f"ending {len(stale)} Work VMs of the Flow VM that was")
    account.await_launchable(config["available_node_types"][FLOW]["node_config"], say)
    _launch(config_file, app.log, say)
    flows = [one["InstanceId"] for one in account.instances(cluster, "running") if _is_flow(one)]
    if len(flows) != 1:
        raise CloudError(f"there are {len(flows)} Flow VMs instead of one", hint=f"`orch down {app.slug}`, then again")
    return remember(app, flow=flows[0], config=digest)


def _new(plan: Plan, app_file: Path, number: str, partition: str, account: Account) -> CloudApp:
    drive = plan.drive or f"s3://{account.bucket()}/{plan.slug}"
    bucket, _, prefix = drive.removeprefix("s3://").rstrip("/").partition("/")
    return CloudApp(
        name=plan.name,
        slug=plan.slug,
        region=plan.region,
        account=number,
        partition=partition,
        bucket=bucket,
        prefix=prefix,
        drive=drive,
        app_file=str(app_file),
    )


def _make(plan: Plan, app: CloudApp, account: Account, say: Say) -> tuple[CloudApp, Made]:
    """What the machines need around them, and on this machine what they are sent."""
    images = {name: Found(ami, root, least) for name, ami, root, least in app.images}
    for image in {plan.flow.image, *(machine.image for machine in plan.machines if machine.wanted)}:
        if image.name not in images or (image.ami and images[image.name].ami != image.ami):
            images[image.name] = account.find_image(image)
            say(f"image {image.name}: {images[image.name].ami}")
    for machine in plan.machines:
        images.setdefault(machine.image.name, images[plan.flow.image.name])
    app = remember(app, images=tuple((name, one.ami, one.root, one.least) for name, one in images.items()))
    flow_profile, work_profile = account.make_roles(app.slug, app.bucket, app.prefix)
    if any(machine.spot for machine in plan.machines):
        account.make_spot_role()
    if not app.key.exists():
        words = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", f"orch {app.slug}", "-f", str(app.key)]
        subprocess.run(words, check=True, capture_output=True)
    key_pair = cluster_name(app.slug)
    account.make_key_pair(key_pair, app.key.with_suffix(".pub").read_text())
    if not app.ray_token.exists():
        write_atomic(app.ray_token, secrets.token_hex(32).encode())
    subnets = tuple(filter(None, os.environ.get("ORCH_AWS_SUBNETS", "").split(",")))
    group = account.make_security_group(app.slug, account.network(subnets), caller())
    made = Made(
        key_pair=key_pair,
        private_key=app.key,
        security_group=group,
        flow_profile=flow_profile,
        work_profile=work_profile,
        images=images,
        token=app.ray_token,
        shipped=_shipped(plan, app),
        subnets=subnets,
    )
    return app, made


def caller(environ: Mapping[str, str] = os.environ, url: str = CHECK_IP) -> str:
    """The address that this machine has for AWS, as a CIDR: ORCH_AWS_SSH_FROM, else asked of AWS. Raises UsageError."""
    text = environ.get("ORCH_AWS_SSH_FROM")
    try:
        if text is None:
            with urllib.request.urlopen(url, timeout=10) as answer:
                text = answer.read(100).decode().strip()
        return str(ipaddress.IPv4Network(text))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"run: it cannot be told which address may reach the machines ({error})",
            hint="set ORCH_AWS_SSH_FROM to this machine's public address, for example 203.0.113.7/32",
        ) from error


def _shipped(plan: Plan, app: CloudApp) -> Path:
    """The folder that every machine gets: small, without secrets, the same bytes for the same orch and requirements."""
    folder = app.folder / "shipped"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o700)
    wheel = build_wheel(folder)
    shutil.copyfile(Path(__file__).with_name("setup.sh"), folder / "setup.sh")
    if plan.requirements is not None:
        shutil.copyfile(Path(app.app_file).with_name(plan.requirements), folder / "requirements.txt")
    parts = [path.read_bytes() for path in sorted(folder.iterdir())]
    stamp = hashlib.sha256(b"".join([*parts, plan.ray.encode(), plan.python.encode()])).hexdigest()
    values = {
        "orch": importlib.metadata.version("orch"),
        "ray": plan.ray,
        "python": plan.python,
        "uv": UV,
        "wheel": wheel.name,
        "stamp": stamp,
    }
    (folder / "wanted").write_text("".join(f"{name}={value}\n" for name, value in values.items()))
    return folder


def _launch(config_file: Path, log: Path, say: Say) -> None:
    """`ray up`. Raises CloudError with AWS's own words, else with the last line of its log."""
    read, write = os.pipe()
    with log.open("wb") as file:
        os.chmod(log, 0o600)
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "orch.cloud.launcher", str(config_file), str(write)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            pass_fds=(write,),
            start_new_session=True,
        )
    os.close(write)
    error = ""
    try:
        with os.fdopen(read, encoding="utf-8") as lines:
            last = ""
            for line in lines:
                told = json.loads(line)
                error = told.get("error", error)
                if told.get("step", last) != last:
                    last = told["step"]
                    say(last)
        code = child.wait()
    except BaseException:
        os.killpg(child.pid, signal.SIGTERM)  # with the ssh and rsync that it has started
        child.wait()
        raise
    if code != 0:
        text = log.read_text(errors="replace")
        known = explained_text(text)
        if known is not None:
            raise known
        lines_said = [line.strip() for line in text.splitlines() if line.strip()]
        raise CloudError(
            f"the Flow VM could not be set up: {error or (lines_said[-1] if lines_said else f'exit code {code}')}",
            hint=f"{log} has all of it",
        )


def _is_flow(instance: Mapping[str, Any]) -> bool:
    return {"Key": "ray-node-type", "Value": "head"} in instance.get("Tags", [])


def _remote(app: CloudApp, instance: Mapping[str, Any]) -> Remote:
    return Remote(app.folder, instance["InstanceId"], instance.get("PublicIpAddress") or instance["PrivateIpAddress"])


def _look(remote: Remote) -> dict[str, Any]:
    """What lives on the Flow VM; nothing, if it cannot be asked."""
    try:
        return _head(remote, "look", timeout=90.0)
    except OrchError:
        return {}


def _head(remote: Remote, verb: str, *, stdin: Any = None, timeout: float) -> dict[str, Any]:
    said = remote.run(f"{PYTHON} -m orch.cli.cloud_head {verb}", stdin=stdin, timeout=timeout)
    return dict(json.loads(said.strip().splitlines()[-1]))


# ---- the app -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Reached:
    """An app, and where it is shown on this machine."""

    app: CloudApp
    remote: Remote
    url: str


def start_app(
    app: CloudApp, account: Account, app_dir: Path, wanted: Mapping[str, Any], say: Say, *, port: int = 0
) -> Reached:
    """Sends the folder and starts the app on the Flow VM. `wanted`: the options of `orch run` there, in JSON;
    port: where it shall be shown on this machine, 0: where it was, or where the Flow VM has it."""
    from orch.runtimes.pack import pack

    remote = _flow(app, account)
    say("sending the app's folder")
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "app.zip"
        pack(app_dir, package, "app")
        stream = tempfile.TemporaryFile()
        with stream:
            backup = f"s3://{app.bucket}/{flow_prefix(app.prefix)}"
            given = {**wanted, "drive": app.drive, "region": app.region, "backup": backup}
            stream.write(json.dumps(given).encode() + b"\n")
            with package.open("rb") as file:
                shutil.copyfileobj(file, stream)
            stream.flush()
            stream.seek(0)
            say("starting the app on the Flow VM")
            found = _head(remote, "start", stdin=stream, timeout=900.0)
    app = remember(
        app, remote_port=found["port"], app_token=found["token"], local_port=port or app.local_port, started=time.time()
    )
    return _forward(app, remote)


def _flow(app: CloudApp, account: Account) -> Remote:
    """The Flow VM, where it is now. Raises UsageError if there is none, RuntimeLost if it does not answer."""
    found = [one for one in account.instances(cluster_name(app.slug), "running") if one["InstanceId"] == app.flow]
    if not found:
        raise UsageError(
            f"{app.name} has no Flow VM in {app.region}",
            hint=f"`orch run {app.app_file} --cloud aws --name {app.slug}` makes one, and goes on where it can",
        )
    remote = _remote(app, found[0])
    if not remote.reachable(0):
        # Perhaps this machine is in another network than before.
        account.admit(app.slug, str(found[0]["VpcId"]), caller())
        if not remote.reachable(30):
            raise RuntimeLost(
                f"the Flow VM {app.flow} of {app.name} runs and does not answer",
                hint="try again; if it stays so, `orch run --cloud aws` sets it up anew",
            )
    return remote


def _forward(app: CloudApp, remote: Remote) -> Reached:
    remote.close()
    port = free_port(app.local_port or app.remote_port)
    remote.forward(port, app.remote_port)
    app = remember(app, local_port=port, address=remote.address)
    return Reached(app, remote, f"http://127.0.0.1:{port}")


def reach(app: CloudApp) -> Reached:
    """The app from this machine, its port forwarded (again). Raises UsageError, RuntimeLost."""
    if not app.flow or not app.remote_port:
        raise UsageError(f"{app.name} is not running on AWS", hint=f"`orch run --cloud aws --name {app.slug}`")
    remote = Remote(app.folder, app.flow, app.address)
    if app.address and remote.forwarded():
        from orch.client import Client

        with Client(f"http://127.0.0.1:{app.local_port}", app.app_token) as client:
            if client.alive():
                return Reached(app, remote, client.url)
    remote = _flow(app, Account(app.region))
    found = _head(remote, "look", timeout=90.0)
    if not found["serving"]:
        raise UsageError(
            f"{app.name} has ended; its Flow VM {app.flow} is still up",
            hint=f"`orch run --cloud aws --name {app.slug}` starts it again, `orch down {app.slug}` removes the VM",
        )
    return _forward(remember(app, remote_port=found["port"], app_token=found["token"]), remote)


# ---- down ----------------------------------------------------------------------------------------------------------


def take_down(app: CloudApp, say: Say, *, purge: bool = False) -> None:
    """Every machine of the app is ended; with `purge` what is made around them, too. The Drive's files stay. Raises
    OrchError if EC2 leaves one."""
    account = Account(app.region)
    number, _ = account.who()
    if number != app.account:
        raise UsageError(f"{app.name} lives in account {app.account}, not in {number}", hint="set AWS_PROFILE as then")
    if app.address:
        Remote(app.folder, app.flow, app.address).close()
    left = account.await_gone(cluster_name(app.slug), said=say)
    if left:
        raise CloudError(f"EC2 has not ended {', '.join(left)} yet", hint=f"`orch down {app.slug}` looks again")
    say(f"{app.name}: no VM is left")
    app = remember(app, flow="", address="", config="", remote_port=0, app_token="")
    where = f"{app.bucket}/{app.prefix}".rstrip("/")
    if purge:
        for line in account.remove(app.slug, cluster_name(app.slug)):
            say(f"removed: {line}")
        app.forget()
    else:
        flow, work = account.role_names(app.slug)
        say(f"what remains costs nothing: the roles {flow} and {work}, the key pair and the security group")
        say(f"`orch down {app.slug} --purge` removes them")
    say(f"the Drive remains, and its storage costs: s3://{where} (aws s3 rm --recursive s3://{where} removes it)")
