"""EC2's machines that orch knows by itself, and what they cost. Data; any other type is taken as it is named.

The prices are on-demand, Linux, US dollars an hour, as AWS publishes them for the regions listed. They change rarely,
and are an estimate all the same: a plan names their date, and says "unknown" where there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AS_OF", "DISK_MONTH", "NAMES", "REGIONS", "TYPES", "Kind", "price"]


@dataclass(frozen=True, slots=True)
class Kind:
    """One EC2 instance type. memory: GiB. gpus: how many of which."""

    vcpus: int
    memory: int
    gpus: int = 0
    gpu: str = ""


AS_OF = "2025-06"
REGIONS = ("us-east-1", "us-east-2", "us-west-2")
"""They have one price list."""
DISK_MONTH = 0.08
"""A GiB of gp3 disk for a month, in `REGIONS`."""

_T4 = "NVIDIA T4, 16 GB"
_A10G = "NVIDIA A10G, 24 GB"

TYPES: dict[str, Kind] = {
    "m6i.large": Kind(2, 8),
    "m6i.xlarge": Kind(4, 16),
    "m6i.2xlarge": Kind(8, 32),
    "m6i.4xlarge": Kind(16, 64),
    "m6i.8xlarge": Kind(32, 128),
    "g4dn.xlarge": Kind(4, 16, 1, _T4),
    "g4dn.2xlarge": Kind(8, 32, 1, _T4),
    "g4dn.4xlarge": Kind(16, 64, 1, _T4),
    "g4dn.8xlarge": Kind(32, 128, 1, _T4),
    "g4dn.12xlarge": Kind(48, 192, 4, _T4),
    "g5.xlarge": Kind(4, 16, 1, _A10G),
    "g5.2xlarge": Kind(8, 32, 1, _A10G),
    "g5.4xlarge": Kind(16, 64, 1, _A10G),
    "g5.8xlarge": Kind(32, 128, 1, _A10G),
    "g5.12xlarge": Kind(48, 192, 4, _A10G),
    "g5.24xlarge": Kind(96, 384, 4, _A10G),
    "g5.48xlarge": Kind(192, 768, 8, _A10G),
}
"""Within a family from small to large."""

NAMES = {
    "cpu": "m6i.large",
    "cpu-medium": "m6i.2xlarge",
    "gpu": "g4dn.xlarge",
    "gpu-fast": "g5.2xlarge",
    "gpu-fast-multi": "g5.12xlarge",
}
"""What the names of docs/compute.md stand for."""

_ON_DEMAND = {
    "m6i.large": 0.096,
    "m6i.xlarge": 0.192,
    "m6i.2xlarge": 0.384,
    "m6i.4xlarge": 0.768,
    "m6i.8xlarge": 1.536,
    "g4dn.xlarge": 0.526,
    "g4dn.2xlarge": 0.752,
    "g4dn.4xlarge": 1.204,
    "g4dn.8xlarge": 2.176,
    "g4dn.12xlarge": 3.912,
    "g5.xlarge": 1.006,
    "g5.2xlarge": 1.212,
    "g5.4xlarge": 1.624,
    "g5.8xlarge": 2.448,
    "g5.12xlarge": 5.672,
    "g5.24xlarge": 8.144,
    "g5.48xlarge": 16.288,
}


def price(instance_type: str, region: str) -> float | None:
    """Dollars an hour; None: unknown."""
    return _ON_DEMAND.get(instance_type) if region in REGIONS else None
