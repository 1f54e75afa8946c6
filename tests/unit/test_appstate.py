"""AppState: attributes of the live tree, conflicts, children, works; against the real HTTP server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from state_server import StateServer, flow_node, work_node

from orch.errors import StateConflict, StateError, StateTooLarge, StateTypeError
from orch_ui import state as state_module
from orch_ui.state import AppServer, AppState, ScriptRun, current_run


def tree() -> dict[str, Any]:
    child = flow_node({"depth": 1})
    page = flow_node(
        {"x": 1, "flag": False, "rows": [1, 2, 3], "table": {"a": 1, "b": {"c": 2}}, "text": "é"},
        flows={"child": child},
        works={
            "trainer": work_node(
                {"retrain": False},
                stage="running",
                reason=None,
                message="",
                since=12.5,
                progress=0.5,
                metrics={"loss": 0.1},
                is_ready=True,
                url="http://x/view/ui.trainer/",
                port=7000,
            )
        },
        structures={
            "models": {
                "order": ["2", "0"],
                "flows": {},
                "works": {"0": work_node({"n": "zero"}), "2": work_node({"n": "two"})},
            },
            "named": {"order": ["first"], "flows": {"first": flow_node({"y": 5})}, "works": {}},
        },
    )
    return {**flow_node({"top": 1}, flows={"ui": page}), "app": {"name": "test", "run": 1, "stage": "running"}}


def close_connections() -> None:
    """A page's process keeps them for ever; a test gives them back."""
    for server in list(state_module._servers.values()):
        server.close()


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StateServer]:
    log = tmp_path / "trainer.log"
    log.write_text("".join(f"line {n}\n" for n in range(50)))
    with StateServer(tree(), {"ui.trainer": log}) as running:
        monkeypatch.setenv("ORCH_FLOW_URL", running.url)
        monkeypatch.setenv("ORCH_FLOW_TOKEN", running.token)
        monkeypatch.setenv("ORCH_FLOW_SCOPE", "ui")
        yield running
        close_connections()


def test_attributes_read_and_write_the_tree(server: StateServer) -> None:
    state = AppState()
    assert (state.x, state.flag, state.rows, state.text) == (1, False, [1, 2, 3], "é")
    state.flag = True
    assert state.flag is True
    assert server.value("/flows/ui/vars/flag") is True


def test_children_read_and_write(server: StateServer) -> None:
    state = AppState()
    state.child.depth = 7
    assert state.child.depth == 7
    assert server.value("/flows/ui/flows/child/vars/depth") == 7
    assert state.named["first"].y == 5
    state.named["first"].y = 6
    assert server.value("/flows/ui/structures/named/flows/first/vars/y") == 6


