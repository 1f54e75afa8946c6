"""Random lives of an app whose messages between flow and agent are lost, doubled, delayed and overtaken, whose server
and agents are killed, and whose clocks run at different speeds; in virtual time, each from one seed.

    ORCH_TEST_SEEDS=2000     so many seeds instead of the usual ones
    ORCH_TEST_SEED=1234      only this one, which always lives the same life
    ORCH_TEST_TRACE=file     where to write what is said in it (without it: beside the failing test)
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
from collections import defaultdict
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from simulated import KINDS, AgentProcess, Behaviour, Faults, Machine, Script, ServerProcess, World, simulation

from orch import CloudCompute, Dict, Flow, List, ScriptWork, ServiceWork
from orch.errors import OrchError
from orch.journal import Journal
from orch.service import Service

SEEDS = int(os.environ.get("ORCH_TEST_SEEDS", "150"))
ONLY = os.environ.get("ORCH_TEST_SEED")
GROUPS = 15
STORM = 60.0
"""Virtual seconds in which anything may happen."""
REST = 400.0
"""Virtual seconds after which everything is in order again."""
SLACK = 20.0
"""Virtual seconds after which what was due has been done."""
DONE = ("succeeded", "failed", "stopped")


class Lab(Flow):
    """Asks its works for what its variables say."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = 0
        self.want = 0
        self.click = False
        self.clicks = 0
        self.stop_some = False
        self.rows: list[Any] = []
        some: dict[str, Any] = {"raise_exception": False, "grace": 3.0}
        vars: dict[str, Any] = {"knob": 0, "log": []}
        self.jobs = List()
        self.named = Dict()
        soon = CloudCompute(idle_timeout=2.0)
        self.cached = ScriptWork(
            "true", parallel=True, retries=1, retry_delay=3.0, vars=vars, cloud_compute=soon, **some
        )
        self.uncached = ScriptWork("true", parallel=True, cache_calls=False, vars=vars, cloud_compute=soon, **some)
        self.replacing = ScriptWork("true", parallel=True, when_busy="replace", vars=vars, **some)
        self.blocking = ScriptWork("true", cache_calls=False, timeout=8.0, **some)
        pair = CloudCompute(count=2, idle_timeout=2.0)
        self.pair = ScriptWork(
            "true", parallel=True, retries=1, on_lost="fail", lost_after=30.0, cloud_compute=pair, **some
        )
        self.service = ServiceWork("true", grace=3.0, lost_after=30.0)
        self.leased = ScriptWork("true", parallel=True, on_lost="restart", lost_after=20.0, vars=vars, **some)
        self.failing = ScriptWork("true", parallel=True, on_lost="fail", lost_after=25.0, retries=1, vars=vars, **some)

    def run(self) -> None:
        while len(self.jobs) < self.want:
            self.jobs.append(ScriptWork("true", parallel=True, raise_exception=False, vars={"knob": 0, "log": []}))
        while len(self.jobs) > self.want:
            self.jobs.pop(0)
        for job in self.jobs:
            job.run(str(self.mode))
        if "a" in self.named and self.want == 0:
            del self.named["a"]
        elif "a" not in self.named and self.want > 1:
            self.named["a"] = ScriptWork("true", parallel=True, raise_exception=False, vars={"knob": 0, "log": []})
        if "a" in self.named:
            self.named["a"].run(str(self.mode))
        for work in (self.cached, self.replacing, self.leased):
            work.knob = self.mode
        if self.stop_some:
            self.stop_some = False
            self.cached.stop()
            self.replacing.stop()
        else:
            self.cached.run(str(self.mode))
            self.cached.run("always")
            self.replacing.run(str(self.mode))
        self.service.run(str(self.mode % 2))
        self.leased.run(str(self.mode))
        self.failing.run(str(self.mode))
        self.pair.run(str(self.mode % 3))
        if self.click:  # (asked in every pass, what is not cached would never come to rest)
            self.uncached.run("clicked")
            self.blocking.run()
            self.clicks += 1
            self.click = False


FIXED = ["cached", "uncached", "replacing", "blocking", "service", "leased", "failing", "pair"]


