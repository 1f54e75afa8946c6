"""The journal: one SQLite file (`.orch/state.db`, WAL) that holds everything a resume needs. Not PURE.

It can be read without the server, e.g. `sqlite3 .orch/state.db "select rev, cause, ops from revisions"`:

    runs       run, started, ended, how, meta        one life of the app; ended and how are NULL if its server died
    revisions  run, rev, at, cause, ops              ops is an RFC 6902 patch; applied in order they give the state
    snapshots  run, rev, state, revs, bytes          the whole tree at rev; revs says when each part last changed,
                                                     bytes how long the run's ops were up to it
    calls      run, key, value                       one row a call
    agents     run, key, value                       one row an agent
    facts      run, kind, key, value                 everything else

Times are seconds since the epoch, values are JSON; `crc` is a CRC-32 of a row's other columns, because SQLite does not
notice a byte that has changed within a value. At least the last 10,000 revisions of each of the last 5 runs are
kept, or fewer if their ops exceed 256 MiB. A commit is one transaction. It survives the death of the process at once,
and a power cut once the WAL is synced: at the next checkpoint, or with the commit itself if that is durable. Use a
Journal from one thread at a time.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import JournalError, JournalUnreadable, NotFound
from orch.state import StateTree, parse_pointer
from orch.wire import Op
from orch_drive.crash import crash_point

__all__ = ["Batch", "Journal", "Loaded", "Revision", "RunInfo"]

KEPT_REVISIONS = 10_000
KEPT_BYTES = 256 * 1024 * 1024
KEPT_RUNS = 5
SNAPSHOT_REVISIONS = 1_000
SNAPSHOT_BYTES = 2 * 1024 * 1024
WAL_BYTES = 32 * 1024 * 1024
"""SQLite starts its write-ahead log anew every 4 MiB, unless somebody reads just then; from this size on it must."""
WAL_PATIENCE = 0.5
"""Seconds in which readers may then come to their end."""

_APPLICATION_ID = 0x6F726368  # "orch"
_BUSY_TIMEOUT = 10.0


def _crc(*columns: Any) -> int:
    return zlib.crc32("\x1f".join(map(str, columns)).encode(errors="replace"))


def _first_tables(db: sqlite3.Connection) -> None:
    for statement in (
        "CREATE TABLE runs (run INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, how TEXT, meta TEXT NOT NULL)",
        "CREATE TABLE revisions (run INTEGER NOT NULL, rev INTEGER NOT NULL, at REAL NOT NULL, cause TEXT NOT NULL,"
        " ops TEXT NOT NULL, PRIMARY KEY (run, rev)) WITHOUT ROWID",
        "CREATE TABLE snapshots (run INTEGER NOT NULL, rev INTEGER NOT NULL, state TEXT NOT NULL, revs TEXT,"
        " PRIMARY KEY (run, rev))",
        "CREATE TABLE calls (run INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (run, key)) WITHOUT ROWID",
        "CREATE TABLE agents (run INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (run, key)) WITHOUT ROWID",
        "CREATE TABLE facts (run INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,"
        " PRIMARY KEY (run, kind, key)) WITHOUT ROWID",
        f"PRAGMA application_id = {_APPLICATION_ID}",
    ):
        db.execute(statement)


def _checksums(db: sqlite3.Connection) -> None:
    db.create_function("crc32", -1, _crc, deterministic=True)
    db.execute("ALTER TABLE snapshots ADD COLUMN bytes INTEGER")
    db.execute(
        "UPDATE snapshots SET bytes = (SELECT coalesce(sum(length(CAST(ops AS BLOB))), 0) FROM revisions"
        " WHERE revisions.run = snapshots.run AND revisions.rev <= snapshots.rev)"
    )
    for table, columns in (
        ("runs", "run, started, ended, how, meta"),
        ("revisions", "run, rev, at, cause, ops"),
        ("snapshots", "run, rev, state, revs, bytes"),
        ("calls", "run, 'call', key, value"),
        ("agents", "run, 'agent', key, value"),
        ("facts", "run, kind, key, value"),
    ):
        db.execute(f"ALTER TABLE {table} ADD COLUMN crc INTEGER")
        db.execute(f"UPDATE {table} SET crc = crc32({columns})")


_STEPS: tuple[Callable[[sqlite3.Connection], None], ...] = (_first_tables, _checksums)
"""What makes schema 1 of nothing, 2 of 1, and so on. Never change one that was released: add the next, and a file that
the present version has written to tests/data."""
_OWN_TABLES = {"call": "calls", "agent": "agents"}
_RUN_TABLES = ("runs", "revisions", "snapshots", "calls", "agents", "facts")


@dataclass(frozen=True, slots=True)
class Revision:
    """One accepted change of the state: what, when (seconds since the epoch) and who."""

    rev: int
    at: float
    cause: str
    ops: list[Op]


@dataclass(slots=True)
class Batch:
    """What becomes durable together.

    `facts` are (kind, key, JSON value, or None to delete); the kinds "call" and "agent" have tables of their own.
    `snapshot` is `StateTree.snapshot()`, or (revision, state that nobody changes any more). `durable`: survives a power
    cut once `commit` returns.
    """

    revisions: list[Revision] = field(default_factory=list)
    facts: list[tuple[str, str, Any | None]] = field(default_factory=list)
    snapshot: tuple[Any, ...] | None = None
    durable: bool = False


@dataclass(frozen=True, slots=True)
class RunInfo:
    """One run. `ended` and `how` are None while its server lives, and for ever if that died."""

    run: int
    started: float
    ended: float | None
    how: str | None
    meta: dict[str, Any]

    @property
    def secrets(self) -> list[str]:
        """Names of the secrets that its scripts had; their values are kept nowhere."""
        return list(self.meta.get("secrets", ()))


@dataclass(slots=True)
class Loaded:
    """What a run left: its state (with the revision of each part) and its facts as {kind: {key: value}}."""

    tree: StateTree
    facts: dict[str, dict[str, Any]]
    damage: list[str] = field(default_factory=list)
    """What could not be read and was made good from what it is kept twice with."""

    @property
    def state(self) -> dict[str, Any]:
        return self.tree.root

    @property
    def rev(self) -> int:
        return self.tree.rev


@dataclass(slots=True)
class _Replayed:
    tree: StateTree
    base: int
    """Bytes of the run's operations before the snapshot that was used."""
    snapshot: int | None
    """Bytes of that snapshot."""
    revisions: int = 0
    size: int = 0
    """Bytes of the operations replayed."""
    damage: list[str] = field(default_factory=list)


