"""What `self.schedule` promises: True in one pass that asks, per tick."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from orch import Flow, ScriptWork
from orch.testing import AppTester


def at(text: str) -> float:
    return datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()


NOON = at("2026-03-02T12:00:00")


class Clocked(Flow):
    def __init__(self, cron: str = "@every 10s", options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._cron = cron
        self._options = options or {}
        self._body: Callable[[Any], None] | None = None
        self.ticks: list[float] = []
        self.above = False
        self.work = ScriptWork("block")

    def tick(self) -> bool:
        return self.schedule(self._cron, **self._options)

    def run(self) -> None:
        if self._body is not None:
            self._body(self)
            return
        if self.above:
            self.work.run()
        if self.tick():
            self.ticks.append(self._find_program().current.now - NOON)  # type: ignore[union-attr]


def started(cron: str = "@every 10s", /, now: float = NOON, **options: Any) -> AppTester:
    tester = AppTester(Clocked(cron, options), now=now, works={"work": {"run_for": None}})
    tester.settle()
    return tester


def ticks(tester: AppTester) -> list[float]:
    return list(tester.state["vars"]["ticks"])


def test_true_in_one_pass_that_asks_per_tick_not_at_registration() -> None:
    tester = started()
    assert ticks(tester) == []
    tester.advance(35)
    assert ticks(tester) == [10, 20, 30]


def test_nothing_runs_between_the_ticks() -> None:
    tester = started()
    tester.advance(35)
    assert tester.passes == 1 + 3 * 2  # each tick, and the pass that its own change causes


def test_fields_and_names() -> None:
    for cron, expected in {
        "*/15 * * * *": [900, 1800, 2700, 3600],
        "30 12 * * 1": [1800],
        "@hourly": [3600],
        "@daily": [],
        "@every 20m": [1200, 2400, 3600],
        "@every 1h": [3600],
        "@every 30m30s": [1830],
    }.items():
        tester = started(cron)
        tester.advance(3_600)
        assert ticks(tester) == expected, cron


def test_tz_is_the_zone_that_the_fields_speak_of() -> None:
    tester = started("0 14 * * *", tz="Europe/Berlin")  # 13:00 UTC in winter
    tester.advance(86_400)
    assert ticks(tester) == [3_600]


def test_a_zones_summer_time_is_followed() -> None:
    start = at("2026-03-28T12:00:00")  # the clocks change in the following night
    tester = started("0 14 * * *", now=start, tz="Europe/Berlin")
    tester.advance(1.5 * 86_400)
    assert [NOON + tick - start for tick in ticks(tester)] == [3_600, 86_400]


def test_a_pass_that_ends_above_it_does_not_use_the_tick_up_and_does_not_spin() -> None:
    tester = started()
    tester.set("above", True)
    tester.settle()
    before = tester.passes
    tester.advance(25)
    assert ticks(tester) == []
    assert tester.passes - before <= 2
    tester.set("above", False)
    tester.settle()
    assert ticks(tester) == [25]
    tester.advance(5)
    assert ticks(tester) == [25, 30]


def test_a_tick_that_no_pass_asks_for_any_more_does_not_spin() -> None:
    tester = started()
    tester.flow._body = lambda flow: None
    before = tester.passes
    tester.advance(10_000)
    assert tester.passes - before <= 1


def test_a_tick_that_waited_for_a_blocked_pass_survives_a_restart() -> None:
    tester = started("@hourly")
    tester.set("above", True)
    tester.advance(3_700)
    tester.restart_server()
    tester.settle()
    assert ticks(tester) == []
    tester.set("above", False)
    tester.settle()
    assert ticks(tester) == [3_700]


def restart_after(tester: AppTester, seconds: float) -> None:
    """The server is down for so long."""
    cron, options = tester.flow._cron, tester.flow._options
    tester.clock.now += seconds
    tester.restart_server()
    tester.flow._cron, tester.flow._options = cron, options
    tester.settle()


def test_it_survives_a_restart() -> None:
    tester = started("@every 1h")
    tester.advance(1_800)
    restart_after(tester, 60)
    tester.advance(1_739)
    assert ticks(tester) == []
    tester.advance(1)
    assert ticks(tester) == [3_600]


def test_ticks_missed_while_the_server_was_down_are_dropped() -> None:
    tester = started("@hourly")
    restart_after(tester, 3.5 * 3_600)
    tester.advance(1_799)
    assert ticks(tester) == []
    tester.advance(1)
    assert ticks(tester) == [4 * 3_600]


def test_every_keeps_its_rhythm_across_missed_ticks() -> None:
    tester = started("@every 10s")
    restart_after(tester, 33)
    tester.advance(20)
    assert ticks(tester) == [40, 50]


def test_catch_up_counts_every_missed_tick() -> None:
    tester = started("@hourly", catch_up=True)
    restart_after(tester, 3.5 * 3_600)
    assert ticks(tester) == [3.5 * 3_600] * 3
    tester.advance(1_800)
    assert ticks(tester)[3:] == [4 * 3_600]


def test_asking_twice_in_a_pass_gives_the_same_answer() -> None:
    tester = started()
    seen: list[tuple[bool, bool]] = []
    tester.flow._body = lambda flow: seen.append((flow.schedule("@every 10s"), flow.schedule("@every 10s")))
    tester.advance(25)
    assert seen.count((True, True)) == 2
    assert set(seen) == {(True, True)}


class Child(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.ticks = 0

    def run(self) -> None:
        if self.schedule("@every 10s"):
            self.ticks += 1


class Family(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.one = Child()
        self.two = Child()
        self.own = 0
        self.keyed = 0

    def run(self) -> None:
        self.one.run()
        self.two.run()
        if self.schedule("@every 10s"):
            self.own += 1
        if self.schedule("@every 10s", key="mine"):
            self.keyed += 1
        if self.schedule("@every 5s"):
            self.keyed += 100


def test_the_key_is_flow_and_cron_unless_given() -> None:
    tester = AppTester(Family(), now=NOON)
    tester.advance(31)
    assert (tester.flow.one.ticks, tester.flow.two.ticks, tester.flow.own) == (3, 3, 3)
    assert tester.flow.keyed == 603


def test_one_key_for_two_zones_in_a_pass_is_an_error_that_says_key() -> None:
    tester = started()

    def body(flow: Any) -> None:
        flow.schedule("0 9 * * *")
        with pytest.raises(ValueError, match="key="):
            flow.schedule("0 9 * * *", tz="Europe/Berlin")
        assert flow.schedule("0 9 * * *", tz="Europe/Berlin", key="berlin") is False

    tester.flow._body = body
    tester.set("above", True)
    tester.settle()
    assert tester.exit_code is None


def test_a_changed_cron_under_the_same_key_registers_anew() -> None:
    tester = started("@every 10s", key="k")
    tester.advance(5)
    tester.flow._cron = "@every 1m"
    tester.set("above", False)
    tester.flow._body = None
    tester.patch([{"op": "add", "path": "/vars/ticks/-", "value": -1}])
    tester.advance(59)
    assert ticks(tester) == [-1]
    tester.advance(1)
    assert ticks(tester) == [-1, 65]


@pytest.mark.parametrize(
    "cron", ["", "never", "* * * *", "61 * * * *", "@every", "@every 0s", "@every soon", "@sometimes", 5]
)
def test_bad_expressions_are_a_value_error_that_names_them(cron: Any) -> None:
    seen: list[str] = []

    def body(flow: Any) -> None:
        with pytest.raises(ValueError) as info:
            flow.schedule(cron)
        seen.append(str(info.value))

    tester = started()
    tester.flow._body = body
    tester.set("above", True)
    tester.settle()
    assert tester.exit_code is None
    assert seen
    assert str(cron).removeprefix("@every").strip() in seen[0]


def test_a_bad_zone_is_a_value_error_that_names_it() -> None:
    tester = started("0 9 * * *", tz="Mars/Olympus")
    assert tester.exit_code == 1
    assert "Mars/Olympus" in tester.message


def test_inside_it_a_parallel_call_starts_once_a_tick() -> None:
    class Ticking(Flow):
        def __init__(self) -> None:
            super().__init__()
            self.w = ScriptWork("w", parallel=True, cache_calls=False)

        def run(self) -> None:
            if self.schedule("@every 10s"):
                self.w.run()

    tester = AppTester(Ticking(), now=NOON)
    tester.advance(35)
    assert len(tester.fake("w").starts) == 3
