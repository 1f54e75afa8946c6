"""What the HTTP server asks of the service behind it. The server turns requests into these calls and nothing more."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orch.wire import Op, Push, PushReply

__all__ = ["ApiRoute", "Backend", "Event", "StaticTarget", "UpstreamTarget", "ViewTarget", "WaitingTarget"]


@dataclass(frozen=True, slots=True)
class Event:
    """One server-sent event. `id` counts up over the app's life; kinds: diff, status, log, app, layout."""

    id: int
    kind: str
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class UpstreamTarget:
    """A server of a Work or a Streamlit frontend. keep: the path is passed on with /view/<component>, strip:
    without."""

    component: str
    host: str
    port: int
    base_path: str
    prefix: str


@dataclass(frozen=True, slots=True)
class StaticTarget:
    component: str
    folder: Path


@dataclass(frozen=True, slots=True)
class WaitingTarget:
    """Exists, but does not answer yet (or any more): show why, in words."""

    component: str
    title: str
    stage: str
    message: str
    last_lines: list[str] = field(default_factory=list)


ViewTarget = UpstreamTarget | StaticTarget | WaitingTarget


@dataclass(frozen=True, slots=True)
class ApiRoute:
    """One route of `configure_api`: FastAPI reads `endpoint`'s signature for parameters; `invoke(answer)` runs a
    function that calls it, between passes and in their thread, and returns or raises what that does."""

    method: str
    route: str
    endpoint: Callable[..., Any]
    invoke: Callable[[Callable[[], Any]], Awaitable[Any]]


class Backend(Protocol):
    """Implemented by `orch.service.Service`; by a fake in the server's unit tests. Raises orch.errors."""

    app_id: str
    token: str
    drive_url: str
    """fsspec URL of the app's Drive root, e.g. file:///x/.orch/drive"""

    def secret_values(self) -> list[str]:
        """What must never be shown."""

    def refuse_secrets(self, value: Any, where: str) -> None:
        """Raises StateTypeError naming the secret whose value is in the bytes, or anywhere in the JSON value."""

    # -- state
    async def read(self, pointer: str, rev: int | None = None) -> tuple[Any, int, int]:
        """(plain JSON value, revision at which it last changed, head revision); only journalled revisions are seen."""

    async def patch(self, ops: list[Op], *, cause: str, match: tuple[str, int] | None = None) -> int:
        """Apply all or nothing under `vars`; `match` = (pointer, value revision) or StateMismatch. Returns the revision
        once it is journalled."""

    async def wait_change(self, pointer: str, after: int, timeout: float) -> bool:
        """True once the value's revision exceeds `after`, False on timeout."""

    async def history(self, pointer: str, limit: int) -> list[dict[str, Any]]:
        """Kept revisions that touched the pointer: {"rev", "at", "cause", "ops"}, newest last."""

    # -- events
    def events(self, after: int | None) -> AsyncIterator[Event]:
        """From `after` (exclusive; None: from now on), endlessly, in order."""

    def last_event(self) -> int:
        """Id of the newest event; 0 before the first one."""

    # -- works
    async def works(self) -> list[dict[str, Any]]: ...
    async def work(self, name: str) -> dict[str, Any]: ...
    async def stop_work(self, name: str) -> dict[str, Any]: ...
    async def restart_work(self, name: str) -> dict[str, Any]: ...
    async def run_work(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]: ...
    def log_files(self, name: str, call: str | None) -> list[Path]:
        """The work's log files, oldest first (one of them if `call` is given). NotFound for an unknown work."""

    # -- drive
    async def published(self, drive: str, manifest: dict[str, Any]) -> None:
        """A version of a path was published, or deleted, by way of REST: what an agent's `wire.Published` says."""

    # -- app
    def layout(self) -> list[dict[str, Any]]:
        """[{"name", "component" | None, "url", "ready": bool, "stage", "tabs"?: [...]}], as the shell shows it."""

    async def status(self) -> dict[str, Any]:
        """{"stage", "rev", "works": {name: stage}, "agents": [...], "passes", "uptime", "message"}"""

    async def app_info(self) -> dict[str, Any]:
        """{"id", "name", "run", "stage", "url", "version", "file", "pid", "drive"}"""

    async def stop_app(self, message: str) -> None: ...
    def api_routes(self) -> list[ApiRoute]: ...
    def view(self, component: str) -> ViewTarget:
        """Where /view/<component>/ leads. NotFound."""

    def metrics(self) -> dict[str, float]:
        """Counters and gauges for /metrics, by their Prometheus name (without the orch_ prefix)."""

    # -- agents
    def agent_token(self, agent: str) -> str | None: ...
    async def push(self, push: Push) -> PushReply: ...
