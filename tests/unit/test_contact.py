"""Leases and the circuit breaker: arithmetic and silences, no process, no clock."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orch.contact import BREAKER_TIME, UNKNOWN_AFTER, Contacts, lease_for


@given(lost_after=st.floats(0.1, 1e6), grace=st.floats(0, 1e4), drift=st.floats(1 / 1.1, 1.1))
def test_a_lease_is_over_before_the_flow_gives_up_whatever_the_clocks_do(
    lost_after: float, grace: float, drift: float
) -> None:
    lease, lease_grace = lease_for(lost_after, grace)
    assert 0 < lease and 0 <= lease_grace <= grace
    assert (lease + lease_grace) * drift < lost_after


@given(grace=st.floats(0, 100), factor=st.floats(3, 1e3))
def test_with_enough_time_the_script_is_gone_a_grace_before(grace: float, factor: float) -> None:
    lost_after = max(1.0, grace * factor)
    lease, lease_grace = lease_for(lost_after, grace)
    assert lease_grace == pytest.approx(grace)
    assert lease + lease_grace <= lost_after - grace


def contacts(hosts: dict[str, str]) -> Contacts:
    made = Contacts()
    for agent, host in hosts.items():
        made.know(agent, host)
    return made


def silent(made: Contacts, since: dict[str, float], clock: float) -> None:
    for agent, quiet in since.items():
        made.missed(agent, clock - quiet, clock)


SIX = {f"a{n}": f"h{n % 3}" for n in range(6)}


def test_one_or_two_silent_agents_are_acted_on() -> None:
    made = contacts(SIX)
    silent(made, {"a0": 100, "a1": 100}, 200)
    assert made.held("a0", 200) == (False, "")


def test_half_of_all_within_ten_seconds_on_two_hosts_hold_the_flow_back() -> None:
    made = contacts(SIX)
    silent(made, {"a0": 100, "a1": 104, "a2": 110}, 200)
    held, said = made.held("a0", 200)
    assert held and "3 of 6 agents" in said and "10 minutes" in said
    assert made.held("a2", 200) == (True, "")  # it was said once


def test_not_if_they_are_fewer_than_half_or_on_one_host_or_not_together() -> None:
    made = contacts({f"a{n}": f"h{n}" for n in range(7)})
    silent(made, {"a0": 100, "a1": 100, "a2": 100}, 200)
    assert not made.held("a0", 200)[0]
    made = contacts({f"a{n}": "h" for n in range(3)})
    silent(made, {"a0": 100, "a1": 100, "a2": 100}, 200)
    assert not made.held("a0", 200)[0]
    made = contacts(SIX)
    silent(made, {"a0": 100, "a1": 106, "a2": 111}, 200)
    assert not made.held("a0", 200)[0]
    assert not made.held("a1", 200)[0]


def test_an_answer_of_one_of_them_ends_it() -> None:
    made = contacts(SIX)
    silent(made, dict.fromkeys(SIX, 100.0), 200)
    assert made.held("a0", 200)[0]
    assert "a3 answers again" in made.heard("a3")
    assert made.heard("a3") == ""
    silent(made, {"a0": 100.0, "a1": 100.0}, 210)
    assert made.held("a0", 210) == (False, "")  # five are still silent together, but that was judged


def test_after_ten_minutes_it_is_acted_on() -> None:
    made = contacts(SIX)
    silent(made, dict.fromkeys(SIX, 100.0), 200)
    assert made.held("a0", 200)[0]
    assert made.held("a1", 200 + BREAKER_TIME - 1)[0]
    held, said = made.held("a1", 200 + BREAKER_TIME)
    assert not held and said
    assert made.held("a0", 200 + BREAKER_TIME) == (False, "")
    made.heard("a0")
    made.heard("a1")
    made.heard("a2")
    silent(made, {"a0": 2000.0, "a1": 2000.0, "a2": 2000.0}, 2100)
    assert made.held("a0", 2100)[0]  # a new silence is a new case


def test_a_later_one_joins_the_held() -> None:
    made = contacts(SIX)
    silent(made, {"a0": 100, "a1": 100, "a2": 100}, 200)
    assert made.held("a0", 200)[0]
    silent(made, {"a3": 108}, 230)
    assert made.held("a3", 230)[0]
    made.forget("a3")
    assert made.heard("a3") == ""


def test_unknown_comes_before_the_default_patience() -> None:
    assert UNKNOWN_AFTER < 30
