"""`python -P -m orch_workers SPEC_FILE`: runs an agent. SPEC_FILE holds a wire.AgentSpec as JSON and is 0600.

The socket listens, and the ready file says so, before the server's modules are loaded: whoever waits for the agent need
not wait for imports, connections do that. Exit codes: 0 after a shutdown, SIGTERM or a fence; 2 for a spec that cannot
be used.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec

from orch.wire import PROTOCOL, AgentSpec, decode
from orch_drive.crash import crash_point, once_in
from orch_workers import places
from orch_workers.records import ReadyFile, Records
from orch_workers.waiter import boot_id, die_with, proc_stat

log = logging.getLogger("orch_workers")

LOOK_EVERY = 2.0
"""Seconds between looks at the ready file."""
FAREWELL = 0.5
"""Seconds that a leaving agent waits for the flow to take what is not pushed yet."""


def main(argv: list[str]) -> int:
    logging.basicConfig(
        level=os.environ.get("ORCH_LOG_LEVEL", "INFO"), format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    try:
        spec = _read_spec(argv)
        if spec.launcher:
            die_with(spec.launcher)
        listeners = _listen(spec)
    except (OSError, ValueError) as error:
        log.critical("%s", error)
        return 2
    once_in(Path(spec.orch_dir, "run"))
    crash_point("agent.spec.read")
    port = listeners[0].getsockname()[1]
    records = Records(Path(spec.orch_dir, "run"), spec.agent)
    records.write_ready(_ready(spec, port))
    left = True
    try:
        left = asyncio.run(_serve(spec, listeners, port))
    finally:
        if not left:  # else the next incarnation needs the port, under which living scripts look for it
            records.remove_ready(spec.epoch)
    return 0


def _read_spec(argv: list[str]) -> AgentSpec:
    """Raises OSError, ValueError."""
    if len(argv) != 1:
        raise ValueError("usage: python -P -m orch_workers SPEC_FILE")
    path = Path(argv[0])
    if path.stat().st_mode & 0o077:
        raise ValueError(f"{path} holds a token and can be read by others: chmod 600 it")
    try:
        spec = decode(AgentSpec, path.read_bytes())
    except msgspec.MsgspecError as error:
        raise ValueError(f"{path} is no agent spec: {error}") from error
    if spec.protocol != PROTOCOL:
        raise ValueError(
            f"{path} is of protocol {spec.protocol}, this agent speaks {PROTOCOL}: use one version of orch"
        )
    return spec


def _listen(spec: AgentSpec) -> list[socket.socket]:
    """The port of the spec, which a former incarnation may have left a moment ago, or a free one; on the loopback too,
    where scripts find the agent. Raises OSError."""
    first = _listen_on(spec, spec.bind, spec.port or places.free_port((), spec.bind))
    if places.is_loopback(spec.bind) or spec.bind in ("0.0.0.0", ""):
        return [first]
    return [first, _listen_on(spec, "127.0.0.1", first.getsockname()[1])]


def _listen_on(spec: AgentSpec, address: str, port: int) -> socket.socket:
    # The protocol is named because asyncio turns Nagle's algorithm off only then: without it every answer in two pieces
    # waits 40 ms for the other side's delayed acknowledgement.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((address, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"agent {spec.agent} cannot listen on {address}:{port}: {error}") from error
    listener.listen(2048)
    return listener


def _ready(spec: AgentSpec, port: int) -> ReadyFile:
    host = places.address_of(spec.bind)
    stat = proc_stat(os.getpid())
    return ReadyFile(
        agent=spec.agent,
        epoch=spec.epoch,
        pid=os.getpid(),
        pid_start=stat.start if stat is not None else "",
        boot_id=boot_id(),
        url=f"http://{host}:{port}",
        port=port,
        token=spec.token,
    )


async def _serve(spec: AgentSpec, listeners: list[socket.socket], port: int) -> bool:
    """Until the agent leaves. Whether scripts of it live on."""
    import uvicorn

    from orch_workers.agent import Agent
    from orch_workers.routes import make_app

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield  # the agent's own handlers stay

    agent = Agent(spec, port)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, agent.leaving.set)
    loop.add_signal_handler(signal.SIGHUP, lambda: None)
    config = uvicorn.Config(
        make_app(agent),
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=1,
    )
    server = Server(config)
    # What is loaded now lives as long as the process: looking at it in every collection would be all that an idle agent
    # does.
    gc.collect()
    gc.freeze()
    async with agent.running():
        serving = asyncio.create_task(server.serve(listeners))
        leaving = asyncio.create_task(agent.leaving.wait())
        replaced = asyncio.create_task(_replaced(agent.records.ready_file))
        await asyncio.wait((serving, leaving, replaced), return_when=asyncio.FIRST_COMPLETED)
        await agent.flushed(FAREWELL)
        agent.close_links()
        server.should_exit = True
        leaving.cancel()
        replaced.cancel()
        await serving
    return not all(attempt.over.is_set() for attempt in agent.attempts.values())


async def _replaced(ready_file: Path) -> None:
    """Returns when the ready file is another agent's. A server that was killed as it started this agent has told nobody
    of it: the next server starts another one, which does not know of this one either."""
    while _written_by(ready_file) == os.getpid():  # noqa: ASYNC110  # it appears by rename: nothing portable tells
        await asyncio.sleep(LOOK_EVERY)
    log.warning("%s is not this agent's any more: another one has taken its place", ready_file)


def _written_by(ready_file: Path) -> int | None:
    try:
        return decode(ReadyFile, ready_file.read_bytes()).pid
    except FileNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
