"""What a Work needs of a Ray cluster, and whether any of its machines could ever give it. PURE: no Ray, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["describe", "misfit", "wanted"]

GPU_NAMES = {"gpu": 1.0, "gpu-fast": 1.0, "gpu-fast-multi": 4.0}
"""The names of docs/compute.md that stand for machines with GPUs, and how many these have."""
ACCELERATOR = "accelerator_type:"
SOME = 0.001
"""How much is asked of a resource that only says what a machine is, as Ray does."""
GIB = 1 << 30


def wanted(
    compute: Mapping[str, Any], *, machine: str = "", offered: Iterable[str] = (), accelerators: Iterable[str] = ()
) -> dict[str, float]:
    """The resources of one Work, in Ray's names and units.

    compute: the fields of its CloudCompute. machine: the custom resource of which every machine that is made for such
    Works has one; empty on a cluster that is not ours. offered: names of all resources there, accelerators: the types
    that Ray knows.
    """
    names = [name for name in (compute.get("instance_type"), compute.get("name")) if name]
    needs: dict[str, float] = {}
    gpus = compute.get("gpus")
    for name in names:
        if gpus is None and name in GPU_NAMES:
            gpus = GPU_NAMES[name]
        if name in accelerators:
            needs[ACCELERATOR + name] = SOME
            gpus = gpus or 1.0
    cpus = compute.get("cpus")
    if machine:
        needs[machine] = 1.0
    else:
        there = set(offered)
        needs |= {resource: 1.0 for name in names if (resource := f"orch_{name}") in there}
        if cpus is None:
            cpus = 1.0
    if cpus:
        needs["CPU"] = float(cpus)
    if gpus:
        needs["GPU"] = float(gpus)
    if memory := compute.get("memory"):
        needs["memory"] = float(int(memory * GIB))
    return needs


def misfit(needs: Mapping[str, float], machines: Sequence[Mapping[str, float]]) -> str:
    """Why no machine can ever hold that, naming the resource, how much is wanted and what there is; "" if one can.

    machines: what each one has in total, in use or not, those included that could still be launched.
    """
    if any(_fits(needs, machine) for machine in machines):
        return ""
    for name, amount in needs.items():
        best = max((machine.get(name, 0.0) for machine in machines), default=0.0)
        if best < amount:
            has = f"at most {_amount(name, best)} on a machine" if best else "none"
            return f"it needs {_amount(name, amount)}, and the cluster offers {has}; {describe(machines)}"
    together = " and ".join(_amount(name, amount) for name, amount in needs.items())
    return f"it needs {together} on one machine, and no machine of the cluster has all of it; {describe(machines)}"


def _fits(needs: Mapping[str, float], machine: Mapping[str, float]) -> bool:
    return all(machine.get(name, 0.0) >= amount for name, amount in needs.items())


def describe(machines: Sequence[Mapping[str, float]]) -> str:
    """What a cluster has, for an error: equal machines counted together."""
    counts: dict[str, int] = {}
    for machine in machines:
        words = (
            ", ".join(_amount(name, amount) for name, amount in sorted(machine.items()) if _shown(name)) or "nothing"
        )
        counts[words] = counts.get(words, 0) + 1
    if not counts:
        return "it has no machine"
    return "its machines: " + "; ".join(f"{count} x ({words})" for words, count in counts.items())


def _shown(name: str) -> bool:
    return not name.startswith("node:") and name != "object_store_memory"


def _amount(name: str, amount: float) -> str:
    if name == "memory":
        return f"{amount / GIB:.3g} GiB memory"
    if amount == SOME or name.startswith(ACCELERATOR):
        return name
    return f"{amount:g} {name}"
