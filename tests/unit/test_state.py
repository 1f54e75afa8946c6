"""The state tree: values, pointers, patches, who may write, limits, revisions."""

from __future__ import annotations

import copy
import enum
import time
from collections import Counter, OrderedDict, defaultdict, namedtuple
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orch.errors import (
    StateError,
    StateForbidden,
    StatePathError,
    StateTestFailed,
    StateTooLarge,
    StateTypeError,
)
from orch.state import (
    MAX_DEPTH,
    StateTree,
    apply_ops,
    format_pointer,
    json_equal,
    json_size,
    parse_pointer,
    same,
    split_pointer,
    to_json,
)

scalars = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text("aé/~0")
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text("ab/~", max_size=2), inner),
    max_leaves=12,
)


# ---- pointers


@pytest.mark.parametrize(
    ("pointer", "tokens"),
    [("", ()), ("/", ("",)), ("/a/b", ("a", "b")), ("/a~1b/~0", ("a/b", "~")), ("/~01", ("~1",)), ("//", ("", ""))],
)
def test_pointers_are_those_of_rfc_6901(pointer: str, tokens: tuple[str, ...]) -> None:
    assert parse_pointer(pointer) == tokens
    assert format_pointer(tokens) == pointer


@given(st.lists(st.text("a/~01")))
def test_any_tokens_make_a_pointer_and_come_back(tokens: list[str]) -> None:
    assert parse_pointer(format_pointer(tokens)) == tuple(tokens)


@pytest.mark.parametrize("pointer", ["a", "vars/x", "/a~", "/a~2b", "~0"])
def test_a_malformed_pointer_is_named(pointer: str) -> None:
    with pytest.raises(StatePathError, match="no JSON pointer") as caught:
        parse_pointer(pointer)
    assert repr(pointer) in str(caught.value)


@pytest.mark.parametrize(
    ("pointer", "component", "attr", "rest"),
    [
        ("/vars/x", "", "x", ()),
        ("/vars/x/0/y", "", "x", ("0", "y")),
        ("/flows/ui/vars/x", "/flows/ui", "x", ()),
        ("/works/t/vars/vars/vars", "/works/t", "vars", ("vars",)),
        ("/flows/a/flows/b/works/c/vars/x", "/flows/a/flows/b/works/c", "x", ()),
        ("/structures/m/works/0/vars/x", "/structures/m/works/0", "x", ()),
        ("/structures/m/flows/0/structures/n/works/1/vars/x", "/structures/m/flows/0/structures/n/works/1", "x", ()),
    ],
)
def test_where_attributes_live(pointer: str, component: str, attr: str, rest: tuple[str, ...]) -> None:
    assert split_pointer(parse_pointer(pointer)) == (parse_pointer(component), attr, rest)


@pytest.mark.parametrize(
    "pointer",
    ["", "/vars", "/app/name", "/works/t/status/stage", "/works/t", "/works/t/flows/x/vars/y", "/structures/m/order/0",
     "/structures/m/vars/x", "/structures/m/works/0/works/1/vars/x", "/flows/ui/vars"],
)  # fmt: skip
def test_where_no_attributes_live(pointer: str) -> None:
    assert split_pointer(parse_pointer(pointer)) is None


# ---- values


class Color(str, enum.Enum):  # noqa: UP042  (the older way is what users have)
    RED = "red"


class Size(enum.IntEnum):
    BIG = 3


class Stage(enum.StrEnum):
    RUNNING = "running"


class Kept:
    def to_state(self) -> dict[str, Any]:
        return {"$kept": {"at": (1, 2)}}


Point = namedtuple("Point", "x y")
nested = defaultdict(list, {"a": [1]})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Color.RED, "red"),
        (Stage.RUNNING, "running"),
        (Size.BIG, 3),
        (Point(1, 2), [1, 2]),
        ((1, (2,)), [1, [2]]),
        (OrderedDict(b=1, a=2), {"b": 1, "a": 2}),
        (nested, {"a": [1]}),
        (Counter("aab"), {"a": 2, "b": 1}),
        ({Color.RED: 1}, {"red": 1}),
        (2**200, 2**200),
        (-0.5, -0.5),
        ("é\U0001f600", "é\U0001f600"),
        (Kept(), {"$kept": {"at": [1, 2]}}),
        ([Kept()], [{"$kept": {"at": [1, 2]}}]),
    ],
)
def test_what_becomes_state(value: Any, plain: Any) -> None:
    made = to_json(value, "x")
    assert made == plain
    assert same(made, plain)


