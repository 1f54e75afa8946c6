"""Starts a program in a session of its own, writes its pid to the file `child`; with "stay" lives on, else exits 0."""

import pathlib
import signal
import subprocess
import sys

child = subprocess.Popen(["sleep", "600"], start_new_session=True)
pathlib.Path("child").write_text(str(child.pid))
while sys.argv[1:] == ["stay"]:
    signal.pause()
