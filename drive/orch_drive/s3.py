"""A Drive's bytes in a bucket: S3 and what speaks its protocol.

Two libraries share the work. botocore reads the standard AWS variables and profiles, finds endpoint and region, names
what is wrong with them, and holds multipart uploads, because those can be taken up again only with its calls. obstore
carries everything else: measured against a server on the same machine it moves 1,000 small objects in a third of the
time that s3fs needs, and it has real conditional writes, which its own fsspec adapter ignores.

Nothing can be locked in a bucket. "Create only" and "replace what I have seen" are the store's conditional writes
(If-None-Match, If-Match); what the store cannot promise is checked again after the commit (see `store`).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from io import RawIOBase
from typing import TYPE_CHECKING, Any, BinaryIO

from orch_drive.crash import crash_point
from orch_drive.errors import DriveCorrupt, DriveError, DrivePathError, DriveUnavailable
from orch_drive.storage import Batch, Tick, Unlocked, blob_key, write_all

if TYPE_CHECKING:
    from obstore.store import S3Store

__all__ = ["S3Storage"]

log = logging.getLogger(__name__)

Piece = list[memoryview]
"""Bytes that follow each other."""

PATIENCE = 60.0
"""Seconds for which a server that is away or says 503 is asked again."""

_LANES = 16
_SMALL_FLIGHT = 32 << 20
_PART = 16 << 20
_PARTS = 4
"""Parts of one upload under way at once: with `_PART` this bounds what it holds in memory."""
_RANGE = 8 << 20
_RANGES = 6
"""The same of a download."""
_MAX_PARTS = 10_000
_STARTS = 5
_PROBES = 8
_SPOOL = 64 << 20
_YOUNG = 12 * 3600.0
_ABANDONED = 7 * 24 * 3600.0

_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")

_HINTS = {
    "NoSuchBucket": ("there is no such bucket", "create it, or correct the Drive's URL"),
    "404": ("there is no such bucket", "create it, or correct the Drive's URL"),
    "InvalidAccessKeyId": ("the access key is not known there", "check AWS_ACCESS_KEY_ID or the profile"),
    "SignatureDoesNotMatch": ("the secret key is wrong", "check AWS_SECRET_ACCESS_KEY or the profile"),
    "InvalidToken": ("the session token is wrong", "check AWS_SESSION_TOKEN or the profile"),
    "ExpiredToken": ("the credentials have expired", "log in again"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock"),
    "AccessDenied": ("no permission", "the credentials need list, read, write and delete below the Drive's prefix"),
    "403": ("no permission", "the credentials need list, read, write and delete below the Drive's prefix"),
    "SlowDown": ("it is overloaded (503)", "try again later"),
    "ServiceUnavailable": ("it is overloaded (503)", "try again later"),
    "503": ("it is overloaded (503)", "try again later"),
    "QuotaExceeded": ("the quota is used up", "free some room there"),
    "PermanentRedirect": ("the bucket is in another region", "set AWS_REGION to the bucket's region"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set AWS_REGION to the bucket's region"),
}


class _Lost(Exception):
    """The upload is no longer there: another writer of the same file has finished it, or given it up."""


class _Link:
    """What talks to one bucket."""

    def __init__(self, store: S3Store, client: Any) -> None:
        self.store = store
        self.client = client


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_")))


@lru_cache(maxsize=16)
def _connect(bucket: str, settings: tuple[tuple[str, str], ...]) -> _Link:
    """Raises ImportError, and what botocore raises on a wrong profile."""
    from botocore.config import Config
    from botocore.session import Session
    from obstore.store import S3Store

    session = Session()
    given = session.get_credentials()
    if given is None:
        raise DriveUnavailable(
            f"the Drive's bucket {bucket} needs credentials, and there are none",
            hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE",
        )
    config = Config(
        signature_version="s3v4",
        max_pool_connections=_LANES,
        connect_timeout=10,
        retries={"mode": "standard", "max_attempts": 4},
        # Content is compared with its sha256 by us; a second checksum would only cost time.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": False},
    )
    client = session.create_client("s3", config=config, region_name=session.get_config_variable("region") or None)
    endpoint = client.meta.endpoint_url
    region = client.meta.region_name
    where: dict[str, Any] = {}
    if not endpoint.endswith(".amazonaws.com"):
        where["endpoint"] = endpoint
        region = "us-east-1" if region in (None, "aws-global") else region
    elif region in (None, "aws-global"):
        region = _region(client, bucket)

    def credentials() -> Any:
        frozen = given.get_frozen_credentials()
        found: dict[str, Any] = {"access_key_id": frozen.access_key, "secret_access_key": frozen.secret_key}
        if frozen.token:
            found["token"] = frozen.token
        # botocore renews by itself what can expire: ask it again soon
        renews = hasattr(given, "refresh_needed")
        found["expires_at"] = datetime.now(UTC) + timedelta(minutes=5) if renews else None
        return found

    store = S3Store(
        bucket,
        region=region,
        unsigned_payload=True,
        virtual_hosted_style_request="endpoint" not in where and "." not in bucket,
        credential_provider=credentials,
        client_options={
            "allow_http": True,
            "timeout": timedelta(seconds=120),
            "connect_timeout": timedelta(seconds=10),
        },
        retry_config={
            "max_retries": 30,
            "retry_timeout": timedelta(seconds=PATIENCE),
            "backoff": {"init_backoff": timedelta(milliseconds=100), "max_backoff": timedelta(seconds=3), "base": 2},
        },
        **where,
    )
    return _Link(store, client)


def _region(client: Any, bucket: str) -> str:
    from botocore.exceptions import ClientError

    try:
        answer = client.head_bucket(Bucket=bucket)
    except ClientError as exc:
        answer = exc.response
    found = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {}).get("x-amz-bucket-region")
    return found or "us-east-1"


class S3Storage(Unlocked):
    """Objects below a prefix of a bucket."""

    near = False
    locked = False

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        bucket, _, prefix = self.url.partition("://")[2].partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise DrivePathError(
                f"{bucket!r} is no bucket's name", hint="3 to 63 lower-case letters, digits, dots and hyphens"
            )
        parts = prefix.split("/") if prefix else []
        if any(part in ("", ".", "..") or not part.isprintable() for part in parts) or len(prefix.encode()) > 500:
            raise DrivePathError(
                f"{self.url} cannot be a Drive: a bucket cannot hold such names below {prefix[:60]!r}",
                hint="no empty, `.` or `..` parts, no control characters, at most 500 bytes",
            )
        self._bucket = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._checked: dict[str, tuple[str, str]] = {}
        self._proven: _Link | None = None

    # ---- errors -----------------------------------------------------------------------------------------------------

    @property
    def _link(self) -> _Link:
        """The connection. The first use of it is a look into the bucket, so that what is wrong is named at once."""
        with self._explained():
            link = _connect(self._bucket, _settings())
            if link is not self._proven:
                link.client.list_objects_v2(Bucket=self._bucket, Prefix=self._prefix + "manifests/", MaxKeys=1)
                self._proven = link
            return link

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What the libraries raise, as FileNotFoundError and DriveUnavailable."""
        try:
            yield
        except (DriveError, FileNotFoundError, FileExistsError):
            raise
        except ImportError as exc:
            raise DriveUnavailable(
                f"the Drive at {self.url} needs a library that is not installed: {exc.name}",
                hint="pip install 'orch[s3]'",
            ) from exc
        except Exception as exc:
            if (error := self._translated(exc)) is None:
                raise
            raise error from exc

    def _translated(self, exc: Exception) -> Exception | None:
        where = f"the Drive at {self.url} cannot be used"
        module = type(exc).__module__
        if module.startswith("botocore"):
            code = str(getattr(exc, "response", {}).get("Error", {}).get("Code", ""))
            text = str(exc)
        elif module.startswith("obstore") or isinstance(exc, (OSError, PermissionError)):
            text = str(exc)
            found = re.search(r"<Code>(\w+)</Code>", text) or re.search(r"\b(403|503)\b", text)
            code = found[1] if found else ""
            name = type(exc).__name__
            if not code and name in ("PermissionDeniedError", "UnauthenticatedError"):
                code = "AccessDenied"
        else:
            return None
        if code == "NoSuchKey":
            return FileNotFoundError(text)
        if code in _HINTS:
            said, hint = _HINTS[code]
            return DriveUnavailable(f"{where}: {said} (bucket {self._bucket})", hint=hint)
        short = " ".join(text.split())[:300]
        if "onnect" in text or "dns" in text.lower() or "timed out" in text.lower():
            return DriveUnavailable(
                f"{where}: its server cannot be reached: {short}", hint="is AWS_ENDPOINT_URL right?"
            )
        return DriveUnavailable(f"{where}: {short}")

    # ---- single objects ---------------------------------------------------------------------------------------------

    def _at(self, key: str) -> str:
        return self._prefix + key

    def read(self, key: str) -> bytes:
        import obstore

        store = self._link.store
        with self._explained():
            return bytes(obstore.get(store, self._at(key)).bytes())

    def read_range(self, key: str, start: int, length: int) -> bytes:
        import obstore

        store = self._link.store
        with self._explained():
            return bytes(obstore.get_range(store, self._at(key), start=start, length=length))

    def read_many(self, keys: Iterable[str], ahead: int = 2 * _LANES) -> Iterator[tuple[str, bytes | None]]:
        link = self._link
        waiting: deque[tuple[str, Future[bytes | None]]] = deque()

        def get(key: str) -> bytes | None:
            import obstore

            try:
                with self._explained():
                    return bytes(obstore.get(link.store, self._at(key)).bytes())
            except FileNotFoundError:
                return None

        with ThreadPoolExecutor(_LANES, thread_name_prefix="orch-drive") as pool:
            try:
                for key in keys:
                    waiting.append((key, pool.submit(get, key)))
                    if len(waiting) >= ahead:
                        name, future = waiting.popleft()
                        yield name, future.result()
                while waiting:
                    name, future = waiting.popleft()
                    yield name, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()

    def _head(self, key: str) -> Any:
        import obstore

        store = self._link.store
        try:
            with self._explained():
                return obstore.head(store, self._at(key))
        except FileNotFoundError:
            return None

    def signature(self, key: str) -> Any:
        found = self._head(key)
        if found is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        return found["e_tag"]

    def size(self, key: str) -> int | None:
        found = self._head(key)
        return None if found is None else int(found["size"])

    def modified(self, key: str) -> float | None:
        found = self._head(key)
        return None if found is None else float(found["last_modified"].timestamp())

    def create(self, key: str, data: bytes) -> bool:
        return self._conditional(key, data, "create")

    def replace(self, key: str, data: bytes, seen: Any = None, *, durable: bool = True) -> bool:
        return self._conditional(key, data, "create" if seen is None else {"e_tag": seen})

    def _conditional(self, key: str, data: bytes, mode: Any) -> bool:
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        store = self._link.store
        try:
            with self._explained():
                try:
                    obstore.put(store, self._at(key), data, mode=mode, use_multipart=False)
                except (AlreadyExistsError, PreconditionError):
                    # A request whose answer was lost is sent again: then it is our own object that is in the way.
                    if bytes(obstore.get(store, self._at(key)).bytes()) != data:
                        return False
        except FileNotFoundError:  # If-Match on what is gone
            return False
        crash_point("drive.manifest.renamed")
        return True

    def remove(self, key: str) -> None:
        import obstore

        store = self._link.store
        with suppress(FileNotFoundError), self._explained():
            obstore.delete(store, self._at(key))

    def remove_many(self, keys: list[str]) -> None:
        import obstore

        store = self._link.store
        for start in range(0, len(keys), 1000):
            with suppress(FileNotFoundError), self._explained():
                obstore.delete(store, [self._at(key) for key in keys[start : start + 1000]])

    def listing(self, prefix: str) -> dict[str, Any]:
        return {key: meta["e_tag"] for key, meta in self._list(prefix)}

    def ages(self, prefix: str) -> dict[str, float]:
        return {key: float(meta["last_modified"].timestamp()) for key, meta in self._list(prefix)}

    def _list(self, prefix: str) -> Iterator[tuple[str, Any]]:
        import obstore

        store = self._link.store
        strip = len(self._prefix)
        with self._explained():
            for rows in obstore.list(store, self._at(prefix.rstrip("/"))):
                for meta in rows:
                    yield meta["path"][strip:], meta

    def set_aside(self, key: str, other: str) -> None:
        import obstore

        store = self._link.store
        with suppress(FileNotFoundError), self._explained():
            obstore.copy(store, self._at(key), self._at(other))
            obstore.delete(store, self._at(key))
        self._checked.pop(key, None)

    # ---- content ----------------------------------------------------------------------------------------------------

    def batch(self, tick: Tick | None = None) -> Batch:
        return _S3Batch(self, tick)

    def fetch(self, key: str, target: int, size: int, tick: Tick | None = None) -> str:
        """Parts are asked for side by side and written in order: what an interrupted one has left is a beginning, and
        the rest is fetched after it. Each is hashed while it is written and the next ones arrive."""
        digest = hashlib.sha256()
        done = 0
        while data := os.pread(target, 1 << 20, done):
            digest.update(data)
            done += len(data)
        os.lseek(target, done, os.SEEK_SET)
        hashed: Future[None] | None = None
        with ThreadPoolExecutor(1, thread_name_prefix="orch-drive") as pool:
            for piece in self._pieces(key, done, size, size):
                if hashed is not None:
                    hashed.result()
                hashed = pool.submit(_update, digest, piece)
                for view in piece:
                    write_all(target, view)
                if tick is not None:
                    tick(sum(map(len, piece)))
        return digest.hexdigest()

    def _pieces(self, key: str, start: int, end: int, size: int, e_tag: str | None = None) -> Iterator[Piece]:
        """The bytes from `start` to `end` of an object that shall have `size`. Raises DriveCorrupt if it has not."""
        import obstore

        store = self._link.store

        def get(first: int, length: int) -> Piece:
            with self._explained():
                options: Any = {"range": (first, first + length)}
                if e_tag is not None:
                    options["if_match"] = e_tag
                found = obstore.get(store, self._at(key), options=options)
                if found.meta["size"] != size:
                    raise DriveCorrupt(f"{self.url}/{key} has {found.meta['size']} bytes, not {size}")
                # as they come from the wire: putting them together would copy them once more
                return [memoryview(data) for data in found.stream(min_chunk_size=1)]

        if end <= start:  # a request for no bytes would be refused
            if self.size(key) != size:
                self.signature(key)
                raise DriveCorrupt(f"{self.url}/{key} does not have {size} bytes")
            return
        if end - start <= _RANGE:
            yield get(start, end - start)
            return
        waiting: deque[Future[Piece]] = deque()
        with ThreadPoolExecutor(_RANGES, thread_name_prefix="orch-drive") as pool:
            try:
                for first in range(start, end, _RANGE):
                    waiting.append(pool.submit(get, first, min(_RANGE, end - first)))
                    if len(waiting) >= _RANGES:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                for future in waiting:
                    future.cancel()

    def digest(self, key: str, size: int, e_tag: str | None = None) -> str:
        digest = hashlib.sha256()
        for piece in self._pieces(key, 0, size, size, e_tag):
            _update(digest, piece)
        return digest.hexdigest()

    def open_checked(self, key: str, sha256: str, size: int) -> BinaryIO:
        """A small file is copied here; of a large one the object is read twice, once to be compared and then, as long
        as it is still that very object, in the ranges that are asked for."""
        if size <= _SPOOL:
            file = tempfile.TemporaryFile()
            try:
                if self.fetch(key, file.fileno(), size) != sha256:
                    raise DriveCorrupt(f"{self.url}/{key} does not match its checksum")
                file.seek(0)
            except BaseException:
                file.close()
                raise
            return file
        e_tag = self.signature(key)
        if self._checked.get(key) != (e_tag, sha256):
            if self.digest(key, size, e_tag) != sha256:
                raise DriveCorrupt(f"{self.url}/{key} does not match its checksum")
            self._checked[key] = (e_tag, sha256)
        from io import BufferedReader

        return BufferedReader(_Ranges(self, key, size, e_tag), 1 << 20)

    def link(self, key: str, *, seconds: int, filename: str) -> str | None:
        """An address that gives the object to whoever has it, for a while."""
        from urllib.parse import quote

        client = self._link.client
        asked = {
            "Bucket": self._bucket,
            "Key": self._at(key),
            "ResponseContentDisposition": f"attachment; filename*=UTF-8''{quote(filename, safe='')}",
        }
        url: str = client.generate_presigned_url("get_object", Params=asked, ExpiresIn=seconds)
        return url

    # ---- multipart --------------------------------------------------------------------------------------------------

    def put_large(self, source: int, tick: Tick | None, sha256: str = "", name: str = "") -> tuple[str, str]:
        """Multipart upload of what the descriptor reads: its checksum, and the name of the blob. If `sha256` tells what
        it was a moment ago, the blob gets that `name`; both answers are empty if the file has changed since.

        Without it the checksum is taken of the bytes as they are sent, which saves reading the file once more before
        the first one is, and the blob gets a name of its own. That begins with what this very file can be told by, so
        that the upload is found again that an interrupted put has left, and what it had finished.
        """
        link = self._link
        before = os.fstat(source)
        stem = name or _stem(before)
        for _ in range(_STARTS):
            found = self._finished(link, source, before, stem, sha256)
            if found is not None:
                if tick is not None:
                    tick(before.st_size)
                return found
            try:
                return self._send_parts(link, source, before, stem, sha256, tick)
            except _Lost:
                log.info("%s: another writer has finished the upload of %s", self.url, stem)
        raise DriveUnavailable(
            f"the Drive at {self.url} cannot be used: others finish every upload of a file", hint="try again"
        )

    def _finished(
        self, link: _Link, source: int, status: os.stat_result, stem: str, sha256: str
    ) -> tuple[str, str] | None:
        """A blob that holds this file, and is so young that no collector can be about to remove it."""
        size = status.st_size
        if sha256:
            return (sha256, stem) if _fresh(self._head(blob_key(stem)), size) else None
        with self._explained():
            answer = self._patiently(
                lambda: link.client.list_objects_v2(Bucket=self._bucket, Prefix=self._at(blob_key(stem)))
            )
        tags = {
            row["ETag"].strip('"'): row["Key"].rpartition("/")[2]
            for row in answer.get("Contents", ())
            if row["Size"] == size and _young(row["LastModified"])
        }
        if not tags:
            return None
        digest, parts, step = hashlib.sha256(), [], _step(size)
        for start in range(0, size, step):
            data = os.pread(source, min(step, size - start), start)
            digest.update(data)
            parts.append(_md5(data))
        name = tags.get(_joined(parts))
        return (digest.hexdigest(), name) if name else None

    def _send_parts(
        self, link: _Link, source: int, before: os.stat_result, stem: str, sha256: str, tick: Tick | None
    ) -> tuple[str, str]:
        size, step = before.st_size, _step(before.st_size)
        with self._explained(), _losing():
            name, upload, there = self._patiently(lambda: self._unfinished(link, stem, not sha256))
        named = {"Bucket": self._bucket, "Key": self._at(blob_key(name)), "UploadId": upload}

        def send(number: int, data: bytearray) -> dict[str, Any]:
            known = there.get(number)
            if known is not None and known == (len(data), _md5(data)):
                return {"PartNumber": number, "ETag": f'"{known[1]}"'}
            with _losing():
                answer = self._patiently(lambda: link.client.upload_part(**named, PartNumber=number, Body=data))
            crash_point("drive.part.sent")
            return {"PartNumber": number, "ETag": answer["ETag"]}

        digest = hashlib.sha256()
        parts: list[dict[str, Any]] = []
        waiting: deque[tuple[bytearray, Future[dict[str, Any]]]] = deque()
        # botocore would copy a `bytes` behind its headers; and buffers that are used again need no new pages
        free: list[bytearray] = []

        def drain() -> None:
            data, future = waiting.popleft()
            parts.append(future.result())
            free.append(data)
            if tick is not None:
                tick(len(data))

        with self._explained(), ThreadPoolExecutor(_PARTS, thread_name_prefix="orch-drive") as pool:
            try:
                changed = False
                for number, start in enumerate(range(0, size, step), 1):
                    if len(waiting) > _PARTS:  # one is read ahead: no lane waits for the disk, nor for a slow part
                        drain()
                    length = min(step, size - start)
                    data = free.pop() if free and length == step else bytearray(length)
                    whole, after = _fill(data, source, start), os.fstat(source)
                    changed = not whole or (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns)
                    if changed:
                        break
                    waiting.append((data, pool.submit(send, number, data)))
                    digest.update(data)
                while waiting:
                    drain()
            finally:
                for _, future in waiting:
                    future.cancel()
            found = digest.hexdigest()
            if changed or sha256 not in ("", found):
                with suppress(_Lost), _losing():
                    link.client.abort_multipart_upload(**named)
                return "", ""
            crash_point("drive.blob.written")
            tag = self._finish(link, named, parts, size, own=not sha256)
            # Of another writer who went on with this upload it can hold other bytes, if those came under the same time.
            other = not sha256 and tag != _joined(part["ETag"].strip('"') for part in parts)
            if other and self.digest(blob_key(name), size) != found:
                raise _Lost
        crash_point("drive.blob.renamed")
        return found, name

    def _finish(self, link: _Link, named: dict[str, Any], parts: list[dict[str, Any]], size: int, *, own: bool) -> str:
        """The ETag of what came out of it."""
        from botocore.exceptions import ClientError

        def complete() -> str:
            try:
                done = link.client.complete_multipart_upload(**named, MultipartUpload={"Parts": parts})
            except ClientError as exc:
                # completed by a request whose answer was lost, or by another writer of the same file
                code = _code(exc)
                if code == "InvalidPart" and own:
                    raise _Lost from exc
                if code != "NoSuchUpload":
                    raise
                try:
                    done = link.client.head_object(Bucket=named["Bucket"], Key=named["Key"])
                except ClientError as missing:  # given up by that writer
                    raise _Lost from missing
                if done["ContentLength"] != size:
                    raise _Lost from exc
            return str(done["ETag"]).strip('"')

        return str(self._patiently(complete))

    def _unfinished(self, link: _Link, stem: str, own: bool) -> tuple[str, str, dict[int, tuple[int, str]]]:
        """The newest unfinished upload of this blob (`own`: of one whose name begins so), by name and id, with its
        parts, number -> (size, MD5); else a new one. One that was begun long ago is left alone: what becomes of it
        would be as old, to a collector."""
        answer = link.client.list_multipart_uploads(Bucket=self._bucket, Prefix=self._at(blob_key(stem)))
        found = [row for row in answer.get("Uploads", ()) if _young(row["Initiated"])]
        if not found:
            name = f"{stem}-{secrets.token_hex(8)}" if own else stem
            key = self._at(blob_key(name))
            return name, link.client.create_multipart_upload(Bucket=self._bucket, Key=key)["UploadId"], {}
        newest = max(found, key=lambda row: row["Initiated"])
        key, upload = newest["Key"], newest["UploadId"]
        parts: dict[int, tuple[int, str]] = {}
        for page in link.client.get_paginator("list_parts").paginate(Bucket=self._bucket, Key=key, UploadId=upload):
            for row in page.get("Parts", ()):
                parts[row["PartNumber"]] = (row["Size"], row["ETag"].strip('"'))
        return key.rpartition("/")[2], upload, parts

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """botocore tries a few times within seconds; a server that restarts needs more."""
        from botocore.exceptions import BotoCoreError, ClientError

        deadline, pause = time.monotonic() + PATIENCE, 0.2
        while True:
            try:
                return call()
            except (BotoCoreError, ClientError) as exc:
                status = getattr(exc, "response", {}).get("ResponseMetadata", {}).get("HTTPStatusCode", 503)
                if status < 500 or time.monotonic() > deadline:
                    raise
                log.info("%s: %s, trying again", self.url, exc)
            time.sleep(pause)
            pause = min(2 * pause, 3.0)

    # ---- locks that a bucket does not have ---------------------------------------------------------------------------

    @contextmanager
    def commit_lock(self) -> Iterator[None]:
        yield

    def sweep(self) -> None:
        """Uploads that nobody has gone on with for a week."""
        client = self._link.client
        horizon = time.time() - _ABANDONED
        with self._explained():
            pages = client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._bucket, Prefix=self._at("blobs/")
            )
            for page in pages:
                for row in page.get("Uploads", ()):
                    if row["Initiated"].timestamp() < horizon:
                        client.abort_multipart_upload(Bucket=self._bucket, Key=row["Key"], UploadId=row["UploadId"])


