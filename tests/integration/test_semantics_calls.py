"""What a Call promises: identity, caching, hand-over, blocking, replacement, attempts, stops, resumes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orch import Call, CloudCompute, Drive, Flow, ScriptWork, Stage, Work
from orch.errors import CallError, StateTypeError
from orch.events import AskCall, StopApp
from orch.testing import AppTester
from orch.wire import Ended


class Python(Work):
    def run(self, *args: Any, **kwargs: Any) -> None: ...


class Box(Flow):
    """Its works are given as keyword arguments of ScriptWork; its run() is `_body`."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.flag = False
        self.count = 0
        self.log: list[Any] = []
        self.w = ScriptWork("true", **(options or {}))
        self.other = ScriptWork("other", parallel=True)
        self.py = Python(parallel=True)

    def run(self) -> None:
        self._body(self)


def started(body: Callable[[Any], None], options: dict[str, Any] | None = None, /, **w: Any) -> AppTester:
    flow = Box(options)
    flow._body = body
    tester = AppTester(flow, works={"w": w})
    tester.settle()
    return tester


def restarted(tester: AppTester, body: Callable[[Any], None], *, resume: bool = False) -> None:
    if resume:
        tester.resume()
    else:
        tester.restart_server()
    tester.flow._body = body


def ids(tester: AppTester, name: str = "w") -> list[str]:
    return [start.call for start in tester.fake(name).starts]


PARALLEL = {"parallel": True}


# ---- identity --------------------------------------------------------------------------------------------------------


def test_run_only_records_the_wish_and_returns_a_call() -> None:
    got: list[Call] = []
    tester = started(lambda flow: got.append(flow.w.run("a")), PARALLEL)
    first = got[0]
    assert (first.id, first.stage, first.done, first.attempt) == ("1-w-1", Stage.PENDING, False, 0)
    assert (first.args, first.kwargs, first.result, first.exit_code) == (("a",), {}, None, None)
    assert len(tester.fake("w").starts) == 1


def test_call_id_is_run_number_work_and_counter() -> None:
    tester = started(lambda flow: [flow.w.run(str(i)) for i in range(3)] and None, PARALLEL)
    assert [call.id for call in tester.calls("w")] == ["1-w-1", "1-w-2", "1-w-3"]


def test_order_and_repetition_of_arguments_make_different_calls() -> None:
    def body(flow: Any) -> None:
        for args in ([1, 2], [2, 1], [1, 1, 2]):
            flow.py.run(args)
            flow.py.run(args)

    assert len(started(body).calls("py")) == 3


def test_dict_key_order_does_not_matter_and_positional_and_keyword_forms_differ() -> None:
    def body(flow: Any) -> None:
        flow.py.run({"a": 1, "b": {"c": 2, "d": 3}})
        flow.py.run({"b": {"d": 3, "c": 2}, "a": 1})
        flow.py.run(x=1, y=2)
        flow.py.run(y=2, x=1)
        flow.py.run(1, 2)

    assert len(started(body).calls("py")) == 3


def test_drive_and_cloud_compute_are_legal_arguments_others_are_a_state_type_error() -> None:
    def body(flow: Any) -> None:
        flow.py.run(Drive("m"), CloudCompute("gpu"))
        with pytest.raises(StateTypeError, match="argument 0"):
            flow.py.run(object())
        with pytest.raises(StateTypeError, match="argument x"):
            flow.py.run(x={1})

    tester = started(body)
    args = tester.fake("py").starts[0].args
    assert [next(iter(arg)) for arg in args] == ["$drive", "$compute"]
    assert tester.exit_code is None


def test_a_call_has_no_truth_value() -> None:
    def body(flow: Any) -> None:
        with pytest.raises(TypeError, match=r"\.succeeded.*\.result"):
            bool(flow.w.run())

    assert started(body, PARALLEL).exit_code is None


# ---- queue and replace -----------------------------------------------------------------------------------------------


def test_different_calls_of_one_work_run_one_after_another_in_the_order_asked() -> None:
    tester = started(lambda flow: [flow.w.run(x) for x in "cab"] and None, PARALLEL)
    assert len(tester.fake("w").starts) == 1
    tester.advance(10)
    assert [start.args for start in tester.fake("w").starts] == [["c"], ["a"], ["b"]]
    assert all(call.succeeded for call in tester.calls("w"))


