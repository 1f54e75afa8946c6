"""The `.orch` folder beside an app file, and the list of apps that this user has run.

    .orch/
      lock          held (flock) by the flow server for its whole life; holds its pid
      app.json      {"id", "app_file"}: which app file the folder belongs to
      server.json   the last server: where it serves, its pid
      token         the app's bearer token, 0600
      state.db      the journal
      logs/<work>/<call>.log, logs/server.log
      drive/  works/<work>/  run/   .gitignore

Whether a server lives is asked of the lock and of nothing else: a pid in a file may by now be somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from orch.errors import UsageError
from orch_drive.crash import crash_point, once_in
from orch_drive.drafts import process_exists

_TOKEN = re.compile(r"[\x21-\x7e]+")

__all__ = [
    "AppFolder",
    "AppRunning",
    "FolderLock",
    "KnownApp",
    "ServerInfo",
    "agent_spec_file",
    "known_apps",
    "sweep_drafts",
    "write_atomic",
]

log = logging.getLogger(__name__)


class AppRunning(UsageError):
    """The app is already running in this folder."""

    def __init__(self, folder: Path, pid: int | None, url: str | None) -> None:
        who = f"pid {pid}" if pid else "another process"
        where = f"at {url}" if url else "and is still starting"
        super().__init__(
            f"an app is already running in {folder}: {who} {where}",
            hint="`orch open` shows it, `orch stop` ends it",
        )
        self.pid = pid
        self.url = url


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerInfo:
    """server.json. `url` is without the token; `started` is in seconds since the epoch."""

    url: str
    pid: int
    app_id: str
    name: str
    run: int
    started: float
    app_file: str


@dataclass(frozen=True, slots=True)
class KnownApp:
    """An app that was run by this user once. `used`: when it was last started, seconds since the epoch."""

    name: str
    folder: Path
    url: str
    used: float


def write_atomic(path: Path, data: bytes, *, mode: int = 0o600, point: str = "") -> None:
    """Readers see the old or the new content; the file is never readable by others in between. An OSError names it.

    point: names the crash points of this file. A killed process leaves its draft to `sweep_drafts`.
    """
    draft = path.parent / f".{path.name}.{secrets.token_hex(4)}.{os.getpid()}.tmp"
    try:
        fd = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(data)
                os.fchmod(file.fileno(), mode)
            if point:
                crash_point(point, "written")
            os.replace(draft, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(draft)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    if point:
        crash_point(point, "renamed")


def agent_spec_file(run: Path, agent: str) -> Path:
    """What an agent is started from, written before it is: a former incarnation that is told of its end looks here."""
    return run / f"agent-{agent}.spec"


def sweep_drafts(folder: Path) -> None:
    """Remove the drafts (`*.<pid>.tmp`) that killed processes have left in a folder."""
    for draft in folder.glob("*.tmp"):
        pid = draft.name.split(".")[-2]
        if pid.isdigit() and not process_exists(int(pid)):
            draft.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    """The object in the file; None if there is no file. Raises UsageError naming it if it holds anything else."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})", hint="remove it") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} does not hold a JSON object", hint="remove it")
    return value


class FolderLock:
    """The right to be the one server of a folder. A context manager; the kernel frees it when the process dies."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def release(self) -> None:
        """Give it up; a second call does nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.release()


