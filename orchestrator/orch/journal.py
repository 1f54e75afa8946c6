"""The journal: one SQLite file (`.orch/state.db`, WAL) that holds everything a resume needs. Not PURE.

It can be read without the server, e.g. `sqlite3 .orch/state.db "select rev, cause, ops from revisions"`:

    runs       run, started, ended, how, meta        one life of the app; ended and how are NULL if its server died
    revisions  run, rev, at, cause, ops              ops is an RFC 6902 patch; applied in order they give the state
    snapshots  run, rev, state, revs                 the whole tree at rev; revs says when each part last changed
    calls      run, key, value                       one row a call
    agents     run, key, value                       one row an agent
    facts      run, kind, key, value                 everything else

Times are seconds since the epoch, values are JSON. At least the last 10,000 revisions of each of the last 5 runs are
kept. A commit is one transaction. It survives the death of the process at once, and a power cut once the WAL is synced:
at the next checkpoint, or with the commit itself if that is durable. Use a Journal from one thread at a time.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import JournalError, NotFound
from orch.state import StateTree, parse_pointer
from orch.wire import Op

__all__ = ["Batch", "Journal", "Loaded", "Revision", "RunInfo"]

KEPT_REVISIONS = 10_000
KEPT_RUNS = 5
SNAPSHOT_REVISIONS = 1_000
SNAPSHOT_BYTES = 2 * 1024 * 1024

_APPLICATION_ID = 0x6F726368  # "orch"
_SCHEMA_VERSION = 1
_SCHEMA = """
CREATE TABLE runs (run INTEGER PRIMARY KEY, started REAL NOT NULL, ended REAL, how TEXT, meta TEXT NOT NULL);
CREATE TABLE revisions (run INTEGER NOT NULL, rev INTEGER NOT NULL, at REAL NOT NULL, cause TEXT NOT NULL,
    ops TEXT NOT NULL, PRIMARY KEY (run, rev)) WITHOUT ROWID;
CREATE TABLE snapshots (run INTEGER NOT NULL, rev INTEGER NOT NULL, state TEXT NOT NULL, revs TEXT,
    PRIMARY KEY (run, rev));
CREATE TABLE calls (run INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (run, key)) WITHOUT ROWID;
CREATE TABLE agents (run INTEGER NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (run, key)) WITHOUT ROWID;
CREATE TABLE facts (run INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL, value TEXT NOT NULL,
    PRIMARY KEY (run, kind, key)) WITHOUT ROWID;
