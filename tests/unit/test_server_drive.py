"""The Drive routes on a real Drive: list, download, ranges, versions, zip, upload, delete."""

from __future__ import annotations

import errno
import io
import zipfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fake_backend import FakeBackend
from http_face import in_memory

from orch.server.drive import parse_range
from orch_drive import DriveStore


@pytest.fixture
def backend(tmp_path: Path) -> FakeBackend:
    return FakeBackend(tmp_path)


@pytest.fixture
async def http(backend: FakeBackend) -> AsyncIterator[httpx.AsyncClient]:
    async with in_memory(backend) as client:
        yield client


@pytest.fixture
def store(backend: FakeBackend, tmp_path: Path) -> DriveStore:
    """A Drive with a folder of one work, a file of another, and one path that both publish."""
    store = DriveStore(backend.drive_url, "app")
    logs = tmp_path / "logs"
    (logs / "v0").mkdir(parents=True)
    (logs / "v0" / "metrics.csv").write_text("a,b\n1,2\n")
    (logs / "ä.txt").write_text("ten bytes!")
    (tmp_path / "model.pt2").write_bytes(b"first")
    store.publish("trainer", "lightning_logs", logs)
    store.publish("trainer", "model.pt2", tmp_path / "model.pt2")
    (tmp_path / "model.pt2").write_bytes(b"second version")
    store.publish("trainer", "model.pt2", tmp_path / "model.pt2")
    for component in ("trainer", "ui.other"):
        store.publish(component, "both.txt", logs / "ä.txt")
    return store


async def test_folders_are_listed(http: httpx.AsyncClient, store: DriveStore) -> None:
    for path in ("/api/v1/drive/app", "/api/v1/drive/app/"):
        rows = (await http.get(path)).json()
        assert [(row["path"], row["type"], row["component"]) for row in rows] == [
            ("both.txt", "file", "trainer"),
            ("both.txt", "file", "ui.other"),
            ("lightning_logs", "folder", "trainer"),
            ("model.pt2", "file", "trainer"),
        ]
    assert (rows[2]["files"], rows[2]["size"]) == (2, 18)
    assert (rows[3]["version"], rows[3]["size"]) == (2, 14)
    rows = (await http.get("/api/v1/drive/app/lightning_logs")).json()
    assert [row["path"] for row in rows] == ["lightning_logs/v0", "lightning_logs/ä.txt"]
    rows = (await http.get("/api/v1/drive/app/?recursive=true&component=trainer")).json()
    assert len(rows) == 4
    assert (await http.get("/api/v1/drive/app/nothing")).status_code == 404
    assert (await http.get("/api/v1/drive/empty/")).json() == []


async def test_files_are_downloaded(http: httpx.AsyncClient, store: DriveStore) -> None:
    answer = await http.get("/api/v1/drive/app/model.pt2")
    assert (answer.content, answer.headers["content-length"]) == (b"second version", "14")
    assert answer.headers["content-security-policy"] == "sandbox"
    assert answer.headers["x-orch-version"] == "2"
    tag = answer.headers["etag"]
    assert (await http.get("/api/v1/drive/app/model.pt2", headers={"if-none-match": tag})).status_code == 304
    assert (await http.get("/api/v1/drive/app/model.pt2?version=1")).content == b"first"
    assert (await http.get("/api/v1/drive/app/model.pt2?version=7")).status_code == 404
    assert (await http.get("/api/v1/drive/app/lightning_logs/%C3%A4.txt")).text == "ten bytes!"
    head = await http.head("/api/v1/drive/app/model.pt2")
    assert (head.content, head.headers["content-length"]) == (b"", "14")
    assert (await http.get("/api/v1/drive/app/both.txt")).status_code == 409
    assert (await http.get("/api/v1/drive/app/both.txt?component=ui.other")).text == "ten bytes!"


async def test_parts_of_files(http: httpx.AsyncClient, store: DriveStore) -> None:
    path = "/api/v1/drive/app/lightning_logs/%C3%A4.txt"
    for asked, text, where in [
        ("bytes=0-2", "ten", "0-2"),
        ("bytes=4-", "bytes!", "4-9"),
        ("bytes=-6", "bytes!", "4-9"),
        ("bytes=4-999", "bytes!", "4-9"),
    ]:
        answer = await http.get(path, headers={"range": asked})
        assert (answer.status_code, answer.text) == (206, text)
        assert answer.headers["content-range"] == f"bytes {where}/10"
    outside = await http.get(path, headers={"range": "bytes=10-"})
    assert (outside.status_code, outside.headers["content-range"]) == (416, "bytes */10")
    for asked in ("bytes=1-2,4-5", "lines=1-2", "bytes=-", "bytes=5-2"):
        assert (await http.get(path, headers={"range": asked})).status_code == 200
    stale = {"range": "bytes=0-2", "if-range": '"other"'}
    assert (await http.get(path, headers=stale)).status_code == 200


