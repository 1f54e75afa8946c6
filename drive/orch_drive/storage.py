"""Where a Drive's bytes lie: one seam, `Storage`, over local disk, over fsspec, and (in `s3`) over a bucket.

    blobs/a/<sha256>                               content, named by its checksum, never changed
    blobs/u/u<...>                                 the same of a large file, sent before its checksum was known
    manifests/<component>/<path>/00000007.json     one complete version; creating it is the commit
    manifests/<component>/<path>/partial.json      the unfinished version, replaced
    manifests/<component>/.fence                   the epoch below which nothing more is accepted
    corrupt/<blob>                                 a blob whose bytes did not match, kept out of the way
    tmp/, lock, commit.lock                        local disk only

Order: the bytes are durable before the manifest that names them. On local disk that is fsync and rename; elsewhere an
object that was put is whole and durable, and "create only" is the store's own conditional write.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from orch_drive.crash import crash_point
from orch_drive.errors import DriveCorrupt, DrivePathError, DriveUnavailable

__all__ = [
    "Batch",
    "FsspecStorage",
    "LocalStorage",
    "Storage",
    "Tick",
    "Unlocked",
    "blob_key",
    "copy_hashed",
    "folds_case",
    "hash_whole",
    "open_storage",
    "write_all",
]

Tick = Callable[[int], None]
"""Told of each piece of content that has been moved: its bytes."""

CHUNK = 8 << 20
_BATCH_FILES = 512
_BATCH_BYTES = 64 << 20
_TMP_AGE = 24 * 3600.0


def blob_key(name: str) -> str:
    """Where a blob lies: its name is its checksum, or one of its own that begins with `u`."""
    return f"blobs/{name[:1]}/{name}"


class Batch(Protocol):
    """Blobs on their way. After `flush()` all of them are durable under their names; several may travel at once."""

    def add_bytes(self, sha256: str, data: bytes) -> None: ...

    def add_file(self, source: int, sha256: str = "", name: str = "") -> tuple[str, str]:
        """Send what the file descriptor reads; the checksum of exactly the bytes that were sent, and the blob's name.
        `sha256`: what it was a moment ago, if that is known, with the `name` that such content shall have. Both are
        empty if the file has changed meanwhile."""

    def flush(self) -> None: ...

    def abort(self) -> None:
        """Drop what has not been flushed."""


class Storage(Protocol):
    """Keys are relative paths with `/`. A missing key is FileNotFoundError, other failures are OSError."""

    url: str
    near: bool
    """A look at one blob costs microseconds."""
    locked: bool
    """`commit_lock` keeps every other committer out."""

    def read(self, key: str) -> bytes: ...
    def read_many(self, keys: Iterable[str], ahead: int = 32) -> Iterator[tuple[str, bytes | None]]:
        """In the order asked, None for a missing one; where it pays, several at once, at most `ahead` in memory."""

    def read_range(self, key: str, start: int, length: int) -> bytes: ...

    def signature(self, key: str) -> Any:
        """Changes when the key is replaced."""

    def create(self, key: str, data: bytes) -> bool:
        """Write it whole and durable, or answer False because the key exists."""

    def replace(self, key: str, data: bytes, seen: Any = None, *, durable: bool = True) -> bool:
        """Write it over the key. Where committers cannot be locked out: False, and nothing done, unless the key's
        signature is still `seen` (None: there is none). `durable=False`: a power cut may undo it."""

    def remove(self, key: str) -> None:
        """No error if it is gone already."""

    def remove_many(self, keys: list[str]) -> None: ...
    def listing(self, prefix: str) -> dict[str, Any]:
        """The keys below, with their signatures where those come for free (else None)."""

    def ages(self, prefix: str) -> dict[str, float]:
        """The keys below, with the time at which each was written."""

    def size(self, key: str) -> int | None: ...
    def modified(self, key: str) -> float | None: ...
    def set_aside(self, key: str, other: str) -> None:
        """Give the key another name."""

    def batch(self, tick: Tick | None = None) -> Batch: ...
    def fetch(self, key: str, target: int, size: int, tick: Tick | None = None) -> str:
        """Copy the key, which shall have that size, to a file descriptor (open for reading and writing; what it holds
        already is the beginning); the checksum of what is there then. May raise DriveCorrupt."""

    def digest(self, key: str, size: int) -> str:
        """The checksum of what lies there. May raise DriveCorrupt if that has another size."""

    def open_checked(self, key: str, sha256: str, size: int) -> BinaryIO:
        """Its bytes, compared with the checksum before the first one is handed out. Raises DriveCorrupt."""

    def link(self, key: str, *, seconds: int, filename: str) -> str | None:
        """A URL that gives the bytes to whoever has it, for that long; None where there is no such thing."""

    def commit_lock(self) -> AbstractContextManager[None]:
        """One committer at a time, where the storage can promise it; else `create` decides the race."""

    def shared(self) -> AbstractContextManager[None]:
        """Held while blobs are read or about to be named by a manifest."""

    def exclusive(self) -> AbstractContextManager[bool]:
        """Yields True if nobody holds `shared`: then unreferenced blobs are garbage whatever their age."""

    def sweep(self) -> None:
        """Remove what dead writers left behind; called under `exclusive`, where that can be had."""


def open_storage(url: str) -> Storage:
    """The storage of a URL or local path."""
    scheme, found, rest = url.partition("://")
    if not found:
        return LocalStorage(Path(url))
    if scheme in ("file", "local"):
        return LocalStorage(Path(rest))
    if scheme in ("s3", "s3a"):
        from orch_drive.s3 import S3Storage

        return S3Storage(url)
    return FsspecStorage(url)


def _hash_fd(fd: int, start: int, length: int, digest: Any, tick: Tick | None = None) -> None:
    while length:
        data = os.pread(fd, min(length, 1 << 20), start)
        if not data:
            raise OSError(errno.EIO, "a file that was just written is shorter than what was written")
        digest.update(data)
        start += len(data)
        length -= len(data)
        if tick is not None:
            tick(len(data))


def write_all(fd: int, data: bytes | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def copy_hashed(source: int, target: int, tick: Tick | None = None) -> str:
    """Copy a descriptor's whole content to an empty file; sha256 of what the target holds. Bounded memory.

    The kernel copies (sharing extents where the file system can), holes stay holes, and the hash is taken from the
    copy: a source that changes meanwhile can give a mixed copy, never a copy that does not match its checksum.
    """
    digest = hashlib.sha256()
    size = os.fstat(source).st_size
    os.ftruncate(target, size)
    done = 0
    while done < size:
        start, end = _data_extent(source, done, size)
        _hash_fd(target, done, start - done, digest, tick)
        done = start
        while done < end:
            count = _copy_piece(source, target, done, min(CHUNK, end - done))
            if not count:  # cut off meanwhile: the copy has zeros there, and the caller sees the other size
                break
            _hash_fd(target, done, count, digest, tick)
            done += count
        if done < end:
            _hash_fd(target, done, size - done, digest, tick)
            break
    return digest.hexdigest()


def _data_extent(fd: int, start: int, size: int) -> tuple[int, int]:
    """Where the next bytes lie that are no hole."""
    try:
        first = os.lseek(fd, start, os.SEEK_DATA)
        return min(first, size), min(os.lseek(fd, first, os.SEEK_HOLE), size)
    except (AttributeError, OSError) as exc:
        if getattr(exc, "errno", 0) == errno.ENXIO:  # nothing but a hole up to the end
            return size, size
        return start, size


def _copy_piece(source: int, target: int, offset: int, length: int) -> int:
    try:
        # also a plain 0 is looked at again: some file systems answer it although there is more to read
        if count := os.copy_file_range(source, target, length, offset, offset):
            return count
    except AttributeError:
        pass  # not on this system
    except OSError as exc:
        if exc.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        # not between these two file systems
    data = os.pread(source, min(length, 1 << 20), offset)
    view = memoryview(data)
    while view:
        view = view[os.pwrite(target, view, offset + len(data) - len(view)) :]
    return len(data)


def folds_case(folder: str | os.PathLike[str]) -> bool:
    """Whether the disk takes `A` and `a` for one name, as is usual on macOS."""
    name = f".orch-tmp-{secrets.token_hex(8)}"
    path = os.path.join(folder, name)
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        return os.path.exists(os.path.join(folder, name.upper()))
    finally:
        with suppress(FileNotFoundError):
            os.unlink(path)


def hash_whole(fd: int) -> str:
    digest, done = hashlib.sha256(), 0
    while data := os.pread(fd, 1 << 20, done):
        digest.update(data)
        done += len(data)
    return digest.hexdigest()


# ---- local disk --------------------------------------------------------------------------------------------------


class _OneByOne:
    """What a storage that has no requests for many keys makes of those for one."""

    remove: Callable[[str], None]
    modified: Callable[[str], float | None]
    _keys: Callable[[str], list[str]]

    def remove_many(self, keys: list[str]) -> None:
        for key in keys:
            self.remove(key)

    def listing(self, prefix: str) -> dict[str, Any]:
        return dict.fromkeys(self._keys(prefix))

    def ages(self, prefix: str) -> dict[str, float]:
        found = ((key, self.modified(key)) for key in self._keys(prefix))
        return {key: when for key, when in found if when is not None}


class Unlocked:
    """A storage in which nobody can be locked out."""

    @contextmanager
    def shared(self) -> Iterator[None]:
        yield

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        yield False


class LocalStorage(_OneByOne):
    """A folder. Locks are flock, so a killed process holds none."""

    near = True
    locked = True

    def __init__(self, root: Path) -> None:
        self.root = Path(os.path.abspath(root))
        self.url = f"file://{self.root}"
        self._checked: dict[str, tuple[int, int, int]] = {}

    def path(self, key: str) -> Path:
        return self.root / key

    def _at(self, key: str) -> str:
        return f"{self.root}/{key}"

    def read(self, key: str) -> bytes:
        with open(self._at(key), "rb") as file:
            return file.read()

    def read_many(self, keys: Iterable[str], ahead: int = 32) -> Iterator[tuple[str, bytes | None]]:
        return _one_by_one(self, keys)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        with _opened(self._at(key)) as fd:
            return os.pread(fd, length, start)

    def signature(self, key: str) -> Any:
        stat = os.stat(self._at(key))
        return stat.st_ino, stat.st_mtime_ns, stat.st_size

    def create(self, key: str, data: bytes) -> bool:
        # The commit lock is held by the caller: between this look and the rename nobody else can create the key.
        if os.path.lexists(self._at(key)):
            return False
        self.replace(key, data)
        return True

    def replace(self, key: str, data: bytes, seen: Any = None, *, durable: bool = True) -> bool:
        target = self._at(key)
        tmp, fd = self.temporary()
        try:
            try:
                write_all(fd, data)
                crash_point("drive.manifest.written")
                if durable:
                    os.fsync(fd)
            finally:
                os.close(fd)
            crash_point("drive.manifest.synced")
            self.make_dirs(os.path.dirname(target))
            os.rename(tmp, target)
        except BaseException:
            with suppress(FileNotFoundError):
                os.unlink(tmp)
            raise
        crash_point("drive.manifest.renamed")
        if durable:
            _fsync_dir(os.path.dirname(target))
        return True

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            os.unlink(self._at(key))

    def _keys(self, prefix: str) -> list[str]:
        out: list[str] = []
        folders = [prefix.rstrip("/")]
        while folders:
            folder = folders.pop()
            try:
                with os.scandir(self._at(folder)) as entries:
                    for entry in entries:
                        name = f"{folder}/{entry.name}"
                        if entry.is_dir(follow_symlinks=False):
                            folders.append(name)
                        else:
                            out.append(name)
            except FileNotFoundError:
                continue
        return out

    def size(self, key: str) -> int | None:
        try:
            return os.stat(self._at(key)).st_size
        except FileNotFoundError:
            return None

    def modified(self, key: str) -> float | None:
        try:
            return os.stat(self._at(key)).st_mtime
        except FileNotFoundError:
            return None

    def set_aside(self, key: str, other: str) -> None:
        self.make_dirs(os.path.dirname(self._at(other)))
        with suppress(FileNotFoundError):
            os.rename(self._at(key), self._at(other))

    def batch(self, tick: Tick | None = None) -> Batch:
        return _LocalBatch(self, tick)

    def fetch(self, key: str, target: int, size: int, tick: Tick | None = None) -> str:
        source = os.open(self._at(key), os.O_RDONLY)
        try:
            os.ftruncate(target, 0)
            return copy_hashed(source, target, tick)
        finally:
            os.close(source)

    def digest(self, key: str, size: int) -> str:
        with _opened(self._at(key)) as fd:
            return hash_whole(fd)

    def link(self, key: str, *, seconds: int, filename: str) -> str | None:
        return None

    def open_checked(self, key: str, sha256: str, size: int) -> BinaryIO:
        file = open(self._at(key), "rb")
        try:
            stat = os.fstat(file.fileno())
            seen = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
            if self._checked.get(sha256) != seen:
                if hash_whole(file.fileno()) != sha256:
                    raise DriveCorrupt(f"{self._at(key)} does not match its checksum")
                self._checked[sha256] = seen
        except BaseException:
            file.close()
            raise
        return file

    @contextmanager
    def commit_lock(self) -> Iterator[None]:
        with self._flock("commit.lock", fcntl.LOCK_EX):
            yield

    @contextmanager
    def shared(self) -> Iterator[None]:
        with self._flock("lock", fcntl.LOCK_SH):
            yield

    @contextmanager
    def exclusive(self) -> Iterator[bool]:
        with self._flock("lock", fcntl.LOCK_EX | fcntl.LOCK_NB) as got:
            yield got

    @contextmanager
    def _flock(self, name: str, how: int) -> Iterator[bool]:
        # An open of its own each time: flock then also keeps the threads of one process apart.
        path = self._at(name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            self.make_dirs(str(self.root))
            fd = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                fcntl.flock(fd, how)
            except BlockingIOError:
                yield False
                return
            yield True
        finally:
            os.close(fd)

    def temporary(self) -> tuple[str, int]:
        """A new empty file in the store's own file system; it is read-only under its final name."""
        path = f"{self.root}/tmp/{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            return path, os.open(path, flags, 0o444)
        except FileNotFoundError:
            self.make_dirs(os.path.dirname(path))
            return path, os.open(path, flags, 0o444)

    def make_dirs(self, folder: str) -> None:
        if os.path.isdir(folder):
            return
        parent = os.path.dirname(folder)
        self.make_dirs(parent)
        with suppress(FileExistsError):
            os.mkdir(folder)
        _fsync_dir(parent)

    def sweep(self) -> None:
        for key in self._keys("tmp"):
            self.remove(key)


