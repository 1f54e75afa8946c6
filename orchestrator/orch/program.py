"""The user's Flow objects, run in passes. Whoever holds the Program (one thread at a time) may run one.

A pass is a transaction: `Pass` collects what `run()` changed and asked for; `PassResult` carries it to the engine,
which commits it. Between passes the engine's diffs are applied here first, so that a pass sees one state.
"""

from __future__ import annotations

import functools
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any, NoReturn

import msgspec

from orch.api import Route
from orch.calls import BookView, Call, Reason, Stage, call_id, call_key, json_arguments, number_of, work_of
from orch.component import Component, build, importable, short_name
from orch.errors import CallError, OrchError, StateTypeError, UsageError
from orch.flow import Flow
from orch.frontends import Frontend, StaticFrontend, StreamlitFrontend
from orch.schedule import following, next_tick
from orch.state import apply_ops, format_pointer, parse_pointer, split_pointer
from orch.structures import Dict, List, Structure
from orch.wire import ComponentRecord, Op
from orch.work import Work, WorkSpec, WorkView
from orch_drive.drive import FLOW_INDEX

__all__ = ["Pass", "PassInput", "PassOver", "PassResult", "Program", "Schedule", "WorkAsk", "with_calls"]

PARAMETER = re.compile(r"\{\w+")


class Schedule(msgspec.Struct, frozen=True, kw_only=True):
    cron: str
    tz: str
    catch_up: bool
    due: float
    """Seconds since the epoch; a pass at or after it that asks gets True."""
    ticked: bool = False
    """`due` was reached while the server lived: this tick waits for a pass that asks, it is not one that was missed."""


class PassInput(msgspec.Struct, kw_only=True):
    """What changed since the last pass."""

    run: int
    now: float
    ops: list[Op] = msgspec.field(default_factory=list)
    views: dict[str, WorkView] = msgspec.field(default_factory=dict)
    """By short name: every work whose picture changed."""
    schedules: dict[str, Schedule] = msgspec.field(default_factory=dict)


class WorkAsk(msgspec.Struct, kw_only=True):
    """What a pass wants of one Work."""

    work: str
    new: dict[str, Call] = msgspec.field(default_factory=dict)
    """Calls to add, by key, in the order asked."""
    replace: bool = False
    """The new call replaces whatever runs or waits."""
    stop: bool = False
    restart: bool = False
    seen: list[str] = msgspec.field(default_factory=list)
    """Ids of finished calls that were handed to the flow."""


class PassResult(msgspec.Struct, kw_only=True):
    how: str
    """"end", "blocked", "stop", "fail", or "error"."""
    message: str = ""
    traceback: str = ""
    ops: list[Op] = msgspec.field(default_factory=list)
    asks: list[WorkAsk] = msgspec.field(default_factory=list)
    created: list[WorkSpec] = msgspec.field(default_factory=list)
    removed: list[str] = msgspec.field(default_factory=list)
    records: dict[str, Any] = msgspec.field(default_factory=dict)
    """Component name -> how to build it again, None when it was removed."""
    schedules: dict[str, Schedule] = msgspec.field(default_factory=dict)
    layout: list[dict[str, Any]] | None = None
    frontends: dict[str, dict[str, Any]] = msgspec.field(default_factory=dict)
    routes: list[Any] | None = None
    """What `Program.api_routes` gives now; None: no component came or went."""
    seconds: float = 0.0
    value: Any = None
    """Result of an API method."""
    error: BaseException | None = None


class PassOver(BaseException):
    """Ends a pass from inside. A BaseException: `except Exception` does not catch it, `finally` runs."""

    def __init__(self, how: str, message: str = "") -> None:
        super().__init__(how, message)
        self.how = how
        self.message = message


