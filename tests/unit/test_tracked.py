"""State variables: every mutation becomes operations that replay to the same state, and identities hold."""

from __future__ import annotations

import copy
import json
import pickle
import random
import threading
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from orch.errors import StatePathError, StateTypeError
from orch.state import apply_ops, copy_json, same
from orch.tracked import LEAVES, TrackedCounter, TrackedDict, TrackedList, Vars
from orch.wire import Op


class Book:
    """A component's vars, the operations that they reported, and what those make of the state declared at first."""

    def __init__(self, **declared: Any) -> None:
        self.ops: list[Op] = []
        self.vars = Vars(self.ops.append, where="ui")
        for name, value in declared.items():
            self.vars.declare(name, value)
        self.replica = self.vars.snapshot()
        assert self.ops == []

    def __getitem__(self, name: str) -> Any:
        return self.vars.get(name)

    def __setitem__(self, name: str, value: Any) -> None:
        self.vars.set(name, value)

    def took(self) -> list[Op]:
        """What was reported since the last time; checks that it replays."""
        ops, self.ops[:] = list(self.ops), []
        apply_ops(self.replica, copy_json(ops))
        assert same(self.replica, self.vars.snapshot())
        assert same(json.loads(json.dumps(self.replica)), self.replica)
        return ops

    def paths(self) -> list[str]:
        return [f"{op['op']} {op['path']}" for op in self.took()]


# ---- what is reported


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        (lambda r: r.append(4), ["add /r/-"]),
        (lambda r: r.extend([4, 5]), ["add /r/-", "add /r/-"]),
        (lambda r: r.extend(r), ["add /r/-"] * 3),
        (lambda r: r.insert(1, 9), ["add /r/1"]),
        (lambda r: r.insert(-1, 9), ["add /r/2"]),
        (lambda r: r.insert(99, 9), ["add /r/-"]),
        (lambda r: r.insert(-99, 9), ["add /r/0"]),
        (lambda r: r.pop(), ["remove /r/2"]),
        (lambda r: r.pop(0), ["remove /r/0"]),
        (lambda r: r.pop(-2), ["remove /r/1"]),
        (lambda r: r.remove(2), ["remove /r/1"]),
        (lambda r: r.clear(), ["replace /r"]),
        (lambda r: r.__setitem__(0, 7), ["replace /r/0"]),
        (lambda r: r.__setitem__(-1, 7), ["replace /r/2"]),
        (lambda r: r.__setitem__(0, 1.0), ["replace /r/0"]),
        (lambda r: r.__setitem__(0, 1), []),
        (lambda r: r.__setitem__(slice(0, 2), [7, 8, 9]), ["replace /r"]),
        (lambda r: r.__setitem__(slice(None, None, 2), [7, 8]), ["replace /r"]),
        (lambda r: r.__setitem__(slice(None), [1, 2, 3]), []),
        (lambda r: r.__delitem__(1), ["remove /r/1"]),
        (lambda r: r.__delitem__(slice(1, None)), ["remove /r/2", "remove /r/1"]),
        (lambda r: r.__delitem__(slice(None, None, -2)), ["remove /r/2", "remove /r/0"]),
        (lambda r: r.__delitem__(slice(None)), ["replace /r"]),
        (lambda r: r.__delitem__(slice(0, 0)), []),
        (lambda r: r.__iadd__([4]), ["add /r/-"]),
        (lambda r: r.__imul__(2), ["replace /r"]),
        (lambda r: r.__imul__(1), []),
        (lambda r: r.__imul__(0), ["replace /r"]),
        (lambda r: r.reverse(), ["replace /r"]),
        (lambda r: r.sort(reverse=True), ["replace /r"]),
        (lambda r: r.sort(), []),
        (lambda r: r.extend([]), []),
    ],
)
def test_list_mutations(change: Callable[[Any], Any], ops: list[str]) -> None:
    book = Book(r=[1, 2, 3])
    expected = [1, 2, 3]
    change(book["r"])
    change(expected)
    assert book["r"] == expected
    assert [type(x) for x in book["r"]] == [type(x) for x in expected] or "1.0" in str(expected) or not ops
    assert book.paths() == ops


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        (lambda d: d.__setitem__("a", 2), ["replace /d/a"]),
        (lambda d: d.__setitem__("a", True), ["replace /d/a"]),
        (lambda d: d.__setitem__("a", 1), []),
        (lambda d: d.__setitem__("x", 2), ["add /d/x"]),
        (lambda d: d.__setitem__("x/y~z", 2), ["add /d/x~1y~0z"]),
        (lambda d: d.__setitem__("", 2), ["add /d/"]),
        (lambda d: d.__delitem__("a"), ["remove /d/a"]),
        (lambda d: d.pop("a"), ["remove /d/a"]),
        (lambda d: d.pop("nope", None), []),
        (lambda d: d.popitem(), ["remove /d/b"]),
        (lambda d: d.clear(), ["replace /d"]),
        (lambda d: d.update({"a": 1, "x": 0}, b=3), ["add /d/x", "replace /d/b"]),
        (lambda d: d.update([("a", 9)]), ["replace /d/a"]),
        (lambda d: d.update(), []),
        (lambda d: d.__ior__({"x": 1}), ["add /d/x"]),
        (lambda d: d.setdefault("a", 9), []),
        (lambda d: d.setdefault("x", [1]).append(2), ["add /d/x", "add /d/x/-"]),
        (lambda d: d.setdefault("x"), ["add /d/x"]),
        (lambda d: d["b"].setdefault("c", []).append(1), ["add /d/b/c", "add /d/b/c/-"]),
    ],
)
def test_dict_mutations(change: Callable[[Any], Any], ops: list[str]) -> None:
    book = Book(d={"a": 1, "b": {}})
    expected: Any = {"a": 1, "b": {}}
    change(book["d"])
    change(expected)
    assert book["d"] == expected
    assert list(book["d"]) == list(expected)
    assert book.paths() == ops


