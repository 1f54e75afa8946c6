"""What a ServiceWork promises: `run(args)` declares what shall be up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orch import Flow, ServiceWork, Stage
from orch.errors import StateTypeError
from orch.testing import AppTester
from orch.wire import Ended, Ready


class Box(Flow):
    def __init__(self, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: flow.ask()
        self.which = "a"
        self.count = 0
        self.past = 0
        self.w = ServiceWork("serve --port {port}", **(options or {}))

    def ask(self) -> None:
        self.w.run(self.which)
        self.past = self.count + 1

    def run(self) -> None:
        self._body(self)


def started(options: dict[str, Any] | None = None, /, **w: Any) -> AppTester:
    flow = Box(options)
    tester = AppTester(flow, works={"w": w})
    tester.settle()
    return tester


def starts(tester: AppTester) -> list[tuple[str, int]]:
    return [(start.call, start.attempt) for start in tester.fake("w").starts]


def test_defaults() -> None:
    options = ServiceWork("serve")._options
    assert options["parallel"] is True
    assert options["when_busy"] == "replace"
    assert options["raise_exception"] is False
    assert options["lost_after"] == 30.0
    assert options["restart"] == "always"
    assert options["health"] == "/"


def test_the_same_arguments_while_up_do_nothing() -> None:
    tester = started()
    for number in range(5):
        tester.set("count", number + 1)
        tester.advance(10)
    assert starts(tester) == [("1-w-1", 1)]


def test_others_replace_it_and_earlier_ones_too() -> None:
    tester = started()
    for which in "bab":
        tester.set("which", which)
        tester.advance(5)
    assert [start.args for start in tester.fake("w").starts] == [["a"], ["b"], ["a"], ["b"]]
    assert [call.reason for call in tester.calls("w")] == ["replaced", "replaced", "replaced", None]


def test_every_exit_counts_as_death_noticed_and_named_with_delays_1_2_4_to_30() -> None:
    tester = started(run_for=0.5)
    delays = []
    last = tester.now
    while len(delays) < 8:
        seen = len(tester.fake("w").starts)
        tester.until(lambda s=seen: len(tester.fake("w").starts) > s)
        delays.append(tester.now - last - 0.5)
        last = tester.now
    assert delays == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30])
    assert len(tester.calls("w")) == 1
    tester.advance(0.5)
    status = tester.flow.w.status
    assert status.stage == "pending"
    assert status.reason == "exit_code"
    assert "exit code 0" in status.message
    assert "30 s" in status.message
    assert tester.exit_code is None


def test_the_delay_is_reset_after_60_s_ready() -> None:
    tester = started(run_for=None)
    for _ in range(4):
        tester.until(lambda: tester.flow.w.is_ready)
        tester.kill("w")
        tester.settle()
    assert "8 s" in tester.flow.w.status.message
    tester.until(lambda: tester.flow.w.is_ready)
    tester.advance(61)
    tester.kill("w")
    tester.settle()
    assert "restart in 1 s" in tester.flow.w.status.message
    assert "SIGKILL" in tester.flow.w.status.message


def test_less_than_60_s_ready_does_not_reset_it() -> None:
    tester = started(run_for=None)
    for _ in range(3):
        tester.until(lambda: tester.flow.w.is_ready)
        tester.advance(50)
        tester.kill("w")
        tester.settle()
    assert "restart in 4 s" in tester.flow.w.status.message


@pytest.mark.parametrize(
    ("policy", "code", "stage"),
    [
        ("always", 0, "running"),
        ("always", 1, "running"),
        ("on_failure", 0, "succeeded"),
        ("on_failure", 1, "running"),
        ("never", 0, "succeeded"),
        ("never", 1, "failed"),
    ],
)
def test_restart_policies(policy: str, code: int, stage: str) -> None:
    tester = started({"restart": policy}, run_for=10.0, exit_code=code)
    tester.advance(12)
    assert tester.flow.w.status.stage == stage
    again = 2 if stage == "running" else 1
    assert len(starts(tester)) == again
    tester.set("count", 1)  # asking for the same does not bring back what shall not be restarted
    tester.settle()
    assert len(starts(tester)) == again
    assert tester.exit_code is None


def test_retries_is_not_used() -> None:
    tester = started({"restart": "never", "retries": 5}, run_for=1.0, exit_code=1)
    tester.advance(100)
    assert len(starts(tester)) == 1


def test_a_declaration_changed_while_it_waits_for_its_restart_starts_at_once() -> None:
    tester = started(run_for=0.5)
    for _ in range(5):
        tester.until(lambda: tester.flow.w.is_running)
        tester.until(lambda: tester.flow.w.is_pending)
    tester.fake("w").run_for = None
    tester.set("which", "b")
    tester.settle()
    assert tester.flow.w.is_running
    assert tester.fake("w").starts[-1].args == ["b"]


def test_with_parallel_false_the_pass_waits_until_it_is_ready_not_until_it_ends() -> None:
    tester = started({"parallel": False}, run_for=None, ready_after=20.0)
    tester.advance(19)
    assert tester.state["vars"]["past"] == 0
    tester.advance(2)
    assert tester.flow.w.is_ready
    assert tester.state["vars"]["past"] == 1
    tester.set("which", "b")
    tester.set("count", 5)
    tester.advance(10)
    assert tester.state["vars"]["past"] == 1
    tester.advance(15)
    assert tester.state["vars"]["past"] == 6


def test_a_stop_by_the_user_holds_it() -> None:
    tester = started(run_for=None)
    tester.stop_work("w")
    tester.advance(100)
    tester.set("count", 1)
    tester.advance(100)
    assert tester.flow.w.has_stopped
    assert len(starts(tester)) == 1
    tester.restart_work("w")
    tester.advance(1)
    assert tester.flow.w.is_running


def test_a_stop_while_it_waits_for_its_restart_holds_it_too() -> None:
    tester = started(run_for=1.0)
    tester.until(lambda: tester.flow.w.is_pending and tester.flow.w.has_started)
    tester.stop_work("w")
    tester.advance(100)
    assert len(starts(tester)) == 1
    assert tester.calls("w")[0].stage is Stage.STOPPED


def test_the_url_is_there_while_it_answers_and_gone_when_it_died() -> None:
    tester = started(run_for=None)
    tester.until(lambda: tester.flow.w.is_ready)
    assert tester.flow.w.url == "http://testserver/view/w/"
    tester.kill("w")
    tester.settle()
    assert tester.flow.w.url == ""
    tester.advance(1)
    assert tester.flow.w.url == "http://testserver/view/w/"


def test_a_restart_delay_survives_the_server() -> None:
    tester = started(run_for=0.5)
    for _ in range(4):
        tester.until(lambda: tester.flow.w.is_running)
        tester.until(lambda: tester.flow.w.is_pending)
    seen = len(starts(tester))
    tester.restart_server()
    tester.advance(7.9)
    assert len(starts(tester)) == seen
    tester.advance(0.2)
    assert len(starts(tester)) == seen + 1
    tester.advance(0.5)
    assert "restart in 16 s" in tester.flow.w.status.message


@pytest.mark.parametrize(
    ("command", "prefix", "kept"),
    [
        ("tb --path_prefix {base_path}", None, "keep"),
        ("tb", None, "strip"),
        ("tb {{base_path}}", None, "strip"),
        ("tb {base_path}", "strip", "strip"),
        ("tb", "keep", "keep"),
    ],
)
def test_prefix_is_kept_if_base_path_occurs_in_the_command_else_stripped(
    command: str, prefix: str | None, kept: str
) -> None:
    assert ServiceWork(command, prefix=prefix)._options["prefix"] == kept


@pytest.mark.parametrize(("name", "value"), [("restart", "sometimes"), ("prefix", "x"), ("reload", [1])])
def test_wrong_keywords_are_named(name: str, value: Any) -> None:
    with pytest.raises(StateTypeError, match=name):
        ServiceWork("serve", **{name: value})


def test_another_declaration_begins_with_short_delays_again() -> None:
    tester = started(run_for=0.5)
    for _ in range(4):
        tester.until(lambda: tester.flow.w.is_running)
        tester.until(lambda: tester.flow.w.is_pending)
    assert "restart in 8 s" in tester.flow.w.status.message
    tester.set("which", "b")
    tester.until(lambda: tester.flow.w.is_running)
    tester.until(lambda: tester.flow.w.is_pending)
    assert "restart in 1 s" in tester.flow.w.status.message


@pytest.mark.parametrize("cache", [True, False])
def test_caching_does_not_apply(cache: bool) -> None:
    tester = started({"cache_calls": cache, "restart": "never"}, run_for=5.0)
    tester.advance(10)
    tester.set("count", 1)
    tester.advance(10)
    assert starts(tester) == [("1-w-1", 1)]
    for which in "ba":  # what has succeeded before is started again when it is declared again
        tester.set("which", which)
        tester.advance(1)
    assert starts(tester) == [("1-w-1", 1), ("1-w-2", 1), ("1-w-3", 1)]


def test_late_news_of_an_earlier_attempt_is_not_taken_for_the_current_one() -> None:
    tester = started(run_for=None, ready_after=None)
    tester.kill("w")
    tester.advance(2)
    assert starts(tester) == [("1-w-1", 1), ("1-w-1", 2)]
    for attempt, ready in ((1, False), (2, True)):
        tester._report(Ready(work="w", call="1-w-1", attempt=attempt, at=tester.now))
        tester.settle()
        assert tester.flow.w.is_ready is ready
    tester._report(Ended(work="w", call="1-w-1", attempt=1, at=tester.now))
    tester.settle()
    assert tester.flow.w.is_running
