"""`Drive`: what users call. Files and folders shared by Works, each component writing under its own name."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from orch_drive.errors import DriveError, DriveNotFound, DriveNotHere, DrivePathError

if TYPE_CHECKING:
    import builtins

    from orch_drive.manifest import Manifest, ManifestIndex, VersionInfo
    from orch_drive.store import DriveStore

__all__ = ["APP_DRIVE", "FLOW_INDEX", "Drive", "drives_in"]

APP_DRIVE = "app"
"""The Drive of a script that was given none."""

_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,63}")
_FETCH_TRIES = 5

T = TypeVar("T")
P = ParamSpec("P")

FLOW_INDEX: ContextVar[Callable[[str], ManifestIndex] | None] = ContextVar("FLOW_INDEX", default=None)
"""Set while a Flow's code runs: drive id -> what the server knows of its files. Drives then do no I/O."""


on_publish: Callable[[Manifest], None] | None = None
"""Set in the process of a Python Work: told of what Drives publish that nobody has bound."""

own_epoch = 0
"""Set there too: the epoch in which such Drives write."""


class Drive:
    """Files shared by Works.

    `Drive("models")` (or `"lit://models"`) lives under the app's drive URL, `Drive("s3://bucket/prefix")` or any fsspec
    URL lives there. `root_folder` is the local folder that paths are relative to (default: the Work's cwd); a relative
    one is itself relative to the cwd. A Drive is state: only its id and its root folder are kept, and two Drives with
    the same are equal. Its owner is the component that uses it.

    Every method raises an error of the DriveError tree; each has an async twin (`aput`, `aget`, ...) that runs it in a
    thread. In a Flow only `list()` and `versions()` work.
    """

    def __init__(self, id: str, *, root_folder: str | os.PathLike[str] | None = None) -> None:
        if not isinstance(id, str):
            raise DrivePathError(f"a Drive's id is a str, not {type(id).__name__}")
        id = id.removeprefix("lit://")
        if "://" in id:
            id = id.rstrip("/") if not id.endswith("://") else id
        elif not _NAME.fullmatch(id):
            raise DrivePathError(f"{id!r} is no Drive's name", hint="letters, digits, - _ and ., or a URL")
        self._id = id
        self._root_folder = None if root_folder is None else os.fspath(root_folder)
        self._base_url: str | None = None
        self._component: str | None = None
        self._cwd: str | None = None
        self._host: str | None = None
        self._epoch: int | None = None
        self._call: str | None = None
        self._on_publish: Callable[[Manifest], None] | None = None
        self._index: ManifestIndex | None = None
        self._opened: DriveStore | None = None

    # ---- identity -------------------------------------------------------------------------------------------------

    @property
    def id(self) -> str:
        """Its name under the app's drive URL, or its own URL."""
        return self._id

    @property
    def root_folder(self) -> Path:
        """The local folder that paths are relative to, absolute."""
        return Path(os.path.abspath(os.path.join(self._cwd or os.getcwd(), self._root_folder or "")))

    @property
    def component_name(self) -> str:
        """The component that this Drive writes as."""
        return self._component or os.environ.get("ORCH_WORK") or "user"

    def to_state(self) -> dict[str, Any]:
        """The Drive as JSON state: `{"$drive": {"id": ..., "root_folder": ...}}`."""
        return {"$drive": {"id": self._id, "root_folder": self._root_folder}}

    @classmethod
    def from_state(cls, value: dict[str, Any]) -> Drive:
        """The Drive of `to_state()`, not bound to anything yet."""
        inner = value.get("$drive", value)
        return cls(inner["id"], root_folder=inner.get("root_folder"))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Drive):
            return NotImplemented
        return (self._id, self._root_folder) == (other._id, other._root_folder)

    def __hash__(self) -> int:
        return hash((self._id, self._root_folder))

    def __repr__(self) -> str:
        root = "" if self._root_folder is None else f", root_folder={self._root_folder!r}"
        return f"Drive({self._id!r}{root})"

    def __copy__(self) -> Drive:
        return Drive(self._id, root_folder=self._root_folder)

    def __deepcopy__(self, memo: dict[int, Any]) -> Drive:
        return Drive(self._id, root_folder=self._root_folder)

    def bind(
        self,
        *,
        base_url: str | None = None,
        component: str | None = None,
        cwd: str | os.PathLike[str] | None = None,
        host: str | None = None,
        epoch: int = 0,
        call: str | None = None,
        on_publish: Callable[[Manifest], None] | None = None,
        index: ManifestIndex | None = None,
    ) -> Drive:
        """Tell the Drive where it is used; returns itself. Called by orch, in place of what it was told before.

        `base_url`: the app's drive URL (default: ORCH_DRIVE_URL); `component`: who writes (ORCH_WORK); `cwd`: what a
        relative root folder is relative to; `host`, `epoch`, `call`: recorded in what is published; `on_publish` is
        called with each manifest that was committed; `index`: answer `list()` and `versions()` from it, and refuse
        everything else.
        """
        self._base_url = base_url
        self._component = component
        self._cwd = None if cwd is None else os.fspath(cwd)
        self._host = host
        self._epoch = epoch
        self._call = call
        self._on_publish = on_publish
        self._index = index
        self._opened = None
        return self

    # ---- files ----------------------------------------------------------------------------------------------------

    def put(self, path: str | os.PathLike[str], *, sync: bool = False) -> int:
        """Publish a file or folder of the root folder, all or nothing; returns its version.

        Only what changed travels. A folder is merged over what the component published there before; with `sync` what
        is gone from the folder is gone from the Drive too. Raises DriveNotFound, DrivePathError, DriveStaleEpoch,
        DriveConflict (a file keeps changing), DriveUnavailable.
        """
        store, name = self._store("put"), _text(path)
        root = self.root_folder
        manifest = store.publish(
            self.component_name,
            name,
            root / _checked(name),
            sync=sync,
            epoch=self._writes_in,
            call=self._call if self._call is not None else os.environ.get("ORCH_CALL"),
            host=self._host if self._host is not None else os.uname().nodename,
            cwd=str(root),
            root=root,
        )
        self._tell(manifest)
        return manifest.version

    def get(
        self,
        path: str | os.PathLike[str],
        *,
        component_name: str | None = None,
        timeout: float | None = None,
        overwrite: bool = False,
        version: int | None = None,
        partial: bool = False,
    ) -> Path:
        """Bring a file or folder to the root folder, verified, file by file by rename; returns its local path.

        `component_name`: whose, when several publish it (else DriveAmbiguous). `timeout`: seconds to wait for it to
        appear (None: not at all). A local file that differs is refused (DriveConflict) unless `overwrite`; one that is
        the same is left alone. `version`: a complete version that is still kept. `partial`: an unfinished version of a
        running call counts too. Raises DriveNotFound, DriveCorrupt naming the file.
        """
        store, name = self._store("get"), _checked(_text(path))
        deadline = None if timeout is None else time.monotonic() + timeout
        pause, tries = 0.02, 0
        while True:
            manifest = store.resolve(name, component=component_name, version=version, partial=partial)
            if manifest is not None:
                target = self._target(name)
                try:
                    store.fetch(manifest, target, overwrite=overwrite)
                    return target
                except DriveNotFound:  # replaced between the look and the copy
                    tries += 1
                    if tries >= _FETCH_TRIES:
                        raise
                    continue
            now = time.monotonic()
            if deadline is None or now >= deadline:
                break
            time.sleep(min(pause, deadline - now))  # storage cannot call back: look again, ever more seldom
            pause = min(pause * 1.5, 1.0)
        if version is not None:
            kept = [info.version for info in store.versions(name, component=component_name)]
            raise DriveNotFound(
                f"{name!r} has no version {version} on Drive {self._id!r}", hint=f"kept are {kept}" if kept else ""
            )
        raise store.index().missing(name, component_name)

    def list(
        self, path: str | os.PathLike[str] = ".", *, component_name: str | None = None, recursive: bool = False
    ) -> builtins.list[str]:
        """Paths on the Drive, sorted, of all components or one: what a folder holds, what a pattern (`*`, `?`, `[..]`,
        `**`) matches, or the file itself. `recursive`: all files below. Nothing there: an empty list."""
        index = self._known()
        if index is None:
            index = self._store("list").index()
        return index.list(_text(path), component=component_name, recursive=recursive)

    def delete(self, path: str | os.PathLike[str]) -> None:
        """Delete a file or folder that this component published. Raises DriveNotFound (naming who has it)."""
        store = self._store("delete")
        for manifest in store.delete(self.component_name, _text(path), epoch=self._writes_in, call=self._call):
            self._tell(manifest)

    def versions(
        self, path: str | os.PathLike[str], *, component_name: str | None = None
    ) -> builtins.list[VersionInfo]:
        """The complete versions that hold the path, oldest first, the last 10 of each owner."""
        index = self._known()
        if index is not None:
            return index.versions(_text(path), component=component_name)
        return self._store("versions").versions(_text(path), component=component_name)

    def verify(
        self, path: str | os.PathLike[str], *, component_name: str | None = None, version: int | None = None
    ) -> int:
        """Compare every byte with its checksum; returns the number of files. Raises DriveCorrupt naming the file."""
        return self._store("verify").verify(_text(path), component=component_name, version=version)

    # ---- async twins ----------------------------------------------------------------------------------------------

    async def aput(self, path: str | os.PathLike[str], *, sync: bool = False) -> int:
        """`put` in a thread."""
        return await _in_thread(self.put, path, sync=sync)

    async def aget(
        self,
        path: str | os.PathLike[str],
        *,
        component_name: str | None = None,
        timeout: float | None = None,
        overwrite: bool = False,
        version: int | None = None,
        partial: bool = False,
    ) -> Path:
        """`get` in a thread."""
        return await _in_thread(
            self.get,
            path,
            component_name=component_name,
            timeout=timeout,
            overwrite=overwrite,
            version=version,
            partial=partial,
        )

    async def alist(
        self, path: str | os.PathLike[str] = ".", *, component_name: str | None = None, recursive: bool = False
    ) -> builtins.list[str]:
        """`list` in a thread."""
        return await _in_thread(self.list, path, component_name=component_name, recursive=recursive)

    async def adelete(self, path: str | os.PathLike[str]) -> None:
        """`delete` in a thread."""
        await _in_thread(self.delete, path)

    async def aversions(
        self, path: str | os.PathLike[str], *, component_name: str | None = None
    ) -> builtins.list[VersionInfo]:
        """`versions` in a thread."""
        return await _in_thread(self.versions, path, component_name=component_name)

    async def averify(
        self, path: str | os.PathLike[str], *, component_name: str | None = None, version: int | None = None
    ) -> int:
        """`verify` in a thread."""
        return await _in_thread(self.verify, path, component_name=component_name, version=version)

    # ---- behind ---------------------------------------------------------------------------------------------------

    @property
    def _writes_in(self) -> int:
        return own_epoch if self._epoch is None else self._epoch

    def _tell(self, manifest: Manifest) -> None:
        hook = self._on_publish or on_publish
        if hook is not None:
            hook(manifest)

    def _known(self) -> ManifestIndex | None:
        """What answers in place of the storage: in a Flow the server's manifests."""
        if self._index is not None or self._base_url is not None:
            return self._index
        flow = FLOW_INDEX.get()
        return None if flow is None else flow(self._id)

    def _store(self, verb: str) -> DriveStore:
        if self._known() is not None:
            raise DriveNotHere(
                f"Drive {self._id!r}: {verb}() cannot be used in a Flow, only list() and versions()",
                hint="do it in a Work",
            )
        if self._opened is None:
            from orch_drive.store import DriveStore

            base = self._base_url or os.environ.get("ORCH_DRIVE_URL") or ""
            if not base and "://" not in self._id:
                raise DriveError(
                    f"Drive {self._id!r} is not connected to an app",
                    hint="use it in a Work that orch runs, set ORCH_DRIVE_URL, or give a URL",
                )
            self._opened = DriveStore(base, self._id)
        return self._opened

    def _target(self, name: str) -> Path:
        root = self.root_folder
        target = root / name
        real, limit = os.path.realpath(target.parent if name != "." else target), os.path.realpath(root)
        if os.path.commonpath([real, limit]) != limit:
            raise DrivePathError(f"{target} leads out of {root}")
        return target


def drives_in(value: Any) -> set[str]:
    """The ids of the Drives that JSON state holds, at any depth."""
    import msgspec

    # asked of whole works' vars, which hardly ever hold any
    return _drives_in(value) if b'"$drive"' in msgspec.json.encode(value) else set()


def _drives_in(value: Any) -> set[str]:
    if isinstance(value, dict):
        if "$drive" in value:
            try:
                return {Drive.from_state(value).id}
            except (DriveError, AttributeError, KeyError, TypeError):  # anybody may write {"$drive": "nonsense"}
                return set()
        return set().union(*map(_drives_in, value.values()))
    if isinstance(value, list | tuple):
        return set().union(*map(_drives_in, value))
    return set()


def _text(path: str | os.PathLike[str]) -> str:
    text = os.fspath(path)
    if not isinstance(text, str):
        raise DrivePathError("a Drive path is a str or a Path, not bytes")
    return text


def _checked(path: str) -> str:
    from orch_drive.manifest import check_path

    return check_path(path)


async def _in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    import asyncio

    return await asyncio.to_thread(function, *args, **kwargs)
