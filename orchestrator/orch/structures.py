"""List and Dict of components: what a list or dict attribute becomes when it holds nothing but Flows and Works."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from orch.component import Component
from orch.errors import StateTypeError

if TYPE_CHECKING:
    from orch.flow import Flow

__all__ = ["Dict", "List", "Structure"]

KEY = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Structure:
    """Base of List and Dict: named members in an order, each a node of the tree."""

    _owner: Flow | None
    _attribute: str

    def __init__(self) -> None:
        self._owner = None
        self._attribute = ""
        self._items: dict[str, Component] = {}
        self._next = 0
        self._declared: dict[str, Component] = {}
        """The members that the owner's `__init__` made."""

    def _members(self) -> Iterator[Component]:
        return iter(list(self._items.values()))

    @property
    def name(self) -> str:
        """Dotted name from the root: `root.models`."""
        return f"{self._owner.name}.{self._attribute}" if self._owner is not None else type(self).__name__

    @property
    def _pointer(self) -> str:
        assert self._owner is not None
        return f"{self._owner._pointer}/structures/{self._attribute}"

    def _attach(self, owner: Flow, attribute: str) -> None:
        self._owner, self._attribute = owner, attribute
        for key, member in self._items.items():
            owner._adopt(member, key, self)

    def _detach(self) -> None:
        """Undo of `_attach`."""
        if self._owner is not None:
            self._owner._children.pop(self._attribute)
        self._owner = None
        for member in self._items.values():
            member._parent = member._container = None

    def _check(self, value: Any) -> Component:
        if not isinstance(value, Component):
            raise StateTypeError(
                f"{type(self).__name__} {self._attribute!r} holds Flows and Works, not {type(value).__name__}"
            )
        return value

    def _insert(self, key: str, value: Any, position: int | None = None) -> None:
        member = self._check(value)
        if self._owner is not None:
            self._owner._adopt(member, key, self)
        self._place(key, member, position)
        if self._owner is None or self._owner._declaring:
            self._declared[key] = member
        if self._owner is not None:
            self._owner._added(member, self, position)

    def _place(self, key: str, member: Component, position: int | None) -> None:
        if position is None or position >= len(self._items):
            self._items[key] = member
        else:
            pairs = list(self._items.items())
            pairs.insert(position, (key, member))
            self._items = dict(pairs)

    def _remove(self, key: str) -> Component:
        position = list(self._items).index(key)
        member = self._items.pop(key)
        if self._owner is not None:
            self._owner._removed(member, self, position)
        return member

    def _record(self) -> dict[str, Any]:
        """What a resume needs besides the members' own records."""
        assert self._owner is not None
        removed = [key for key, member in self._declared.items() if self._items.get(key) is not member]
        return {
            "kind": type(self).__name__,
            "parent": self._owner.name,
            "attribute": self._attribute,
            "next": self._next,
            "removed": removed,
        }

    def _node(self) -> dict[str, Any]:
        node: dict[str, Any] = {"order": list(self._items), "flows": {}, "works": {}}
        for key, member in self._items.items():
            node[member._kind][key] = member._node()
        return node

    def __len__(self) -> int:
        return len(self._items)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({list(self._items.values())!r})"


class List(Structure):
    """An ordered list of components. Names are numbers given at insertion, never reused: `root.models.0`."""

    def __init__(self, *members: Any) -> None:
        super().__init__()
        if len(members) == 1 and isinstance(members[0], list | tuple):
            members = tuple(members[0])
        for member in members:
            self.append(member)

    def _new_key(self) -> str:
        self._next += 1
        return str(self._next - 1)

    def append(self, member: Any) -> None:
        self._check(member)
        self._insert(self._new_key(), member)

    def insert(self, index: int, member: Any) -> None:
        self._check(member)
        size = len(self._items)
        self._insert(self._new_key(), member, max(0, index + size) if index < 0 else index)

    def extend(self, members: Iterable[Any]) -> None:
        for member in members:
            self.append(member)

    def __iadd__(self, members: Iterable[Any]) -> List:
        self.extend(members)
        return self

    def __add__(self, members: Iterable[Any]) -> list[Any]:
        return [*self, *members]

    def __radd__(self, members: Iterable[Any]) -> list[Any]:
        return [*members, *self]

    def pop(self, index: int = -1) -> Component:
        return self._remove(list(self._items)[index])

    def remove(self, member: Component) -> None:
        for key, item in self._items.items():
            if item is member:
                self._remove(key)
                return
        raise ValueError(f"{member!r} is not in {self!r}")

    def clear(self) -> None:
        for key in list(self._items):
            self._remove(key)

    def index(self, member: Component) -> int:
        return list(self._items.values()).index(member)

    def __delitem__(self, index: int | slice) -> None:
        keys = list(self._items)[index]
        for key in [keys] if isinstance(keys, str) else keys:
            self._remove(key)

    def __getitem__(self, index: Any) -> Any:
        return list(self._items.values())[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(list(self._items.values()))

    def __contains__(self, member: object) -> bool:
        return any(item is member for item in self._items.values())


class Dict(Structure):
    """Components by name; keys match `[A-Za-z0-9_-]{1,64}`."""

    def __init__(self, members: dict[str, Any] | None = None, /, **more: Any) -> None:
        super().__init__()
        self.update({**(members or {}), **more})

    def update(self, members: dict[str, Any]) -> None:
        for key, member in members.items():
            self[key] = member

    def __setitem__(self, key: str, member: Any) -> None:
        if not isinstance(key, str) or not KEY.fullmatch(key):
            raise StateTypeError(f"Dict key {key!r}: letters, digits, '_' and '-' are allowed, at most 64")
        if key in self._items:
            if self._items[key] is member:
                return
            raise StateTypeError(
                f"{self._attribute}[{key!r}] holds a component: delete it first, it cannot be replaced"
            )
        self._insert(key, member)

    def __getitem__(self, key: str) -> Any:
        return self._items[key]

    def __delitem__(self, key: str) -> None:
        if key not in self._items:
            raise KeyError(key)
        self._remove(key)

    def pop(self, key: str) -> Component:
        if key not in self._items:
            raise KeyError(key)
        return self._remove(key)

    def clear(self) -> None:
        for key in list(self._items):
            self._remove(key)

    def get(self, key: str, default: Any = None) -> Any:
        return self._items.get(key, default)

    def keys(self) -> list[str]:
        return list(self._items)

    def values(self) -> list[Any]:
        return list(self._items.values())

    def items(self) -> list[tuple[str, Any]]:
        return list(self._items.items())

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._items))

    def __contains__(self, key: object) -> bool:
        return key in self._items
