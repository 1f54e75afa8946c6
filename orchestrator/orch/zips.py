"""Folders as one zip file: written while it is sent, and taken apart into a folder."""

from __future__ import annotations

import os
import stat
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from orch.errors import StateTypeError
from orch_drive.errors import DriveConflict, DrivePathError
from orch_drive.manifest import check_path

__all__ = ["unzip", "zipped"]

CHUNK = 256 * 1024


class _Sink:
    """What zipfile writes to: it cannot seek, and is emptied after each piece."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes, /) -> int:
        self._pieces.append(bytes(data))
        return len(data)

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Nothing to close."""

    def take(self) -> bytes:
        data = b"".join(self._pieces)
        self._pieces.clear()
        return data


def zipped(
    files: Iterable[tuple[str, bool, float, Callable[[], BinaryIO]]],
    *,
    compress: bool,
    moved: Callable[[int], None] = lambda count: None,
) -> Iterator[bytes]:
    """The zip file of these (name, executable, time, what opens it), in pieces. `moved` is told of their bytes."""
    sink = _Sink()
    method = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, executable, at, opened in files:
            info = zipfile.ZipInfo(name, _date(at))
            info.compress_type = method
            info.external_attr = (stat.S_IFREG | (0o755 if executable else 0o644)) << 16
            with opened() as source, archive.open(info, "w", force_zip64=True) as target:
                while data := source.read(CHUNK):
                    target.write(data)
                    moved(len(data))
                    yield sink.take()
    yield sink.take()


def _date(at: float) -> tuple[int, int, int, int, int, int]:
    """The time of day, as zip files say it: there are none before 1980 and after 2107."""
    local = time.localtime(min(max(at, 315_619_200), 4_354_732_800))
    return local.tm_year, local.tm_mon, local.tm_mday, local.tm_hour, local.tm_min, local.tm_sec


def unzip(archive: Path, folder: Path, check: Callable[[bytes], None]) -> None:
    """Take the archive apart into this new folder, and remove it. `check` is told of the bytes of each file, after an
    empty piece.

    Raises StateTypeError for what is no zip file, DrivePathError for a link and a name that leads out of the folder,
    DriveConflict for two files of one name, and what `check` raises.
    """
    folder.mkdir()
    try:
        with zipfile.ZipFile(archive) as found:
            for info in found.infolist():
                name = check_path(info.filename)
                mode = info.external_attr >> 16
                if stat.S_ISLNK(mode):
                    raise DrivePathError(f"{name!r} is a link", hint="put the file itself into the zip file")
                target = folder / name
                if info.is_dir():
                    target.mkdir(parents=True, exist_ok=True)
                    continue
                target.parent.mkdir(parents=True, exist_ok=True)
                check(b"")
                with found.open(info) as source, target.open("xb") as out:
                    while data := source.read(CHUNK):
                        check(data)
                        out.write(data)
                if mode & 0o100:
                    target.chmod(0o755)
                at = time.mktime((*info.date_time, 0, 0, -1))
                os.utime(target, (at, at))
    except (FileExistsError, NotADirectoryError, IsADirectoryError):
        raise DriveConflict(f"the zip file holds {name!r} twice, or names that are one on this disk") from None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise StateTypeError(f"this is no zip file that can be read: {error}", hint="zip -r it") from error
    archive.unlink()
