"""What one version of a published path consists of, and which version a path means. PURE: no I/O, no clock.

A component publishes paths. Each published path has a chain of manifests, numbered 1, 2, 3 ...; a manifest names every
file of that version with its size and sha256. Beside the chain there may be one *partial* manifest, replaced again and
again while a call runs, and superseded by the next complete version. Deleting a path adds one with `deleted` set.

Chains of one component may overlap (`logs`, and later `logs/best.pt`). Every commit of a component therefore carries a
`serial`, counted up, and the component's files are an overlay: a newer manifest decides about everything at and below
its path.

On disk a manifest is one line of JSON and one line with its checksum. A file without the second line was torn by a
crash and counts as never committed; one whose checksum is wrong is corrupt.
"""

from __future__ import annotations

import builtins
import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from orch_drive.errors import DriveAmbiguous, DriveCorrupt, DriveNotFound, DrivePathError

__all__ = [
    "FORMAT",
    "KEEP",
    "NO_FENCE",
    "Blob",
    "Changes",
    "Entry",
    "Fence",
    "FileInfo",
    "Manifest",
    "ManifestIndex",
    "VersionInfo",
    "ancestors",
    "chain_key",
    "chain_path",
    "check_component",
    "check_name",
    "check_path",
    "decode",
    "decode_fence",
    "diff",
    "encode",
    "encode_fence",
    "format_of",
    "from_json",
    "glob_regex",
    "is_glob",
    "narrow",
    "to_json",
]

FORMAT = 2
"""The newest that can be read. 1 is written unless an entry needs 2 (`Entry.blob`): who knows only 1 refuses such a
manifest, and collects no garbage beside it."""
KEEP = 10
"""Complete versions kept of each published path."""

_OWN = re.compile(r"u[0-9a-f-]{8,80}")
_COMPONENT = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
_MAX_PATH = 4096
_MAX_SEGMENT = 255


class Blob(NamedTuple):
    """A piece of content in storage."""

    name: str
    """What it lies under: its checksum, or a name of its own."""
    sha256: str
    size: int


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One file of a version. `name` is relative to the manifest's path; a published file has its own last name."""

    name: str
    size: int
    sha256: str
    mtime_ns: int = 0
    ctime_ns: int = 0
    """Of the publisher's file; 0 when its times were too young to prove that it will not change unseen."""
    executable: bool = False
    parts: list[tuple[str, int]] = []
    """(sha256, size) of the blobs that make up a file which grows while it is published; else it is one blob."""
    pack: tuple[str, int, int] | None = None
    """Of a small file that was published together with others: sha256 of the blob that holds them, where in it the file
    begins, the blob's size."""
    blob: str = ""
    """The name of its blob (of the first one, if there are `parts`) where that is not the checksum, because the bytes
    were sent before it was known."""
    sample: str = ""
    """Checksum of a few places of a large file: where it is another one, the whole need not be compared."""

    @property
    def pieces(self) -> list[Blob]:
        """The blobs that its bytes are in, in order."""
        if self.pack is not None:
            return [Blob(self.pack[0], self.pack[0], self.pack[2])]
        found = [Blob(sha256, sha256, size) for sha256, size in self.parts or [(self.sha256, self.size)]]
        if self.blob:
            found[0] = found[0]._replace(name=self.blob)
        return found

    def same_bytes(self, other: Entry) -> bool:
        return self.sha256 == other.sha256 and self.size == other.size and self.executable == other.executable


class Manifest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One version of one path of one component. Times are seconds since the epoch."""

    drive: str
    component: str
    path: str
    version: int
    serial: int
    """Counts every commit of the component, partial ones too: it changes whenever the content does. For `reload`."""
    is_dir: bool
    entries: list[Entry] = []
    partial: bool = False
    deleted: bool = False
    epoch: int = 0
    call: str | None = None
    host: str = ""
    cwd: str = ""
    """The folder that it was published from (the one that `path` is relative to), on `host`."""
    at: float = 0.0
    within: str = ""
    """Set by `narrow`: the published path that this manifest is a cut of."""
    format: int = 1

    @property
    def size(self) -> int:
        """Bytes of all its files."""
        return sum(entry.size for entry in self.entries)

    @property
    def blobs(self) -> set[str]:
        """The names of all blobs that it needs."""
        return {piece.name for entry in self.entries for piece in entry.pieces}

    def drive_path(self, entry: Entry) -> str:
        """The entry's path on the Drive."""
        if not self.is_dir:
            return self.path
        return entry.name if self.path == "." else f"{self.path}/{entry.name}"

    def entry(self, name: str) -> Entry | None:
        return next((entry for entry in self.entries if entry.name == name), None)


