"""The engine alone: what it makes of agents of Works' own that come, go and come late."""

from __future__ import annotations

from typing import Any

import pytest

from orch import CloudCompute, Flow, ScriptWork
from orch.engine import Config, Engine
from orch.events import (
    AgentFailed,
    AgentGone,
    AgentPolled,
    AgentUp,
    AskCall,
    Event,
    Instruction,
    LaunchAgent,
    PassEnded,
    PlacedWorks,
    Pushed,
    ReleaseAgent,
    Reply,
    RunPass,
    StartCalls,
    StopWork,
    Tick,
)
from orch.program import Program
from orch.wire import AgentStatus, Ended, Item, Placed, Push, PushReply, Started, VarOps


class Root(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.knob = 1
        some: dict[str, Any] = {"parallel": True, "raise_exception": False, "lost_after": 30.0}
        self.job = ScriptWork("x", retries=3, retry_delay=5.0, **some)
        self.pair = ScriptWork("x", cloud_compute=CloudCompute(count=2), **some)


class Driven:
    """An engine, its instructions, and agents that answer."""

    def __init__(self) -> None:
        program = self.program = Program(Root())
        config = Config(app="test", run=1, base_url="", shared_records=False, agent_of=lambda spec: spec.name)
        self.engine = Engine(config, program.node(), program.specs())
        self.now = 100.0
        self.done: list[Instruction] = []
        self._take(self.engine.start(self.now))

    def tell(self, event: Event) -> None:
        self.done = []
        self._take(self.engine.handle(event, self.now))

    def _take(self, instructions: list[Instruction]) -> None:
        self.engine.take_batch()
        self.done += instructions
        for each in instructions:
            if isinstance(each, RunPass):
                self._take(self.engine.handle(PassEnded(result=self.program.run_pass(each.given)), self.now))

    def came(self, kind: type[Instruction]) -> list[Any]:
        return [each for each in self.done if isinstance(each, kind)]

    def up(self, agent: str, epoch: int) -> None:
        self.engine.know_agent(agent, epoch)
        self.tell(AgentUp(agent=agent, epoch=epoch, status=status(agent, epoch), since=epoch))

    def placed(self, agent: str) -> None:
        self.tell(PlacedWorks(agent=agent, placed=[Placed(work=agent, host="h", port=1)]))

    def running(self, name: str = "job") -> None:
        self.tell(AskCall(work=name))
        self.up(name, 10)
        self.placed(name)
        assert self.came(StartCalls)

    def push(self, agent: str, epoch: int, seq: int, item: Item) -> PushReply:
        self.tell(Pushed(ticket=1, push=Push(agent=agent, epoch=epoch, seq=seq, items=[item])))
        (reply,) = self.came(Reply)
        assert isinstance(reply.value, PushReply)
        return reply.value

    def stage(self, name: str = "job") -> str:
        call = self.engine.works[name].book.shown
        assert call is not None
        return str(call.stage)


@pytest.fixture
def driven() -> Driven:
    return Driven()


def status(agent: str, epoch: int) -> AgentStatus:
    return AgentStatus(agent=agent, epoch=epoch, pid=1, seq=0)


def ended(**how: Any) -> Ended:
    return Ended(**{"work": "job", "call": "1-job-1", "attempt": 1, "at": 100.0, "reason": "exit_code", **how})


def test_an_agent_that_comes_up_after_it_was_given_up_is_not_heard(driven: Driven) -> None:
    driven.running()
    driven.tell(AgentGone(agent="job", epoch=12, message="its place has ended"))
    driven.now += 10
    driven.tell(Tick())
    assert driven.came(LaunchAgent)
    driven.tell(AgentUp(agent="job", epoch=10, status=status("job", 10), since=10))
    agent = driven.engine.agents["job"]
    assert (agent.epoch, agent.up, agent.launching) == (12, False, True)
    driven.tell(AgentUp(agent="nobody", epoch=1, status=status("nobody", 1)))
    assert "nobody" not in driven.engine.agents


def test_nor_is_a_failure_of_what_was_given_up(driven: Driven) -> None:
    driven.running()
    driven.tell(AgentGone(agent="job", epoch=12, message="its place has ended"))
    driven.now += 10
    driven.tell(Tick())
    driven.tell(AgentFailed(agent="job", epoch=11, message="no machine is large enough", reason="infeasible"))
    assert driven.stage() == "pending" and driven.engine.agents["job"].launching
    driven.tell(AgentFailed(agent="job", epoch=13, message="no machine is large enough", reason="infeasible"))
    assert driven.stage() == "failed"


def test_a_script_whose_agent_gets_no_successor_is_unknown_until_somebody_decides(driven: Driven) -> None:
    driven.running()
    driven.tell(AgentFailed(agent="job", epoch=11, message="the cluster does not answer"))
    assert driven.stage() == "unknown" and not driven.engine.works["job"].placed
    driven.tell(StopWork(ticket=1, work="job"))
    assert driven.stage() == "stopped" and not driven.engine.works["job"].live


def test_silence_counts_while_a_successor_is_attached(driven: Driven) -> None:
    driven.running()
    driven.push("job", 10, 1, Started(work="job", call="1-job-1", attempt=1, pid=1, at=100.0))
    driven.engine.know_agent("job", 11)
    driven.tell(AgentPolled(agent="job", status=None, silence=11.0, clock=50.0))
    assert driven.stage() == "unknown"


def test_a_place_is_given_back_also_when_a_retry_was_stopped(driven: Driven) -> None:
    driven.running()
    driven.push("job", 10, 1, ended())
    assert driven.stage() == "pending"
    driven.tell(StopWork(ticket=1, work="job"))
    driven.now += 61
    driven.tell(Tick())
    assert driven.came(ReleaseAgent)


def test_a_silent_place_that_holds_nothing_is_left_and_another_one_taken(driven: Driven) -> None:
    driven.tell(AskCall(work="job"))
    driven.up("job", 10)  # (its place message is on its way)
    driven.tell(AgentPolled(agent="job", status=None, silence=29.0, clock=50.0))
    assert not driven.done
    driven.tell(AgentPolled(agent="job", status=None, silence=31.0, clock=52.0))
    assert [type(each) for each in driven.done if isinstance(each, ReleaseAgent | LaunchAgent)] == [
        ReleaseAgent,
        LaunchAgent,
    ]


def test_a_further_machine_has_no_variables_not_even_those_of_the_root(driven: Driven) -> None:
    driven.tell(AskCall(work="pair"))
    for agent in ("pair", "pair~1"):
        driven.up(agent, 10)
        driven.placed(agent)
    said = VarOps(work="pair~1", ops=[{"op": "replace", "path": "/knob", "value": 2}])
    (result,) = driven.push("pair~1", 10, 1, said).results
    assert result.status == 403
    assert driven.engine.tree.get("/vars/knob") == 1


def test_a_further_machine_that_cannot_be_placed_again_ends_no_attempt_that_is_under_way(driven: Driven) -> None:
    driven.tell(AskCall(work="pair"))
    for agent in ("pair", "pair~1"):
        driven.up(agent, 10)
        driven.placed(agent)
    work = driven.engine.works["pair"]
    assert work.live
    work.parts[0].placing = True
    work.parts[0].live = False
    driven.tell(AgentFailed(agent="pair~1", epoch=11, message="no machine", reason="infeasible"))
    assert work.live and work.book.current == "1-pair-1"
