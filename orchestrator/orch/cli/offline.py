"""What is known of an app whose server is not running: its journal, its logs, and the scripts that outlived it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orch.cli.target import Target
from orch.errors import NotFound
from orch.journal import Journal, RunInfo
from orch.logtail import showable
from orch.paths import AppFolder
from orch.processes import find

__all__ = ["Recorded", "fate", "history_offline", "living_scripts", "log_files", "read_offline", "works_of"]


class Recorded:
    """The last run as the journal has it."""

    def __init__(self, run: RunInfo, state: Any, rev: int) -> None:
        self.run = run
        self.state = state
        self.rev = rev


def _open(target: Target) -> tuple[Journal, RunInfo]:
    folder = target.folder
    if folder is None or not folder.state_db.exists():
        raise target.not_running()
    journal = Journal.open(folder.state_db, readonly=True)
    runs = journal.runs()
    if not runs:
        journal.close()
        raise NotFound(f"{folder.state_db} holds no run", hint="`orch run` starts one")
    return journal, runs[-1]


def read_offline(target: Target, *, rev: int | None = None) -> Recorded:
    """Raises UsageError if no app has been run there, JournalError if the file cannot be read."""
    journal, run = _open(target)
    try:
        if rev is not None:
            return Recorded(run, journal.at(run.run, rev).root, rev)
        loaded = journal.load(run.run)
        return Recorded(run, loaded.state, loaded.rev)
    finally:
        journal.close()


def history_offline(target: Target, pointer: str, limit: int) -> list[dict[str, Any]]:
    journal, run = _open(target)
    try:
        return [
            {"rev": revision.rev, "at": revision.at, "cause": revision.cause, "ops": revision.ops}
            for revision in journal.history(run.run, pointer, limit)
        ]
    finally:
        journal.close()


def works_of(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(short name, node) of all works in a state tree, depth first."""
    for name, node in (tree.get("works") or {}).items():
        yield prefix + name, node
    for name, node in (tree.get("flows") or {}).items():
        yield from works_of(node, f"{prefix}{name}.")
    for name, node in (tree.get("structures") or {}).items():
        yield from works_of(node, f"{prefix}{name}.")


def living_scripts(folder: AppFolder) -> int:
    """How many scripts have outlived the server."""
    return sum(
        find(record.get("pid"), record.get("pid_start"), record.get("boot_id")) is not None
        for _, record in folder.run_records()
    )


def fate(folder: AppFolder, call: dict[str, Any]) -> tuple[str, str] | None:
    """(stage, reason) of a call that was running when its server died; None if it runs on. A script that has ended has
    left its exit record; what that means (its outputs, its retries) the next server decides."""
    place = folder.run / "processes"
    key = f"{call.get('id')}.{call.get('attempt')}"
    for _, record in folder.run_records():
        if record.get("key") == key and find(record.get("pid"), record.get("pid_start"), record.get("boot_id")):
            return None
    try:
        exit_record = json.loads((place / f"{key}.exit.json").read_bytes())
    except (FileNotFoundError, ValueError):
        return "unknown", ""
    if exit_record.get("signal"):
        return "ended", f"signal {exit_record['signal']}"
    return "ended", f"exit {exit_record.get('exit_code')}"


def log_files(folder: AppFolder, work: str, call: str | None = None) -> list[Path]:
    """A work's log files, oldest first. Raises NotFound naming what there is, or why it may not be shown."""
    place = folder.logs / work
    if not place.is_dir() or place.parent != folder.logs:
        there = sorted(path.name for path in folder.logs.iterdir() if path.is_dir()) if folder.logs.is_dir() else []
        raise NotFound(f"no logs of a work {work!r} in {folder.logs}", hint=f"there are: {', '.join(there) or 'none'}")
    files = sorted(place.glob("*.log"), key=lambda path: path.stat().st_mtime)
    if call is not None:
        files = [path for path in files if path.stem == call]
        if not files:
            raise NotFound(f"no log of call {call!r} in {place}", hint="`orch logs WORK` shows all calls")
    return showable(files, _secrets(folder))


def _secrets(folder: AppFolder) -> dict[int, list[str]]:
    if not folder.state_db.exists():
        return {}
    journal = Journal.open(folder.state_db, readonly=True)
    try:
        return {run.run: run.secrets for run in journal.runs()}
    finally:
        journal.close()
