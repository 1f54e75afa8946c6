"""The state routes over a real tree: pointers, tags, waiting, patches, and every kind of bad body."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from http_face import in_memory

PATCH = {"content-type": "application/json-patch+json"}


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


@pytest.fixture
async def http(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(backend) as client:
        yield client


def op(path: str, value: Any, verb: str = "replace") -> dict[str, Any]:
    return {"op": verb, "path": path, "value": value}


async def send(http: httpx.AsyncClient, *ops: dict[str, Any], **headers: str) -> httpx.Response:
    fields = {**PATCH, **{name.replace("_", "-"): value for name, value in headers.items()}}
    return await http.patch("/api/v1/state", content=json.dumps(ops), headers=fields)


async def test_root_and_values(http: httpx.AsyncClient) -> None:
    root = await http.get("/api/v1/state")
    assert root.status_code == 200
    assert root.json()["app"]["name"] == "studio"
    assert root.headers["etag"] == '"10"'
    assert root.headers["content-type"] == "application/json"
    assert (await http.get("/api/v1/state/vars/count")).json() == 0
    assert (await http.get("/api/v1/state/vars/rows/1")).json() == 2
    assert (await http.get("/api/v1/state/vars/deep/er")).json() == {"est": "ö"}


@pytest.mark.parametrize("path", ["/vars/a~1b~0c/x", "/vars/a%7E1b%7E0c/x", "/vars/%61~1b~0c/x"])
async def test_the_path_is_the_json_pointer(http: httpx.AsyncClient, path: str) -> None:
    assert (await http.get(f"/api/v1/state{path}")).json() == 1


@pytest.mark.parametrize("path", ["/nothing", "/vars/rows/7", "/vars/count/x", "/", "/vars/a~2b", "/vars/%ff"])
async def test_an_unknown_path_is_a_404_problem(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.get(f"/api/v1/state{path}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/problem+json"
    assert {"type", "title", "status", "detail", "hint"} <= answer.json().keys()


async def test_if_none_match(http: httpx.AsyncClient) -> None:
    for tag in ('"10"', 'W/"10"', '"3", "10"', "*"):
        answer = await http.get("/api/v1/state/vars/count", headers={"if-none-match": tag})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == '"10"'
    assert (await http.get("/api/v1/state/vars/count", headers={"if-none-match": '"9"'})).status_code == 200


async def test_tags_speak_of_the_value_not_of_the_tree(http: httpx.AsyncClient) -> None:
    answer = await send(http, op("/vars/count", 5))
    assert answer.json() == {"rev": 11}
    assert answer.headers["etag"] == '"11"'
    assert (await http.get("/api/v1/state/vars/count")).headers["etag"] == '"11"'
    assert (await http.get("/api/v1/state/vars/rows")).headers["etag"] == '"10"'
    assert (await http.get("/api/v1/state/vars")).headers["etag"] == '"11"'


async def test_long_poll_answers_when_the_value_changes(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    waiting = asyncio.ensure_future(http.get("/api/v1/state/vars/count?after=10&wait=20"))
    await asyncio.sleep(0.05)
    await send(http, op("/vars/rows/0", 9))  # another value: nobody is woken by it
    await asyncio.sleep(0.05)
    assert not waiting.done()
    await send(http, op("/vars/count", 1))
    answer = await waiting
    assert (answer.json(), answer.headers["etag"]) == (1, '"12"')


async def test_long_poll_that_is_over_answers_the_value_as_it_is(http: httpx.AsyncClient) -> None:
    answer = await http.get("/api/v1/state/vars/count?after=10&wait=0.01")
    assert (answer.status_code, answer.json(), answer.headers["etag"]) == (200, 0, '"10"')
    tag = {"if-none-match": '"10"'}
    assert (await http.get("/api/v1/state/vars/count?after=10&wait=0.01", headers=tag)).status_code == 304
    assert (await http.get("/api/v1/state/vars/count?after=9&wait=20")).json() == 0  # changed before: at once


async def test_long_poll_ends_with_the_server(backend: FakeBackend) -> None:
    closing = asyncio.Event()
    async with in_memory(backend, closing=closing) as http:
        waiting = asyncio.ensure_future(http.get("/api/v1/state/vars/count?after=10&wait=60"))
        await asyncio.sleep(0.05)
        closing.set()
        assert (await asyncio.wait_for(waiting, 2)).json() == 0


async def test_head_waits_without_a_body(http: httpx.AsyncClient) -> None:
    answer = await http.head("/api/v1/state")
    assert (answer.status_code, answer.content, answer.headers["etag"]) == (200, b"", '"10"')


async def test_earlier_revisions(http: httpx.AsyncClient) -> None:
    assert (await http.get("/api/v1/state/vars/count?rev=10")).json() == 0
    assert (await http.get("/api/v1/state/vars/count?rev=2")).status_code == 404
    assert (await http.get("/api/v1/state/vars/count?rev=x")).status_code == 422


async def test_patch_is_all_or_nothing(http: httpx.AsyncClient) -> None:
    answer = await send(http, op("/vars/count", 7), op("/vars/rows/-", 4, "add"), op("/vars/count", 0, "test"))
    assert answer.status_code == 409
    assert answer.json()["type"] == "urn:orch:problem:state-test-failed"
    assert (await http.get("/api/v1/state/vars")).headers["etag"] == '"10"'
    assert (await send(http, op("/vars/count", 7), op("/vars/rows/-", 4, "add"))).json() == {"rev": 11}
    assert (await http.get("/api/v1/state/vars/rows")).json() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ([op("/vars/rows/9", 1)], 409),
        ([op("/works/trainer/status/stage", "failed")], 403),
        ([op("/app/name", "x")], 403),
        ([op("/vars/undeclared", 1, "add")], 422),
        ([{"op": "remove", "path": "/vars/count"}], 403),
        ([{"op": "jump", "path": "/vars/count"}], 400),
        ([{"op": "replace", "path": "/vars/count"}], 400),
        ([{"op": "move", "path": "/vars/count"}], 400),
        ([{"op": "replace", "path": 3, "value": 1}], 400),
        ({"op": "replace"}, 400),
        (["replace"], 400),
        (None, 400),
    ],
)
async def test_patches_that_are_refused(http: httpx.AsyncClient, body: Any, status: int) -> None:
    answer = await http.patch("/api/v1/state", content=json.dumps(body), headers=PATCH)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert (await http.get("/api/v1/state")).headers["etag"] == '"10"'


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"[{", 400),
        (b"\xff\xfe", 400),
        (b'[{"op":"replace","path":"/vars/count","value":NaN}]', 422),
        (b'[{"op":"replace","path":"/vars/count","value":-Infinity}]', 422),
        (b'[{"op":"replace","path":"/vars/count","value":1e999}]', 422),
        (b'[{"op":"replace","path":"/vars/count","value":"\\ud800"}]', 422),
        (b"[" * 100_000, 422),
    ],
)
async def test_bodies_that_are_no_json_state(http: httpx.AsyncClient, body: bytes, status: int) -> None:
    answer = await http.patch("/api/v1/state", content=body, headers=PATCH)
    assert answer.status_code == status, answer.text


async def test_the_content_type_is_checked(http: httpx.AsyncClient) -> None:
    for kind in ("application/json", "text/plain", ""):
        answer = await http.patch("/api/v1/state", content=b"[]", headers={"content-type": kind})
        assert answer.status_code == 415
        assert answer.headers["accept-patch"] == "application/json-patch+json"
    kind = "application/json-patch+json; charset=utf-8"
    assert (await http.patch("/api/v1/state", content=b"[]", headers={"content-type": kind})).status_code == 200


async def test_a_body_that_is_too_large_is_not_read(http: httpx.AsyncClient) -> None:
    body = b" " * (4 * 1024 * 1024 + 1)
    assert (await http.patch("/api/v1/state", content=body, headers=PATCH)).status_code == 413

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(5):
            yield b" " * 1024 * 1024

    answer = await http.patch("/api/v1/state", content=chunks(), headers=PATCH)  # no Content-Length
    assert answer.status_code == 413
    assert "4,194,304" in answer.json()["detail"]


async def test_if_match(http: httpx.AsyncClient) -> None:
    assert (await send(http, op("/vars/count", 1), if_match='"10"')).status_code == 200
    stale = await send(http, op("/vars/count", 2), if_match='"10"')
    assert (stale.status_code, stale.json()["status"]) == (412, 412)
    assert (await send(http, op("/vars/count", 2), if_match='"9", "11"')).status_code == 200
    assert (await send(http, op("/vars/count", 3), if_match="*")).status_code == 200
    assert (await send(http, op("/vars/count", 4), if_match='W/"13"')).status_code == 412  # weak tags never match
    assert (await http.get("/api/v1/state/vars/count")).json() == 3


async def test_put_sets_one_value(http: httpx.AsyncClient) -> None:
    put = await http.put("/api/v1/state/vars/count", content=b"41")
    assert (put.status_code, put.json(), put.headers["etag"]) == (200, {"rev": 11}, '"11"')
    assert (await http.put("/api/v1/state/vars/a~1b~0c/new", json={"k": [None]})).status_code == 200
    assert (await http.get("/api/v1/state/vars/a~1b~0c")).json() == {"x": 1, "new": {"k": [None]}}
    assert (await http.put("/api/v1/state/vars/rows/0", json=9)).status_code == 200
    assert (await http.get("/api/v1/state/vars/rows")).json() == [9, 2, 3]  # set, not inserted
    assert (await http.put("/api/v1/state/vars/rows/3", json=9)).status_code == 409
    assert (await http.put("/api/v1/state/vars/undeclared", json=9)).status_code == 422
    assert (await http.put("/api/v1/state/app/name", json="x")).status_code == 403
    assert (await http.put("/api/v1/state/vars/count", content=b"NaN")).status_code == 422
    assert (await http.put("/api/v1/state/vars/count", content=b"")).status_code == 400


async def test_put_with_if_match_speaks_of_the_value(http: httpx.AsyncClient) -> None:
    await send(http, op("/vars/rows/0", 5))
    tag = {"if-match": '"10"'}
    assert (await http.put("/api/v1/state/vars/count", json=1, headers=tag)).status_code == 200
    assert (await http.put("/api/v1/state/vars/rows", json=[], headers=tag)).status_code == 412


async def test_an_equal_value_is_no_change_and_keeps_the_tag(http: httpx.AsyncClient) -> None:
    await send(http, op("/vars/rows/0", 5))
    put = await http.put("/api/v1/state/vars/count", json=0)
    assert (put.json()["rev"], put.headers["etag"]) == (11, '"10"')


async def test_the_cause(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    await send(http, op("/vars/count", 1))
    await send(http, op("/vars/count", 2), x_orch_cause="ui")
    await http.put("/api/v1/state/vars/count", json=3, headers={"x-orch-cause": "ui"})
    assert backend.causes == ["api", "ui", "ui"]
    assert (await send(http, op("/vars/count", 4), x_orch_cause="flow")).status_code == 400


async def test_history(http: httpx.AsyncClient) -> None:
    await send(http, op("/vars/count", 1))
    assert [item["rev"] for item in (await http.get("/api/v1/history/vars/count")).json()] == [11]
    assert (await http.get("/api/v1/history?limit=0")).status_code == 422
