"""/api/v1/state: read, wait, patch, put; /api/v1/history."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from orch.errors import OrchError, StateMismatch, StatePathError
from orch.server.asgi import HEAD_REQUEST
from orch.server.context import Context
from orch.server.openapi import REVISION, header, problems
from orch.server.responses import BadBody, Json, UnsupportedType, etag, json_body, parse_etags
from orch.wire import Op

__all__ = ["router"]

MAX_WAIT = 60.0
PATCH_TYPE = "application/json-patch+json"
NEEDS: dict[str, tuple[str, ...]] = {
    "add": ("path", "value"),
    "replace": ("path", "value"),
    "test": ("path", "value"),
    "remove": ("path",),
    "move": ("from", "path"),
    "copy": ("from", "path"),
}
CAUSES = ("api", "ui")

POINTER = {"type": "string", "pattern": "^(/([^~]|~[01])*)?$", "examples": ["/flows/ui/vars/train_start"]}
WRITE_HEADERS = [
    header("If-Match", "the entity tag that the value must still have; else 412"),
    header("X-Orch-Cause", "who the change is by", *CAUSES),
]
READ_EXTRA = {"parameters": [header("If-None-Match", "an entity tag: if the value still has it, the answer is 304")]}
JSON_VALUE: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"application/json": {"schema": {}}}},
    "parameters": WRITE_HEADERS,
}
JSON_PATCH: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            PATCH_TYPE: {
                "schema": {
                    "type": "array",
                    "items": {
                        "oneOf": [
                            {
                                "type": "object",
                                "required": ["op", *fields],
                                "properties": {
                                    "op": {"const": op},
                                    **{field: {} if field == "value" else POINTER for field in fields},
                                },
                            }
                            for op, fields in NEEDS.items()
                        ]
                    },
                }
            }
        },
    },
    "parameters": WRITE_HEADERS,
}

RevQuery = Annotated[int | None, Query(description="the value as it was at this revision, as far as it is kept", ge=0)]
AfterQuery = Annotated[
    int | None, Query(description="wait until the value has changed after this revision (the one in its ETag)", ge=0)
]
WaitQuery = Annotated[
    float | None,
    Query(
        description=f"seconds to wait at most (30 if only `after` is given, never more than {MAX_WAIT:g}); when they "
        "are over the value is answered as it is: its ETag tells, and with If-None-Match it is a 304",
        ge=0,
    ),
]


def check_patch(document: Any) -> list[Op]:
    """The operations of an RFC 6902 document. Raises BadBody naming the operation that is none."""
    if not isinstance(document, list):
        raise BadBody("a JSON patch is a list of operations", hint='[{"op": "replace", "path": "/vars/x", "value": 1}]')
    for index, op in enumerate(document):
        if not isinstance(op, dict) or not isinstance(op.get("op"), str) or op["op"] not in NEEDS:
            raise BadBody(f"operation {index} is not one of {', '.join(NEEDS)}")
        for field in NEEDS[op["op"]]:
            if field not in op:
                raise BadBody(f"operation {index} ({op['op']}) lacks {field!r}")
            if field != "value" and not isinstance(op[field], str):
                raise BadBody(f"operation {index} ({op['op']}): {field!r} is not a JSON pointer")
    return document


def _cause(request: Request) -> str:
    cause = request.headers.get("x-orch-cause", "api")
    if cause not in CAUSES:
        raise BadBody(f"X-Orch-Cause: {cause!r} is not one of {', '.join(CAUSES)}")
    return cause


async def _match(context: Context, pointer: str, text: str | None) -> tuple[str, int] | None:
    """What If-Match asks for, as (pointer, revision). Raises StateMismatch if it cannot hold any more."""
    if text is None:
        return None
    strong, _, anything = parse_etags(text)
    if anything:
        return None
    revs = [int(tag) for tag in strong if tag.isdigit()]
    if len(revs) == 1:
        return pointer, revs[0]
    try:
        _, current, _ = await context.backend.read(pointer)
    except StatePathError:
        current = -1
    if current not in revs:
        raise StateMismatch(f"If-Match: {text}: the value last changed at revision {current}")
    return pointer, current


async def _tag_after(context: Context, pointer: str, rev: int) -> str:
    """The tag of a value as the write at `rev` left it."""
    try:
        _, value_rev, _ = await context.backend.read(pointer)
    except StatePathError:
        return etag(rev)
    # A later write may have come in between: its tag would let this client overwrite what it has not seen.
    return etag(min(value_rev, rev))


async def _put(context: Context, pointer: str, value: Any, cause: str, match: tuple[str, int] | None) -> int:
    op: Op = {"op": "replace", "path": pointer, "value": value}
    try:
        return await context.backend.patch([op], cause=cause, match=match)
    except StatePathError:
        # `add` makes a new key of a dict; in a list it would insert, which is not what PUT says.
        container, _, _ = await context.backend.read(pointer.rpartition("/")[0])
        if not isinstance(container, dict):
            raise
    return await context.backend.patch([{**op, "op": "add"}], cause=cause, match=match)


def router(context: Context) -> APIRouter:
    """The routes, on this context."""
    routes = APIRouter(prefix="/api/v1", tags=["state"])
    backend = context.backend

    async def read(pointer: str, request: Request, rev: int | None, after: int | None, wait: float | None) -> Response:
        try:
            if (after is not None or wait is not None) and rev is None:
                if after is None:
                    _, after, _ = await backend.read(pointer)
                await _wait(pointer, after, min(30.0 if wait is None else wait, MAX_WAIT))
            value, value_rev, head = await backend.read(pointer, rev)
        except StatePathError as error:
            raise NoSuchValue(error.message, hint=error.hint) from error
        headers = {"etag": etag(value_rev), "x-orch-rev": str(head)}
        asked = request.headers.get("if-none-match")
        if asked is not None:
            strong, weak, anything = parse_etags(asked)
            if anything or str(value_rev) in strong | weak:
                return Response(status_code=304, headers=headers)
        if request.scope.get(HEAD_REQUEST):
            return Response(headers=headers)  # somebody who only waits for the revision
        return Json(context, value, headers=headers)

    async def _wait(pointer: str, after: int, timeout: float) -> None:
        change = asyncio.ensure_future(backend.wait_change(pointer, after, timeout))
        closing = asyncio.ensure_future(context.closing.wait())
        try:
            await asyncio.wait({change, closing}, return_when=asyncio.FIRST_COMPLETED)
            if change.done():
                change.result()
        finally:
            change.cancel()
            closing.cancel()
            await asyncio.gather(change, closing, return_exceptions=True)

    unchanged: dict[int | str, Any] = {304: {"description": "Not changed"}}

    @routes.get("/state", summary="The whole state tree", responses=unchanged | problems(404), openapi_extra=READ_EXTRA)
    async def get_root(
        request: Request,
        rev: RevQuery = None,
        after: AfterQuery = None,
        wait: WaitQuery = None,
    ) -> Response:
        return await read("", request, rev, after, wait)

    @routes.get(
        "/state/{pointer:path}",
        summary="One value; the path is its JSON pointer",
        responses=unchanged | problems(404),
        openapi_extra=READ_EXTRA,
    )
    async def get_value(
        pointer: str,
        request: Request,
        rev: RevQuery = None,
        after: AfterQuery = None,
        wait: WaitQuery = None,
    ) -> Response:
        return await read("/" + pointer, request, rev, after, wait)

    @routes.patch(
        "/state",
        summary="Apply a JSON patch, all or nothing",
        responses=REVISION | problems(400, 409, 412, 413, 415, 422),
        openapi_extra=JSON_PATCH,
    )
    async def patch_state(request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != PATCH_TYPE:
            raise UnsupportedType(f"the content type is {kind or 'missing'}", hint=f"send {PATCH_TYPE}")
        ops = check_patch(await json_body(request))
        match = await _match(context, "", request.headers.get("if-match"))
        rev = await backend.patch(ops, cause=_cause(request), match=match)
        return Json(context, {"rev": rev}, headers={"etag": etag(rev)})

    @routes.put(
        "/state/{pointer:path}",
        summary="Set one value",
        responses=REVISION | problems(400, 409, 412, 413),
        openapi_extra=JSON_VALUE,
    )
    async def put_value(pointer: str, request: Request) -> Response:
        pointer = "/" + pointer
        value = await json_body(request)
        match = await _match(context, pointer, request.headers.get("if-match"))
        rev = await _put(context, pointer, value, _cause(request), match)
        return Json(context, {"rev": rev}, headers={"etag": await _tag_after(context, pointer, rev)})

    @routes.get("/history", summary="The kept revisions")
    async def history_root(limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        return Json(context, await backend.history("", limit))

    @routes.get("/history/{pointer:path}", summary="The kept revisions that touched one value")
    async def history(pointer: str, limit: Annotated[int, Query(ge=1, le=1000)] = 20) -> Response:
        return Json(context, await backend.history("/" + pointer, limit))

    return routes


class NoSuchValue(OrchError):
    """The pointer names nothing in the state."""

    status = 404
