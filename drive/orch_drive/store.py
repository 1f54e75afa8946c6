"""One Drive in its storage: publish, resolve, fetch, versions, delete, verify, collect garbage.

Publishing sends the blobs that are not there yet, then creates the next manifest of the path: that is the commit. Two
writers of one path: each gets a version of its own, the later commit is the newer one. A writer with an older epoch
than the path has seen is refused. Deleting commits a manifest without files.
"""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from orch_drive.crash import crash_point
from orch_drive.drafts import PREFIX as DRAFT
from orch_drive.drafts import draft_in, sweep
from orch_drive.errors import (
    DriveConflict,
    DriveCorrupt,
    DriveNotFound,
    DrivePathError,
    DriveStaleEpoch,
    DriveUnavailable,
)
from orch_drive.manifest import (
    KEEP,
    Entry,
    Manifest,
    ManifestIndex,
    TornManifest,
    VersionInfo,
    ancestors,
    chain_key,
    chain_path,
    check_component,
    check_name,
    check_path,
    decode,
    encode,
    narrow,
)
from orch_drive.storage import Batch, LocalStorage, blob_key, hash_whole, open_storage

__all__ = ["DriveStore"]

log = logging.getLogger(__name__)

_SMALL = 1 << 20
_READ_TRIES = 5
_COMMIT_TRIES = 50
_GC_AGE = 24 * 3600.0

Times = tuple[int, int, int]
Entries = list[Entry]
Manifests = list[Manifest]
Names = list[str]
Versions = list[VersionInfo]


class _Changing(Exception):
    """The file changed while it was read."""


class _Chain(msgspec.Struct):
    """What storage holds of one published path: the file names of its manifests."""

    component: str
    key: str
    versions: list[int]
    partial: bool = False


Chains = list[_Chain]


