"""/metrics: the service's numbers in Prometheus' text format, version 0.0.4."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["CONTENT_TYPE", "exposition"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(numbers: Mapping[str, float]) -> str:
    """`{"passes_total": 3, 'works{stage="running"}': 2}` as text; names ending in `_total` are counters."""
    families: dict[str, list[str]] = {}
    for name, value in numbers.items():
        family, brace, labels = name.partition("{")
        families.setdefault(f"orch_{family}", []).append(f"orch_{family}{brace}{labels} {_number(value)}")
    lines: list[str] = []
    for family, samples in sorted(families.items()):
        lines += (f"# TYPE {family} {'counter' if family.endswith('_total') else 'gauge'}", *samples)
    return "\n".join((*lines, ""))


def _number(value: float) -> str:
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "+Inf" if value > 0 else "-Inf"
    return repr(value)