def test_the_root_is_the_scope_of_an_empty_name(server: StateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_FLOW_SCOPE", "")
    state = AppState()
    assert state.top == 1
    assert state.ui.x == 1
    state.ui.x = 3
    assert server.value("/flows/ui/vars/x") == 3


def test_structures_keep_the_trees_order(server: StateServer) -> None:
    models = AppState().models
    assert len(models) == 2
    assert [model.n for model in models] == ["two", "zero"]
    assert models[0].n == "two"
    assert models[-1].n == "zero"
    assert AppState().named.keys() == ["first"]
    with pytest.raises(KeyError):
        AppState().named["other"]


def test_unknown_names_and_children_cannot_be_written(server: StateServer) -> None:
    state = AppState()
    with pytest.raises(AttributeError, match=r"no attribute 'nothing'.*flag, models, named, rows"):
        _ = state.nothing
    with pytest.raises(AttributeError, match="no state variable 'nothing'"):
        state.nothing = 1
    for child in ("child", "trainer", "models"):
        with pytest.raises(AttributeError, match="is a child"):
            setattr(state, child, 1)
    with pytest.raises(AttributeError, match="read-only"):
        state.trainer.retrain = True
    with pytest.raises(AttributeError, match="cannot be deleted"):
        del state.x
    assert not server.requests


def test_a_value_that_is_no_state_is_refused_and_named(server: StateServer) -> None:
    state = AppState()
    with pytest.raises(StateTypeError, match=r"x.*object"):
        state.x = object()
    with pytest.raises(StateTypeError, match=r"rows\[0\]"):
        state.rows = [float("nan")]
    assert (state.x, state.rows) == (1, [1, 2, 3])
    assert not server.requests


def test_a_value_too_large_is_named(server: StateServer) -> None:
    state = AppState()
    with pytest.raises(StateTooLarge, match="/flows/ui/vars/text"):
        state.text = "x" * (2 * 1024 * 1024 + 1)
    assert state.text == "é"


def test_a_run_sees_one_snapshot_and_its_own_writes(server: StateServer) -> None:
    state = AppState()
    assert state.x == 1
    server.set("/flows/ui/vars/text", "other")
    assert state.text == "é"
    state.x = 5
    assert state.x == 5
    assert AppState().text == "other"


def test_assigning_what_was_read_and_changed_elsewhere_is_a_conflict(server: StateServer) -> None:
    state = AppState()
    state.x = state.x + 1
    server.set("/flows/ui/vars/x", 10)
    with pytest.raises(StateConflict, match="changed elsewhere, please repeat"):
        state.x = state.x + 1
    assert server.value("/flows/ui/vars/x") == 10
    assert state.x == 10  # and the next look is a new one
    state.x = state.x + 1
    assert server.value("/flows/ui/vars/x") == 11


def test_assigning_an_equal_value_that_changed_elsewhere_is_a_conflict(server: StateServer) -> None:
    state = AppState()
    assert state.flag is False
    server.set("/flows/ui/vars/flag", True)
    with pytest.raises(StateConflict):
        state.flag = False


def test_assigning_what_was_not_read_wins(server: StateServer) -> None:
    state = AppState()
    assert state.text == "é"
    server.set("/flows/ui/vars/x", 10)
    state.x = 2
    assert server.value("/flows/ui/vars/x") == 2
    assert server.requests[-1][0]["op"] == "replace"


def test_appends_never_conflict(server: StateServer) -> None:
    state = AppState()
    assert state.rows == [1, 2, 3]
    server.patch_as_flow({"op": "add", "path": "/flows/ui/vars/rows/-", "value": 99})
    state.rows.append(4)
    state.rows += [5]
    state.rows.extend([6, 7])
    assert server.value("/flows/ui/vars/rows") == [1, 2, 3, 99, 4, 5, 6, 7]


def test_an_append_within_an_element_reaches_that_element_or_conflicts(server: StateServer) -> None:
    server.set("/flows/ui/vars/rows", [{"k": []}, {"k": []}])
    state = AppState()
    state.rows[1]["k"].append("deep")
    assert server.value("/flows/ui/vars/rows") == [{"k": []}, {"k": ["deep"]}]
    server.patch_as_flow({"op": "remove", "path": "/flows/ui/vars/rows/0"})
    with pytest.raises(StateConflict):
        state.rows[0]["k"].append("astray")
    assert server.value("/flows/ui/vars/rows") == [{"k": ["deep"]}]


def test_mutations_in_place_reach_the_tree(server: StateServer) -> None:
    state = AppState()
    state.table["b"]["c"] = 3
    state.table["new"] = [1]
    state.table["new"].append(2)
    del state.table["a"]
    state.rows[0] = 10
    state.rows.insert(1, 11)
    assert state.rows.pop() == 3
    state.rows.sort(reverse=True)
    assert server.value("/flows/ui/vars/table") == {"b": {"c": 3}, "new": [1, 2]}
    assert server.value("/flows/ui/vars/rows") == [11, 10, 2]
    assert (AppState().table, AppState().rows) == (state.table, state.rows)


def test_one_mutation_is_one_request(server: StateServer) -> None:
    AppState().rows.extend(range(100))
    AppState().table.update({"p": 1, "q": 2})
    assert len(server.requests) == 2
    assert len(server.value("/flows/ui/vars/rows")) == 103


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.rows.__setitem__(0, 5),
        lambda state: state.rows.pop(0),
        lambda state: state.rows.insert(0, 5),
        lambda state: state.rows.sort(reverse=True),
        lambda state: state.rows.clear(),
    ],
)
def test_what_depends_on_the_list_as_it_was_read_conflicts(server: StateServer, change: Any) -> None:
    state = AppState()
    assert state.rows == [1, 2, 3]
    server.set("/flows/ui/vars/rows", [7, 8, 9])
    with pytest.raises(StateConflict):
        change(state)
    assert server.value("/flows/ui/vars/rows") == [7, 8, 9]
    assert state.rows == [7, 8, 9]


