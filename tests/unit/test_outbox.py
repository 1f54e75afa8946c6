"""The agent's outbox against a flow that is slow, away, forgetful or newer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orch.wire import Ended, Item, ItemResult, Progress, Push, PushReply, VarOps, decode, encode
from orch_workers.outbox import MAX_ITEMS, Outbox


class Flow:
    """Answers pushes through a hook; a plain HTTP server, one request a connection."""

    def __init__(self) -> None:
        self.bodies: list[Push] = []
        self.answer: Callable[[Push], tuple[int, bytes]] = self.accept
        self.gate = asyncio.Event()
        self.gate.set()

    def accept(self, push: Push) -> tuple[int, bytes]:
        return 200, encode(PushReply(acked=push.seq + len(push.items) - 1))

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while header := await reader.readuntil(b"\r\n\r\n"):
                lines = dict(line.split(": ", 1) for line in header.decode().split("\r\n")[1:] if ": " in line)
                push = decode(Push, await reader.readexactly(int(lines["Content-Length"])))
                await self.gate.wait()
                self.bodies.append(push)
                status, body = self.answer(push)
                if status == 0:
                    return
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except asyncio.IncompleteReadError:
            return
        finally:
            writer.close()

    @property
    def items(self) -> list[Item]:
        return [item for push in self.bodies for item in push.items]


@asynccontextmanager
async def outbox(flow: Flow, **hooks: Any) -> AsyncIterator[Outbox]:
    server = await asyncio.start_server(flow.serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    callbacks: dict[str, Callable[..., None]] = {
        "on_result": lambda result: None, "on_acked": lambda acked: None,
        "on_fenced": lambda: None, "on_contact": lambda at: None,
    }  # fmt: skip
    box = Outbox("a", 1, "t", url, **{**callbacks, **hooks})
    task = asyncio.create_task(box.run())
    try:
        yield box
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        box.close()
        server.close()
        await server.wait_closed()
        await asyncio.sleep(0.05)


def ops(n: int) -> VarOps:
    return VarOps(work="w", ops=[{"op": "replace", "path": "/n", "value": n}])


async def test_order_and_coalescing() -> None:
    flow = Flow()
    async with outbox(flow) as box:
        flow.gate.clear()
        assert box.add(ops(0)) == 1
        await asyncio.sleep(0.1)  # on its way
        for n in range(1, 1200):
            box.add(ops(n))
        flow.gate.set()
        assert await box.flushed(5)
        assert [item.ops[0]["value"] for item in flow.items if isinstance(item, VarOps)] == list(range(1200))
        assert [len(push.items) for push in flow.bodies] == [1, MAX_ITEMS, MAX_ITEMS, 199]
        assert [push.seq for push in flow.bodies] == [1, 2, 502, 1002]


async def test_an_item_says_what_was_true_when_it_was_added() -> None:
    flow = Flow()
    async with outbox(flow) as box:
        value = {"rows": [1]}
        box.add(VarOps(work="w", ops=[{"op": "replace", "path": "/d", "value": value}]))
        value["rows"].append(2)
        assert await box.flushed(5)
        [item] = flow.items
        assert isinstance(item, VarOps) and item.ops[0]["value"] == {"rows": [1]}


async def test_progress_that_was_not_sent_is_replaced() -> None:
    flow = Flow()
    async with outbox(flow) as box:
        flow.gate.clear()
        box.add(Progress(work="w", call="c", progress=0.1))
        await asyncio.sleep(0.1)
        box.add(Progress(work="w", call="c", progress=0.2, metrics={"loss": 2}, moving="1 of 2 GiB"))
        box.add(Progress(work="w", call="d", progress=0.5))
        box.add(Progress(work="w", call="c", metrics={"acc": 1}))
        box.add(Ended(work="w", call="c", attempt=1, at=0))
        box.add(Progress(work="w", call="c", progress=0.0))
        flow.gate.set()
        assert await box.flushed(5)
        found = [item for item in flow.items if isinstance(item, Progress)]
        told = [(item.call, item.progress, item.metrics) for item in found]
        assert told == [("c", 0.1, {}), ("c", 0.2, {"loss": 2, "acc": 1}), ("d", 0.5, {}), ("c", 0.0, {})]
        assert [item.moving for item in found] == [None, "1 of 2 GiB", None, None]


@pytest.mark.parametrize("failure", [(0, b""), (503, b""), (200, b"nonsense")])
async def test_resent_with_the_same_numbers(failure: tuple[int, bytes]) -> None:
    flow = Flow()
    failures = 3

    def answer(push: Push) -> tuple[int, bytes]:
        nonlocal failures
        failures -= 1
        return failure if failures >= 0 else flow.accept(push)

    flow.answer = answer
    async with outbox(flow) as box:
        box.add(ops(1))
        box.add(ops(2))
        assert await box.flushed(5)
        assert all(push.seq == 1 for push in flow.bodies) and len(flow.bodies) >= 3
        assert box.acked == 2


async def test_results_are_told_and_partly_acknowledged_goes_on() -> None:
    flow, results, acked = Flow(), [], []
    flow.answer = lambda push: (
        200,
        encode(PushReply(acked=push.seq, results=[ItemResult(seq=push.seq, rev=7, error="no", status=409)])),
    )
    async with outbox(flow, on_result=results.append, on_acked=acked.append) as box:
        for n in range(3):
            box.add(ops(n))
        assert await box.flushed(5)
    assert [result.seq for result in results] == acked == [1, 2, 3] and results[0].error == "no"


async def test_fenced() -> None:
    flow, fenced = Flow(), asyncio.Event()
    flow.answer = lambda push: (409, b"")
    async with outbox(flow, on_fenced=fenced.set) as box:
        box.add(ops(1))
        await asyncio.wait_for(fenced.wait(), 5)
        box.add(ops(2))
        assert not await box.flushed(0.2)
        assert len(flow.bodies) == 1


async def test_attach_tells_what_is_known_and_where_to_go() -> None:
    first, second = Flow(), Flow()
    first.answer = lambda push: (503, b"")
    async with outbox(first) as box, outbox(second) as other:
        box.add(ops(1))
        box.add(ops(2))
        await asyncio.sleep(0.2)
        box.attached(other.flow_url, 1)
        assert await box.flushed(5)
        assert [(push.seq, len(push.items)) for push in second.bodies] == [(2, 1)]
