"""State variables of one component: dicts and lists that report their own mutations as RFC 6902 operations. PURE.

A value that is put into state is copied; what is read back is a `TrackedList` or `TrackedDict`, a real list or dict
whose every mutation becomes one or a few operations, at a cost that depends on the mutation and not on the state. A
container that leaves the state (popped, replaced, removed) is detached: an ordinary container from then on.

Hazard: C code that fills a list behind its methods (`heapq`) cannot be seen. Use it on a copy and assign that.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, SupportsIndex

from orch.errors import OrchError
from orch.state import Change, execute, format_pointer, normalise, parse_pointer, same, to_json, undo
from orch.wire import Op

__all__ = ["LEAVES", "TrackedCounter", "TrackedDict", "TrackedList", "Vars", "plain"]

LEAVES: dict[str, Callable[[dict[str, Any]], Any]] = {}
"""Kinds of objects that live in state: `to_state()` gives `{"$kind": {...}}`, the function here takes the inner dict
and gives the object back. Dicts of unknown kinds, and those the function refuses, stay dicts."""


def plain(value: Any) -> Any:
    """A copy of a value read from state as ordinary dicts and lists; objects become what their `to_state()` gives."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in dict.items(value)}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return to_json(value, "") if hasattr(type(value), "to_state") else value


def _unmarked(value: Any, memo: dict[int, Any]) -> Any:
    """Like `plain`, but objects stay objects: what `copy.deepcopy` gives."""
    if isinstance(value, dict):
        items = {key: _unmarked(item, memo) for key, item in dict.items(value)}
        return Counter(items) if isinstance(value, Counter) else items
    if isinstance(value, list):
        return [_unmarked(item, memo) for item in value]
    return copy.deepcopy(value, memo)


def _tracked(value: Any, home: Vars) -> Any:
    """A tracked copy of a JSON value."""
    if isinstance(value, dict):
        if len(value) == 1 and (leaf := _leaf(value)) is not None:
            return leaf
        return _fill_dict(TrackedDict(), value, home)
    if isinstance(value, list):
        items = TrackedList()
        items._home = home
        list.extend(items, value)
        for index, item in enumerate(value):
            if isinstance(item, dict | list):
                child = _tracked(item, home)
                list.__setitem__(items, index, child)
                _adopt(child, items, index)
        return items
    return value


def _fill_dict(target: TrackedDict, value: dict[str, Any], home: Vars) -> TrackedDict:
    target._home = home
    dict.update(target, value)
    for key, item in dict.items(value):
        if isinstance(item, dict | list):
            child = _tracked(item, home)
            dict.__setitem__(target, key, child)
            _adopt(child, target, key)
    return target


def _leaf(value: dict[str, Any]) -> Any:
    ((kind, inner),) = dict.items(value)
    make = LEAVES.get(kind) if kind[:1] == "$" else None
    if make is None or not isinstance(inner, dict):
        return None
    try:
        return make(plain(inner))
    except (OrchError, AttributeError, KeyError, TypeError, ValueError):
        return None  # anybody may write {"$drive": "nonsense"} into a variable: that is a dict then, and shown as one


def _adopt(child: Any, parent: _Parent, key: str | int) -> None:
    if isinstance(child, TrackedDict | TrackedList):
        child._parent = parent
        child._key = key


def _detach(child: Any) -> None:
    if isinstance(child, TrackedDict | TrackedList):
        child._parent = None


def _tokens(node: TrackedDict | TrackedList) -> list[str] | None:
    """Where a container is in its component's vars; None if it is detached."""
    tokens: list[str] = []
    here: _Parent | None = node
    while not isinstance(here, Vars):
        if here is None:
            return None
        parent = here._parent
        if isinstance(parent, TrackedList):
            here._key = parent._index_of(here, here._key)
        tokens.append(str(here._key))
        here = parent
    tokens.reverse()
    return tokens


