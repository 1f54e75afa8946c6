"""List and Dict: what lists and dicts of components can do, in __init__, in run() and in API methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from orch import Dict, Flow, List, ScriptWork
from orch.errors import StateTypeError
from orch.testing import AppTester


class Leaf(Flow):
    def __init__(self, x: int = 0) -> None:
        super().__init__()
        self.x = x
        self.subs = [ScriptWork("sub", parallel=True)]


class Root(Flow):
    def __init__(self) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.go = 0
        self.items = [Leaf(0), Leaf(1), Leaf(2)]
        self.table = Dict(a=Leaf(10), b=Leaf(11))

    def run(self) -> None:
        self._body(self)


def started() -> AppTester:
    tester = AppTester(Root())
    tester.settle()
    return tester


def change(tester: AppTester, body: Callable[[Any], Any]) -> Any:
    return tester.call_method(lambda: body(tester.flow))


def values(tester: AppTester) -> list[int]:
    return [leaf.x for leaf in tester.flow.items]


def same_as_tree(tester: AppTester) -> None:
    """The flow's objects and the tree agree, also about every work's place."""
    node = tester.program.node()
    for name in ("items", "table"):
        mine, tree = node["structures"][name], tester.state["structures"][name]
        assert mine["order"] == tree["order"]
        assert {k: v["vars"] for k, v in mine["flows"].items()} == {k: v["vars"] for k, v in tree["flows"].items()}
    assert sorted(work.name.removeprefix("root.") for work in tester.flow.works()) == sorted(tester.engine.works)


def test_list_operations() -> None:
    tester = started()
    change(tester, lambda flow: flow.items.insert(1, Leaf(7)))
    assert values(tester) == [0, 7, 1, 2]
    change(tester, lambda flow: flow.items.insert(-1, Leaf(8)))
    assert values(tester) == [0, 7, 1, 8, 2]
    change(tester, lambda flow: flow.items.remove(flow.items[0]))
    change(tester, lambda flow: flow.items.__delitem__(slice(0, 2)))
    assert values(tester) == [8, 2]
    change(tester, lambda flow: setattr(flow, "items", flow.items.__iadd__([Leaf(9)])))
    assert values(tester) == [8, 2, 9]
    assert tester.flow.items[-1].x == 9
    assert [leaf.x for leaf in tester.flow.items[1:]] == [2, 9]
    assert len(tester.flow.items) == 3
    assert tester.flow.items[1] in tester.flow.items
    assert tester.flow.items.index(tester.flow.items[2]) == 2
    change(tester, lambda flow: flow.items.clear())
    assert values(tester) == []
    same_as_tree(tester)


def test_lists_add_up_to_an_ordinary_list() -> None:
    items = started().flow.items
    other = [Leaf(5)]
    assert [leaf.x for leaf in items + other] == [0, 1, 2, 5]
    assert [leaf.x for leaf in other + items] == [5, 0, 1, 2]
    assert type(items + items) is list


def test_dict_operations() -> None:
    tester = started()
    change(tester, lambda flow: flow.table.update({"c": Leaf(12)}))
    assert list(tester.flow.table) == tester.flow.table.keys() == ["a", "b", "c"]
    assert change(tester, lambda flow: flow.table.pop("a")).x == 10
    change(tester, lambda flow: flow.table.__delitem__("b"))
    with pytest.raises(KeyError):
        change(tester, lambda flow: flow.table.pop("nope"))
    assert [(key, leaf.x) for key, leaf in tester.flow.table.items()] == [("c", 12)]
    assert tester.flow.table.get("nope") is None
    assert "c" in tester.flow.table
    same_as_tree(tester)


def test_only_components_fit() -> None:
    tester = started()
    for body in (
        lambda flow: flow.items.append(1),
        lambda flow: flow.items.insert(0, "x"),
        lambda flow: flow.table.update({"n": None}),
    ):
        with pytest.raises(StateTypeError, match="holds Flows and Works"):
            change(tester, body)
    same_as_tree(tester)


def test_an_api_method_that_raises_leaves_structures_as_they_were() -> None:
    tester = started()
    kept = list(tester.flow.items)

    def method() -> None:
        flow = tester.flow
        flow.items.append(Leaf(5))
        flow.items.pop(0)
        flow.items.insert(0, Leaf(6))
        flow.table["new"] = Leaf(7)
        del flow.table["a"]
        flow.more = [Leaf(8)]
        flow.single = Leaf(9)
        flow.items[1].x = 99
        raise ValueError("no")

    before = tester.rev
    with pytest.raises(ValueError, match="no"):
        tester.call_method(method)
    assert tester.rev == before
    assert list(tester.flow.items) == kept
    assert values(tester) == [0, 1, 2]
    assert list(tester.flow.table) == ["a", "b"]
    assert not hasattr(tester.flow, "more")
    assert not hasattr(tester.flow, "single")
    assert tester.flow.items[0].name == "root.items.0"
    same_as_tree(tester)
    change(tester, lambda flow: flow.items.append(Leaf(3)))
    tester.restart_server()
    assert values(tester) == [0, 1, 2, 3]
    same_as_tree(tester)


def test_an_element_may_leave_and_come_back_under_a_new_number() -> None:
    tester = started()

    def rotate(flow: Any) -> None:
        flow.items.append(flow.items.pop(0))

    change(tester, rotate)
    assert values(tester) == [1, 2, 0]
    assert tester.state["structures"]["items"]["order"] == ["1", "2", "3"]
    same_as_tree(tester)


def test_structures_inside_elements_go_with_them_and_are_restored_with_them() -> None:
    tester = started()
    change(tester, lambda flow: flow.items[0].subs.append(ScriptWork("more", parallel=True)))
    change(tester, lambda flow: flow.items.append(Leaf(3)))
    change(tester, lambda flow: flow.items[3].subs.append(ScriptWork("more", parallel=True)))
    tester.restart_server()
    assert [len(leaf.subs) for leaf in tester.flow.items] == [2, 1, 1, 2]
    same_as_tree(tester)
    change(tester, lambda flow: flow.items.pop(3))
    change(tester, lambda flow: flow.items.pop(0))
    tester.notes.clear()
    tester.restart_server()
    tester.settle()
    assert [note for note in tester.notes if "cannot be made" in note] == []
    assert [len(leaf.subs) for leaf in tester.flow.items] == [1, 1]
    same_as_tree(tester)


def test_what_a_flow_was_given_before_it_had_its_place_is_restored_with_it() -> None:
    tester = started()

    def make(flow: Any) -> None:
        leaf = Leaf(3)
        leaf.subs.append(ScriptWork("more", parallel=True))
        leaf.late = Leaf(4)
        leaf.late.subs.pop(0)
        leaf.late.others = {"k": Leaf(5)}
        leaf.late.others["k"].script = ScriptWork("deep", parallel=True)
        flow.items.append(leaf)
        leaf.late.others["k"].script.run("once")

    change(tester, make)
    for name in ("items.3", "items.4"):
        assert {work for work in tester.engine.works if work.startswith(name)} == {
            f"{name}.subs.0",
            f"{name}.subs.1",
            f"{name}.late.others.k.subs.0",
            f"{name}.late.others.k.script",
        }
        before = tester.state["structures"]["items"]
        tester.restart_server()
        assert tester.state["structures"]["items"] == before
        tester.settle()
        tester.notes.clear()
        same_as_tree(tester)
        change(tester, lambda flow: flow.items.append(flow.items.pop(3)))  # what came late goes with it
    assert tester.notes == []


def test_a_dict_key_that_was_removed_and_used_again_is_restored_as_the_new_one() -> None:
    tester = started()
    change(tester, lambda flow: flow.table["a"].subs.append(ScriptWork("more", parallel=True)))
    change(tester, lambda flow: flow.table.pop("a"))
    change(tester, lambda flow: flow.table.update({"a": Leaf(77), "c": Leaf(78)}))
    change(tester, lambda flow: flow.table.pop("b"))
    change(tester, lambda flow: flow.table.update({"b": ScriptWork("other", parallel=True)}))
    tester.restart_server()
    assert tester.flow.table["a"].x == 77
    assert len(tester.flow.table["a"].subs) == 1
    assert isinstance(tester.flow.table["b"], ScriptWork)
    assert list(tester.flow.table) == ["a", "c", "b"]
    same_as_tree(tester)


def test_removing_and_adding_the_same_key_in_one_pass() -> None:
    def body(flow: Any) -> None:
        for leaf in flow.table.values():
            leaf.subs[0].run(str(leaf.x))
        if flow.go == 1:
            del flow.table["a"]
            flow.table["a"] = Leaf(50)
            flow.go = 2

    tester = started()
    tester.flow._body = body
    for name in ("table.a.subs.0", "table.b.subs.0"):
        tester.fake(name).run_for = None
    tester.set("go", 1)
    tester.settle()
    starts = [(start.call, start.args) for start in tester.fake("table.a.subs.0").starts]
    assert starts == [("1-table.a.subs.0-1", ["50"])] or starts[-1] == ("1-table.a.subs.0-2", ["50"])
    assert len(tester.fake("table.b.subs.0").starts) == 1
    same_as_tree(tester)


def test_components_can_be_changed_in_passes_only() -> None:
    tester = started()
    with pytest.raises(StateTypeError, match=r"__init__ and run\(\) only"):
        tester.flow.items.append(Leaf())


def test_a_list_of_components_is_taken_at_every_place_where_it_is_assigned() -> None:
    tester = started()
    change(tester, lambda flow: setattr(flow, "late", (Leaf(1), Leaf(2))))
    assert isinstance(tester.flow.late, List)
    assert tester.state["structures"]["late"]["order"] == ["0", "1"]
    tester.restart_server()
    assert [leaf.x for leaf in tester.flow.late] == [1, 2]


class Placeholders(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.models = []
        self.table = {}
        self.rows = [1]
        self.table = {"a": Leaf(1)}


def test_an_empty_list_or_dict_may_stand_for_children_that_come_later() -> None:
    tester = AppTester(Placeholders())
    tester.settle()
    assert list(tester.state["structures"]) == ["table"]
    change(tester, lambda flow: setattr(flow, "models", [Leaf(2)]))
    change(tester, lambda flow: flow.models.append(Leaf(3)))
    for _ in range(2):
        assert [leaf.x for leaf in tester.flow.models] == [2, 3]
        assert tester.state["vars"] == {"rows": [1]}
        tester.restart_server()
    with pytest.raises(StateTypeError, match=r"rows is a state variable"):
        change(tester, lambda flow: setattr(flow, "rows", [Leaf()]))
