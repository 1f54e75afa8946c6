"""When a schedule ticks: cron fields, @hourly and friends (croniter), or `@every 10s`. PURE: time is passed in."""

from __future__ import annotations

import re
from datetime import datetime
from zoneinfo import ZoneInfo

__all__ = ["following", "next_tick", "seconds"]

EVERY = re.compile(r"@every\s+(.+)")
PART = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds(text: str) -> float:
    """Seconds of a duration such as `10s`, `1h30m`, `500ms`. Raises ValueError."""
    parts = PART.findall(text.strip())
    if not parts or "".join(number + unit for number, unit in parts) != text.replace(" ", ""):
        raise ValueError(f"{text!r} is no duration: give e.g. 10s, 5m, 1h30m")
    return sum(float(number) * UNITS[unit] for number, unit in parts)


def _period(cron: str) -> float | None:
    """Seconds between the ticks of an `@every` expression; None for others."""
    if not isinstance(cron, str):
        raise ValueError(f"{cron!r} is no cron expression: give 5 fields, @hourly, ... or '@every 10s'")
    every = EVERY.fullmatch(cron.strip())
    if every is None:
        return None
    period = seconds(every[1])
    if period <= 0:
        raise ValueError(f"{cron!r}: the period must be longer than zero")
    return period


def following(cron: str, tz: str, due: float, now: float) -> float:
    """The first tick later than `now` of a schedule that ticks at `due`; `@every` keeps its rhythm."""
    period = _period(cron)
    if period is None:
        return next_tick(cron, tz, max(due, now))
    return due + period * (max(0.0, now - due) // period + 1)


def next_tick(cron: str, tz: str, after: float) -> float:
    """The first tick later than `after` (seconds since the epoch). Raises ValueError."""
    period = _period(cron)
    if period is not None:
        return after + period
    from croniter import croniter

    try:
        zone = ZoneInfo(tz)
    except (KeyError, ValueError, OSError) as error:
        raise ValueError(f"{tz!r} is no time zone: give an IANA name such as UTC or Europe/Berlin") from error
    try:
        return float(croniter(cron, datetime.fromtimestamp(after, zone)).get_next(float))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{cron!r} is no cron expression: give 5 fields, @hourly, ... or '@every 10s'") from error
