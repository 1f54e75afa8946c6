"""Works, logs, events, the app's own pages, metrics, routes of the user's flows, and errors."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import httpx
import pytest
from fake_backend import FakeBackend
from fastapi import BackgroundTasks, Form, HTTPException, Query, Request, Response, UploadFile
from http_face import in_memory, served

from orch.calls import Call, Stage
from orch.errors import RuntimeLost
from orch.server.backend import ApiRoute
from orch.server.context import Context
from orch.server.events import sse


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


def write_log(backend: FakeBackend, name: str, text: str, mtime: float | None = None) -> Path:
    path = backend.folder / "logs" / f"{name}.log"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    if mtime is not None:
        os.utime(path, (mtime, mtime))
    return path


# ---- works -----------------------------------------------------------------------------------------------------------


async def test_works(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        assert (await http.get("/api/v1/works")).json()[0]["name"] == "trainer"
        assert (await http.get("/api/v1/works/ui.trainer")).json()["name"] == "ui.trainer"
        missing = await http.get("/api/v1/works/nobody")
        assert (missing.status_code, missing.json()["hint"]) == (404, "there is: trainer")
        for verb in ("stop", "restart"):
            assert (await http.post(f"/api/v1/works/trainer/{verb}")).status_code == 200
        assert (await http.get("/api/v1/works/trainer/stop")).status_code == 405
        assert backend.asked == [("stop", "trainer"), ("restart", "trainer")]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"args": [1, "a"], "kwargs": {"x": None}}, 200),
        ({}, 200),
        (None, 422),
        ([], 422),
        ({"args": 1}, 422),
        ({"kwargs": []}, 422),
        ({"arguments": []}, 422),
        ({"args": ["too much"]}, 422),
    ],
)
async def test_run_checks_its_body(backend: FakeBackend, body: Any, status: int) -> None:
    async with in_memory(backend) as http:
        answer = await http.post("/api/v1/works/trainer/run", content=json.dumps(body))
        assert answer.status_code == status
        assert len(backend.asked) == (status == 200)
        assert (await http.post("/api/v1/works/trainer/run")).status_code == 200  # no body at all: no arguments
        assert backend.asked[-1] == ("run", "trainer", [], {})


async def test_app_and_stop(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        assert (await http.get("/api/v1/app")).json()["name"] == "studio"
        assert (await http.get("/api/v1/status")).json()["stage"] == "running"
        assert (await http.get("/api/v1/layout")).json()[0]["name"] == "APP"
        assert (await http.post("/api/v1/app/stop", json={"message": "bye"})).status_code == 200
        assert (await http.post("/api/v1/app/stop", json={"massage": "bye"})).status_code == 422
    assert backend.asked == [("stop app", "bye")]


# ---- logs ------------------------------------------------------------------------------------------------------------


async def logs(http: httpx.AsyncClient, **params: Any) -> str:
    answer = await http.get("/api/v1/works/trainer/logs", params=params)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    return answer.text


async def test_logs(backend: FakeBackend) -> None:
    write_log(backend, "1-trainer-1", "one\ntwo\nthree")  # cut off in the middle of a line
    write_log(backend, "1-trainer-2", "four\nfive ä\n")
    async with in_memory(backend) as http:
        assert await logs(http) == "one\ntwo\nthree\nfour\nfive ä\n"
        assert await logs(http, call="1-trainer-1") == "one\ntwo\nthree"
        assert await logs(http, tail=1) == "five ä\n"
        assert await logs(http, tail=3) == "three\nfour\nfive ä\n"
        assert await logs(http, tail=99) == "one\ntwo\nthree\nfour\nfive ä\n"
        assert await logs(http, tail=0) == ""
        assert await logs(http, grep="^t") == "two\nthree\n"
        assert await logs(http, grep="o|v", tail=2) == "four\nfive ä\n"
        assert (await http.get("/api/v1/works/nobody/logs")).status_code == 404


@pytest.mark.parametrize("params", [{"tail": "-1"}, {"since": "yesterday"}, {"grep": "("}, {"grep": "(a+)+$"}])
async def test_logs_asked_for_wrongly(backend: FakeBackend, params: dict[str, str]) -> None:
    async with in_memory(backend) as http:
        answer = await http.get("/api/v1/works/trainer/logs", params=params)
        assert answer.status_code == 422
        assert next(iter(params)) in answer.json()["detail"]


async def test_logs_since(backend: FakeBackend) -> None:
    now = time.time()

    def header(attempt: int, ago: float) -> str:
        return (
            f"--- 1-trainer-2 attempt {attempt} {time.strftime('%Y-%m-%dT%H:%M:%S%z', time.localtime(now - ago))} ---\n"
        )

    write_log(backend, "1-trainer-1", "old\n", mtime=now - 7200)
    write_log(backend, "1-trainer-2", header(1, 3000) + "a\n" + header(2, 900) + "b\n" + header(3, 60) + "c\n")
    async with in_memory(backend) as http:
        assert await logs(http, since="20m") == header(1, 3000) + "a\n" + header(2, 900) + "b\n" + header(3, 60) + "c\n"
        assert await logs(http, since="5m") == header(2, 900) + "b\n" + header(3, 60) + "c\n"
        assert await logs(http, since="10") == header(3, 60) + "c\n"
        assert (await logs(http, since="3h")).startswith("old\n")
        iso = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(now - 300))
        assert (await logs(http, since=iso)).startswith(header(2, 900))


async def test_logs_are_followed_into_the_next_call(backend: FakeBackend) -> None:
    path = write_log(backend, "1-trainer-1", "one\n")
    async with served(backend) as http:
        async with http.stream("GET", "/api/v1/works/trainer/logs?follow=true&tail=5") as answer:
            pieces = answer.aiter_text()
            assert await anext(pieces) == "one\n"
            with path.open("a") as file:
                file.write("two\n")
            assert await anext(pieces) == "two\n"
            write_log(backend, "1-trainer-2", "three\n")
            assert await anext(pieces) == "three\n"


async def test_secrets_are_redacted_also_across_chunk_borders(backend: FakeBackend) -> None:
    backend.secrets = ["s3cret-value", "s3cret-value-longer", "multi\nline"]
    border = 64 * 1024 - 6  # where the first chunk ends, within the first secret
    filler = ("x" * 99 + "\n") * (border // 100) + "x" * (border % 100)
    write_log(backend, "1-trainer-1", f"{filler}s3cret-value-longer, s3cret-value and multi\nline s3cret-valu\n")
    async with in_memory(backend) as http:
        last = "x" * (border % 100) + "***, *** and *** s3cret-valu\n"
        assert (await logs(http)).endswith("\n" + last)
        assert await logs(http, tail=1) == last  # the tail does not begin within a secret
        assert await logs(http, grep="and") == last
        work = (await http.get("/api/v1/works/trainer")).json()
        assert work["last_lines"] == ["value ***", "value ***", "value ***"]
        backend.waiting("trainer", "failed: s3cret-value", "line s3cret-value-longer")
        for headers in ({"accept": "text/html"}, {}):
            page = await http.get("/view/trainer/", headers=headers)
            assert page.status_code == 503
            assert "***" in page.text
            assert "s3cret" not in page.text


# ---- events ----------------------------------------------------------------------------------------------------------


async def events_of(answer: httpx.Response, count: int) -> list[tuple[int, str, Any]]:
    found: list[tuple[int, str, Any]] = []
    fields: dict[str, str] = {}
    async for line in answer.aiter_lines():
        name, _, value = line.partition(": ")
        fields[name] = value
        if not line and "data" in fields:
            found.append((int(fields["id"]), fields["event"], json.loads(fields["data"])))
            fields = {}
            if len(found) == count:
                break
    return found


async def test_events_in_order_and_resumed(backend: FakeBackend) -> None:
    backend.secrets = ["hush"]
    await backend.tell("status", {"n": 1})
    await backend.tell("log", {"lines": ["say hush"]})
    async with served(backend) as http:
        async with http.stream("GET", "/api/v1/events?after=0") as answer:
            assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
            reading = asyncio.ensure_future(events_of(answer, 3))
            await asyncio.sleep(0.05)
            await backend.tell("status", {"n": 3})
            assert await reading == [
                (1, "status", {"n": 1}),
                (2, "log", {"lines": ["say ***"]}),
                (3, "status", {"n": 3}),
            ]
        async with http.stream("GET", "/api/v1/events?after=0", headers={"last-event-id": "2"}) as answer:
            assert await events_of(answer, 1) == [(3, "status", {"n": 3})]
        async with http.stream("GET", "/api/v1/events?after=0&kinds=log,app") as answer:
            assert await events_of(answer, 1) == [(2, "log", {"lines": ["say ***"]})]
        for query, count in (("after=0&follow=false", 3), ("after=3&follow=false", 0), ("follow=false", 0)):
            answer = await http.get(f"/api/v1/events?{query}")  # ends by itself
            assert answer.text.count("data:") == count
        assert (await http.get("/api/v1/events", headers={"last-event-id": "x"})).status_code == 400
        assert (await http.get("/api/v1/events?after=x")).status_code == 422


async def test_a_client_that_leaves_ends_its_stream(backend: FakeBackend) -> None:
    ended = asyncio.Event()

    async def endless(after: int | None) -> Any:
        try:
            await asyncio.sleep(3600)
            yield None
        finally:
            ended.set()

    backend.events = endless  # type: ignore[method-assign]
    async with served(backend) as http:
        async with http.stream("GET", "/api/v1/events") as answer:
            await anext(answer.aiter_raw())
            assert not ended.is_set()
        await asyncio.wait_for(ended.wait(), 5)


async def test_the_server_stops_under_open_streams(backend: FakeBackend) -> None:
    began = time.monotonic()
    async with served(backend) as http:
        await http.get("/api/v1/app")
        stream = http.stream("GET", "/api/v1/events")
        answer = await stream.__aenter__()
        began = time.monotonic()
    assert time.monotonic() - began < 1.5
    await stream.__aexit__(None, None, None)
    assert answer.status_code == 200


async def test_silence_brings_a_heartbeat(backend: FakeBackend) -> None:
    stream = sse(Context(backend), backend.events(None), frozenset(), heartbeat=0.01)
    assert await anext(stream) == b"retry: 1000\n\n"
    assert (await anext(stream)).startswith(b": ")
    await backend.tell("app", {})
    while (chunk := await anext(stream)).startswith(b":"):
        pass
    assert chunk == b"id: 1\nevent: app\ndata: {}\n\n"
    await stream.aclose()


# ---- pages, metrics, errors ------------------------------------------------------------------------------------------


async def test_the_documentation_comes_from_here(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        docs = await http.get("/docs")
        assert docs.status_code == 200
        assert "://" not in docs.text  # nothing is loaded from elsewhere
        api = (await http.get("/openapi.json")).json()
        assert api["info"]["title"] == "orch"
        paths = api["paths"]
        for route in ("/api/v1/state", "/api/v1/works/{name}/logs", "/api/v1/drive/{drive}/{path}", "/healthz"):
            assert route in paths
        assert "application/json-patch+json" in paths["/api/v1/state"]["patch"]["requestBody"]["content"]


async def test_the_shell(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        page = await http.get("/")
        assert page.headers["content-type"].startswith("text/html")
        assert "studio" in page.text
        assert (await http.get("/shell/%2e%2e/__init__.py")).status_code == 404
        assert (await http.get("/shell/__init__.py")).status_code == 404


async def test_metrics(backend: FakeBackend) -> None:
    async with in_memory(backend) as http:
        lines = (await http.get("/metrics")).text.splitlines()
    assert "# TYPE orch_passes_total counter" in lines
    assert lines.count("# TYPE orch_works gauge") == 1
    assert 'orch_works{stage="running"} 1.0' in lines


async def test_unexpected_errors_are_logged_and_not_shown(
    backend: FakeBackend, caplog: pytest.LogCaptureFixture
) -> None:
    backend.fail = ZeroDivisionError("inner detail")
    async with in_memory(backend) as http:
        with caplog.at_level(logging.ERROR):
            answer = await http.get("/api/v1/state")
    assert answer.status_code == 500
    assert answer.headers["content-type"] == "application/problem+json"
    assert "inner detail" not in answer.text
    assert [type(record.exc_info[1]) for record in caplog.records if record.exc_info] == [ZeroDivisionError]


async def test_own_errors_keep_their_status(backend: FakeBackend) -> None:
    backend.fail = RuntimeLost("the agent is gone", hint="wait")
    async with in_memory(backend) as http:
        answer = await http.get("/api/v1/state")
        assert (answer.status_code, answer.json()["detail"], answer.json()["hint"]) == (
            503,
            "the agent is gone",
            "wait",
        )
        for method, path, status in (("GET", "/nope", 404), ("DELETE", "/api/v1/app", 405), ("GET", "/api/v1/", 404)):
            answer = await http.request(method, path)
            assert (answer.status_code, answer.json()["status"]) == (status, status)


# ---- the user's own routes -------------------------------------------------------------------------------------------


def route(method: str, path: str, endpoint: Any) -> ApiRoute:
    async def invoke(answer: Callable[[], Any]) -> Any:
        return await asyncio.to_thread(answer)

    return ApiRoute(method, path, endpoint, invoke)


class Flow:
    factor = 2

    def double(self, x: int, y: Annotated[int, Query(ge=0)] = 1) -> dict[str, int]:
        """Twice the sum."""
        return {"sum": (x + y) * self.factor}

    def store(self, body: dict[str, int]) -> list[str]:
        if not body:
            raise HTTPException(418, "nothing to store")
        return list(body)


async def test_routes_of_flows_follow_fastapis_rules(backend: FakeBackend) -> None:
    flow = Flow()
    async with in_memory(backend) as http:
        assert (await http.get("/double/3")).status_code == 404
        backend.routes = [route("GET", "/double/{x}", flow.double), route("POST", "/store", flow.store)]
        assert (await http.get("/double/3")).json() == {"sum": 8}
        assert (await http.get("/double/3?y=4")).json() == {"sum": 14}
        wrong = await http.get("/double/three?y=-1")
        assert wrong.status_code == 422
        assert [error["loc"] for error in wrong.json()["errors"]] == [["path", "x"], ["query", "y"]]
        assert (await http.post("/store", json={"a": 1})).json() == ["a"]
        refused = await http.post("/store", json={})
        assert (refused.status_code, refused.json()["detail"]) == (418, "nothing to store")
        assert (await http.get("/store")).status_code == 405
        api = (await http.get("/openapi.json")).json()
        assert api["paths"]["/double/{x}"]["get"]["description"] == "Twice the sum."
        backend.routes = backend.routes[:1]
        assert (await http.post("/store", json={"a": 1})).status_code == 404
        assert "/store" not in (await http.get("/openapi.json")).json()["paths"]


async def test_methods_may_be_async_and_take_what_fastapi_gives(backend: FakeBackend) -> None:
    async def posted(request: Request) -> int:
        return len(await request.body())

    async def uploaded(request: Request, file: UploadFile, name: Annotated[str, Form()]) -> str:
        return f"{name}: {len(await file.read())}{request.url.path}"

    def answered(response: Response, tasks: BackgroundTasks) -> str:
        response.status_code = 201
        response.headers["x-own"] = "1"
        tasks.add_task(done.append, "task")
        return "made"

    done: list[str] = []
    backend.routes = [route("POST", "/p", posted), route("POST", "/u", uploaded), route("GET", "/a", answered)]
    large = b"x" * 3_000_000
    async with served(backend) as http:  # (a body in many pieces)
        assert (await http.post("/p", content=large)).json() == len(large)
        assert (await http.post("/u", files={"file": large}, data={"name": "n"})).json() == "n: 3000000/u"
        answer = await http.get("/a")
        assert (answer.status_code, answer.json(), answer.headers["x-own"]) == (201, "made", "1")
    assert done == ["task"]


async def test_what_a_method_returns_is_encoded_where_it_ran(backend: FakeBackend) -> None:
    rows = [1]

    def method() -> Any:
        return {"rows": rows, "call": Call(id="1-w-1", work="w", key="k"), "stage": Stage.FAILED}

    async def invoke(answer: Callable[[], Any]) -> Any:
        answered = answer()
        rows.append(2)  # the next pass
        return answered

    backend.routes = [ApiRoute("GET", "/m", method, invoke)]
    async with in_memory(backend) as http:
        answer = (await http.get("/m")).json()
    assert answer["rows"] == [1]
    assert (answer["call"]["id"], answer["call"]["stage"], answer["stage"]) == ("1-w-1", "pending", "failed")


async def test_an_error_of_a_method_is_named(backend: FakeBackend) -> None:
    def method() -> int:
        return 1 // 0

    backend.routes = [route("GET", "/m", method)]
    async with in_memory(backend) as http:
        answer = await http.get("/m")
    assert answer.status_code == 500
    assert answer.json()["detail"].startswith("GET /m: ZeroDivisionError: ")


@pytest.mark.parametrize("path", ["/api/v1/state/{name}", "/healthz", "/view/{work}", "/"])
async def test_a_route_that_orchs_own_hides_is_said_once(
    backend: FakeBackend, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    def method(name: str = "", work: str = "") -> None: ...

    backend.routes = [route("GET", path, method), route("GET", "/mine/{name}", method)]
    async with in_memory(backend) as http:
        await http.get("/mine/a")
        backend.routes = [*backend.routes, route("GET", "/more", method)]
        await http.get("/mine/a")
    assert [r.getMessage() for r in caplog.records if "never reached" in r.getMessage()] == [
        f"GET {path} of configure_api is never reached: orch has a route there"
    ]


async def test_a_route_that_fastapi_cannot_read_breaks_only_itself(backend: FakeBackend) -> None:
    def odd(x: Flow) -> None: ...

    backend.routes = [route("GET", "/odd", odd), route("GET", "/double/{x}", Flow().double)]
    async with in_memory(backend) as http:
        answer = await http.get("/odd")
        assert answer.status_code == 500
        assert "GET /odd" in answer.json()["detail"]
        assert (await http.get("/double/1")).status_code == 200
