"""What an app needs of AWS: its declared computes -> the machines, before anything is asked for or spent. PURE.

A plan is shown (`orch run --cloud aws --dry-run`), then made into the configuration of a Ray cluster (`cluster`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orch.cloud.prices import AS_OF, DISK_MONTH, NAMES, REGIONS, TYPES, Kind, price
from orch.errors import UsageError

__all__ = ["FLOW", "Image", "Machine", "Plan", "describe", "machine_key", "make_plan", "slug"]

FLOW = "flow"
"""The node type of the Flow VM."""
SPARE = 8
"""How many more machines of a kind may be launched than the app declares when it is loaded: Works made while it runs,
and the replacement of one that is lost before EC2 knows of it."""
IDLE = 60.0
"""Seconds for which a Work keeps its machine after it has ended, unless its compute says another time: the engine's."""
CPU_DISK, GPU_DISK = 50, 150
HOURS_A_MONTH = 730

_SLUG = re.compile(r"[^a-z0-9]+")
_ANY_TYPE = re.compile(r"[a-z][a-z0-9-]*\.[a-z0-9-]+")


@dataclass(frozen=True, slots=True)
class Image:
    """A machine image: a fixed one, or the public parameter under which its newest one is published."""

    name: str
    """For people."""
    ami: str = ""
    parameter: str = ""


@dataclass(frozen=True, slots=True)
class Machine:
    """One kind of machine. memory and disk: GiB; idle: seconds; price: dollars an hour, None: unknown."""

    key: str
    instance_type: str
    kind: Kind | None
    """None: a type that orch does not know; Ray asks EC2 for its CPUs and memory."""
    spot: bool
    disk: int
    shm: float | None
    idle: float
    price: float | None
    image: Image
    works: tuple[str, ...] = ()
    wanted: int = 0
    """How many the app's Works need together when all of them run."""

    @property
    def limit(self) -> int:
        return self.wanted + SPARE


@dataclass(frozen=True, slots=True)
class Plan:
    name: str
    slug: str
    region: str
    drive: str | None
    """None: below the app's own prefix of the account's bucket."""
    flow: Machine
    machines: tuple[Machine, ...]
    ray: str
    python: str
    requirements: str | None
    """The file whose packages every machine gets."""


def slug(name: str) -> str:
    """The app's name as AWS takes it. Raises UsageError."""
    made = _SLUG.sub("-", name.lower()).strip("-")[:32].strip("-")
    if not made:
        raise UsageError(f"the app's name {name!r} holds no letter or digit of a-z, 0-9", hint="give another --name")
    return made


def machine_key(compute: Mapping[str, Any]) -> str:
    """The custom resource of which each machine for such a CloudCompute (its fields) has one.

    Two computes have the same key if the same machine is right for both; how many a Work wants is no part of it.
    """
    fields = {name: value for name, value in compute.items() if value not in (None, False)}
    fields.pop("count", None)
    name = str(fields.pop("name", "cpu"))
    readable = "orch_" + re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")
    if not fields and name in NAMES:
        return readable
    digest = hashlib.sha256(json.dumps([name, fields], sort_keys=True).encode()).hexdigest()
    return f"{readable}_{digest[:8]}"


def make_plan(
    name: str,
    computes: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    region: str,
    ray: str,
    python: str,
    cpu_image: Image,
    gpu_image: Image,
    flow_type: str = "m6i.large",
    drive: str | None = None,
    requirements: str | None = None,
) -> Plan:
    """computes: each Work's name with the fields of its CloudCompute. Raises UsageError naming the Work.

    The default compute always has a kind of machine, at no cost while none is wanted: for Works that are made later.
    """
    found: dict[str, Machine] = {}
    for work, compute in [("", {"name": "cpu"}), *computes]:
        key = machine_key(compute)
        machine = found.get(key) or _machine(key, work, compute, region, cpu_image, gpu_image)
        if work:
            machine = _with(machine, work, int(compute.get("count") or 1))
        found[key] = machine
    _know(flow_type, "the Flow VM")
    flow = Machine(
        FLOW, flow_type, TYPES.get(flow_type), False, CPU_DISK, None, 0.0, price(flow_type, region), cpu_image
    )
    ordered = tuple(sorted(found.values(), key=lambda machine: machine.key))
    return Plan(name, slug(name), region, drive, flow, ordered, ray, python, requirements)


def _with(machine: Machine, work: str, count: int) -> Machine:
    from dataclasses import replace

    return replace(machine, works=(*machine.works, work), wanted=machine.wanted + count)


