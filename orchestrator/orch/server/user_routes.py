"""The routes that flows add by `configure_api`, with FastAPI's rules for their parameters."""

from __future__ import annotations

import asyncio
import inspect
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Match

from orch.calls import Call
from orch.errors import OrchError, UsageError
from orch.server.asgi import ClientGone
from orch.server.backend import ApiRoute
from orch.server.context import Context
from orch.server.proxy import VIEW
from orch_drive import DriveError

__all__ = ["UserRoutes"]

log = logging.getLogger(__name__)

ENCODERS: dict[Any, Callable[[Any], Any]] = {Call: Call.public, msgspec.Struct: msgspec.to_builtins}


class MethodFailed(OrchError):
    """A method of the app's flow raised an error."""

    status = 500


class UserRoutes:
    """Keeps the app's routes equal to `backend.api_routes()`, which may change with each pass."""

    def __init__(self, app: FastAPI, context: Context) -> None:
        self._app = app
        self._context = context
        self._known: list[tuple[str, str, Callable[..., Any]]] = []
        self._mounted: list[BaseRoute] = []

        class Answer(JSONResponse):
            """What a method returned, secrets left out."""

            def render(self, content: Any) -> bytes:
                return context.redactor.json(content)

        self._answer = Answer

    def refresh(self) -> None:
        """Mount what is new and drop what is gone; cheap when nothing changed."""
        routes = self._context.backend.api_routes()
        known = [(route.method, route.route, route.endpoint) for route in routes]
        if known == self._known:
            return
        before, self._known = self._known, known
        table = self._app.router.routes
        for old in self._mounted:
            table.remove(old)
        count = len(table)
        own = table[:count]
        for route, key in zip(routes, known, strict=True):
            if key not in before and _taken(route, own):
                log.error("%s %s of configure_api is never reached: orch has a route there", route.method, route.route)
            self._mount(route)
        self._mounted = table[count:]
        self._app.openapi_schema = None

    def _mount(self, route: ApiRoute) -> None:
        name = getattr(route.endpoint, "__name__", "endpoint")
        words: dict[str, Any] = {"methods": [route.method], "name": name, "response_model": None, "tags": ["flow"]}
        words["operation_id"] = f"{route.method}:{route.route}"
        words["response_class"] = self._answer
        words["description"] = inspect.getdoc(route.endpoint) or ""
        try:
            self._app.add_api_route(route.route, self._endpoint(route), **words)
        except Exception as error:  # FastAPI raises many kinds for a signature that it cannot use
            problem = UsageError(f"{route.method} {route.route}: FastAPI cannot read the parameters of {name}: {error}")
            log.error("%s", problem)
            self._app.add_api_route(route.route, _broken(problem), **words)

    def _endpoint(self, route: ApiRoute) -> Callable[..., Awaitable[Any]]:
        async def endpoint(**kwargs: Any) -> Any:
            for value in kwargs.values():
                if isinstance(value, Request):
                    try:
                        await value.body()  # kept in it: the method has another event loop, or none
                    except ClientDisconnect:
                        raise ClientGone from None
                    except RuntimeError:
                        pass  # a form has been read from it already

            def answer() -> Any:
                try:
                    result = route.endpoint(**kwargs)
                    if inspect.iscoroutine(result):
                        result = asyncio.run(result)
                except (HTTPException, OrchError, DriveError):
                    raise
                except Exception as error:
                    raise MethodFailed(f"{route.method} {route.route}: {type(error).__name__}: {error}") from error
                # Encoded here, in the transaction: what it returns may be state.
                return result if isinstance(result, Response) else jsonable_encoder(result, custom_encoder=ENCODERS)

            return await route.invoke(answer)

        # Annotations are evaluated where the flow was written, not here.
        signature = inspect.signature(route.endpoint, eval_str=True)
        endpoint.__signature__ = signature.replace(return_annotation=inspect.Signature.empty)  # type: ignore[attr-defined]
        endpoint.__name__ = getattr(route.endpoint, "__name__", "endpoint")
        return endpoint


def _taken(route: ApiRoute, own: list[BaseRoute]) -> bool:
    """Does a route of orch's own answer before this one is asked?"""
    path = re.sub(r"\{[^}]*\}", "x", route.route)
    scope = {"type": "http", "method": route.method, "path": path, "root_path": "", "headers": []}
    return path.startswith(VIEW) or any(one.matches(scope)[0] is Match.FULL for one in own)


def _broken(problem: UsageError) -> Callable[[], Awaitable[None]]:
    problem.status = 500

    async def broken() -> None:
        raise problem

    return broken
