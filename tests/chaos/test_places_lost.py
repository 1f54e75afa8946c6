"""Works with places of their own, in virtual time: what random lives (test_messages.py) and hostile reading have found,
each by itself."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from simulated import Behaviour, Script, ServerProcess, SimPlace, World, simulate, until

from orch import CloudCompute, Dict, Flow, ScriptWork
from orch.calls import Call


class Named(Flow):
    """Its works are there while `there` is set, and are asked for what `mode` says."""

    def __init__(self) -> None:
        super().__init__()
        self.there = True
        self.mode = 0
        self.named = Dict()
        some: dict[str, Any] = {"parallel": True, "raise_exception": False, "grace": 3.0, "lost_after": 30.0}
        self.waits = ScriptWork("true", **some)
        self.leased = ScriptWork("true", on_lost="restart", **some)

    def run(self) -> None:
        if self.there and "a" not in self.named:
            self.named["a"] = ScriptWork("true", parallel=True, raise_exception=False, grace=4.0)
        elif not self.there and "a" in self.named:
            del self.named["a"]
        if "a" in self.named:
            self.named["a"].run()
        if self.mode:
            self.waits.run(self.mode)
            self.leased.run(self.mode)


class Pair(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.pair = ScriptWork(
            "true", parallel=True, raise_exception=False, retries=1, retry_delay=1.0, grace=5.0,
            cloud_compute=CloudCompute(count=2, idle_timeout=1.0),
        )  # fmt: skip

    def run(self) -> None:
        self.pair.run()


class Nobody(Flow):
    def __init__(self) -> None:
        super().__init__()
        self.there = False


async def write(server: ServerProcess, name: str, value: Any) -> None:
    ops = [{"op": "replace", "path": f"/vars/{name}", "value": value}]
    await server.ask(lambda service: service.patch(ops, cause="ui"))


async def serving(world: World) -> ServerProcess:
    server = ServerProcess(world)
    await until(lambda: server.serves)
    return server


def shown(server: ServerProcess, work: str) -> Call | None:
    assert server.service is not None
    known = server.service.engine.works.get(work)
    return None if known is None else known.book.shown


async def at(server: ServerProcess, work: str, stage: str, seconds: float = 60.0) -> Call:
    def there() -> bool:
        call = shown(server, work)
        return call is not None and call.stage == stage

    await until(there, seconds)
    call = shown(server, work)
    assert call is not None
    return call


def places(world: World, agent: str) -> list[SimPlace]:
    return [place for place in world.places if place.agent == agent and place.lives]


def place(world: World, agent: str) -> SimPlace:
    (found,) = places(world, agent)
    return found


def test_a_work_that_is_removed_does_not_wait_for_its_place_any_more(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.full = True
        server = await serving(world)
        await until(lambda: "named.a" in world.epochs)
        first = world.epochs["named.a"]
        await write(server, "there", False)
        await asyncio.sleep(1.0)
        world.full = False
        await asyncio.sleep(5.0)
        assert not world.places, "nobody wants it any more"
        await write(server, "there", True)
        await at(server, "named.a", "running")
        assert world.epochs["named.a"] > first

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_nor_does_one_that_comes_back_take_what_its_predecessor_has_asked_for(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.full = True
        server = await serving(world)
        await until(lambda: "named.a" in world.epochs)
        await write(server, "there", False)
        await write(server, "there", True)
        world.full = False
        await at(server, "named.a", "running")
        await asyncio.sleep(20.0)
        assert (await at(server, "named.a", "running")).id == "1-named.a-2"
        assert place(world, "named.a").epoch == world.epochs["named.a"]

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_the_place_of_a_removed_work_ends_though_its_agent_cannot_be_attached(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.network.decide = lambda message: "lost" if message.kind == "attach" else ""
        server = await serving(world)
        await until(lambda: places(world, "named.a"))
        await asyncio.sleep(15.0)
        launched = world.epochs["named.a"]
        await write(server, "there", False)
        await until(lambda: not places(world, "named.a"))
        await asyncio.sleep(30.0)
        assert world.epochs["named.a"] == launched

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_the_place_of_a_removed_work_ends_though_the_server_is_killed(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = await serving(world)
        await at(server, "named.a", "running")
        await write(server, "there", False)
        await asyncio.sleep(0.5)
        assert places(world, "named.a"), "its script has its grace"
        server.kill()
        server = await serving(world)
        await until(lambda: not places(world, "named.a"))
        assert server.service is not None and not server.service.engine.released
        await write(server, "there", True)
        await at(server, "named.a", "running")

    simulate(tmp_path / "app", life, flow=Named, own_places=True, hears=None)


def test_a_place_that_is_out_of_reach_when_it_is_to_end_is_ended_later(tmp_path: Path) -> None:
    """Its agent is dead: nobody is there who could hear that it is refused."""

    async def life(world: World) -> None:
        world.frees = 0.0
        server = await serving(world)
        await at(server, "named.a", "running")
        old = place(world, "named.a")
        for up in (True, False):
            world.network.cut(old.machine, up, 60.0)
        old.process.party.kill()
        await write(server, "there", False)
        await asyncio.sleep(50.0)
        assert old.lives
        await until(lambda: not old.lives)
        assert server.service is not None
        await until(lambda: not server.service.engine.released)

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_a_work_that_comes_back_is_not_given_the_place_of_its_predecessor(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = await serving(world)
        await at(server, "named.a", "running")
        former = place(world, "named.a")
        world.full = True
        await write(server, "there", False)
        await write(server, "there", True)
        server.kill()
        world.full = False
        server = await serving(world)
        assert (await at(server, "named.a", "running")).id == "1-named.a-2"
        assert not former.lives and place(world, "named.a").epoch > former.epoch

    simulate(tmp_path / "app", life, flow=Named, own_places=True, hears=None)


def test_the_place_of_a_work_that_the_app_declares_no_longer_ends(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = await serving(world)
        await write(server, "mode", 1)
        await at(server, "waits", "running")
        server.kill()
        world.make_flow = Nobody
        server = await serving(world)
        await until(lambda: not places(world, "waits"))
        assert server.service is not None and "waits" not in server.service.engine.agents

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_an_agent_that_died_where_nobody_can_look_is_no_running_script(tmp_path: Path) -> None:
    """The link is cut while another one is being started: the wait call is unknown, the leased one is done again."""

    async def life(world: World) -> None:
        world.frees = 1.0
        server = await serving(world)
        await write(server, "mode", 1)
        for name in ("waits", "leased"):
            await at(server, name, "running")
            old = place(world, name)
            epoch = old.epoch
            old.process.party.kill()
            await until(lambda name=name, epoch=epoch: world.epochs[name] > epoch)
            for up in (True, False):
                world.network.cut(old.machine, up, 100.0)
        await at(server, "waits", "unknown", 20.0)
        await at(server, "leased", "running", 70.0)
        assert shown(server, "leased").attempt == 2  # type: ignore[union-attr]
        await at(server, "waits", "running", 120.0)
        assert shown(server, "waits").attempt == 1  # type: ignore[union-attr]

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_a_place_that_is_out_of_reach_and_holds_nothing_is_left(tmp_path: Path) -> None:
    """A machine that was switched off looks like that for ever."""

    async def life(world: World) -> None:
        world.frees = 1.0
        server = await serving(world)
        await write(server, "mode", 1)
        await at(server, "waits", "succeeded")
        old = place(world, "waits")
        for up in (True, False):
            world.network.cut(old.machine, up, 1e6)
        await asyncio.sleep(20.0)
        server.kill()
        server = await serving(world)
        await write(server, "mode", 2)
        await until(
            lambda: [script.exit for script in world.scripts() if script.call == "1-waits-2"] not in ([], [None])
        )
        assert (await at(server, "waits", "succeeded")).id == "1-waits-2"
        world.network.good()
        await until(lambda: not old.lives, 100.0)

    simulate(tmp_path / "app", life, flow=Named, own_places=True, seconds=0.5)


def test_a_place_that_ends_while_its_next_agent_starts_is_lost_though_no_other_can_be_had(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = await serving(world)
        await write(server, "mode", 1)
        await at(server, "waits", "running")
        world.none_fits = True
        old = place(world, "waits")
        epoch = old.epoch
        old.process.party.kill()
        await until(lambda: world.epochs["waits"] > epoch)
        old.end()
        assert (await at(server, "waits", "failed")).reason == "lost"
        await write(server, "mode", 2)
        failed = await at(server, "waits", "failed")
        await until(lambda: shown(server, "waits").id != failed.id)
        assert (await at(server, "waits", "failed")).reason == "infeasible"

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def test_an_attempt_that_was_never_started_is_started_by_the_next_agent_in_the_place(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = await serving(world)
        await write(server, "mode", 1)
        world.network.decide = lambda message: "lost" if message.kind == "start" else ""
        await until(lambda: any(m is not None and m.kind == "start" for _, m, _ in world.trace))
        process = place(world, "waits").process
        assert process is not None
        await until(lambda: server.service.engine.works["waits"].live)  # type: ignore[union-attr]
        process.party.kill()
        world.network.decide = lambda message: ""
        assert (await at(server, "waits", "running")).attempt == 1

    simulate(tmp_path / "app", life, flow=Named, own_places=True)


def stubborn(script: Script) -> Behaviour:
    """The first machine's script fails, the other's does not hear that it is to end."""
    if script.work == "pair":
        return Behaviour(seconds=2.0, code=1)
    return Behaviour(seconds=1e9, hears=None)


def test_a_retry_on_several_machines_waits_for_the_slowest_end(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.behave = stubborn
        server = await serving(world)
        assert (await at(server, "pair", "failed")).attempt == 2  # (endless work in one moment is an error)
        starts = [(script.work, script.begin) for script in world.scripts()]
        assert [work for work, _ in sorted(starts, key=lambda start: start[1])][2:] in (
            ["pair", "pair~1"],
            ["pair~1", "pair"],
        )
        assert max(at for _, at in starts) - min(at for _, at in starts) > 7.0
        await until(lambda: not any(place.lives for place in world.places))

    simulate(tmp_path / "app", life, flow=Pair, own_places=True)


def test_the_places_of_several_machines_are_given_back_when_their_scripts_have_ended(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        world.behave = stubborn
        server = await serving(world)
        await at(server, "pair", "running")
        await server.ask(lambda service: service.stop_work("pair"))
        await at(server, "pair", "stopped")
        await until(lambda: not any(place.lives for place in world.places))
        assert server.service is not None
        (part,) = server.service.engine.parts.values()
        assert part.book.shown is not None and part.book.shown.stage == "stopped" and not part.live
        assert all(script.exit is not None for script in world.scripts())

    simulate(tmp_path / "app", life, flow=Pair, own_places=True)