class Life:
    """One seed."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.seed = seed
        self.random = random.Random(f"life {seed}")
        self.folder = folder
        self.server: ServerProcess | None = None
        self.starts: dict[tuple[str, int], Script] = {}
        self.drift = self.random.random() < 0.5
        self.shared = self.random.random() < 0.75
        self.own_places = seed % 3 == 2
        """Each work's agent has a place of its own; else one agent serves all: always on the same machine, or not."""
        self.shared |= self.own_places
        self.acked: dict[int, list[int]] = defaultdict(list)
        self.maybe: set[tuple[int, int]] = set()
        self.quiet = False
        self.crashed: list[Machine] = []
        self.unknown: dict[str, float] = {}
        self.agents_replaced = False

    # -- the world
    def rate(self) -> float:
        return self.random.uniform(0.91, 1.1) if self.drift else 1.0

    def behave(self, script: Script) -> Behaviour:
        chance = random.Random(f"{self.seed} {script.key}")
        service = script.work == "service"
        seconds = chance.choice([0.0, 0.3, 1.0, 4.0, 12.0, 30.0]) if not service else chance.choice([5.0, 1e9, 1e9])
        return Behaviour(
            seconds=seconds,
            code=chance.choice([0, 0, 1]),
            writes=None
            if service or script.work in ("blocking", "pair", "pair~1")
            else chance.choice([None, seconds / 10 + 0.05, 3.0]),
            hears=chance.choice([0.0, 0.0, 1.0, None]),
            lingers=chance.choice([0.0, 0.0, 0.5]),
            listens=chance.choice([0.1, 3.0]) if service else None,
        )

    def started(self, script: Script) -> None:
        key = (script.call, script.attempt)
        if key in self.starts:
            self.world.fail(f"{script.key} was started twice")
        self.starts[key] = script
        for other in self.world.scripts():
            elsewhere = script.work == "named.a" and other.machine is not script.machine  # another work of that name
            if other.work == script.work and other.lives and not elsewhere:
                self.world.fail(f"{script.key} was started while {other.key} lives on {other.machine.name}")

    # -- what happens
    async def storm(self) -> None:
        world, chance = self.world, self.random
        level = chance.choice([0.0, 0.05, 0.15, 0.4])
        faults = Faults({kind: level for kind in KINDS}, slowest=chance.choice([1.0, 6.0, 14.0]))
        for kind in KINDS:
            if chance.random() < 0.15:
                faults.share[kind] = 0.7
        world.network.faults = faults
        world.note(f"shared {self.shared} own places {self.own_places} drift {self.drift} faults {faults}")
        self.server = ServerProcess(world)
        hands = [
            asyncio.ensure_future(hand)
            for hand in (self.users(0), self.users(1), self.kills(), self.cuts(), self.pauses())
        ]
        await asyncio.sleep(STORM)
        for hand in hands:
            hand.cancel()
        await asyncio.gather(*hands, return_exceptions=True)
        for hand in hands:
            if not hand.cancelled() and hand.exception() is not None:
                raise hand.exception()  # type: ignore[misc]
        world.note("the storm is over")
        world.network.good()
        for party in world.loop.parties:
            if not party.ended:
                party.release()
        if self.server.party.ended:
            self.server = ServerProcess(world)

    async def users(self, who: int) -> None:
        """Clicks, appends and REST."""
        chance = random.Random(f"user {who} {self.seed}")
        number = 0
        while True:
            await asyncio.sleep(chance.expovariate(0.7))
            what = chance.choice(["mode", "mode", "want", "click", "stop_some", "row", "row", "row", "rest", "rest"])
            try:
                if what in ("mode", "want"):
                    await self.patch("replace", what, chance.randrange(4))
                elif what in ("click", "stop_some"):
                    await self.patch("replace", what, True)
                elif what == "row":
                    number += 1
                    try:
                        await self.patch("add", "rows/-", [who, number])
                    except (ConnectionResetError, asyncio.CancelledError):
                        self.maybe.add((who, number))
                        raise
                    else:
                        self.acked[who].append(number)
                else:
                    name = chance.choice([*FIXED, "jobs.0", "jobs.1", "named.a"])
                    await self.rest(name, chance.choice(["stop", "restart", "run"]))
            except (ConnectionError, OrchError) as error:
                self.world.note(f"user: {what}: {error!r}")

    async def patch(self, op: str, name: str, value: Any) -> None:
        ops = [{"op": op, "path": f"/vars/{name}", "value": value}]
        self.world.note(f"user: {op} {name} {value}")
        assert self.server is not None
        await self.server.ask(lambda service: service.patch(ops, cause="ui"))

    async def rest(self, name: str, what: str) -> None:
        self.world.note(f"user: {what} {name}")
        asked: dict[str, Callable[[Service], Awaitable[Any]]] = {
            "stop": lambda service: service.stop_work(name),
            "restart": lambda service: service.restart_work(name),
            "run": lambda service: service.run_work(name, ["extra"], {}),
        }
        assert self.server is not None
        await self.server.ask(asked[what])

    async def kills(self) -> None:
        """Of the server and, where its records can be found again, of the agent."""
        chance = random.Random(f"kills {self.seed}")
        pace = chance.choice([0.0, 0.02, 0.1])
        while pace:
            await asyncio.sleep(chance.expovariate(pace))
            assert self.server is not None
            which = chance.choice(["server", "server", "agent", "both"])
            if which != "server" and self.shared and (agent := self.some_agent(chance)) is not None:
                if agent.spec.bound and chance.random() < 0.4:
                    self.crashed.append(agent.machine)
                    next(place for place in self.world.places if place.machine is agent.machine).end()
                else:
                    self.world.note(f"kill {agent.party.name}")
                    agent.party.kill()
            if which == "agent":
                continue
            self.server.kill()
            await asyncio.sleep(chance.choice([0.0, 0.5, 5.0, 25.0]))
            self.world.port_taken = chance.random() < 0.2
            self.server = ServerProcess(self.world)

    def some_agent(self, chance: random.Random) -> AgentProcess | None:
        living = self.world.living()
        return chance.choice(living) if living and self.own_places else self.world.agent()

    async def cuts(self) -> None:
        chance = random.Random(f"cuts {self.seed}")
        pace = chance.choice([0.0, 0.03, 0.1])
        while pace:
            await asyncio.sleep(chance.expovariate(pace))
            seconds = chance.choice([0.5, 3.0, 11.0, 30.0])
            machines = self.world.machines
            if self.own_places:  # (what they share is the server's machine)
                machines = [place.machine for place in self.world.places if place.lives and chance.random() < 0.7]
            for machine in machines:
                for up in chance.choice([(True,), (False,), (True, False)]):
                    self.world.network.cut(machine, up, seconds)

    async def pauses(self) -> None:
        """SIGSTOP, and CONT later."""
        chance = random.Random(f"pauses {self.seed}")
        pace = chance.choice([0.0, 0.0, 0.05])
        while pace:
            await asyncio.sleep(chance.expovariate(pace))
            agent = self.some_agent(chance)
            party = agent.party if agent is not None and chance.random() < 0.7 else self.server and self.server.party
            if not party or party.ended:
                continue
            self.world.note(f"hold {party.name}")
            party.hold()
            await asyncio.sleep(chance.choice([0.5, 4.0, 15.0, 40.0]))
            if not party.ended:
                self.world.note(f"release {party.name}")
                party.release()

    # -- what must be true afterwards
    async def rest_comes(self) -> None:
        """Left alone, everything comes in order within REST seconds."""
        deadline = self.world.loop.now + REST
        while problem := self.disorder():
            if self.world.loop.now > deadline:
                self.world.fail(f"it does not come to rest: {problem}")
                return
            self.leases_are_kept()
            if self.world.failures:
                return
            await asyncio.sleep(1.0)

    def leases_are_kept(self) -> None:
        """With on_lost="restart" or "fail" nothing is unknown for longer than its lost_after."""
        assert self.server is not None
        works = self.server.service.engine._all() if self.server.serves and self.server.service is not None else []
        unknown: dict[str, float] = {}
        for work in works:
            call = work.book.calls[work.book.current] if work.book.current is not None else None
            if call is not None and call.stage == "unknown" and work.spec.on_lost != "wait":
                since = unknown[call.id] = self.unknown.get(call.id, self.world.loop.now)
                if self.world.loop.now > since + work.spec.lost_after + SLACK:
                    self.world.fail(f"{call} has been unknown since {since:.0f}")
        self.unknown = unknown

    def disorder(self) -> str:
        server = self.server
        assert server is not None
        if server.party.ended:
            return "the server is gone"
        if not server.serves:
            return "the server is not there yet"
        service = server.service
        assert service is not None
        engine = service.engine
        if engine.stage != "running":
            return f"the app is {engine.stage}"
        if engine._passing or engine._deferred or not service._inbox.empty():
            return "the flow is busy"
        newest = {process.spec.agent: process for process in self.world.living()}
        for name, agent in engine.agents.items():
            process = newest.get(name)
            if name == "local" or agent.up:
                if process is None or process.agent is None:
                    return f"agent {name} is not there yet"
                if process.spec.epoch != agent.epoch:
                    return f"agent {name} is an old one"
                if process.agent._outbox.acked != process.agent._outbox.seq:
                    return f"the outbox of {name} is not empty"
                there = {work.spec.name for work in engine._all() if work.agent == name}
                if set(process.agent.works) - there:
                    return f"{set(process.agent.works) - there} are still on the agent {name}"
            elif agent.launching or agent.expected:
                return f"agent {name} is being launched or found"
        for work in engine._all():
            name, call = work.spec.name, work.book.shown
            if (work.book.queue or work.book.current is not None) and not self.stays(name, work):
                return f"{name} is at {call}, and {work.book.queue} wait"
            if work.release_at is not None:
                return f"the place of {name} is to be given back"
            if not work.placed:
                continue
            process = newest.get(work.agent)
            if process is None or process.agent is None or name not in process.agent.works:
                return f"{name} is not on its agent"
            if work.main is not None:
                continue
            live = process.agent.works[name].live
            vars = engine.tree.get(work.spec.pointer)["vars"]
            if live.view() != vars:
                return f"vars of {name}: {live.view()} on the agent, {vars} in the tree"
            if live.pending:
                return f"{name}: {live.pending} wait for their echo"
        for place in self.world.places:
            known = engine.agents.get(place.agent)
            if known is None and not place.told:
                continue  # its server was killed before it could know of it: it ends by itself, much later
            if place.lives and (known is None or not known.up or place.epoch != known.epoch):
                return f"the place of {place.agent}, {place.machine.name}, is still there"
        wanted = {work.book.current for work in engine._all()}
        for script in self.world.scripts():
            if script.lives and script.call not in wanted and not self.abandoned(script):
                return f"{script.key} lives, and nobody wants it"
        return ""

    def stays(self, name: str, work: Any) -> bool:
        """A service that runs, or a call whose machine is lost for good."""
        if work.book.current is None:
            return False
        call = work.book.calls[work.book.current]
        if not self.shared and call.stage == "unknown" and "replaced" in call.message:
            return True
        return name == "service" and call.stage == "running" and work.ready and not work.book.queue

    def abandoned(self, script: Script) -> bool:
        """On a machine whose agent was replaced by one elsewhere."""
        return not self.shared and script.machine is not self.world.machines[-1]

    async def check(self) -> None:
        assert self.server is not None and self.server.service is not None
        service = self.server.service
        engine = service.engine
        await self.server.ask(lambda service: service.journalled())
        flow = service.program.node()
        tree = msgspec.json.decode(msgspec.json.encode(engine.tree.root))
        self.same_vars(flow, tree, "")
        self.check_rows(tree["vars"]["rows"])
        for name, work in engine.works.items():
            self.check_log(name, engine.tree.get(work.spec.pointer)["vars"].get("log", []))
            for call in work.book.calls.values():
                self.check_call(name, call, work.spec.on_lost)
        self.check_history(tree)

    def same_vars(self, flow: Any, tree: Any, at: str) -> None:
        if isinstance(flow, dict):
            for name, value in flow.items():
                if name == "vars" and value != tree[name]:
                    self.world.fail(f"the flow has {at}/vars {value}, the tree {tree[name]}")
                elif name in tree and name not in ("vars", "status", "calls"):
                    self.same_vars(value, tree[name], f"{at}/{name}")

    def check_rows(self, rows: list[Any]) -> None:
        """What was acknowledged is there once, in its order; what was not, at most once."""
        for who, acked in self.acked.items():
            mine = [number for of, number in rows if of == who]
            if mine != sorted(set(mine)):
                self.world.fail(f"rows of user {who} are doubled or out of order: {mine}")
            if missing := set(acked) - set(mine):
                self.world.fail(f"acknowledged rows {missing} of user {who} are lost")
            if strange := {number for number in mine if (who, number) not in self.maybe} - set(acked):
                self.world.fail(f"rows {strange} of user {who} were refused, and are there")

    def check_log(self, name: str, log: list[Any]) -> None:
        """The same of what the scripts append; those of an older attempt never come behind those of a newer one."""
        order = [(int(call.rsplit("-", 1)[1]), attempt, number) for call, attempt, number in log]
        if order != sorted(set(order)):
            self.world.fail(f"the log of {name} is doubled or out of order: {log}")
        present = {(call, attempt, number) for call, attempt, number in log}
        for script in self.world.scripts():
            if script.work == name and name != "named.a":
                for number, fate in script.writes:
                    if fate == "ok" and (script.call, script.attempt, number) not in present:
                        self.world.fail(f"write {number} of {script.key} was acknowledged and is lost")

    def check_call(self, name: str, call: Any, on_lost: str) -> None:
        """What is told of a call is what its script did."""
        script = self.starts.get((call.id, call.attempt))
        if name == "pair" and call.stage != "succeeded":
            return  # what its other machine's script has done is told of it too
        if call.stage == "succeeded" and (script is None or script.exit is None or script.exit.exit_code != 0):
            self.world.fail(f"{call} succeeded, its script ended with {script and script.exit}")
        if call.reason == "exit_code" and (
            script is None or script.exit is None or script.exit.exit_code != call.exit_code
        ):
            self.world.fail(f"{call} has another exit code than its script: {script and script.exit}")
        if call.reason in ("exception", "signal"):
            self.world.fail(f"{call}: {call.message}")
        gone = self.own_places and (script is None or script.machine in self.crashed)
        if call.reason == "lost" and on_lost == "wait" and self.shared and not gone:
            self.world.fail(f"{call} is called lost, its script ended with {script and script.exit}")
        if call.restarts and on_lost != "restart":
            self.world.fail(f"{call} was started again")

    def check_history(self, tree: Any) -> None:
        """Revisions follow each other without a gap and lead to the tree; no attempt ends twice."""
        db = sqlite3.connect(self.folder / ".orch" / "state.db")
        run = db.execute("SELECT max(run) FROM runs").fetchone()[0]
        db.close()
        journal = Journal.open(self.folder / ".orch" / "state.db", readonly=True)
        revisions = journal.revisions(run, 0, 1_000_000)
        journal.close()
        numbers = [revision.rev for revision in revisions]
        # (The first ones may be in the oldest snapshot.)
        if numbers != list(range(numbers[0], self.rev() + 1)):
            self.world.fail(f"revisions are missing or doubled: {numbers}, the tree is at {self.rev()}")
        ends: dict[tuple[str, int], list[str]] = defaultdict(list)
        for revision in revisions:
            for op in revision.ops:
                parts = op["path"].split("/")
                if len(parts) > 2 and parts[-2] == "calls" and op["op"] == "add":
                    call = op["value"]
                    told = ends[call["id"], call["attempt"]]
                    over = call["stage"] in DONE or (call["stage"] == "pending" and call["finished_at"] is not None)
                    if over and (not told or told[-1] != call["stage"]):
                        told.append(call["stage"])
        for (call_id, attempt), stages in ends.items():
            # A retry that waits may still be stopped.
            if len(stages) > 1 and stages != ["pending", "stopped"]:
                self.world.fail(f"{call_id} attempt {attempt} has ended {stages}")

    def rev(self) -> int:
        assert self.server is not None and self.server.service is not None
        return self.server.service.engine.tree.rev

    async def stop(self) -> None:
        """The app ends, and with it everything."""
        assert self.server is not None
        await self.server.ask(lambda service: service.stop_app(""))
        await asyncio.wait([self.server.task], timeout=60.0)
        if not self.server.task.done():
            self.world.fail("the server does not end")
        elif self.server.code != 0:
            self.world.fail(f"the server ends with {self.server.code}")
        for script in self.world.scripts():
            if script.lives and not self.abandoned(script):
                self.world.fail(f"{script.key} has survived the app")

    async def live(self) -> None:
        await self.storm()
        await self.rest_comes()
        if not self.world.failures:
            await self.check()
            await self.stop()

    def run(self) -> list[str]:
        """The failures."""
        with simulation(self.seed, limit=STORM + REST + 200.0) as loop:
            world = self.world = World(
                loop, self.folder, self.seed, shared=self.shared, own_places=self.own_places, rate=self.rate,
                make_flow=Lab, behave=self.behave, started=self.started,
            )  # fmt: skip
            try:
                loop.run_until_complete(self.live())
            except Exception as error:
                world.fail(repr(error), error)
            world.over = True
            return world.failures


@pytest.mark.parametrize("group", range(1 if ONLY else GROUPS))
def test_whatever_becomes_of_messages(group: int, tmp_path: Path) -> None:
    seeds = [int(ONLY)] if ONLY else range(group, SEEDS, GROUPS)
    for seed in seeds:
        life = Life(seed, tmp_path / f"seed{seed}")
        failures = life.run()
        if failures or (ONLY and os.environ.get("ORCH_TEST_TRACE")):
            trace = Path(os.environ.get("ORCH_TEST_TRACE") or tmp_path / f"trace-{seed}.txt")
            trace.write_text("\n".join(life.world.lines()))
            if not failures:
                continue
            pytest.fail(
                f"seed {seed} (ORCH_TEST_SEED={seed} repeats it, the messages are in {trace}):\n"
                + "\n".join(failures[:3])[:4000],
                pytrace=False,
            )


def test_a_seed_always_lives_the_same_life(tmp_path: Path) -> None:
    def lines(again: int) -> list[str]:
        life = Life(3, tmp_path / f"life{again}")
        life.run()
        return life.world.lines()

    assert lines(0) == lines(1)