def test_subclasses_become_the_plain_type() -> None:
    class Half(float):
        pass

    for value, kind in ((Color.RED, str), (Stage.RUNNING, str), (Size.BIG, int), (Half(0.5), float), (nested, dict)):
        assert type(to_json(value, "x")) is kind


@given(values)
def test_a_json_value_becomes_an_equal_and_separate_one(value: Any) -> None:
    made = to_json(value, "x")
    assert same(made, value)
    if isinstance(value, dict | list) and value:
        assert made is not value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"rows": [0, {"x": {1}}]}, "ui.rows[1].x is of type set"),
        ([b""], "ui[0] is of type bytes"),
        ({"a b": object()}, "ui['a b'] is of type object"),
        ({1: 2}, "ui has the key 1 of type int"),
        ({"a": {None: 2}}, "ui.a has the key None"),
        ([float("nan")], "ui[0] is nan"),
        (float("-inf"), "ui is -inf"),
        (enum.Enum("Bare", "A").A, "Bare"),
        (1j, "complex"),
        (lambda: 0, "function"),
        ("\ud800", "lone surrogate U+D800"),
        ({"\udfff": 1}, "lone surrogate U+DFFF"),
        pytest.param(10**5000, "digits", id="long"),
    ],
)
def test_what_is_no_state_is_refused_by_place_and_type(value: Any, message: str) -> None:
    with pytest.raises(StateTypeError) as caught:
        to_json(value, "ui")
    assert message in str(caught.value)
    assert isinstance(caught.value, AttributeError)
    str(caught.value).encode()


def test_cycles_depth_and_shared_parts_end_in_an_error_and_not_in_a_hang() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(StateTypeError, match="contains itself"):
        to_json(loop, "x")
    deep: Any = 0
    for _ in range(MAX_DEPTH):
        deep = [deep]
    assert to_json(deep, "x") == deep
    with pytest.raises(StateTypeError, match="more than 100 deep"):
        to_json([deep], "x")
    bomb: Any = "x"
    for _ in range(60):
        bomb = [bomb, bomb]
    with pytest.raises(StateTypeError, match="elements"):
        to_json(bomb, "x")
    shared = [1]
    made = to_json([shared, shared], "x")
    assert made == [[1], [1]]
    assert made[0] is not made[1]


def test_one_true_and_one_point_zero_are_three_values() -> None:
    for a in (1, True, 1.0):
        for b in (1, True, 1.0):
            assert same(a, b) is (type(a) is type(b))
            assert same({"k": [a]}, {"k": [b]}) is (type(a) is type(b))
    assert same({"a": 1, "b": 2}, {"b": 2, "a": 1})
    assert not same([1, 2], [2, 1])
    assert not same({"a": None}, {})
    assert same([Kept()], [{"$kept": {"at": [1, 2]}}])
    assert same({"$kept": {"at": [1, 2]}}, Kept())


def test_a_test_compares_numbers_by_value_and_a_bool_is_no_number() -> None:
    assert json_equal([1, 2.0], [1.0, 2])
    assert not json_equal(True, 1)
    assert not json_equal(0, False)
    assert not json_equal("1", 1)
    assert not json_equal(None, 0)
    assert json_equal({"a": [None]}, {"a": [None]})


# ---- patches