class _Ranges(RawIOBase):
    """One version of an object, read where it is asked for."""

    def __init__(self, storage: S3Storage, key: str, size: int, e_tag: str) -> None:
        self._storage, self._key, self._size, self._e_tag = storage, key, size, e_tag
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._size, self._position + len(view))
        done = 0
        for piece in (
            self._storage._pieces(self._key, self._position, end, self._size, self._e_tag)
            if end > self._position
            else ()
        ):
            for data in piece:
                view[done : done + len(data)] = data
                done += len(data)
        self._position += done
        return done


def _update(digest: Any, piece: Piece) -> None:
    for data in piece:
        digest.update(data)


class _S3Batch:
    """Small objects travel side by side while the next files are read; a large one has all lanes for itself."""

    def __init__(self, storage: S3Storage, tick: Tick | None) -> None:
        self._storage = storage
        self._tick = tick
        self._pool: ThreadPoolExecutor | None = None
        self._waiting: deque[tuple[int, Future[None]]] = deque()
        self._bytes = 0
        self._lock = threading.Lock()
        self._misses = 0
        """Looks that found nothing, less those that found something: an interrupted put is worth a look before each
        object, a first one is not."""

    def add_bytes(self, sha256: str, data: bytes) -> None:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(_LANES, thread_name_prefix="orch-drive")
        while self._waiting and self._bytes + len(data) > _SMALL_FLIGHT:
            self._drain()
        self._bytes += len(data)
        self._waiting.append((len(data), self._pool.submit(self._put, sha256, data)))
        while self._waiting and self._waiting[0][1].done():
            self._drain()

    def _put(self, sha256: str, data: bytes) -> None:
        import obstore

        storage = self._storage
        if self._misses < _PROBES:
            found = storage._head(blob_key(sha256))
            with self._lock:
                self._misses += 1 if found is None else -1
            if _fresh(found, len(data)):
                return
        store = storage._link.store
        with storage._explained():
            obstore.put(store, storage._at(blob_key(sha256)), data, use_multipart=False)
        crash_point("drive.blob.renamed")

    def add_file(self, source: int, sha256: str = "", name: str = "") -> tuple[str, str]:
        size = os.fstat(source).st_size
        if size > _PART:
            return self._storage.put_large(source, self._tick, sha256, name or sha256)
        data = os.pread(source, size + 1, 0)
        found = hashlib.sha256(data).hexdigest()
        if len(data) != size or sha256 not in ("", found):
            return "", ""
        self.add_bytes(name or found, data)
        return found, name or found

    def flush(self) -> None:
        while self._waiting:
            self._drain()

    def _drain(self) -> None:
        length, future = self._waiting.popleft()
        self._bytes -= length
        future.result()
        if self._tick is not None:
            self._tick(length)

    def abort(self) -> None:
        for _, future in self._waiting:
            future.cancel()
        self._waiting.clear()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


