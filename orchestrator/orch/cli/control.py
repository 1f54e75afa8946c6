"""`orch stop`, `restart`, `open`, `dashboard`, `down`."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from typing import TYPE_CHECKING

from orch.cli.console import wants_browser
from orch.cli.output import note
from orch.cli.state import pointer_of
from orch.cli.target import Target, app_argument, at_cloud, find_cloud, find_folder, find_target
from orch.errors import OrchError, UsageError
from orch.processes import find, wait_gone

if TYPE_CHECKING:
    from orch.client import Client
    from orch.cloud.apps import CloudApp

__all__ = [
    "dashboard",
    "dashboard_arguments",
    "down",
    "down_arguments",
    "open",
    "open_arguments",
    "restart",
    "restart_arguments",
    "stop",
    "stop_arguments",
]


def stop_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work", nargs="?", metavar="WORK", help="one work (default: the app)")
    parser.add_argument("--timeout", type=float, default=120.0, metavar="S", help="seconds to wait (default: 120)")
    app_argument(parser)


def stop(args: argparse.Namespace) -> int:
    """Waits until the app has ended, or until the work has stopped."""
    target = find_target(args.app)
    if args.work is not None:
        with target.client() as client:
            client.stop_work(args.work)
            stage = _wait_ended(client, args.work, args.timeout)
        sys.stdout.write(f"{args.work}: {stage}\n")
        return 0
    pid = target.folder.server_pid() if target.folder is not None else None
    server = find(pid)
    with target.client() as client:
        name = client.app()["name"]
        client.stop_app("orch stop")
    if server is not None:
        gone = not wait_gone([server], args.timeout)
    else:
        gone = _wait_unreachable(target, args.timeout)
    if not gone:
        raise OrchError(f"{name} is still stopping after {args.timeout:.0f} s", hint="`orch down` ends it by force")
    sys.stdout.write(f"{name}: stopped\n")
    return 0


def _wait_unreachable(target: Target, timeout: float) -> bool:
    """For a server on another machine, whose process cannot be looked at."""
    deadline = time.monotonic() + timeout
    with target.client() as client:
        while client.alive():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
    return True


def _wait_ended(client: Client, work: str, timeout: float) -> str:
    """The stage in which the work ended. Raises OrchError if it has not by then."""
    deadline = time.monotonic() + timeout
    pointer = pointer_of(work, client.state()) + "/status"
    while True:
        status, rev = client.read(pointer)
        if status["stage"] not in ("pending", "running", "unknown"):
            return str(status["stage"])
        left = deadline - time.monotonic()
        if left <= 0:
            raise OrchError(
                f"{work} is still {status['stage']} after {timeout:g} s", hint=f"`orch logs {work}` may tell why"
            )
        client.wait_change(pointer, after=rev, wait=min(left, 10.0))


def restart_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("work", metavar="WORK")
    app_argument(parser)


def restart(args: argparse.Namespace) -> int:
    """Stop, then the latest call again."""
    with find_target(args.app).client() as client:
        client.restart_work(args.work)
    sys.stdout.write(f"{args.work}: restarting\n")
    return 0


def open_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--print", action="store_true", dest="only_print", help="print the address, open nothing")
    app_argument(parser)


def open(args: argparse.Namespace) -> int:
    """Prints the address with its token (on stdout, for pipes), and opens it where there is a screen."""
    target = find_target(args.app)
    if target.url is None:
        raise target.not_running()
    url = f"{target.url}/?token={target.token}"
    sys.stdout.write(url + "\n")
    if wants_browser(False if args.only_print else None):
        import webbrowser

        webbrowser.open(url)
    return 0


def dashboard_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, metavar="PORT", help="port of the dashboard (default: Streamlit's choice)")
    parser.add_argument("--no-open", action="store_true", help="do not open a browser")
    app_argument(parser)


def dashboard(args: argparse.Namespace) -> int:
    """Becomes the dashboard's server: whatever ends this process ends that."""
    if importlib.util.find_spec("streamlit") is None:
        raise UsageError(
            "dashboard: streamlit is not installed", hint="it comes with the extra [ui]: pip install 'orch[ui]'"
        )
    target = find_target(args.app)
    if target.url is None or target.token is None:
        raise target.not_running()
    spec = importlib.util.find_spec("orch_ui.dashboard.main")
    if spec is None or spec.origin is None:
        raise UsageError(
            "dashboard: this version has none yet", hint="`orch status` and `orch ps --watch` show the same"
        )
    command = [sys.executable, "-P", "-m", "streamlit", "run", spec.origin, "--server.address=127.0.0.1"]
    command += ["--browser.gatherUsageStats=false", f"--server.headless={str(not _opens(args)).lower()}"]
    command += ["--client.toolbarMode=viewer", "--server.fileWatcherType=none", "--theme.primaryColor=#6d3fd1"]
    if args.port is not None:
        command.append(f"--server.port={args.port}")
    env = {**os.environ, "ORCH_FLOW_URL": target.url, "ORCH_FLOW_TOKEN": target.token}
    note("dashboard; Ctrl-C ends it")
    sys.stdout.flush()
    sys.stderr.flush()
    os.execve(command[0], command, env)


def _opens(args: argparse.Namespace) -> bool:
    return wants_browser(False if args.no_open else None)


def down_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", metavar="NAME", help="an app on AWS: end its machines (same as --app NAME)")
    parser.add_argument("--purge", action="store_true", help="on AWS: its roles, key pair and security group too")
    parser.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds to end in peace (default: 60)"
    )
    app_argument(parser)


def down(args: argparse.Namespace) -> int:
    """One line for each thing that was ended; at the end nothing of the app is left on this machine, or of its machines
    on AWS."""
    if args.name is not None:
        if args.app is not None and args.app != args.name:
            raise UsageError(f"down: {args.name!r} and --app {args.app!r} are two apps", hint="name one of them")
        args.app = args.name
    cloud = None
    if args.name is not None:
        from orch.cloud.apps import find_app

        cloud = find_app(args.name)
    elif args.app is not None:
        cloud = find_cloud(args.app)
    if cloud is not None:
        from orch.cloud.up import take_down as take_down_machines

        with cloud.lock():
            _stop_in_peace(cloud, args.timeout)
            take_down_machines(cloud, note_line, purge=args.purge)
        return 0
    if args.purge:
        raise UsageError("down: --purge is for an app on AWS", hint="`orch down NAME --purge`")
    if args.app is not None and args.app.startswith(("http://", "https://")):
        target = find_target(args.app)
        if target.folder is None:
            raise UsageError(
                f"down: {target.url} is not an app of this machine", hint="run `orch down` where it was started"
            )
        folder = target.folder
    else:
        folder = find_folder(args.app)
    from orch.leftovers import take_down

    take_down(folder, lambda line: note_line(line), timeout=args.timeout)
    return 0


def _stop_in_peace(cloud: CloudApp, timeout: float) -> None:
    """An app on AWS is asked to end, so that its works publish what they have; if it cannot be asked, its machines end
    all the same."""
    try:
        target = at_cloud(cloud)
        with target.client() as client:
            client.stop_app("orch down")
        note_line(
            f"{cloud.name}: {'stopped' if _wait_unreachable(target, timeout) else 'does not end, its machines do now'}"
        )
    except OrchError as error:
        note_line(f"{cloud.name}: not asked to stop: {error.message}")


def note_line(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