@pytest.mark.parametrize(
    ("change", "ops"),
    [
        (lambda c: c.update("aaz"), ["replace /c/a", "add /c/z"]),
        (lambda c: c.update({"a": 5}, b=1), ["replace /c/a", "replace /c/b"]),
        (lambda c: c.subtract("ab"), ["replace /c/a", "replace /c/b"]),
        (lambda c: c.__iadd__(Counter("a")), ["replace /c/a"]),
        (lambda c: c.__isub__(Counter("bb")), ["replace /c/b", "remove /c/b"]),
        (lambda c: c.__ior__(Counter("bb")), ["replace /c/b"]),
        (lambda c: c.__iand__(Counter("a")), ["replace /c/a", "replace /c/b", "remove /c/b"]),
        (lambda c: c.__setitem__("a", c["a"] + 1), ["replace /c/a"]),
        (lambda c: c.__setitem__("n", c["n"] + 1), ["add /c/n"]),
        (lambda c: c.__delitem__("nope"), []),
        (lambda c: c.__delitem__("a"), ["remove /c/a"]),
        (lambda c: c["nope"], []),
        (lambda c: c.most_common(1), []),
        (lambda c: c.clear(), ["replace /c"]),
    ],
)
def test_counter_mutations(change: Callable[[Any], Any], ops: list[str]) -> None:
    book = Book(c=Counter("aab"))
    expected = Counter("aab")
    change(book["c"])
    change(expected)
    assert book["c"] == expected
    assert dict(book["c"]) == dict(expected)
    assert book.paths() == ops


def test_depth_is_no_obstacle() -> None:
    book = Book(d={"a": [{"b": {"c": [1]}}]})
    book["d"]["a"][0]["b"]["c"].append({"d": {}})
    book["d"]["a"][0]["b"]["c"][1]["d"]["e"] = (1, 2)
    assert book.paths() == ["add /d/a/0/b/c/-", "add /d/a/0/b/c/1/d/e"]
    assert book["d"] == {"a": [{"b": {"c": [1, {"d": {"e": [1, 2]}}]}}]}


def test_assigning() -> None:
    book = Book(x=1, rows=[{"n": 1}], none=None)
    rows = book["rows"]
    book["rows"] = [{"n": 1}]
    assert book["rows"] is rows
    assert book.took() == []
    book["rows"] = rows
    rows += [{"n": 2}]
    book["rows"] = rows  # what `self.rows += [...]` does
    assert book["rows"] is rows
    assert book.took() == [{"op": "add", "path": "/rows/-", "value": {"n": 2}}]
    for value in (1.0, True, 1):
        book["x"] = value
        assert book.took() == [{"op": "replace", "path": "/x", "value": value}]
        book["x"] = value
        assert book.took() == []
    with pytest.raises(KeyError):
        book["new"] = 1
    with pytest.raises(KeyError):
        book["new"]
    assert "new" not in book.vars
    assert book.vars.names() == ["x", "rows", "none"]


