"""Which app a command speaks of: `--app FOLDER|URL|NAME`, by default the one in this folder."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlsplit

from orch.errors import UsageError
from orch.paths import AppFolder, known_apps

if TYPE_CHECKING:
    from orch.client import Client
    from orch.cloud.apps import CloudApp

__all__ = ["Target", "app_argument", "at_cloud", "find_cloud", "find_folder", "find_target", "read_arguments"]


@dataclass(frozen=True, slots=True)
class Target:
    """An app: its server if one lives, its folder if it is on this machine; at least one of them."""

    folder: AppFolder | None
    url: str | None
    token: str | None

    def client(self) -> Client:
        """For the living server. Raises UsageError if there is none."""
        if self.url is None or self.token is None:
            raise self.not_running()
        from orch.client import Client

        return Client(self.url, self.token)

    def not_running(self) -> UsageError:
        assert self.folder is not None
        if not self.folder.exists:
            return UsageError(
                f"no app has been run in {self.folder.root}", hint="go to its folder, or say --app FOLDER|URL|NAME"
            )
        return UsageError(f"the app in {self.folder.root} is not running", hint="`orch run` starts it")


def app_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--app", metavar="FOLDER|URL|NAME", help="which app (default: the one in this folder)")


def read_arguments(parser: argparse.ArgumentParser) -> None:
    """What all verbs that read have in common."""
    app_argument(parser)
    parser.add_argument("--json", action="store_true", help="for programs")


def find_target(app: str | None) -> Target:
    """The app that was named. Raises UsageError naming what was looked for and where."""
    if app is not None and app.startswith(("http://", "https://")):
        return _at_url(app)
    if app is not None and (cloud := find_cloud(app)) is not None:
        return at_cloud(cloud)
    folder = find_folder(app)
    if not folder.serving():
        return Target(folder, None, None)
    info = folder.read_server()
    if info is None or info.pid != folder.server_pid():
        raise UsageError(f"the app in {folder.root} is still starting", hint="try again in a moment")
    return Target(folder, info.url, folder.token())


def at_cloud(app: CloudApp) -> Target:
    """An app in a cloud, its port forwarded. Raises UsageError, RuntimeLost."""
    from orch.cloud.up import reach

    reached = reach(app)
    return Target(None, reached.url, reached.app.app_token)


def find_cloud(app: str) -> CloudApp | None:
    """The app of that name that was started in a cloud from here, unless it means one of this machine: a path, the name
    of one that runs, or of a folder here in which one was run."""
    path = Path(app).expanduser()
    if "/" in app or app in (".", "..") or path.is_file() or (path / ".orch").is_dir():
        return None
    if any(k.name == app and AppFolder(k.folder).serving() for k in known_apps()):
        return None
    from orch.cloud.apps import find_app

    return find_app(app)


def _at_url(text: str) -> Target:
    parts = urlsplit(text)
    url = f"{parts.scheme}://{parts.netloc}"
    token = parse_qs(parts.query).get("token", [""])[0]
    for known in known_apps():
        folder = AppFolder(known.folder)
        # Only the token says for sure that it is this one: an address may be a tunnel's.
        if folder.serving() and (folder.token() == token if token else _same_place(known.url, url)):
            return Target(folder, url, folder.token())
    if not token:
        raise UsageError(f"no token for {url}", hint="give the address as `orch open` prints it, with ?token=...")
    return Target(None, url, token)


def _same_place(one: str, other: str) -> bool:
    def place(url: str) -> tuple[str, str, int | None]:
        parts = urlsplit(url)
        host = parts.hostname or ""
        return parts.scheme, "127.0.0.1" if host in ("localhost", "::1") else host, parts.port

    return place(one) == place(other)


def find_folder(app: str | None) -> AppFolder:
    """The folder of an app on this machine, by its path, its app file or its name. Raises UsageError."""
    if app is None:
        return AppFolder(Path.cwd())
    path = Path(app).expanduser()
    if path.is_file():
        path = path.absolute().parent
    if path.is_dir() and ((path / ".orch").is_dir() or "/" in app or app in (".", "..")):
        return AppFolder(path)
    named = [known for known in known_apps() if known.name == app]
    running = [known for known in named if AppFolder(known.folder).serving()]
    if len(running) > 1:
        raise UsageError(
            f"{len(running)} running apps are named {app!r}",
            hint=f"--app {' or --app '.join(str(k.folder) for k in running)}",
        )
    if running or named:
        return AppFolder((running or named)[0].folder)
    if path.is_dir():
        return AppFolder(path)
    from orch.cloud.apps import known as known_in_clouds

    names = sorted({known.name for known in known_apps()} | {cloud.name for cloud in known_in_clouds()})
    raise UsageError(
        f"--app {app!r} is no folder, no URL and no app that was run by this user",
        hint=f"known: {', '.join(names[:8])}" if names else "no app was run by this user yet",
    )
