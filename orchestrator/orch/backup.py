"""A copy of the journal on another disk, such as the Drive's bucket: from it another machine goes on with the app.

    journal/head.json          {"base": n, "by": its writer}: the base to begin with
    journal/base-<n>.db        a whole journal, with everything of the pieces up to n
    journal/piece-<n>.json     {"by": writer, "entries": [...]}: what was committed next; the numbers have no gaps

What must survive the loss of this disk before it is acted on (a launch, the end of a call) is in a piece by then; the
rest follows within `SHIP_EVERY`. A piece is created only if its number is free, which makes the pieces one log with one
writer at a time: a server that finds its next number taken has been replaced, and must end.

Source: the shared log of M. Balakrishnan et al., "CORFU: A Shared Log Design for Flash Clusters", NSDI 2012 (a position
is written once, and whoever comes second learns of it).
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from orch.errors import JournalError
from orch.journal import Batch, Journal, Revision
from orch.paths import write_atomic
from orch_drive.crash import crash_point
from orch_drive.errors import DriveError
from orch_drive.storage import Storage, open_storage

__all__ = ["SHIP_EVERY", "Backup"]

SHIP_EVERY = 5.0
"""Seconds for which a change that nothing is done about may be here alone."""
PIECES = 300
PIECES_BYTES = 8 * 1024 * 1024
"""So many pieces, or bytes of them, call for a new base."""
ASK_AGAIN = 2.0
FOLDER = "journal"
HEAD = f"{FOLDER}/head.json"


class Backup:
    """The copy of one app's journal at `url` (anything that a Drive can be at). Used from one thread at a time.

    `state_db`: the journal's path; beside it is noted how far the copy was brought from here.
    """

    def __init__(self, url: str, state_db: Path) -> None:
        self.url = url
        self.based = False
        """There is a base with everything up to what is added next."""
        self._db = state_db
        self._note = state_db.with_name("backup.json")
        self._storage: Storage = open_storage(url)
        self._by = uuid.uuid4().hex
        self._at = self._base = self._bytes = 0
        self._entries: list[list[Any]] = []

    # -- at start

    def claim(self, *, fresh: bool) -> bool:
        """Go on with the copy, from now on alone; bring it here if there is no journal, unless `fresh` wants none.
        Whether there was one to bring.

        Raises JournalError if another server has it, or has gone on with the app of which this disk has a journal.
        """
        brought = False
        try:
            head, pieces = self._head(), self._pieces()
            self._at = max([head["base"], *pieces])
            if self._db.exists():
                by = self._by_whom(self._at) if self._at in pieces else head["by"]
                if not fresh and self._at and not self._was_here(self._at, by):
                    raise JournalError(
                        f"{self._db} is older than its copy at {self.url}: another machine has gone on with the app",
                        hint=f"to go on here, stop it there and move {self._db} away; --fresh starts over",
                    )
            elif head["base"] and not fresh:
                self._restore(head["base"])
                brought = True
        except (OSError, DriveError, KeyError, ValueError, msgspec.MsgspecError) as error:
            raise JournalError(f"the copy of the journal at {self.url} cannot be read: {error}") from error
        self._put([], _raise)
        return brought

    def _restore(self, base: int) -> None:
        write_atomic(self._db, self._storage.read(f"{FOLDER}/base-{base}.db"), mode=0o600)
        journal = Journal.open(self._db)
        try:
            for number in range(base + 1, self._at + 1):
                for entry in msgspec.json.decode(self._storage.read(_piece(number)))["entries"]:
                    _replay(journal, entry)
        finally:
            journal.close()

    def _head(self) -> dict[str, Any]:
        try:
            return dict(msgspec.json.decode(self._storage.read(HEAD)))
        except FileNotFoundError:
            return {"base": 0, "by": ""}

    def _by_whom(self, number: int) -> str:
        return str(msgspec.json.decode(self._storage.read(_piece(number)))["by"])

    def _was_here(self, number: int, by: str) -> bool:
        """Whether this disk's journal holds that piece: the server that wrote it ran here."""
        try:
            note = msgspec.json.decode(self._note.read_bytes())
        except FileNotFoundError:
            return False
        return bool(number < note["at"] or (number == note["at"] and by == note["by"]))

    def _names(self) -> list[str]:
        return [key.rpartition("/")[2] for key in self._storage.listing(f"{FOLDER}/")]

    def _pieces(self) -> list[int]:
        return [int(name[6:-5]) for name in self._names() if name.startswith("piece-") and name.endswith(".json")]

    # -- from then on

    def add(self, run: int, batch: Batch) -> None:
        """It was committed."""
        revisions = [[entry.rev, entry.at, entry.cause, entry.ops] for entry in batch.revisions]
        # Encoded now: what it refers to may change before it is shipped.
        self._entries.append(["commit", run, msgspec.Raw(msgspec.json.encode([revisions, batch.facts]))])

    def end_run(self, run: int, how: str) -> None:
        self._entries.append(["end", run, how])

    def ship(self, warn: Callable[[str], None]) -> None:
        """Returns when everything that was added is there, however long that takes. Raises JournalError if another
        server has taken over."""
        if self._entries:
            entries, self._entries = self._entries, []
            self._put(entries, warn)

    def _put(self, entries: list[list[Any]], warn: Callable[[str], None]) -> None:
        number = self._at + 1
        data = msgspec.json.encode({"by": self._by, "entries": entries})
        # Before the piece: a note that is behind would lock this disk out.
        write_atomic(self._note, msgspec.json.encode({"at": number, "by": self._by}), mode=0o600, point="flow.backup")
        said = False
        while not self._created(number, data, warn if not said else _silent):
            said = True
            time.sleep(ASK_AGAIN)  # nothing tells that a storage answers again
        if said:
            warn(f"the copy of the journal at {self.url} is written again")
        crash_point("flow.backup.sent")
        self._at = number
        self._bytes += len(data)

    def _created(self, number: int, data: bytes, warn: Callable[[str], None]) -> bool:
        try:
            with self._storage.commit_lock():
                self._storage.create(_piece(number), data)
            # An answer that was lost, and the request sent again, looks like another writer. And a number that was
            # taken is free again once a later base has it.
            by, head = self._by_whom(number), self._head()
            if head["base"] >= number:
                by = head["by"]
        except (OSError, DriveError) as error:
            warn(f"the copy of the journal at {self.url} cannot be written ({error}): nothing is started until it can")
            return False
        if by != self._by:
            raise JournalError(
                f"another server goes on with this app: it has written to {self.url}",
                hint="an app has one flow server; the scripts are that one's now",
            )
        return True

    @property
    def due(self) -> bool:
        """Whether a new base is wanted, and can be made: nothing waits to be shipped."""
        grown = self._at - self._base >= PIECES or self._bytes >= PIECES_BYTES
        return not self._entries and (grown or not self.based)

    def copy(self, journal: Journal) -> tuple[int, Path]:
        """The journal as it is, for `put_base`. In the thread of the journal."""
        path = self._db.with_name("backup.db")
        journal.copy(path)
        crash_point("flow.backup.copied")
        self._base, self._bytes, self.based = self._at, 0, True
        return self._at, path

    def put_base(self, number: int, path: Path) -> None:
        """Begin with this from now on, and drop what was before. Raises JournalError; then the former base is left."""
        name = f"base-{number}.db"
        try:
            self._replace(f"{FOLDER}/{name}", path.read_bytes())
            crash_point("flow.backup.based")
            self._replace(HEAD, msgspec.json.encode({"base": number, "by": self._by}))
            old = [_piece(n) for n in self._pieces() if n <= number]
            old += [f"{FOLDER}/{key}" for key in self._names() if key.startswith("base-") and key != name]
            self._storage.remove_many(old)
        except (OSError, DriveError) as error:
            raise JournalError(f"the copy of the journal at {self.url} cannot be written: {error}") from error
        finally:
            path.unlink(missing_ok=True)

    def _replace(self, key: str, data: bytes) -> None:
        try:
            seen = self._storage.signature(key)
        except FileNotFoundError:
            seen = None
        with self._storage.commit_lock():
            if not self._storage.replace(key, data, seen):
                raise OSError(f"{key} is written by somebody else")


def _piece(number: int) -> str:
    return f"{FOLDER}/piece-{number}.json"


def _raise(message: str) -> None:
    raise JournalError(message)


def _silent(message: str) -> None: ...


def _replay(journal: Journal, entry: list[Any]) -> None:
    kind, run, what = entry
    if kind == "end":
        journal.end_run(run, what)
        return
    revisions, facts = what
    kept = [Revision(rev=rev, at=at, cause=cause, ops=ops) for rev, at, cause, ops in revisions]
    journal.commit(run, Batch(revisions=kept, facts=[(kind, key, value) for kind, key, value in facts]))