def test_augmented_assignment_in_a_dict_keeps_the_list() -> None:
    book = Book(d={"rows": [1]})
    rows = book["d"]["rows"]
    book["d"]["rows"] += [2]
    assert book["d"]["rows"] is rows
    assert book.paths() == ["add /d/rows/-"]


# ---- state has no aliases


def test_what_is_put_in_is_copied() -> None:
    mine = {"a": [1]}
    book = Book(x=mine, rows=[], d={})
    mine["a"].append(2)
    book["rows"].append(mine)
    book["d"]["k"] = mine
    mine["a"].append(3)
    assert book["x"] == {"a": [1]}
    assert book["rows"] == [{"a": [1, 2]}]
    assert book["d"] == {"k": {"a": [1, 2]}}
    book["rows"] = book["x"]
    book["x"]["a"].append(4)
    assert book["rows"] == {"a": [1]}
    book["d"]["self"] = book["d"]
    book["d"]["k"]["a"].append(5)
    assert book["d"]["self"]["k"] == {"a": [1, 2]}
    book.took()


def test_reported_values_belong_to_nobody() -> None:
    book = Book(rows=[])
    book["rows"].append({"a": [1]})
    book["rows"][0]["a"].append(2)
    assert book.ops[0]["value"] == {"a": [1]}
    assert type(book.ops[0]["value"]) is dict
    book.took()


@pytest.mark.parametrize(
    "leave",
    [
        lambda b: b["rows"].pop(1),
        lambda b: b["rows"].__delitem__(1),
        lambda b: b["rows"].__delitem__(slice(0, 2)),
        lambda b: b["rows"].remove({"n": 1, "in": [0]}),
        lambda b: b["rows"].clear(),
        lambda b: b["rows"].__setitem__(1, None),
        lambda b: b["rows"].__setitem__(slice(None), []),
        lambda b: b["rows"].__imul__(0),
        lambda b: b.__setitem__("rows", None),
        lambda b: b.vars.declare("rows", []),
        lambda b: b.vars.load({"rows": [], "d": {}}),
        lambda b: b.vars.apply([{"op": "remove", "path": "/rows/1"}], in_place=True),
        lambda b: b.vars.apply([{"op": "replace", "path": "/rows", "value": 1}], in_place=True),
    ],
)
def test_what_left_is_ordinary(leave: Callable[[Book], Any]) -> None:
    book = Book(rows=[{"n": 0, "in": [0]}, {"n": 1, "in": [0]}, {"n": 2}], d={})
    row, inner = book["rows"][1], book["rows"][1]["in"]
    leave(book)
    book.ops.clear()
    before = book.vars.snapshot()
    row["n"] = 99
    row[5] = {object()}
    inner.append(object())
    inner.sort(key=str)
    inner.reverse()
    row.update(a=1)
    row.pop("a")
    row.setdefault("z", [0]).append(1)
    del inner[0]
    row.clear()
    assert book.ops == []
    assert same(book.vars.snapshot(), before)


def test_replaced_dict_values_and_cleared_dicts_are_detached() -> None:
    book = Book(d={"a": {"x": 1}, "b": {"x": 2}, "c": {"x": 3}, "e": {"x": 4}})
    d = book["d"]
    a, b, c, e = d["a"], d["b"], d["c"], d["e"]
    d["a"] = {"y": 1}
    assert d.popitem()[1] is e
    assert d.pop("b") is b
    d.clear()
    book.took()
    for gone in (a, b, c, e):
        gone["x"] = 9
    assert book.ops == []


# ---- identity


