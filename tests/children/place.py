"""Stands for the place that an engine has given to an agent: starts the agent of the spec (argument), which may not
outlive it, and another one whenever the file `again` appears there."""

import json
import os
import pathlib
import subprocess
import sys
import time

path = pathlib.Path(sys.argv[1])
again = path.with_name("again")
while True:
    spec = json.loads(path.read_bytes())
    path.write_text(json.dumps({**spec, "launcher": os.getpid(), "bound": True}))
    agent = subprocess.Popen([sys.executable, "-P", "-m", "orch_workers", str(path)], start_new_session=True)
    agent.wait()
    while not again.exists():
        time.sleep(0.01)
    again.unlink()
