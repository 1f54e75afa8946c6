"""The state tree: JSON values, pointers (RFC 6901), patches (RFC 6902), who may write where, limits, revisions. PURE.

A patch costs what it changes, not what the state holds: sizes and revisions are kept along the paths that were touched.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, TypeGuard

import msgspec

from orch.errors import StateError, StateForbidden, StatePathError, StateTestFailed, StateTooLarge, StateTypeError
from orch.wire import Op

__all__ = [
    "MAX_DEPTH",
    "MAX_TREE",
    "MAX_VALUE",
    "Change",
    "Snapshot",
    "StateTree",
    "Target",
    "apply_ops",
    "copy_json",
    "execute",
    "format_pointer",
    "json_equal",
    "json_size",
    "normalise",
    "parse_pointer",
    "same",
    "split_pointer",
    "to_json",
    "undo",
]

MAX_VALUE = 2 * 1024 * 1024
"""Bytes of compact JSON that one attribute may take."""
MAX_TREE = 32 * 1024 * 1024
"""Bytes of compact JSON that the whole tree may take."""
MAX_DEPTH = 100
"""Containers within containers in one attribute."""

_MAX_NODES = 2 * 1024 * 1024
"""Elements in one value: a value of MAX_VALUE bytes cannot hold more, a graph that shares its parts can."""
_MAX_INT_BITS = 13_000
"""Python refuses to print or to read integers of more than 4,300 digits (about 14,300 bits)."""
_STATE_HINT = "state is None, bool, int, finite float, str, list, dict with str keys; _private attributes are no state"
_MISSING: Any = type("Missing", (), {"__repr__": lambda _: "MISSING"})()

# ---- pointers --------------------------------------------------------------------------------------------------------


def parse_pointer(pointer: str) -> tuple[str, ...]:
    """The reference tokens of an RFC 6901 pointer; `""` is the whole document. Raises StatePathError when malformed."""
    if pointer == "":
        return ()
    if not isinstance(pointer, str) or pointer[0] != "/":
        raise StatePathError(
            f"{pointer!r} is no JSON pointer", hint='a pointer is "" or starts with /, e.g. /vars/name'
        )
    if "~" not in pointer:
        return tuple(pointer[1:].split("/"))
    if re.search(r"~(?![01])", pointer):
        raise StatePathError(f"{pointer!r} is no JSON pointer", hint="write ~0 for ~ and ~1 for / within a name")
    return tuple(token.replace("~1", "/").replace("~0", "~") for token in pointer[1:].split("/"))


def format_pointer(tokens: Iterable[str]) -> str:
    """The RFC 6901 pointer of these tokens."""
    return "".join(f"/{token.replace('~', '~0').replace('/', '~1')}" for token in tokens)


class Target(NamedTuple):
    """Where a pointer below some component's `vars` leads."""

    component: tuple[str, ...]
    attr: str
    rest: tuple[str, ...]


def split_pointer(tokens: Iterable[str]) -> Target | None:
    """Component, attribute and the rest; None if the path does not lead to an attribute.

    Components: (/flows/<name> | /structures/<name>/flows/<n>)* [/works/<name> | /structures/<name>/works/<n>]
    """
    path = tuple(tokens)
    at, end = 0, len(path)
    while at < end:
        match path[at]:
            case "vars":
                return Target(path[:at], path[at + 1], path[at + 2 :]) if at + 1 < end else None
            case "flows":
                step, leaf = 2, False
            case "works":
                step, leaf = 2, True
            case "structures" if at + 2 < end and path[at + 2] in ("flows", "works"):
                step, leaf = 4, path[at + 2] == "works"
            case _:
                return None
        at += step
        if leaf and (at >= end or path[at] != "vars"):
            return None
    return None


# ---- values ----------------------------------------------------------------------------------------------------------


