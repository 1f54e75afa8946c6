"""The copy of the journal: what is restored from it, and that one server at a time goes on with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from orch.backup import PIECES, Backup
from orch.errors import JournalError
from orch.journal import Batch, Journal, Revision
from orch.state import StateTree


class Machine:
    """A disk with a journal and its copy, as a server keeps them."""

    def __init__(self, folder: Path, url: str) -> None:
        folder.mkdir(exist_ok=True)
        self.db = folder / "state.db"
        self.backup = Backup(url, self.db)
        self.said: list[str] = []
        self.journal: Journal | None = None

    def start(self, *, fresh: bool = False) -> bool:
        brought = self.backup.claim(fresh=fresh)
        self.journal = Journal.open(self.db)
        runs = self.journal.runs()
        if runs:
            loaded = self.journal.load(runs[-1].run)
            self.run, self.rev, self.tree = runs[-1].run, loaded.rev, loaded.tree
        else:
            self.run, self.rev = self.journal.begin_run({"app": "test"}), 0
            self.tree = StateTree({"vars": {"n": 0}})
            self.journal.commit(self.run, Batch(snapshot=self.tree.snapshot()))
        self.rebase()
        return brought

    def rebase(self) -> None:
        assert self.journal is not None
        self.backup.put_base(*self.backup.copy(self.journal))

    def commit(self, n: int, *, ship: bool = True) -> None:
        assert self.journal is not None
        self.rev += 1
        ops = self.tree.apply([{"op": "replace", "path": "/vars/n", "value": n}], self.rev, guard=False)
        batch = Batch(
            revisions=[Revision(rev=self.rev, at=1.0, cause="api", ops=ops)], facts=[("call", f"c{n}", {"n": n})]
        )
        self.journal.commit(self.run, batch)
        self.backup.add(self.run, batch)
        if ship:
            self.backup.ship(self.said.append)

    def stop(self) -> None:
        assert self.journal is not None
        self.journal.close()

    def n(self) -> int:
        assert self.journal is not None
        return int(self.journal.load(self.run).state["vars"]["n"])


Make = Callable[[str], Machine]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    return lambda name: Machine(tmp_path / name, f"file://{tmp_path}/copy")


def test_another_machine_goes_on_where_the_first_was(make: Make) -> None:
    first = make("a")
    assert first.start() is False
    for n in range(1, 6):
        first.commit(n)
    first.commit(6, ship=False)  # nothing was done about it yet
    first.stop()
    second = make("b")
    assert second.start() is True
    assert second.n() == 5
    assert second.journal is not None
    assert second.journal.load(second.run).facts["call"]["c5"] == {"n": 5}
    second.commit(7)
    second.stop()
    third = make("c")
    assert third.start() is True and third.n() == 7
    third.stop()


def test_a_run_that_had_ended_has_ended_elsewhere_too(make: Make) -> None:
    first = make("a")
    first.start()
    assert first.journal is not None
    first.journal.end_run(first.run, "stopped")
    first.backup.end_run(first.run, "stopped")
    first.backup.ship(first.said.append)
    first.stop()
    second = make("b")
    second.start()
    assert second.journal is not None
    assert second.journal.runs()[-1].how == "stopped"
    second.stop()


def test_of_two_servers_the_one_that_comes_second_ends(make: Make) -> None:
    first, second = make("a"), make("b")
    first.start()
    first.commit(1)
    second.start()
    with pytest.raises(JournalError, match="another server goes on"):
        first.commit(2)
    second.commit(3)
    assert second.n() == 3
    second.rebase()  # which drops the pieces before
    with pytest.raises(JournalError, match="another server goes on"):
        first.commit(4)
    second.commit(5)
    for machine in (first, second):
        machine.stop()


def test_a_disk_whose_journal_is_older_than_the_copy_is_refused(make: Make, tmp_path: Path) -> None:
    first = make("a")
    first.start()
    first.commit(1)
    first.stop()
    second = make("b")
    second.start()
    second.stop()
    again = make("a")
    with pytest.raises(JournalError, match="another machine has gone on"):
        again.start()
    assert make("a").start(fresh=True) is False


def test_the_same_disk_goes_on_with_what_was_not_shipped(make: Make) -> None:
    first = make("a")
    first.start()
    first.commit(1)
    first.commit(2, ship=False)
    first.stop()
    again = make("a")
    assert again.start() is False
    assert again.n() == 2
    again.commit(3)
    again.stop()
    second = make("b")
    second.start()
    assert second.n() == 3
    second.stop()


def test_an_answer_that_was_lost_is_not_taken_for_another_server(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = make("a")
    machine.start()
    storage = machine.backup._storage
    create = storage.create
    answers = iter([OSError("the answer is lost"), None])

    def flaky(key: str, data: bytes) -> bool:
        done = create(key, data)
        if (error := next(answers)) is not None:
            raise error
        return done

    monkeypatch.setattr(storage, "create", flaky)
    monkeypatch.setattr("orch.backup.ASK_AGAIN", 0.0)
    machine.commit(1)
    assert "nothing is started until it can" in machine.said[0] and "again" in machine.said[1]
    machine.stop()


def test_pieces_do_not_add_up_for_ever(make: Make, tmp_path: Path) -> None:
    machine = make("a")
    machine.start()
    for n in range(PIECES + 1):
        machine.commit(n)
        if machine.backup.due:
            machine.rebase()
    left = [path.name for path in (tmp_path / "copy" / "journal").iterdir()]
    assert len([name for name in left if name.startswith("base-")]) == 1
    assert len([name for name in left if name.startswith("piece-")]) < 5
    machine.stop()
    second = make("b")
    second.start()
    assert second.n() == PIECES
    second.stop()
