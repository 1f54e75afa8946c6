"""`orch ps`, `status`, `logs`, `events`: what the app is doing, and what it did."""

from __future__ import annotations

import argparse
import json
import queue
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orch.cli.console import Console
from orch.cli.output import STAGE_STYLES, ago, note, print_json, print_table, rich_console, table
from orch.cli.target import Target, find_target, read_arguments
from orch.errors import RuntimeLost, UsageError

if TYPE_CHECKING:
    from orch.client import Client

__all__ = [
    "events",
    "events_arguments",
    "logs",
    "logs_arguments",
    "ps",
    "ps_arguments",
    "status",
    "status_arguments",
    "work_row",
]

LAST_WORDS = 10.0
"""Seconds between the last answer of a server that ends and its end."""
COLUMNS = ("WORK", "STAGE", "REASON", "CALL", "ATTEMPT", "SINCE", "PROGRESS", "URL")


# ---- ps ------------------------------------------------------------------------------------------------------------


def ps_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-w", "--watch", action="store_true", help="keep showing it, as it changes")
    read_arguments(parser)


def ps(args: argparse.Namespace) -> int:
    target = find_target(args.app)
    if args.watch:
        if args.json or not sys.stdout.isatty():
            raise UsageError("ps: --watch needs a terminal", hint="`orch events -f --json` is for programs")
        return _watch(target)
    app, works = _look(target)
    if args.json:
        print_json({"app": app, "works": works})
        return 0
    sys.stdout.write(_headline(app) + "\n\n")
    print_table(COLUMNS, [work_row(work) for work in works])
    return 0


