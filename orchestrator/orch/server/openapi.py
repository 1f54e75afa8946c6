"""The OpenAPI document, as far as FastAPI cannot read it off the routes: problems, the token, headers."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from orch.server.backend import Backend
from orch.server.open_routes import HEALTH_PATH

__all__ = ["REVISION", "content", "document", "header", "problems"]

PROBLEM_TYPE = "application/problem+json"
PROBLEM: dict[str, Any] = {
    "title": "Problem",
    "description": "What went wrong (RFC 9457).",
    "type": "object",
    "required": ["type", "title", "status", "detail", "hint"],
    "properties": {
        "type": {"type": "string", "description": "a URN that names the kind of problem, or about:blank"},
        "title": {"type": "string", "description": "the same for every problem of this type"},
        "status": {"type": "integer"},
        "detail": {"description": "a sentence about this one; what a flow's own route raises may be any JSON value"},
        "hint": {"type": "string", "description": "what to do about it"},
        "errors": {"type": "array", "items": {"type": "object"}, "description": "the fields that do not fit"},
    },
}
_CONTENT = {PROBLEM_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}

REVISION: dict[int | str, Any] = {
    200: {
        "description": "Journalled: the revision that it became",
        "content": {
            "application/json": {
                "schema": {"type": "object", "required": ["rev"], "properties": {"rev": {"type": "integer"}}}
            }
        },
    }
}
"""The answer to a write."""


def problems(*statuses: int) -> dict[int | str, Any]:
    """For `responses=`: the route answers with these statuses if something is wrong."""
    return {status: {"description": HTTPStatus(status).phrase, "content": _CONTENT} for status in statuses}


def content(kind: str) -> dict[int | str, Any]:
    """For `responses=`: what a success has as its body."""
    return {200: {"content": {kind: {}}}}


def header(name: str, description: str, *values: str) -> dict[str, Any]:
    """For `openapi_extra`'s "parameters": a request header that the route reads itself; `values` are all it may be."""
    schema = {"type": "string", "enum": list(values)} if values else {"type": "string"}
    return {"name": name, "in": "header", "required": False, "description": description, "schema": schema}


def document(api: FastAPI, backend: Backend) -> dict[str, Any]:
    """The whole document."""
    made = get_openapi(title=api.title, version=api.version, routes=api.routes)
    components = made.setdefault("components", {})
    components.setdefault("schemas", {})["Problem"] = PROBLEM
    components["securitySchemes"] = {
        "token": {"type": "http", "scheme": "bearer", "description": "the app's token, in .orch/token"},
        "cookie": {"type": "apiKey", "in": "cookie", "name": f"orch_{backend.app_id}"},
    }
    made["security"] = [{"token": []}, {"cookie": []}]
    for path, operations in made["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            if path == HEALTH_PATH:
                operation["security"] = []
                continue
            invalid = answers.get("422")
            if invalid is not None:
                invalid["content"] = _CONTENT  # FastAPI's own is not what this server answers
            for status, answer in problems(401, 403).items():
                answers.setdefault(str(status), answer)
            answers["default"] = {"description": "Another problem", "content": _CONTENT}
    for unused in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(unused, None)
    return made
