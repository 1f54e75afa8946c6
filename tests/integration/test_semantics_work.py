"""What a Work promises: its keywords, its attributes, its state in the flow, its commands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orch import BuildConfig, CloudCompute, Drive, Flow, ScriptWork, ServiceWork, Stage, Work
from orch.errors import StaleEpoch, StateTypeError
from orch.events import AgentPolled, Pushed, SendDiffs
from orch.testing import AppTester
from orch.wire import Progress, Push, VarOps


class Box(Flow):
    def __init__(self, kind: Any = ScriptWork, options: dict[str, Any] | None = None) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.flag = False
        self.w = kind("true", **{"parallel": True, **(options or {})}) if kind is not Python else Python(options or {})

    def run(self) -> None:
        self._body(self)


class Python(Work):
    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__(parallel=True, **options)
        self.n = 0
        self.rows: list[int] = []

    def run(self, *args: Any) -> None: ...


def started(flow: Box, body: Callable[[Any], None] | None = None, **w: Any) -> AppTester:
    flow._body = body or (lambda flow: flow.w.run())
    tester = AppTester(flow, works={"w": w})
    tester.settle()
    return tester


def test_start_with_flow_places_the_agent_at_app_start_and_makes_no_call() -> None:
    tester = started(Box(options={"start_with_flow": True}), lambda flow: None)
    assert tester.flow.w.port is not None
    assert tester.flow.w.host == "127.0.0.1"
    assert tester.calls("w") == []
    assert tester.fake("w").starts == []


def test_how_far_its_files_are_is_its_message() -> None:
    tester = started(Box(), start_after=5.0, run_for=None)
    [call] = tester.calls("w")

    def moving(text: str) -> None:
        tester._report(Progress(work="w", call=call.id, moving=text))
        tester.settle()

    def said() -> tuple[str, str]:
        status = tester.state["works"]["w"]["status"]
        assert tester.flow.w.status.message == status["message"]
        return status["stage"], status["message"]

    moving("fetching logs: 1.0 of 5.0 GiB")
    assert said() == ("pending", "fetching logs: 1.0 of 5.0 GiB")
    tester.until(lambda: tester.flow.w.is_running)
    assert said() == ("running", "")
    moving("publishing logs: 2.0 of 5.0 GiB")
    assert said() == ("running", "publishing logs: 2.0 of 5.0 GiB")
    tester.lose_contact()
    tester.advance(15)
    assert said() == ("unknown", "no contact with agent local"), "what is more important is said"
    tester.regain_contact()
    tester.advance(5)
    tester.stop_work("w")
    tester.settle()
    assert said() == ("stopped", "")


def test_host_and_port_are_set_once_placed() -> None:
    tester = started(Box(), lambda flow: None)
    assert (tester.flow.w.host, tester.flow.w.port) in ((None, None), ("", None))
    tester.flow._body = lambda flow: flow.w.run()
    tester.set("flag", True)
    tester.settle()
    assert tester.flow.w.port == tester.state["works"]["w"]["status"]["port"] == tester.fake("w").port
    assert tester.flow.w.host == "127.0.0.1"


def test_a_port_given_is_kept() -> None:
    tester = started(Box(options={"port": 8123}))
    assert tester.flow.w.port == 8123


def test_attributes_before_any_call() -> None:
    work = started(Box(), lambda flow: None).flow.w
    assert (work.status.stage, work.status.reason, work.status.message, work.status.since) == (
        "not_started",
        None,
        "",
        None,
    )
    for name in (
        "has_started",
        "is_pending",
        "is_running",
        "has_succeeded",
        "has_failed",
        "has_stopped",
        "has_timeout",
    ):
        assert getattr(work, name) is False, name
    assert (work.num_successes, work.num_timeouts, work.url, work.is_ready) == (0, 0, "", False)
    assert (work.exit_code, work.progress, work.metrics, work.files, work.last_lines) == (None, None, {}, [], [])
    assert work.name == "root.w"


def test_attributes_along_a_call() -> None:
    tester = started(Box(), start_after=5.0, run_for=10.0)
    work = tester.flow.w
    assert work.is_pending
    began = tester.now
    assert work.status.since == began
    tester.advance(5)
    assert work.is_running
    assert work.has_started
    assert work.status.since == began + 5
    tester.report("w", progress=0.25, metrics={"loss": 1.5})
    tester.settle()
    assert (work.progress, work.metrics) == (0.25, {"loss": 1.5})
    tester.report("w", metrics={"acc": 2})
    tester.settle()
    assert (work.progress, work.metrics) == (0.25, {"loss": 1.5, "acc": 2})
    tester.advance(10)
    assert work.has_succeeded
    assert (work.exit_code, work.num_successes, work.progress) == (0, 1, 0.25)  # kept until the next call


def test_attributes_speak_of_the_current_call_and_are_kept_until_the_next_one_starts() -> None:
    def body(flow: Any) -> None:
        flow.w.run("b" if flow.flag else "a")

    tester = started(Box(options={"raise_exception": False}), body, exit_code=[3, 0], run_for=10.0)
    tester.report("w", progress=0.5, metrics={"a": 1})
    tester.advance(10)
    work = tester.flow.w
    assert (work.exit_code, work.metrics, work.progress, work.has_failed) == (3, {"a": 1}, 0.5, True)
    tester.set("flag", True)
    tester.settle()
    assert (work.exit_code, work.metrics, work.progress, work.has_failed) == (None, {}, None, False)
    assert work.is_running


def test_files_are_the_last_complete_outputs_with_size_and_version() -> None:
    tester = started(Box(), run_for=None)
    files = {"a.txt": 5, "b/c": 6}
    tester.publish("w", "out", files, partial=True)
    tester.settle()
    assert tester.flow.w.files == []
    tester.publish("w", "out", files)
    tester.settle()
    assert tester.flow.w.files == [
        {"path": "out/a.txt", "size": 5, "version": 1},
        {"path": "out/b/c", "size": 6, "version": 1},
    ]
    tester.publish("w", "out", {"a.txt": 9})
    tester.settle()
    assert tester.flow.w.files == [{"path": "out/a.txt", "size": 9, "version": 2}]


def test_files_of_an_output_that_is_a_file_or_the_whole_folder() -> None:
    tester = started(Box(), run_for=None)
    tester.publish("w", "out/model.bin")
    tester.settle()
    assert [file["path"] for file in tester.flow.w.files] == ["out/model.bin"]
    tester.publish("w", ".", {"a": 1, "out/b": 2})
    tester.settle()
    assert [file["path"] for file in tester.flow.w.files] == ["a", "out/b"]


def test_only_the_first_1000_files_are_shown() -> None:
    tester = started(Box(), run_for=None)
    tester.publish("w", "o", {str(n): n for n in range(1_500)})
    tester.settle()
    assert len(tester.flow.w.files) == 1_000


def test_last_lines_are_read_from_the_log() -> None:
    tester = started(Box())
    tester.program.log_tail = lambda name: [f"line of {name}"]
    assert tester.flow.w.last_lines == ["line of w"]


def test_a_works_diffs_reach_the_flow_and_the_flows_writes_reach_the_work() -> None:
    sent: list[Any] = []

    def body(flow: Any) -> None:
        flow.w.run()
        if flow.w.n == 5:
            flow.w.rows.append(7)
            flow.w.n = 6

    tester = started(Box(Python), body, run_for=None)
    handle = tester._do

    def spy(instruction: Any) -> None:
        if isinstance(instruction, SendDiffs):
            sent.extend(instruction.diffs)
        handle(instruction)

    tester._do = spy  # type: ignore[method-assign]
    tester.work_sets("w", [{"op": "replace", "path": "/n", "value": 5}])
    tester.settle()
    assert tester.flow.w.n == 6
    assert tester.state["works"]["w"]["vars"] == {"n": 6, "rows": [7]}
    echo, written = sent
    assert (echo.work, echo.seq, echo.ops) == ("w", tester._seq, None)
    assert written.ops == [
        {"op": "add", "path": "/rows/-", "value": 7},
        {"op": "replace", "path": "/n", "value": 6},
    ]
    assert written.rev > echo.rev


def test_the_tree_decides_a_refused_diff_is_named_and_answered() -> None:
    tester = started(Box(Python), run_for=None)
    before = tester.rev
    tester.work_sets("w", [{"op": "add", "path": "/undeclared", "value": 1}])
    tester.settle()
    assert tester.rev == before
    assert any("w: a change was refused" in note and "undeclared" in note for note in tester.notes)
    assert tester.exit_code is None


def test_a_diff_sent_twice_takes_effect_once() -> None:
    tester = started(Box(Python), run_for=None)
    tester.work_sets("w", [{"op": "add", "path": "/rows/-", "value": 1}])
    tester._unacked = [(tester._seq, VarOps(work="w", ops=[{"op": "add", "path": "/rows/-", "value": 1}]))]
    tester._push()
    tester.settle()
    assert tester.flow.w.rows == [1]


def test_a_late_diff_of_an_earlier_call_is_dropped_when_its_work_was_replaced() -> None:
    tester = started(Box(Python), run_for=None)
    tester._report(VarOps(work="w", call="1-w-99", ops=[{"op": "add", "path": "/rows/-", "value": 1}]))
    assert tester.flow.w.rows == []
    assert any("1-w-99" in note for note in tester.notes)


def test_vars_are_attributes_of_the_work() -> None:
    flow = Box(options={"vars": {"retrain": False, "lr": 0.1}})
    assert flow.w.retrain is False
    tester = started(flow, run_for=None)
    tester.work_sets("w", [{"op": "replace", "path": "/retrain", "value": True}])
    tester.settle()
    assert tester.flow.w.retrain is True
    assert tester.state["works"]["w"]["vars"] == {"retrain": True, "lr": 0.1}


def test_a_result_of_run_is_the_calls_result() -> None:
    seen: list[Any] = []
    tester = started(Box(Python), lambda flow: seen.append(flow.w.run().result), result={"a": [1]})
    tester.advance(5)
    assert seen[-1] == {"a": [1]}


def test_a_script_whose_start_fails_is_a_failed_call() -> None:
    tester = started(Box(options={"raise_exception": False}), start_error="no such file: x")
    tester.advance(1)
    call = tester.calls("w")[0]
    assert (call.failed, call.reason, call.message) == (True, "exception", "no such file: x")


def test_overriding_script_work_run_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="subclass Work"):
        type("Mine", (ScriptWork,), {"run": lambda self: None})
    with pytest.raises(TypeError, match="subclass Work"):
        type("Mine", (ServiceWork,), {"run": lambda self: None})


def test_a_work_whose_init_forgets_super_says_so() -> None:
    class Forgetful(Work):
        def __init__(self) -> None:
            self.x = 1

    with pytest.raises(StateTypeError, match=r"Forgetful.*super\(\).__init__\(\)"):
        Forgetful()


def test_command_is_a_list_or_a_string_split_as_a_shell_splits_words() -> None:
    for command in ("", [], [1], 5, "'open", ["a", ""]):
        with pytest.raises(StateTypeError, match="command"):
            ScriptWork(command)  # type: ignore[arg-type]
    with pytest.raises(StateTypeError, match="one str"):
        ScriptWork(["a"], shell=True)
    assert ScriptWork("echo 'unclosed", shell=True)._options["command"] == "echo 'unclosed"


def test_run_appends_arguments_a_str_is_split_a_list_is_taken_as_it_is() -> None:
    tester = started(Box(), lambda flow: flow.w.run("--lr '0 1'", ["a b", 3, {"x": 1}], 5, True))
    assert tester.fake("w").starts[0].args == ["--lr", "0 1", "a b", "3", '{"x":1}', "5", "True"]


def test_constructor_args_and_everything_the_agent_needs_travel_with_the_start() -> None:
    options = {
        "args": ["--port", "{port}", 3, {"x": 1}],
        "inputs": ["data"],
        "outputs": "out",
        "cwd": "sub",
        "env": {"A": "{port}"},
        "timeout": 5.0,
        "grace": 3.0,
        "sync_interval": 0.5,
        "drive": Drive("d"),
    }
    start = started(Box(options=options)).fake("w").starts[0]
    assert start.script_args == ["--port", "{port}", "3", '{"x":1}']
    assert (start.inputs, start.outputs, start.cwd, start.env["A"]) == (["data"], ["out"], "sub", "{port}")
    assert (start.timeout, start.grace, start.sync_interval) == (5.0, 3.0, 0.5)
    assert start.drive is not None
    assert "$drive" in start.drive


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("retries", -1),
        ("retries", True),
        ("timeout", "5"),
        ("grace", -1),
        ("retry_delay", float("nan")),
        ("when_busy", "maybe"),
        ("on_lost", "cry"),
        ("port", 0),
        ("port", 70_000),
        ("env", {"A": 1}),
        ("health", 5),
        ("host", 127),
        ("display_name", 1),
        ("args", 5),
        ("cloud_compute", "gpu"),
        ("cloud_build_config", "numpy"),
        ("outputs", [1]),
        ("drive", "models"),
        ("vars", {"_a": 1}),
        ("vars", {"a b": 1}),
        ("vars", {"status": 1}),
        ("sync_interval", "often"),
    ],
)
def test_a_wrong_keyword_is_named(name: str, value: Any) -> None:
    with pytest.raises(StateTypeError, match=name if (name, value) != ("vars", {"status": 1}) else "status"):
        ScriptWork("true", **{name: value})


def test_cloud_compute_may_be_shared_and_is_shown() -> None:
    class Two(Flow):
        def __init__(self) -> None:
            super().__init__()
            compute = CloudCompute("gpu", gpus=2)
            self.a = ScriptWork("true", cloud_compute=compute)
            self.b = ScriptWork("true", cloud_compute=compute, cloud_build_config=BuildConfig(["numpy>=2"]))

    tester = AppTester(Two())
    tester.settle()
    for name in "ab":
        assert tester.engine.describe(tester.engine.find(name))["cloud_compute"]["gpus"] == 2
    assert tester.flow.b.cloud_build_config.requirements == ["numpy>=2"]


def test_call_and_status_are_str_enums() -> None:
    tester = started(Box(), run_for=None)
    stage = tester.flow.w.status.stage
    assert isinstance(stage, Stage)
    assert stage == "running"
    assert f"{stage}" == "running"


def test_silence_of_the_agent_is_unknown_never_dead() -> None:
    tester = started(Box(options={"retries": 3}), run_for=None)
    tester._event(AgentPolled(agent="local", status=None))
    tester._settle()
    tester.settle()
    assert tester.flow.w.status.stage == "unknown"
    assert not (tester.flow.w.has_failed or tester.flow.w.has_stopped)
    tester.advance(10_000)
    assert len(tester.fake("w").starts) == 1
    tester._event(AgentPolled(agent="local", status=tester._agent_up("local").status))
    tester._settle()
    tester.settle()
    assert tester.flow.w.is_running


def test_a_work_that_listens_is_ready_and_has_a_url_until_another_call_is_asked_for() -> None:
    urls: list[str] = []

    def body(flow: Any) -> None:
        flow.w.run("b" if flow.flag else "a")
        urls.append(flow.w.url)

    tester = started(Box(options={"when_busy": "replace"}), body, run_for=None, ready_after=5.0, stop_after=3.0)
    assert (tester.flow.w.is_ready, tester.flow.w.url) == (False, "")
    tester.advance(5)
    assert tester.flow.w.is_ready
    assert tester.flow.w.url == "http://testserver/view/w/"
    seen = len(urls)
    tester.set("flag", True)
    tester.step()
    assert urls[seen:] == [""], "empty at once, in the very pass that asks"
    assert tester.state["works"]["w"]["status"]["url"] == ""
    tester.advance(3)
    assert tester.flow.w.url == ""
    tester.advance(5)
    assert tester.flow.w.url == "http://testserver/view/w/"


def test_readiness_survives_a_restart_of_the_server() -> None:
    tester = started(Box(), run_for=None, ready_after=1.0)
    tester.advance(2)
    tester.restart_server()
    tester.settle()
    assert tester.flow.w.is_ready
    assert tester.flow.w.url != ""


def test_reports_of_a_stale_epoch_are_refused() -> None:
    tester = started(Box(Python), run_for=None)
    tester._epoch += 1
    tester.work_sets("w", [{"op": "add", "path": "/rows/-", "value": "new"}])
    tester.settle()
    old = Push(agent="local", epoch=tester._epoch - 1, seq=99, items=[VarOps(work="w", ops=[OLD])])
    with pytest.raises(StaleEpoch, match="replaced"):
        tester._ask(lambda ticket: Pushed(ticket=ticket, push=old))
    assert tester.flow.w.rows == ["new"]


OLD = {"op": "add", "path": "/rows/-", "value": "old"}
