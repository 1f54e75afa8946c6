"""One Drive in its storage: publish, resolve, fetch, versions, delete, verify, collect garbage.

Publishing sends the blobs that are not there yet, then creates the next manifest of the path: that is the commit. Two
writers of one path: each gets a version of its own, the later commit is the newer one. Deleting commits a manifest
without files.

A writer with an older epoch than its component has seen is refused: than any of the component's manifests, or than its
fence. The fence says which versions there were when it was set, and a reader takes no other from an older epoch. So a
commit that was on its way while the fence was set counts or does not, but never comes to light afterwards, also where
committers cannot be locked out; there a committer looks at the fence again before it says that it is done.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import random
import stat
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from orch_drive.crash import crash_point
from orch_drive.drafts import OWN_FOLDER, PREFIX, draft_in, sweep
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
    NO_FENCE,
    Blob,
    Entry,
    Fence,
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
    decode_fence,
    encode,
    encode_fence,
    format_of,
    narrow,
)
from orch_drive.storage import (
    Batch,
    LocalStorage,
    Tick,
    blob_key,
    folds_case,
    hash_whole,
    open_storage,
    write_all,
)

__all__ = ["DriveStore", "files_in"]

log = logging.getLogger(__name__)

_SMALL = 1 << 20
_PART = 8 << 20
_APPENDED = 64 << 10
"""A file of at least this size that has grown is published by what was added; smaller ones travel packed together."""
_PACK_FILES = 8
"""Fewer than these are not worth a pack."""
_SPARSE = 0.25
"""Of a pack that holds less than this share of wanted bytes the files are packed anew."""
_RESUMED = 32 << 20
"""A file of at least this size is fetched so that an interrupted fetch can be gone on with."""
_SPOTS, _SPOT = 8, 16 << 10
_READ_TRIES = 5
_COMMIT_TRIES = 50
_GC_AGE = 24 * 3600.0
_GC_LOOK = 3600.0
_BROKEN = ".broken"
_GC_MARK = "collected"
"""Written by who looks for garbage, where one writer a day does."""

Times = tuple[int, int, int]
Progress = Callable[[int, int], None]
Entries = list[Entry]
Pieces = list[tuple[str, int]]
Sent = tuple[str, str]
"""A checksum and the name of the blob; both empty if the file has changed."""
Todo = list[tuple[str, Entry, Path]]
Rows = list[tuple[Manifest, Entry, Blob]]
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
    signature: Any = None
    """Of the partial manifest, where the listing tells it."""


Chains = dict[tuple[str, str], _Chain]


class _Look(msgspec.Struct):
    """One look at the manifests of a storage."""

    index: ManifestIndex
    corrupt: dict[tuple[str, str], DriveCorrupt]
    chains: Chains
    fences: dict[str, tuple[Any, Fence]]
    """component -> signature, fence"""
    broken: set[str] = set()
    """Blobs that a reader far away has found damaged or missing: they are sent again although manifests name them."""

    def fence(self, component: str) -> Fence:
        return self.fences[component][1] if component in self.fences else NO_FENCE


class DriveStore:
    """The Drive `drive_id` below `base_url` (a local path or any fsspec URL); an id that is a URL stands for itself.

    Safe to use from several threads and processes. Component names may be short (`ui.trainer`) or full. Errors are the
    DriveError tree.
    """

    def __init__(self, base_url: str, drive_id: str) -> None:
        self.drive_id = drive_id
        self.storage = open_storage(drive_id if "://" in drive_id else f"{base_url.rstrip('/')}/{drive_id}")
        self._parsed: dict[str, tuple[Any, Manifest | Fence | DriveCorrupt | None]] = {}
        self._hints: dict[tuple[str, str, str], dict[str, Entry]] = {}
        self._placed: dict[str, tuple[tuple[int, ...], str]] = {}
        self._garbage: set[str] = set()
        self._gc_look = 0.0

    @property
    def url(self) -> str:
        return self.storage.url

    # ---- what is there --------------------------------------------------------------------------------------------

    def index(self, *, all_versions: bool = False) -> ManifestIndex:
        """Everything published now; with `all_versions` also the older versions that are kept.

        A path whose newest manifest is corrupt is left out, with a log line.
        """
        return self._load(all_versions).index

    def manifests(self, *, all_versions: bool = False) -> Manifests:
        """The newest complete version of each published path; deleted paths left out unless `all_versions`."""
        if not all_versions:
            return [manifest for manifest in self.index().current() if not manifest.deleted]
        with self._explained("read"):
            found = [manifest for _, _, manifest in self._valid(self._look(self.storage.listing("manifests")))]
        return [manifest for manifest in found if isinstance(manifest, Manifest) and not manifest.partial]

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
        look = self._load(all_versions=version is not None)
        for (owner, key), error in look.corrupt.items() if version is None else ():
            where = chain_path(key)
            if component is not None and owner != check_component(component):
                continue
            if where is None or where in ancestors(path) or path in ancestors(where):
                raise error
        return look.index.resolve(path, component=component, version=version, partial=partial)

    def versions(self, path: str, *, component: str | None = None, partial: bool = False) -> Versions:
        """The complete versions that hold the path, oldest first, at most the last 10 of each published path."""
        return self.index(all_versions=True).versions(path, component=component, partial=partial)

    def list(self, path: str = ".", *, component: str | None = None, recursive: bool = False) -> Names:
        """See ManifestIndex.list."""
        return self.index().list(path, component=component, recursive=recursive)

    @staticmethod
    def _key(component: str, name: str, version: int | None) -> str:
        return f"manifests/{component}/{name}/" + ("partial.json" if version is None else f"{version:08d}.json")

    def _look(self, listed: dict[str, Any]) -> _Look:
        """What a listing of manifests says; none but the fences are read."""
        look = _Look(ManifestIndex(), {}, {}, {}, set())
        for key, signature in listed.items():
            parts = key.split("/")
            if len(parts) == 3 and parts[2] == ".fence":
                try:
                    found = self._read(key, signature)
                except FileNotFoundError:
                    continue
                if isinstance(found, Fence):
                    look.fences[parts[1]] = (self._parsed[key][0], found)
            elif len(parts) == 3 and parts[1] == _BROKEN:
                look.broken.add(parts[2])
            if len(parts) != 4:
                continue
            _, component, name, file = parts
            chain = look.chains.setdefault((component, name), _Chain(component, name, []))
            if file == "partial.json":
                chain.partial, chain.signature = True, signature
            elif file.endswith(".json") and file[:-5].isdigit():
                chain.versions.append(int(file[:-5]))
        for chain in look.chains.values():
            chain.versions.sort()
        return look

    def _read(self, key: str, signature: Any = None) -> Manifest | Fence | DriveCorrupt | None:
        """The manifest or fence, or why there is none: corrupt, or None for a torn one and one that is gone."""
        try:
            if key.endswith(("/partial.json", "/.fence")) and signature is None:
                signature = self.storage.signature(key)
            if key in self._parsed and self._parsed[key][0] == signature:
                return self._parsed[key][1]
            data = self.storage.read(key)
        except FileNotFoundError:
            self._parsed.pop(key, None)
            return None
        return self._parse(key, data, signature)

    def _parse(self, key: str, data: bytes, signature: Any = None) -> Manifest | Fence | DriveCorrupt | None:
        found: Manifest | Fence | DriveCorrupt | None
        try:
            if key.endswith("/.fence"):
                found = decode_fence(data)
            else:
                found = decode(data, name=f"{self.url}/{key}")
        except TornManifest:
            log.warning("%s/%s is cut off: it was never committed, the version before it counts", self.url, key)
            found = None
        except DriveCorrupt as exc:
            log.warning("%s", exc)
            found = exc
        self._parsed[key] = (signature, found)
        return found

    def _read_ahead(self, look: _Look, all_versions: bool) -> None:
        """Far away, what is going to be read is asked for at once."""
        if self.storage.near:
            return
        wanted = [
            self._key(chain.component, chain.key, version)
            for chain in look.chains.values()
            for version in (chain.versions if all_versions else chain.versions[-1:])
        ]
        missing = [key for key in wanted if key not in self._parsed]
        if len(missing) > 1:
            for key, data in self.storage.read_many(missing):
                if data is not None:
                    self._parse(key, data)

    def _read_chain(self, look: _Look, chain: _Chain, version: int | None) -> Manifest | DriveCorrupt | None:
        """One manifest, if the component's fence lets it count."""
        found = self._read(self._key(chain.component, chain.key, version), chain.signature if version is None else None)
        if isinstance(found, Manifest) and not look.fence(chain.component).admits(chain.key, found):
            return None
        return found if not isinstance(found, Fence) else None

    def _valid(self, look: _Look) -> Iterator[tuple[_Chain, int | None, Manifest | DriveCorrupt]]:
        """Every manifest that counts; corrupt ones too."""
        self._read_ahead(look, True)
        for chain in look.chains.values():
            for version in [*chain.versions, *([None] if chain.partial else [])]:
                found = self._read_chain(look, chain, version)
                if found is not None:
                    yield chain, version, found

    def _load(self, all_versions: bool = False) -> _Look:
        with self._explained("read"):
            listed = self.storage.listing("manifests")
            for gone in set(self._parsed).difference(listed):
                self._parsed.pop(gone, None)
            look = self._look(listed)
            self._read_ahead(look, all_versions)
            for chain in look.chains.values():
                newest = True
                for version in reversed(chain.versions):
                    found = self._read_chain(look, chain, version)
                    if isinstance(found, Manifest):
                        look.index.add(found)
                        newest = False
                        if not all_versions:
                            break
                    elif found is not None and newest:
                        look.corrupt[chain.component, chain.key] = found
                        newest = False
                        if not all_versions:
                            break
                if chain.partial:
                    found = self._read_chain(look, chain, None)
                    if isinstance(found, Manifest):
                        look.index.add(found)
        return look

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
        progress: Progress | None = None,
        leave: Collection[str] = (),
    ) -> Manifest:
        """Publish a file or folder under `path`; returns the manifest that now counts (the old one if nothing changed).

        `source` is the file or folder itself. `sync`: the folder becomes exactly what `source` holds; without it, files
        that `source` lacks stay. `partial`: the unfinished version, replaced each time; a file that vanishes or keeps
        changing while it is read stays as it was (a complete version raises DriveConflict). `previous`: a manifest of
        this path whose unchanged files (size and times) need not be read again; by default the last one. `root`: links
        may not lead out of this folder (default: `source`, or its folder for a file). `epoch` 0 is not fenced.
        `progress(done, total)`: told of bytes, those included that need not travel. `leave`: names of files
        of a folder that are being written: in a partial version they stay as they were.

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
        if isinstance(self.storage, LocalStorage) and _holds(real, self.storage.root):
            raise DrivePathError(f"{source} contains the Drive itself ({self.storage.root})")

        with self._explained("written to"):
            with self.storage.shared():
                look = self._load()
                self._check_epoch(look, component, path, epoch)
                self._check_case(look, component, path)
                hint = self._hint(look, component, path, str(real), host, cwd, previous)
                hint.leave = frozenset(leave) if partial else frozenset()
                tick = None if progress is None else _tally(progress, real)
                if is_dir:
                    entries = self._send_folder(real, limit, hint, partial, not sync, tick)
                else:
                    entries = self._send_one(path, real, hint, partial, tick)
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
                if committed and not self.storage.locked:
                    self._check_assumed(look, manifest, hint.assumed)
            if not partial:
                self._tell_whole(look.broken & draft.blobs)
            if not committed:  # what was sent for nothing is named nowhere
                entries = _placed_as(entries, manifest)
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
                self._garbage.update(found.blobs)
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
                look = self._load()
                index, corrupt = look.index, look.corrupt
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

    def fence(self, component: str, epoch: int) -> None:
        """From now on nothing more is accepted from incarnations of this component with a lower epoch, at any path.

        What they have published stays. Call it before a new incarnation starts, once for each Drive that it uses;
        asking again costs one look. Raises DriveStaleEpoch if there has been a newer one already.
        """
        component = check_component(component)
        key = f"manifests/{component}/.fence"
        with self._explained("written to"):
            for _ in range(_COMMIT_TRIES):
                found = self._read(key)
                if isinstance(found, Fence) and found.epoch >= epoch:
                    if found.epoch > epoch:
                        raise DriveStaleEpoch(
                            f"{component} is fenced at epoch {found.epoch}; epoch {epoch} has been replaced",
                            hint="a newer incarnation of it has taken over, or another app's work of that name",
                        )
                    return
                with self.storage.commit_lock():
                    look = self._look(self.storage.listing(f"manifests/{component}"))
                    seen, old = look.fences.get(component, (None, NO_FENCE))
                    if old.epoch >= epoch:
                        continue
                    new = self._fence_of(look, epoch)
                    # Without fsync: after a power cut no older incarnation is alive on this machine.
                    if not self.storage.replace(key, encode_fence(new), seen, durable=False):
                        continue
                    if not self.storage.locked:
                        self._renew_partials(look)
                return
        raise DriveConflict(f"{component} is being fenced by too many at once", hint="try again")

    def highest_epoch(self) -> int:
        """Of all fences. The epoch of a new incarnation has to be higher, whatever its clock says."""
        with self._explained("read"):
            look = self._look(self.storage.listing("manifests"))
        return max((fence.epoch for _, fence in look.fences.values()), default=0)

    def _fence_of(self, look: _Look, epoch: int) -> Fence:
        """A fence behind what counts now. Manifests that an older fence has shut out stay shut out."""
        heads: dict[str, int] = {}
        partials: dict[str, int] = {}
        void: dict[str, list[int]] = {}
        self._read_ahead(look, True)
        for chain in look.chains.values():
            if chain.versions:
                heads[chain.key] = chain.versions[-1]
            for version in chain.versions:
                found = self._read(self._key(chain.component, chain.key, version))
                if isinstance(found, Manifest) and not look.fence(chain.component).admits(chain.key, found):
                    void.setdefault(chain.key, []).append(version)
            unfinished = self._read_chain(look, chain, None) if chain.partial else None
            if isinstance(unfinished, Manifest):
                partials[chain.key] = unfinished.serial
        return Fence(epoch=epoch, heads=heads, partials=partials, void=void)

    def _renew_partials(self, look: _Look) -> None:
        """Write what is unfinished once more: the write of a stale epoch that is on its way then finds another object
        than it has seen."""
        for chain in look.chains.values():
            found = self._read_chain(look, chain, None) if chain.partial else None
            if isinstance(found, Manifest):
                again = encode(msgspec.structs.replace(found, at=time.time()))
                self.storage.replace(self._key(chain.component, chain.key, None), again, chain.signature)

    def _check_epoch(self, look: _Look, component: str, path: str, epoch: int) -> int:
        """The epoch to record. Raises DriveStaleEpoch."""
        newest = max(look.index.last_epoch(component), look.fence(component).epoch)
        if epoch and epoch < newest:
            raise DriveStaleEpoch(
                f"{component} is in epoch {newest}; a write of epoch {epoch} to {path!r} is refused",
                hint="a newer incarnation of it has taken over",
            )
        return max(epoch, newest)

    def _check_case(self, look: _Look, component: str, path: str) -> None:
        """Raises DrivePathError if this Drive's own disk would take the path's versions for those of another path."""
        mine = component, chain_key(path)
        for other in look.chains:
            if other != mine and tuple(map(str.casefold, other)) == tuple(map(str.casefold, mine)):
                if isinstance(self.storage, LocalStorage) and folds_case(self.storage.root):
                    raise DrivePathError(
                        f"{path!r} of {component} and {chain_path(other[1])!r} of {other[0]} are one name on this "
                        f"Drive's disk ({self.storage.root})",
                        hint="give it another name, or keep the Drive on a disk that tells upper and lower case apart",
                    )

    def _hint(
        self,
        look: _Look,
        component: str,
        path: str,
        source: str,
        host: str,
        cwd: str,
        previous: Manifest | None,
    ) -> _Hint:
        """What is known of the files that `source` holds."""
        mine = self._hints.get((component, path, source))
        known = look.index.view(component, partial=True).at(path)
        base = {entry.name: entry for entry in known.entries} if known is not None else {}
        trusted: dict[str, Entry] = {}
        for manifest in (known, previous):
            if manifest is not None and (manifest.host, manifest.cwd, manifest.path) == (host, cwd, path):
                trusted.update((entry.name, entry) for entry in manifest.entries)
        if mine is not None:
            trusted.update(mine)
        hint = _Hint(base, trusted)
        if self.storage.near:
            told = [entry for entry in base.values() if entry.blob]
        else:
            told = [entry for manifest in look.index.counting(component) for entry in manifest.entries]
        for entry in told:
            hint.know(entry, look.broken)
        return hint

    def _send_folder(
        self, source: Path, limit: str, hint: _Hint, partial: bool, keep: bool, tick: Tick | None = None
    ) -> Entries:
        for attempt in range(_READ_TRIES):
            entries: Entries = []
            unstable = ""
            with self._batch(tick) as batch:
                files = list(files_in(source, limit))
                hint.weigh(hint.base if keep else {name for name, _ in files})
                packer = _Packer(batch, hint.packed)
                for name, file in files:
                    if name in hint.leave:
                        if name in hint.base:
                            entries.append(hint.base[name])
                        continue
                    try:
                        entries.append(self._send(name, file, hint, batch, partial, tick, packer))
                    except FileNotFoundError:
                        if partial and name in hint.base:
                            entries.append(hint.base[name])
                    except _Changing:
                        unstable = name
                        if partial and name in hint.base:
                            entries.append(hint.base[name])
                packer.close()
            entries = [packer.placed(entry) for entry in entries]
            if partial or not unstable:
                return sorted(entries, key=lambda entry: entry.name)
            hint.trusted.update((entry.name, entry) for entry in entries)
            log.info("%s/%s changed while it was read (%d)", source, unstable, attempt + 1)
        raise DriveConflict(
            f"{source}/{unstable} keeps changing while it is read", hint="publish it when it is finished"
        )

    def _send_one(self, path: str, file: Path, hint: _Hint, partial: bool, tick: Tick | None = None) -> Entries:
        name = path.rpartition("/")[2]
        try:
            with self._batch(tick) as batch:
                return [self._send(name, file, hint, batch, partial, tick)]
        except (FileNotFoundError, _Changing) as exc:
            if partial and name in hint.base:
                return [hint.base[name]]
            if isinstance(exc, FileNotFoundError):
                raise DriveNotFound(f"{file} vanished while it was read, so {path!r} was not published") from exc
            raise DriveConflict(
                f"{file} keeps changing while it is read", hint="publish it when it is finished"
            ) from exc

    @contextmanager
    def _batch(self, tick: Tick | None = None) -> Iterator[Batch]:
        batch = self.storage.batch(tick)
        try:
            yield batch
            batch.flush()
        finally:
            batch.abort()

    def _send(
        self,
        name: str,
        file: Path,
        hint: _Hint,
        batch: Batch,
        partial: bool = False,
        tick: Tick | None = None,
        packer: _Packer | None = None,
    ) -> Entry:
        """The entry of one file, its bytes on their way. Raises FileNotFoundError, _Changing."""
        known = hint.trusted.get(name)
        if known is not None and known.ctime_ns and (partial or not (known.parts or hint.sparse(known))):
            status = os.stat(file)
            executable = bool(status.st_mode & 0o100)
            if (known.size, known.mtime_ns, known.ctime_ns, known.executable) == (*_times(status), executable) and all(
                self._kept(piece.name, piece.size, hint) for piece in known.pieces
            ):
                if tick is not None:
                    tick(known.size)
                return known
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            for _ in range(_READ_TRIES):
                before = os.fstat(fd)
                sha256, blob, parts = "", "", None
                sample = "" if self.storage.near or before.st_size <= _SMALL else _sample(fd, before.st_size)
                base = hint.base.get(name)
                if partial and base is not None and _APPENDED <= base.size < before.st_size:
                    sha256, parts = self._send_rest(fd, before.st_size, base, hint, batch)
                    blob = base.blob
                if not sha256:
                    parts = None
                    sha256, blob = self._send_bytes(fd, before.st_size, base, hint, batch, tick, packer, sample)
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
            parts=parts or [],
            blob="" if blob == sha256 else blob,
            sample="" if parts else sample,
        )

    def _send_bytes(
        self,
        fd: int,
        size: int,
        known: Entry | None,
        hint: _Hint,
        batch: Batch,
        tick: Tick | None = None,
        packer: _Packer | None = None,
        sample: str = "",
    ) -> Sent:
        """What the storage now has (or will have after the batch)."""
        if size <= _SMALL:
            data = os.pread(fd, size + 1, 0)
            if len(data) != size:
                return "", ""
            sha256 = hashlib.sha256(data).hexdigest()
            there = packer is not None and packer.has(sha256)
            if not there and sha256 in hint.packed:
                pack, _, length = hint.packed[sha256]
                there = self._kept(pack, length, hint)
                if not there:
                    del hint.packed[sha256]
            if there or self._kept(sha256, size, hint):
                if tick is not None:
                    tick(size)
            elif packer is not None and size < _APPENDED:
                packer.add(sha256, data)
            else:
                batch.add_bytes(sha256, data)
            return sha256, sha256
        if hint.likely(size, sample) if sample else (known is not None and known.size == size):
            # may well be there already: look before it is sent
            sha256 = hash_whole(fd)
            name = hint.own.get(sha256, sha256)
            if self._kept(name, size, hint):
                if tick is not None:
                    tick(size)
                return sha256, name
            sent = batch.add_file(fd, sha256, name)
        else:
            sent = batch.add_file(fd)
        if sample and sent[0]:
            hint.samples.add((size, sample))
            hint.named.add(sent[1])
            hint.own[sent[0]] = sent[1]
        return sent

    def _send_rest(self, fd: int, size: int, known: Entry, hint: _Hint, batch: Batch) -> tuple[str, Pieces | None]:
        """Of a file that has grown only what was added is sent, together with what was added last as long as that is
        not larger: so there are few parts, and no byte is sent often. Nothing if it has changed otherwise, too."""
        digest = hashlib.sha256()
        _hash_range(fd, 0, known.size, digest)
        if digest.copy().hexdigest() != known.sha256 or not all(
            self._kept(piece.name, piece.size, hint) for piece in known.pieces
        ):
            return "", None
        _hash_range(fd, known.size, size - known.size, digest)
        parts, start = [(piece.sha256, piece.size) for piece in known.pieces], known.size
        while len(parts) > 1 and parts[-1][1] <= size - start:
            start -= parts.pop()[1]
        while start < size:
            data = os.pread(fd, min(_PART, size - start), start)
            if not data:
                return "", None
            sha256 = hashlib.sha256(data).hexdigest()
            if not self._kept(sha256, len(data), hint):
                batch.add_bytes(sha256, data)
            parts.append((sha256, len(data)))
            start += len(data)
        return digest.hexdigest(), parts

    def _kept(self, name: str, size: int, hint: _Hint) -> bool:
        """Whether the storage has the blob, and no collector is about to take it."""
        if not self.storage.near:
            return hint.assume(name)
        if name not in hint.looked:
            hint.looked[name] = self._has(name, size)
        return hint.looked[name]

    def _has(self, name: str, size: int) -> bool:
        key = blob_key(name)
        if self.storage.size(key) != size:
            return False
        if isinstance(self.storage, LocalStorage):
            return True
        # Without locks an old blob that no manifest names may be collected at this moment: send it again.
        when = self.storage.modified(key)
        return when is not None and time.time() - when < _GC_AGE / 2

    def _commit(self, draft: Manifest, *, keep: bool) -> tuple[Manifest, bool]:
        """Create the next manifest of the draft's path, unless it would say nothing new: then the one that counts.

        Raises DriveStaleEpoch, and DriveConflict if other writers were faster again and again.
        """
        component, path, name = draft.component, draft.path, chain_key(draft.path)
        for turn in range(_COMMIT_TRIES):
            if turn and not self.storage.locked:
                time.sleep(random.uniform(0, 0.02 * min(turn, 10)))  # writers that were in each other's way part
            with self.storage.commit_lock():
                look = self._load()
                index, chain = look.index, look.chains.get((component, name), _Chain(component, name, []))
                epoch = self._check_epoch(look, component, path, draft.epoch)
                newest = index.chains(component).get(path)
                unfinished = index.partial(component, path)
                view = index.view(component, draft.partial).at(path)
                entries = draft.entries
                if keep and view is not None and view.is_dir:
                    entries = _merged(view.entries, entries)
                manifest = msgspec.structs.replace(
                    draft,
                    # torn, corrupt and shut out manifests have their numbers too
                    version=1 + max(chain.versions, default=0),
                    serial=1 + index.last_serial(component),
                    epoch=epoch,
                    at=time.time(),
                    entries=entries,
                    format=format_of(entries),
                )
                current = unfinished if draft.partial and unfinished is not None else newest
                if current is not None and view is current and _unchanged(current, manifest):
                    if draft.partial or unfinished is None:
                        return current, False
                key = self._key(component, name, None if draft.partial else manifest.version)
                if draft.partial:
                    done = self.storage.replace(key, encode(manifest), chain.signature)
                else:
                    done = self.storage.create(key, encode(manifest))
                if not done:
                    continue
                if not self.storage.locked and not self._let_through(manifest, draft.epoch, key):
                    continue
                if unfinished is not None and not draft.partial:
                    self.storage.remove(self._key(component, name, None))
                if unfinished is not None:
                    self._garbage.update(unfinished.blobs)
                return manifest, True
        raise DriveConflict(f"{path!r} is being published by too many writers at once", hint="try again")

    def _let_through(self, manifest: Manifest, epoch: int, key: str) -> bool:
        """A fence may have been set between the look and the commit: then it decides which of the two came first. What
        it shuts out is taken back; a writer that is not fenced may try again."""
        found = self._read(f"manifests/{manifest.component}/.fence")
        if not isinstance(found, Fence) or found.admits(chain_key(manifest.path), manifest):
            return True
        self.storage.remove(key)
        if not epoch:
            return False
        raise DriveStaleEpoch(
            f"{manifest.component} has been fenced at epoch {found.epoch}; a write of epoch {epoch} to "
            f"{manifest.path!r} is refused",
            hint="a newer incarnation of it has taken over",
        )

    def _check_assumed(self, look: _Look, manifest: Manifest, assumed: set[str]) -> None:
        """Blobs that were not sent, because a manifest named them when the publish began: if that manifest is still
        there, now that ours names them too, no collector can have taken them. Else they are looked at."""
        if not assumed:
            return
        relied = [
            self._key(m.component, chain_key(m.path), None if m.partial else m.version)
            for m in look.index.counting(manifest.component)
            if not assumed.isdisjoint(m.blobs)
        ]
        there = self.storage.listing(f"manifests/{manifest.component}")
        if all(key in there and not key.endswith("/partial.json") for key in relied):
            return
        for name in assumed:
            if self.storage.size(blob_key(name)) is None:
                self._hints.clear()
                raise DriveConflict(
                    f"{manifest.path!r}: bytes that had been published before were removed meanwhile",
                    hint="publish it again",
                )

    # ---- fetch ----------------------------------------------------------------------------------------------------

    def fetch(
        self,
        manifest: Manifest,
        dest: Path,
        *,
        subpath: str | None = None,
        overwrite: bool = True,
        skip: Callable[[str], bool] | None = None,
        progress: Progress | None = None,
    ) -> Names:
        """Put a version's files at `dest`, which is the place of the manifest's path itself (a file, or the folder).

        Only what differs is written, each file verified and then renamed into place; other files stay. `subpath`: only
        that part of the manifest, `dest` being its place. `skip(name)`: leave that file alone. `progress(done, total)`:
        told of the bytes that are written. Returns the names that were written, as in the manifest. With
        `overwrite=False` a local file that differs raises DriveConflict before anything is written. Raises
        DriveNotFound (no such subpath; a version that is no longer kept), DriveCorrupt, DriveUnavailable (no room).
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
            todo: Todo = []
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
            _refuse_impossible([(entry, target) for _, entry, target in todo], cut, dest)
            if cut.is_dir:
                dest.mkdir(parents=True, exist_ok=True)
            tick = None if progress is None else _counter(progress, sum(entry.size for _, entry, _ in todo))
            for folder in {target.parent for _, _, target in todo}:
                folder.mkdir(parents=True, exist_ok=True)
                sweep(folder)
            for (name, entry, target), data in self._arrivals(cut, todo):
                self._fetch_one(cut, entry, target, data, tick)
                written.append(name)
        return written

    def _arrivals(self, manifest: Manifest, todo: Todo) -> Iterator[tuple[tuple[str, Entry, Path], bytes | None]]:
        """What is to be written, the bytes of small files with it where asking for several at once pays."""
        rest: Todo = []
        small: Todo = []
        packed: dict[tuple[str, int], Todo] = {}
        for row in todo:
            entry = row[1]
            if entry.pack is not None:
                packed.setdefault((entry.pack[0], entry.pack[2]), []).append(row)
            elif self.storage.near or entry.size > _SMALL or entry.parts:
                rest.append(row)
            else:
                small.append(row)
        keys = [blob_key(entry.pieces[0].name) for _, entry, _ in small]
        for row, (_, data) in zip(small, self.storage.read_many(keys), strict=True):
            if data is None:
                raise self._bytes_gone(manifest, row[1])
            yield row, data
        whole = {pack: rows for pack, rows in packed.items() if 2 * sum(row[1].size for row in rows) >= pack[1]}
        # packs are large: few at a time
        packs = self.storage.read_many([blob_key(pack) for pack, _ in whole], 4)
        for rows, (_, data) in zip(whole.values(), packs, strict=True):
            if data is None:
                raise self._bytes_gone(manifest, rows[0][1])
            for row in rows:
                assert row[1].pack is not None
                offset = row[1].pack[1]
                yield row, data[offset : offset + row[1].size]
        for pack in packed.keys() - whole.keys():
            for row in packed[pack]:
                try:
                    yield row, self._packed_bytes(row[1])
                except FileNotFoundError:
                    raise self._bytes_gone(manifest, row[1]) from None
        for row in rest:
            yield row, None

    def _packed_bytes(self, entry: Entry) -> bytes:
        assert entry.pack is not None
        pack, offset, _ = entry.pack
        return self.storage.read_range(blob_key(pack), offset, entry.size) if entry.size else b""

    def _fetch_one(self, manifest: Manifest, entry: Entry, target: Path, data: bytes | None, tick: Tick | None) -> None:
        with _beside(target, entry, resumed=not self.storage.near) as (tmp, fd):
            if data is not None:
                sha256 = hashlib.sha256(data).hexdigest()
                if len(data) == entry.size and sha256 == entry.sha256:
                    write_all(fd, data)
                if tick is not None:
                    tick(len(data))
            else:
                sha256 = self._fetch_blobs(manifest, entry, target, fd, tick)
            if sha256 != entry.sha256:
                raise self._bytes_wrong(manifest, entry)
            if entry.mtime_ns:
                os.utime(fd, ns=(entry.mtime_ns, entry.mtime_ns))
            crash_point("drive.file.written")
            os.rename(tmp, target)
            self._remember(str(target), os.fstat(fd), entry.sha256)
        crash_point("drive.file.renamed")

    def _fetch_blobs(self, manifest: Manifest, entry: Entry, target: Path, fd: int, tick: Tick | None) -> str:
        try:
            if entry.parts:
                return self._fetch_parts(entry, target, fd, tick)
            begun, key = os.fstat(fd).st_size, blob_key(entry.pieces[0].name)
            sha256 = self.storage.fetch(key, fd, entry.size, tick)
            if begun and sha256 != entry.sha256:  # what an earlier fetch had left was no beginning of it
                os.ftruncate(fd, 0)
                sha256 = self.storage.fetch(key, fd, entry.size)
            return sha256
        except FileNotFoundError:
            raise self._bytes_gone(manifest, entry) from None
        except DriveCorrupt:
            raise self._bytes_wrong(manifest, entry) from None

    def _fetch_parts(self, entry: Entry, target: Path, fd: int, tick: Tick | None) -> str:
        """A file that grows: the parts that the file at its place has already are taken from there."""
        digest = hashlib.sha256()
        os.ftruncate(fd, 0)
        os.lseek(fd, 0, os.SEEK_SET)
        offset = 0
        for name, sha256, size in entry.pieces:
            piece = _piece_of(target, offset, size, sha256)
            if piece is None:
                with self.storage.open_checked(blob_key(name), sha256, size) as file:
                    while data := file.read(_SMALL):
                        digest.update(data)
                        write_all(fd, data)
            else:
                digest.update(piece)
                write_all(fd, piece)
            if tick is not None:
                tick(size)
            offset += size
        return digest.hexdigest()

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
                    self._remember(str(target), status, entry.sha256)
                    return True
        if not overwrite:
            raise DriveConflict(f"{target} exists and differs from the Drive's", hint="overwrite=True replaces it")
        return False

    def _remember(self, target: str, status: os.stat_result, sha256: str) -> None:
        """This process has seen these bytes there; a write after this moment changes the file's time."""
        if time.time_ns() - status.st_mtime_ns > _tick(status):
            self._placed[target] = (_placed(status), sha256)
        else:
            self._placed.pop(target, None)

    def open(self, manifest: Manifest, name: str | None = None) -> BinaryIO:
        """One file of a version, opened for reading (it can seek); its bytes are verified before this returns."""
        entry = manifest.entry(name) if name is not None else (manifest.entries[0] if not manifest.is_dir else None)
        if entry is None:
            raise DriveNotFound(f"{manifest.path!r} version {manifest.version} has no file {name or ''!r}")
        with self._explained("read"), self.storage.shared():
            try:
                if entry.pack is not None:
                    data = self._packed_bytes(entry)
                    if hashlib.sha256(data).hexdigest() != entry.sha256:
                        raise DriveCorrupt(f"{entry.name} does not match its checksum")
                    return BytesIO(data)
                if entry.parts:
                    return self._joined(entry)
                return self.storage.open_checked(blob_key(entry.pieces[0].name), entry.sha256, entry.size)
            except FileNotFoundError:
                raise self._bytes_gone(manifest, entry) from None
            except DriveCorrupt:
                raise self._bytes_wrong(manifest, entry) from None

    def _joined(self, entry: Entry) -> BinaryIO:
        file = tempfile.TemporaryFile()
        try:
            if self._fetch_parts(entry, Path(os.devnull), file.fileno(), None) != entry.sha256:
                raise DriveCorrupt(f"{entry.name} does not match its checksum")
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def link(self, manifest: Manifest, *, seconds: int = 3600) -> str | None:
        """A URL that gives the file of this manifest to whoever has it, for that long. None where the storage has no
        such thing (only buckets have), and for a folder or an unfinished file that grows."""
        if manifest.is_dir or manifest.entries[0].parts:
            return None
        name = manifest.path.rpartition("/")[2]
        entry = manifest.entries[0]
        with self._explained("read"):
            if entry.pack is not None and self.storage.link("", seconds=1, filename="") is not None:
                with self.open(manifest) as file:  # a link speaks of an object of its own, garbage from tomorrow on
                    self.storage.create(blob_key(entry.sha256), file.read())
            return self.storage.link(blob_key(entry.blob or entry.sha256), seconds=seconds, filename=name)

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

    def verify(
        self,
        path: str,
        *,
        component: str | None = None,
        version: int | None = None,
        progress: Progress | None = None,
    ) -> int:
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
        with self._explained("read"), self.storage.shared():
            each = {
                piece: (manifest, entry, piece)
                for manifest in manifests
                for entry in manifest.entries
                for piece in entry.pieces
            }
            rows = list(each.values())
            tick = None if progress is None else _counter(progress, sum(piece.size for _, _, piece in rows))
            for manifest, entry, right in self._hashes(rows):
                if right is None:
                    raise self._bytes_gone(manifest, entry)
                if not right:
                    raise self._bytes_wrong(manifest, self._culprit(manifest, entry))
                if tick is not None:
                    tick(sum(piece.size for piece in entry.pieces))
            count = sum(len(manifest.entries) for manifest in manifests)
        return count

    def _culprit(self, manifest: Manifest, entry: Entry) -> Entry:
        """Which file of a damaged pack it is."""
        if entry.pack is None:
            return entry
        for other in manifest.entries:
            if other.pack is not None and other.pack[0] == entry.pack[0]:
                if hashlib.sha256(self._packed_bytes(other)).hexdigest() != other.sha256:
                    return other
        return entry

    def _hashes(self, rows: Rows) -> Iterator[tuple[Manifest, Entry, bool | None]]:
        """Whether each blob is what it shall be; None if it is missing."""
        small = [] if self.storage.near else [row for row in rows if row[2].size <= _SMALL]
        for (manifest, entry, piece), (_, data) in zip(
            small, self.storage.read_many([blob_key(row[2].name) for row in small]), strict=True
        ):
            yield manifest, entry, None if data is None else hashlib.sha256(data).hexdigest() == piece.sha256
        for manifest, entry, (name, sha256, size) in rows:
            if self.storage.near or size > _SMALL:
                try:
                    yield manifest, entry, self.storage.digest(blob_key(name), size) == sha256
                except FileNotFoundError:
                    yield manifest, entry, None
                except DriveCorrupt:
                    yield manifest, entry, False

    def _bytes_wrong(self, manifest: Manifest, entry: Entry) -> DriveCorrupt:
        # Out of the way, so that publishing the file again brings good bytes; the bad ones stay for a look.
        self._hints.clear()
        aside = entry.pieces[0].name
        for name, sha256, size in entry.pieces:
            with suppress(FileNotFoundError):
                try:
                    good = self.storage.digest(blob_key(name), size) == sha256
                except DriveCorrupt:
                    good = False
                if not good:
                    aside = name
                    self.storage.set_aside(blob_key(name), f"corrupt/{name}")
                    self._tell_broken(name)
        return DriveCorrupt(
            f"the bytes of {manifest.drive_path(entry)!r} ({manifest.component}, version {manifest.version}) "
            "do not match their checksum",
            hint=f"publish it again; the damaged bytes are in {self.url}/corrupt/{aside}",
        )

    def _tell_broken(self, name: str) -> None:
        if not self.storage.near:
            self.storage.create(f"manifests/{_BROKEN}/{name}", b"")

    def _tell_whole(self, names: set[str]) -> None:
        """They have been sent again."""
        self.storage.remove_many([f"manifests/{_BROKEN}/{name}" for name in sorted(names)])

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
        for piece in entry.pieces:
            if self.storage.size(blob_key(piece.name)) != piece.size:
                self._tell_broken(piece.name)
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
            look = self._look(self.storage.listing(f"manifests/{component}"))
            chain = look.chains.get((component, name))
            if chain is not None and (len(chain.versions) > KEEP or chain.partial or self._ends(look, chain)):
                self._prune_chain(look, chain)
        self._collect()

    def _ends(self, look: _Look, chain: _Chain) -> bool:
        newest = self._read_chain(look, chain, chain.versions[-1]) if chain.versions else None
        return isinstance(newest, Manifest) and newest.deleted

    def _prune_chain(self, look: _Look, chain: _Chain) -> None:
        component, name = chain.component, chain.key
        found = {v: self._read_chain(look, chain, v) for v in chain.versions}
        good = [v for v, manifest in found.items() if isinstance(manifest, Manifest)]
        tombs = [v for v, manifest in found.items() if isinstance(manifest, Manifest) and manifest.deleted]
        oldest = max(good[-KEEP] if len(good) >= KEEP else 0, tombs[-1] if tombs else 0)
        for version, manifest in found.items():
            if version < oldest:
                if isinstance(manifest, Manifest):
                    self._garbage.update(manifest.blobs)
                self.storage.remove(self._key(component, name, version))
                self._parsed.pop(self._key(component, name, version), None)
                crash_point("drive.prune.manifest")
        newest = found[good[-1]] if good else None
        partial = self._read_chain(look, chain, None) if chain.partial else None
        if isinstance(partial, Manifest) and isinstance(newest, Manifest) and partial.serial < newest.serial:
            self._garbage.update(partial.blobs)
            self.storage.remove(self._key(component, name, None))

    def _collect(self) -> None:
        """After a publish. Where nothing can be locked what became garbage just now is too young to be removed: there
        one writer a day looks for all of it."""
        if isinstance(self.storage, LocalStorage):
            if self._garbage:
                self._remove_blobs(set(self._garbage), _GC_AGE)
            return
        self._garbage.clear()
        if time.monotonic() < self._gc_look:
            return
        self._gc_look = time.monotonic() + _GC_LOOK
        last = self.storage.modified(_GC_MARK)
        if last is not None and time.time() - last < _GC_AGE:
            return
        seen = self.storage.signature(_GC_MARK) if last is not None else None
        if self.storage.replace(_GC_MARK, f"{time.time()}".encode(), seen) and last is not None:
            self.gc()

    def gc(self, *, min_age: float = _GC_AGE) -> int:
        """Remove every blob that no kept version names, and what interrupted writers left; returns the number of blobs.

        On local disk a blob goes only while nobody publishes or fetches (else nothing is removed this time); elsewhere
        only if it is older than `min_age` seconds, which must be longer than any publish takes.
        """
        with self._explained("written to"):
            names = {key.rpartition("/")[2] for key in self.storage.listing("blobs")}
            return self._remove_blobs(names, min_age, sweep=True)

    def _remove_blobs(self, candidates: set[str], min_age: float, *, sweep: bool = False) -> int:
        with self.storage.exclusive() as alone:
            if not alone and isinstance(self.storage, LocalStorage):
                return 0
            if sweep:
                self.storage.sweep()
            if not alone:
                horizon = time.time() - min_age
                old = {key.rpartition("/")[2] for key, when in self.storage.ages("blobs").items() if when <= horizon}
                candidates = candidates & old
            if not candidates:
                return 0
            live, certain = self._live()
            if not certain:
                return 0
            dead = sorted(candidates - live)
            if not alone:
                self.storage.remove_many([blob_key(name) for name in dead])
            for name in dead if alone else ():
                self.storage.remove(blob_key(name))
                crash_point("drive.prune.blob")
            self._garbage -= candidates
        return len(dead)

    def _live(self) -> tuple[set[str], bool]:
        """The blobs that some manifest names; not certain if one cannot be read."""
        live: set[str] = set()
        certain = True
        for _, _, found in self._valid(self._look(self.storage.listing("manifests"))):
            if isinstance(found, Manifest):
                live |= found.blobs
            else:
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


