"""The journal: what was committed is there after a crash, and only that; the ring; errors that say what to do."""

from __future__ import annotations

import json
import os
import shutil
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

import pytest

import orch.journal
from orch.errors import JournalError, JournalUnreadable, NotFound, StatePathError
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


def test_the_edges_of_the_ring(monkeypatch: pytest.MonkeyPatch, path: Path, journal: Journal) -> None:
    monkeypatch.setattr(orch.journal, "KEPT_REVISIONS", 100)
    monkeypatch.setattr(orch.journal, "SNAPSHOT_REVISIONS", 10)
    writer = Writer(journal, {"vars": {"x": 0}})
    for number in range(1, 401):
        writer.set("x", number)
        # At every moment: the last 100 and little more, without a gap, each as it was.
        kept = [r.rev for r in journal.history(writer.run, "", 1000)]
        assert kept == list(range(kept[0], number + 1))
        assert min(100, number) <= len(kept) <= 100 + 25 + 2 * 11 + 1
        oldest = kept[0] - 1
        assert journal.at(writer.run, oldest).root == {"vars": {"x": oldest}}
        assert journal.at(writer.run, number).root == {"vars": {"x": number}}
        for rev in (oldest - 1, number + 1):
            with pytest.raises(NotFound, match=f"revision {rev} of run 1 is not kept: kept are {oldest} to {number}"):
                journal.at(writer.run, rev)
    assert oldest > 0


def test_large_revisions_shorten_the_ring(monkeypatch: pytest.MonkeyPatch, path: Path, journal: Journal) -> None:
    monkeypatch.setattr(orch.journal, "KEPT_BYTES", 1_000_000)
    monkeypatch.setattr(orch.journal, "SNAPSHOT_BYTES", 50_000)
    writer = Writer(journal, {"vars": {"x": 0}})
    largest = 0
    for number in range(1, 401):
        writer.set("x", f"{number} " + "y" * 20_000)
        if number == 200:
            journal.close()
            journal = writer.journal = Journal.open(path)
            journal.load(writer.run)
        largest = max(largest, path.stat().st_size)
    kept = [r.rev for r in journal.history(writer.run, "", 1000)]
    assert kept == list(range(kept[0], 401))
    assert 50 <= len(kept) <= 75
    assert journal.at(writer.run, kept[0]).root["vars"]["x"].startswith(f"{kept[0]} ")
    assert largest < 3_000_000
    journal.close()


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
    assert "--fresh" in caught.value.hint
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


DATA = Path(__file__).parents[1] / "data"
WRITTEN = sorted(DATA.glob("journal-*.db"))
"""One small journal of each schema there ever was, all with what journal.json says."""


@pytest.mark.parametrize("readonly", [False, True])
@pytest.mark.parametrize("old", WRITTEN, ids=lambda path: path.stem)
def test_older_journals_load_for_ever(path: Path, old: Path, readonly: bool) -> None:
    shutil.copy(old, path)
    before = path.read_bytes()
    wanted = json.loads((DATA / "journal.json").read_text())
    journal = Journal.open(path, readonly=readonly)
    assert [[run.run, run.how] for run in journal.runs()] == wanted["runs"]
    loaded = journal.load(2)
    assert same(loaded.state, wanted["state"])
    assert loaded.rev == wanted["rev"]
    assert {kind: facts for kind, facts in loaded.facts.items() if kind != "token"} == wanted["facts"]
    assert journal.at(2, 30).root["works"]["adds"]["vars"] == {"total": 6}
    assert [entry.rev for entry in journal.history(2, "/structures/children_/flows/1/vars/inner", 9)] == [18, 38]
    if readonly:
        with pytest.raises(JournalError, match="cannot be written"):
            journal.begin_run({})
    else:
        assert journal.begin_run({}) == 3
        journal.commit(3, Batch([Revision(1, 0.0, "ui", [])], snapshot=(0, {})))
    journal.close()
    assert readonly == (path.read_bytes() == before)
    again = Journal.open(path)
    assert [run.run for run in again.runs()] == ([1, 2] if readonly else [1, 2, 3])
    again.close()


def test_every_schema_has_its_file() -> None:
    assert [path.stem for path in WRITTEN] == [f"journal-{n + 1}" for n in range(len(orch.journal._STEPS))]


