"""Each message between flow and agent, sent twice and again after newer ones: it takes effect once, and is answered as
before. The cases are made from the routes and from the kinds of items: a new one without a case fails here."""

from __future__ import annotations

import asyncio
import typing
from pathlib import Path
from typing import Any

import pytest
from simulated import AgentProcess, Endpoint, ServerProcess, World, call, simulate, until

from orch import Flow, ScriptWork
from orch.events import Pushed, StopCalls
from orch.testing import AppTester
from orch.wire import (
    AgentSpec,
    Attach,
    Diff,
    Ended,
    Forget,
    Item,
    Place,
    Progress,
    Published,
    Push,
    PushReply,
    Ready,
    Shutdown,
    StartCall,
    Started,
    StartReply,
    StopCall,
    VarOps,
    WorkVars,
    decode,
    encode,
)
from orch_workers.messages import Batch, Changes

Message = tuple[str, Any]
"""Route, body."""
FLOW = "http://127.0.0.1:7501"
SETTLED = 2.0
"""Virtual seconds after which a message has had its effect."""


class One(Flow):
    """A script that runs for ever, and has something to append to."""

    def __init__(self) -> None:
        super().__init__()
        self.job = ScriptWork(
            "true", parallel=True, raise_exception=False, retries=1, retry_delay=100.0, vars={"log": []}
        )

    def run(self) -> None:
        self.job.run()


# ---- the agent -------------------------------------------------------------------------------------------------------


def place(work: str, rev: int, **vars: Any) -> Message:
    return "/v1/place", [Place(work=work, token=work, rev=rev, vars=vars or {"x": 0})]


def start(call: str, attempt: int = 1) -> Message:
    return "/v1/start", [StartCall(work="w", call=call, attempt=attempt, kind="script", command="true", lease=60.0)]


def stop(call: str) -> Message:
    return "/v1/stop", [StopCall(work="w", call=call, attempt=1, grace=5.0)]


def state(rev: int, value: int) -> Message:
    return "/v1/state", [Diff(work="w", rev=rev, ops=[{"op": "replace", "path": "/x", "value": value}])]


def attach(number: int, rev: int, flow: str = FLOW) -> Message:
    works = {"w": WorkVars(rev=rev, vars={"x": rev})}
    return "/v1/attach", Attach(flow_url=flow, epoch=1, number=number, works=works)


def live(*numbers: int) -> Message:
    batches = [Batch(n=n, ops=[{"op": "replace", "path": "/x", "value": n}]) for n in numbers]
    return "/live/w", Changes(session="s", batches=batches)


PLACED = [attach(1, 0), place("w", 1)]
RUNNING = [*PLACED, start("1-w-1")]
CASES: dict[str, tuple[list[Message], Message, list[Message]]] = {
    # route: what comes before, the message, what comes between it and its late copy
    "/v1/attach": (RUNNING, attach(2, 5), [state(6, 6), attach(3, 7, FLOW + "0")]),
    "/v1/place": ([attach(1, 0)], place("w", 1), [state(2, 2), start("1-w-1")]),
    "/v1/start": (PLACED, start("1-w-1"), [stop("1-w-1"), start("1-w-2")]),
    "/v1/stop": (RUNNING, stop("1-w-1"), [start("1-w-2")]),
    "/v1/forget": (RUNNING, ("/v1/forget", [Forget(work="w", rev=5)]), [place("w", 5), start("1-w-2")]),
    "/v1/state": (RUNNING, state(2, 2), [state(3, 3)]),
    "/v1/shutdown": (RUNNING, ("/v1/shutdown", Shutdown()), []),
    "/live/{name}": (RUNNING, live(1), [live(2)]),
}
SAID = {"/report/{name}"}
"""What a script says of itself, over the loopback: the last one counts."""