def test_a_row_keeps_its_identity_when_others_move() -> None:
    book = Book(rows=[{"n": i} for i in range(50)])
    rows = book["rows"]
    row = rows[30]
    for move, at in (
        (lambda: rows.pop(0), 29),
        (lambda: rows.insert(0, {"n": -1}), 30),
        (lambda: rows.__delitem__(slice(0, 20)), 10),
        (lambda: rows.sort(key=lambda r: -r["n"]), 19),
        (lambda: rows.reverse(), 10),
        (lambda: rows.__setitem__(slice(None), [r for r in rows if r["n"] % 10 == 0]), 1),
        (lambda: rows.__imul__(2), 1),
        (lambda: rows.extend([{"n": 1}]), 1),
    ):
        move()
        book.took()
        row["touched"] = row.get("touched", 0) + 1
        (op,) = book.took()
        assert op["path"] == f"/rows/{at}/touched"
        assert rows[at] is row
    assert rows[4] == {"n": 30, "touched": 6}
    assert rows[4] is not row


def test_moving_within_a_list_by_pop_and_insert() -> None:
    book = Book(rows=[{"n": 0}, {"n": 1}])
    book["rows"].insert(0, book["rows"].pop())
    book["rows"][0]["n"] = 5
    assert book["rows"] == [{"n": 5}, {"n": 0}]
    book.took()
    book["rows"][0], book["rows"][1] = book["rows"][1], book["rows"][0]
    assert book["rows"] == [{"n": 0}, {"n": 5}]
    random.Random(1).shuffle(book["rows"])
    book.took()


def test_finding_a_row_costs_the_distance_it_moved() -> None:
    book = Book(rows=[{"n": i} for i in range(20_000)])
    rows = book["rows"]
    first, last = rows[0], rows[-1]

    def cost(row: Any, times: int = 200) -> float:
        start = time.perf_counter()
        for i in range(times):
            row["n"] = -i - 1
        return (time.perf_counter() - start) / times

    assert min(cost(last) for _ in range(5)) < 5 * min(cost(first) for _ in range(5))
    book.took()


def test_a_change_costs_the_same_in_a_large_state() -> None:
    def cost(size: int) -> float:
        book = Book(d={f"key{i}": {"v": i} for i in range(size)}, rows=list(range(size)))
        d, rows = book["d"], book["rows"]

        def once(i: int) -> float:
            start = time.perf_counter()
            d["key5"]["v"] = -i - 1
            d["key7"] = {"v": -i - 1}
            rows.append(i)
            rows[3] = -i - 10
            rows.pop()
            return time.perf_counter() - start

        times = sorted(once(i) for i in range(300))
        return times[len(times) // 4]

    assert cost(100_000) < 5 * cost(10)


# ---- bad values


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["rows"].append({1}), "ui.rows[2] is of type set"),
        (lambda b: b["rows"].append({"x": [1, {"y": b""}]}), "ui.rows[2].x[1].y is of type bytes"),
        (lambda b: b["rows"].extend([{"ok": 1}, object()]), "ui.rows[3] is of type object"),
        (lambda b: b["rows"].insert(0, float("inf")), "ui.rows[0] is inf"),
        (lambda b: b["rows"].__setitem__(1, 1j), "ui.rows[1] is of type complex"),
        (lambda b: b["rows"].__setitem__(slice(1, 1), [1, 1j]), "ui.rows[2] is of type complex"),
        (lambda b: b["rows"][0].update(ok=1, bad=range(3)), "ui.rows[0].bad is of type range"),
        (lambda b: b["rows"][0].update({"ok": 1, 5: 1}), "ui.rows[0] has the key 5 of type int"),
        (lambda b: b["rows"][0].__setitem__(None, 1), "ui.rows[0] has the key None of type NoneType"),
        (lambda b: b["rows"][0].__setitem__("a b", {2}), "ui.rows[0]['a b'] is of type set"),
        (lambda b: b["rows"][0].setdefault("k", {2}), "ui.rows[0].k is of type set"),
        (lambda b: b["rows"][0].__setitem__("k", "\ud800"), "lone surrogate"),
        (lambda b: b.__setitem__("rows", {"a": [set()]}), "ui.rows.a[0] is of type set"),
        (lambda b: b.vars.declare("fresh", {"a": {1: 2}}), "ui.fresh.a has the key 1"),
        (lambda b: b["c"].update([5]), "ui.c has the key 5"),
    ],
)
def test_a_bad_value_is_named_and_nothing_is_stored(change: Callable[[Book], Any], message: str) -> None:
    book = Book(rows=[{"n": 1}, 2], c=Counter("a"))
    with pytest.raises(StateTypeError) as caught:
        change(book)
    assert message in str(caught.value)
    assert book.vars.snapshot() == {"rows": [{"n": 1}, 2], "c": {"a": 1}}
    assert book.ops == []


