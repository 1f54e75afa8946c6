"""Work: one unit of work in a process of its own. In the flow's process it is a remote control; in its own it runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from orch.calls import BookView, Call, Reason, Stage
from orch.component import Component, reserved_names
from orch.compute import BuildConfig, CloudCompute
from orch.errors import CallError, StateTypeError
from orch.wire import ComponentRecord
from orch_drive.drive import APP_DRIVE, drives_in

if TYPE_CHECKING:
    from orch.program import Pass

__all__ = ["Status", "Work", "WorkSpec", "WorkView"]


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """Where a Work stands: of the current call, else of the latest one. `since` is seconds since the epoch."""

    stage: Stage = Stage.NOT_STARTED
    reason: Reason | None = None
    message: str = ""
    since: float | None = None


class WorkView(msgspec.Struct, frozen=True, kw_only=True):
    """What a pass sees of a Work: one immutable picture, taken when the pass starts."""

    status: Status = Status()
    book: BookView = BookView()
    host: str = ""
    port: int | None = None
    url: str = ""
    ready: bool = False
    exit_code: int | None = None
    progress: float | None = None
    metrics: Mapping[str, Any] = msgspec.field(default_factory=dict)
    files: tuple[Mapping[str, Any], ...] = ()
    num_successes: int = 0
    num_timeouts: int = 0


class WorkSpec(msgspec.Struct, frozen=True, kw_only=True):
    """A Work's declaration as plain data: all that the engine and the agents need to know of it."""

    name: str
    pointer: str
    kind: str
    """"python", "script" or "service"."""
    record: ComponentRecord
    parallel: bool = False
    cache_calls: bool = True
    raise_exception: bool = True
    start_with_flow: bool = False
    host: str | None = None
    port: int | None = None
    compute: dict[str, Any] = msgspec.field(default_factory=dict)
    build: dict[str, Any] = msgspec.field(default_factory=dict)
    timeout: float | None = None
    retries: int = 0
    retry_delay: float = 1.0
    grace: float = 10.0
    when_busy: str = "queue"
    on_lost: str = "wait"
    lost_after: float = 300.0
    env: dict[str, str] = msgspec.field(default_factory=dict)
    health: str | None = None
    display_name: str | None = None
    command: list[str] | str = ""
    script_args: list[str] = msgspec.field(default_factory=list)
    shell: bool = False
    cwd: str | None = None
    inputs: list[str] = msgspec.field(default_factory=list)
    outputs: list[str] = msgspec.field(default_factory=list)
    reload: list[str] = msgspec.field(default_factory=list)
    drive: dict[str, Any] | None = None
    sync_interval: float = 2.0
    prefix: str = "strip"
    restart: str = "never"
    used: int = 0
    """Numbers that an earlier work of this name has given its calls."""
    hidden: bool = False
    """A page's own server (Streamlit): supervised like a service, not part of the tree."""

    def drives(self, values: Any) -> list[str]:
        """Ids of the Drives that it may write to, as far as it is declared; `values`: its vars."""
        if self.kind == "python":
            return sorted(drives_in([values, self.record.args, self.record.kwargs]))
        return sorted(drives_in(self.drive) or {APP_DRIVE}) if self.outputs else []


def number(owner: str, name: str, value: Any, *, least: float = 0.0) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or not value >= least):
        raise StateTypeError(f"{owner}({name}={value!r}): a number of at least {least:g} is needed")
    return value


def one_of(owner: str, name: str, value: Any, *choices: str) -> Any:
    if value not in choices:
        raise StateTypeError(f"{owner}({name}={value!r}): one of {', '.join(map(repr, choices))} is needed")
    return value


