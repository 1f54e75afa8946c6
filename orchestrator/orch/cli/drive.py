"""`orch drive`: the files that Works share.

An app of this machine: the Drive is read where it lies. What is written goes by REST while the app runs, so that its
flow hears of it. An app on another machine: all by REST.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import posixpath
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orch.cli.output import print_json, print_table, size
from orch.cli.target import Target, find_target, read_arguments
from orch.errors import NotFound, UsageError
from orch_drive.errors import DriveAmbiguous, DriveConflict, DriveCorrupt

if TYPE_CHECKING:
    from orch.client import Client
    from orch_drive import DriveStore

__all__ = [
    "get",
    "get_arguments",
    "ls",
    "ls_arguments",
    "put",
    "put_arguments",
    "rm",
    "rm_arguments",
    "verify",
    "verify_arguments",
    "versions",
    "versions_arguments",
]

Progress = Callable[[int, int], None]
"""Told of bytes: how many of how many."""


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--drive", default="app", metavar="ID", help="which Drive (default: the app's own)")
    parser.add_argument("--component", metavar="NAME", help="whose files, where several works publish the same path")
    read_arguments(parser)


def _store(target: Target, drive: str) -> DriveStore:
    """The Drive where it lies: of an app of this machine."""
    from orch_drive import DriveStore

    folder = target.folder
    assert folder is not None
    if target.url is not None:
        with target.client() as client:
            base = client.app()["drive"]
    elif not folder.exists:
        raise target.not_running()
    else:
        base = folder.drive.as_uri()
        if folder.state_db.exists():
            from orch.cli.offline import read_offline

            base = read_offline(target).run.meta.get("drive") or base
    return DriveStore(base, drive)


# ---- ls ------------------------------------------------------------------------------------------------------------


def ls_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default=".", metavar="PATH", help="a folder, a file or a pattern")
    _common(parser)


def ls(args: argparse.Namespace) -> int:
    """All files at or below the path, or matching it."""
    from orch_drive.manifest import ancestors, check_path, glob_regex, is_glob

    path = check_path(args.path)
    target = find_target(args.app)
    if target.folder is None:
        with target.client() as client:
            files = client.drive_list(args.drive, component=args.component, recursive=True)
    else:
        files = [msgspec.to_builtins(info) for info in _store(target, args.drive).index().files(args.component)]
    regex = glob_regex(path) if is_glob(path) else None
    found = [
        file for file in files if any(name == path or (regex and regex.match(name)) for name in ancestors(file["path"]))
    ]
    if not found and path != ".":
        raise NotFound(f"drive ls: there is no {path!r} on the Drive {args.drive!r}", hint="`orch drive ls` lists it")
    if args.json:
        print_json(found)
        return 0
    rows = [
        {
            **file,
            "size": size(file["size"]),
            "owner": file["component"],
            "published": _clock(file["at"]),
        }
        for file in found
    ]
    print_table(("PATH", "SIZE", "VERSION", "OWNER", "PUBLISHED"), rows)
    return 0


def _clock(at: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))


# ---- get -----------------------------------------------------------------------------------------------------------


def get_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="a file or folder on the Drive")
    parser.add_argument("to", nargs="?", metavar="TO", help="where to put it (default: its own name, here)")
    parser.add_argument("--version", type=int, metavar="N", help="an earlier version that is kept")
    parser.add_argument("--partial", action="store_true", help="an unfinished version too")
    parser.add_argument("--overwrite", action="store_true", help="replace local files that differ")
    parser.add_argument(
        "--link", type=int, nargs="?", const=3600, metavar="SECONDS", help="of a file in a bucket: print an address"
    )
    _common(parser)


def get(args: argparse.Namespace) -> int:
    """Verified; nothing is written if a local file differs and --overwrite was not said."""
    from orch_drive.manifest import check_path

    path = check_path(args.path)
    to = Path(args.to or posixpath.basename(path) or ".").expanduser()
    target = find_target(args.app)
    if args.link is not None:
        return _print_link(target, args)
    if target.folder is None:
        with target.client() as client:
            found = client.drive_find(
                args.drive, path, component=args.component, version=args.version, partial=args.partial
            )
            to = _place(to, path, is_dir=[file["path"] for file in found] != [path])
            version, count = max((file["version"] for file in found), default=0), len(found)
            with _bar("get", args) as progress:
                written = _download(client, found, path, to, args, progress)
    else:
        store = _store(target, args.drive)
        manifest = store.resolve(path, component=args.component, version=args.version, partial=args.partial)
        if manifest is None:
            if store.resolve(path, component=args.component, version=args.version, partial=True) is not None:
                raise NotFound(
                    f"drive get: of {path!r} there is only an unfinished version yet", hint="--partial takes it"
                )
            raise store.index().missing(path, args.component)
        to = _place(to, path, is_dir=manifest.is_dir)
        version, count = manifest.version, len(manifest.entries)
        with _bar("get", args) as progress:
            written = store.fetch(manifest, to, overwrite=args.overwrite, progress=progress)
    if args.json:
        print_json({"to": str(to), "version": version, "files": written})
    else:
        sys.stdout.write(f"{to}: version {version}, {len(written)} of {count} files written\n")
    return 0


def _place(to: Path, path: str, *, is_dir: bool) -> Path:
    if to.is_dir() and not is_dir:
        return to / posixpath.basename(path)
    if to.exists() and is_dir and not to.is_dir():
        raise UsageError(f"drive get: {to} is a file, {path} is a folder", hint="say where to put it")
    return to


def _download(
    client: Client,
    found: list[dict[str, Any]],
    path: str,
    to: Path,
    args: argparse.Namespace,
    progress: Progress | None,
) -> list[str]:
    """As `DriveStore.fetch` does it, but over REST. Returns the names that were written, relative to the path."""
    from orch_drive.manifest import check_path

    if len(owners := sorted({str(file["component"]) for file in found})) > 1:
        raise DriveAmbiguous(f"{path!r} is published by {', '.join(owners)}", hint=f"--component {owners[0]}")
    todo: list[tuple[str, Path, dict[str, Any]]] = []
    for file in found:
        name = posixpath.relpath(check_path(file["path"]), path)
        local = to if name == "." else to / name
        if local.is_file() and _sha256(local) == file["sha256"]:
            continue
        if local.exists() and not (args.overwrite and local.is_file()):
            raise DriveConflict(f"{local} exists and differs from the Drive's", hint="--overwrite replaces it")
        todo.append((posixpath.basename(path) if name == "." else name, local, file))
    done, total = 0, sum(file["size"] for _, _, file in todo)
    for _, local, file in todo:
        local.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".orch-get-", dir=local.parent) as folder:
            fresh = Path(folder, "file")
            with fresh.open("wb") as out:
                for piece in client.drive_get(args.drive, file, partial=args.partial):
                    out.write(piece)
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)
            if _sha256(fresh) != file["sha256"]:
                raise DriveCorrupt(f"{file['path']!r} has changed on its way", hint="ask again")
            os.replace(fresh, local)
    return [name for name, _, _ in todo]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _print_link(target: Target, args: argparse.Namespace) -> int:
    if not 1 <= args.link <= 7 * 86400:
        raise UsageError("drive get: a link holds for 1 second to 7 days", hint="--link 3600")
    if target.folder is None:
        with target.client() as client:
            url = client.drive_link(
                args.drive, args.path, seconds=args.link, component=args.component, version=args.version
            )
    else:
        store = _store(target, args.drive)
        manifest = store.resolve(args.path, component=args.component, version=args.version)
        if manifest is None:
            raise store.index().missing(args.path, args.component)
        found = store.link(manifest, seconds=args.link)
        if found is None:
            raise UsageError(
                f"drive get: {args.path} has no link: only a single file in a bucket has one",
                hint="an app with `--drive s3://...` keeps its files in one",
            )
        url = found
    if args.json:
        print_json({"url": url})
    else:
        sys.stdout.write(url + "\n")
    return 0


@contextmanager
def _bar(verb: str, args: argparse.Namespace) -> Iterator[Progress | None]:
    """A progress bar on a terminal; what it yields is told of bytes."""
    if args.json or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn(verb), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(verb, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


# ---- put and rm ----------------------------------------------------------------------------------------------------


def put_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="a local file or folder")
    parser.add_argument(
        "path", nargs="?", metavar="PATH", help="its path on the Drive (default: its own name), or FOLDER/"
    )
    parser.add_argument("--sync", action="store_true", help="of a folder: what it lacks is gone from the Drive too")
    parser.add_argument("--drive", default="app", metavar="ID", help="which Drive (default: the app's own)")
    read_arguments(parser)


def put(args: argparse.Namespace) -> int:
    """Published under the name `api`, a folder as one version, merged over what was put there before."""
    from orch_drive.manifest import check_path

    source = Path(args.source).expanduser()
    if not source.exists():
        raise UsageError(
            f"drive put: there is no {source}", hint="say a local file or folder, then its path on the Drive"
        )
    path = args.path or source.absolute().name
    if source.is_file() and (path == "." or path.endswith("/")):
        path = posixpath.join(path, source.name)
    path = check_path(path)
    target = find_target(args.app)
    if target.url is not None:
        with target.client() as client, _bar("put", args) as progress:
            done = client.drive_put(args.drive, path, source, sync=args.sync, progress=progress)
        version, files = done["version"], done["files"]
    else:
        from orch.server.drive import UPLOADER

        store = _store(target, args.drive)
        with _bar("put", args) as progress:
            manifest = store.publish(UPLOADER, path, source, sync=args.sync, progress=progress)
        version, files = manifest.version, len(manifest.entries)
    _print_done(
        [{"path": path, "version": version, **({"files": files} if source.is_dir() else {})}], args, "published"
    )
    return 0


def rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    _common(parser)


def rm(args: argparse.Namespace) -> int:
    """With its earlier versions. A file inside a published folder stays in that folder's earlier versions."""
    target = find_target(args.app)
    if target.url is not None:
        with target.client() as client:
            client.drive_delete(args.drive, args.path, component=args.component)
    else:
        store = _store(target, args.drive)
        owners = [args.component] if args.component else store.owners(args.path)
        if not owners:
            raise store.index().missing(args.path)
        if len(owners) > 1:
            raise DriveAmbiguous(
                f"drive rm: {args.path!r} is published by {', '.join(owners)}", hint=f"--component {owners[0]}"
            )
        store.delete(owners[0], args.path)
    _print_done([{"path": args.path}], args, "deleted")
    return 0


