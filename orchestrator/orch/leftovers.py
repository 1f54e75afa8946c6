"""End everything that an app has left on this machine, and check that nothing remains: `orch down`, and a new run.

The server first (it stops its works gracefully), then agents that outlived a server, then scripts that outlived
their agent.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import signal
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from orch.errors import OrchError
from orch.paths import AppFolder, FolderLock
from orch.processes import Proc, boot_id, descendants, find, group_members, send, wait_gone

__all__ = ["clear_logs", "clear_records", "end_agents", "end_scripts", "take_down"]

KILL_WAIT = 5.0
"""Seconds until a killed process must be gone."""
ROUNDS = 3
"""A script may start a process while it is being ended: look again, that many times at most."""


def take_down(folder: AppFolder, say: Callable[[str], None], *, timeout: float = 60.0, grace: float = 10.0) -> None:
    """Blocks until all is gone; `say` gets one line for each thing that was ended.

    timeout: seconds for the server, and for each agent, to end by itself. Scripts that nobody watches any more get the
    grace of their Work between TERM and KILL; `grace`, in seconds, where no record tells it. Raises OrchError naming
    what could not be ended.
    """
    if not folder.exists:
        say(f"nothing to end: no app has been run in {folder.root}")
        return
    ended = _end_server(folder, say, timeout)
    with _hold(folder):
        ended += end_places(folder, say)
        ended += end_agents(folder, say, timeout=timeout)
        for _ in range(ROUNDS):
            ended += end_scripts(folder, say, grace=grace)
            left = _left(folder)
            if not left:
                break
    if left:
        raise OrchError(f"could not be ended: {', '.join(left)}", hint="look at them with `ps`")
    say("nothing was running" if not ended else "all ended")


def _left(folder: AppFolder) -> list[str]:
    return [
        *(f"agent {path.stem}" for path, record in folder.agent_records() if _agent(record)),
        *(f"script {path.name.removesuffix('.run.json')}" for path, record in folder.run_records() if _script(record)),
    ]


def end_places(folder: AppFolder, say: Callable[[str], None]) -> int:
    """Give back what the app has on a Ray cluster: agents and scripts end with their places. How many there were.
    Raises OrchError if the cluster cannot be reached."""
    addresses = {str(record.get("address") or "auto") for _, record in folder.place_records()}
    return sum(asyncio.run(_sweep(folder, address, say)) for address in addresses)


async def _sweep(folder: AppFolder, address: str, say: Callable[[str], None]) -> int:
    from orch.runtimes.ray import RayRuntime

    runtime = RayRuntime(address, folder.run, folder.logs, folder.root, app_id=folder.app_id())
    try:
        lines = await runtime.sweep()
    finally:
        runtime.close()
    for line in lines:
        say(line)
    return len(lines)


def end_agents(folder: AppFolder, say: Callable[[str], None], *, timeout: float = 60.0) -> int:
    """Ask every agent found in `.orch/run` to stop its scripts and exit; kill one that does not. How many there
    were."""
    return sum(_end_agent(path.stem, record, say, timeout) for path, record in folder.agent_records())


def end_scripts(folder: AppFolder, say: Callable[[str], None], *, grace: float = 10.0) -> int:
    """End scripts that nobody watches any more, group and all, at the same time. How many there were."""
    found = [(path.name.removesuffix(".run.json"), record) for path, record in folder.run_records()]
    if not found:
        return 0
    with ThreadPoolExecutor(min(len(found), 64), thread_name_prefix="orch-end") as pool:
        ended = pool.map(lambda each: _end_script(each[0], each[1], say, _grace(folder, each[0], grace)), found)
        return sum(list(ended))


def _grace(folder: AppFolder, key: str, default: float) -> float:
    """Of the attempt's Work, as its agent wrote it down."""
    start = (folder.call_record(key) or {}).get("start")
    grace = start.get("grace") if isinstance(start, dict) else None
    return float(grace) if isinstance(grace, int | float) else default


def clear_records(folder: AppFolder) -> None:
    """Forget what agents wrote down: for a new run, once nothing of the old one lives."""
    for name in ("calls", "processes"):
        shutil.rmtree(folder.run / name, ignore_errors=True)
    for path in folder.run.glob("agent-*"):
        path.unlink(missing_ok=True)


def clear_logs(folder: AppFolder, before: int) -> None:
    """Remove the logs of runs with a number below `before`: nothing else is known of them any more."""
    for path in folder.logs.glob("*/*.log"):
        run = path.name.partition("-")[0]
        if run.isdigit() and int(run) < before:
            path.unlink(missing_ok=True)