def test_ordinary_errors_stay_what_they_are() -> None:
    book = Book(rows=[1], d={})
    rows, d = book["rows"], book["d"]
    for bad, error in (
        (lambda: rows.pop(5), IndexError),
        (lambda: rows.remove(9), ValueError),
        (lambda: rows.__setitem__(5, 1), IndexError),
        (lambda: rows.__delitem__(-9), IndexError),
        (lambda: rows.__setitem__(slice(0, 1, 2), [1, 2]), ValueError),
        (lambda: rows.sort(key=lambda _: 1 / 0), ZeroDivisionError),
        (lambda: d.pop("x"), KeyError),
        (lambda: d.popitem(), KeyError),
        (lambda: d.__delitem__("x"), KeyError),
        (lambda: d.update(3), TypeError),
        (lambda: book.__setitem__("rows", []) or book["rows"].pop(), IndexError),
    ):
        with pytest.raises(error):
            bad()
    assert book.paths() == ["replace /rows"]


def test_what_a_bad_depth_is_counts_from_the_attribute() -> None:
    book = Book(d={})
    here = book["d"]
    for _ in range(99):
        here["k"] = {}
        here = here["k"]
    with pytest.raises(StateTypeError, match="100 deep"):
        here["k"] = {}
    book.took()


# ---- conversions


def test_copies_are_plain_and_detached() -> None:
    book = Book(rows=[{"n": [1]}], d={"a": {"b": 1}}, c=Counter("a"))
    rows, d, c = book["rows"], book["d"], book["c"]
    for made, kind in (
        (copy.copy(rows), list),
        (copy.deepcopy(rows), list),
        (rows.copy(), list),
        (rows[:], list),
        (rows + rows[:0], list),
        (rows * 1, list),
        (list(rows), list),
        (pickle.loads(pickle.dumps(rows)), list),
        (copy.copy(d), dict),
        (copy.deepcopy(d), dict),
        (d.copy(), dict),
        (d | {}, dict),
        (pickle.loads(pickle.dumps(d)), dict),
        (copy.copy(c), Counter),
        (copy.deepcopy(c), Counter),
        (c.copy(), Counter),
        (c + Counter(), Counter),
        (pickle.loads(pickle.dumps(c)), Counter),
    ):
        assert type(made) is kind
        assert made in (rows, d, c)
        made.clear()
    for deep in (copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert type(deep[0]) is dict
        assert type(deep[0]["n"]) is list
        deep[0]["n"].append(2)
    assert type(copy.deepcopy([d])[0]["a"]) is dict
    assert book.took() == []


def test_tracked_containers_look_like_what_they_are() -> None:
    book = Book(rows=[{"n": [1, None, "é"]}], c=Counter("aab"))
    rows = book["rows"]
    assert isinstance(rows, list)
    assert isinstance(rows[0], dict)
    assert repr(rows) == "[{'n': [1, None, 'é']}]"
    assert repr(book["c"]) == "Counter({'a': 2, 'b': 1})"
    assert rows == [{"n": [1, None, "é"]}]
    assert json.dumps(rows) == json.dumps([{"n": [1, None, "é"]}])
    assert msgspec.json.encode({"r": rows, "c": book["c"]}) == '{"r":[{"n":[1,null,"é"]}],"c":{"a":2,"b":1}}'.encode()
    assert TrackedList([1, 2]) == [1, 2]
    assert TrackedDict(a=1) == {"a": 1}
    with pytest.raises(TypeError):
        hash(rows)
    match rows[0]:
        case {"n": [first, *_]}:
            assert first == 1
        case _:
            pytest.fail("a tracked dict is no mapping")


def test_kinds_of_containers() -> None:
    book = Book(dd=defaultdict(int, a=1), od=OrderedDict(b=1), c=Counter("a"), t=(1, (2,)), plain={})
    assert type(book["dd"]) is type(book["od"]) is TrackedDict
    assert type(book["t"]) is type(book["t"][1]) is TrackedList
    assert type(book["c"]) is TrackedCounter
    book["c"] = {"z": 1}
    assert type(book["c"]) is TrackedCounter
    assert book["c"]["nope"] == 0
    book["plain"] = Counter("a")
    assert type(book["plain"]) is TrackedDict
    book.vars.apply([{"op": "replace", "path": "/c", "value": {"y": 2}}], in_place=True)
    assert type(book["c"]) is TrackedCounter
    book.vars.apply([{"op": "add", "path": "/c/x", "value": 2}], in_place=False)
    assert type(book["c"]) is TrackedCounter
    book.vars.load({"c": {"w": 1}})
    assert type(book["c"]) is TrackedCounter
    assert book.vars.names() == ["c"]
    book["c"].update("w")
    assert book["c"] == Counter({"w": 2})


# ---- objects that serialize themselves


class Store:
    def __init__(self, name: str, owner: str = "me") -> None:
        self.name, self.owner = name, owner

    def to_state(self) -> dict[str, Any]:
        return {"$store": {"name": self.name, "owner": self.owner}}


@pytest.fixture
def store_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LEAVES, "$store", lambda inner: Store(**inner))