def test_when_busy_replace_stops_the_running_one_and_starts_when_it_is_gone() -> None:
    def body(flow: Any) -> None:
        flow.w.run("b" if flow.flag else "a")

    tester = started(body, {"parallel": True, "when_busy": "replace"}, run_for=None, stop_after=3.0)
    tester.set("flag", True)
    tester.settle()
    assert ids(tester) == ["1-w-1"]
    assert tester.calls("w")[1].stage is Stage.PENDING
    tester.advance(3)
    first, second = tester.calls("w")
    assert (first.stage, first.reason) == (Stage.STOPPED, "replaced")
    assert (first.done, first.succeeded, first.failed) == (True, False, False)
    assert second.stage is Stage.RUNNING


def test_of_several_asked_in_one_pass_only_the_last_counts() -> None:
    options = {"parallel": True, "when_busy": "replace"}
    tester = started(lambda flow: [flow.w.run(x) for x in "abc"] and None, options, run_for=None)
    tester.advance(100)
    assert [call.args for call in tester.calls("w")] == [("c",)]
    assert len(tester.fake("w").starts) == 1


def test_of_several_asked_in_one_pass_the_last_counts_also_when_it_has_finished() -> None:
    options = {"parallel": True, "when_busy": "replace"}
    tester = started(lambda flow: [flow.w.run(x) for x in "abc"] and None, options)
    tester.advance(100)
    assert [call.args for call in tester.calls("w")] == [("c",)]
    assert tester.calls("w")[0].succeeded


def test_earlier_arguments_replace_again() -> None:
    options = {"parallel": True, "when_busy": "replace"}
    tester = started(lambda flow: flow.w.run(str(flow.count % 2)), options, run_for=None)
    for number in range(1, 4):
        tester.set("count", number)
        tester.advance(1)
    assert [call.args[0] for call in tester.calls("w")] == ["0", "1", "0", "1"]
    assert tester.calls("w")[-1].stage is Stage.RUNNING


# ---- caching ---------------------------------------------------------------------------------------------------------


def test_arguments_that_succeeded_are_not_run_again_asking_returns_the_finished_call() -> None:
    got: list[Call] = []
    tester = started(lambda flow: got.append(flow.w.run("a")), PARALLEL, result=["x"])
    tester.advance(10)
    for number in range(5):
        tester.set("count", number + 1)
        tester.settle()
    assert len(tester.fake("w").starts) == 1
    assert (got[-1].id, got[-1].succeeded, got[-1].result) == ("1-w-1", True, ["x"])
    tester.restart_server()
    tester.flow._body = lambda flow: got.append(flow.w.run("a"))
    tester.settle()
    assert got[-1].succeeded
    assert len(tester.fake("w").starts) == 1


def test_arguments_that_failed_after_all_retries_are_not_run_again() -> None:
    got: list[Call] = []
    options = {"parallel": True, "raise_exception": False, "retries": 1}
    tester = started(lambda flow: got.append(flow.w.run("a")), options, exit_code=3)
    tester.advance(100)
    tester.set("count", 1)
    tester.advance(100)
    assert len(tester.fake("w").starts) == 2
    assert (got[-1].failed, got[-1].exit_code, got[-1].attempt) == (True, 3, 2)


def test_cached_calls_are_never_forgotten_though_the_tree_shows_the_last_20() -> None:
    def body(flow: Any) -> None:
        for number in range(30):
            flow.w.run(str(number))

    tester = started(body, PARALLEL)
    tester.advance(100)
    shown = tester.state["works"]["w"]["calls"]
    assert list(shown) == [f"1-w-{n}" for n in range(11, 31)]
    tester.restart_server()
    tester.flow._body = body
    tester.advance(100)
    assert len(tester.fake("w").starts) == 30


def test_uncached_while_it_runs_asking_returns_it() -> None:
    got: list[Call] = []
    tester = started(lambda flow: got.append(flow.w.run("a")), {"parallel": True, "cache_calls": False}, run_for=None)
    tester.set("count", 1)
    tester.settle()
    assert {call.id for call in got} == {"1-w-1"}


def test_uncached_parallel_is_handed_over_in_one_committed_pass_then_the_same_arguments_start_anew() -> None:
    def body(flow: Any) -> None:
        call = flow.w.run("a")
        if call.done:
            flow.log.append(call.id)

    tester = started(body, {"parallel": True, "cache_calls": False}, run_for=10.0)
    tester.advance(9.0)
    assert tester.state["vars"]["log"] == []
    tester.advance(1.0)
    assert tester.state["vars"]["log"] == ["1-w-1"]
    tester.advance(10.0)
    assert tester.state["vars"]["log"] == ["1-w-1", "1-w-2"]
    assert ids(tester) == ["1-w-1", "1-w-2", "1-w-3"]


