"""The Drive in a bucket of a real S3 server: what only a server far away can do to it."""

from __future__ import annotations

import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from s3server import ACCESS, BUCKET, READER, SECRET, S3Server
from testkit import wait_until

from orch_drive import Drive, DriveCorrupt, DriveNotFound, DrivePathError, DriveStore, DriveUnavailable
from orch_drive import s3 as s3_module
from orch_drive.s3 import S3Storage
from orch_drive.storage import blob_key, hash_whole

MIB = 1 << 20


@pytest.fixture
def store(s3_url: str) -> DriveStore:
    return DriveStore(s3_url, "app")


def storage(store: DriveStore) -> S3Storage:
    assert isinstance(store.storage, S3Storage)
    return store.storage


def large(path: Path, size: int, seed: bytes = b"orch") -> str:
    """A file that repeats nowhere, without holding it in memory; its checksum."""
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for n in range(size // MIB):
            block = hashlib.shake_128(seed + n.to_bytes(4, "big")).digest(MIB)
            digest.update(block)
            file.write(block)
    return digest.hexdigest()


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_a_large_file_goes_in_parts_and_comes_in_ranges(
    store: DriveStore, tmp_path: Path, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = large(tmp_path / "big", 50 * MIB)
    told: list[tuple[int, int]] = []
    manifest = store.publish("trainer", "big", tmp_path / "big", progress=lambda *at: told.append(at))
    entry = manifest.entries[0]
    assert entry.sha256 == sha256 and manifest.blobs == {entry.blob} and manifest.format == 2
    assert told[0] == (0, 50 * MIB) and told[-1] == (50 * MIB, 50 * MIB) and told == sorted(told)
    key = storage(store)._at(blob_key(entry.blob))
    head = s3_server.client().head_object(Bucket=BUCKET, Key=key)
    assert head["ContentLength"] == 50 * MIB and head["ETag"].strip('"').endswith("-4"), "four parts of 16 MiB"
    assert store.fetch(manifest, tmp_path / "got") == ["big"]
    with open(tmp_path / "got", "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    assert store.verify("big") == 1
    url = store.link(manifest)
    assert url is not None
    with urllib.request.urlopen(url) as answer, open(tmp_path / "big", "rb") as file:
        assert answer.read(100) == file.read(100)
    with monkeypatch.context() as patch:
        patch.setattr(s3_module, "_SPOOL", MIB)
        with store.open(manifest) as file:  # compared once, then read in ranges
            file.seek(40 * MIB)
            there = file.read(3)
            file.seek(-1, os.SEEK_END)
            last = file.read(10)
    with open(tmp_path / "big", "rb") as file:
        assert (os.pread(file.fileno(), 3, 40 * MIB), os.pread(file.fileno(), 9, 50 * MIB - 1)) == (there, last)


PUT = """
import sys
from pathlib import Path
from orch_drive import DriveStore
base, source = sys.argv[1:]
DriveStore(base, "app").publish("trainer", "big", Path(source))
"""


def test_an_interrupted_upload_is_gone_on_with(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = large(tmp_path / "big", 128 * MIB)
    killed_put(s3_url, tmp_path / "big", "drive.part.sent:2")
    assert store.list() == []
    sent = counted_parts(store, monkeypatch)
    manifest = store.publish("trainer", "big", tmp_path / "big")
    assert manifest.entries[0].sha256 == sha256 and store.verify("big") == 1
    assert 0 < len(sent) < 8, "parts that were there are not sent again"
    left = storage(store)._link.client.list_multipart_uploads(Bucket=BUCKET, Prefix=storage(store)._prefix)
    assert not left.get("Uploads")


def killed_put(s3_url: str, source: Path, point: str) -> None:
    command = [sys.executable, "-P", "-c", PUT, s3_url, str(source)]
    env = {**os.environ, "ORCH_CRASH_AT": point}
    assert subprocess.run(command, env=env, start_new_session=True, timeout=100).returncode == -signal.SIGKILL


def counted_parts(store: DriveStore, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of the parts that are sent from now on."""
    client, sent = storage(store)._link.client, list[int]()
    upload = client.upload_part

    def counted(**asked: Any) -> Any:
        sent.append(asked["PartNumber"])
        return upload(**asked)

    monkeypatch.setattr(client, "upload_part", counted)
    return sent


@pytest.mark.parametrize("forged", [False, True])
def test_a_source_that_changed_after_an_interrupted_upload_is_sent_as_it_is(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, forged: bool
) -> None:
    """Also if its size and time are the same: what was sent already is compared."""
    file = tmp_path / "big"
    large(file, 48 * MIB)
    before = file.stat()
    killed_put(s3_url, file, "drive.blob.written:1")
    with open(file, "r+b") as out:
        out.seek(20 * MIB)
        out.write(b"changed in the second part")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns if forged else before.st_mtime_ns + 1))
    sent = counted_parts(store, monkeypatch)
    manifest = store.publish("trainer", "big", file)
    assert sorted(sent) == ([2] if forged else [1, 2, 3])
    with open(file, "rb") as source:
        assert manifest.entries[0].sha256 == hashlib.file_digest(source, "sha256").hexdigest()
    assert store.verify("big") == 1


def test_an_upload_that_was_finished_but_not_named_is_used(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = large(tmp_path / "big", 40 * MIB)
    killed_put(s3_url, tmp_path / "big", "drive.blob.renamed:1")
    (left,) = store.storage.listing("blobs")
    sent = counted_parts(store, monkeypatch)
    manifest = store.publish("trainer", "big", tmp_path / "big")
    assert sent == [] and blob_key(manifest.entries[0].blob) == left
    assert manifest.entries[0].sha256 == sha256 and store.verify("big") == 1


def test_an_upload_that_was_begun_long_ago_is_not_gone_on_with(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blob could be as old as the upload's beginning, and collected before a manifest names it."""
    large(tmp_path / "big", 40 * MIB)
    killed_put(s3_url, tmp_path / "big", "drive.blob.written:1")
    monkeypatch.setattr(s3_module, "_YOUNG", -60.0)
    sent = counted_parts(store, monkeypatch)
    store.publish("trainer", "big", tmp_path / "big")
    assert sorted(sent) == [1, 2, 3] and store.verify("big") == 1


def test_what_a_killed_put_leaves_is_collected_by_age_and_never_what_is_named(
    store: DriveStore, s3_url: str, tmp_path: Path
) -> None:
    large(tmp_path / "one", 20 * MIB)
    named = store.publish("trainer", "one", tmp_path / "one")
    store.publish("trainer", "grows", tmp_path / "one", partial=True)
    large(tmp_path / "two", 20 * MIB, b"two")
    killed_put(s3_url, tmp_path / "two", "drive.blob.renamed:1")
    assert len(store.storage.listing("blobs")) == 2
    assert store.gc() == 0, "it may be about to be named"
    assert store.gc(min_age=0) == 1
    assert list(store.storage.listing("blobs")) == [blob_key(named.entries[0].blob)]
    assert store.verify("one") == 1 and store.read_bytes("grows", partial=True)[:MIB]


def test_what_was_written_by_its_checksum_before_is_read_and_kept(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As earlier versions of orch did with every file."""
    file, put = tmp_path / "big", S3Storage.put_large
    sha256 = large(file, 40 * MIB)
    with monkeypatch.context() as patch:
        patch.setattr(S3Storage, "put_large", lambda self, fd, tick, *_: put(self, fd, tick, sha256, sha256))
        old = store.publish("trainer", "big", file)
    assert not old.entries[0].blob and old.format == 1
    assert b"format" not in store.storage.read("manifests/trainer/big/00000001.json")
    fresh = DriveStore(*store.url.rsplit("/", 1))
    os.utime(file)
    sent = counted_parts(fresh, monkeypatch)
    assert fresh.publish("trainer", "big", file) == old and sent == []
    (tmp_path / "d").mkdir()
    file.rename(tmp_path / "d/renamed")
    large(tmp_path / "d/new", 20 * MIB, b"new")
    mixed = fresh.publish("trainer", "d", tmp_path / "d")
    assert len(sent) == 2, "the renamed file is not sent again"
    assert mixed.format == 2 and sha256 in mixed.blobs and len(mixed.blobs) == 2
    assert fresh.verify(".") == 3


def test_a_large_file_twice_in_a_folder_is_sent_once(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for name in ("best", "last"):
        large(source / name, 20 * MIB)
    large(source / "other", 20 * MIB, b"other")
    sent = counted_parts(store, monkeypatch)
    manifest = store.publish("trainer", "s", source)
    assert len(sent) == 4 and len(manifest.blobs) == 2 and store.verify("s") == 3


def test_a_checkpoint_of_the_same_size_is_read_once(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It need not be compared with the one before: a look at a few places says that it is another one."""
    read: list[int] = []
    monkeypatch.setattr("orch_drive.store.hash_whole", lambda fd: (read.append(fd), hash_whole(fd))[1])
    for seed in (b"one", b"two"):
        large(tmp_path / "last.ckpt", 20 * MIB, seed)
        manifest = store.publish("trainer", "last.ckpt", tmp_path / "last.ckpt")
        assert manifest.entries[0].blob and read == []
    with open(tmp_path / "last.ckpt", "r+b") as file:
        file.seek(MIB)
        file.write(b"where nobody looks")
    third = store.publish("trainer", "last.ckpt", tmp_path / "last.ckpt")
    assert len(read) == 1 and third.version == 3 and third.entries[0].sha256 != manifest.entries[0].sha256
    assert all(store.verify("last.ckpt", version=n) == 1 for n in (1, 2, 3))


def test_a_large_file_that_grows_goes_on_from_the_blob_it_has(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "s/events"
    file.parent.mkdir()
    large(file, 20 * MIB)
    first = store.publish("trainer", "s", file.parent, partial=True).entries[0]
    sent = counted_parts(store, monkeypatch)
    for n in range(2):
        with open(file, "ab") as out:
            out.write(os.urandom(100_000 + n))
        grown = store.publish("trainer", "s", file.parent, partial=True)
        assert sent == [] and grown.entries[0].pieces[0] == first.pieces[0] and grown.format == 2
        store.gc(min_age=0)
        store.fetch(grown, tmp_path / "got")
        assert (tmp_path / "got/events").read_bytes() == file.read_bytes()
    assert DriveStore(*store.url.rsplit("/", 1)).read_bytes("s/events", partial=True) == file.read_bytes()
    done = store.publish("trainer", "s", file.parent)
    assert len(done.entries[0].pieces) == 1 and store.verify("s") == 1


def test_a_damaged_large_blob_is_named_and_healed_by_the_next_publish(store: DriveStore, tmp_path: Path) -> None:
    source = tmp_path / "s"
    source.mkdir()
    large(source / "big", 20 * MIB)
    old = store.publish("trainer", "s", source)
    (source / "a").write_text("another version")
    manifest = store.publish("trainer", "s", source)
    blob = manifest.entries[1].blob
    for call in (
        lambda: store.fetch(manifest, tmp_path / "got"),
        lambda: store.open(manifest, "big"),
        lambda: store.verify("s"),
    ):
        data = store.storage.read(blob_key(blob))
        store.storage.remove(blob_key(blob))
        store.storage.create(blob_key(blob), data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(DriveCorrupt, match="s/big") as error:
            call()
        assert f"corrupt/{blob}" in error.value.hint and store.storage.size(f"corrupt/{blob}") == 20 * MIB
        assert not (tmp_path / "got/big").exists()
        with pytest.raises(DriveCorrupt, match=r"s/big.*missing"):
            store.verify("s")
        fresh = DriveStore(*store.url.rsplit("/", 1))
        assert fresh.publish("trainer", "s", source) == manifest, "its bytes are what they were"
        assert fresh.verify("s") == 2 and fresh.verify("s", version=old.version) == 1
        assert not fresh.storage.listing("manifests/.broken"), "it is sent again once"
    store.fetch(manifest, tmp_path / "got")
    assert (tmp_path / "got/big").read_bytes() == (source / "big").read_bytes()


def test_a_file_that_changes_while_its_parts_are_sent_leaves_nothing(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "big"
    large(file, 40 * MIB)
    client, turns = storage(store)._link.client, iter(range(100))
    upload = client.upload_part

    def changing(**asked: Any) -> Any:
        if next(turns) == 0:
            with open(file, "ab") as out:
                out.write(b"more")
        return upload(**asked)

    monkeypatch.setattr(client, "upload_part", changing)
    manifest = store.publish("trainer", "big", file)
    assert manifest.entries[0].size == 40 * MIB + 4 and store.verify("big") == 1
    assert len(store.storage.listing("blobs")) == 1
    assert not client.list_multipart_uploads(Bucket=BUCKET, Prefix=storage(store)._prefix).get("Uploads")


@pytest.mark.parametrize("step", ["upload_part", "complete_multipart_upload"])
@pytest.mark.parametrize("forged", [False, True])
def test_two_writers_of_one_large_file_at_once(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, forged: bool
) -> None:
    """The second one goes on with the upload of the first, and finishes it before that one does; `forged`: with other
    bytes that have come under the same time."""
    file = tmp_path / "big"
    large(file, 40 * MIB)
    other, client = DriveStore(s3_url, "app"), storage(store)._link.client
    call, lock, begun = getattr(client, step), threading.Lock(), list[bool]()

    def overtaken(**asked: Any) -> Any:
        with lock:
            if not begun:
                begun.append(True)
                monkeypatch.setattr(client, step, call)
                if forged:
                    before = file.stat()
                    with open(file, "r+b") as out:
                        out.seek(20 * MIB)
                        out.write(b"something else")
                    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
                other.publish("tester", "big", file)
        return call(**asked)

    monkeypatch.setattr(client, step, overtaken)
    mine = store.publish("trainer", "big", file)
    theirs = store.resolve("big", component="tester")
    assert theirs is not None and theirs.blobs == mine.blobs
    assert store.verify("big") == 2 and len(store.storage.listing("blobs")) == 1
    with open(file, "rb") as source:
        assert mine.entries[0].sha256 == hashlib.file_digest(source, "sha256").hexdigest()
    store.delete("tester", "big")
    store.gc(min_age=0)
    assert store.verify("big") == 1


@pytest.mark.parametrize(
    "point", ["drive.blob.renamed:1", "drive.part.sent:1", "drive.blob.written:1", "drive.manifest.renamed:1"]
)
def test_a_put_killed_anywhere_leaves_a_whole_version(
    store: DriveStore, s3_url: str, tmp_path: Path, point: str
) -> None:
    source = tmp_path / "s"
    source.mkdir()
    (source / "a").write_text("old")
    store.publish("trainer", "big", source)
    (source / "a").write_text("new")
    sha256 = large(source / "b", 20 * MIB)
    command = [sys.executable, "-P", "-c", PUT, s3_url, str(source)]
    env = {**os.environ, "ORCH_CRASH_AT": point}
    assert subprocess.run(command, env=env, start_new_session=True, timeout=100).returncode == -9
    reader = DriveStore(s3_url, "app")
    committed = point.startswith("drive.manifest")
    assert reader.read_bytes("big/a") == (b"new" if committed else b"old")
    assert reader.verify("big") == (2 if committed else 1)
    assert subprocess.run(command, start_new_session=True, timeout=100).returncode == 0
    found = reader.resolve("big/b")
    assert found is not None and found.entries[0].sha256 == sha256
    assert reader.read_bytes("big/a") == b"new" and reader.verify("big") == 2


def test_an_interrupted_download_is_gone_on_with(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = large(tmp_path / "big", 64 * MIB)
    manifest = store.publish("trainer", "big", tmp_path / "big")
    dest = tmp_path / "here" / "big"
    pieces = S3Storage._pieces
    asked: list[int] = []

    def cut(self: S3Storage, key: str, start: int, *rest: Any) -> Iterator[s3_module.Piece]:
        asked.append(start)
        for n, piece in enumerate(pieces(self, key, start, *rest)):
            if n == 4 and len(asked) == 1:  # 32 MiB are there
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(S3Storage, "_pieces", cut)
    with pytest.raises(KeyboardInterrupt):
        store.fetch(manifest, dest)
    assert not dest.exists()
    store.fetch(manifest, dest)
    assert asked == [0, 32 * MIB]
    with open(dest, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == sha256
    assert os.listdir(dest.parent) == ["big"]
    # what was left is not a beginning of what is wanted: everything is fetched, and nothing is blamed
    dest.unlink()
    asked.clear()
    with pytest.raises(KeyboardInterrupt):
        store.fetch(manifest, dest)
    (left,) = dest.parent.iterdir()
    with open(left, "r+b") as file:
        file.write(b"something else")
    store.fetch(manifest, dest)
    assert asked == [0, 32 * MIB, 0] and store.verify("big") == 1


def test_what_an_interrupted_put_has_sent_is_not_sent_again(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import obstore

    source = tmp_path / "s"
    source.mkdir()
    for n in range(60):
        (source / f"f{n:02d}").write_text(f"text {n} " * 12_000)  # too large to be packed
    put = obstore.put
    sent: list[str] = []

    def counted(where: Any, path: str, *rest: Any, **more: Any) -> Any:
        if "/blobs/" in path:
            if len(sent) == 40:
                raise KeyboardInterrupt
            sent.append(path)
        return put(where, path, *rest, **more)

    monkeypatch.setattr(obstore, "put", counted)
    with pytest.raises(KeyboardInterrupt):
        store.publish("trainer", "d", source)
    assert store.list() == [] and len(sent) == 40
    monkeypatch.setattr(obstore, "put", lambda *rest, **more: (sent.append(rest[1]), put(*rest, **more))[1])
    store.publish("trainer", "d", source)
    assert len([path for path in sent if "/blobs/" in path]) == 60 and store.verify("d") == 60


def test_a_presigned_link_gives_the_file(store: DriveStore, tmp_path: Path) -> None:
    (tmp_path / "model ä.pt").write_bytes(b"weights")
    manifest = store.publish("trainer", "model ä.pt", tmp_path / "model ä.pt")
    url = store.link(manifest, seconds=60)
    assert url is not None and SECRET not in url
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"weights"
        assert "model%20%C3%A4.pt" in answer.headers["content-disposition"]
    folder = store.publish("trainer", "d", tmp_path)
    assert store.link(folder) is None


# ---- who comes first -------------------------------------------------------------------------------------------------


def test_one_of_many_creates_and_replaces(store: DriveStore) -> None:
    there = storage(store)

    def both(n: int) -> tuple[bool, bool]:
        made = there.create("x", f"{n}".encode())
        seen = there.signature("x")
        return made, there.replace("x", f"then {n}".encode(), seen)

    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(both, range(8)))
    assert sum(made for made, _ in results) == 1
    assert any(replaced for _, replaced in results)
    seen = there.signature("x")
    assert there.replace("x", b"newer", seen) and not there.replace("x", b"too late", seen)
    assert there.read("x") == b"newer"
    assert not there.replace("gone", b"", seen)


def test_eight_writers_and_eight_readers(s3_url: str, tmp_path: Path) -> None:
    stop = threading.Event()

    def put(n: int) -> None:
        store, source = DriveStore(s3_url, "app"), tmp_path / f"w{n}"
        source.mkdir()
        for turn in range(3):
            for name in "abc":
                (source / name).write_text(f"{n}.{turn} {name}")
            store.publish("trainer", "d", source, call=f"{n}.{turn}")

    def read(n: int) -> int:
        store, seen = DriveStore(s3_url, "app"), 0
        while not (stop.is_set() and seen):
            manifest = store.resolve("d")
            if manifest is None:
                continue
            try:
                store.fetch(manifest, tmp_path / f"r{n}")
            except DriveNotFound:
                continue
            got = {path.read_text() for path in (tmp_path / f"r{n}").iterdir()}
            assert got == {f"{manifest.call} {name}" for name in "abc"}
            seen += 1
        return seen

    with ThreadPoolExecutor(16) as pool:
        readers = [pool.submit(read, n) for n in range(8)]
        try:
            for writer in [pool.submit(put, n) for n in range(8)]:
                writer.result()
        finally:
            stop.set()
        assert all(reader.result() > 0 for reader in readers)
    store = DriveStore(s3_url, "app")
    assert [info.version for info in store.versions("d")] == list(range(15, 25))
    store.verify("d")


# ---- a server that has troubles --------------------------------------------------------------------------------------


class Gate:
    """In front of the server: answers the requests that `refuse` picks with 503, passes the others on."""

    def __init__(self, port: int) -> None:
        self._upstream = port
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.refuse: Callable[[bytes], bool] = lambda head: False
        self.refused = 0
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        """One request a connection."""
        with client:
            head = b""
            while b"\r\n\r\n" not in head:
                data = client.recv(65536)
                if not data:
                    return
                head += data
            top, _, body = head.partition(b"\r\n\r\n")
            length = next(
                (int(line.split(b":")[1]) for line in top.split(b"\r\n") if line.lower().startswith(b"content-length")),
                0,
            )
            while len(body) < length:
                body += client.recv(65536)
            if self.refuse(top):
                self.refused += 1
                text = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
                client.sendall(
                    b"HTTP/1.1 503 Slow Down\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(text) + text
                )
                return
            with socket.create_connection(("127.0.0.1", self._upstream)) as server:
                server.sendall(top + b"\r\nConnection: close\r\n\r\n" + body)
                while data := server.recv(65536):
                    client.sendall(data)

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()


@pytest.fixture
def gate(s3_server: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(s3_server.port)
    monkeypatch.setenv("AWS_ENDPOINT_URL", gate.endpoint)
    yield gate
    gate.close()


def test_503_is_tried_again(gate: Gate, s3_url: str, tmp_path: Path) -> None:
    seen: dict[bytes, int] = {}

    def twice_each(head: bytes) -> bool:
        line = head.partition(b"\r\n")[0]
        seen[line] = seen.get(line, 0) + 1
        return seen[line] <= 2

    gate.refuse = twice_each
    store = DriveStore(s3_url, "app")
    (tmp_path / "s").mkdir()
    (tmp_path / "s/a").write_text("text")
    large(tmp_path / "s/b", 20 * MIB)
    manifest = store.publish("trainer", "s", tmp_path / "s")
    store.fetch(manifest, tmp_path / "got")
    assert (tmp_path / "got/a").read_text() == "text" and gate.refused > 6


def test_503_for_ever_is_said(gate: Gate, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3_module, "PATIENCE", 1.0)
    (tmp_path / "a").write_text("1")
    store = DriveStore(s3_url, "app")
    store.publish("trainer", "a", tmp_path / "a")
    (tmp_path / "a").write_text("22")
    gate.refuse = lambda head: head.startswith(b"PUT")
    with pytest.raises(DriveUnavailable, match=r"overloaded.*503") as error:
        store.publish("trainer", "a", tmp_path / "a")
    assert error.value.hint and gate.refused > 1
    assert store.read_bytes("a") == b"1"
    gate.refuse = lambda head: True
    with pytest.raises(DriveUnavailable, match="503"):
        DriveStore(s3_url, "other").list()


def test_a_server_that_is_killed_in_a_put_and_comes_back(
    store: DriveStore, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "s"
    source.mkdir()
    for n in range(100):
        (source / f"f{n:03d}").write_text(f"old {n}")
    store.publish("trainer", "d", source)
    for n in range(100):
        (source / f"f{n:03d}").write_text(f"new {n}")
    large(source / "big", 40 * MIB)
    half = threading.Event()
    put = S3Storage.put_large

    def then(self: S3Storage, *rest: Any) -> tuple[str, str]:
        half.set()
        return put(self, *rest)

    monkeypatch.setattr(S3Storage, "put_large", then)
    with ThreadPoolExecutor(1) as pool:
        published = pool.submit(store.publish, "trainer", "d", source)
        assert half.wait(30)
        s3_server.kill()
        s3_server.start()
        manifest = published.result(90)
    assert manifest.version == 2 and DriveStore(*store.url.rsplit("/", 1)).verify("d") == 101


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("access", "secret", "said"),
    [
        ("nobody", SECRET, "access key"),
        (ACCESS, "not-the-secret", "secret key"),
    ],
)
def test_wrong_credentials_are_named(
    s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, access: str, secret: str, said: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    (tmp_path / "a").write_text("1")
    for call in (lambda s: s.list(), lambda s: s.publish("t", "a", tmp_path / "a")):
        with pytest.raises(DriveUnavailable, match=said) as error:
            call(DriveStore(s3_url, "app"))
        assert error.value.hint and secret not in str(error.value)


def test_no_credentials_at_all(s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(DriveUnavailable, match="credentials") as error:
        DriveStore(s3_url, "app").list()
    assert "AWS_PROFILE" in error.value.hint


def test_a_profile_is_enough(s3_url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in s3_server.env():
        monkeypatch.delenv(name)
    (tmp_path / "credentials").write_text(f"[lab]\naws_access_key_id = {ACCESS}\naws_secret_access_key = {SECRET}\n")
    (tmp_path / "config").write_text(f"[profile lab]\nregion = eu-west-1\nendpoint_url = {s3_server.endpoint}\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    drive = Drive(s3_url).bind(component="t", cwd=tmp_path)
    (tmp_path / "a").write_text("1")
    assert drive.put("a") == 1 and drive.list() == ["a"]


def test_a_bucket_that_may_not_be_written(
    store: DriveStore, s3_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").write_text("1")
    manifest = store.publish("trainer", "a", tmp_path / "a")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", READER[0])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", READER[1])
    reader = DriveStore(s3_url, "app")
    reader.fetch(manifest, tmp_path / "got")
    (tmp_path / "a").write_text("2")
    with pytest.raises(DriveUnavailable, match="no permission"):
        reader.publish("trainer", "a", tmp_path / "a")
    assert reader.read_bytes("a") == b"1"


def test_a_bucket_that_is_not_there(s3_url: str, tmp_path: Path) -> None:
    with pytest.raises(DriveUnavailable, match="no such bucket"):
        DriveStore("s3://no-such-bucket-here", "app").list()


def test_a_server_that_is_not_there(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    with pytest.raises(DriveUnavailable, match=rf"cannot be reached.*{port}"):
        DriveStore(s3_url, "app").list()


@pytest.mark.parametrize(
    "url", ["s3://ab/x", "s3://UPPER/x", "s3://a_b_c/x", "s3://bucket/a//b", "s3://bucket/../x", "s3://bucket/a\nb"]
)
def test_names_that_a_bucket_cannot_hold(url: str) -> None:
    with pytest.raises(DrivePathError):
        DriveStore(url, "app")


def test_two_processes_see_each_other(store: DriveStore, s3_url: str, tmp_path: Path) -> None:
    (tmp_path / "f").write_text("from another process")
    command = [sys.executable, "-P", "-c", PUT, s3_url, str(tmp_path / "f")]
    other = subprocess.Popen(command, start_new_session=True)
    try:
        wait_until(lambda: store.list() == ["big"], timeout=30)
    finally:
        other.wait(30)
    assert store.read_bytes("big") == b"from another process"
