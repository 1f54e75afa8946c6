"""Reads and compare-and-sets over REST by eight clients, while the server is killed and started again and again."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from linearizable import Operation, Register, explain
from testkit import RunningApp, free_port, wait_until

Apps = Callable[..., RunningApp]

KEYS = ("a", "b", "c", "d")
CLIENTS = 8
KILLS = 6
TURNS = 400
"""Requests for each start of the server; it is killed when half of them have been made."""

APP = """
from orch import App, Flow

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.a = self.b = self.c = self.d = "start"
        self.passes = 0

    def run(self):
        self.passes = len(self.a + self.b)  # passes commit revisions of their own in between

app = App(Root())
"""


class Client(threading.Thread):
    """Reads, and sets what it has read to a value that nobody else uses; notes what it was answered."""

    def __init__(self, number: int, port: int, token: str, turns: threading.Semaphore, stop: threading.Event) -> None:
        super().__init__(name=f"client-{number}")
        self.number, self.port, self.token, self.turns, self.stop = number, port, token, turns, stop
        self.taken = 0
        self.random = random.Random(number)
        self.history: dict[str, list[Operation]] = {key: [] for key in KEYS}
        self.seen: dict[str, Register] = {}
        self.written = 0
        self.failure: BaseException | None = None
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        try:
            while not self.stop.is_set():
                if not self.turns.acquire(timeout=0.1):
                    continue
                self.taken += 1
                key = self.random.choice(KEYS)
                if key not in self.seen or self.random.random() < 0.4:
                    self._read(key)
                else:
                    self._set(key, by=self.random.choice(("test", "match")))
        except BaseException as error:
            self.failure = error
        finally:
            self._drop()

    def _drop(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _request(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, str] | None:
        """(status, JSON, ETag); None if the connection broke, so that the outcome is unknown."""
        while self._connection is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
            try:
                connection.connect()
                self._connection = connection
            except OSError:  # nothing was asked
                connection.close()
                if self.stop.wait(0.02):
                    return None
        headers = {"Authorization": f"Bearer {self.token}", **headers}
        try:
            self._connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = self._connection.getresponse()
            return answer.status, json.loads(answer.read()), answer.headers.get("ETag", "")
        except (OSError, http.client.HTTPException):
            self._drop()
            return None

    def _read(self, key: str) -> None:
        invoked = time.monotonic()
        answer = self._request("GET", f"/api/v1/state/vars/{key}")
        if answer is None:
            return
        status, value, tag = answer
        assert status == 200, answer
        rev = int(tag.strip('"'))
        self.history[key].append(Operation("read", "ok", invoked, time.monotonic(), value=value, rev=rev))
        self.seen[key] = Register(value, rev)

    def _set(self, key: str, *, by: str) -> None:
        seen = self.seen.pop(key)
        self.written += 1
        value = f"{self.number}.{self.written}"
        expected = seen.value if by == "test" else seen.rev
        invoked = time.monotonic()
        if by == "test":
            path = f"/vars/{key}"
            ops = [
                {"op": "test", "path": path, "value": expected},
                {"op": "replace", "path": path, "value": value},
            ]
            kind = {"Content-Type": "application/json-patch+json"}
            answer = self._request("PATCH", "/api/v1/state", ops, **kind)
        else:
            kind = {"Content-Type": "application/json", "If-Match": f'"{expected}"'}
            answer = self._request("PUT", f"/api/v1/state/vars/{key}", value, **kind)
        if answer is None:
            done = Operation(by, "unknown", invoked, expected=expected, value=value)
        elif answer[0] == 200:
            rev = answer[1]["rev"]
            done = Operation(by, "ok", invoked, time.monotonic(), expected=expected, value=value, rev=rev)
            self.seen[key] = Register(value, rev)
        else:
            assert answer[0] == (409 if by == "test" else 412), answer
            done = Operation(by, "failed", invoked, time.monotonic(), expected=expected, value=value)
        self.history[key].append(done)


def revisions(app: RunningApp) -> dict[int, Any]:
    """All kept revisions: what, and who."""
    found: dict[int, Any] = {}
    for key in (*KEYS, "passes"):
        for row in app.get(f"/history/vars/{key}?limit=1000"):
            found[row["rev"]] = [row["cause"], row["at"], row["ops"]]
    return found


@pytest.mark.slow
def test_histories_are_linearizable_under_kills(orch_app: Apps) -> None:
    port = free_port()
    app = orch_app(APP, start=False)
    app.start(port=port)
    app.wait_state("/vars/passes", lambda passes: passes == 10)
    started = {key: app.request("GET", f"/api/v1/state/vars/{key}") for key in KEYS}
    initial = {key: Register(got.json(), int(got.headers["ETag"].strip('"'))) for key, got in started.items()}
    stop, turns = threading.Event(), threading.Semaphore(0)
    clients = [Client(number, port, app.token, turns, stop) for number in range(CLIENTS)]

    def acknowledged() -> list[tuple[str, Operation]]:
        return [
            (key, op)
            for client in clients
            for key in KEYS
            for op in list(client.history[key])
            if op.outcome == "ok" and op.kind != "read"
        ]

    def taken(count: int) -> bool:
        assert not any(client.failure for client in clients), [client.failure for client in clients]
        return sum(client.taken for client in clients) >= count

    before: dict[int, Any] = {}
    try:
        for client in clients:
            client.start()
        for number in range(KILLS):
            turns.release(TURNS)
            wait_until(lambda number=number: taken(number * TURNS + TURNS // 2), 30, what="requests")
            app.kill()
            app.start(port=port)
            now = revisions(app)
            assert {rev: now[rev] for rev in before} == before, "a revision has disappeared or changed"
            before = now
        turns.release(TURNS)
        wait_until(lambda: taken((KILLS + 1) * TURNS), 30, what="requests after the last kill")
    finally:
        stop.set()
        for client in clients:
            client.join(40)

    assert taken(0)
    now = revisions(app)
    assert {rev: now[rev] for rev in before} == before, "a revision has disappeared or changed"
    written = acknowledged()
    assert len({op.rev for _, op in written}) == len(written), "two writes were told one revision"
    for key, op in written:
        assert {"op": "replace", "path": f"/vars/{key}", "value": op.value} in now[op.rev][2], (key, op)
    for key in KEYS:
        history = [op for client in clients for op in client.history[key]]
        final = app.request("GET", f"/api/v1/state/vars/{key}")
        end = time.monotonic()
        rev = int(final.headers["ETag"].strip('"'))
        history.append(Operation("read", "ok", end, end, value=final.json(), rev=rev))
        assert {op.outcome for op in history} >= {"ok", "failed"}
        assert explain(history, initial[key]) is None, key
        # The same history without one of its writes cannot be explained: the check is no formality.
        lost = next(op for op in history if op.outcome == "ok" and op.kind != "read")
        assert explain([op for op in history if op is not lost], initial[key]) is not None
    assert app.interrupt() == 130