class _Unfit(Exception):
    """A value that is no state; `trail` is where in it, innermost first."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        self.trail: list[str | int] = []


def to_json(value: Any, where: str) -> Any:
    """A fresh plain JSON value that equals `value`.

    Subclasses of str, int and float (enums too) become the plain value, tuples lists, subclasses of dict dicts; an
    object with `to_state()` becomes what that returns.

    Raises:
        StateTypeError: naming the place ("ui.rows[3].x" if `where` is "ui.rows") and the type.
    """
    return normalise(value, where, 0)


def normalise(value: Any, where: str | Callable[[], str], depth: int) -> Any:
    """`to_json` for a value that will lie `depth` containers deep in its attribute."""
    kind = type(value)
    if value is None or kind is bool or (kind is str and value.isascii()):
        return value
    try:
        return _Normaliser().convert(value, depth)
    except _Unfit as unfit:
        place = where if isinstance(where, str) else where()
        raise StateTypeError(f"{_place(place, unfit.trail)} {unfit.reason}", hint=_STATE_HINT) from None


def _place(where: str, trail: list[str | int]) -> str:
    if where.startswith("/"):
        return where + format_pointer(str(step) for step in reversed(trail))
    for step in reversed(trail):
        if isinstance(step, str) and step.isidentifier():
            where += f".{step}"
        else:
            where += f"[{step!r}]"
    return where or "the value"


def _type_name(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


class _Normaliser:
    __slots__ = ("active", "left")

    def __init__(self) -> None:
        self.active: set[int] = set()
        self.left = _MAX_NODES

    def convert(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if value is None or kind is bool:
            return value
        if kind is str:
            return _text(value)
        if kind is int:
            if value.bit_length() > _MAX_INT_BITS:
                raise _Unfit("is an int of more than 3,900 digits, which is too long for state")
            return value
        if kind is float:
            if not math.isfinite(value):
                raise _Unfit(f"is {value}, which is not JSON state: floats must be finite")
            return value
        if kind is not dict and kind is not list:
            to_state = getattr(kind, "to_state", None)
            if callable(to_state):
                return self.convert(to_state(value), depth)
            if isinstance(value, str):
                return self.convert(str.__str__(value), depth)
            if isinstance(value, int):
                return self.convert(int.__int__(value), depth)
            if isinstance(value, float):
                return self.convert(float.__float__(value), depth)
            if not isinstance(value, dict | list | tuple):
                raise _Unfit(f"is of type {_type_name(kind)}, which is not JSON state")
        if id(value) in self.active:
            raise _Unfit("contains itself")
        if depth >= MAX_DEPTH:
            raise _Unfit(f"is nested more than {MAX_DEPTH} deep")
        self.left -= len(value)
        if self.left < 0:
            raise _Unfit(f"has more than {_MAX_NODES:,} elements, which is too many for state")
        self.active.add(id(value))
        plain = self._dict(value, depth) if isinstance(value, dict) else self._list(value, depth)
        self.active.discard(id(value))
        return plain

    def _dict(self, value: dict[Any, Any], depth: int) -> dict[str, Any]:
        plain: dict[str, Any] = {}
        key: Any = None
        try:
            for key, item in dict.items(value):
                name = key
                if type(key) is not str:
                    if not isinstance(key, str):
                        break
                    name = str.__str__(key)
                plain[_text(name)] = self.convert(item, depth + 1)
            else:
                return plain
        except _Unfit as unfit:
            unfit.trail.append(str(key).encode("utf-8", "backslashreplace").decode())
            raise
        raise _Unfit(f"has the key {key!r} of type {_type_name(type(key))}: keys must be str")

    def _list(self, value: list[Any] | tuple[Any, ...], depth: int) -> list[Any]:
        plain: list[Any] = []
        try:
            for item in value:
                plain.append(self.convert(item, depth + 1))  # noqa: PERF401  (the length says where it failed)
        except _Unfit as unfit:
            unfit.trail.append(len(plain))
            raise
        return plain


def _text(value: str) -> str:
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Unfit(f"holds the lone surrogate U+{ord(value[error.start]):04X}, which is no text") from None
    return value


def copy_json(value: Any) -> Any:
    """A copy of a plain JSON value."""
    kind = type(value)
    if kind is dict:
        return {key: item if type(item) in _SCALARS else copy_json(item) for key, item in value.items()}
    if kind is list:
        return [item if type(item) in _SCALARS else copy_json(item) for item in value]
    return value


_SCALARS = frozenset((type(None), bool, int, float, str))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _stored(value: Any) -> Any:
    return to_json(value, "") if hasattr(type(value), "to_state") else value


def _equal(a: Any, b: Any, scalars: Callable[[Any, Any], bool]) -> bool:
    if type(a) not in _SCALARS:
        a = _stored(a)
    if type(b) not in _SCALARS:
        b = _stored(b)
    if isinstance(a, dict):
        if not isinstance(b, dict) or len(a) != len(b):
            return False
        return all(key in b and _equal(item, dict.__getitem__(b, key), scalars) for key, item in dict.items(a))
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(lambda x, y: _equal(x, y, scalars), a, b))
    return scalars(a, b)


def _same_scalar(a: Any, b: Any) -> bool:
    return type(a) is type(b) and bool(a == b)


def _test_scalar(a: Any, b: Any) -> bool:
    if _is_number(a):
        return _is_number(b) and bool(a == b)
    return type(a) is type(b) and bool(a == b)


def same(a: Any, b: Any) -> bool:
    """Equal as state: 1, True and 1.0 are three values; the order of keys does not matter.

    Objects with `to_state()` are what that returns.
    """
    return _equal(a, b, _same_scalar)


def json_equal(a: Any, b: Any) -> bool:
    """Equal as RFC 6902's `test` means it: numbers compare by value, and a bool is no number."""
    return _equal(a, b, _test_scalar)


