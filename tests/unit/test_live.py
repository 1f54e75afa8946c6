"""LiveVars: whatever the order of own and others' changes, both sides end equal."""

from __future__ import annotations

import copy
from collections import deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orch.errors import OrchError
from orch.state import apply_ops, same
from orch.tracked import Vars
from orch.wire import Diff, Op
from orch_workers.live import LiveVars, names_of


def replace(path: str, value: Any) -> Op:
    return {"op": "replace", "path": path, "value": value}


def test_names() -> None:
    assert names_of([replace("/a/b", 1), {"op": "move", "path": "/a/x", "from": "/c~1d/y"}]) == {"a", "c/d"}


def test_own_write_does_not_flicker() -> None:
    live = LiveVars(1, {"x": 0})
    live.local(1, [replace("/x", 1)])
    live.local(2, [replace("/x", 2)])
    # Somebody else wrote before ours arrived: the tree has theirs, then ours.
    assert live.remote(2, [replace("/x", 9)]) == [replace("/x", 2)]
    assert live.remote(3, None, 1) == []
    assert live.base == {"x": 1} and live.value("x") == 2
    assert live.remote(4, None, 2) == []
    assert live.base == live.view() == {"x": 2} and not live.pending


def test_others_write_later_wins() -> None:
    live = LiveVars(1, {"x": 0, "y": 0})
    live.local(1, [replace("/x", 1)])
    live.remote(2, None, 1)
    assert live.remote(3, [replace("/x", 9)]) == [replace("/x", 9)]
    assert live.remote(4, [replace("/y", 1)]) == [replace("/y", 1)]
    assert live.view() == {"x": 9, "y": 1}


def test_refused_and_changed_on_the_way() -> None:
    live = LiveVars(1, {"rows": [1]})
    live.local(1, [{"op": "add", "path": "/rows/-", "value": 2}])
    live.local(2, [{"op": "add", "path": "/rows/-", "value": 3}])
    assert live.drop(1) == [replace("/rows", [1, 3])]
    assert live.remote(2, [{"op": "add", "path": "/rows/-", "value": 30}], 2) == [replace("/rows", [1, 30])]
    assert live.drop(7) == [] and live.waits_for(1) is None


def test_own_change_that_no_longer_fits_is_left_out_of_the_view() -> None:
    live = LiveVars(1, {"rows": [1, 2]})
    live.local(1, [{"op": "remove", "path": "/rows/1"}])
    assert live.remote(2, [replace("/rows", [])]) == [replace("/rows", [])]
    assert live.drop(1) == [replace("/rows", [])]


def test_a_look_costs_the_variable_once_however_many_changes_wait() -> None:
    class Element(dict[str, Any]):
        copies = 0

        def __deepcopy__(self, memo: Any) -> Element:
            Element.copies += 1
            return Element(self)

    live = LiveVars(1, {"log": [Element()]})
    for seq in range(1, 100):
        live.local(seq, [{"op": "add", "path": "/log/-", "value": seq}])
    Element.copies = 0
    assert live.value("log") == [{}, *range(1, 100)]
    assert Element.copies == 1


def test_twice_is_once() -> None:
    live = LiveVars(1, {"rows": []})
    op = {"op": "add", "path": "/rows/-", "value": 1}
    live.remote(2, [op])
    assert live.remote(2, [op]) == [] and live.base == {"rows": [1]}
    live.local(1, [op])
    live.local(2, [op])
    live.remote(3, None, 1)
    live.remote(3, None, 2)  # one revision may hold several own changes
    assert live.remote(3, None, 2) == [] and live.base == {"rows": [1, 1, 1]}


def test_reset() -> None:
    live = LiveVars(5, {"x": 0, "rows": []})
    live.local(1, [replace("/x", 1)])
    live.local(2, [{"op": "add", "path": "/rows/-", "value": 1}])
    assert live.reset(4, {"x": 7, "rows": []}, 2) == []
    assert live.reset(8, {"x": 1, "rows": [9]}, 1) == [replace("/rows", [9, 1]), replace("/x", 1)]
    assert live.view() == {"x": 1, "rows": [9, 1]} and len(live.pending) == 1


def test_nothing_is_shared() -> None:
    given_vars = {"d": {"a": [1]}}
    live = LiveVars(1, given_vars)
    value = {"b": []}
    live.local(1, [replace("/d", value)])
    live.remote(2, None, 1)
    value["b"].append(1)  # type: ignore[attr-defined]
    given_vars["d"]["a"].append(2)
    live.value("d")["b"].append(3)
    assert live.base == {"d": {"b": []}}


OPS = st.one_of(
    st.builds(lambda name, value: replace(f"/{name}", value), st.sampled_from("xy"), st.integers(0, 3)),
    st.builds(lambda value: {"op": "add", "path": "/rows/-", "value": value}, st.integers(0, 99)),
    st.builds(lambda i: {"op": "remove", "path": f"/rows/{i}"}, st.integers(0, 2)),
    st.builds(lambda rows: replace("/rows", rows), st.lists(st.integers(0, 9), max_size=3)),
    st.builds(
        lambda k, v: {"op": "add", "path": f"/d/{k}", "value": {"n": v}}, st.sampled_from("ab"), st.integers(0, 3)
    ),
)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("own"), OPS), st.tuples(st.just("other"), OPS), st.sampled_from([("send",), ("hear",)])
    ),
    max_size=40,
)


@settings(max_examples=300, deadline=None)
@given(STEPS)
def test_both_sides_end_equal(steps: list[Any]) -> None:
    start: dict[str, Any] = {"x": 0, "y": 0, "rows": [0], "d": {}}
    tree, rev, seq = copy.deepcopy(start), 0, 0
    live = LiveVars(0, start)
    own = Vars(lambda op: None)
    own.load(start)
    to_tree: deque[tuple[int, list[Op]]] = deque()
    to_side: deque[Diff | int] = deque()

    def send() -> None:
        nonlocal rev
        number, ops = to_tree.popleft()
        try:
            apply_ops(tree, ops)
        except OrchError:
            to_side.append(number)
            return
        rev += 1
        to_side.append(Diff(work="w", rev=rev, seq=number))

    def hear() -> None:
        news = to_side.popleft()
        ops = live.drop(news) if isinstance(news, int) else live.remote(news.rev, news.ops, news.seq)
        own.apply(ops, in_place=False)
        assert same(own.snapshot(), live.view())

    for step in steps:
        if step[0] == "own":
            try:
                own.apply([step[1]], in_place=True)  # as the running code would
            except OrchError:
                continue
            seq += 1
            live.local(seq, [step[1]])
            to_tree.append((seq, [step[1]]))
        elif step[0] == "other":
            try:
                apply_ops(tree, [step[1]])
            except OrchError:
                continue
            rev += 1
            to_side.append(Diff(work="w", rev=rev, ops=[step[1]]))
        elif step[0] == "send" and to_tree:
            send()
        elif step[0] == "hear" and to_side:
            hear()
    while to_tree:
        send()
    while to_side:
        hear()
    assert not live.pending
    assert same(live.base, tree) and same(own.snapshot(), tree)


def test_unknown_name() -> None:
    with pytest.raises(KeyError):
        LiveVars(0, {}).value("x")