def _fsync_dir(folder: str) -> None:
    with _opened(folder) as fd:
        os.fsync(fd)


class _LocalBatch:
    """Writes files beside the store, makes many of them durable in one go, then gives them their names."""

    def __init__(self, storage: LocalStorage, tick: Tick | None) -> None:
        self._storage = storage
        self._tick = tick
        self._waiting: list[tuple[str, str]] = []
        self._bytes = 0

    def add_bytes(self, sha256: str, data: bytes) -> None:
        tmp, fd = self._storage.temporary()
        self._waiting.append((tmp, sha256))
        try:
            write_all(fd, data)
        finally:
            os.close(fd)
        if self._tick is not None:
            self._tick(len(data))
        self._written(len(data))

    def add_file(self, source: int, sha256: str = "", name: str = "") -> tuple[str, str]:
        tmp, fd = self._storage.temporary()
        try:
            try:
                digest = copy_hashed(source, fd, self._tick)
                size = os.fstat(fd).st_size
            finally:
                os.close(fd)
        except BaseException:
            os.unlink(tmp)
            raise
        name = name if name and digest == sha256 else digest
        self._waiting.append((tmp, name))
        self._written(size)
        return digest, name

    def _written(self, size: int) -> None:
        crash_point("drive.blob.written")
        self._bytes += size
        if len(self._waiting) >= _BATCH_FILES or self._bytes >= _BATCH_BYTES:
            self.flush()

    def flush(self) -> None:
        if hasattr(os, "posix_fadvise"):
            # Starts writing all of them to disk; the fsyncs that follow then share one journal commit (15x faster).
            for tmp, _ in self._waiting:
                with _opened(tmp) as fd:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        folders: set[str] = set()
        for tmp, name in self._waiting:
            with _opened(tmp) as fd:
                os.fsync(fd)
            folders.add(os.path.dirname(self._storage.path(blob_key(name))))
        for folder in folders:
            self._storage.make_dirs(folder)
        while self._waiting:
            tmp, name = self._waiting[-1]
            crash_point("drive.blob.synced")
            os.rename(tmp, self._storage.path(blob_key(name)))
            self._waiting.pop()
            crash_point("drive.blob.renamed")
        for folder in folders:
            _fsync_dir(folder)
        self._bytes = 0

    def abort(self) -> None:
        for tmp, _ in self._waiting:
            with suppress(FileNotFoundError):
                os.unlink(tmp)
        self._waiting.clear()