class DriveStore:
    """The Drive `drive_id` below `base_url` (a local path or any fsspec URL); an id that is a URL stands for itself.

    Safe to use from several threads and processes. Component names may be short (`ui.trainer`) or full. Errors are the
    DriveError tree.
    """

    def __init__(self, base_url: str, drive_id: str) -> None:
        self.drive_id = drive_id
        self.storage = open_storage(drive_id if "://" in drive_id else f"{base_url.rstrip('/')}/{drive_id}")
        self._parsed: dict[str, tuple[Any, Manifest | DriveCorrupt | None]] = {}
        self._hints: dict[tuple[str, str, str], dict[str, Entry]] = {}
        self._placed: dict[str, tuple[tuple[int, ...], str]] = {}
        self._garbage: set[str] = set()

    @property
    def url(self) -> str:
        return self.storage.url

    # ---- what is there --------------------------------------------------------------------------------------------

    def index(self, *, all_versions: bool = False) -> ManifestIndex:
        """Everything published now; with `all_versions` also the older versions that are kept.

        A path whose newest manifest is corrupt is left out, with a log line.
        """
        index, _ = self._load(all_versions)
        return index

    def manifests(self, *, all_versions: bool = False) -> Manifests:
        """The newest complete version of each published path; deleted paths left out unless `all_versions`."""
        if not all_versions:
            return [manifest for manifest in self.index().current() if not manifest.deleted]
        with self._explained("read"):
            found = [
                self._read(key)
                for chain in self._chains()
                for key in (self._key(chain.component, chain.key, version) for version in chain.versions)
            ]
        return [manifest for manifest in found if isinstance(manifest, Manifest)]

    def owners(self, path: str) -> Names:
        """The components that publish the path."""
        return self.index().owners(path)

    def resolve(
        self, path: str, *, component: str | None = None, version: int | None = None, partial: bool = False
    ) -> Manifest | None:
        """What the path means, as a manifest of exactly this path; None if it is not there.

        A path inside a published folder gives the part of the folder's manifest that it names (`within` says which
        folder). `partial`: an unfinished version counts if it is the newest; compare `serial` to see that it changed.
        Raises DriveAmbiguous naming the owners, DriveCorrupt if its newest manifest cannot be read.
        """
        path = check_path(path)
        index, corrupt = self._load(all_versions=version is not None)
        for (owner, key), error in corrupt.items() if version is None else ():
            where = chain_path(key)
            if component is not None and owner != check_component(component):
                continue
            if where is None or where in ancestors(path) or path in ancestors(where):
                raise error
        return index.resolve(path, component=component, version=version, partial=partial)

    def versions(self, path: str, *, component: str | None = None, partial: bool = False) -> Versions:
        """The complete versions that hold the path, oldest first, at most the last 10 of each published path."""
        return self.index(all_versions=True).versions(path, component=component, partial=partial)

    def list(self, path: str = ".", *, component: str | None = None, recursive: bool = False) -> Names:
        """See ManifestIndex.list."""
        return self.index().list(path, component=component, recursive=recursive)

    def _chains(self) -> Chains:
        chains: dict[tuple[str, str], _Chain] = {}
        keys = self.storage.keys("manifests")
        for gone in set(self._parsed).difference(keys):
            self._parsed.pop(gone, None)
        for key in keys:
            parts = key.split("/")
            if len(parts) != 4:
                continue
            _, component, name, file = parts
            chain = chains.setdefault((component, name), _Chain(component, name, []))
            if file == "partial.json":
                chain.partial = True
            elif file.endswith(".json") and file[:-5].isdigit():
                chain.versions.append(int(file[:-5]))
        for chain in chains.values():
            chain.versions.sort()
        return list(chains.values())

    @staticmethod
    def _key(component: str, name: str, version: int | None) -> str:
        return f"manifests/{component}/{name}/" + ("partial.json" if version is None else f"{version:08d}.json")

    def _read(self, key: str) -> Manifest | DriveCorrupt | None:
        """The manifest, or why there is none: corrupt, or None for a torn one and one that is gone."""
        replaced = key.endswith("/partial.json")
        try:
            signature = self.storage.signature(key) if replaced else None
            if key in self._parsed and self._parsed[key][0] == signature:
                return self._parsed[key][1]
            data = self.storage.read(key)
        except FileNotFoundError:
            self._parsed.pop(key, None)
            return None
        found: Manifest | DriveCorrupt | None
        try:
            found = decode(data, name=f"{self.url}/{key}")
        except TornManifest:
            log.warning("%s/%s is cut off: it was never committed, the version before it counts", self.url, key)
            found = None
        except DriveCorrupt as exc:
            log.warning("%s", exc)
            found = exc
        self._parsed[key] = (signature, found)
        return found

    def _load(self, all_versions: bool = False) -> tuple[ManifestIndex, dict[tuple[str, str], DriveCorrupt]]:
        index = ManifestIndex()
        corrupt: dict[tuple[str, str], DriveCorrupt] = {}
        with self._explained("read"):
            for chain in self._chains():
                newest = True
                for version in reversed(chain.versions):
                    found = self._read(self._key(chain.component, chain.key, version))
                    if isinstance(found, Manifest):
                        index.add(found)
                        newest = False
                        if not all_versions:
                            break
                    elif found is not None and newest:
                        corrupt[chain.component, chain.key] = found
                        newest = False
                        if not all_versions:
                            break
                if chain.partial:
                    found = self._read(self._key(chain.component, chain.key, None))
                    if isinstance(found, Manifest):
                        index.add(found)
        return index, corrupt

    # ---- publish --------------------------------------------------------------------------------------------------

    def publish(
        self,
        component: str,
        path: str,
        source: Path,
        *,
        partial: bool = False,
        sync: bool = True,
        epoch: int = 0,
        call: str | None = None,
        host: str = "",
        cwd: str = "",
        previous: Manifest | None = None,
        root: Path | None = None,
    ) -> Manifest:
        """Publish a file or folder under `path`; returns the manifest that now counts (the old one if nothing changed).

        `source` is the file or folder itself. `sync`: the folder becomes exactly what `source` holds; without it, files
        that `source` lacks stay. `partial`: the unfinished version, replaced each time; a file that vanishes or keeps
        changing while it is read stays as it was (a complete version raises DriveConflict). `previous`: a manifest of
        this path whose unchanged files (size and times) need not be read again; by default the last one. `root`: links
        may not lead out of this folder (default: `source`, or its folder for a file). `epoch` 0 is not fenced.

        Raises DriveNotFound (no source), DriveStaleEpoch, DriveConflict, DrivePathError, DriveUnavailable.
        """
        component, path = check_component(component), check_path(path)
        source = Path(source)
        if not os.path.lexists(source):
            raise DriveNotFound(f"{source} does not exist, so {path!r} cannot be published")
        real = Path(os.path.realpath(source))
        is_dir = real.is_dir()
        if not is_dir and not real.is_file():
            raise DriveNotFound(f"{source} is neither a file nor a folder, so {path!r} cannot be published")
        if path == "." and not is_dir:
            raise DrivePathError('only a folder can be published as "."')
        if root is None:
            root = real if is_dir else real.parent
        limit = os.path.realpath(root)
        if not _inside(str(real), limit):
            raise DrivePathError(f"{source} leads out of {limit}", hint="publish the folder that it points to instead")
        if isinstance(self.storage, LocalStorage) and _inside(str(self.storage.root), str(real)):
            raise DrivePathError(f"{source} contains the Drive itself ({self.storage.root})")

        with self._explained("written to"):
            with self.storage.shared():
                index, _ = self._load()
                self._fence(index, component, path, epoch)
                hint = self._hint(index, component, path, str(real), host, cwd, previous)
                if is_dir:
                    entries = self._send_folder(real, limit, hint, partial)
                else:
                    entries = self._send_one(path, real, hint, partial)
                draft = Manifest(
                    drive=self.drive_id,
                    component=component,
                    path=path,
                    version=0,
                    serial=0,
                    is_dir=is_dir,
                    entries=entries,
                    partial=partial,
                    epoch=epoch,
                    call=call,
                    host=host,
                    cwd=cwd,
                )
                manifest, committed = self._commit(draft, keep=is_dir and not sync)
            self._hints[component, path, str(real)] = {entry.name: entry for entry in entries}
            if committed:
                self._prune(component, path)
        return manifest

    def discard_partial(self, component: str, path: str) -> None:
        """Forget the unfinished version of exactly this published path; no error if there is none."""
        component, path = check_component(component), check_path(path)
        with self._explained("written to"), self.storage.commit_lock():
            found = self._read(self._key(component, chain_key(path), None))
            if isinstance(found, Manifest):
                self._garbage.update(entry.sha256 for entry in found.entries)
            self.storage.remove(self._key(component, chain_key(path), None))
        self._collect()

    def delete(self, component: str, path: str, *, epoch: int = 0, call: str | None = None) -> Manifests:
        """Delete a file or folder of that component, with its history; returns the manifests that say so.

        A part of a published folder vanishes from its newest version; older versions keep it. Raises DriveNotFound,
        DriveStaleEpoch.
        """
        component, path = check_component(component), check_path(path)
        out: Manifests = []
        with self._explained("written to"):
            with self.storage.shared():
                index, corrupt = self._load()
                below = [name for name in index.chains(component) if path in ancestors(name)]
                lost = [chain_path(key) for owner, key in corrupt if owner == component]
                if not index.view(component, partial=True).holds(path) and path not in lost:
                    raise index.missing(path, component)
                for name in sorted({path, *below}):
                    newest = index.chains(component).get(name)
                    if newest is not None and newest.deleted and name != path:
                        continue
                    draft = Manifest(
                        drive=self.drive_id,
                        component=component,
                        path=name,
                        version=0,
                        serial=0,
                        is_dir=False,
                        deleted=True,
                        epoch=epoch,
                        call=call,
                    )
                    out.append(self._commit(draft, keep=False)[0])
            for manifest in out:
                self._prune(component, manifest.path)
        return out

    def _fence(self, index: ManifestIndex, component: str, path: str, epoch: int) -> int:
        """The epoch to record. Raises DriveStaleEpoch."""
        seen = (index.chains(component).get(path), index.partial(component, path))
        newest = max((manifest.epoch for manifest in seen if manifest is not None), default=0)
        if epoch and epoch < newest:
            raise DriveStaleEpoch(
                f"{component} has published {path!r} in epoch {newest}; a write of epoch {epoch} is refused"
            )
        return max(epoch, newest)

    def _hint(
        self,
        index: ManifestIndex,
        component: str,
        path: str,
        source: str,
        host: str,
        cwd: str,
        previous: Manifest | None,
    ) -> _Hint:
        """What is known of the files that `source` holds."""
        mine = self._hints.get((component, path, source))
        known = index.view(component, partial=True).at(path)
        base = {entry.name: entry for entry in known.entries} if known is not None else {}
        trusted: dict[str, Entry] = {}
        for manifest in (known, previous):
            if manifest is not None and (manifest.host, manifest.cwd, manifest.path) == (host, cwd, path):
                trusted.update((entry.name, entry) for entry in manifest.entries)
        if mine is not None:
            trusted.update(mine)
        return _Hint(base, trusted)

    def _send_folder(self, source: Path, limit: str, hint: _Hint, partial: bool) -> Entries:
        for attempt in range(_READ_TRIES):
            entries: Entries = []
            unstable = ""
            with self._batch() as batch:
                for name, file in _walk(source, limit):
                    try:
                        entries.append(self._send(name, file, hint, batch))
                    except FileNotFoundError:
                        if partial and name in hint.base:
                            entries.append(hint.base[name])
                    except _Changing:
                        unstable = name
                        if partial and name in hint.base:
                            entries.append(hint.base[name])
            if partial or not unstable:
                return sorted(entries, key=lambda entry: entry.name)
            hint.trusted.update((entry.name, entry) for entry in entries)
            log.info("%s/%s changed while it was read (%d)", source, unstable, attempt + 1)
        raise DriveConflict(
            f"{source}/{unstable} keeps changing while it is read", hint="publish it when it is finished"
        )

    def _send_one(self, path: str, file: Path, hint: _Hint, partial: bool) -> Entries:
        name = path.rpartition("/")[2]
        try:
            with self._batch() as batch:
                return [self._send(name, file, hint, batch)]
        except (FileNotFoundError, _Changing) as exc:
            if partial and name in hint.base:
                return [hint.base[name]]
            if isinstance(exc, FileNotFoundError):
                raise DriveNotFound(f"{file} vanished while it was read, so {path!r} was not published") from exc
            raise DriveConflict(
                f"{file} keeps changing while it is read", hint="publish it when it is finished"
            ) from exc

    @contextmanager
    def _batch(self) -> Iterator[Batch]:
        batch = self.storage.batch()
        try:
            yield batch
            batch.flush()
        finally:
            batch.abort()

    def _send(self, name: str, file: Path, hint: _Hint, batch: Batch) -> Entry:
        """The entry of one file, its bytes on their way. Raises FileNotFoundError, _Changing."""
        known = hint.trusted.get(name)
        if known is not None and known.ctime_ns:
            status = os.stat(file)
            executable = bool(status.st_mode & 0o100)
            if (known.size, known.mtime_ns, known.ctime_ns, known.executable) == (*_times(status), executable) and (
                not self.storage.near or self.storage.size(blob_key(known.sha256)) == known.size
            ):
                return known
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            for _ in range(_READ_TRIES):
                before = os.fstat(fd)
                sha256 = self._send_bytes(fd, before.st_size, hint.base.get(name), batch)
                after = os.fstat(fd)
                if (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns) and sha256:
                    break
            else:
                raise _Changing(name)
        finally:
            os.close(fd)
        return Entry(
            name=name,
            size=before.st_size,
            sha256=sha256,
            mtime_ns=before.st_mtime_ns,
            ctime_ns=0 if _racy(before) else before.st_ctime_ns,
            executable=bool(before.st_mode & 0o100),
        )

    def _send_bytes(self, fd: int, size: int, known: Entry | None, batch: Batch) -> str:
        """The checksum of what the storage now has (or will have after the batch); empty if the file was cut off."""
        if size <= _SMALL:
            data = os.pread(fd, size + 1, 0)
            if len(data) != size:
                return ""
            sha256 = hashlib.sha256(data).hexdigest()
            if not self._has(sha256, size, known):
                batch.add_bytes(sha256, data)
            return sha256
        if known is not None and known.size == size:  # probably the same: look before it is sent
            sha256 = hash_whole(fd)
            if self._has(sha256, size, known):
                return sha256
        return batch.add_file(fd)

    def _has(self, sha256: str, size: int, known: Entry | None) -> bool:
        key = blob_key(sha256)
        if self.storage.size(key) != size:
            return False
        if isinstance(self.storage, LocalStorage) or (known is not None and known.sha256 == sha256):
            return True
        # Without locks an old blob that no manifest names may be collected at this moment: send it again.
        when = self.storage.modified(key)
        return when is not None and time.time() - when < _GC_AGE / 2

    def _commit(self, draft: Manifest, *, keep: bool) -> tuple[Manifest, bool]:
        """Create the next manifest of the draft's path, unless it would say nothing new: then the one that counts.

        Raises DriveConflict if other writers were faster again and again.
        """
        component, path, name = draft.component, draft.path, chain_key(draft.path)
        for _ in range(_COMMIT_TRIES):
            with self.storage.commit_lock():
                index, _ = self._load()
                epoch = self._fence(index, component, path, draft.epoch)
                newest = index.chains(component).get(path)
                unfinished = index.partial(component, path)
                view = index.view(component, draft.partial).at(path)
                entries = draft.entries
                if keep and view is not None and view.is_dir:
                    entries = _merged(view.entries, entries)
                manifest = msgspec.structs.replace(
                    draft,
                    version=1 + self._last_version(component, name),
                    serial=1 + index.last_serial(component),
                    epoch=epoch,
                    at=time.time(),
                    entries=entries,
                )
                current = unfinished if draft.partial and unfinished is not None else newest
                if current is not None and view is current and _unchanged(current, manifest):
                    if draft.partial or unfinished is None:
                        return current, False
                if draft.partial:
                    self.storage.replace(self._key(component, name, None), encode(manifest))
                elif not self.storage.create(self._key(component, name, manifest.version), encode(manifest)):
                    continue
                elif unfinished is not None:
                    self.storage.remove(self._key(component, name, None))
                if unfinished is not None:
                    self._garbage.update(entry.sha256 for entry in unfinished.entries)
                return manifest, True
        raise DriveConflict(f"{path!r} is being published by too many writers at once", hint="try again")

    def _last_version(self, component: str, name: str) -> int:
        """The highest number taken; torn and corrupt manifests count too."""
        keys = self.storage.keys(f"manifests/{component}/{name}")
        numbers = [key.rpartition("/")[2].removesuffix(".json") for key in keys]
        return max((int(number) for number in numbers if number.isdigit()), default=0)

    # ---- fetch ----------------------------------------------------------------------------------------------------

    def fetch(
        self,
        manifest: Manifest,
        dest: Path,
        *,
        subpath: str | None = None,
        overwrite: bool = True,
        skip: Callable[[str], bool] | None = None,
    ) -> Names:
        """Put a version's files at `dest`, which is the place of the manifest's path itself (a file, or the folder).

        Only what differs is written, each file verified and then renamed into place; other files stay. `subpath`: only
        that part of the manifest, `dest` being its place. `skip(name)`: leave that file alone. Returns the names that
        were written, as in the manifest. With `overwrite=False` a local file that differs raises DriveConflict before
        anything is written. Raises DriveNotFound (no such subpath; a version that is no longer kept), DriveCorrupt.
        """
        dest = Path(dest)
        cut = manifest
        if subpath not in (None, "", ".", manifest.path):
            where = check_path(str(subpath))
            part = narrow(manifest, where if manifest.path == "." else f"{manifest.path}/{where}")
            if part is None:
                raise DriveNotFound(f"{manifest.path!r} version {manifest.version} has no {subpath!r}")
            cut = part
        prefix = cut.path[len(manifest.path) + 1 :] if manifest.path != "." else cut.path
        written: list[str] = []
        with self._explained("read"), self.storage.shared():
            todo: list[tuple[str, Entry, Path]] = []
            folders: dict[str, bool] = {}
            for entry in cut.entries:
                check_name(entry.name)
                name = entry.name
                if cut is not manifest:
                    name = f"{prefix}/{entry.name}" if cut.is_dir else prefix
                if skip is not None and skip(name):
                    continue
                target = dest / entry.name if cut.is_dir else dest
                if cut.is_dir:
                    _refuse_leaving(target.parent, dest, folders)
                if not self._identical(target, entry, overwrite):
                    todo.append((name, entry, target))
            if cut.is_dir:
                dest.mkdir(parents=True, exist_ok=True)
            for folder in {target.parent for _, _, target in todo}:
                sweep(folder)
            for name, entry, target in todo:
                self._fetch_one(cut, entry, target)
                written.append(name)
        return written

    def _fetch_one(self, manifest: Manifest, entry: Entry, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        tmp = draft_in(target.parent)
        mode = 0o777 if entry.executable else 0o666
        fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            try:
                try:
                    sha256 = self.storage.fetch(blob_key(entry.sha256), fd)
                except FileNotFoundError:
                    raise self._bytes_gone(manifest, entry) from None
                if sha256 != entry.sha256:
                    raise self._bytes_wrong(manifest, entry)
                if entry.mtime_ns:
                    os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            finally:
                os.close(fd)
            crash_point("drive.file.written")
            os.rename(tmp, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(tmp)
            raise
        crash_point("drive.file.renamed")
        self._remember(target, os.stat(target, follow_symlinks=False), entry.sha256)

    def _identical(self, target: Path, entry: Entry, overwrite: bool) -> bool:
        """Whether the local file is what the entry says. Raises DriveConflict if it may not be replaced."""
        try:
            status = os.stat(target, follow_symlinks=False)
        except (FileNotFoundError, NotADirectoryError):
            if os.path.lexists(target.parent) and not target.parent.is_dir():
                raise DriveConflict(f"{target.parent} is a file, but {target} has to go below it") from None
            return False
        if stat.S_ISDIR(status.st_mode):
            raise DriveConflict(f"{target} is a folder, on the Drive it is a file")
        if stat.S_ISREG(status.st_mode) and status.st_size == entry.size:
            # Size and time alone prove nothing: two versions may have been written within one tick of the clock.
            if self._placed.get(str(target)) == (_placed(status), entry.sha256):
                return True
            with open(target, "rb") as file:
                if hash_whole(file.fileno()) == entry.sha256:
                    self._remember(target, status, entry.sha256)
                    return True
        if not overwrite:
            raise DriveConflict(f"{target} exists and differs from the Drive's", hint="overwrite=True replaces it")
        return False

    def _remember(self, target: Path, status: os.stat_result, sha256: str) -> None:
        """This process has seen these bytes there; a write after this moment changes the file's time."""
        if time.time_ns() - status.st_mtime_ns > _tick(status):
            self._placed[str(target)] = (_placed(status), sha256)
        else:
            self._placed.pop(str(target), None)

    def open(self, manifest: Manifest, name: str | None = None) -> BinaryIO:
        """One file of a version, opened for reading (it can seek); its bytes are verified before this returns."""
        entry = manifest.entry(name) if name is not None else (manifest.entries[0] if not manifest.is_dir else None)
        if entry is None:
            raise DriveNotFound(f"{manifest.path!r} version {manifest.version} has no file {name or ''!r}")
        with self._explained("read"), self.storage.shared():
            try:
                return self.storage.open_checked(blob_key(entry.sha256), entry.sha256)
            except FileNotFoundError:
                raise self._bytes_gone(manifest, entry) from None
            except DriveCorrupt:
                raise self._bytes_wrong(manifest, entry) from None

    def read_bytes(
        self, path: str, *, component: str | None = None, version: int | None = None, partial: bool = False
    ) -> bytes:
        """The bytes of a file on the Drive, verified. Raises DriveNotFound, DriveAmbiguous, DriveCorrupt."""
        manifest = self.resolve(path, component=component, version=version, partial=partial)
        if manifest is None:
            raise self.index().missing(check_path(path), component)
        if manifest.is_dir:
            raise DrivePathError(f"{path!r} is a folder on the Drive")
        with self.open(manifest) as file:
            return file.read()

    def verify(self, path: str, *, component: str | None = None, version: int | None = None) -> int:
        """Read every byte at or below the path (of every owner, unless `component` says whose) and compare checksums.

        Returns the number of files. Raises DriveCorrupt naming the first file that does not match, DriveNotFound.
        """
        names = [component] if component else self.owners(path)
        found = [self.resolve(path, component=name, version=version) for name in names]
        manifests = [manifest for manifest in found if manifest is not None]
        if not manifests:
            self.resolve(path, component=component, version=version)  # a corrupt manifest has no owner
            raise self.index().missing(check_path(path), component)
        count = 0
        with self._explained("read"), self.storage.shared(), open(os.devnull, "r+b") as sink:
            for manifest in manifests:
                for entry in manifest.entries:
                    try:
                        if self._hash_blob(entry, sink.fileno()) != entry.sha256:
                            raise self._bytes_wrong(manifest, entry)
                    except FileNotFoundError:
                        raise self._bytes_gone(manifest, entry) from None
                    count += 1
        return count

    def _hash_blob(self, entry: Entry, sink: int) -> str:
        if isinstance(self.storage, LocalStorage):
            with open(self.storage.path(blob_key(entry.sha256)), "rb") as file:
                return hash_whole(file.fileno())
        return self.storage.fetch(blob_key(entry.sha256), sink)

    def _bytes_wrong(self, manifest: Manifest, entry: Entry) -> DriveCorrupt:
        # Out of the way, so that publishing the file again brings good bytes; the bad ones stay for a look.
        self.storage.set_aside(blob_key(entry.sha256), f"corrupt/{entry.sha256}")
        return DriveCorrupt(
            f"the bytes of {manifest.drive_path(entry)!r} ({manifest.component}, version {manifest.version}) "
            "do not match their checksum",
            hint=f"publish it again; the damaged bytes are in {self.url}/corrupt/{entry.sha256}",
        )

    def _bytes_gone(self, manifest: Manifest, entry: Entry) -> DriveNotFound | DriveCorrupt:
        name, chain = manifest.within or manifest.path, chain_key(manifest.within or manifest.path)
        key = self._key(manifest.component, chain, None if manifest.partial else manifest.version)
        try:
            still = decode(self.storage.read(key), name=key)
        except (FileNotFoundError, TornManifest):
            still = None
        if still is None or still.serial != manifest.serial:
            return DriveNotFound(
                f"version {manifest.version} of {name!r} has been replaced meanwhile", hint="ask again"
            )
        return DriveCorrupt(
            f"the bytes of {manifest.drive_path(entry)!r} ({manifest.component}, version {manifest.version}) "
            "are missing",
            hint="publish it again",
        )

    # ---- housekeeping ---------------------------------------------------------------------------------------------

    def _prune(self, component: str, path: str) -> None:
        """Drop the manifests of one path that are no longer kept, then the blobs that only they named."""
        name = chain_key(path)
        with self.storage.commit_lock():
            for chain in self._chains():
                if (chain.component, chain.key) != (component, name):
                    continue
                found = {v: self._read(self._key(component, name, v)) for v in chain.versions}
                good = [v for v, manifest in found.items() if isinstance(manifest, Manifest)]
                tombs = [v for v, manifest in found.items() if isinstance(manifest, Manifest) and manifest.deleted]
                oldest = max(good[-KEEP] if len(good) >= KEEP else 0, tombs[-1] if tombs else 0)
                for version, manifest in found.items():
                    if version < oldest:
                        if isinstance(manifest, Manifest):
                            self._garbage.update(entry.sha256 for entry in manifest.entries)
                        self.storage.remove(self._key(component, name, version))
                        self._parsed.pop(self._key(component, name, version), None)
                        crash_point("drive.prune.manifest")
                newest = found[good[-1]] if good else None
                partial = self._read(self._key(component, name, None)) if chain.partial else None
                if isinstance(partial, Manifest) and isinstance(newest, Manifest) and partial.serial < newest.serial:
                    self._garbage.update(entry.sha256 for entry in partial.entries)
                    self.storage.remove(self._key(component, name, None))
        self._collect()

    def _collect(self) -> None:
        if self._garbage:
            self._remove_blobs(set(self._garbage), _GC_AGE)

    def gc(self, *, min_age: float = _GC_AGE) -> int:
        """Remove every blob that no kept version names, and what interrupted writers left; returns the number of blobs.

        On local disk a blob goes only while nobody publishes or fetches (else nothing is removed this time); elsewhere
        only if it is older than `min_age` seconds, which must be longer than any publish takes.
        """
        with self._explained("written to"):
            names = {key.rpartition("/")[2] for key in self.storage.keys("blobs")}
            return self._remove_blobs(names, min_age, sweep=True)

    def _remove_blobs(self, candidates: set[str], min_age: float, *, sweep: bool = False) -> int:
        count = 0
        with self.storage.exclusive() as alone:
            if not alone and isinstance(self.storage, LocalStorage):
                return 0
            if sweep:
                self.storage.sweep()
            live, certain = self._live()
            if not certain:
                return 0
            for sha256 in candidates - live:
                key = blob_key(sha256)
                if not alone:
                    when = self.storage.modified(key)
                    if when is not None and time.time() - when < min_age:
                        continue
                self.storage.remove(key)
                crash_point("drive.prune.blob")
                self._garbage.discard(sha256)
                count += 1
            self._garbage -= live
        return count

    def _live(self) -> tuple[set[str], bool]:
        """The blobs that some manifest names; not certain if one cannot be read."""
        live: set[str] = set()
        certain = True
        for chain in self._chains():
            for version in [*chain.versions, *([None] if chain.partial else [])]:
                found = self._read(self._key(chain.component, chain.key, version))
                if isinstance(found, Manifest):
                    live.update(entry.sha256 for entry in found.entries)
                elif found is not None:
                    certain = False
        return live, certain

    @contextmanager
    def _explained(self, verb: str) -> Iterator[None]:
        try:
            yield
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as exc:
            raise DriveConflict(f"{exc.filename or self.url}: {exc.strerror or exc}") from exc
        except OSError as exc:
            hints = {
                errno.ENOSPC: "the disk is full",
                errno.EDQUOT: "the disk quota is used up",
                errno.EROFS: "the file system is read-only",
            }
            hint = hints.get(exc.errno or 0, "no permission" if isinstance(exc, PermissionError) else "")
            where = f" ({exc.filename})" if exc.filename else ""
            raise DriveUnavailable(
                f"the Drive at {self.url} cannot be {verb}{where}: {exc.strerror or exc}", hint=hint
            ) from exc


class _Hint:
    """What is known of a source's files: `base` as the Drive has them, `trusted` with times of this very folder."""

    __slots__ = ("base", "trusted")

    def __init__(self, base: dict[str, Entry], trusted: dict[str, Entry]) -> None:
        self.base = base
        self.trusted = trusted


def _times(status: os.stat_result) -> Times:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _racy(status: os.stat_result) -> bool:
    """Whether a write at this moment could leave the file's times as they are (clocks of file systems are coarse)."""
    return time.time_ns() - max(status.st_mtime_ns, status.st_ctime_ns) < _tick(status)


def _tick(status: os.stat_result) -> int:
    """Nanoseconds within which two writes may get the same time, generously."""
    coarse = status.st_mtime_ns % 1_000_000_000 == 0 and status.st_ctime_ns % 1_000_000_000 == 0
    return 2_100_000_000 if coarse else 50_000_000


def _placed(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _unchanged(old: Manifest, new: Manifest) -> bool:
    def told(m: Manifest) -> tuple[Any, ...]:
        return m.deleted, m.is_dir, m.partial, m.epoch, m.call, m.host, m.cwd, len(m.entries)

    return told(old) == told(new) and all(
        a.name == b.name and a.same_bytes(b) for a, b in zip(old.entries, new.entries, strict=True)
    )


def _merged(old: list[Entry], new: list[Entry]) -> Entries:
    names = {entry.name for entry in new}
    folders = {folder for name in names for folder in ancestors(name)} - names
    kept = [entry for entry in old if names.isdisjoint(ancestors(entry.name)) and entry.name not in folders]
    return sorted([*new, *kept], key=lambda entry: entry.name)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _walk(source: Path, limit: str) -> Iterator[tuple[str, Path]]:
    """Every file below a folder, by relative name. Links are followed as long as they stay within `limit`."""
    stack: list[tuple[str, frozenset[str]]] = [("", frozenset({str(source)}))]
    while stack:
        folder, seen = stack.pop()
        try:
            with os.scandir(source / folder) as found:
                items = sorted(found, key=lambda item: item.name)
        except FileNotFoundError:
            continue
        for item in items:
            if item.name.startswith(DRAFT):
                continue
            name = f"{folder}/{item.name}" if folder else item.name
            above = seen
            if item.is_symlink():
                real = os.path.realpath(item.path)
                if not os.path.exists(real):
                    log.warning("%s points to nothing and is not published", item.path)
                    continue
                if not _inside(real, limit):
                    raise DrivePathError(
                        f"{item.path} leads out of {limit} (to {real})",
                        hint="copy the file there, or publish its folder",
                    )
                if real in seen or _inside(os.path.realpath(source / folder), real):
                    raise DrivePathError(f"{item.path} is a link to a folder that contains it")
                above = seen | {real}
            try:
                if item.is_dir():
                    stack.append((name, above | {os.path.realpath(item.path)} if item.is_symlink() else above))
                elif item.is_file():
                    check_name(name)
                    yield name, Path(item.path)
                elif not stat.S_ISREG(item.stat().st_mode):
                    log.warning("%s is neither a file nor a folder and is not published", item.path)
            except FileNotFoundError:
                continue


def _refuse_leaving(folder: Path, dest: Path, known: dict[str, bool]) -> None:
    """Raise DrivePathError if a link below `dest` would lead a write out of it."""
    key = str(folder)
    if key not in known:
        known[key] = _inside(os.path.realpath(folder), os.path.realpath(dest))
    if not known[key]:
        raise DrivePathError(f"{folder} leads out of {dest}")
