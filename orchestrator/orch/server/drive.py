"""/api/v1/drive: list, download, upload, delete."""

from __future__ import annotations

import asyncio
import mimetypes
import re
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, BinaryIO
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter

from orch.server.asgi import HEAD_REQUEST, ClientGone
from orch.server.context import Context
from orch.server.openapi import header, problems
from orch.server.responses import Json, Stream, parse_etags
from orch.zips import unzip, zipped
from orch_drive import DriveAmbiguous, DriveConflict, DrivePathError, DriveStore, DriveUnavailable, Manifest
from orch_drive.manifest import FileInfo, ManifestIndex, check_path, to_json

__all__ = ["UPLOADER", "router"]

UPLOADER = "api"
"""The component under whose name uploads are published."""
CHUNK = 256 * 1024
WHOSE = "say whose with ?component=<name>"
DRIVE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
BINARY: dict[str, Any] = {
    "requestBody": {"content": {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}}
}

DOWNLOAD: dict[int | str, Any] = {
    200: {"content": {"application/json": {}, "application/octet-stream": {}, "application/zip": {}, "*/*": {}}},
    206: {"description": "The range of the file that was asked for", "content": {"*/*": {}}},
    304: {"description": "Not changed"},
}
DOWNLOAD_HEADERS = [
    header("If-None-Match", "an entity tag: if the file still has it, the answer is 304"),
    header("Range", "bytes=first-last: a part of the file"),
]
DriveName = Annotated[str, PathParameter(json_schema_extra={"pattern": f"^{DRIVE_ID.pattern}$"})]
ComponentQuery = Annotated[str | None, Query(description="only what this component published")]


class Stores:
    """The app's Drives, opened when first asked for."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._stores: dict[str, DriveStore] = {}

    def get(self, drive: str) -> DriveStore:
        """Raises DrivePathError for what is no name of a Drive under the app's own URL."""
        if not DRIVE_ID.fullmatch(drive):
            raise DrivePathError(f"{drive!r} is no name of a Drive of this app", hint="for example /api/v1/drive/app/")
        if drive not in self._stores:
            self._stores[drive] = DriveStore(self._context.backend.drive_url, drive)
        return self._stores[drive]


def listing(files: list[FileInfo], folder: str, *, recursive: bool) -> list[dict[str, Any]]:
    """The files below `folder`; without `recursive` its direct children only, folders as one row each."""
    prefix = "" if folder == "." else folder + "/"
    rows: list[dict[str, Any]] = []
    folders: dict[tuple[str, str], dict[str, Any]] = {}
    for file in files:
        if not file.path.startswith(prefix):
            continue
        rest = file.path[len(prefix) :]
        if recursive or "/" not in rest:
            rows.append(
                {
                    "path": file.path,
                    "type": "file",
                    "size": file.size,
                    "version": file.version,
                    "component": file.component,
                    "at": file.at,
                    "sha256": file.sha256,
                }
            )
            continue
        path = prefix + rest.partition("/")[0]
        row = folders.get((path, file.component))
        if row is None:
            row = {"path": path, "type": "folder", "size": 0, "files": 0, "component": file.component, "at": 0.0}
            folders[path, file.component] = row
            rows.append(row)
        row["size"] += file.size
        row["files"] += 1
        row["at"] = max(row["at"], file.at)
    return sorted(rows, key=lambda row: (row["path"], row["component"]))


def _of_version(manifest: Manifest) -> list[FileInfo]:
    return [
        FileInfo(
            path=manifest.drive_path(entry),
            size=entry.size,
            version=manifest.version,
            component=manifest.component,
            sha256=entry.sha256,
            at=manifest.at,
            call=manifest.call,
        )
        for entry in manifest.entries
    ]


def _version_row(manifest: Manifest) -> dict[str, Any]:
    return {
        "path": manifest.path,
        "version": manifest.version,
        "component": manifest.component,
        "size": manifest.size,
        "files": len(manifest.entries),
        "at": manifest.at,
    }


async def _chunks(file: BinaryIO, start: int, length: int) -> AsyncGenerator[bytes, None]:
    file.seek(start)
    while length > 0 and (data := await asyncio.to_thread(file.read, min(CHUNK, length))):
        length -= len(data)
        yield data


def parse_range(text: str, size: int) -> tuple[int, int] | None:
    """(first byte, length) of a `Range: bytes=a-b` header with one range; None for what shall be answered whole.
    Raises ValueError if the range lies outside the file."""
    found = re.fullmatch(r"bytes=(\d*)-(\d*)", text.strip())
    if found is None or found[0] == "bytes=-":
        return None
    if not found[1]:
        start, end = max(0, size - int(found[2])), size - 1
    else:
        start, end = int(found[1]), min(int(found[2]) if found[2] else size - 1, size - 1)
        if found[2] and int(found[2]) < int(found[1]):
            return None
    if start > end or start >= size:
        raise ValueError(text)
    return start, end - start + 1


