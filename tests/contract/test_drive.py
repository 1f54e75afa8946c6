"""One suite over every storage of the Drive: memory, local disk, and a real S3 server."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orch_drive import (
    Drive,
    DriveAmbiguous,
    DriveConflict,
    DriveCorrupt,
    DriveError,
    DriveNotFound,
    DriveNotHere,
    DrivePathError,
    DriveStaleEpoch,
    DriveStore,
    DriveUnavailable,
    ManifestIndex,
)
from orch_drive.drive import drives_in
from orch_drive.manifest import Manifest
from orch_drive.storage import LocalStorage, blob_key

MakeDrive = Callable[..., Drive]


def remove_memory(url: str) -> None:
    import fsspec

    fs = fsspec.filesystem("memory")
    root = "/" + url.removeprefix("memory://")
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture(params=["local", "memory", "s3"])
def base_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "local":
        yield f"file://{tmp_path}/drive store"
        return
    if request.param == "s3":
        yield request.getfixturevalue("s3_url") + "/drive store"
        return
    url = f"memory://{uuid4().hex}"
    yield url
    remove_memory(url)


@pytest.fixture
def store(base_url: str) -> DriveStore:
    return DriveStore(base_url, "app")


@pytest.fixture
def make(base_url: str, tmp_path: Path) -> MakeDrive:
    """A Drive of a component, in a folder of its own."""

    def drive(component: str = "trainer", **more: Any) -> Drive:
        cwd = tmp_path / "cwd" / component
        cwd.mkdir(parents=True, exist_ok=True)
        return Drive("models").bind(base_url=base_url, component=component, cwd=cwd, **more)

    return drive


def write(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def tree(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.name.startswith(".orch-tmp-")
    }


def blobs(store: DriveStore) -> set[str]:
    return {key.rpartition("/")[2] for key in store.storage.listing("blobs")}


def rewrite(store: DriveStore, key: str, data: bytes) -> None:
    store.storage.remove(key)
    assert store.storage.create(key, data)


def damage(store: DriveStore, sha256: str, change: Callable[[bytes], bytes]) -> None:
    key, storage = blob_key(sha256), store.storage
    data = change(storage.read(key))
    if isinstance(storage, LocalStorage):
        path = storage.path(key)
        path.chmod(0o644)
        path.write_bytes(data)
    else:
        storage.remove(key)
        storage.create(key, data)


# ---- put and get -----------------------------------------------------------------------------------------------------


def test_a_file_and_a_folder_travel(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, best="weights", logs__v0__a="1", logs__v0__b__c="2")
    assert one.put("best") == 1
    assert one.put("logs") == 1
    assert other.list() == ["best", "logs"]
    assert other.get("best") == other.root_folder / "best"
    other.get("logs")
    assert tree(other.root_folder) == tree(one.root_folder)
    assert other.get("logs/v0/b").is_dir()
    assert one.verify("logs") == 2 and one.verify(".") == 3


@pytest.mark.parametrize(
    "name",
    [
        "a b.txt",
        " lead",
        "-rf",
        "ä日本🎈.pt",
        "a+b%20c#d?e&f",
        "x.json",
        "partial.json",
        "a~b",
        "[1]",
        "n\nl",
        "x" * 200,
    ],
)
def test_weird_names(make: MakeDrive, name: str) -> None:
    one, other = make("trainer"), make("server")
    (one.root_folder / name).write_text(name)
    (one.root_folder / "dir" / name).mkdir(parents=True)
    (one.root_folder / "dir" / name / name).write_text("inner")
    one.put(name)
    one.put("dir")
    assert name in other.list() and f"dir/{name}/{name}" in other.list(recursive=True)
    assert other.get(name).read_text() == name
    assert other.get(f"dir/{name}").joinpath(name).read_text() == "inner"
    assert [info.version for info in other.versions(name)] == [1]


@pytest.mark.parametrize("path", ["../x", "/etc/passwd", "a/../../x", "", "..\\x", "a\0b"])
def test_paths_that_leave_the_root_are_refused_everywhere(make: MakeDrive, path: str) -> None:
    drive = make()
    (drive.root_folder.parent / "x").write_text("secret")
    for call in (drive.put, drive.get, drive.list, drive.delete, drive.versions, drive.verify):
        with pytest.raises(DrivePathError):
            call(path)
    assert drive.list() == []


def test_the_whole_root_folder_can_be_put(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, a="1", b__c="2")
    one.put(".")
    other.get(".")
    assert tree(other.root_folder) == {"a": "1", "b/c": "2"}
    assert other.list("b") == ["b/c"]
    assert other.get("b/c").read_text() == "2"


def test_an_empty_folder_travels(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    (one.root_folder / "empty").mkdir()
    one.put("empty")
    assert other.get("empty").is_dir()


def test_an_empty_file_and_a_large_one(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    (one.root_folder / "none").touch()
    data = os.urandom(1 << 20) * 9 + b"tail"
    (one.root_folder / "large").write_bytes(data)
    one.put("none")
    one.put("large")
    assert other.get("none").read_bytes() == b""
    assert other.get("large").read_bytes() == data


def test_the_executable_bit_and_the_time_travel(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    script = one.root_folder / "run.sh"
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    os.utime(script, ns=(10**18, 10**18))
    one.put("run.sh")
    got = other.get("run.sh")
    assert os.access(got, os.X_OK) and got.stat().st_mtime_ns == 10**18


def test_a_missing_path_is_named(make: MakeDrive) -> None:
    drive = make()
    with pytest.raises(DriveNotFound, match=r"nothing\.pt"):
        drive.put("nothing.pt")
    with pytest.raises(DriveNotFound, match=r"nothing\.pt"):
        drive.get("nothing.pt")
    with pytest.raises(DriveNotFound, match=r"nothing\.pt"):
        drive.delete("nothing.pt")
    with pytest.raises(DriveNotFound):
        drive.verify("nothing.pt")
    assert drive.versions("nothing.pt") == []


def test_get_waits_for_the_path_to_appear(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    with pytest.raises(DriveNotFound):
        other.get("late", timeout=0.05)
    with ThreadPoolExecutor(1) as pool:
        got = pool.submit(other.get, "late", timeout=30)
        write(one.root_folder, late="here")
        one.put("late")
        assert got.result().read_text() == "here"


def test_get_does_not_clobber(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, d__a="new", d__b="same")
    one.put("d")
    write(other.root_folder, d__a="mine", d__b="same", d__c="extra")
    before = (other.root_folder / "d/b").stat()
    with pytest.raises(DriveConflict, match=r"d/a.*differs"):
        other.get("d")
    assert tree(other.root_folder) == {"d/a": "mine", "d/b": "same", "d/c": "extra"}
    other.get("d", overwrite=True)
    assert tree(other.root_folder) == {"d/a": "new", "d/b": "same", "d/c": "extra"}
    assert (other.root_folder / "d/b").stat().st_ino == before.st_ino, "an identical file is left alone"
    other.get("d")


def test_a_folder_in_the_way_of_a_file_and_back(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, x="file", y__z="deep")
    one.put("x")
    one.put("y")
    write(other.root_folder, x__in="way", y="way")
    with pytest.raises(DriveConflict):
        other.get("x", overwrite=True)
    with pytest.raises(DriveConflict):
        other.get("y", overwrite=True)


def test_links_are_followed_inside_and_refused_outside(make: MakeDrive, tmp_path: Path) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, d__real="bytes")
    (one.root_folder / "d/link").symlink_to("real")
    (one.root_folder / "d/dangling").symlink_to("nowhere")
    one.put("d")
    assert other.get("d/link").read_text() == "bytes"
    (tmp_path / "secret").write_text("secret")
    (one.root_folder / "d/out").symlink_to(tmp_path / "secret")
    with pytest.raises(DrivePathError, match=r"out leads out"):
        one.put("d")
    (one.root_folder / "d/out").unlink()
    (one.root_folder / "d/loop").symlink_to(".")
    with pytest.raises(DrivePathError, match=r"loop"):
        one.put("d")
    (one.root_folder / "whole").symlink_to(tmp_path)
    with pytest.raises(DrivePathError):
        one.put("whole")
    with pytest.raises(DrivePathError):
        one.put("whole/secret")
    (other.root_folder / "elsewhere").symlink_to(tmp_path)
    write(one.root_folder, elsewhere__secret="changed")
    one.put("elsewhere")
    with pytest.raises(DrivePathError):
        other.get("elsewhere/secret", overwrite=True)
    assert (tmp_path / "secret").read_text() == "secret"


def test_what_is_no_file_is_left_out(make: MakeDrive) -> None:
    drive = make()
    write(drive.root_folder, d__a="1")
    os.mkfifo(drive.root_folder / "d/pipe")
    drive.put("d")
    assert drive.list("d") == ["d/a"]
    with pytest.raises(DriveNotFound):
        drive.put("d/pipe")


def test_later_writes_to_the_source_do_not_reach_the_drive(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    for size in (100, 3 << 20):
        (one.root_folder / "f").write_bytes(b"a" * size)
        one.put("f")
        with open(one.root_folder / "f", "r+b") as file:
            file.write(b"b")
        got = other.get("f", overwrite=True)
        assert got.read_bytes() == b"a" * size
        got.write_bytes(b"mine")
        assert one.verify("f") == 1


# ---- versions --------------------------------------------------------------------------------------------------------


def test_versions_and_get_of_an_old_one(make: MakeDrive) -> None:
    one, other = make("trainer", call="1-trainer-1"), make("server")
    for text in ("1", "22", "333"):
        write(one.root_folder, f=text)
        one.put("f")
    infos = other.versions("f")
    assert [(info.version, info.size, info.files, info.component) for info in infos] == [
        (1, 1, 1, "trainer"),
        (2, 2, 1, "trainer"),
        (3, 3, 1, "trainer"),
    ]
    assert infos[0].call == "1-trainer-1" and infos[0].at <= infos[2].at <= time.time()
    assert other.get("f", version=2).read_text() == "22"
    with pytest.raises(DriveNotFound, match=r"version 9"):
        other.get("f", version=9)


def test_ten_versions_are_kept_and_the_rest_takes_no_room(make: MakeDrive, store: DriveStore) -> None:
    drive = make()
    for n in range(13):
        write(drive.root_folder, f=f"text {n}")
        drive.put("f")
    assert [info.version for info in drive.versions("f")] == list(range(4, 14))
    inside = drive._store("look")
    if not isinstance(inside.storage, LocalStorage):
        inside.gc(min_age=0)
    assert len(blobs(inside)) == 10
    for n in range(4, 14):
        assert drive.get("f", version=n, overwrite=True).read_text() == f"text {n - 1}"


def test_an_unchanged_put_is_no_new_version(make: MakeDrive) -> None:
    drive = make()
    write(drive.root_folder, d__a="1")
    assert drive.put("d") == drive.put("d") == 1
    os.utime(drive.root_folder / "d/a", ns=(1, 1))
    assert drive.put("d") == 1
    write(drive.root_folder, d__a="2")
    assert drive.put("d") == 2


def test_the_same_size_and_a_moment_later_is_seen(make: MakeDrive) -> None:
    drive = make()
    file = drive.root_folder / "f"
    for n in range(20):
        file.write_text(f"{n:04d}")
        assert drive.put("f") == n + 1
    file.write_text("abcd")
    status = file.stat()
    drive.put("f")
    file.write_text("efgh")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    drive.put("f")
    assert drive._store("look").read_bytes("f") == b"efgh"


def test_a_folder_is_merged_or_synchronized(make: MakeDrive) -> None:
    drive = make()
    write(drive.root_folder, d__a="1", d__b="2")
    drive.put("d")
    (drive.root_folder / "d/a").unlink()
    write(drive.root_folder, d__c="3")
    drive.put("d")
    assert drive.list("d") == ["d/a", "d/b", "d/c"]
    drive.put("d", sync=True)
    assert drive.list("d") == ["d/b", "d/c"]
    shutil.rmtree(drive.root_folder / "d/c", ignore_errors=True)
    (drive.root_folder / "d/c").unlink()
    write(drive.root_folder, d__c__deep="4")
    drive.put("d")
    assert drive.list("d", recursive=True) == ["d/b", "d/c/deep"]


def test_a_file_inside_a_published_folder_can_be_put_alone(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, d__a="1", d__b="2")
    one.put("d")
    write(one.root_folder, d__a="new")
    one.put("d/a")
    other.get("d")
    assert tree(other.root_folder / "d") == {"a": "new", "b": "2"}
    one.put("d", sync=True)
    assert other.get("d/a").read_text() == "new"


def test_only_what_changed_travels(make: MakeDrive) -> None:
    drive = make()
    for n in range(20):
        write(drive.root_folder, **{f"d__f{n}": f"text {n}"})
    (drive.root_folder / "d/big").write_bytes(b"x" * (2 << 20))
    drive.put("d")
    inside = drive._store("look")
    sent: list[str] = []
    batch = inside.storage.batch
    with pytest.MonkeyPatch.context() as patch:

        def watched(tick: Any) -> Any:
            made = batch(tick)
            small, large = made.add_bytes, made.add_file
            made.add_bytes = lambda sha, data: (sent.append(sha), small(sha, data))  # type: ignore[method-assign]
            made.add_file = lambda *given: (sent.append("large"), large(*given))[1]  # type: ignore[method-assign]
            return made

        patch.setattr(inside.storage, "batch", watched)
        drive.put("d")
        assert sent == []
        os.utime(drive.root_folder / "d/big")
        os.utime(drive.root_folder / "d/f1")
        drive.put("d")
        assert sent == []
        write(drive.root_folder, d__f3="other")
        drive.put("d")
        assert len(sent) == 1


# ---- owners ----------------------------------------------------------------------------------------------------------


def test_a_path_of_several_owners_is_ambiguous(make: MakeDrive) -> None:
    one, other, reader = make("trainer"), make("ui.other"), make("reader")
    write(one.root_folder, logs__a="1")
    write(other.root_folder, logs__b="2")
    one.put("logs")
    other.put("logs")
    for drive in (one, reader):
        with pytest.raises(DriveAmbiguous, match=r"trainer, ui\.other"):
            drive.get("logs")
    assert reader.get("logs/b").read_text() == "2"
    assert reader.get("logs", component_name="root.trainer").joinpath("a").read_text() == "1"
    assert reader.list("logs") == ["logs/a", "logs/b"]
    assert reader.list("logs", component_name="ui.other") == ["logs/b"]
    assert reader._store("look").owners("logs") == ["trainer", "ui.other"]
    with pytest.raises(DriveNotFound, match=r"nobody"):
        reader.get("logs", component_name="nobody")


def test_delete_concerns_only_the_own_name(make: MakeDrive) -> None:
    one, other = make("trainer"), make("other")
    write(one.root_folder, logs__a="1", logs__b="2")
    one.put("logs")
    with pytest.raises(DriveNotFound) as error:
        other.delete("logs")
    assert "trainer" in error.value.hint
    one.delete("logs/a")
    assert one.list("logs") == ["logs/b"]
    assert one.get("logs/a", version=1).read_text() == "1", "an older version keeps it"
    one.delete("logs")
    assert one.list() == [] and one.versions("logs") == []
    with pytest.raises(DriveNotFound):
        one.delete("logs")
    write(one.root_folder, logs__c="3")
    one.put("logs")
    assert one.list("logs", recursive=True) == ["logs/a", "logs/b", "logs/c"]


def test_delete_of_a_folder_of_single_paths_frees_the_room(make: MakeDrive) -> None:
    drive = make()
    write(drive.root_folder, d__a="1", d__b="2")
    drive.put("d/a")
    drive.put("d/b")
    drive.delete("d")
    assert drive.list(recursive=True) == []
    inside = drive._store("look")
    if not isinstance(inside.storage, LocalStorage):
        inside.gc(min_age=0)
    assert blobs(inside) == set()


# ---- epochs, partial versions ----------------------------------------------------------------------------------------


def test_a_stale_epoch_is_refused(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="new")
    store.publish("trainer", "s", source, epoch=5)
    write(source, a="old agent")
    for partial in (False, True):
        with pytest.raises(DriveStaleEpoch, match=r"epoch 4"):
            store.publish("trainer", "s", source, epoch=4, partial=partial)
    with pytest.raises(DriveStaleEpoch):
        store.delete("trainer", "s", epoch=4)
    assert store.read_bytes("s/a") == b"new"
    store.publish("trainer", "s", source, epoch=6, partial=True)
    with pytest.raises(DriveStaleEpoch):
        store.publish("trainer", "s", source, epoch=5)
    store.publish("other", "s", source, epoch=1)
    assert store.publish("trainer", "s", write(source, a="by hand")).epoch == 6, "0 is not fenced and keeps the fence"


def test_a_fence_shuts_out_older_epochs_at_every_path(store: DriveStore, base_url: str, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="1")
    store.publish("trainer", "s", source, epoch=4)
    store.publish("trainer", "logs", source, epoch=4, partial=True)
    store.fence("root.trainer", 5)
    stale = DriveStore(base_url, "app")
    write(source, a="2")
    for path in ("s", "never/published", "logs"):
        for partial in (False, True):
            with pytest.raises(DriveStaleEpoch, match=r"epoch 4"):
                stale.publish("trainer", path, source, epoch=4, partial=partial)
    with pytest.raises(DriveStaleEpoch):
        stale.delete("trainer", "s", epoch=4)
    with pytest.raises(DriveStaleEpoch):
        stale.fence("trainer", 4)
    assert store.read_bytes("s/a") == b"1", "what it had published stays"
    found = store.resolve("logs", partial=True)
    assert found is not None and found.partial
    store.fence("trainer", 5)
    store.publish("other", "s", source, epoch=1)
    store.delete("other", "s")
    assert store.publish("trainer", "s", source, epoch=5).version == 2
    assert store.publish("trainer", "s", write(source, a="by hand")).version == 3, "0 is not fenced"
    assert stale.list("s") == ["s/a"]


def test_a_newer_epoch_at_one_path_shuts_out_older_ones_at_all(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="1")
    store.publish("trainer", "s", source, epoch=5)
    with pytest.raises(DriveStaleEpoch):
        store.publish("trainer", "elsewhere", source, epoch=4)


def test_a_commit_that_a_fence_overtakes_never_counts(
    base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stale writer has looked, then the fence is set, then its write arrives."""
    stale, newer = DriveStore(base_url, "app"), DriveStore(base_url, "app")
    if stale.storage.locked:
        pytest.skip("committers are locked out here")
    source = write(tmp_path / "s", a="old")
    stale.publish("trainer", "s", source, epoch=4)
    stale.publish("trainer", "logs", source, epoch=4, partial=True)
    create, replace = stale.storage.create, stale.storage.replace

    def overtaken(key: str, data: bytes) -> bool:
        newer.fence("trainer", 5)
        assert create(key, data)
        assert newer.read_bytes("s/a") == b"old", "it does not count, although it is there"
        return True

    write(source, a="stale")
    with monkeypatch.context() as patch:
        patch.setattr(stale.storage, "create", overtaken)
        with pytest.raises(DriveStaleEpoch):
            stale.publish("trainer", "s", source, epoch=4)

    def overtaken_partial(key: str, data: bytes, seen: Any = None, **how: Any) -> bool:
        newer.fence("trainer", 7)
        return replace(key, data, seen, **how)

    newer.publish("trainer", "logs", source, epoch=5, partial=True)
    with monkeypatch.context() as patch:
        patch.setattr(stale.storage, "replace", overtaken_partial)
        with pytest.raises(DriveStaleEpoch):
            stale.publish("trainer", "logs", write(tmp_path / "t", a="very stale"), epoch=6, partial=True)
    assert newer.read_bytes("logs/a", partial=True) == b"stale" and newer.read_bytes("s/a") == b"old"
    fresh = DriveStore(base_url, "app")
    assert [info.version for info in fresh.versions("s")] == [1]
    assert fresh.publish("trainer", "s", write(source, a="new"), epoch=7).version > 1
    fresh.gc(min_age=0)
    assert fresh.read_bytes("s/a") == b"new" and fresh.verify(".") >= 1


