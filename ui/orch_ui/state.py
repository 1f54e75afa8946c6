"""AppState: the live tree as attributes, for one run of a page's script.

The page's process finds its app in the environment: ORCH_FLOW_URL, ORCH_FLOW_TOKEN, ORCH_FLOW_SCOPE (short name of the
flow whose page it is, "" for the root). A run reads one snapshot, taken at its first read, plus what it wrote itself.
Every write is one request, made when the assignment is executed.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any
from urllib.parse import quote

import httpx
import msgspec

from orch import errors
from orch.errors import OrchError, StateConflict
from orch.state import apply_ops, copy_json, format_pointer, parse_pointer, to_json
from orch.tracked import Vars
from orch.wire import Op
from orch.work import Status

__all__ = ["AppServer", "AppState", "ScriptRun", "Structure", "WorkState", "current_run"]

Tokens = tuple[str, ...]
LOGS = "#logs"
"""Stands for a work's log in the set of what a run has read."""
TAIL = 20
"""Lines of `last_lines`."""
PROBLEMS: dict[str, type[OrchError]] = {
    name: getattr(errors, name)
    for name in ("StateForbidden", "StateTooLarge", "StateTypeError", "StateError", "NotFound")
}


class AppServer:
    """The flow server's REST API, as far as a page needs it. Safe to share between threads.

    Raises AttributeError "is the app running?" where there is no server: what pages know how to show.
    """

    def __init__(self, url: str, token: str, scope: str = "") -> None:
        self.url = url.rstrip("/")
        self.token = token
        self.scope = scope
        self._http = httpx.Client(
            base_url=f"{self.url}/api/v1",
            headers={"Authorization": f"Bearer {token}", "X-Orch-Cause": "ui"},
            timeout=httpx.Timeout(10.0, connect=2.0),
            trust_env=False,
        )
        self._base: Tokens | None = None

    @classmethod
    def from_environment(cls) -> AppServer:
        """The app that started this process."""
        url = os.environ.get("ORCH_FLOW_URL")
        if not url:
            raise AttributeError("no app started this page (ORCH_FLOW_URL is not set): is the app running?")
        with _servers_lock:
            key = (url, os.environ.get("ORCH_FLOW_TOKEN", ""), os.environ.get("ORCH_FLOW_SCOPE", ""))
            if key not in _servers:
                _servers[key] = cls(*key)
            return _servers[key]

    def close(self) -> None:
        """Give the connections back; the next `from_environment` makes another one."""
        with _servers_lock:
            for key in [key for key, server in _servers.items() if server is self]:
                del _servers[key]
        self._http.close()

    def base(self) -> Tokens:
        """Where the scope's node is in the tree."""
        if self._base is None:
            tree, _ = self.read(()) if self.scope else ({}, 0)
            self._base = _locate(tree, self.scope)
        return self._base

    def read(self, tokens: Tokens) -> tuple[Any, int]:
        """(value, revision at which it last changed)."""
        response = self._request("GET", _state_url(tokens))
        return msgspec.json.decode(response.content), int(response.headers["etag"].strip('"'))

    def unchanged(self, tokens: Tokens, rev: int) -> bool:
        """Whether the value is still the one of that revision."""
        return self._request("GET", _state_url(tokens), headers={"If-None-Match": f'"{rev}"'}).status_code == 304

    def patch(self, ops: list[Op]) -> int:
        """Apply all or nothing; the revision once it is journalled. Raises StateConflict, StateError."""
        response = self._request(
            "PATCH",
            "/state",
            content=msgspec.json.encode(ops),
            headers={"Content-Type": "application/json-patch+json"},
        )
        return int(msgspec.json.decode(response.content)["rev"])

    def last_lines(self, work: str) -> list[str]:
        """The tail of a work's log."""
        return self._request("GET", f"/works/{quote(work)}/logs", params={"tail": TAIL}).text.splitlines()

    def stream(self, kinds: str, after: int | None) -> Any:
        """Context manager of a streamed response of server-sent events; silence for a minute is an error."""
        params: dict[str, Any] = {"kinds": kinds} | ({} if after is None else {"after": after})
        return self._http.stream("GET", "/events", params=params, timeout=httpx.Timeout(60.0, connect=2.0))

    def _request(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise AttributeError(f"the app at {self.url} does not answer ({error}): is the app running?") from error
        if response.is_success or response.status_code == 304:
            return response
        raise _problem(response)


_servers: dict[tuple[str, str, str], AppServer] = {}
_servers_lock = threading.Lock()


def _state_url(tokens: Tokens) -> str:
    return "/state" + quote(format_pointer(tokens))


def _problem(response: httpx.Response) -> Exception:
    """What an answer that is no success means to a page."""
    try:
        problem = msgspec.json.decode(response.content)
        detail, hint, kind = str(problem["detail"]), str(problem.get("hint", "")), str(problem.get("type", ""))
    except (msgspec.DecodeError, KeyError, TypeError):
        detail, hint, kind = f"the app answered {response.status_code}", "", ""
    if response.status_code == 401:
        return AttributeError("the app does not know this page any more (its token changed): is the app running?")
    if response.status_code == 409:
        return StateConflict(f"changed elsewhere, please repeat ({detail})")
    name = "".join(part.capitalize() for part in kind.rpartition(":")[2].split("-"))
    error: type[OrchError] = PROBLEMS.get(name, OrchError)
    return error(detail, hint=hint)


def _locate(tree: dict[str, Any], scope: str) -> Tokens:
    """Tokens of a component's node by its short name ("", "ui", "ui.trainer", "models.0")."""
    tokens: list[str] = []
    node: Any = tree
    parts = scope.split(".") if scope else []
    while parts:
        name = parts.pop(0)
        if name in node.get("flows", {}):
            step = ["flows", name]
        elif name in node.get("structures", {}) and parts:
            step = ["structures", name, "flows", parts.pop(0)]
        else:
            raise AttributeError(f"the app has no flow {scope!r} (any more)")
        for token in step:
            node = node[token]
        tokens += step
    return tuple(tokens)


# ---- one run of a page's script --------------------------------------------------------------------------------------


class ScriptRun:
    """One run of a script: its snapshot, what it has read, the revisions that it made itself."""

    def __init__(self, server: AppServer | None = None) -> None:
        self._server = server
        self.reads: set[Tokens] = set()
        self.log_reads: set[str] = set()
        self.own: set[int] = set()
        self.automatic = False
        """Nobody clicked: the script runs because something changed."""
        self.rev: int | None = None
        """Every change of the scope up to this revision is in the snapshot; None before the first read."""
        self._tree: Any = None
        self._vars: dict[Tokens, Vars] = {}
        self._writing = _Writing(self)

    @property
    def server(self) -> AppServer:
        if self._server is None:
            self._server = AppServer.from_environment()
        return self._server

    def node(self, at: Tokens) -> dict[str, Any]:
        """A component's node, by tokens relative to the scope. Raises AttributeError once it has gone."""
        if self._tree is None:
            self._tree, self.rev = self.server.read(self.server.base())
            self._tree = {"vars": {}, **self._tree}
        node = self._tree
        for token in at:
            if token not in node:
                raise AttributeError(f"{_name(at) or 'the app'} is gone")
            node = node[token]
        return dict(node)

    def note(self, *tokens: str) -> None:
        """This was read: a change of it, or of something in it, makes the page run again."""
        self.reads.add((*self.server.base(), *tokens))

    def get(self, at: Tokens, name: str) -> Any:
        """A state variable; containers come back tracked."""
        self.note(*at, "vars", name)
        return self._vars_of(at).get(name)

    def set(self, at: Tokens, name: str, value: Any) -> None:
        """Assign at once. Raises StateTypeError, StateConflict, StateTooLarge."""
        path = (*at, "vars", name)
        if isinstance(value, list | dict) and value is self._vars_of(at).get(name):
            return  # `state.rows += [1]` puts the same list back
        new = to_json(value, ".".join(filter(None, (_name(at), name))))
        ops: list[Op] = [{"op": "replace", "path": self._absolute(path), "value": new}]
        if (*self.server.base(), *path) in self.reads:
            old = self._look(path)
            ops.insert(0, {"op": "test", "path": self._absolute(path), "value": old})
        self._send(ops)
        change: Op = {"op": "replace", "path": format_pointer((name,)), "value": new}
        apply_ops(self._look((*at, "vars")), [copy_json(change)])
        self._vars_of(at).apply([change], in_place=False)

    def affected(self, rev: int, paths: list[Tokens]) -> bool:
        """Whether a revision changed something that this run has read.

        What a run wrote itself counts as well, it may have shown the old value before; unless it was such a change that
        brought about the run: a page that writes whenever it runs would run for ever.
        """
        if self.rev is None or rev <= self.rev or (self.automatic and rev in self.own):
            return False
        return any(
            path[: len(read)] == read or read[: len(path)] == path for path in paths for read in tuple(self.reads)
        )

    # -- inside
    def _vars_of(self, at: Tokens) -> Vars:
        found = self._vars.get(at)
        if found is None:
            found = Vars(lambda op: self._writing.add(at, op), where=_name(at), lock=self._writing)
            found.load(self.node(at)["vars"])
            self._vars[at] = found
        return found

    def _absolute(self, tokens: Tokens) -> str:
        return format_pointer((*self.server.base(), *tokens))

    def _look(self, tokens: Tokens) -> Any:
        self.node(())
        return _find(self._tree, tokens)

    def _send(self, ops: list[Op]) -> None:
        try:
            self.own.add(self.server.patch(ops))
        except BaseException:
            self._forget()
            raise

    def _forget(self) -> None:
        """The snapshot has proved stale: the next read takes another one. `rev` stays: what came since then counts."""
        self._tree = None
        self._vars = {}

    def _mutated(self, at: Tokens, ops: list[Op]) -> None:
        """In-place mutations, already done here: send them, each with a test of what it replaces or pushes aside."""
        vars_ = self._look((*at, "vars"))
        sent: list[Op] = []
        for op in ops:
            tokens = parse_pointer(op["path"])
            path = self._absolute((*at, "vars", *tokens))
            old = _find(vars_, tokens)
            # An append needs no test, unless the way to its list leads through a place in another list: that may by now
            # be somebody else's.
            place = tokens if old is not _NOTHING else _outer_place(vars_, tokens)
            if place:
                test = {"op": "test", "path": self._absolute((*at, "vars", *place))}
                sent.append({**test, "value": copy_json(_find(vars_, place))})
            sent.append({**op, "path": path})
            apply_ops(vars_, [copy_json(op)])
        self._send(sent)


class _Writing:
    """Held by Vars around each mutation; what one mutation reports (`extend`) becomes one request when it is over."""

    def __init__(self, run: ScriptRun) -> None:
        self._run = run
        self._lock = threading.RLock()
        self._depth = 0
        self._ops: list[tuple[Tokens, Op]] = []

    def add(self, at: Tokens, op: Op) -> None:
        self._ops.append((at, op))

    def __enter__(self) -> None:
        self._lock.acquire()
        self._depth += 1

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        try:
            self._depth -= 1
            if self._depth:
                return
            ops, self._ops = self._ops, []
            if ops and error is not None:
                self._run._forget()
            elif ops:
                self._run._mutated(ops[0][0], [op for _, op in ops])
        finally:
            self._lock.release()


_NOTHING: Any = object()


def _find(tree: Any, tokens: Tokens) -> Any:
    """The value there, _NOTHING if there is none."""
    for token in tokens:
        if isinstance(tree, list):
            if not token.isdecimal() or int(token) >= len(tree):
                return _NOTHING
            tree = tree[int(token)]
        elif not isinstance(tree, dict) or token not in tree:
            return _NOTHING
        else:
            tree = tree[token]
    return tree


def _outer_place(tree: Any, tokens: Tokens) -> Tokens:
    """The innermost element of a list on the way to a value, () if there is none."""
    for end in range(len(tokens) - 1, 0, -1):
        if isinstance(_find(tree, tokens[: end - 1]), list):
            return tokens[:end]
    return ()


def _name(at: Tokens) -> str:
    """Short name of a component, relative to the scope, from its tokens."""
    names: list[str] = []
    rest = list(at)
    while rest:
        step = 4 if rest[0] == "structures" else 2
        names += rest[1:step:2]
        rest = rest[step:]
    return ".".join(names)


current_run: ContextVar[ScriptRun | None] = ContextVar("current_run", default=None)
"""Set by the page's entry around one run of the script, so that every AppState in it shares a snapshot."""


# ---- what pages see --------------------------------------------------------------------------------------------------


class AppState:
    """A flow's attributes, live: `state.rows`, `state.train_start = True`, `state.rows.append(1)`, `state.child.x`.

    `AppState()` is the flow whose page this is. Writing over a child or to a name that the flow has not declared is an
    AttributeError. An assignment to a value that this run has read raises StateConflict if it was changed elsewhere
    meanwhile; appending to a list never does.
    """

    __slots__ = ("_at", "_run")
    _at: Tokens
    _run: ScriptRun

    def __init__(self) -> None:
        object.__setattr__(self, "_run", current_run.get() or ScriptRun())
        object.__setattr__(self, "_at", ())

    @classmethod
    def _of(cls, run: ScriptRun, at: Tokens) -> AppState:
        state = cls.__new__(cls)
        object.__setattr__(state, "_run", run)
        object.__setattr__(state, "_at", at)
        return state

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        node = self._run.node(self._at)
        if name in node["vars"]:
            return self._run.get(self._at, name)
        if name in node.get("structures", {}):
            return Structure(self._run, (*self._at, "structures", name))
        for kind in ("flows", "works"):
            if name in node.get(kind, {}):
                return _component(self._run, (*self._at, kind, name))
        raise AttributeError(f"{self!r} has no attribute {name!r}; it has {', '.join(dir(self)) or 'none'}")

    def __setattr__(self, name: str, value: Any) -> None:
        node = self._run.node(self._at)
        if name in node["vars"]:
            self._run.set(self._at, name, value)
            return
        if any(name in node.get(kind, {}) for kind in ("flows", "works", "structures")):
            raise AttributeError(f"{self!r}.{name} is a child: it cannot be written over")
        raise AttributeError(f"{self!r} has no state variable {name!r}: declare it in the flow's __init__")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self!r}.{name} cannot be deleted")

    def __dir__(self) -> list[str]:
        node = self._run.node(self._at)
        return [*node["vars"], *node.get("flows", {}), *node.get("works", {}), *node.get("structures", {})]

    def __repr__(self) -> str:
        return f"<AppState {_name(self._at) or 'of the page'}>"


