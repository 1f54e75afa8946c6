"""`python netns_serve.py NETNS=ADDRESS,NETNS=ADDRESS,... run APP OPTIONS`: an `orch run` that places its agent in
network namespaces, each incarnation in the next of them.

Such an agent is another machine's for the flow: its process cannot be looked at nor killed, and what it has written
down stays where it is.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path

import msgspec

import orch.cli
import orch.service
from orch.runtimes.base import Handle
from orch.runtimes.local import LocalRuntime
from orch.wire import AgentSpec


class NamespaceRuntime(LocalRuntime):
    name = "netns"
    shared_records = False

    def __init__(self, root: Path, hosts: list[tuple[str, str]]) -> None:
        super().__init__(root, root)
        self._root = root
        self._hosts = hosts
        self._netns = ""

    async def launch(self, spec: AgentSpec) -> Handle:
        self._netns, address = self._hosts.pop(0)
        disk = self._root / f".disk-{address}"
        self._run, self._logs = disk / "run", disk / "logs"
        for folder in (self._run, self._logs):
            folder.mkdir(parents=True)
        return await super().launch(msgspec.structs.replace(spec, bind=address, orch_dir=str(disk), port=0))

    def _command(self, spec_file: Path) -> list[str]:
        return ["ip", "netns", "exec", self._netns, *super()._command(spec_file)]

    async def poll(self, handle: Handle) -> str | None:
        return None

    async def kill(self, handle: Handle) -> None:
        return None


def main() -> int:
    places, *words = sys.argv[1:]
    hosts = [(name, address) for name, _, address in (place.partition("=") for place in places.split(","))]
    orch.service.serve = functools.partial(orch.service.serve, runtime=NamespaceRuntime(Path.cwd(), hosts))
    return orch.cli.main(words)


if __name__ == "__main__":
    sys.exit(main())