def json_size(value: Any) -> int:
    """Bytes of the value's compact JSON."""
    return len(msgspec.json.encode(value))


# ---- patches ---------------------------------------------------------------------------------------------------------


class Change(NamedTuple):
    """One primitive change of one container: enough to undo it, to measure it and to say what it touched.

    `old` is MISSING for an insertion, `new` for a removal; `length` is the container's before.
    """

    tokens: tuple[str, ...]
    container: Any
    key: Any
    old: Any
    new: Any
    length: int

    @property
    def inserted(self) -> bool:
        return self.old is _MISSING

    @property
    def removed(self) -> bool:
        return self.new is _MISSING


def malformed(message: str) -> StateError:
    error = StateError(message, hint='a patch is a list of {"op": ..., "path": ..., "value" or "from": ...}, RFC 6902')
    error.status = 400
    return error


def _part(op: Any, name: str) -> tuple[str, ...]:
    pointer = op.get(name)
    if not isinstance(pointer, str):
        raise malformed(f"the operation {_short(op)} needs {name!r}, a JSON pointer")
    try:
        return parse_pointer(pointer)
    except StatePathError as error:
        raise malformed(f"{name} of the operation {_short(op)}: {error}") from None


def _check_form(op: Any) -> str:
    if not isinstance(op, dict):
        raise malformed(f"{_short(op)} is no operation")
    verb = op.get("op")
    if verb in ("add", "replace", "test"):
        if "value" not in op:
            raise malformed(f"the operation {_short(op)} needs a value")
    elif verb not in ("remove", "move", "copy"):
        raise malformed(f"{verb!r} is no operation: add, remove, replace, move, copy or test are")
    return str(verb)


def _check_list(ops: Any) -> Iterable[Any]:
    if isinstance(ops, str | bytes | dict) or not isinstance(ops, Iterable):
        raise malformed(f"{_short(ops)} is no list of operations")
    return ops


def _short(value: Any) -> str:
    """A value in a message: its first 80 characters."""
    try:
        text = msgspec.json.encode(value).decode()
    except (TypeError, ValueError, RecursionError):
        text = f"a {_type_name(type(value))}"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nothing_at(tokens: tuple[str, ...], depth: int, container: Any) -> StatePathError:
    parent = format_pointer(tokens[:depth]) or "the root"
    message = f"{format_pointer(tokens)} does not exist: "
    if isinstance(container, dict):
        names = ", ".join(map(repr, list(dict.keys(container))[:8])) or "nothing"
        more = ", ..." if len(container) > 8 else ""
        return StatePathError(f"{message}{parent} has no {tokens[depth]!r}", hint=f"it has {names}{more}")
    if isinstance(container, list):
        return StatePathError(f"{message}{parent} is a list of {len(container)}, without an element {tokens[depth]!r}")
    return StatePathError(f"{message}{parent} is {_short(container)}, which has no parts")


def _index(token: str, length: int) -> int | None:
    """The list index that a token names, below `length`; None if it names none."""
    if not (token.isascii() and token.isdigit()) or len(token) > 10 or (token[0] == "0" and len(token) > 1):
        return None
    index = int(token)
    return index if index < length else None


