"""The routes that flows add by `configure_api`, with FastAPI's rules for their parameters."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from starlette.responses import Response
from starlette.routing import BaseRoute

from orch.errors import UsageError
from orch.server.backend import ApiRoute
from orch.server.context import Context
from orch.server.responses import Json

__all__ = ["UserRoutes"]

log = logging.getLogger(__name__)


class UserRoutes:
    """Keeps the app's routes equal to `backend.api_routes()`, which may change with each pass."""

    def __init__(self, app: FastAPI, context: Context) -> None:
        self._app = app
        self._context = context
        self._known: list[tuple[str, str, Callable[..., Any]]] = []
        self._mounted: list[BaseRoute] = []

    def refresh(self) -> None:
        """Mount what is new and drop what is gone; cheap when nothing changed."""
        routes = self._context.backend.api_routes()
        known = [(route.method, route.route, route.endpoint) for route in routes]
        if known == self._known:
            return
        self._known = known
        table = self._app.router.routes
        for old in self._mounted:
            table.remove(old)
        count = len(table)
        for route in routes:
            self._mount(route)
        self._mounted = table[count:]
        self._app.openapi_schema = None

    def _mount(self, route: ApiRoute) -> None:
        name = getattr(route.endpoint, "__name__", "endpoint")
        words: dict[str, Any] = {"methods": [route.method], "name": name, "response_model": None, "tags": ["flow"]}
        words["operation_id"] = f"{route.method}:{route.route}"
        words["description"] = inspect.getdoc(route.endpoint) or ""
        try:
            self._app.add_api_route(route.route, self._endpoint(route), **words)
        except Exception as error:  # FastAPI raises many kinds for a signature that it cannot use
            problem = UsageError(f"{route.method} {route.route}: FastAPI cannot read the parameters of {name}: {error}")
            log.error("%s", problem)
            self._app.add_api_route(route.route, _broken(problem), **words)

    def _endpoint(self, route: ApiRoute) -> Callable[..., Awaitable[Any]]:
        async def endpoint(**kwargs: Any) -> Any:
            result = await route.invoke(kwargs)
            return result if isinstance(result, Response) else Json(self._context, jsonable_encoder(result))

        # Annotations are evaluated where the flow was written, not here.
        signature = inspect.signature(route.endpoint, eval_str=True)
        endpoint.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
        endpoint.__name__ = getattr(route.endpoint, "__name__", "endpoint")
        return endpoint


def _broken(problem: UsageError) -> Callable[[], Awaitable[None]]:
    problem.status = 500

    async def broken() -> None:
        raise problem

    return broken
