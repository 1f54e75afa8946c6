"""AppTester, the fake of everything around the engine, and what the state tree promises through it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from orch import Drive, Flow, ScriptWork, Work
from orch.errors import StateForbidden, StateMismatch, StatePathError, StateTestFailed, StateTypeError
from orch.events import Patch
from orch.state import apply_ops
from orch.testing import AppTester


class Child(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.x = 0


class App(Flow):
    def __init__(self, start: int = 0) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.count = start
        self.rows: list[Any] = []
        self.table: dict[str, Any] = {"a": 1}
        self.ui = Child()
        self.w = ScriptWork("true", parallel=True, vars={"n": 0})
        self.models = [ScriptWork("true", parallel=True, vars={"z": 0})]

    def run(self) -> None:
        self._body(self)


def started(body: Callable[[Any], None] | None = None, **works: dict[str, Any]) -> AppTester:
    flow = App()
    flow._body = body or (lambda flow: None)
    tester = AppTester(flow, works=works)
    tester.settle()
    return tester


def test_no_sockets_no_threads_no_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    threads = threading.active_count()
    tester = started(lambda flow: flow.w.run())
    tester.until(lambda: tester.flow.w.has_succeeded)
    assert threading.active_count() == threads


def test_step_until_and_the_fake_clock() -> None:
    tester = started(lambda flow: flow.w.run(), w={"run_for": 30.0, "start_after": 5.0})
    began = tester.now
    tester.until(lambda t: t.flow.w.is_running)
    assert tester.now == began + 5
    tester.until(lambda: tester.flow.w.has_succeeded)
    assert tester.now == began + 35
    while tester.step():
        pass
    assert tester.now == began + 35
    with pytest.raises(AssertionError, match="did not come true"):
        tester.until(lambda: False)


def test_settings_of_a_fake_work() -> None:
    with pytest.raises(AttributeError, match="typo"):
        started(lambda flow: flow.w.run(), w={"typo": 1})
    tester = started(lambda flow: flow.w.run(), w={"start_error": "no such file"})
    tester.advance(1)
    assert tester.exit_code == 1
    assert "no such file" in tester.message


def test_a_state_that_was_read_stays_as_it_was() -> None:
    tester = started()
    before = tester.state
    tester.set("count", 5)
    assert (before["vars"]["count"], tester.state["vars"]["count"]) == (0, 5)
    before["vars"]["count"] = 7
    assert tester.state["vars"]["count"] == 5


class Lister(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.train = ScriptWork("train", outputs=["logs"], cache_calls=False)
        self.drive = Drive("app")
        self.models: list[str] = []
        self.result: list[str] = []
        self.goes = 0

    def run(self) -> None:
        self.models = [str(path) for path in self.drive.list("logs/*/model.pt")]
        if self.goes:
            self.result = self.train.run(str(self.goes)).result
            self.goes = 0


def test_the_flow_sees_what_its_works_publish() -> None:
    tester = AppTester(Lister())
    tester.settle()
    assert (tester.exit_code, tester.flow.models) == (None, [])
    for n in (1, 2):
        tester.fake("train").publishes = made = [f"logs/v{n}/model.pt"]
        tester.set("goes", n)
        tester.until(lambda made=made: tester.flow.result == made)
    tester.settle()
    tester.restart_server()
    tester.settle()
    assert tester.state["vars"]["models"] == ["logs/v1/model.pt", "logs/v2/model.pt"]
    assert [file["path"] for file in tester.flow.train.files] == ["logs/v2/model.pt", "logs/v1/model.pt"]


def test_kill() -> None:
    tester = started(lambda flow: flow.w.run(), w={"run_for": None})
    tester.kill(tester.flow.w)
    tester.settle()
    assert tester.exit_code == 1
    assert tester.calls("w")[0].reason == "signal"
    with pytest.raises(AssertionError, match="not running"):
        tester.kill("w")


def test_restart_server_keeps_what_was_journalled() -> None:
    tester = started(lambda flow: flow.w.run("a"), w={"run_for": 50.0})
    tester.set("count", 5)
    tester.set("ui.x", 6)
    tester.work_sets("w", [{"op": "replace", "path": "/n", "value": 7}])
    tester.settle()
    before = tester.flow
    rev = tester.rev
    tester.restart_server()
    assert tester.flow is not before
    assert (tester.flow.count, tester.flow.ui.x, tester.flow.w.n) == (5, 6, 7)
    assert tester.rev >= rev
    tester.settle()
    assert tester.flow.w.is_running
    tester.advance(50)
    assert tester.flow.w.has_succeeded


def test_restart_server_gives_the_root_its_constructor_arguments_again() -> None:
    tester = AppTester(App(7))
    tester.restart_server()
    assert tester.flow.count == 7


def test_writing_to_the_flow_between_passes_is_a_diff() -> None:
    tester = started()
    tester.flow.rows.append(1)
    tester.flow.rows.append(2)
    tester.flow.count = 3
    tester.settle()
    assert tester.state["vars"]["rows"] == [1, 2]
    assert tester.flow.rows == [1, 2]
    assert tester.state["vars"]["count"] == 3


def test_root_may_be_a_work() -> None:
    class Single(Work):
        def run(self) -> None: ...

    tester = AppTester(Single())
    tester.until(lambda: tester.exit_code == 0)


# ---- the state tree --------------------------------------------------------------------------------------------------


def test_the_tree_has_the_documented_shape() -> None:
    tester = started()
    tree = tester.state
    assert set(tree) == {"vars", "flows", "works", "structures", "app"}
    assert tree["app"]["name"] == "test"
    assert (tree["app"]["run"], tree["app"]["stage"]) == (1, "running")
    assert set(tree["works"]["w"]) == {"vars", "status", "calls"}
    assert tree["structures"]["models"]["order"] == ["0"]
    assert tree["flows"]["ui"]["vars"] == {"x": 0}


@pytest.mark.parametrize(
    "pointer", ["/vars/count", "/flows/ui/vars/x", "/works/w/vars/n", "/structures/models/works/0/vars/z"]
)
def test_pointers(pointer: str) -> None:
    tester = started()
    rev = tester.patch([{"op": "replace", "path": pointer, "value": 9}])
    assert tester.rev == rev
    tester.settle()
    assert tester.engine.tree.get(pointer) == 9


def test_each_revision_carries_who_caused_it_and_when() -> None:
    def body(flow: Any) -> None:
        flow.w.run()
        if flow.count == 1:
            flow.count = 2

    tester = started(body, w={"run_for": None})
    tester.advance(5)
    tester.set("count", 1)
    tester.settle()
    tester.work_sets("w", [{"op": "replace", "path": "/n", "value": 1}])
    tester.patch([{"op": "replace", "path": "/vars/table/a", "value": 2}], cause="api")
    tester.call_method(lambda: setattr(tester.flow, "rows", [1]))
    causes = {op["path"]: (revision.cause, revision.at) for revision in tester.revisions for op in revision.ops}
    now = tester.now
    assert causes["/vars/count"] == ("flow", now)
    assert ("ui", now) in {(r.cause, r.at) for r in tester.revisions}
    assert causes["/works/w/vars/n"] == ("work:w", now)
    assert causes["/vars/table/a"] == ("api", now)
    assert causes["/vars/rows"] == ("api", now)


def test_revisions_count_up_by_one_and_replaying_them_gives_the_tree() -> None:
    flow = App()
    flow._body = lambda flow: flow.w.run(str(flow.count))
    tester = AppTester(flow)
    tree = msgspec.json.decode(msgspec.json.encode(AppTester(App()).program.node()))
    tester.settle()
    for number in range(30):
        tester.set("count", number)
        tester.advance(2)
    tree["app"] = {"name": "test", "run": 1, "stage": "starting", "message": ""}
    for revision in tester.revisions:
        apply_ops(tree, revision.ops)
    assert tree == tester.state
    assert [revision.rev for revision in tester.revisions] == list(range(1, tester.rev + 1))


def test_if_match_speaks_of_the_addressed_value() -> None:
    tester = started()
    seen = tester.engine.tree.value_rev("/vars/count")
    tester.set("rows", [1])  # something else
    tester.patch([{"op": "replace", "path": "/vars/count", "value": 1}], match=("/vars/count", seen))
    with pytest.raises(StateMismatch, match="/vars/count"):
        tester.patch([{"op": "replace", "path": "/vars/count", "value": 2}], match=("/vars/count", seen))
    assert tester.state["vars"]["count"] == 1
    with pytest.raises(StateMismatch):
        tester.patch([{"op": "replace", "path": "/vars/count", "value": 2}], match=("", seen))


def test_if_match_is_looked_at_when_the_diffs_turn_comes() -> None:
    """A pass that changes the value while the request waits is a mismatch."""
    box: list[AppTester] = []

    def body(flow: Any) -> None:
        if flow.count == 1:
            patch = [{"op": "replace", "path": "/vars/rows", "value": ["late"]}]
            match = ("/vars/rows", box[0].engine.tree.value_rev("/vars/rows"))
            box[0]._event(Patch(ticket=55, ops=patch, cause="ui", match=match))
            flow.rows.append("pass")
            flow.count = 2

    box.append(started(body))
    box[0].set("count", 1)
    box[0].settle()
    assert isinstance(box[0]._answers[55].error, StateMismatch)
    assert box[0].state["vars"]["rows"] == ["pass"]


def test_a_failing_test_is_reported() -> None:
    tester = started()
    with pytest.raises(StateTestFailed, match="/vars/count"):
        tester.patch(
            [
                {"op": "replace", "path": "/vars/rows", "value": [1]},
                {"op": "test", "path": "/vars/count", "value": 5},
            ]
        )
    assert tester.state["vars"]["rows"] == []


def test_two_concurrent_appends_are_both_kept() -> None:
    box: list[AppTester] = []

    def body(flow: Any) -> None:
        if flow.count == 1:
            append = {"op": "add", "path": "/vars/rows/-", "value": "ui"}
            box[0]._event(Patch(ops=[append], cause="ui"))
            flow.rows.append("flow")
            flow.count = 2

    box.append(started(body))
    box[0].set("count", 1)
    box[0].settle()
    assert box[0].state["vars"]["rows"] == ["flow", "ui"]
    assert box[0].flow.rows == ["flow", "ui"]


@pytest.mark.parametrize(
    ("op", "error"),
    [
        ({"op": "add", "path": "/vars/new", "value": 1}, StateTypeError),
        ({"op": "replace", "path": "/vars/new", "value": 1}, StateTypeError),
        ({"op": "remove", "path": "/vars/count"}, StateForbidden),
        ({"op": "move", "path": "/vars/count", "from": "/vars/rows"}, StateForbidden),
        ({"op": "copy", "path": "/vars/table/b", "from": "/vars/rows"}, StateForbidden),
        ({"op": "replace", "path": "/works/w/status/stage", "value": "x"}, StateForbidden),
        ({"op": "replace", "path": "/app/stage", "value": "x"}, StateForbidden),
        ({"op": "replace", "path": "/vars/table/missing", "value": 1}, StatePathError),
        ({"op": "replace", "path": "/flows/nope/vars/x", "value": 1}, StatePathError),
        ({"op": "replace", "path": "/vars/count", "value": float("inf")}, StateTypeError),
    ],
)
def test_writes_that_are_not_allowed_change_nothing_and_stop_nothing(
    op: dict[str, Any], error: type[Exception]
) -> None:
    tester = started()
    before = tester.rev, msgspec.json.encode(tester.state)
    with pytest.raises(error):
        tester.patch([{"op": "replace", "path": "/vars/count", "value": 8}, op])
    assert (tester.rev, msgspec.json.encode(tester.state)) == before
    assert tester.exit_code is None


def test_add_to_an_existing_name_and_moves_within_one_attribute_are_allowed() -> None:
    tester = started()
    tester.patch([{"op": "add", "path": "/vars/count", "value": 5}])
    tester.patch([{"op": "move", "path": "/vars/table/b", "from": "/vars/table/a"}])
    tester.patch([{"op": "copy", "path": "/vars/table/c", "from": "/vars/table/b"}])
    tester.settle()
    assert tester.flow.count == 5
    assert tester.flow.table == {"b": 1, "c": 1}
