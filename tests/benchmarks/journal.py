"""What a resume costs after a long life, and what that life takes on disk; run by hand, prints JSON.

A resume is all that the server does with the journal before its first pass: open, load, rebuild program and engine.
Times are medians in seconds, beside the floor of reading the same rows with sqlite3 and json, measured in the same run.
"""

from __future__ import annotations

import json
import sqlite3
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from orch import Flow, ScriptWork
from orch.calls import Call, Stage, call_id, call_key
from orch.engine import Config, Engine
from orch.journal import Batch, Journal, Revision
from orch.program import Program, with_calls
from orch.state import StateTree

ROUNDS = 5
CALLS = 20_000


class Root(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.table = {f"k{n}": n for n in range(1000)}
        self.large = ""
        self.work = ScriptWork("true", parallel=True)


def write(path: Path, revisions: int, *, large: int = 0, calls: int = 0) -> None:
    """The life of a run: `revisions` small changes in commits of 10, then finished calls of one Work."""
    journal = Journal.open(path)
    run = journal.begin_run({"app": "bench"})
    tree = StateTree(Program(Root()).node(), 0)
    tree.apply([{"op": "replace", "path": "/vars/large", "value": "x" * large}], 0, guard=True)
    journal.commit(run, Batch(snapshot=tree.snapshot()))
    for start in range(1, revisions + 1, 10):
        batch = Batch()
        for rev in range(start, start + 10):
            op = {"op": "replace", "path": f"/vars/table/k{rev % 1000}", "value": -rev}
            batch.revisions.append(Revision(rev, float(rev), "ui", tree.apply([op], rev, guard=True)))
        if journal.due_snapshot():
            batch.snapshot = tree.snapshot()
        journal.commit(run, batch)
    for number in range(1, calls + 1):
        args = (f"--seed {number} --lr 0.1 --epochs 3",)
        call = Call(
            id=call_id(run, "work", number), work="work", key=call_key(args, {}), args=args, kwargs={}, asked_at=1.0,
            stage=Stage.SUCCEEDED, attempt=1, exit_code=0, started_at=1.0, finished_at=2.0, result=["model.pt2"],
        )  # fmt: skip
        journal.commit(run, Batch(facts=[("call", call.id, msgspec.to_builtins(call))]))
    journal.close()


def resume(path: Path) -> Engine:
    """As `Service._begin` goes on with a run that was cut off."""
    journal = Journal.open(path)
    run = journal.runs()[-1].run
    loaded = journal.load(run)
    program = Program(Root())
    program.restore(loaded.state, loaded.facts.get("component", {}), loaded.facts["call"])
    tree = with_calls(program.node(), loaded.state)
    revs = msgspec.json.decode(loaded.tree.snapshot().revs)
    config = Config(app="bench", run=run, base_url="http://127.0.0.1:1")
    engine = Engine(config, tree, program.specs(), rev=loaded.rev, revs=revs)
    engine.restore(loaded.facts, clean=False)
    engine.start(2.0)
    engine.settle(2.0)
    journal.close()
    return engine


def floor(path: Path) -> int:
    """The rows that a resume needs, read and decoded by nothing but the standard library."""
    db = sqlite3.connect(path)
    base, state, revs = db.execute("SELECT rev, state, revs FROM snapshots ORDER BY rev DESC LIMIT 1").fetchone()
    rows = [state, revs or "null"]
    rows += [ops for (ops,) in db.execute("SELECT ops FROM revisions WHERE rev > ? ORDER BY rev", (base,))]
    rows += [value for (value,) in db.execute("SELECT value FROM calls")]
    values = [json.loads(row) for row in rows]
    db.close()
    return len(values)


def seconds(body: Callable[[Path], Any], path: Path) -> float:
    times = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        body(path)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def main() -> None:
    lives: dict[str, dict[str, int]] = {
        "1,000 revisions": {"revisions": 1_000},
        "100,000 revisions": {"revisions": 100_000},
        "100,000 revisions, 2 MB of state": {"revisions": 100_000, "large": 2_000_000},
        "20,000 cached calls": {"revisions": 1_000, "calls": CALLS},
    }
    figures = {}
    for name, life in lives.items():
        with tempfile.TemporaryDirectory(prefix="orch-bench-") as folder:
            path = Path(folder, "state.db")
            began = time.perf_counter()
            write(path, **life)
            wrote = time.perf_counter() - began
            engine = resume(path)
            assert engine.tree.rev >= life["revisions"]
            assert len(engine.works["work"].book.calls) == life.get("calls", 0)
            took, least = seconds(resume, path), seconds(floor, path)
            figures[name] = {
                "resume_seconds": round(took, 4),
                "target": 1.0,
                "met": took <= 1.0,
                "floor_seconds": round(least, 4),
                "floor_ratio": round(took / least, 1),
                "disk_mib": round(sum(file.stat().st_size for file in Path(folder).iterdir()) / 2**20, 2),
                "written_in_seconds": round(wrote, 1),
            }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