@pytest.mark.parametrize(
    ("doc", "ops", "after"),
    [
        ({"a": 1}, [{"op": "add", "path": "/b", "value": [2]}], {"a": 1, "b": [2]}),
        ({"a": 1}, [{"op": "add", "path": "/a", "value": 2}], {"a": 2}),
        ({"a": [1, 3]}, [{"op": "add", "path": "/a/1", "value": 2}], {"a": [1, 2, 3]}),
        ({"a": [1]}, [{"op": "add", "path": "/a/1", "value": 2}], {"a": [1, 2]}),
        ({"a": [1]}, [{"op": "add", "path": "/a/-", "value": None}], {"a": [1, None]}),
        ({"a": [1, 2]}, [{"op": "remove", "path": "/a/0"}], {"a": [2]}),
        ({"a": 1, "": 2}, [{"op": "remove", "path": "/"}], {"a": 1}),
        ({"a": 1}, [{"op": "replace", "path": "/a", "value": True}], {"a": True}),
        ({"a": [1, 2, 3]}, [{"op": "move", "from": "/a/0", "path": "/a/2"}], {"a": [2, 3, 1]}),
        ({"a": {"b": 1}}, [{"op": "move", "from": "/a/b", "path": "/a/c"}], {"a": {"c": 1}}),
        ({"a": 1}, [{"op": "move", "from": "/a", "path": "/a"}], {"a": 1}),
        ({"a": {"b": [1]}}, [{"op": "copy", "from": "/a/b", "path": "/c"}], {"a": {"b": [1]}, "c": [1]}),
        ({"a": {"b": 1}}, [{"op": "copy", "from": "/a", "path": "/a/a"}], {"a": {"b": 1, "a": {"b": 1}}}),
        ({"a": 1}, [{"op": "test", "path": "", "value": {"a": 1.0}}], {"a": 1}),
        ({"a~/b": 1}, [{"op": "replace", "path": "/a~0~1b", "value": 2}], {"a~/b": 2}),
        ({"0": {"-": 1}}, [{"op": "replace", "path": "/0/-", "value": 2}], {"0": {"-": 2}}),
        ([1], [{"op": "add", "path": "/-", "value": 2}], [1, 2]),
    ],
)
def test_the_six_operations(doc: Any, ops: list[Any], after: Any) -> None:
    apply_ops(doc, ops)
    assert same(doc, after)