class AppFolder:
    """The folder of an app file and its `.orch`. Making an object touches nothing on disk; `create` does."""

    def __init__(self, root: str | Path) -> None:
        self.root = Path(root).expanduser().absolute()
        self.orch = self.root / ".orch"
        self.state_db = self.orch / "state.db"
        self.logs = self.orch / "logs"
        self.drive = self.orch / "drive"
        self.works = self.orch / "works"
        self.run = self.orch / "run"
        self.server_log = self.logs / "server.log"
        self._token = self.orch / "token"
        self._server = self.orch / "server.json"
        self._app = self.orch / "app.json"
        self._lock = self.orch / "lock"

    def __repr__(self) -> str:
        return f"AppFolder({str(self.root)!r})"

    @property
    def exists(self) -> bool:
        """Whether an app has ever been run here."""
        return self.orch.is_dir()

    def create(self) -> None:
        """Make `.orch` and its folders. Raises UsageError if the disk does not let us."""
        try:
            for folder in (self.orch, self.logs, self.drive, self.works, self.run):
                folder.mkdir(mode=0o700, exist_ok=True)
            ignore = self.orch / ".gitignore"
            if not ignore.exists():
                write_atomic(ignore, b"*\n", mode=0o644)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            there = isinstance(error, FileExistsError)
            raise UsageError(
                f"cannot write {error.filename or self.orch}: {'it is no folder' if there else error.strerror}",
                hint="move it away" if there else "the app's folder must be writable",
            ) from error

    # -- the server's life

    def lock(self, *, timeout: float = 0.5) -> FolderLock:
        """Become the one server of this folder. Raises AppRunning, with its pid and URL, while another one lives.

        Waits up to `timeout` seconds, because `serving` of another command holds the lock for an instant.
        """
        self.create()
        fd = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    os.close(fd)
                    raise self.running_error() from None
                time.sleep(0.01)
        try:
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
        except OSError as error:
            os.close(fd)
            raise OSError(error.errno, error.strerror, str(self._lock)) from error
        once_in(self.run)
        for folder in (self.orch, self.run, self.run / "calls", self.run / "processes"):
            sweep_drafts(folder)
        return FolderLock(fd)

    def serving(self) -> bool:
        """Whether a flow server of this folder lives."""
        try:
            fd = os.open(self._lock, os.O_RDONLY)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def server_pid(self) -> int | None:
        """The pid of the living server, also before it serves; None if none lives."""
        if not self.serving():
            return None
        text = self._lock.read_text().strip()
        return int(text) if text.isdigit() else None

    def running_error(self) -> AppRunning:
        """What to tell somebody who wants to start a second server."""
        pid = self.server_pid()
        info = self.read_server()
        return AppRunning(self.root, pid, info.url if info is not None and info.pid == pid else None)

    # -- the files

    def read_server(self) -> ServerInfo | None:
        """What the last server wrote; it need not be alive (see `serving`)."""
        value = _read_json(self._server)
        if value is None:
            return None
        try:
            return ServerInfo(**{name: value[name] for name in ServerInfo.__dataclass_fields__})
        except KeyError as error:
            raise UsageError(f"{self._server} lacks {error}", hint="remove it") from error

    def last_port(self) -> int | None:
        """Where the last server served."""
        info = self.read_server()
        return None if info is None else urlsplit(info.url).port

    def write_server(self, info: ServerInfo) -> None:
        """Say where the app is served, here and in the list of known apps."""
        write_atomic(self._server, json.dumps(asdict(info), indent=1).encode(), point="flow.server")
        try:
            _remember(KnownApp(info.name, self.root, info.url, info.started))
        except OSError as error:
            log.warning("this app cannot be found by name (`--app %s`): %s", info.name, error)

    def token(self) -> str:
        """The app's token, made at the first call. Only this user can read its file."""
        with contextlib.suppress(FileNotFoundError):
            text = self._token.read_bytes().decode("ascii", "replace").strip()
            if _TOKEN.fullmatch(text):
                if self._token.stat().st_mode & 0o077:
                    self._token.chmod(0o600)
                return text
        self.create()
        text = secrets.token_urlsafe(32)
        write_atomic(self._token, text.encode(), point="flow.token")
        return text

    def app_id(self) -> str:
        """Eight hexadecimal digits that stay the same for the folder's life (they name the cookie)."""
        return str((_read_json(self._app) or {}).get("id") or self._write_app(None)["id"])

    def check_claim(self, app_file: Path) -> None:
        """Raises UsageError if the folder was last used by another app file."""
        used = self.claimed_by()
        if used is not None and used != app_file.name:
            raise UsageError(
                f"{self.orch} belongs to the app in {used}, not to {app_file.name}",
                hint=f"`orch run {used}`, or --fresh to start over with {app_file.name}, or a folder for each app",
            )

    def claim(self, app_file: Path, *, fresh: bool = False) -> None:
        """Note that the folder belongs to this app file; `fresh`: whoever it belonged to. Raises UsageError as
        `check_claim`. Call it with the lock held."""
        if not fresh:
            self.check_claim(app_file)
        self._write_app(app_file.name)

    def claimed_by(self) -> str | None:
        """Name of the app file that the folder was last used by."""
        used = (_read_json(self._app) or {}).get("app_file")
        return used if isinstance(used, str) else None

    def _write_app(self, app_file: str | None) -> dict[str, Any]:
        old = _read_json(self._app) or {}
        new = {"id": old.get("id") or secrets.token_hex(4), "app_file": app_file or old.get("app_file")}
        if new != old:
            self.create()
            write_atomic(self._app, json.dumps(new).encode(), point="flow.app")
        return new

    def agent_records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """`run/agent-*.json`: what is known of the agents that were started here."""
        return self._records("agent-*.json")

    def place_records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """`run/ray-*.json`: the places that Works were given on a Ray cluster."""
        return self._records("ray-*.json")

    def run_records(self) -> Iterator[tuple[Path, dict[str, Any]]]:
        """`run/processes/*.run.json`: the waiters that were started here, with their scripts."""
        return self._records("processes/*.run.json")

    def call_record(self, key: str) -> dict[str, Any] | None:
        """`run/calls/<key>.json`: what an agent was asked to start; None if that is not known, or cannot be read."""
        try:
            return _read_json(self.run / "calls" / f"{key}.json")
        except UsageError as error:
            log.warning("left alone: %s", error)
            return None

    def _records(self, pattern: str) -> Iterator[tuple[Path, dict[str, Any]]]:
        for path in sorted(self.run.glob(pattern)):
            try:
                record = _read_json(path)
            except UsageError as error:
                log.warning("left alone: %s", error)
                continue
            if record is not None:
                yield path, record


# ---- apps by name --------------------------------------------------------------------------------------------------


def _registry() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "orch" / "apps"


def _remember(app: KnownApp) -> None:
    folder = _registry()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    sweep_drafts(folder)
    digest = hashlib.sha256(os.fsencode(os.path.realpath(app.folder))).hexdigest()[:16]
    value = {"name": app.name, "folder": str(app.folder), "url": app.url, "used": app.used}
    write_atomic(folder / f"{digest}.json", json.dumps(value).encode(), point="flow.known")


def known_apps() -> list[KnownApp]:
    """Apps that this user has run and whose folder is still there, latest first."""
    apps = []
    for path in _registry().glob("*.json"):
        value = _read_json(path)
        if value is not None and Path(value["folder"], ".orch").is_dir():
            apps.append(KnownApp(value["name"], Path(value["folder"]), value["url"], value["used"]))
    return sorted(apps, key=lambda app: -app.used)