@pytest.mark.usefixtures("store_kind")
def test_objects_are_stored_as_their_dict_and_read_back_as_objects() -> None:
    book = Book(drive=Store("models"), rows=[])
    assert isinstance(book["drive"], Store)
    assert book.vars.snapshot()["drive"] == {"$store": {"name": "models", "owner": "me"}}
    book["drive"] = Store("models")
    assert book.took() == []
    book["drive"] = Store("logs")
    assert book.took() == [{"op": "replace", "path": "/drive", "value": {"$store": {"name": "logs", "owner": "me"}}}]
    book["rows"].append({"at": [Store("a")]})
    assert book.took()[0]["value"] == {"at": [{"$store": {"name": "a", "owner": "me"}}]}
    assert book["rows"][0]["at"][0].name == "a"
    book["rows"][0] = {"at": [Store("a")]}
    book["rows"].reverse()
    assert book.took() == []
    assert copy.deepcopy(book["rows"])[0]["at"][0].name == "a"


@pytest.mark.usefixtures("store_kind")
@pytest.mark.parametrize("in_place", [True, False])
def test_operations_reach_into_objects(in_place: bool) -> None:
    book = Book(drive=Store("models"), rows=[{"s": Store("a")}])
    book.vars.apply(
        [
            {"op": "replace", "path": "/drive/$store/name", "value": "logs"},
            {"op": "replace", "path": "/rows/0/s/$store/owner", "value": "you"},
        ],
        in_place=in_place,
    )
    assert (book["drive"].name, book["drive"].owner) == ("logs", "me")
    assert (book["rows"][0]["s"].name, book["rows"][0]["s"].owner) == ("a", "you")
    book.vars.apply([{"op": "add", "path": "/drive/$store/extra", "value": 1}], in_place=in_place)
    assert book["drive"] == {"$store": {"name": "logs", "owner": "me", "extra": 1}}
    book.vars.apply([{"op": "replace", "path": "/drive", "value": {"$store": "nonsense"}}], in_place=in_place)
    assert book["drive"] == {"$store": "nonsense"}
    with pytest.raises(StatePathError):
        book.vars.apply([{"op": "replace", "path": "/rows/0/s/$store/x/y", "value": 1}], in_place=in_place)
    assert isinstance(book["rows"][0]["s"], Store)


# ---- what others changed


def test_operations_in_place_keep_identities_and_are_not_reported() -> None:
    book = Book(rows=[{"n": 0}, {"n": 1}], d={})
    rows, row = book["rows"], book["rows"][1]
    remote = [
        {"op": "remove", "path": "/rows/0"},
        {"op": "replace", "path": "/rows/0/n", "value": 5},
        {"op": "add", "path": "/rows/-", "value": {"n": [9]}},
        {"op": "copy", "from": "/rows/1", "path": "/d/c"},
        {"op": "move", "from": "/rows/1", "path": "/rows/0"},
    ]
    moved = None
    book.vars.apply(remote[:3], in_place=True)
    moved = rows[1]
    book.vars.apply(remote[3:], in_place=True)
    apply_ops(book.replica, copy_json(remote))
    assert book.took() == []
    assert book["rows"] is rows
    assert rows[1] is row
    assert rows[0] is moved
    row["n"] = 6
    rows[0]["n"].append(1)
    book["d"]["c"]["n"].append(2)
    assert book.paths() == ["replace /rows/1/n", "add /rows/0/n/-", "add /d/c/n/-"]
    remote[2]["value"]["n"].append("alien")
    assert "alien" not in rows[0]["n"]