def _hold(folder: AppFolder) -> FolderLock:
    """Nobody may start a server here meanwhile."""
    return folder.lock(timeout=KILL_WAIT)


def _end_server(folder: AppFolder, say: Callable[[str], None], timeout: float) -> int:
    pid = folder.server_pid()
    server = find(pid)
    if server is None or not folder.serving():
        return 0
    name = f"server (pid {pid})"
    send(server, signal.SIGTERM)
    send(server, signal.SIGCONT)  # a process that is held by SIGSTOP would not see its TERM
    if wait_gone([server], timeout):
        send(server, signal.SIGKILL)
        if wait_gone([server], KILL_WAIT):
            raise OrchError(f"the {name} could not be ended", hint="is it stopped, or in uninterruptible sleep?")
        say(f"{name}: killed, it had not ended within {timeout:.0f} s")
    else:
        say(f"{name}: stopped")
    return 1


def _agent(record: dict[str, Any]) -> Proc | None:
    return find(record.get("pid"), record.get("pid_start"), record.get("boot_id"))


def _end_agent(name: str, record: dict[str, Any], say: Callable[[str], None], timeout: float) -> int:
    agent = _agent(record)
    if agent is None:
        return 0
    # Its scripts are not its children (they outlive it); the records of their waiters are looked at afterwards.
    line = f"{name} (pid {agent.pid})"
    send(agent, signal.SIGCONT)
    problem = _ask_to_shut_down(record, timeout)
    if not problem:
        if not wait_gone([agent], timeout):
            say(f"{line}: shut down")
            return 1
        problem = f"did not end within {timeout:.0f} s"
    send(agent, signal.SIGKILL)
    wait_gone([agent], KILL_WAIT)
    say(f"{line}: killed ({problem})")
    return 1


def _ask_to_shut_down(record: dict[str, Any], timeout: float) -> str:
    """Why it would not; empty if it does."""
    url = record.get("url") or f"http://127.0.0.1:{record.get('port')}"
    request = urllib.request.Request(
        f"{url}/v1/shutdown",
        data=json.dumps({"kill": False}).encode(),
        headers={"Authorization": f"Bearer {record.get('token')}", "Content-Type": "application/json"},
        method="POST",
    )
    # No proxy of the environment: an agent is asked directly.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=timeout):
            return ""
    except urllib.error.HTTPError as error:
        return f"it answered {error.code}"
    except OSError as error:
        return f"it does not answer: {getattr(error, 'reason', error)}"


def _script(record: dict[str, Any]) -> list[Proc]:
    """What lives of a waiter and its script, the script's descendants included, waiter last."""
    boot = record.get("boot_id")
    script = find(record.get("pid"), record.get("pid_start"), boot)
    waiter = find(record.get("waiter_pid"), record.get("waiter_start"), boot)
    found = [] if script is None else [script, *descendants(script)]
    if waiter is not None:
        found += [proc for proc in descendants(waiter) if proc not in found]
        found.append(waiter)
    if not boot or boot == boot_id():
        found = [*(proc for proc in group_members(record.get("pgid"), "ORCH_CALL") if proc not in found), *found]
    return found


def _end_script(name: str, record: dict[str, Any], say: Callable[[str], None], grace: float) -> int:
    procs = _script(record)
    if not procs:
        return 0
    waiter = find(record.get("waiter_pid"), record.get("waiter_start"), record.get("boot_id"))
    scripts = [proc for proc in procs if proc != waiter]
    for proc in scripts:
        send(proc, signal.SIGTERM)
    for proc in procs:
        send(proc, signal.SIGCONT)
    left = wait_gone(scripts, grace)
    how = "stopped"
    if left:
        how = f"killed, it had not ended within {grace:.0f} s"
        # Children appear while their parents are being killed: look again until none is left.
        deadline = time.monotonic() + KILL_WAIT
        while left and time.monotonic() < deadline:
            for proc in left:
                send(proc, signal.SIGKILL)
            wait_gone(left, KILL_WAIT)
            left = [proc for proc in _script(record) if proc != waiter]
    if waiter is not None and wait_gone([waiter], KILL_WAIT):
        # It writes the exit record and ends by itself; one that does not is of no use any more.
        send(waiter, signal.SIGKILL)
        wait_gone([waiter], KILL_WAIT)
    say(f"script {name} (pid {record.get('pid')}): {how}")
    return 1