class Fence(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a component may still say: everything from `epoch` on, and what it had said when the fence was set."""

    epoch: int
    heads: dict[str, int] = {}
    """The last version of each chain at that moment, by chain key."""
    partials: dict[str, int] = {}
    """The serial of its unfinished version."""
    void: dict[str, list[int]] = {}
    """Versions up to that one which an earlier fence had shut out."""

    def admits(self, chain: str, manifest: Manifest) -> bool:
        """Whether a manifest counts. Epoch 0 is not fenced."""
        if not manifest.epoch or manifest.epoch >= self.epoch:
            return True
        if manifest.partial:
            return manifest.serial == self.partials.get(chain)
        return manifest.version <= self.heads.get(chain, 0) and manifest.version not in self.void.get(chain, ())


NO_FENCE = Fence(epoch=0)


class Changes(msgspec.Struct, frozen=True):
    """Names that differ between two versions."""

    added: list[str]
    changed: list[str]
    removed: list[str]

    def __bool__(self) -> bool:
        return bool(self.added or self.changed or self.removed)


class VersionInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One version of a path, as `versions()` tells it. `at` is seconds since the epoch, `size` bytes."""

    version: int
    at: float
    size: int
    files: int
    component: str
    path: str
    call: str | None = None
    partial: bool = False


class FileInfo(msgspec.Struct, frozen=True, kw_only=True):
    """One file of a component's newest complete versions. `size` in bytes, `at` seconds since the epoch."""

    path: str
    size: int
    version: int
    component: str
    sha256: str
    at: float
    call: str | None = None


# ---- paths -------------------------------------------------------------------------------------------------------


def check_path(path: str) -> str:
    """The path in its one spelling: relative, with `/`, no `.` or empty parts; `.` is the whole Drive.

    Raises DrivePathError for an empty or absolute path, `..`, a backslash, NUL, and names no file system can hold.
    """
    if not isinstance(path, str):
        raise DrivePathError(f"a Drive path is a str, not {type(path).__name__}")
    if "\\" in path:
        raise DrivePathError(f"{path!r} contains a backslash", hint="use / between the parts of a Drive path")
    return check_name(path)


def check_name(name: str) -> str:
    """As `check_path`, but a backslash is an ordinary character: for names found in a directory."""
    if not name:
        raise DrivePathError("the path is empty", hint='use "." for everything')
    if "\0" in name:
        raise DrivePathError(f"{name!r} contains a NUL character")
    if name.startswith("/"):
        raise DrivePathError(f"{name!r} is absolute", hint="Drive paths are relative to the root folder")
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if ".." in parts:
        raise DrivePathError(f"{name!r} leaves the root folder (..)")
    try:
        sizes = [len(part.encode()) for part in parts]
    except UnicodeEncodeError as exc:
        raise DrivePathError(f"{name!r} is not valid UTF-8") from exc
    if max(sizes, default=0) > _MAX_SEGMENT or sum(sizes) > _MAX_PATH:
        raise DrivePathError(f"{name[:60]!r}... is too long: {_MAX_SEGMENT} bytes a name, {_MAX_PATH} a path")
    return "/".join(parts) or "."


def check_component(name: str) -> str:
    """The component's short name (`ui.trainer` for `root.ui.trainer`). Raises DrivePathError if it is none."""
    short = name.removeprefix("root.")
    if not _COMPONENT.fullmatch(short) or len(short) > 200:
        raise DrivePathError(f"{name!r} is no component's name", hint="letters, digits, - and _, joined by dots")
    return short


def ancestors(path: str) -> Iterator[str]:
    """The path itself, then each folder above it, `.` last."""
    while path != ".":
        yield path
        path = path.rpartition("/")[0] or "."
    yield "."


def _below(path: str, folder: str) -> bool:
    return folder == "." or path.startswith(folder + "/")


def _overlaps(one: str, other: str) -> bool:
    return one == other or _below(one, other) or _below(other, one)


def chain_key(path: str) -> str:
    """One file name that stands for a published path. Long ones end in a hash: any file system can hold them."""
    if path == ".":
        return "%2E"
    key = quote(path, safe=" ")
    if key.startswith("."):
        key = "%2E" + key[1:]
    if len(key) <= 120:
        return key
    return key[:100] + "~" + hashlib.sha256(path.encode()).hexdigest()[:40]


def chain_path(key: str) -> str | None:
    """The published path of a key; None for the long ones."""
    return unquote(key) if len(key) <= 120 else None


def is_glob(path: str) -> bool:
    return any(char in path for char in "*?[")


def glob_regex(pattern: str) -> re.Pattern[str]:
    """A shell pattern over whole paths: `*`, `?`, `[...]` stay within one name, `**` matches any number of folders."""
    out, i = "", 0
    while i < len(pattern):
        char, rest = pattern[i], pattern[i:]
        bracket = re.match(r"\[(!?)(\]?[^\]/]*)\]", rest)
        if rest.startswith("**/") and (i == 0 or pattern[i - 1] == "/"):
            out, i = out + "(?:[^/]+/)*", i + 3
        elif rest == "**" and (i == 0 or pattern[i - 1] == "/"):
            out, i = out + ".*", i + 2
        elif bracket:
            inside = re.sub(r"([\\\[\]^&|~])", r"\\\1", bracket[2])
            out, i = out + f"[{'^/' if bracket[1] else ''}{inside}]", i + bracket.end()
        else:
            out, i = out + {"*": "[^/]*", "?": "[^/]"}.get(char, re.escape(char)), i + 1
    try:
        return re.compile(out + r"\Z", re.DOTALL)
    except re.error as exc:
        raise DrivePathError(f"{pattern!r} is no pattern: {exc}") from exc


# ---- codec -------------------------------------------------------------------------------------------------------

_encoder = msgspec.json.Encoder()
_decoder = msgspec.json.Decoder(Manifest)


class TornManifest(Exception):
    """The file ends before its checksum: the writer died. It counts as never committed."""


def encode(manifest: Manifest) -> bytes:
    """The manifest as it lies in storage: a line of JSON, a line with the checksum."""
    return _sealed(manifest)


def encode_fence(fence: Fence) -> bytes:
    """The fence as it lies in storage."""
    return _sealed(fence)


def _sealed(value: Manifest | Fence) -> bytes:
    body = _encoder.encode(value)
    return body + b"\nsha256:" + hashlib.sha256(body).hexdigest().encode() + b"\n"


def _unsealed(data: bytes, name: str) -> bytes:
    body, _, rest = data.partition(b"\nsha256:")
    if not rest.endswith(b"\n"):
        raise TornManifest(name)
    if rest.strip() != hashlib.sha256(body).hexdigest().encode():
        raise DriveCorrupt(f"{name} does not match its checksum", hint="publish the path again")
    return body


def decode_fence(data: bytes) -> Fence:
    """The fence of stored bytes. Raises TornManifest, DriveCorrupt."""
    body = _unsealed(data, "the fence")
    try:
        return msgspec.json.decode(body, type=Fence)
    except msgspec.MsgspecError as exc:
        raise DriveCorrupt(f"this is no fence that this version of orch can read: {exc}") from exc


def decode(data: bytes, *, name: str = "manifest") -> Manifest:
    """The manifest of stored bytes. Raises TornManifest, DriveCorrupt naming `name`."""
    body = _unsealed(data, name)
    try:
        manifest = _decoder.decode(body)
        _check(manifest)
    except (msgspec.MsgspecError, DrivePathError) as exc:
        raise DriveCorrupt(f"{name} is no manifest that this version of orch can read: {exc}") from exc
    return manifest


def format_of(entries: Iterable[Entry]) -> int:
    """The oldest format that can say this."""
    return 2 if any(entry.blob for entry in entries) else 1


def to_json(manifest: Manifest) -> dict[str, Any]:
    """The manifest as plain JSON values, for messages."""
    value: dict[str, Any] = msgspec.to_builtins(manifest)
    return value


def from_json(value: dict[str, Any]) -> Manifest:
    """The manifest of plain JSON values. Raises DriveCorrupt."""
    try:
        manifest = msgspec.convert(value, Manifest)
        _check(manifest)
    except (msgspec.MsgspecError, DrivePathError) as exc:
        raise DriveCorrupt(f"not a manifest: {exc}") from exc
    return manifest


def _check(manifest: Manifest) -> None:
    if manifest.format > FORMAT:
        raise DriveCorrupt(f"manifest format {manifest.format} is newer than {FORMAT}", hint="update orch")
    for path in (manifest.path, *(entry.name for entry in manifest.entries)):
        if check_name(path) != path:
            raise DrivePathError(f"{path!r} is not in its plain form")
    for entry in manifest.entries:
        if entry.blob and (entry.pack is not None or not _OWN.fullmatch(entry.blob)):
            raise DrivePathError(f"{entry.blob!r} cannot be the blob of {entry.name!r}")


def diff(old: Manifest | None, new: Manifest) -> Changes:
    """What `new` adds, changes and removes, by name."""
    before = {entry.name: entry for entry in old.entries} if old is not None else {}
    after = {entry.name: entry for entry in new.entries}
    return Changes(
        added=[name for name in after if name not in before],
        changed=[name for name in after if name in before and not after[name].same_bytes(before[name])],
        removed=[name for name in before if name not in after],
    )


def narrow(manifest: Manifest, path: str) -> Manifest | None:
    """The part of a manifest that lies at or below a Drive path, as a manifest of that path; None if nothing does."""
    if path == manifest.path:
        return manifest
    within = manifest.within or manifest.path
    if _below(manifest.path, path):
        prefix = "" if path == "." else path + "/"
        cut = [msgspec.structs.replace(e, name=manifest.drive_path(e)[len(prefix) :]) for e in manifest.entries]
        return msgspec.structs.replace(manifest, path=path, is_dir=True, entries=cut, within=within)
    if not manifest.is_dir or not _below(path, manifest.path):
        return None
    name = path if manifest.path == "." else path[len(manifest.path) + 1 :]
    exact = manifest.entry(name)
    if exact is not None:
        entry = msgspec.structs.replace(exact, name=name.rpartition("/")[2])
        return msgspec.structs.replace(manifest, path=path, is_dir=False, entries=[entry], within=within)
    cut = [
        msgspec.structs.replace(entry, name=entry.name[len(name) + 1 :])
        for entry in manifest.entries
        if entry.name.startswith(name + "/")
    ]
    return msgspec.structs.replace(manifest, path=path, entries=cut, within=within) if cut else None


# ---- which version a path means ----------------------------------------------------------------------------------


class _Chain:
    """The versions of one published path."""

    __slots__ = ("complete", "partial")

    def __init__(self) -> None:
        self.complete: dict[int, Manifest] = {}
        self.partial: Manifest | None = None

    def newest(self, partial: bool) -> Manifest | None:
        complete = self.complete[max(self.complete)] if self.complete else None
        if partial and self.partial is not None and (complete is None or self.partial.serial > complete.serial):
            return self.partial
        return complete


class _View:
    """The files of one component: newer manifests decide about everything at and below their path."""

    __slots__ = ("dirs", "files", "manifests")

    def __init__(self, manifests: Iterable[Manifest]) -> None:
        self.manifests = sorted(manifests, key=lambda m: (m.serial, m.at, m.path), reverse=True)
        self.files: dict[str, tuple[Entry, Manifest]] = {}
        self.dirs: set[str] = set()
        decided: set[str] = set()
        for manifest in self.manifests:
            if manifest.is_dir and not manifest.deleted and decided.isdisjoint(ancestors(manifest.path)):
                self.dirs.update(ancestors(manifest.path))
            for entry in manifest.entries:
                path = manifest.drive_path(entry)
                above = list(ancestors(path))
                if path not in self.dirs and decided.isdisjoint(above):
                    self.files[path] = (entry, manifest)
                    self.dirs.update(above[1:])
            decided.add(manifest.path)
        # an older folder may lie where a newer file is
        self.dirs.difference_update(self.files)

    def holds(self, path: str) -> bool:
        return path in self.files or path in self.dirs

    def at(self, path: str) -> Manifest | None:
        """What the path means, as one manifest of exactly that path."""
        if path in self.files:
            return narrow(self.files[path][1], path)
        if path not in self.dirs:
            return None
        found = {name: pair for name, pair in self.files.items() if _below(name, path)}
        makers = {manifest.path: manifest for _, manifest in found.values()}
        touching = [m for m in self.manifests if _overlaps(m.path, path)]
        if not makers:  # an empty folder
            makers = {m.path: m for m in touching if m.is_dir and not m.deleted and path in ancestors(m.path)}
        newest = max(makers.values(), key=lambda m: (m.serial, m.at))
        serial = max(m.serial for m in touching)
        if len(makers) == 1 and newest.path == path and len(found) == len(newest.entries) and serial == newest.serial:
            return newest
        prefix = "" if path == "." else path + "/"
        entries = [msgspec.structs.replace(found[name][0], name=name[len(prefix) :]) for name in sorted(found)]
        one_folder = len({(m.host, m.cwd) for m in makers.values()}) == 1
        return msgspec.structs.replace(
            newest,
            path=path,
            is_dir=True,
            entries=entries,
            serial=serial,
            version=newest.version if len(makers) == 1 else serial,
            host=newest.host if one_folder else "",
            cwd=newest.cwd if one_folder else "",
            within=newest.path if len(makers) == 1 else ".",
        )

    def makers(self, path: str) -> set[str]:
        """The published paths whose manifests provide what is at or below the path."""
        if path in self.files:
            return {self.files[path][1].path}
        return {manifest.path for name, (_, manifest) in self.files.items() if _below(name, path)}


class ManifestIndex:
    """The manifests of one Drive, and the questions they answer without I/O.

    The flow server keeps one a Drive, so that `list()` and `versions()` work in a Flow; `DriveStore` fills one from
    storage. Paths are checked (DrivePathError); component names may be short or full. Not thread-safe.
    """

    def __init__(self, manifests: Iterable[Manifest] = ()) -> None:
        self._chains: dict[str, dict[str, _Chain]] = {}
        self._views: dict[tuple[str, bool], _View] = {}
        for manifest in manifests:
            self.add(manifest)

    def add(self, manifest: Manifest) -> None:
        """Learn of a version; known ones and ones that are too old to be kept change nothing. Any order."""
        chain = self._chains.setdefault(manifest.component, {}).setdefault(manifest.path, _Chain())
        if manifest.partial:
            if chain.partial is None or manifest.serial > chain.partial.serial:
                chain.partial = manifest
        else:
            chain.complete[manifest.version] = manifest
        versions = sorted(chain.complete)
        tombs = [version for version in versions if chain.complete[version].deleted]
        for version in versions:
            if version in versions[:-KEEP] or (tombs and version < tombs[-1]):
                del chain.complete[version]
        newest = chain.newest(partial=False)
        if chain.partial is not None and newest is not None and newest.serial > chain.partial.serial:
            chain.partial = None
        self._forget(manifest.component)

    def remove(self, component: str, path: str) -> None:
        """Forget every version of a published path."""
        component = check_component(component)
        self._chains.get(component, {}).pop(check_path(path), None)
        self._forget(component)

    def _forget(self, component: str) -> None:
        self._views.pop((component, False), None)
        self._views.pop((component, True), None)

    def view(self, component: str, partial: bool = False) -> _View:
        key = (component, partial)
        if key not in self._views:
            newest = (chain.newest(partial) for chain in self._chains.get(component, {}).values())
            self._views[key] = _View(manifest for manifest in newest if manifest is not None)
        return self._views[key]

    def components(self) -> builtins.list[str]:
        """Names of the components that have published something, sorted."""
        return sorted(self._chains)

    def current(self) -> builtins.list[Manifest]:
        """The newest complete version of each published path."""
        newest = (chain.newest(False) for chains in self._chains.values() for chain in chains.values())
        return [manifest for manifest in newest if manifest is not None]

    def chains(self, component: str) -> dict[str, Manifest]:
        """The newest complete manifest (a deletion too) of each path that the component published."""
        found = {path: chain.newest(False) for path, chain in self._chains.get(component, {}).items()}
        return {path: manifest for path, manifest in found.items() if manifest is not None}

    def partial(self, component: str, path: str) -> Manifest | None:
        """The partial manifest of exactly that published path."""
        chain = self._chains.get(component, {}).get(path)
        return chain.partial if chain is not None else None

    def last_serial(self, component: str) -> int:
        return max((manifest.serial for manifest in self.counting(component)), default=0)

    def last_epoch(self, component: str) -> int:
        """The newest epoch that the component has published in."""
        return max((manifest.epoch for manifest in self.counting(component)), default=0)

    def counting(self, component: str) -> builtins.list[Manifest]:
        """The newest complete manifest and the unfinished one of each path that the component published."""
        chains = self._chains.get(component, {}).values()
        found = (manifest for chain in chains for manifest in (chain.partial, chain.newest(False)))
        return [manifest for manifest in found if manifest is not None]

    def owners(self, path: str, *, partial: bool = False) -> builtins.list[str]:
        """The components that publish the path (a file, or a folder of files), sorted."""
        path = check_path(path)
        return [name for name in self.components() if self.view(name, partial).holds(path)]

    def resolve(
        self, path: str, *, component: str | None = None, version: int | None = None, partial: bool = False
    ) -> Manifest | None:
        """What the path means now (or in that version), as a manifest of exactly this path; None if there is nothing.

        `partial`: an unfinished version counts if it is newer. Raises DriveAmbiguous naming the owners.
        """
        path = check_path(path)
        if version is None:
            found = [
                manifest
                for name in ([check_component(component)] if component else self.components())
                if (manifest := self.view(name, partial).at(path)) is not None
            ]
        else:
            found = [
                m
                for m in self._history(path, component)
                if m.version == version and (m.within or m.path) in ancestors(path)
            ]
        owners = sorted({manifest.component for manifest in found})
        if len(owners) > 1:
            raise DriveAmbiguous(
                f"{path!r} is published by {', '.join(owners)}",
                hint=f"say whose: component_name={owners[0]!r}",
            )
        # one owner may have published it under several paths: the one closest to it counts
        return max(found, key=lambda m: len(m.within or m.path)) if found else None

    def _history(self, path: str, component: str | None) -> builtins.list[Manifest]:
        out: builtins.list[Manifest] = []
        for name in [check_component(component)] if component else self.components():
            chains = self._chains.get(name, {})
            makers = self.view(name).makers(path) or {above for above in ancestors(path) if above in chains}
            for maker in makers:
                for manifest in chains[maker].complete.values():
                    cut = None if manifest.deleted else narrow(manifest, path)
                    if cut is not None:
                        out.append(cut)
        return out

    def versions(self, path: str, *, component: str | None = None, partial: bool = False) -> builtins.list[VersionInfo]:
        """The complete versions that hold the path, oldest first; `partial` adds the unfinished one. All owners'."""
        path = check_path(path)
        found = self._history(path, component)
        if partial:
            names = [check_component(component)] if component else self.components()
            views = [self.view(name, True).at(path) for name in names]
            found += [manifest for manifest in views if manifest is not None and manifest.partial]
        found.sort(key=lambda m: (m.component, m.partial, m.serial))
        return [
            VersionInfo(
                version=m.version,
                at=m.at,
                size=m.size,
                files=len(m.entries),
                component=m.component,
                path=m.within or m.path,
                call=m.call,
                partial=m.partial,
            )
            for m in found
        ]

    def list(self, path: str = ".", *, component: str | None = None, recursive: bool = False) -> builtins.list[str]:
        """Paths on the Drive, sorted: of a folder its files and folders, of a pattern what matches, of a file itself.

        `recursive`: all files below instead. Nothing there: an empty list.
        """
        path = check_path(path)
        names = [check_component(component)] if component else self.components()
        out: set[str] = set()
        for view in map(self.view, names):
            if is_glob(path) and not view.holds(path):
                regex = glob_regex(path)
                tops = {name for name in (*view.files, *view.dirs) if name != "." and regex.match(name)}
                if recursive:
                    out.update(name for name in view.files if not tops.isdisjoint(ancestors(name)))
                else:
                    out.update(tops)
            elif path in view.files:
                out.add(path)
            elif recursive:
                out.update(name for name in view.files if _below(name, path))
            else:
                out.update(n for n in (*view.files, *view.dirs) if n != "." and (n.rpartition("/")[0] or ".") == path)
        return sorted(out)

    def files(self, component: str | None = None) -> builtins.list[FileInfo]:
        """Every file of the newest complete versions, sorted by path."""
        names = [check_component(component)] if component else self.components()
        return [
            FileInfo(
                path=path,
                size=entry.size,
                version=manifest.version,
                component=name,
                sha256=entry.sha256,
                at=manifest.at,
                call=manifest.call,
            )
            for name in names
            for path, (entry, manifest) in sorted(self.view(name).files.items())
        ]

    def missing(self, path: str, component: str | None = None) -> DriveNotFound:
        """The error for a path that nobody (or not this component) publishes."""
        owners = self.owners(path)
        who = f" of {check_component(component)}" if component else ""
        hint = f"{', '.join(owners)} has it" if owners else "list() shows what is there"
        return DriveNotFound(f"{path!r}{who} is not on the Drive", hint=hint)