def test_what_is_held_never_changes_under_the_program() -> None:
    book = Book(rows=[{"n": 0}, {"n": 1}], d={"a": {"b": [1]}, "other": {"x": 1}})
    rows, first, second, d, other = book["rows"], book["rows"][0], book["rows"][1], book["d"], book["d"]["other"]
    remote = [
        {"op": "replace", "path": "/rows/0/n", "value": 5},
        {"op": "add", "path": "/rows/-", "value": {"n": 2}},
        {"op": "add", "path": "/d/a/b/-", "value": 2},
        {"op": "add", "path": "/d/a/b/-", "value": 3},
    ]
    book.vars.apply(remote, in_place=False)
    apply_ops(book.replica, remote)
    assert rows == [{"n": 0}, {"n": 1}]
    assert first == {"n": 0}
    assert d == {"a": {"b": [1]}, "other": {"x": 1}}
    assert book["rows"] == [{"n": 5}, {"n": 1}, {"n": 2}]
    assert book["d"]["a"]["b"] == [1, 2, 3]
    rows.append("lost")
    first["n"] = "lost"
    d["a"]["b"].append("lost")
    assert book.took() == []
    second["n"] = 7  # untouched by the remote change: still the state's own
    other["x"] = 2
    assert book.paths() == ["replace /rows/1/n", "replace /d/other/x"]


@pytest.mark.parametrize("in_place", [True, False])
def test_operations_apply_all_or_none(in_place: bool) -> None:
    book = Book(rows=[{"n": 0}, {"n": 1}], x=1)
    rows, row = book["rows"], book["rows"][1]
    before = book.vars.snapshot()
    with pytest.raises(StatePathError):
        book.vars.apply(
            [
                {"op": "replace", "path": "/x", "value": 2},
                {"op": "replace", "path": "/rows/1/n", "value": 2},
                {"op": "remove", "path": "/rows/0"},
                {"op": "replace", "path": "/rows/7/n", "value": 2},
            ],
            in_place=in_place,
        )
    assert same(book.vars.snapshot(), before)
    assert book["rows"] is rows
    row["n"] = 3
    assert book.paths() == ["replace /rows/1/n"]


def test_loading_keeps_what_is_equal() -> None:
    book = Book(rows=[{"n": 0}], d={"a": 1}, gone=1)
    rows, d = book["rows"], book["d"]
    book.vars.load({"rows": [{"n": 0}], "d": {"a": True}, "new": 5})
    assert book["rows"] is rows
    assert book["d"] is not d
    assert book.vars.snapshot() == {"rows": [{"n": 0}], "d": {"a": True}, "new": 5}
    assert book.ops == []


def test_threads_see_one_order() -> None:
    lock = threading.RLock()
    ops: list[Op] = []
    shared = Vars(ops.append, lock=lock)
    shared.declare("rows", [{"n": 0}])
    shared.declare("d", {})
    replica = shared.snapshot()
    stop = threading.Event()

    def receive() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            op = {"op": "add", "path": "/d/remote", "value": number}
            with lock:
                shared.apply([op], in_place=False)
                ops.append(op)

    receiver = threading.Thread(target=receive)
    receiver.start()
    try:
        for i in range(3000):
            shared.get("rows").append({"n": i})
            shared.get("rows").pop(0)["n"] = "gone"
            shared.get("d")["local"] = i
    finally:
        stop.set()
        receiver.join()
    apply_ops(replica, ops)
    # what was written into a copy that had just been replaced went nowhere, on both sides alike
    assert same(replica, shared.snapshot())


# ---- whatever happens, the operations replay

leaves = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.5, 1.0, "a", "~/", ""])
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "~/", ""]), inner, max_size=3)
    ),
    max_leaves=8,
)
keys = st.sampled_from(["a", "b", "~/", ""])
indices = st.integers(-4, 4)
slices = st.builds(slice, st.none() | indices, st.none() | indices, st.none() | st.sampled_from([1, 2, -1]))


def containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from containers(item)
    elif isinstance(value, list):
        yield value
        for item in value:
            yield from containers(item)