def _look(target: Target) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(the app, its works) as REST tells them, or as the journal does; then `server` is False."""
    if target.url is not None:
        with target.client() as client:
            return {**client.app(), "server": True}, client.works()
    from orch.cli.offline import fate, living_scripts, read_offline, works_of

    recorded = read_offline(target)
    assert target.folder is not None
    info = target.folder.read_server()
    app = {
        **recorded.state.get("app", {}),
        "run": recorded.run.run,
        "server": False,
        "url": "",
        "file": info.app_file if info else "",
        "scripts_alive": living_scripts(target.folder),
    }
    works = []
    for name, node in works_of(recorded.state):
        status = {**node.get("status", {}), "url": "", "is_ready": False}
        work = {"name": name, "status": status, "calls": node.get("calls", {})}
        if status.get("stage") == "running" and (ended := fate(target.folder, _shown_call(work))) is not None:
            status["stage"], status["reason"] = ended
        works.append(work)
    return app, works


def _headline(app: dict[str, Any]) -> str:
    parts = [str(app.get("name") or "app"), f"run {app.get('run')}"]
    if app["server"]:
        return "  ".join([*parts, str(app.get("stage")), str(app.get("url"))])
    alive = app["scripts_alive"]
    parts.append(_offline_stage(app))
    if alive:
        parts.append(
            f"{alive} script{'s' if alive > 1 else ''} still run: `orch run` goes on with them, `orch down` ends them"
        )
    return "  ".join(parts)


def _offline_stage(app: dict[str, Any]) -> str:
    """How the run ended, if it has: a server that was killed leaves the stage that it was in."""
    ended = app.get("stage") in ("stopped", "failed")
    return f"{app['stage']}, server not running" if ended else "server not running"


def work_row(work: dict[str, Any], now: float | None = None) -> dict[str, Any]:
    """One row of the table: of a work as REST tells it, or of its node in the state tree."""
    status = work.get("status") or work
    call = _shown_call(work)
    progress = work.get("progress", status.get("progress"))
    reason = status.get("reason") or ""
    if reason == "exit_code" and call.get("exit_code") is not None:
        reason = f"exit {call['exit_code']}"
    return {
        "work": work.get("name"),
        "stage": status.get("stage"),
        "reason": reason,
        "call": call.get("id"),
        "attempt": call.get("attempt") or "",
        "since": ago(status.get("since"), now),
        "progress": f"{progress:.0%}" if isinstance(progress, int | float) else "",
        "url": work.get("url") or status.get("url"),
    }


def _shown_call(work: dict[str, Any]) -> dict[str, Any]:
    """The running call, else the latest one."""
    calls = work.get("calls") or {}
    listed = list(calls.values()) if isinstance(calls, dict) else list(calls)
    running = [call for call in listed if call.get("stage") in ("running", "unknown")]
    return dict((running or listed or [{}])[-1])


def _watch(target: Target) -> int:
    """Redraws when something has changed, at most four times a second, until Ctrl-C or the end of the app."""
    from rich.console import Group
    from rich.live import Live
    from rich.text import Text

    def show(app: dict[str, Any], works: list[dict[str, Any]]) -> None:
        live.update(Group(Text(_headline(app)), table(COLUMNS, [work_row(work) for work in works])), refresh=True)

    rev, heard = 0, time.monotonic()
    with target.client() as client, Live(console=rich_console(), auto_refresh=False, screen=False) as live:
        while True:
            try:
                show({**client.app(), "server": True}, client.works())
                rev = client.wait_change("", after=rev, wait=1.0)
                heard = time.monotonic()
            except RuntimeLost:
                if target.folder is not None and not target.folder.serving():
                    show(*_look(Target(target.folder, None, None)))
                    return 0
                if target.folder is None or time.monotonic() - heard > LAST_WORDS:
                    raise
            time.sleep(0.25)


# ---- status --------------------------------------------------------------------------------------------------------


def status_arguments(parser: argparse.ArgumentParser) -> None:
    read_arguments(parser)


def status(args: argparse.Namespace) -> int:
    target = find_target(args.app)
    app, works = _look(target)
    if target.url is not None:
        with target.client() as client:
            found = {**app, **client.status()}
    else:
        found = {**app, "works": {work["name"]: work["status"].get("stage") for work in works}}
    if args.json:
        print_json(found)
        return 0
    stages: dict[str, list[str]] = {}
    for name, stage in found.get("works", {}).items():
        stages.setdefault(str(stage), []).append(name)
    lines = {
        "app": f"{found.get('name')} (run {found.get('run')})",
        "stage": found.get("stage") if found["server"] else _offline_stage(found),
        "message": found.get("message"),
        "url": found.get("url"),
        "file": found.get("file"),
        "pid": found.get("pid"),
        "uptime": ago(time.time() - found["uptime"]) if found.get("uptime") is not None else None,
        "revision": found.get("rev"),
        "passes": found.get("passes"),
        "agents": len(found["agents"]) if found.get("agents") is not None else None,
        "scripts": f"{found['scripts_alive']} still run without the server" if found.get("scripts_alive") else None,
        "drive": found.get("drive"),
    }
    for stage in STAGE_STYLES:
        if stage in stages:
            lines[stage] = ", ".join(stages[stage])
    for name, value in lines.items():
        if value not in (None, ""):
            sys.stdout.write(f"{name:<12} {value}\n")
    return 0


# ---- logs ----------------------------------------------------------------------------------------------------------


def logs_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("works", nargs="*", metavar="WORK", help="whose (default: all)")
    parser.add_argument("-f", "--follow", action="store_true", help="go on as they grow")
    parser.add_argument("--tail", type=int, metavar="N", help="only the last N lines (of each work)")
    parser.add_argument("--since", metavar="TIME", help="only attempts that ran since: 90s, 5m, 1h30m, or an ISO time")
    parser.add_argument("--grep", metavar="RE", help="only lines that match")
    parser.add_argument("--call", metavar="ID", help="only this call (of one work)")
    read_arguments(parser)


def logs(args: argparse.Namespace) -> int:
    """Also after the app has ended. Several works: each line has its work's name in front."""
    if args.tail is not None and args.tail < 0:
        raise UsageError(f"logs: --tail {args.tail} is no number of lines", hint="0 or more")
    if args.call is not None and len(args.works) != 1:
        raise UsageError("logs: --call needs one WORK", hint="the call's id has its name: 1-trainer-3 is of trainer")
    target = find_target(args.app)
    if target.url is None and args.follow:
        note("the server is not running: nothing to follow")
    names = args.works or _names_with_logs(target)
    if args.json:
        for work, line in _lines(target, names, args):
            sys.stdout.write(json.dumps({"work": work, "line": line}, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        return 0
    prefixed = len(names) != 1
    console = Console()
    for work, line in _lines(target, names, args):
        if prefixed:
            console.log(work, line)
        else:
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


def _names_with_logs(target: Target) -> list[str]:
    if target.url is not None:
        with target.client() as client:
            return [work["name"] for work in client.works()]
    assert target.folder is not None
    if not target.folder.exists:
        raise target.not_running()
    return sorted(path.name for path in target.folder.logs.iterdir() if path.is_dir())


def _lines(target: Target, names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    if target.url is None:
        for name in names:
            for line in _split(_read_files(target, name, args)):
                yield name, line
    elif not args.follow or len(names) == 1:
        with target.client() as client:
            for name in names:
                for line in _split(_stream(client, name, args)):
                    yield name, line
    else:
        yield from _interleaved(target, names, args)


def _stream(client: Client, name: str, args: argparse.Namespace) -> Iterator[bytes]:
    return client.logs(name, call=args.call, tail=args.tail, since=args.since, grep=args.grep, follow=args.follow)


def _interleaved(target: Target, names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """Lines of several works as they come: one thread reads each, until the app ends."""
    lines: queue.Queue[tuple[str, str | Exception | None]] = queue.Queue(maxsize=1000)

    def read(name: str) -> None:
        try:
            with target.client() as client:
                for line in _split(_stream(client, name, args)):
                    lines.put((name, line))
        except Exception as error:
            lines.put((name, error))
        else:
            lines.put((name, None))

    for name in names:
        threading.Thread(target=read, args=(name,), name=f"logs-{name}", daemon=True).start()
    left = len(names)
    while left:
        name, line = lines.get()
        if isinstance(line, Exception):
            raise line
        if line is None:
            left -= 1
        else:
            yield name, line


def _read_files(target: Target, name: str, args: argparse.Namespace) -> Iterator[bytes]:
    from orch.cli.offline import log_files
    from orch.server.logs import LogReader, compile_pattern, parse_since
    from orch.server.redact import StreamRedactor

    folder = target.folder
    assert folder is not None

    def files() -> list[Path]:
        return log_files(folder, name, args.call)

    reader = LogReader(
        files,
        lambda: StreamRedactor(()),
        tail=args.tail,
        since=parse_since(args.since, time.time()) if args.since else None,
        pattern=compile_pattern(args.grep) if args.grep else None,
    )
    return reader.read()


def _split(pieces: Iterable[bytes]) -> Iterator[str]:
    """Lines without their ends; a line end that is not there yet is waited for."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


# ---- events --------------------------------------------------------------------------------------------------------


def events_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-f", "--follow", action="store_true", help="go on as they come")
    parser.add_argument("--after", type=int, default=0, metavar="ID", help="only those after this event")
    parser.add_argument("--kind", action="append", metavar="KIND", help="only diff, status, log, app or layout")
    read_arguments(parser)


def events(args: argparse.Namespace) -> int:
    """Those that are kept; with --follow those that come, too."""
    with find_target(args.app).client() as client:
        for event in client.events(args.after, kinds=args.kind or (), follow=args.follow):
            if args.json:
                line = json.dumps({"id": event.id, "kind": event.kind, "data": event.data}, ensure_ascii=False)
            else:
                line = f"{event.id} {event.kind} {_brief(event.data)}"
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
    return 0


def _brief(data: dict[str, Any]) -> str:
    text = json.dumps(data, ensure_ascii=False)
    return text if len(text) <= 400 else text[:397] + "..."