def _sample(fd: int, size: int) -> str:
    """Checksum of a few places of a file."""
    digest = hashlib.sha256()
    for n in range(_SPOTS):
        digest.update(os.pread(fd, _SPOT, max(0, size - _SPOT) * n // (_SPOTS - 1)))
    return digest.hexdigest()[:16]


def _hash_range(fd: int, start: int, length: int, digest: Any) -> None:
    while length > 0 and (data := os.pread(fd, min(length, 1 << 20), start)):
        digest.update(data)
        start += len(data)
        length -= len(data)


@contextmanager
def _beside(target: Path, entry: Entry, *, resumed: bool) -> Iterator[tuple[Path, int]]:
    """A file beside the target, to be renamed to it; gone at the end if it was not. Of a large one that comes a long
    way the beginning is kept for the next fetch, unless somebody else is fetching the same."""
    mode = 0o777 if entry.executable else 0o666
    tmp = draft_in(target.parent)
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    resumed = resumed and entry.size >= _RESUMED
    if resumed:
        kept = target.parent / (PREFIX + hashlib.sha256(f"{target.name}/{entry.sha256}".encode()).hexdigest()[:32])
        fd = os.open(kept, flags, mode)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            resumed = False
        else:
            tmp = kept
    if not resumed:
        fd = os.open(tmp, flags | os.O_EXCL, mode)
    try:
        yield tmp, fd
    except BaseException as exc:
        if not resumed or isinstance(exc, (DriveCorrupt, DriveNotFound)):
            with suppress(FileNotFoundError):
                os.unlink(tmp)
        raise
    finally:
        os.close(fd)


def _piece_of(file: Path, offset: int, size: int, sha256: str) -> bytes | None:
    """These bytes, if the file has them there."""
    if size > _PART:
        return None
    try:
        with open(file, "rb") as source:
            data = os.pread(source.fileno(), size, offset)
    except OSError:
        return None
    return data if hashlib.sha256(data).hexdigest() == sha256 else None


def _refuse_impossible(todo: list[tuple[Entry, Path]], manifest: Manifest, dest: Path) -> None:
    """Raise, before anything is written, if the disk has no room for it, or takes two of its names for one."""
    folder = dest
    while not folder.is_dir():
        folder = folder.parent
    free = os.statvfs(folder)
    need = sum(entry.size for entry, _ in todo)
    if need > free.f_bavail * free.f_frsize:
        raise DriveUnavailable(
            f"{manifest.path!r} does not fit: {need} bytes are to be written to {folder}, "
            f"{free.f_bavail * free.f_frsize} are free",
            hint="the disk is full",
        )
    seen: dict[str, str] = {}
    for name in sorted({above for entry in manifest.entries for above in ancestors(entry.name)}):
        other = seen.setdefault(name.casefold(), name)
        if other != name and manifest.is_dir and folds_case(folder):
            raise DrivePathError(
                f"{manifest.path!r} holds {other!r} and {name!r}, which are one file on this disk ({folder})",
                hint="fetch it to a disk that tells upper and lower case apart",
            )


class _Hint:
    """What is known of a source's files: `base` as the Drive has them, `trusted` with times of this very folder.

    Far away no blob is looked at that a manifest `named` when the publish began; such blobs are `assumed` to be there.
    """

    __slots__ = (
        "_sparse",
        "assumed",
        "base",
        "leave",
        "looked",
        "named",
        "own",
        "packed",
        "samples",
        "sizes",
        "trusted",
    )

    def __init__(self, base: dict[str, Entry], trusted: dict[str, Entry]) -> None:
        self.base = base
        self.trusted = trusted
        self.named: set[str] = set()
        self.sizes: set[int] = set()
        """Of files of which no sample is known."""
        self.samples: set[tuple[int, str]] = set()
        """Size and sample of the others, and of those that are sent by this publish."""
        self.own: dict[str, str] = {}
        """Checksum -> name of the blob, where that is another one."""
        self.assumed: set[str] = set()
        self.looked: dict[str, bool] = {}
        self.leave: frozenset[str] = frozenset()
        self.packed = {entry.sha256: entry.pack for entry in base.values() if entry.pack is not None}
        """Where in which pack a content lies."""
        self._sparse: set[str] = set()

    def know(self, entry: Entry, broken: Collection[str]) -> None:
        if entry.sample:
            self.samples.add((entry.size, entry.sample))
        elif not entry.parts:
            self.sizes.add(entry.size)
        for name, sha256, _ in entry.pieces:
            if name not in broken:
                self.named.add(name)
            if name != sha256 and (name not in broken or sha256 not in self.own):
                self.own[sha256] = name

    def likely(self, size: int, sample: str) -> bool:
        """Whether a file may have been sent already."""
        return size in self.sizes or (size, sample) in self.samples

    def weigh(self, names: Collection[str]) -> None:
        """Do not count on packs of which these files need little."""
        wanted: dict[tuple[str, int], int] = {}
        for name, entry in self.base.items():
            if entry.pack is not None:
                pack, _, length = entry.pack
                wanted[pack, length] = wanted.get((pack, length), 0) + (entry.size if name in names else 0)
        self._sparse = {pack for (pack, length), size in wanted.items() if size < _SPARSE * length}
        for sha256, (pack, _, _) in list(self.packed.items()):
            if pack in self._sparse:
                del self.packed[sha256]

    def sparse(self, entry: Entry) -> bool:
        return entry.pack is not None and entry.pack[0] in self._sparse

    def assume(self, sha256: str) -> bool:
        if sha256 in self.named:
            self.assumed.add(sha256)
            return True
        return False


class _Packer:
    """Puts small files together, so that a thousand of them are one write, and far away one request.

    `known`: contents that lie in a pack already; those of this publish are added.
    """

    def __init__(self, batch: Batch, known: dict[str, tuple[str, int, int]]) -> None:
        self._batch = batch
        self._known = known
        self._waiting: dict[str, bytes] = {}
        self._size = 0

    def has(self, sha256: str) -> bool:
        return sha256 in self._waiting

    def add(self, sha256: str, data: bytes) -> None:
        if self._size + len(data) > _PART:
            self.close()
        self._waiting[sha256] = data
        self._size += len(data)

    def close(self) -> None:
        if len(self._waiting) < _PACK_FILES:
            for sha256, data in self._waiting.items():
                self._batch.add_bytes(sha256, data)
        else:
            whole = b"".join(self._waiting.values())
            pack, offset = hashlib.sha256(whole).hexdigest(), 0
            self._batch.add_bytes(pack, whole)
            for sha256, data in self._waiting.items():
                self._known[sha256] = (pack, offset, len(whole))
                offset += len(data)
        self._waiting.clear()
        self._size = 0

    def placed(self, entry: Entry) -> Entry:
        """The entry, with the place where its bytes went."""
        pack = self._known.get(entry.sha256)
        if pack is None or entry.pack is not None or entry.parts or entry.size >= _APPENDED:
            return entry
        return msgspec.structs.replace(entry, pack=pack)


def _tally(progress: Progress, source: Path) -> Tick:
    """Bytes as they go by -> (done, total)."""
    if source.is_dir():
        total = sum(entry.stat().st_size for entry in source.rglob("*") if entry.is_file())
    else:
        total = source.stat().st_size
    return _counter(progress, total)


def _counter(progress: Progress, total: int) -> Tick:
    done = 0
    progress(0, total)

    def tick(count: int) -> None:
        nonlocal done
        done += count
        progress(min(done, total), total)

    return tick


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
        return m.deleted, m.is_dir, m.partial, m.call, m.host, m.cwd, len(m.entries)

    return told(old) == told(new) and all(
        a.name == b.name and a.same_bytes(b) for a, b in zip(old.entries, new.entries, strict=True)
    )


def _placed_as(entries: Entries, manifest: Manifest) -> Entries:
    """These entries, with the blobs that the manifest names for the same bytes."""
    there = {entry.name: entry for entry in manifest.entries}

    def placed(mine: Entry) -> Entry:
        other = there[mine.name]
        return msgspec.structs.replace(mine, blob=other.blob, parts=other.parts, pack=other.pack)

    return [placed(entry) for entry in entries]


def _merged(old: list[Entry], new: list[Entry]) -> Entries:
    names = {entry.name for entry in new}
    folders = {folder for name in names for folder in ancestors(name)} - names
    kept = [entry for entry in old if names.isdisjoint(ancestors(entry.name)) and entry.name not in folders]
    return sorted([*new, *kept], key=lambda entry: entry.name)


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _holds(folder: Path, drive: Path) -> bool:
    """Whether publishing the folder would publish the Drive."""
    return _inside(str(drive), str(folder)) and OWN_FOLDER not in drive.relative_to(folder).parts


def files_in(source: Path, limit: str | None = None) -> Iterator[tuple[str, Path]]:
    """Every file below a folder that can be published, by relative name. Links are followed as long as they stay within
    `limit` (default: the folder). Raises DrivePathError."""
    limit = os.path.realpath(source) if limit is None else limit
    stack: list[tuple[str, frozenset[str]]] = [("", frozenset({str(source)}))]
    while stack:
        folder, seen = stack.pop()
        try:
            with os.scandir(source / folder) as found:
                items = sorted(found, key=lambda item: item.name)
        except FileNotFoundError:
            continue
        for item in items:
            if item.name.startswith(PREFIX) or item.name == OWN_FOLDER:
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