class Pass:
    """One pass while it runs."""

    def __init__(self, given: PassInput, schedules: Mapping[str, Schedule], *, parallel: bool = False) -> None:
        self.run = given.run
        self.now = given.now
        self.ops: list[Op] = []
        self.asks: dict[str, WorkAsk] = {}
        self.created: dict[str, Work] = {}
        self.removed: list[str] = []
        self.records: dict[str, Any] = {}
        self.parallel = parallel
        self.known = schedules
        self.schedules: dict[str, Schedule] = {}
        self._asked: dict[str, tuple[str, str]] = {}
        self._numbers: dict[str, int] = {}
        self.left: PassOver | None = None
        """How the pass was ended from inside: also when a `finally` or a bare `except` got in the way."""

    def leave(self, how: str, message: str = "") -> NoReturn:
        over = PassOver(how, message)
        if self.left is None or (self.left.how == "blocked" and how != "blocked"):
            self.left = over
        raise over

    def _for(self, work: Work) -> WorkAsk:
        name = short_name(work.name)
        return self.asks.setdefault(name, WorkAsk(work=name))

    def replacing(self, work: Work) -> bool:
        ask = self.asks.get(short_name(work.name))
        return ask is not None and ask.replace

    # -- asking
    def ask(self, work: Work, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """`work.run(*args, **kwargs)`: record the wish, or return what became of it. Blocks by ending the pass."""
        plain_args, plain_kwargs = json_arguments(work.name, args, kwargs)
        call = self._find(work, plain_args, plain_kwargs)
        blocking = not (work._options["parallel"] or self.parallel)
        if blocking and not call.done and not self._up(work, call):
            self.leave("blocked", call.id)
        return call

    @staticmethod
    def _up(work: Work, call: Call) -> bool:
        """A service that answers does not hold the pass any longer."""
        last = work._view.book.last
        service = work._declaration()["kind"] == "service"
        return service and work._view.ready and last is not None and last.id == call.id

    def _find(self, work: Work, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        ask, book = self._for(work), work._view.book
        key = call_key(args, kwargs)
        service = work._declaration()["kind"] == "service"
        replaces = work._options["when_busy"] == "replace"
        if key in ask.new:
            return ask.new[key]
        found = book.newest if service else book.latest.get(key)
        if found is not None and found.key == key and not self._again(work, ask, found, service):
            if replaces:  # of several asked in one pass only the last counts, and this one is it
                ask.new, ask.replace = {}, False
            if found.fresh:
                ask.seen.append(found.id)
            return found
        call = self._new(work, key, args, kwargs)
        if replaces:
            ask.new, ask.replace = {key: call}, True
        else:
            ask.new[key] = call
        return call

    def _again(self, work: Work, ask: WorkAsk, found: Call, service: bool) -> bool:
        """Does asking for these arguments start a new call, although there is one?"""
        if not found.done or ask.stop:
            return False
        if found.stage is Stage.STOPPED:
            return work._view.book.held != found.key
        if service:
            return False
        if work._options["cache_calls"]:
            return False
        return not found.fresh

    def _new(self, work: Work, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        name = short_name(work.name)
        number = self._numbers.get(name, work._view.book.counter) + 1
        self._numbers[name] = number
        error = work._argument_error(args, kwargs)
        call = Call(id=call_id(self.run, name, number), work=name, key=key, args=args, kwargs=kwargs, asked_at=self.now)
        if error:
            call = call.move(
                Stage.FAILED, reason=Reason.EXCEPTION, message=f"{name}: {error}", finished_at=self.now, fresh=True
            )
        return call

    def stop_work(self, work: Work) -> None:
        ask = self._for(work)
        ask.new, ask.replace, ask.restart, ask.stop = {}, False, False, True

    def restart_work(self, work: Work) -> None:
        ask = self._for(work)
        if work._view.book.newest is None:
            raise CallError(f"{work.name}.restart(): it has never been asked for a call, there is nothing to restart")
        ask.new, ask.replace, ask.restart = {}, False, True

    # -- schedules
    def schedule(self, key: str, cron: str, tz: str, catch_up: bool) -> bool:
        """Is there a tick of `key` for this pass? Asking again in the same pass gives the same answer."""
        asked = self._asked.setdefault(key, (cron, tz))
        if asked != (cron, tz):
            raise ValueError(
                f"schedule {key!r} is asked for as {asked[0]!r} ({asked[1]}) and as {cron!r} ({tz}) in one pass: "
                f"tell them apart with key="
            )
        known = self.known.get(key)
        if known is None or (known.cron, known.tz) != (cron, tz):
            due = next_tick(cron, tz, self.now)
            self.schedules[key] = Schedule(cron=cron, tz=tz, catch_up=catch_up, due=due)
            return False
        if known.due > self.now:
            if known.catch_up != catch_up:
                self.schedules[key] = msgspec.structs.replace(known, catch_up=catch_up)
            return False
        due = next_tick(cron, tz, known.due) if catch_up else following(cron, tz, known.due, self.now)
        self.schedules[key] = Schedule(cron=cron, tz=tz, catch_up=catch_up, due=due)
        return True


class Program:
    """The tree of the user's objects."""

    def __init__(self, root: Flow | Work, *, log_tail: Callable[[str], list[str]] | None = None) -> None:
        if not isinstance(root, Flow | Work):
            raise UsageError(f"App({root!r}): a Flow or a Work is needed")
        self.root = root
        self.log_tail = log_tail or (lambda name: [])
        self.current: Pass | None = None
        self.on_stray: Callable[[], None] | None = None
        self.stray: list[Op] = []
        """Changes made outside a pass (by a test): the engine takes them as a diff."""
        self.schedules: dict[str, Schedule] = {}
        self.drive_index: Callable[[str], Any] | None = None
        """Drive id -> what the server knows of its files; None: Drives in the flow do their own I/O."""
        self.layout: list[dict[str, Any]] = []
        self.frontends: dict[str, dict[str, Any]] = {}
        self._recorded: set[str] = set()
        """Names of the records that the journal has."""
        self._retired: dict[str, int] = {}
        """Numbers that the calls of removed works have used, by short name: a new work of that name counts on."""
        self._undo: list[Callable[[], None]] = []
        """Takes back what the last transaction did besides changing variables."""
        root._program = self

    # -- the tree
    def node(self) -> dict[str, Any]:
        """The state tree, without statuses and without `app`."""
        if isinstance(self.root, Flow):
            return self.root._node()
        return {"vars": {}, "flows": {}, "works": {"root": self.root._node()}, "structures": {}}

    def components(self) -> list[Component]:
        return [self.root, *self.root._walk()]

    def works(self) -> list[Work]:
        return [component for component in self.components() if isinstance(component, Work)]

    def variables(self) -> Iterator[tuple[str, Any]]:
        """Every state variable, by its whole name (`root.ui.x`)."""
        for component in self.components():
            for name, value in component._vars.snapshot().items():
                yield f"{component.name}.{name}", value

    def specs(self) -> list[WorkSpec]:
        return [work._spec() for work in self.works()]

    def find(self, name: str) -> Component:
        """The component called `root.ui.trainer`."""
        return find_component(self.root, name)

    def _at(self, tokens: tuple[str, ...]) -> Component:
        """The component whose pointer has these tokens."""
        component: Any = self.root
        if isinstance(component, Work):
            return component
        i = 0
        while i < len(tokens):
            if tokens[i] == "structures":
                component = component._children[tokens[i + 1]]._items[tokens[i + 3]]
                i += 4
            else:
                component = component._children[tokens[i + 1]]
                i += 2
        return component  # type: ignore[no-any-return]

    # -- what components report
    def record(self, op: Op) -> None:
        if self.current is not None:
            self.current.ops.append(op)
            return
        self.stray.append(op)
        if self.on_stray is not None:
            self.on_stray()

    def _mine(self) -> Pass:
        if self.current is None:
            raise StateTypeError("components can be added and removed in a Flow's __init__ and run() only")
        return self.current

    def component_added(self, child: Component, container: Structure | None, position: int | None) -> None:
        here = self._mine()
        here.ops.append({"op": "add", "path": child._pointer, "value": child._node()})
        if container is not None:
            at = "-" if position is None or position >= len(container) - 1 else str(position)
            here.ops.append({"op": "add", "path": f"{container._pointer}/order/{at}", "value": child._attribute})
            self._note(here, container.name, container._record())
        self._undo.append(lambda: _take_out(child, container))
        self._created(here, child)

    def structure_added(self, structure: Structure) -> None:
        here = self._mine()
        here.ops.append({"op": "add", "path": structure._pointer, "value": structure._node()})
        self._note(here, structure.name, structure._record())
        self._undo.append(structure._detach)
        for member in structure._members():
            self._created(here, member)

    def _created(self, here: Pass, child: Component) -> None:
        used: dict[str, int] = {}
        for component in [child, *child._walk()]:
            if isinstance(component, Work):
                name = short_name(component.name)
                here.created[name] = component
                used[name] = self._retired.get(name, 0)
                component._view = WorkView(book=BookView(counter=used[name]))
        self._note_component(here, child, used)
        self._note_below(here, child, used)

    def _note_below(self, here: Pass, parent: Component, used: dict[str, int]) -> None:
        """What `parent` was given after it was made: building it again does not bring that back."""
        for name, child in parent._children.items():
            late = name in parent._late
            if isinstance(child, Component):
                members = [(child, late)]
            else:
                members = [
                    (member, late or child._declared.get(key) is not member) for key, member in child._items.items()
                ]
                record = child._record()
                if late or record["removed"] or any(is_late for _, is_late in members):
                    self._note(here, child.name, record)
            for member, is_late in members:
                if is_late:
                    self._note_component(here, member, used)
                self._note_below(here, member, used)

    def _note_component(self, here: Pass, child: Component, used: dict[str, int]) -> None:
        assert child._parent is not None
        if not importable(type(child)):
            raise StateTypeError(
                f"{child.name}: {type(child).__qualname__} cannot be imported by name: no resume could make it again",
                hint="define the class at the top level of app.py or of a module beside it",
            )
        record = {
            "kind": "component",
            "parent": child._parent.name,
            "attribute": child._attribute,
            "container": child._container._attribute if child._container is not None else None,
            "record": msgspec.to_builtins(child._record),
            "calls": {name: number for name, number in used.items() if number},
        }
        self._note(here, child.name, record)

    def _note(self, here: Pass, name: str, record: Any) -> None:
        here.records[name] = record
        self._recorded.add(name)

    def component_removed(self, child: Component, container: Structure, position: int) -> None:
        here = self._mine()
        here.ops.append({"op": "remove", "path": child._pointer})
        here.ops.append({"op": "replace", "path": f"{container._pointer}/order", "value": list(container._items)})
        below = [name for name in self._recorded if name == child.name or name.startswith(child.name + ".")]
        here.records.update(dict.fromkeys(below))
        self._note(here, container.name, container._record())
        for component in [child, *child._walk()]:
            if isinstance(component, Work):
                name = short_name(component.name)
                here.asks.pop(name, None)
                if here.created.pop(name, None) is None:
                    here.removed.append(name)
                if not isinstance(container, List):
                    self._retired[name] = component._view.book.counter
        self._undo.append(lambda: _put_back(child, container, position, below, self._recorded))
        self._recorded.difference_update(below)

    # -- restoring
    def restore(self, tree: dict[str, Any], records: Mapping[str, Any], calls: Iterable[str] = ()) -> list[str]:
        """Take kept state over: components made in passes are made again, state fills the attributes that still exist.

        Args:
            records: what passes recorded, by component name. calls: ids of all calls of the run.

        Returns one line for each difference between the kept state and what app.py declares now.
        """
        lines: list[str] = []
        self._recorded = set(records)
        for call in calls:
            work = work_of(call)
            self._retired[work] = max(self._retired.get(work, 0), number_of(call))
        self.root._program = None  # quiet: these are no changes of a pass
        try:
            for name in sorted(records, key=lambda n: (n.count("."), _natural(n))):
                self._rebuild(name, records[name], lines)
        finally:
            self.root._program = self
        for component in self.components():
            try:
                node = _follow(tree, component._pointer)
            except (KeyError, IndexError, TypeError):
                lines.append(f"{short_name(component.name)}: new, starts with its defaults")
                continue
            kept = node.get("vars", {})
            here = set(component._vars.names())
            name = short_name(component.name)
            lines += [f"{name}.{new}: new, starts with its default" for new in sorted(here - set(kept))]
            lines += [
                f"{name}.{old}: no longer declared, its kept value is dropped" for old in sorted(set(kept) - here)
            ]
            component._vars.load({**component._vars.snapshot(), **{k: v for k, v in kept.items() if k in here}})
        told = {line.partition(":")[0] for line in lines}
        there = {short_name(component.name) for component in self.components()}
        lines += [
            f"{name}: no longer declared, its kept state is dropped"
            for name in _names_in(tree)
            if name not in there and name not in told
        ]
        self._reorder(tree)
        return lines

    def _rebuild(self, name: str, record: Any, lines: list[str]) -> None:
        try:
            parent = self.find(record["parent"])
            if not isinstance(parent, Flow):
                raise AttributeError(f"{record['parent']} is no Flow")
            parent._declaring = True
            try:
                if record["kind"] == "component":
                    self._rebuild_component(parent, record)
                else:
                    self._rebuild_structure(parent, record)
            finally:
                parent._declaring = False
        except Exception as error:  # whatever a constructor of a changed app.py raises
            lines.append(f"{short_name(name)}: cannot be made again: {error}")

    def _rebuild_structure(self, parent: Flow, record: Any) -> None:
        name = record["attribute"]
        if name not in parent._children:
            setattr(parent, name, (List if record["kind"] == "List" else Dict)())
            parent._late.add(name)
        structure = parent._children[name]
        if not isinstance(structure, Structure):
            raise AttributeError(f"{structure.name} is a {type(structure).__name__} now")
        structure._next = max(structure._next, record["next"])
        for key in record["removed"]:
            if key in structure._items:
                structure._remove(key)

    def _rebuild_component(self, parent: Flow, record: Any) -> None:
        container = record.get("container")
        key = record["attribute"]
        if container is None:
            if key in parent._children:
                return
            child = build(msgspec.convert(record["record"], ComponentRecord))
            setattr(parent, key, child)
            parent._late.add(key)
        else:
            structure = parent._children[container]
            if not isinstance(structure, Structure):
                raise AttributeError(f"{structure.name} is a {type(structure).__name__} now")
            if key in structure._items:
                return
            child = build(msgspec.convert(record["record"], ComponentRecord))
            parent._adopt(child, key, structure)
            structure._place(key, child, None)
        for component in [child, *child._walk()]:
            if isinstance(component, Work):
                before = record.get("calls", {}).get(short_name(component.name), 0)
                component._view = WorkView(book=BookView(counter=before))

    def _reorder(self, tree: dict[str, Any]) -> None:
        for component in self.components():
            for child in component._children.values():
                if isinstance(child, Structure):
                    try:
                        order = _follow(tree, child._pointer)["order"]
                    except (KeyError, TypeError):
                        continue
                    known = {key: rank for rank, key in enumerate(order)}
                    child._items = dict(sorted(child._items.items(), key=lambda item: known.get(item[0], len(known))))

    def reload(self, tree: dict[str, Any]) -> None:
        """Undo what an abandoned transaction did: structures as before, variables as the tree has them."""
        while self._undo:
            self._undo.pop()()
        for component in self.components():
            try:
                node = _follow(tree, component._pointer)
            except (KeyError, TypeError):
                continue
            component._vars.load(node["vars"])

    # -- passes
    def receive(self, given: PassInput) -> None:
        """Apply what happened since the last pass."""
        i, ops = 0, given.ops
        while i < len(ops):
            where = split_pointer(parse_pointer(ops[i]["path"]))
            if where is None:
                i += 1
                continue
            tokens = where[0]
            prefix = format_pointer(tokens) + "/vars"
            batch: list[Op] = []
            while i < len(ops) and ops[i]["path"].startswith(prefix + "/"):
                op = {**ops[i], "path": ops[i]["path"][len(prefix) :]}
                if "from" in op:
                    op["from"] = op["from"][len(prefix) :]
                batch.append(op)
                i += 1
            try:
                component = self._at(tokens)
            except KeyError:  # removed by a pass that this diff was ordered before
                continue
            component._vars.apply(batch, in_place=True)
        if given.views:
            for work in self.works():
                view = given.views.get(short_name(work.name))
                if view is not None:
                    work._view = view
        self.schedules.update(given.schedules)

    def run_pass(self, given: PassInput) -> PassResult:
        """Call the root's run() once. Never raises what user code raised: the result says how the pass ended."""
        self.receive(given)
        return self._transaction(Pass(given, self.schedules), self._run_root)

    def run_method(self, given: PassInput, method: Callable[[], Any]) -> PassResult:
        """Answer an API request between passes: its changes are one revision, every call in it is parallel."""
        self.receive(given)
        return self._transaction(Pass(given, self.schedules, parallel=True), method)

    def _run_root(self) -> None:
        if isinstance(self.root, Flow):
            self.root.run()
            return
        assert self.current is not None
        call = self.current.ask(self.root, (), {})
        name = type(self.root).__name__
        if call.succeeded:
            self.current.leave("stop", f"{name} has succeeded")
        if call.failed:
            self.current.leave("fail", f"{name} failed: {call.message or call.reason}")

    def _transaction(self, here: Pass, body: Callable[[], Any]) -> PassResult:
        began = perf_counter()
        self._undo = []
        self.current = here
        index = FLOW_INDEX.set(self.drive_index)
        result = PassResult(how="end")
        try:
            with suppress(PassOver):
                result.value = body()
            if here.left is not None:
                result.how, result.message = here.left.how, here.left.message
            if result.how in ("end", "blocked"):
                try:
                    result.layout, result.frontends = self._layout()
                    if here.records:
                        result.routes = self.api_routes()
                except PassOver as over:
                    raise UsageError(
                        "configure_layout() and configure_api() say what there is: "
                        "they cannot wait for a call, stop or fail the app"
                    ) from over
        except (Exception, SystemExit, RecursionError) as error:
            return PassResult(
                how="error",
                message=_describe(error),
                traceback="".join(traceback.format_exception(_users(error))),
                error=error,
                seconds=perf_counter() - began,
            )
        finally:
            FLOW_INDEX.reset(index)
            self.current = None
        if result.how in ("stop", "fail"):
            here.asks = {}
        result.ops = _squashed(here.ops)
        result.asks = list(here.asks.values())
        result.created = [work._spec() for work in here.created.values()]
        result.removed = here.removed
        result.records = here.records
        result.schedules = here.schedules
        if here.schedules:
            self._undo.append(functools.partial(setattr, self, "schedules", self.schedules))
            self.schedules = {**self.schedules, **here.schedules}
        result.seconds = perf_counter() - began
        return result

    # -- layout and API
    def _layout(self) -> tuple[list[dict[str, Any]] | None, dict[str, dict[str, Any]]]:
        frontends: dict[str, dict[str, Any]] = {}
        tabs = self._tabs(self.root, frontends)
        if tabs == self.layout and frontends == self.frontends:
            return None, {}
        self._undo.append(functools.partial(self._show, self.layout, self.frontends))
        self._show(tabs, frontends)
        return tabs, frontends

    def _show(self, tabs: list[dict[str, Any]], frontends: dict[str, dict[str, Any]]) -> None:
        self.layout, self.frontends = tabs, frontends

    def _tabs(self, component: Component, frontends: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        if isinstance(component, Work):
            return [{"name": component.display_name, "component": short_name(component.name), "kind": "work"}]
        assert isinstance(component, Flow)
        layout = component.configure_layout()
        if layout is None:
            return self._default_tabs(component, frontends)
        if isinstance(layout, Frontend):
            layout = [{"name": component._attribute or "app", "content": layout}]
        elif isinstance(layout, dict):
            layout = [layout]
        elif isinstance(layout, str) or not isinstance(layout, Iterable):
            raise UsageError(
                f"{component.name}.configure_layout(): {layout!r} is no layout",
                hint='give a list of {"name": str, "content": ...}, one of them, or a Frontend',
            )
        tabs: list[dict[str, Any]] = []
        for entry in layout:
            if not isinstance(entry, dict) or "name" not in entry or "content" not in entry:
                raise UsageError(
                    f"{component.name}.configure_layout(): {entry!r} is no tab",
                    hint='give {"name": str, "content": Flow, Work, Frontend or URL}',
                )
            tab = self._tab(component, str(entry["name"]), entry["content"], frontends)
            if tab is not None:
                tabs.append(tab)
        return tabs

    def _tab(self, owner: Flow, name: str, content: Any, frontends: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
        if isinstance(content, str):
            return {"name": name, "component": None, "url": content, "kind": "url"}
        if isinstance(content, Work):
            return {"name": name, "component": short_name(content.name), "kind": "work"}
        if content is owner:
            raise UsageError(f"{owner.name}.configure_layout(): tab {name!r} shows the flow whose tabs these are")
        if isinstance(content, Flow):
            inner = self._tabs(content, frontends)
            if len(inner) == 1:
                return {**inner[0], "name": name}
            return {"name": name, "component": None, "kind": "tabs", "tabs": inner}
        if isinstance(content, Frontend):
            return {"name": name, "component": _frontend(owner, content, frontends), "kind": "frontend"}
        if content is None:
            return {"name": name, "component": None, "kind": "empty"}
        raise UsageError(
            f"{owner.name}.configure_layout(): tab {name!r} shows {content!r}",
            hint="a tab's content is a Flow, a Work, a Frontend or a URL",
        )

    def _default_tabs(self, flow: Flow, frontends: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The children that have a UI: flows that return a layout, services, and whatever listens on its port."""
        tabs: list[dict[str, Any]] = []
        for child in flow._children.values():
            for member in [child] if isinstance(child, Component) else list(child._members()):
                if isinstance(member, Flow):
                    inner = self._tabs(member, frontends)
                    if len(inner) == 1:
                        tabs.append({**inner[0], "name": member._attribute})
                    elif inner:
                        tabs.append({"name": member._attribute, "component": None, "kind": "tabs", "tabs": inner})
                elif isinstance(member, Work) and (member._declaration()["kind"] == "service" or member.is_ready):
                    tabs.append({"name": member.display_name, "component": short_name(member.name), "kind": "work"})
        return tabs

    def api_routes(self) -> list[tuple[Flow, Route]]:
        """(flow, route) of every flow's configure_api. Raises UsageError for a duplicate and for what is no route."""
        found: dict[tuple[str, str], str] = {}
        routes: list[tuple[Flow, Route]] = []
        if not isinstance(self.root, Flow):
            return []
        for flow in self.root._flows_first():
            try:
                declared = flow.configure_api() or []
            except Exception as error:
                raise UsageError(f"{flow.name}.configure_api(): {_describe(error)}") from error
            for route in declared if isinstance(declared, Iterable) else [declared]:
                if not isinstance(route, Route):
                    raise UsageError(
                        f"{flow.name}.configure_api(): {route!r} is no route",
                        hint="give a list of Get, Post, Put or Delete(route, method)",
                    )
                where = (route.method, PARAMETER.sub("{", route.route))  # whatever its parameters are called
                if where in found:
                    raise UsageError(f"{route.method} {route.route} is declared by {found[where]} and by {flow.name}")
                found[where] = flow.name
                routes.append((flow, route))
        return routes


def find_component(root: Component, name: str) -> Component:
    """The component called `root.ui.trainer`. ValueError for a wrong prefix, AttributeError for an unknown child."""
    parts = name.split(".")
    if parts[0] != "root":
        raise ValueError(f"{name!r} does not start with 'root'")
    component: Component = root
    rest = parts[1:]
    while rest:
        part = rest.pop(0)
        child: Any = component._children.get(part)
        if isinstance(child, Structure) and rest:
            key = rest.pop(0)
            part, child = f"{part}.{key}", child._items.get(key)
        if not isinstance(child, Component):
            raise AttributeError(f"{component.name} has no child {part!r}")
        component = child
    return component


def _take_out(child: Component, container: Structure | None) -> None:
    """Undo of an insertion."""
    assert child._parent is not None
    (child._parent._children if container is None else container._items).pop(child._attribute)
    child._parent = child._container = None


def _put_back(child: Component, container: Structure, position: int, below: list[str], recorded: set[str]) -> None:
    """Undo of a removal."""
    container._place(child._attribute, child, position)
    child._parent, child._container = container._owner, container
    recorded.update(below)


def _squashed(ops: list[Op]) -> list[Op]:
    """The same change in fewer operations: what is written twice is written once, and what is written into a value
    that this pass has written is part of it. So a value that ends as it began is no change, however it got there."""
    done: list[Op | None] = []
    written: dict[tuple[str, ...], int] = {}
    """Paths through dicts only (list indexes move), none below another -> which of `done` wrote there."""
    below: dict[tuple[str, ...], set[tuple[str, ...]]] = {}
    for op in ops:
        path = parse_pointer(op["path"])
        target = split_pointer(path)
        if target is None or "from" in op:  # components come or go: paths mean something else before and after
            written.clear()
            below.clear()
            done.append(op)
            continue
        top = len(path) - len(target.rest)
        holder = next((path[:n] for n in range(top, len(path)) if path[:n] in written), None)
        known = done[written[holder]] if holder is not None else None
        if holder is not None and known is not None:
            inside = {**op, "path": format_pointer(("value", *path[len(holder) :]))}
            apply_ops(known, [inside])
            continue
        if path in written:
            _rewrite(done, written, path, op)
            continue
        for moot in below.pop(path, ()):
            if moot in written:
                done[written.pop(moot)] = None
        done.append(op)
        if not any(token.isdigit() or token == "-" for token in target.rest):
            written[path] = len(done) - 1
            for n in range(top, len(path)):
                below.setdefault(path[:n], set()).add(path)
    return [op for op in done if op is not None]


def _rewrite(done: list[Op | None], written: dict[tuple[str, ...], int], path: tuple[str, ...], op: Op) -> None:
    """`op` at a path that was written before: one operation says both."""
    at = written[path]
    before = done[at]
    assert before is not None
    if before["op"] == "add" and op["op"] == "remove":
        done[at] = None
        del written[path]
    elif op["op"] == "remove":
        done[at] = op
    else:
        done[at] = {**op, "op": "add" if before["op"] == "add" else "replace"}


def _frontend(owner: Flow, content: Frontend, frontends: dict[str, dict[str, Any]]) -> str:
    base = short_name(owner.name)
    name, number = base, 1
    key = {**content.key(), "scope": "" if owner._parent is None else base}
    while name in frontends and frontends[name] != key:
        number += 1
        name = f"{base}@{number}"
    if isinstance(content, StreamlitFrontend | StaticFrontend):
        frontends[name] = key
    return name


def _describe(error: BaseException) -> str:
    where = ""
    frames = traceback.extract_tb(error.__traceback__)
    if frames:
        last = frames[-1]
        for frame in reversed(frames):
            if "/orch/" not in frame.filename:
                last = frame
                break
        where = f" ({last.filename.rsplit('/', 1)[-1]}:{last.lineno} in {last.name})"
    text = str(error)
    hint = f" - {error.hint}" if isinstance(error, OrchError) and error.hint else ""
    return f"{type(error).__name__}: {text}{where}{hint}"


def _users(error: BaseException) -> BaseException:
    """The error with a traceback that begins in the user's code, if any of it is the user's."""
    here, frame = Path(__file__).parent, error.__traceback__
    while frame is not None and here in Path(frame.tb_frame.f_code.co_filename).parents:
        frame = frame.tb_next
    return error if frame is None else error.with_traceback(frame)


def _names_in(node: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Short names of the components in a state tree, parents first."""
    for name, child in node.get("flows", {}).items():
        yield prefix + name
        yield from _names_in(child, f"{prefix}{name}.")
    yield from (prefix + name for name in node.get("works", {}))
    for name, structure in node.get("structures", {}).items():
        yield from _names_in(structure, f"{prefix}{name}.")


def _follow(tree: Any, pointer: str) -> Any:
    for token in parse_pointer(pointer):
        tree = tree[int(token)] if isinstance(tree, list) else tree[token]
    return tree


def _natural(name: str) -> list[tuple[int, Any]]:
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def with_calls(node: dict[str, Any], kept: dict[str, Any]) -> dict[str, Any]:
    """The new program's tree, with the works' calls as they were shown."""
    for group in ("flows", "works", "structures"):
        for name, child in node.get(group, {}).items():
            old = kept.get(group, {}).get(name)
            if old is not None:
                node[group][name] = with_calls(child, old)
    if "calls" in node and "calls" in kept:
        node["calls"] = kept["calls"]
    return node