class Structure:
    """A List or Dict of components, in its order; a List is read by position, a Dict by key."""

    def __init__(self, run: ScriptRun, at: Tokens) -> None:
        self._run = run
        self._at = at

    def _order(self) -> list[str]:
        self._run.note(*self._at, "order")
        return list(self._run.node(self._at)["order"])

    def _member(self, key: str) -> Any:
        node = self._run.node(self._at)
        for kind in ("flows", "works"):
            if key in node[kind]:
                return _component(self._run, (*self._at, kind, key))
        raise KeyError(key)

    def __getitem__(self, key: int | str) -> Any:
        return self._member(self._order()[key] if isinstance(key, int) else key)

    def __len__(self) -> int:
        return len(self._order())

    def __iter__(self) -> Iterator[Any]:
        """Members of a List, keys of a Dict."""
        order = self._order()
        return iter([self._member(key) for key in order] if all(key.isdecimal() for key in order) else order)

    def keys(self) -> list[str]:
        return self._order()

    def values(self) -> list[Any]:
        return [self._member(key) for key in self._order()]

    def items(self) -> list[tuple[str, Any]]:
        return [(key, self._member(key)) for key in self._order()]

    def __repr__(self) -> str:
        return f"<Structure {_name(self._at)}>"


class WorkState:
    """A Work, read-only: its vars, and what a flow reads of it (`is_running`, `progress`, `url`, ...)."""

    __slots__ = ("_at", "_run")
    _at: Tokens
    _run: ScriptRun

    def __init__(self, run: ScriptRun, at: Tokens) -> None:
        object.__setattr__(self, "_run", run)
        object.__setattr__(self, "_at", at)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        node = self._run.node(self._at)
        if name in node["vars"]:
            self._run.note(*self._at, "vars", name)
            return copy_json(node["vars"][name])
        status = node.get("status", {})
        if name in _FIELDS:
            self._run.note(*self._at, "status", name)
            return copy_json(status.get(name, _FIELDS[name]))
        if name in _STAGES:
            self._run.note(*self._at, "status", "stage")
            return status.get("stage") == _STAGES[name]
        match name:
            case "status":
                for field in ("stage", "reason", "message", "since"):
                    self._run.note(*self._at, "status", field)
                picture = {field: status.get(field) for field in ("stage", "reason", "since")}
                picture["stage"] = picture["stage"] or "not_started"
                return msgspec.convert({**picture, "message": status.get("message") or ""}, Status)
            case "has_timeout":
                self._run.note(*self._at, "status", "reason")
                return status.get("reason") == "timeout"
            case "has_started":
                self._run.note(*self._at, "calls")
                return any(call.get("attempt", 0) > 0 for call in node.get("calls", {}).values())
            case "last_lines":
                self._run.log_reads.add(self._short())
                return self._run.server.last_lines(self._short())
            case "name":
                return f"root.{self._short()}"
        raise AttributeError(f"{self!r} has no attribute {name!r}; it has {', '.join(dir(self))}")

    def _short(self) -> str:
        return _name((*self._run.server.base(), *self._at))

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"{self!r}.{name} is read-only here: let the flow write it")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{self!r}.{name} cannot be deleted")

    def __dir__(self) -> list[str]:
        more = ["has_started", "has_timeout", "last_lines", "name", "status"]
        return [*self._run.node(self._at)["vars"], *_FIELDS, *_STAGES, *more]

    def __repr__(self) -> str:
        return f"<WorkState {_name(self._at)}>"


_FIELDS: dict[str, Any] = {
    "exit_code": None,
    "files": [],
    "host": "",
    "is_ready": False,
    "metrics": {},
    "num_successes": 0,
    "num_timeouts": 0,
    "port": None,
    "progress": None,
    "url": "",
}
"""Fields of a work's status in the tree that are attributes of the same name."""
_STAGES = {
    "has_failed": "failed",
    "has_stopped": "stopped",
    "has_succeeded": "succeeded",
    "is_pending": "pending",
    "is_running": "running",
}


def _component(run: ScriptRun, at: Tokens) -> AppState | WorkState:
    return WorkState(run, at) if at[-2] == "works" else AppState._of(run, at)