def _walk(doc: Any, tokens: tuple[str, ...], upto: int) -> Any:
    """The value that the first `upto` tokens lead to."""
    node = doc
    for depth in range(upto):
        found = _MISSING
        if isinstance(node, dict):
            # dict.get: a Counter answers [] for names that it does not have
            found = dict.get(node, tokens[depth], _MISSING)
        elif isinstance(node, list) and (index := _index(tokens[depth], len(node))) is not None:
            found = list.__getitem__(node, index)
        if found is _MISSING:
            raise _nothing_at(tokens, depth, node)
        node = found
    return node


def _put(doc: Any, tokens: tuple[str, ...], value: Any, changes: list[Change], *, replace: bool) -> bool:
    """Add or replace; False if that changes nothing. `value` becomes part of the document."""
    last = len(tokens) - 1
    container = _walk(doc, tokens, last)
    token = tokens[last]
    if isinstance(container, dict):
        old = dict.get(container, token, _MISSING)
        if old is _MISSING and replace:
            raise _nothing_at(tokens, last, container)
        if old is not _MISSING and same(old, value):
            return False
        changes.append(Change(tokens, container, token, old, value, len(container)))
        dict.__setitem__(container, token, value)
        return True
    if not isinstance(container, list):
        raise _nothing_at(tokens, last, container)
    length = len(container)
    if replace:
        index = _index(token, length)
        if index is None:
            raise _nothing_at(tokens, last, container)
        old = list.__getitem__(container, index)
        if same(old, value):
            return False
        changes.append(Change(tokens, container, index, old, value, length))
        list.__setitem__(container, index, value)
        return True
    index = length if token == "-" else _index(token, length + 1)
    if index is None:
        raise _nothing_at(tokens, last, container)
    changes.append(Change((*tokens[:last], str(index)), container, index, _MISSING, value, length))
    list.insert(container, index, value)
    return True


def _remove(doc: Any, tokens: tuple[str, ...], changes: list[Change]) -> Any:
    last = len(tokens) - 1
    container = _walk(doc, tokens, last)
    value = _walk(doc, tokens, len(tokens))
    key: Any = tokens[last] if isinstance(container, dict) else int(tokens[last])
    changes.append(Change(tokens, container, key, value, _MISSING, len(container)))
    if isinstance(container, dict):
        dict.__delitem__(container, key)
    else:
        list.__delitem__(container, key)
    return value


def execute(doc: Any, op: Op, changes: list[Change], make: Callable[[Any], Any] = copy_json) -> bool:
    """Carry out one operation on a dict or list (or a subclass, past its overridden methods), noting what changed.

    `make` turns a value of the patch into one that may become part of the document. Returns False if nothing changed.
    """
    verb = _check_form(op)
    tokens = _part(op, "path")
    if verb == "test":
        found = _walk(doc, tokens, len(tokens))
        if not json_equal(found, op["value"]):
            raise StateTestFailed(f"{op['path'] or 'the root'} is {_short(found)}, not {_short(op['value'])}")
        return False
    if not tokens:
        raise StateForbidden("the root itself cannot be written", hint="name a part of it, e.g. /vars/name")
    if verb in ("add", "replace"):
        return _put(doc, tokens, make(op["value"]), changes, replace=verb == "replace")
    if verb == "remove":
        _remove(doc, tokens, changes)
        return True
    source = _part(op, "from")
    if not source:
        raise StateForbidden(f"the root itself cannot be the source of a {verb}", hint="name a part of it")
    if verb == "copy":
        return _put(doc, tokens, make(_walk(doc, source, len(source))), changes, replace=False)
    if tokens == source:
        _walk(doc, source, len(source))
        return False
    if tokens[: len(source)] == source:
        raise malformed(f"{op['from']} cannot be moved into itself ({op['path']})")
    return _put(doc, tokens, _remove(doc, source, changes), changes, replace=False) or True


def undo(changes: list[Change]) -> None:
    """Take back what `execute` noted, newest first."""
    for change in reversed(changes):
        container, key = change.container, change.key
        if isinstance(container, dict):
            if change.inserted:
                dict.__delitem__(container, key)
            else:
                dict.__setitem__(container, key, change.old)
        elif change.inserted:
            list.__delitem__(container, key)
        elif change.removed:
            list.insert(container, key, change.old)
        else:
            list.__setitem__(container, key, change.old)
    changes.clear()


