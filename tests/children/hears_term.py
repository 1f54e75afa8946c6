"""Ends itself with exit code 7 at SIGTERM, after a last line."""

import pathlib
import signal
import sys


def end(*_: object) -> None:
    print("last words", flush=True)
    sys.exit(7)


signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
while True:
    signal.pause()
