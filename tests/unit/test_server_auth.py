"""Who is let in: Host, Bearer token, cookie, Origin, and what is open to everybody."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
from fake_backend import FakeBackend
from http_face import BEARER, in_memory

from orch.server.auth import same_origin, without_token

HTML = {"accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
COOKIE = {"cookie": "a=b; orch_a1b2c3d4=app-token"}
OWN = {"origin": "http://127.0.0.1:7501"}


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


@pytest.mark.parametrize(
    "path", ["/", "/docs", "/openapi.json", "/metrics", "/api/v1/state", "/view/page/", "/nothing", "/api/v1/events"]
)
async def test_everything_needs_the_token(backend: FakeBackend, path: str) -> None:
    async with in_memory(backend, token=False) as http:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic app-token"}):
            answer = await http.get(path, headers=headers)
            assert answer.status_code == 401
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "app-token" not in answer.text
        assert (
            await http.get(path, headers={"cookie": "orch_a1b2c3d4=wrong; orch_other=app-token"})
        ).status_code == 401


async def test_health_is_open_and_tells_nothing(backend: FakeBackend) -> None:
    async with in_memory(backend, token=False) as http:
        answer = await http.get("/healthz", headers={"host": "probe.example"})
        assert answer.status_code == 200
        assert answer.json()["status"] == "ok"
        assert answer.json().keys() == {"status", "version"}


async def test_a_person_is_told_how_to_open_the_app(backend: FakeBackend) -> None:
    async with in_memory(backend, token=False) as http:
        answer = await http.get("/view/page/", headers=HTML)
        assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
        assert "orch open" in answer.text


async def test_the_token_in_the_address_becomes_a_cookie(backend: FakeBackend) -> None:
    async with in_memory(backend, token=False) as http:
        answer = await http.get("/view/page/x%20y?a=1&token=app-token&b=%26", headers=HTML)
        assert answer.status_code == 303
        assert answer.headers["location"] == "/view/page/x%20y?a=1&b=%26"
        cookie = answer.headers["set-cookie"]
        assert cookie.startswith("orch_a1b2c3d4=app-token;")
        assert {part.strip() for part in cookie.split(";")[1:]} == {"HttpOnly", "SameSite=Lax", "Path=/"}
        assert (await http.get("/api/v1/app")).status_code == 200  # the client has the cookie now
        assert (await http.get("/?token=wrong")).status_code != 303


async def test_a_wrong_token_in_the_address_is_no_way_in(backend: FakeBackend) -> None:
    async with in_memory(backend, token=False) as http:
        assert (await http.get("/?token=app-toke")).status_code == 401
        assert (await http.get("/?token=")).status_code == 401
        assert (await http.post("/api/v1/app/stop?token=app-token")).status_code == 401


async def test_the_redirect_stays_on_this_host(backend: FakeBackend) -> None:
    async with in_memory(backend, token=False) as http:
        answer = await http.get("http://127.0.0.1:7501//evil.example/x?token=app-token")
        assert answer.headers["location"] == "/evil.example/x"


@pytest.mark.parametrize(
    "origin", ["", "null", "http://evil.example", "http://127.0.0.1:9999", "http://localhost:7501"]
)
async def test_with_a_cookie_writes_need_an_own_origin(backend: FakeBackend, origin: str) -> None:
    async with in_memory(backend, token=False) as http:
        headers = {**COOKIE, **({"origin": origin} if origin else {})}
        assert (await http.post("/api/v1/works/trainer/stop", headers=headers)).status_code == 403
        assert (await http.delete("/api/v1/drive/app/x", headers=headers)).status_code == 403
        assert backend.asked == []
        assert (await http.get("/api/v1/app", headers=headers)).status_code == 200
        assert (await http.post("/api/v1/works/trainer/stop", headers={**COOKIE, **OWN})).status_code == 200
        # A program with the token in a header is no browser that was tricked.
        assert (await http.post("/api/v1/works/trainer/stop", headers={**BEARER, **headers})).status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("localhost", 200),
        ("LOCALHOST:80", 200),
        ("app.localhost:7501", 200),
        ("127.0.0.1:1", 200),
        ("192.168.1.7", 200),
        ("[::1]:7501", 200),
        ("studio.lan:7501", 200),
        ("Studio.Lan.", 200),
        ("proxy.lan", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("localhost.evil.example:7501", 403),
        ("2130706433", 403),
        ("", 400),
    ],
)
async def test_the_host_is_checked(backend: FakeBackend, host: str, status: int) -> None:
    async with in_memory(backend, allow_hosts=["studio.lan", "proxy.lan:8443"]) as http:
        answer = await http.get("/api/v1/app", headers={"host": host})
        assert answer.status_code == status
        if status == 403:
            assert "--allow-host" in answer.json()["hint"]


def test_origins() -> None:
    assert same_origin("https://a.example", "a.example:443")
    assert same_origin("http://A.example:80", "a.example")
    assert not same_origin("https://a.example", "a.example:80")
    assert not same_origin("null", "null")
    assert not same_origin("", "")


def test_the_query_without_token() -> None:
    assert without_token(b"token=a&x=1&token=b&tokens=2&y") == b"x=1&tokens=2&y"
    assert without_token(b"token=a") == b""


async def test_agents_have_their_own_token(backend: FakeBackend) -> None:
    body = {"agent": "local", "epoch": 2, "seq": 1, "items": []}
    agent = {"authorization": "Bearer agent-token"}
    async with in_memory(backend, token=False) as http:
        for headers, sent, status in [
            (agent, body, 200),
            ({}, body, 401),
            (BEARER, body, 401),
            (agent, {**body, "agent": "other"}, 401),
            (agent, {**body, "epoch": 1}, 409),
            (agent, {**body, "seq": "x"}, 422),
            (agent, [], 422),
        ]:
            answer = await http.post("/agents/v1/push", json=sent, headers=headers)
            assert answer.status_code == status, (headers, sent)
        assert (await http.post("/agents/v1/push", content=b"{", headers=agent)).status_code == 400
        assert (await http.get("/agents/v1/push", headers=agent)).status_code == 405
        item = {"type": "vars", "work": "trainer", "ops": [{"op": "replace", "path": "/x", "value": 1}]}
        answer: httpx.Response = await http.post("/agents/v1/push", json={**body, "items": [item]}, headers=agent)
        assert answer.json()["acked"] == 1
        assert (await http.get("/api/v1/app", headers=agent)).status_code == 401
    assert len(backend.pushed) == 2
