"""What a Flow promises: state, children, passes. One test a sentence of the documentation, on the real engine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter, OrderedDict, defaultdict, namedtuple
from collections.abc import Callable
from enum import IntEnum, StrEnum
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orch import App, BuildConfig, CloudCompute, Dict, Drive, Flow, List, ScriptWork, ServiceWork, Work
from orch.errors import StateTooLarge, StateTypeError
from orch.events import Patch
from orch.testing import AppTester
from orch.wire import Ended, VarOps


class Base(Flow):
    """Behaviour is given as functions, so that a test reads in one place. (They are private: no state.)"""

    def __init__(self) -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.declare()

    def declare(self) -> None:
        """State and children of a test."""

    def run(self) -> None:
        self._body(self)


def started(flow: Base, body: Callable[[Any], None] | None = None, **works: dict[str, Any]) -> AppTester:
    """The app, after its first passes."""
    if body is not None:
        flow._body = body
    tester = AppTester(flow, works=works)
    tester.settle()
    return tester


def in_pass(tester: AppTester, body: Callable[[Any], Any]) -> Any:
    """Run `body(flow)` as a transaction of its own, as an API method would."""
    return tester.call_method(lambda: body(tester.flow))


# ---- state -----------------------------------------------------------------------------------------------------------


class Color(StrEnum):
    RED = "red"


class Level(IntEnum):
    HIGH = 3


class Celsius(float):
    pass


Point = namedtuple("Point", "x y")


class Variables(Base):
    def declare(self) -> None:
        self.nothing = None
        self.flag = True
        self.number = 1
        self.fraction = 0.5
        self.text = "a"
        self.rows = [1, [2, {"a": None}]]
        self.table = {"a": {"b": 1}}
        self._hidden = object()


def test_public_attributes_set_in_init_are_state() -> None:
    assert started(Variables()).state["vars"] == {
        "nothing": None,
        "flag": True,
        "number": 1,
        "fraction": 0.5,
        "text": "a",
        "rows": [1, [2, {"a": None}]],
        "table": {"a": {"b": 1}},
    }


class DeclaredByHelpers(Base):
    def declare(that) -> None:
        that._more()
        outside_helper(that)

    def _more(this) -> None:
        this.one = 1


def outside_helper(flow: Any) -> None:
    flow.two = 2


def test_state_may_be_declared_by_helpers_that_init_calls() -> None:
    assert started(DeclaredByHelpers()).state["vars"] == {"one": 1, "two": 2}


class Converted(Base):
    def declare(self) -> None:
        self.color = Color.RED
        self.level = Level.HIGH
        self.heat = Celsius(20.5)
        self.pair = (1, (2,))
        self.point = Point(1, 2)
        self.ordered = OrderedDict(b=1, a=2)
        self.default = defaultdict(list, a=[1])


def test_subclasses_are_stored_as_the_plain_value() -> None:
    tester = started(Converted())
    values = tester.state["vars"]
    assert values == {
        "color": "red",
        "level": 3,
        "heat": 20.5,
        "pair": [1, [2]],
        "point": [1, 2],
        "ordered": {"b": 1, "a": 2},
        "default": {"a": [1]},
    }
    assert [type(values[name]) for name in ("color", "level", "heat")] == [str, int, float]
    assert type(tester.flow.color) is str
    with pytest.raises(KeyError):
        tester.flow.default["missing"]


class Counting(Base):
    def declare(self) -> None:
        self.seen = Counter("aab")


def test_a_counter_stays_one() -> None:
    tester = started(Counting(), lambda flow: flow.seen.update("b") if flow.seen["b"] < 3 else None)
    assert isinstance(tester.flow.seen, Counter)
    assert tester.state["vars"]["seen"] == {"a": 2, "b": 3}
    tester.set("seen", {"z": 1})
    tester.settle()
    assert isinstance(tester.flow.seen, Counter)
    assert tester.flow.seen["missing"] == 0
    tester.restart_server()
    tester.settle()
    assert isinstance(tester.flow.seen, Counter)
    assert tester.flow.seen == {"z": 1, "b": 3}


class Refused(Flow):
    def __init__(self, value: Any = None) -> None:
        super().__init__()
        self.kept = 1
        self._error: StateTypeError | None = None
        try:
            self.odd = REFUSED[value] if value is not None else object()
        except StateTypeError as error:
            self._error = error


REFUSED: dict[str, Any] = {
    "object": object(),
    "set": {1},
    "nan": float("nan"),
    "infinity": float("inf"),
    "bytes": b"x",
    "int keys": {1: 2},
    "nested": {"a": [1, {2}]},
    "work beside a number": [ScriptWork("true"), 1],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_anything_else_is_a_state_type_error_naming_attribute_and_type_and_nothing_is_stored(kind: str) -> None:
    flow = Refused(kind)
    assert isinstance(flow._error, AttributeError)
    assert "Refused.odd" in str(flow._error)
    named = {"set": "set", "bytes": "bytes", "int keys": "int", "nested": "set", "object": "object"}
    assert named.get(kind, "") in str(flow._error)
    assert AppTester(flow).state["vars"] == {"kept": 1}
    with pytest.raises(AttributeError):
        _ = flow.odd


def test_a_wrong_value_assigned_later_is_refused_and_the_old_one_stays() -> None:
    def body(flow: Any) -> None:
        with pytest.raises(StateTypeError, match=r"table\.b\[0\].*set"):
            flow.table = {"b": [{1}]}
        with pytest.raises(StateTypeError, match=r"rows.*object"):
            flow.rows.append(object())

    tester = started(Variables(), body)
    assert tester.exit_code is None
    assert tester.state["vars"]["table"] == {"a": {"b": 1}}
    assert tester.flow.rows == [1, [2, {"a": None}]]


def test_bool_int_and_float_are_different_values() -> None:
    tester = started(Variables())
    before = tester.rev
    assert tester.set("number", True) == before + 1
    assert tester.state["vars"]["number"] is True
    assert tester.set("number", 1.0) == before + 2
    assert type(tester.state["vars"]["number"]) is float
    assert tester.set("number", 1) == before + 3
    assert type(tester.state["vars"]["number"]) is int


def test_a_new_public_attribute_after_init_is_an_attribute_error() -> None:
    flow = Variables()
    with pytest.raises(AttributeError, match=r"new.*declare it in __init__"):
        flow.new = 1
    flow._new = 1  # private ones are free

    def body(flow: Any) -> None:
        with pytest.raises(AttributeError, match="declare it in __init__"):
            flow.new = 1

    assert started(flow, body).exit_code is None
    assert "new" not in flow._vars


class WithProperty(Base):
    limit: int = 7
    """A class attribute of the same name as a variable."""
    helper: ScriptWork | None = None
    """A class attribute of the same name as a child."""

    def declare(self) -> None:
        self.celsius = 0.0
        self.limit = self.limit + 1
        self.helper = ScriptWork("true")

    @property
    def fahrenheit(self) -> float:
        return float(self.celsius * 9 / 5 + 32)

    @fahrenheit.setter
    def fahrenheit(self, value: float) -> None:
        self.celsius = (value - 32) * 5 / 9


def test_flows_and_works_may_be_abstract() -> None:
    class Step(Flow, ABC):
        @abstractmethod
        def step(self) -> int: ...

    class One(Step):
        def __init__(self) -> None:
            super().__init__()
            self.n = self.step()

        def step(self) -> int:
            return 1

    with pytest.raises(TypeError, match="abstract"):
        Step()  # type: ignore[abstract]
    assert AppTester(One()).state["vars"] == {"n": 1}


def test_properties_with_setters_work() -> None:
    tester = started(WithProperty())
    in_pass(tester, lambda flow: setattr(flow, "fahrenheit", 212))
    assert tester.state["vars"]["celsius"] == 100.0
    assert tester.flow.fahrenheit == 212.0


def test_a_variable_hides_a_class_attribute_of_its_name() -> None:
    tester = started(WithProperty())
    assert tester.state["vars"]["limit"] == 8
    in_pass(tester, lambda flow: setattr(flow, "limit", flow.limit + 1))
    assert tester.flow.limit == tester.state["vars"]["limit"] == 9
    assert tester.flow.helper.name == "root.helper"
    assert (WithProperty.limit, WithProperty.helper) == (7, None)


FLOW_NAMES = [
    "name",
    "run",
    "stop",
    "fail",
    "schedule",
    "flows",
    "works",
    "named_works",
    "configure_layout",
    "configure_api",
]
WORK_NAMES = [
    "name",
    "run",
    "stop",
    "restart",
    "status",
    "url",
    "port",
    "host",
    "progress",
    "metrics",
    "files",
    "is_ready",
]


class Named(Flow):
    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 1)


class NamedWork(Work):
    def __init__(self, name: str) -> None:
        super().__init__()
        setattr(self, name, 1)


@pytest.mark.parametrize(
    ("kind", "name"), [*((Named, name) for name in FLOW_NAMES), *((NamedWork, name) for name in WORK_NAMES)]
)
def test_orchs_own_public_names_are_reserved(kind: Any, name: str) -> None:
    with pytest.raises(StateTypeError, match=f"{name}.*belongs to orch"):
        kind(name)


class Rows(Base):
    def declare(self) -> None:
        self.rows = [[1], [2]]
        self.d = {"a": {"b": 0}}
        self.old: list[Any] = []


def test_in_place_mutation_at_any_depth_is_seen() -> None:
    tester = started(Rows())

    def change(flow: Any) -> None:
        flow.rows.append([3])
        flow.rows[0].append("x")
        flow.d["a"]["b"] = 1

    in_pass(tester, change)
    assert tester.state["vars"]["rows"] == [[1, "x"], [2], [3]]
    assert tester.state["vars"]["d"] == {"a": {"b": 1}}


def test_the_cost_of_a_mutation_does_not_depend_on_the_size_of_the_state() -> None:
    flow = Rows()
    flow.rows = [[0] * 100 for _ in range(1_000)]
    tester = started(flow)
    in_pass(tester, lambda flow: flow.rows[500].append(1))
    assert tester.revisions[-1].ops == [{"op": "add", "path": "/vars/rows/500/-", "value": 1}]


def test_state_has_no_aliases() -> None:
    tester = started(Rows())
    mine = [1]

    def change(flow: Any) -> None:
        flow.rows = [mine, mine]
        mine.append("outside")
        flow.rows[0].append("inside")

    in_pass(tester, change)
    assert tester.state["vars"]["rows"] == [[1, "inside"], [1]]
    assert mine == [1, "outside"]


def test_popped_and_replaced_containers_are_ordinary_values() -> None:
    tester = started(Rows())

    def change(flow: Any) -> None:
        popped = flow.rows.pop(0)
        replaced = flow.d["a"]
        flow.d["a"] = {"new": 1}
        popped.append("nowhere")
        replaced["b"] = "nowhere"

    in_pass(tester, change)
    assert tester.state["vars"] == {"rows": [[2]], "d": {"a": {"new": 1}}, "old": []}


def test_a_container_keeps_its_identity_when_others_move_around_it() -> None:
    tester = started(Rows())

    def change(flow: Any) -> None:
        second = flow.rows[1]
        flow.rows.insert(0, [0])
        assert flow.rows[2] is second
        second.append("mine")

    in_pass(tester, change)
    assert tester.state["vars"]["rows"] == [[0], [1], [2, "mine"]]
    held = tester.flow.rows[2]
    tester.patch([{"op": "remove", "path": "/vars/rows/0"}])
    tester.settle()
    assert tester.flow.rows[1] is held


class Holding(Base):
    def declare(self) -> None:
        self.drive = Drive("models")
        self.compute = CloudCompute("gpu", gpus=1)


def test_drive_and_cloud_compute_serialize_themselves() -> None:
    tester = started(Holding())
    assert tester.state["vars"]["compute"]["$compute"]["gpus"] == 1
    assert "$drive" in tester.state["vars"]["drive"]
    tester.restart_server()
    assert isinstance(tester.flow.compute, CloudCompute)
    assert isinstance(tester.flow.drive, Drive)


# ---- children --------------------------------------------------------------------------------------------------------


class Leaf(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.x = 0
        self.work = ScriptWork("true", parallel=True, vars={"n": 0})


class Holder(Work):
    """Tries to hold a component."""

    def __init__(self, inner: str) -> None:
        super().__init__()
        self.inner = Leaf() if inner == "flow" else ScriptWork("true")


class Tree(Base):
    def declare(self) -> None:
        self.ui = Leaf()
        self.top = ScriptWork("true", parallel=True)
        self.models = [ScriptWork("true", parallel=True), Leaf()]
        self.by_name = {"first-one": Leaf(), "second_2": ScriptWork("true", parallel=True)}
        self.empty = List()


@pytest.mark.parametrize("inner", ["flow", "work"])
def test_works_are_leaves(inner: str) -> None:
    with pytest.raises(StateTypeError, match=r"Holder\.inner.*leaf"):
        Holder(inner)


def test_names() -> None:
    flow = Tree()
    assert flow.name == "root"
    assert flow.ui.name == "root.ui"
    assert flow.models[0].name == "root.models.0"
    assert flow.by_name["first-one"].work.name == "root.by_name.first-one.work"


def test_a_list_or_dict_of_components_becomes_list_or_dict() -> None:
    tester = started(Tree())
    assert isinstance(tester.flow.models, List)
    assert isinstance(tester.flow.by_name, Dict)
    models = tester.state["structures"]["models"]
    assert models["order"] == ["0", "1"]
    assert list(models["works"]) == ["0"]
    assert list(models["flows"]) == ["1"]


def test_flows_works_and_named_works_find_everything_at_every_depth() -> None:
    flow = Tree()
    assert list(flow.flows) == ["root.ui", "root.models.1", "root.by_name.first-one"]
    names = [
        "root.ui.work",
        "root.top",
        "root.models.0",
        "root.models.1.work",
        "root.by_name.first-one.work",
        "root.by_name.second_2",
    ]
    assert [work.name for work in flow.works()] == names
    assert flow.named_works() == list(zip(names, flow.works(), strict=True))


def test_app_get_finds_one() -> None:
    app = App(Tree())
    assert app.get("root") is app.root
    assert app.get("root.by_name.first-one.work").name == "root.by_name.first-one.work"
    assert app.get("root.models.1") is app.root.models[1]  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["ui", "rooted.ui", "", "ui.root"])
def test_app_get_with_a_wrong_prefix_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match="root"):
        App(Tree()).get(name)


@pytest.mark.parametrize(
    ("name", "parent", "child"),
    [("root.nope", "root", "nope"), ("root.ui.nope", "root.ui", "nope"), ("root.models.7", "root", "models.7")],
)
def test_app_get_of_an_unknown_child_names_parent_and_child(name: str, parent: str, child: str) -> None:
    with pytest.raises(AttributeError, match=f"{parent} .*'{child}'"):
        App(Tree()).get(name)


def test_a_child_attribute_once_set_cannot_be_replaced() -> None:
    def body(flow: Any) -> None:
        for name in ("ui", "models", "top"):
            for value in (1, None, Leaf(), [Leaf()]):
                with pytest.raises(StateTypeError, match=f"{name}.*cannot be replaced"):
                    setattr(flow, name, value)
        flow.ui = flow.ui  # the same is no replacement
        with pytest.raises(StateTypeError, match="cannot be replaced"):
            flow.by_name["first-one"] = Leaf()

    tester = started(Tree(), body)
    assert tester.exit_code is None


@pytest.mark.parametrize("key", ["", "a b", "a/b", "a.b", "ä", "x" * 65, 1])
def test_dict_keys_outside_the_pattern_are_refused(key: Any) -> None:
    with pytest.raises(StateTypeError, match="key"):
        Dict({key: ScriptWork("true")})


def test_dict_keys_inside_the_pattern_are_taken() -> None:
    assert list(Dict({"A-z_09": ScriptWork("true"), "x" * 64: ScriptWork("true")})) == ["A-z_09", "x" * 64]


def test_one_component_cannot_be_in_two_places() -> None:
    flow = Tree()
    for place in (lambda: setattr(flow, "again", flow.top), lambda: flow.empty.append(flow.top)):
        with pytest.raises(StateTypeError, match=r"already belongs to root"):
            place()
    with pytest.raises(StateTypeError, match=r"already belongs to root"):
        flow.again = {"top": flow.top}
    with pytest.raises(StateTypeError, match=r"belongs to root\.empty"):
        flow.other = flow.empty
    assert flow.top.name == "root.top"


def test_a_child_attribute_must_fit_into_a_name() -> None:
    with pytest.raises(StateTypeError, match="cannot name a child"):
        setattr(Tree(), "a/b", Leaf())


class Growing(Base):
    """Makes children in run()."""

    def declare(self) -> None:
        self.late = None
        self.wanted = 1
        self.models = List()
        self.named = Dict()


class Made(Work):
    def __init__(
        self, tags: list[str], drive: Drive, compute: CloudCompute, build: BuildConfig, kind: Any, helper: Any
    ) -> None:
        super().__init__(cloud_compute=compute, cloud_build_config=build, parallel=True)
        self.tags = tags
        self.drive = drive
        self._kind_of = kind
        self._helper = helper


class Commands(BuildConfig):
    def build_commands(self) -> list[str]:
        return ["make"]


def make(flow: Any) -> None:
    if flow.late is None:
        build = Commands(["numpy"], python="3.12")
        flow.late = Made(["a"], Drive("m"), CloudCompute("gpu"), build, Leaf, outside_helper)
        flow.extra = Leaf()
        flow.more = [Leaf()]
        flow.models.append(Leaf())
        flow.named["k"] = ScriptWork(["echo", "hi"], parallel=True)


def test_a_none_attribute_may_later_hold_a_work() -> None:
    tester = started(Growing(), make)
    assert "late" not in tester.state["vars"]
    assert tester.state["works"]["late"]["vars"]["tags"] == ["a"]
    assert tester.flow.late.name == "root.late"


def test_a_variable_that_is_not_none_cannot_become_a_child() -> None:
    tester = started(Growing())
    with pytest.raises(StateTypeError, match=r"wanted.*state variable"):
        in_pass(tester, lambda flow: setattr(flow, "wanted", Leaf()))


def test_components_made_in_run_are_made_again_after_a_restart_before_the_first_pass() -> None:
    tester = started(Growing(), make)
    tester.set("/structures/models/flows/0/vars/x", 5)
    tester.set("extra.x", 6)
    tester.restart_server()
    flow = tester.flow
    assert isinstance(flow.late, Made)
    assert flow.late.tags == ["a"]
    assert flow.late.drive.id == Drive("m").id
    assert flow.late.cloud_compute == CloudCompute("gpu")
    assert type(flow.late.cloud_build_config) is Commands
    assert flow.late._kind_of is Leaf
    assert flow.late._helper is outside_helper
    assert (flow.models[0].x, flow.extra.x, flow.more[0].x) == (5, 6, 0)
    assert flow.named["k"].name == "root.named.k"
    tester.settle()
    flow._body = lambda flow: flow.late.run()
    tester.set("wanted", 2)
    tester.until(lambda: tester.flow.late.has_succeeded)


class Picky(Work):
    def __init__(self, value: Any = None, *, cls: Any = None) -> None:
        super().__init__()
        self._value = value


def test_constructor_arguments_may_have_any_name() -> None:
    assert Picky(cls=Leaf)._record.kwargs == {"cls": {"$import": f"{Leaf.__module__}:Leaf"}}


@pytest.mark.parametrize("value", [object(), {1}, lambda: 1, float("nan"), [object()], {"a": b""}])
def test_other_constructor_arguments_are_a_state_type_error(value: Any) -> None:
    with pytest.raises(StateTypeError, match=r"Picky\(\) argument 0"):
        Picky(value)


def test_functions_that_cannot_be_imported_are_refused_as_constructor_arguments() -> None:
    def local() -> None: ...

    for value in (local, Tree().declare):
        with pytest.raises(StateTypeError, match="cannot be imported by name"):
            Picky(value)


def test_a_class_that_a_resume_could_not_import_cannot_be_made_in_run() -> None:
    class Local(Flow):
        pass

    tester = started(Growing(), lambda flow: flow.models.append(Local()))
    assert tester.exit_code == 1
    assert "Local" in tester.message
    assert "imported" in tester.message


def grow(flow: Any) -> None:
    while len(flow.models) < flow.wanted:
        flow.models.append(ScriptWork("train", parallel=True, vars={"n": 0}))
    for model in flow.models:
        model.run()


def test_a_list_elements_number_is_counted_up_and_never_reused_and_the_tree_keeps_the_order() -> None:
    tester = started(Growing())

    def change(flow: Any) -> None:
        for _ in range(3):
            flow.models.append(Leaf())
        flow.models.pop(1)
        flow.models.insert(0, Leaf())
        flow.models.append(Leaf())

    in_pass(tester, change)
    assert [model.name.rsplit(".", 1)[1] for model in tester.flow.models] == ["3", "0", "2", "4"]
    assert tester.state["structures"]["models"]["order"] == ["3", "0", "2", "4"]
    tester.restart_server()
    assert [model.name.rsplit(".", 1)[1] for model in tester.flow.models] == ["3", "0", "2", "4"]


def test_numbers_are_not_reused_after_a_restart_either() -> None:
    tester = started(Growing())
    in_pass(tester, lambda flow: flow.models.extend([Leaf(), Leaf()]))
    in_pass(tester, lambda flow: flow.models.clear())
    tester.restart_server()
    assert list(tester.flow.models) == []
    in_pass(tester, lambda flow: flow.models.append(Leaf()))
    assert tester.flow.models[0].name == "root.models.2"
    assert tester.state["structures"]["models"]["order"] == ["2"]


def test_declared_elements_that_were_removed_stay_removed_after_a_restart() -> None:
    tester = started(Tree())

    def remove(flow: Any) -> None:
        flow.models.pop(0)
        del flow.by_name["first-one"]

    in_pass(tester, remove)
    for _ in range(2):
        tester.restart_server()
        assert [model.name for model in tester.flow.models] == ["root.models.1"]
        assert list(tester.flow.by_name) == ["second_2"]
        assert "first-one" not in tester.state["structures"]["by_name"]["flows"]


def test_removing_an_element_cancels_its_wishes_of_that_pass() -> None:
    def body(flow: Any) -> None:
        if flow.wanted:
            grow(flow)
            flow.models.pop()
            flow.wanted = 0

    tester = started(Growing(), body)
    assert tester.exit_code is None
    assert tester.fakes == {}
    assert tester.state["structures"]["models"] == {"order": [], "flows": {}, "works": {}}


def test_removing_an_element_stops_its_work_and_drops_late_diffs_with_a_log_line() -> None:
    tester = started(Growing(), grow)
    tester.until(lambda: tester.fake("models.0").current is not None)
    tester.flow._body = lambda flow: None
    in_pass(tester, lambda flow: flow.models.pop())
    assert tester.fake("models.0").current is None
    assert "0" not in tester.state["structures"]["models"]["works"]
    before = tester.state["vars"], tester.passes
    tester.work_sets("models.0", [{"op": "replace", "path": "/n", "value": 5}])
    tester.settle()
    assert (tester.state["vars"], tester.passes) == before
    assert any("models.0" in note for note in tester.notes)


def test_a_removed_work_cannot_be_asked_any_more() -> None:
    tester = started(Growing(), grow)
    gone = tester.flow.models[0]
    tester.flow._body = lambda flow: None
    in_pass(tester, lambda flow: flow.models.pop())
    assert gone.name == "root.models.0"
    with pytest.raises(Exception, match="not part of the app"):
        in_pass(tester, lambda flow: gone.run())


def test_a_new_work_of_a_removed_ones_name_counts_its_calls_on() -> None:
    def body(flow: Any) -> None:
        for work in flow.named.values():
            work.run("x")

    tester = started(Growing(), body, **{"named.k": {"run_for": 1.0}})
    put = lambda flow: flow.named.update({"k": ScriptWork("true", parallel=True)})  # noqa: E731
    in_pass(tester, put)
    tester.until(lambda: tester.flow.named["k"].has_succeeded)
    for restart in (False, True):
        in_pass(tester, lambda flow: flow.named.clear())
        if restart:
            tester.restart_server()
            tester.flow._body = body
        in_pass(tester, put)
        tester.until(lambda: tester.flow.named["k"].has_succeeded)
    starts = [start.call for start in tester.fake("named.k").starts]
    assert starts == ["1-named.k-1", "1-named.k-2", "1-named.k-3"]
    tester.restart_server()
    assert [call.id for call in tester.calls("named.k")] == ["1-named.k-3"]
    tester.flow._body = body
    tester.advance(5)
    assert len(tester.fake("named.k").starts) == 3


# ---- passes ----------------------------------------------------------------------------------------------------------


class Passing(Base):
    def declare(self) -> None:
        self.click = False
        self.count = 0
        self.other = 0
        self.log: list[Any] = []
        self.work = ScriptWork("true", parallel=True, vars={"n": 0})
        self.slow = ScriptWork("slow", raise_exception=False)


def test_run_is_called_once_at_start_and_then_only_when_something_changed() -> None:
    tester = started(Passing())
    assert tester.passes == 1
    tester.advance(1_000)
    assert tester.passes == 1
    tester.set("click", True)
    tester.settle()
    assert tester.passes == 2


def test_a_works_diff_a_calls_status_and_its_progress_start_a_pass() -> None:
    tester = started(Passing(), lambda flow: flow.work.run())
    tester.settle()
    seen = tester.passes
    for cause in (
        lambda: tester.work_sets("work", [{"op": "replace", "path": "/n", "value": 1}]),
        lambda: tester.report("work", progress=0.5),
        lambda: tester.advance(1.0),
    ):
        cause()
        tester.settle()
        assert tester.passes > seen
        seen = tester.passes
    assert tester.flow.work.has_succeeded


def test_assigning_an_equal_value_is_no_change() -> None:
    def body(flow: Any) -> None:
        flow.count = 0
        flow.log = []

    tester = started(Passing(), body)
    assert tester.passes == 1
    before = tester.rev
    assert tester.set("count", 0) == before
    tester.settle()
    assert (tester.rev, tester.passes) == (before, 1)


def test_a_value_that_is_the_same_at_the_end_of_the_pass_is_no_change() -> None:
    def body(flow: Any) -> None:
        flow.count = 1
        flow.count = 0

    tester = started(Passing(), body)
    assert tester.passes == 1


class Nested(Base):
    def declare(self) -> None:
        self.d: dict[str, Any] = {"a": 1, "b": {"c": [1, 2], "k": 0}, "0": 1}
        self.rows: list[Any] = [{"x": 1}, [2]]
        self.counts = Counter("aab")


def refill(flow: Any) -> None:
    flow.rows.clear()
    flow.rows.extend([{"x": 0}, [2]])
    flow.rows[0]["x"] = 1


def count_again(flow: Any) -> None:
    flow.counts.clear()
    flow.counts.update("baa")


def busy(flow: Any) -> None:
    flow.d["b"]["k"] = "busy"
    flow.d["a"] += 1
    flow.d["b"]["k"] = 0
    flow.d["a"] -= 1


def scratch(flow: Any) -> None:
    flow.d["tmp"] = {"x": 1}
    flow.d["tmp"]["y"] = 2
    flow.d["a"] = flow.d.pop("a")
    del flow.d["tmp"]


def rebuild(flow: Any) -> None:
    flow.d["b"]["c"] = []
    flow.d["b"]["new"] = 1
    flow.d["b"] = {}
    flow.d["b"]["k"] = 0
    flow.d["b"].setdefault("c", []).extend([1, 2])


@pytest.mark.parametrize("body", [refill, count_again, busy, scratch, rebuild])
def test_a_container_that_is_the_same_at_the_end_of_the_pass_is_no_change(body: Callable[[Any], None]) -> None:
    tester = started(Nested(), body)
    assert (tester.passes, tester.rev) == (1, 1)


KEYS = st.sampled_from(["a", "b", "0", "-", "c~/"])
SMALL = st.recursive(
    st.integers(0, 1), lambda inner: st.dictionaries(KEYS, inner, max_size=2) | st.lists(inner, max_size=2)
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(0, 3), KEYS, SMALL), max_size=12))
def test_what_a_pass_did_and_what_it_commits_are_the_same(steps: list[tuple[int, int, str, Any]]) -> None:
    def body(flow: Any) -> None:
        for verb, depth, key, value in steps:
            place = flow.d
            for _ in range(depth):
                inner = [
                    v for v in (place.values() if isinstance(place, dict) else place) if isinstance(v, dict | list)
                ]
                place = inner[-1] if inner else place
            if isinstance(place, list):
                if verb % 2:
                    place.append(value)
                else:
                    place.insert(0, value)
                if verb > 4:
                    place.pop(0)
            elif verb < 4:
                place[key] = value
            elif verb < 6:
                place.pop(key, None)
            elif verb == 6:
                place.clear()
            else:
                flow.d = {"a": value}

    tester = started(Nested())
    in_pass(tester, body)
    assert tester.state["vars"] == tester.flow._vars.snapshot()


def test_its_own_state_starts_another_pass_if_the_last_one_reached_its_end() -> None:
    tester = started(Passing(), lambda flow: setattr(flow, "count", min(flow.count + 1, 5)))
    assert tester.state["vars"]["count"] == 5
    assert tester.passes == 6


def test_a_pass_that_blocks_does_not_use_its_own_state_as_a_wake_up() -> None:
    def body(flow: Any) -> None:
        flow.count += 1
        flow.slow.run()

    tester = started(Passing(), body, slow={"run_for": None})
    assert tester.flow.slow.is_running
    seen = tester.passes
    tester.advance(100)
    assert tester.passes == seen
    assert tester.state["vars"]["count"] == seen


def test_after_100_passes_caused_by_nothing_else_a_warning_names_the_attributes_then_10_a_second() -> None:
    tester = started(Passing(), lambda flow: setattr(flow, "count", flow.count + 1))
    warned = [note for note in tester.notes if "/vars/count" in note]
    assert len(warned) == 1
    assert 100 <= tester.passes <= 102
    before = tester.passes
    tester.advance(3.0)
    assert 29 <= tester.passes - before <= 31
    tester.set("other", 1)  # anything else that happens is seen at once
    before = tester.passes
    tester.settle()
    assert tester.passes > before


def test_a_burst_of_diffs_is_applied_before_one_pass() -> None:
    tester = started(Passing(), lambda flow: flow.work.run(), work={"run_for": None})
    before = tester.passes
    tester._unacked = [
        (tester._seq + i, VarOps(work="work", ops=[{"op": "replace", "path": "/n", "value": i}])) for i in range(1, 6)
    ]
    tester._seq += 5
    tester._push()
    tester._settle()
    tester.settle()
    assert tester.flow.work.n == 5
    assert tester.passes == before + 1


def test_a_calls_end_closes_its_burst() -> None:
    seen: list[tuple[bool, int]] = []

    def body(flow: Any) -> None:
        flow.work.run()
        seen.append((flow.work.has_succeeded, flow.work.n))

    tester = started(Passing(), body, work={"run_for": None})
    current = tester.fake("work").current
    assert current is not None
    items = [
        VarOps(work="work", ops=[{"op": "replace", "path": "/n", "value": 1}]),
        Ended(work="work", call=current.call, attempt=1, at=tester.now),
        VarOps(work="work", ops=[{"op": "replace", "path": "/n", "value": 2}]),
    ]
    tester.fake("work").current = None
    tester._report(*items)
    tester.settle()
    assert seen[-2:] == [(True, 1), (True, 2)]


def test_a_pass_is_one_revision_together_with_the_calls_it_asked_for() -> None:
    def body(flow: Any) -> None:
        if flow.click:
            flow.click = False
            flow.count += 1
            flow.log.append("x")
            flow.work.run("a")

    tester = started(Passing(), body)
    tester.set("click", True)
    before = len(tester.revisions)
    tester.step()
    made = tester.revisions[before]
    paths = {op["path"] for op in made.ops}
    assert {"/vars/click", "/vars/count", "/vars/log/-", "/works/work/calls/1-work-1"} <= paths
    assert made.cause == "flow"


def test_a_pass_sees_one_state_and_diffs_that_arrive_meanwhile_come_after_it() -> None:
    seen: list[Any] = []
    box: dict[str, AppTester] = {}

    def body(flow: Any) -> None:
        if flow.click and flow.count == 0:
            flow.count = 1
            # A click on the variable that this pass is about to write, while it runs:
            box["tester"]._event(Patch(ops=[{"op": "replace", "path": "/vars/click", "value": True}], cause="ui"))
            assert box["tester"].rev == rev[0]
            seen.append(flow.click)
            flow.click = False
        elif flow.click:
            flow.count += 1
            flow.click = False

    tester = box["tester"] = started(Passing(), body)
    rev = [tester.set("click", True)]
    tester.settle()
    assert seen == [True]
    assert tester.state["vars"]["count"] == 2, "the second click was lost"


def test_a_click_on_the_same_value_under_a_pass_is_not_lost() -> None:
    """The value is True when the click arrives, and the pass resets it."""
    box: list[AppTester] = []
    answers: list[int] = []

    def body(flow: Any) -> None:
        if flow.click:
            if not flow.count:
                click = Patch(ticket=999, ops=[{"op": "replace", "path": "/vars/click", "value": True}], cause="ui")
                box[0]._event(click)
                answers.append(len(box[0]._answers))  # its answer waits
            flow.click = False
            flow.count += 1

    box.append(started(Passing(), body))
    box[0].set("click", True)
    box[0].settle()
    assert answers == [0]
    assert box[0].state["vars"]["count"] == 2


def test_a_pass_that_raises_commits_nothing_and_fails_the_app_with_the_traceback() -> None:
    def body(flow: Any) -> None:
        flow.count = 5
        flow.work.run()
        flow.log[3]

    tester = started(Passing(), body)
    assert tester.exit_code == 1
    assert tester.stage == "failed"
    assert "IndexError" in tester.message
    assert "Traceback" in tester.message
    assert "flow.log[3]" in tester.message
    assert tester.state["vars"]["count"] == 0
    assert tester.calls("work") == []


@pytest.mark.parametrize(("method", "code"), [("stop", 0), ("fail", 1)])
def test_stop_and_fail_end_the_pass_at_that_line_changes_kept_calls_dropped(method: str, code: int) -> None:
    reached: list[str] = []

    def body(flow: Any) -> None:
        flow.count = 5
        flow.work.run()
        try:
            getattr(flow, method)("enough")
        except Exception:
            reached.append("except")
        finally:
            reached.append("finally")
        reached.append("behind")

    tester = started(Passing(), body)
    assert tester.exit_code == code
    assert "enough" in tester.message
    assert tester.stage == ("stopped" if code == 0 else "failed")
    assert tester.state["app"]["stage"] == tester.stage
    assert reached == ["finally"]
    assert tester.state["vars"]["count"] == 5
    assert tester.calls("work") == []
    assert tester.passes == 1


@pytest.mark.parametrize(("method", "code"), [("stop", 0), ("fail", 1)])
def test_what_runs_behind_stop_and_fail_does_not_take_them_back(method: str, code: int) -> None:
    def blocks(flow: Any) -> None:
        try:
            getattr(flow, method)("enough")
        finally:
            flow.log.append("finally")
            flow.slow.run()

    def swallows(flow: Any) -> None:
        try:
            getattr(flow, method)(ValueError("enough"))
        except BaseException:
            flow.log.append("except")
        flow.slow.run()

    for body, said in ((blocks, "finally"), (swallows, "except")):
        tester = started(Passing(), body)
        assert (tester.exit_code, tester.message, tester.passes) == (code, "enough", 1)
        assert tester.state["vars"]["log"] == [said]
        assert tester.calls("slow") == []


def test_a_blocking_call_that_is_swallowed_has_not_reached_the_end() -> None:
    def body(flow: Any) -> None:
        try:
            flow.slow.run()
        except BaseException:
            flow.count += 1

    tester = started(Passing(), body, slow={"run_for": 5.0})
    tester.until(lambda: tester.flow.slow.is_running)
    tester.settle()
    assert tester.state["vars"]["count"] == tester.passes < 5
    tester.until(lambda: tester.flow.slow.has_succeeded)


def test_children_orchestrate_when_their_parent_calls_them() -> None:
    class Child(Base):
        def declare(self) -> None:
            self.runs = 0

        def run(self) -> None:
            self.runs = 1

    class Parent(Base):
        def declare(self) -> None:
            self.called = Child()
            self.uncalled = Child()

    tester = started(Parent(), lambda flow: flow.called.run())
    assert tester.state["flows"]["called"]["vars"]["runs"] == 1
    assert tester.state["flows"]["uncalled"]["vars"]["runs"] == 0


def test_state_can_only_be_asked_for_calls_in_a_pass() -> None:
    tester = started(Passing())
    with pytest.raises(Exception, match="outside a pass"):
        tester.flow.work.run()
    with pytest.raises(Exception, match="pass"):
        tester.flow.stop()


def test_over_a_second_on_average_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1_000, 2))
    monkeypatch.setattr("orch.program.perf_counter", lambda: float(next(clock)))
    tester = started(Passing(), lambda flow: setattr(flow, "count", min(8, flow.count + 1)))
    assert len([note for note in tester.notes if "2.0 s on average" in note]) == 1


@pytest.mark.parametrize("where", ["pass", "ui"])
def test_size_limits_name_path_and_size(where: str) -> None:
    big = "x" * (2 * 1024 * 1024)
    tester = started(Passing(), lambda flow: setattr(flow, "log", [big]) if where == "pass" else None)
    if where == "ui":
        with pytest.raises(StateTooLarge, match=r"/vars/log would take 2\.0 MiB"):
            tester.set("log", [big])
        assert tester.exit_code is None
    else:
        assert tester.exit_code == 1
        assert "/vars/log would take 2.0 MiB" in tester.message
    assert tester.state["vars"]["log"] == []


class Stuffed(Flow):
    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        self.inner = {str(i): Stuffing(size) for i, size in enumerate(sizes)}


class Stuffing(Flow):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.rows = ["x" * size]


def test_size_limits_hold_for_what_init_declares_too() -> None:
    with pytest.raises(StateTooLarge, match=r"/structures/inner/flows/1/vars/rows would take 2\.0 MiB"):
        AppTester(Stuffed([5, 2 * 1024 * 1024]))
    with pytest.raises(StateTooLarge, match=r"33\.\d MiB: the whole tree may take 32\.0 MiB"):
        AppTester(Stuffed([2_050_000] * 17))


def test_a_flow_declared_without_run_is_fine() -> None:
    class Quiet(Flow):
        pass

    tester = AppTester(Quiet())
    tester.settle()
    assert (tester.passes, tester.stage) == (1, "running")


class RootWork(Work):
    def __init__(self) -> None:
        super().__init__()
        self.n = 1

    def run(self) -> None: ...


def test_a_root_work_stops_the_app_once_it_has_succeeded() -> None:
    tester = AppTester(RootWork(), works={"root": {"run_for": 5.0}})
    tester.until(lambda: tester.exit_code is not None)
    assert tester.exit_code == 0
    assert tester.stage == "stopped"
    assert tester.state["works"]["root"]["vars"] == {"n": 1}
    assert tester.calls("root")[0].succeeded


def test_a_root_work_that_fails_fails_the_app() -> None:
    tester = AppTester(RootWork(), works={"root": {"exit_code": 3}})
    tester.until(lambda: tester.exit_code is not None)
    assert tester.exit_code == 1


class RootService(ServiceWork):
    def __init__(self, restart: str, raise_exception: bool) -> None:
        super().__init__("serve", restart=restart, raise_exception=raise_exception)


class LenientRoot(Work):
    def __init__(self, retries: int = 0, parallel: bool = False) -> None:
        super().__init__(raise_exception=False, retries=retries, retry_delay=3.0, parallel=parallel)

    def run(self) -> None: ...


@pytest.mark.parametrize("parallel", [False, True])
def test_a_root_work_that_has_failed_for_good_fails_the_app_whatever_raise_exception_says(parallel: bool) -> None:
    tester = AppTester(LenientRoot(2, parallel), works={"root": {"exit_code": 3}})
    tester.until(lambda: tester.exit_code is not None)
    assert (tester.exit_code, tester.stage) == (1, "failed")
    assert tester.message == "LenientRoot failed: exit code 3"
    assert tester.calls("root")[0].attempt == 3
    tester.resume()
    tester.fake("root").exit_code = 0
    tester.until(lambda: tester.exit_code is not None)
    assert (tester.exit_code, tester.stage) == (0, "stopped")


def test_a_root_service_that_is_not_restarted_any_more_ends_the_app() -> None:
    tester = AppTester(RootService("never", False), works={"root": {"run_for": 5.0, "exit_code": 1}})
    tester.until(lambda: tester.exit_code is not None)
    assert (tester.exit_code, tester.stage) == (1, "failed")


def test_a_root_work_that_is_stopped_waits_for_its_restart() -> None:
    tester = AppTester(LenientRoot(), works={"root": {"run_for": 50.0}})
    tester.until(lambda: tester.flow.is_running)
    tester.stop_work("root")
    tester.settle()
    assert (tester.exit_code, tester.stage) == (None, "running")
    tester.restart_work("root")
    tester.until(lambda: tester.exit_code is not None)
    assert tester.exit_code == 0


def test_a_service_is_a_work_too() -> None:
    assert issubclass(ServiceWork, ScriptWork)
    assert issubclass(ScriptWork, Work)