@pytest.mark.parametrize(
    ("op", "error", "status"),
    [
        ({"op": "replace", "path": "/nope", "value": 1}, StatePathError, 409),
        ({"op": "remove", "path": "/rows/3"}, StatePathError, 409),
        ({"op": "remove", "path": "/rows/-"}, StatePathError, 409),
        ({"op": "replace", "path": "/rows/-", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/4", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/-1", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/01", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/1e0", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/²", "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/rows/" + "9" * 5000, "value": 1}, StatePathError, 409),
        ({"op": "add", "path": "/a/b/c", "value": 1}, StatePathError, 409),
        ({"op": "test", "path": "/nope", "value": 1}, StatePathError, 409),
        ({"op": "copy", "from": "/nope", "path": "/a"}, StatePathError, 409),
        ({"op": "move", "from": "/a", "path": "/nope/x"}, StatePathError, 409),
        ({"op": "test", "path": "/a", "value": True}, StateTestFailed, 409),
        ({"op": "remove", "path": ""}, StateForbidden, 403),
        ({"op": "replace", "path": "", "value": {}}, StateForbidden, 403),
        ({"op": "move", "from": "/rows", "path": "/rows/0"}, StateError, 400),
        ({"op": "increment", "path": "/a"}, StateError, 400),
        ({"op": "add", "path": "/a"}, StateError, 400),
        ({"op": "add", "path": "a", "value": 1}, StateError, 400),
        ({"op": "add", "value": 1}, StateError, 400),
        ({"op": "move", "path": "/a"}, StateError, 400),
        ({"op": ["add"], "path": "/a", "value": 1}, StateError, 400),
        ("remove everything", StateError, 400),
        (None, StateError, 400),
    ],
)
def test_a_bad_operation_changes_nothing_and_takes_the_others_with_it(op: Any, error: type, status: int) -> None:
    doc = {"a": 1, "rows": [1, {"x": 2}, 3]}
    before = copy.deepcopy(doc)
    good = [
        {"op": "replace", "path": "/rows/1/x", "value": 9},
        {"op": "move", "from": "/rows/0", "path": "/rows/2"},
        {"op": "add", "path": "/new", "value": [1]},
        {"op": "add", "path": "/new/-", "value": 2},
        {"op": "add", "path": "/rows/-", "value": 0},
        {"op": "remove", "path": "/rows/3"},
    ]
    with pytest.raises(StateError) as caught:
        apply_ops(doc, [*good, op])
    assert type(caught.value) is error
    assert caught.value.status == status
    assert same(doc, before)
    tree = StateTree(doc, 7)
    with pytest.raises(error):
        tree.apply([*good, op], 8, guard=False)
    assert same(tree.root, before)
    assert tree.rev == 7
    assert tree.value_rev("/rows") == 7


@pytest.mark.parametrize("ops", [{}, "[]", None, 3])
def test_a_patch_is_a_list(ops: Any) -> None:
    with pytest.raises(StateError) as caught:
        apply_ops({}, ops)
    assert caught.value.status == 400


def test_a_failing_test_says_what_it_found() -> None:
    with pytest.raises(StateTestFailed, match=r'/a is "aaa.*\.\.\., not \[1\]'):
        apply_ops({"a": "a" * 500}, [{"op": "test", "path": "/a", "value": [1]}])


def test_a_missing_path_says_what_is_there() -> None:
    with pytest.raises(StatePathError, match=r"/a/c does not exist: /a has no 'c'") as caught:
        apply_ops({"a": {"b": 1}}, [{"op": "remove", "path": "/a/c"}])
    assert caught.value.hint == "it has 'b'"


# ---- the tree: who may write


def studio() -> dict[str, Any]:
    return {
        "vars": {"x": 1, "rows": [{"n": 1}, {"n": 2}], "d": {"a": {"b": 1}}},
        "flows": {"ui": {"vars": {"start": False}, "flows": {}, "works": {}, "structures": {}}},
        "works": {"trainer": {"vars": {"retrain": False}, "status": {"stage": "running"}, "calls": {}}},
        "structures": {"models": {"order": ["0"], "flows": {}, "works": {"0": {"vars": {"z": None}, "status": {}}}}},
        "app": {"name": "studio", "run": 1, "stage": "running"},
    }


@pytest.mark.parametrize(
    "op",
    [
        {"op": "replace", "path": "/vars/x", "value": [1, {"a": None}]},
        {"op": "add", "path": "/vars/x", "value": 2},
        {"op": "add", "path": "/vars/d/new", "value": 2},
        {"op": "remove", "path": "/vars/rows/0"},
        {"op": "move", "from": "/vars/rows/0", "path": "/vars/rows/1"},
        {"op": "copy", "from": "/vars/d", "path": "/vars/d/a/b"},
        {"op": "replace", "path": "/flows/ui/vars/start", "value": True},
        {"op": "replace", "path": "/works/trainer/vars/retrain", "value": True},
        {"op": "replace", "path": "/structures/models/works/0/vars/z", "value": 0},
    ],
)
def test_users_write_below_vars(op: dict[str, Any]) -> None:
    tree = StateTree(studio(), 1)
    assert tree.apply([op], 2, guard=True) == [op]
    expected = studio()
    apply_ops(expected, [op])
    assert same(tree.root, expected)
    assert tree.rev == 2


@pytest.mark.parametrize(
    ("op", "error", "status"),
    [
        ({"op": "replace", "path": "/app/stage", "value": "stopped"}, StateForbidden, 403),
        ({"op": "replace", "path": "/works/trainer/status/stage", "value": "failed"}, StateForbidden, 403),
        ({"op": "replace", "path": "/vars", "value": {}}, StateForbidden, 403),
        ({"op": "add", "path": "/vars", "value": {}}, StateForbidden, 403),
        ({"op": "add", "path": "/works/new", "value": {"vars": {}}}, StateForbidden, 403),
        ({"op": "add", "path": "/structures/models/order/-", "value": "1"}, StateForbidden, 403),
        ({"op": "remove", "path": "/vars/x"}, StateForbidden, 403),
        ({"op": "move", "from": "/vars/x", "path": "/vars/d/x"}, StateForbidden, 403),
        ({"op": "copy", "from": "/vars/x", "path": "/vars/d/x"}, StateForbidden, 403),
        ({"op": "copy", "from": "/app/name", "path": "/vars/d/x"}, StateForbidden, 403),
        ({"op": "move", "from": "/vars/d/a", "path": "/vars/d"}, StateForbidden, 403),
        ({"op": "move", "from": "/vars/d/a", "path": "/flows/ui/vars/start"}, StateForbidden, 403),
        ({"op": "add", "path": "/vars/new", "value": 1}, StateTypeError, 422),
        ({"op": "replace", "path": "/vars/new", "value": 1}, StateTypeError, 422),
        ({"op": "add", "path": "/vars/new/deeper", "value": 1}, StateTypeError, 422),
        ({"op": "replace", "path": "/vars/x", "value": {"s": {1, 2}}}, StateTypeError, 422),
        ({"op": "replace", "path": "/vars/x", "value": float("nan")}, StateTypeError, 422),
        ({"op": "replace", "path": "/flows/nope/vars/x", "value": 1}, StatePathError, 409),
        ({"op": "replace", "path": "/vars/rows/2/n", "value": 1}, StatePathError, 409),
        ({"op": "test", "path": "/vars/x", "value": 2}, StateTestFailed, 409),
        ({"op": "replace", "path": "vars/x", "value": 2}, StateError, 400),
    ],
)
def test_what_users_may_not_write(op: dict[str, Any], error: type, status: int) -> None:
    tree = StateTree(studio(), 5)
    with pytest.raises(StateError) as caught:
        tree.apply([{"op": "replace", "path": "/vars/x", "value": 2.5}, op], 6, guard=True)
    assert type(caught.value) is error
    assert caught.value.status == status
    assert same(tree.root, studio())
    assert tree.rev == 5


def test_depth_counts_from_the_attribute() -> None:
    tree = StateTree(studio(), 1)
    value: Any = 0
    for _ in range(60):
        value = {"k": value}
    path = "/vars/d/a/b"
    tree.apply([{"op": "replace", "path": path, "value": value}], 2, guard=True)
    deeper = path + "/k" * 60
    with pytest.raises(StateTypeError, match="100 deep"):
        tree.apply([{"op": "replace", "path": deeper, "value": value}], 3, guard=True)
    with pytest.raises(StateTypeError, match="100 deep"):
        tree.apply([{"op": "copy", "from": path, "path": deeper}], 3, guard=True)


def test_equal_values_and_tests_make_no_revision() -> None:
    tree = StateTree(studio(), 1)
    ops = [
        {"op": "test", "path": "/vars/x", "value": 1},
        {"op": "replace", "path": "/vars/x", "value": 1},
        {"op": "add", "path": "/vars/d", "value": {"a": {"b": 1}}},
    ]
    assert tree.apply(ops, 2, guard=True) == []
    assert tree.rev == 1
    change = {"op": "replace", "path": "/vars/x", "value": 1.0}
    assert tree.apply([*ops, change], 2, guard=True) == [change]
    assert tree.rev == 2
    assert type(tree.get("/vars/x")) is float


@pytest.mark.parametrize("guard", [True, False])
def test_the_tree_shares_nothing_with_a_patch(guard: bool) -> None:
    tree = StateTree(studio(), 1)
    value = {"list": [1]}
    sent = {"op": "replace", "path": "/vars/x", "value": value}
    (done,) = tree.apply([sent], 2, guard=guard)
    tree.apply([{"op": "add", "path": "/vars/x/list/-", "value": 2}], 3, guard=guard)
    assert done["value"] == {"list": [1]}
    value["list"].append(9)
    assert tree.get("/vars/x") == {"list": [1, 2]}


# ---- the tree: revisions


def test_a_value_dates_from_its_own_last_change() -> None:
    tree = StateTree(studio(), 10)
    assert tree.value_rev("/vars/rows/0/n") == 10
    tree.apply([{"op": "replace", "path": "/vars/rows/1/n", "value": 5}], 11, guard=True)
    tree.apply([{"op": "replace", "path": "/works/trainer/status/stage", "value": "failed"}], 12, guard=False)
    assert tree.value_rev("") == 12
    assert tree.value_rev("/vars") == 11
    assert tree.value_rev("/vars/rows") == 11
    assert tree.value_rev("/vars/rows/1") == 11
    assert tree.value_rev("/vars/rows/1/n") == 11
    assert tree.value_rev("/vars/rows/0") == 10
    assert tree.value_rev("/vars/x") == 10
    assert tree.value_rev("/works") == 12
    assert tree.value_rev("/works/trainer/vars") == 10
    assert tree.value_rev("/app") == 10
    with pytest.raises(StatePathError):
        tree.value_rev("/vars/nope")


def test_appending_leaves_the_others_alone_and_inserting_moves_them() -> None:
    tree = StateTree(studio(), 1)
    tree.apply([{"op": "add", "path": "/vars/rows/-", "value": {"n": 3}}], 2, guard=True)
    assert [tree.value_rev(f"/vars/rows/{i}") for i in range(3)] == [1, 1, 2]
    tree.apply([{"op": "remove", "path": "/vars/rows/2"}], 3, guard=True)
    assert [tree.value_rev(f"/vars/rows/{i}") for i in range(2)] == [1, 1]
    assert tree.value_rev("/vars/rows") == 3
    tree.apply([{"op": "remove", "path": "/vars/rows/0"}], 4, guard=True)
    assert tree.value_rev("/vars/rows/0") == 4
    tree.apply([{"op": "replace", "path": "/vars/d", "value": {"a": 1}}], 5, guard=True)
    assert tree.value_rev("/vars/d/a") == 5
    assert tree.value_rev("/vars/x") == 1


def test_a_snapshot_remembers_the_dates_and_does_not_move() -> None:
    tree = StateTree(studio(), 1)
    tree.apply([{"op": "replace", "path": "/vars/rows/1/n", "value": 5}], 2, guard=True)
    tree.apply([{"op": "replace", "path": "/vars/x", "value": [0]}], 3, guard=True)
    rev, state, revs = tree.snapshot()
    tree.apply([{"op": "add", "path": "/vars/x/-", "value": 1}], 4, guard=True)
    again = StateTree(msgspec.json.decode(bytes(state)), rev, revs=msgspec.json.decode(bytes(revs)))
    assert again.get("/vars/x") == [0]
    for pointer, expected in (("", 3), ("/vars/rows/1/n", 2), ("/vars/rows/0", 1), ("/vars/x/0", 3), ("/app/name", 1)):
        assert again.value_rev(pointer) == expected


# ---- the tree: sizes

tree_ops = st.lists(
    st.one_of(
        st.builds(lambda v: {"op": "replace", "path": "/vars/x", "value": v}, values),
        st.builds(lambda v: {"op": "add", "path": "/vars/rows/-", "value": v}, values),
        st.builds(lambda v, i: {"op": "add", "path": f"/vars/rows/{i}", "value": v}, values, st.integers(0, 3)),
        st.builds(lambda i: {"op": "remove", "path": f"/vars/rows/{i}"}, st.integers(0, 3)),
        st.builds(lambda k, v: {"op": "add", "path": f"/vars/d/{k}", "value": v}, st.sampled_from("abé"), values),
        st.builds(lambda k: {"op": "remove", "path": f"/vars/d/{k}"}, st.sampled_from("abé")),
        st.builds(lambda k: {"op": "move", "from": "/vars/d/a", "path": f"/vars/d/{k}"}, st.sampled_from("abé")),
        st.builds(lambda i: {"op": "copy", "from": "/vars/rows/0", "path": f"/vars/rows/{i}"}, st.integers(0, 3)),
        st.just({"op": "replace", "path": "/flows/ui", "value": {"vars": {"start": "long " * 9}}}),
        st.builds(lambda v: {"op": "replace", "path": "/flows/ui/vars/start", "value": v}, values),
        st.just({"op": "add", "path": "/flows/ui/vars/start", "value": [1]}),
        st.just({"op": "add", "path": "/flows/ui/vars/start/-", "value": "é"}),
        st.just({"op": "remove", "path": "/flows/ui"}),
    ),
    max_size=8,
)


@given(st.lists(tree_ops, max_size=4))
def test_sizes_are_exact_whatever_happens(patches: list[list[Any]]) -> None:
    tree = StateTree(studio(), 1)
    model = studio()
    for rev, ops in enumerate(patches, 2):
        before = copy.deepcopy(tree.root)
        try:
            apply_ops(model, ops)
        except StateError as error:
            with pytest.raises(type(error)):
                tree.apply(ops, rev, guard=False)
            assert same(tree.root, before)
        else:
            done = tree.apply(ops, rev, guard=False)
            apply_ops(before, done)
            assert same(before, tree.root)
        assert same(tree.root, model)
        assert tree.size == json_size(tree.root)
        node = tree._find(("vars", "rows"))
        if node is not None and node.size is not None:
            assert node.size == json_size(tree.get("/vars/rows"))
        start = tree._find(("flows", "ui", "vars", "start"))
        if start is not None and start.size is not None:
            assert start.size == json_size(tree.get("/flows/ui/vars/start"))


def test_limits_name_path_and_size() -> None:
    tree = StateTree(studio(), 1, max_value=1000, max_tree=2000)
    with pytest.raises(StateTooLarge, match=r"/vars/x would take 2.0 KiB: one attribute may take 1000 bytes"):
        tree.apply([{"op": "replace", "path": "/vars/x", "value": "y" * 2000}], 2, guard=True)
    fill = [{"op": "add", "path": "/vars/rows/-", "value": "z" * 90} for _ in range(9)]
    tree.apply(fill, 2, guard=True)
    with pytest.raises(StateTooLarge, match="/vars/rows would take"):
        tree.apply(fill, 3, guard=True)
    with pytest.raises(StateTooLarge, match="/vars/rows would take"):
        tree.apply([{"op": "copy", "from": "/vars/rows", "path": "/vars/rows/0"}], 3, guard=True)
    with pytest.raises(StateTooLarge, match="the whole tree may take"):
        tree.apply([{"op": "replace", "path": "/vars/x", "value": "y" * 900}], 3, guard=True)
    with pytest.raises(StateTooLarge, match="/works/big/vars/blob would take"):
        tree.apply([{"op": "add", "path": "/works/big", "value": {"vars": {"blob": "y" * 1200}}}], 3, guard=False)
    assert tree.rev == 2
    assert tree.size == json_size(tree.root)


def test_doubling_copies_stop_before_the_memory_does() -> None:
    tree = StateTree(studio(), 1)
    doubling = [{"op": "copy", "from": "/vars/rows", "path": "/vars/rows/0"} for _ in range(60)]
    with pytest.raises((StateTooLarge, StateTypeError)):
        tree.apply(doubling, 2, guard=True)
    flat = [{"op": "copy", "from": "/vars/d/a", "path": f"/vars/d/a/k{i}"} for i in range(90)]
    with pytest.raises((StateTooLarge, StateTypeError)):
        tree.apply(flat, 2, guard=True)
    assert same(tree.root, studio())


def test_too_much_state_can_still_shrink_and_the_engine_can_still_write() -> None:
    root = studio()
    root["vars"]["rows"] = ["z" * 100] * 20
    tree = StateTree(root, 1, max_value=1000, max_tree=1500)
    with pytest.raises(StateTooLarge):
        tree.check_limits()
    tree.apply([{"op": "remove", "path": "/vars/rows/0"}], 2, guard=True)
    tree.apply([{"op": "replace", "path": "/works/trainer/status/stage", "value": "succeeded"}], 3, guard=False)
    with pytest.raises(StateTooLarge):
        tree.apply([{"op": "add", "path": "/vars/rows/-", "value": 1}], 4, guard=True)


def test_a_change_costs_the_same_in_a_large_state() -> None:
    def cost(count: int) -> float:
        tree = StateTree({"vars": {"d": {f"key{i}": i for i in range(count)}}}, 1)
        best = []
        for rev in range(2, 402):
            start = time.perf_counter()
            tree.apply([{"op": "replace", "path": "/vars/d/key5", "value": -rev}], rev, guard=True)
            best.append(time.perf_counter() - start)
        return sorted(best)[len(best) // 4]

    assert cost(100_000) < 5 * cost(10)  # a hundred-thousandfold would be 10,000 times
