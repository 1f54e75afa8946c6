"""A plan and what was found or made in the account -> the configuration of a Ray cluster. PURE but for `Facts.of_head`.

One node type for each kind of machine. Each has one custom resource, of which a machine has one and a Work takes one:
so Ray launches a machine for a Work when it is asked for, and gives it back when it has been idle.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orch.cloud.plan import FLOW, Machine, Plan, machine_key

__all__ = ["APP_DIR", "CONFIG_VARIABLE", "ENV", "Found", "Made", "cluster_config", "cluster_name", "facts_of_head"]

ENV = "$HOME/.orch-env"
"""Where orch is installed on a machine, unless its image holds it ready in /opt/orch."""
SHIPPED = "~/.orch-cloud"
APP_DIR = "orch-app"
"""Below the home of the Flow VM."""
CONFIG_VARIABLE = "ORCH_RAY_CONFIG"
"""On the Flow VM: the file by which a server there knows that the cluster is its app's own, and of which machines."""
HEAD_CONFIG = "~/ray_bootstrap_config.yaml"
SSH_USER = "ubuntu"
LINGER = 20.0
"""Seconds for which Ray keeps a machine that its Work has given back (after its idle_timeout, by the engine):
so that a Work that is asked for at that moment finds it."""
OBJECT_STORE = 128 * 2**20
"""Bytes: orch moves no objects through Ray, and the memory is the scripts'."""


@dataclass(frozen=True, slots=True)
class Found:
    """One machine image. root: name of its root device; least: GiB that its root disk has at least."""

    ami: str
    root: str
    least: int


@dataclass(frozen=True, slots=True)
class Made:
    """What the account holds for this app."""

    key_pair: str
    private_key: Path
    security_group: str
    flow_profile: str
    work_profile: str
    images: Mapping[str, Found]
    """By the name of the plan's image."""
    token: Path
    """File with the Ray cluster's token."""
    shipped: Path
    """Folder that every machine gets: orch itself, and what sets a machine up."""
    subnets: tuple[str, ...] = ()


def cluster_name(slug: str) -> str:
    return f"orch-{slug}"


def cluster_config(plan: Plan, made: Made) -> dict[str, Any]:
    """As `ray up` takes it."""
    types = {FLOW: _node(plan, made, plan.flow, made.flow_profile, resources={"CPU": 0}, workers=0)}
    for machine in plan.machines:
        resources = {machine.key: 1}
        if machine.kind is not None:
            resources |= {"CPU": machine.kind.vcpus}
            resources |= {"GPU": machine.kind.gpus} if machine.kind.gpus else {}
        node = _node(plan, made, machine, made.work_profile, resources=resources, workers=machine.limit)
        types[_node_name(machine)] = {**node, "idle_timeout_s": LINGER}
    env = 'export PATH="$(cat ~/.orch-path)/bin:$PATH" RAY_AUTH_MODE=token'
    start = f"--object-store-memory={OBJECT_STORE} --disable-usage-stats --include-log-monitor=false"
    return {
        "cluster_name": cluster_name(plan.slug),
        "max_workers": sum(machine.limit for machine in plan.machines),
        # A Work waits for its machine: nothing is gained by launching some of them first.
        "upscaling_speed": 1000,
        "provider": {"type": "aws", "region": plan.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": SSH_USER, "ssh_private_key": str(made.private_key)},
        "head_node_type": FLOW,
        "available_node_types": types,
        "file_mounts": {"~/.ray/auth_token": str(made.token), SHIPPED: str(made.shipped)},
        "initialization_commands": [],
        "setup_commands": [f"bash {SHIPPED}/setup.sh"],
        "head_setup_commands": [],
        "worker_setup_commands": [],
        "head_start_ray_commands": [
            f"{env}; ray stop",
            f"{env}; ulimit -n 65536; ray start --head --port=6379 --include-dashboard=false "
            f"--autoscaling-config={HEAD_CONFIG} {start}",
        ],
        "worker_start_ray_commands": [
            f"{env}; ray stop",
            f"{env}; ulimit -n 65536; ray start --address=$RAY_HEAD_IP:6379 {start}",
        ],
    }


def _node_name(machine: Machine) -> str:
    return machine.key.removeprefix("orch_")


def _node(
    plan: Plan, made: Made, machine: Machine, profile: str, *, resources: dict[str, int], workers: int
) -> dict[str, Any]:
    image = made.images[machine.image.name]
    name = f"{cluster_name(plan.slug)} {_node_name(machine)}"
    config: dict[str, Any] = {
        "InstanceType": machine.instance_type,
        "ImageId": image.ami,
        "KeyName": made.key_pair,
        "SecurityGroupIds": [made.security_group],
        "IamInstanceProfile": {"Arn": profile},
        "BlockDeviceMappings": [
            {
                "DeviceName": image.root,
                "Ebs": {
                    "VolumeSize": max(machine.disk, image.least),
                    "VolumeType": "gp3",
                    "DeleteOnTermination": True,
                    "Encrypted": True,
                },
            }
        ],
        # Scripts reach the metadata service too: by version 2 only, which a proxied request cannot speak.
        "MetadataOptions": {"HttpTokens": "required", "HttpPutResponseHopLimit": 1},
        "TagSpecifications": [
            {
                "ResourceType": "volume",
                "Tags": [{"Key": "Name", "Value": name}, {"Key": "orch-app", "Value": plan.slug}],
            }
        ],
    }
    if made.subnets:
        config["SubnetIds"] = list(made.subnets)
    if machine.spot:
        config["InstanceMarketOptions"] = {
            "MarketType": "spot",
            "SpotOptions": {"SpotInstanceType": "one-time", "InstanceInterruptionBehavior": "terminate"},
        }
    if machine.shm is not None:
        config["UserData"] = f"#!/bin/bash\nmount -o remount,size={int(machine.shm * 1024)}m /dev/shm\n"
    return {"resources": resources, "min_workers": 0, "max_workers": workers, "node_config": config}


def facts_of_head(
    environ: Mapping[str, str] = os.environ,
) -> tuple[Callable[[Mapping[str, Any]], str], Sequence[Mapping[str, float]]] | None:
    """For a server that places Works on a Ray cluster: which resource stands for the machine of a CloudCompute, and
    what each kind of machine that may be launched has. None: the cluster is not one that orch has made."""
    path = environ.get(CONFIG_VARIABLE)
    if not path:
        return None
    import yaml

    config = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    types: Mapping[str, Any] = config["available_node_types"]
    offered = [
        {resource: float(amount) for resource, amount in kind["resources"].items()}
        for kind in types.values()
        if kind.get("max_workers")
    ]
    return machine_key, offered
