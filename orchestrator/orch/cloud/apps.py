"""The apps that this user has started in a cloud: on this machine, a folder each, for this user only."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from orch.cloud.plan import slug
from orch.errors import UsageError
from orch.paths import write_atomic

__all__ = ["CloudApp", "find_app", "known", "remember"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CloudApp:
    """What is needed to get back to an app."""

    name: str
    slug: str
    region: str
    account: str
    partition: str
    bucket: str
    prefix: str
    drive: str
    app_file: str
    """On this machine."""
    local_port: int = 0
    """Where it is shown on this machine; 0: never yet."""
    remote_port: int = 0
    app_token: str = ""
    """Opens the app."""
    flow: str = ""
    """The instance of the Flow VM; empty: there is none."""
    address: str = ""
    """Where it was reached last."""
    config: str = ""
    """Digest of the configuration that the Flow VM was set up with."""
    images: tuple[tuple[str, str, str, int], ...] = ()
    """(name, ami, root device, least disk): every machine of an app is made from the images that the first one had."""
    started: float = 0.0

    @property
    def folder(self) -> Path:
        return _registry() / self.slug

    @property
    def key(self) -> Path:
        """Of its machines, made for it alone."""
        return self.folder / "key"

    @property
    def ray_token(self) -> Path:
        return self.folder / "ray-token"

    @property
    def log(self) -> Path:
        """What Ray's launcher has said."""
        return self.folder / "launch.log"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """One command at a time makes or ends its machines. Raises UsageError."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        fd = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise UsageError(
                f"another command is starting or ending {self.name}", hint="wait for it, or end it with Ctrl-C"
            ) from None
        try:
            yield
        finally:
            os.close(fd)

    def forget(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _registry() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser() / "orch" / "cloud"


def remember(app: CloudApp, **changes: object) -> CloudApp:
    """Write it down, changed; returns it."""
    app = replace(app, **changes)  # type: ignore[arg-type]
    app.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_atomic(app.folder / "app.json", json.dumps(asdict(app), indent=1).encode())
    return app


def _read(folder: Path) -> CloudApp | None:
    path = folder / "app.json"
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error})", hint="its machines, if any, are tagged orch-app") from error
    value["images"] = tuple(tuple(image) for image in value.get("images", ()))
    return CloudApp(**{name: value[name] for name in CloudApp.__dataclass_fields__ if name in value})


def find_app(name: str) -> CloudApp | None:
    """The app that was started under this name; None if there is none."""
    try:
        folder = _registry() / slug(name)
    except UsageError:
        return None
    return _read(folder)


def known() -> list[CloudApp]:
    """All of them, the latest first."""
    folders = _registry().glob("*/") if _registry().is_dir() else ()
    apps = [app for folder in folders if (app := _read(folder)) is not None]
    return sorted(apps, key=lambda app: -app.started)