def _fresh(meta: Any, size: int) -> bool:
    """Whether the object is there and so young that no collector can be about to remove it."""
    return meta is not None and meta["size"] == size and _young(meta["last_modified"])


def _young(when: datetime) -> bool:
    return time.time() - when.timestamp() < _YOUNG


def _stem(status: os.stat_result) -> str:
    """The beginning of a blob's own name: which file it is, as it is now. Two files may be taken for one, for what was
    sent already is compared with what is to be sent."""
    told = (socket.gethostname(), status.st_ino, status.st_size, status.st_mtime_ns)
    return "u" + hashlib.sha256(repr(told).encode()).hexdigest()[:24]


def _step(size: int) -> int:
    """Bytes of a part."""
    return max(_PART, -(-size // _MAX_PARTS))


def _fill(data: bytearray, source: int, start: int) -> bool:
    """Whether the file has that many bytes there."""
    view = memoryview(data)
    while view and (count := os.preadv(source, [view], start)):
        view, start = view[count:], start + count
    return not view


def _md5(data: bytes | bytearray) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _joined(tags: Iterable[str]) -> str:
    """The ETag of what was put together out of parts with these ones; empty if they are no checksums."""
    found = list(tags)
    if not all(re.fullmatch("[0-9a-f]{32}", tag) for tag in found):
        return ""
    return f"{_md5(bytes.fromhex(''.join(found)))}-{len(found)}"


@contextmanager
def _losing() -> Iterator[None]:
    from botocore.exceptions import ClientError

    try:
        yield
    except ClientError as exc:
        if _code(exc) == "NoSuchUpload":
            raise _Lost from exc
        raise


def _code(exc: Any) -> str:
    return str(exc.response.get("Error", {}).get("Code", ""))