def test_ranges_of_an_empty_file() -> None:
    with pytest.raises(ValueError, match="bytes=0-"):
        parse_range("bytes=0-", 0)


async def test_versions_and_verify(http: httpx.AsyncClient, store: DriveStore) -> None:
    rows = (await http.get("/api/v1/drive/app/model.pt2?versions=true")).json()
    assert [row["version"] for row in rows] == [1, 2]
    assert (await http.get("/api/v1/drive/app/nothing?versions=1")).status_code == 404
    assert (await http.get("/api/v1/drive/app/lightning_logs?verify=true")).json()["files"] == 2


async def test_links(http: httpx.AsyncClient, store: DriveStore) -> None:
    answer = await http.get("/api/v1/drive/app/model.pt2?link=true")
    assert answer.status_code == 409 and "bucket" in answer.json()["detail"]
    assert (await http.get("/api/v1/drive/app/nothing?link=true")).status_code == 404


async def test_a_drive_in_a_bucket(tmp_path: Path, s3_url: str) -> None:
    """List, download, ranges, zip, upload, versions, verify, links, as on local disk."""
    backend = FakeBackend(tmp_path)
    backend.drive_url = s3_url
    logs = tmp_path / "logs"
    logs.mkdir()
    for n in range(12):
        (logs / f"f{n}").write_text(f"text {n}")
    store = DriveStore(s3_url, "app")
    store.publish("trainer", "logs", logs)
    async with in_memory(backend) as http:
        assert len((await http.get("/api/v1/drive/app/logs")).json()) == 12
        for name in ("logs/f7", "in/x"):
            if name == "in/x":
                assert (await http.put(f"/api/v1/drive/app/{name}", content=b"text 7")).status_code == 201
            part = await http.get(f"/api/v1/drive/app/{name}", headers={"range": "bytes=5-"})
            assert (part.status_code, part.text) == (206, "7")
            answer = (await http.get(f"/api/v1/drive/app/{name}?link=true&seconds=60")).json()
            async with httpx.AsyncClient() as anybody:
                assert (await anybody.get(answer["url"])).text == "text 7"
        answer = await http.get("/api/v1/drive/app/logs?zip=true")
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.read("f11") == b"text 11" and len(archive.namelist()) == 12
        assert (await http.get("/api/v1/drive/app/logs?verify=true")).json()["files"] == 12
        assert [row["version"] for row in (await http.get("/api/v1/drive/app/in/x?versions=true")).json()] == [1]
        assert (await http.delete("/api/v1/drive/app/in/x")).status_code == 204
        assert (await http.get("/api/v1/drive/app/in/x")).status_code == 404


def zip_of(files: dict[str, bytes], **fields: Any) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(name)
            for field, value in fields.items():
                setattr(info, field, value)
            archive.writestr(info, data)
    return out.getvalue()


async def test_a_folder_is_uploaded_as_one_version(
    http: httpx.AsyncClient, store: DriveStore, backend: FakeBackend
) -> None:
    url = "/api/v1/drive/app/data"
    first = zip_of({"a.txt": b"one", "sub/b.txt": b"two", "empty/": b""}, external_attr=0o755 << 16)
    answer = await http.put(f"{url}?zip=true", content=first)
    assert (answer.status_code, answer.json()["version"], answer.json()["files"]) == (201, 1, 2)
    manifest = store.resolve("data")
    assert manifest is not None and manifest.is_dir and manifest.entries[0].executable
    assert (await http.put(f"{url}?zip=true", content=zip_of({"c.txt": b"three"}))).json()["version"] == 2
    assert store.list("data", recursive=True) == ["data/a.txt", "data/c.txt", "data/sub/b.txt"]
    assert (await http.put(f"{url}?zip=true&sync=true", content=zip_of({"c.txt": b"3"}))).json()["version"] == 3
    assert store.list("data", recursive=True) == ["data/c.txt"]
    whole = await http.get(f"{url}?zip=true")
    assert (await http.put("/api/v1/drive/app/again?zip=true", content=whole.content)).status_code == 201
    assert store.read_bytes("again/c.txt") == b"3"
    assert len(backend.published_manifests) == 4, "each is one publish that the flow hears of"

    backend.secrets.append("hush-hush")
    link = zip_of({"passwd": b"/etc/passwd"}, external_attr=0o120777 << 16)
    twice = io.BytesIO()
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(twice, "w") as archive:
        archive.writestr("x", "1")
        archive.writestr("x", "2")
    for content, status, word in [
        (zip_of({"../out": b"1"}), 422, "leaves the root"),
        (zip_of({"/etc/x": b"1"}), 422, "absolute"),
        (link, 422, "link"),
        (twice.getvalue(), 409, "twice"),
        (zip_of({"a": b"1", "a/b": b"2"}), 409, "twice"),
        (b"no zip", 422, "no zip file"),
        (first[:-30], 422, "no zip file"),
        (zip_of({"s": b"-" * 300_000 + b"hush-hush"}), 422, "secret"),
    ]:
        answer = await http.put(f"{url}?zip=true", content=content)
        assert (answer.status_code, word in answer.json()["detail"]) == (status, True), answer.text
    assert [info.version for info in store.versions("data")] == [1, 2, 3], "nothing has changed"


