"""Flow: the Python object that orchestrates. It reads and writes state and asks Works to run; it never computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from orch.component import Component, Shadow, reserved_names
from orch.errors import StateTypeError
from orch.structures import KEY, Dict, List, Structure
from orch.work import Work

if TYPE_CHECKING:
    from orch.program import Pass

__all__ = ["Flow"]


class Flow(Component):
    """Subclass it, declare state and children in `__init__`, orchestrate in `run`.

    `run()` is called once at start and then whenever something changed. It sees one state, and what it changes and asks
    for is committed as one revision when it ends. Parents call their children's `run()`; orch calls the root's.
    """

    @property
    def _kind(self) -> str:
        return "flows"

    # -- what users override
    def run(self) -> None:
        """One pass. Optional in child flows."""

    def configure_layout(self) -> Any:
        """The tabs: a list of {"name", "content"}, one such dict, or one Frontend. Evaluated after each pass."""
        return None

    def configure_api(self) -> list[Any]:
        """A list of Get/Post/Put/Delete(route, method or function). Read at start, and anew when flows come or go."""
        return []

    # -- what users call
    def schedule(self, cron: str, *, tz: str = "UTC", key: str | None = None, catch_up: bool = False) -> bool:
        """True in one pass per tick of `cron` (5 fields, @hourly, ..., or "@every 10s").

        Args:
            tz: IANA name of the time zone that the fields speak of.
            key: identity of the schedule; default: this flow and `cron`.
            catch_up: ticks missed while the server was down each count (default: they are dropped).
        Raises: ValueError for an expression or zone that cannot be read.
        """
        return self._in_pass("schedule").schedule(key or f"{self.name}:{cron}", cron, tz, catch_up)

    def stop(self, message: str = "") -> NoReturn:
        """End the app with exit code 0. The pass ends at this line; its changes are kept, its new calls dropped."""
        self._in_pass("stop").leave("stop", str(message))

    def fail(self, message: str) -> NoReturn:
        """End the app with exit code 1. The pass ends at this line; its changes are kept, its new calls dropped."""
        self._in_pass("fail").leave("fail", str(message))

    @property
    def flows(self) -> dict[str, Flow]:
        """Every Flow below this one, at every depth, by name."""
        return {child.name: child for child in self._walk() if isinstance(child, Flow)}

    def works(self) -> list[Work]:
        """Every Work below this flow, at every depth."""
        return [child for child in self._walk() if isinstance(child, Work)]

    def named_works(self) -> list[tuple[str, Work]]:
        return [(work.name, work) for work in self.works()]

    # -- children
    def _set_public(self, name: str, value: Any) -> None:
        if isinstance(value, list | tuple) and value and all(isinstance(item, Component) for item in value):
            value = List(*value)
        elif isinstance(value, dict) and value and all(isinstance(item, Component) for item in value.values()):
            value = Dict(value)
        if not isinstance(value, Component | Structure):
            if name in self._children:
                raise StateTypeError(f"{self.name}.{name} is a child: once set it cannot be replaced")
            self._set_var(name, value)
            return
        if self._children.get(name) is value:
            return
        if name in self._children:
            raise StateTypeError(f"{self.name}.{name} is a child: once set it cannot be replaced")
        if not (name.isidentifier() or KEY.fullmatch(name)):
            raise StateTypeError(f"{self.name}: {name!r} cannot name a child: letters, digits, '_' and '-' are allowed")
        if isinstance(value, Structure) and value._owner is not None:
            raise StateTypeError(
                f"{self.name}.{name}: this {type(value).__name__} belongs to {value.name}: make another one"
            )
        if name in self._vars:
            # None, or an empty list or dict, may stand for children that come later.
            if self._vars.get(name) not in ((None, [], {}) if isinstance(value, Structure) else (None,)):
                raise StateTypeError(f"{self.name}.{name} is a state variable, it cannot become a child")
            self._vars.drop(name)
            program = self._find_program()
            if program is not None:
                program.record({"op": "remove", "path": f"{self._pointer}/vars/{name}"})
        Shadow.cast(type(self), name)
        if not self._declaring:
            self._late.add(name)
        if isinstance(value, Component):
            self._adopt(value, name, None)
            self._children[name] = value
            self._added(value, None, None)
        else:
            self._children[name] = value
            value._attach(self, name)
            program = self._find_program()
            if program is not None:
                program.structure_added(value)

    def _adopt(self, child: Component, key: str, container: Structure | None) -> None:
        if child._parent is not None:
            raise StateTypeError(f"{child!r} already belongs to {child._parent.name}: make another one")
        ancestor: Component | None = self
        while ancestor is not None:
            if ancestor is child:
                raise StateTypeError(f"{self.name}.{key}: a flow cannot contain itself")
            ancestor = ancestor._parent
        child._parent, child._attribute, child._container = self, key, container

    def _added(self, child: Component, container: Structure | None, position: int | None) -> None:
        program = self._find_program()
        if program is not None:
            program.component_added(child, container, position)

    def _removed(self, child: Component, container: Structure, position: int) -> None:
        program = self._find_program()
        if program is not None:
            program.component_removed(child, container, position)
        child._given_name = child.name  # what it was called
        child._parent = None
        child._container = None

    def _node(self) -> dict[str, Any]:
        node: dict[str, Any] = {"vars": self._vars.snapshot(), "flows": {}, "works": {}, "structures": {}}
        for name, child in self._children.items():
            if isinstance(child, Structure):
                node["structures"][name] = child._node()
            else:
                node[child._kind][name] = child._node()
        return node

    def _flows_first(self) -> Iterator[Flow]:
        yield self
        for child in self._walk():
            if isinstance(child, Flow):
                yield child

    def _in_pass(self, what: str) -> Pass:
        program = self._find_program()
        current = program.current if program is not None else None
        if current is None:
            raise RuntimeError(f"{self.name}.{what}() only means something while the app runs a pass: call it in run()")
        return current


Flow._reserved = reserved_names(Flow)
