"""/openapi.json speaks of every route, and says of each what it really answers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from fake_backend import FakeBackend
from http_face import in_memory

from orch.server.backend import ApiRoute

ROUTES = {
    "/api/v1/state": {"get", "patch"},
    "/api/v1/state/{pointer}": {"get", "put"},
    "/api/v1/history": {"get"},
    "/api/v1/history/{pointer}": {"get"},
    "/api/v1/events": {"get"},
    "/api/v1/works": {"get"},
    "/api/v1/works/{name}": {"get"},
    "/api/v1/works/{name}/stop": {"post"},
    "/api/v1/works/{name}/restart": {"post"},
    "/api/v1/works/{name}/run": {"post"},
    "/api/v1/works/{name}/logs": {"get"},
    "/api/v1/layout": {"get"},
    "/api/v1/status": {"get"},
    "/api/v1/app": {"get"},
    "/api/v1/app/stop": {"post"},
    "/api/v1/drive/{drive}": {"get"},
    "/api/v1/drive/{drive}/{path}": {"get", "put", "delete"},
    "/healthz": {"get"},
    "/metrics": {"get"},
}
PATCH = {"content-type": "application/json-patch+json"}


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


def operation(document: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The operation that a request is for; the longest path that fits."""
    fits = [
        known
        for known in document["paths"]
        if re.fullmatch(re.sub(r"\\\{(\w+)\\\}", lambda m: ".*" if m[1] in ("pointer", "path") else "[^/]*",
                               re.escape(known)), path)
    ]  # fmt: skip
    found: dict[str, Any] = document["paths"][max(fits, key=lambda known: (known.count("{") == 0, len(known)))][method]
    return found


async def test_every_route_is_there(backend: FakeBackend) -> None:
    async def invoke(kwargs: dict[str, Any]) -> Any:
        return kwargs

    def greet(name: str, loud: bool = False) -> None: ...

    backend.routes = [ApiRoute("POST", "/greet/{name}", greet, invoke)]
    async with in_memory(backend) as http:
        document = (await http.get("/openapi.json")).json()
        backend.routes = []
        later = (await http.get("/openapi.json")).json()
    found = {path: set(operations) for path, operations in document["paths"].items()}
    assert found == {**ROUTES, "/greet/{name}": {"post"}}
    assert {item["name"]: item["in"] for item in document["paths"]["/greet/{name}"]["post"]["parameters"]} == {
        "name": "path",
        "loud": "query",
    }
    assert set(later["paths"]) == set(ROUTES), "a route that is gone is gone from the document too"
    headers = {item["name"] for item in document["paths"]["/api/v1/state/{pointer}"]["put"]["parameters"]}
    assert {"If-Match", "pointer"} <= headers
    assert document["components"]["securitySchemes"]["cookie"]["name"] == f"orch_{backend.app_id}"
    assert document["paths"]["/healthz"]["get"]["security"] == []
    text = str(document)
    for name in re.findall(r"#/components/schemas/(\w+)", text):
        assert name in document["components"]["schemas"]


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("get", "/api/v1/state/vars/nope", {}, 404),
        ("get", "/api/v1/state/~2", {}, 404),
        ("get", "/api/v1/state?rev=99", {}, 404),
        ("get", "/api/v1/state?rev=x", {}, 422),
        ("get", "/api/v1/state", {"headers": {"if-none-match": "*"}}, 304),
        ("get", "/api/v1/state", {}, 200),
        ("patch", "/api/v1/state", {"content": b"[]", "headers": PATCH}, 200),
        ("patch", "/api/v1/state", {"content": b"{", "headers": PATCH}, 400),
        ("patch", "/api/v1/state", {"content": b"[]", "headers": {**PATCH, "if-match": '"0"'}}, 412),
        ("patch", "/api/v1/state", {"content": b"[]"}, 415),
        ("patch", "/api/v1/state", {"json": [{"op": "remove", "path": "/app"}], "headers": PATCH}, 403),
        (
            "patch",
            "/api/v1/state",
            {"json": [{"op": "test", "path": "/vars/count", "value": 9}], "headers": PATCH},
            409,
        ),
        ("put", "/api/v1/state/vars/nope", {"json": 1}, 422),
        ("put", "/api/v1/state/vars/rows/9", {"json": 1}, 409),
        ("put", "/api/v1/state/vars/count", {"content": b"x" * 5_000_000}, 413),
        ("get", "/api/v1/events", {"headers": {"last-event-id": "x"}}, 400),
        ("get", "/api/v1/works/nobody", {}, 404),
        ("post", "/api/v1/works/nobody/stop", {}, 404),
        ("post", "/api/v1/works/trainer/run", {"content": b"["}, 400),
        ("get", "/api/v1/works/nobody/logs", {}, 404),
        ("get", "/api/v1/works/trainer/logs?grep=(", {}, 422),
        ("post", "/api/v1/app/stop", {"json": []}, 422),
        ("get", "/api/v1/drive/app/nope", {}, 404),
        ("delete", "/api/v1/drive/app/nope", {}, 404),
        ("put", "/api/v1/drive/app/a.txt", {"content": b""}, 201),
        ("get", "/metrics", {}, 200),
        ("get", "/healthz", {}, 200),
    ],
)
async def test_answers_are_what_the_document_says(
    backend: FakeBackend, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    async with in_memory(backend) as http:
        document = (await http.get("/openapi.json")).json()
        answer = await http.request(method, path, **options)
    assert answer.status_code == status, answer.text
    said = operation(document, method, path.partition("?")[0])["responses"][str(status)]
    if answer.content:
        kind = answer.headers["content-type"].partition(";")[0]
        assert kind in said["content"]
        assert status < 400 or kind == "application/problem+json"


async def test_a_405_names_what_can_be_done_there(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        for path, allowed in (
            ("/api/v1/state", "GET, HEAD, PATCH"),
            ("/api/v1/state/vars/count", "GET, HEAD, PUT"),
            ("/api/v1/drive/app/x", "DELETE, GET, HEAD, PUT"),
            ("/api/v1/works/trainer/run", "POST"),
        ):
            answer = await http.options(path)
            assert (answer.status_code, answer.headers.get_list("allow")) == (405, [allowed])


async def test_a_problem_shows_no_secret(backend: FakeBackend) -> None:
    backend.secrets = ["hunter2"]
    async with in_memory(backend) as http:
        answer = await http.get("/api/v1/works/hunter2")
    assert answer.status_code == 404
    assert "hunter2" not in answer.text