def test_a_writer_without_an_epoch_is_not_lost_under_a_fence(
    base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has looked, then the fence is set, then its write arrives: it writes again."""
    by_hand, newer = DriveStore(base_url, "app"), DriveStore(base_url, "app")
    if by_hand.storage.locked:
        pytest.skip("committers are locked out here")
    source = write(tmp_path / "s", a="old")
    newer.fence("trainer", 4)
    newer.publish("trainer", "s", source, epoch=4)
    create, fences = by_hand.storage.create, iter((5, 6))

    def overtaken(key: str, data: bytes) -> bool:
        if epoch := next(fences, None):
            newer.fence("trainer", epoch)
        return create(key, data)

    monkeypatch.setattr(by_hand.storage, "create", overtaken)
    manifest = by_hand.publish("trainer", "s", write(source, a="by hand"))
    assert next(fences, None) is None and manifest.epoch == 6
    assert DriveStore(base_url, "app").read_bytes("s/a") == b"by hand"


def test_of_two_fences_the_higher_stays(store: DriveStore, base_url: str) -> None:
    def fence(epoch: int) -> bool:
        try:
            DriveStore(base_url, "app").fence("trainer", epoch)
        except DriveStaleEpoch:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        done = dict(zip(range(1, 9), pool.map(fence, range(1, 9)), strict=True))
    assert done[8]
    with pytest.raises(DriveStaleEpoch):
        store.fence("trainer", 7)


def test_a_file_that_grows_is_published_by_what_was_added(store: DriveStore, base_url: str, tmp_path: Path) -> None:
    source, dest = tmp_path / "logs", tmp_path / "board"
    source.mkdir()
    events = source / "events.out.tfevents.1"
    sent: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        batch = store.storage.batch

        def watched(tick: Any) -> Any:
            made = batch(tick)
            small, large = made.add_bytes, made.add_file
            made.add_bytes = lambda sha, data: (sent.append(len(data)), small(sha, data))  # type: ignore[method-assign]
            made.add_file = lambda fd, *rest: (sent.append(os.fstat(fd).st_size), large(fd, *rest))[1]  # type: ignore[method-assign]
            return made

        patch.setattr(store.storage, "batch", watched)
        reader = DriveStore(base_url, "app")
        whole = b""
        for turn in range(40):
            with open(events, "ab") as file:
                file.write(more := os.urandom(100_000))
            whole += more
            manifest = store.publish("trainer", "logs", source, partial=True)
            assert len(manifest.entries[0].pieces) <= 7
            if turn % 8 == 7:
                found = reader.resolve("logs", partial=True)
                assert found is not None
                reader.fetch(found, dest)
                assert (dest / events.name).read_bytes() == whole
        assert sum(sent) < 6 * len(whole), "not again and again from its beginning"
        assert manifest.entries[0].parts and reader.read_bytes(f"logs/{events.name}", partial=True) == whole
        rewritten = b"x" * len(whole) + b"longer"
        events.write_bytes(rewritten)
        store.publish("trainer", "logs", source, partial=True)
        assert reader.read_bytes(f"logs/{events.name}", partial=True) == rewritten
        with open(events, "ab") as file:
            file.write(b"end")
        store.publish("trainer", "logs", source, partial=True)
        done = store.publish("trainer", "logs", source)
    assert not done.entries[0].parts, "a complete version has its files in one piece"
    store.fetch(done, dest)
    assert (dest / events.name).read_bytes() == rewritten + b"end" and store.verify("logs") == 1
    store.gc(min_age=0)
    assert blobs(store) == {done.entries[0].sha256}


def test_small_files_travel_together(store: DriveStore, base_url: str, tmp_path: Path) -> None:
    source = tmp_path / "s"
    for n in range(100):
        write(source, **{f"f{n:03d}": f"text {n}", f"d__g{n:03d}": f"text {n}"})
    first = store.publish("trainer", "d", source)
    assert len(blobs(store)) == 1 and len(first.blobs) == 1
    reader = DriveStore(base_url, "app")
    reader.fetch(first, tmp_path / "got")
    assert tree(tmp_path / "got") == tree(source) and reader.verify("d") == 200
    assert reader.read_bytes("d/f042") == b"text 42"
    reader.fetch(first, tmp_path / "one", subpath="d/g007")
    assert (tmp_path / "one").read_text() == "text 7"
    os.utime(source / "f001")
    (source / "f002").rename(source / "renamed")
    write(source, f000="changed")
    second = store.publish("trainer", "d", source)
    assert len(second.blobs) == 2, "what lies in the pack is not sent again"
    reader.fetch(second, tmp_path / "got2")
    assert tree(tmp_path / "got2") == tree(source)
    for n in range(100):
        (source / f"f{n:03d}").unlink(missing_ok=True)
        if n:
            (source / f"d/g{n:03d}").unlink()
    write(source, last="text 99")
    third = store.publish("trainer", "d", source)
    assert first.blobs.isdisjoint(third.blobs), "a pack is not kept for few files"
    reader.fetch(third, tmp_path / "got3")
    assert tree(tmp_path / "got3") == tree(source) == {"d/g000": "text 0", "last": "text 99", "renamed": "text 2"}
    assert reader.verify("d") == 3
    reader.fetch(first, tmp_path / "again")
    assert (tmp_path / "again/f099").read_text() == "text 99"


def test_a_damaged_pack_is_named_and_can_be_published_again(store: DriveStore, tmp_path: Path) -> None:
    source = tmp_path / "s"
    for n in range(20):
        write(source, **{f"f{n:02d}": f"text {n:02d}"})
    manifest = store.publish("trainer", "d", source)
    (pack,) = manifest.blobs
    for _ in range(2):
        damage(store, pack, lambda data: data.replace(b"text 07", b"text 70"))
        with pytest.raises(DriveCorrupt, match=r"d/f07"):
            store.fetch(manifest, tmp_path / "dest")
        assert not (tmp_path / "dest/f07").exists()
        fresh = DriveStore(*_address(store))
        fresh.publish("trainer", "d", source, call=os.urandom(4).hex())
        assert fresh.verify("d") == 20
    found = fresh.resolve("d")
    assert found is not None
    fresh.fetch(found, tmp_path / "dest")
    assert tree(tmp_path / "dest") == tree(source)


def test_partial_versions(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "logs", a="1")
    first = store.publish("trainer", "logs", source, partial=True)
    assert first.partial and store.resolve("logs") is None and store.owners("logs") == []
    write(source, a="12", b="x")
    second = store.publish("trainer", "logs", source, partial=True)
    assert second.serial > first.serial
    assert store.publish("trainer", "logs", source, partial=True) == second, "nothing changed"
    found = store.resolve("logs/a", partial=True)
    assert found is not None and found.serial == second.serial
    store.fetch(found, tmp_path / "got" / "a")
    assert (tmp_path / "got/a").read_text() == "12"
    assert store.versions("logs") == [] and [info.partial for info in store.versions("logs", partial=True)] == [True]
    done = store.publish("trainer", "logs", source)
    assert (done.version, done.partial) == (1, False) and store.resolve("logs", partial=True) == done
    write(source, a="123")
    store.publish("trainer", "logs", source, partial=True, call="1-trainer-2")
    store.discard_partial("trainer", "logs")
    assert store.resolve("logs", partial=True) == done
    store.discard_partial("trainer", "logs")
    assert [m.version for m in store.manifests()] == [1]


def test_a_complete_version_with_the_bytes_of_the_partial_one_is_committed(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "logs", a="1")
    store.publish("trainer", "logs", source)
    write(source, a="2")
    store.publish("trainer", "logs", source, partial=True)
    write(source, a="1")
    final = store.publish("trainer", "logs", source)
    found = store.resolve("logs/a", partial=True)
    assert not final.partial and found is not None and not found.partial


def changing(
    store: DriveStore, patch: pytest.MonkeyPatch, file: Path, times: int, act: Callable[[Path], object]
) -> None:
    """Let `act` happen to the file the first `times` times that it is read."""
    left = [times]
    send = store._send_bytes

    def racing(fd: int, *rest: Any) -> tuple[str, str]:
        result = send(fd, *rest)
        if left[0] and os.path.exists(file) and os.path.samestat(os.fstat(fd), os.stat(file)):
            left[0] -= 1
            act(file)
        return result

    patch.setattr(store, "_send_bytes", racing)


def append(file: Path) -> None:
    with open(file, "a") as out:
        out.write("more")


def test_a_file_that_changes_while_read(store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "logs", a="1", b="2")
    store.publish("trainer", "logs", source, partial=True)
    append(source / "a")
    write(source, b="22")
    with monkeypatch.context() as patch:
        changing(store, patch, source / "a", 10**6, append)
        kept = store.publish("trainer", "logs", source, partial=True)
        assert [entry.size for entry in kept.entries] == [1, 2], "the changing file stays as it was"
        with pytest.raises(DriveConflict, match=r"logs/a keeps changing"):
            store.publish("trainer", "logs", source)
        with pytest.raises(DriveConflict):
            store.publish("trainer", "a", source / "a")
    assert store.resolve("logs") is None
    with monkeypatch.context() as patch:
        changing(store, patch, source / "a", 3, append)
        final = store.publish("trainer", "logs", source)
    assert final.entries[0].size == (source / "a").stat().st_size
    store.verify("logs")


def test_a_file_that_vanishes_while_read(store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write(tmp_path / "logs", a="1", b="2")
    open_file = os.open

    def vanish(path: Any, *rest: Any, **more: Any) -> int:
        if path == source / "a":
            (source / "a").unlink(missing_ok=True)
        return open_file(path, *rest, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", vanish)
        assert [e.name for e in store.publish("trainer", "logs", source, partial=True).entries] == ["b"]
        write(source, a="1")
        assert [e.name for e in store.publish("trainer", "logs", source).entries] == ["b"]
        write(source, a="1")
        with pytest.raises(DriveNotFound):
            store.publish("trainer", "a", source / "a")


# ---- fetch -----------------------------------------------------------------------------------------------------------


def test_fetch_writes_only_what_differs(store: DriveStore, tmp_path: Path) -> None:
    manifest = store.publish("trainer", "logs", write(tmp_path / "s", a="1", b="2", c__d="3"))
    dest = tmp_path / "dest"
    assert store.fetch(manifest, dest) == ["a", "b", "c/d"]
    assert store.fetch(manifest, dest) == []
    write(dest, a="x", extra="stays")
    assert store.fetch(manifest, dest, skip=lambda name: name == "a") == []
    assert store.fetch(manifest, dest) == ["a"]
    assert tree(dest) == {"a": "1", "b": "2", "c/d": "3", "extra": "stays"}
    assert store.fetch(manifest, tmp_path / "one", subpath="c/d") == ["c/d"]
    assert (tmp_path / "one").read_text() == "3"
    assert store.fetch(manifest, tmp_path / "c", subpath="c") == ["c/d"]
    assert tree(tmp_path / "c") == {"d": "3"}
    with pytest.raises(DriveNotFound):
        store.fetch(manifest, dest, subpath="nothing")


def test_two_versions_of_the_same_size_and_time_are_told_apart(store: DriveStore, tmp_path: Path) -> None:
    source, dest = tmp_path / "s", tmp_path / "dest"
    manifests = []
    for text in ("one", "two"):
        write(source, a=text)
        os.utime(source / "a", ns=(10**18, 10**18))
        manifests.append(store.publish("trainer", "s", source))
    for manifest, text in [*zip(manifests, ("one", "two"), strict=True)] * 2:
        assert store.fetch(manifest, dest) == ["a"]
        assert store.fetch(manifest, dest) == []
        assert tree(dest) == {"a": text}
    write(dest, a="xxx")
    assert store.fetch(manifests[1], dest) == ["a"]


def test_a_version_that_is_no_longer_kept_says_so(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="0")
    first = store.publish("trainer", "s", source)
    for n in range(1, 12):
        store.publish("trainer", "s", write(source, a=str(n)))
    store.gc(min_age=0)
    with pytest.raises(DriveNotFound, match=r"replaced"):
        store.fetch(first, tmp_path / "dest")
    assert tree(tmp_path / "dest") == {}


def test_the_store_answers_a_flow(make: MakeDrive) -> None:
    heard: list[Manifest] = []
    one = make("trainer", on_publish=heard.append)
    write(one.root_folder, lightning_logs__version_0__model="1", lightning_logs__version_1__model="2")
    one.put("lightning_logs")
    index = ManifestIndex(one._store("look").manifests())
    flow = Drive("models").bind(index=index)
    assert flow.list("lightning_logs/*/model") == [
        "lightning_logs/version_0/model",
        "lightning_logs/version_1/model",
    ]
    write(one.root_folder, best="x")
    one.put("best")
    index.add(heard[-1])
    assert flow.list() == ["best", "lightning_logs"] and [info.version for info in flow.versions("best")] == [1]
    one.delete("best")
    index.add(heard[-1])
    assert flow.list() == ["lightning_logs"]
    for call in (flow.put, flow.get, flow.delete, flow.verify):
        with pytest.raises(DriveNotHere, match=r"in a Flow"):
            call("lightning_logs")


async def test_async_twins(make: MakeDrive) -> None:
    one, other = make("trainer"), make("server")
    write(one.root_folder, f="1")
    assert await one.aput("f") == 1
    assert await other.alist() == ["f"]
    assert (await other.aget("f", timeout=1)).read_text() == "1"
    assert [info.version for info in await other.aversions("f")] == [1]
    assert await other.averify("f") == 1
    await one.adelete("f")
    assert await other.alist() == []
    await asyncio.get_running_loop().shutdown_default_executor()


def test_ranges_can_be_read(store: DriveStore, tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(bytes(range(256)) * 10000)
    manifest = store.publish("api", "f", tmp_path / "f")
    with store.open(manifest) as file:
        file.seek(300)
        assert file.read(2) == bytes([44, 45])
    folder = store.publish("api", "d", write(tmp_path / "d", x="in"))
    with store.open(folder, "x") as file:
        assert file.read() == b"in"
    with pytest.raises(DriveNotFound):
        store.open(folder, "y")
    with pytest.raises(DrivePathError):
        store.read_bytes("d")


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-1], lambda b: b + b"x"])
def test_a_damaged_blob_is_named_and_never_handed_out(
    store: DriveStore, tmp_path: Path, change: Callable[[bytes], bytes]
) -> None:
    source = write(tmp_path / "s", good="fine", bad="original")
    manifest = store.publish("trainer", "s", source)
    bad = manifest.entry("bad")
    assert bad is not None
    calls: list[Callable[[], object]] = [
        lambda: store.verify("s"),
        lambda: store.fetch(manifest, tmp_path / "dest"),
        lambda: store.read_bytes("s/bad"),
    ]
    for call in calls:
        damage(store, bad.sha256, change)
        with pytest.raises(DriveCorrupt, match=r"s/bad"):
            call()
        with pytest.raises(DriveCorrupt, match=r"s/bad.*missing"):
            store.verify("s")
        assert not (tmp_path / "dest/bad").exists()
        # publishing it again heals the version that is damaged, too
        store.publish("trainer", "s", source)
        fresh = DriveStore(*_address(store))
        fresh.publish("trainer", "s", source, call=str(len(calls)))
        assert store.verify("s") == 2
    store.fetch(manifest, tmp_path / "dest")
    assert tree(tmp_path / "dest") == {"bad": "original", "good": "fine"}


def _address(store: DriveStore) -> tuple[str, str]:
    base, _, name = store.url.rpartition("/")
    return base, name


def test_a_damaged_manifest_is_named_and_the_rest_works(store: DriveStore, tmp_path: Path) -> None:
    store.publish("trainer", "s", write(tmp_path / "s", a="1"))
    store.publish("trainer", "t", write(tmp_path / "t", a="2"))
    key = "manifests/trainer/s/00000001.json"
    data = store.storage.read(key)
    rewrite(store, key, data.replace(b'"size":1', b'"size":2'))
    fresh = DriveStore(*_address(store))
    with pytest.raises(DriveCorrupt, match=r"00000001\.json"):
        fresh.resolve("s/a")
    with pytest.raises(DriveCorrupt):
        fresh.verify("s")
    assert fresh.read_bytes("t/a") == b"2" and fresh.list() == ["t"]
    assert fresh.gc(min_age=0) == 0, "with a manifest unread nobody knows what is garbage"
    assert fresh.publish("trainer", "s", tmp_path / "s").version == 2
    assert fresh.read_bytes("s/a") == b"1"


def test_a_torn_manifest_was_never_committed(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="1")
    store.publish("trainer", "s", source)
    store.publish("trainer", "s", write(source, a="2"))
    key = "manifests/trainer/s/00000002.json"
    rewrite(store, key, store.storage.read(key)[:40])
    fresh = DriveStore(*_address(store))
    assert fresh.read_bytes("s/a") == b"1"
    assert fresh.publish("trainer", "s", source).version == 3
    assert fresh.read_bytes("s/a") == b"2"


@pytest.mark.parametrize("hours", [-1, 1])
def test_a_clock_that_is_an_hour_off(
    store: DriveStore, base_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    source = write(tmp_path / "s", a="1")
    store.publish("trainer", "s", source)
    now, create = time.time, store.storage.create
    with monkeypatch.context() as patch:
        patch.setattr(time, "time", lambda: now() + hours * 3600)
        store.publish("trainer", "s", write(source, a="2"))
        store.publish("trainer", "s/b", write(tmp_path, b="3") / "b")
        assert [info.version for info in store.versions("s") if info.path == "s"] == [1, 2]

    def collected_meanwhile(key: str, data: bytes) -> bool:
        """The bytes are there and no manifest names them yet: a collector whose clock is wrong comes by."""
        with monkeypatch.context() as patch:
            patch.setattr(time, "time", lambda: now() + hours * 3600)
            DriveStore(base_url, "app").gc()
        return create(key, data)

    monkeypatch.setattr(store.storage, "create", collected_meanwhile)
    store.publish("trainer", "s", write(source, a="4"))
    fresh = DriveStore(base_url, "app")
    assert fresh.read_bytes("s/a") == b"4" and fresh.verify(".") == 1 and fresh.list("s") == ["s/a"]
    assert [fresh.verify("s", version=info.version) for info in fresh.versions("s") if info.path == "s"] == [1, 1, 1]


# ---- many at once ----------------------------------------------------------------------------------------------------


def test_writers_of_one_path_and_readers(base_url: str, tmp_path: Path) -> None:
    """Every version is whole, whoever wrote it; readers never see a mixture."""
    writers, rounds = 4, 6
    stop = threading.Event()

    def put(n: int) -> None:
        store = DriveStore(base_url, "app")
        for turn in range(rounds):
            source = tmp_path / f"w{n}"
            for name in ("a", "b", "c"):
                write(source, **{name: f"{n}.{turn} {name}"})
            store.publish("trainer", "d", source, call=f"{n}.{turn}")

    def read(n: int) -> int:
        store, seen = DriveStore(base_url, "app"), 0
        while not stop.is_set():
            manifest = store.resolve("d")
            if manifest is None:
                continue
            try:
                store.fetch(manifest, tmp_path / f"r{n}")
            except DriveNotFound:
                continue
            assert set(tree(tmp_path / f"r{n}").values()) == {f"{manifest.call} {name}" for name in "abc"}
            seen += 1
        return seen

    with ThreadPoolExecutor(writers + 2) as pool:
        readers = [pool.submit(read, n) for n in range(2)]
        try:
            for writer in [pool.submit(put, n) for n in range(writers)]:
                writer.result()
        finally:
            stop.set()
        assert all(reader.result() > 0 for reader in readers)
    store = DriveStore(base_url, "app")
    assert [info.version for info in store.versions("d")] == list(range(writers * rounds - 9, writers * rounds + 1))
    store.verify("d")


def test_garbage_collection_never_eats_a_live_blob(base_url: str, tmp_path: Path) -> None:
    """The same few contents come and go, so that dead blobs are named again while the collector runs."""
    stop = threading.Event()

    def collect() -> None:
        store = DriveStore(base_url, "app")
        while not stop.is_set():
            store.gc()

    def put(n: int) -> None:
        store = DriveStore(base_url, "app")
        for turn in range(30):
            source = write(tmp_path / f"w{n}", a=f"{turn % 3}", b=f"{(turn + n) % 5}")
            store.publish(f"w{n}", "d", source, call=str(turn), partial=turn % 4 == 3)
            if turn % 7 == 6:
                store.delete(f"w{n}", "d")

    with ThreadPoolExecutor(4) as pool:
        collector = pool.submit(collect)
        try:
            for writer in [pool.submit(put, n) for n in range(3)]:
                writer.result()
        finally:
            stop.set()
        collector.result()
    store = DriveStore(base_url, "app")
    for manifest in store.manifests(all_versions=True):
        for entry in manifest.entries:
            assert store.storage.size(blob_key(entry.sha256)) == entry.size
    assert store.list() == ["d"] and store.verify("d") == 6


# ---- local disk only -------------------------------------------------------------------------------------------------

PUT = """
import sys
from pathlib import Path
from orch_drive import DriveStore
base, source = sys.argv[1:]
DriveStore(base, "app").publish("trainer", "d", Path(source))
"""

CRASHES = [
    ("drive.blob.written", 1),
    ("drive.blob.written", 30),
    ("drive.blob.written", 71),
    ("drive.blob.synced", 1),
    ("drive.blob.synced", 66),
    ("drive.blob.renamed", 1),
    ("drive.blob.renamed", 66),
    ("drive.manifest.written", 1),
    ("drive.manifest.synced", 1),
    ("drive.manifest.renamed", 1),
    ("drive.prune.manifest", 1),
    ("drive.prune.blob", 1),
    ("drive.prune.blob", 2),
]


@pytest.mark.parametrize(("point", "hit"), CRASHES)
def test_a_put_killed_anywhere_leaves_a_whole_version_and_can_be_repeated(tmp_path: Path, point: str, hit: int) -> None:
    base, source = f"{tmp_path}/store", tmp_path / "s"
    store = DriveStore(base, "app")
    for n in range(10):
        store.publish("trainer", "d", write(source, a=f"old {n}", b=f"b {n}"))
    old = tree(source)
    for n in range(70):
        write(source, **{f"f{n:02d}": f"new {n} " * 12_000})
    write(source, a="new")
    (source / "large").write_bytes(b"L" * (3 << 20))
    new = tree(source)

    def put(crash: str | None) -> int:
        env = {**os.environ, **({"ORCH_CRASH_AT": crash} if crash else {})}
        command = [sys.executable, "-P", "-c", PUT, base, str(source)]
        return subprocess.run(command, env=env, start_new_session=True, timeout=60).returncode

    assert put(f"{point}:{hit}") == -signal.SIGKILL, "the crash point was not reached"
    reader = DriveStore(base, "app")
    manifest = reader.resolve("d")
    assert manifest is not None
    reader.verify("d")
    reader.fetch(manifest, tmp_path / "got")
    assert tree(tmp_path / "got") in (old, new)
    assert (tree(tmp_path / "got") == new) == (point.startswith("drive.prune") or point == "drive.manifest.renamed")
    assert put(None) == 0
    again = DriveStore(base, "app")
    manifest = again.resolve("d")
    assert manifest is not None
    assert again.verify("d") == len(new)
    again.fetch(manifest, tmp_path / "got")
    assert tree(tmp_path / "got") == new
    again.gc()
    assert not again.storage.listing("tmp")
    assert blobs(again) == {sha for m in again.manifests(all_versions=True) for sha in m.blobs}


GET = """
import sys
from pathlib import Path
from orch_drive import DriveStore
base, dest = sys.argv[1:]
store = DriveStore(base, "app")
store.fetch(store.resolve("d"), Path(dest))
"""


@pytest.mark.parametrize(("point", "hit"), [("drive.file.written", 2), ("drive.file.renamed", 1)])
def test_a_get_killed_anywhere_leaves_whole_files(tmp_path: Path, point: str, hit: int) -> None:
    base, dest = f"{tmp_path}/store", tmp_path / "dest"
    store = DriveStore(base, "app")
    store.publish("trainer", "d", write(tmp_path / "s", a="new a", b="new b"))
    write(dest, a="old a", b="old b")
    env = {**os.environ, "ORCH_CRASH_AT": f"{point}:{hit}"}
    command = [sys.executable, "-P", "-c", GET, base, str(dest)]
    assert subprocess.run(command, env=env, start_new_session=True, timeout=60).returncode == -signal.SIGKILL
    assert tree(dest) == {"a": "new a", "b": "old b"}
    manifest = store.resolve("d")
    assert manifest is not None and store.fetch(manifest, dest) == ["b"]
    assert tree(dest) == {"a": "new a", "b": "new b"}
    again = store.publish("other", "dest", dest)
    assert [entry.name for entry in again.entries] == ["a", "b"], "what the killed get left is never published"


def test_resuming_sends_only_the_rest(tmp_path: Path) -> None:
    base, source = f"{tmp_path}/store", tmp_path / "s"
    for n in range(600):
        write(source, **{f"f{n:03d}": f"{n:08d}" * 9000})
    command = [sys.executable, "-P", "-c", PUT, base, str(source)]
    env = {**os.environ, "ORCH_CRASH_AT": "drive.blob.written:590"}
    assert subprocess.run(command, env=env, start_new_session=True, timeout=60).returncode == -signal.SIGKILL
    store = DriveStore(base, "app")
    there = {sha: store.storage.signature(blob_key(sha)) for sha in blobs(store)}
    assert len(there) == 512
    store.publish("trainer", "d", source)
    assert all(store.storage.signature(blob_key(sha)) == before for sha, before in there.items())
    assert store.verify("d") == 600


def test_the_drive_is_not_published_into_itself(tmp_path: Path) -> None:
    drive = Drive("app").bind(base_url=f"{tmp_path}/shared", component="t", cwd=tmp_path)
    write(tmp_path, a="1")
    drive.put("a")
    with pytest.raises(DrivePathError, match=r"contains the Drive itself"):
        drive.put(".")


def test_an_apps_own_folder_is_not_published(store: DriveStore, tmp_path: Path) -> None:
    """Its token would be everybody's."""
    app = write(tmp_path / "app", a="1")
    (app / "sub/.orch").mkdir(parents=True)
    (app / "sub/.orch/token").write_text("secret")
    here = Drive("app").bind(base_url=f"{app}/.orch/drive", component="t", cwd=app)
    here.put("a")
    assert here.put(".") == 1 and here.list(recursive=True) == ["a"]
    manifest = store.publish("t", ".", app)
    assert [entry.name for entry in manifest.entries] == ["a"]


def test_paths_that_differ_by_case_are_refused_where_the_drive_cannot_tell_them_apart(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "s", a="1")
    store.publish("trainer", "logs", source)
    monkeypatch.setattr("orch_drive.store.folds_case", lambda folder: True)
    store.publish("trainer", "logs", write(source, a="2"))
    store.publish("trainer", "logs/Other", source)
    if isinstance(store.storage, LocalStorage):
        for component, path in (("trainer", "Logs"), ("Trainer", "logs")):
            with pytest.raises(DrivePathError, match=r"'logs' of trainer are one name"):
                store.publish(component, path, source)
        assert store.list(".") == ["logs"]
    else:
        store.publish("trainer", "Logs", source)
        assert store.list(".") == ["Logs", "logs"]


def test_a_storage_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    drive = Drive("x").bind(base_url=f"{tmp_path}/file", component="t", cwd=tmp_path)
    with pytest.raises(DriveError) as error:
        drive.put("file")
    assert str(tmp_path) in error.value.message
    with pytest.raises(DriveError, match=r"not connected"):
        Drive("x").put("a")


def test_progress_is_told_in_bytes(store: DriveStore, tmp_path: Path) -> None:
    source = write(tmp_path / "s", a="x" * 3_000_000, b="y" * 500, c="")
    told: list[tuple[int, int]] = []

    def whole() -> bool:
        steps, total = told[:], 3_000_500
        told.clear()
        return steps[0] == (0, total) and steps[-1] == (total, total) and steps == sorted(steps)

    manifest = store.publish("trainer", "s", source, progress=lambda *step: told.append(step))
    assert whole()
    store.publish("trainer", "s", source, progress=lambda *step: told.append(step))
    assert whole(), "what need not travel counts too"
    store.fetch(manifest, tmp_path / "dest", progress=lambda *step: told.append(step))
    assert whole()
    store.fetch(manifest, tmp_path / "dest", progress=lambda *step: told.append(step))
    assert told == [(0, 0)]
    told.clear()
    store.verify("s", progress=lambda *step: told.append(step))
    assert whole()


def test_a_full_disk_is_said(store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    write(tmp_path / "s", a="1")
    store.publish("trainer", "s", tmp_path / "s")
    write(tmp_path / "s", a="2")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.storage, "create", full)
        with pytest.raises(DriveUnavailable) as error:
            store.publish("trainer", "s", tmp_path / "s")
    assert error.value.hint == "the disk is full"
    assert store.read_bytes("s/a") == b"1"


def test_a_disk_that_is_really_full(small_disk: Callable[[str], Path], tmp_path: Path) -> None:
    disk = small_disk("size=2m")
    store = DriveStore(f"{disk}/drive", "app")
    source = tmp_path / "s"
    source.mkdir()
    (source / "a").write_bytes(old := os.urandom(600_000))
    store.publish("trainer", "s", source)
    (source / "a").write_bytes(os.urandom(600_000))
    (source / "b").write_bytes(os.urandom(1_500_000))
    for partial in (False, True):
        with pytest.raises(DriveUnavailable, match="cannot be written to") as error:
            store.publish("trainer", "s", source, partial=partial)
        assert error.value.hint == "the disk is full"
    assert store.read_bytes("s/a") == old and store.verify(".") == 1 and len(store.versions("s", partial=True)) == 1
    small_disk("remount,size=8m")
    manifest = store.publish("trainer", "s", source)
    assert manifest.version == 2 and store.verify(".") == 2
    (disk / "in-the-way").write_bytes(b"x" * 4_000_000)
    with pytest.raises(DriveUnavailable, match="does not fit"):
        store.fetch(manifest, disk / "dest")
    assert not (disk / "dest").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """A file system of its own, mounted with the options that it is called with."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    place = tmp_path / "disk"
    place.mkdir()

    def mount(options: str) -> Path:
        made = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"mount is not permitted here: {made.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", "-l", place], check=True)


def test_a_version_that_does_not_fit_is_refused_before_anything_is_written(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.publish("trainer", "s", write(tmp_path / "s", a="new a", b="new b"))
    write(tmp_path / "dest", a="old")
    full = os.statvfs_result((4096, 4096, 100, 0, 0, 100, 100, 100, 0, 255))
    with monkeypatch.context() as patch:
        patch.setattr(os, "statvfs", lambda path: full)
        with pytest.raises(DriveUnavailable, match="does not fit") as error:
            store.fetch(manifest, tmp_path / "dest")
    assert error.value.hint == "the disk is full" and tree(tmp_path / "dest") == {"a": "old"}


def test_names_that_differ_by_case_are_refused_where_they_are_one(
    store: DriveStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = store.publish("trainer", "s", write(tmp_path / "s", Model__a="1", model__a="2", c="3"))
    store.fetch(manifest, tmp_path / "here")
    assert len(tree(tmp_path / "here")) == 3
    with monkeypatch.context() as patch:
        patch.setattr("orch_drive.store.folds_case", lambda folder: True)
        with pytest.raises(DrivePathError, match=r"Model.*model"):
            store.fetch(manifest, tmp_path / "there")
        store.fetch(manifest, tmp_path / "part", subpath="model")
    assert not (tmp_path / "there").exists() and tree(tmp_path / "part") == {"a": "2"}


def test_a_reader_makes_nothing(tmp_path: Path) -> None:
    store = DriveStore(f"{tmp_path}/none", "app")
    assert store.list() == [] and store.manifests() == [] and store.resolve("x") is None
    assert not (tmp_path / "none").exists()


# ---- a Drive as state ------------------------------------------------------------------------------------------------


def test_a_drive_is_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drive = Drive("lit://models", root_folder="sub")
    assert drive.id == "models" and drive.to_state() == {"$drive": {"id": "models", "root_folder": "sub"}}
    assert Drive.from_state(drive.to_state()) == drive == Drive.from_state(drive.to_state()["$drive"])
    assert drive != Drive("models") and hash(drive) == hash(Drive("models", root_folder="sub"))
    assert drive.bind(cwd=tmp_path).root_folder == tmp_path / "sub"
    for bad in ("", "a/b", "../x", "/abs", "a b", ".hidden"):
        with pytest.raises(DrivePathError):
            Drive(bad)
    monkeypatch.setenv("ORCH_DRIVE_URL", str(tmp_path / "store"))
    monkeypatch.setenv("ORCH_WORK", "ui.trainer")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "f").write_text("1")
    own = Drive("models")
    own.put("f")
    assert own.versions("f")[0].component == "ui.trainer" and (tmp_path / "store/models/blobs").is_dir()


def test_drives_are_found_in_state() -> None:
    state = [
        {"a": {"b": [Drive("one").to_state(), {"$drive": "nonsense"}]}, "$drives": 1},
        Drive("s3://x/y").to_state(),
    ]
    assert drives_in(state) == {"one", "s3://x/y"} and drives_in({"a": [1, None, "drive"]}) == set()


def test_a_drive_with_a_url_of_its_own(tmp_path: Path) -> None:
    drive = Drive(f"file://{tmp_path}/elsewhere/").bind(base_url="/nonexistent", component="t", cwd=tmp_path)
    (tmp_path / "f").write_text("1")
    drive.put("f")
    assert (tmp_path / "elsewhere/manifests/t/f/00000001.json").exists()


@pytest.fixture
def own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orch_drive.store._SMALL", 0)
    monkeypatch.setattr("orch_drive.s3._PART", 0)
    monkeypatch.setattr("orch_drive.s3._step", lambda size: size)


# ---- a model ---------------------------------------------------------------------------------------------------------

PATHS = st.sampled_from(["d/a", "d/b", "d/e/c", "d/e/f"])
TARGETS = st.sampled_from(["d", "d/a", "d/e", "d/e/c", "."])


class DriveModel(RuleBasedStateMachine):
    """What the Drive holds is what a dict would hold; every kept version of `d` stays what it was."""

    kind: Literal["local", "memory", "s3"] = "local"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        name = uuid4().hex
        self.base = {"local": f"{self.folder}/store", "memory": f"memory://{name}", "s3": f"s3://drive-tests/{name}"}[
            self.kind
        ]
        self.cwd = self.folder / "cwd"
        self.cwd.mkdir()
        self.drive = Drive("m").bind(base_url=self.base, component="t", cwd=self.cwd)
        self.held: dict[str, str] = {}
        self.versions: dict[int, dict[str, str]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.folder)
        if self.kind == "memory":
            remove_memory(self.base)

    def local(self, target: str) -> dict[str, str]:
        prefix = "" if target == "." else f"{target}/"
        return {name: text for name, text in tree(self.cwd).items() if name == target or name.startswith(prefix)}

    @rule(path=PATHS, text=st.text("xyz", max_size=3))
    def write(self, path: str, text: str) -> None:
        (self.cwd / path).parent.mkdir(parents=True, exist_ok=True)
        (self.cwd / path).write_text(text)

    @rule(path=PATHS)
    def unlink(self, path: str) -> None:
        (self.cwd / path).unlink(missing_ok=True)

    @rule(where=TARGETS, sync=st.booleans(), fresh=st.booleans())
    def put(self, where: str, sync: bool, fresh: bool) -> None:
        if fresh:
            self.drive = Drive("m").bind(base_url=self.base, component="t", cwd=self.cwd)
        if not (self.cwd / where).exists():
            with pytest.raises(DriveNotFound):
                self.drive.put(where, sync=sync)
            return
        version = self.drive.put(where, sync=sync)
        if sync:
            prefix = "" if where == "." else f"{where}/"
            self.held = {n: t for n, t in self.held.items() if n != where and not n.startswith(prefix)}
        self.held.update(self.local(where))
        if where == "d":
            self.versions[version] = {n: t for n, t in self.held.items() if n.startswith("d/")}

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        target = data.draw(st.sampled_from(sorted(self.held)))
        self.drive.delete(target)
        del self.held[target]

    @rule()
    def collect(self) -> None:
        self.drive._store("look").gc(min_age=0)

    @rule()
    def get_everything(self) -> None:
        place = self.folder / "got"
        reader = Drive("m").bind(base_url=self.base, component="r", cwd=place)
        if self.held:
            reader.get(".")
            assert tree(place) == self.held
            shutil.rmtree(place)

    @precondition(lambda self: self.versions)
    @rule(data=st.data())
    def get_version(self, data: st.DataObject) -> None:
        chain = {info.version for info in self.drive.versions("d") if info.path == "d"}
        kept = sorted(chain & set(self.versions))
        if not kept:
            return
        version = data.draw(st.sampled_from(kept))
        place = self.folder / "old"
        Drive("m").bind(base_url=self.base, component="r", cwd=place).get("d", version=version)
        assert {f"d/{name}": text for name, text in tree(place / "d").items()} == self.versions[version]
        shutil.rmtree(place)

    @invariant()
    def lists_what_it_holds(self) -> None:
        assert self.drive.list(recursive=True) == sorted(self.held)


class MemoryDriveModel(DriveModel):
    kind = "memory"


class S3DriveModel(DriveModel):
    kind = "s3"


class OwnNamesDriveModel(S3DriveModel):
    """Every file as large ones are: under a name of its own."""


_small = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None
)
TestDriveModel = DriveModel.TestCase
TestDriveModel.settings = _small
TestMemoryDriveModel = MemoryDriveModel.TestCase
TestMemoryDriveModel.settings = _small
TestS3DriveModel = S3DriveModel.TestCase
TestS3DriveModel.settings = settings(_small, max_examples=8)
TestS3DriveModel = pytest.mark.usefixtures("s3_url")(TestS3DriveModel)
TestOwnNamesDriveModel = OwnNamesDriveModel.TestCase
TestOwnNamesDriveModel.settings = settings(_small, max_examples=8)
TestOwnNamesDriveModel = pytest.mark.usefixtures("s3_url", "own_names")(TestOwnNamesDriveModel)
