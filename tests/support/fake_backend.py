"""A backend for the HTTP server's tests: a real state tree and real log files, and a record of what was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import NotFound, StaleEpoch, StateError, StateMismatch, StateTypeError
from orch.server.backend import ApiRoute, Event, StaticTarget, UpstreamTarget, ViewTarget, WaitingTarget
from orch.state import StateTree, copy_json
from orch.wire import Op, Push, PushReply

__all__ = ["FakeBackend"]


class FakeBackend:
    """Implements `orch.server.backend.Backend`."""

    app_id = "a1b2c3d4"
    token = "app-token"

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drive_url = (folder / "drive").as_uri()
        self.secrets: list[str] = []
        self.tree = StateTree(
            {
                "vars": {"count": 0, "a/b~c": {"x": 1}, "rows": [1, 2, 3], "deep": {"er": {"est": "ö"}}},
                "flows": {},
                "works": {"trainer": {"vars": {"retrain": False}, "status": {"stage": "running"}, "calls": {}}},
                "structures": {},
                "app": {"name": "studio", "run": 1, "stage": "running"},
            },
            rev=10,
        )
        self.causes: list[str] = []
        self.asked: list[tuple[Any, ...]] = []
        self.pushed: list[Push] = []
        self.published_manifests: list[dict[str, Any]] = []
        self.log: list[Event] = []
        self.views: dict[str, ViewTarget] = {}
        self.routes: list[ApiRoute] = []
        self.fail: Exception | None = None
        self._news = asyncio.Condition()

    def secret_values(self) -> list[str]:
        return self.secrets

    def refuse_secrets(self, value: Any, where: str) -> None:
        data = value if isinstance(value, bytes) else msgspec.json.encode(value)
        if any(secret.encode() in data for secret in self.secrets):
            raise StateTypeError(f"{where} holds a secret")

    # -- state
    async def read(self, pointer: str, rev: int | None = None) -> tuple[Any, int, int]:
        if self.fail is not None:
            raise self.fail
        if rev is not None and rev != self.tree.rev:
            raise NotFound(f"revision {rev} is not kept")
        return copy_json(self.tree.get(pointer)), self.tree.value_rev(pointer), self.tree.rev

    async def patch(self, ops: list[Op], *, cause: str, match: tuple[str, int] | None = None) -> int:
        if match is not None and self.tree.value_rev(match[0]) != match[1]:
            raise StateMismatch(f"{match[0]} changed at {self.tree.value_rev(match[0])}")
        self.tree.apply(ops, self.tree.rev + 1, guard=True)
        self.causes.append(cause)
        await self.tell("diff", {"rev": self.tree.rev, "cause": cause, "ops": ops})
        return self.tree.rev

    async def wait_change(self, pointer: str, after: int, timeout: float) -> bool:
        async with self._news:
            try:
                async with asyncio.timeout(timeout):
                    await self._news.wait_for(lambda: self.tree.value_rev(pointer) > after)
            except TimeoutError:
                return False
        return True

    async def history(self, pointer: str, limit: int) -> list[dict[str, Any]]:
        return [event.data for event in self.log if event.kind == "diff"][-limit:]

    # -- events
    async def tell(self, kind: str, data: dict[str, Any]) -> None:
        async with self._news:
            self.log.append(Event(len(self.log) + 1, kind, data))
            self._news.notify_all()

    async def events(self, after: int | None) -> AsyncIterator[Event]:
        seen = len(self.log) if after is None else after
        while True:
            async with self._news:
                while len(self.log) <= seen:
                    await self._news.wait()
            while seen < len(self.log):
                seen += 1
                yield self.log[seen - 1]

    def last_event(self) -> int:
        return len(self.log)

    # -- works
    async def works(self) -> list[dict[str, Any]]:
        return [await self.work("trainer")]

    async def work(self, name: str) -> dict[str, Any]:
        if name not in ("trainer", "ui.trainer"):
            raise NotFound(f"there is no work {name!r}", hint="there is: trainer")
        stage = self.tree.get("/works/trainer/status/stage")
        return {"name": name, "status": {"stage": stage}, "last_lines": [f"value {value}" for value in self.secrets]}

    async def stop_work(self, name: str) -> dict[str, Any]:
        self.asked.append(("stop", name))
        return await self.work(name)

    async def restart_work(self, name: str) -> dict[str, Any]:
        self.asked.append(("restart", name))
        return await self.work(name)

    async def run_work(self, name: str, args: list[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
        if "too much" in args:
            raise StateError("no")
        self.asked.append(("run", name, args, kwargs))
        return await self.work(name)

    def log_files(self, name: str, call: str | None) -> list[Path]:
        if name != "trainer":
            raise NotFound(f"there is no work {name!r}")
        paths = sorted((self.folder / "logs").glob("*.log"))
        return [path for path in paths if call is None or path.stem == call]

    # -- drive
    async def published(self, drive: str, manifest: dict[str, Any]) -> None:
        self.published_manifests.append({"drive": drive, **manifest})

    # -- app
    def layout(self) -> list[dict[str, Any]]:
        return [{"name": "APP", "component": "page", "url": "/view/page/", "ready": True, "stage": ""}]

    async def status(self) -> dict[str, Any]:
        return {"stage": "running", "rev": self.tree.rev, "works": {"trainer": "running"}}

    async def app_info(self) -> dict[str, Any]:
        return {"id": self.app_id, "name": "studio", "run": 1, "stage": "running"}

    async def stop_app(self, message: str) -> None:
        self.asked.append(("stop app", message))

    def api_routes(self) -> list[ApiRoute]:
        return self.routes

    def view(self, component: str) -> ViewTarget:
        if component not in self.views:
            raise NotFound(f"there is nothing to see of {component!r}")
        return self.views[component]

    def metrics(self) -> dict[str, float]:
        return {"passes_total": 3.0, 'works{stage="running"}': 1.0, 'works{stage="failed"}': 0.0, "revision": 10.0}

    # -- agents
    def agent_token(self, agent: str) -> str | None:
        return {"local": "agent-token"}.get(agent)

    async def push(self, push: Push) -> PushReply:
        if push.epoch < 2:
            raise StaleEpoch(f"agent {push.agent} epoch {push.epoch} was replaced")
        self.pushed.append(push)
        return PushReply(acked=push.seq + len(push.items) - 1)

    def upstream(self, component: str, port: int, prefix: str = "strip", host: str = "127.0.0.1") -> None:
        """Let /view/<component>/ lead to a port."""
        self.views[component] = UpstreamTarget(component, host, port, f"/view/{component}", prefix)

    def waiting(self, component: str, message: str = "", *lines: str) -> None:
        """Let /view/<component>/ show that there is nothing yet."""
        self.views[component] = WaitingTarget(component, f"{component} starts", "pending", message, list(lines))

    def static(self, component: str, folder: Path) -> None:
        """Let /view/<component>/ serve files."""
        self.views[component] = StaticTarget(component, folder)