def test_uncached_parallel_asked_twice_in_a_pass_is_the_same_finished_call() -> None:
    seen: list[tuple[str, str]] = []

    def body(flow: Any) -> None:
        if len(seen) < 1:
            one, two = flow.w.run("a"), flow.w.run("a")
            if one.done:
                seen.append((one.id, two.id))

    tester = started(body, {"parallel": True, "cache_calls": False})
    tester.advance(5)
    assert seen == [("1-w-1", "1-w-1")]


def test_uncached_blocking_is_handed_over_in_every_pass_until_one_reaches_the_end() -> None:
    seen: list[str] = []

    def body(flow: Any) -> None:
        if flow.flag:
            seen.append(flow.w.run("a").id)
            flow.blocked.run()
            flow.flag = False

    flow = WithSecond({"cache_calls": False})
    flow._body = body
    tester = AppTester(flow, works={"blocked": {"run_for": 60.0}})
    for number in (1, 2):
        seen.clear()
        tester.set("flag", True)
        tester.advance(30)
        for count in range(3):  # passes that end at the second call
            tester.set("count", 10 * number + count)
            tester.settle()
        assert len(seen) >= 4
        assert set(seen) == {f"1-w-{number}"}
        tester.advance(60)
        assert tester.state["vars"]["flag"] is False
        assert len(ids(tester)) == number


class WithSecond(Box):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(options)
        self.blocked = ScriptWork("second", cache_calls=False)


