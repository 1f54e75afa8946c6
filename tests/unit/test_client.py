"""The client against the real server, and what it makes of errors."""

from __future__ import annotations

import asyncio
import hashlib
import io
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from fake_backend import FakeBackend
from http_face import served
from testkit import free_port

from orch.client import Client
from orch.errors import (
    NotFound,
    OrchError,
    RuntimeLost,
    StateForbidden,
    StateMismatch,
    StateTestFailed,
    StateTypeError,
)
from orch_drive import DriveNotFound, DrivePathError

T = TypeVar("T")


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


@pytest.fixture
async def client(backend: FakeBackend) -> AsyncIterator[Client]:
    async with served(backend) as http:
        with Client(str(http.base_url), backend.token, cause="ui") as client:
            yield client


async def call(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    return await asyncio.to_thread(function, *args, **kwargs)


async def test_state(client: Client, backend: FakeBackend) -> None:
    assert (await call(client.state))["app"]["name"] == "studio"
    assert await call(client.state, "/vars/a~1b~0c/x") == 1
    assert await call(client.read, "/vars/count") == (0, 10)
    assert await call(client.put_state, "/vars/count", 5, match=10) == 11
    assert await call(client.patch, [{"op": "add", "path": "/vars/rows/-", "value": 4}], match=11) == 12
    assert backend.causes == ["ui", "ui"]
    assert len(await call(client.history)) == 2
    for key in ("..", ".", "a b/c~d%2F?#", "ä"):
        pointer = "/vars/deep/" + key.replace("~", "~0").replace("/", "~1")
        await call(client.put_state, pointer, key)
        assert await call(client.state, pointer) == key


async def test_waiting(client: Client, backend: FakeBackend) -> None:
    waiting = asyncio.ensure_future(call(client.wait_change, "/vars/count", after=10, wait=10))
    await asyncio.sleep(0.05)
    await backend.patch([{"op": "replace", "path": "/vars/count", "value": 1}], cause="flow")
    assert await waiting == 11
    assert await call(client.wait_change, "/vars/count", after=11, wait=0.01) == 11


async def test_errors_arrive_as_what_they_are(client: Client, tmp_path: Path) -> None:
    replace: dict[str, Any] = {"op": "replace", "path": "/vars/count", "value": 1}
    for kind, function, args in [
        (NotFound, client.state, ("/vars/nothing",)),
        (NotFound, client.work, ("nobody",)),
        (StateForbidden, client.put_state, ("/app/name", "x")),
        (StateTypeError, client.put_state, ("/vars/undeclared", 1)),
        (StateTestFailed, client.patch, ([replace | {"op": "test"}],)),
        (DriveNotFound, client.drive_list, ("app", "nothing")),
        (DrivePathError, client.drive_list, ("..", "x")),
        (OrchError, client.patch, ("no patch",)),
    ]:
        with pytest.raises(kind) as caught:
            await call(function, *args)
        assert type(caught.value) is kind or kind is NotFound
    with pytest.raises(StateMismatch) as mismatch:
        await call(client.put_state, "/vars/count", 1, match=3)
    assert mismatch.value.status == 412
    with pytest.raises(NotFound) as missing:
        await call(client.work, "nobody")
    assert missing.value.hint == "there is: trainer"


async def test_a_wrong_token_and_no_server(client: Client) -> None:
    with Client(client.url, "wrong") as stranger:
        with pytest.raises(OrchError, match="token") as refused:
            await call(stranger.works)
        assert refused.value.status == 401
    with Client(f"http://127.0.0.1:{free_port()}", "t") as nobody:
        with pytest.raises(RuntimeLost, match="does not answer") as lost:
            await call(nobody.works)
        assert "orch run" in lost.value.hint
        assert not await call(nobody.alive)
        with pytest.raises(RuntimeLost):
            await call(list, nobody.events())


async def test_works_and_app(client: Client, backend: FakeBackend) -> None:
    assert (await call(client.work, "root.ui.trainer"))["name"] == "ui.trainer"
    await call(client.stop_work, "trainer")
    await call(client.restart_work, "trainer")
    await call(client.run_work, "trainer", ["--x=1"], {"k": 2})
    await call(client.stop_app, "bye")
    assert backend.asked == [
        ("stop", "trainer"),
        ("restart", "trainer"),
        ("run", "trainer", ["--x=1"], {"k": 2}),
        ("stop app", "bye"),
    ]
    assert await call(client.alive)
    assert (await call(client.app))["name"] == "studio"
    assert (await call(client.status))["stage"] == "running"
    assert (await call(client.layout))[0]["name"] == "APP"


async def test_logs(client: Client, backend: FakeBackend) -> None:
    folder = backend.folder / "logs"
    folder.mkdir()
    (folder / "1-trainer-1.log").write_text("one\ntwo\n")
    assert b"".join(await call(list, client.logs("trainer"))) == b"one\ntwo\n"
    assert b"".join(await call(list, client.logs("trainer", grep="t", tail=1))) == b"two\n"
    with pytest.raises(NotFound):
        await call(list, client.logs("nobody"))


async def test_events(client: Client, backend: FakeBackend) -> None:
    for number in range(3):
        await backend.tell("app" if number else "diff", {"n": number, "text": "ä\n"})
    events = await call(list, client.events(after=0, follow=False))
    assert [(event.id, event.kind, event.data["n"]) for event in events] == [
        (1, "diff", 0),
        (2, "app", 1),
        (3, "app", 2),
    ]
    stream = client.events(after=1, kinds=["app"])
    assert (await call(next, stream)).data == {"n": 1, "text": "ä\n"}
    await call(stream.close)  # type: ignore[attr-defined]


async def test_drive(client: Client, tmp_path: Path) -> None:
    source = tmp_path / "x.bin"
    source.write_bytes(b"x" * 100_000)
    assert (await call(client.drive_put, "app", "in/x.bin", source))["version"] == 1
    assert [row["path"] for row in await call(client.drive_list, "app")] == ["in/x.bin"]
    assert [row["version"] for row in await call(client.drive_versions, "app", "in/x.bin")] == [1]
    assert await call(client.drive_verify, "app", "in") == 1
    (file,) = await call(client.drive_find, "app", "in/x.bin")
    (same,) = await call(client.drive_find, "app", "in")
    assert file["path"] == same["path"] == "in/x.bin"
    assert file["sha256"] == same["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert b"".join(await call(list, client.drive_get("app", file))) == source.read_bytes()
    with pytest.raises(DriveNotFound):
        await call(client.drive_find, "app", "nothing")
    await call(client.drive_delete, "app", "in/x.bin")
    assert await call(client.drive_list, "app") == []
    (tmp_path / "more/sub").mkdir(parents=True)
    (tmp_path / "more/sub/y").write_bytes(b"y" * 600_000)
    (tmp_path / "more/run.sh").write_bytes(b"#!")
    (tmp_path / "more/run.sh").chmod(0o755)
    for at, name in ((10**9, "run.sh"), (0, "sub/y")):
        os.utime(tmp_path / "more" / name, (at, at))
    told: list[tuple[int, int]] = []
    done = await call(client.drive_put, "app", "more", tmp_path / "more", progress=lambda *step: told.append(step))
    assert (done["version"], done["files"]) == (1, 2) and told[-1] == (600_002, 600_002) and len(told) > 2
    assert [row["path"] for row in await call(client.drive_list, "app")] == ["more/run.sh", "more/sub/y"]
    answer = await call(client._send, "GET", "/api/v1/drive/app/more", params={"zip": True})
    with zipfile.ZipFile(io.BytesIO(answer.content)) as got:
        dates = {info.filename: info.date_time for info in got.infolist()}
    assert dates == {"run.sh": time.localtime(10**9)[:6], "sub/y": (1980, 1, 2, 0, 0, 0)}
    (tmp_path / "more/run.sh").unlink()
    assert (await call(client.drive_put, "app", "more", tmp_path / "more", sync=True))["files"] == 1


def test_the_import_is_light() -> None:
    code = "import sys, orch.client; print(*({'httpx', 'fastapi', 'uvicorn', 'asyncio'} & {*sys.modules}))"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
