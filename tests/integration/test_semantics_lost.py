"""Contact lost: `unknown`, then what `on_lost` says, and never two copies."""

from __future__ import annotations

from typing import Any

import pytest

from orch import Flow, ScriptWork, ServiceWork, Stage
from orch.events import AgentPolled, AgentUp, PlacedWorks
from orch.testing import AppTester
from orch.wire import AgentStatus, Placed, StartCall


class Box(Flow):
    def __init__(self, options: dict[str, Any], service: bool = False) -> None:
        super().__init__()
        self.asked = 0
        kind: Any = ServiceWork if service else ScriptWork
        self.w = kind("x", **{"parallel": True, "raise_exception": False, "grace": 1.0, "lost_after": 60.0, **options})

    def run(self) -> None:
        self.w.run(str(self.asked))


def started(service: bool = False, **options: Any) -> AppTester:
    tester = AppTester(Box(options, service), works={"w": {"run_for": None}})
    tester.until(lambda: tester.flow.w.is_running)
    return tester


def attempts(tester: AppTester) -> list[tuple[str, int]]:
    return [(start.call, start.attempt) for start in tester.fake("w").starts]


def test_wait_waits_and_what_happened_meanwhile_arrives() -> None:
    tester = started()
    assert tester.fake("w").starts[0].lease is None
    tester.lose_contact()
    tester.advance(9)
    assert tester.flow.w.is_running
    tester.advance(4)
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    tester.advance(10_000)
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    fake = tester.fake("w")
    assert fake.current is not None
    tester._finish(fake, fake.current, reason=None, exit_code=0)
    tester.advance(10)
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    tester.regain_contact()
    tester.settle()
    assert tester.flow.w.has_succeeded and attempts(tester) == [("1-w-1", 1)]


def test_restart_after_the_lease_is_a_new_attempt_that_costs_no_retry() -> None:
    tester = started(on_lost="restart", retries=1)
    lease = tester.fake("w").starts[0]
    assert lease.lease is not None and lease.lease + lease.lease_grace <= 59
    tester.lose_contact()
    tester.advance(59)
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    assert tester.fake("w").current is None  # its lease is over, and only now another one may start
    tester.advance(4)
    assert tester.flow.w.is_running and attempts(tester) == [("1-w-1", 1), ("1-w-1", 2)]
    tester.kill("w")  # the retry is still there
    tester.advance(2)
    assert tester.flow.w.is_running and len(attempts(tester)) == 3
    tester.kill("w")
    tester.settle()
    assert tester.flow.w.has_failed


def test_a_silence_shorter_than_the_patience_but_longer_than_the_lease() -> None:
    tester = started(on_lost="restart")
    tester.lose_contact()
    tester.advance(57)
    tester.regain_contact()
    tester.settle()
    assert tester.flow.w.is_running and attempts(tester) == [("1-w-1", 1), ("1-w-1", 2)]


def test_a_silence_shorter_than_the_lease_harms_nothing() -> None:
    tester = started(on_lost="restart")
    tester.lose_contact()
    tester.advance(30)
    tester.regain_contact()
    tester.advance(100)
    assert tester.flow.w.is_running and len(attempts(tester)) == 1


@pytest.mark.parametrize("raises", [False, True])
def test_fail_fails_and_is_not_retried(raises: bool) -> None:
    tester = started(on_lost="fail", retries=3, raise_exception=raises)
    tester.lose_contact()
    tester.advance(63)
    call = tester.calls("w")[0]
    assert (call.stage, call.reason) == ("failed", "lost") and "60 s" in call.message
    assert len(attempts(tester)) == 1
    assert tester.exit_code == (1 if raises else None)


def test_fail_says_so_as_soon_as_it_is_known() -> None:
    tester = started(on_lost="fail", retries=3)
    tester.lose_contact()
    tester.advance(57)
    tester.regain_contact()
    tester.settle()
    call = tester.calls("w")[0]
    assert (call.stage, call.reason, call.message) == ("failed", "lost", "its lease had run out")
    assert len(attempts(tester)) == 1


def test_a_failed_one_can_be_asked_again_on_a_new_agent() -> None:
    tester = started(on_lost="fail")
    tester.lose_contact()
    tester.advance(63)
    tester.set("asked", 1)
    tester.settle()
    assert tester.flow.w.is_running and attempts(tester)[-1] == ("1-w-2", 1)