class TwoSteps(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.go = False
        self.done = 0
        self.first = ScriptWork("first", cache_calls=False)
        self.second = ScriptWork("second", cache_calls=False)

    def run(self) -> None:
        if self.go:
            self.first.run()
            self.second.run()
            self.done += 1
            self.go = False


def test_two_blocking_uncached_calls_run_once_each_per_round() -> None:
    tester = AppTester(TwoSteps())
    for round_ in (1, 2):
        tester.set("go", True)
        tester.until(lambda r=round_: tester.state["vars"]["done"] == r)
        assert len(tester.fake("first").starts) == round_
        assert len(tester.fake("second").starts) == round_


def test_a_hand_over_survives_a_restart_of_the_server() -> None:
    tester = AppTester(TwoSteps())
    tester.set("go", True)
    tester.until(lambda: tester.fake("second").current is not None)
    tester.restart_server()
    tester.until(lambda: tester.state["vars"]["done"] == 1)
    assert len(tester.fake("first").starts) == 1
    assert len(tester.fake("second").starts) == 1


def test_a_finish_that_nobody_asked_for_lapses_with_the_first_pass_that_reaches_the_end() -> None:
    def body(flow: Any) -> None:
        if flow.flag:
            flow.log.append(flow.w.run("a").done)

    tester = started(body, {"parallel": True, "cache_calls": False}, run_for=5.0)
    tester.set("flag", True)
    tester.settle()
    tester.set("flag", False)
    tester.advance(10)
    tester.set("flag", True)
    tester.settle()
    assert not any(tester.state["vars"]["log"])
    assert ids(tester) == ["1-w-1", "1-w-2"]


def test_an_api_method_lets_nothing_lapse() -> None:
    tester = AppTester(TwoSteps())
    tester.set("go", True)
    tester.until(lambda: tester.fake("second").current is not None)
    tester.call_method(lambda: setattr(tester.flow, "done", 0))
    tester.until(lambda: tester.state["vars"]["done"] == 1)
    assert len(tester.fake("first").starts) == 1


def test_hand_overs_are_part_of_the_passs_transaction() -> None:
    """What an API method was given and then raised is still there for the flow."""
    seen: list[bool] = []

    def body(flow: Any) -> None:
        if flow.flag:
            seen.append(flow.w.run("a").done)
        else:
            flow.blocked.run()  # ends the pass before anything can lapse

    flow = WithSecond({"parallel": True, "cache_calls": False})
    flow._body = body
    tester = AppTester(flow, works={"blocked": {"run_for": None}})
    tester.run_work("w", "a")
    tester.advance(5)

    def method() -> None:
        seen.append(tester.flow.w.run("a").done)
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        tester.call_method(method)
    assert seen == [True]
    tester.set("flag", True)
    tester.settle()
    assert seen[:2] == [True, True]
    tester.set("count", 1)
    tester.settle()
    assert seen[:3] == [True, True, False]  # used up: the same arguments started anew


# ---- blocking --------------------------------------------------------------------------------------------------------


def test_blocking_ends_the_whole_root_pass_finally_runs_except_exception_does_not_catch() -> None:
    seen: list[str] = []

    def body(flow: Any) -> None:
        flow.count += 1
        try:
            flow.w.run()
        except Exception:
            seen.append("except")
        finally:
            seen.append("finally")
        seen.append("past")
        flow.flag = True

    tester = started(body, run_for=5.0)
    assert set(seen) == {"finally"}
    assert tester.state["vars"]["count"] >= 1  # committed
    assert tester.state["vars"]["flag"] is False
    tester.until(lambda: tester.state["vars"]["flag"])
    assert seen[-2:] == ["finally", "past"]


class Outer(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.after = 0
        self.inner = Box({})

    def run(self) -> None:
        self.inner.run()
        self.after += 1 if self.after < 3 else 0


def test_a_blocking_call_of_a_child_ends_the_roots_pass() -> None:
    flow = Outer()
    flow.inner._body = lambda inner: inner.w.run()
    tester = AppTester(flow, works={"inner.w": {"run_for": 9.0}})
    tester.advance(8)
    assert tester.state["vars"]["after"] == 0
    tester.advance(5)
    assert tester.state["vars"]["after"] == 3


def test_each_later_pass_starts_at_the_top_again() -> None:
    def body(flow: Any) -> None:
        flow.count += 1
        flow.w.run()

    tester = started(body, run_for=5.0)
    before = tester.state["vars"]["count"]
    tester.set("flag", True)
    tester.settle()
    assert tester.state["vars"]["count"] == before + 1


def test_a_failed_blocking_call_lets_the_flow_go_on_and_read_why() -> None:
    def body(flow: Any) -> None:
        call = flow.w.run()
        flow.log = [call.failed, str(call.reason), call.exit_code, call.message, call.done]

    tester = started(body, {"raise_exception": False}, exit_code=7)
    tester.advance(5)
    assert tester.state["vars"]["log"] == [True, "exit_code", 7, "exit code 7", True]
    assert tester.exit_code is None


def test_parallel_returns_at_once() -> None:
    tester = started(lambda flow: (flow.w.run(), setattr(flow, "flag", True)) and None, PARALLEL, run_for=None)
    assert tester.state["vars"]["flag"] is True


# ---- failures --------------------------------------------------------------------------------------------------------


def test_raise_exception_fails_the_app_at_once_and_the_works_are_stopped_before_it_exits() -> None:
    def body(flow: Any) -> None:
        flow.other.run()
        flow.w.run()

    flow = Box(PARALLEL)
    flow._body = body
    works = {"w": {"exit_code": 4}, "other": {"run_for": None, "stop_after": 3.0}}
    tester = AppTester(flow, works=works)
    tester.until(lambda: tester.stage == "failed")
    failed_at = tester.now
    assert "w failed" in tester.message or "w failed" in tester.state["app"]["message"]
    assert tester.exit_code is None
    tester.until(lambda: tester.exit_code is not None)
    assert tester.exit_code == 1
    assert tester.now - failed_at == pytest.approx(3.0)
    assert tester.calls("other")[0].reason == "stopped"


def test_an_app_that_ends_waits_at_most_grace_and_two_seconds() -> None:
    flow = Box({"parallel": True, "grace": 4.0})
    flow._body = lambda flow: flow.w.run()
    tester = AppTester(flow, works={"w": {"run_for": None}})
    tester.settle()
    tester.fake("w").current = None  # it never answers again
    began = tester.now
    tester.stop()
    tester.until(lambda: tester.exit_code is not None)
    assert tester.now - began == pytest.approx(6.0)


def test_the_traceback_of_a_python_work_is_named() -> None:
    flow = Box()
    flow._body = lambda flow: flow.py.run()
    tester = AppTester(flow, works={"py": {"exception": "ValueError: bad"}})
    tester.until(lambda: tester.exit_code is not None)
    assert "py failed: ValueError: bad" in tester.message


def test_retries_wait_retry_delay_and_then_fail() -> None:
    options = {"parallel": True, "raise_exception": False, "retries": 2, "retry_delay": 5.0}
    tester = started(lambda flow: flow.w.run(), options, exit_code=1)
    for seconds, attempts in ((5.9, 1), (0.2, 2), (5.8, 2), (0.2, 3), (1.0, 3)):
        tester.advance(seconds)  # each attempt takes a second, then the delay
        assert len(tester.fake("w").starts) == attempts
    call = tester.calls("w")[0]
    assert (call.failed, call.attempt) == (True, 3)


def test_a_retry_that_succeeds_is_a_success() -> None:
    tester = started(lambda flow: flow.w.run(), {"parallel": True, "retries": 3}, exit_code=[1, 1, 0])
    tester.advance(20)
    call = tester.calls("w")[0]
    assert (call.succeeded, call.attempt, call.reason, call.message) == (True, 3, None, "")
    assert tester.exit_code is None


def test_between_attempts_the_work_is_pending_and_says_why() -> None:
    tester = started(lambda flow: flow.w.run(), {"parallel": True, "retries": 1, "retry_delay": 60.0}, exit_code=2)
    tester.advance(2)
    assert tester.flow.w.is_pending
    assert tester.flow.w.status.reason == "exit_code"
    assert "retry 1 of 1" in tester.flow.w.status.message


def test_a_retrys_due_time_is_journalled_with_the_failure() -> None:
    tester = started(lambda flow: flow.w.run(), {"parallel": True, "retries": 1, "retry_delay": 60.0}, exit_code=[2, 0])
    tester.advance(30)
    restarted(tester, lambda flow: flow.w.run())
    tester.advance(30.9)
    assert len(tester.fake("w").starts) == 1
    tester.advance(0.2)
    assert [start.attempt for start in tester.fake("w").starts] == [1, 2]


def test_timeout_is_per_attempt_and_counted() -> None:
    options = {"parallel": True, "raise_exception": False, "timeout": 3.0, "retries": 1}
    tester = started(lambda flow: flow.w.run(), options, run_for=None)
    tester.advance(20)
    call = tester.calls("w")[0]
    assert (call.failed, call.reason, call.attempt) == (True, "timeout", 2)
    assert tester.flow.w.has_timeout
    assert tester.flow.w.num_timeouts == 2


def test_a_killed_process_is_retried_too() -> None:
    tester = started(lambda flow: flow.w.run(), {"parallel": True, "retries": 1}, run_for=None)
    tester.kill("w")
    tester.advance(2)
    assert tester.flow.w.is_running
    assert tester.calls("w")[0].attempt == 2


def test_arguments_that_cannot_be_split_give_a_failed_call_not_an_error_in_the_flow() -> None:
    def body(flow: Any) -> None:
        call = flow.w.run("'unclosed")
        flow.log = [call.failed, str(call.reason), call.message]

    tester = started(body, {"raise_exception": False})
    failed, reason, message = tester.state["vars"]["log"]
    assert (failed, reason) == (True, "exception")
    assert "cannot be split" in message
    assert tester.exit_code is None
    assert tester.fake("w").starts == []
    assert tester.passes < 5


def test_arguments_that_cannot_be_split_are_a_failure_with_raise_exception() -> None:
    tester = started(lambda flow: flow.w.run("'unclosed"))
    assert tester.exit_code == 1
    assert "cannot be split" in tester.message
    tester = started(lambda flow: flow.w.run(lr=1), {"raise_exception": False})
    assert "keyword" in tester.calls("w")[0].message


def test_uncached_arguments_that_cannot_be_split_do_not_spin() -> None:
    def body(flow: Any) -> None:
        if flow.flag:
            flow.log.append(flow.w.run("'x").failed)
            flow.flag = False

    tester = started(body, {"parallel": True, "cache_calls": False, "raise_exception": False})
    tester.set("flag", True)
    tester.settle()
    assert tester.state["vars"]["log"] == [True]
    assert len(tester.calls("w")) == 1


# ---- stops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("parallel", [True, False])
def test_a_stop_by_the_user_holds_the_work(cached: bool, parallel: bool) -> None:
    def body(flow: Any) -> None:
        call = flow.w.run("b" if flow.flag else "a")
        flow.log = [call.id, str(call.stage)]

    options = {"parallel": parallel, "cache_calls": cached, "retries": 3}
    tester = started(body, options, run_for=None, stop_after=1.0)
    tester.stop_work("w")
    tester.advance(20)
    assert tester.state["vars"]["log"] == ["1-w-1", "stopped"]
    assert tester.state["works"]["w"]["status"]["held"] is True
    call = tester.calls("w")[0]
    assert (call.done, call.succeeded, call.failed, call.reason) == (True, False, False, "stopped")
    assert tester.exit_code is None
    for number in range(3):
        tester.set("count", number + 1)
        tester.advance(5)
    assert ids(tester) == ["1-w-1"]
    restarted(tester, body)
    tester.advance(5)
    assert ids(tester) == ["1-w-1"], "the hold was forgotten"
    tester.set("flag", True)
    tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"], "other arguments"


def test_a_held_work_runs_again_by_restart() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=None)
    tester.stop_work("w")
    tester.advance(5)
    tester.restart_work("w")
    tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]
    assert tester.flow.w.is_running


