"""Metrics read off the logs that training scripts write: Lightning's CSV files and TensorBoard's events.

The parsers take bytes as they were appended and keep what is not complete for the next time; `MetricsReader` finds the
files and remembers how far each was read. TensorBoard's files are read without TensorBoard: they are TFRecord files
(length, CRC, data, CRC) of `tensorboard.Event` protocol buffers, of which only scalars matter here.
"""

from __future__ import annotations

import csv
import math
import os
import struct
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["CsvMetrics", "EventMetrics", "MetricsReader"]

SCAN_FILES = 2_000
"""Directory entries looked at in one search for logs."""
READ_BYTES = 1 << 20
"""Bytes read from one file in one poll; the rest waits for the next one."""
SCAN_EVERY = 5
"""Polls between two searches for new files."""
MAX_TAGS = 500
RECORD_BYTES = 1 << 26
"""A record longer than this is no event: the file is given up."""


class CsvMetrics:
    """Lightning's `metrics.csv`: a header, then rows with blanks where a metric was not logged. PURE."""

    def __init__(self) -> None:
        self._header: list[str] | None = None
        self._rest = b""

    def feed(self, data: bytes) -> dict[str, float]:
        """The latest value per column in what was appended. Raises ValueError if this is no table."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        latest: dict[str, float] = {}
        for row in csv.reader(line.decode("utf-8", errors="replace") for line in lines):
            if self._header is None:
                self._header = row
            elif len(row) == len(self._header):
                for name, text in zip(self._header, row, strict=True):
                    if text and (value := _number(text)) is not None:
                        latest[name] = value
        return latest


class EventMetrics:
    """A TensorBoard event file. PURE."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> dict[str, float]:
        """The latest scalar per tag in what was appended. Raises ValueError if this is no event file."""
        buffer = self._rest + data
        latest: dict[str, float] = {}
        at = 0
        while len(buffer) - at >= 12:
            (length,) = struct.unpack_from("<Q", buffer, at)
            if length > RECORD_BYTES:
                raise ValueError(f"a record of {length} bytes")
            end = at + 12 + length + 4
            if end > len(buffer):
                break  # torn: the rest is still being written
            latest.update(_scalars(buffer[at + 12 : at + 12 + length]))
            at = end
        self._rest = buffer[at:]
        return latest


# Field numbers of tensorboard's event.proto, summary.proto and tensor.proto.
_EVENT_STEP, _EVENT_SUMMARY, _SUMMARY_VALUE, _VALUE_TAG, _VALUE_SIMPLE, _VALUE_TENSOR = 2, 5, 1, 1, 2, 8
_TENSOR_DTYPE, _TENSOR_CONTENT, _TENSOR_FLOATS, _TENSOR_DOUBLES = 1, 4, 5, 6
_FLOAT, _DOUBLE = 1, 2


def _scalars(event: bytes) -> Iterator[tuple[str, float]]:
    for field, summary in _fields(event):
        if field == _EVENT_SUMMARY and isinstance(summary, bytes):
            for inner, value in _fields(summary):
                if inner == _SUMMARY_VALUE and isinstance(value, bytes):
                    yield from _scalar(value)


def _scalar(message: bytes) -> Iterator[tuple[str, float]]:
    tag, value = "", None
    for field, content in _fields(message):
        if field == _VALUE_TAG and isinstance(content, bytes):
            tag = content.decode("utf-8", errors="replace")
        elif field == _VALUE_SIMPLE and isinstance(content, bytes) and len(content) == 4:
            (value,) = struct.unpack("<f", content)
        elif field == _VALUE_TENSOR and isinstance(content, bytes):
            value = _tensor_scalar(content)
    if tag and value is not None and math.isfinite(value):
        yield tag, value


