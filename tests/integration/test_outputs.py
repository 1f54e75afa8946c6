"""A script's files: inputs, outputs, reloads, on a real Drive on local disk."""

from __future__ import annotations

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fake_flow import flow_with_agent
from testkit import wait_until

from orch.wire import Ended, Progress, Published, StartCall, Started
from orch_drive import DriveAmbiguous, DriveConflict, DriveNotFound, DriveStaleEpoch, DriveStore
from orch_workers import outputs
from orch_workers.outputs import FileTransfer, split_owner

Make = Callable[..., FileTransfer]


@pytest.fixture
def url(tmp_path: Path) -> str:
    return f"file://{tmp_path}/drive"


@pytest.fixture
def make(tmp_path: Path, url: str) -> Make:
    """`make(work, folder, inputs=..., outputs=...)`; what it reports is in `make.published`."""
    published: list[tuple[str, dict[str, Any]]] = []

    def transfer(
        work: str,
        folder: str = "cwd",
        *,
        writers: tuple[tuple[str, Path], ...] = (),
        epoch: int = 1,
        attempt: int = 1,
        on_moving: Callable[[str], None] = lambda text: None,
        **fields: Any,
    ) -> FileTransfer:
        cwd = tmp_path / folder
        cwd.mkdir(exist_ok=True)
        fields.setdefault("sync_interval", 0.0)  # no file has to be quiet
        start = StartCall(work=work, call=f"1-{work}-1", attempt=attempt, kind="script", **fields)
        return FileTransfer(
            start,
            cwd=cwd,
            drive_url=url,
            epoch=epoch,
            on_published=lambda drive, manifest: published.append((drive, manifest)),
            on_moving=on_moving,
            writers=lambda: list(writers),
        )

    transfer.published = published  # type: ignore[attr-defined]
    return transfer