def test_a_held_work_runs_again_by_post_run() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=None)
    tester.stop_work("w")
    tester.advance(5)
    tester.run_work("w", "a")
    tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]


def test_after_work_stop_a_later_passs_run_starts_it_again() -> None:
    def body(flow: Any) -> None:
        if flow.flag:
            flow.flag = False
            flow.w.stop()
        else:
            flow.w.run("a")

    tester = started(body, PARALLEL, run_for=None)
    tester.set("flag", True)
    tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]
    assert tester.calls("w")[0].reason == "stopped"


def test_stop_drops_what_waits_too() -> None:
    def body(flow: Any) -> None:
        if flow.flag:
            flow.w.stop()
        else:
            for x in "abc":
                flow.w.run(x)

    tester = started(body, PARALLEL, run_for=None)
    tester.set("flag", True)
    tester.advance(5)
    assert {call.stage for call in tester.calls("w")} == {Stage.STOPPED}
    assert len(ids(tester)) == 1


def test_a_stopped_call_is_never_a_cached_result_even_if_it_waited_for_a_retry() -> None:
    def body(flow: Any) -> None:
        if flow.flag:
            flow.w.stop()
        else:
            flow.w.run("a")

    tester = started(body, {"parallel": True, "retries": 5, "retry_delay": 100.0}, exit_code=1)
    tester.advance(10)
    tester.set("flag", True)
    tester.advance(10)
    assert tester.calls("w")[0].stage is Stage.STOPPED
    assert tester.calls("w")[0].message == "", "it waits for no retry any more"
    tester.advance(500)
    assert len(ids(tester)) == 1
    tester.set("flag", False)
    tester.advance(1)
    assert ids(tester) == ["1-w-1", "1-w-2"]