class Lone:
    """A real agent, and a flow that acknowledges whatever it pushes."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.flow = world.party("flow", world.machines[0])
        spec = AgentSpec(
            agent="local", epoch=1, token="t", flow_url=FLOW, app_dir=str(world.folder), app_id="a", app_name="a",
            orch_dir=str(world.machines[0].folder), run=1,
        )  # fmt: skip
        self.process = AgentProcess(world, world.machines[0], spec, self.flow)
        for url in (FLOW, FLOW + "0"):
            world.network.listen(url.removeprefix("http://"), Endpoint(self.flow, self._take))

    async def _take(self, scope: Any, receive: Any, send: Any) -> None:
        push = decode(Push, (await receive())["body"])
        body = encode(PushReply(acked=push.seq + len(push.items) - 1))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def send(self, message: Message) -> tuple[int, bytes]:
        route, body = message
        handle = await asyncio.shield(self.process.ready)
        endpoint = self.world.network.endpoints[handle["url"].removeprefix("http://")]
        token = "t" if route.startswith("/v1") else "w"
        answer = await endpoint.party.task(call(endpoint.app, "POST", route, encode(body), token))
        await asyncio.sleep(SETTLED)
        assert isinstance(answer, tuple)
        return answer

    def picture(self) -> Any:
        """All that a message could change."""
        agent = self.process.agent
        assert agent is not None
        works = {w.name: (w.live.view(), w.live.rev, w.place, w.received, w.session) for w in agent.works.values()}
        scripts = [(script.key, script.begin, script.stopped, script.exit) for script in self.world.scripts()]
        return agent.status(), works, scripts, agent._outbox.flow_url, sorted(agent.attempts)


def test_every_route_of_the_agent_has_a_case(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        lone = Lone(world)
        handle = await asyncio.shield(lone.process.ready)
        routes = world.network.endpoints[handle["url"].removeprefix("http://")].app.routes
        assert {route.path for route in routes if "POST" in (route.methods or ())} == CASES.keys() | SAID

    simulate(tmp_path / "app", life)


@pytest.mark.parametrize("route", CASES)
def test_a_message_to_the_agent_takes_effect_once(route: str, tmp_path: Path) -> None:
    before, message, newer = CASES[route]

    async def life(world: World) -> None:
        lone = Lone(world)
        for earlier in before:
            assert (await lone.send(earlier))[0] == 200
        untouched = lone.picture()
        answer = await lone.send(message)
        once = lone.picture()
        assert answer[0] == 200
        assert once != untouched, "the case says nothing"
        assert await lone.send(message) == answer
        assert lone.picture() == once
        for later in newer:
            assert (await lone.send(later))[0] == 200
        now = lone.picture()
        if newer:
            assert now != once
            assert (await lone.send(message))[0] == 200
            assert lone.picture() == now

    simulate(tmp_path / "app", life, hears=8.0 if route == "/v1/shutdown" else 0.5)


def test_a_start_that_was_under_way_for_long_displaces_no_newer_one(tmp_path: Path) -> None:
    """(An agent that adopts knows nothing of an attempt that its predecessor had accepted and not started.)"""

    async def life(world: World) -> None:
        lone = Lone(world)
        for message in [*PLACED, start("1-w-2")]:
            await lone.send(message)
        now = lone.picture()
        status, body = await lone.send(start("1-w-1"))
        [reply] = decode(list[StartReply], body)
        assert (status, reply.accepted) == (200, False) and "1-w-2.1" in reply.error
        assert lone.picture() == now

    simulate(tmp_path / "app", life)


def test_a_work_that_has_come_back_under_its_name_is_another_one(tmp_path: Path) -> None:
    async def life(world: World) -> None:
        lone = Lone(world)
        for message in RUNNING:
            await lone.send(message)
        agent = lone.process.agent
        assert agent is not None
        work = agent.works["w"]
        # The agent has not heard that the first one was removed; the attach says that the flow counts on this one.
        await lone.send(attach(2, 5))
        await lone.send(("/v1/forget", [Forget(work="w", rev=5)]))
        assert agent.works["w"] is work
        again = Place(work="w", token="another", rev=8, vars={"x": 8})
        await lone.send(("/v1/place", [again]))
        assert (work.live.view(), work.place) == ({"x": 8}, again)
        await lone.send(("/v1/place", [Place(work="w", token="old", rev=3, vars={"x": 3})]))
        assert (work.live.view(), work.place) == ({"x": 8}, again)

    simulate(tmp_path / "app", life)


# ---- the flow --------------------------------------------------------------------------------------------------------

CALL = "1-job-1"
ABOUT: dict[str, Any] = {"work": "job", "call": CALL, "attempt": 1}
MANIFEST = {
    "drive": "app", "component": "job", "path": "out", "version": 1, "serial": 1, "is_dir": False, "epoch": 1,
    "entries": [{"name": "out", "size": 1, "sha256": "0" * 64}], "partial": False, "at": 1.0,
}  # fmt: skip
APPEND = VarOps(work="job", call=CALL, ops=[{"op": "add", "path": "/log/-", "value": 1}])
ITEMS: dict[type, list[Any]] = {
    VarOps: [APPEND, VarOps(work="job", call=CALL, ops=[{"op": "replace", "path": "/nothing", "value": 1}])],
    Started: [Started(**ABOUT, pid=1, at=1.0)],
    Ready: [Ready(**ABOUT, at=1.0)],
    Ended: [Ended(**ABOUT, at=1.0), Ended(**ABOUT, at=1.0, reason="exit_code", exit_code=3)],
    Progress: [Progress(work="job", call=CALL, progress=0.5, metrics={"loss": 1.0})],
    Published: [Published(work="job", drive="app", manifest=MANIFEST, call=CALL)],
}


def test_every_kind_of_item_has_a_case() -> None:
    assert set(typing.get_args(Item)) == ITEMS.keys()


@pytest.mark.parametrize("item", [item for items in ITEMS.values() for item in items], ids=lambda i: type(i).__name__)
def test_a_push_takes_effect_once(item: Any, tmp_path: Path) -> None:
    async def life(world: World) -> None:
        server = ServerProcess(world)
        await until(lambda: any(world.scripts()))
        service = server.service
        assert service is not None
        engine = service.engine
        known = engine.agents["local"]
        await until(lambda: engine.works["job"].book.shown.stage == "running")
        world.agents[0].party.hold()  # from here on it is played
        await asyncio.sleep(1.0)
        token = service.agent_token("local")
        assert token is not None

        async def push(message: Push) -> tuple[int, bytes]:
            endpoint = world.network.endpoints["127.0.0.1:7501"]
            answer = await endpoint.party.task(call(endpoint.app, "POST", "/agents/v1/push", encode(message), token))
            await asyncio.sleep(0.5)
            assert isinstance(answer, tuple)
            return answer

        def picture() -> Any:
            return encode(engine.tree.root), engine.tree.rev, known.acked, engine.passes

        untouched = picture()
        message = Push(agent="local", epoch=known.epoch, seq=known.acked + 1, items=[item])
        answer = await push(message)
        once = picture()
        assert answer[0] == 200 and once != untouched
        assert await push(message) == answer
        assert picture() == once
        more = Push(agent="local", epoch=known.epoch, seq=known.acked + 1, items=[APPEND])
        assert (await push(more))[0] == 200
        now = picture()
        assert now != once
        assert await push(message) == await push(message)
        assert picture() == now
        stale = Push(agent="local", epoch=known.epoch - 1, seq=known.acked + 1, items=[APPEND])
        assert (await push(stale))[0] == 409
        assert picture() == now
        world.agents[0].party.release()

    simulate(tmp_path / "app", life, flow=One)


def test_a_script_that_was_given_up_while_its_start_was_under_way_is_stopped() -> None:
    tester = AppTester(One())
    tester.until(lambda: tester.fake("job").starts)
    tester.settle()
    late = Started(work="job", call=CALL, attempt=7, pid=1, at=1.0)
    known = tester.engine.agents["local"]
    push = Push(agent="local", epoch=known.epoch, seq=known.acked + 1, items=[late])
    stops = [i for i in tester.engine.handle(Pushed(push=push), tester.now) if isinstance(i, StopCalls)]
    assert [(stop.call, stop.attempt, stop.reason) for stop in stops[0].calls] == [(CALL, 7, "lost")]


def test_an_attempt_whose_end_is_known_does_not_begin_again() -> None:
    """(A new incarnation of the agent tells everything that it finds in its predecessor's records.)"""
    tester = AppTester(One())
    fake = tester.fake("job")
    fake.run_for, fake.exit_code = 1.0, 1
    tester.until(lambda: fake.starts and fake.current is None)
    tester.settle()
    known = tester.engine.agents["local"]
    again = [Started(**ABOUT, pid=1, at=1.0), Ready(**ABOUT, at=1.0), Ended(**ABOUT, at=1.0)]
    push = Push(agent="local", epoch=known.epoch, seq=known.acked + 1, items=again)
    tester.engine.handle(Pushed(push=push), tester.now)
    work = tester.engine.works["job"]
    assert work.book.shown is not None
    assert (work.book.shown.stage, work.book.shown.exit_code, work.ready) == ("pending", 1, False)