def _print_done(done: list[dict[str, Any]], args: argparse.Namespace, what: str) -> None:
    if args.json:
        print_json(done)
        return
    for entry in done:
        version = f" as version {entry['version']}" if "version" in entry else ""
        if "files" in entry:
            version += f", {entry['files']} file{'' if entry['files'] == 1 else 's'}"
        sys.stdout.write(f"{entry['path']}: {what}{version}\n")


# ---- versions and verify -------------------------------------------------------------------------------------------


def versions_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    _common(parser)


def versions(args: argparse.Namespace) -> int:
    """Oldest first, every owner's, the unfinished one too."""
    target = find_target(args.app)
    if target.folder is None:
        with target.client() as client:
            found = client.drive_versions(args.drive, args.path, component=args.component, partial=True)
    else:
        store = _store(target, args.drive)
        found = [msgspec.to_builtins(i) for i in store.versions(args.path, component=args.component, partial=True)]
        if not found:
            raise store.index().missing(args.path, args.component)
    if args.json:
        print_json(found)
        return 0
    rows = [
        {
            **info,
            "owner": info["component"],
            "size": size(info["size"]),
            "published": _clock(info["at"]),
            "complete": "no" if info["partial"] else "yes",
        }
        for info in found
    ]
    print_table(("PATH", "OWNER", "VERSION", "FILES", "SIZE", "PUBLISHED", "CALL", "COMPLETE"), rows)
    return 0


def verify_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", nargs="?", default=".", metavar="PATH", help="default: everything")
    parser.add_argument("--version", type=int, metavar="N", help="an earlier version that is kept")
    _common(parser)


def verify(args: argparse.Namespace) -> int:
    """Exit code 1, naming the file, if stored bytes do not match what was published."""
    target = find_target(args.app)
    if target.folder is None:
        with target.client() as client:
            count = client.drive_verify(args.drive, args.path, component=args.component, version=args.version)
    else:
        with _bar("verify", args) as progress:
            count = _store(target, args.drive).verify(
                args.path, component=args.component, version=args.version, progress=progress
            )
    if args.json:
        print_json({"path": args.path, "files": count, "ok": True})
    else:
        sys.stdout.write(f"{args.path}: {count} file{'' if count == 1 else 's'} verified\n")
    return 0
