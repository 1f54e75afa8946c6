"""Ignores SIGTERM and SIGINT; only SIGKILL ends it."""

import pathlib
import signal

signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path("ready").touch()
while True:
    signal.pause()
