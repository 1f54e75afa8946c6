"""Stands for an agent: starts one script in the cwd, says so in the file `started`, and then does nothing.

Arguments: the script. Killed with SIGKILL it must not take the script along.
"""

import asyncio
import os
import pathlib
import sys

from orch_workers.process import ProcessSpec, Spawner


async def main() -> None:
    here = pathlib.Path.cwd()
    spawner = Spawner(here / "run")
    spec = ProcessSpec("1-orphan-1.1", [sys.executable, sys.argv[1]], str(here), dict(os.environ), str(here / "log"))
    await spawner.start(spec)
    (here / "started").touch()
    await asyncio.Event().wait()


asyncio.run(main())