def apply_ops(doc: Any, ops: Iterable[Op]) -> None:
    """Apply a patch to a plain dict or list in place: all of it or nothing.

    Raises:
        StatePathError: a missing path.
        StateTestFailed: a failing `test`.
        StateError: a malformed operation (status 400).
    """
    changes: list[Change] = []
    try:
        for op in _check_list(ops):
            execute(doc, op, changes)
    except BaseException:
        undo(changes)
        raise


# ---- the tree --------------------------------------------------------------------------------------------------------


class Snapshot(NamedTuple):
    """A state that later changes do not touch: JSON bytes."""

    rev: int
    state: Any
    revs: Any = None


class _Node:
    """What is known of one touched path.

    `rev`: last change at it or below. `base`: when it was last set as a whole, which speaks for everything below that
    has no node. `size`: bytes of JSON, kept for attributes only.
    """

    __slots__ = ("base", "children", "rev", "size")

    def __init__(self, rev: int, base: int) -> None:
        self.rev = rev
        self.base = base
        self.children: dict[str, _Node] | None = None
        self.size: int | None = None

    def dump(self) -> Any:
        if not self.children:
            return self.rev if self.rev == self.base else [self.rev, self.base]
        return [self.rev, self.base, {token: child.dump() for token, child in self.children.items()}]

    @classmethod
    def load(cls, data: Any) -> _Node:
        if isinstance(data, int):
            return cls(data, data)
        node = cls(data[0], data[1])
        if len(data) > 2:
            node.children = {token: cls.load(child) for token, child in data[2].items()}
        return node


def _human(size: int) -> str:
    if size < 1024:
        return f"{size} bytes"
    return f"{size / 1024 / 1024:.1f} MiB" if size >= 1024 * 1024 else f"{size / 1024:.1f} KiB"


