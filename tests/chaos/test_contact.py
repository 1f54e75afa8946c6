"""Leases, the orphan guard and the fence: what a real agent, and a real waiter, do without the flow."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from fake_flow import FakeFlow, alive, flow_with_agent

from orch.wire import Ended, Started
from orch_workers.waiter import steady

LEASE = 1.2


@pytest.fixture
async def flow(tmp_path: Path) -> AsyncIterator[FakeFlow]:
    async with flow_with_agent(tmp_path / "app") as flow:
        yield flow


async def leased(flow: FakeFlow, work: str = "w", command: str = "sleep 60") -> int:
    """A running script with a lease: its pid."""
    await flow.place(work)
    await flow.start(work, command, lease=LEASE, lease_grace=0.5)
    started = await flow.until(lambda: flow.of(Started, work))
    return int(started[0].pid)


def contact(flow: FakeFlow) -> float:
    return float((flow.orch_dir / "run" / "processes" / "contact-local").read_text())


def exit_record(flow: FakeFlow, work: str = "w") -> dict[str, object] | None:
    path = flow.orch_dir / "run" / "processes" / f"1-{work}-1.1.exit.json"
    return json.loads(path.read_text()) if path.exists() else None


async def test_a_lease_holds_while_the_flow_answers_and_not_longer(flow: FakeFlow) -> None:
    pid = await leased(flow)
    begin = contact(flow)
    await flow.until(lambda: contact(flow) > begin + 2 * LEASE)
    assert alive(pid)
    flow.away = True  # whatever it asks the agent, it takes nothing
    last = contact(flow)
    while alive(pid):
        await flow.status()
        assert steady() < last + LEASE + 10
        await asyncio.sleep(0.02)
    flow.away = False
    ended = await flow.ended("w")
    assert (ended.reason, ended.cut, ended.signal) == ("lost", True, "SIGTERM")
    assert "lease" in ended.message
    assert len(flow.of(Ended)) == 1


@pytest.mark.parametrize("what", [signal.SIGSTOP, signal.SIGKILL])
async def test_a_lease_ends_the_script_of_an_agent_that_cannot(flow: FakeFlow, what: signal.Signals) -> None:
    pid = await leased(flow)
    patient = await leased_not(flow)
    assert flow.agent is not None
    agent = flow.agent.pid
    os.kill(agent, what)
    try:
        await flow.until(lambda: not alive(pid))
        record = await flow.until(lambda: exit_record(flow))
        assert record["cut"] and record["stopped"]
        assert alive(patient)
    finally:
        if what is signal.SIGSTOP:
            os.kill(agent, signal.SIGCONT)
    if what is signal.SIGKILL:
        await flow.agent.wait()
        flow.agent = None
        flow.epoch, flow.acked = 2, 0
        await flow.start_agent()
        await flow.attach()
    ended = await flow.ended("w")
    assert (ended.reason, ended.cut) == ("lost", True)
    assert alive(patient)


async def leased_not(flow: FakeFlow) -> int:
    await flow.place("patient")
    await flow.start("patient", "sleep 60")
    started = await flow.until(lambda: flow.of(Started, "patient"))
    return int(started[0].pid)


async def test_what_has_a_lease_is_started_in_contact_only(flow: FakeFlow) -> None:
    await flow.place("w")
    flow.away = True
    await flow.start("w", "touch it_ran", lease=LEASE, lease_grace=0.5)
    asked = len(flow.bodies)
    await flow.until(lambda: len(flow.bodies) > asked + 2)  # it asks for an answer
    assert not (flow.folder / "it_ran").exists()
    flow.away = False
    assert (await flow.ended("w")).reason is None
    assert (flow.folder / "it_ran").exists()


async def test_a_stop_ends_what_waits_for_contact(flow: FakeFlow) -> None:
    await flow.place("w")
    flow.away = True
    await flow.start("w", "touch it_ran", lease=LEASE, lease_grace=0.5)
    await flow.stop("w")
    flow.away = False
    assert (await flow.ended("w")).reason == "stopped"
    assert not (flow.folder / "it_ran").exists()


async def test_a_fenced_agent_without_a_successor_ends_its_scripts(flow: FakeFlow) -> None:
    pid = await leased_not(flow)
    assert flow.agent is not None
    flow.epoch = 2  # replaced, on another machine
    await flow.place("x")
    await flow.start("x", "true")
    assert await asyncio.wait_for(flow.agent.wait(), 10) == 0
    assert not alive(pid)
    record = json.loads((flow.orch_dir / "run" / "calls" / "1-patient-1.1.json").read_text())
    assert (record["ended"]["reason"], record["ended"]["cut"]) == ("lost", True)


async def test_a_new_attempt_never_runs_beside_one_that_was_given_up(flow: FakeFlow) -> None:
    pid = await leased_not(flow)
    await flow.start("patient", "sleep 60", attempt=2)
    started = await flow.until(lambda: [s for s in flow.of(Started, "patient") if s.attempt == 2])
    assert not alive(pid) and alive(started[0].pid)
    [ended] = flow.of(Ended, "patient")
    assert (ended.attempt, ended.reason) == (1, "lost")


async def test_the_orphan_guard_publishes_and_says_why(tmp_path: Path) -> None:
    async with flow_with_agent(tmp_path / "app", orphan_timeout=1.0) as flow:
        await flow.place("w")
        await flow.start("w", "echo half > out.txt; exec sleep 60", shell=True, outputs=["out.txt"], sync_interval=60)
        [started] = await flow.until(lambda: flow.of(Started))
        await flow.until(lambda: (flow.folder / "out.txt").exists())
        beats = flow.pushes
        await flow.until(lambda: flow.pushes > beats + 8)  # more than two seconds of contact
        assert alive(started.pid) and flow.agent is not None
        flow.away = True
        assert await asyncio.wait_for(flow.agent.wait(), 15) == 0
        assert not alive(started.pid)
        record = json.loads((flow.orch_dir / "run" / "calls" / "1-w-1.1.json").read_text())
        assert record["ended"]["reason"] == "lost" and "orphan guard" in record["ended"]["message"]
        assert list((flow.orch_dir / "drive").rglob("blobs/*"))
        flow.away, flow.epoch, flow.acked = False, 2, 0
        await flow.start_agent()
        await flow.attach()
        assert (await flow.ended("w")).cut