def _machine(
    key: str, work: str, compute: Mapping[str, Any], region: str, cpu_image: Image, gpu_image: Image
) -> Machine:
    where = f"the work {work}" if work else "the default compute"
    instance_type = _type(where, compute)
    kind = TYPES.get(instance_type)
    graphic = bool(kind.gpus if kind is not None else compute.get("gpus") or instance_type[0] in "gp")
    disk = compute.get("disk_size")
    idle = compute.get("idle_timeout")
    return Machine(
        key=key,
        instance_type=instance_type,
        kind=kind,
        spot=bool(compute.get("interruptible")),
        disk=int(-(-disk // 1)) if disk else GPU_DISK if graphic else CPU_DISK,
        shm=compute.get("shm_size"),
        idle=IDLE if idle is None else float(idle),
        price=price(instance_type, region),
        image=gpu_image if graphic else cpu_image,
    )


def _type(where: str, compute: Mapping[str, Any]) -> str:
    """The instance type: the one that is named, made large enough for what is asked if orch chose it."""
    given = compute.get("instance_type")
    name = str(compute.get("name") or "cpu")
    if given is None and name not in NAMES:
        given = name
    if given is not None:
        _know(given, where)
        kind = TYPES.get(given)
        if kind is not None and (lack := _lacks(kind, compute)):
            raise UsageError(f"{where}: {given} has {lack}", hint="choose a larger instance_type")
        return str(given)
    chosen = NAMES[name]
    family = chosen.partition(".")[0]
    larger = [one for one in TYPES if one.partition(".")[0] == family]
    for one in larger[larger.index(chosen) :]:
        if not _lacks(TYPES[one], compute):
            return one
    raise UsageError(
        f"{where}: no machine of {name!r} is large enough: {larger[-1]} has {_lacks(TYPES[larger[-1]], compute)}",
        hint="choose an instance_type",
    )


def _know(instance_type: str, where: str) -> None:
    if instance_type not in TYPES and not _ANY_TYPE.fullmatch(instance_type):
        raise UsageError(
            f"{where}: {instance_type!r} is no name of a compute and no EC2 instance type",
            hint=f"one of {', '.join(NAMES)}, or a type such as m6i.large",
        )


def _lacks(kind: Kind, compute: Mapping[str, Any]) -> str:
    for field, has, unit in (
        ("cpus", kind.vcpus, "vCPUs"),
        ("gpus", kind.gpus, "GPUs"),
        ("memory", kind.memory, "GiB"),
    ):
        wants = compute.get(field)
        if wants is not None and wants > has:
            return f"{has} {unit}, not {wants:g}"
    return ""


# ---- for people ----------------------------------------------------------------------------------------------------


def describe(plan: Plan) -> list[str]:
    """What will be made and what it costs, line by line."""
    lines = [
        f"app          {plan.name}, in AWS region {plan.region}",
        f"drive        {plan.drive or 'an S3 prefix of its own, in the bucket orch-<account>-' + plan.region}",
        f"image        {_image(plan.flow.image)}",
    ]
    others = {machine.image for machine in plan.machines if machine.wanted} - {plan.flow.image}
    lines += [f"             {_image(image)}" for image in sorted(others, key=lambda image: image.name)]
    packages = f", {plan.requirements}" if plan.requirements else ""
    lines += [f"installs     Python {plan.python}, ray {plan.ray}, this orch{packages}", ""]
    rows: list[tuple[str, ...]] = [("VM", "TYPE", "HAS", "DISK", "SPOT", "VMS", "PRICE", "FOR")]
    rows.append(_row("Flow VM", plan.flow, "1, always", "the Flow, the pages, Ray's head"))
    for machine in plan.machines:
        if machine.wanted:
            count = f"0 to {machine.wanted}"
            rows.append(_row(machine.key.removeprefix("orch_"), machine, count, ", ".join(machine.works)))
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [*lines, "", *_sums(plan)]


def _image(image: Image) -> str:
    return f"{image.name} ({image.ami})" if image.ami else f"{image.name}, the newest at the first start"


def _row(name: str, machine: Machine, count: str, purpose: str) -> tuple[str, ...]:
    has = "as EC2 says"
    if machine.kind is not None:
        gpus = f", {machine.kind.gpus} x {machine.kind.gpu}" if machine.kind.gpus else ""
        has = f"{machine.kind.vcpus} vCPUs, {machine.kind.memory} GiB{gpus}"
    return (
        name, machine.instance_type, has, f"{machine.disk} GiB", "spot" if machine.spot else "no", count,
        _money(machine), purpose,
    )  # fmt: skip


def _money(machine: Machine) -> str:
    if machine.price is None:
        return "unknown"
    return f"{'up to ' if machine.spot else ''}${machine.price:.3f}/h"


def _sums(plan: Plan) -> list[str]:
    lines = []
    used = [machine for machine in plan.machines if machine.wanted]
    known = [machine.price for machine in used if machine.price is not None]
    if plan.flow.price is None:
        lines.append("The Flow VM costs an unknown price as long as it is up.")
    else:
        lines.append(f"The Flow VM costs ${plan.flow.price:.3f}/h as long as it is up (until `orch down`).")
    if len(known) == len(used) and plan.flow.price is not None:
        total = plan.flow.price + sum(machine.wanted * (machine.price or 0.0) for machine in used)
        lines.append(f"With every Work running: {'up to ' if any(m.spot for m in used) else ''}${total:.3f}/h.")
    else:
        lines.append("With every Work running: unknown.")
    if plan.region in REGIONS:
        lines.append(
            f"Prices: on-demand, of {AS_OF}; disks ${DISK_MONTH:.2f} a GiB and month, S3 and traffic come on top."
        )
    else:
        lines.append(f"This version has no prices for {plan.region}; see AWS's pages.")
    idle: Sequence[float] = sorted({machine.idle for machine in used}) or [IDLE]
    words = " to ".join(dict.fromkeys(f"{seconds:g} s" for seconds in (idle[0], idle[-1])))
    lines.append(f"A Work's VM is made when the Work is asked to run, and given back {words} after it has ended.")
    return lines
