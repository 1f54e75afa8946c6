"""A work's log files as one text: the tail of it, what is newer than some time, the lines that match, and what comes.

The files hold what the scripts wrote, byte for byte, between header lines that orch writes at the start of each
attempt and that carry its time. Single lines have none, so `since` is as fine as an attempt: it leaves out the
attempts that had ended before, and shows the one that was running then from its beginning.
"""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from re import _constants, _parser  # type: ignore[attr-defined]
from typing import IO, Any

from orch.errors import OrchError
from orch.server.redact import StreamRedactor

__all__ = ["HEADER", "LogReader", "compile_pattern", "parse_since"]

CHUNK = 64 * 1024
MAX_PATTERN = 500
MAX_LINE = 16 * 1024
"""A longer line is matched, and shown, in pieces."""

HEADER = re.compile(rb"^--- \S+ attempt \d+ (?P<at>\S+)")
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class BadLogQuery(OrchError):
    """The log cannot be asked for like this."""

    status = 422


def parse_since(text: str, now: float) -> float:
    """The moment meant by "90", "90s", "5m", "1h30m", "2d" (ago), or by an ISO 8601 time: seconds since the epoch.
    A time without zone is UTC. Raises BadLogQuery."""
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return now - float(text)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", text)
    if parts and "".join(number + unit for number, unit in parts) == text:
        return now - sum(float(number) * UNITS[unit] for number, unit in parts)
    try:
        return _timestamp(text)
    except ValueError:
        raise BadLogQuery(
            f"since={text!r} is no time", hint="seconds, 5m, 1h30m, or a time like 2025-01-31T12:00:00Z"
        ) from None


