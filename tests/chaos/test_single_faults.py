"""One message lost or late at the worst moment: what random lives (test_messages.py) have found, each by itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from simulated import AgentProcess, Message, ServerProcess, World, simulate, until

from orch import Dict, Flow, ScriptWork


class One(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.job = ScriptWork(
            "true", parallel=True, raise_exception=False, retries=1, retry_delay=1.0, vars={"log": []}
        )

    def run(self) -> None:
        self.job.run()


class Named(Flow):
    """Its work is there while `there` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.there = True
        self.named = Dict()

    def run(self) -> None:
        if self.there and "a" not in self.named:
            self.named["a"] = ScriptWork("true", parallel=True, raise_exception=False, grace=4.0, vars={"log": []})
        elif not self.there and "a" in self.named:
            del self.named["a"]
        if "a" in self.named:
            self.named["a"].run()


def nth(kind: str, number: int, fate: str) -> Callable[[Message], str]:
    """That fate for one message of a kind."""
    seen = 0

    def decide(message: Message) -> str:
        nonlocal seen
        seen += message.kind == kind
        return fate if message.kind == kind and seen == number else ""

    return decide


def seen(world: World, kind: str) -> int:
    """How many of them have been sent."""
    return sum(isinstance(entry[1], Message) and entry[1].kind == kind for entry in world.trace)


def stage(server: ServerProcess, work: str) -> Any:
    known = server.service.engine.works.get(work) if server.serves and server.service is not None else None
    return None if known is None or known.book.shown is None else known.book.shown.stage


async def press(server: ServerProcess, there: bool) -> None:
    ops = [{"op": "replace", "path": "/vars/there", "value": there}]
    await server.ask(lambda service: service.patch(ops, cause="ui"))


async def settled(world: World, server: ServerProcess, work: str) -> AgentProcess:
    """The work is on the living agent, with the vars that the tree has, and its call runs."""
    service = server.service
    assert service is not None

    def there() -> AgentProcess | None:
        process, known = world.agent(), service.engine.works.get(work)
        if process is None or process.agent is None or known is None or stage(server, work) != "running":
            return None
        placed, vars = process.agent.works.get(work), service.engine.tree.get(known.spec.pointer)["vars"]
        same = placed is not None and placed.fresh.is_set() and placed.live.view() == vars and not placed.live.pending
        return process if same else None

    process = await until(there)
    assert isinstance(process, AgentProcess)
    return process


def test_one_lost_attach_ends_no_app(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.network.decide = nth("attach", 1, "mute")
        server = ServerProcess(world)
        await until(lambda: server.serves)
        await settled(world, server, "job")

    simulate(tmp_path / "app", life, flow=One)


def test_nor_does_a_network_that_is_away_for_long(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: server.serves)
        await settled(world, server, "job")
        server.kill()
        world.network.decide = lambda message: "mute" if message.kind == "attach" else ""
        server = ServerProcess(world)
        await asyncio.sleep(300.0)
        world.network.decide = lambda message: ""
        await settled(world, server, "job")
        assert [script.lives for script in world.scripts()] == [True]

    simulate(tmp_path / "app", life, flow=One)


def test_an_agent_hears_of_what_is_written_while_it_is_attached(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: stage(server, "job") == "succeeded")
        await asyncio.sleep(1.0)  # until that is journalled
        server.kill()
        world.network.decide = nth("attach", 1, "slow answer")
        attaches = seen(world, "attach")
        server = ServerProcess(world)
        await until(lambda: seen(world, "attach") > attaches)
        ops = [{"op": "add", "path": "/works/job/vars/log/-", "value": "late"}]
        await server.ask(lambda service: service.patch(ops, cause="ui"))
        agent = world.agents[0].agent
        assert agent is not None
        await until(lambda: agent.works["job"].live.view() == {"log": ["late"]})

    simulate(tmp_path / "app", life, flow=One, seconds=0.5)


def test_an_agent_is_not_called_stale_before_the_new_server_knows_it(tmp_path: Path) -> None:
    """It would end its scripts."""

    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: server.serves)
        await settled(world, server, "job")
        server.kill()
        world.network.decide = nth("status", 1, "mute")  # it takes its time
        server = ServerProcess(world)
        await until(lambda: len(world.agents) == 2)
        await settled(world, server, "job")
        assert [script.lives for script in world.scripts()] == [True]

    simulate(tmp_path / "app", life, flow=One, writes=0.2)


def test_a_retry_that_is_due_before_its_agent_is_there_does_not_keep_the_server_busy(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: stage(server, "job") == "pending" and any(script.exit for script in world.scripts()))
        server.kill()
        world.agents[0].party.kill()
        world.network.decide = nth("attach", 1, "mute")
        server = ServerProcess(world)
        await until(lambda: stage(server, "job") == "failed")  # (endless work in one moment is an error)
        assert len(list(world.scripts())) == 2

    simulate(tmp_path / "app", life, flow=One, seconds=0.5, code=1)


def test_what_is_left_of_a_removed_work_does_not_write_to_the_one_that_has_its_name_now(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: server.serves)
        await settled(world, server, "named.a")
        await press(server, False)
        await press(server, True)
        first = next(world.scripts())
        assert first.lives
        await until(lambda: len(list(world.scripts())) == 2)
        assert not first.lives and [fate for _, fate in first.writes if fate.startswith("refused 401")]
        await asyncio.sleep(1.0)
        await settled(world, server, "named.a")
        assert server.service is not None
        log = server.service.engine.tree.get("/structures/named/works/a/vars/log")
        assert log and {call for call, _, _ in log} == {"1-named.a-2"}

    simulate(tmp_path / "app", life, flow=Named, hears=None, writes=0.3)


def test_a_work_that_comes_back_while_its_agent_is_attached_is_placed_anew(tmp_path: Path) -> None:
    """What the agent has of that name is the predecessor's, and the order to forget that one may still come."""

    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: server.serves)
        process = await settled(world, server, "named.a")
        attaches: list[Message] = []

        def decide(message: Message) -> str:
            if message.kind == "attach":
                attaches.append(message)
            return "slow answer" if message.kind == "attach" else ""

        world.network.decide = decide
        await press(server, False)
        process.party.kill()  # (before it has heard of that)
        await until(lambda: attaches)
        await press(server, True)
        await settled(world, server, "named.a")
        assert {script.call for script in world.scripts() if script.lives} == {"1-named.a-2"}

    simulate(tmp_path / "app", life, flow=Named)
