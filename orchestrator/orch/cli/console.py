"""What `orch run` says while it runs: called by the service, written to the terminal line by line."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
import webbrowser
from collections.abc import Callable
from typing import TextIO

from orch.cli.output import STAGE_STYLES, coloured

__all__ = ["Console", "open_browser", "printable", "wants_browser"]

_CODES = {
    "red": "31",
    "green": "32",
    "yellow": "33",
    "magenta": "35",
    "cyan": "36",
    "bright_black": "90",
    "bold": "1",
}
_WORK_COLOURS = ("36", "35", "34", "33", "32", "96", "95", "94", "93", "92")


class Console:
    """The lines of one `orch run`. Any thread may call it. Secrets are redacted by the caller.

    A terminal that has gone away (SIGHUP, a closed pipe) silences it and never harms the app.

    on_url: called once with the URL and its token, when the app is served. ends_by: what ends the app, in words.
    """

    def __init__(
        self,
        out: TextIO | None = None,
        err: TextIO | None = None,
        *,
        on_url: Callable[[str], None] | None = None,
        ends_by: str = "Ctrl-C",
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._err = sys.stderr if err is None else err
        self._colour = coloured(self._out)
        self._lock = threading.Lock()
        self._on_url = on_url
        self._ends_by = ends_by
        self._prefixes: dict[str, str] = {}
        self._stages: dict[str, tuple[str, str]] = {}
        self._gone: set[int] = set()
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        """Progress of the start: what is being done now."""
        self._write(self._out, f"{self._paint('orch', 'bright_black')} {text}")

    def work(self, name: str, stage: str, detail: str = "") -> None:
        """A work has come to a stage. The same again is not repeated."""
        with self._lock:
            if self._stages.get(name) == (stage, detail):
                return
            before, _ = self._stages.get(name, ("", ""))
            self._stages[name] = (stage, detail)
        if (before, stage) == ("ready", "running"):
            stage = "not ready"
        tail = f" ({detail})" if detail else ""
        self._write(self._out, f"{self._prefix(name)} {self._paint(stage, STAGE_STYLES.get(stage, ''))}{tail}")

    def failed(self, name: str, detail: str) -> None:
        """A call has failed, and the app with it: said on stderr, and not once more as the work's stage."""
        with self._lock:
            told = self._stages.get(name) == ("failed", detail)
            self._stages[name] = ("failed", detail)
        if not told:
            self.error(f"{name} failed{f': {detail}' if detail else ''}")

    def url(self, url_with_token: str) -> None:
        """The app is served."""
        seconds = time.monotonic() - self._started
        self._write(
            self._out,
            f"{self._paint('orch', 'bright_black')} ready after {seconds:.1f} s; {self._ends_by} stops the app",
        )
        self._write(self._out, f"\n    {self._paint(url_with_token, 'bold')}\n")
        if self._on_url is not None:
            call, self._on_url = self._on_url, None
            call(url_with_token)

    def log(self, work: str, line: str) -> None:
        """One line of a work's output."""
        self._write(self._out, f"{self._prefix(work)} {printable(line, colour=self._colour)}")

    def note(self, text: str) -> None:
        """Something worth knowing."""
        self._write(self._out, f"{self._paint('orch', 'bright_black')} {text}")

    def warn(self, text: str) -> None:
        """Something that deserves attention, on stderr."""
        self._write(self._err, self._paint(f"orch: warning: {text}", "yellow", self._err))

    def error(self, text: str) -> None:
        """What went wrong, on stderr; a traceback may have several lines."""
        self._write(self._err, self._paint(f"orch: {text}", "red", self._err))

    def secret(self, name: str) -> str:
        """Ask for a secret's value; empty where there is nobody to ask."""
        from orch.cli.run import ask_secret

        return ask_secret(name) if sys.stdin is not None and sys.stdin.isatty() else ""

    def stopping(self, seconds: float) -> None:
        """The app is asked to end; its works have that long."""
        limit = f" (up to {seconds:.0f} s)" if seconds else ""
        self.note(f"stopping{limit}" + ("; Ctrl-C again kills" if self._ends_by == "Ctrl-C" else ""))

    def done(self, code: int, message: str = "") -> None:
        """The app has ended."""
        tail = f": {message}" if message else ""
        if code in (0, 130):
            self.note(f"stopped{tail}")
        else:
            self.error(f"failed{tail}")

    # -- how it is written

    def _prefix(self, name: str) -> str:
        if name not in self._prefixes:
            code = _WORK_COLOURS[len(self._prefixes) % len(_WORK_COLOURS)]
            self._prefixes[name] = f"\x1b[{code}m{name} |\x1b[0m" if self._colour else f"{name} |"
        return self._prefixes[name]

    def _paint(self, text: str, style: str, stream: TextIO | None = None) -> str:
        wanted = self._colour if stream is None else coloured(stream)
        code = _CODES.get(style)
        return f"\x1b[{code}m{text}\x1b[0m" if wanted and code else text

    def _write(self, stream: TextIO, text: str) -> None:
        with self._lock:
            if id(stream) in self._gone:
                return
            try:
                try:
                    stream.write(text + "\n")
                except UnicodeEncodeError:
                    encoding = stream.encoding or "ascii"
                    stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
                stream.flush()
            except (OSError, ValueError):
                # The terminal or the pipe is gone (ValueError: its file object is closed); the log files have it all.
                self._gone.add(id(stream))


_ESCAPES = re.compile(r"\x1b(?:\[[0-?]*[ -/]*([@-~])|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.?)")


def printable(line: str, *, colour: bool) -> str:
    """The last state of a `\r` bar, without what would move the cursor out of the line; colours only if wanted."""
    line = line.rstrip("\r\n").rpartition("\r")[2]
    line = _ESCAPES.sub(lambda found: found[0] if colour and found[1] == "m" else "", line)
    kept = "".join(char if char in "\t\x1b" or char.isprintable() or char >= "\xa0" else " " for char in line)
    return f"{kept}\x1b[0m" if "\x1b" in kept else kept


def wants_browser(choice: bool | None) -> bool:
    """Whether to open one: as told, else only where somebody sits in front of a screen."""
    if choice is not None:
        return choice
    if not sys.stdout.isatty() or os.environ.get("SSH_CONNECTION"):
        return False
    return sys.platform == "darwin" or bool(os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"))


def open_browser(url: str) -> None:
    """Open it without waiting for it: a text browser would hold the terminal."""
    threading.Thread(target=webbrowser.open, args=(url,), name="browser", daemon=True).start()
