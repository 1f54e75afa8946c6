"""Exits with code 3 and leaves a child in its process group that ignores SIGTERM; its pid is in the file `child`."""

import os
import pathlib
import signal

reader, writer = os.pipe()
if (pid := os.fork()) == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.write(writer, b"x")
    while True:
        signal.pause()
os.read(reader, 1)  # it ignores SIGTERM from here on
pathlib.Path("child").write_text(str(pid))
os._exit(3)
