"""What all verbs print with: one line for an error, tables for people, JSON for programs."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from orch.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.table import Table

__all__ = ["STAGE_STYLES", "ago", "coloured", "error_line", "note", "print_json", "print_table", "report_error", "size"]

STAGE_STYLES = {
    "running": "green",
    "ready": "green",
    "succeeded": "green",
    "starting": "cyan",
    "pending": "cyan",
    "stopping": "yellow",
    "stopped": "yellow",
    "ended": "yellow",
    "unknown": "magenta",
    "failed": "red",
    "not_started": "bright_black",
}


_DROPPED_FIRST = ("ATTEMPT", "CALL", "PUBLISHED", "PROGRESS", "VERSION", "URL", "SINCE", "OWNER", "REASON")


_IN_PYTHON = {
    "list() shows": "`orch drive ls` shows",
    "overwrite=True": "--overwrite",
    "say whose: component_name=": "say whose: --component ",
}
"""Hints of the Drive are written for Python; the command line has its own words."""

_DISK_HINTS = {
    errno.ENOSPC: "free some space on that disk, then start again",
    errno.EDQUOT: "free some space there, then start again",
    errno.EROFS: "that disk is mounted read-only: mount it for writing, or use another folder",
    errno.EACCES: "check the permissions of the file and its folder",
}


def coloured(stream: Any) -> bool:
    """Whether escape sequences are welcome there (a terminal, TERM not dumb, no NO_COLOR)."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return False
    return bool(getattr(stream, "isatty", lambda: False)())


def error_line(error: BaseException) -> str:
    """`orch: what, where; hint`, always one line."""
    message, hint = getattr(error, "message", None), getattr(error, "hint", "")
    if isinstance(message, str) and isinstance(hint, str):
        # OrchError and DriveError, which are two trees.
        text = message
    elif isinstance(error, OSError) and error.strerror:
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
        hint = _DISK_HINTS.get(error.errno or 0, "")
    else:
        text = f"unexpected {type(error).__name__}: {error}"
        hint = "ORCH_DEBUG=1 shows where; please report it"
    for python, words in _IN_PYTHON.items():
        hint = hint.replace(python, words)
    line = " ".join(f"{text.rstrip('. ')}; {hint}".split() if hint else text.split())
    return f"orch: {line}"


def report_error(error: Exception) -> int:
    """Print the error's line (with ORCH_DEBUG=1 its traceback first) and return the exit code that it means."""
    while isinstance(error, ExceptionGroup):
        # Tasks that failed together: the first one is the story, the others mostly its echo.
        error = error.exceptions[0]
    if os.environ.get("ORCH_DEBUG") == "1":
        import traceback

        traceback.print_exception(error)
    line = error_line(error)
    sys.stdout.flush()
    sys.stderr.write((f"\x1b[31m{line}\x1b[0m" if coloured(sys.stderr) else line) + "\n")
    return 2 if isinstance(error, UsageError) else 1


def note(text: str) -> None:
    """A line beside the answer: on stderr, so that the answer can be piped."""
    sys.stderr.write(f"orch: {text}\n")


def print_json(value: Any) -> None:
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def rich_console() -> RichConsole:
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


def _cell(value: Any) -> str:
    return "" if value is None else " ".join(str(value).split())


def table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Table:
    """A rich table; `rows` are keyed by the lower-case column names. The column STAGE is coloured. Where the terminal
    is too narrow for all, it has the columns that matter most; pipes and --json have them all."""
    from rich.table import Table
    from rich.text import Text

    columns = _fitting(columns, rows, shutil.get_terminal_size().columns)
    made = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, overflow="fold")
    for row in rows:
        cells = []
        for column in columns:
            text = _cell(row.get(column.lower()))
            cells.append(Text(text, style=STAGE_STYLES.get(text, "") if column == "STAGE" else ""))
        made.add_row(*cells)
    return made


def _fitting(columns: Sequence[str], rows: Sequence[Mapping[str, Any]], width: int) -> Sequence[str]:
    def needs(column: str) -> int:
        return max(len(text) for text in (column, *(_cell(row.get(column.lower())) for row in rows)))

    columns = list(columns)
    for column in _DROPPED_FIRST:
        if sum(needs(name) + 1 for name in columns) - 1 <= width:
            break
        if column in columns:
            columns.remove(column)
    return columns


def print_table(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> None:
    """On a terminal a table that fits it; elsewhere plain columns, one line a row, nothing cut or wrapped."""
    if sys.stdout.isatty():
        rich_console().print(table(columns, rows))
        return
    cells = [[_cell(row.get(column.lower())) or "-" for column in columns] for row in rows]
    lines = [list(columns), *cells]
    widths = [max(len(line[n]) for line in lines) for n in range(len(columns))]
    for line in lines:
        sys.stdout.write("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n")


def ago(at: float | None, now: float | None = None) -> str:
    """A time in seconds since the epoch as "12s", "3m 05s", "2h 10m", "4d 3h" before now."""
    if not at:
        return ""
    seconds = max(0, int((time.time() if now is None else now) - at))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600}h"


def size(count: int | None) -> str:
    """Bytes for people: "812 B", "3.4 MiB"."""
    if count is None:
        return ""
    value = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{int(value)} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