def mutate(target: Any, data: st.DataObject) -> Callable[[Any], Any]:
    """One random mutation for a list or a dict, as a function that can be applied to its plain twin too."""
    if isinstance(target, list):
        verb = data.draw(
            st.sampled_from("append insert extend set slice del delslice pop clear sort reverse imul".split())
        )
        value, index, part = data.draw(values), data.draw(indices), data.draw(slices)
        items = data.draw(st.lists(values, max_size=3))
        return {
            "append": lambda t: t.append(value),
            "insert": lambda t: t.insert(index, value),
            "extend": lambda t: t.extend(items),
            "set": lambda t: t.__setitem__(index, value),
            "slice": lambda t: t.__setitem__(part, items),
            "del": lambda t: t.__delitem__(index),
            "delslice": lambda t: t.__delitem__(part),
            "pop": lambda t: t.pop(index),
            "clear": lambda t: t.clear(),
            "sort": lambda t: t.sort(key=repr),
            "reverse": lambda t: t.reverse(),
            "imul": lambda t: t.__imul__(2 if len(t) < 8 else 1),  # twenty doublings would fill the memory
        }[verb]
    verb = data.draw(st.sampled_from("set del pop popitem setdefault update clear".split()))
    key, value = data.draw(keys), data.draw(values)
    more = data.draw(st.dictionaries(keys, values, max_size=3))
    return {
        "set": lambda t: t.__setitem__(key, value),
        "del": lambda t: t.__delitem__(key),
        "pop": lambda t: t.pop(key, None),
        "popitem": lambda t: t.popitem(),
        "setdefault": lambda t: t.setdefault(key, value),
        "update": lambda t: t.update(more),
        "clear": lambda t: t.clear(),
    }[verb]


def outcome(change: Callable[[Any], Any], target: Any) -> Any:
    try:
        result = change(target)
    except (LookupError, ValueError) as error:
        return type(error)
    return copy.deepcopy(result)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_random_mutations_replay(data: st.DataObject) -> None:
    book = Book(x=data.draw(st.lists(values, max_size=4)), y=data.draw(st.dictionaries(keys, values, max_size=4)))
    held: list[Any] = []
    for _ in range(data.draw(st.integers(1, 10))):
        twin = book.vars.snapshot()  # ordinary containers that undergo the same
        mine = [c for name in ("x", "y") for c in containers(book[name])]
        theirs = [c for name in ("x", "y") for c in containers(twin[name])]
        number = data.draw(st.integers(0, len(mine) - 1))
        change = mutate(mine[number], data)
        assert same(outcome(change, mine[number]), outcome(change, theirs[number]))
        assert same(book.vars.snapshot(), twin)
        book.took()
        held.extend(mine)
        # the same again through containers that were read earlier, wherever they are now, if anywhere
        old = data.draw(st.sampled_from(held))
        attached = any(old is c for name in ("x", "y") for c in containers(book[name]))
        before = book.vars.snapshot()
        outcome(mutate(old, data), old)
        ops = book.took()
        assert bool(ops) is not same(before, book.vars.snapshot())
        assert attached or not ops


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_operations_replay_in_a_second_component_either_way(data: st.DataObject) -> None:
    """What one side reports, another side applies: in place, or with copies; both end equal and still report right."""
    first = {"x": data.draw(st.lists(values, max_size=4)), "y": data.draw(st.dictionaries(keys, values, max_size=4))}
    book, inside, beside = Book(**first), Book(**first), Book(**first)
    for _ in range(data.draw(st.integers(1, 8))):
        mine = [c for name in ("x", "y") for c in containers(book[name])]
        target = data.draw(st.sampled_from(mine))
        held = [c for name in ("x", "y") for c in containers(beside[name])]
        frozen = copy.deepcopy(held)
        outcome(mutate(target, data), target)
        ops = book.took()
        for other, in_place in ((inside, True), (beside, False)):
            other.vars.apply(ops, in_place=in_place)
            apply_ops(other.replica, copy_json(ops))
            assert other.took() == []
            assert same(other.vars.snapshot(), book.vars.snapshot())
        assert same(held, frozen)
    for other in (inside, beside):
        for container in [c for name in ("x", "y") for c in containers(other[name])]:
            if isinstance(container, list):
                container.append("end")
            else:
                container["end"] = "end"
            other.took()