@pytest.mark.parametrize("running", [True, False])
def test_restart_stops_then_runs_the_latest_call_again(running: bool) -> None:
    def body(flow: Any) -> None:
        flow.w.run("a")
        if flow.flag:
            flow.flag = False
            flow.w.restart()

    tester = started(body, PARALLEL, run_for=None if running else 1.0)
    tester.advance(5)
    tester.set("flag", True)
    tester.advance(5)
    starts = tester.fake("w").starts
    assert [(start.call, start.args) for start in starts] == [("1-w-1", ["a"]), ("1-w-2", ["a"])]
    assert tester.calls("w")[0].stage is (Stage.STOPPED if running else Stage.SUCCEEDED)
    assert tester.calls("w")[1].stage is (Stage.RUNNING if running else Stage.SUCCEEDED)


def test_restart_runs_the_latest_of_several_calls() -> None:
    tester = started(lambda flow: [flow.w.run(x) for x in "ab"] and None, PARALLEL, run_for=None)
    tester.flow._body = lambda flow: None
    tester.restart_work("w")
    tester.advance(5)
    assert [start.args for start in tester.fake("w").starts] == [["a"], ["b"]]
    assert [call.stage for call in tester.calls("w")] == [Stage.STOPPED, Stage.STOPPED, Stage.RUNNING]


def test_a_restart_that_the_server_forgot_between_stop_and_start_still_happens() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=None, stop_after=5.0)
    tester.restart_work("w")
    tester.advance(1)
    restarted(tester, lambda flow: flow.w.run("a"))
    tester.advance(10)
    assert ids(tester) == ["1-w-1", "1-w-2"]
    assert tester.flow.w.is_running


def test_restart_before_any_call_is_an_error_at_that_line() -> None:
    tester = started(lambda flow: None)
    with pytest.raises(CallError, match="never been asked"):
        tester.call_method(lambda: tester.flow.w.restart())
    with pytest.raises(CallError, match="never been asked"):
        tester.restart_work("w")
    assert tester.exit_code is None


def test_restart_forgets_failures_and_the_server_remembers_that() -> None:
    def body(flow: Any) -> None:
        flow.w.run("a")
        if flow.flag:
            flow.w.run("b")

    tester = started(body, {"parallel": True, "raise_exception": False}, exit_code=[1, 0, 0])
    tester.set("flag", True)
    tester.advance(10)  # a failed, b succeeded
    tester.restart_work("w")  # b again; a's failure is forgotten
    tester.advance(10)
    assert [start.args for start in tester.fake("w").starts] == [["a"], ["b"], ["b"], ["a"]]


# ---- resume ----------------------------------------------------------------------------------------------------------


def test_after_kill_9_of_the_server_running_calls_go_on_and_nothing_is_started_twice() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=50.0)
    for _ in range(3):
        restarted(tester, lambda flow: flow.w.run("a"))
        tester.advance(10)
        assert tester.flow.w.is_running
    tester.advance(30)
    assert tester.flow.w.has_succeeded
    assert len(ids(tester)) == 1


