"""REST of a real `orch run`: conditional reads and writes, waiting, history, events, routes of flows, who may talk."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
from testkit import RunningApp, wait_until

Apps = Callable[..., RunningApp]

APP = """
from fastapi import HTTPException, Request
from orch import App, Delete, Dict, Flow, Get, Post, Put, ScriptWork, ServiceWork, StaticFrontend


class Child(Flow):
    def __init__(self):
        super().__init__()
        self.words = ["a"]

    def configure_layout(self):
        return StaticFrontend("site")

    def configure_api(self):
        return [Get("/child/{n}", self.word)]

    def word(self, n: int, times: int = 1):
        if n >= len(self.words):
            raise HTTPException(418, detail=f"no word {n}")
        return {"word": self.words[n] * times}


class Late(Flow):
    def __init__(self, number):
        super().__init__()
        self.number = number
        self.hits = 0

    def configure_api(self):
        return [Post(f"/late/{self.number}", self.hit)]

    async def hit(self, request: Request):
        self.hits += len(await request.body())
        return self.hits


class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = 1
        self.late = Dict()
        self.d = {"a": {"b": 1}, "a/b~c": 1}
        self.rows = [1]
        self.seen = []
        self.child = Child()
        self.talk = ScriptWork(["python", "-uc", "for n in range(50): print('word', n)"], parallel=True)
        self.service = ServiceWork("python -m http.server {port} --bind 127.0.0.1")

    def run(self):
        self.talk.run()
        self.service.run()
        self.seen = [self.x, len(self.rows)]

    def configure_layout(self):
        return [
            {"name": "Page", "content": self.child},
            {"name": "Served", "content": self.service},
            {"name": "Far", "content": "https://example.com/"},
        ]

    def configure_api(self):
        return [
            Post("/add", self.add),
            Put("/set/{n}", self.put),
            Delete("/rows", self.clear),
            Post("/late", self.make),
            Delete("/gone/{n}", self.drop),
        ]

    def make(self, n: int):
        self.late[str(n)] = Late(n)

    def drop(self, n: int):
        del self.late[str(n)]

    def add(self, n: int = 1):
        self.x += n
        self.rows.append(n)
        return self.x

    def put(self, n: int, by: str = ""):
        self.x = n
        return {"by": by}

    def clear(self):
        self.rows.clear()


