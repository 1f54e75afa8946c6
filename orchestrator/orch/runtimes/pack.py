"""The folder of an app as one file, for machines that do not have it. Needs pathspec (extra `ray`)."""

from __future__ import annotations

import os
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path

from orch.errors import UsageError

__all__ = ["IGNORE_FILE", "LIMIT", "pack"]

IGNORE_FILE = ".orchignore"
LIMIT = 500 * 1024 * 1024
"""Bytes of the packed folder that Ray takes (its limit is a little higher)."""
NEVER = (".orch/", ".git/", "__pycache__/", ".venv/")
LARGEST = 5
EPOCH = (1980, 1, 1, 0, 0, 0)


def pack(folder: Path, target: Path, top: str, *, limit: int = LIMIT) -> None:
    """Write the zip `target`: the same content makes the same bytes, which is what Ray knows a package by.

    top: name of the one folder in it, which holds everything of `folder` but what its `.orchignore` names (the syntax
    of .gitignore), `.orch`, `.git` and virtual environments. Links are followed. Raises UsageError if the file would be
    larger than `limit`, or something cannot be read.
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    sizes: list[tuple[int, str]] = []
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
                for path, name in _chosen(folder):
                    before = file.tell()
                    _add(archive, path, f"{top}/{name}")
                    sizes.append((file.tell() - before, name))
                    if file.tell() > limit:
                        raise _too_large(folder, sizes, limit)
                if not sizes:
                    archive.writestr(zipfile.ZipInfo(f"{top}/", EPOCH), b"")
        os.replace(draft, target)
    except OSError as error:
        raise UsageError(
            f"the app's folder cannot be sent: {error.filename or target}: {error.strerror}",
            hint=f"list what the works do not need in {folder / IGNORE_FILE}",
        ) from error
    finally:
        draft.unlink(missing_ok=True)


def _chosen(folder: Path) -> Iterator[tuple[Path, str]]:
    """Every file that travels, with its path below the folder, in a fixed order."""
    from pathspec import GitIgnoreSpec

    ignore_file = folder / IGNORE_FILE
    own = ignore_file.read_text().splitlines() if ignore_file.exists() else []
    ignored = GitIgnoreSpec.from_lines([*own, *NEVER])
    seen: set[str] = set()
    for where, folders, files in os.walk(folder, followlinks=True, onerror=_raise):
        real = os.path.realpath(where)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        below = os.path.relpath(where, folder)
        prefix = "" if below == "." else f"{below}/"
        folders[:] = sorted(
            name
            for name in folders
            if not ignored.match_file(f"{prefix}{name}/")
            and not os.path.exists(os.path.join(where, name, "pyvenv.cfg"))
        )
        for name in sorted(files):
            path = Path(where, name)
            if not ignored.match_file(f"{prefix}{name}") and path.is_file():
                yield path, f"{prefix}{name}"


def _raise(error: OSError) -> None:
    raise error


def _add(archive: zipfile.ZipFile, path: Path, name: str) -> None:
    entry = zipfile.ZipInfo(name, EPOCH)
    mode = path.stat().st_mode
    entry.external_attr = (stat.S_IFREG | (0o755 if mode & stat.S_IXUSR else 0o644)) << 16
    entry.compress_type = zipfile.ZIP_DEFLATED
    with path.open("rb") as source, archive.open(entry, "w", force_zip64=path.stat().st_size > 1 << 30) as sink:
        while data := source.read(1 << 20):
            sink.write(data)


def _too_large(folder: Path, sizes: list[tuple[int, str]], limit: int) -> UsageError:
    largest = ", ".join(f"{name} ({size / 2**20:.0f} MiB)" for size, name in sorted(sizes, reverse=True)[:LARGEST])
    return UsageError(
        f"{folder} is too large to be sent to the cluster: over {limit / 2**20:.0f} MiB packed; the largest: {largest}",
        hint=f"list what the works do not need in {folder / IGNORE_FILE} (as in a .gitignore), or put it on the Drive",
    )