def test_an_end_that_was_reported_while_the_server_was_down_is_recorded_once() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=5.0)
    tester.engine.handle = lambda event, now: []  # type: ignore[method-assign]  (it is dead)
    tester.advance(10)
    assert tester.fake("w").current is None
    restarted(tester, lambda flow: flow.w.run("a"))
    tester.advance(10)
    assert tester.flow.w.has_succeeded
    assert tester.flow.w.num_successes == 1
    assert len(ids(tester)) == 1


def test_resume_keeps_results_forgets_failures_and_stops_what_was_running() -> None:
    def body(flow: Any) -> None:
        flow.w.run("ok")
        flow.other.run("bad")
        flow.py.run("long")

    flow = Box(PARALLEL)
    flow._body = body
    flow.other._options["raise_exception"] = False
    tester = AppTester(flow, works={"other": {"exit_code": [1, 0]}, "py": {"run_for": None}})
    tester.advance(10)
    assert tester.flow.other.has_failed
    tester.resume()
    tester.flow._body = lambda flow: None
    tester.settle()
    assert tester.flow.py.has_stopped
    assert tester.state["works"]["py"]["status"]["stage"] == "stopped"
    assert tester.state["works"]["py"]["calls"]["1-py-1"]["stage"] == "stopped"
    tester.flow._body = body
    tester.set("count", 1)
    tester.advance(10)
    assert ids(tester) == ["1-w-1"]
    assert ids(tester, "other") == ["1-other-1", "1-other-2"]
    assert ids(tester, "py") == ["1-py-1", "1-py-2"]


def test_failures_that_a_resume_forgot_stay_forgotten_when_the_server_dies_next() -> None:
    options = {"parallel": True, "raise_exception": False}
    tester = started(lambda flow: flow.w.run("a"), options, exit_code=1)
    tester.advance(5)
    restarted(tester, lambda flow: None, resume=True)
    tester.settle()
    restarted(tester, lambda flow: flow.w.run("a"))
    tester.advance(5)
    assert len(ids(tester)) == 2


def test_resume_forgets_a_hold() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=None)
    tester.stop_work("w")
    tester.advance(5)
    restarted(tester, lambda flow: flow.w.run("a"), resume=True)
    tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]


def test_a_call_asked_while_a_pass_runs_is_ordered_after_it() -> None:
    box: list[AppTester] = []

    def body(flow: Any) -> None:
        if box and flow.flag:
            box[0]._event(AskCall(work="w", args=["api"]))
            flow.w.run("flow")
            flow.flag = False

    box.append(started(body, PARALLEL))
    box[0].set("flag", True)
    box[0].advance(10)
    assert [(call.id, call.args[0]) for call in box[0].calls("w")] == [("1-w-1", "flow"), ("1-w-2", "api")]


def test_a_parallel_hand_over_is_used_up_by_a_committed_pass_that_blocks_behind_it() -> None:
    seen: list[str] = []

    def body(flow: Any) -> None:
        call = flow.w.run("a")
        if call.done:
            seen.append(call.id)
        flow.blocked.run()

    flow = WithSecond({"parallel": True, "cache_calls": False})
    flow._body = body
    tester = AppTester(flow, works={"w": {"run_for": 5.0}, "blocked": {"run_for": None}})
    tester.advance(6)
    tester.set("count", 1)
    tester.settle()
    assert seen == ["1-w-1"]
    assert ids(tester) == ["1-w-1", "1-w-2"]


def test_launches_and_ends_are_fsynced_other_diffs_need_not() -> None:
    batches: list[tuple[bool, set[str]]] = []
    flow = Box(PARALLEL)
    flow._body = lambda flow: flow.w.run()
    tester = AppTester(flow, works={"w": {"run_for": 5.0}})
    take = tester.engine.take_batch

    def spy() -> Any:
        batch = take()
        if batch is not None:
            stages = {fact["stage"] + str(fact["attempt"]) for kind, _, fact in batch.facts if kind == "call"}
            batches.append((batch.durable, stages))
        return batch

    tester.engine.take_batch = spy  # type: ignore[method-assign]
    tester.advance(4)
    tester.set("count", 1)
    tester.advance(10)
    assert any(durable and "pending1" in stages for durable, stages in batches)
    assert any(durable and "succeeded1" in stages for durable, stages in batches)
    assert any(not durable for durable, _ in batches)