"""
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

    @property
    def state(self) -> dict[str, Any]:
        return self.tree.root

    @property
    def rev(self) -> int:
        return self.tree.rev


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
        self._snapshot_bytes: int | None = None
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
            db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False, timeout=10.0)
            journal = cls(path, db, durable=durable)
            try:
                journal._prepare(readonly)
            except BaseException:
                db.close()
                raise
        return journal

    def _prepare(self, readonly: bool) -> None:
        db = self._db
        version = self._number("PRAGMA user_version")
        owner = self._number("PRAGMA application_id")
        tables = self._number("SELECT count(*) FROM sqlite_master")
        if owner != _APPLICATION_ID and (owner or version or tables):
            raise JournalError(
                f"{self.path} is a database of another program", hint="move it away, or run the app in another folder"
            )
        if version > _SCHEMA_VERSION:
            raise JournalError(
                f"{self.path} was written by a newer orch (schema {version}, this one knows {_SCHEMA_VERSION})",
                hint="update orch, or start over with --fresh",
            )
        if readonly:
            return
        db.execute("PRAGMA journal_mode = WAL")
        db.execute("PRAGMA journal_size_limit = 16777216")
        db.execute("PRAGMA fullfsync = 1")  # macOS: fsync alone does not reach the disk
        if version < _SCHEMA_VERSION:
            with self._transaction(durable=True):
                for statement in _SCHEMA.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
                db.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")

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
            self._db.execute("INSERT INTO runs VALUES (?, ?, NULL, NULL, ?)", (run, time.time(), _json(meta)))
            for table in _RUN_TABLES:
                self._db.execute(f"DELETE FROM {table} WHERE run <= ?", (run - KEPT_RUNS,))
        self._since_revisions = self._since_bytes = 0
        self._snapshot_bytes = None
        return run

    def resume_run(self, run: int) -> None:
        """Go on with a run, also with one that had ended. Raises NotFound."""
        with _explained(self.path), self._transaction(durable=True):
            if not self._db.execute("UPDATE runs SET ended = NULL, how = NULL WHERE run = ?", (run,)).rowcount:
                raise NotFound(f"{self.path} has no run {run}")

    def end_run(self, run: int, how: str) -> None:
        """The run ended cleanly: `how` is e.g. "stopped" or "failed"."""
        with _explained(self.path), self._transaction(durable=True):
            self._db.execute("UPDATE runs SET ended = ?, how = ? WHERE run = ?", (time.time(), how, run))

    def runs(self) -> list[RunInfo]:
        """The runs that are kept, oldest first."""
        with _explained(self.path):
            rows = self._db.execute("SELECT run, started, ended, how, meta FROM runs ORDER BY run").fetchall()
            return [RunInfo(row[0], row[1], row[2], row[3], msgspec.json.decode(row[4])) for row in rows]

    # -- writing

    def commit(self, run: int, batch: Batch) -> None:
        """Write the batch in one transaction: all of it or nothing."""
        revisions = [(run, entry.rev, entry.at, entry.cause, _json(entry.ops)) for entry in batch.revisions]
        snapshot: tuple[int, str, str | None] | None = None
        if batch.snapshot is not None:
            rev, state, *rest = batch.snapshot
            revs = rest[0] if rest else None
            snapshot = (rev, _json(state), None if revs is None else _json(revs))
        with _explained(self.path), self._transaction(durable=batch.durable or self._durable):
            self._db.executemany("INSERT INTO revisions VALUES (?, ?, ?, ?, ?)", revisions)
            for kind, key, value in batch.facts:
                self._set_fact(run, kind, key, value)
            if snapshot is not None:
                self._db.execute("INSERT OR REPLACE INTO snapshots VALUES (?, ?, ?, ?)", (run, *snapshot))
                self._prune(run, snapshot[0])
        self._since_revisions += len(revisions)
        self._since_bytes += sum(len(row[4]) for row in revisions)
        if snapshot is not None:
            after = [row for row in revisions if row[1] > snapshot[0]]
            self._since_revisions = len(after)
            self._since_bytes = sum(len(row[4]) for row in after)
            self._snapshot_bytes = len(snapshot[1])

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
            marks = ", ".join("?" * (len(where) + 1))
            self._db.execute(f"INSERT OR REPLACE INTO {table} VALUES ({marks})", (*where, _json(value)))

    def _prune(self, run: int, head: int) -> None:
        """Forget what is older than the ring, and snapshots that stand close together.

        The oldest snapshot is what the kept revisions rest on; those between it and the newest are there to become it.
        """
        revs = [row[0] for row in self._db.execute("SELECT rev FROM snapshots WHERE run = ? ORDER BY rev", (run,))]
        base = max((rev for rev in revs if rev <= head - KEPT_REVISIONS), default=revs[0])
        keep = [base]
        for rev in revs:
            if rev >= keep[-1] + KEPT_REVISIONS // 4:
                keep.append(rev)
        doomed = [(run, rev) for rev in revs if rev not in keep and rev != revs[-1]]
        self._db.executemany("DELETE FROM snapshots WHERE run = ? AND rev = ?", doomed)
        self._db.execute("DELETE FROM revisions WHERE run = ? AND rev <= ?", (run, base))

    # -- reading

    def load(self, run: int) -> Loaded:
        """The newest state of a run and its facts. Raises NotFound for an unknown run."""
        with _explained(self.path):
            if not self._number("SELECT count(*) FROM runs WHERE run = ?", run):
                raise NotFound(f"{self.path} has no run {run}")
            tree, revisions, size, snapshot = self._replay(run, None)
            facts: dict[str, dict[str, Any]] = {}
            for kind, table in _OWN_TABLES.items():
                rows = self._db.execute(f"SELECT key, value FROM {table} WHERE run = ?", (run,))
                facts[kind] = {key: msgspec.json.decode(value) for key, value in rows}
            for kind, key, value in self._db.execute("SELECT kind, key, value FROM facts WHERE run = ?", (run,)):
                facts.setdefault(kind, {})[key] = msgspec.json.decode(value)
        self._since_revisions, self._since_bytes, self._snapshot_bytes = revisions, size, snapshot
        return Loaded(tree, facts)

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
            return self._replay(run, rev)[0]

    def revisions(self, run: int, after: int, limit: int) -> list[Revision]:
        """Up to `limit` kept revisions after a revision, oldest first."""
        with _explained(self.path):
            rows = self._db.execute(
                "SELECT rev, at, cause, ops FROM revisions WHERE run = ? AND rev > ? ORDER BY rev LIMIT ?",
                (run, after, limit),
            ).fetchall()
            return [self._revision(row) for row in rows]

    def history(self, run: int, pointer: str, limit: int) -> list[Revision]:
        """The last `limit` kept revisions that changed the value at the pointer, anything in it, or what it lies in;
        newest last. Raises StatePathError for a malformed pointer."""
        tokens = parse_pointer(pointer)
        found: list[Revision] = []
        with _explained(self.path):
            rows = self._db.execute("SELECT rev, at, cause, ops FROM revisions WHERE run = ? ORDER BY rev DESC", (run,))
            for row in rows:
                if len(found) >= limit:
                    break
                if any(_touches(entry, tokens) for entry in self._paths.decode(row[3])):
                    found.append(self._revision(row))
        return found[::-1]

    def _revision(self, row: tuple[int, float, str, str]) -> Revision:
        return Revision(row[0], row[1], row[2], self._ops.decode(row[3]))

    def _replay(self, run: int, rev: int | None) -> tuple[StateTree, int, int, int | None]:
        """(the tree at `rev` or at the newest revision, revisions replayed, their bytes, bytes of the snapshot used)"""
        upto = 2**62 if rev is None else rev
        row = self._db.execute(
            "SELECT rev, state, revs FROM snapshots WHERE run = ? AND rev <= ? ORDER BY rev DESC LIMIT 1", (run, upto)
        ).fetchone()
        base, state, revs = row if row is not None else (0, "{}", None)
        tree = StateTree(msgspec.json.decode(state), base, revs=msgspec.json.decode(revs) if revs is not None else None)
        size = count = 0
        for at, text in self._db.execute(
            "SELECT rev, ops FROM revisions WHERE run = ? AND rev > ? AND rev <= ? ORDER BY rev", (run, base, upto)
        ):
            tree.replay(self._ops.decode(text), at)
            size += len(text)
            count += 1
        return tree, count, size, len(state) if row is not None else None

    # -- SQLite

    def _number(self, sql: str, *args: Any) -> Any:
        return self._db.execute(sql, args).fetchone()[0]

    @contextmanager
    def _transaction(self, *, durable: bool) -> Iterator[None]:
        level = "FULL" if durable else "NORMAL"
        if level != self._synchronous:
            self._db.execute(f"PRAGMA synchronous = {level}")  # has no effect inside a transaction
            self._synchronous = level
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
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

_HINTS: Iterable[tuple[str, str, str]] = (
    ("SQLITE_FULL", "the disk is full", "free some space on that disk, then start the app again: it resumes"),
    ("SQLITE_READONLY", "it cannot be written", "check the permissions of the file and its folder, and the mount"),
    ("SQLITE_CANTOPEN", "it cannot be opened", "check that its folder exists and is yours to write"),
    ("SQLITE_NOTADB", "it is not a database", "move it away; the app then starts over"),
    ("SQLITE_CORRUPT", "it is damaged", "restore it from a copy, or start over with --fresh"),
    ("SQLITE_IOERR", "the disk does not answer as it should", "check the disk; is the folder still there?"),
    ("SQLITE_BUSY", "another program holds it", "end the program that writes to it"),
    ("SQLITE_CONSTRAINT", "it holds this revision already", "is a second server writing to it?"),
    ("SQLITE_TOOBIG", "a value is too large for it", "put large data into the Drive"),
)


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
        raise JournalError(
            f"{path} holds a value that cannot be read: {error}", hint="restore it from a copy, or use --fresh"
        ) from error