def test_steps_to_the_present_are_one_transaction(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(DATA / "journal-1.db", path)
    begun = []

    def third(db: sqlite3.Connection) -> None:
        begun.append(db.execute("SELECT count(crc) FROM revisions").fetchone()[0])  # stands on the step before
        db.execute("CREATE TABLE third (x)")
        if len(begun) == 1:
            raise sqlite3.OperationalError("cut off")

    monkeypatch.setattr(orch.journal, "_STEPS", (*orch.journal._STEPS, third))
    with pytest.raises(JournalError, match="cut off"):
        Journal.open(path)
    db = sqlite3.connect(path)
    assert db.execute("PRAGMA user_version").fetchone() == (1,)
    assert "crc" not in [row[1] for row in db.execute("PRAGMA table_info(revisions)")]
    db.close()
    journal = Journal.open(path)
    assert journal.load(2).rev == 40
    assert journal._number("PRAGMA user_version") == 3
    assert begun == [45, 45]
    journal.close()
    Journal.open(path).close()
    assert len(begun) == 2


# ---- damage


def damaged(path: Path, sql: str, *args: Any) -> None:
    db = sqlite3.connect(path)
    assert db.execute(sql, args).rowcount == 1
    db.commit()
    db.close()


def test_damage_is_named_where_it_is(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    for number in range(1, 6):
        writer.write({"op": "replace", "path": "/vars/x", "value": 10 + number}, facts=[("call", "1-t-1", {"n": 1})])
    damaged(path, "UPDATE revisions SET ops = replace(ops, '13', '18') WHERE rev = 3")
    with pytest.raises(JournalUnreadable, match=r"damaged: revision 3 of run 1 is not as it was written") as caught:
        journal.load(writer.run)
    assert str(path) in str(caught.value)
    assert "--fresh" in caught.value.hint
    assert journal.at(writer.run, 2).root == {"vars": {"x": 12}}
    with pytest.raises(JournalUnreadable, match="revision 3"):
        journal.at(writer.run, 3)
    with pytest.raises(JournalUnreadable, match="revision 3"):
        journal.history(writer.run, "/vars/x", 5)
    assert [r.rev for r in journal.history(writer.run, "/vars/x", 2)] == [4, 5]
    damaged(path, "DELETE FROM revisions WHERE rev = 3")
    with pytest.raises(JournalUnreadable, match="revision 3 of run 1 is missing"):
        journal.load(writer.run)
    journal.commit(writer.run, Batch(snapshot=writer.tree.snapshot()))
    assert journal.load(writer.run).rev == 5
    damaged(path, "UPDATE calls SET value = replace(value, '1', '7')")
    with pytest.raises(JournalUnreadable, match="call 1-t-1 of run 1 is not as it was written"):
        journal.load(writer.run)


def test_a_damaged_snapshot_is_made_good_by_an_earlier_one(path: Path, journal: Journal) -> None:
    writer = Writer(journal, {"vars": {"x": 0}})
    for number in range(1, 4):
        writer.set("x", number)
    journal.commit(writer.run, Batch(snapshot=writer.tree.snapshot()))
    writer.set("x", 4)
    damaged(path, "UPDATE snapshots SET state = ? WHERE rev = 3", b'{"vars":{"x":\xff}}')
    loaded = journal.load(writer.run)
    assert (loaded.state, loaded.rev) == ({"vars": {"x": 4}}, 4)
    assert "snapshot 3 of run 1" in loaded.damage[0]
    assert journal.due_snapshot()
    journal.commit(writer.run, Batch(snapshot=loaded.tree.snapshot()))
    assert journal.load(writer.run).damage == []
    assert not journal.due_snapshot()


def test_a_flipped_byte_is_an_error_or_changes_nothing(path: Path) -> None:
    """Every 23rd byte of a small journal, one after another: what loads is exactly what was written."""
    shutil.copy(DATA / "journal-2.db", path)
    whole = path.read_bytes()
    journal = Journal.open(path, readonly=True)
    runs, loaded = journal.runs(), journal.load(2)
    journal.close()
    wanted = (runs, loaded.state, loaded.rev, loaded.facts)
    errors = 0
    for place in range(10, len(whole), 23):
        flipped = bytearray(whole)
        flipped[place] ^= 0x10
        path.write_bytes(flipped)
        try:
            journal = Journal.open(path, readonly=True)
            try:
                runs, loaded = journal.runs(), journal.load(2)
                assert (runs, loaded.state, loaded.rev, loaded.facts) == wanted, f"byte {place}"
            finally:
                journal.close()
        except JournalError as error:
            errors += 1
            assert str(path) in str(error)
            assert error.hint
    assert errors > 100


@pytest.mark.parametrize("how", ["cut", "half", "zeros", "noise", "first"])
def test_a_torn_end_of_the_log_costs_only_what_was_torn(path: Path, tmp_path: Path, how: str) -> None:
    journal = Journal.open(path)
    writer = Writer(journal, {"vars": {"x": 0}})
    copies = tmp_path / "copies"
    copies.mkdir()
    for number in range(1, 30):
        writer.set("x", number)
    size = os.stat(f"{path}-wal").st_size
    writer.set("x", 30)
    grown = os.stat(f"{path}-wal").st_size
    assert grown > size
    for file in (path, Path(f"{path}-wal")):  # what a kill -9 and a power cut leave
        shutil.copy(file, copies)
    journal.close()
    torn = copies / path.name
    with open(f"{torn}-wal", "r+b") as file:
        if how in ("cut", "half"):
            file.truncate(grown - (4096 + 24 if how == "cut" else 2000))
        elif how == "first":
            file.seek(0)
            file.write(b"nothing of a log")
        else:
            file.seek(grown - 4096)
            file.write(b"\0" * 4096 if how == "zeros" else os.urandom(4096))
    again = Journal.open(torn)
    if how == "first":  # the tables themselves were only there
        assert again.runs() == []
        again.close()
        return
    loaded = again.load(writer.run)
    assert (loaded.rev, loaded.state) == (29, {"vars": {"x": 29}})
    again.commit(writer.run, Batch([Revision(30, 0.0, "ui", [{"op": "replace", "path": "/vars/x", "value": -1}])]))
    again.close()
    again = Journal.open(torn)
    assert again.load(writer.run).state == {"vars": {"x": -1}}
    again.close()


@pytest.mark.parametrize("what", ["notes", "recipes", "newer", "page", "whole"])
def test_a_fresh_start_moves_aside_what_cannot_be_read(path: Path, what: str) -> None:
    journal = Journal.open(path)
    Writer(journal, {"vars": {"x": "y" * 50_000}})
    journal.close()
    if what == "notes":
        path.write_text("these are my notes, " * 200)
    elif what == "recipes":
        path.unlink()
        db = sqlite3.connect(path)
        db.execute("CREATE TABLE recipes (name TEXT)")
        db.close()
    elif what == "newer":
        db = sqlite3.connect(path)
        db.execute("PRAGMA user_version = 99")
        db.close()
    elif what == "page":
        with path.open("r+b") as file:
            file.seek(path.stat().st_size - 4096)
            file.write(b"\xff" * 4096)
    before = path.read_bytes()
    journal, aside = Journal.open_anew(path)
    if what == "whole":
        assert aside is None
        assert len(journal.runs()) == 1
    else:
        assert aside is not None
        assert aside.read_bytes() == before
        assert journal.runs() == []
    assert journal.begin_run({}) == (2 if what == "whole" else 1)
    journal.close()


def test_a_fresh_start_moves_nothing_aside_for_want_of_space(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Journal.open(path).close()
    full = JournalError("the disk is full")

    def fails(self: Journal, readonly: bool) -> None:
        raise full

    monkeypatch.setattr(Journal, "_prepare", fails)
    with pytest.raises(JournalError) as caught:
        Journal.open_anew(path)
    assert caught.value is full
    assert path.exists()


# ---- readers


def test_readers_without_a_gap_do_not_let_the_log_grow(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orch.journal, "WAL_BYTES", 2 * 2**20)
    journal._wal_due = 2 * 2**20
    writer = Writer(journal, {"vars": {"x": ""}})
    stop = threading.Event()

    def read() -> None:
        first, second = (sqlite3.connect(path, isolation_level=None) for _ in range(2))
        while not stop.is_set():  # one begins before the other ends: there is always a reader
            first.execute("BEGIN")
            first.execute("SELECT count(*) FROM revisions").fetchone()
            if second.in_transaction:
                second.execute("COMMIT")
            first, second = second, first
        first.close()
        second.close()

    reader = threading.Thread(target=read)
    reader.start()
    largest = 0
    try:
        for number in range(300):
            writer.set("x", f"{number} " + "y" * 100_000)
            largest = max(largest, os.stat(f"{path}-wal").st_size)
    finally:
        stop.set()
        reader.join()
    assert largest < 12 * 2**20


def test_a_reader_that_does_not_end_is_told_of_and_forgiven(
    path: Path, journal: Journal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(orch.journal, "WAL_BYTES", 2**20)
    monkeypatch.setattr(orch.journal, "WAL_PATIENCE", 0.01)
    journal._wal_due = 2**20
    writer = Writer(journal, {"vars": {"x": ""}})
    reader = sqlite3.connect(path, isolation_level=None)
    reader.execute("BEGIN")
    seen = reader.execute("SELECT count(*) FROM revisions").fetchone()
    assert journal.held == 0
    for number in range(60):
        writer.set("x", f"{number} " + "y" * 100_000)
    assert journal.held > 2**20
    assert reader.execute("SELECT count(*) FROM revisions").fetchone() == seen
    reader.execute("COMMIT")
    for number in range(30):
        writer.set("x", f"{number} " + "z" * 100_000)
    assert journal.held == 0
    assert os.stat(f"{path}-wal").st_size < 8 * 2**20
    reader.close()
    assert journal.load(writer.run).rev == 90


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="No such file") as caught:
        Journal.open(tmp_path / "nowhere" / "state.db")
    assert caught.value.hint


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