def test_nothing_is_started_while_the_app_ends() -> None:
    tester = started(lambda flow: flow.w.run("a"), PARALLEL, run_for=None, stop_after=5.0)
    tester.stop()
    for ask in (lambda: tester.run_work("other"), lambda: tester.restart_work("w")):
        with pytest.raises(CallError, match="the app is stopping"):
            ask()
    tester.until(lambda: tester.exit_code is not None)
    assert tester.exit_code == 0
    assert len(ids(tester)) == 1


def test_a_pass_that_ends_after_the_apps_stop_starts_nothing() -> None:
    box: list[AppTester] = []

    def body(flow: Any) -> None:
        if flow.flag:
            box[0]._event(StopApp())
            flow.count = 5
            flow.w.run("late")

    box.append(started(body, PARALLEL))
    box[0].set("flag", True)
    while box[0].step():
        pass
    assert box[0].exit_code == 0
    assert ids(box[0]) == []


def test_post_run_of_what_runs_or_has_succeeded_starts_nothing_new() -> None:
    tester = started(lambda flow: None, PARALLEL, run_for=10.0)
    for _ in range(2):
        assert tester.run_work("w", "a")["call"] == "1-w-1"
        tester.advance(1)
    tester.advance(20)
    assert tester.run_work("w", "a")["call"] == "1-w-1"
    assert tester.calls("w")[0].succeeded
    tester.advance(5)
    assert ids(tester) == ["1-w-1"]


def test_post_run_of_what_has_failed_or_is_uncached_starts_it_again() -> None:
    tester = started(lambda flow: None, {"parallel": True, "raise_exception": False}, exit_code=1)
    for _ in range(2):
        tester.run_work("w", "a")
        tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]
    tester = started(lambda flow: None, {"parallel": True, "cache_calls": False})
    for _ in range(2):
        tester.run_work("w", "a")
        tester.advance(5)
    assert ids(tester) == ["1-w-1", "1-w-2"]


def test_post_run_with_arguments_that_cannot_be_used_is_refused() -> None:
    tester = started(lambda flow: None, PARALLEL)
    with pytest.raises(CallError, match="cannot be split"):
        tester.run_work("w", "'x")
    assert tester.calls("w") == []
    assert tester.exit_code is None


def test_of_several_asked_in_turns_the_last_counts() -> None:
    options = {"parallel": True, "when_busy": "replace"}
    tester = started(lambda flow: [flow.w.run(x) for x in "aba"] and None, options, run_for=None)
    tester.advance(10)
    assert [call.args for call in tester.calls("w")] == [("a",)]
    tester.flow._body = lambda flow: [flow.w.run(x) for x in "bab"] and None
    tester.set("flag", True)
    tester.advance(10)
    assert [start.args for start in tester.fake("w").starts] == [["a"], ["b"]]


def test_an_app_whose_first_pass_blocks_is_running() -> None:
    tester = started(lambda flow: flow.w.run(), run_for=None)
    assert tester.stage == tester.state["app"]["stage"] == "running"


def test_an_end_that_is_told_twice_counts_once() -> None:
    """As by a new agent that reads the exit record again."""
    options = {"parallel": True, "timeout": 3.0, "retries": 1, "retry_delay": 60.0, "raise_exception": False}
    tester = started(lambda flow: flow.w.run(), options, run_for=None)
    tester.advance(30)
    for _ in range(2):
        tester._report(Ended(work="w", call="1-w-1", attempt=1, at=tester.now, reason="timeout"))
        tester.advance(10)
    assert tester.flow.w.num_timeouts == 1
    tester.advance(14)
    assert len(ids(tester)) == 2, "the retry was put off"
    tester._report(Ended(work="w", call="1-w-1", attempt=1, at=tester.now))
    tester.settle()
    assert tester.flow.w.is_running


# ---- long lives


def test_calls_that_nobody_can_ask_for_leave_the_journal() -> None:
    """Sixty uncached calls: the last twenty stay, in the server that has run them and in the one that resumes."""

    def body(flow: Any) -> None:
        flow.w.run(flow.flag)
        flow.other.run(flow.count // 2)

    tester = started(body, {"parallel": True, "cache_calls": False}, run_for=1.0)
    for number in range(1, 61):
        tester.set("/vars/count", number)
        tester.advance(2.0)
    for again in (False, True):
        book, cached = (tester.engine.works[name].book for name in ("w", "other"))
        assert book.counter >= 60
        assert 20 <= len(book.calls) <= 22
        assert len(cached.calls) == len(cached.latest) == 31  # each of these is an answer still
        assert set(tester.facts["call"]) == {*book.calls, *cached.calls}
        starts = len(ids(tester, "other"))
        if not again:
            restarted(tester, body)
            tester.set("/vars/count", 4)
            tester.settle()
            assert len(ids(tester, "other")) == starts
