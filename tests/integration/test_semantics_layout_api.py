"""What `configure_layout` and `configure_api` promise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from fastapi import HTTPException

from orch import Delete, Flow, Get, List, Post, Put, ScriptWork, ServiceWork, StaticFrontend, StreamlitFrontend
from orch.errors import OrchError, UsageError
from orch.events import ApiRequest
from orch.program import Program
from orch.testing import AppTester


def render(state: Any) -> None: ...


class Tabbed(Flow):
    """Shows what `_layout` gives."""

    def __init__(self, layout: Callable[[Any], Any] | None = None) -> None:
        super().__init__()
        self._layout = layout or (lambda flow: None)
        self.count = 0
        self.service = ServiceWork("serve")
        self.script = ScriptWork("true", parallel=True)

    def configure_layout(self) -> Any:
        return self._layout(self)


class Root(Tabbed):
    def __init__(self) -> None:
        super().__init__()
        self.child = Tabbed()
        self._body: Callable[[Any], None] = lambda flow: None

    def run(self) -> None:
        self._body(self)


def shown(layout: Callable[[Any], Any], child: Callable[[Any], Any] | None = None) -> AppTester:
    flow = Root()
    flow._layout = layout
    if child is not None:
        flow.child._layout = child
    tester = AppTester(flow)
    tester.settle()
    return tester


def test_a_list_of_tabs() -> None:
    tester = shown(
        lambda flow: [
            {"name": "Work", "content": flow.script},
            {"name": "Page", "content": StreamlitFrontend(render)},
            {"name": "Docs", "content": "https://example.org/x"},
        ]
    )
    assert tester.layout == [
        {"name": "Work", "component": "script", "kind": "work"},
        {"name": "Page", "component": "root", "kind": "frontend"},
        {"name": "Docs", "component": None, "url": "https://example.org/x", "kind": "url"},
    ]
    assert tester.program.frontends == {"root": {"streamlit": f"{__name__}:render", "scope": ""}}


def test_one_dict_is_one_tab() -> None:
    tester = shown(lambda flow: {"name": "Only", "content": flow.script})
    assert tester.layout == [{"name": "Only", "component": "script", "kind": "work"}]


def test_one_frontend_is_one_tab() -> None:
    tester = shown(lambda flow: StaticFrontend("docs"))
    assert [tab["kind"] for tab in tester.layout] == ["frontend"]
    assert tester.program.frontends == {"root": {"static": "docs", "scope": ""}}


def test_a_flow_that_returns_tabs_nests_and_its_frontend_is_scoped_to_it() -> None:
    tester = shown(
        lambda flow: [{"name": "Sub", "content": flow.child}],
        lambda flow: [
            {"name": "A", "content": StreamlitFrontend(render)},
            {"name": "B", "content": flow.service},
        ],
    )
    (tab,) = tester.layout
    assert (tab["name"], tab["kind"]) == ("Sub", "tabs")
    assert [(inner["name"], inner["component"]) for inner in tab["tabs"]] == [("A", "child"), ("B", "child.service")]
    assert tester.program.frontends["child"]["scope"] == "child"


def test_a_flow_that_returns_one_frontend_is_that_tab() -> None:
    tester = shown(lambda flow: [{"name": "Sub", "content": flow.child}], lambda flow: StreamlitFrontend(render))
    assert tester.layout == [{"name": "Sub", "component": "child", "kind": "frontend"}]


def test_two_frontends_of_one_flow_are_two_pages() -> None:
    tester = shown(
        lambda flow: [
            {"name": "A", "content": StreamlitFrontend("a.py:main")},
            {"name": "B", "content": StreamlitFrontend("b.py")},
            {"name": "A again", "content": StreamlitFrontend("a.py:main")},
        ]
    )
    assert [tab["component"] for tab in tester.layout] == ["root", "root@2", "root"]
    assert set(tester.program.frontends) == {"root", "root@2"}


def test_the_default_is_the_children_that_have_a_ui() -> None:
    flow = Root()
    flow._body = lambda flow: flow.script.run()
    tester = AppTester(flow, works={"script": {"run_for": None, "ready_after": 5.0}})
    tester.settle()
    assert [tab["component"] for tab in tester.layout] == ["service", "child.service"]
    tester.advance(6)  # a script that answers on its port is a server
    assert [tab["component"] for tab in tester.layout] == ["service", "script", "child.service"]


def test_it_is_evaluated_after_each_pass_also_one_that_blocks() -> None:
    flow = Root()
    flow._layout = lambda flow: [{"name": f"n={flow.count}", "content": flow.script}]
    tester = AppTester(flow)
    tester.settle()
    assert tester.layout[0]["name"] == "n=0"
    tester.set("count", 1)
    tester.settle()
    assert tester.layout[0]["name"] == "n=1"

    def body(flow: Any) -> None:
        flow.count = 5
        flow.script._options["parallel"] = False
        flow.script.run()

    tester.flow._body = body
    tester.fake("script").run_for = None
    tester.set("count", 2)
    tester.settle()
    assert tester.layout[0]["name"] == "n=5"


def test_the_server_is_told_only_when_the_layout_changed() -> None:
    told: list[Any] = []
    tester = shown(lambda flow: [{"name": str(flow.count // 2), "content": flow.script}])
    handle = tester._do
    tester._do = lambda i: (told.append(i) if type(i).__name__ == "Layout" else None, handle(i))[1]  # type: ignore[method-assign]
    for number in range(1, 5):
        tester.set("count", number)
        tester.settle()
    assert len(told) == 2


def test_a_url_that_is_empty_yet_is_a_tab_that_waits() -> None:
    tester = shown(lambda flow: [{"name": "Service", "content": flow.service.url or None}])
    assert tester.layout == [{"name": "Service", "component": None, "kind": "empty"}]


@pytest.mark.parametrize("layout", ["x", [1], [{"name": "A"}], [{"name": "A", "content": 5}]])
def test_what_is_no_layout_fails_the_app_naming_the_flow(layout: Any) -> None:
    tester = shown(lambda flow: layout)
    assert tester.exit_code == 1
    assert "root.configure_layout()" in tester.message


@pytest.mark.parametrize("layout", [lambda flow: flow.child, lambda flow: {"name": "A", "content": flow}])
def test_a_flow_is_no_layout_and_no_tab_of_its_own(layout: Callable[[Any], Any]) -> None:
    tester = shown(layout)
    assert tester.exit_code == 1
    assert "UsageError: root.configure_layout()" in tester.message


@pytest.mark.parametrize("ask", [lambda flow: flow.again.run(), lambda flow: flow.stop("x")])
def test_a_layout_cannot_block_or_stop(ask: Callable[[Any], Any]) -> None:
    flow = Root()
    flow.again = ScriptWork("again")
    flow._layout = ask
    tester = AppTester(flow)
    tester.settle()
    assert tester.exit_code == 1
    assert "UsageError: configure_layout()" in tester.message
    assert tester.calls("again") == []


def test_a_layout_that_raises_commits_nothing() -> None:
    flow = Root()
    flow._body = lambda flow: setattr(flow, "count", 5)
    flow._layout = lambda flow: 1 / 0
    tester = AppTester(flow)
    tester.settle()
    assert tester.exit_code == 1
    assert "ZeroDivisionError" in tester.message
    assert tester.state["vars"]["count"] == 0


# ---- API -------------------------------------------------------------------------------------------------------------


class Api(Flow):
    def __init__(self, routes: str = "") -> None:
        super().__init__()
        self._body: Callable[[Any], None] = lambda flow: None
        self.count = 0
        self.log: list[Any] = []
        self.slow = ScriptWork("slow")
        self.again = ScriptWork("again", cache_calls=False)
        self._routes = routes

    def run(self) -> None:
        self._body(self)

    def configure_api(self) -> list[Any]:
        return [kind(route, self.answer) for kind, route in ROUTES[self._routes]] if self._routes else []

    def answer(self) -> int:
        return int(self.count)


ROUTES: dict[str, list[Any]] = {
    "two": [(Get, "/a"), (Post, "a"), (Put, "/b"), (Delete, "/b/{x}")],
    "one": [(Get, "/c")],
    "same": [(Post, "/a")],
    "other": [(Delete, "/b/{other}")],
}


class Parent(Api):
    def __init__(self, own: str, childs: str) -> None:
        super().__init__(own)
        self.child = Api(childs)


def test_every_flows_routes() -> None:
    routes = Program(Parent("two", "one")).api_routes()
    assert [(flow.name, route.method, route.route) for flow, route in routes] == [
        ("root", "GET", "/a"),
        ("root", "POST", "/a"),
        ("root", "PUT", "/b"),
        ("root", "DELETE", "/b/{x}"),
        ("root.child", "GET", "/c"),
    ]


def test_a_duplicate_is_an_error_that_names_both() -> None:
    with pytest.raises(UsageError, match=r"POST /a .*root.* and by root\.child"):
        Program(Parent("two", "same")).api_routes()


def test_a_route_is_a_duplicate_whatever_its_parameters_are_called() -> None:
    with pytest.raises(UsageError, match=r"DELETE /b/\{other\} .*root.* and by root\.child"):
        Program(Parent("two", "other")).api_routes()


@pytest.mark.parametrize("what", ["one", ["/a"], {"a": 1}, len])
def test_what_is_no_list_of_routes_is_refused_naming_the_flow(what: Any) -> None:
    flow = Parent("two", "one")
    object.__setattr__(flow.child, "configure_api", lambda: what)
    with pytest.raises(UsageError, match=r"root\.child\.configure_api\(\)"):
        Program(flow).api_routes()


def test_an_error_in_configure_api_is_named() -> None:
    flow = Parent("two", "one")
    object.__setattr__(flow.child, "configure_api", lambda: flow.nothing)
    with pytest.raises(UsageError, match=r"root\.child\.configure_api\(\): AttributeError: .*nothing"):
        Program(flow).api_routes()


class Growing(Api):
    def __init__(self) -> None:
        super().__init__("two")
        self.members = List()
        self.wanted: list[str] = []
        self.drop = False

    def run(self) -> None:
        while self.wanted:
            self.members.append(Api(self.wanted.pop()))
        if self.drop:
            self.drop = False
            self.members.pop(0)


def paths(tester: AppTester) -> list[tuple[str, str]]:
    return [(flow.name, route.route) for flow, route in tester.routes if flow is not tester.flow]


def test_routes_of_flows_made_and_removed_in_passes_come_and_go_with_them() -> None:
    tester = AppTester(Growing())
    tester.settle()
    assert paths(tester) == []
    tester.set("wanted", ["one"])
    tester.settle()
    assert paths(tester) == [("root.members.0", "/c")]
    tester.restart_server()
    assert paths(tester) == [("root.members.0", "/c")]
    tester.set("drop", True)
    tester.settle()
    assert paths(tester) == []


def test_a_duplicate_made_in_a_pass_fails_it_made_in_a_method_fails_the_method() -> None:
    tester = AppTester(Growing())
    tester.settle()
    with pytest.raises(UsageError, match="POST /a"):
        tester.call_method(lambda: tester.flow.members.append(Api("same")))
    assert (tester.exit_code, len(tester.flow.members), paths(tester)) == (None, 0, [])
    tester.call_method(lambda: tester.flow.members.append(Api("one")))
    assert [route for _, route in paths(tester)] == ["/c"]
    tester.set("wanted", ["same"])
    tester.settle()
    assert tester.exit_code == 1
    assert "POST /a is declared by root and by root.members" in tester.message


def test_a_methods_changes_are_one_revision_answered_after_it() -> None:
    tester = AppTester(Api())
    tester.settle()

    def method() -> str:
        flow = tester.flow
        flow.count += 1
        flow.log.append("x")
        flow.slow.run("a")
        return "answer"

    before = len(tester.revisions)
    assert tester.call_method(method) == "answer"
    made = tester.revisions[before]
    assert made.cause == "api"
    assert {"/vars/count", "/vars/log/-", "/works/slow/calls/1-slow-1"} <= {op["path"] for op in made.ops}
    assert tester.state["vars"] == {"count": 1, "log": ["x"]}


def test_it_is_answered_between_passes() -> None:
    order: list[str] = []
    box: list[AppTester] = []

    def body(flow: Any) -> None:
        if flow.count == 1:
            box[0]._event(ApiRequest(ticket=77, method=lambda: order.append("method")))
            order.append("pass goes on")
            flow.count = 2

    box.append(AppTester(Api()))
    box[0].settle()
    box[0].flow._body = body
    box[0].set("count", 1)
    box[0].settle()
    assert order == ["pass goes on", "method"]


def test_every_call_in_it_is_parallel() -> None:
    tester = AppTester(Api())
    tester.settle()
    behind: list[str] = []

    def method() -> None:
        call = tester.flow.slow.run("a")
        behind.append(str(call.stage))

    tester.call_method(method)
    assert behind == ["pending"]
    tester.advance(5)
    assert tester.flow.slow.has_succeeded


def test_its_changes_start_a_pass() -> None:
    tester = AppTester(Api())
    tester.settle()
    before = tester.passes
    tester.call_method(lambda: None)
    tester.settle()
    assert tester.passes == before
    tester.call_method(lambda: setattr(tester.flow, "count", 5))
    tester.settle()
    assert tester.passes == before + 1


def test_http_exception_passes_through_and_nothing_is_kept() -> None:
    tester = AppTester(Api())
    tester.settle()

    def method() -> None:
        flow = tester.flow
        flow.count = 5
        flow.log.append("x")
        flow.slow.run("a")
        raise HTTPException(418, "teapot")

    before = tester.rev
    with pytest.raises(HTTPException) as info:
        tester.call_method(method)
    assert info.value.status_code == 418
    assert tester.rev == before
    assert (tester.flow.count, tester.flow.log) == (0, [])
    assert tester.calls("slow") == []
    assert tester.exit_code is None
    tester.call_method(lambda: setattr(tester.flow, "count", tester.flow.count + 1))
    assert tester.state["vars"]["count"] == 1


def test_a_schedule_asked_in_a_method_that_raises_is_not_used_up() -> None:
    tester = AppTester(Api())
    seen: list[bool] = []
    tester.call_method(lambda: tester.flow.schedule("@every 10s"))

    def method() -> None:
        seen.append(tester.flow.schedule("@every 10s"))
        raise ValueError

    tester.advance(11)
    with pytest.raises(ValueError):
        tester.call_method(method)
    assert tester.call_method(lambda: tester.flow.schedule("@every 10s")) is True
    assert tester.call_method(lambda: tester.flow.schedule("@every 10s")) is False
    assert seen == [True]


def test_a_value_that_is_no_state_is_refused_without_failing_the_app() -> None:
    tester = AppTester(Api())
    tester.settle()
    with pytest.raises(AttributeError, match="count"):
        tester.call_method(lambda: setattr(tester.flow, "count", object()))
    with pytest.raises(OrchError, match=r"2\.0 MiB"):
        tester.call_method(lambda: setattr(tester.flow, "log", ["x" * 2_100_000]))
    assert tester.flow.log == []
    assert tester.exit_code is None


def test_a_method_may_stop_the_app() -> None:
    tester = AppTester(Api())
    tester.settle()
    tester.call_method(lambda: tester.flow.stop("enough"))
    assert tester.exit_code == 0
    assert tester.message == "enough"


@pytest.mark.parametrize(("route", "endpoint"), [("", len), (5, len), ("/x", 5)])
def test_what_is_no_route_is_refused(route: Any, endpoint: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="Get"):
        Get(route, endpoint)
