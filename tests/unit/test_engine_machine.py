"""Random lives of an app on the real engine: whatever happens in whatever order, the promises hold.

- a Work never has two live attempts, and nothing is started while another attempt of it lives
- an attempt is started at most once; what is done stays done
- revisions count up by one, and replaying their operations on the tree that they began with gives the tree
- left alone, the app comes to rest: nothing waits for ever, and the flow's objects equal the tree
"""

from __future__ import annotations

import os
from typing import Any

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orch import Call, Flow, List, ScriptWork, ServiceWork, Stage
from orch.errors import CallError, NotFound, OrchError
from orch.events import ApiRequest, ForgetWorks, Instruction, Patch
from orch.program import Program
from orch.state import apply_ops
from orch.testing import AppTester
from orch.wire import StartCall

FIXED = ["cached", "uncached", "replacing", "service", "blocking", "leased", "failing"]


class Lab(Flow):
    """Asks its works for what its variables say."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = 0
        self.want = 0
        self.click = False
        self.clicks = 0
        self.stop_some = False
        self.rows: list[Any] = []
        self.jobs = List()
        self.cached = ScriptWork("x", parallel=True, raise_exception=False, retries=1, retry_delay=3.0)
        self.uncached = ScriptWork("x", parallel=True, raise_exception=False, cache_calls=False)
        self.replacing = ScriptWork("x", parallel=True, raise_exception=False, when_busy="replace", vars={"n": 0})
        self.service = ServiceWork("x")
        self.blocking = ScriptWork("x", raise_exception=False, cache_calls=False, timeout=8.0)
        lost: dict[str, Any] = {"lost_after": 20.0, "grace": 3.0, "parallel": True, "raise_exception": False}
        self.leased = ScriptWork("x", on_lost="restart", retries=1, **lost)
        self.failing = ScriptWork("x", on_lost="fail", retries=1, **lost)

    def run(self) -> None:
        while len(self.jobs) < self.want:
            self.jobs.append(ScriptWork("job", parallel=True, raise_exception=False, vars={"n": 0}))
        while len(self.jobs) > self.want:
            self.jobs.pop(0)
        for job in self.jobs:
            job.run(str(self.mode))
        if self.schedule("@every 7s"):
            self.uncached.run("tick")
        if self.stop_some:
            self.stop_some = False
            self.cached.stop()
            self.replacing.stop()
        else:
            self.cached.run(str(self.mode))
            self.cached.run("always")
            self.replacing.run(str(self.mode))
        self.service.run(str(self.mode % 2))
        self.leased.run(str(self.mode))
        self.failing.run(str(self.mode))
        if self.click:
            self.blocking.run()
            self.clicks += 1
            self.click = False


class Watched(AppTester):
    """Notes what must never happen."""

    lost = False
    """Contact was lost at some time: an attempt may have been given up before any agent heard of it."""

    def _begin_server(
        self, program: Program, tree: dict[str, Any] | None = None, rev: int = 0, *, clean: bool = False
    ) -> None:
        self.base = msgspec.json.decode(msgspec.json.encode(tree or program.node()))
        self.base["app"] = {"name": "test", "run": 1, "stage": "starting", "message": ""}
        self.base_rev = rev
        self.revisions = []
        super()._begin_server(program, tree, rev, clean=clean)

    def _launch(self, call: StartCall) -> None:
        fake = self.fake(call.work)
        again = [(start.call, start.attempt) for start in fake.starts].count((call.call, call.attempt))
        assert again or fake.current is None, f"{call.call} was started while {fake.current} lives"
        earlier = [start.attempt for start in fake.starts if start.call == call.call]
        assert again or call.attempt > max(earlier, default=0), f"attempt {call.attempt} after {earlier}"
        assert again or self.lost or call.attempt == len(earlier) + 1, f"attempt {call.attempt} after {earlier}"
        super()._launch(call)

    def _do(self, instruction: Instruction) -> None:
        if isinstance(instruction, ForgetWorks):
            assert not set(instruction.works) & set(self.engine.works), "a work that is there was forgotten"
        super()._do(instruction)


class Lives(RuleBasedStateMachine):
    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        self.tester = Watched(Lab())
        self.over: dict[str, tuple[Stage, Any]] = {}
        self.lives = 1
        for name in FIXED:
            fake = self.tester.fake(name)
            fake.run_for = data.draw(st.sampled_from([None, 0.0, 1.0, 5.0]))
            fake.exit_code = data.draw(st.sampled_from([0, 1, [1, 0]]))
            fake.start_after = data.draw(st.sampled_from([0.0, 2.0]))
            fake.stop_after = data.draw(st.sampled_from([0.0, 3.0, 30.0]))
            fake.ready_after = data.draw(st.sampled_from([None, 0.0, 2.0]))

    # -- what users and works do
    @rule(mode=st.integers(0, 3))
    def set_mode(self, mode: int) -> None:
        self.tester.set("mode", mode)

    @rule(want=st.integers(0, 3))
    def set_want(self, want: int) -> None:
        self.tester.set("want", want)

    @rule(name=st.sampled_from(["click", "stop_some"]))
    def press(self, name: str) -> None:
        self.tester._event(Patch(ops=[{"op": "replace", "path": f"/vars/{name}", "value": True}], cause="ui"))

    @rule(value=st.integers())
    def append(self, value: int) -> None:
        self.tester._event(Patch(ops=[{"op": "add", "path": "/vars/rows/-", "value": value}], cause="ui"))

    @rule(value=st.integers(0, 3))
    def work_writes(self, value: int) -> None:
        self.tester.work_sets("replacing", [{"op": "replace", "path": "/n", "value": value}])

    @rule(number=st.integers(0, 5), value=st.integers(0, 3))
    def job_writes(self, number: int, value: int) -> None:
        self.tester.work_sets(f"jobs.{number}", [{"op": "replace", "path": "/n", "value": value}])

    @rule(
        name=st.sampled_from([*FIXED, "jobs.0", "jobs.1"]),
        what=st.sampled_from(["stop", "restart", "run", "run other"]),
    )
    def rest(self, name: str, what: str) -> None:
        try:
            if what == "stop":
                self.tester.stop_work(name)
            elif what == "restart":
                self.tester.restart_work(name)
            else:
                self.tester.run_work(name, *(["other"] if what == "run other" else []))
        except (CallError, NotFound):
            pass  # never asked yet, or not there

    @rule(add=st.booleans(), fails=st.booleans())
    def method(self, add: bool, fails: bool) -> None:
        def body() -> None:
            flow = self.tester.flow
            flow.want = len(flow.jobs) + 1 if add else 0
            if add:
                flow.jobs.append(ScriptWork("job", parallel=True, raise_exception=False, vars={"n": 0}))
                flow.jobs[-1].run("method")
            else:
                flow.jobs.clear()
            flow.replacing.run("method")
            if fails:
                raise OrchError("no")

        self.tester._event(ApiRequest(ticket=-1, method=body))

    @rule(name=st.sampled_from([*FIXED, "jobs.0"]))
    def killed(self, name: str) -> None:
        if self.tester.fake(name).current is not None:
            self.tester.kill(name)

    # -- what machines do
    @rule(count=st.integers(1, 5))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.tester.step()

    @rule(seconds=st.sampled_from([0.0, 0.5, 3.0, 20.0]))
    def time_passes(self, seconds: float) -> None:
        self.tester.advance(seconds)

    @precondition(lambda self: self.lives < 4)
    @rule(resumed=st.sampled_from([False, False, True]))
    def server_dies(self, resumed: bool) -> None:
        """By kill -9; or the run ended and is gone on with."""
        self.lives += 1
        if resumed:
            self.tester.resume()
        else:
            self.tester.restart_server()

    @precondition(lambda self: self.tester.engine.agents["local"].up and self.tester._silent_since is None)
    @rule()
    def contact_is_lost(self) -> None:
        self.tester.lost = True
        self.tester.lose_contact()

    @precondition(lambda self: self.tester._silent_since is not None)
    @rule()
    def contact_is_back(self) -> None:
        self.tester.regain_contact()

    # -- what always holds
    @invariant()
    def revisions_count_up_and_give_the_tree(self) -> None:
        if not hasattr(self, "tester"):
            return
        tester = self.tester
        assert [r.rev for r in tester.revisions] == list(
            range(tester.base_rev + 1, tester.base_rev + 1 + len(tester.revisions))
        )
        for revision in tester.revisions:
            apply_ops(tester.base, revision.ops)
        tester.base_rev += len(tester.revisions)
        tester.revisions.clear()
        assert tester.base_rev == tester.rev
        assert tester.base == tester.state

    @invariant()
    def what_is_done_stays_done(self) -> None:
        if not hasattr(self, "tester"):
            return
        assert self.tester.exit_code is None, self.tester.message
        for work in self.tester.engine.works.values():
            for call in work.book.calls.values():
                self._stays(call)
            assert work.book.current is None or not work.book.calls[work.book.current].done
            assert work.live <= (work.book.current is not None)

    def _stays(self, call: Call) -> None:
        now = (call.stage, call.result)
        assert self.over.get(call.id, now) == now
        if call.done:
            self.over[call.id] = now

    def teardown(self) -> None:
        """Left alone, everything ends."""
        if not hasattr(self, "tester"):
            return
        tester = self.tester
        if tester._silent_since is not None:
            tester.regain_contact()
        for fake in tester.fakes.values():
            if fake.name != "service":
                fake.run_for = fake.run_for or 1.0
            if fake.current is not None and fake.name != "service":
                tester._finish(fake, fake.current, reason=None, exit_code=0)
        tester.advance(200)
        self.revisions_count_up_and_give_the_tree()
        self.what_is_done_stays_done()
        for work in tester.engine.works.values():
            waiting = [call.id for call in work.book.calls.values() if not call.done]
            held_back = work.spec.name in ("service", "uncached")  # up for ever, asked again every seven seconds
            assert held_back or not waiting, f"{waiting} never end"
        assert not tester.state["vars"]["click"]
        self._objects_equal_the_tree(tester.program.node(), tester.state)

    def _objects_equal_the_tree(self, mine: dict[str, Any], tree: dict[str, Any]) -> None:
        assert mine["vars"] == tree["vars"]
        assert mine["structures"]["jobs"]["order"] == tree["structures"]["jobs"]["order"]
        assert set(mine["works"]) == set(tree["works"])
        for name, work in mine["structures"]["jobs"]["works"].items():
            assert work["vars"] == tree["structures"]["jobs"]["works"][name]["vars"]
        assert mine["works"]["replacing"]["vars"] == tree["works"]["replacing"]["vars"]


TestLives = Lives.TestCase
TestLives.settings = settings(
    max_examples=int(os.environ.get("ORCH_TEST_EXAMPLES", "60")),
    stateful_step_count=40,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