def _zip(store: DriveStore, manifest: Manifest) -> Iterator[bytes]:
    files = (
        (entry.name, entry.executable, entry.mtime_ns / 1e9, lambda name=entry.name: store.open(manifest, name))
        for entry in manifest.entries
    )
    return zipped(files, compress=True)


async def _in_thread(chunks: Iterator[bytes]) -> AsyncGenerator[bytes, None]:
    while (chunk := await asyncio.to_thread(next, chunks, None)) is not None:
        if chunk:
            yield chunk


def _open_file(context: Context, store: DriveStore, manifest: Manifest, request: Request) -> Response:
    entry = manifest.entries[0]
    headers = {
        "etag": f'"{entry.sha256}"',
        "accept-ranges": "bytes",
        "cache-control": "no-cache",
        "content-disposition": f"inline; filename*=UTF-8''{quote(manifest.path.rpartition('/')[2], safe='')}",
        # A page that a script wrote must not run with the rights of the app's own pages.
        "content-security-policy": "sandbox",
        "x-content-type-options": "nosniff",
        "x-orch-version": str(manifest.version),
    }
    asked = request.headers.get("if-none-match")
    if asked is not None:
        strong, weak, anything = parse_etags(asked)
        if anything or entry.sha256 in strong | weak:
            return Response(status_code=304, headers=headers)
    start, length, status = 0, entry.size, 200
    wanted = request.headers.get("range")
    if wanted is not None and request.headers.get("if-range", headers["etag"]) == headers["etag"]:
        try:
            part = parse_range(wanted, entry.size)
        except ValueError:
            return Response(status_code=416, headers={"content-range": f"bytes */{entry.size}"})
        if part is not None:
            start, length = part
            status = 206
            headers["content-range"] = f"bytes {start}-{start + length - 1}/{entry.size}"
    headers["content-length"] = str(length)
    kind = mimetypes.guess_type(manifest.path)[0] or "application/octet-stream"
    if request.scope.get(HEAD_REQUEST):
        return Response(status_code=status, headers=headers, media_type=kind)
    file = store.open(manifest)
    response = Stream(context, kind, _chunks(file, start, length), status=status, release=file.close)
    response.headers.update(headers)
    return response


def _read(
    context: Context,
    store: DriveStore,
    path: str,
    request: Request,
    component: str | None,
    version: int | None,
    partial: bool,
    recursive: bool,
    as_zip: bool,
) -> Response:
    index = store.index()
    if version is None and not as_zip and not partial:
        files = index.files(component)
        if not any(file.path == path for file in files):
            rows = listing(files, path, recursive=recursive)
            if rows or path == ".":
                return Json(context, rows)
    manifest = _resolve(store, index, path, component, version, partial)
    if not manifest.is_dir:
        return _open_file(context, store, manifest, request)
    if not as_zip:
        return Json(context, listing(_of_version(manifest), path, recursive=recursive))
    response = Stream(context, "application/zip", _in_thread(_zip(store, manifest)))
    name = quote(path.rpartition("/")[2].replace(".", "") or store.drive_id, safe="")
    response.headers["content-disposition"] = f"attachment; filename*=UTF-8''{name}.zip"
    response.headers["x-orch-version"] = str(manifest.version)
    return response


def _link(store: DriveStore, path: str, component: str | None, version: int | None, seconds: int) -> dict[str, Any]:
    manifest = _resolve(store, store.index(), path, component, version, False)
    url = store.link(manifest, seconds=seconds)
    if url is None:
        raise DriveConflict(
            f"{path!r}: only a single file in a bucket has a link of its own", hint="download it from the app itself"
        )
    return {"path": path, "version": manifest.version, "url": url, "expires": time.time() + seconds}


def _resolve(
    store: DriveStore, index: ManifestIndex, path: str, component: str | None, version: int | None, partial: bool
) -> Manifest:
    try:
        manifest = store.resolve(path, component=component, version=version, partial=partial)
    except DriveAmbiguous as error:
        raise DriveAmbiguous(error.message, hint=WHOSE) from error
    if manifest is None:
        raise index.missing(path, component)
    return manifest


class _Secrets:
    """Refuses what holds a secret, also across two pieces of it. An empty piece ends a file."""

    def __init__(self, context: Context) -> None:
        self._backend = context.backend
        self._overlap = max((len(value.encode()) for value in context.redactor.values()), default=1) - 1
        self._seen = b""

    def check(self, data: bytes) -> None:
        """Raises StateTypeError."""
        seen = self._seen + data if data else b""
        self._backend.refuse_secrets(seen, "the upload")
        self._seen = seen[max(0, len(seen) - self._overlap) :]


@contextmanager
def _upload_folder() -> Iterator[str]:
    """Raises DriveUnavailable if the disk cannot take the upload."""
    with tempfile.TemporaryDirectory(prefix="orch-upload-") as folder:
        try:
            yield folder
        except OSError as error:
            raise DriveUnavailable(
                f"the upload cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}",
                hint="it needs room for the upload, TMPDIR of `orch run` says where; of a folder for twice its size",
            ) from error