class StateTree:
    """The state of one run and the revision of each part of it. Not thread-safe: one sequencer applies everything.

    Args:
        root: the tree; owned by this object from now on.
        rev: its revision.
        max_value, max_tree: limits in bytes of compact JSON.
        revs: revisions of the parts, from `snapshot().revs`; without it every part dates from `rev`.
    """

    def __init__(
        self,
        root: dict[str, Any],
        rev: int = 0,
        max_value: int = MAX_VALUE,
        max_tree: int = MAX_TREE,
        *,
        revs: Any = None,
    ) -> None:
        self.root = root
        self.rev = rev
        self.max_value = max_value
        self.max_tree = max_tree
        self.size = json_size(root)
        """Bytes of the whole tree's compact JSON."""
        self._top = _Node(rev, rev) if revs is None else _Node.load(revs)

    # -- reading

    def get(self, pointer: str) -> Any:
        """The live value: do not change it. Raises StatePathError."""
        tokens = parse_pointer(pointer)
        return _walk(self.root, tokens, len(tokens))

    def value_rev(self, pointer: str) -> int:
        """The revision at which the value, or anything under it, last changed. Raises StatePathError.

        Insertions and removals within a list move its elements: they then all date from that revision.
        """
        tokens = parse_pointer(pointer)
        _walk(self.root, tokens, len(tokens))
        if not tokens:
            return self.rev
        node = self._top
        for token in tokens:
            child = node.children.get(token) if node.children else None
            if child is None:
                return node.base
            node = child
        return node.rev

    def snapshot(self) -> Snapshot:
        """The state of this moment, encoded: costs as much as the state is large."""
        encode = msgspec.json.encode
        return Snapshot(self.rev, msgspec.Raw(encode(self.root)), msgspec.Raw(encode(self._top.dump())))

    def check_limits(self) -> None:
        """Measure everything. Raises StateTooLarge naming the first attribute that is too large, or the tree."""
        for pointer, value in _attributes(self.root, ()):
            self._check_value(pointer, json_size(value))
        self._check_tree(self.size)

    # -- writing

    def allowed(self, tokens: Iterable[str]) -> Target:
        """Where a user's write to this path goes. Raises StateForbidden outside `vars`, StatePathError for an unknown
        component, StateTypeError for a name that is not declared."""
        path = tuple(tokens)
        target = split_pointer(path)
        if target is None:
            raise StateForbidden(
                f"{format_pointer(path) or 'the root'} cannot be written: only values below a component's vars can",
                hint="e.g. /vars/name, /flows/<flow>/vars/name or /works/<work>/vars/name",
            )
        above = (*target.component, "vars")
        declared = _walk(self.root, above, len(above))
        if target.attr not in declared:
            names = ", ".join(list(declared)[:20]) or "nothing"
            raise StateTypeError(
                f"{format_pointer((*above, target.attr))} is not declared: attributes are declared in __init__",
                hint=f"declared there: {names}",
            )
        return target

    def apply(self, ops: Iterable[Op], rev: int, *, guard: bool) -> list[Op]:
        """Apply a patch as revision `rev`: all of it or nothing.

        Args:
            ops: the patch; it is not changed, and the tree keeps no part of it.
            rev: greater than `self.rev`, or equal to it to add to the revision just made.
            guard: a user's write: paths must lie below a component's `vars` (see `allowed`), values must be JSON state.

        Returns:
            What changed the tree: the patch without `test` operations and without operations that change nothing. If
            that is empty there is no new revision: `self.rev` stays.

        Raises:
            StateForbidden, StatePathError, StateTypeError, StateTestFailed, StateTooLarge; StateError with status 400
            for a malformed operation.
        """
        changes: list[Change] = []
        done: list[Op] = []
        ledger = _Ledger(self)
        try:
            for op in _check_list(ops):
                admitted = self._admit(op) if guard else op
                first = len(changes)
                if execute(self.root, admitted, changes):
                    done.append(admitted)
                for change in changes[first:]:
                    ledger.enter(change)
                ledger.check(slack=2)
            ledger.check(slack=1)
        except BaseException:
            undo(changes)
            raise
        if done:
            self._settle(changes, ledger, rev)
        return done

    def replay(self, ops: Iterable[Op], rev: int) -> None:
        """Apply a revision that was accepted before: no limits, and `self.rev` follows whatever it changes."""
        changes: list[Change] = []
        ledger = _Ledger(self)
        for op in ops:
            first = len(changes)
            execute(self.root, op, changes)
            for change in changes[first:]:
                ledger.enter(change)
        self._settle(changes, ledger, rev)

    def _settle(self, changes: list[Change], ledger: _Ledger, rev: int) -> None:
        for change in changes:
            self._touch(change, rev)
        self.size += ledger.delta
        for target, size in ledger.sizes.items():
            node = self._find((*target.component, "vars", target.attr))
            if node is not None:
                node.size = size
        self.rev = rev

    def _admit(self, op: Op) -> Op:
        """Check one operation of a user. Returns it with a plain value."""
        verb = _check_form(op)
        tokens = _part(op, "path")
        if verb == "test":
            return op
        target = self.allowed(tokens)
        if not target.rest and verb not in ("add", "replace"):
            raise StateForbidden(
                f"{op['path']}: {verb} is not possible for a declared attribute, only replace is",
                hint="attributes stay what __init__ declared",
            )
        if verb in ("add", "replace"):
            return {"op": verb, "path": op["path"], "value": normalise(op["value"], op["path"], len(target.rest))}
        if verb == "remove":
            return {"op": verb, "path": op["path"]}
        source = self.allowed(_part(op, "from"))
        if source[:2] != target[:2]:
            raise StateForbidden(f"{verb} from {op['from']} to {op['path']}: both must lie in one attribute")
        if not source.rest and verb == "move":
            raise StateForbidden(f"{op['from']} is a declared attribute: it cannot be moved away")
        # the value may come to lie deeper than it did
        normalise(self.get(op["from"]), op["path"], len(target.rest))
        return {"op": verb, "path": op["path"], "from": op["from"]}

    def _check_value(self, pointer: str, size: int, slack: int = 1) -> None:
        if size > self.max_value * slack:
            raise StateTooLarge(
                f"{pointer} would take {_human(size)}: one attribute may take {_human(self.max_value)}",
                hint="put large data into the Drive and its path into the state",
            )

    def _check_tree(self, size: int, slack: int = 1, pointer: str = "") -> None:
        if size > self.max_tree * slack:
            of = f"with {pointer} " if pointer else ""
            raise StateTooLarge(
                f"{of}the state would take {_human(size)}: the whole tree may take {_human(self.max_tree)}",
                hint="put large data into the Drive and its path into the state",
            )

    # -- revisions

    def _find(self, tokens: tuple[str, ...]) -> _Node | None:
        node: _Node | None = self._top
        for token in tokens:
            if node is None or node.children is None:
                return None
            node = node.children.get(token)
        return node

    def _touch(self, change: Change, rev: int) -> None:
        node = self._top
        node.rev = rev
        for token in change.tokens[:-1]:
            if node.children is None:
                node.children = {}
            child = node.children.get(token)
            if child is None:
                child = node.children[token] = _Node(rev, node.base)
            child.rev = rev
            node = child
        last = change.tokens[-1]
        moved = isinstance(change.container, list) and (
            (change.inserted and change.key < change.length) or (change.removed and change.key < change.length - 1)
        )
        if moved:
            node.children, node.base = None, rev
        elif change.removed:
            if node.children:
                node.children.pop(last, None)
        else:
            if node.children is None:
                node.children = {}
            node.children[last] = _Node(rev, rev)


