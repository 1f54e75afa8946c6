"""Progress and last lines, read off the raw output of scripts that know nothing of orch. PURE: no I/O, no clock.

What is understood: tqdm's bars (nested ones too), rich's and Lightning's and Keras' bars, "epoch 3/10", "Epoch [3/10]",
"Epoch 3: 40%|...", "step 12/100", "progress: 37%", "37% done". A bar within an epoch counts as part of that epoch when
the number of epochs is known: from "n/m", from `max_epochs=3` in the output, or from the command's own arguments.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Sequence

__all__ = ["ProgressParser", "epochs_in"]

KEEP_LINES = 200
LINE_BYTES = 8_000
"""So much of a line is kept while it is not ended; the rest of it is dropped unread."""
LINE_CHARS = 2_000
LOOKED_AT = 1_000
"""Promising pieces of output looked at per feed, the last ones: a flood must not cost more than a stream."""

ABANDONED = 4
"""Inner bars that may finish without a move of the outer one, which was left before its end then."""

_ANSI = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\^_])")
_PROMISING = re.compile(rb"(?i)epoch|step|iter|batch|progress|%\||\d/\d+ *[\[\xe2]|\xe2\x94\x81|% *(?:done|complete)")

# Numbers must be followed by something else, so that a piece that is still being written is not misread.
_TQDM = re.compile(r"(?<![\d.])(?P<percent>\d{1,3})%\|(?:[^|]*\|)? *(?:(?P<n>\d+)/(?P<m>\d+)(?= )|[\d.]+\w*/)")
_BLOCKS = re.compile(r"(?<![━╸╺])[━╸╺]{2}[━╸╺ ]*+(?<= )(?:(?P<n>\d+)/(?P<m>\d+)(?=\D)|(?P<percent>\d{1,3})%)")
_KERAS = re.compile(r"^ *(?P<n>\d+)/(?P<m>\d+) +(?:\[[=>. ]|[━╸╺])")
_EPOCH = re.compile(
    r"\bepochs?\b *[:#=]? *[\[(]? *(?P<n>\d+)(?: *(?:/|of|out of) *(?P<m>\d+))?(?=\D)"
    r"(?:[\])]? *[:,|]? *[\[(] *(?P<k>\d+) */ *(?P<l>\d+)(?=\D))?",
    re.IGNORECASE,
)
_STEP = re.compile(
    r"\b(?:global[ _])?(?:step|iter|iteration|batch)\b *[:#=]? *[\[(]? *(?P<n>\d+) *(?:/|of) *(?P<m>\d+)(?=\D)",
    re.IGNORECASE,
)
_PERCENT = re.compile(
    r"\bprogress\b\W{0,4}(?P<said>\d{1,3}(?:\.\d+)?) ?%|(?P<done>\d{1,3}(?:\.\d+)?) ?% *(?:done|complete)",
    re.IGNORECASE,
)
_EPOCHS = re.compile(
    r"(?<![a-z_])(?:max_|num_|n_|num_train_)?epochs\b['\"]?(?: *[=:] *| +)(?P<m>[1-9]\d*)\b(?![./%])", re.IGNORECASE
)
_SANITY = re.compile(r"\bsanity", re.IGNORECASE)
_ASIDE = re.compile(r"\b(?:valid|val\b|eval|test|predict)", re.IGNORECASE)


def epochs_in(words: Sequence[str]) -> int | None:
    """The number of epochs that a command line asks for (`--trainer.max_epochs 3`, `--epochs=3`), if it says so."""
    found = _EPOCHS.search(" ".join(word.lstrip("-").replace("-", "_") for word in words))
    return int(found["m"]) if found else None


class ProgressParser:
    """Fed with what a script writes, as it comes; remembers how far it is and its last lines, in bounded memory.

    `argv` is the script's command line, which may name the number of epochs.
    """

    def __init__(self, argv: Sequence[str] = ()) -> None:
        self._lines: deque[bytes] = deque(maxlen=KEEP_LINES)
        self._pending = b""  # the piece since the last \r or \n
        self._skipping = False  # the piece is too long: wait for its end
        self._shown = b""  # the last piece of this line that was not blank
        self._progress: float | None = None
        self._expected = epochs_in(argv)
        self._epochs: int | None = None
        self._epoch: int | None = None  # from 0
        self._from_zero = False
        self._bars_in_epochs = False
        self._bars: dict[tuple[str, int], float] = {}  # unfinished bars, the outermost first
        self._idle = 0  # inner bars that finished since the outermost moved
        self._cycle_over = False
        self._only_aside = False

    @property
    def progress(self) -> float | None:
        """0..1, or None as long as nothing was said about it."""
        return self._progress

    def feed(self, data: bytes) -> float | None:
        """Takes the next bytes of output, cut anywhere; returns `progress`."""
        if self._skipping:
            end = min((at for at in (data.find(b"\r"), data.find(b"\n")) if at >= 0), default=-1)
            if end < 0:
                return self._progress
            data = data[end:]
            self._skipping = False
        data = self._pending + data
        *lines, rest = data.split(b"\n")
        for line in lines[-KEEP_LINES:]:
            self._show(line.split(b"\r"))
            if self._shown:
                self._lines.append(self._shown[:LINE_BYTES])
            self._shown = b""
        *ended, self._pending = rest.split(b"\r")
        self._show(ended)
        if _PROMISING.search(data):
            pieces = data[: len(data) - len(self._pending)].replace(b"\r", b"\n").split(b"\n")
            for piece in [piece for piece in pieces if _PROMISING.search(piece)][-LOOKED_AT:]:
                self._look(piece, "\n")
            # A bar is drawn as \r + text: it stands here until the next one. Told twice is told once.
            self._look(self._pending, "")
        if len(self._pending) > LINE_BYTES:
            self._pending = self._pending[:LINE_BYTES]
            self._skipping = True
        return self._progress

    def tail(self, n: int = 20) -> list[str]:
        """The last `n` lines that are not blank, the unfinished one included, as a terminal would end up showing them:
        of pieces separated by \\r the last, without colours and cursor movements, at most 2,000 characters each."""
        found: list[str] = []
        for raw in reversed([*self._lines, self._shown if _blank(self._pending) else self._pending]):
            if len(found) >= n:
                break
            text = _clean(raw).rstrip()
            if text.strip():
                found.append(text if len(text) <= LINE_CHARS else text[: LINE_CHARS - 1] + "…")
        return found[::-1]

    def _show(self, pieces: Sequence[bytes]) -> None:
        for piece in reversed(pieces):
            if not _blank(piece):
                self._shown = piece
                return

    # -- what a piece of output says

    def _look(self, piece: bytes, end: str) -> None:
        text = _clean(piece[:LINE_CHARS]) + end
        if _SANITY.search(text):
            return
        bar = _TQDM.search(text) or _BLOCKS.search(text) or _KERAS.search(text)
        if bar is not None:
            self._bar(bar, text[: bar.start()].strip(" :"))
            return
        if epoch := _EPOCH.search(text):
            if epoch["m"] is not None or epoch["k"] is not None:
                part = _fraction(epoch["k"], epoch["l"]) if epoch["k"] is not None else None
                if part is None and (step := _STEP.search(text, epoch.end())):
                    part = _fraction(step["n"], step["m"])
                self._in_epoch(int(epoch["n"]), _int(epoch["m"]), part)
                return
        if step := _STEP.search(text):
            self._bar(step, "")
        elif percent := _PERCENT.search(text):
            self._raise_to(float(percent["said"] or percent["done"]) / 100)
        elif self._expected is None and (epochs := _EPOCHS.search(text)):
            self._expected = int(epochs["m"])

    def _bar(self, bar: re.Match[str], desc: str) -> None:
        said = bar.groupdict()
        part = _fraction(said["n"], said["m"]) if said["m"] is not None else int(said["percent"]) / 100
        if part is None:
            return
        if epoch := _EPOCH.search(desc + "\n"):
            self._bars_in_epochs = True
            self._in_epoch(int(epoch["n"]), _int(epoch["m"]), part)
        elif _ASIDE.search(desc):
            # Validation between two stretches of training is no progress; alone it is, until something else begins.
            if self._epoch is None and not self._bars and (self._progress is None or self._only_aside):
                self._only_aside = self._cycle_over = True
                self._raise_to(part)
        elif self._epoch is None:
            self._free_bar(desc, int(said["m"] or 100), part)
        elif not self._bars_in_epochs:
            self._in_epoch_part(part)

    def _free_bar(self, desc: str, total: int, part: float) -> None:
        """A bar without an epoch: the outermost of those that are unfinished counts, with the next one as its part."""
        key = (re.sub(r"\d+", "", desc), total)
        fresh = not self._bars and self._cycle_over and part < 1.0
        if fresh:
            self._cycle_over = self._only_aside = False
        self._bars[key] = part
        outer = next(iter(self._bars))
        value = self._bars[outer]
        if key == outer:
            self._idle = 0
        else:
            value = min(1.0, value + part / outer[1])
            if part >= 1.0:
                del self._bars[key]
                self._idle += 1
        if self._bars[outer] >= 1.0 or self._idle >= ABANDONED or len(self._bars) > ABANDONED:
            self._bars.clear()
            self._idle = 0
            self._cycle_over = True
        self._raise_to(value, fresh=fresh)

    def _in_epoch(self, n: int, m: int | None, part: float | None) -> None:
        self._from_zero = self._from_zero or n == 0
        index = n if self._from_zero else n - 1
        if m is not None:
            # "Epoch 0/2" is the first of three; whoever knows the number beforehand decides.
            self._epochs = self._expected if self._expected in (m, m + 1) else m + 1 if self._from_zero else m
        fresh = self._epoch is None or index < self._epoch
        changed = index != self._epoch
        self._epoch = index
        if part is None and not self._bars_in_epochs and not self._from_zero:
            part = 1.0  # "epoch 3/10" stands at the end of the third as a rule
        self._in_epoch_part(part or 0.0, fresh=fresh, changed=changed)

    def _in_epoch_part(self, part: float, *, fresh: bool = False, changed: bool = False) -> None:
        assert self._epoch is not None
        epochs = self._epochs or self._expected
        if epochs is None:
            self._raise_to(part, fresh=changed)  # each epoch is a cycle of its own
        else:
            self._raise_to((self._epoch + part) / epochs, fresh=fresh)

    def _raise_to(self, value: float, *, fresh: bool = False) -> None:
        """Forward only, except where a new cycle has begun."""
        value = min(1.0, max(0.0, value))
        if fresh or self._progress is None or value > self._progress:
            self._progress = value


def _blank(piece: bytes) -> bool:
    if b"\x1b" in piece:
        return not _clean(piece[:LINE_BYTES]).strip()
    return not piece or piece.isspace()


def _clean(raw: bytes) -> str:
    return _ANSI.sub("", raw.decode("utf-8", errors="replace"))


def _int(text: str | None) -> int | None:
    return None if text is None else int(text)


def _fraction(n: str, m: str) -> float | None:
    total = int(m)
    return min(1.0, int(n) / total) if total else None
