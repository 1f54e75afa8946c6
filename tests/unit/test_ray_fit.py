"""What a CloudCompute asks of a Ray cluster, and how it is said that no machine has it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from orch.errors import UsageError
from orch.runtimes.ray import RayRuntime
from orch.runtimes.ray_fit import GIB, SOME, misfit, wanted

KNOWN = ["A100", "T4"]


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        ({"name": "cpu"}, {"CPU": 1.0}),
        ({"name": "cpu", "cpus": 0}, {}),
        ({"name": "cpu", "cpus": 2.5, "memory": 1.5}, {"CPU": 2.5, "memory": 1.5 * GIB}),
        ({"name": "gpu"}, {"CPU": 1.0, "GPU": 1.0}),
        ({"name": "gpu-fast-multi"}, {"CPU": 1.0, "GPU": 4.0}),
        ({"name": "gpu-fast-multi", "gpus": 2}, {"CPU": 1.0, "GPU": 2.0}),
        ({"name": "gpu", "gpus": 0}, {"CPU": 1.0}),
        ({"name": "A100"}, {"CPU": 1.0, "GPU": 1.0, "accelerator_type:A100": SOME}),
        ({"name": "gpu", "instance_type": "T4", "gpus": 2}, {"CPU": 1.0, "GPU": 2.0, "accelerator_type:T4": SOME}),
        ({"name": "special"}, {"CPU": 1.0, "orch_special": 1.0}),
        ({"name": "elsewhere"}, {"CPU": 1.0}),
        ({}, {"CPU": 1.0}),
    ],
)
def test_on_somebody_elses_cluster(compute: dict[str, Any], expected: dict[str, float]) -> None:
    assert wanted(compute, offered=["CPU", "orch_special"], accelerators=KNOWN) == expected


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        ({"name": "cpu"}, {"orch_x": 1.0}),
        ({"name": "gpu"}, {"orch_x": 1.0, "GPU": 1.0}),
        ({"name": "cpu", "cpus": 2, "memory": 4}, {"orch_x": 1.0, "CPU": 2.0, "memory": 4.0 * GIB}),
    ],
)
def test_on_a_cluster_of_ours(compute: dict[str, Any], expected: dict[str, float]) -> None:
    assert wanted(compute, machine="orch_x", offered=["orch_cpu"]) == expected


def test_one_machine_must_have_all_of_it() -> None:
    cpu = {"CPU": 8.0, "memory": 32.0 * GIB, "node:10.0.0.1": 1.0, "object_store_memory": 1e9}
    gpu = {"CPU": 2.0, "GPU": 1.0, "memory": 8.0 * GIB}
    assert misfit({"CPU": 8.0}, [cpu, gpu]) == ""
    assert misfit({}, [cpu]) == ""
    assert misfit({"GPU": 4.0}, [cpu, gpu]) == (
        "it needs 4 GPU, and the cluster offers at most 1 GPU on a machine; "
        "its machines: 1 x (8 CPU, 32 GiB memory); 1 x (2 CPU, 1 GPU, 8 GiB memory)"
    )
    assert misfit({"CPU": 8.0, "GPU": 1.0}, [cpu, gpu]).startswith("it needs 8 CPU and 1 GPU on one machine, and no")
    assert misfit({"orch_x": 1.0}, [cpu, cpu]).endswith("offers none; its machines: 2 x (8 CPU, 32 GiB memory)")
    assert "it has no machine" in misfit({"CPU": 1.0}, [])


def test_without_ray_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else find_spec(name))
    with pytest.raises(UsageError, match="ray") as caught:
        RayRuntime("auto", tmp_path, tmp_path, tmp_path, app_id="x")
    assert "pip install 'orch[ray]'" in caught.value.hint