app = App(Root(), name="rest")
"""
JSON_PATCH = {"Content-Type": "application/json-patch+json"}


class Rest:
    """Requests below /api/v1, and what a problem looks like."""

    def __init__(self, app: RunningApp) -> None:
        self.app = app

    def __call__(self, method: str, path: str, **options: Any) -> httpx.Response:
        return self.app.request(method, f"/api/v1{path}", **options)

    def patch(self, *ops: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        return self("PATCH", "/state", content=json.dumps(ops), headers={**JSON_PATCH, **(headers or {})})

    def replace(self, path: str, value: Any) -> httpx.Response:
        return self.patch({"op": "replace", "path": path, "value": value})


def problem(answer: httpx.Response, status: int, *words: str) -> None:
    """The answer is problem JSON with that status, and its detail or hint says these words."""
    assert answer.status_code == status, (answer.status_code, answer.text)
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert {"type", "title", "status", "detail", "hint"} <= body.keys(), body
    assert body["status"] == status
    for word in words:
        assert word in body["detail"] + body["hint"], body


def test_rest(orch_app: Apps) -> None:
    app = orch_app(APP, {"site/index.html": "<h1>static page</h1>"})
    app.wait_state("/works/talk/status/stage", lambda stage: stage == "succeeded")
    wait_until(lambda: app.work("service")["status"]["is_ready"], 15, what="the service is ready")
    rest = Rest(app)
    check_conditions(rest)
    check_refusals(rest)
    check_waiting(rest)
    check_events(rest)
    check_logs(rest)
    check_flow_routes(rest)
    check_shown(rest)
    check_access(app)


def check_conditions(rest: Rest) -> None:
    first = rest("GET", "/state/vars/x")
    tag = first.headers["etag"]
    assert rest("GET", "/state/vars/x", headers={"If-None-Match": tag}).status_code == 304
    # Another value changes: this one's tag stays, the root's does not.
    root = rest("GET", "/state").headers["etag"]
    rev = rest("PUT", "/state/vars/rows", json=[1, 2]).json()["rev"]
    assert rest("GET", "/state/vars/x").headers["etag"] == tag
    assert rest("GET", "/state", headers={"If-None-Match": root}).status_code == 200
    # Below: the value's tag follows.
    below = rest("GET", "/state/vars/d").headers["etag"]
    assert rest("PUT", "/state/vars/d/a/b", json=2).json()["rev"] > rev
    assert rest("GET", "/state/vars/d").headers["etag"] != below
    assert rest("PUT", "/state/vars/x", json=2, headers={"If-Match": tag}).status_code == 200
    problem(rest("PUT", "/state/vars/x", json=3, headers={"If-Match": tag}), 412)
    problem(rest.patch({"op": "replace", "path": "/vars/x", "value": 3}, headers={"If-Match": root}), 412)
    assert rest("GET", "/state/vars/x").json() == 2
    # An escaped pointer.
    assert rest("GET", "/state/vars/d/a~1b~0c").json() == 1
    # An equal value is no change.
    tag = rest("GET", "/state/vars/x").headers["etag"]
    assert rest("PUT", "/state/vars/x", json=2).status_code == 200
    assert rest("GET", "/state/vars/x").headers["etag"] == tag


def check_refusals(rest: Rest) -> None:
    before = rest("GET", "/state/vars").json()
    problem(rest("GET", "/state/vars/nope"), 404, "nope")
    problem(rest("GET", "/works/nope"), 404, "nope")
    problem(rest("GET", "/nope"), 404)
    problem(rest("DELETE", "/state"), 405)
    problem(rest.patch({"op": "test", "path": "/vars/x", "value": 99}), 409, "/vars/x")
    problem(rest.replace("/vars/d/no/way", 1), 409, "/vars/d/no")
    problem(rest.patch({"op": "remove", "path": "/vars/rows/77"}), 409)
    problem(rest.replace("/works/talk/status/stage", "failed"), 403, "/works/talk/status")
    problem(rest.replace("/app/run", 9), 403)
    problem(rest.replace("", {}), 403)
    problem(rest.patch({"op": "add", "path": "/vars/undeclared", "value": 1}), 422, "undeclared")
    problem(rest.patch({"op": "remove", "path": "/vars/x"}), 403)
    problem(rest.patch({"op": "move", "from": "/vars/d/a", "path": "/vars/rows/0"}), 403)
    problem(rest.patch({"op": "jump", "path": "/vars/x"}), 400)
    problem(rest("PATCH", "/state", content=b'{"no": "list"}', headers=JSON_PATCH), 400)
    nan = b'[{"op": "replace", "path": "/vars/x", "value": NaN}]'
    problem(rest("PATCH", "/state", content=nan, headers=JSON_PATCH), 422)
    problem(rest("PATCH", "/state", content=b"[]", headers={"Content-Type": "text/plain"}), 415)
    problem(rest.replace("/vars/x", "y" * (3 * 2**20)), 422, "/vars/x", "3.0 MiB", "2.0 MiB")
    problem(rest.replace("/vars/x", "y" * (5 * 2**20)), 413)
    problem(rest("POST", "/works/talk/run", json={"args": [], "what": 1}), 422, "what")
    # One request is one revision or nothing.
    problem(
        rest.patch(
            {"op": "replace", "path": "/vars/x", "value": 50}, {"op": "replace", "path": "/vars/nope", "value": 1}
        ),
        422,
    )
    assert rest("GET", "/state/vars").json() == before
    # Within one attribute moves are fine, and appends are never lost.
    assert rest.patch({"op": "move", "from": "/vars/d/a/b", "path": "/vars/d/z"}).status_code == 200
    assert rest("GET", "/state/vars/d").json() == {"a": {}, "a/b~c": 1, "z": 2}
    append = {"op": "add", "path": "/vars/rows/-", "value": 7}
    threads = [threading.Thread(target=rest.patch, args=(append,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rest("GET", "/state/vars/rows").json() == [1, 2, 7, 7, 7, 7]


def check_waiting(rest: Rest) -> None:
    answer = rest("GET", "/state/vars/x")
    rev = int(answer.headers["etag"].strip('"'))
    before = time.monotonic()
    same = rest("GET", f"/state/vars/x?after={rev}&wait=0.3", headers={"If-None-Match": answer.headers["etag"]})
    assert same.status_code == 304
    assert 0.25 < time.monotonic() - before < 3
    found: list[Any] = []
    reader = threading.Thread(
        target=lambda: found.append(
            httpx.get(
                f"{rest.app.url}/api/v1/state/vars/x?after={rev}&wait=20",
                headers={"Authorization": f"Bearer {rest.app.token}"},
                timeout=30,
            ).json()
        )
    )
    reader.start()
    changed = rest.replace("/vars/x", 1234).json()["rev"]
    reader.join(10)
    assert found == [1234]
    # An earlier revision, and one that is none.
    then = rest("GET", f"/state/vars/x?rev={rev}")
    assert (then.json(), then.headers["etag"]) == (answer.json(), answer.headers["etag"])
    # Its tag says when it last changed, whatever else has changed up to the revision that is asked for.
    later = rest("PUT", "/state/vars/rows", json=["later"]).json()["rev"]
    assert rest("PUT", "/state/vars/rows", json=["latest"]).json()["rev"] > later
    assert rest("GET", f"/state/vars/x?rev={later}").headers["etag"] == f'"{changed}"'
    assert rest("GET", f"/state?rev={later}").headers["etag"] == f'"{later}"'
    assert rest("GET", f"/state/vars/x?rev={changed}").json() == 1234
    problem(rest("GET", "/state/vars/x?rev=99999999"), 404)
    [row] = rest("GET", "/history/vars/x?limit=1").json()
    assert (row["rev"], row["cause"]) == (changed, "api")
    assert row["ops"] == [{"op": "replace", "path": "/vars/x", "value": 1234}]


def read_events(rest: Rest, after: int, enough: Callable[[list[dict[str, Any]]], bool]) -> list[dict[str, Any]]:
    """Events from the stream until there are enough."""
    events: list[dict[str, Any]] = []
    headers = {"Authorization": f"Bearer {rest.app.token}"}
    with httpx.stream("GET", f"{rest.app.url}/api/v1/events?after={after}", headers=headers, timeout=10) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        event: dict[str, Any] = {}
        for line in answer.iter_lines():
            if not line:
                if "data" in event:
                    events.append(event)
                    if enough(events):
                        return events
                event = {}
                continue
            name, _, value = line.partition(": ")
            if name in ("id", "event", "data"):
                event[name] = json.loads(value) if name == "data" else value
    raise AssertionError(f"the stream ended: {events}")


def check_events(rest: Rest) -> None:
    rest.replace("/vars/x", 1)
    rev = rest.replace("/vars/x", 2).json()["rev"]
    events = read_events(rest, 0, lambda found: any(e["data"].get("rev") == rev for e in found))
    ids = [int(event["id"]) for event in events]
    assert ids == list(range(ids[0], ids[0] + len(ids)))
    revs = [event["data"]["rev"] for event in events if event["event"] == "diff"]
    assert revs == sorted(set(revs))
    assert {"diff", "status", "log"} <= {event["event"] for event in events}
    log = next(event["data"] for event in events if event["event"] == "log")
    assert {"work", "file", "offset"} <= log.keys()
    # Resumed by id: exactly what came after.
    middle = ids[len(ids) // 2]
    again = read_events(rest, middle, lambda found: int(found[-1]["id"]) >= ids[-1])
    assert [int(event["id"]) for event in again][: len(ids)] == ids[ids.index(middle) + 1 :]


def check_logs(rest: Rest) -> None:
    whole = rest("GET", "/works/talk/logs").text
    assert whole.count("word ") == 50
    assert rest("GET", "/works/talk/logs?tail=2").text.splitlines() == ["word 48", "word 49"]
    assert rest("GET", "/works/talk/logs?grep=word%201.").text.split("\n")[0] == "word 10"
    [call] = rest("GET", "/works/talk").json()["calls"]
    assert rest("GET", f"/works/talk/logs?call={call}&tail=1").text == "word 49\n"
    assert rest("GET", "/works/talk/logs?since=1h").text == whole
    problem(rest("GET", "/works/talk/logs?call=9-talk-9"), 404)
    problem(rest("GET", "/works/talk/logs?grep=("), 422)
    problem(rest("GET", "/works/talk/logs?since=soon"), 422)
    problem(rest("GET", "/works/talk/logs?tail=-1"), 422)


def check_flow_routes(rest: Rest) -> None:
    app = rest.app
    x = rest("GET", "/state/vars/x").json()
    head = int(rest("GET", "/state/vars/x").headers["x-orch-rev"])
    assert app.request("POST", "/add?n=5").json() == x + 5
    changes = [row for row in rest("GET", "/history?limit=10").json() if row["rev"] > head]
    [row] = [row for row in changes if any(op["path"] == "/vars/x" for op in row["ops"])]
    assert any(op["path"].startswith("/vars/rows") for op in row["ops"]), "both changes are one revision"
    app.wait_state("/vars/seen", lambda seen: seen[0] == x + 5)
    assert app.request("PUT", "/set/3?by=me").json() == {"by": "me"}
    assert rest("GET", "/state/vars/x").json() == 3
    assert app.request("GET", "/child/0?times=3").json() == {"word": "aaa"}
    answer = app.request("GET", "/child/9")
    assert (answer.status_code, "no word 9" in answer.text) == (418, True)
    assert app.request("GET", "/child/zero").status_code == 422
    assert app.request("DELETE", "/rows").status_code == 200
    assert rest("GET", "/state/vars/rows").json() == []
    paths = app.request("GET", "/openapi.json").json()["paths"]
    assert {"/add", "/set/{n}", "/child/{n}", "/api/v1/state"} <= paths.keys()
    # Flows made and removed later bring their routes and take them away.
    assert app.request("POST", "/late/7").status_code == 404
    assert app.request("POST", "/late?n=7").status_code == 200
    assert app.request("POST", "/late/7", content=b"x" * 1_000_000).json() == 1_000_000
    assert app.request("POST", "/late/7").json() == 1_000_000
    assert app.request("DELETE", "/gone/7").status_code == 200
    assert app.request("POST", "/late/7").status_code == 404
    assert app.request("GET", "/docs").status_code == 200


def check_shown(rest: Rest) -> None:
    tabs = rest("GET", "/layout").json()
    assert [tab["name"] for tab in tabs] == ["Page", "Served", "Far"]
    assert [tab["ready"] for tab in tabs] == [True, True, True]
    assert tabs[0]["url"] == "/view/child/"
    assert tabs[1]["url"] == "/view/service/"
    assert tabs[2]["url"] == "https://example.com/"
    assert "static page" in rest.app.request("GET", "/view/child/").text
    info = rest("GET", "/app").json()
    assert (info["name"], info["run"], info["stage"]) == ("rest", 1, "running")
    assert rest("GET", "/status").json()["works"]["talk"] == "succeeded"
    assert len(rest("GET", "/works").json()) == 2
    metrics = rest.app.request("GET", "/metrics").text
    assert "# TYPE" in metrics
    assert httpx.get(f"{rest.app.url}/healthz").status_code == 200


def check_access(app: RunningApp) -> None:
    def ask(method: str = "GET", path: str = "/api/v1/app", **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return httpx.request(method, app.url + path, headers=named)

    bearer = f"Bearer {app.token}"
    for path in ("/api/v1/app", "/docs", "/openapi.json", "/metrics", "/view/service/", "/add", "/"):
        assert ask(path=path).status_code == 401, path
    problem(ask(), 401)
    problem(ask(Authorization="Bearer wrong"), 401)
    problem(ask(Authorization=bearer, Host="evil.example"), 403, "evil.example")
    assert ask(Authorization=bearer, Host="localhost:1").status_code == 200
    # The cookie.
    answer = ask(path=f"/view/service/?a=1&token={app.token}")
    assert (answer.status_code, answer.headers["location"]) == (303, "/view/service/?a=1")
    cookie = answer.headers["set-cookie"]
    name = f"orch_{app.get('/app')['id']}"
    assert cookie.startswith(f"{name}=")
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert ask(path="/?token=wrong").status_code == 401
    value = cookie.partition(";")[0]
    host = app.url.removeprefix("http://")
    assert ask(Cookie=value).status_code == 200
    problem(ask("POST", "/add", Cookie=value), 403)
    problem(ask("POST", "/add", Cookie=value, Origin="http://evil.example"), 403)
    problem(ask("POST", "/add", Cookie=value, Origin="null"), 403)
    assert ask("POST", "/add", Cookie=value, Origin=f"http://{host}").status_code == 200
    assert ask("POST", "/add", Authorization=bearer, Origin="http://evil.example").status_code == 200