def test_a_work_shows_its_attributes(server: StateServer) -> None:
    trainer = AppState().trainer
    assert trainer.is_running
    assert not trainer.has_failed
    assert not trainer.has_started
    assert (trainer.progress, trainer.metrics, trainer.port) == (0.5, {"loss": 0.1}, 7000)
    assert (trainer.is_ready, trainer.url, trainer.exit_code) == (True, "http://x/view/ui.trainer/", None)
    assert (trainer.status.stage, trainer.status.reason, trainer.status.since) == ("running", None, 12.5)
    assert trainer.retrain is False
    assert trainer.name == "root.ui.trainer"
    assert trainer.last_lines == [f"line {n}" for n in range(30, 50)]
    assert set(dir(trainer)) >= {"is_pending", "has_timeout", "files", "num_successes", "host"}
    assert all(hasattr(trainer, name) for name in dir(trainer))
    with pytest.raises(AttributeError, match="no attribute 'run'"):
        trainer.run()


def test_without_a_server_it_asks_whether_the_app_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORCH_FLOW_URL", raising=False)
    with pytest.raises(AttributeError, match="is the app running"):
        _ = AppState().x
    monkeypatch.setenv("ORCH_FLOW_URL", "http://127.0.0.1:9")
    with pytest.raises(AttributeError, match="is the app running"):
        _ = AppState().x
    with pytest.raises(AttributeError, match="is the app running"):
        AppState().x = 1
    close_connections()


def test_a_wrong_token_or_scope_is_said(server: StateServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORCH_FLOW_SCOPE", "gone")
    with pytest.raises(AttributeError, match="no flow 'gone'"):
        _ = AppState().x
    monkeypatch.setenv("ORCH_FLOW_TOKEN", "wrong")
    with pytest.raises(AttributeError, match="token"):
        _ = AppState().x


def test_every_state_of_one_script_run_shares_its_snapshot(server: StateServer) -> None:
    run = ScriptRun()
    token = current_run.set(run)
    try:
        assert AppState().x == 1
        server.set("/flows/ui/vars/x", 2)
        assert AppState().x == 1
    finally:
        current_run.reset(token)
    assert AppState().x == 2


def test_what_was_read_is_known(server: StateServer) -> None:
    run = ScriptRun(AppServer.from_environment())
    state = AppState._of(run, ())
    assert not run.affected(99, [("flows", "ui", "vars", "x")])
    _ = state.x, state.trainer.progress, state.rows
    head = server.tree.rev
    assert run.affected(head + 1, [("flows", "ui", "vars", "x")])
    assert run.affected(head + 1, [("flows", "ui", "vars", "rows", "3", "deep")])
    assert run.affected(head + 1, [("flows", "ui", "works", "trainer", "status")])
    assert not run.affected(head + 1, [("flows", "ui", "vars", "text"), ("flows", "ui", "vars", "xx")])
    assert not run.affected(head, [("flows", "ui", "vars", "x")])
    state.x = 5
    assert run.affected(server.tree.rev, [("flows", "ui", "vars", "x")])  # what was shown before is old now
    run.automatic = True
    assert not run.affected(server.tree.rev, [("flows", "ui", "vars", "x")])  # but not for ever


def test_errors_are_state_errors(server: StateServer) -> None:
    server.patch_as_flow({"op": "remove", "path": "/flows/ui/flows/child"})
    state = AppState()
    with pytest.raises(AttributeError, match="no attribute 'child'"):
        _ = state.child
    assert issubclass(StateConflict, StateError)
