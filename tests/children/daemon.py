"""Becomes a daemon as of old: fork, setsid, fork. Its pid is in the file `child`; the first process exits 0."""

import os
import pathlib
import signal

reader, writer = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 3)
        os.write(writer, str(os.getpid()).encode())
        while True:
            signal.pause()
    os._exit(0)
pathlib.Path("child").write_bytes(os.read(reader, 20))
