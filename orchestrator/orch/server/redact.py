"""Keeps secrets out of everything that shows a script's own output."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import msgspec

__all__ = ["MASK", "Redactor", "StreamRedactor"]

MASK = "***"


class StreamRedactor:
    """Redacts bytes that arrive in pieces: what may be the beginning of a secret is held back until it is known."""

    def __init__(self, secrets: tuple[bytes, ...]) -> None:
        self._secrets = secrets
        self._pattern = re.compile(b"|".join(map(re.escape, secrets))) if secrets else None
        self._held = b""

    @property
    def spans_lines(self) -> bool:
        """Whether a secret may be cut in two by a line end."""
        return any(b"\n" in secret for secret in self._secrets)

    def feed(self, data: bytes) -> bytes:
        """The part of the output that is safe to show by now."""
        if self._pattern is None:
            return data
        data = self._held + data
        shown: list[bytes] = []
        position = 0
        safe = self._safe_length(data)
        for match in self._pattern.finditer(data):
            if match.start() >= safe:
                break
            shown += (data[position : match.start()], MASK.encode())
            position = match.end()
        rest = data[position:]
        safe = self._safe_length(rest)
        self._held = rest[safe:]
        return b"".join((*shown, rest[:safe]))

    def flush(self) -> bytes:
        """The rest, at the end of the output."""
        rest, self._held = self._held, b""
        return rest if self._pattern is None else self._pattern.sub(MASK.encode(), rest)

    def _safe_length(self, data: bytes) -> int:
        """Length of `data` without the longest tail that is a true beginning of a secret."""
        longest = 0
        for secret in self._secrets:
            for length in range(min(len(secret) - 1, len(data)), longest, -1):
                if data.endswith(secret[:length]):
                    longest = length
                    break
        return len(data) - longest


class Redactor:
    """Replaces every secret value by ***. The values are asked for each time, as a resume may bring new ones."""

    def __init__(self, values: Callable[[], list[str]]) -> None:
        self._values = values
        self._known: tuple[str, ...] = ()
        self._text: re.Pattern[str] | None = None
        self._json: re.Pattern[bytes] | None = None

    def values(self) -> tuple[str, ...]:
        """The secrets, the longest first, so that one that contains another is replaced as a whole."""
        return tuple(sorted({value for value in self._values() if value}, key=lambda value: (-len(value), value)))

    def _refresh(self) -> None:
        values = self.values()
        if values != self._known:
            self._known = values
            self._text = re.compile("|".join(map(re.escape, values))) if values else None
            escaped = [re.escape(msgspec.json.encode(value)[1:-1]) for value in values]
            self._json = re.compile(b"|".join(escaped)) if values else None

    def text(self, text: str) -> str:
        """`text` without secrets."""
        self._refresh()
        return text if self._text is None else self._text.sub(MASK, text)

    def json(self, value: Any) -> bytes:
        """`value` as JSON without secrets in any string or key."""
        self._refresh()
        data = msgspec.json.encode(value)
        # The walk is for the rare hit: replacing in the bytes could break a number, and walking always would be slow.
        if self._json is None or self._json.search(data) is None:
            return data
        return msgspec.json.encode(self._walk(value))

    def stream(self) -> StreamRedactor:
        """A redactor for one stream of bytes, with the secrets of now."""
        return StreamRedactor(tuple(value.encode("utf-8", "surrogateescape") for value in self.values()))

    def _walk(self, value: Any) -> Any:
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {self._walk(key): self._walk(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._walk(item) for item in value]
        return value