def _tensor_scalar(tensor: bytes) -> float | None:
    """The value of a tensor of one float or double; None for anything else (images, histograms, text)."""
    dtype, content = 0, b""
    for field, value in _fields(tensor):
        if field == _TENSOR_DTYPE and isinstance(value, int):
            dtype = value
        elif field in (_TENSOR_CONTENT, _TENSOR_FLOATS, _TENSOR_DOUBLES) and isinstance(value, bytes):
            content = value
    form = {_FLOAT: "<f", _DOUBLE: "<d"}.get(dtype)
    if form is None or len(content) != struct.calcsize(form):
        return None
    (number,) = struct.unpack(form, content)
    return float(number)


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, varint or raw bytes) of a protocol buffer message. Raises ValueError where it is damaged."""
    at = 0
    while at < len(message):
        key, at = _varint(message, at)
        kind = key & 7
        if kind == 0:
            number, at = _varint(message, at)
            yield key >> 3, number
            continue
        if kind == 2:
            size, at = _varint(message, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
        if at + size > len(message):
            raise ValueError(f"a field of {size} bytes at byte {at} of {len(message)}")
        yield key >> 3, message[at : at + size]
        at += size


def _varint(message: bytes, at: int) -> tuple[int, int]:
    number = shift = 0
    while at < len(message) and shift < 70:
        byte = message[at]
        at += 1
        number |= (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
        shift += 7
    raise ValueError(f"a damaged number at byte {at}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


class MetricsReader:
    """Follows the logs below some folders. Blocking, in bounded steps: call `poll` in a thread.

    `folders` may also name files, and need not exist yet. Files last changed before `since` (seconds since the epoch)
    are those of earlier runs and are left alone.
    """

    def __init__(self, folders: Iterable[Path], *, since: float = 0.0) -> None:
        self._folders = [Path(folder) for folder in folders]
        self._since = since
        self._polls = 0
        self._files: dict[str, tuple[CsvMetrics | EventMetrics, int]] = {}
        self._given_up: set[str] = set()
        self._latest: dict[str, float] = {}
        self._lock = threading.Lock()

    def poll(self, *, final: bool = False) -> dict[str, float]:
        """The latest finite value per tag since the start, at most 500 tags. `final`: nothing is left for a later look
        (one that is under way is waited for)."""
        with self._lock:
            if final or self._polls % SCAN_EVERY == 0:
                self._find()
            self._polls += 1
            while self._read() and final:
                pass
            return dict(self._latest)

    def _read(self) -> bool:
        """One bounded step in each file. Whether any had something new."""
        news = False
        for path, (parser, offset) in list(self._files.items()):
            try:
                size = os.stat(path).st_size
                if size < offset:  # written anew
                    parser, offset = type(parser)(), 0
                if size == offset:
                    continue
                with open(path, "rb") as file:
                    file.seek(offset)
                    data = file.read(READ_BYTES)
                self._take(parser.feed(data))
                self._files[path] = (parser, offset + len(data))
                news = True
            except FileNotFoundError:
                del self._files[path]
            except (OSError, ValueError, csv.Error):  # not what its name says: no metrics from it
                del self._files[path]
                self._given_up.add(path)
        return news

    def _take(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            if name in self._latest or len(self._latest) < MAX_TAGS:
                self._latest[name] = value

    def _find(self) -> None:
        for path in self._candidates():
            if path in self._files or path in self._given_up:
                continue
            name = os.path.basename(path)
            try:
                if os.stat(path).st_mtime < self._since - 1.0:  # clocks of file systems are coarse
                    continue
            except OSError:
                continue
            if name == "metrics.csv":
                self._files[path] = (CsvMetrics(), 0)
            elif "tfevents" in name:
                self._files[path] = (EventMetrics(), 0)

    def _candidates(self) -> Iterator[str]:
        left = SCAN_FILES
        for folder in self._folders:
            if folder.is_file():
                yield str(folder)
            # The newest first, so that the limit cuts off what is old: version_12 before version_3.
            stack = [str(folder)]
            while stack and left > 0:
                try:
                    with os.scandir(stack.pop()) as entries:
                        listed = list(entries)
                except OSError:
                    continue
                left -= len(listed)
                below: list[tuple[float, str]] = []
                for entry in listed:
                    try:
                        if entry.is_dir(follow_symlinks=False):
                            below.append((entry.stat().st_mtime, entry.path))
                        elif entry.name == "metrics.csv" or "tfevents" in entry.name:
                            yield entry.path
                    except OSError:
                        continue
                stack += [path for _, path in sorted(below)]
