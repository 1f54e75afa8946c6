"""The real HTTP server on a bare state tree: what a page talks to, without engine, agents and works."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

from orch.errors import NotFound, StateMismatch
from orch.server.backend import ApiRoute, Event, UpstreamTarget, ViewTarget
from orch.server.serve import HttpServer, bind_socket
from orch.state import StateTree, copy_json
from orch.wire import Op, Push, PushReply

__all__ = ["StateServer", "flow_node", "work_node"]


def flow_node(vars: dict[str, Any] | None = None, **parts: Any) -> dict[str, Any]:
    """A flow's node; `parts`: flows, works, structures."""
    return {"vars": vars or {}, "flows": {}, "works": {}, "structures": {}, **parts}


def work_node(vars: dict[str, Any] | None = None, **status: Any) -> dict[str, Any]:
    """A work's node."""
    return {"vars": vars or {}, "status": {"stage": "not_started", **status}, "calls": {}}


class StateServer:
    """Serves `tree` on a port of 127.0.0.1; `patch` is what somebody else writes, statuses included."""

    app_id = "t"
    token = "secret-token"
    drive_url = "memory://"

    def __init__(self, tree: dict[str, Any], logs: dict[str, Path] | None = None, *, port: int = 0) -> None:
        self.tree = StateTree(tree, rev=1)
        self.logs = logs or {}
        self.tabs: list[dict[str, Any]] = []
        self.views: dict[str, ViewTarget] = {}
        self.requests: list[list[Op]] = []
        self.secret_values = list
        self._events: list[Event] = []
        self._news = asyncio.Condition()
        self._sock = bind_socket("127.0.0.1", port)
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._main(),), daemon=True)

    def __enter__(self) -> StateServer:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._loop.close()

    async def _main(self) -> None:
        server = HttpServer()
        await server.start(self, "127.0.0.1", self._sock)  # type: ignore[arg-type]
        self._ready.set()
        await self._stop.wait()
        await server.stop()
        me = asyncio.current_task()
        for task in [task for task in asyncio.all_tasks() if task is not me]:
            task.cancel()
            await asyncio.wait({task}, timeout=2)
        await self._loop.shutdown_asyncgens()
        for _ in range(20):  # closed transports let go of their sockets a few rounds later
            await asyncio.sleep(0.005)

    # -- somebody else
    def patch_as_flow(self, *ops: Op, cause: str = "flow") -> int:
        """Write anywhere, statuses included; from another thread."""

        async def write() -> int:
            return await self._apply(list(ops), cause, guard=False)

        return asyncio.run_coroutine_threadsafe(write(), self._loop).result(5)

    def set(self, path: str, value: Any) -> int:
        return self.patch_as_flow({"op": "replace", "path": path, "value": value})

    def value(self, path: str) -> Any:
        return copy_json(self.tree.get(path))

    def tell(self, kind: str, **data: Any) -> None:
        """An event that is no diff."""
        asyncio.run_coroutine_threadsafe(self._tell(kind, data), self._loop).result(5)

    def add_page(self, component: str, port: int) -> None:
        self.views[component] = UpstreamTarget(component, "127.0.0.1", port, f"/view/{component}", "keep")
        self.tabs.append({"name": component.upper(), "component": component, "url": "", "ready": True, "stage": ""})

    # -- what the server asks
    async def _apply(self, ops: list[Op], cause: str, *, guard: bool) -> int:
        done = self.tree.apply(ops, self.tree.rev + 1, guard=guard)
        if done:
            await self._tell("diff", {"rev": self.tree.rev, "cause": cause, "at": 0.0, "ops": done})
        return self.tree.rev

    async def _tell(self, kind: str, data: dict[str, Any]) -> None:
        async with self._news:
            self._events.append(Event(len(self._events) + 1, kind, data))
            self._news.notify_all()

    async def read(self, pointer: str, rev: int | None = None) -> tuple[Any, int, int]:
        return copy_json(self.tree.get(pointer)), self.tree.value_rev(pointer), self.tree.rev

    async def patch(
        self, ops: list[Op], *, cause: str, match: tuple[str, int] | None = None, create: bool = False
    ) -> int:
        self.requests.append(ops)
        if match is not None and self.tree.value_rev(match[0]) != match[1]:
            raise StateMismatch
        return await self._apply(ops, cause, guard=True)

    async def wait_change(self, pointer: str, after: int, timeout: float) -> bool:
        async with self._news:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await self._news.wait_for(lambda: self.tree.value_rev(pointer) > after)
        return self.tree.value_rev(pointer) > after

    async def history(self, pointer: str, limit: int) -> list[dict[str, Any]]:
        return []

    async def events(self, after: int | None) -> AsyncIterator[Event]:
        seen = len(self._events) if after is None else after
        while True:
            async with self._news:
                await self._news.wait_for(lambda count=seen: len(self._events) > count)
            while seen < len(self._events):  # more may come while one is being sent
                seen += 1
                yield self._events[seen - 1]

    def log_files(self, name: str, call: str | None) -> list[Path]:
        if name not in self.logs:
            raise NotFound(f"there is no work {name}")
        return [self.logs[name]]

    def layout(self) -> list[dict[str, Any]]:
        return self.tabs

    async def status(self) -> dict[str, Any]:
        return {"stage": "running", "works": {}, "message": ""}

    async def app_info(self) -> dict[str, Any]:
        return {"id": self.app_id, "name": "test app", "run": 1, "stage": "running", "url": self.url}

    def api_routes(self) -> list[ApiRoute]:
        return []

    def view(self, component: str) -> ViewTarget:
        if component not in self.views:
            raise NotFound(f"there is nothing called {component}")
        return self.views[component]

    def metrics(self) -> dict[str, float]:
        return {}

    def agent_token(self, agent: str) -> str | None:
        return None

    async def push(self, push: Push) -> PushReply:
        raise NotFound

    @contextlib.contextmanager
    def client(self) -> Iterator[httpx.Client]:
        with httpx.Client(base_url=self.url, headers={"Authorization": f"Bearer {self.token}"}) as client:
            yield client