def test_a_service_is_restarted_without_its_delays() -> None:
    tester = started(service=True, on_lost="restart", restart="never", lost_after=30.0)
    tester.until(lambda: tester.flow.w.is_ready)
    tester.lose_contact()
    tester.advance(20)
    assert not tester.flow.w.has_stopped and tester.flow.w.status.stage is Stage.UNKNOWN
    tester.advance(13)
    assert tester.flow.w.is_ready and len(attempts(tester)) == 2


def test_a_stop_while_unknown_is_done_when_the_lease_is_over() -> None:
    tester = started(on_lost="restart")
    tester.lose_contact()
    tester.advance(20)
    tester.stop_work("w")
    tester.settle()
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    tester.advance(45)
    assert tester.flow.w.has_stopped and len(attempts(tester)) == 1


def test_a_stop_while_unknown_reaches_the_agent_that_comes_back() -> None:
    tester = started()
    tester.lose_contact()
    tester.advance(20)
    tester.stop_work("w")
    tester._undelivered.clear()  # a link that was made anew has forgotten it
    tester.regain_contact()
    tester.settle()
    assert tester.flow.w.has_stopped


def test_the_replaced_agent_is_refused() -> None:
    tester = started(on_lost="restart")
    old = tester._agent_up("local").status
    epoch = tester.engine.agents["local"].epoch
    tester.lose_contact()
    tester.advance(63)
    assert tester.engine.agents["local"].epoch == epoch + 1
    tester._event(AgentPolled(agent="local", status=old))  # an answer that was on its way
    tester.settle()
    assert tester.flow.w.is_running and tester.calls("w")[0].attempt == 2


def test_what_the_flow_has_given_up_is_told_to_stop() -> None:
    tester = started()
    stray = tester.fake("w").starts[0]
    report = tester._agent_up("local").status.works[0]
    status = AgentStatus(agent="local", epoch=1, pid=0, seq=tester._seq, works=[report])
    tester.stop_work("w")
    tester.settle()
    assert tester.flow.w.has_stopped
    told = tester.engine.handle(AgentPolled(agent="local", status=status), tester.now)
    stops = [stop for i in told for stop in getattr(i, "calls", [])]
    assert [(stop.call, stop.attempt) for stop in stops] == [(stray.call, 1)]


def test_on_another_machine_nothing_is_started_again_from_unknown() -> None:
    """The new agent knows nothing of the old one's scripts: the same attempt may still be running there."""
    tester = started()
    tester.engine.config = type(tester.engine.config)(
        app="test", run=1, base_url="http://testserver", shared_records=False
    )
    status = AgentStatus(agent="local", epoch=2, pid=0, seq=0)
    sent = tester.engine.handle(AgentUp(agent="local", epoch=2, status=status), tester.now)
    placed = PlacedWorks(agent="local", placed=[Placed(work="w", host="10.0.0.2", port=1)])
    sent += tester.engine.handle(placed, tester.now) + tester.engine.settle(tester.now)
    assert not [call for i in sent for call in getattr(i, "calls", []) if isinstance(call, StartCall)]
    assert tester.calls("w")[0].stage is Stage.UNKNOWN


def test_a_silence_of_everything_is_nobodys_fault() -> None:
    tester = started(on_lost="restart")
    for silence in (12.0, 61.0, 63.0):
        tester._event(AgentPolled(agent="local", status=None, silence=silence, clock=silence, reachable=False))
    tester.settle()
    assert tester.flow.w.status.stage is Stage.UNKNOWN and len(attempts(tester)) == 1
    assert len([note for note in tester.notes if "everything else" in note]) == 1


@pytest.mark.parametrize("seconds, count", [(40, 1), (58, 2)])
def test_a_server_that_restarts_replaces_a_silent_agent_and_keeps_its_scripts(seconds: float, count: int) -> None:
    tester = started(on_lost="restart")
    tester.lose_contact()
    tester.advance(seconds)  # 58: the lease is over
    assert tester.flow.w.status.stage is Stage.UNKNOWN
    tester.restart_server()
    tester.settle()
    assert tester.flow.w.is_running and len(attempts(tester)) == count