class _Ledger:
    """How a patch in progress changes sizes."""

    def __init__(self, tree: StateTree) -> None:
        self.tree = tree
        self.delta = 0
        self.sizes: dict[Target, int] = {}
        """New size of each touched attribute (by its Target without rest)."""
        self.grown: dict[Target, int] = {}
        self.added: dict[str, int] = {}
        """Sizes of the attributes of components that were added."""
        self.pointer = ""
        self.replaced: list[tuple[str, ...]] = []
        """Paths above attributes that were set: sizes known from before do not hold below them."""

    def enter(self, change: Change) -> None:
        delta = 0
        if not change.removed:
            new = json_size(change.new)
            delta += new
        if not change.inserted:
            delta -= json_size(change.old)
        if change.inserted or change.removed:
            around = json_size(change.key) + 1 if isinstance(change.container, dict) else 0
            others = change.length if change.inserted else change.length - 1
            around += 1 if others else 0
            delta += around if change.inserted else -around
        self.delta += delta
        target = split_pointer(change.tokens)
        if target is None:
            path = change.tokens
            self.replaced.append(path)
            self.sizes = {at: size for at, size in self.sizes.items() if at.component[: len(path)] != path}
            # a component comes or goes, or the engine writes its own part of the tree
            if isinstance(change.new, dict) and delta > 0:
                for pointer, value in _attributes(change.new, change.tokens):
                    self.added[pointer] = json_size(value)
                    self.pointer = pointer
            return
        attr = target._replace(rest=())
        self.pointer = format_pointer((*target.component, "vars", target.attr))
        self.grown[attr] = self.grown.get(attr, 0) + delta
        if not target.rest:
            self.sizes[attr] = 0 if change.removed else new
            return
        known = self.sizes.get(attr)
        if known is None and not any(target.component[: len(path)] == path for path in self.replaced):
            node = self.tree._find((*target.component, "vars", target.attr))
            known = node.size if node is not None else None
        # measured once, after the change; from then on only differences are
        self.sizes[attr] = json_size(self.tree.get(self.pointer)) if known is None else known + delta

    def check(self, slack: int) -> None:
        for pointer, size in self.added.items():
            self.tree._check_value(pointer, size, slack)
        for target, size in self.sizes.items():
            if self.grown[target] > 0 and size > self.tree.max_value * slack:
                self.tree._check_value(format_pointer((*target.component, "vars", target.attr)), size, slack)
        if self.delta > 0 and self.pointer:
            self.tree._check_tree(self.tree.size + self.delta, slack, self.pointer)


def _is_dict(value: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict)


def _attributes(component: dict[str, Any], tokens: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    """(pointer, value) of each attribute of the component at `tokens` and of those below it."""
    values = component.get("vars")
    if _is_dict(values):
        for name, value in values.items():
            yield format_pointer((*tokens, "vars", name)), value
    for kind in ("flows", "works"):
        children = component.get(kind)
        if _is_dict(children):
            for name, child in children.items():
                if _is_dict(child):
                    yield from _attributes(child, (*tokens, kind, name))
    structures = component.get("structures")
    if _is_dict(structures):
        for name, structure in structures.items():
            if _is_dict(structure):
                yield from _attributes(structure, (*tokens, "structures", name))