def _timestamp(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


def compile_pattern(text: str) -> re.Pattern[bytes]:
    """The regular expression, searched in each line. Raises BadLogQuery if it is none, or if matching it could take
    exponential time: `re` keeps the interpreter to itself meanwhile, so one pattern could stop the whole server."""
    if len(text) > MAX_PATTERN:
        raise BadLogQuery(f"the pattern has {len(text)} characters, at most {MAX_PATTERN} are allowed")
    try:
        pattern = re.compile(text.encode())
        parsed = _parser.parse(text.encode())
    except (re.error, RecursionError, OverflowError) as error:
        raise BadLogQuery(f"grep={text!r} is no regular expression: {error}") from None
    if _explodes(parsed, inside=False):
        raise BadLogQuery(
            f"grep={text!r} repeats a group that itself repeats or has alternatives",
            hint="write it without (...)* around such a part",
        )
    return pattern


def _explodes(parsed: Any, *, inside: bool) -> bool:
    """Whether an unbounded repeat holds another one or an alternative, the usual way into exponential time."""
    for op, arguments in parsed:
        unbounded = op in (_constants.MAX_REPEAT, _constants.MIN_REPEAT) and arguments[1] > 64
        if inside and (unbounded or op in (_constants.BRANCH, _constants.GROUPREF)):
            return True
        if any(_explodes(child, inside=inside or unbounded) for child in _children(arguments)):
            return True
    return False


def _children(arguments: Any) -> Iterator[Any]:
    if isinstance(arguments, _parser.SubPattern):
        yield arguments
    elif isinstance(arguments, tuple | list):
        for item in arguments:
            yield from _children(item)


class _Open:
    """One log file that is being shown: how far it is read, and the part of its last line that awaits its end."""

    def __init__(self, path: Path, offset: int, redactor: StreamRedactor, pattern: re.Pattern[bytes] | None) -> None:
        self.path = path
        self._offset = offset
        self._redactor = redactor
        self._pattern = pattern
        self._partial = b""
        self._complete = True

    def read(self) -> Iterator[bytes]:
        """What was added since the last time."""
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0  # truncated: it begins anew
            file.seek(self._offset)
            while data := file.read(CHUNK):
                self._offset += len(data)
                yield from self._show(self._redactor.feed(data))

    def close(self, *, newline: bool) -> Iterator[bytes]:
        """What was held back. `newline`: end the last line, as another file follows."""
        yield from self._show(self._redactor.flush())
        if self._partial and self._matches(self._partial):
            self._complete = False
            yield self._partial
        self._partial = b""
        if newline and not self._complete:
            yield b"\n"

    def _show(self, data: bytes) -> Iterator[bytes]:
        if self._pattern is not None:
            *lines, self._partial = (self._partial + data).split(b"\n")
            data = b"".join(line + b"\n" for line in lines if self._matches(line))
            while len(self._partial) > MAX_LINE:
                piece, self._partial = self._partial[:MAX_LINE], self._partial[MAX_LINE:]
                data += piece + b"\n" if self._matches(piece) else b""
        if data:
            self._complete = data.endswith(b"\n")
            yield data

    def _matches(self, line: bytes) -> bool:
        return self._pattern is None or self._pattern.search(line[:MAX_LINE]) is not None


class LogReader:
    """Reads the log files of one work, which may grow and become more.

    Args:
        files: gives the files, oldest first; asked anew at every `read`.
        redactor: makes the redactor of one file.
        tail: only the last so many lines of what is there at the first `read`.
        since: only attempts that had not ended at this time (seconds since the epoch).
        pattern: only lines in which it is found.
        follow: `read` will be called again, so keep back what is not complete.
    """

    def __init__(
        self,
        files: Callable[[], list[Path]],
        redactor: Callable[[], StreamRedactor],
        *,
        tail: int | None = None,
        since: float | None = None,
        pattern: re.Pattern[bytes] | None = None,
        follow: bool = False,
    ) -> None:
        self._files = files
        self._redactor = redactor
        self._tail = tail
        self._since = since
        self._pattern = pattern
        self._follow = follow
        self._current: _Open | None = None

    def read(self) -> Iterator[bytes]:
        """The first time what is there, later what is new. It reads files: call it in a thread."""
        if self._current is not None:
            paths = self._files()
            after = paths.index(self._current.path) + 1 if self._current.path in paths else 0
            yield from self._current.read()
            yield from self._copy([(path, 0) for path in paths[after:]])
            return
        starts = self._since_starts(self._files())
        if self._tail is None:
            yield from self._copy(starts)
        elif self._pattern is None and not self._redactor().spans_lines:
            yield from self._copy(_tail_starts(starts, self._tail))
        else:
            # Where the last lines begin is only known once the lines are.
            yield from deque(_lines(self._copy(starts)), maxlen=self._tail)

    def _copy(self, starts: Iterable[tuple[Path, int]]) -> Iterator[bytes]:
        for path, offset in starts:
            if self._current is not None:
                yield from self._current.close(newline=True)
            self._current = _Open(path, offset, self._redactor(), self._pattern)
            yield from self._current.read()
        if self._current is not None and not self._follow:
            yield from self._current.close(newline=False)

    def _since_starts(self, paths: list[Path]) -> list[tuple[Path, int]]:
        """The files that were written to after `since`, and where in them its attempt begins."""
        since = self._since
        if since is None:
            return [(path, 0) for path in paths]
        recent = [path for path in paths if path.stat().st_mtime >= since]
        if not recent and paths:
            return [(paths[-1], paths[-1].stat().st_size)]
        return [(path, _attempt_start(path, since)) for path in recent]


def _attempt_start(path: Path, since: float) -> int:
    """Offset of the header of the attempt that ran at `since`, or of the first one after it."""
    start = offset = 0
    with path.open("rb") as file:
        for line in file:
            if found := HEADER.match(line):
                try:
                    began = _timestamp(found["at"].decode())
                except ValueError:
                    began = since  # a script's own line that looks like a header
                if began > since:
                    break
                start = offset
            offset += len(line)
    return start


def _tail_starts(starts: list[tuple[Path, int]], count: int) -> list[tuple[Path, int]]:
    """Where to begin so that the last `count` lines of all files together are shown."""
    result: list[tuple[Path, int]] = []
    for path, start in reversed(starts):
        if result and count <= 0:
            break
        with path.open("rb") as file:
            offset, found = _last_lines(file, start, count)
        result.append((path, offset))
        count -= found
    return result[::-1]


def _last_lines(file: IO[bytes], start: int, count: int) -> tuple[int, int]:
    """Offset of the last `count` lines of the file, not before `start`, and how many lines these are."""
    end = file.seek(0, os.SEEK_END)
    if count <= 0 or end <= start:
        return end, 0
    file.seek(end - 1)
    found = 0 if file.read(1) == b"\n" else 1  # an open last line counts, and has no line end to be found by
    position = end
    while position > start:
        size = min(CHUNK, position - start)
        position -= size
        file.seek(position)
        block = file.read(size)
        cut = len(block)
        while (cut := block.rfind(b"\n", 0, cut)) >= 0:
            if found == count:
                return position + cut + 1, count
            found += 1
    return start, found


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with their ends; the last one as it is."""
    partial = b""
    for chunk in chunks:
        *lines, partial = (partial + chunk).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if partial:
        yield partial