async def _receive_file(context: Context, request: Request, target: Path) -> None:
    """Raises StateTypeError for what holds a secret."""
    secrets = _Secrets(context)
    with target.open("wb") as file:
        while True:
            message = await request.receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            if data := message.get("body", b""):
                secrets.check(data)
                await asyncio.to_thread(file.write, data)
            if not message.get("more_body", False):
                return


def _delete(store: DriveStore, path: str, component: str | None) -> list[Manifest]:
    if component is None:
        owners = store.owners(path)
        if len(owners) > 1:
            raise DriveAmbiguous(f"{path!r} is published by {', '.join(owners)}", hint=WHOSE)
        component = owners[0] if owners else UPLOADER
    return store.delete(component, path)


def router(context: Context) -> APIRouter:
    """The routes, on this context."""
    routes = APIRouter(prefix="/api/v1/drive", tags=["drive"])
    stores = Stores(context)

    async def get(
        drive: DriveName,
        path: str,
        request: Request,
        component: ComponentQuery = None,
        version: Annotated[int | None, Query(description="this version instead of the newest")] = None,
        versions: Annotated[bool, Query(description="the kept versions of the path instead of itself")] = False,
        partial: Annotated[bool, Query(description="an unfinished version counts if it is the newest")] = False,
        recursive: Annotated[bool, Query(description="of a folder: all files below it")] = False,
        zip: Annotated[bool, Query(description="a folder as one zip file")] = False,
        verify: Annotated[bool, Query(description="compare the stored bytes with their checksums")] = False,
        link: Annotated[
            bool, Query(description="a file in a bucket: an address that needs no token, for a while")
        ] = False,
        seconds: Annotated[int, Query(ge=1, le=7 * 86400, description="how long the link holds")] = 3600,
    ) -> Response:
        store = stores.get(drive)
        path = check_path(path or ".")
        if versions:
            found = await asyncio.to_thread(store.versions, path, component=component, partial=partial)
            if not found:
                raise store.index().missing(path, component)
            return Json(context, found)
        if verify:
            count = await asyncio.to_thread(store.verify, path, component=component, version=version)
            return Json(context, {"path": path, "files": count})
        if link:
            return Json(context, await asyncio.to_thread(_link, store, path, component, version, seconds))
        return await asyncio.to_thread(
            _read, context, store, path, request, component, version, partial, recursive, zip
        )

    async def get_root(
        drive: DriveName,
        request: Request,
        component: ComponentQuery = None,
        recursive: Annotated[bool, Query(description="all files, not only what lies at the top")] = False,
    ) -> Response:
        store = stores.get(drive)
        return await asyncio.to_thread(_read, context, store, ".", request, component, None, False, recursive, False)

    async def put(
        drive: DriveName,
        path: str,
        request: Request,
        zip: Annotated[bool, Query(description="the body is a zip file: a folder, as one version")] = False,
        sync: Annotated[bool, Query(description="of a folder: what it lacks is gone from the Drive too")] = False,
    ) -> Response:
        store = stores.get(drive)
        path = check_path((path or ".") if zip else path)
        context.backend.refuse_secrets(path, "the path")
        with _upload_folder() as folder:
            source = Path(folder, path.rpartition("/")[2] if not zip else "files")
            if zip:
                archive = Path(folder, "zip")
                await _receive_file(context, request, archive)
                await asyncio.to_thread(unzip, archive, source, _Secrets(context).check)
            else:
                await _receive_file(context, request, source)
            manifest = await asyncio.to_thread(store.publish, UPLOADER, path, source, sync=sync)
        await context.backend.published(drive, to_json(manifest))
        etag = {} if manifest.is_dir else {"etag": f'"{manifest.entries[0].sha256}"'}
        return Json(context, _version_row(manifest), 201, etag)

    async def delete(drive: DriveName, path: str, component: ComponentQuery = None) -> Response:
        store = stores.get(drive)
        for manifest in await asyncio.to_thread(_delete, store, check_path(path), component):
            await context.backend.published(drive, to_json(manifest))
        return Response(status_code=204)

    routes.add_api_route("/{drive}", get_root, summary="What lies at the top of a Drive", responses=problems(422))
    routes.add_api_route(
        "/{drive}/{path:path}",
        get,
        summary="A file's bytes, or what a folder holds",
        responses=DOWNLOAD | problems(404, 409, 416),
        openapi_extra={"parameters": DOWNLOAD_HEADERS},
    )
    routes.add_api_route(
        "/{drive}/{path:path}",
        put,
        methods=["PUT"],
        status_code=201,
        summary="Upload a file, or a folder as a zip file",
        openapi_extra=BINARY,
    )
    routes.add_api_route(
        "/{drive}/{path:path}",
        delete,
        methods=["DELETE"],
        status_code=204,
        summary="Delete a file or folder",
        responses=problems(404, 409),
    )
    return routes
