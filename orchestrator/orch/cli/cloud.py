"""`orch run --cloud aws`: say what it would make and cost, ask, make it, start the app there, show it here."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from orch.cli.console import Console, open_browser, wants_browser
from orch.cli.options import RunOptions
from orch.client import Client
from orch.errors import OrchError, RuntimeLost, UsageError
from orch.loader import load_app

if TYPE_CHECKING:
    from orch.cloud.up import Reached

__all__ = ["run_on_aws"]

PAUSE = 2.0
"""Seconds between attempts to get back to an app."""
ENDED = ("stopped", "failed")


def run_on_aws(options: RunOptions) -> int:
    """Blocks until the app has ended or Ctrl-C, which leaves it running (with --detach: until it serves)."""
    from orch.cloud.aws import Account, find_region
    from orch.cloud.plan import describe
    from orch.cloud.remote import needed_programs
    from orch.cloud.up import bring_up, find_app, plan_of, start_app

    region = find_region()
    app = load_app(options.app_file, list(options.argv))
    plan = plan_of(app, options.app_file, name=options.name, drive=options.drive, region=region)
    sys.stdout.write("\n".join(describe(plan)) + "\n")
    sys.stdout.flush()
    if options.dry_run:
        return 0
    needed_programs()
    if not options.yes and not _agreed():
        return 1
    console = Console(ends_by=f"`orch stop --app {plan.slug}`")
    account = Account(region)
    account.who()
    wanted: dict[str, Any] = {
        "app_file": options.app_file.name,
        "argv": list(options.argv),
        "name": plan.name,
        "host": "127.0.0.1",
        "allow_hosts": list(options.allow_hosts),
        "env": dict(options.env),
        "secrets": dict(options.secrets),
        "durable": options.durable,
        "resume": options.resume,
        "fresh": options.fresh,
    }
    try:
        cloud = bring_up(plan, options.app_file, account, console.step)
        reached = start_app(
            cloud,
            account,
            options.app_file.parent,
            wanted,
            console.step,
            port=options.port if options.port_given else 0,
        )
    except UsageError:
        raise
    except BaseException:
        if find_app(plan.name) is not None:
            sys.stderr.write(f"orch: what has been made is kept; `orch down {plan.slug}` ends its machines\n")
        raise
    url = f"{reached.url}/?token={reached.app.app_token}"
    if options.detach:
        sys.stdout.write(f"orch: {plan.name} runs on AWS; `orch ps --app {plan.slug}` shows it\n{url}\n")
        if wants_browser(options.open):
            open_browser(url)
        return 0
    console.url(url)
    if wants_browser(options.open):
        open_browser(url)
    return _follow(reached, console)


def _agreed() -> bool:
    if not (sys.stdin is not None and sys.stdin.isatty()):
        raise UsageError("run: this costs money, and there is nobody to ask", hint="-y starts it without a question")
    sys.stdout.write("\nStart it? [y/N] ")
    sys.stdout.flush()
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _follow(reached: Reached, console: Console) -> int:
    """Shows what the works do until the app has ended; gets back to it when the network or this machine was away."""
    from orch.cloud.up import reach

    name = reached.app.slug
    seen = _Seen()
    try:
        while True:
            try:
                if (code := _watch(reached, console, seen)) is not None:
                    break
            except RuntimeLost as error:
                if seen.told != error.message:
                    console.warn(f"{error.message}; it goes on without this machine")
                seen.told = error.message
            try:
                reached = reach(reached.app)
            except UsageError as error:  # it has ended, or its machines are gone: there is nothing to get back to
                console.note(error.message)
                code = 1
                break
            except OrchError:
                time.sleep(PAUSE)
    except KeyboardInterrupt:
        console.note(f"it goes on on AWS: `orch open --app {name}` shows it, `orch down {name}` ends it and its VMs")
        return 130
    console.note(f"the Flow VM is still up, and costs: `orch down {name}` removes it")
    return code


@dataclass
class _Seen:
    event: int = 0
    told: str = ""


def _watch(reached: Reached, console: Console, seen: _Seen) -> int | None:
    """The exit code of an app that has ended; None if the stream ended for another reason. Raises RuntimeLost."""
    with Client(reached.url, reached.app.app_token) as client:
        for event in client.events(seen.event, kinds=("status", "log", "app", "diff")):
            seen.event, seen.told = event.id, ""
            data = event.data
            if event.kind == "status":
                console.work(data["work"], data["stage"], data.get("detail") or "")
            elif event.kind == "log":
                for line in data["lines"]:
                    console.log(data["work"], line)
            elif event.kind == "app":
                {"error": console.error, "warning": console.warn}.get(data["level"], console.note)(data["text"])
            elif (stage := _stage(data["ops"])) in ENDED:
                console.note(f"{reached.app.name}: {stage}")
                return 0 if stage == "stopped" else 1
    return None


def _stage(ops: Sequence[Mapping[str, Any]]) -> str:
    """The app's stage, if these operations change it."""
    return next((str(op["value"]) for op in ops if op["path"] == "/app/stage"), "")