async def test_an_upload_that_does_not_fit_is_refused(
    http: httpx.AsyncClient, store: DriveStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("orch.server.drive.unzip", full)
    answer = await http.put("/api/v1/drive/app/data?zip=true", content=zip_of({"a": b"1"}))
    assert (answer.status_code, "No space left" in answer.json()["detail"]) == (503, True)
    assert "TMPDIR" in answer.json()["hint"] and store.resolve("data") is None


async def test_a_folder_as_zip(http: httpx.AsyncClient, store: DriveStore) -> None:
    answer = await http.get("/api/v1/drive/app/lightning_logs?zip=true")
    assert answer.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["v0/metrics.csv", "ä.txt"]
        assert archive.read("v0/metrics.csv") == b"a,b\n1,2\n"


async def test_upload_and_delete(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    body = bytes(range(256)) * 40_000  # larger than the limit of JSON bodies
    answer = await http.put("/api/v1/drive/app/in/data%20x.bin", content=body)
    assert answer.status_code == 201, answer.text
    assert answer.json()["path"] == "in/data x.bin"
    assert (answer.json()["version"], answer.json()["component"], answer.json()["size"]) == (1, "api", len(body))
    assert (await http.get("/api/v1/drive/app/in/data%20x.bin")).content == body
    again = await http.put("/api/v1/drive/app/in/data%20x.bin", content=b"")
    assert again.json()["version"] == 2
    assert (await http.get("/api/v1/drive/app/in/data%20x.bin")).content == b""
    assert (await http.delete("/api/v1/drive/app/in/data%20x.bin")).status_code == 204
    assert (await http.get("/api/v1/drive/app/in/data%20x.bin")).status_code == 404
    assert (await http.delete("/api/v1/drive/app/in/data%20x.bin")).status_code == 404
    told = [(item["drive"], item["version"], item.get("deleted", False)) for item in backend.published_manifests]
    assert told == [("app", 1, False), ("app", 2, False), ("app", 3, True)]


async def test_only_one_owners_files_are_deleted(http: httpx.AsyncClient, store: DriveStore) -> None:
    assert (await http.delete("/api/v1/drive/app/both.txt")).status_code == 409
    assert (await http.delete("/api/v1/drive/app/both.txt?component=ui.other")).status_code == 204
    assert (await http.get("/api/v1/drive/app/both.txt")).text == "ten bytes!"


@pytest.mark.parametrize(
    "path",
    ["app/..%2fx", "app/a/%2e%2e/%2e%2e/%2e%2e/x", "app//etc/passwd", "app/a%00b", "..%2f/x", ".orch/x"],
)
async def test_paths_that_leave_the_drive(http: httpx.AsyncClient, store: DriveStore, path: str) -> None:
    for method in ("GET", "PUT", "DELETE"):
        answer = await http.request(method, f"/api/v1/drive/{path}", content=b"x" if method == "PUT" else None)
        assert answer.status_code in (404, 422), (method, answer.text)
        assert answer.headers["content-type"] == "application/problem+json"


async def test_an_upload_that_breaks_off_publishes_nothing(http: httpx.AsyncClient, backend: FakeBackend) -> None:
    from orch.server.app import create_app

    app = create_app(backend)
    messages = [
        {"type": "http.request", "body": b"half", "more_body": True},
        {"type": "http.disconnect"},
    ]
    sent: list[object] = []

    async def receive() -> dict[str, object]:
        return messages.pop(0)

    async def send(message: object) -> None:
        sent.append(message)

    path = "/api/v1/drive/app/x"
    headers = [(b"host", b"localhost"), (b"authorization", b"Bearer app-token")]
    scope = {"type": "http", "method": "PUT", "path": path, "raw_path": path.encode(), "query_string": b""}
    await app({**scope, "headers": headers}, receive, send)
    await app.aclose()
    assert (await http.get(path)).status_code == 404
    assert backend.published_manifests == []
