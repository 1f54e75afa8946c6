"""Follow a call's log file: whole lines with their offsets, bounded work per look, `\\r` bars collapsed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from orch.errors import NotFound

__all__ = ["LogTail", "last_lines", "showable"]

MOST = 256 * 1024
"""Bytes read at one look. A script that writes faster is followed at its end; the file holds everything."""
CONTEXT = 4 * 1024
"""Bytes before the end of a log at which a reader begins that comes late."""
LINE = 4_000
"""Characters shown of one line."""


class LogTail:
    """Where a reader of one log file is."""

    def __init__(self, work: str, call: str, path: Path) -> None:
        self.work = work
        self.call = call
        self.path = path
        self.offset = 0
        self._rest = b""

    def come_late(self) -> None:
        """Begin near the end of what is there, with a whole line: an earlier server has shown the rest."""
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                if size > CONTEXT:
                    file.seek(size - CONTEXT)
                    self.offset = size - CONTEXT + file.read(CONTEXT).find(b"\n") + 1
        except FileNotFoundError:
            self.offset = 0

    @property
    def name(self) -> str:
        return f"{self.work}/{self.path.name}"

    def read(self, *, final: bool = False) -> list[tuple[int, list[str]]]:
        """New whole lines as [(offset of the first, lines)]; with `final` the unfinished last line too."""
        found: list[tuple[int, list[str]]] = []
        try:
            size = os.stat(self.path).st_size
        except FileNotFoundError:
            return found
        if size > self.offset:
            if size - self.offset > MOST:
                skipped = size - self.offset - MOST
                found.append((self.offset, [f"... {skipped} bytes not shown, they are in {self.path.name} ..."]))
                self.offset += skipped
                self._rest = b""
            with self.path.open("rb") as file:
                file.seek(self.offset)
                data = file.read(MOST)
            start = self.offset - len(self._rest)
            self.offset += len(data)
            whole, newline, self._rest = (self._rest + data).rpartition(b"\n")
            if newline:
                found.append((start, [_shown(line) for line in whole.split(b"\n")]))
            if len(self._rest) > MOST:
                self._rest = self._rest[-LINE:]
        if final and self._rest:
            found.append((self.offset - len(self._rest), [_shown(self._rest)]))
            self._rest = b""
        return found


ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
"""Control sequences of terminals (ECMA-48 CSI and OSC): colours, cursor movements, titles."""


def _shown(line: bytes) -> str:
    text = line.rstrip(b"\r").rpartition(b"\r")[2][:LINE]
    return ESCAPE.sub("", text.decode(errors="replace"))


def last_lines(path: Path, count: int = 20) -> list[str]:
    """The last lines of a log without its header lines; [] if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            size = file.tell()
            file.seek(max(0, size - 64 * 1024))
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return []
    shown = [_shown(line) for line in lines]
    return [line for line in shown if line and not line.startswith("# orch ")][-count:]


def showable(paths: Sequence[Path], secrets: Mapping[int, Sequence[str]]) -> list[Path]:
    """The log files that may be shown: not those of runs that had secrets (`secrets`: names by run number) which cannot
    be taken out any more, as their values are kept nowhere. Raises NotFound if that leaves none of them."""
    hidden = {path: names for path in paths if (names := secrets.get(_run_of(path)))}
    if hidden and len(hidden) == len(paths):
        path, names = list(hidden.items())[-1]
        raise NotFound(
            f"{path.name} is not shown: its run had the secrets {', '.join(names)}, whose values are not kept, so they "
            "cannot be taken out of what the script said",
            hint=f"read the file itself: {path}",
        )
    return [path for path in paths if path not in hidden]


def _run_of(path: Path) -> int:
    number = path.name.partition("-")[0]
    return int(number) if number.isdigit() else 0