def _one_by_one(storage: LocalStorage | FsspecStorage, keys: Iterable[str]) -> Iterator[tuple[str, bytes | None]]:
    for key in keys:
        try:
            yield key, storage.read(key)
        except FileNotFoundError:
            yield key, None


@contextmanager
def _opened(path: str) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


# ---- everything else ---------------------------------------------------------------------------------------------

_memory_lock = threading.RLock()


class FsspecStorage(_OneByOne, Unlocked):
    """Any fsspec URL. The garbage collector goes by age here, for nothing can be locked."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        self.url = url.rstrip("/")
        try:
            fs, root = url_to_fs(self.url)
        except ValueError as exc:
            raise DrivePathError(
                f"{url} cannot be a Drive: {exc}", hint="s3://bucket/prefix or another fsspec URL"
            ) from exc
        except ImportError as exc:
            raise DriveUnavailable(f"the Drive at {url} needs a library that is not installed: {exc}") from exc
        self._fs = fs
        self._root = root.rstrip("/")
        protocol = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        self.near = self.locked = protocol == "memory"

    def _at(self, key: str) -> str:
        return f"{self._root}/{key}"

    def read(self, key: str) -> bytes:
        data: bytes = self._fs.cat_file(self._at(key))
        return data

    def read_many(self, keys: Iterable[str], ahead: int = 32) -> Iterator[tuple[str, bytes | None]]:
        return _one_by_one(self, keys)

    def read_range(self, key: str, start: int, length: int) -> bytes:
        data: bytes = self._fs.cat_file(self._at(key), start=start, end=start + length)
        return data

    def signature(self, key: str) -> Any:
        info = self._fs.info(self._at(key))
        return [info.get(name) for name in ("ETag", "etag", "version_id", "created", "mtime", "LastModified", "size")]

    def create(self, key: str, data: bytes) -> bool:
        try:
            self._fs.pipe_file(self._at(key), data, mode="create")
        except FileExistsError:
            return False
        crash_point("drive.manifest.renamed")
        return True

    def replace(self, key: str, data: bytes, seen: Any = None, *, durable: bool = True) -> bool:
        self._fs.pipe_file(self._at(key), data)
        crash_point("drive.manifest.renamed")
        return True

    def remove(self, key: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.rm_file(self._at(key))

    def _keys(self, prefix: str) -> list[str]:
        self._fs.invalidate_cache()
        strip = len(self._root) + 1
        try:
            return [name[strip:] for name in self._fs.find(self._at(prefix.rstrip("/")))]
        except FileNotFoundError:
            return []

    def size(self, key: str) -> int | None:
        try:
            size: int = self._fs.info(self._at(key))["size"]
        except FileNotFoundError:
            return None
        return size

    def modified(self, key: str) -> float | None:
        try:
            when: float = self._fs.modified(self._at(key)).timestamp()
        except FileNotFoundError:
            return None
        return when

    def set_aside(self, key: str, other: str) -> None:
        with suppress(FileNotFoundError):
            self._fs.mv(self._at(key), self._at(other))

    def batch(self, tick: Tick | None = None) -> Batch:
        return _FsspecBatch(self, tick)

    def link(self, key: str, *, seconds: int, filename: str) -> str | None:
        return None

    def put_blob(self, sha256: str, data: bytes) -> None:
        self._fs.pipe_file(self._at(blob_key(sha256)), data)
        crash_point("drive.blob.renamed")

    def put_blob_file(self, source: int, sha256: str, name: str) -> tuple[str, str]:
        # The checksum is of the bytes that travel, so the name can only be given afterwards.
        tmp = self._at(f"tmp/{secrets.token_hex(8)}")
        self._fs.makedirs(self._at("tmp"), exist_ok=True)
        digest, done, size = hashlib.sha256(), 0, os.fstat(source).st_size
        try:
            with self._fs.open(tmp, "wb") as out:
                while done < size and (data := os.pread(source, min(CHUNK, size - done), done)):
                    out.write(data)
                    digest.update(data)
                    done += len(data)
            crash_point("drive.blob.written")
            name = name if name and digest.hexdigest() == sha256 else digest.hexdigest()
            target = blob_key(name)
            self._fs.makedirs(self._at(os.path.dirname(target)), exist_ok=True)
            self._fs.mv(tmp, self._at(target))
        except BaseException:
            with suppress(FileNotFoundError):
                self._fs.rm_file(tmp)
            raise
        crash_point("drive.blob.renamed")
        return digest.hexdigest(), name

    def fetch(self, key: str, target: int, size: int, tick: Tick | None = None) -> str:
        digest = hashlib.sha256()
        os.ftruncate(target, 0)
        os.lseek(target, 0, os.SEEK_SET)
        for data in self._pieces(key):
            write_all(target, data)
            digest.update(data)
            if tick is not None:
                tick(len(data))
        return digest.hexdigest()

    def _pieces(self, key: str) -> Iterator[bytes]:
        size, done = self._fs.info(self._at(key))["size"], 0
        while done < size and (data := self._fs.cat_file(self._at(key), start=done, end=min(done + CHUNK, size))):
            yield data
            done += len(data)

    def digest(self, key: str, size: int) -> str:
        digest = hashlib.sha256()
        for data in self._pieces(key):
            digest.update(data)
        return digest.hexdigest()

    def open_checked(self, key: str, sha256: str, size: int) -> BinaryIO:
        import tempfile

        file = tempfile.TemporaryFile()
        try:
            if self.fetch(key, file.fileno(), size) != sha256:
                raise DriveCorrupt(f"{self.url}/{key} does not match its checksum")
            file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    @contextmanager
    def commit_lock(self) -> Iterator[None]:
        if not self.locked:
            yield
            return
        with _memory_lock:  # fsspec's memory file system looks and writes in two steps
            yield

    def sweep(self) -> None:
        horizon = time.time() - _TMP_AGE
        self.remove_many([key for key, when in self.ages("tmp").items() if when < horizon])


class _FsspecBatch:
    def __init__(self, storage: FsspecStorage, tick: Tick | None) -> None:
        self._storage = storage
        self._tick = tick or (lambda count: None)

    def add_bytes(self, sha256: str, data: bytes) -> None:
        self._storage.put_blob(sha256, data)
        self._tick(len(data))

    def add_file(self, source: int, sha256: str = "", name: str = "") -> tuple[str, str]:
        size = os.fstat(source).st_size
        sent = self._storage.put_blob_file(source, sha256, name)
        self._tick(size)
        return sent

    def flush(self) -> None:
        return

    def abort(self) -> None:
        return
