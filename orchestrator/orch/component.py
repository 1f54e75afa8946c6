"""What Flow and Work share: a name in the tree, state variables, children, and a record to be built from again."""

from __future__ import annotations

import importlib
import inspect
from abc import ABCMeta
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orch.compute import BuildConfig, CloudCompute
from orch.errors import StateTypeError
from orch.state import to_json
from orch.tracked import LEAVES, Vars
from orch.wire import ComponentRecord, Op

if TYPE_CHECKING:
    from orch.program import Program
    from orch.structures import Structure

__all__ = ["Component", "build", "decode_argument", "encode_argument", "import_name", "short_name"]

LEAVES["$compute"] = CloudCompute.from_state
LEAVES["$build"] = BuildConfig.from_state


def _drive_from_state(data: dict[str, Any]) -> Any:
    from orch_drive import Drive

    return Drive.from_state(data)


LEAVES["$drive"] = _drive_from_state


def short_name(name: str) -> str:
    """`root.ui.trainer` -> `ui.trainer`; the root itself keeps its name."""
    return name.removeprefix("root.")


# ---- constructor arguments as JSON -----------------------------------------------------------------------------------


def import_name(obj: Any) -> str:
    return f"{obj.__module__}:{obj.__qualname__}"


def encode_argument(value: Any, where: str) -> Any:
    """JSON of a constructor argument. Raises StateTypeError naming the argument."""
    if isinstance(value, Component):
        return {"$component": {**_record_dict(value._record)}}
    if isinstance(value, BuildConfig) and type(value) is not BuildConfig:
        return {"$object": [import_name(type(value)), value.to_state()["$build"]]}
    if isinstance(value, list | tuple):
        return [encode_argument(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: encode_argument(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        if not importable(value):
            raise StateTypeError(
                f"{where}: {value.__qualname__} cannot be imported by name",
                hint="give a class or function that stands at the top level of a module",
            )
        return {"$import": import_name(value)}
    return to_json(value, where)


def decode_argument(value: Any) -> Any:
    if isinstance(value, list):
        return [decode_argument(item) for item in value]
    if isinstance(value, dict):
        if len(value) == 1:
            ((kind, inner),) = value.items()
            if kind == "$component":
                return build(ComponentRecord(**inner))
            if kind == "$import":
                return resolve(inner)
            if kind == "$object":
                return resolve(inner[0])(**inner[1])
            if kind in LEAVES:
                return LEAVES[kind](inner)
        return {key: decode_argument(item) for key, item in value.items()}
    return value


def importable(value: Any) -> bool:
    """Is this class or function found again by `module:qualname`?"""
    bound = inspect.ismethod(value) and not isinstance(value.__self__, type)
    return "<" not in value.__qualname__ and not bound


def resolve(name: str) -> Any:
    """The object behind `module:qualname`. Raises StateTypeError."""
    module, _, qualname = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in qualname.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise StateTypeError(
            f"{name} cannot be imported: {error}",
            hint="components live at the top level of app.py or of a module beside it",
        ) from error
    return found


def _record_dict(record: ComponentRecord) -> dict[str, Any]:
    return {"module": record.module, "qualname": record.qualname, "args": record.args, "kwargs": record.kwargs}


def build(record: ComponentRecord) -> Any:
    """A new component from its record: what an agent does, and a resume."""
    cls = resolve(f"{record.module}:{record.qualname}")
    return cls(*decode_argument(record.args), **decode_argument(record.kwargs))


# ---- the base class --------------------------------------------------------------------------------------------------


class _Meta(ABCMeta):
    """Records constructor arguments, and knows when `__init__` is over. (Of ABCMeta: users may derive from ABC too.)"""

    def __call__(cls, /, *args: Any, **kwargs: Any) -> Any:
        component: Any = cls.__new__(cls, *args, **kwargs)  # type: ignore[arg-type]
        where = cls.__name__
        record = ComponentRecord(
            module=cls.__module__,
            qualname=cls.__qualname__,
            args=[encode_argument(value, f"{where}() argument {i}") for i, value in enumerate(args)],
            kwargs={name: encode_argument(value, f"{where}() argument {name}") for name, value in kwargs.items()},
        )
        component._setup(record)
        component.__init__(*args, **kwargs)
        component._declaring = False
        component._complete()
        return component


class Component(metaclass=_Meta):
    """Base of Flow and Work. Public attributes set while `__init__` runs are state; `_private` ones are not."""

    _declaring: bool
    _record: ComponentRecord
    _parent: Component | None
    _attribute: str
    _given_name: str
    """What it is called without a parent: "root", or in a Work's own process the name it has in the tree."""
    _vars: Vars
    _children: dict[str, Component | Structure]
    _late: set[str]
    """Names of the children that `__init__` did not make."""
    _program: Program | None
    _reserved: frozenset[str] = frozenset()
    _container: Structure | None

    def _setup(self, record: ComponentRecord) -> None:
        self._declaring = True
        self._record = record
        self._parent = None
        self._container = None
        self._attribute = ""
        self._given_name = "root"
        self._children = {}
        self._late = set()
        self._program = None
        self._vars = Vars(self._report, where=self._where)

    def _complete(self) -> None:
        """`__init__` is over."""

    # -- place in the tree
    @property
    def name(self) -> str:
        """Dotted name from the root: `root.ui.trainer`."""
        if self._parent is None:
            return self._given_name
        middle = f".{self._container._attribute}" if self._container is not None else ""
        return f"{self._parent.name}{middle}.{self._attribute}"

    @property
    def _kind(self) -> str:
        raise TypeError

    @property
    def _pointer(self) -> str:
        """RFC 6901 pointer of this component's node."""
        if self._parent is None:
            return "" if self._kind == "flows" else "/works/root"
        if self._container is not None:
            return f"{self._parent._pointer}/structures/{self._container._attribute}/{self._kind}/{self._attribute}"
        return f"{self._parent._pointer}/{self._kind}/{self._attribute}"

    def _where(self) -> str:
        """What error messages call this component: its class until it has a place in the tree."""
        return type(self).__name__ if self._parent is None else short_name(self.name)

    def _find_program(self) -> Program | None:
        component: Component | None = self
        while component is not None:
            if component._program is not None:
                return component._program
            component = component._parent
        return None

    def _report(self, op: Op) -> None:
        """A state variable changed."""
        program = self._find_program()
        if program is not None:
            prefix = self._pointer + "/vars"
            moved = {**op, "path": prefix + op["path"]}
            if "from" in op:
                moved["from"] = prefix + op["from"]
            program.record(moved)

    def _walk(self) -> Iterator[Component]:
        """All components below, parents first, in the order of their declaration."""
        for child in self._children.values():
            members = [child] if isinstance(child, Component) else list(child._members())
            for member in members:
                yield member
                yield from member._walk()

    def _node(self) -> dict[str, Any]:
        """The component's subtree as JSON, without statuses."""
        raise NotImplementedError

    # -- attributes
    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            object.__setattr__(self, name, value)
            return
        found = getattr(type(self), name, None)
        if name in self._reserved:
            raise StateTypeError(
                f"{type(self).__name__}.{name}: this name belongs to orch",
                hint="choose another attribute name",
            )
        if isinstance(found, property) or (found is not None and hasattr(type(found), "__set__")):
            object.__setattr__(self, name, value)
            return
        self._set_public(name, value)

    def _set_public(self, name: str, value: Any) -> None:
        if isinstance(value, Component):
            raise StateTypeError(
                f"{type(self).__name__}.{name}: a Work is a leaf, it cannot hold a {type(value).__name__}"
            )
        self._set_var(name, value)

    def _set_var(self, name: str, value: Any) -> None:
        if name in self._vars:
            self._vars.set(name, value)
        elif self._declaring:
            self._vars.declare(name, value)
            Shadow.cast(type(self), name)
        else:
            raise AttributeError(
                f"{self.name} ({type(self).__name__}) has no state variable {name!r}: declare it in __init__"
            )

    def __getattr__(self, name: str) -> Any:
        # Only reached when ordinary look-up fails: state and children live here, not in the instance's __dict__.
        if not name.startswith("_"):
            own = self.__dict__
            if "_vars" in own and name in own["_vars"]:
                return own["_vars"].get(name)
            if name in own.get("_children", ()):
                return own["_children"][name]
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __delattr__(self, name: str) -> None:
        if name.startswith("_"):
            object.__delattr__(self, name)
            return
        raise AttributeError(f"{self.name}: {name!r} cannot be deleted, state variables live as long as the component")

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name}>"


class Shadow:
    """A class attribute whose name is an instance's state variable or child too: that hides the class's, as always."""

    def __init__(self, name: str, default: Any) -> None:
        self.name = name
        self.default = default

    @classmethod
    def cast(cls, owner: type, name: str) -> None:
        default = inspect.getattr_static(owner, name, cls)
        if default is not cls and not isinstance(default, cls):
            setattr(owner, name, cls(name, default))

    def __get__(self, instance: Component | None, owner: type) -> Any:
        if instance is not None and (self.name in instance._vars or self.name in instance._children):
            return instance.__getattr__(self.name)
        get = getattr(type(self.default), "__get__", None)
        return self.default if get is None else get(self.default, instance, owner)


def reserved_names(cls: type) -> frozenset[str]:
    """orch's own public names: no state variable may take them."""
    return frozenset(name for name in dir(cls) if not name.startswith("_"))