class _Place:
    """An attached container under its lock, for one mutation: its path, and the way in and out for values."""

    __slots__ = ("depth", "home", "node", "path", "tokens")

    def __init__(self, node: TrackedDict | TrackedList, tokens: list[str], home: Vars) -> None:
        self.node = node
        self.home = home
        self.tokens = tokens
        self.path = format_pointer(tokens)
        self.depth = len(tokens)

    def plain(self, value: Any, key: str | int) -> Any:
        """The JSON value to report. Raises StateTypeError naming the attribute."""
        return normalise(value, lambda: self.home._where([*self.tokens, key]), self.depth)

    def key(self, key: Any) -> str:
        if type(key) is str and key.isascii():
            return key
        (name,) = normalise({key: None}, lambda: self.home._where(self.tokens), 0)
        return str(name)

    def at(self, key: str | int) -> str:
        return self.path + (f"/{key}" if isinstance(key, int) else format_pointer((key,)))

    def report(self, verb: str, path: str, *value: Any) -> None:
        op: Op = {"op": verb, "path": path}
        if value:
            op["value"] = value[0]
        self.home._report(op)


_NO_LOCK: AbstractContextManager[Any] = nullcontext()


class TrackedList(list[Any]):
    """A list in state."""

    __slots__ = ("_home", "_key", "_parent")

    _home: Vars | None
    _key: str | int
    _parent: _Parent | None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> TrackedList:
        self = super().__new__(cls)
        self._home = None
        self._key = 0
        self._parent = None
        return self

    # -- where it is

    def _lock(self) -> AbstractContextManager[Any]:
        return self._home._lock if self._home is not None else _NO_LOCK

    def _place(self) -> _Place | None:
        tokens = None if self._home is None else _tokens(self)
        return None if tokens is None or self._home is None else _Place(self, tokens, self._home)

    def _index_of(self, child: TrackedDict | TrackedList, hint: Any) -> int:
        """By identity, searching outwards from where it was last seen: elements move by a few places at a time."""
        length = len(self)
        low = high = min(int(hint), length - 1)
        while low >= 0 or high < length:
            if low >= 0:
                if list.__getitem__(self, low) is child:
                    return low
                low -= 1
            high += 1
            if high < length and list.__getitem__(self, high) is child:
                return high
        raise RuntimeError("a tracked container is not where its parent should have it")

    # -- mutations

    def append(self, value: Any, /) -> None:
        self.extend((value,))

    def extend(self, values: Iterable[Any], /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().extend(values)
                return
            start = len(self)
            added = [place.plain(value, start + i) for i, value in enumerate(list(values))]
            for value in added:
                self._insert(place, len(self), value)

    def insert(self, index: SupportsIndex, value: Any, /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().insert(index, value)
                return
            at, length = index.__index__(), len(self)
            at = max(0, at + length) if at < 0 else min(at, length)
            self._insert(place, at, place.plain(value, at))

    def _insert(self, place: _Place, at: int, value: Any) -> None:
        child = _tracked(value, place.home)
        _adopt(child, self, at)
        path = place.at(at) if at < len(self) else f"{place.path}/-"
        super().insert(at, child)
        place.report("add", path, value)

    def __setitem__(self, index: Any, value: Any, /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().__setitem__(index, value)
            elif isinstance(index, slice):
                items = list(self)
                items[index] = value
                self._become(place, items)
            else:
                self._assign(place, index, value)

    def _assign(self, place: _Place, index: SupportsIndex, value: Any) -> None:
        at = index.__index__()
        old = self[at]  # IndexError as usual
        at += len(self) if at < 0 else 0
        if value is old:
            return
        new = place.plain(value, at)
        if same(old, new):
            return
        child = _tracked(new, place.home)
        _detach(old)
        _adopt(child, self, at)
        super().__setitem__(at, child)
        place.report("replace", place.at(at), new)

    def __delitem__(self, index: SupportsIndex | slice, /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().__delitem__(index)
            elif isinstance(index, slice):
                doomed = sorted(range(*index.indices(len(self))), reverse=True)
                if doomed and len(doomed) == len(self):
                    self._become(place, [])
                    return
                for at in doomed:
                    self._take(place, at)
            else:
                self._take(place, index)

    def _take(self, place: _Place, index: SupportsIndex) -> Any:
        at = index.__index__()
        value = self[at]
        at += len(self) if at < 0 else 0
        super().__delitem__(at)
        _detach(value)
        place.report("remove", place.at(at))
        return value

    def pop(self, index: SupportsIndex = -1, /) -> Any:
        with self._lock():
            place = self._place()
            if place is None or not self:
                return super().pop(index)
            return self._take(place, index)

    def remove(self, value: Any, /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().remove(value)
                return
            try:
                at = self.index(value)
            except ValueError:
                raise ValueError("list.remove(x): x not in list") from None
            self._take(place, at)

    def clear(self) -> None:
        del self[:]

    def sort(self, *, key: Callable[[Any], Any] | None = None, reverse: bool = False) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().sort(key=key, reverse=reverse)
                return
            self._become(place, sorted(self, key=key, reverse=reverse))

    def reverse(self) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                super().reverse()
                return
            self._become(place, self[::-1])

    def __iadd__(self, values: Iterable[Any], /) -> TrackedList:  # type: ignore[misc]
        self.extend(values)
        return self

    def __imul__(self, times: SupportsIndex, /) -> TrackedList:
        with self._lock():
            place = self._place()
            if place is None:
                return super().__imul__(times)
            self._become(place, list(self) * times)
            return self

    def _become(self, place: _Place, items: list[Any]) -> None:
        """Take these elements instead, reported as one replacement. Elements that were here already stay the same
        objects (their first occurrence: no aliases in state)."""
        kept: set[int] = set()
        news: list[Any] = []
        children: list[Any] = []
        for at, item in enumerate(items):
            new = place.plain(item, at)
            news.append(new)
            if isinstance(item, TrackedDict | TrackedList) and item._parent is self and id(item) not in kept:
                kept.add(id(item))
                children.append(item)
            else:
                children.append(_tracked(new, place.home))
        if len(children) == len(self) and all(map(_unchanged, self, children)):
            return
        equal = same(self, news)  # equal elements that change places: the objects move, the value does not
        for old in self:
            if id(old) not in kept:
                _detach(old)
        for at, child in enumerate(children):
            _adopt(child, self, at)
        super().__setitem__(slice(None), children)
        if not equal:
            place.report("replace", place.path, news)

    # -- copies are ordinary lists

    def __copy__(self) -> list[Any]:
        return list(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _unmarked(self, memo)

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]:
        return list, (list(self),)


class TrackedDict(dict[str, Any]):
    """A dict in state; its keys are str."""

    __slots__ = ("_home", "_key", "_parent")

    _home: Vars | None
    _key: str | int
    _parent: _Parent | None

    def __new__(cls, *_args: Any, **_kwargs: Any) -> TrackedDict:
        self = super().__new__(cls)
        self._home = None
        self._key = 0
        self._parent = None
        return self

    def _lock(self) -> AbstractContextManager[Any]:
        return self._home._lock if self._home is not None else _NO_LOCK

    def _place(self) -> _Place | None:
        tokens = None if self._home is None else _tokens(self)
        return None if tokens is None or self._home is None else _Place(self, tokens, self._home)

    # -- mutations

    def __setitem__(self, key: str, value: Any, /) -> None:
        with self._lock():
            place = self._place()
            if place is None:
                dict.__setitem__(self, key, value)
                return
            name = place.key(key)
            if name in self and dict.__getitem__(self, name) is value:
                return  # `d["rows"] += [...]` puts the same list back
            self._assign(place, name, place.plain(value, name))

    def _assign(self, place: _Place, name: str, new: Any) -> None:
        exists = name in self
        old = dict.__getitem__(self, name) if exists else None
        if exists and same(old, new):
            return
        child = _tracked(new, place.home)
        _detach(old)
        _adopt(child, self, name)
        dict.__setitem__(self, name, child)
        place.report("replace" if exists else "add", place.at(name), new)

    def update(self, *args: Any, **kwargs: Any) -> None:
        with self._lock():
            place = self._place()
            values: dict[Any, Any] = {}
            values.update(*args, **kwargs)
            if place is None:
                dict.update(self, values)
                return
            news = [
                (place.key(key), value, place.plain(value, key if isinstance(key, str) else str(key)))
                for key, value in values.items()
            ]
            for name, value, new in news:
                if name not in self or dict.__getitem__(self, name) is not value:
                    self._assign(place, name, new)

    def __ior__(self, other: Any, /) -> TrackedDict:  # type: ignore[override, misc]
        self.update(other)
        return self

    def setdefault(self, key: str, default: Any = None, /) -> Any:
        with self._lock():
            if key not in self:
                self[key] = default
            return dict.__getitem__(self, key)

    def __delitem__(self, key: str, /) -> None:
        self.pop(key)

    def pop(self, key: str, /, *default: Any) -> Any:
        with self._lock():
            place = self._place()
            if place is None or key not in self:
                return dict.pop(self, key, *default)
            value = dict.pop(self, key)
            _detach(value)
            place.report("remove", place.at(str(key)))
            return value

    def popitem(self) -> tuple[str, Any]:
        with self._lock():
            place = self._place()
            if place is None or not self:
                return dict.popitem(self)
            key = next(reversed(self))
            return key, self.pop(key)

    def clear(self) -> None:
        with self._lock():
            place = self._place()
            if place is None or not self:
                dict.clear(self)
                return
            for value in dict.values(self):
                _detach(value)
            dict.clear(self)
            place.report("replace", place.path, {})

    # -- copies are ordinary dicts

    def __copy__(self) -> dict[str, Any]:
        return dict(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _unmarked(self, memo)

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]:
        return dict, (dict(self),)


class TrackedCounter(Counter[str], TrackedDict):
    """A `collections.Counter` in state: an attribute that was declared as one stays one."""

    def update(self, iterable: Any = None, /, **kwargs: Any) -> None:
        self._count(iterable, kwargs, 1)

    def subtract(self, iterable: Any = None, /, **kwargs: Any) -> None:
        self._count(iterable, kwargs, -1)

    def _count(self, iterable: Any, kwargs: dict[str, Any], sign: int) -> None:
        # Counter counts one element at a time; this way it is one operation a key
        counts: Counter[str] = Counter(iterable)
        counts.update(kwargs)
        with self._lock():
            TrackedDict.update(self, {key: self[key] + sign * count for key, count in counts.items()})

    def __ior__(self, other: Any, /) -> TrackedCounter:  # type: ignore[override, misc]
        for key, count in other.items():
            if count > self[key]:
                self[key] = count
        return self._keep_positive()  # type: ignore[attr-defined, no-any-return]

    def copy(self) -> Counter[str]:  # type: ignore[override]
        return Counter(dict(self))

    def __copy__(self) -> Counter[str]:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _unmarked(self, memo)

    def __reduce_ex__(self, _protocol: SupportsIndex) -> tuple[Any, ...]:
        return Counter, (dict(self),)

    def __repr__(self) -> str:
        return repr(self.copy())


class Vars:
    """The state variables of one component.

    Args:
        report: called with each operation, after the change; paths are relative to these vars (`/rows/3/x`), values are
            plain JSON that nobody else holds.
        where: what error messages put before the attribute's name ("ui": "ui.rows[3].x"), or a function that knows.
        lock: held around every change together with its report, where several threads write.
    """

    def __init__(
        self,
        report: Callable[[Op], None],
        *,
        where: str | Callable[[], str] = "",
        lock: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._report = report
        self._lock = lock if lock is not None else _NO_LOCK
        self._prefix = where
        self._values: dict[str, Any] = {}
        self._counters: set[str] = set()

    # -- the component's own side

    def declare(self, name: str, value: Any) -> None:
        """A new variable, not reported. Raises StateTypeError; then nothing is stored."""
        new = normalise(value, lambda: self._where([name]), 0)
        with self._lock:
            _detach(self._values.get(name))
            self._counters.discard(name)
            if isinstance(value, Counter):
                self._counters.add(name)
            self._store(name, new)

    def drop(self, name: str) -> None:
        """Take a declared variable back, not reported."""
        with self._lock:
            _detach(self._values.pop(name))
            self._counters.discard(name)

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def names(self) -> list[str]:
        return list(self._values)

    def get(self, name: str) -> Any:
        """The variable as user code sees it. Raises KeyError if it is not declared."""
        return self._values[name]

    def set(self, name: str, value: Any) -> None:
        """Assign a tracked copy of `value`; an equal value is no change.

        Raises KeyError if it is not declared, StateTypeError if `value` is no state; then nothing changes.
        """
        with self._lock:
            old = self._values[name]
            if value is old:
                return
            new = normalise(value, lambda: self._where([name]), 0)
            if same(old, new):
                return
            _detach(old)
            self._store(name, new)
            self._report({"op": "replace", "path": format_pointer((name,)), "value": new})

    def snapshot(self) -> dict[str, Any]:
        """All variables as plain JSON, in the order of their declaration."""
        with self._lock:
            return {name: plain(value) for name, value in self._values.items()}

    # -- what others changed

    def apply(self, ops: Iterable[Op], *, in_place: bool) -> None:
        """Apply accepted operations (paths like `/rows/3/x`), all or none; they are not reported.

        Args:
            in_place: containers change where they are and keep their identity. Otherwise every container that changes,
                and those it lies in, are replaced by copies: what the program holds never changes under it, and is
                detached.

        Raises StatePathError and the other errors of `orch.state.apply_ops`.
        """
        with self._lock:
            changes: list[Change] = []
            fresh: dict[int, Any] = {}
            opened: list[TrackedDict] = []
            try:
                for op in ops:
                    for part, verbs in _CHANGING:
                        if op.get("op") in verbs and isinstance(op.get(part), str):
                            tokens = parse_pointer(op[part])
                            self._open_objects(tokens, changes, opened, fresh)
                            if not in_place:
                                self._copy_path(tokens, changes, fresh)
                    execute(self._values, op, changes, self._make)
            except BaseException:
                undo(changes)
                raise
            for change in changes:
                if not change.inserted:
                    _detach(change.old)
                if not change.removed:
                    _adopt(change.new, self if change.container is self._values else change.container, change.key)
            for container in fresh.values():
                _adopt_all(container)
            for inner in opened:
                _close_object(inner)
            for name in {change.tokens[0] for change in changes}:
                self._keep_counter(name)

    def load(self, values: Mapping[str, Any]) -> None:
        """Take these plain values instead of all variables, not reported. Equal ones keep their containers."""
        with self._lock:
            for name in [name for name in self._values if name not in values]:
                _detach(self._values.pop(name))
            for name, value in values.items():
                old = self._values.get(name)
                if name not in self._values or not same(old, value):
                    _detach(old)
                    self._store(name, value)

    # -- inside

    def _where(self, tokens: Sequence[str | int]) -> str:
        prefix = self._prefix if isinstance(self._prefix, str) else self._prefix()
        name = ".".join(part for part in (prefix, str(tokens[0])) if part)
        node = self._values.get(str(tokens[0]))
        for token in tokens[1:]:
            inside = isinstance(node, list)
            if inside or not str(token).isidentifier():
                name += f"[{token}]" if inside else f"[{token!r}]"
            else:
                name += f".{token}"
            if isinstance(node, dict):
                node = dict.get(node, str(token))
            elif isinstance(node, list):
                node = node[int(token)] if int(token) < len(node) else None
        return name

    def _store(self, name: str, value: Any) -> None:
        """`value` is plain; it is copied."""
        child = _tracked(value, self)
        _adopt(child, self, name)
        self._values[name] = child
        self._keep_counter(name)

    def _keep_counter(self, name: str) -> None:
        value = self._values.get(name)
        if name in self._counters and isinstance(value, TrackedDict) and not isinstance(value, TrackedCounter):
            counter = _copy_container(value, TrackedCounter)
            _detach(value)
            _adopt(counter, self, name)
            _adopt_all(counter)
            self._values[name] = counter

    def _make(self, value: Any) -> Any:
        return _tracked(plain(value), self)

    def _open_objects(
        self, tokens: tuple[str, ...], changes: list[Change], opened: list[TrackedDict], fresh: dict[int, Any]
    ) -> None:
        """An operation inside an object (`/drive/$drive/name`) needs the dict that stands for it, for a moment."""
        container: Any = self._values
        for depth, token in enumerate(tokens[:-1]):
            child = _child(container, token)
            if hasattr(type(child), "to_state"):
                inner = _fill_dict(TrackedDict(), plain(child), self)
                opened.append(inner)
                fresh[id(inner)] = inner
                _swap(tokens[: depth + 1], container, child, inner, changes)
                child = inner
            container = child

    def _copy_path(self, tokens: tuple[str, ...], changes: list[Change], fresh: dict[int, Any]) -> None:
        """Put copies in the place of the containers on the way to what will change, once an `apply`."""
        container: Any = self._values
        for depth, token in enumerate(tokens[:-1]):
            child = _child(container, token)
            if isinstance(child, TrackedDict | TrackedList) and id(child) not in fresh:
                double = _copy_container(child, type(child))
                fresh[id(double)] = double
                _swap(tokens[: depth + 1], container, child, double, changes)
                child = double
            container = child


def _child(container: Any, token: str) -> Any:
    if isinstance(container, dict):
        return dict.get(container, token)
    if isinstance(container, list) and token.isdecimal() and int(token) < len(container):
        return list.__getitem__(container, int(token))
    return None  # `execute` says what is missing


def _swap(tokens: tuple[str, ...], container: Any, old: Any, new: Any, changes: list[Change]) -> None:
    key: Any = tokens[-1] if isinstance(container, dict) else int(tokens[-1])
    changes.append(Change(tokens, container, key, old, new, len(container)))
    if isinstance(container, dict):
        dict.__setitem__(container, key, new)
    else:
        list.__setitem__(container, key, new)


def _copy_container(value: Any, kind: type[Any]) -> Any:
    """A shallow copy, not yet attached, whose elements are not yet adopted."""
    double = kind()
    double._home = value._home
    if isinstance(double, dict):
        dict.update(double, value)
    else:
        list.extend(double, value)
    return double


def _adopt_all(container: Any) -> None:
    for key, child in dict.items(container) if isinstance(container, dict) else enumerate(container):
        _adopt(child, container, key)


def _close_object(inner: TrackedDict) -> None:
    parent = inner._parent
    leaf = _leaf(inner) if len(inner) == 1 else None
    if leaf is None or parent is None:
        return
    if isinstance(parent, TrackedList):
        list.__setitem__(parent, parent._index_of(inner, inner._key), leaf)
    else:
        dict.__setitem__(parent._values if isinstance(parent, Vars) else parent, str(inner._key), leaf)
    _detach(inner)


def _unchanged(old: Any, new: Any) -> bool:
    return old is new or (not isinstance(old, dict | list) and same(old, new))


_CHANGING = (("path", ("add", "remove", "replace", "move", "copy")), ("from", ("move",)))

_Parent = Vars | TrackedList | TrackedDict
