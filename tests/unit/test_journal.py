"""The journal: what was committed is there after a crash, and only that; the ring; errors that say what to do."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

import orch.journal
from orch.errors import JournalError, NotFound, StatePathError
from orch.journal import Batch, Journal, Revision
from orch.state import StateTree, same


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


@pytest.fixture
def journal(path: Path) -> Iterator[Journal]:
    journal = Journal.open(path)
    yield journal
    journal.close()


class Writer:
    """A run whose state and journal go together, as the service keeps them."""

    def __init__(self, journal: Journal, state: dict[str, Any]) -> None:
        self.journal = journal
        self.run = journal.begin_run({"app": "x"})
        self.tree = StateTree(state, 0)
        self.snapshots = 0
        journal.commit(self.run, Batch(snapshot=self.tree.snapshot()))

    def write(self, *ops: dict[str, Any], facts: list[Any] | None = None, durable: bool = False) -> None:
        rev = self.tree.rev + 1
        done = self.tree.apply(ops, rev, guard=True)
        batch = Batch([Revision(rev, 1000.0 + rev, "ui", done)], facts or [], durable=durable)
        if self.journal.due_snapshot():
            batch.snapshot = self.tree.snapshot()
            self.snapshots += 1
        self.journal.commit(self.run, batch)

    def set(self, name: str, value: Any) -> None:
        self.write({"op": "replace", "path": f"/vars/{name}", "value": value})


def test_what_was_committed_comes_back(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0, "rows": [], "é": "\U0001f600"}, "works": {}})
    writer.set("x", 1)
    writer.write(
        {"op": "add", "path": "/vars/rows/-", "value": {"n": 1.0}},
        {"op": "add", "path": "/vars/rows/0", "value": 2**80},
        facts=[("call", "1-t-1", {"stage": "running"}), ("agent", "local", {"epoch": 1}), ("schedule", "k", 5.5)],
    )
    writer.write(
        {"op": "move", "from": "/vars/rows/0", "path": "/vars/rows/1"},
        facts=[("call", "1-t-1", {"stage": "succeeded"}), ("schedule", "k", None), ("schedule", "l", [1])],
    )
    journal.close()
    again = Journal.open(path)
    loaded = again.load(writer.run)
    assert same(loaded.state, writer.tree.root)
    assert loaded.rev == 3
    assert loaded.facts == {
        "call": {"1-t-1": {"stage": "succeeded"}},
        "agent": {"local": {"epoch": 1}},
        "schedule": {"l": [1]},
    }
    for pointer in ("", "/vars", "/vars/x", "/vars/rows", "/vars/rows/1", "/vars/é", "/works"):
        assert loaded.tree.value_rev(pointer) == writer.tree.value_rev(pointer)
    assert loaded.tree.size == writer.tree.size
    again.close()


def test_a_batch_is_all_or_nothing(journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    writer.set("x", 1)
    bad = Batch(
        [Revision(2, 0.0, "ui", [{"op": "replace", "path": "/vars/x", "value": 2}]), Revision(1, 0.0, "ui", [])],
        [("call", "c", {})],
    )
    with pytest.raises(JournalError, match="holds this revision already"):
        journal.commit(writer.run, bad)
    loaded = journal.load(writer.run)
    assert loaded.state == {"vars": {"x": 1}}
    assert loaded.facts["call"] == {}
    writer.set("x", 3)
    assert journal.load(writer.run).state == {"vars": {"x": 3}}


def test_runs_count_up_and_the_last_five_are_kept(path: Path, journal: Journal) -> None:
    for number in range(1, 8):
        assert journal.begin_run({"n": number}) == number
        journal.commit(
            number,
            Batch([Revision(1, 0.0, "flow", [])], [("call", "c", {"n": number}), ("x", "y", 1)], snapshot=(0, {})),
        )
        if number != 6:
            journal.end_run(number, "stopped")
    runs = journal.runs()
    assert [info.run for info in runs] == [3, 4, 5, 6, 7]
    assert [info.how for info in runs] == ["stopped", "stopped", "stopped", None, "stopped"]
    assert runs[3].ended is None
    assert runs[3].meta == {"n": 6}
    assert runs[0].started <= (runs[0].ended or 0.0)
    assert journal.load(3).facts["call"] == {"c": {"n": 3}}
    with pytest.raises(NotFound, match="no run 2"):
        journal.load(2)
    with pytest.raises(NotFound, match="no run 2"):
        journal.resume_run(2)
    journal.resume_run(7)
    assert journal.runs()[-1].how is None
    db = sqlite3.connect(path)
    for table in ("revisions", "snapshots", "calls", "facts"):
        assert db.execute(f"SELECT min(run), max(run) FROM {table}").fetchone() == (3, 7)
    db.close()


def test_earlier_revisions_and_history(journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0, "d": {"a": {"b": 1}, "c": 2}}})
    for number in range(1, 6):
        writer.set("x", number)
    writer.write({"op": "replace", "path": "/vars/d/a/b", "value": 5})
    writer.write({"op": "replace", "path": "/vars/d/c", "value": 6})
    writer.write({"op": "move", "from": "/vars/d/a", "path": "/vars/d/z"})
    writer.write({"op": "replace", "path": "/vars/d", "value": {}})
    for rev in range(6):
        assert journal.at(writer.run, rev).root["vars"]["x"] == rev
    assert journal.at(writer.run, 8).root["vars"]["d"] == {"z": {"b": 5}, "c": 6}
    for rev in (-1, 10):
        with pytest.raises(NotFound, match=rf"revision {rev} of run 1 is not kept: kept are 0 to 9"):
            journal.at(writer.run, rev)
    with pytest.raises(NotFound, match="nothing is kept"):
        journal.at(9, 1)
    assert [r.rev for r in journal.revisions(writer.run, 2, 3)] == [3, 4, 5]
    assert journal.revisions(writer.run, 8, 9) == [
        Revision(9, 1009.0, "ui", [{"op": "replace", "path": "/vars/d", "value": {}}])
    ]
    assert [r.rev for r in journal.history(writer.run, "/vars/d/a", 10)] == [6, 8, 9]
    assert [r.rev for r in journal.history(writer.run, "/vars/d/a/b/c", 10)] == [6, 8, 9]
    assert [r.rev for r in journal.history(writer.run, "/vars/x", 2)] == [4, 5]
    assert [r.rev for r in journal.history(writer.run, "", 99)] == list(range(1, 10))
    assert journal.history(writer.run, "/vars/xx", 10) == []
    with pytest.raises(StatePathError):
        journal.history(writer.run, "vars", 1)


def test_the_ring(monkeypatch: pytest.MonkeyPatch, path: Path, journal: Journal) -> None:
    monkeypatch.setattr(orch.journal, "KEPT_REVISIONS", 100)
    monkeypatch.setattr(orch.journal, "SNAPSHOT_REVISIONS", 10)
    writer = Writer(journal, {"vars": {"x": 0, "never": 1}})
    assert not journal.due_snapshot()
    for number in range(1, 501):
        writer.set("x", number)
    assert writer.snapshots in range(45, 51)
    kept = journal.revisions(writer.run, 0, 10_000)
    assert 100 <= len(kept) <= 150
    assert kept[-1].rev == 500
    oldest = kept[0].rev - 1
    for rev in range(oldest, 501):
        assert journal.at(writer.run, rev).root["vars"]["x"] == rev
    with pytest.raises(NotFound):
        journal.at(writer.run, oldest - 1)
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM snapshots").fetchone()[0] <= 6
    db.close()
    loaded = journal.load(writer.run)
    assert loaded.state == {"vars": {"x": 500, "never": 1}}
    assert loaded.tree.value_rev("/vars/never") == 0


def test_snapshots_are_due_by_count_by_bytes_and_by_size(path: Path, journal: Journal) -> None:
    run = journal.begin_run({})
    assert journal.due_snapshot()
    journal.commit(run, Batch(snapshot=(0, {"vars": {"x": 0}})))
    assert not journal.due_snapshot()
    journal.commit(
        run, Batch([Revision(1, 0.0, "ui", [{"op": "replace", "path": "/vars/x", "value": "y" * 2_100_000}])])
    )
    assert journal.due_snapshot()
    journal.commit(run, Batch(snapshot=(1, {"vars": {"x": "y" * 2_100_000}})))
    small = [{"op": "replace", "path": "/vars/x", "value": 1}]
    journal.commit(run, Batch([Revision(rev, 0.0, "ui", small) for rev in range(2, 1500)]))
    assert not journal.due_snapshot()  # 1,498 small revisions replay faster than 2 MiB are written
    journal.close()
    again = Journal.open(path)
    assert again.load(run).state == {"vars": {"x": 1}}
    assert not again.due_snapshot()
    again.commit(run, Batch([Revision(rev, 0.0, "ui", small) for rev in range(1500, 12_000)]))
    assert again.due_snapshot()
    again.close()


def test_a_hundred_thousand_revisions_resume_quickly(path: Path, journal: Journal) -> None:
    run = journal.begin_run({})
    tree = StateTree({"vars": {"x": 0, "d": {f"k{i}": i for i in range(1000)}}}, 0)
    journal.commit(run, Batch(snapshot=tree.snapshot()))
    for start in range(1, 100_001, 500):
        batch = Batch()
        for rev in range(start, start + 500):
            ops = tree.apply([{"op": "replace", "path": f"/vars/d/k{rev % 1000}", "value": -rev}], rev, guard=True)
            batch.revisions.append(Revision(rev, 0.0, "ui", ops))
        if journal.due_snapshot():
            batch.snapshot = tree.snapshot()
        journal.commit(run, batch)
    journal.close()
    begin = time.perf_counter()
    again = Journal.open(path)
    loaded = again.load(run)
    took = time.perf_counter() - begin
    assert loaded.rev == 100_000
    assert same(loaded.state, tree.root)
    again.close()
    assert took < 1.0


# ---- files and crashes


def test_the_file_is_private_and_readable_without_the_server(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    writer.set("x", [1])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True)
    assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    rev, cause, ops = db.execute("SELECT rev, cause, ops FROM revisions").fetchone()
    assert (rev, cause, json.loads(ops)) == (1, "ui", [{"op": "replace", "path": "/vars/x", "value": [1]}])
    (value,) = db.execute("SELECT json_extract(state, '$.vars.x') FROM snapshots").fetchone()
    assert value == 0
    db.close()
    looking = Journal.open(path, readonly=True)
    assert looking.load(writer.run).state == {"vars": {"x": [1]}}
    with pytest.raises(JournalError, match="cannot be written"):
        looking.commit(writer.run, Batch([Revision(2, 0.0, "ui", [])]))
    looking.close()


def test_looking_makes_no_file(path: Path) -> None:
    with pytest.raises(NotFound, match=r"no state database .*state\.db"):
        Journal.open(path, readonly=True)
    assert not path.exists()


def test_an_open_mode_is_narrowed(path: Path) -> None:
    path.touch(mode=0o644)
    Journal.open(path).close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_kill_nine_loses_nothing_that_was_committed(path: Path) -> None:
    """A child commits and prints each number once `commit` has returned; it is killed in the middle of that."""
    child = textwrap.dedent("""
        import sys
        from orch.journal import Batch, Journal, Revision
        journal = Journal.open(sys.argv[1])
        run = journal.begin_run({})
        journal.commit(run, Batch(snapshot=(0, {"vars": {"x": 0}})))
        rev = 0
        while True:
            rev += 1
            op = {"op": "replace", "path": "/vars/x", "value": rev}
            journal.commit(run, Batch([Revision(rev, 0.0, "ui", [op])], [("call", "c", rev)], durable=rev % 50 == 0))
            print(rev, flush=True)
    """)
    process = subprocess.Popen(
        [sys.executable, "-P", "-c", child, str(path)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(Path(orch.journal.__file__).parents[1])},
    )
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            if int(line) >= 300:
                os.killpg(process.pid, signal.SIGKILL)
                break
        told = [int(line), *map(int, process.stdout.read().split())][-1]
    process.wait()
    journal = Journal.open(path)
    loaded = journal.load(1)
    assert loaded.rev in (told, told + 1)  # the last commit may not have been told any more
    assert loaded.state == {"vars": {"x": loaded.rev}}
    assert loaded.facts["call"] == {"c": loaded.rev}
    assert journal.runs()[0].how is None
    journal.close()


def test_durable_commits_sync(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for always in (False, True):
        journal = Journal.open(path, durable=always)
        run = journal.begin_run({})
        for asked in (False, True, False):
            journal.commit(run, Batch(facts=[("x", "y", 1)], durable=asked))
            (level,) = journal._db.execute("PRAGMA synchronous").fetchone()
            assert level == (2 if asked or always else 1)
        journal.close()


def test_one_thread_after_another(journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    thread = threading.Thread(target=writer.set, args=("x", 5))
    thread.start()
    thread.join()
    assert journal.load(writer.run).state == {"vars": {"x": 5}}


# ---- errors


def test_a_full_disk_is_named_and_loses_nothing(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    (pages,) = journal._db.execute("PRAGMA page_count").fetchone()
    journal._db.execute(f"PRAGMA max_page_count = {pages + 10}")
    big = Batch([Revision(1, 0.0, "ui", [{"op": "replace", "path": "/vars/x", "value": "y" * 1_000_000}])])
    with pytest.raises(JournalError, match=rf"{path}: the disk is full") as caught:
        journal.commit(writer.run, big)
    assert "free some space" in caught.value.hint
    assert journal.load(writer.run).state == {"vars": {"x": 0}}
    journal._db.execute("PRAGMA max_page_count = 1000000")
    journal.commit(writer.run, big)
    assert len(journal.load(writer.run).state["vars"]["x"]) == 1_000_000


def test_what_is_no_journal_is_left_alone(path: Path) -> None:
    path.write_text("these are my notes, " * 200)
    with pytest.raises(JournalError, match="is not a database") as caught:
        Journal.open(path)
    assert "move it away" in caught.value.hint
    assert path.read_text().startswith("these are my notes")


def test_another_programs_database_is_left_alone(path: Path) -> None:
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE recipes (name TEXT)")
    db.commit()
    db.close()
    with pytest.raises(JournalError, match="database of another program"):
        Journal.open(path)
    db = sqlite3.connect(path)
    assert db.execute("SELECT count(*) FROM sqlite_master").fetchone() == (1,)
    db.close()


def test_a_newer_schema_is_refused(path: Path) -> None:
    Journal.open(path).close()
    db = sqlite3.connect(path)
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(JournalError, match="newer orch") as caught:
        Journal.open(path)
    assert "--fresh" in caught.value.hint


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file") as caught:
        Journal.open(tmp_path / "nowhere" / "state.db")
    assert caught.value.hint


def test_a_damaged_value_is_named(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    journal._db.execute("UPDATE snapshots SET state = '{broken'")
    with pytest.raises(JournalError, match="cannot be read") as caught:
        journal.load(writer.run)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value.__cause__, msgspec.MsgspecError)


def test_a_closed_journal_says_so(path: Path) -> None:
    journal = Journal.open(path)
    journal.close()
    with pytest.raises(JournalError, match="closed"):
        journal.runs()


def test_a_path_that_is_too_long_says_so(tmp_path: Path) -> None:
    longest = 504
    folder = tmp_path
    while (room := longest - len(os.fsencode(folder)) - len("/state.db")) > 0:
        folder /= "d" * (room - 1 if room < 200 else 100)
    folder.mkdir(parents=True)
    Journal.open(folder / "state.db").close()
    with pytest.raises(JournalError, match=rf"505 bytes, SQLite takes at most {longest}") as caught:
        Journal.open(folder / "statex.db")
    assert "shorter" in caught.value.hint
