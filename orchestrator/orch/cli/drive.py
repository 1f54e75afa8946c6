"""`orch drive`: the files that Works share.

An app of this machine: the Drive is read where it lies. What is written goes by REST while the app runs, so that its
flow hears of it. An app on another machine: all by REST.
"""

from __future__ import annotations

import argparse
import os
import posixpath
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from orch.cli.output import print_json, print_table, size
from orch.cli.target import Target, find_target, read_arguments
from orch.errors import NotFound, UsageError
from orch_drive.errors import DriveAmbiguous

if TYPE_CHECKING:
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
    _common(parser)


def get(args: argparse.Namespace) -> int:
    """Verified; nothing is written if a local file differs and --overwrite was not said."""
    target = find_target(args.app)
    if target.folder is None:
        raise UsageError(
            f"drive get: {target.url} is on another machine",
            hint=f"download {target.url}/api/v1/drive/{args.drive}/{args.path} (a folder: with ?zip=true)",
        )
    store = _store(target, args.drive)
    manifest = store.resolve(args.path, component=args.component, version=args.version, partial=args.partial)
    if manifest is None:
        raise store.index().missing(args.path, args.component)
    name = posixpath.basename(manifest.path)
    to = Path(args.to or name or ".").expanduser()
    if to.is_dir() and not manifest.is_dir:
        to = to / name
    if to.exists() and manifest.is_dir and not to.is_dir():
        raise UsageError(f"drive get: {to} is a file, {args.path} is a folder", hint="say where to put it")
    written = store.fetch(manifest, to, overwrite=args.overwrite)
    if args.json:
        print_json({"to": str(to), "version": manifest.version, "files": written})
    else:
        sys.stdout.write(f"{to}: version {manifest.version}, {len(written)} of {len(manifest.entries)} files written\n")
    return 0


# ---- put and rm ----------------------------------------------------------------------------------------------------


def put_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="FILE", help="a local file or folder")
    parser.add_argument("path", nargs="?", metavar="PATH", help="its path on the Drive (default: its own name)")
    parser.add_argument("--drive", default="app", metavar="ID", help="which Drive (default: the app's own)")
    read_arguments(parser)


def put(args: argparse.Namespace) -> int:
    """Published under the name `api`. Each file of a folder is a version of its own."""
    source = Path(args.source).expanduser()
    if not source.exists():
        raise UsageError(
            f"drive put: there is no {source}", hint="say a local file or folder, then its path on the Drive"
        )
    path = args.path or source.absolute().name
    target = find_target(args.app)
    done: list[dict[str, Any]] = []
    if target.url is not None:
        with target.client() as client:
            for name, file in _local_files(source, path):
                done.append({"path": name, "version": client.drive_put(args.drive, name, file)["version"]})
    else:
        from orch.server.drive import UPLOADER

        store = _store(target, args.drive)
        for name, file in _local_files(source, path):
            done.append({"path": name, "version": store.publish(UPLOADER, name, file).version})
    _print_done(done, args, "published")
    return 0


def _local_files(source: Path, path: str) -> Iterator[tuple[str, Path]]:
    if source.is_dir():
        for folder, _, names in sorted(os.walk(source)):
            for name in sorted(names):
                file = Path(folder, name)
                yield posixpath.normpath(posixpath.join(path, file.relative_to(source).as_posix())), file
    else:
        yield path, source


def rm_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH")
    _common(parser)


def rm(args: argparse.Namespace) -> int:
    """Earlier versions are kept: `orch drive get --version N` still has them."""
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
        count = _store(target, args.drive).verify(args.path, component=args.component, version=args.version)
    if args.json:
        print_json({"path": args.path, "files": count, "ok": True})
    else:
        sys.stdout.write(f"{args.path}: {count} file{'' if count == 1 else 's'} verified\n")
    return 0