class Work(Component):
    """Subclass it and override `run(self, *args, **kwargs)`: that executes in a process of the work's own.

    In the flow, `work.run(...)` only records the wish and returns a `Call`. State variables are live both ways: what
    the running code assigns reaches the flow at once, what the flow assigns reaches the running code within 100 ms.

    Args:
        parallel: `run()` returns at once (default: it ends the pass until the call has finished).
        cache_calls: arguments that finished are not run again in this run.
        raise_exception: a failed call fails the app.
        start_with_flow: place the machine and environment at app start.
        host, port: address to listen on; default: given when placed.
        timeout: seconds an attempt may take. retries, retry_delay: attempts after a failure, seconds before each.
        grace: seconds between TERM and KILL.
        when_busy: "queue" other arguments behind the running call, or "replace" it.
        on_lost, lost_after: what to do after `lost_after` seconds without contact: "wait", "restart" or "fail".
        env: environment. health: path that answers below 500 once the server on `port` is ready.
    """

    _view: WorkView
    _options: dict[str, Any]

    def __init__(
        self,
        *,
        parallel: bool = False,
        cache_calls: bool = True,
        raise_exception: bool = True,
        start_with_flow: bool = False,
        host: str | None = None,
        port: int | None = None,
        cloud_compute: CloudCompute | None = None,
        cloud_build_config: BuildConfig | None = None,
        timeout: float | None = None,
        retries: int = 0,
        retry_delay: float = 1.0,
        grace: float = 10.0,
        when_busy: str = "queue",
        on_lost: str = "wait",
        lost_after: float = 300.0,
        env: dict[str, str] | None = None,
        health: str | None = None,
        display_name: str | None = None,
    ) -> None:
        owner = type(self).__name__
        if isinstance(retries, bool) or not isinstance(retries, int) or retries < 0:
            raise StateTypeError(f"{owner}(retries={retries!r}): a whole number of at least 0 is needed")
        if port is not None and (isinstance(port, bool) or not isinstance(port, int) or not 0 < port < 65536):
            raise StateTypeError(f"{owner}(port={port!r}): a port from 1 to 65535 is needed")
        for name, text in (("host", host), ("health", health), ("display_name", display_name)):
            if text is not None and not isinstance(text, str):
                raise StateTypeError(f"{owner}({name}={text!r}): a str is needed")
        for key, value in (env or {}).items():
            if not isinstance(key, str) or not isinstance(value, str):
                raise StateTypeError(f"{owner}(env=...): {key!r}: {value!r} must both be str")
        compute = cloud_compute or CloudCompute()
        build_config = cloud_build_config or BuildConfig()
        if not isinstance(compute, CloudCompute):
            raise StateTypeError(f"{owner}(cloud_compute={compute!r}): a CloudCompute is needed")
        if not isinstance(build_config, BuildConfig):
            raise StateTypeError(f"{owner}(cloud_build_config={build_config!r}): a BuildConfig is needed")
        self._compute, self._build_config = compute, build_config
        self._options = {
            "parallel": bool(parallel),
            "cache_calls": bool(cache_calls),
            "raise_exception": bool(raise_exception),
            "start_with_flow": bool(start_with_flow),
            "host": host,
            "port": port,
            "compute": compute.to_state()["$compute"],
            "build": {**build_config.to_state()["$build"], "commands": build_config.build_commands()},
            "timeout": number(owner, "timeout", timeout),
            "retries": retries,
            "retry_delay": number(owner, "retry_delay", retry_delay),
            "grace": number(owner, "grace", grace),
            "when_busy": one_of(owner, "when_busy", when_busy, "queue", "replace"),
            "on_lost": one_of(owner, "on_lost", on_lost, "wait", "restart", "fail"),
            "lost_after": number(owner, "lost_after", lost_after),
            "env": dict(env or {}),
            "health": health,
            "display_name": display_name,
        }

    def _setup(self, record: ComponentRecord) -> None:
        super()._setup(record)
        self._view = WorkView()
        self._options = {}
        # The instance's `run` shadows the class's: in the flow's process asking is all that can be done. The work's own
        # process takes the shadow away (see `_build`).
        object.__setattr__(self, "run", self._ask)

    def _complete(self) -> None:
        if not self._options:
            name = type(self).__name__
            raise StateTypeError(f"{name}.__init__ does not call super().__init__(): a Work needs it")

    @classmethod
    def _build(cls, record: ComponentRecord, name: str = "root") -> Work:
        """The Work of a record, ready to execute: called in the work's own process."""
        from orch.component import build

        work = build(record)
        if not isinstance(work, Work):
            raise StateTypeError(f"{record.module}:{record.qualname} is no Work")
        work.__dict__.pop("run", None)
        work._given_name = name if name == "root" else f"root.{name}"
        return work

    # -- what users override
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Executes in the work's own process. A JSON result becomes the call's result."""
        raise CallError(f"{type(self).__name__} has no run(): override it, or use ScriptWork for a script")

    def on_start(self) -> None:
        """In the work's process, before `run`."""

    def on_exit(self) -> None:
        """In the work's process, when it is asked to stop (SIGTERM)."""

    def on_exception(self, error: BaseException) -> None:
        """In the work's process, when `run` raised."""

    # -- asking
    def _ask(self, *args: Any, **kwargs: Any) -> Call:
        return self._in_pass("run").ask(self, args, kwargs)

    def stop(self) -> None:
        """Stop the running call and drop the waiting ones; a later pass's `run()` starts again."""
        self._in_pass("stop").stop_work(self)

    def restart(self) -> None:
        """Stop, then the latest call again."""
        self._in_pass("restart").restart_work(self)

    def _in_pass(self, what: str) -> Pass:
        program = self._find_program()
        if program is None:
            raise CallError(f"{type(self).__name__}.{what}(): this work is not part of the app (any more)")
        if program.current is None:
            raise CallError(f"{self.name}.{what}() was called outside a pass: call it in a Flow's run()")
        return program.current

    @property
    def _giving_way(self) -> bool:
        """This pass has asked for a call that replaces the running one."""
        program = self._find_program()
        return program is not None and program.current is not None and bool(program.current.replacing(self))

    def _argument_error(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
        """Why a call with these arguments cannot be started; empty if it can."""
        return ""

    # -- status
    @property
    def _kind(self) -> str:
        return "works"

    @property
    def status(self) -> Status:
        return self._view.status

    @property
    def has_started(self) -> bool:
        last = self._view.book.last
        return last is not None and last.attempt > 0

    @property
    def is_pending(self) -> bool:
        return self.status.stage is Stage.PENDING

    @property
    def is_running(self) -> bool:
        return self.status.stage is Stage.RUNNING

    @property
    def has_succeeded(self) -> bool:
        return self.status.stage is Stage.SUCCEEDED

    @property
    def has_failed(self) -> bool:
        return self.status.stage is Stage.FAILED

    @property
    def has_stopped(self) -> bool:
        return self.status.stage is Stage.STOPPED

    @property
    def has_timeout(self) -> bool:
        return self.status.reason is Reason.TIMEOUT

    @property
    def num_successes(self) -> int:
        return self._view.num_successes

    @property
    def num_timeouts(self) -> int:
        return self._view.num_timeouts

    @property
    def url(self) -> str:
        """Address through the proxy; empty until the server is ready."""
        return "" if self._giving_way else self._view.url

    @property
    def is_ready(self) -> bool:
        return self._view.ready and not self._giving_way

    @property
    def host(self) -> str | None:
        return self._view.host or self._options.get("host")

    @property
    def port(self) -> int | None:
        return self._view.port or self._options.get("port")

    @property
    def exit_code(self) -> int | None:
        return self._view.exit_code

    @property
    def progress(self) -> float | None:
        return self._view.progress

    @property
    def metrics(self) -> dict[str, Any]:
        return dict(self._view.metrics)

    @property
    def files(self) -> list[dict[str, Any]]:
        """Paths of the last complete outputs: {"path", "size", "version"}, the first 1,000."""
        return [dict(entry) for entry in self._view.files]

    @property
    def last_lines(self) -> list[str]:
        """Tail of the log of the current or latest call, read now."""
        program = self._find_program()
        return program.log_tail(short(self.name)) if program is not None else []

    @property
    def cloud_compute(self) -> CloudCompute:
        return self._compute

    @property
    def cloud_build_config(self) -> BuildConfig:
        return self._build_config

    @property
    def display_name(self) -> str:
        return self._options.get("display_name") or self._attribute or "root"

    # -- as data
    def _spec(self) -> WorkSpec:
        return WorkSpec(
            name=short(self.name),
            pointer=self._pointer,
            record=self._record,
            used=self._view.book.counter,
            **self._declaration(),
        )

    def _declaration(self) -> dict[str, Any]:
        return {"kind": "python", **self._options}

    def _node(self) -> dict[str, Any]:
        return {"vars": self._vars.snapshot(), "status": {}, "calls": {}}


def short(name: str) -> str:
    return name.removeprefix("root.")


Work._reserved = reserved_names(Work)
