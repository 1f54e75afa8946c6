"""Earlier revisions of a long run, at the exact edges of what is kept: REST and command line, server or none."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from testkit import RunningApp, orch_command

from orch.journal import Batch, Journal, Revision
from orch.state import StateTree

Apps = Callable[..., RunningApp]

APP = """
from orch import App, Flow

class Root(Flow):
    def __init__(self):
        super().__init__()
        self.x = 0
        self.rare = 0

app = App(Root())
"""
LONG = 25_000
KEPT = 10_000


def write_a_long_run(folder: Path) -> None:
    """x is the revision, except every 5,000th, where rare is."""
    (folder / ".orch").mkdir()
    journal = Journal.open(folder / ".orch" / "state.db")
    run = journal.begin_run({"app": "long"})
    node: dict[str, Any] = {"vars": {"x": 0, "rare": 0}, "flows": {}, "works": {}, "structures": {}}
    tree = StateTree({**node, "app": {"name": "long", "run": run, "stage": "running", "message": ""}}, 0)
    journal.commit(run, Batch(snapshot=tree.snapshot()))
    for start in range(1, LONG + 1, 50):
        batch = Batch()
        for rev in range(start, start + 50):
            name = "x" if rev % 5_000 else "rare"
            ops = tree.apply([{"op": "replace", "path": f"/vars/{name}", "value": rev}], rev, guard=True)
            batch.revisions.append(Revision(rev, 1000.0 + rev, "ui", ops))
        if journal.due_snapshot():
            batch.snapshot = tree.snapshot()
        journal.commit(run, batch)
    journal.close()


def test_the_edges_of_what_is_kept(orch_app: Apps, app_folder: Callable[..., Path]) -> None:
    folder = app_folder(APP)
    write_a_long_run(folder)
    app = orch_app(folder, start=False)

    def orch(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*orch_command(), *words], cwd=folder, env=app.env, capture_output=True, text=True)

    def at(rev: int) -> Any:
        return json.loads(orch("state", "get", "x", "--rev", str(rev), "--json").stdout)

    # Without a server.
    refused = orch("state", "get", "x", "--rev", "1")
    assert refused.returncode != 0
    words = refused.stderr.split("kept are ")[1].split()
    oldest, newest = int(words[0]), int(words[2].rstrip(".;"))
    assert newest == LONG
    assert KEPT <= newest - oldest <= KEPT * 1.35
    assert at(newest) == LONG - 1
    assert at(newest - KEPT) == newest - KEPT - 1
    assert at(oldest) == (oldest if oldest % 5_000 else oldest - 1)
    for rev in (oldest - 1, newest + 1):
        refused = orch("state", "get", "x", "--rev", str(rev))
        assert refused.returncode != 0
        assert f"revision {rev} of run 1 is not kept: kept are {oldest} to {newest}" in refused.stderr
    rare = [row["rev"] for row in json.loads(orch("state", "history", "rare", "--json").stdout)]
    assert rare == [rev for rev in (5_000, 10_000, 15_000, 20_000, 25_000) if rev > oldest]
    everything = json.loads(orch("state", "history", "--json", "-n", "99999").stdout)
    assert [row["rev"] for row in everything] == list(range(oldest + 1, newest + 1))

    # With one: the run goes on, and nothing of it is forgotten by that.
    app.start("--resume")
    head = app.get("/status")["rev"]
    assert head >= newest
    for rev in (oldest, newest - KEPT, newest - 1, newest):
        x = rev if rev % 5_000 else rev - 1
        assert app.get(f"/state/vars/x?rev={rev}") == x
        answer = app.request("GET", f"/api/v1/state?rev={rev}")
        assert answer.json()["vars"]["x"] == x
        assert answer.headers["etag"] == f'"{rev}"'
    for rev in (0, oldest - 1, head + 1):
        answer = app.request("GET", f"/api/v1/state/vars/x?rev={rev}")
        assert answer.status_code == 404, answer.text
        assert f"kept are {oldest} to {head}" in answer.json()["detail"]
    assert [row["rev"] for row in app.get("/history/vars/rare")] == rare
    rev = app.set("/vars/rare", -1)
    assert app.get(f"/state/vars/rare?rev={rev - 1}") == LONG
    assert app.get(f"/state/vars/rare?rev={rev}") == -1
    shown = orch("state", "history", "rare", "-n", "1")
    assert shown.stdout.split()[0] == str(rev)
    assert "replace /vars/rare -1" in shown.stdout
    assert app.interrupt() == 130