class _Paths(msgspec.Struct):
    """Only the pointers of an operation, for a search that need not build its value."""

    path: str
    source: str = msgspec.field(name="from", default="")


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


class Journal:
    """Reads and writes one state database. Every method raises JournalError, saying what, where and what to do."""

    def __init__(self, path: Path, db: sqlite3.Connection, *, durable: bool) -> None:
        """Use `Journal.open`."""
        self.path = path
        self._db = db
        self._durable = durable
        self._synchronous = ""
        self._since_revisions = 0
        self._since_bytes = 0
        self._all_bytes = 0
        self._snapshot_bytes: int | None = None
        self._wal = path.with_name(path.name + "-wal")
        self._wal_due = WAL_BYTES
        self.held = 0
        """Bytes of the write-ahead log, while a reader that does not end keeps it from starting anew."""
        self._ops = msgspec.json.Decoder(list[Op])
        self._paths = msgspec.json.Decoder(list[_Paths])

    @classmethod
    def open(cls, path: str | Path, *, durable: bool = False, readonly: bool = False) -> Journal:
        """Open the database; it is created (mode 0600) if it does not exist.

        Args:
            durable: fsync every commit, not only those that ask for it.
            readonly: only look; the file must exist.
        """
        path = Path(path)
        if readonly and not path.exists():
            raise NotFound(f"there is no state database {path}", hint="start the app with orch run")
        with _explained(path):
            if not readonly:
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
                path.chmod(0o600)
            uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rw'}"
            if readonly and not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists():
                uri += "&immutable=1"  # else SQLite wants to write an index beside it
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=_BUSY_TIMEOUT)
            journal = cls(path, db, durable=durable)
            try:
                journal._prepare(readonly)
            except BaseException:
                journal._db.close()
                db.close()
                raise
        return journal

    @classmethod
    def open_anew(cls, path: Path, *, durable: bool = False) -> tuple[Journal, Path | None]:
        """Open the database for a start that needs nothing of it: one that cannot be read is moved aside.

        Returns the journal, and where the old database is now (None: where it was).
        """
        try:
            return cls.open(path, durable=durable), None
        except JournalUnreadable:
            aside = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            with _explained(path):
                for suffix in ("-shm", "-wal", ""):
                    old = path.with_name(path.name + suffix)
                    if old.exists():
                        old.replace(aside.with_name(aside.name + suffix))
            return cls.open(path, durable=durable), aside

    def _damaged(self, what: str) -> JournalUnreadable:
        return JournalUnreadable(f"{self.path} is damaged: {what}", hint=_DAMAGED_HINT)

    def _prepare(self, readonly: bool) -> None:
        db = self._db
        db.text_factory = _text
        version = self._number("PRAGMA user_version")
        owner = self._number("PRAGMA application_id")
        tables = self._number("SELECT count(*) FROM sqlite_master")
        newest = len(_STEPS)
        if owner != _APPLICATION_ID and (owner or version or tables):
            raise JournalUnreadable(
                f"{self.path} is a database of another program",
                hint="move it away, run the app in another folder, or start over with --fresh",
            )
        if version > newest:
            raise JournalUnreadable(
                f"{self.path} was written by a newer orch (schema {version}, this one knows {newest})",
                hint="update orch, or start over with --fresh",
            )
        found = db.execute("PRAGMA quick_check(1)").fetchone()  # 100 MiB take 40 ms
        if found != ("ok",):
            raise self._damaged(" ".join(str(found and found[0]).split()))
        if readonly:
            if version < newest:
                self._db = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
                self._db.text_factory = _text
                db.backup(self._db)
                db.close()
                self._migrate(version)
                self._db.execute("PRAGMA query_only = 1")
            return
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone does not reach the disk
        if version < newest:
            self._migrate(version)

    def _migrate(self, version: int) -> None:
        """From an older schema to the present one, step by step, in one transaction."""
        with self._transaction(durable=True):
            for step in _STEPS[version:]:
                step(self._db)
            self._db.execute(f"PRAGMA user_version = {len(_STEPS)}")

    def close(self) -> None:
        with _explained(self.path):
            self._db.close()

    # -- runs

    def next_run(self) -> int:
        """The number that the next `begin_run` gives."""
        with _explained(self.path):
            return int(self._number("SELECT coalesce(max(run), 0) + 1 FROM runs"))

    def begin_run(self, meta: dict[str, Any]) -> int:
        """A new run; its number. Runs older than the last 5 are forgotten."""
        with _explained(self.path), self._transaction(durable=True):
            run = self.next_run()
            row = (run, time.time(), None, None, _json(meta))
            self._db.execute("INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?)", (*row, _crc(*row)))
            for table in _RUN_TABLES:
                self._db.execute(f"DELETE FROM {table} WHERE run <= ?", (run - KEPT_RUNS,))
        self._since_revisions = self._since_bytes = self._all_bytes = 0
        self._snapshot_bytes = None
        return run

    def resume_run(self, run: int) -> None:
        """Go on with a run, also with one that had ended. Raises NotFound."""
        self._mark(run, None, None)

    def end_run(self, run: int, how: str) -> None:
        """The run ended cleanly: `how` is e.g. "stopped" or "failed"."""
        self._mark(run, time.time(), how)

    def _mark(self, run: int, ended: float | None, how: str | None) -> None:
        with _explained(self.path), self._transaction(durable=True):
            row = self._db.execute("SELECT started, meta FROM runs WHERE run = ?", (run,)).fetchone()
            if row is None:
                raise NotFound(f"{self.path} has no run {run}")
            crc = _crc(run, row[0], ended, how, row[1])
            self._db.execute("UPDATE runs SET ended = ?, how = ?, crc = ? WHERE run = ?", (ended, how, crc, run))

    def runs(self) -> list[RunInfo]:
        """The runs that are kept, oldest first."""
        with _explained(self.path):
            rows = self._db.execute("SELECT run, started, ended, how, meta, crc FROM runs ORDER BY run").fetchall()
            for row in rows:
                self._whole(f"run {row[0]}", row)
            return [RunInfo(row[0], row[1], row[2], row[3], msgspec.json.decode(row[4])) for row in rows]

    # -- writing

    def commit(self, run: int, batch: Batch) -> None:
        """Write the batch in one transaction: all of it or nothing."""
        rows = [(run, entry.rev, float(entry.at), entry.cause, _json(entry.ops)) for entry in batch.revisions]
        size = sum(len(row[4]) for row in rows)
        snapshot: tuple[Any, ...] | None = None
        after: list[tuple[int, int, float, str, str]] = []
        if batch.snapshot is not None:
            rev, state, *rest = batch.snapshot
            revs = _json(rest[0]) if rest and rest[0] is not None else None
            after = [row for row in rows if row[1] > rev]
            snapshot = (run, rev, _json(state), revs, self._all_bytes + size - sum(len(row[4]) for row in after))
        with _explained(self.path), self._transaction(durable=batch.durable or self._durable):
            self._db.executemany(
                "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?)", [(*row, _crc(*row)) for row in rows]
            )
            for kind, key, value in batch.facts:
                self._set_fact(run, kind, key, value)
            if snapshot is not None:
                self._db.execute(
                    "INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?, ?, ?)", (*snapshot, _crc(*snapshot))
                )
                self._prune(run, snapshot[1])
                crash_point("flow.snapshot.written")
        self._all_bytes += size
        if snapshot is None:
            self._since_revisions += len(rows)
            self._since_bytes += size
        else:
            self._since_revisions = len(after)
            self._since_bytes = sum(len(row[4]) for row in after)
            self._snapshot_bytes = len(snapshot[2])
        with _explained(self.path):
            self._start_wal_anew()

    def _start_wal_anew(self) -> None:
        """Readers that follow one another without a gap would let the write-ahead log grow for ever, because SQLite
        starts it anew only when nobody reads. Waiting for those that read now is enough: the next ones do not need it.
        """
        try:
            size = os.stat(self._wal).st_size
        except FileNotFoundError:
            return
        if size < self._wal_due:
            if size < WAL_BYTES:
                self.held, self._wal_due = 0, WAL_BYTES
            return
        self._db.execute(f"PRAGMA busy_timeout = {WAL_PATIENCE * 1000:.0f}")
        (busy, _, _) = self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        self._db.execute(f"PRAGMA busy_timeout = {_BUSY_TIMEOUT * 1000:.0f}")
        self.held = size if busy and size >= 2 * WAL_BYTES else 0
        self._wal_due = size + WAL_BYTES // 2 if busy else WAL_BYTES

    def due_snapshot(self) -> bool:
        """True if the next batch should carry a snapshot. May be asked from any thread.

        After 1,000 revisions or 2 MiB of operations; for a large state after a share of its size, so that snapshots do
        not cost more than what they save.
        """
        if self._snapshot_bytes is None:
            return True
        return (
            self._since_bytes >= max(SNAPSHOT_BYTES, self._snapshot_bytes)
            or (self._since_revisions >= SNAPSHOT_REVISIONS and self._since_bytes >= self._snapshot_bytes // 8)
            or self._since_revisions >= KEPT_REVISIONS
        )

    def _set_fact(self, run: int, kind: str, key: str, value: Any | None) -> None:
        table = _OWN_TABLES.get(kind, "facts")
        where: tuple[Any, ...] = (run, key) if table != "facts" else (run, kind, key)
        if value is None:
            names = "run = ? AND key = ?" if table != "facts" else "run = ? AND kind = ? AND key = ?"
            self._db.execute(f"DELETE FROM {table} WHERE {names}", where)
        else:
            text = _json(value)
            marks = ", ".join("?" * (len(where) + 2))
            row = (*where, text, _crc(run, kind, key, text))
            self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", row)

    def _prune(self, run: int, head: int) -> None:
        """Forget what is older than the ring, and snapshots that stand close together.

        The oldest snapshot is what the kept revisions rest on; those between it and the newest are there to become it.
        """
        rows = self._db.execute("SELECT rev, bytes FROM snapshots WHERE run = ? ORDER BY rev", (run,)).fetchall()
        newest = rows[-1]
        base = rows[0]
        for row in rows:
            if row[0] <= head - KEPT_REVISIONS or newest[1] - row[1] >= KEPT_BYTES:
                base = row
        keep = [base]
        for row in rows:
            if row[0] >= keep[-1][0] + KEPT_REVISIONS // 4 or row[1] >= keep[-1][1] + KEPT_BYTES // 4:
                keep.append(row)
        doomed = [(run, row[0]) for row in rows if row not in keep and row != newest]
        self._db.executemany("DELETE FROM snapshots WHERE run = ? AND rev = ?", doomed)
        self._db.execute("DELETE FROM revisions WHERE run = ? AND rev <= ?", (run, base[0]))

    def copy(self, path: Path) -> None:
        """All that is committed, as a database of its own at `path` (mode 0600)."""
        path.unlink(missing_ok=True)
        with _explained(path):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            with contextlib.closing(sqlite3.connect(path)) as target:
                self._db.backup(target)

    # -- reading

    def load(self, run: int) -> Loaded:
        """The newest state of a run and its facts. Raises NotFound for an unknown run."""
        with _explained(self.path):
            if not self._number("SELECT count(*) FROM runs WHERE run = ?", run):
                raise NotFound(f"{self.path} has no run {run}")
            replayed = self._replay(run, None)
            facts: dict[str, dict[str, Any]] = {}
            for kind, table in _OWN_TABLES.items():
                facts[kind] = {}
                self._read_facts(run, f"SELECT run, '{kind}', key, value, crc FROM {table}", facts)
            self._read_facts(run, "SELECT run, kind, key, value, crc FROM facts", facts)
        self._since_revisions, self._since_bytes = replayed.revisions, replayed.size
        self._all_bytes, self._snapshot_bytes = replayed.base + replayed.size, replayed.snapshot
        return Loaded(replayed.tree, facts, replayed.damage)

    def _read_facts(self, run: int, sql: str, facts: dict[str, dict[str, Any]]) -> None:
        for row in self._db.execute(sql):  # of all runs: a row whose run is damaged would not be missed otherwise
            self._whole(f"{row[1]} {row[2]} of run {row[0]}", row)
            if row[0] == run:
                facts.setdefault(row[1], {})[row[2]] = msgspec.json.decode(row[3])

    def at(self, run: int, rev: int) -> StateTree:
        """The state as it was at a revision. Raises NotFound if that is no longer (or not yet) kept."""
        with _explained(self.path):
            oldest = self._number("SELECT min(rev) FROM snapshots WHERE run = ?", run)
            newest = self._number(
                "SELECT max(rev) FROM (SELECT rev FROM snapshots WHERE run = ?1"
                " UNION ALL SELECT max(rev) FROM revisions WHERE run = ?1)",
                run,
            )
            if oldest is None or newest is None or not oldest <= rev <= newest:
                kept = f"kept are {oldest} to {newest}" if newest is not None else "nothing is kept"
                raise NotFound(f"revision {rev} of run {run} is not kept: {kept}")
            return self._replay(run, rev).tree

    def revisions(self, run: int, after: int, limit: int) -> list[Revision]:
        """Up to `limit` kept revisions after a revision, oldest first."""
        with _explained(self.path):
            rows = self._db.execute(
                "SELECT run, rev, at, cause, ops, crc FROM revisions WHERE run = ? AND rev > ? ORDER BY rev LIMIT ?",
                (run, after, limit),
            ).fetchall()
            return [self._revision(row) for row in rows]

    def history(self, run: int, pointer: str, limit: int) -> list[Revision]:
        """The last `limit` kept revisions that changed the value at the pointer, anything in it, or what it lies in;
        newest last. Raises StatePathError for a malformed pointer."""
        tokens = parse_pointer(pointer)
        found: list[Revision] = []
        with _explained(self.path):
            rows = self._db.execute(
                "SELECT run, rev, at, cause, ops, crc FROM revisions WHERE run = ? ORDER BY rev DESC", (run,)
            )
            for row in rows:
                if len(found) >= limit:
                    break
                self._whole(f"revision {row[1]} of run {run}", row)
                if any(_touches(entry, tokens) for entry in self._paths.decode(row[4])):
                    found.append(self._revision(row))
        return found[::-1]

    def _revision(self, row: tuple[Any, ...]) -> Revision:
        self._whole(f"revision {row[1]} of run {row[0]}", row)
        return Revision(row[1], row[2], row[3], self._ops.decode(row[4]))

    def _whole(self, what: str, row: tuple[Any, ...] | None) -> None:
        """Raises JournalUnreadable unless the row is there and its last column is the checksum of the others."""
        if row is None or _crc(*row[:-1]) != row[-1]:
            raise self._damaged(f"{what} is not as it was written")

    def _replay(self, run: int, rev: int | None) -> _Replayed:
        """The tree at `rev`, or at the newest revision: a snapshot and what came after it.

        A snapshot that is damaged is not missed while an earlier one and the revisions since then are whole.
        """
        upto = 2**62 if rev is None else rev
        known = self._db.execute(
            "SELECT rev FROM snapshots WHERE run = ? AND rev <= ? ORDER BY rev DESC", (run, upto)
        ).fetchall()
        damage: list[str] = []
        first: JournalUnreadable | None = None
        for (at,) in known:
            try:
                with _explained(self.path):
                    row = self._db.execute(
                        "SELECT run, rev, state, revs, bytes, crc FROM snapshots WHERE run = ? AND rev = ?", (run, at)
                    ).fetchone()
                    self._whole(f"snapshot {at} of run {run}", row)
            except JournalUnreadable as error:
                damage.append(error.message)
                first = first or error
                continue
            replayed = self._replay_from(row, upto)
            replayed.damage = damage
            if damage:
                replayed.snapshot = None  # the next commit brings a new one
            return replayed
        if first is not None:
            raise first
        return self._replay_from((run, 0, "{}", None, 0, 0), upto)

    def _replay_from(self, snapshot: tuple[Any, ...], upto: int) -> _Replayed:
        run, base, state, revs, size, _ = snapshot
        tree = StateTree(msgspec.json.decode(state), base, revs=msgspec.json.decode(revs) if revs is not None else None)
        replayed = _Replayed(tree, size, len(state))
        expected = base
        for row in self._db.execute(
            "SELECT run, rev, at, cause, ops, crc FROM revisions WHERE run = ? AND rev > ? AND rev <= ? ORDER BY rev",
            (run, base, upto),
        ):
            expected += 1
            if row[1] != expected:
                raise self._damaged(f"revision {expected} of run {run} is missing")
            self._whole(f"revision {expected} of run {run}", row)
            tree.replay(self._ops.decode(row[4]), expected)
            replayed.size += len(row[4])
            replayed.revisions += 1
        return replayed

    # -- SQLite

    def _number(self, sql: str, *args: Any) -> Any:
        row = self._db.execute(sql, args).fetchone()
        if row is None:
            raise self._damaged(f"nothing answers {sql}")
        return row[0]

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        level = "FULL" if durable else "NORMAL"
        if level != self._synchronous:
            self._db.execute(f"PRAGMA synchronous = {level}")  # has no effect inside a transaction
            self._synchronous = level
        self._db.execute("BEGIN IMMEDIATE")
        crash_point("flow.journal.begun")
        try:
            yield
            crash_point("flow.journal.written")
            self._db.execute("COMMIT")
            crash_point("flow.journal.committed")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise


def _touches(entry: _Paths, tokens: tuple[str, ...]) -> bool:
    return _related(entry.path, tokens) or (entry.source != "" and _related(entry.source, tokens))


def _related(pointer: str, tokens: tuple[str, ...]) -> bool:
    path = parse_pointer(pointer)
    shorter = min(len(path), len(tokens))
    return path[:shorter] == tokens[:shorter]


LONGEST_PATH = 504
"""Bytes: SQLite's own limit of 512, less its suffix `-journal`."""


def _text(raw: bytes) -> str:
    """A changed byte may be no text any more: the checksum tells."""
    return raw.decode(errors="replace")


_DAMAGED_HINT = "restore it from a copy, or start over with --fresh: that moves it aside"
_HINTS: Iterable[tuple[str, str, str]] = (
    ("SQLITE_FULL", "the disk is full", "free some space on that disk, then start the app again: it resumes"),
    ("SQLITE_READONLY", "it cannot be written", "check the permissions of the file and its folder, and the mount"),
    ("SQLITE_CANTOPEN", "it cannot be opened", "check that its folder exists and is yours to write"),
    ("SQLITE_IOERR", "the disk does not answer as it should", "check the disk; is the folder still there?"),
    ("SQLITE_BUSY", "another program holds it", "end the program that writes to it"),
    ("SQLITE_CONSTRAINT", "it holds this revision already", "is a second server writing to it?"),
    ("SQLITE_TOOBIG", "a value is too large for it", "put large data into the Drive"),
)
_UNREADABLE: Iterable[tuple[str, str]] = (
    ("SQLITE_NOTADB", "it is not a database"),
    ("SQLITE_CORRUPT", "it is damaged"),
    ("SQLITE_ERROR", "its tables are not as they should be"),
)


_SCARCE = 128 * 1024


def _free(path: Path) -> int:
    """Bytes that the disk has left."""
    try:
        disk = os.statvfs(path.parent)
    except OSError:
        return _SCARCE
    return disk.f_bavail * disk.f_frsize


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorname", None) or type(error).__name__
        length = len(os.fsencode(path.absolute()))
        if code == "SQLITE_CANTOPEN" and length > LONGEST_PATH:
            raise JournalError(
                f"{path} cannot be opened: its path has {length} bytes, SQLite takes at most {LONGEST_PATH}",
                hint="move the app to a folder with a shorter path",
            ) from error
        if code.startswith("SQLITE_IOERR") and _free(path) < _SCARCE:
            code = "SQLITE_FULL"  # what SQLite says when it has no room for its index of the log
        for prefix, what in _UNREADABLE:
            if code.startswith(prefix):
                raise JournalUnreadable(f"{path}: {what} ({error})", hint=_DAMAGED_HINT) from error
        for prefix, what, hint in _HINTS:
            if code.startswith(prefix):
                raise JournalError(f"{path}: {what} ({error})", hint=hint) from error
        raise JournalError(
            f"{path}: {error} ({code})", hint="is the database open and is the file in order?"
        ) from error
    except OSError as error:
        hint = "check that its folder exists, is yours to write, and that the disk is neither full nor read-only"
        raise JournalError(f"{path}: {error.strerror or error}", hint=hint) from error
    except msgspec.MsgspecError as error:
        raise JournalUnreadable(f"{path} holds a value that cannot be read: {error}", hint=_DAMAGED_HINT) from error