def put(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def publish(make: Make, tmp_path: Path, work: str, files: dict[str, str], output: str = "logs") -> None:
    put(tmp_path / f"made-by-{work}", files)
    make(work, f"made-by-{work}", outputs=[output]).finish()


def content(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_owners() -> None:
    assert split_owner("logs/a:b") == (None, "logs/a:b")
    assert split_owner("ui.trainer:logs") == ("ui.trainer", "logs")
    assert split_owner("*:logs") == ("*", "logs")


def test_inputs_are_merged_over_what_is_there(make: Make, tmp_path: Path) -> None:
    publish(make, tmp_path, "trainer", {"logs/a": "new", "logs/b": "b"})
    put(tmp_path / "cwd", {"logs/a": "old", "logs/own": "own"})
    make("eval", inputs=["logs"]).prepare()
    assert content(tmp_path / "cwd") == {"logs/a": "new", "logs/b": "b", "logs/own": "own"}
    make("eval2", "cwd2", inputs=["trainer:logs/b"]).prepare()
    assert content(tmp_path / "cwd2") == {"logs/b": "b"}


def test_missing_inputs(make: Make, tmp_path: Path) -> None:
    with pytest.raises(DriveNotFound, match=r"'logs' of eval .*'app'.*cwd"):
        make("eval", inputs=["logs"]).prepare()
    with pytest.raises(DriveNotFound, match="trainer:logs"):
        make("eval", inputs=["trainer:logs"]).prepare()
    make("eval", inputs=["logs"], outputs=["logs"]).prepare()  # also an output: a first run has none
    put(tmp_path / "cwd", {"logs/x": "here"})
    make("eval", inputs=["logs"]).prepare()
    assert content(tmp_path / "cwd") == {"logs/x": "here"}


def test_several_owners(make: Make, tmp_path: Path) -> None:
    publish(make, tmp_path, "a", {"logs/x": "from a"})
    publish(make, tmp_path, "b", {"logs/x": "from b"})
    with pytest.raises(DriveAmbiguous, match="a, b"):
        make("eval", inputs=["logs"]).prepare()
    make("eval", inputs=["b:logs"]).prepare()
    assert content(tmp_path / "cwd") == {"logs/x": "from b"}
    make("all", "all", inputs=["*:logs"]).prepare()
    assert content(tmp_path / "all") == {"logs/a/x": "from a", "logs/b/x": "from b"}


def test_what_was_published_from_here_is_left_alone(make: Make, tmp_path: Path) -> None:
    put(tmp_path / "cwd", {"logs/x": "published"})
    make("trainer", outputs=["logs"]).finish()
    put(tmp_path / "cwd", {"logs/x": "edited since"})
    make("eval", inputs=["logs"]).prepare()
    assert content(tmp_path / "cwd") == {"logs/x": "edited since"}
    (tmp_path / "cwd/logs/x").unlink()
    (tmp_path / "cwd/logs").rmdir()
    make("eval", inputs=["logs"]).prepare()
    assert content(tmp_path / "cwd") == {"logs/x": "published"}


def test_never_over_a_file_that_another_work_writes(make: Make, tmp_path: Path) -> None:
    publish(make, tmp_path, "trainer", {"logs/x": "theirs", "data/y": "y"})
    put(tmp_path / "cwd", {"logs/x": "mine"})
    writers = (("writer", tmp_path / "cwd/logs"),)
    with pytest.raises(DriveConflict, match=r"eval .*logs.* writer "):
        make("eval", inputs=["logs"], writers=writers).prepare()
    assert content(tmp_path / "cwd") == {"logs/x": "mine"}
    put(tmp_path / "cwd", {"logs/x": "theirs"})  # the same already: nothing is written
    make("eval", inputs=["logs"], writers=writers).prepare()


def test_outputs_partial_then_complete(make: Make, tmp_path: Path, url: str) -> None:
    store = DriveStore(url, "app")
    transfer = make("trainer", outputs=["logs", "model.pt"])
    transfer.prepare()
    transfer.sync()  # nothing there yet
    put(tmp_path / "cwd", {"logs/a": "1"})
    transfer.sync()
    transfer.sync()
    assert store.resolve("logs") is None
    partial = store.resolve("logs", partial=True)
    assert partial is not None and partial.partial and partial.call == "1-trainer-1"
    put(tmp_path / "cwd", {"logs/a": "2", "logs/b": "b"})
    transfer.sync()
    with pytest.raises(DriveNotFound, match=r"'model\.pt'.*cwd"):
        transfer.finish()
    assert store.resolve("logs") is None
    put(tmp_path / "cwd", {"model.pt": "m"})
    assert transfer.finish() == ["logs", "model.pt"]
    complete = store.resolve("logs", partial=True)
    assert complete is not None and not complete.partial and [entry.name for entry in complete.entries] == ["a", "b"]
    told = [(manifest["path"], manifest.get("partial", False)) for _, manifest in make.published]  # type: ignore[attr-defined]
    assert told == [("logs", True), ("logs", True), ("logs", False), ("model.pt", False)]
    # The partial of a call that failed stays until the next call, not until the next attempt.
    put(tmp_path / "cwd", {"logs/a": "3"})
    make("trainer", outputs=["logs"]).sync()
    make("trainer", outputs=["logs"], attempt=2).prepare()
    assert (found := store.resolve("logs", partial=True)) is not None and found.partial
    make("trainer", outputs=["logs"]).prepare()
    assert (found := store.resolve("logs", partial=True)) is not None and not found.partial


def test_a_file_that_is_being_written_waits_until_it_is_quiet(make: Make, tmp_path: Path, url: str) -> None:
    store = DriveStore(url, "app")
    transfer = make("trainer", outputs=["out"], sync_interval=60.0)

    def there() -> dict[str, int]:
        manifest = store.resolve("out", partial=True)
        return {} if manifest is None else {entry.name: entry.size for entry in manifest.entries}

    def old(name: str) -> None:
        os.utime(tmp_path / "cwd/out" / name, ns=(10**18, 10**18))

    put(tmp_path / "cwd", {"out/model.pt": "half"})
    transfer.sync()
    assert there() == {}
    put(tmp_path / "cwd", {"out/events.out.tfevents.1": "12", "out/metrics.csv": "a,b", "out/done.pt": "done"})
    old("done.pt")
    transfer.sync()
    assert there() == {"events.out.tfevents.1": 2, "metrics.csv": 3, "done.pt": 4}
    put(tmp_path / "cwd", {"out/model.pt": "whole model"})
    old("model.pt")
    transfer.sync()
    assert there()["model.pt"] == 11
    put(tmp_path / "cwd", {"out/model.pt": "the next one, half"})
    transfer.sync()
    assert there()["model.pt"] == 11, "the last whole one stays"
    transfer.sync(ended=True)
    assert there()["model.pt"] == 18


def test_a_file_whose_clock_is_ahead_gets_quiet_too(
    make: Make, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DriveStore(url, "app")
    transfer = make("trainer", outputs=["out", "one"], sync_interval=60.0)
    put(tmp_path / "cwd", {"out/model.pt": "model", "one": "single"})
    for name in ("out/model.pt", "one"):
        os.utime(tmp_path / "cwd" / name, ns=(4 * 10**18, 4 * 10**18))
    now = [100.0]
    monkeypatch.setattr("orch_workers.outputs.time.monotonic", lambda: now[0])
    transfer.sync()
    transfer.sync()
    assert store.resolve("out", partial=True) is None and store.resolve("one", partial=True) is None
    now[0] += 2
    transfer.sync()
    assert store.read_bytes("out/model.pt", partial=True) == b"model"
    assert store.read_bytes("one", partial=True) == b"single"


@pytest.mark.parametrize("watched", [True, False])
def test_outputs_are_looked_through_when_something_happened(
    make: Make, tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch, watched: bool
) -> None:
    store = DriveStore(url, "app")
    if not watched:
        monkeypatch.setitem(sys.modules, "watchfiles._rust_notify", None)
    looked: list[Path] = []
    fingerprint = outputs._fingerprint
    monkeypatch.setattr(outputs, "_fingerprint", lambda path: (looked.append(path), fingerprint(path))[1])
    transfer = make("trainer", outputs=["out"])
    put(tmp_path / "cwd", {"out/deep/a": "1"})
    transfer.sync()
    assert store.read_bytes("out/deep/a", partial=True) == b"1"
    if watched:
        wait_until(lambda: (looked.clear(), transfer.sync(), not looked)[2])  # what it heard before has passed
    looked.clear()
    transfer.sync()
    assert len(looked) == (0 if watched else 1)

    def seen(name: str, text: bytes) -> bool:
        transfer.sync()
        found = store.resolve(name, partial=True)
        return found is not None and store.read_bytes(name, partial=True) == text

    put(tmp_path / "cwd", {"out/deep/a": "22", "out/new/b": "3"})
    wait_until(lambda: seen("out/deep/a", b"22") and seen("out/new/b", b"3"))
    put(tmp_path / "cwd", {"out/new/b": "44"})
    wait_until(lambda: seen("out/new/b", b"44"))
    shutil.rmtree(tmp_path / "cwd/out")
    put(tmp_path / "cwd", {"out/deep/a": "made again"})
    wait_until(lambda: seen("out/deep/a", b"made again"))
    transfer.finish()


def test_an_old_incarnation_cannot_publish(make: Make, tmp_path: Path) -> None:
    put(tmp_path / "cwd", {"logs/a": "1"})
    make("trainer", outputs=["logs"], epoch=2).finish()
    put(tmp_path / "cwd", {"logs/a": "2"})
    with pytest.raises(DriveStaleEpoch):
        make("trainer", outputs=["logs"], epoch=1).finish()


def test_reload_follows_partial_versions(make: Make, tmp_path: Path) -> None:
    service = make("board", "board", reload=["logs"])
    service.prepare()
    trainer = make("trainer", "train", outputs=["logs"])
    for text in ("one", "two", "three"):
        put(tmp_path / "train", {"logs/events": text})
        # the kernel tells of it a moment later
        wait_until(
            lambda t=text: (trainer.sync(), service.sync(), content(tmp_path / "board"))[2] == {"logs/events": t}
        )


def test_how_far_long_transfers_are_is_said(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr("orch_workers.outputs.time.monotonic", lambda: clock.__setitem__(0, clock[0] + 0.3) or clock[0])
    said: list[str] = []
    (tmp_path / "train/out").mkdir(parents=True)
    for n in range(12):
        (tmp_path / f"train/out/{n}").write_bytes(os.urandom(100 << 10))
    trainer = make("trainer", "train", outputs=["out"], on_moving=said.append)
    trainer.sync(ended=True)
    assert said == [], "a partial version is nobody's concern"
    put(tmp_path / "train", {"out/more": "x"})
    for n in range(12):
        (tmp_path / f"train/out/{n}").write_bytes(os.urandom(100 << 10))
    trainer.finish()
    assert said[-1] == "" and 3 <= len(said) < 12
    assert all(re.fullmatch(r"publishing out: \d\.\d of 1\.2 MiB", text) for text in said[:-1]) and said[0] != said[-2]
    said.clear()
    make("board", "board", inputs=["trainer:out"], on_moving=said.append).prepare()
    assert said[-1] == "" and 3 <= len(said) < 12
    assert all(re.fullmatch(r"fetching trainer:out: \d\.\d of 1\.2 MiB", text) for text in said[:-1])
    said.clear()
    make("board", "board", reload=["trainer:out"], on_moving=said.append).sync()
    assert said == []


async def test_how_far_its_files_are_reaches_the_flow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(
        tmp_path,
        {"at-once/sitecustomize.py": "from orch_workers import outputs\noutputs._LONG = outputs._SAID_EVERY = 0"},
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "at-once"))
    put(tmp_path / "app", {"data/a": "a" * 100_000, "data/b": "b" * 100_000, "cwd/keep": ""})
    async with flow_with_agent(tmp_path / "app") as flow:
        DriveStore(f"file://{flow.orch_dir}/drive", "app").publish("api", "data", flow.folder / "data")
        await flow.place("w")
        await flow.start("w", "cp -r data out", cwd="cwd", inputs=["data"], outputs=["out"], sync_interval=60)
        assert (await flow.ended("w")).reason is None
        # what was not sent yet is replaced by what is newer
        told = [item.moving for item in flow.of(Progress)]
        assert told[-1] == "" and len(told) >= 2
        kinds = [type(item) for _, item, _ in flow.items]
        assert kinds[0] is Progress and kinds.index(Started) > 0 and kinds[-1] is Ended


async def test_a_script_with_files(tmp_path: Path) -> None:
    async with flow_with_agent(tmp_path / "app") as flow:
        store = DriveStore(f"file://{flow.orch_dir}/drive", "app")
        put(flow.folder, {"a/keep": ""})
        await flow.place("make")
        await flow.place("use")
        step = "echo {0} > out/f; sleep 0.5"
        command = ["bash", "-c", f"mkdir -p out; {step.format(1)}; {step.format(2)}; exit $0"]
        await flow.start("make", command, args=["3"], outputs=["out"], cwd="a", sync_interval=0.1)
        ended = await flow.ended("make")
        assert ended.reason == "exit_code"
        assert store.resolve("out") is None
        assert store.read_bytes("out/f", partial=True) == b"2\n"
        await flow.start("make", command, n=2, args=["0"], outputs=["out"], cwd="a", sync_interval=0.1)
        ended = await flow.ended("make", 2)
        assert ended.reason is None and ended.result == ["out"]
        kinds = [type(item) for _, item, _ in flow.items]
        assert kinds.index(Published) < kinds.index(Ended) and kinds[-2:] == [Published, Ended]
        put(flow.folder, {"b/keep": ""})
        await flow.start("use", "cat out/f", inputs=["out"], cwd="b")
        ended = await flow.ended("use")
        assert ended.reason is None and flow.log_of("use").endswith("2\n") and ended.result == []
        await flow.start("use", "cat out/f", n=2, inputs=["nowhere"], cwd="b")
        ended = await flow.ended("use", 2)
        assert ended.reason == "exception" and "nowhere" in ended.message
        await flow.start("use", "true", n=3, outputs=["nowhere"], cwd="b")
        ended = await flow.ended("use", 3)
        assert ended.reason == "exception" and "nowhere" in ended.message and ended.exit_code == 0
